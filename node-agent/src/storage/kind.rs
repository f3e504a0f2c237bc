//! What an image is for, and what its content says about that.
//!
//! A kernel, an initramfs and a firmware image are told by their first bytes. A raw disk holds
//! whatever its guest wrote, so its content is judged only where a file becomes a disk, never when
//! a VM starts: a guest must not be able to keep itself from starting by what it writes.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::str::FromStr;

/// What an image is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ImageKind {
    /// A bzImage or an ELF kernel.
    Kernel,
    /// An initial RAM file system.
    Initrd,
    /// A flat firmware image.
    Firmware,
    /// A raw disk.
    Disk,
}

impl ImageKind {
    /// The word of the API and of the records.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Kernel => "kernel",
            Self::Initrd => "initrd",
            Self::Firmware => "firmware",
            Self::Disk => "disk",
        }
    }
}

impl fmt::Display for ImageKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

/// A word that names no kind of image.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a kind of image: use kernel, initrd, firmware or disk")]
pub struct UnknownKind(String);

impl FromStr for ImageKind {
    type Err = UnknownKind;
    fn from_str(word: &str) -> Result<Self, UnknownKind> {
        let all = [Self::Kernel, Self::Initrd, Self::Firmware, Self::Disk];
        let known = all.into_iter().find(|kind| kind.word() == word);
        known.ok_or_else(|| {
            UnknownKind(word.chars().take(40).flat_map(char::escape_debug).collect())
        })
    }
}

/// What the bytes of a file tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// Nothing of it is known.
    Unknown,
    /// A bzImage or an ELF file.
    Kernel,
    /// A cpio archive.
    Cpio,
    /// Something compressed, with this program.
    Compressed(&'static str),
    /// A firmware volume, or code where a processor begins.
    Firmware,
    /// A partition table or a file system.
    Disk,
    /// A disk in a format that is not raw.
    ForeignDisk(&'static str),
}

/// So much of a file's beginning is looked at: the last magic is that of btrfs.
const HEAD: usize = 0x1_0048;
/// The reset vector: the last 16 bytes of a firmware image.
const TAIL: usize = 16;
/// Largest firmware image, and the unit of its size, bytes.
const FIRMWARE_MAX: u64 = 16 << 20;
const FIRMWARE_UNIT: u64 = 4096;
const SECTOR: u64 = 512;

/// Magic bytes: offset, bytes, what they tell. The first that fits counts.
const MAGICS: [(usize, &[u8], Content); 21] = [
    (0x202, b"HdrS", Content::Kernel),
    (0, b"\x7fELF", Content::Kernel),
    (0, b"070701", Content::Cpio),
    (0, b"070702", Content::Cpio),
    (0, b"\x1f\x8b", Content::Compressed("gzip")),
    (0, b"\xfd7zXZ\0", Content::Compressed("xz")),
    (0, b"\x28\xb5\x2f\xfd", Content::Compressed("zstd")),
    (0, b"\x02\x21\x4c\x18", Content::Compressed("lz4")),
    (0, b"\x04\x22\x4d\x18", Content::Compressed("lz4")),
    (0, b"BZh", Content::Compressed("bzip2")),
    (0, b"\x5d\0\0", Content::Compressed("lzma")),
    (0, b"QFI\xfb", Content::ForeignDisk("qcow2")),
    (0, b"KDMV", Content::ForeignDisk("vmdk")),
    (0, b"vhdxfile", Content::ForeignDisk("vhdx")),
    (0x40, b"\x7f\x10\xda\xbe", Content::ForeignDisk("vdi")),
    (0x28, b"_FVH", Content::Firmware),
    (0x200, b"EFI PART", Content::Disk),
    (0x1fe, b"\x55\xaa", Content::Disk),
    (0x438, b"\x53\xef", Content::Disk),
    (0, b"XFSB", Content::Disk),
    (0x1_0040, b"_BHRfS_M", Content::Disk),
];

impl Content {
    /// Looks at a file.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn of(file: &File) -> io::Result<Self> {
        let size = file.metadata()?.len();
        let mut head = vec![0; HEAD];
        let mut filled = 0;
        while filled < HEAD {
            match file.read_at(&mut head[filled..], filled as u64)? {
                0 => break,
                count => filled += count,
            }
        }
        head.truncate(filled);
        let mut tail = [0; TAIL];
        if size >= TAIL as u64 {
            file.read_exact_at(&mut tail, size - TAIL as u64)?;
        }
        Ok(Self::judge(&head, tail, size))
    }

    fn judge(head: &[u8], tail: [u8; TAIL], size: u64) -> Self {
        let fits = |offset: usize, magic: &[u8]| {
            head.get(offset..).is_some_and(|rest| rest.starts_with(magic))
        };
        let found = MAGICS.iter().find(|(offset, magic, _)| fits(*offset, magic));
        match found {
            Some((_, _, content)) => *content,
            // A far or near jump, or the NOPs and cache instructions that go before one.
            None if is_firmware_size(size)
                && matches!(tail[0], 0xea | 0xe9 | 0xeb | 0x90 | 0x0f | 0xfa) =>
            {
                Self::Firmware
            }
            None => Self::Unknown,
        }
    }

    /// The kind that a file of this content most likely is.
    #[must_use]
    pub fn kind(self) -> Option<ImageKind> {
        match self {
            Self::Kernel => Some(ImageKind::Kernel),
            Self::Cpio | Self::Compressed(_) => Some(ImageKind::Initrd),
            Self::Firmware => Some(ImageKind::Firmware),
            Self::Disk | Self::ForeignDisk(_) => Some(ImageKind::Disk),
            Self::Unknown => None,
        }
    }

    /// Whether a file of this content and size can be used as `kind`; if not, why, and what to do.
    ///
    /// # Errors
    /// The reason.
    pub fn check(self, kind: ImageKind, size: u64) -> Result<(), String> {
        match (kind, self) {
            (ImageKind::Kernel, Self::Kernel)
            | (ImageKind::Initrd, Self::Cpio | Self::Compressed(_) | Self::Unknown) => Ok(()),
            (ImageKind::Firmware, Self::Firmware | Self::Unknown) => check_firmware_size(size),
            (ImageKind::Disk, Self::Disk | Self::Unknown | Self::Firmware) => check_sectors(size),
            (ImageKind::Disk, Self::ForeignDisk(format)) => Err(format!(
                "it is a {format} image, and disks are raw: convert it first with `qemu-img \
                 convert -O raw`"
            )),
            (ImageKind::Disk, Self::Compressed(program)) => {
                Err(format!("it is compressed ({program}), and disks are raw: unpack it first"))
            }
            (ImageKind::Kernel, _) => Err(format!(
                "it is {self}, not a kernel: give a bzImage (/boot/vmlinuz-… of a Linux package) \
                 or an ELF kernel"
            )),
            (ImageKind::Initrd, _) => {
                Err(format!("it is {self}, not an initramfs (a cpio archive, compressed or not)"))
            }
            (ImageKind::Firmware, _) => Err(format!("it is {self}, not a flat firmware image")),
            (ImageKind::Disk, Self::Kernel | Self::Cpio) => {
                Err(format!("it is {self}, not a raw disk"))
            }
        }
    }
}

impl fmt::Display for Content {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unknown => f.write_str("of unknown content"),
            Self::Kernel => f.write_str("a kernel"),
            Self::Cpio => f.write_str("a cpio archive"),
            Self::Compressed(program) => write!(f, "a compressed file ({program})"),
            Self::Firmware => f.write_str("a firmware image"),
            Self::Disk => f.write_str("a disk image"),
            Self::ForeignDisk(format) => write!(f, "a {format} disk image"),
        }
    }
}

fn is_firmware_size(size: u64) -> bool {
    size > 0 && size <= FIRMWARE_MAX && size.is_multiple_of(FIRMWARE_UNIT)
}

fn check_firmware_size(size: u64) -> Result<(), String> {
    if is_firmware_size(size) {
        return Ok(());
    }
    Err(format!("it has {size} bytes: a firmware image has a multiple of 4096, at most 16 MiB"))
}

fn check_sectors(size: u64) -> Result<(), String> {
    if size > 0 && size.is_multiple_of(SECTOR) {
        return Ok(());
    }
    Err(format!("it has {size} bytes: a raw disk has a whole number of 512-byte sectors"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(offset: usize, magic: &[u8], size: usize) -> Content {
        let mut bytes = vec![0; size];
        bytes[offset..offset + magic.len()].copy_from_slice(magic);
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&bytes, 0).unwrap();
        Content::of(&file).unwrap()
    }

    #[test]
    fn every_magic_is_found_in_a_file_and_not_where_the_file_is_cut() {
        for (offset, magic, content) in MAGICS {
            assert_eq!(with(offset, magic, HEAD + 512), content, "{magic:?}");
            assert_eq!(with(offset, magic, offset + magic.len()), content, "{magic:?}");
            let cut = with(offset, &magic[..magic.len() - 1], offset + magic.len() - 1);
            assert_eq!(cut, Content::Unknown, "{magic:?}");
        }
        assert_eq!(with(0, b"", 0), Content::Unknown);
        // A bzImage carries a boot sector's signature too.
        let mut kernel = vec![0; 4096];
        kernel[0x1fe..0x206].copy_from_slice(b"\x55\xaa\0\0HdrS");
        assert_eq!(Content::judge(&kernel, [0; TAIL], 4096), Content::Kernel);
    }

    #[test]
    fn firmware_is_told_by_its_reset_vector() {
        assert_eq!(with(65_536 - 16, b"\xea\x5b\xe0\0\xf0", 65_536), Content::Firmware);
        assert_eq!(with(65_000 - 16, b"\xea\x5b\xe0\0\xf0", 65_000), Content::Unknown);
    }

    #[test]
    fn a_file_is_used_as_what_it_is() {
        use ImageKind::{Disk, Firmware, Initrd, Kernel};
        let good = [
            (Content::Kernel, Kernel),
            (Content::Cpio, Initrd),
            (Content::Compressed("gzip"), Initrd),
            (Content::Unknown, Initrd),
            (Content::Firmware, Firmware),
            (Content::Unknown, Firmware),
            (Content::Disk, Disk),
            (Content::Unknown, Disk),
        ];
        for (content, kind) in good {
            assert_eq!(content.check(kind, 8192), Ok(()), "{content} as {kind}");
        }
        let bad = [
            (Content::Disk, Kernel, "a disk image, not a kernel"),
            (Content::Unknown, Kernel, "bzImage"),
            (Content::Kernel, Initrd, "a kernel, not an initramfs"),
            (Content::Kernel, Disk, "a kernel, not a raw disk"),
            (Content::ForeignDisk("qcow2"), Disk, "qemu-img convert -O raw"),
            (Content::Compressed("xz"), Disk, "unpack it first"),
            (Content::Disk, Firmware, "not a flat firmware"),
        ];
        for (content, kind, reason) in bad {
            let error = content.check(kind, 8192).unwrap_err();
            assert!(error.contains(reason), "{content} as {kind}: {error}");
        }
        assert!(Content::Disk.check(Disk, 1000).unwrap_err().contains("sectors"));
        assert!(Content::Firmware.check(Firmware, 1000).unwrap_err().contains("4096"));
    }

    #[test]
    fn kinds_have_words() {
        for kind in [ImageKind::Kernel, ImageKind::Initrd, ImageKind::Firmware, ImageKind::Disk] {
            assert_eq!(kind.word().parse(), Ok(kind));
        }
        assert!("floppy".parse::<ImageKind>().unwrap_err().to_string().contains("floppy"));
    }
}
