//! The bandwidth limit: how long to wait before sending more. Pure; time comes in as a number.

use std::num::NonZeroU64;
use std::time::Duration;

/// How far sending may run ahead of the limit before it waits.
const BURST: Duration = Duration::from_millis(20);

/// Spreads bytes over time, all connections of a migration together.
#[derive(Debug)]
pub(crate) struct Pace {
    limit_bytes_s: Option<NonZeroU64>,
    /// When, on the caller's clock, all that was sent so far is paid for.
    paid_until: Duration,
}

impl Pace {
    pub(crate) fn new(limit_bytes_s: Option<NonZeroU64>) -> Self {
        Self { limit_bytes_s, paid_until: Duration::ZERO }
    }

    /// Books `bytes` sent at `now` and says how long to wait before the next are sent. Time that was not used
    /// is not saved up.
    pub(crate) fn book(&mut self, now: Duration, bytes: u64) -> Duration {
        let Some(limit) = self.limit_bytes_s else { return Duration::ZERO };
        let nanos = u128::from(bytes) * 1_000_000_000 / u128::from(limit.get());
        let cost = Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
        self.paid_until = self.paid_until.max(now).saturating_add(cost);
        self.paid_until.saturating_sub(now).saturating_sub(BURST)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn the_rate_is_the_limit(limit in 1000..1_000_000_000_u64, sizes in proptest::collection::vec(1..2_000_000_u64, 1..50)) {
            let mut pace = Pace::new(NonZeroU64::new(limit));
            let mut now = Duration::from_secs(5);
            let begin = now;
            for bytes in &sizes {
                now += pace.book(now, *bytes);
            }
            let fair = Duration::from_secs_f64(sizes.iter().sum::<u64>() as f64 / limit as f64);
            let (shortest, longest) = (fair.saturating_sub(BURST * 2), fair + BURST);
            prop_assert!(now - begin >= shortest && now - begin <= longest, "{:?} for {fair:?}", now - begin);
        }
    }

    #[test]
    fn without_a_limit_nothing_waits() {
        assert_eq!(Pace::new(None).book(Duration::ZERO, u64::MAX), Duration::ZERO);
    }
}
