//! `KEY=VALUE` on a TOML document that keeps its comments, its order and its style.

use toml_edit::{ArrayOfTables, DocumentMut, InlineTable, Item, Table, TableLike, Value};

/// Deepest key, and the largest index: a document has neither.
const DEPTH_MAX: usize = 16;

/// One step of a key.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Step {
    Key(String),
    Index(usize),
    /// `[+]`: one behind the last.
    Append,
}

/// Why an assignment cannot be made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum AssignError {
    #[error("`{0}` is not KEY=VALUE, as in memory=2GiB or disks[0].size=\"10GiB\"")]
    Shape(String),
    #[error("`{0}` is not a key: write it as in boot.kernel or disks[0].size")]
    Key(String),
    #[error("`{0}` is no TOML value: close its quotes and brackets")]
    Value(String),
    #[error("`{key}`: {reason}")]
    Place { key: String, reason: String },
}

/// Sets `KEY=VALUE`.
pub(super) fn assign(document: &mut DocumentMut, text: &str) -> Result<(), AssignError> {
    let (key, value) = text.split_once('=').ok_or_else(|| AssignError::Shape(text.to_owned()))?;
    let (steps, value) = (steps(key)?, value.trim());
    if value.starts_with(['"', '\'', '[', '{']) && value.parse::<Value>().is_err() {
        return Err(AssignError::Value(value.to_owned()));
    }
    let place = |reason: String| AssignError::Place { key: key.trim().to_owned(), reason };
    set_in_table(document.as_table_mut(), &steps, value).map_err(place)
}

/// Removes a key, or one of a list.
pub(super) fn unset(document: &mut DocumentMut, key: &str) -> Result<(), AssignError> {
    let steps = steps(key)?;
    let place = |reason: String| AssignError::Place { key: key.trim().to_owned(), reason };
    remove_from_table(document.as_table_mut(), &steps).map_err(place)
}

/// Splits `disks[0].readonly`. Keys are bare: letters, digits, - and _.
fn steps(key: &str) -> Result<Vec<Step>, AssignError> {
    let bad = || AssignError::Key(key.to_owned());
    let mut steps = Vec::new();
    for part in key.trim().split('.') {
        let (name, mut rest) = part.split_at(part.find('[').unwrap_or(part.len()));
        let bare = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_');
        if name.is_empty() || !name.chars().all(bare) {
            return Err(bad());
        }
        steps.push(Step::Key(name.to_owned()));
        while let Some((index, after)) = rest.strip_prefix('[').and_then(|r| r.split_once(']')) {
            steps.push(match index {
                "+" => Step::Append,
                index => Step::Index(index.parse().map_err(|_| bad())?),
            });
            rest = after;
        }
        if !rest.is_empty() || steps.len() > DEPTH_MAX {
            return Err(bad());
        }
    }
    Ok(steps)
}

/// The value that was meant: TOML where it is TOML, else text. Where text is, text it stays:
/// `name=123` is the text 123.
fn parse(text: &str, present: Option<&Value>) -> Value {
    let parsed = text.parse::<Value>().ok().filter(|_| !text.is_empty());
    let quoted = text.starts_with(['"', '\'']);
    match (parsed, present) {
        (Some(_), Some(Value::String(_))) if !quoted => text.into(),
        (Some(mut parsed), _) => {
            // No decoration of its own: it gets that of its place.
            parsed.decor_mut().clear();
            parsed
        }
        (None, _) => text.into(),
    }
}

/// Puts a value where another is, in its dress: blanks and comments around it stay.
fn replace(present: &mut Value, text: &str) {
    let mut value = parse(text, Some(present));
    *value.decor_mut() = present.decor().clone();
    *present = value;
}

type Outcome = Result<(), String>;

fn set_in_table(table: &mut Table, steps: &[Step], text: &str) -> Outcome {
    let (Some(Step::Key(name)), rest) = (steps.first(), &steps[1..]) else {
        return Err("a list is not meant here".to_owned());
    };
    if let Some(item) = table.get_mut(name) {
        return set_in_item(item, rest, text);
    }
    let mut made = match rest.first() {
        None => Item::Value(parse(text, None)),
        Some(Step::Key(_)) => Item::Table(Table::new()),
        // A list of tables, or of values.
        Some(_) if rest.len() > 1 => Item::ArrayOfTables(ArrayOfTables::new()),
        Some(_) => Item::Value(toml_edit::Array::new().into()),
    };
    if !rest.is_empty() {
        set_in_item(&mut made, rest, text)?;
    }
    table.insert(name, made);
    Ok(())
}

fn set_in_item(item: &mut Item, steps: &[Step], text: &str) -> Outcome {
    match item {
        Item::None => Err("it is not there".to_owned()),
        Item::Value(value) => set_in_value(value, steps, text),
        Item::Table(table) if steps.is_empty() => {
            Err(format!("it is a table of {} keys; set one of them", table.len()))
        }
        Item::Table(table) => set_in_table(table, steps, text),
        Item::ArrayOfTables(tables) => {
            let count = tables.len();
            match (index(steps.first(), count)?, &steps[1..]) {
                (_, []) => Err("each of the list is a table; set one of its keys".to_owned()),
                (at, rest) if at < count => {
                    let table = tables.get_mut(at).ok_or("it is not there")?;
                    set_in_table(table, rest, text)
                }
                (_, rest) => {
                    let mut table = Table::new();
                    set_in_table(&mut table, rest, text)?;
                    tables.push(table);
                    Ok(())
                }
            }
        }
    }
}

fn set_in_value(value: &mut Value, steps: &[Step], text: &str) -> Outcome {
    match (value, steps.first()) {
        (value, None) => {
            replace(value, text);
            Ok(())
        }
        (Value::InlineTable(table), Some(Step::Key(_))) => set_in_inline(table, steps, text),
        (Value::Array(array), Some(_)) => {
            let count = array.len();
            let at = index(steps.first(), count)?;
            if let Some(value) = array.get_mut(at) {
                return set_in_value(value, &steps[1..], text);
            }
            if steps.len() == 1 {
                array.push(parse(text, None));
                return Ok(());
            }
            let mut table = InlineTable::new();
            set_in_inline(&mut table, &steps[1..], text)?;
            array.push(table);
            Ok(())
        }
        (value, Some(_)) => {
            Err(format!("it is a {}, and has no keys of its own", value.type_name()))
        }
    }
}

fn set_in_inline(table: &mut InlineTable, steps: &[Step], text: &str) -> Outcome {
    let (Some(Step::Key(name)), rest) = (steps.first(), &steps[1..]) else {
        return Err("a list is not meant here".to_owned());
    };
    if let Some(value) = table.get_mut(name) {
        return set_in_value(value, rest, text);
    }
    let mut made: Value = match rest.first() {
        None => parse(text, None),
        Some(Step::Key(_)) => InlineTable::new().into(),
        Some(_) => toml_edit::Array::new().into(),
    };
    if !rest.is_empty() {
        set_in_value(&mut made, rest, text)?;
    }
    table.insert(name, made);
    Ok(())
}

/// Which of a list of `count` is meant; `count` itself: a new one.
fn index(step: Option<&Step>, count: usize) -> Result<usize, String> {
    match step {
        Some(Step::Append) => Ok(count),
        Some(Step::Index(at)) if *at <= count => Ok(*at),
        Some(Step::Index(at)) => Err(format!("there is no [{at}]: the list has {count}")),
        Some(Step::Key(_)) | None => Err(format!(
            "it is a list of {count}: say which is meant, as in [0], or [+] for a new one"
        )),
    }
}

fn remove_from_table(table: &mut dyn TableLike, steps: &[Step]) -> Outcome {
    let (Some(Step::Key(name)), rest) = (steps.first(), &steps[1..]) else {
        return Err("a list is not meant here".to_owned());
    };
    let item = table.get_mut(name).ok_or("it is not there")?;
    if rest.is_empty() {
        table.remove(name);
        return Ok(());
    }
    remove_from_item(item, rest)?;
    let emptied = match table.get(name) {
        Some(Item::ArrayOfTables(tables)) => tables.is_empty(),
        _ => false,
    };
    if emptied {
        table.remove(name);
    }
    Ok(())
}

fn remove_from_item(item: &mut Item, steps: &[Step]) -> Outcome {
    match item {
        Item::None => Err("it is not there".to_owned()),
        Item::Table(table) => remove_from_table(table, steps),
        Item::Value(Value::InlineTable(table)) => remove_from_table(table, steps),
        Item::Value(Value::Array(array)) => {
            let at = existing(steps.first(), array.len())?;
            match &steps[1..] {
                [] => {
                    array.remove(at);
                    Ok(())
                }
                rest => match array.get_mut(at) {
                    Some(Value::InlineTable(table)) => remove_from_table(table, rest),
                    _ => Err("it has no keys of its own".to_owned()),
                },
            }
        }
        Item::Value(value) => {
            Err(format!("it is a {}, and has no keys of its own", value.type_name()))
        }
        Item::ArrayOfTables(tables) => {
            let at = existing(steps.first(), tables.len())?;
            match &steps[1..] {
                [] => {
                    tables.remove(at);
                    Ok(())
                }
                rest => remove_from_table(tables.get_mut(at).ok_or("it is not there")?, rest),
            }
        }
    }
}

fn existing(step: Option<&Step>, count: usize) -> Result<usize, String> {
    match index(step, count)? {
        at if at < count => Ok(at),
        _ => Err(format!("there is nothing to remove behind the last: the list has {count}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WEB: &str = "# the shop\nname = \"web\"\ncpus = 2 # enough\nmemory   = \"512MiB\"\n\n[boot]\nkernel = \"shared/vmlinuz\"\n\n# root\n[[disks]]\nimage = \"shared/web.raw\"\n\n[[disks]]\nimage = \"shared/data.raw\" # big\nreadonly = false\n\n[ha]\nenabled = true\n";

    fn set(text: &str, assignments: &[&str]) -> Result<String, AssignError> {
        let mut document: DocumentMut = text.parse().unwrap();
        for assignment in assignments {
            assign(&mut document, assignment)?;
        }
        Ok(document.to_string())
    }

    fn without(text: &str, key: &str) -> Result<String, AssignError> {
        let mut document: DocumentMut = text.parse().unwrap();
        unset(&mut document, key)?;
        Ok(document.to_string())
    }

    #[test]
    fn only_the_value_changes() {
        let cases = [
            ("memory=2GiB", "memory   = \"512MiB\"", "memory   = \"2GiB\""),
            ("cpus=4", "cpus = 2 # enough", "cpus = 4 # enough"),
            ("name=123", "\"web\"", "\"123\""),
            ("boot.kernel = shared/other", "shared/vmlinuz", "shared/other"),
            ("disks[1].readonly=true", "readonly = false", "readonly = true"),
            ("disks[1].image=\"a/b\"", "\"shared/data.raw\" # big", "\"a/b\" # big"),
            ("ha.enabled=false", "enabled = true", "enabled = false"),
        ];
        for (assignment, from, to) in cases {
            assert_eq!(set(WEB, &[assignment]).unwrap(), WEB.replace(from, to), "{assignment}");
        }
        assert_eq!(set(WEB, &["cpus=2"]).unwrap(), WEB);
    }

    #[test]
    fn what_is_missing_is_made_in_its_place() {
        let cpu = set(WEB, &["cpu=host"]).unwrap();
        assert!(cpu.contains("memory   = \"512MiB\"\ncpu = \"host\"\n\n[boot]"), "{cpu}");
        let size = set(WEB, &["disks[0].size=1GiB"]).unwrap();
        assert!(size.contains("image = \"shared/web.raw\"\nsize = \"1GiB\"\n"), "{size}");
        for key in ["nics[0]", "nics[+]"] {
            let nic = set(WEB, &[&format!("{key}.network=lan")]).unwrap();
            assert_eq!(nic, format!("{WEB}\n[[nics]]\nnetwork = \"lan\"\n"));
        }
        let disk = set(WEB, &["disks[+].image=a/b", "disks[2].readonly=true"]).unwrap();
        assert!(disk.contains("[[disks]]\nimage = \"a/b\"\nreadonly = true\n"), "{disk}");
        let table = set("x = 1\n", &["a.b.c=true"]).unwrap();
        assert_eq!(table.parse::<toml::Table>().unwrap()["a"]["b"]["c"].as_bool(), Some(true));
    }

    #[test]
    fn braces_stay_braces() {
        let inline = "boot = { kernel = \"a/b\" }\ndisks = [{ image = \"a/c\" }]\ntags = [\"x\"]\n";
        let text =
            set(inline, &["boot.initrd=a/i", "disks[0].readonly=true", "tags[+]=y"]).unwrap();
        let expected = "boot = { kernel = \"a/b\" , initrd = \"a/i\" }\ndisks = [{ image = \"a/c\" , readonly = true }]\ntags = [\"x\", \"y\"]\n";
        assert_eq!(text.parse::<toml::Table>().unwrap(), expected.parse::<toml::Table>().unwrap());
        assert!(!text.contains("[boot]") && !text.contains("[[disks]]"), "{text}");
        let more = set(inline, &["disks[+].image=a/d"]).unwrap();
        assert_eq!(more.parse::<toml::Table>().unwrap()["disks"][1]["image"].as_str(), Some("a/d"));
    }

    #[test]
    fn values_are_toml_or_text() {
        let value = |text: &str| {
            let set = set("", &[&format!("x={text}")]).unwrap();
            set.parse::<toml::Table>().unwrap()["x"].clone()
        };
        assert_eq!(value("true"), toml::Value::Boolean(true));
        assert_eq!(value("-3"), toml::Value::Integer(-3));
        assert_eq!(value("[1, 2]"), toml::Value::Array(vec![1.into(), 2.into()]));
        for text in ["2GiB", "shared/a b", "console=ttyS0 root=/dev/vda", "", "a\"b"] {
            assert_eq!(value(text), toml::Value::String(text.to_owned()), "{text}");
        }
        assert_eq!(value("'7'"), toml::Value::String("7".to_owned()));
    }

    #[test]
    fn keys_are_removed_with_their_lines() {
        assert_eq!(without(WEB, "cpus").unwrap(), WEB.replace("cpus = 2 # enough\n", ""));
        assert_eq!(
            without(WEB, "disks[1].readonly").unwrap(),
            WEB.replace("readonly = false\n", "")
        );
        let one = without(WEB, "disks[1]").unwrap();
        assert_eq!(one.parse::<toml::Table>().unwrap()["disks"].as_array().unwrap().len(), 1);
        let none = without(&one, "disks[0]").unwrap();
        assert!(!none.parse::<toml::Table>().unwrap().contains_key("disks"), "{none}");
    }

    #[test]
    fn nonsense_is_refused() {
        for text in [
            "memory",
            "x=[1",
            "x=\"a",
            "x={",
            "=1",
            "a..b=1",
            "a b=1",
            "disks[x].image=1",
            "disks[0=1",
            "a[0]b=1",
        ] {
            assert!(set(WEB, &[text]).is_err(), "{text}");
        }
        for (text, reason) in [
            ("disks[3].image=a/b", "the list has 2"),
            ("disks.image=a/b", "say which is meant"),
            ("boot=x", "set one of them"),
            ("cpus.x=1", "has no keys"),
            ("disks[0]=x", "one of its keys"),
        ] {
            let error = set(WEB, &[text]).unwrap_err().to_string();
            assert!(error.contains(reason), "{text}: {error}");
        }
        assert!(without(WEB, "nope").is_err() && without(WEB, "disks[2]").is_err());
        let deep = vec!["a"; DEPTH_MAX + 2].join(".");
        assert!(set(WEB, &[&format!("{deep}=1")]).is_err());
    }
}
