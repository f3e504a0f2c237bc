//! Interrupts and doorbells: message-signalled vectors towards the guest (GSI, KVM routing, irqfd)
//! and queue notifications from it (ioeventfd).
//!
//! Devices see only [`Platform`], so everything above it is tested without KVM. The routes of the
//! in-kernel PIC and IOAPIC (GSI 0 to 23) are kept as KVM sets them up; message-signalled GSIs come
//! after them.

mod kvm;
mod routing;

pub use kvm::KvmPlatform;
pub use routing::{Gsi, GsiRouter};

use vmm_sys_util::eventfd::EventFd;

/// Why an interrupt or a doorbell could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum InterruptError {
    /// No eventfd could be made.
    #[error("no eventfd for an interrupt vector or a doorbell: raise the open file limit")]
    EventFd(#[source] std::io::Error),
    /// KVM's routing table is full.
    #[error("no free GSI: {limit} interrupt routes are in use; take devices off the machine")]
    NoGsi {
        /// Number of routes that KVM takes.
        limit: u32,
    },
    /// KVM refused the routing table.
    #[error("KVM_SET_GSI_ROUTING with {routes} routes failed")]
    Routing {
        /// Number of routes handed in.
        routes: usize,
        /// What KVM said.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// KVM refused to bind an eventfd to a GSI.
    #[error("KVM_IRQFD for GSI {gsi} failed")]
    Irqfd {
        /// The GSI.
        gsi: u32,
        /// What KVM said.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// KVM refused a doorbell.
    #[error("KVM_IOEVENTFD at {address:#x} failed")]
    Ioeventfd {
        /// Guest physical address.
        address: u64,
        /// What KVM said.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// The vector could not be signalled.
    #[error("an interrupt vector could not be signalled")]
    Signal(#[source] std::io::Error),
}

/// One message-signalled interrupt vector of a device.
pub trait MsiVector: Send + std::fmt::Debug {
    /// Takes the message that the guest programmed.
    ///
    /// # Errors
    /// [`InterruptError`] when the platform does not take the route.
    fn route(&mut self, address: u64, data: u32) -> Result<(), InterruptError>;

    /// Sends the message. A vector without a route swallows it.
    ///
    /// # Errors
    /// [`InterruptError::Signal`].
    fn signal(&self) -> Result<(), InterruptError>;
}

/// What devices need of the hypervisor.
pub trait Platform: Send + Sync + std::fmt::Debug {
    /// A new vector, not routed yet.
    ///
    /// # Errors
    /// [`InterruptError`] when there are no more GSIs or files.
    fn new_vector(&self) -> Result<Box<dyn MsiVector>, InterruptError>;

    /// Signals `event` on every guest write at `address`, of any length.
    ///
    /// # Errors
    /// [`InterruptError::Ioeventfd`].
    fn add_doorbell(&self, address: u64, event: &EventFd) -> Result<(), InterruptError>;

    /// Undoes [`Self::add_doorbell`].
    ///
    /// # Errors
    /// [`InterruptError::Ioeventfd`].
    fn remove_doorbell(&self, address: u64, event: &EventFd) -> Result<(), InterruptError>;
}

#[cfg(test)]
pub(crate) mod fake;
