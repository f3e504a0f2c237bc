//! The saved state of a VM as versioned sections.
//!
//! Owns the container: which section belongs to which device, at which version, with a checksum.
//! Never knows what a section's bytes mean; each device encodes and decodes its own.
//!
//! ```text
//! "HFSTATE1"
//! section*      kind u16 | instance u16 | version u16 | length u32 | bytes | crc32 u32
//! end section   kind 0xffff, instance 0, version 0, length 4: number of sections before it, u32
//! ```
//!
//! All integers are little-endian; the CRC-32 (IEEE) covers the section's header and bytes.
//!
//! Invariants
//! - The format is additive only: a kind, once given, keeps its number; a version, once released,
//!   keeps its meaning, and a newer version only appends fields.
//! - Whatever the bytes are, reading them ends in sections or in a [`StateError`]: no panic, and no
//!   allocation beyond the bytes at hand.

mod error;
mod section;

pub use error::StateError;
pub use section::{
    SECTION_BYTES_MAX, SECTIONS_MAX, STATE_BYTES_MAX, Section, find_section, read_sections,
    write_sections,
};
