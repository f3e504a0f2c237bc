//! Running, pausing, resetting, saving and restoring.

use std::sync::MutexGuard;
use std::sync::atomic::Ordering;

use serde::{Deserialize, Serialize};

use super::build::lock;
use super::chips::ChipState;
use super::{Machine, MachineError, RunState};
use crate::state::{Section, find_section, read_sections, write_sections};
use crate::vcpu::VcpuState;

const SECTION_SHAPE: u16 = 0x0001;
const SECTION_CHIPS: u16 = 0x0010;
const SECTION_VCPU: u16 = 0x0020;
const VERSION: u16 = 1;

/// What must be the same on both sides of a state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Shape {
    vcpus: u8,
    memory_bytes: u64,
}

impl Machine {
    /// Lets the machine run: from its beginning, or from where it was paused. Devices come first,
    /// so that what was in flight is interrupted for; a guest's clock is told that it stood still.
    ///
    /// # Errors
    /// [`MachineError::WrongState`] if an event has halted it, [`MachineError::Pci`] if a device
    /// cannot run.
    pub fn resume(&self) -> Result<(), MachineError> {
        let mut state = lock(&self.state);
        if self.is_halted() {
            return Err(MachineError::WrongState { is: *state, wanted: "reset first" });
        }
        if *state == RunState::Running {
            return Ok(());
        }
        self.run(&mut state)
    }

    fn run(&self, state: &mut MutexGuard<'_, RunState>) -> Result<(), MachineError> {
        self.pci.resume()?;
        for vcpu in &self.vcpus {
            // Refused where the guest does not use KVM's clock: nobody to tell then.
            if let Err(error) = lock(&vcpu.fd).kvmclock_ctrl() {
                tracing::trace!(%error, "no KVM clock to tell of the pause");
            }
        }
        **state = RunState::Running;
        self.control.run();
        Ok(())
    }

    /// Stops vCPUs and devices; afterwards nothing changes guest memory. Does nothing if the machine
    /// does not run.
    ///
    /// # Errors
    /// [`MachineError::Pause`] if a vCPU does not leave the guest; [`MachineError::Pci`] if a disk
    /// cannot be flushed, everything stands still then as well.
    pub fn pause(&self) -> Result<(), MachineError> {
        self.pause_locked(&mut lock(&self.state))
    }

    /// Pauses for a move. What halted the guest by itself is no part of the state that is saved:
    /// the target would run on over a shutdown or a reset, and this side might still act on it after
    /// the commit. So a halted machine does not move; whoever hears its event deals with it.
    ///
    /// # Errors
    /// [`MachineError::WrongState`] if an event has halted it, else as [`pause`](Self::pause).
    pub(super) fn pause_to_move(&self) -> Result<(), MachineError> {
        let mut state = lock(&self.state);
        self.pause_locked(&mut state)?;
        if self.is_halted() {
            return Err(MachineError::WrongState { is: *state, wanted: "not halted by its guest" });
        }
        Ok(())
    }

    fn pause_locked(&self, state: &mut RunState) -> Result<(), MachineError> {
        if *state != RunState::Running {
            return Ok(());
        }
        self.control.request_pause();
        if let Err(error) = self.control.wait_paused() {
            if !self.is_halted() {
                self.control.run();
            }
            return Err(error.into());
        }
        *state = RunState::Paused;
        self.pci.pause()?;
        Ok(())
    }

    /// Resets the machine, as its reset button does, and lets it run. Also what ends a halt.
    ///
    /// # Errors
    /// [`MachineError`]; the machine stands still then.
    pub fn reset(&self) -> Result<(), MachineError> {
        let mut state = lock(&self.state);
        if self.control.is_exiting() {
            return Err(MachineError::WrongState { is: *state, wanted: "not stopped for good" });
        }
        self.control.request_pause();
        self.control.wait_paused()?;
        *state = RunState::Paused;
        self.pci.reset();
        self.legacy.reset()?;
        self.power_on.chips.restore_chips(&self.vm)?;
        for (index, (vcpu, saved)) in self.vcpus.iter().zip(&self.power_on.vcpus).enumerate() {
            saved
                .restore(&lock(&vcpu.fd), self.xsave_size, true)
                .map_err(|source| MachineError::Vcpu { index, source })?;
        }
        self.load_boot_source()?;
        self.halted.store(false, Ordering::SeqCst);
        self.run(&mut state)
    }

    /// Ends the machine for good, as pulling its plug does: vCPUs leave the guest, devices finish
    /// what is in flight and are gone. Only dropping the machine is left to do.
    ///
    /// # Errors
    /// [`MachineError::Pause`] if a vCPU does not leave the guest.
    pub fn stop(&self) -> Result<(), MachineError> {
        let mut state = lock(&self.state);
        self.halted.store(true, Ordering::SeqCst);
        self.control.exit();
        self.control.wait_paused()?;
        *state = RunState::Paused;
        self.pci.stop();
        Ok(())
    }

    /// Presses the power button. False if the guest does not listen to it (yet).
    #[must_use]
    pub fn press_power_button(&self) -> bool {
        lock(&self.legacy.power).press_button()
    }

    /// The whole state except memory, in sections. The machine is paused.
    ///
    /// # Errors
    /// [`MachineError::WrongState`] if it is not; else what could not be read.
    pub fn save_state(&self) -> Result<Vec<u8>, MachineError> {
        let state = lock(&self.state);
        if *state != RunState::Paused {
            return Err(MachineError::WrongState { is: *state, wanted: "paused" });
        }
        let mut sections = vec![Section::encode(SECTION_SHAPE, 0, VERSION, &self.shape())?];
        for (index, vcpu) in (0u16..).zip(self.save_vcpus()?) {
            sections.push(Section::encode(SECTION_VCPU, index, VERSION, &vcpu)?);
        }
        let chips = ChipState::save(&self.vm)?;
        sections.push(Section::encode(SECTION_CHIPS, 0, VERSION, &chips)?);
        sections.extend(self.legacy.save()?);
        sections.extend(self.pci.save()?);
        Ok(write_sections(&sections)?)
    }

    fn shape(&self) -> Shape {
        let vcpus = u8::try_from(self.vcpus.len()).unwrap_or(u8::MAX);
        Shape { vcpus, memory_bytes: self.memory_bytes }
    }

    /// Takes over a saved state; memory has arrived already. The machine, which never ran, is
    /// paused afterwards: [`resume`](Self::resume) lets it go on.
    ///
    /// # Errors
    /// [`MachineError`] with what does not fit; the machine is not usable then.
    pub fn restore_state(&self, bytes: &[u8]) -> Result<(), MachineError> {
        let mut state = lock(&self.state);
        if *state != RunState::Created {
            return Err(MachineError::WrongState { is: *state, wanted: "not started yet" });
        }
        let sections = read_sections(bytes)?;
        let saved: Shape = find_section(&sections, SECTION_SHAPE, 0)?.decode(VERSION)?;
        let shape = self.shape();
        if saved != shape {
            return Err(MachineError::OtherShape {
                saved_vcpus: saved.vcpus,
                saved_memory: saved.memory_bytes,
                vcpus: shape.vcpus,
                memory: shape.memory_bytes,
            });
        }
        let chips: ChipState = find_section(&sections, SECTION_CHIPS, 0)?.decode(VERSION)?;
        let vcpus = (0u16..).zip(&self.vcpus).map(|(index, _)| {
            find_section(&sections, SECTION_VCPU, index)?.decode::<VcpuState>(VERSION)
        });
        let vcpus = vcpus.collect::<Result<Vec<_>, _>>()?;

        chips.restore_chips(&self.vm)?;
        self.restore_vcpus(&vcpus)?;
        chips.restore_clock(&self.vm)?;
        self.legacy.restore(&sections)?;
        self.pci.restore(&sections)?;
        *state = RunState::Paused;
        Ok(())
    }

    fn restore_vcpus(&self, saved: &[VcpuState]) -> Result<(), MachineError> {
        for (index, (vcpu, saved)) in self.vcpus.iter().zip(saved).enumerate() {
            vcpu.host_cpuid.covers(saved.cpuid())?;
            saved
                .restore(&lock(&vcpu.fd), self.xsave_size, false)
                .map_err(|source| MachineError::Vcpu { index, source })?;
            *lock(&vcpu.cpuid) = saved.cpuid().clone();
        }
        let (Some(first), Some(first_saved)) = (self.vcpus.first(), saved.first()) else {
            return Ok(());
        };
        for (index, (vcpu, saved)) in self.vcpus.iter().zip(saved).enumerate().skip(1) {
            saved
                .restore_tsc_offset(&lock(&vcpu.fd), first_saved, &lock(&first.fd))
                .map_err(|source| MachineError::Vcpu { index, source })?;
        }
        Ok(())
    }
}
