//! How a refused document is shown: file, line and column, the line itself, and the reason under
//! it, as compilers do.

use proto::v1::Refusal;
use tonic::Code;

use crate::failure::{Exit, Failure};

/// Longest piece of a line that is shown.
const LINE_MAX: usize = 160;
/// Refusals that are shown: the first ones are what a person mends next.
const SHOWN_MAX: usize = 20;

/// One refusal. `file` is what the person calls the text, `text` the text, if it is at hand.
pub(crate) fn shown(refusal: &Refusal, file: &str, text: Option<&str>) -> String {
    if refusal.line == 0 {
        return format!("{file}: {}", refusal.reason.trim_end());
    }
    let position = match refusal.column {
        0 => format!("{file}:{}", refusal.line),
        column => format!("{file}:{}:{column}", refusal.line),
    };
    let index = usize::try_from(refusal.line - 1).unwrap_or(usize::MAX);
    let Some(line) = text.and_then(|text| text.lines().nth(index)) else {
        return format!("{position}: {}", refusal.reason.trim_end());
    };
    let number = refusal.line.to_string();
    let pad = " ".repeat(number.len());
    let column = usize::try_from(refusal.column.max(1) - 1).unwrap_or(0);
    let (line, before) = clipped(line, column);
    let reason = refusal.reason.trim_end().replace('\n', &format!("\n{pad} | {before}  "));
    format!("{pad}--> {position}\n{pad} |\n{number} | {line}\n{pad} | {before}^ {reason}")
}

/// The part of a line that is shown, and the blanks that stand before its column.
fn clipped(line: &str, column: usize) -> (String, String) {
    let column = column.min(line.chars().count());
    let skipped = if column < LINE_MAX - 20 { 0 } else { column - LINE_MAX / 2 };
    // A tab stays one, so that the mark stands under its column.
    let visible = |c: char| if c == '\t' || !c.is_control() { c } else { '\u{fffd}' };
    let part: String = line.chars().skip(skipped).take(LINE_MAX).map(visible).collect();
    let before = part.chars().take(column - skipped);
    let before = before.map(|c| if c == '\t' { '\t' } else { ' ' }).collect();
    (part, before)
}

/// Whether somebody else was faster.
pub(crate) fn is_conflict(refusals: &[Refusal]) -> bool {
    refusals.iter().any(|refusal| refusal.present_revision.is_some())
}

/// Whether nothing is wrong with the document itself: it cannot be written as things are (the VM runs).
fn is_of_the_moment(refusal: &Refusal) -> bool {
    let code = i32::try_from(refusal.code).map_or(Code::Unknown, Code::from);
    matches!(code, Code::FailedPrecondition | Code::PermissionDenied)
}

/// A commit that was refused, as the command's failure. `file_of` says what the person calls the
/// file of a key, and its text.
pub(crate) fn failure<'a>(
    what: &str,
    refusals: &[Refusal],
    file_of: impl Fn(&str) -> (String, Option<&'a str>),
) -> Failure {
    let texts = refusals.iter().map(|refusal| {
        let (file, text) = file_of(&refusal.path);
        shown(refusal, &file, text)
    });
    let mut texts: Vec<String> = texts.take(SHOWN_MAX).collect();
    if let Some(more @ 1..) = refusals.len().checked_sub(SHOWN_MAX) {
        texts.push(format!("and {more} more"));
    }
    let why = texts.join("\n");
    if is_conflict(refusals) {
        return Failure::new(Exit::Refused, format!("cannot {what}"))
            .why(why)
            .remedy("somebody else changed it at the same time: look again, then try again");
    }
    let exit = if refusals.iter().all(is_of_the_moment) { Exit::Refused } else { Exit::Usage };
    Failure::new(exit, format!("cannot {what}")).why(why)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(line: u32, column: u32, reason: &str) -> Refusal {
        let path = "vms/web.toml".to_owned();
        Refusal { path, reason: reason.to_owned(), line, column, ..Refusal::default() }
    }

    #[test]
    fn a_reason_stands_under_its_place() {
        let text = "name = \"web\"\nmemory = \"2GB\"\n";
        let shown = shown(&refusal(2, 10, "`2GB` is not a size"), "web.toml", Some(text));
        let expected =
            " --> web.toml:2:10\n  |\n2 | memory = \"2GB\"\n  |          ^ `2GB` is not a size";
        assert_eq!(shown, expected);
    }

    #[test]
    fn a_thousand_refusals_are_counted() {
        let refusals = vec![refusal(0, 0, "no pool `x`"); 1000];
        let shown = failure("write", &refusals, |key| (key.to_owned(), None));
        let lines: Vec<&str> = shown.why.iter().flat_map(|why| why.lines()).collect();
        assert_eq!(lines.len(), SHOWN_MAX + 1);
        assert_eq!(lines[SHOWN_MAX], "and 980 more");
    }

    #[test]
    fn what_is_not_there_is_not_shown() {
        let text = Some("a\n");
        assert_eq!(shown(&refusal(0, 0, "no pool `x`"), "w", text), "w: no pool `x`");
        assert_eq!(shown(&refusal(9, 2, "bad"), "w", text), "w:9:2: bad");
        assert_eq!(shown(&refusal(1, 1, "bad"), "w", None), "w:1:1: bad");
        assert!(shown(&refusal(1, 99, "bad"), "w", text).ends_with("|  ^ bad"));
    }

    #[test]
    fn a_long_or_wild_line_is_cut() {
        let long = "ä".repeat(500) + "\u{1b}[31mX";
        let text = shown(&refusal(1, 501, "bad"), "w", Some(&long));
        assert!(text.lines().all(|line| line.chars().count() < LINE_MAX + 20), "{text}");
        assert!(!text.contains('\u{1b}') && text.contains('X'), "{text}");
    }

    #[test]
    fn a_conflict_and_nonsense_have_their_exits() {
        let file_of = |key: &str| (key.to_owned(), None);
        let mut conflict = refusal(0, 0, "changed meanwhile");
        assert_eq!(failure("x", &[conflict.clone()], file_of).exit, Exit::Usage);
        conflict.present_revision = Some(7);
        assert_eq!(failure("x", &[conflict], file_of).exit, Exit::Refused);
        let of = |code: Code| Refusal {
            code: u32::try_from(i32::from(code)).unwrap(),
            ..refusal(0, 0, "the VM is started")
        };
        let (runs, wrong) = (of(Code::FailedPrecondition), of(Code::InvalidArgument));
        assert_eq!(failure("x", std::slice::from_ref(&runs), file_of).exit, Exit::Refused);
        assert_eq!(failure("x", std::slice::from_ref(&wrong), file_of).exit, Exit::Usage);
        assert_eq!(failure("x", &[runs, wrong], file_of).exit, Exit::Usage, "mend that first");
    }
}
