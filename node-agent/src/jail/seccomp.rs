//! The system calls a VM process may make once it is set up. All others kill it.
//!
//! Two filters: one that refuses politely what libraries try and can do without (opening files,
//! `clone3`, whose flags a filter cannot see), and the allowlist. The stricter answer wins.

use std::collections::BTreeMap;

use seccompiler::SeccompCmpArgLen::{Dword, Qword};
use seccompiler::SeccompCmpOp::{Eq, MaskedEq};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCondition, SeccompFilter, SeccompRule, TargetArch,
    apply_filter_all_threads,
};

/// The filter could not be made or installed.
#[derive(Debug, thiserror::Error)]
pub enum FilterError {
    /// Made.
    #[error("the filter cannot be built: {0}")]
    Build(#[from] seccompiler::BackendError),
    /// Installed.
    #[error("the filter cannot be installed: {0}")]
    Install(#[from] seccompiler::Error),
}

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

/// Allowed whatever their arguments.
const FREE: &[i64] = &[
    // memory
    libc::SYS_brk,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_mincore,
    libc::SYS_msync,
    libc::SYS_membarrier,
    // threads and time
    libc::SYS_futex,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_gettid,
    libc::SYS_getpid,
    libc::SYS_tgkill,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_nanosleep,
    libc::SYS_clock_nanosleep,
    libc::SYS_clock_gettime,
    libc::SYS_clock_getres,
    libc::SYS_gettimeofday,
    libc::SYS_getrandom,
    libc::SYS_getrusage,
    libc::SYS_sysinfo,
    libc::SYS_uname,
    libc::SYS_getuid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getegid,
    // signals
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_restart_syscall,
    // waiting
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_eventfd2,
    libc::SYS_timerfd_create,
    libc::SYS_timerfd_settime,
    libc::SYS_timerfd_gettime,
    // open files
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_preadv,
    libc::SYS_pwritev,
    libc::SYS_preadv2,
    libc::SYS_pwritev2,
    libc::SYS_lseek,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_fallocate,
    libc::SYS_ftruncate,
    libc::SYS_sync_file_range,
    libc::SYS_fadvise64,
    libc::SYS_fstat,
    libc::SYS_close,
    libc::SYS_dup,
    libc::SYS_fcntl,
    libc::SYS_pipe2,
    // open sockets
    libc::SYS_accept4,
    libc::SYS_connect,
    libc::SYS_shutdown,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
];

/// Answered with ENOSYS or EACCES: libraries ask for them and go on without.
const REFUSED: &[(i64, i32)] = &[
    (libc::SYS_clone3, libc::ENOSYS),
    (libc::SYS_open, libc::EACCES),
    (libc::SYS_openat, libc::EACCES),
    (libc::SYS_openat2, libc::EACCES),
    (libc::SYS_access, libc::EACCES),
    (libc::SYS_faccessat, libc::EACCES),
    (libc::SYS_faccessat2, libc::EACCES),
    (libc::SYS_readlink, libc::EACCES),
    (libc::SYS_readlinkat, libc::EACCES),
    (libc::SYS_getcwd, libc::EACCES),
    (libc::SYS_stat, libc::EACCES),
    (libc::SYS_prlimit64, libc::EPERM),
    (libc::SYS_sched_setaffinity, libc::EPERM),
];

/// Ioctl numbers by their type byte: KVM's; `T` (taps, FIONBIO); 0x12 (block devices).
const IOCTL_TYPES: [u64; 3] = [0xae, 0x54, 0x12];

/// Installs both filters for every thread. Needs no_new_privs.
///
/// # Errors
/// [`FilterError`]; the process must not run its guest then.
pub fn install() -> Result<(), FilterError> {
    for program in programs()? {
        apply_filter_all_threads(&program)?;
    }
    Ok(())
}

fn programs() -> Result<Vec<BpfProgram>, FilterError> {
    let mut programs = Vec::new();
    for errno in [libc::ENOSYS, libc::EACCES, libc::EPERM] {
        let calls = REFUSED.iter().filter(|(_, answer)| *answer == errno);
        let rules: Rules = calls.map(|(call, _)| (*call, Vec::new())).collect();
        let answer = SeccompAction::Errno(errno.unsigned_abs());
        let filter = SeccompFilter::new(rules, SeccompAction::Allow, answer, TargetArch::x86_64)?;
        programs.push(BpfProgram::try_from(filter)?);
    }
    let filter = SeccompFilter::new(
        allowlist()?,
        SeccompAction::KillProcess,
        SeccompAction::Allow,
        TargetArch::x86_64,
    )?;
    programs.push(BpfProgram::try_from(filter)?);
    Ok(programs)
}

fn allowlist() -> Result<Rules, FilterError> {
    let mut rules: Rules = FREE.iter().map(|call| (*call, Vec::new())).collect();
    rules.extend(REFUSED.iter().map(|(call, _)| (*call, Vec::new())));
    let mut rule = |call: i64, conditions: Vec<SeccompCondition>| -> Result<(), FilterError> {
        rules.entry(call).or_default().push(SeccompRule::new(conditions)?);
        Ok(())
    };
    // Nothing becomes executable after the start.
    let no_exec = || SeccompCondition::new(2, Dword, MaskedEq(exec_bit()), 0);
    rule(libc::SYS_mmap, vec![no_exec()?])?;
    rule(libc::SYS_mprotect, vec![no_exec()?])?;
    // Threads, never processes.
    let thread = u64::from(libc::CLONE_THREAD.unsigned_abs());
    rule(libc::SYS_clone, vec![SeccompCondition::new(0, Qword, MaskedEq(thread), thread)?])?;
    for family in [libc::AF_INET, libc::AF_INET6] {
        let family = u64::from(family.unsigned_abs());
        rule(libc::SYS_socket, vec![SeccompCondition::new(0, Dword, Eq, family)?])?;
    }
    // tokio's signal handling talks to itself.
    let unix = u64::from(libc::AF_UNIX.unsigned_abs());
    rule(libc::SYS_socketpair, vec![SeccompCondition::new(0, Dword, Eq, unix)?])?;
    for kind in IOCTL_TYPES {
        let condition = SeccompCondition::new(1, Dword, MaskedEq(0xff00), kind << 8)?;
        rule(libc::SYS_ioctl, vec![condition])?;
    }
    for option in [libc::PR_SET_NAME, libc::PR_SET_VMA] {
        let option = u64::from(option.unsigned_abs());
        rule(libc::SYS_prctl, vec![SeccompCondition::new(0, Dword, Eq, option)?])?;
    }
    // What an open descriptor is (an empty path), which glibc's fstat and std's metadata ask so.
    let empty_path = u64::from(libc::AT_EMPTY_PATH.unsigned_abs());
    let by_descriptor =
        |argument| SeccompCondition::new(argument, Dword, MaskedEq(empty_path), empty_path);
    rule(libc::SYS_newfstatat, vec![by_descriptor(3)?])?;
    rule(libc::SYS_statx, vec![by_descriptor(2)?])?;
    Ok(rules)
}

fn exec_bit() -> u64 {
    u64::from(libc::PROT_EXEC.unsigned_abs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_filters_fit_the_kernel_and_leave_dangerous_calls_out() {
        assert!(programs().unwrap().iter().all(|program| program.len() < 4096));
        let rules = allowlist().unwrap();
        let dangerous = [
            libc::SYS_execve,
            libc::SYS_execveat,
            libc::SYS_fork,
            libc::SYS_ptrace,
            libc::SYS_mount,
            libc::SYS_kill,
            libc::SYS_io_uring_setup,
            libc::SYS_bpf,
            libc::SYS_process_vm_writev,
            libc::SYS_setuid,
            libc::SYS_bind,
            libc::SYS_unshare,
        ];
        for call in dangerous {
            assert!(!rules.contains_key(&call), "system call {call} is allowed");
        }
    }
}
