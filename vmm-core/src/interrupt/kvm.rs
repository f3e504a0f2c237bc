//! [`Platform`] on a KVM virtual machine.

use std::sync::Arc;

use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{Gsi, GsiRouter, InterruptError, MsiVector, Platform};

/// Vectors as irqfds with MSI routes, doorbells as ioeventfds.
#[derive(Debug, Clone)]
pub struct KvmPlatform {
    router: Arc<GsiRouter>,
}

impl KvmPlatform {
    /// A platform on `vm`, whose in-kernel irqchip exists.
    #[must_use]
    pub fn new(vm: Arc<VmFd>) -> Self {
        Self { router: Arc::new(GsiRouter::new(vm)) }
    }

    /// The routing table of this virtual machine; there must be only one.
    #[must_use]
    pub fn router(&self) -> &Arc<GsiRouter> {
        &self.router
    }
}

impl Platform for KvmPlatform {
    fn new_vector(&self) -> Result<Box<dyn MsiVector>, InterruptError> {
        let event = EventFd::new(EFD_NONBLOCK).map_err(InterruptError::EventFd)?;
        let gsi = self.router.allocate()?;
        Ok(Box::new(KvmVector { event, gsi, bound: false, router: self.router.clone() }))
    }

    fn add_doorbell(&self, address: u64, event: &EventFd) -> Result<(), InterruptError> {
        self.router
            .vm()
            .register_ioevent(event, &IoEventAddress::Mmio(address), NoDatamatch)
            .map_err(|source| InterruptError::Ioeventfd { address, source })
    }

    fn remove_doorbell(&self, address: u64, event: &EventFd) -> Result<(), InterruptError> {
        self.router
            .vm()
            .unregister_ioevent(event, &IoEventAddress::Mmio(address), NoDatamatch)
            .map_err(|source| InterruptError::Ioeventfd { address, source })
    }
}

#[derive(Debug)]
struct KvmVector {
    event: EventFd,
    gsi: Gsi,
    /// The irqfd is registered: done with the first route, a signal before has nowhere to go.
    bound: bool,
    router: Arc<GsiRouter>,
}

impl MsiVector for KvmVector {
    fn route(&mut self, address: u64, data: u32) -> Result<(), InterruptError> {
        self.router.set(self.gsi, address, data)?;
        if !self.bound {
            self.router
                .vm()
                .register_irqfd(&self.event, self.gsi.0)
                .map_err(|source| InterruptError::Irqfd { gsi: self.gsi.0, source })?;
            self.bound = true;
        }
        Ok(())
    }

    fn signal(&self) -> Result<(), InterruptError> {
        if self.bound {
            self.event.write(1).map_err(InterruptError::Signal)?;
        }
        Ok(())
    }
}

impl Drop for KvmVector {
    fn drop(&mut self) {
        if self.bound
            && let Err(error) = self.router.vm().unregister_irqfd(&self.event, self.gsi.0)
        {
            tracing::warn!(gsi = self.gsi.0, %error, "an irqfd could not be unbound");
        }
        self.router.release(self.gsi);
    }
}

#[cfg(test)]
mod tests {
    use kvm_ioctls::Kvm;

    use super::*;

    /// Interrupts and doorbells against the host's own KVM; without /dev/kvm it says so.
    #[test]
    fn kvm_takes_routes_irqfds_and_doorbells() {
        let Ok(kvm) = Kvm::new() else {
            crate::skip::this_test("no /dev/kvm");
            return;
        };
        let vm = Arc::new(kvm.create_vm().unwrap());
        vm.create_irq_chip().unwrap();
        let platform = KvmPlatform::new(vm.clone());
        let mut first = platform.new_vector().unwrap();
        let mut second = platform.new_vector().unwrap();
        first.signal().unwrap();
        first.route(0xfee0_0000, 0x41).unwrap();
        first.route(0xfee0_0000, 0x41).unwrap();
        second.route(0xfee0_1000, 0x42).unwrap();
        first.signal().unwrap();
        second.signal().unwrap();
        // A pin of the IOAPIC still has its route after the table was replaced.
        vm.set_irq_line(4, true).unwrap();
        vm.set_irq_line(4, false).unwrap();
        drop(first);
        assert_eq!(platform.router().allocate().unwrap(), Gsi(24), "the GSI came back");

        let event = EventFd::new(EFD_NONBLOCK).unwrap();
        platform.add_doorbell(0xc000_3000, &event).unwrap();
        let taken = platform.add_doorbell(0xc000_3000, &event);
        assert!(matches!(taken, Err(InterruptError::Ioeventfd { address: 0xc000_3000, .. })));
        platform.remove_doorbell(0xc000_3000, &event).unwrap();
        platform.add_doorbell(0xc000_3000, &event).unwrap();
    }

    #[test]
    fn gsis_run_out_with_a_message() {
        let Ok(kvm) = Kvm::new() else {
            crate::skip::this_test("no /dev/kvm");
            return;
        };
        let vm = Arc::new(kvm.create_vm().unwrap());
        let router = GsiRouter::new(vm);
        while router.allocate().is_ok() {}
        assert!(matches!(router.allocate(), Err(InterruptError::NoGsi { .. })));
        router.release(Gsi(30));
        assert_eq!(router.allocate().unwrap(), Gsi(30));
    }
}
