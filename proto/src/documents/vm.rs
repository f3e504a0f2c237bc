//! The VM document: what a person writes to describe a VM, and the proof that it makes sense.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize};

use crate::document::{Document, DocumentError, Faults, check, parse};
use crate::schema::{Described, Shape, table};
use crate::{ByteSize, Name};

table! {
    /// A virtual machine; the file's name is the VM's.
    pub struct VmSpec {
        /// The VM's name, unique in the cluster; the file is called the same.
        name: Name, required;
        /// vCPUs.
        #[serde(default = "one")]
        cpus: u32, default "1", where "1 to 8" => |cpus| (1..=CPUS_MAX).contains(cpus);
        /// Guest memory.
        memory: ByteSize, required, where "at least 64MiB, in whole MiB, at most 16TiB" => |memory| {
            (MEMORY_MIN..=MEMORY_MAX).contains(memory) && memory.0.is_multiple_of(1 << 20)
        };
        /// Which CPU the guest sees. `baseline`: the features that all nodes share, so that the VM
        /// can move anywhere. `host`: all that the node has.
        #[serde(default, skip_serializing_if = "CpuModel::is_default")]
        cpu: CpuModel, default "\"baseline\"";
        /// What it boots: a kernel, or a firmware.
        boot: BootSpec, required;
        /// Disks in the guest's order.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        disks: Vec<DiskSpec>, default "[]", where "at most 16 disks" => |disks| disks.len() <= 16;
        /// Network cards in the guest's order.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        nics: Vec<NicSpec>, default "[]", where "at most 8 network cards" => |nics| nics.len() <= 8;
        /// High availability.
        #[serde(default)]
        ha: HaSpec, otherwise "none";
    }

    /// What a VM boots: a Linux kernel, or a flat PC firmware image. Files are `pool/image`.
    pub struct BootSpec {
        /// A bzImage or an ELF kernel with a PVH note.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        kernel: Option<String>, otherwise "none: `firmware` is needed",
            where "pool/name, with a-z, A-Z, 0-9, ., _ and - in the name" => |image| is_image(image);
        /// Initial RAM file system for `kernel`.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        initrd: Option<String>, otherwise "none",
            where "pool/name, with a-z, A-Z, 0-9, ., _ and - in the name" => |image| is_image(image);
        /// Kernel command line for `kernel`.
        #[serde(default, skip_serializing_if = "String::is_empty")]
        cmdline: String, default "\"\"", where "at most 2047 bytes, no NUL" => |line| {
            line.len() <= CMDLINE_MAX && !line.contains('\0')
        };
        /// A flat firmware image, mapped to end at 4 GiB.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        firmware: Option<String>, otherwise "none: `kernel` is needed",
            where "pool/name, with a-z, A-Z, 0-9, ., _ and - in the name" => |image| is_image(image);
    }

    /// A disk: an image file in a pool.
    pub struct DiskSpec {
        /// A raw image. Made, sparse, if it is missing and `size` is given.
        image: String, required,
            where "pool/name, with a-z, A-Z, 0-9, ., _ and - in the name" => |image| {
                parse_image(image).is_ok()
            };
        /// Size of a disk that is to be made.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        size: Option<ByteSize>, otherwise "the image's; it must be there",
            where "a multiple of 512 bytes, more than 0" => |size| {
                size.is_none_or(|size| size.0 > 0 && size.0.is_multiple_of(512))
            };
        /// The guest cannot write; several VMs may then share the image.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        readonly: bool, default "false";
    }

    /// A network card.
    pub struct NicSpec {
        /// The network it is plugged into.
        network: Name, required;
        /// Its address, as in 52:54:00:12:34:56.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        mac: Option<String>, otherwise "made from the VM's id",
            where "a unicast MAC address: six octets, as in 52:54:00:12:34:56" => |mac| {
                mac.as_deref().is_none_or(|mac| parse_mac(mac).is_some())
            };
    }

    /// High availability of one VM.
    pub struct HaSpec {
        /// Start it elsewhere when its node dies. All its files must then be in shared pools.
        #[serde(default)]
        enabled: bool, default "false";
        /// Higher first, when memory or time is short.
        #[serde(default, skip_serializing_if = "is_zero")]
        priority: i32, default "0",
            where "-1000 to 1000" => |priority| (-1000..=1000).contains(priority);
        /// Failed starts that are tried again on the same node, later each time.
        #[serde(default = "one")]
        max_restarts: u32, default "1", where "0 to 10" => |count| *count <= 10;
        /// Nodes it is given to after that, before it is given up (phase `error`).
        #[serde(default = "one")]
        max_relocations: u32, default "1", where "0 to 10" => |count| *count <= 10;
    }
}

impl Default for HaSpec {
    fn default() -> Self {
        Self { enabled: false, priority: 0, max_restarts: 1, max_relocations: 1 }
    }
}

fn is_zero(number: &i32) -> bool {
    *number == 0
}

impl Document for VmSpec {
    fn check_whole(&self, faults: &mut Faults) {
        faults.within("boot", |faults| self.boot.check_whole(faults));
        for (index, disk) in self.disks.iter().enumerate() {
            if self.disks[..index].iter().any(|other| other.image == disk.image) {
                faults.within("disks", |faults| {
                    faults.within(index, |faults| {
                        faults.within("image", |faults| {
                            faults.add(format!("disk `{}` is listed twice", disk.image));
                        });
                    });
                });
            }
        }
    }
}

impl BootSpec {
    fn check_whole(&self, faults: &mut Faults) {
        match (&self.kernel, &self.firmware) {
            (Some(_), Some(_)) | (None, None) => {
                faults.add("[boot] needs either `kernel` or `firmware`, not both and not neither");
            }
            (None, Some(_)) => {
                let given =
                    [("initrd", self.initrd.is_some()), ("cmdline", !self.cmdline.is_empty())];
                for (key, _) in given.into_iter().filter(|(_, given)| *given) {
                    faults.within(key, |faults| faults.add(format!("`{key}` needs `kernel`")));
                }
            }
            (Some(_), None) => {}
        }
    }
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

impl Described for CpuModel {
    const SHAPE: Shape = Shape::Words(&["baseline", "host"]);
}

fn one() -> u32 {
    1
}

/// Least guest memory.
pub const MEMORY_MIN: ByteSize = ByteSize(64 << 20);
/// Most guest memory.
const MEMORY_MAX: ByteSize = ByteSize(16 << 40);
/// Most vCPUs of a VM.
pub const CPUS_MAX: u32 = 8;
/// Longest kernel command line, bytes without the closing NUL.
pub const CMDLINE_MAX: usize = 2047;

/// Not `pool/name`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{}` does not name an image: write pool/name, with a-z, A-Z, 0-9, ., _ and - in the name",
    .0.chars().take(200).collect::<String>().escape_debug()
)]
pub struct InvalidImage(pub String);

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

impl VmSpec {
    /// Reads and checks a TOML document.
    ///
    /// # Errors
    /// Everything that is wrong, with line and column.
    pub fn parse(document: &str) -> Result<ValidatedVmSpec, DocumentError> {
        parse(document).map(ValidatedVmSpec)
    }

    /// Checks everything that can be checked without knowing the cluster.
    ///
    /// # Errors
    /// Everything that is wrong.
    pub fn validate(self) -> Result<ValidatedVmSpec, DocumentError> {
        check(&self)?;
        Ok(ValidatedVmSpec(self))
    }
}

/// Splits and checks `pool/name`.
///
/// # Errors
/// [`InvalidImage`] if it is anything else; so no path can escape a pool.
pub fn parse_image(reference: &str) -> Result<(Name, &str), InvalidImage> {
    let invalid = || InvalidImage(reference.chars().take(200).collect());
    let (pool, image) = reference.split_once('/').ok_or_else(invalid)?;
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    if image.is_empty() || image.len() > 128 || image.starts_with('.') || !image.chars().all(plain)
    {
        return Err(invalid());
    }
    Ok((pool.parse().map_err(|_| invalid())?, image))
}

fn is_image(reference: &Option<String>) -> bool {
    reference.as_deref().is_none_or(|reference| parse_image(reference).is_ok())
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
            ("cpus = 2", "cpus = 0", "line 2, column 8: `cpus` is refused: 1 to 8"),
            ("cpus = 2", "cpus = 9", "line 2, column 8: `cpus` is refused: 1 to 8"),
            ("512MiB", "32MiB", "at least 64MiB"),
            ("512MiB", "512MB", "is not a size"),
            ("kernel = \"shared/vmlinuz\"", "", "either `kernel` or `firmware`"),
            ("shared/web.raw", "shared/../web.raw", "pool/name"),
            ("shared/web.raw", "web.raw", "pool/name"),
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
