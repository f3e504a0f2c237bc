//! A process that is killed leaves a mount that fails at once; the next start replaces it.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use cluster::Txn;
use nix::errno::Errno;

use super::harness::{Mounted, can_mount, failure, wait};
use crate::common::Outcome;

/// Where the killed process mounts; set for it alone.
const VARIABLE: &str = "HOLDFAST_TREE_CRASH";

/// The process that is killed: this very program, asked for the test below.
struct Victim(Child);

impl Drop for Victim {
    fn drop(&mut self) {
        // It may have ended by itself.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

/// Not a test by itself: what [`Victim`] runs.
#[test]
fn victim() -> Outcome {
    let Ok(folder) = std::env::var(VARIABLE) else { return Ok(()) };
    let tree = Mounted::new_in(1, Path::new(&folder))?;
    // Not through its own mount: a process that is killed while it waits for itself stays.
    tree.txn(0, Txn::new().put("mine", "x"))?;
    loop {
        std::thread::sleep(Duration::from_secs(60));
    }
}

#[test]
fn what_a_killed_process_leaves_is_replaced() -> Outcome {
    if !can_mount("what_a_killed_process_leaves_is_replaced") {
        return Ok(());
    }
    let mut tree = Mounted::new(1)?;
    let root = tree.path("");
    tree.unmount(0);
    let temporary = tree.folder().join("temporary");
    fs::create_dir(&temporary)?;
    for _ in 0..2 {
        let mut victim = Command::new(std::env::current_exe()?);
        victim.args(["--exact", "tree::crash::victim", "--nocapture"]).env(VARIABLE, tree.folder());
        victim.env("TMPDIR", &temporary);
        let mut victim = Victim(victim.stdout(Stdio::null()).spawn()?);
        wait("it has mounted", || root.join("mine").exists());
        let held = fs::File::open(root.join("mine"))?;
        victim.0.kill()?;
        victim.0.wait()?;
        let begin = Instant::now();
        let read = std::os::unix::fs::FileExt::read_at(&held, &mut [0; 1], 0);
        assert_eq!(failure(fs::read_dir(&root)), Errno::ENOTCONN);
        assert_eq!(failure(read), Errno::ENOTCONN);
        assert!(begin.elapsed() < Duration::from_secs(1), "{:?}", begin.elapsed());
    }
    tree.mount(0)?;
    assert!(root.join("vms").is_dir() && !root.join("mine").exists());
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    let point = format!(" {} ", root.to_string_lossy().trim_end_matches('/'));
    let here = mounts.lines().filter(|line| line.contains(&point));
    assert_eq!(here.count(), 1, "the remains are gone");
    Ok(())
}
