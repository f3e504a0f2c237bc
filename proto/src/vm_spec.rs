//! The VM document: what a person writes to describe a VM, and the proof that it makes sense.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize};

use crate::{ByteSize, DocumentError, Name};

/// A VM as its document says it. Unknown keys are refused. [`VmSpec::validate`] makes the form
/// that the rest of the system takes.
///
/// ```toml
/// name = "web"
/// cpus = 2
/// memory = "512MiB"
/// [boot]
/// kernel = "shared/vmlinuz"
/// initrd = "shared/guest.cpio.gz"
/// cmdline = "console=ttyS0"
/// [[disks]]
/// image = "shared/web.raw"
/// size = "1GiB"
/// [[nics]]
/// network = "lan"
/// [ha]
/// enabled = true
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmSpec {
    /// The VM's name, unique in the cluster.
    pub name: Name,
    /// vCPUs, 1 to 8.
    #[serde(default = "one")]
    pub cpus: u32,
    /// Guest memory, 64 MiB or more, a multiple of 1 MiB.
    pub memory: ByteSize,
    /// `baseline` (default): features that all nodes share, so the VM can move anywhere; `host`.
    #[serde(default, skip_serializing_if = "CpuModel::is_default")]
    pub cpu: CpuModel,
    /// What it boots.
    pub boot: BootSpec,
    /// Disks in the guest's order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<DiskSpec>,
    /// Network cards in the guest's order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub nics: Vec<NicSpec>,
    /// High availability; absent: none.
    #[serde(default)]
    pub ha: HaSpec,
}

/// Which CPU the guest sees.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum CpuModel {
    /// The features that all nodes of the cluster share.
    #[default]
    Baseline,
    /// All that the node has; the VM may not be able to move.
    Host,
}

impl CpuModel {
    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

impl<'de> Deserialize<'de> for CpuModel {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl serde::de::Visitor<'_> for Visitor {
            type Value = CpuModel;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("\"baseline\" or \"host\"")
            }
            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<CpuModel, E> {
                match text {
                    "baseline" => Ok(CpuModel::Baseline),
                    "host" => Ok(CpuModel::Host),
                    other => Err(E::unknown_variant(other, &["baseline", "host"])),
                }
            }
            fn visit_i64<E: serde::de::Error>(self, count: i64) -> Result<CpuModel, E> {
                Err(E::custom(format_args!(
                    "`cpu` is the model, \"baseline\" or \"host\"; for the number of vCPUs write \
                     `cpus = {count}`"
                )))
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

/// What a VM boots: a Linux kernel, or a flat PC firmware image. Files are `pool/image`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BootSpec {
    /// A bzImage or an ELF kernel with a PVH note.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<String>,
    /// Initial RAM file system for `kernel`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initrd: Option<String>,
    /// Kernel command line for `kernel`, at most 2047 bytes.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub cmdline: String,
    /// A flat firmware image, mapped to end at 4 GiB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub firmware: Option<String>,
}

/// A disk: an image file in a pool.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskSpec {
    /// `pool/name` of a raw image. Made, sparse, if it is missing and `size` is given.
    pub image: String,
    /// Size for a disk that is to be made; a multiple of 512 bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<ByteSize>,
    /// The guest cannot write; several VMs may then share the image.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub readonly: bool,
}

/// A network card.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NicSpec {
    /// Name of the network it is plugged into.
    pub network: Name,
    /// Six octets; made from the VM's id where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<String>,
}

/// High availability of one VM.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct HaSpec {
    /// Start it elsewhere when its node dies. Its disks must then be on shared pools.
    pub enabled: bool,
}

fn one() -> u32 {
    1
}

/// Least guest memory, bytes.
pub const MEMORY_MIN: ByteSize = ByteSize(64 << 20);
/// Most vCPUs of a VM.
pub const CPUS_MAX: u32 = 8;
/// Longest kernel command line, bytes without the closing NUL.
pub const CMDLINE_MAX: usize = 2047;
const DISKS_MAX: usize = 16;
const NICS_MAX: usize = 8;

/// Why a [`VmSpec`] is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SpecError {
    /// The document itself.
    #[error(transparent)]
    Document(#[from] DocumentError),
    /// vCPUs out of range.
    #[error("cpus = {0} is out of range: a VM has 1 to {CPUS_MAX} vCPUs")]
    Cpus(u32),
    /// Memory too small or uneven.
    #[error("memory = \"{0}\" is refused: give at least {MEMORY_MIN}, in whole MiB")]
    Memory(ByteSize),
    /// Neither or both ways of booting.
    #[error("[boot] needs either `kernel` or `firmware`, not both and not neither")]
    Boot,
    /// Something that goes with a kernel was given without one.
    #[error("[boot] `{0}` needs `kernel`")]
    NeedsKernel(&'static str),
    /// Command line too long or with a NUL.
    #[error("[boot] cmdline is refused: at most {CMDLINE_MAX} bytes, no NUL")]
    Cmdline,
    /// Not `pool/name`.
    #[error(
        "`{0}` does not name an image: write pool/name, with a-z, A-Z, 0-9, ., _ and - in the name"
    )]
    Image(String),
    /// Disk size.
    #[error("disk `{0}`: size must be a multiple of 512 bytes and more than 0")]
    DiskSize(String),
    /// The same image twice.
    #[error("disk `{0}` is listed twice")]
    DiskTwice(String),
    /// Too many devices.
    #[error("too many {0}: at most {1}")]
    TooMany(&'static str, usize),
    /// Not a unicast MAC address.
    #[error("`{0}` is not a unicast MAC address: write six octets, as in 52:54:00:12:34:56")]
    Mac(String),
}

/// A VM document that makes sense by itself: cannot be made any other way than by checking.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ValidatedVmSpec(VmSpec);

impl ValidatedVmSpec {
    /// The checked document.
    #[must_use]
    pub fn get(&self) -> &VmSpec {
        &self.0
    }
}

impl std::ops::Deref for ValidatedVmSpec {
    type Target = VmSpec;
    fn deref(&self) -> &VmSpec {
        &self.0
    }
}

/// Splits and checks `pool/name`.
///
/// # Errors
/// [`SpecError::Image`] if it is anything else; so no path can escape a pool.
pub fn parse_image(reference: &str) -> Result<(Name, &str), SpecError> {
    let invalid = || SpecError::Image(reference.chars().take(200).collect());
    let (pool, image) = reference.split_once('/').ok_or_else(invalid)?;
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    if image.is_empty() || image.len() > 128 || image.starts_with('.') || !image.chars().all(plain)
    {
        return Err(invalid());
    }
    Ok((pool.parse().map_err(|_| invalid())?, image))
}

/// Parses a unicast MAC address.
#[must_use]
pub fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let mut mac = [0; 6];
    let mut parts = text.split(':');
    for octet in &mut mac {
        let part = parts.next().filter(|part| part.len() == 2)?;
        *octet = u8::from_str_radix(part, 16).ok()?;
    }
    (parts.next().is_none() && mac[0] & 1 == 0 && mac != [0; 6]).then_some(mac)
}

impl VmSpec {
    /// Reads and checks a TOML document.
    ///
    /// # Errors
    /// The first thing that is wrong, with line and column where it is the document's form.
    pub fn parse(document: &str) -> Result<ValidatedVmSpec, SpecError> {
        let spec: VmSpec = toml::from_str(document).map_err(DocumentError::from)?;
        spec.validate()
    }

    /// Checks everything that can be checked without knowing the cluster.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn validate(self) -> Result<ValidatedVmSpec, SpecError> {
        if !(1..=CPUS_MAX).contains(&self.cpus) {
            return Err(SpecError::Cpus(self.cpus));
        }
        if self.memory < MEMORY_MIN
            || !self.memory.0.is_multiple_of(1 << 20)
            || self.memory.0 > 1 << 44
        {
            return Err(SpecError::Memory(self.memory));
        }
        self.boot.validate()?;
        if self.disks.len() > DISKS_MAX {
            return Err(SpecError::TooMany("disks", DISKS_MAX));
        }
        if self.nics.len() > NICS_MAX {
            return Err(SpecError::TooMany("nics", NICS_MAX));
        }
        for (index, disk) in self.disks.iter().enumerate() {
            parse_image(&disk.image)?;
            if disk.size.is_some_and(|size| size.0 == 0 || !size.0.is_multiple_of(512)) {
                return Err(SpecError::DiskSize(disk.image.clone()));
            }
            if self.disks[..index].iter().any(|other| other.image == disk.image) {
                return Err(SpecError::DiskTwice(disk.image.clone()));
            }
        }
        for mac in self.nics.iter().filter_map(|nic| nic.mac.as_ref()) {
            parse_mac(mac).ok_or_else(|| SpecError::Mac(mac.clone()))?;
        }
        Ok(ValidatedVmSpec(self))
    }
}

impl BootSpec {
    fn validate(&self) -> Result<(), SpecError> {
        match (&self.kernel, &self.firmware) {
            (Some(_), Some(_)) | (None, None) => return Err(SpecError::Boot),
            (None, Some(_)) if self.initrd.is_some() => {
                return Err(SpecError::NeedsKernel("initrd"));
            }
            (None, Some(_)) if !self.cmdline.is_empty() => {
                return Err(SpecError::NeedsKernel("cmdline"));
            }
            (None, Some(_)) | (Some(_), None) => {}
        }
        if self.cmdline.len() > CMDLINE_MAX || self.cmdline.contains('\0') {
            return Err(SpecError::Cmdline);
        }
        for image in [&self.kernel, &self.initrd, &self.firmware].into_iter().flatten() {
            parse_image(image)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WEB: &str = "name = \"web\"\ncpus = 2\nmemory = \"512MiB\"\n[boot]\nkernel = \"shared/vmlinuz\"\n[[disks]]\nimage = \"shared/web.raw\"\nsize = \"1GiB\"\n";

    #[test]
    fn a_document_becomes_a_spec() {
        let spec = VmSpec::parse(WEB).unwrap();
        assert_eq!((spec.cpus, spec.memory.0, spec.disks.len()), (2, 512 << 20, 1));
        assert!(!spec.ha.enabled);
    }

    #[test]
    fn an_unknown_key_names_its_line() {
        let error = VmSpec::parse(&WEB.replace("cpus", "cpuss")).unwrap_err().to_string();
        assert!(error.contains("cpuss") && error.contains("line 2"), "{error}");
    }

    #[test]
    fn a_number_as_the_cpu_model_is_told_from_the_number_of_cpus() {
        let error = VmSpec::parse(&WEB.replace("cpus = 2", "cpu = 2")).unwrap_err().to_string();
        assert!(error.contains("write `cpus = 2`") && error.contains("line 2"), "{error}");
        let error = VmSpec::parse(&WEB.replace("cpus = 2", "cpu = \"fast\"")).unwrap_err();
        assert!(error.to_string().contains("`baseline` or `host`"), "{error}");
        for (word, model) in [("baseline", CpuModel::Baseline), ("host", CpuModel::Host)] {
            let spec = VmSpec::parse(&WEB.replace("cpus = 2", &format!("cpu = \"{word}\"")));
            assert_eq!(spec.unwrap().cpu, model);
        }
    }

    #[test]
    fn nonsense_is_refused_with_its_reason() {
        let cases = [
            ("cpus = 2", "cpus = 0", "cpus = 0"),
            ("cpus = 2", "cpus = 9", "cpus = 9"),
            ("512MiB", "32MiB", "at least 64MiB"),
            ("512MiB", "512MB", "is not a size"),
            ("kernel = \"shared/vmlinuz\"", "", "either `kernel` or `firmware`"),
            ("shared/web.raw", "shared/../web.raw", "does not name an image"),
            ("shared/web.raw", "web.raw", "does not name an image"),
            ("1GiB", "100", "multiple of 512"),
            ("\"web\"", "\"We b\"", "not a valid name"),
        ];
        for (from, to, expected) in cases {
            let error = VmSpec::parse(&WEB.replace(from, to)).unwrap_err().to_string();
            assert!(error.contains(expected), "{to}: {error}");
        }
    }

    #[test]
    fn macs_are_unicast() {
        assert_eq!(parse_mac("52:54:00:12:34:56"), Some([0x52, 0x54, 0, 0x12, 0x34, 0x56]));
        for bad in
            ["", "52:54:00:12:34", "52:54:00:12:34:56:78", "53:54:00:12:34:56", "5:54:00:12:34:56"]
        {
            assert_eq!(parse_mac(bad), None, "{bad}");
        }
    }
}
