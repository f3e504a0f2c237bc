//! `config explain`: what documents are made of, from the schema that the cluster checks them by.
//! Needs no cluster.

use proto::documents::DocumentPath;
use proto::schema::{Explanation, explain as look_up};

use crate::args::Format;
use crate::failure::{Exit, Failure};
use crate::output;
use crate::paths;

/// Widest line of prose.
const WIDTH: usize = 90;

/// Prints what a key means: `vm`, `vm.disks`, `vm.disks[0].image`; all documents where it is empty. A
/// document's path (`vms/web`) means what it is made of.
pub(crate) fn explain(format: Format, key: &str, recursive: bool) -> Result<(), Failure> {
    let found = find(&kind_of(key).unwrap_or_else(|| key.to_owned()))?;
    output::print(format, &found, |found| text(found, recursive))
}

/// What the document with a path is called here.
fn kind_of(path: &str) -> Option<String> {
    let document = path.contains('/') || path.ends_with(".toml");
    DocumentPath::of(&document.then(|| paths::key(path))?)
        .map(|document| document.kind().word().to_owned())
}

/// Word by word, so that what is not there can be answered with what is. A list may be named in
/// the singular.
fn find(key: &str) -> Result<Explanation, Failure> {
    let mut path = String::new();
    for word in key.split('.').filter(|word| !word.is_empty()) {
        let dot = if path.is_empty() { "" } else { "." };
        let mut candidates =
            [format!("{path}{dot}{word}"), format!("{path}{dot}{word}s")].into_iter();
        match candidates.find(|candidate| look_up(candidate).is_some()) {
            Some(next) => path = next,
            None => return Err(unknown(&path, word)),
        }
    }
    look_up(&path).ok_or_else(|| unknown("", key))
}

fn unknown(above: &str, word: &str) -> Failure {
    let word: String = word.chars().take(60).flat_map(char::escape_debug).collect();
    let within = if above.is_empty() { "documents".to_owned() } else { format!("`{above}`") };
    let failure = Failure::new(Exit::NotFound, format!("there is no `{word}` in {within}"));
    let known = look_up(above).map(|above| above.children).unwrap_or_default();
    let names: Vec<&str> = known.iter().map(|child| last(&child.path)).collect();
    match names.is_empty() {
        true => failure.why("it has no keys of its own"),
        false => failure.why(format!("known are {}", names.join(", "))),
    }
}

fn last(path: &str) -> &str {
    path.rsplit('.').next().unwrap_or(path)
}

fn text(found: &Explanation, recursive: bool) -> String {
    let mut text = String::new();
    if !found.path.is_empty() {
        text.push_str(&format!("{}\n\n", heading(&found.path, found)));
    }
    text.push_str(&prose(found, "  "));
    if !found.children.is_empty() {
        text.push_str(if found.path.is_empty() { "\nDocuments:\n" } else { "\nKeys:\n" });
        children(found, 1, recursive, &mut text);
    }
    text
}

fn children(parent: &Explanation, depth: usize, recursive: bool, text: &mut String) {
    let indent = "  ".repeat(depth);
    for child in &parent.children {
        text.push_str(&format!("{indent}{}\n", heading(last(&child.path), child)));
        text.push_str(&prose(child, &format!("{indent}    ")));
        if recursive {
            children(child, depth + 2, true, text);
        }
    }
}

/// `memory  <size, required>`.
fn heading(name: &str, what: &Explanation) -> String {
    let default = match what.default.as_str() {
        "" => String::new(),
        "required" => ", required".to_owned(),
        default => format!(", default {default}"),
    };
    format!("{name}  <{}{default}>", what.type_words)
}

fn prose(what: &Explanation, indent: &str) -> String {
    let mut text = wrapped(&what.documentation, indent);
    if !what.constraint.is_empty() {
        text.push_str(&wrapped(&format!("Rule: {}.", what.constraint), indent));
    }
    text
}

fn wrapped(prose: &str, indent: &str) -> String {
    let mut lines = String::new();
    let mut line = String::new();
    for word in prose.split_whitespace() {
        let full = indent.len() + line.chars().count() + 1 + word.chars().count() > WIDTH;
        if full && !line.is_empty() {
            lines.push_str(&format!("{indent}{line}\n"));
            line.clear();
        }
        if !line.is_empty() {
            line.push(' ');
        }
        line.push_str(word);
    }
    if !line.is_empty() {
        lines.push_str(&format!("{indent}{line}\n"));
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_found_also_in_the_singular_and_with_an_index() {
        for key in ["vm.disks.image", "vm.disk.image", "vm.disks[0].image"] {
            assert_eq!(last(&find(key).unwrap().path), "image", "{key}");
        }
        assert!(find("").unwrap().children.len() > 3);
    }

    #[test]
    fn a_documents_path_is_what_it_is_made_of() {
        for (path, kind) in [
            ("vms/web", "vm"),
            ("/vms/web.toml", "vm"),
            ("nodes/n1", "node"),
            ("storage.toml", "storage"),
        ] {
            assert_eq!(kind_of(path).as_deref(), Some(kind), "{path}");
            assert!(find(kind).is_ok(), "{kind}");
        }
        for key in ["vm", "vm.disks", "notes/a", "vms/"] {
            assert_eq!(kind_of(key), None, "{key}");
        }
    }

    #[test]
    fn what_is_not_there_is_answered_with_what_is() {
        for (key, words) in [
            ("vm.memry", "memory"),
            ("vm.disks.imag", "readonly"),
            ("house", "vm"),
            ("vm.memory.x", "no keys of its own"),
        ] {
            let failure = find(key).unwrap_err();
            assert_eq!(failure.exit, Exit::NotFound);
            assert!(failure.to_string().contains(words), "{failure}");
        }
    }

    #[test]
    fn prose_is_wrapped() {
        let text = wrapped(&"word ".repeat(60), "    ");
        assert!(text.lines().count() > 3);
        assert!(text.lines().all(|line| line.len() <= WIDTH && line.starts_with("    word")));
    }
}
