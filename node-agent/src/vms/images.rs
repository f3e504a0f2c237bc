//! Which images a VM uses and as what, and who may share one.
//!
//! An image that is written belongs to one VM alone. Images that are only read (kernels, initramfs,
//! firmware, read-only disks) are shared by as many as like.

use std::fmt;

use proto::{Name, VmSpec};

use crate::storage::ImageKind;

/// One use of an image by a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ImageUse<'a> {
    /// `pool/name`.
    pub image: &'a str,
    /// As what.
    pub kind: ImageKind,
    /// Whether the VM writes it.
    pub written: bool,
}

impl fmt::Display for ImageUse<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.kind, self.written) {
            (ImageKind::Disk, true) => f.write_str("writable disk"),
            (ImageKind::Disk, false) => f.write_str("read-only disk"),
            (kind, _) => kind.fmt(f),
        }
    }
}

/// All that a VM boots from, then its disks in order.
pub fn image_uses(spec: &VmSpec) -> impl Iterator<Item = ImageUse<'_>> {
    let boot = [
        (&spec.boot.kernel, ImageKind::Kernel),
        (&spec.boot.initrd, ImageKind::Initrd),
        (&spec.boot.firmware, ImageKind::Firmware),
    ];
    let boot = boot.into_iter().filter_map(|(image, kind)| {
        Some(ImageUse { image: image.as_deref()?, kind, written: false })
    });
    let disks = spec.disks.iter().map(|disk| ImageUse {
        image: &disk.image,
        kind: ImageKind::Disk,
        written: !disk.readonly,
    });
    boot.chain(disks)
}

/// Two uses of one image that exclude each other.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "image `{image}` cannot be a {wanted} of VM `{vm}`: it is a {present} of VM `{owner}`; use a \
     copy of it, or make every disk that it is `readonly = true`"
)]
pub struct ImageShared {
    /// `pool/name`.
    pub image: String,
    vm: Name,
    wanted: String,
    owner: Name,
    present: String,
}

/// Whether a VM may use its images beside `others`: one that somebody writes is nobody else's, and
/// not even the VM's own in another way.
///
/// # Errors
/// The first image that cannot be shared.
pub fn check_sharing<'a>(
    spec: &VmSpec,
    others: impl Iterator<Item = &'a VmSpec>,
) -> Result<(), ImageShared> {
    let shared = |wanted: ImageUse<'_>, present: ImageUse<'_>, owner: &Name| ImageShared {
        image: wanted.image.to_owned(),
        vm: spec.name.clone(),
        wanted: wanted.to_string(),
        owner: owner.clone(),
        present: present.to_string(),
    };
    let clash = |a: ImageUse<'_>, b: ImageUse<'_>| a.image == b.image && (a.written || b.written);
    for (index, wanted) in image_uses(spec).enumerate() {
        if let Some(present) = image_uses(spec).take(index).find(|own| clash(wanted, *own)) {
            return Err(shared(wanted, present, &spec.name));
        }
    }
    for other in others.filter(|other| other.name != spec.name) {
        for present in image_uses(other) {
            if let Some(wanted) = image_uses(spec).find(|wanted| clash(*wanted, present)) {
                return Err(shared(wanted, present, &other.name));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(name: &str, kernel: &str, disks: &[(&str, bool)]) -> VmSpec {
        let mut text =
            format!("name = \"{name}\"\nmemory = \"64MiB\"\n[boot]\nkernel = \"p/{kernel}\"\n");
        for (image, readonly) in disks {
            text.push_str(&format!("[[disks]]\nimage = \"p/{image}\"\nreadonly = {readonly}\n"));
        }
        VmSpec::parse(&text).unwrap().get().clone()
    }

    #[test]
    fn what_is_only_read_is_shared() {
        let a = spec("a", "vmlinuz", &[("data", true), ("vmlinuz", true), ("own-a", false)]);
        let b = spec("b", "vmlinuz", &[("data", true), ("own-b", false)]);
        assert_eq!(check_sharing(&b, [&a].into_iter()), Ok(()));
        // Itself, as it was before.
        assert_eq!(check_sharing(&b, [&a, &b].into_iter()), Ok(()));
    }

    #[test]
    fn what_is_written_belongs_to_one() {
        let writes = |image| spec("b", "other", &[(image, false)]);
        let cases = [
            (writes("vmlinuz"), spec("a", "vmlinuz", &[]), "it is a kernel of VM `a`"),
            (writes("d"), spec("a", "k", &[("d", true)]), "it is a read-only disk of VM `a`"),
            (writes("d"), spec("a", "k", &[("d", false)]), "it is a writable disk of VM `a`"),
            (spec("b", "d", &[]), spec("a", "k", &[("d", false)]), "cannot be a kernel of VM `b`"),
            (
                spec("b", "k", &[("d", true)]),
                spec("a", "k", &[("d", false)]),
                "read-only disk of VM `b`",
            ),
            (spec("b", "d", &[("d", false)]), spec("a", "k", &[]), "it is a kernel of VM `b`"),
        ];
        for (wanted, present, reason) in cases {
            let error = check_sharing(&wanted, [&present].into_iter()).unwrap_err().to_string();
            assert!(error.contains(reason), "{error}");
        }
    }
}
