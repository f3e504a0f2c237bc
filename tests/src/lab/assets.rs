//! What the nodes boot and run: kernel and initramfs (made by scripts under `deploy/`, kept in the
//! cache) and the programs with their libraries (copied into the lab's folder, stripped).

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, bail, ensure};

/// The repository that is worked in: of the crate that cargo runs, as `deploy/lab` says it, or else
/// the one this was built from. Clones share compiled programs, and the one built last may be gone.
#[must_use]
pub fn repository() -> PathBuf {
    let crate_folder =
        std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
    PathBuf::from(crate_folder).join("..")
}

/// A folder with a kernel and an initramfs.
#[derive(Debug, Clone)]
pub struct BootFiles {
    /// A bzImage, or an ELF image with a PVH entry point.
    pub kernel: PathBuf,
    /// The initramfs.
    pub initrd: PathBuf,
}

/// The node's boot files; made if they are missing or old.
///
/// # Errors
/// If the script fails; it has said why.
pub fn node_image() -> anyhow::Result<BootFiles> {
    let folder = super::state::cache().join("images/node");
    run_script("deploy/node/build", &[folder.as_os_str()])?;
    Ok(BootFiles { kernel: folder.join("kernel"), initrd: folder.join("node.cpio") })
}

/// The test guest's boot files; made if they are missing or old.
///
/// # Errors
/// If the script fails, or the guest's probe is not built.
pub fn guest_image() -> anyhow::Result<BootFiles> {
    let folder = super::state::cache().join("images/guest");
    let probe = program("guest-probe")?;
    run_script("deploy/guest/build", &[folder.as_os_str(), probe.as_os_str()])?;
    Ok(BootFiles { kernel: folder.join("vmlinuz"), initrd: folder.join("guest.cpio") })
}

fn run_script(script: &str, arguments: &[&std::ffi::OsStr]) -> anyhow::Result<()> {
    let path = repository().join(script);
    let status = Command::new(&path).args(arguments).stdin(Stdio::null()).status();
    let status = status.with_context(|| format!("cannot run {}", path.display()))?;
    ensure!(status.success(), "{script} failed ({status})");
    Ok(())
}

/// A program that this build made, or the one in the folder that `HOLDFAST_PROGRAMS` names.
///
/// # Errors
/// If it is not built.
pub fn program(name: &str) -> anyhow::Result<PathBuf> {
    if let Some(folder) = std::env::var_os("HOLDFAST_PROGRAMS") {
        let path = PathBuf::from(folder).join(name);
        ensure!(path.is_file(), "{} is not there (HOLDFAST_PROGRAMS)", path.display());
        return Ok(path);
    }
    let own = std::env::current_exe()?;
    let folder = own.parent().context("this program has no folder")?;
    let folder = if folder.ends_with("deps") { folder.parent().unwrap_or(folder) } else { folder };
    let path = folder.join(name);
    if !path.is_file() {
        bail!("{} is not built: run `cargo build --release --bins`", path.display());
    }
    Ok(path)
}

/// Fills `folder` with the programs for the nodes: `bin/`, and `root/` with their libraries.
///
/// # Errors
/// If a program is not built, or `strip` or `ldd` fail.
pub fn collect_programs(folder: &Path, names: &[&str]) -> anyhow::Result<()> {
    std::fs::create_dir_all(folder.join("bin"))?;
    for name in names {
        let from = program(name)?;
        let to = folder.join("bin").join(name);
        let new = to.with_extension("new");
        let status = Command::new("strip").arg("-o").arg(&new).arg(&from).status();
        ensure!(
            status.context("strip is missing: run deploy/setup")?.success(),
            "strip {name} failed"
        );
        std::fs::rename(new, to)?;
        for library in libraries(&from)? {
            let to = folder.join("root").join(library.strip_prefix("/")?);
            if !to.exists() {
                std::fs::create_dir_all(to.parent().context("a library without a folder")?)?;
                std::fs::copy(&library, &to)
                    .with_context(|| format!("copying {}", library.display()))?;
            }
        }
    }
    Ok(())
}

fn libraries(program: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let output = Command::new("ldd").arg(program).output()?;
    ensure!(output.status.success(), "ldd {} failed", program.display());
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    Ok(text.split_whitespace().filter(|word| word.starts_with('/')).map(PathBuf::from).collect())
}
