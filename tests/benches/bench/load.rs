//! The load, the same for every store: what one client feels, what 64 get through, how soon a watch
//! hears, how long a member is away, and what all of it takes of memory and disk.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use futures::StreamExt;

use crate::figures::Figures;
use crate::member::{Connection, Members, Process};

/// Each with a connection and a certificate of its own.
pub(crate) const CLIENTS: usize = 64;
const VALUE_BYTES: usize = 256;
const LIMIT: Duration = Duration::from_secs(60);

/// How much is done.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Size {
    /// Keys at the end of the load.
    keys: usize,
    /// Puts of one client after the other.
    single: usize,
    reads: usize,
    watched: usize,
    pub(crate) rounds: usize,
}

impl Size {
    /// As many keys as a cluster of ours takes, but for a few.
    pub(crate) const FULL: Self =
        Self { keys: 99_900, single: 2000, reads: 50_000, watched: 1000, rounds: 2 };
    pub(crate) const QUICK: Self =
        Self { keys: 10_000, single: 500, reads: 10_000, watched: 300, rounds: 1 };
}

fn key(number: usize) -> String {
    format!("bench/{number:08}")
}

/// Different in each put, as real ones are, and nothing that compresses to nothing.
fn value(number: usize) -> Vec<u8> {
    let mut value = Vec::with_capacity(VALUE_BYTES);
    let mut state = u64::try_from(number).unwrap_or(0) ^ 0x9e37_79b9_7f4a_7c15;
    while value.len() < VALUE_BYTES {
        state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
        value.extend((state >> 24).to_le_bytes().iter().take(5));
    }
    value.truncate(VALUE_BYTES);
    value
}

/// Puts a cluster through all of it.
pub(crate) async fn measure<M: Members>(members: &mut M, size: Size) -> anyhow::Result<Figures> {
    let leader = members.leader().await?;
    let one = single(members, leader, size.single).await?;
    eprintln!("  one client: a put takes {:.2} ms (median)", ms(one.percentile(50)));
    let before = written(members)?;
    let puts = together(members, size.keys, Action::Put).await?;
    let disk_bytes = written(members)?.saturating_sub(before);
    eprintln!("  {CLIENTS} clients: {:.0} puts/s", puts.per_s());
    let reads = together(members, size.reads, Action::Get { keys: size.keys }).await?;
    eprintln!("  {CLIENTS} clients: {:.0} linearizable reads/s", reads.per_s());
    let watched = watch(members, leader, size.watched).await?;
    eprintln!("  a watch hears after {:.2} ms (p99)", ms(watched.percentile(99)));
    let resident = members.processes().iter().map(Process::resident_bytes);
    let resident: u64 = resident.sum::<anyhow::Result<u64>>()?;
    let follower = (leader + 1) % members.processes().len();
    let restart = restart(members, follower).await?;
    #[allow(clippy::cast_precision_loss, reason = "figures for people")]
    Ok(Figures {
        put_median_ms: ms(one.percentile(50)),
        puts_per_s: puts.per_s(),
        put_p99_ms: ms(puts.percentile(99)),
        reads_per_s: reads.per_s(),
        watch_p99_ms: ms(watched.percentile(99)),
        restart_ms: ms(restart),
        resident_mib: resident as f64 / f64::from(1 << 20),
        disk_bytes_per_put: disk_bytes as f64 / size.keys as f64,
    })
}

/// By all members together, bytes.
fn written<M: Members>(members: &M) -> anyhow::Result<u64> {
    members.processes().iter().map(Process::written_bytes).sum()
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

/// How long operations took, one by one and together.
struct Times {
    each: Vec<Duration>,
    all: Duration,
}

impl Times {
    #[allow(clippy::cast_precision_loss, reason = "figures for people")]
    fn per_s(&self) -> f64 {
        self.each.len() as f64 / self.all.as_secs_f64()
    }

    fn percentile(&self, percent: usize) -> Duration {
        let mut sorted = self.each.clone();
        sorted.sort_unstable();
        let place = (sorted.len() * percent / 100).min(sorted.len().saturating_sub(1));
        sorted.get(place).copied().unwrap_or_default()
    }
}

/// One put after the other, at the leader. The clients take turns: what one may ask for in a second
/// is limited.
async fn single<M: Members>(members: &M, leader: usize, count: usize) -> anyhow::Result<Times> {
    let mut clients: Vec<_> = (0..CLIENTS).map(|client| members.connect(client, leader)).collect();
    // Connected before it counts.
    for client in &mut clients {
        client.get("none").await?;
    }
    let (mut each, begin) = (Vec::with_capacity(count), Instant::now());
    for number in 0..count {
        let began = Instant::now();
        clients[number % CLIENTS].put(&key(number), value(number)).await?;
        each.push(began.elapsed());
    }
    Ok(Times { each, all: begin.elapsed() })
}

#[derive(Debug, Clone, Copy)]
enum Action {
    Put,
    Get { keys: usize },
}

/// All clients at once, spread over the members.
async fn together<M: Members>(members: &M, count: usize, action: Action) -> anyhow::Result<Times> {
    let spread = members.processes().len();
    let mut clients: Vec<_> =
        (0..CLIENTS).map(|client| members.connect(client, client % spread)).collect();
    for client in &mut clients {
        client.get("none").await?;
    }
    let next = Arc::new(AtomicUsize::new(0));
    let begin = Instant::now();
    let working = clients.into_iter().map(|mut client| {
        let next = next.clone();
        tokio::spawn(async move {
            let mut each = Vec::new();
            loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                if number >= count {
                    return anyhow::Ok(each);
                }
                let began = Instant::now();
                match action {
                    Action::Put => client.put(&key(number), value(number)).await?,
                    Action::Get { keys } => {
                        let key = key(number * 7919 % keys);
                        ensure!(client.get(&key).await?, "{key} was put, and is not there");
                    }
                }
                each.push(began.elapsed());
            }
        })
    });
    let mut each = Vec::with_capacity(count);
    for working in working.collect::<Vec<_>>() {
        each.extend(working.await??);
    }
    Ok(Times { each, all: begin.elapsed() })
}

/// From the sending of a put at the leader to its arrival in a watch at another member.
async fn watch<M: Members>(members: &M, leader: usize, count: usize) -> anyhow::Result<Times> {
    let other = (leader + 1) % members.processes().len();
    let mut values = members.connect(0, other).watch("watched/").await?;
    let mut writers: Vec<_> = (1..9).map(|client| members.connect(client, leader)).collect();
    for writer in &mut writers {
        writer.get("none").await?;
    }
    let (mut each, begin) = (Vec::with_capacity(count), Instant::now());
    for number in 0..count {
        let value = format!("{number:0256}").into_bytes();
        let writer = number % writers.len();
        let began = Instant::now();
        let put = writers[writer].put("watched/key", value.clone());
        let heard = async {
            while values.next().await.context("the watch ended")?? != value {}
            anyhow::Ok(began.elapsed())
        };
        let (put, heard) = futures::join!(put, tokio::time::timeout(LIMIT, heard));
        put?;
        each.push(heard.context("a watch did not hear of a put")??);
    }
    Ok(Times { each, all: begin.elapsed() })
}

/// From the start of a member that ended in good order to its answer to a linearizable read.
async fn restart<M: Members>(members: &mut M, member: usize) -> anyhow::Result<Duration> {
    members.processes()[member].end()?;
    let begin = Instant::now();
    members.start(member)?;
    until_it_answers(members, member).await?;
    Ok(begin.elapsed())
}

/// Waits until a member answers a linearizable read.
pub(crate) async fn until_it_answers<M: Members>(members: &M, member: usize) -> anyhow::Result<()> {
    let until = Instant::now() + LIMIT;
    loop {
        // A connection of its own each time: one that failed waits before it is tried again.
        let mut client = members.connect(0, member);
        let asked = tokio::time::timeout(Duration::from_secs(5), client.get(&key(0)));
        match asked.await {
            Ok(Ok(_)) => return Ok(()),
            _ if Instant::now() > until => bail!("a member did not answer within {LIMIT:?}"),
            _ => tokio::time::sleep(Duration::from_millis(10)).await,
        }
    }
}
