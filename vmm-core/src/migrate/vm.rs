//! What live migration asks of a VM. The machine implements these; nothing here knows KVM.

use std::error::Error;

use super::DirtyPages;
use crate::memory::GuestMemory;

/// An error of the machine, carried as the cause of a migration error.
pub type VmError = Box<dyn Error + Send + Sync>;

/// A VM that can be moved away while it runs.
///
/// The methods are called by one thread at a time, in this order: `start_dirty_tracking`,
/// `take_dirty` as often as there are rounds, `flush_disks` between them, `pause`, `save_state`, `take_dirty`; then either nothing
/// more (committed), or `stop_dirty_tracking` and, if it was paused, `resume`.
pub trait MigrationVm: Send + Sync {
    /// The guest's memory. Its regions do not change while a migration runs.
    fn memory(&self) -> &GuestMemory;

    /// Begins to record writes. A write that happens after this returns is in a later
    /// [`take_dirty`](Self::take_dirty); what was recorded before may be forgotten.
    ///
    /// # Errors
    /// Whatever the machine met; the migration then fails and the VM runs on.
    fn start_dirty_tracking(&self) -> Result<(), VmError>;

    /// The pages written since tracking started or since this was last called: the guest's (KVM's log)
    /// merged with the VMM's own ([`DirtyPages::take_vmm_writes`]). Both are cleared.
    ///
    /// # Errors
    /// Whatever the machine met; the migration then fails and the VM runs on.
    fn take_dirty(&self) -> Result<DirtyPages, VmError>;

    /// Ends the recording; a second call does nothing.
    ///
    /// # Errors
    /// Whatever the machine met; it is logged, the VM runs on.
    fn stop_dirty_tracking(&self) -> Result<(), VmError>;

    /// Makes what the guest wrote to its disks durable while it runs on, so that [`pause`](Self::pause),
    /// which does so too, has little left to wait for.
    ///
    /// # Errors
    /// Whatever the machine met; the migration then fails and the VM runs on.
    fn flush_disks(&self) -> Result<(), VmError>;

    /// Stops the vCPUs and the devices. When it returns, nothing writes guest memory any more: I/O in
    /// flight is finished or dropped back into its queue.
    ///
    /// # Errors
    /// Whatever the machine met; `resume` is called then as well, so a pause that stopped half-way
    /// must be resumable.
    fn pause(&self) -> Result<(), VmError>;

    /// Lets vCPUs and devices run on from where they were paused.
    ///
    /// # Errors
    /// Whatever the machine met; the VM stands still then, and the migration error says so.
    fn resume(&self) -> Result<(), VmError>;

    /// The whole state except memory, as [`crate::state::write_sections`] makes it. The VM is paused.
    ///
    /// # Errors
    /// Whatever the machine met; the VM is resumed then.
    fn save_state(&self) -> Result<Vec<u8>, VmError>;
}

/// A VM that was built to receive another: same layout, vCPUs not running, nothing loaded into
/// its memory that must survive (whatever is there is overwritten).
pub trait IncomingVm: Send {
    /// The memory to fill.
    fn memory(&self) -> &GuestMemory;

    /// Takes over the state that [`MigrationVm::save_state`] wrote, after all memory has arrived.
    /// Nothing runs yet.
    ///
    /// # Errors
    /// Whatever is wrong with the state; this VM is thrown away then.
    fn restore_state(&mut self, state: &[u8]) -> Result<(), VmError>;
}
