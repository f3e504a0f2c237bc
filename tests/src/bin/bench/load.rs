//! The load, the same for every store: what one client feels, what 64 get through, how soon watches
//! hear, how long a member is away, and what all of it takes of memory and disk.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use futures::StreamExt;

use crate::figures::Figures;
use crate::store::{Connection, Members};

const CLIENTS: usize = 64;
const VALUE_BYTES: usize = 256;

/// How much is done.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Size {
    /// Keys at the end of the load.
    keys: usize,
    /// Puts of the one client.
    single: usize,
    reads: usize,
    watched: usize,
    pub(crate) rounds: usize,
}

impl Size {
    pub(crate) const FULL: Self =
        Self { keys: 100_000, single: 2000, reads: 50_000, watched: 1000, rounds: 2 };
    pub(crate) const QUICK: Self =
        Self { keys: 10_000, single: 500, reads: 10_000, watched: 300, rounds: 1 };
}

fn key(number: usize) -> String {
    format!("bench/{number:08}")
}

fn value(number: usize) -> Vec<u8> {
    // Different in each put, as real ones are: nothing here compresses to nothing.
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
    let put_median = single(&mut members.connect(leader), size.single).await?;
    let written = |members: &M| -> anyhow::Result<u64> {
        members.processes().iter().map(super::process::Process::written_bytes).sum()
    };
    let before = written(members)?;
    let puts = together(members, size.keys, Action::Put).await?;
    let disk_bytes = written(members)? - before;
    let reads = together(members, size.reads, Action::Get { keys: size.keys }).await?;
    let watch_p99 = watch(members, leader, size.watched).await?;
    let resident = members.processes().iter().map(super::process::Process::resident_bytes);
    let resident: u64 = resident.sum::<anyhow::Result<u64>>()?;
    let follower = (leader + 1) % members.processes().len();
    let restart = members.restart(follower).await?;
    #[allow(clippy::cast_precision_loss, reason = "figures for people")]
    Ok(Figures {
        put_median_ms: ms(put_median),
        puts_per_s: puts.per_s(),
        put_p99_ms: ms(puts.percentile(99)),
        reads_per_s: reads.per_s(),
        watch_p99_ms: ms(watch_p99),
        restart_ms: ms(restart),
        resident_mib: resident as f64 / f64::from(1 << 20),
        disk_bytes_per_put: disk_bytes as f64 / size.keys as f64,
    })
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

/// How long many operations took, one by one and together.
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
        sorted.get((sorted.len() * percent / 100).min(sorted.len() - 1)).copied().unwrap_or_default()
    }
}

/// One client, one put after the other, at the leader. The median.
async fn single<C: Connection>(client: &mut C, count: usize) -> anyhow::Result<Duration> {
    let mut each = Vec::with_capacity(count);
    for number in 0..count {
        let began = Instant::now();
        client.put(&key(number), value(number)).await?;
        each.push(began.elapsed());
    }
    Ok(Times { each, all: Duration::ZERO }.percentile(50))
}

#[derive(Debug, Clone, Copy)]
enum Action {
    Put,
    Get { keys: usize },
}

/// Many clients, each with a connection of its own, spread over the members.
async fn together<M: Members>(
    members: &M,
    count: usize,
    action: Action,
) -> anyhow::Result<Times> {
    let next = Arc::new(AtomicUsize::new(0));
    let began = Instant::now();
    let clients = (0..CLIENTS).map(|client| {
        let (next, mut client) = (next.clone(), members.connect(client % 3));
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
                    Action::Get { keys } => client.get(&key(number * 7919 % keys)).await?,
                }
                each.push(began.elapsed());
            }
        })
    });
    let mut each = Vec::with_capacity(count);
    for client in clients.collect::<Vec<_>>() {
        each.extend(client.await??);
    }
    Ok(Times { each, all: began.elapsed() })
}

/// From the sending of a put at the leader to its arrival in a watch at another member.
async fn watch<M: Members>(members: &M, leader: usize, count: usize) -> anyhow::Result<Duration> {
    let other = (leader + 1) % members.processes().len();
    let mut values = members.connect(other).watch("watched/").await?;
    let mut writer = members.connect(leader);
    let mut each = Vec::with_capacity(count);
    for number in 0..count {
        let value = format!("{number:0256}").into_bytes();
        let began = Instant::now();
        let put = writer.put("watched/key", value.clone());
        let heard = async {
            while values.next().await.context("the watch ended")?? != value {}
            anyhow::Ok(began.elapsed())
        };
        let (put, heard) = futures::join!(put, tokio::time::timeout(Duration::from_secs(10), heard));
        put?;
        each.push(heard.context("a watch did not hear of a put within 10 s")??);
    }
    Ok(Times { each, all: Duration::ZERO }.percentile(99))
}

/// Waits until a member answers a linearizable read, whatever is in it.
pub(crate) async fn until_it_answers<C: Connection>(
    connect: impl Fn() -> C,
) -> anyhow::Result<()> {
    let until = Instant::now() + Duration::from_secs(60);
    loop {
        let mut client = connect();
        match tokio::time::timeout(Duration::from_secs(10), client.get("no/such/key")).await {
            Ok(Err(error)) if error.downcast_ref::<tonic::Status>().is_none() => return Ok(()),
            Ok(Ok(())) => return Ok(()),
            _ if Instant::now() > until => bail!("a member did not answer within a minute"),
            _ => tokio::time::sleep(Duration::from_millis(10)).await,
        }
    }
}
