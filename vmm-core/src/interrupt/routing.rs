//! KVM's interrupt routing table: the default PIC and IOAPIC routes plus one MSI route a vector.
//!
//! Invariant: the table handed to KVM always begins with the default routes, so that legacy
//! interrupts keep working however often it is replaced.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KvmIrqRouting, kvm_irq_routing_entry,
    kvm_irq_routing_entry__bindgen_ty_1, kvm_irq_routing_irqchip, kvm_irq_routing_msi,
};
use kvm_ioctls::VmFd;

use super::InterruptError;

/// Pins of the in-kernel IOAPIC.
const IOAPIC_PINS: u32 = 24;
/// Pins of each of the two PICs.
const PIC_PINS: u32 = 8;
/// GSIs that KVM takes (`KVM_MAX_IRQ_ROUTES`).
const GSI_LIMIT: u32 = 4096;

/// A global system interrupt number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Gsi(pub u32);

#[derive(Debug, Default)]
struct Routes {
    /// Allocated GSIs; `None` until the guest has programmed the message.
    messages: BTreeMap<Gsi, Option<(u64, u32)>>,
}

/// Hands out GSIs and keeps KVM's routing table.
#[derive(Debug)]
pub struct GsiRouter {
    vm: Arc<VmFd>,
    routes: Mutex<Routes>,
}

impl GsiRouter {
    /// A router for `vm`, whose in-kernel irqchip exists. KVM's default routes are in force.
    #[must_use]
    pub fn new(vm: Arc<VmFd>) -> Self {
        Self { vm, routes: Mutex::default() }
    }

    pub(super) fn vm(&self) -> &VmFd {
        &self.vm
    }

    /// Takes the lowest free GSI behind those of the IOAPIC.
    ///
    /// # Errors
    /// [`InterruptError::NoGsi`].
    pub fn allocate(&self) -> Result<Gsi, InterruptError> {
        let mut routes = self.routes.lock().unwrap_or_else(PoisonError::into_inner);
        let taken = (IOAPIC_PINS..).zip(routes.messages.keys());
        let run = taken.take_while(|(next, gsi)| gsi.0 == *next).count();
        let gsi = u32::try_from(run)
            .ok()
            .and_then(|run| IOAPIC_PINS.checked_add(run))
            .filter(|gsi| *gsi < GSI_LIMIT)
            .map(Gsi)
            .ok_or(InterruptError::NoGsi { limit: GSI_LIMIT })?;
        routes.messages.insert(gsi, None);
        Ok(gsi)
    }

    /// Routes `gsi` to the message and tells KVM, unless it is so already.
    ///
    /// # Errors
    /// [`InterruptError::Routing`]; the route is then as before.
    pub fn set(&self, gsi: Gsi, address: u64, data: u32) -> Result<(), InterruptError> {
        let mut routes = self.routes.lock().unwrap_or_else(PoisonError::into_inner);
        let message = Some((address, data));
        let before = routes.messages.insert(gsi, message);
        if before == Some(message) {
            return Ok(());
        }
        self.commit(&routes).inspect_err(|_| {
            routes.messages.insert(gsi, before.flatten());
        })
    }

    /// Gives `gsi` back. KVM keeps the stale route until the next change: nothing signals it.
    pub fn release(&self, gsi: Gsi) {
        self.routes.lock().unwrap_or_else(PoisonError::into_inner).messages.remove(&gsi);
    }

    fn commit(&self, routes: &Routes) -> Result<(), InterruptError> {
        let mut entries = default_routes();
        entries.extend(
            routes
                .messages
                .iter()
                .filter_map(|(gsi, message)| message.map(|message| (*gsi, message)))
                .map(|(gsi, (address, data))| msi_route(gsi, address, data)),
        );
        let error = |source| InterruptError::Routing { routes: entries.len(), source };
        let table = KvmIrqRouting::from_entries(&entries)
            .map_err(|_| InterruptError::NoGsi { limit: GSI_LIMIT })?;
        self.vm.set_gsi_routing(&table).map_err(error)
    }
}

/// The table that KVM_CREATE_IRQCHIP sets up: GSI n to pin n of the PICs (n < 16) and the IOAPIC.
fn default_routes() -> Vec<kvm_irq_routing_entry> {
    let pic = (0..2 * PIC_PINS).map(|gsi| {
        let chip = if gsi < PIC_PINS { KVM_IRQCHIP_PIC_MASTER } else { KVM_IRQCHIP_PIC_SLAVE };
        chip_route(gsi, chip, gsi % PIC_PINS)
    });
    let ioapic = (0..IOAPIC_PINS).map(|gsi| chip_route(gsi, KVM_IRQCHIP_IOAPIC, gsi));
    pic.chain(ioapic).collect()
}

fn chip_route(gsi: u32, irqchip: u32, pin: u32) -> kvm_irq_routing_entry {
    kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_IRQCHIP,
        u: kvm_irq_routing_entry__bindgen_ty_1 {
            irqchip: kvm_irq_routing_irqchip { irqchip, pin },
        },
        ..Default::default()
    }
}

fn msi_route(gsi: Gsi, address: u64, data: u32) -> kvm_irq_routing_entry {
    let [low, high] = halves(address);
    kvm_irq_routing_entry {
        gsi: gsi.0,
        type_: KVM_IRQ_ROUTING_MSI,
        u: kvm_irq_routing_entry__bindgen_ty_1 {
            msi: kvm_irq_routing_msi {
                address_lo: low,
                address_hi: high,
                data,
                ..Default::default()
            },
        },
        ..Default::default()
    }
}

#[expect(clippy::cast_possible_truncation, reason = "the halves are what is wanted")]
fn halves(value: u64) -> [u32; 2] {
    [value as u32, (value >> 32) as u32]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn default_routes_are_those_of_kvm() {
        let routes = default_routes();
        assert_eq!(routes.len(), 40);
        for gsi in 0..24_u32 {
            let of_gsi = routes.iter().filter(|route| route.gsi == gsi).count();
            assert_eq!(of_gsi, if gsi < 16 { 2 } else { 1 }, "GSI {gsi}");
        }
    }
}
