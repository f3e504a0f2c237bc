//! TLS 1.3 between the two VM processes of one migration.
//!
//! Each side makes an [`Identity`] (key and self-signed certificate) for this migration alone, and
//! accepts exactly the peer's certificate, by its SHA-256 [`Fingerprint`]. The fingerprints travel through the
//! agents' own mutual TLS, so that no key of a node ever enters a process that faces a guest.
//!
//! Invariants: TLS 1.3 only, both sides authenticated, the handshake's signature always verified,
//! no session is resumed, no early data.

mod accept;
mod connect;
mod identity;
mod stream;
mod verify;

pub use accept::TlsAcceptor;
pub use connect::TlsConnector;
pub use identity::{Fingerprint, Identity, InvalidFingerprint};
