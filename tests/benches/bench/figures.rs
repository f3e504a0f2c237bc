//! The figures, their bars, and how both are shown.

use std::fmt::Write as _;

use serde::Serialize;

/// What one store came to.
#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) struct Figures {
    /// One client's median.
    pub(crate) put_median_ms: f64,
    /// 64 clients.
    pub(crate) puts_per_s: f64,
    pub(crate) put_p99_ms: f64,
    /// Linearizable ones.
    pub(crate) reads_per_s: f64,
    pub(crate) watch_p99_ms: f64,
    pub(crate) restart_ms: f64,
    /// All members together.
    pub(crate) resident_mib: f64,
    /// On all members together.
    pub(crate) disk_bytes_per_put: f64,
}

impl Figures {
    const NONE: Self = Self {
        put_median_ms: 0.0,
        puts_per_s: 0.0,
        put_p99_ms: 0.0,
        reads_per_s: 0.0,
        watch_p99_ms: 0.0,
        restart_ms: 0.0,
        resident_mib: 0.0,
        disk_bytes_per_put: 0.0,
    };

    /// The middle of several runs, figure by figure.
    pub(crate) fn median(runs: &[Self]) -> Self {
        let mut median = Self::NONE;
        for bar in BARS {
            let mut values: Vec<f64> = runs.iter().map(|run| (bar.of)(run)).collect();
            values.sort_by(f64::total_cmp);
            let middle = values.len() / 2;
            let value = match values.get(middle) {
                None => 0.0,
                Some(upper) if values.len() % 2 == 1 => *upper,
                Some(upper) => (upper + values[middle - 1]) / 2.0,
            };
            *(bar.of_mut)(&mut median) = value;
        }
        median
    }
}

/// How a figure must stand to the other store's.
struct Bar {
    name: &'static str,
    of: fn(&Figures) -> f64,
    of_mut: fn(&mut Figures) -> &mut f64,
    /// Ours by theirs.
    ratio: f64,
    more_is_better: bool,
}

macro_rules! bar {
    ($field:ident, $name:literal, at most $ratio:literal) => {
        bar!($field, $name, $ratio, false)
    };
    ($field:ident, $name:literal, at least $ratio:literal) => {
        bar!($field, $name, $ratio, true)
    };
    ($field:ident, $name:literal, $ratio:literal, $more:literal) => {
        Bar {
            name: $name,
            of: |figures| figures.$field,
            of_mut: |figures| &mut figures.$field,
            ratio: $ratio,
            more_is_better: $more,
        }
    };
}

const BARS: [Bar; 8] = [
    bar!(put_median_ms, "put, one client, median, ms", at most 0.8),
    bar!(puts_per_s, "puts, 64 clients, per second", at least 2.0),
    bar!(put_p99_ms, "put, 64 clients, p99, ms", at most 0.5),
    bar!(reads_per_s, "linearizable reads, 64 clients, per second", at least 2.0),
    bar!(watch_p99_ms, "watch delivery, p99, ms", at most 0.5),
    bar!(restart_ms, "restart of a member, ms", at most 0.5),
    bar!(resident_mib, "resident memory of three members, MiB", at most 1.0),
    bar!(disk_bytes_per_put, "written to three disks per put, bytes", at most 0.7),
];

impl Bar {
    fn measured(&self, ours: &Figures, theirs: &Figures) -> f64 {
        (self.of)(ours) / (self.of)(theirs)
    }

    fn holds(&self, ratio: f64) -> bool {
        if self.more_is_better { ratio >= self.ratio } else { ratio <= self.ratio }
    }
}

/// For people.
pub(crate) fn table(ours: &Figures, theirs: &Figures) -> String {
    let mut text =
        format!("{:<44} {:>10} {:>10} {:>7} {:>9}\n", "", "holdfast", "etcd", "ratio", "bar");
    for bar in BARS {
        let ratio = bar.measured(ours, theirs);
        let sign = if bar.more_is_better { ">=" } else { "<=" };
        let verdict = if bar.holds(ratio) { "holds" } else { "MISSED" };
        let _ = writeln!(
            text,
            "{:<44} {:>10.2} {:>10.2} {:>7.2} {sign:>5} {:<3} {verdict}",
            bar.name,
            (bar.of)(ours),
            (bar.of)(theirs),
            ratio,
            bar.ratio
        );
    }
    text
}

/// For programs.
pub(crate) fn json(ours: &Figures, theirs: &Figures) -> serde_json::Result<String> {
    let bars: Vec<serde_json::Value> = BARS
        .iter()
        .map(|bar| {
            let ratio = bar.measured(ours, theirs);
            let holds = bar.holds(ratio);
            serde_json::json!({ "figure": bar.name, "ratio": ratio, "bar": bar.ratio, "holds": holds })
        })
        .collect();
    let all = serde_json::json!({ "holdfast": ours, "etcd": theirs, "bars": bars });
    serde_json::to_string_pretty(&all)
}
