//! Lengths of time as people write them: `50ms`, `30s`, `12h`, `90d`.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A length of time in whole milliseconds, written with its unit: ms, s, min, h or d.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct TimeSpan {
    ms: u64,
}

/// Why a text is not a [`TimeSpan`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a time: write a number with ms, s, min, h or d, as in 30s")]
pub struct InvalidTimeSpan(pub String);

/// With `ms` before `s`: the first one that fits counts.
const UNITS: [(&str, u64); 5] =
    [("ms", 1), ("s", 1000), ("min", 60_000), ("h", 3_600_000), ("d", 86_400_000)];

impl TimeSpan {
    /// Of this many milliseconds.
    #[must_use]
    pub const fn from_ms(ms: u64) -> Self {
        Self { ms }
    }

    /// In milliseconds.
    #[must_use]
    pub const fn as_ms(self) -> u64 {
        self.ms
    }
}

impl From<TimeSpan> for Duration {
    fn from(span: TimeSpan) -> Self {
        Self::from_millis(span.ms)
    }
}

impl FromStr for TimeSpan {
    type Err = InvalidTimeSpan;

    fn from_str(text: &str) -> Result<Self, InvalidTimeSpan> {
        let invalid = || InvalidTimeSpan(text.chars().take(80).collect());
        let trimmed = text.trim();
        let (digits, unit_ms) = UNITS
            .iter()
            .find_map(|(unit, ms)| Some((trimmed.strip_suffix(unit)?, *ms)))
            .ok_or_else(invalid)?;
        let number: u64 = digits.trim_end().parse().map_err(|_| invalid())?;
        number.checked_mul(unit_ms).map(Self::from_ms).ok_or_else(invalid)
    }
}

impl fmt::Display for TimeSpan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let whole = |(_, ms): &&(&str, u64)| self.ms != 0 && self.ms.is_multiple_of(*ms);
        let (unit, ms) = UNITS.iter().rev().find(whole).unwrap_or(&("ms", 1));
        write!(f, "{}{unit}", self.ms / ms)
    }
}

impl Serialize for TimeSpan {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for TimeSpan {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl serde::de::Visitor<'_> for Visitor {
            type Value = TimeSpan;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a time such as \"30s\"")
            }
            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<TimeSpan, E> {
                text.parse().map_err(E::custom)
            }
        }
        deserializer.deserialize_str(Visitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_round_trip() {
        for (text, ms) in
            [("50ms", 50), ("30s", 30_000), ("5min", 300_000), ("12h", 43_200_000), ("0ms", 0)]
        {
            assert_eq!(text.parse(), Ok(TimeSpan::from_ms(ms)));
            assert_eq!(TimeSpan::from_ms(ms).to_string(), text);
        }
        assert_eq!("90 d".parse(), Ok(TimeSpan::from_ms(90 * 86_400_000)));
        for bad in ["", "30", "s", "-1s", "1.5h", "1y", "99999999999999d"] {
            assert!(bad.parse::<TimeSpan>().is_err(), "{bad}");
        }
    }
}
