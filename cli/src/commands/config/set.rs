//! `config set` and `vm set`: keys of a document, its comments and order kept.

use proto::documents::DocumentPath;
use toml_edit::DocumentMut;

use super::assign::{assign, unset};
use super::change::{self, Options, Planned};
use super::{Assignments, Files};
use crate::connect::Session;
use crate::failure::{Exit, Failure};
use crate::files::{Committed, Read};
use crate::{paths, refusal};

/// Others may change the document meanwhile: the keys are then set in what they made of it.
const TRIES: u32 = 5;

pub(crate) async fn set(session: &Session, path: &str, keys: &Assignments) -> Result<(), Failure> {
    let key = paths::key(path);
    let mut files = Files::new(session);
    let mut last = None;
    for _ in 0..TRIES {
        let before = if begins_empty(&key) {
            files.get(&key, Read::Linearizable).await?.0
        } else {
            Some(files.existing(&key, Read::Linearizable).await?)
        };
        let content = before.as_ref().map(|file| file.content.as_slice()).unwrap_or_default();
        let text = edited(&key, content, keys)?;
        let revision = before.as_ref().map_or(0, |file| file.revision);
        let options = Options { dry_run: keys.dry_run, yes: true };
        if text.as_bytes() == content {
            return change::report(&files, &[], revision, options, true);
        }
        let plan = [Planned { key: key.clone(), before, after: Some(text.clone().into()) }];
        let what = format!("set keys of {key}");
        let changes = vec![plan[0].change()];
        match files.commit(&what, changes, keys.dry_run).await? {
            Committed::Done(revision) => {
                return change::report(&files, &plan, revision, options, true);
            }
            Committed::Refused(refusals) => {
                let file_of = |_: &str| (key.clone(), Some(text.as_str()));
                let failure = refusal::failure(&what, &refusals, file_of);
                if !refusal::is_conflict(&refusals) {
                    return Err(failure);
                }
                last = Some(failure);
            }
        }
    }
    Err(last.unwrap_or_else(|| Failure::new(Exit::Refused, format!("cannot set keys of {key}"))))
}

/// Whether a document that is absent is made: one that a few keys are enough for. A VM is not.
fn begins_empty(key: &str) -> bool {
    DocumentPath::of(key).is_some_and(|document| !matches!(document, DocumentPath::Vm(_)))
}

/// The document with the keys set.
fn edited(key: &str, content: &[u8], keys: &Assignments) -> Result<String, Failure> {
    let what = || format!("cannot set keys of {key}");
    let text = std::str::from_utf8(content)
        .map_err(|error| Failure::new(Exit::Usage, what()).why(error.to_string()))?;
    let mut document: DocumentMut = text.parse().map_err(|error: toml_edit::TomlError| {
        Failure::new(Exit::Usage, what())
            .why(error.to_string())
            .remedy(format!("correct it with `clusterctl config edit {key}`"))
    })?;
    let bad = |error: super::assign::AssignError| {
        Failure::new(Exit::Usage, what()).why(error.to_string())
    };
    for assignment in &keys.assignments {
        assign(&mut document, assignment).map_err(bad)?;
    }
    for key in &keys.unset {
        unset(&mut document, key).map_err(bad)?;
    }
    Ok(document.to_string())
}
