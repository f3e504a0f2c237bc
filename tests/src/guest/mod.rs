//! The test guest: what its probe writes to disk ([`records`]) and how a client talks to it
//! ([`client`]). The probe itself is `src/bin/guest-probe`; `deploy/guest/build` makes the guest.

pub mod client;
pub mod records;

/// The port that the probe listens on.
pub const PORT: u16 = 7777;
