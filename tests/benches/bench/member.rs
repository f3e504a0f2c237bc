//! What the load needs of a store, whoever made it; and its processes, which are asked for their
//! memory and their writes.

use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use futures::future::BoxFuture;
use futures::stream::BoxStream;
use nix::sys::signal::Signal;
use tests::lab::process::ProcessId;

/// A connection of one client to one member.
pub(crate) trait Connection: Clone + Send + 'static {
    /// Sets a key.
    fn put(&mut self, key: &str, value: Vec<u8>) -> BoxFuture<'_, anyhow::Result<()>>;
    /// Whether a key is there, by a linearizable read.
    fn get(&mut self, key: &str) -> BoxFuture<'_, anyhow::Result<bool>>;
    /// The values put under a prefix from now on.
    fn watch(
        &mut self,
        prefix: &str,
    ) -> BoxFuture<'_, anyhow::Result<BoxStream<'static, anyhow::Result<Vec<u8>>>>>;
}

/// Three members.
pub(crate) trait Members {
    type Connection: Connection;
    /// A new connection of one of the clients to one of them.
    fn connect(&self, client: usize, member: usize) -> Self::Connection;
    /// Which of them leads.
    fn leader(&self) -> BoxFuture<'_, anyhow::Result<usize>>;
    /// Their processes.
    fn processes(&self) -> &[Process];
    /// Starts one of them, after it ended, on what it had.
    fn start(&mut self, member: usize) -> anyhow::Result<()>;
}

/// One member's process, killed with this value.
#[derive(Debug)]
pub(crate) struct Process(pub(crate) ProcessId);

impl Process {
    /// Asks it to end, and waits.
    pub(crate) fn end(&self) -> anyhow::Result<()> {
        self.0.signal(Signal::SIGTERM);
        let until = Instant::now() + Duration::from_secs(30);
        while self.0.is_alive() {
            ensure!(Instant::now() < until, "a member did not end within 30 s of SIGTERM");
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// Memory in use, bytes.
    pub(crate) fn resident_bytes(&self) -> anyhow::Result<u64> {
        Ok(self.figure("status", "VmRSS:")? * 1024)
    }

    /// Written to the disk so far, bytes (`write_bytes` of `/proc/PID/io`).
    pub(crate) fn written_bytes(&self) -> anyhow::Result<u64> {
        self.figure("io", "write_bytes:")
    }

    /// Of all its threads, in user mode and in the kernel.
    pub(crate) fn cpu_time(&self) -> anyhow::Result<Duration> {
        let path = format!("/proc/{}/stat", self.0.pid);
        let text = std::fs::read_to_string(&path).with_context(|| path.clone())?;
        // The name, in parentheses, may hold anything; utime and stime are fields 14 and 15.
        let fields = text.rsplit_once(')').map(|(_, rest)| rest.split_whitespace());
        let fields: Vec<&str> = fields.with_context(|| path.clone())?.collect();
        let ticks = |field: usize| fields.get(field - 3).and_then(|text| text.parse::<u64>().ok());
        let ticks = ticks(14).zip(ticks(15)).map(|(user, system)| user + system);
        // A tick is 10 ms, whatever the kernel's own is (USER_HZ, proc_pid_stat(5)).
        Ok(Duration::from_millis(10 * ticks.with_context(|| path.clone())?))
    }

    fn figure(&self, file: &str, name: &str) -> anyhow::Result<u64> {
        let path = format!("/proc/{}/{file}", self.0.pid);
        let text = std::fs::read_to_string(&path).with_context(|| path.clone())?;
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        let word = line.and_then(|line| line.split_whitespace().next());
        word.with_context(|| format!("no {name} in {path}"))?.parse().context(path)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill_and_wait();
    }
}
