//! One section, and the codec of a sequence of them.

use std::collections::BTreeSet;

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::StateError;

/// Most bytes of one section.
pub const SECTION_BYTES_MAX: usize = 16 << 20;
/// Most bytes of a whole state.
pub const STATE_BYTES_MAX: usize = 64 << 20;
/// Most sections of a state.
pub const SECTIONS_MAX: usize = 4096;

const MAGIC: &[u8; 8] = b"HFSTATE1";
const END_KIND: u16 = 0xffff;
const HEADER_BYTES: usize = 10;

/// The state of one device, vCPU or other part of a VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Section {
    /// What the section describes; numbered by the module that owns it, never reused.
    pub kind: u16,
    /// Which of several of that kind: a vCPU's index, a device's slot; 0 for a single one.
    pub instance: u16,
    /// The version of the bytes; the first is 1.
    pub version: u16,
    /// The state, encoded as `kind` and `version` say.
    pub bytes: Vec<u8>,
}

impl Section {
    /// A section that holds `value` in postcard's encoding.
    ///
    /// # Errors
    /// [`StateError::Unencodable`] if the encoder refuses the value.
    pub fn encode<T: Serialize>(
        kind: u16,
        instance: u16,
        version: u16,
        value: &T,
    ) -> Result<Self, StateError> {
        let bytes = postcard::to_stdvec(value).map_err(|error| StateError::Unencodable {
            kind,
            instance,
            reason: error.to_string(),
        })?;
        Ok(Self { kind, instance, version, bytes })
    }

    /// The value that a section of version `known` or newer holds. A newer version only appends
    /// fields, so what follows `T` in it is ignored; at version `known` itself nothing may follow.
    /// Sections older than `known` are decoded by asking for the type of their version first.
    ///
    /// # Errors
    /// [`StateError::Version`] for an older section, [`StateError::Undecodable`] for bytes that are
    /// not a `T`.
    pub fn decode<T: DeserializeOwned>(&self, known: u16) -> Result<T, StateError> {
        if self.version < known {
            return Err(StateError::Version {
                kind: self.kind,
                instance: self.instance,
                version: self.version,
                known,
            });
        }
        let undecodable = |reason: String| StateError::Undecodable {
            kind: self.kind,
            instance: self.instance,
            version: self.version,
            reason,
        };
        let (value, rest) = postcard::take_from_bytes(&self.bytes)
            .map_err(|error| undecodable(error.to_string()))?;
        if self.version == known && !rest.is_empty() {
            return Err(undecodable(format!("{} bytes too many", rest.len())));
        }
        Ok(value)
    }
}

/// The section of a kind and instance.
///
/// # Errors
/// [`StateError::Missing`] if there is none.
pub fn find_section(
    sections: &[Section],
    kind: u16,
    instance: u16,
) -> Result<&Section, StateError> {
    sections
        .iter()
        .find(|section| section.kind == kind && section.instance == instance)
        .ok_or(StateError::Missing { kind, instance })
}

fn put_section(
    out: &mut Vec<u8>,
    kind: u16,
    instance: u16,
    version: u16,
    bytes: &[u8],
) -> Result<(), StateError> {
    let begin = out.len();
    let length = u32::try_from(bytes.len()).ok().filter(|_| bytes.len() <= SECTION_BYTES_MAX);
    let length = length.ok_or(StateError::TooLarge {
        what: "bytes of a section",
        size: bytes.len() as u64,
        limit: SECTION_BYTES_MAX as u64,
    })?;
    for field in [kind, instance, version] {
        out.extend_from_slice(&field.to_le_bytes());
    }
    out.extend_from_slice(&length.to_le_bytes());
    out.extend_from_slice(bytes);
    let crc = crc32fast::hash(&out[begin..]);
    out.extend_from_slice(&crc.to_le_bytes());
    Ok(())
}

/// The bytes of a saved state.
///
/// # Errors
/// A reserved kind, two sections of the same kind and instance, or a size over its limit.
pub fn write_sections(sections: &[Section]) -> Result<Vec<u8>, StateError> {
    let count = u32::try_from(sections.len()).ok().filter(|_| sections.len() <= SECTIONS_MAX);
    let count = count.ok_or(too_many(sections.len()))?;
    let mut seen = BTreeSet::new();
    let mut out = MAGIC.to_vec();
    for section in sections {
        let Section { kind, instance, version, bytes } = section;
        if *kind == END_KIND {
            return Err(StateError::ReservedKind);
        }
        if !seen.insert((*kind, *instance)) {
            return Err(StateError::Duplicate { kind: *kind, instance: *instance });
        }
        put_section(&mut out, *kind, *instance, *version, bytes)?;
    }
    put_section(&mut out, END_KIND, 0, 0, &count.to_le_bytes())?;
    check_total(out.len())?;
    Ok(out)
}

/// The sections of a saved state, in the order in which they were written.
///
/// # Errors
/// Whatever is wrong with the bytes, see [`StateError`].
pub fn read_sections(state: &[u8]) -> Result<Vec<Section>, StateError> {
    check_total(state.len())?;
    let mut reader = Reader { state, offset: 0 };
    if reader.take(MAGIC.len()).ok().is_none_or(|magic| magic != MAGIC) {
        return Err(StateError::NotAState);
    }
    let mut seen = BTreeSet::new();
    let mut sections = Vec::new();
    loop {
        let section = reader.section()?;
        let Section { kind, instance, .. } = section;
        if kind == END_KIND {
            reader.end(&section, sections.len())?;
            return Ok(sections);
        }
        if sections.len() == SECTIONS_MAX {
            return Err(too_many(SECTIONS_MAX + 1));
        }
        if !seen.insert((kind, instance)) {
            return Err(StateError::Duplicate { kind, instance });
        }
        sections.push(section);
    }
}

fn too_many(count: usize) -> StateError {
    StateError::TooLarge { what: "sections", size: count as u64, limit: SECTIONS_MAX as u64 }
}

fn check_total(size: usize) -> Result<(), StateError> {
    if size <= STATE_BYTES_MAX {
        return Ok(());
    }
    Err(StateError::TooLarge { what: "bytes", size: size as u64, limit: STATE_BYTES_MAX as u64 })
}

struct Reader<'a> {
    state: &'a [u8],
    offset: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8], StateError> {
        let end = self.offset.checked_add(count);
        let bytes = end.and_then(|end| self.state.get(self.offset..end));
        let bytes = bytes.ok_or(StateError::Truncated { offset: self.state.len() })?;
        self.offset += count;
        Ok(bytes)
    }

    fn take_u16(&mut self) -> Result<u16, StateError> {
        self.take(2)
            .map(|bytes| bytes.iter().rev().fold(0, |sum, byte| sum << 8 | u16::from(*byte)))
    }

    fn take_u32(&mut self) -> Result<u32, StateError> {
        self.take(4).map(u32_le)
    }

    fn section(&mut self) -> Result<Section, StateError> {
        let begin = self.offset;
        let [kind, instance, version] = [self.take_u16()?, self.take_u16()?, self.take_u16()?];
        let length = self.take_u32()? as usize;
        if length > SECTION_BYTES_MAX {
            return Err(StateError::TooLarge {
                what: "bytes of a section",
                size: length as u64,
                limit: SECTION_BYTES_MAX as u64,
            });
        }
        let bytes = self.take(length)?;
        let found = crc32fast::hash(&self.state[begin..begin + HEADER_BYTES + length]);
        let expected = self.take_u32()?;
        if found != expected {
            return Err(StateError::Damaged { kind, instance, expected, found });
        }
        Ok(Section { kind, instance, version, bytes: bytes.to_vec() })
    }

    fn end(&self, section: &Section, sections: usize) -> Result<(), StateError> {
        let found = u32::try_from(sections).unwrap_or(u32::MAX);
        let expected = match section {
            Section { instance: 0, version: 0, bytes, .. } if bytes.len() == 4 => u32_le(bytes),
            _ => return Err(StateError::ReservedKind),
        };
        if expected != found {
            return Err(StateError::WrongCount { expected, found });
        }
        match self.state.len() - self.offset {
            0 => Ok(()),
            excess => Err(StateError::TrailingBytes { excess }),
        }
    }
}

fn u32_le(bytes: &[u8]) -> u32 {
    bytes.iter().rev().fold(0, |sum, byte| sum << 8 | u32::from(*byte))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn arbitrary_sections() -> impl Strategy<Value = Vec<Section>> {
        let body = (any::<u16>(), proptest::collection::vec(any::<u8>(), 0..64));
        proptest::collection::btree_map((0..END_KIND, 0..4_u16), body, 0..12).prop_map(|map| {
            let section =
                |((kind, instance), (version, bytes))| Section { kind, instance, version, bytes };
            map.into_iter().map(section).collect()
        })
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(sections in arbitrary_sections()) {
            let state = write_sections(&sections).unwrap();
            prop_assert_eq!(read_sections(&state).unwrap(), sections);
        }

        #[test]
        fn no_cut_and_no_flipped_bit_goes_unnoticed(
            sections in arbitrary_sections(),
            at in any::<proptest::sample::Index>(),
            bit in 0..8_u8,
        ) {
            let state = write_sections(&sections).unwrap();
            let at = at.index(state.len());
            prop_assert!(read_sections(&state[..at]).is_err());
            let mut flipped = state.clone();
            flipped[at] ^= 1 << bit;
            prop_assert!(read_sections(&flipped).is_err());
        }

        #[test]
        fn garbage_is_refused_without_a_panic(
            mut garbage in proptest::collection::vec(any::<u8>(), 0..256),
            magic in any::<bool>(),
        ) {
            if magic {
                garbage.splice(0..0, MAGIC.iter().copied());
            }
            prop_assert!(read_sections(&garbage).is_err());
        }
    }

    #[test]
    fn a_length_beyond_the_bytes_allocates_nothing() {
        let mut state = MAGIC.to_vec();
        state.extend_from_slice(&[1, 0, 0, 0, 1, 0]);
        state.extend_from_slice(&u32::try_from(SECTION_BYTES_MAX).unwrap().to_le_bytes());
        assert_eq!(read_sections(&state), Err(StateError::Truncated { offset: state.len() }));
        let length = state.len();
        state[length - 4..].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(matches!(read_sections(&state), Err(StateError::TooLarge { .. })));
    }

    #[test]
    fn duplicates_and_the_end_kind_are_refused_by_the_writer_too() {
        let section = Section { kind: 1, instance: 2, version: 1, bytes: vec![] };
        let twice = [section.clone(), section.clone()];
        assert_eq!(write_sections(&twice), Err(StateError::Duplicate { kind: 1, instance: 2 }));
        let end = Section { kind: END_KIND, ..section };
        assert_eq!(write_sections(&[end]), Err(StateError::ReservedKind));
    }

    #[test]
    fn a_newer_version_may_append_and_an_older_one_is_named() {
        let newer = Section::encode(7, 0, 2, &(1_u32, 2_u32, 3_u8)).unwrap();
        assert_eq!(newer.decode::<(u32, u32)>(1).unwrap(), (1, 2));
        assert!(matches!(newer.decode::<(u32, u32)>(2), Err(StateError::Undecodable { .. })));
        assert!(matches!(newer.decode::<u8>(3), Err(StateError::Version { version: 2, .. })));
    }
}
