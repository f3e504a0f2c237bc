//! What happens to a running VM without anyone asking for it.

/// Why a VM wants to be reset.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ResetCause {
    /// The guest wrote to the ACPI reset register.
    AcpiReset,
    /// The guest pulsed the reset line of the keyboard controller.
    KeyboardController,
    /// A vCPU met a triple fault: what a PC answers with a reset.
    TripleFault,
}

/// An event of a machine. After each, the vCPUs do not run on until the machine is reset.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MachineEvent {
    /// The guest switched itself off (ACPI S5).
    Shutdown,
    /// The guest asked for a reset; [`Machine::reset`](super::Machine::reset) does it.
    Reset(ResetCause),
    /// The VM cannot run on.
    Crashed {
        /// What happened, with the vCPU and where it was.
        reason: String,
    },
    /// The deadline of the [`WriteGate`](crate::gate::WriteGate) has passed: the VM may be running
    /// elsewhere, and this process must end.
    DeadlinePassed,
}
