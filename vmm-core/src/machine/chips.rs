//! KVM's in-kernel chips: two PICs, I/O APIC, PIT, and the VM's clock.

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_irqchip,
    kvm_pit_state2,
};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};

use super::MachineError;
use super::error::kvm;

const CHIPS: [u32; 3] = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC];

/// State of the chips.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct ChipState {
    irqchips: [kvm_irqchip; 3],
    pit: kvm_pit_state2,
    clock: kvm_clock_data,
}

impl ChipState {
    pub(super) fn save(vm: &VmFd) -> Result<Self, MachineError> {
        let mut irqchips = [kvm_irqchip::default(); 3];
        for (chip, id) in irqchips.iter_mut().zip(CHIPS) {
            chip.chip_id = id;
            vm.get_irqchip(chip).map_err(kvm("read an interrupt controller"))?;
        }
        let pit = vm.get_pit2().map_err(kvm("read the timer"))?;
        let clock = vm.get_clock().map_err(kvm("read the clock"))?;
        Ok(Self { irqchips, pit, clock })
    }

    /// Interrupt controllers and timer; before the vCPUs.
    pub(super) fn restore_chips(&self, vm: &VmFd) -> Result<(), MachineError> {
        for (chip, id) in self.irqchips.iter().zip(CHIPS) {
            let chip = kvm_irqchip { chip_id: id, ..*chip };
            vm.set_irqchip(&chip).map_err(kvm("set an interrupt controller"))?;
        }
        vm.set_pit2(&self.pit).map_err(kvm("set the timer"))
    }

    /// The clock goes on from where it was: after the vCPUs, whose TSCs it is derived from. Flags
    /// that only make sense on the host that saved it are dropped.
    pub(super) fn restore_clock(&self, vm: &VmFd) -> Result<(), MachineError> {
        let clock = kvm_clock_data { clock: self.clock.clock, ..kvm_clock_data::default() };
        vm.set_clock(&clock).map_err(kvm("set the clock"))
    }
}
