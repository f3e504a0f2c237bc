//! A cluster whose voters are real members and whose learners are stand-ins, all in this process.
//!
//! ```text
//!   voters: cluster crate, RocksDB ── TLS, gRPC ──► stand-ins: one responder, no database
//!                                  ◄── lease heartbeats, membership ──
//! ```

mod count;
mod learners;
mod net;
mod report;
mod standin;
mod voters;
mod wire;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use cluster::{Cluster, Txn};
use tests::scale::Exchange;

use count::{Counted, Kind};
use learners::Learners;
use net::Net;
pub(crate) use report::{print_failover, print_window, shape};
use voters::{Gone, Voter};

/// What anything may take that is waited for.
const LIMIT: Duration = Duration::from_secs(300);
/// After the last learner came in, until the counters are looked at.
const SETTLE: Duration = Duration::from_secs(2);
/// A value that is written, bytes: about as large as the record of a VM's placement.
const VALUE: usize = 128;

/// The cluster.
#[derive(Debug)]
pub(crate) struct Sim {
    voters: Vec<Voter>,
    learners: Learners,
    count: usize,
    gone: Vec<Gone>,
    _folder: tempfile::TempDir,
}

/// What the stand-ins saw in a while.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Window {
    pub(crate) seconds: f64,
    learners: f64,
    counted: Counted,
    /// Of one core, the leader's threads.
    pub(crate) cpu_percent: f64,
    /// Writes that were taken.
    pub(crate) writes: u64,
}

/// Since the leader was killed.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Failover {
    /// Until a write was taken.
    pub(crate) write: Duration,
    /// Until each learner's lease was acknowledged by the new leader.
    pub(crate) leases: Duration,
}

#[allow(clippy::cast_precision_loss, reason = "figures for people")]
fn figure(count: u64) -> f64 {
    count as f64
}

impl Sim {
    pub(crate) fn form(voters: usize, learners: usize) -> anyhow::Result<Self> {
        let (folder, begin) = (tempfile::tempdir()?, Instant::now());
        let net = Net::default();
        let voters = voters::start(voters, folder.path(), &net)?;
        let count = learners;
        let learners = Learners::join(count, &voters, &net)?;
        let sim = Self { voters, learners, count, gone: Vec::new(), _folder: folder };
        println!(
            "{} members came together in {:.1} s",
            count + sim.voters.len(),
            begin.elapsed().as_secs_f64()
        );
        sim.until("all leases are acknowledged", || sim.learners.acknowledged_since(1) == count)?;
        std::thread::sleep(SETTLE);
        Ok(sim)
    }

    fn until(&self, what: &str, holds: impl Fn() -> bool) -> anyhow::Result<()> {
        let until = Instant::now() + LIMIT;
        while !holds() {
            if Instant::now() > until {
                bail!("did not happen within {} s: {what}", LIMIT.as_secs());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    fn leader(&self) -> anyhow::Result<&Voter> {
        self.voters.iter().find(|voter| voter.leads()).context("nobody leads")
    }

    /// Counts for a while, with so many writes a second at the leader.
    pub(crate) fn measure(&self, during: Duration, writes_per_s: u32) -> anyhow::Result<Window> {
        let leader = self.leader()?;
        let taken = Arc::new(AtomicU64::new(0));
        let writing = (writes_per_s > 0).then(|| {
            let every = Duration::from_secs(1) / writes_per_s;
            leader.runtime.spawn(write(leader.cluster.clone(), every, taken.clone()))
        });
        if writing.is_some() {
            std::thread::sleep(SETTLE / 2);
        }
        let (before, begin, cpu) = (self.learners.counts.now(), Instant::now(), leader.cpu()?);
        let written = taken.load(Ordering::Relaxed);
        std::thread::sleep(during);
        let counted = self.learners.counts.now().since(before);
        let seconds = begin.elapsed().as_secs_f64();
        let cpu = leader.cpu()?.saturating_sub(cpu);
        let writes = taken.load(Ordering::Relaxed) - written;
        if let Some(writing) = writing {
            writing.abort();
        }
        Ok(Window {
            seconds,
            learners: figure(u64::try_from(self.count)?),
            counted,
            cpu_percent: cpu.as_secs_f64() / seconds * 100.0,
            writes,
        })
    }

    /// Kills the leader.
    pub(crate) fn fail_over(&mut self) -> anyhow::Result<Failover> {
        let place = self.voters.iter().position(Voter::leads).context("nobody leads")?;
        let leader = self.voters.swap_remove(place);
        let other = self.voters.first().context("nobody is left")?;
        let term = leader.cluster.term();
        let begin = Instant::now();
        self.gone.push(leader.kill());
        let cluster = other.cluster.clone();
        let written = other.runtime.spawn(async move {
            while put(&cluster, 0).await.is_err() {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            begin.elapsed()
        });
        let all = || self.learners.acknowledged_since(term + 1) == self.count;
        self.until("all leases are acknowledged by the new leader", all)?;
        let leases = begin.elapsed();
        self.until("a write is taken", || written.is_finished())?;
        Ok(Failover { write: other.runtime.block_on(written)?, leases })
    }

    pub(crate) fn end(self) {
        let Self { voters, learners, gone, .. } = self;
        let left: Vec<Gone> = voters.into_iter().map(Voter::kill).collect();
        learners.end();
        drop((left, gone));
    }
}

async fn put(cluster: &Cluster, number: u64) -> anyhow::Result<()> {
    let txn = Txn::new().put(format!("status/scale/{}", number % 64), vec![b'x'; VALUE]);
    cluster.txn(txn).await?;
    Ok(())
}

/// One write after each such while, whether the ones before are answered or not.
async fn write(cluster: Cluster, every: Duration, taken: Arc<AtomicU64>) {
    let mut ticks = tokio::time::interval(every);
    for number in 0.. {
        ticks.tick().await;
        let (cluster, taken) = (cluster.clone(), taken.clone());
        tokio::spawn(async move {
            if put(&cluster, number).await.is_ok() {
                taken.fetch_add(1, Ordering::Relaxed);
            }
        });
    }
}

impl Window {
    fn each(&self, kind: Kind) -> f64 {
        figure(self.counted.messages(kind)) / self.seconds / self.learners
    }

    /// What one learner got and sent a second, as the model has it.
    pub(crate) fn exchange(&self) -> Exchange {
        Exchange {
            heartbeats: self.each(Kind::Heartbeat),
            entries: self.each(Kind::Entries),
            commits: self.each(Kind::Commit),
            hellos: self.each(Kind::Hello),
            leases: self.each(Kind::Lease),
        }
    }

    /// Messages a second to and from all learners, answers not counted.
    pub(crate) fn messages(&self) -> f64 {
        figure(self.counted.all_messages()) / self.seconds
    }

    /// Bytes a second to and from all learners.
    pub(crate) fn bytes(&self) -> f64 {
        figure(self.counted.all_wire()) / self.seconds
    }

    /// Entries in one message with entries.
    pub(crate) fn batch(&self) -> f64 {
        figure(self.counted.entries) / figure(self.counted.messages(Kind::Entries).max(1))
    }

    /// From a lease heartbeat's sending to its acknowledgement, milliseconds.
    pub(crate) fn lease_ms(&self) -> f64 {
        figure(self.counted.waited_us) / figure(self.counted.acknowledged.max(1)) / 1000.0
    }

    /// Lease heartbeats that were not acknowledged.
    pub(crate) fn refused(&self) -> u64 {
        self.counted.refused
    }

    /// Of each kind: its name, messages a second, and bytes of a message with its answer: payload,
    /// and what the wire carried for it.
    pub(crate) fn kinds(&self) -> Vec<(&'static str, f64, f64, f64)> {
        let of = |kind: Kind| {
            let messages = match kind {
                // On one connection.
                Kind::Entries | Kind::Commit => {
                    self.counted.messages(Kind::Entries) + self.counted.messages(Kind::Commit)
                }
                kind => self.counted.messages(kind),
            };
            let of_one = |bytes: u64, messages: u64| match messages {
                0 => 0.0,
                messages => figure(bytes) / figure(messages),
            };
            let payload = of_one(self.counted.payload(kind), self.counted.messages(kind));
            let wire = of_one(self.counted.wire(kind), messages);
            (kind.name(), figure(self.counted.messages(kind)) / self.seconds, payload, wire)
        };
        count::KINDS.map(of).into()
    }
}
