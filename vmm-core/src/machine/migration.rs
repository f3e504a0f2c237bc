//! A machine as live migration sees it.

use super::Machine;
use crate::memory::GuestMemory;
use crate::migrate::{DirtyPages, IncomingVm, MigrationVm, VmError};

impl MigrationVm for Machine {
    fn memory(&self) -> &GuestMemory {
        Self::memory(self)
    }

    fn start_dirty_tracking(&self) -> Result<(), VmError> {
        Ok(self.dirty.start()?)
    }

    fn take_dirty(&self) -> Result<DirtyPages, VmError> {
        Ok(self.dirty.take()?)
    }

    fn stop_dirty_tracking(&self) -> Result<(), VmError> {
        Ok(self.dirty.stop()?)
    }

    fn pause(&self) -> Result<(), VmError> {
        Ok(self.pause_to_move()?)
    }

    fn resume(&self) -> Result<(), VmError> {
        // Halted by its guest: it goes on, or ends, as that event asks.
        if self.is_halted() { Ok(()) } else { Ok(Self::resume(self)?) }
    }

    fn flush_disks(&self) -> Result<(), VmError> {
        Ok(self.pci().flush()?)
    }

    fn save_state(&self) -> Result<Vec<u8>, VmError> {
        Ok(Self::save_state(self)?)
    }
}

impl IncomingVm for Machine {
    fn memory(&self) -> &GuestMemory {
        Self::memory(self)
    }

    fn restore_state(&mut self, state: &[u8]) -> Result<(), VmError> {
        Ok(Self::restore_state(self, state)?)
    }
}
