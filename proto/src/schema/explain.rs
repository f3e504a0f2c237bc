//! The schema in words, for `clusterctl config explain`.

use serde::Serialize;

use super::{Default, Field, Shape};
use crate::documents::DocumentKind;

/// A document, a table or a key, explained.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Explanation {
    /// As it is asked for: `vm.disks.image`; empty for the list of all documents.
    pub path: String,
    /// How its value is written: `size`, `list of tables`, `"baseline" or "host"`.
    #[serde(rename = "type")]
    pub type_words: String,
    /// What holds where it is left out; `required` if it cannot be.
    pub default: String,
    /// The rule for its value; empty: its type is all there is to it.
    pub constraint: String,
    /// What it is.
    pub documentation: String,
    /// What is in it, each explained in the same way.
    pub children: Vec<Explanation>,
}

/// Explains a document's type (`vm`), a table or a key in it (`vm.disks.image`); with an empty path,
/// all documents. Indices (`vm.disks.0.image`, `vm.disks[0].image`) and names that people choose
/// (`storage.pools.fast.kind`) may be in the path. `None`: there is no such thing.
#[must_use]
pub fn explain(path: &str) -> Option<Explanation> {
    let path = path.trim_matches('.').replace('[', ".").replace(']', "");
    if path.is_empty() {
        return Some(all());
    }
    let mut words = path.split('.');
    let kind = words.next().and_then(DocumentKind::by_word)?;
    let mut found = document(kind);
    let mut shape = kind.shape();
    for word in words {
        if let Some(next) = found.children.iter().find(|child| last(&child.path) == word) {
            shape = below(shape).and_then(|table| table.field(word)).map_or(shape, |f| &f.shape);
            found = next.clone();
            continue;
        }
        // What a person chose, or where in a list: the description is that of the table below.
        let chosen = match shape {
            Shape::Map(_) => true,
            Shape::List(_) => word.parse::<usize>().is_ok(),
            Shape::Value(_) | Shape::Words(_) | Shape::Table(_) => false,
        };
        if !chosen {
            return None;
        }
    }
    Some(found)
}

fn last(path: &str) -> &str {
    path.rsplit('.').next().unwrap_or(path)
}

fn all() -> Explanation {
    let children: Vec<Explanation> = DocumentKind::ALL.into_iter().map(document).collect();
    Explanation {
        path: String::new(),
        type_words: "files".to_owned(),
        default: String::new(),
        constraint: String::new(),
        documentation: "The documents that people write, by type.".to_owned(),
        children,
    }
}

fn document(kind: DocumentKind) -> Explanation {
    let shape = kind.shape();
    Explanation {
        path: kind.word().to_owned(),
        type_words: format!("file {}", kind.pattern()),
        default: String::new(),
        constraint: String::new(),
        documentation: below(shape).map(|table| prose(table.documentation)).unwrap_or_default(),
        children: children(kind.word(), shape),
    }
}

/// The table in a table, a list or a map.
fn below(shape: &Shape) -> Option<&'static super::Table> {
    match shape {
        Shape::Table(table) => Some(table),
        Shape::List(shape) | Shape::Map(shape) => below(shape),
        Shape::Value(_) | Shape::Words(_) => None,
    }
}

fn children(path: &str, shape: &Shape) -> Vec<Explanation> {
    let Some(table) = below(shape) else { return Vec::new() };
    table.fields.iter().map(|field| explain_field(path, field)).collect()
}

fn explain_field(parent: &str, field: &Field) -> Explanation {
    let path = format!("{parent}.{}", field.name);
    Explanation {
        type_words: type_words(&field.shape),
        default: match field.default {
            Default::Required => "required".to_owned(),
            Default::Is(value) => value.to_owned(),
            Default::Otherwise(words) => words.to_owned(),
        },
        constraint: field.constraint.to_owned(),
        documentation: prose(field.documentation),
        children: children(&path, &field.shape),
        path,
    }
}

fn type_words(shape: &Shape) -> String {
    match shape {
        Shape::Value(words) => (*words).to_owned(),
        Shape::Words(words) => {
            words.iter().map(|word| format!("\"{word}\"")).collect::<Vec<_>>().join(" or ")
        }
        Shape::Table(_) => "table".to_owned(),
        Shape::List(shape) => match **shape {
            Shape::Table(_) => "list of tables".to_owned(),
            _ => format!("list of {}", type_words(shape)),
        },
        Shape::Map(shape) => match **shape {
            Shape::Table(_) => "table of tables by name".to_owned(),
            _ => format!("table of {} by name", type_words(shape)),
        },
    }
}

/// A doc comment as one paragraph: its lines begin with a space.
fn prose(documentation: &str) -> String {
    documentation.split_whitespace().collect::<Vec<_>>().join(" ")
}
