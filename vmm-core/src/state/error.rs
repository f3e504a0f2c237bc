//! Why a saved state cannot be written or read.

/// Why a saved state cannot be written or read. The VM that the state came from is not affected.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StateError {
    /// The first bytes are not those of a saved state.
    #[error("this is not a saved VM state: it does not begin with the bytes HFSTATE1")]
    NotAState,
    /// The bytes end inside a section, or before the end section.
    #[error("the saved state is cut off at byte {offset}; send or copy it again")]
    Truncated {
        /// Bytes that were there.
        offset: usize,
    },
    /// Bytes follow the end section.
    #[error("{excess} bytes follow the end of the saved state; send or copy it again")]
    TrailingBytes {
        /// How many.
        excess: usize,
    },
    /// A section's bytes are not those that were written.
    #[error(
        "section {kind}/{instance} of the saved state is damaged (checksum {found:#010x}, expected {expected:#010x}); send or copy it again"
    )]
    Damaged {
        /// The section's kind.
        kind: u16,
        /// The section's instance.
        instance: u16,
        /// The checksum that was written.
        expected: u32,
        /// The checksum of the bytes at hand.
        found: u32,
    },
    /// Two sections have the same kind and instance.
    #[error("section {kind}/{instance} of the saved state is there twice")]
    Duplicate {
        /// The section's kind.
        kind: u16,
        /// The section's instance.
        instance: u16,
    },
    /// The end section does not hold the number of sections before it.
    #[error(
        "the saved state has {found} sections, its end names {expected}; send or copy it again"
    )]
    WrongCount {
        /// What the end section says.
        expected: u32,
        /// What was read.
        found: u32,
    },
    /// A size or count is over its limit.
    #[error("the saved state is over its limit: {what} {size}, at most {limit}")]
    TooLarge {
        /// Which limit.
        what: &'static str,
        /// The size or count found.
        size: u64,
        /// The limit.
        limit: u64,
    },
    /// A section with the number of the end section.
    #[error("section kind 65535 is reserved for the end of a saved state")]
    ReservedKind,
    /// A section that must be there is not.
    #[error(
        "section {kind}/{instance} is missing from the saved state: it was saved by a VM with other devices"
    )]
    Missing {
        /// The section's kind.
        kind: u16,
        /// The section's instance.
        instance: u16,
    },
    /// A section's version is not one that can be decoded as asked.
    #[error(
        "section {kind}/{instance} has version {version}, this build reads from {known}; use a build that is at least as new as the one that saved it"
    )]
    Version {
        /// The section's kind.
        kind: u16,
        /// The section's instance.
        instance: u16,
        /// The version found.
        version: u16,
        /// The version asked for.
        known: u16,
    },
    /// A section's bytes are not of its type.
    #[error(
        "section {kind}/{instance} version {version} of the saved state does not decode: {reason}"
    )]
    Undecodable {
        /// The section's kind.
        kind: u16,
        /// The section's instance.
        instance: u16,
        /// The section's version.
        version: u16,
        /// What the decoder said.
        reason: String,
    },
    /// A value cannot be encoded.
    #[error("section {kind}/{instance} cannot be encoded: {reason}")]
    Unencodable {
        /// The section's kind.
        kind: u16,
        /// The section's instance.
        instance: u16,
        /// What the encoder said.
        reason: String,
    },
}
