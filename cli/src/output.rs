//! Printing: tables for people, JSON and YAML in the API's shape for programs. Results go to
//! stdout, everything else to stderr.

use std::io::Write;

use comfy_table::{ContentArrangement, Table, presets};
use serde::Serialize;

use crate::args::Format;
use crate::failure::{Exit, Failure};

/// Prints `value` in the wanted form; `table` makes the form for people.
pub(crate) fn print<T: Serialize>(
    format: Format,
    value: &T,
    table: impl FnOnce(&T) -> String,
) -> Result<(), Failure> {
    let unprintable =
        |error: String| Failure::new(Exit::Failed, "cannot print the answer").why(error);
    let text = match format {
        Format::Table => table(value),
        Format::Json => {
            serde_json::to_string_pretty(value).map_err(|error| unprintable(error.to_string()))?
        }
        Format::Yaml => {
            serde_yaml_ng::to_string(value).map_err(|error| unprintable(error.to_string()))?
        }
    };
    line(text.trim_end())
}

/// Prints one line to stdout. A reader that has gone away (`| head`) ends the command quietly.
pub(crate) fn line(text: &str) -> Result<(), Failure> {
    bytes(text.as_bytes())?;
    bytes(b"\n")
}

/// Writes bytes to stdout as they are.
pub(crate) fn bytes(bytes: &[u8]) -> Result<(), Failure> {
    let mut stdout = std::io::stdout().lock();
    match stdout.write_all(bytes).and_then(|()| stdout.flush()) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => std::process::exit(0),
        Err(error) => {
            Err(Failure::new(Exit::Failed, "cannot write to stdout").why(error.to_string()))
        }
    }
}

/// Aligned columns under headings. Long cells are wrapped to a terminal's width only.
pub(crate) fn columns<const N: usize>(
    headings: [&str; N],
    rows: impl IntoIterator<Item = [String; N]>,
) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(headings);
    table.set_content_arrangement(ContentArrangement::Dynamic);
    for row in rows {
        table.add_row(row);
    }
    if let Some(first) = table.column_mut(0) {
        first.set_padding((0, 1));
    }
    trimmed(&table)
}

/// One `name  value` line for each pair whose value is not empty.
pub(crate) fn fields<'a>(pairs: impl IntoIterator<Item = (&'a str, String)>) -> String {
    let pairs: Vec<_> = pairs.into_iter().filter(|(_, value)| !value.is_empty()).collect();
    let width = pairs.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    let pad = " ".repeat(width + 2);
    let lines = pairs.iter().map(|(name, value)| {
        format!("{name:width$}  {}", value.trim_end().replace('\n', &format!("\n{pad}")))
    });
    lines.collect::<Vec<_>>().join("\n")
}

fn trimmed(table: &Table) -> String {
    table.lines().map(|line| line.trim_end().to_owned()).collect::<Vec<_>>().join("\n")
}

/// `1.5 GiB`. Exact where whole, else one decimal.
pub(crate) fn size(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let unit = (1..UNITS.len()).rev().find(|unit| bytes >= 1 << (10 * unit)).unwrap_or(0);
    let whole = bytes >> (10 * unit);
    let tenths = (u128::from(bytes) * 10) >> (10 * unit);
    match tenths % 10 {
        0 => format!("{whole} {}", UNITS[unit]),
        tenth => format!("{whole}.{tenth} {}", UNITS[unit]),
    }
}

/// `85 ms`, `1.5 s`, `12 min`, `3 h`, `5 d`.
pub(crate) fn duration_ms(ms: u64) -> String {
    match ms {
        0..=999 => format!("{ms} ms"),
        1_000..=119_999 => format!("{}.{} s", ms / 1000, ms % 1000 / 100),
        120_000..=7_199_999 => format!("{} min", ms / 60_000),
        7_200_000..=172_799_999 => format!("{} h", ms / 3_600_000),
        _ => format!("{} d", ms / 86_400_000),
    }
}

fn now_ms() -> u64 {
    let since_epoch = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since_epoch.map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}

/// How long ago a moment of the wall clock was; for display only.
pub(crate) fn ago(unix_ms: u64) -> String {
    format!("{} ago", duration_ms(now_ms().saturating_sub(unix_ms)))
}

/// How long until a moment of the wall clock, or how long ago it was; for display only.
pub(crate) fn from_now(unix_ms: u64) -> String {
    match unix_ms.checked_sub(now_ms()) {
        Some(left) => format!("in {}", duration_ms(left)),
        None => ago(unix_ms),
    }
}

/// `yes` or `no`.
pub(crate) fn yes(value: bool) -> String {
    if value { "yes" } else { "no" }.to_owned()
}

/// `-` for what is empty.
pub(crate) fn or_dash(text: &str) -> String {
    if text.is_empty() { "-" } else { text }.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_human() {
        let cases = [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1 KiB"),
            (1536, "1.5 KiB"),
            (512 << 20, "512 MiB"),
            ((1 << 30) + (1 << 29), "1.5 GiB"),
            (3 << 40, "3 TiB"),
        ];
        for (bytes, text) in cases {
            assert_eq!(size(bytes), text);
        }
        assert!(size(u64::MAX).ends_with(" TiB"));
    }

    #[test]
    fn durations_are_human() {
        let cases = [(85, "85 ms"), (1_540, "1.5 s"), (119_999, "119.9 s"), (120_000, "2 min")];
        for (ms, text) in cases {
            assert_eq!(duration_ms(ms), text);
        }
        assert_eq!(
            (duration_ms(3 * 3_600_000), duration_ms(5 * 86_400_000)),
            ("3 h".into(), "5 d".into())
        );
    }

    #[test]
    fn columns_are_aligned_without_trailing_blanks() {
        let row = |a: &str, b: &str| [a.to_owned(), b.to_owned()];
        let text = columns(["NAME", "STATE"], [row("web", "started"), row("database", "stopped")]);
        let lines: Vec<_> = text.lines().collect();
        let column: Vec<_> =
            ["STATE", "started", "stopped"].iter().zip(&lines).map(|(w, l)| l.find(w)).collect();
        assert!(column.iter().all(|at| *at == column[0] && at.is_some()), "{text}");
        assert!(lines.iter().all(|line| !line.ends_with(' ') && !line.starts_with(' ')), "{text}");
    }

    #[test]
    fn fields_leave_out_what_is_empty() {
        let text =
            fields([("name", "web".into()), ("message", String::new()), ("node", "n\nm".into())]);
        assert_eq!(text, "name  web\nnode  n\n      m");
    }
}
