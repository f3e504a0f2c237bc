//! Differences between two versions of a file: the unified form for people, and merges of three.

use std::io::IsTerminal;

/// Added and removed lines of a change.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Count {
    pub(crate) added: usize,
    pub(crate) removed: usize,
}

/// The unified diff of a file's two versions, `None`: absent; empty if nothing differs.
pub(crate) fn unified(key: &str, before: Option<&[u8]>, after: Option<&[u8]>) -> String {
    if before == after {
        return String::new();
    }
    let text = |content: Option<&[u8]>| {
        content.map_or(Some(String::new()), |content| String::from_utf8(content.to_vec()).ok())
    };
    let name = |side: &str, content: Option<&[u8]>| match content {
        Some(_) => format!("{side}/{key}"),
        None => "/dev/null".to_owned(),
    };
    let (old, new) = (name("a", before), name("b", after));
    match (text(before), text(after)) {
        (Some(before), Some(after)) if before != after => {
            let mut options = diffy::DiffOptions::new();
            options.set_original_filename(old).set_modified_filename(new);
            options.create_patch(&before, &after).to_string()
        }
        // One is empty, the other absent.
        (Some(_), Some(_)) => format!("--- {old}\n+++ {new}\n"),
        _ => format!("Binary files {old} and {new} differ\n"),
    }
}

/// How many lines a unified diff adds and removes.
pub(crate) fn count(unified: &str) -> Count {
    let body = unified.lines().filter(|line| !line.starts_with("---") && !line.starts_with("+++"));
    let mut count = Count::default();
    for line in body {
        match line.bytes().next() {
            Some(b'+') => count.added += 1,
            Some(b'-') => count.removed += 1,
            _ => {}
        }
    }
    count
}

/// For stdout: with colours on a terminal, unless `NO_COLOR` says otherwise.
pub(crate) fn painted(unified: &str) -> String {
    let wanted = std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    if wanted && std::io::stdout().is_terminal() { paint(unified) } else { unified.to_owned() }
}

fn paint(unified: &str) -> String {
    let line = |line: &str| {
        let colour = match line.as_bytes() {
            [b'-', b'-', b'-', ..] | [b'+', b'+', b'+', ..] => "1",
            [b'@', b'@', ..] => "36",
            [b'+', ..] => "32",
            [b'-', ..] => "31",
            _ => return format!("{line}\n"),
        };
        format!("\x1b[{colour}m{line}\x1b[0m\n")
    };
    unified.lines().map(line).collect()
}

/// Two changes of one text, put together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Merged {
    /// They touch different lines.
    Clean(String),
    /// They do not; the places are marked.
    Marked(String),
}

/// Merges `mine` and `theirs`, both made from `base`.
pub(crate) fn merge(base: &str, mine: &str, theirs: &str) -> Merged {
    match diffy::merge(base, mine, theirs) {
        Ok(merged) => Merged::Clean(merged),
        Err(marked) => Merged::Marked(
            marked
                .replace("<<<<<<< ours", "<<<<<<< yours")
                .replace("||||||| original", "||||||| before both")
                .replace(">>>>>>> theirs", ">>>>>>> in the cluster"),
        ),
    }
}

/// Whether a text still has the marks of a merge.
pub(crate) fn is_marked(text: &str) -> bool {
    ["<<<<<<< ", ">>>>>>> "].iter().any(|mark| text.lines().any(|line| line.starts_with(mark)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_differ_by_lines() {
        let diff = unified("vms/web.toml", Some(b"a\nb\n"), Some(b"a\nc\n"));
        assert_eq!(diff, "--- a/vms/web.toml\n+++ b/vms/web.toml\n@@ -1,2 +1,2 @@\n a\n-b\n+c\n");
        assert_eq!(count(&diff), Count { added: 1, removed: 1 });
        assert_eq!(unified("x", Some(b"a"), Some(b"a")), "");
        assert!(unified("x", None, Some(b"a\n")).contains("--- /dev/null\n+++ b/x\n"));
        assert!(unified("x", Some(b""), None).contains("+++ /dev/null"));
        assert!(unified("x", Some(b"\xff"), Some(b"a")).starts_with("Binary files"));
        assert!(paint(&diff).contains("\x1b[32m+c\x1b[0m\n"));
    }

    #[test]
    fn changes_of_other_lines_are_merged_and_of_the_same_are_marked() {
        let base = "cpus = 1\na\nb\nc\nd\nmemory = 1\n";
        let mine = base.replace("cpus = 1", "cpus = 2");
        let theirs = base.replace("memory = 1", "memory = 2");
        let both = base.replace("cpus = 1", "cpus = 2").replace("memory = 1", "memory = 2");
        assert_eq!(merge(base, &mine, &theirs), Merged::Clean(both.clone()));
        assert!(!is_marked(&both));
        let Merged::Marked(text) = merge(base, &mine, &base.replace("cpus = 1", "cpus = 3")) else {
            panic!("merged what cannot be")
        };
        assert!(is_marked(&text));
        for part in ["<<<<<<< yours\ncpus = 2", "cpus = 3\n>>>>>>> in the cluster"] {
            assert!(text.contains(part), "{text}");
        }
    }
}
