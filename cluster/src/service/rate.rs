//! How often each client may ask: a bucket of turns per client that fills evenly.

use std::collections::BTreeMap;

use tokio::time::Instant;

/// Clients that are remembered. One that is forgotten begins with a full bucket.
const CLIENTS_MAX: usize = 1024;
/// Seconds that a silent client may save up.
const BURST_S: f64 = 2.0;

/// All clients' buckets.
#[derive(Debug)]
pub(crate) struct Rate {
    per_s: u32,
    clients: BTreeMap<String, Bucket>,
}

#[derive(Debug)]
struct Bucket {
    turns: f64,
    at: Instant,
}

impl Rate {
    /// So many turns a second for each client; 0: no limit.
    pub(crate) fn new(per_s: u32) -> Self {
        Self { per_s, clients: BTreeMap::new() }
    }

    /// Whether a client may ask now.
    pub(crate) fn take(&mut self, client: &str, now: Instant) -> bool {
        if self.per_s == 0 {
            return true;
        }
        let per_s = f64::from(self.per_s);
        if !self.clients.contains_key(client) {
            self.make_room();
            let full = Bucket { turns: per_s * BURST_S, at: now };
            self.clients.insert(client.to_owned(), full);
        }
        let Some(bucket) = self.clients.get_mut(client) else { return true };
        let passed = now.saturating_duration_since(bucket.at).as_secs_f64();
        bucket.turns = passed.mul_add(per_s, bucket.turns).min(per_s * BURST_S);
        bucket.at = now;
        let may = bucket.turns >= 1.0;
        if may {
            bucket.turns -= 1.0;
        }
        may
    }

    fn make_room(&mut self) {
        if self.clients.len() < CLIENTS_MAX {
            return;
        }
        let silent = self.clients.iter().min_by_key(|(_, bucket)| bucket.at);
        if let Some(client) = silent.map(|(client, _)| client.clone()) {
            self.clients.remove(&client);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_greedy_client_waits_and_the_others_do_not() {
        let (mut rate, begin) = (Rate::new(10), Instant::now());
        let taken = (0..100).filter(|_| rate.take("greedy", begin)).count();
        assert_eq!(taken, 20);
        assert!(rate.take("modest", begin));
        let later = begin + Duration::from_millis(500);
        let taken = (0..100).filter(|_| rate.take("greedy", later)).count();
        assert_eq!(taken, 5);
        assert!((0..1000).all(|_| Rate::new(0).take("anyone", begin)));
    }

    #[test]
    fn its_memory_is_bounded() {
        let (mut rate, begin) = (Rate::new(1), Instant::now());
        for client in 0..5000u32 {
            rate.take(&client.to_string(), begin + Duration::from_micros(client.into()));
        }
        assert!(rate.clients.len() <= CLIENTS_MAX);
    }
}
