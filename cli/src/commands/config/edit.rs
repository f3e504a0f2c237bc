//! `config edit` and `vm edit`: a file in the person's editor, until the cluster takes it.
//!
//! Invariant: the text is never lost. It lives in a file beside the editor until it is committed;
//! whenever the command gives up, that file stays and is named.

use std::path::{Path, PathBuf};
use std::process::ExitStatus;

use tempfile::NamedTempFile;
use tokio::signal::unix::{SignalKind, signal};

use super::Files;
use super::change::{self, Options, Planned};
use crate::connect::Session;
use crate::diffs::{self, Merged};
use crate::failure::{Exit, Failure};
use crate::files::{Committed, File, Read};
use crate::{paths, refusal};

/// What the lines begin with that are added at the top, and taken away again.
const NOTE: &str = "#~ ";

/// What is being edited.
struct Draft {
    key: String,
    /// What the text was made from. `None`: the file is new.
    base: Option<File>,
    /// Without the notes at the top.
    text: String,
    /// What the person is told at the top.
    notes: String,
    /// Whether saving it unchanged gives up: it was refused as it is.
    refused: Option<Failure>,
    /// On this machine, where the editor works.
    file: NamedTempFile,
    /// The file could not be read back: it is kept as it is, whatever it holds.
    unread: bool,
}

pub(crate) async fn edit(session: &Session, path: &str) -> Result<(), Failure> {
    let key = paths::key(path);
    let mut files = Files::new(session);
    let (base, _) = files.get(&key, Read::Linearizable).await?;
    let content = base.as_ref().map(|file| file.content.clone()).unwrap_or_default();
    let text = String::from_utf8(content).map_err(|_| {
        Failure::new(Exit::Usage, format!("cannot edit {key}"))
            .why("it is no text")
            .remedy(format!("use `clusterctl config get {key}` and `clusterctl config put {key}`"))
    })?;
    let file = scratch(&key)?;
    let mut draft =
        Draft { key, base, text, notes: String::new(), refused: None, file, unread: false };
    match until_taken(&mut files, &mut draft).await {
        Ok(()) => Ok(()),
        Err(failure) => Err(keep(draft, failure)),
    }
}

/// A file that ends as the edited one does, so that editors know its language.
fn scratch(key: &str) -> Result<NamedTempFile, Failure> {
    let name = key.rsplit('/').next().unwrap_or(key);
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
    let name: String = name.chars().filter(|c| plain(*c)).take(64).collect();
    tempfile::Builder::new().prefix("clusterctl-").suffix(&format!("-{name}")).tempfile().map_err(
        |error| Failure::file("make a file for the editor in", &std::env::temp_dir(), &error),
    )
}

async fn until_taken(files: &mut Files<'_>, draft: &mut Draft) -> Result<(), Failure> {
    loop {
        let text = in_editor(draft).await?;
        let unchanged = text == draft.text;
        draft.text = text;
        if unchanged && let Some(failure) = draft.refused.take() {
            return Err(failure);
        }
        let before = draft.base.as_ref().map(|file| file.content.as_slice());
        if before.unwrap_or_default() == draft.text.as_bytes() {
            eprintln!("nothing changed");
            return Ok(());
        }
        if diffs::is_marked(&draft.text)
            && !before.is_some_and(|before| std::str::from_utf8(before).is_ok_and(diffs::is_marked))
        {
            let why = "the marks of the merge (<<<<<<<, =======, >>>>>>>) are still there";
            refuse(
                draft,
                Failure::new(Exit::Refused, format!("cannot write {}", draft.key)).why(why),
            );
            continue;
        }
        let commit = commit(files, draft);
        tokio::select! {
            done = commit => if done? { return Ok(()) },
            () = crate::wait::interrupt() => {
                return Err(Failure::new(Exit::Interrupted, "interrupted")
                    .why("it may or may not have been written"));
            }
        }
    }
}

/// Commits the text: `true` if it was taken, `false` if the editor is to open again.
async fn commit(files: &mut Files<'_>, draft: &mut Draft) -> Result<bool, Failure> {
    let after = Some(draft.text.clone().into_bytes());
    let plan = [Planned { key: draft.key.clone(), before: draft.base.clone(), after }];
    let what = format!("write {}", draft.key);
    match files.commit(&what, vec![plan[0].change()], false).await? {
        Committed::Done(revision) => {
            change::report(files, &plan, revision, Options::default(), false)?;
            Ok(true)
        }
        Committed::Refused(refusals) if refusal::is_conflict(&refusals) => {
            let (present, _) = files.get(&draft.key, Read::Linearizable).await?;
            rebase(draft, present);
            Ok(false)
        }
        Committed::Refused(refusals) => {
            let file_of = |key: &str| (key.to_owned(), Some(draft.text.as_str()));
            let failure = refusal::failure(&what, &refusals, file_of);
            refuse(draft, failure);
            Ok(false)
        }
    }
}

/// The editor opens again with the reason.
fn refuse(draft: &mut Draft, failure: Failure) {
    eprintln!("{failure}");
    draft.notes = format!(
        "{failure}\n\nCorrect it and save. Saved as it is, nothing is written and the text is kept.\n\
         These lines are taken away."
    );
    draft.refused = Some(failure);
}

/// Somebody else changed the file: the edit goes on from what they made of it.
fn rebase(draft: &mut Draft, present: Option<File>) {
    let text = |file: &Option<File>| {
        let content = file.as_ref().map(|file| file.content.as_slice()).unwrap_or_default();
        String::from_utf8_lossy(content).into_owned()
    };
    let (before, theirs) = (text(&draft.base), text(&present));
    let content = |file: &'_ Option<File>| file.as_ref().map(|file| file.content.clone());
    let diff =
        diffs::unified(&draft.key, content(&draft.base).as_deref(), content(&present).as_deref());
    let outcome = match diffs::merge(&before, &draft.text, &theirs) {
        Merged::Clean(merged) => {
            draft.text = merged;
            "Both changes are put together below: look at them, and save."
        }
        Merged::Marked(marked) => {
            draft.text = marked;
            "They touch the same lines: resolve the marked places, and save."
        }
    };
    draft.notes = format!(
        "{} was changed by somebody else meanwhile:\n\n{diff}\n{outcome}\n\
         These lines are taken away.",
        draft.key
    );
    eprintln!("{} was changed by somebody else meanwhile", draft.key);
    draft.base = present;
    draft.refused = None;
}

/// Opens the editor on the draft; gives what was saved, without the notes.
async fn in_editor(draft: &mut Draft) -> Result<String, Failure> {
    let path = draft.file.path().to_owned();
    let failed = |error: std::io::Error| Failure::file("write", &path, &error);
    let text = with_notes(&draft.notes, &draft.text);
    // By its name: most editors replace the file when they save.
    std::fs::write(&path, text).map_err(failed)?;
    let editor = editor();
    let status = run(&editor, &path).await?;
    let saved = read(&path).inspect_err(|_| draft.unread = true)?;
    if !status.success() {
        let failure = Failure::new(Exit::Failed, format!("the editor `{editor}` failed"));
        draft.text = saved;
        return Err(failure.why(format!("it ended with {status}; nothing was written")));
    }
    Ok(saved)
}

fn read(path: &Path) -> Result<String, Failure> {
    let bytes = std::fs::read(path).map_err(|error| Failure::file("read", path, &error))?;
    let text = String::from_utf8(bytes).map_err(|_| {
        Failure::new(Exit::Usage, format!("{} is no text any more", path.display()))
    })?;
    Ok(without_notes(&text))
}

fn editor() -> String {
    let given = |name| std::env::var(name).ok().filter(|value| !value.trim().is_empty());
    given("VISUAL").or_else(|| given("EDITOR")).unwrap_or_else(|| "vi".to_owned())
}

/// Runs the editor as git does: by the shell, for editors that take arguments. Ctrl-C is the
/// editor's meanwhile.
async fn run(editor: &str, path: &Path) -> Result<ExitStatus, Failure> {
    let failed = |error: std::io::Error| {
        Failure::new(Exit::Failed, format!("cannot run the editor `{editor}`"))
            .why(error.to_string())
            .remedy("name one in $VISUAL or $EDITOR")
    };
    let _ctrl_c = signal(SignalKind::interrupt()).map_err(failed)?;
    let mut command = tokio::process::Command::new("sh");
    command.arg("-c").arg(format!("{editor} \"$1\"")).arg(editor).arg(path);
    command.status().await.map_err(failed)
}

fn with_notes(notes: &str, text: &str) -> String {
    let notes = notes.lines().map(|line| format!("{}\n", format!("{NOTE}{line}").trim_end()));
    notes.chain([text.to_owned()]).collect()
}

fn without_notes(text: &str) -> String {
    let mut rest = text;
    while let Some((line, after)) = rest.split_once('\n') {
        if line != NOTE.trim_end() && !line.starts_with(NOTE) {
            break;
        }
        rest = after;
    }
    rest.to_owned()
}

/// Keeps the text in its file, if it is not the cluster's own, and says where.
fn keep(draft: Draft, failure: Failure) -> Failure {
    let Draft { key, base, text, file, unread, .. } = draft;
    let base = base.map(|file| file.content).unwrap_or_default();
    if base == text.as_bytes() && !unread {
        return failure;
    }
    let path = match kept(file, Some(&text).filter(|_| !unread)) {
        Ok(path) => path,
        Err((path, error)) => {
            eprintln!("cannot tidy {}: {error}", path.display());
            path
        }
    };
    let kept = format!("your text is kept in {}", path.display());
    let remedy =
        format!("{kept}\ngo on from it with `clusterctl config put {key} -f {}`", path.display());
    let remedy = match failure.remedy.as_ref() {
        Some(remedy_before) => format!("{remedy_before}\n{remedy}"),
        None => remedy,
    };
    failure.remedy(remedy)
}

fn kept(file: NamedTempFile, text: Option<&String>) -> Result<PathBuf, (PathBuf, std::io::Error)> {
    let path = file.path().to_owned();
    let failed = |error: std::io::Error| (path.clone(), error);
    // Kept first: whatever else fails, the file stays.
    let (_, path) = file.keep().map_err(|error| failed(error.error))?;
    if let Some(text) = text {
        std::fs::write(&path, text).map_err(failed)?;
    }
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn draft(base: &str, text: &str) -> Draft {
        let content = base.as_bytes().to_vec();
        let key = "vms/web.toml".to_owned();
        let base = File { key: key.clone(), content, create_revision: 1, revision: 5 };
        let file = scratch(&key).unwrap();
        let (notes, text) = (String::new(), text.to_owned());
        Draft { key, base: Some(base), text, notes, refused: None, file, unread: false }
    }

    #[test]
    fn notes_come_and_go() {
        let text = "# mine\nx = 1\n";
        assert_eq!(without_notes(&with_notes("a\n\nb", text)), text);
        assert_eq!(with_notes("a\n\nb", text), "#~ a\n#~\n#~ b\n# mine\nx = 1\n");
        assert_eq!(without_notes(text), text);
        assert_eq!(without_notes("#~ all"), "#~ all");
    }

    #[test]
    fn a_conflict_goes_on_from_what_is_there() {
        let base = "a = 1\n\n\n\n\nb = 1\n";
        let mut draft = draft(base, &base.replace("a = 1", "a = 2"));
        let mut theirs = draft.base.clone().unwrap();
        theirs.content = base.replace("b = 1", "b = 2").into_bytes();
        theirs.revision = 9;
        rebase(&mut draft, Some(theirs));
        assert_eq!(draft.text, "a = 2\n\n\n\n\nb = 2\n");
        assert_eq!(draft.base.as_ref().unwrap().revision, 9);
        assert!(draft.notes.contains("+b = 2") && draft.notes.contains("put together"));
    }

    #[test]
    fn what_was_typed_is_kept_and_named() {
        let failure = keep(draft("a", "b"), Failure::new(Exit::Usage, "no").remedy("see"));
        let remedy = failure.remedy.unwrap();
        let line = remedy.lines().find_map(|line| line.strip_prefix("your text is kept in "));
        let path = Path::new(line.unwrap());
        assert_eq!(std::fs::read_to_string(path).unwrap(), "b");
        assert!(path.to_str().unwrap().ends_with("-web.toml") && remedy.starts_with("see\n"));
        std::fs::remove_file(path).unwrap();
        let mut unread = draft("a", "a");
        unread.unread = true;
        let path = unread.file.path().to_owned();
        std::fs::write(&path, b"\xff").unwrap();
        assert!(keep(unread, Failure::new(Exit::Usage, "no")).remedy.is_some());
        assert_eq!(std::fs::read(&path).unwrap(), b"\xff");
        std::fs::remove_file(path).unwrap();
        let unchanged = draft("a", "a");
        let path = unchanged.file.path().to_owned();
        assert_eq!(keep(unchanged, Failure::new(Exit::Usage, "no")).remedy, None);
        assert!(!path.exists());
    }
}
