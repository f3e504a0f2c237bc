//! What this machine can do for the lab: hardware virtualization that nests, or emulation.

use std::fmt;
use std::path::Path;

/// How the nodes' CPUs are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accel {
    /// The host's KVM can nest: nodes run on it, and have their own KVM.
    Kvm,
    /// QEMU emulates an AMD CPU with SVM: slower, works everywhere.
    Tcg,
}

impl Accel {
    /// Finds out, by the CPU's flags and KVM's own parameters.
    #[must_use]
    pub fn detect() -> Self {
        let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let flag = |name: &str| cpuinfo.split_whitespace().any(|word| word == name);
        let nests =
            ["/sys/module/kvm_intel/parameters/nested", "/sys/module/kvm_amd/parameters/nested"]
                .iter()
                .any(|path| {
                    std::fs::read_to_string(path)
                        .is_ok_and(|text| matches!(text.trim(), "1" | "Y" | "y"))
                });
        let usable = std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm").is_ok();
        if (flag("svm") || flag("vmx")) && nests && usable { Self::Kvm } else { Self::Tcg }
    }

    /// QEMU's arguments.
    #[must_use]
    pub fn arguments(self) -> &'static [&'static str] {
        match self {
            Self::Kvm => &["-accel", "kvm", "-cpu", "host"],
            // Without XSAVE: the emulated SVM does not intercept XSETBV, so that KVM would not know
            // (and a migration not carry) a guest's XCR0. Without AES instructions: emulated, they
            // are several times slower than ChaCha20, which is taken where they are missing. Without SSSE3
            // (and what builds on it), because ChaCha20 in plain registers is emulated twice as fast as
            // in vectors: a live migration is as quick as that.
            Self::Tcg => &[
                "-accel",
                "tcg,thread=multi,tb-size=256",
                "-cpu",
                "EPYC,+svm,+npt,-xsave,-aes,-pclmulqdq,-ssse3,-sse4.1,-sse4.2",
            ],
        }
    }
}

impl fmt::Display for Accel {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kvm => write!(to, "this host's KVM nests: nodes run at native speed"),
            Self::Tcg if Path::new("/dev/kvm").exists() => {
                write!(
                    to,
                    "this host's KVM cannot nest (or may not be used): nodes run emulated, with emulated SVM"
                )
            }
            Self::Tcg => write!(to, "this host has no KVM: nodes run emulated, with emulated SVM"),
        }
    }
}
