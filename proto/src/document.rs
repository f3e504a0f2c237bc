//! Reads TOML documents that people write: which line and column is wrong, and why.
//!
//! Three looks at one text, each only if the one before found nothing: the keys against the schema
//! (so that all unknown ones are named, with what was probably meant), the types (serde), and the
//! rules of the values. A rule names a value by its path (`disks.0.size`); the path is looked up in
//! the text again, so the complaint points at what the person wrote.

use std::fmt;
use std::ops::Range;

use serde::de::DeserializeOwned;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use crate::schema::{Described, Shape, Table, nearest};

/// Largest document, bytes: what the store takes as one value.
pub const DOCUMENT_MAX: usize = 1 << 20;
/// Most faults that one refusal names.
const FAULTS_MAX: usize = 16;
/// Most characters of a reason: it travels in a message's header, and repeats parts of a document
/// that may be anything.
const REASON_MAX: usize = 400;

/// A place in a document, both counted from 1; columns are characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Position {
    /// Line.
    pub line: u32,
    /// Column.
    pub column: u32,
}

/// One thing that is wrong with a document.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// Where; absent if no one place is to blame.
    pub at: Option<Position>,
    /// What is wrong, and what to write instead. Bounded, without control characters.
    pub reason: String,
}

impl Fault {
    /// A fault with its reason made fit to be shown.
    #[must_use]
    pub fn new(at: Option<Position>, reason: &str) -> Self {
        Self { at, reason: shown(reason) }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(at) = self.at {
            write!(f, "line {}, column {}: ", at.line, at.column)?;
        }
        f.write_str(&self.reason)
    }
}

/// A document that is not what its schema asks for: at least one fault, in the order of the text.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
pub struct DocumentError(Vec<Fault>);

impl DocumentError {
    fn one(at: Option<Position>, reason: &str) -> Self {
        Self(vec![Fault::new(at, reason)])
    }

    /// What is wrong, in the order of the text. Never empty.
    #[must_use]
    pub fn faults(&self) -> &[Fault] {
        &self.0
    }
}

/// Broken rules, collected by the path of the value.
#[derive(Debug, Default)]
pub struct Faults {
    path: Vec<String>,
    found: Vec<(Vec<String>, String)>,
}

impl Faults {
    /// Looks at what is below a key, or at an index.
    pub fn within(&mut self, key: impl ToString, look: impl FnOnce(&mut Self)) {
        self.path.push(key.to_string());
        look(self);
        self.path.pop();
    }

    /// Something is wrong with the value that is being looked at.
    pub fn add(&mut self, reason: impl Into<String>) {
        if self.found.len() < FAULTS_MAX {
            self.found.push((self.path.clone(), reason.into()));
        }
    }
}

/// A kind of document: a table whose fields are described, with rules that span several of them.
pub trait Document: DeserializeOwned + Described {
    /// Checks what no single field can tell.
    fn check_whole(&self, faults: &mut Faults) {
        let _ = faults;
    }
}

/// Reads and checks a document.
///
/// # Errors
/// [`DocumentError`]: everything that is wrong, up to a limit.
pub fn parse<T: Document>(text: &str) -> Result<T, DocumentError> {
    if text.len() > DOCUMENT_MAX {
        let reason =
            format!("the document has {} bytes; at most {DOCUMENT_MAX} are allowed", text.len());
        return Err(DocumentError::one(None, &reason));
    }
    let root = DeTable::parse(text).map_err(|error| from_toml(text, &error))?;
    let mut unknown = Vec::new();
    unknown_keys(root.get_ref(), &T::SHAPE, &mut unknown);
    if !unknown.is_empty() {
        unknown.sort_by_key(|(span, _)| span.start);
        let faults = unknown.into_iter().take(FAULTS_MAX);
        let fault = |(span, reason): (Range<usize>, String)| {
            Fault::new(Some(position(text, span.start)), &reason)
        };
        return Err(DocumentError(faults.map(fault).collect()));
    }
    let document: T = toml::from_str(text).map_err(|error| from_toml(text, &error))?;
    let broken = broken(&document);
    if broken.is_empty() {
        return Ok(document);
    }
    let mut faults: Vec<Fault> = broken
        .iter()
        .map(|(path, reason)| Fault::new(find(text, root.get_ref(), path), reason))
        .collect();
    faults.sort_by_key(|fault| fault.at);
    Err(DocumentError(faults))
}

/// Checks the rules of a document that did not come as text.
///
/// # Errors
/// [`DocumentError`] without places.
pub fn check<T: Document>(document: &T) -> Result<(), DocumentError> {
    let broken = broken(document);
    let faults: Vec<Fault> = broken.iter().map(|(_, reason)| Fault::new(None, reason)).collect();
    if faults.is_empty() { Ok(()) } else { Err(DocumentError(faults)) }
}

fn broken<T: Document>(document: &T) -> Vec<(Vec<String>, String)> {
    let mut faults = Faults::default();
    document.check(&mut faults);
    document.check_whole(&mut faults);
    faults.found
}

/// Where a value stands in a document that is TOML, or the nearest thing around it that is there.
/// `path`: keys and indices, outermost first, as in `["disks", "0", "image"]`.
#[must_use]
pub fn locate(text: &str, path: &[String]) -> Option<Position> {
    find(text, DeTable::parse(text).ok()?.get_ref(), path)
}

fn find(text: &str, root: &DeTable<'_>, path: &[String]) -> Option<Position> {
    let (first, rest) = path.split_first()?;
    let mut found = root.get(first.as_str())?;
    for key in rest {
        let next = match found.get_ref() {
            DeValue::Table(table) => table.get(key.as_str()),
            DeValue::Array(array) => key.parse().ok().and_then(|index: usize| array.get(index)),
            _ => None,
        };
        let Some(next) = next else { break };
        found = next;
    }
    Some(position(text, found.span().start))
}

fn from_toml(text: &str, error: &toml::de::Error) -> DocumentError {
    let at = error.span().map(|span| position(text, span.start));
    DocumentError::one(at, &error.message().replace('\n', "; "))
}

fn position(text: &str, offset: usize) -> Position {
    let mut end = offset.min(text.len());
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    let before = &text[..end];
    let number = |count: usize| u32::try_from(count).unwrap_or(u32::MAX - 1) + 1;
    let line = before.bytes().filter(|byte| *byte == b'\n').count();
    let column = before.rsplit('\n').next().map_or(0, |line| line.chars().count());
    Position { line: number(line), column: number(column) }
}

fn shown(reason: &str) -> String {
    let mut short: String = reason.chars().filter(|c| !c.is_control()).take(REASON_MAX).collect();
    if reason.chars().nth(REASON_MAX).is_some() {
        short.push('…');
    }
    short
}

/// Finds the keys that the schema does not know. Values of a wrong type are left to serde.
fn unknown_keys(table: &DeTable<'_>, shape: &Shape, found: &mut Vec<(Range<usize>, String)>) {
    for (key, value) in table {
        let below = match shape {
            Shape::Map(below) => below,
            Shape::Table(known) => match known.field(key.get_ref()) {
                Some(field) => &field.shape,
                None => {
                    found.push((key.span(), unknown_key(key.get_ref(), known)));
                    continue;
                }
            },
            Shape::Value(_) | Shape::Words(_) | Shape::List(_) => return,
        };
        unknown_below(value, below, found);
    }
}

fn unknown_below(
    value: &Spanned<DeValue<'_>>,
    shape: &Shape,
    found: &mut Vec<(Range<usize>, String)>,
) {
    match (value.get_ref(), shape) {
        (DeValue::Table(table), shape) => unknown_keys(table, shape, found),
        (DeValue::Array(array), Shape::List(shape)) => {
            for item in array.iter() {
                unknown_below(item, shape, found);
            }
        }
        _ => {}
    }
}

fn unknown_key(key: &str, known: &Table) -> String {
    let key: String = key.chars().take(60).collect();
    let names = || known.fields.iter().map(|field| field.name);
    match nearest(&key, names()) {
        Some(meant) => format!("unknown key `{key}`: did you mean `{meant}`?"),
        None => {
            let names: Vec<&str> = names().collect();
            format!("unknown key `{key}`: known here are {}", names.join(", "))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::VmSpec;
    use crate::documents::{AnyDocument, DocumentKind};

    fn faults(kind: DocumentKind, text: &str) -> Vec<String> {
        let error = AnyDocument::parse(kind, text).unwrap_err();
        error.faults().iter().map(ToString::to_string).collect()
    }

    const VM: &str = "name = \"web\"\ncpus = 2\nmemory = \"512MiB\"\n[boot]\nkernel = \"a/k\"\n";

    #[test]
    fn a_fault_points_at_what_was_written() {
        let vm = |from: &str, to: &str| faults(DocumentKind::Vm, &VM.replace(from, to));
        let cases = [
            (vm("cpus = 2", "cpus =  99"), "line 2, column 9: `cpus` is refused: 1 to 8"),
            (vm("cpus", "cpuss"), "line 2, column 1: unknown key `cpuss`: did you mean `cpus`?"),
            (
                vm("cpus = 2", "cpus = \"2\""),
                "line 2, column 8: invalid type: string \"2\", expected u32",
            ),
            (vm("512MiB", "512MB"), "line 3, column 10: `512MB` is not a size"),
            (vm("512MiB", "1KiB"), "line 3, column 10: `memory` is refused: at least 64MiB"),
            (vm("kernel = \"a/k\"", ""), "line 4, column 1: [boot] needs either"),
            (vm("\"a/k\"", "\"../k\""), "line 5, column 10: `kernel` is refused: pool/name"),
            (
                vm("cpus = 2", "\"ä\" = 1"),
                "line 2, column 1: unknown key `ä`: known here are name, cpus",
            ),
            (vm("cpus = 2", "cpus = "), "line 2, column 8: "),
            (
                faults(
                    DocumentKind::Vm,
                    &format!("{VM}[[disks]]\nimage = \"a/d\"\n[[disks]]\nimage = \"a/d\"\n"),
                ),
                "line 9, column 9: disk `a/d` is listed twice",
            ),
            (
                faults(DocumentKind::Storage, "[pools.a]\nkind = \"local-dir\"\npath = \"x\"\n"),
                "line 3, column 8: `path` is refused: an absolute path",
            ),
            (
                faults(DocumentKind::Storage, "[pools.A]\nkind = \"local-dir\"\npath = \"/x\"\n"),
                "line 1, column 8: `A` is not a valid name",
            ),
            (
                faults(
                    DocumentKind::Storage,
                    "pools.a = { kind = \"local-dir\", path = \"/x\" }\npools.b = { kind = \"local-dir\", path = \"/x/\" }\n",
                ),
                "line 2, column 40: pool `a` has the same folder",
            ),
            (
                faults(
                    DocumentKind::Networks,
                    "[networks.a]\nbridge = \"br0\"\nuplink = \"e0\"\n[networks.b]\nbridge = \"br1\"\nuplink = \"e0\"\n",
                ),
                "line 6, column 10: uplink `e0` already belongs",
            ),
            (
                faults(DocumentKind::Access, "role = \"root\""),
                "line 1, column 8: unknown variant `root`",
            ),
            (faults(DocumentKind::Access, ""), "line 1, column 1: missing field `role`"),
        ];
        for (found, expected) in cases {
            assert!(found[0].starts_with(expected), "{expected}\n{found:?}");
        }
    }

    #[test]
    fn all_faults_are_named_in_order() {
        let found = faults(
            DocumentKind::Vm,
            &VM.replace("cpus = 2", "cpus = 0").replace("512MiB", "1MiB").replace("a/k", "k"),
        );
        let lines: Vec<&str> = found.iter().map(|fault| &fault[..7]).collect();
        assert_eq!(lines, ["line 2,", "line 3,", "line 5,"]);
    }

    #[test]
    fn an_error_repeats_little_of_a_document() {
        let mut many = VM.to_owned();
        for index in 0..1000 {
            many.insert_str(0, &format!("key-{index} = 1\n"));
        }
        for document in [
            "a".repeat(1 << 20),
            "\0".repeat(5000),
            format!("x = \"{}\"", "ä".repeat(9000)),
            format!("{} = 1", "k".repeat(9000)),
            "[".repeat(1 << 20),
            format!("a = {}", "[".repeat(1_000_000)),
            format!("a = {}", "{a=".repeat(300_000)),
            many,
        ] {
            let error = VmSpec::parse(&document).unwrap_err().to_string();
            assert!(error.len() < 4096, "{} bytes", error.len());
            assert!(error.contains("line 1, "), "{error}");
            assert!(error.chars().all(|c| !c.is_control()));
        }
        let large = format!("{VM}# {}", "a".repeat(2 << 20));
        assert!(VmSpec::parse(&large).unwrap_err().to_string().contains("at most 1048576"));
    }

    #[test]
    fn a_place_is_found_by_its_path() {
        let path = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
        let at = |words: &[&str]| locate(VM, &path(words)).map(|at| (at.line, at.column));
        assert_eq!(at(&["boot", "kernel"]), Some((5, 10)));
        assert_eq!(at(&["boot", "firmware"]), Some((4, 1)));
        assert_eq!(at(&["disks", "3", "image"]), None);
        assert_eq!(at(&[]), None);
    }
}
