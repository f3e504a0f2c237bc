//! What a VM process gives up once it has opened all it needs.
//!
//! A guest that breaks out of the VMM finds: a user of its own, no capabilities, an empty root
//! folder, no new privileges, limits, a cgroup, and a seccomp filter that kills the process on any
//! system call that a VM does not need. Owns the order of these steps; knows nothing of VMs.

pub mod cgroup;
pub mod seccomp;

use std::path::Path;

use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::resource::{Resource, setrlimit};
use nix::unistd::{Gid, Uid, chdir, chroot, geteuid, setgroups, setresgid, setresuid};

/// Why a process could not be jailed. It must not run its guest then.
#[derive(Debug, thiserror::Error)]
pub enum JailError {
    /// A step that the kernel refused.
    #[error("jail: {step} failed: {errno}")]
    Step {
        /// Which.
        step: &'static str,
        /// The kernel's reason.
        errno: Errno,
    },
    /// The agent's mounted tree.
    #[error("jail: cannot leave the mounted tree: {0}")]
    Tree(#[source] std::io::Error),
    /// The filter.
    #[error("jail: seccomp: {0}")]
    Seccomp(#[from] seccomp::FilterError),
}

fn step(step: &'static str) -> impl FnOnce(Errno) -> JailError {
    move |errno| JailError::Step { step, errno }
}

/// First half, while the process has one thread and is root: namespaces of its own. Mounts go on
/// to follow the host's (a share that the host unmounts is not held here), never the other way. The
/// agent's tree is not among them: it would be held for as long as the process lives.
///
/// # Errors
/// [`JailError::Step`].
pub fn enter_namespaces() -> Result<(), JailError> {
    if !geteuid().is_root() {
        return Ok(());
    }
    let own = CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWUTS;
    match unshare(own) {
        Ok(()) => {
            let slave = MsFlags::MS_REC | MsFlags::MS_SLAVE;
            mount(None::<&str>, "/", None::<&str>, slave, None::<&str>)
                .map_err(step("detaching mounts"))?;
            cluster::tree::leave_all().map_err(JailError::Tree)
        }
        // A container may forbid it; the empty root below still hides the host's files.
        Err(Errno::EPERM) => Ok(()),
        Err(errno) => Err(step("unshare")(errno)),
    }
}

/// Second half, when everything is open: limits, empty root, own user, no capabilities, no new
/// privileges. Call [`seccomp::install`] next.
///
/// # Errors
/// [`JailError::Step`]; the process must end then.
pub fn drop_privileges(root: &Path, uid: Option<u32>) -> Result<(), JailError> {
    limit()?;
    if geteuid().is_root() {
        drop_bounding_set()?;
        chroot(root).map_err(step("chroot"))?;
        chdir("/").map_err(step("chdir"))?;
        if let Some(uid) = uid {
            setgroups(&[]).map_err(step("setgroups"))?;
            let gid = Gid::from_raw(uid);
            setresgid(gid, gid, gid).map_err(step("setresgid"))?;
            let uid = Uid::from_raw(uid);
            setresuid(uid, uid, uid).map_err(step("setresuid"))?;
        }
    }
    clear_capabilities()?;
    prctl(libc::PR_SET_NO_NEW_PRIVS, 1).map_err(step("no_new_privs"))?;
    prctl(libc::PR_SET_DUMPABLE, 0).map_err(step("not dumpable"))
}

/// Core dumps would hold the guest's memory. The rest bounds what a broken VMM can pile up.
fn limit() -> Result<(), JailError> {
    let limits = [
        (Resource::RLIMIT_CORE, 0, "RLIMIT_CORE"),
        (Resource::RLIMIT_NOFILE, 1024, "RLIMIT_NOFILE"),
        (Resource::RLIMIT_MSGQUEUE, 0, "RLIMIT_MSGQUEUE"),
        (Resource::RLIMIT_SIGPENDING, 1024, "RLIMIT_SIGPENDING"),
    ];
    limits.into_iter().try_for_each(|(resource, value, name)| {
        setrlimit(resource, value, value).map_err(step(name))
    })
}

fn drop_bounding_set() -> Result<(), JailError> {
    // Numbers above the kernel's last capability answer EINVAL: that ends the loop.
    for capability in 0..64 {
        match prctl(libc::PR_CAPBSET_DROP, capability) {
            Ok(()) => {}
            Err(Errno::EINVAL) if capability > 0 => break,
            Err(errno) => return Err(step("dropping the capability bounding set")(errno)),
        }
    }
    Ok(())
}

/// `struct __user_cap_header_struct` and two `__user_cap_data_struct` (capset(2), version 3).
fn clear_capabilities() -> Result<(), JailError> {
    const VERSION_3: u32 = 0x2008_0522;
    let header: [u32; 2] = [VERSION_3, 0];
    let none: [u32; 6] = [0; 6];
    // SAFETY: header and data have capset's layout for version 3 and outlive the call; pid 0 is
    // the calling thread. Giving capabilities up is always allowed.
    let answer = unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), none.as_ptr()) };
    Errno::result(answer).map(drop).map_err(step("clearing capabilities"))
}

fn prctl(option: libc::c_int, value: libc::c_ulong) -> nix::Result<()> {
    // SAFETY: the options used here take one number and change only this process's attributes.
    let answer = unsafe {
        libc::prctl(option, value, 0 as libc::c_ulong, 0 as libc::c_ulong, 0 as libc::c_ulong)
    };
    Errno::result(answer).map(drop)
}
