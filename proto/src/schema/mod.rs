//! What documents are made of, as data: the same declaration (`table!`) makes the struct that serde
//! reads, the checks of its fields, and the description that [`explain`] shows. So none of the three
//! can say something else than the others.

mod explain;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

pub use explain::{Explanation, explain};

use crate::document::Faults;

/// How a value is written.
#[derive(Debug)]
pub enum Shape {
    /// A plain value, in words: `number`, `text`.
    Value(&'static str),
    /// One of these words.
    Words(&'static [&'static str]),
    /// A table with known keys.
    Table(&'static Table),
    /// A list of values or tables.
    List(&'static Shape),
    /// A table whose keys are names that people choose.
    Map(&'static Shape),
}

/// A table with known keys.
#[derive(Debug)]
pub struct Table {
    /// What it is, from the struct's documentation.
    pub documentation: &'static str,
    /// Its keys, in the order of the declaration.
    pub fields: &'static [Field],
}

impl Table {
    /// A key by its name.
    #[must_use]
    pub fn field(&self, name: &str) -> Option<&'static Field> {
        self.fields.iter().find(|field| field.name == name)
    }
}

/// A key of a table.
#[derive(Debug)]
pub struct Field {
    /// The key.
    pub name: &'static str,
    /// How its value is written.
    pub shape: Shape,
    /// What holds where it is left out.
    pub default: Default,
    /// The rule for its value, in words; empty: its type is all there is to it.
    pub constraint: &'static str,
    /// What it is, from the field's documentation.
    pub documentation: &'static str,
}

/// What holds where a key is left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Default {
    /// It cannot be left out.
    Required,
    /// The same as this TOML value.
    Is(&'static str),
    /// What no value says; in words.
    Otherwise(&'static str),
}

/// A type that documents are made of.
pub trait Described {
    /// How it is written.
    const SHAPE: Shape;
    /// Checks the rules of what is below. `faults` knows where that is.
    fn check(&self, faults: &mut Faults) {
        let _ = faults;
    }
}

macro_rules! plain {
    ($($type:ty = $words:literal),+ $(,)?) => {
        $(impl Described for $type { const SHAPE: Shape = Shape::Value($words); })+
    };
}

plain! {
    i32 = "number",
    u32 = "number",
    u64 = "number",
    bool = "true or false",
    String = "text",
    crate::Name = "name",
    crate::ByteSize = "size",
    crate::TimeSpan = "time",
}

impl<T: Described> Described for Option<T> {
    const SHAPE: Shape = T::SHAPE;
    fn check(&self, faults: &mut Faults) {
        if let Some(value) = self {
            value.check(faults);
        }
    }
}

impl<T: Described> Described for Vec<T> {
    const SHAPE: Shape = Shape::List(&T::SHAPE);
    fn check(&self, faults: &mut Faults) {
        for (index, value) in self.iter().enumerate() {
            faults.within(index, |faults| value.check(faults));
        }
    }
}

impl<K: Ord + ToString, T: Described> Described for BTreeMap<K, T> {
    const SHAPE: Shape = Shape::Map(&T::SHAPE);
    fn check(&self, faults: &mut Faults) {
        for (key, value) in self {
            faults.within(key.to_string(), |faults| value.check(faults));
        }
    }
}

/// Declares tables of documents. Each field: documentation, serde's attributes for a default, its
/// type, then `required`, `default "TOML"` or `otherwise "words"`, then optionally a rule:
/// `where "words" => |value| bool`.
macro_rules! table {
    ($(
        $(#[doc = $doc:literal])+
        $(#[derive($($derive:ident),+)])?
        pub struct $name:ident {
            $(
                $(#[doc = $field_doc:literal])+
                $(#[serde($($serde:tt)*)])?
                $field:ident: $type:ty, $presence:ident $($default:literal)?
                    $(, where $constraint:literal => $rule:expr)?;
            )+
        }
    )+) => {
        $(
            $(#[doc = $doc])+
            #[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
            $(#[derive($($derive),+)])?
            #[serde(deny_unknown_fields)]
            pub struct $name {
                $(
                    $(#[doc = $field_doc])+
                    $(#[doc = concat!("\n\nConstraint: ", $constraint, ".")])?
                    $(#[serde($($serde)*)])?
                    pub $field: $type,
                )+
            }

            impl $crate::schema::Described for $name {
                const SHAPE: $crate::schema::Shape =
                    $crate::schema::Shape::Table(&$crate::schema::Table {
                        documentation: concat!($($doc),+),
                        fields: &[$($crate::schema::Field {
                            name: stringify!($field),
                            shape: <$type as $crate::schema::Described>::SHAPE,
                            default: $crate::schema::presence!($presence $($default)?),
                            constraint: concat!($($constraint)?),
                            documentation: concat!($($field_doc),+),
                        }),+],
                    });

                fn check(&self, faults: &mut $crate::document::Faults) {
                    $(faults.within(stringify!($field), |faults| {
                        $(
                            let rule: fn(&$type) -> bool = $rule;
                            if !rule(&self.$field) {
                                faults.add(concat!(
                                    "`", stringify!($field), "` is refused: ", $constraint
                                ));
                            }
                        )?
                        $crate::schema::Described::check(&self.$field, faults);
                    });)+
                }
            }
        )+
    };
}

/// The third part of a field's declaration.
macro_rules! presence {
    (required) => {
        $crate::schema::Default::Required
    };
    (default $value:literal) => {
        $crate::schema::Default::Is($value)
    };
    (otherwise $words:literal) => {
        $crate::schema::Default::Otherwise($words)
    };
}

pub(crate) use {presence, table};

/// The known word that was probably meant, if one is near: a third of its letters may differ.
pub(crate) fn nearest<'a>(word: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let distances = known.map(|candidate| (distance(word, candidate), candidate));
    let (distance, nearest) = distances.min_by_key(|(distance, _)| *distance)?;
    (distance <= nearest.len().max(3) / 3).then_some(nearest)
}

/// Letters to insert, remove or change (Levenshtein); two neighbours that changed places are two.
fn distance(left: &str, right: &str) -> usize {
    let right: Vec<char> = right.chars().collect();
    let mut row: Vec<usize> = (0..=right.len()).collect();
    for (index, letter) in left.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = index + 1;
        for (column, other) in right.iter().enumerate() {
            let change = diagonal + usize::from(letter != *other);
            diagonal = row[column + 1];
            row[column + 1] = change.min(diagonal + 1).min(row[column] + 1);
        }
    }
    row[right.len()]
}
