//! Histograms of whole numbers, as far as openraft uses the crate of this name: four buckets for each
//! power of two, so that a percentile is at most a quarter too low. Memory grows with the largest
//! number recorded, to 2 KiB at most.

use std::fmt;
use std::marker::PhantomData;

/// How often which numbers were recorded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Histogram<T = ()> {
    /// How many numbers fell into each bucket, up to the last one that has any.
    counts: Vec<u64>,
    total: u64,
    data: PhantomData<T>,
}

/// The bucket of a number: those below 4 have one each, then come four to a power of two.
fn bucket_of(value: u64) -> usize {
    let bucket = match value.checked_ilog2() {
        Some(power @ 2..) => u64::from(power - 1) * 4 + ((value >> (power - 2)) & 3),
        _ => value,
    };
    usize::try_from(bucket).unwrap_or(usize::MAX)
}

/// The least number in a bucket.
fn least_of(bucket: usize) -> u64 {
    let bucket = u64::try_from(bucket).unwrap_or(u64::MAX);
    if bucket < 4 { bucket } else { (4 + bucket % 4) << (bucket / 4 - 1) }
}

impl<T> Histogram<T> {
    /// Nothing recorded.
    #[must_use]
    pub fn new() -> Self {
        Self { counts: Vec::new(), total: 0, data: PhantomData }
    }

    /// Records a number.
    pub fn record(&mut self, value: u64) {
        self.record_n(value, 1);
    }

    /// Records a number several times.
    pub fn record_n(&mut self, value: u64, times: u64) {
        if times == 0 {
            return;
        }
        let bucket = bucket_of(value);
        if self.counts.len() <= bucket {
            self.counts.resize(bucket + 1, 0);
        }
        self.counts[bucket] = self.counts[bucket].saturating_add(times);
        self.total = self.total.saturating_add(times);
    }

    /// How many numbers were recorded.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.total
    }

    /// The least number of the bucket in which so many of a thousand are reached; 0 of none.
    fn per_mille(&self, share: u64) -> u64 {
        let wanted = u128::from(self.total) * u128::from(share);
        let mut seen = 0;
        let reached = self.counts.iter().position(|count| {
            seen += u128::from(*count);
            seen > 0 && seen * 1000 >= wanted
        });
        reached.map_or(0, least_of)
    }

    /// The usual percentiles.
    #[must_use]
    pub fn percentile_stats(&self) -> PercentileStats {
        PercentileStats {
            samples: self.total,
            p0_1: self.per_mille(1),
            p1: self.per_mille(10),
            p5: self.per_mille(50),
            p10: self.per_mille(100),
            p50: self.per_mille(500),
            p90: self.per_mille(900),
            p99: self.per_mille(990),
            p99_9: self.per_mille(999),
        }
    }
}

impl<T> Default for Histogram<T> {
    fn default() -> Self {
        Self::new()
    }
}

/// Percentiles of a histogram: so many of a hundred numbers are not above it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names say it")]
pub struct PercentileStats {
    /// How many numbers were recorded.
    pub samples: u64,
    pub p0_1: u64,
    pub p1: u64,
    pub p5: u64,
    pub p10: u64,
    pub p50: u64,
    pub p90: u64,
    pub p99: u64,
    pub p99_9: u64,
}

impl fmt::Display for PercentileStats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { samples, p0_1, p1, p5, p10, p50, p90, p99, p99_9 } = self;
        write!(
            f,
            "{samples} samples, P0.1 {p0_1}, P1 {p1}, P5 {p5}, P10 {p10}, P50 {p50}, P90 {p90}, P99 {p99}, P99.9 {p99_9}"
        )
    }
}

/// Histograms with their names, a line each.
#[derive(Debug, Default)]
pub struct AsciiChart(Vec<(String, PercentileStats)>);

impl AsciiChart {
    /// None.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// One more.
    #[must_use]
    #[allow(clippy::should_implement_trait, reason = "openraft calls it so")]
    pub fn add<T>(mut self, name: impl Into<String>, histogram: Histogram<T>) -> Self {
        self.0.push((name.into(), histogram.percentile_stats()));
        self
    }
}

impl fmt::Display for AsciiChart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|(name, stats)| writeln!(f, "{name}: {stats}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_number_is_in_a_bucket_at_most_a_quarter_wide() {
        let mut numbers: Vec<u64> = (0..10_000).collect();
        numbers.extend((3..64).flat_map(|power| {
            let value = 1 << power;
            [value - 1, value, value + 1, value + value / 2]
        }));
        numbers.push(u64::MAX);
        for value in numbers {
            let (bucket, least) = (bucket_of(value), least_of(bucket_of(value)));
            assert!(least <= value && value - least <= value / 4, "{value}: {least}");
            assert_eq!(bucket_of(least), bucket);
            assert!(bucket < 252);
            assert!(bucket == 251 || least_of(bucket + 1) > value);
        }
    }

    #[test]
    fn percentiles_are_those_of_what_was_recorded() {
        let mut histogram = Histogram::<()>::new();
        let none = histogram.percentile_stats();
        assert_eq!((none.samples, none.p50, none.p99_9), (0, 0, 0));
        histogram.record_n(2, 90);
        histogram.record_n(1000, 9);
        histogram.record(1 << 40);
        histogram.record_n(u64::MAX, 0);
        let stats = histogram.percentile_stats();
        assert_eq!((stats.samples, histogram.total()), (100, 100));
        assert_eq!((stats.p0_1, stats.p50, stats.p90), (2, 2, 2));
        assert_eq!((stats.p99, stats.p99_9), (896, 1 << 40));
        let chart = AsciiChart::new().add("one", histogram).to_string();
        assert!(chart.starts_with("one: 100 samples, P0.1 2"), "{chart}");
    }
}
