//! One survivor of a lost majority becomes a cluster again. For a stopped member's data folder.
//!
//! # Why it is another cluster
//!
//! The obvious way is to write a membership of one into the survivor's log and let it elect itself.
//! That is a second history under the same name: a majority that was not lost but cut off, or that
//! is repaired later, holds entries at the same indexes, accepts the survivor's votes and appends
//! (its certificates are good), hands out the same node ids and, with a higher term, overwrites
//! what the survivor acknowledged since. Records that shut the old members out would have to be
//! known to both sides, and to nodes that the survivor has never heard of.
//!
//! So the survivor's data goes into a cluster of its own: a new id, a new CA, a new Raft log. The id
//! stands in every certificate and both ends of every connection check it: the two can never be
//! members of one group, whatever comes back in which order. Of the old cluster there is either a
//! majority, and then it is the cluster as ever (without this node); or there is none, and then it
//! accepts no change any more. What no protocol can exclude is that a person recovers a node while
//! a majority lives on behind a broken network. Then both would own the VMs; therefore
//!
//! - it is refused unless nothing at all is heard of any other member,
//! - a person says that the machines of the dropped members are off and stay off,
//! - every VM that may run on them comes back stopped, for a person to start ([`crate::restore`]):
//!   all but those without HA of which a majority is known to have left them to the survivor.
//!
//! # What becomes of the folder
//!
//! The state (the whole log applied: nobody is left to commit the rest, and some of it was) goes
//! into `recover.hfb`, a backup; from it a cluster is made in `recovered/`; then the old identity
//! and database are moved to `before-recover-ID.partial/`, which becomes `before-recover-ID/`, and
//! the new ones in, the identity last. Nothing of the old is changed or deleted: the old database is
//! only read. Interrupted before the move, nothing has happened; in it, the folder is that of no
//! member, agents refuse it, and [`finish_recovery`] does the rest of the move.

mod others;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use proto::record::Placement;
use proto::{Name, NodeId, VmId, keys};

use crate::backup;
use crate::consensus::{Held, held, settled};
use crate::identity::{Identity, SEALING_KEY};
use crate::machine::{Overlay, Read, Record, Table, decode};
use crate::restore::{Checked, Own, Restored, runs_on};
use crate::storage::{FolderLock, Frozen, LOG, STATE, View};
use crate::{ClusterConfig, InitError, Member, OpenError, Opened, RestoreError, open};

pub use others::Heard;
use others::nobody_answers;

/// Rows that are read at once of a state with changes on top.
const PAGE: usize = 16;
const BACKUP: &str = "recover.hfb";
const KEPT: &str = "before-recover-";
const RECOVERED: &str = "recovered";
/// What a member's folder holds of its cluster; the identity first.
const PARTS: [&str; 7] =
    ["identity.json", "node.pem", "ca.crt", SEALING_KEY, LOG, STATE, "snapshots"];

/// Why a node was not recovered. Nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum RecoverError {
    /// There is nothing to recover.
    #[error("{} belongs to no cluster; to begin with a backup, use `clusterctl cluster restore`", .0.display())]
    NoMember(PathBuf),
    /// Others are up, or are not known to be gone.
    #[error(
        "not all others of the old cluster are gone: {}. Nothing was changed: recovering makes sense only where all others are lost. Start this node's agent and see `clusterctl cluster status`; if the others are too few for a quorum and cannot be brought back, power their machines off (VMs outlive an agent), and end whatever else is at these addresses, then try again", others::list(.0)
    )]
    Answers(Vec<Heard>),
    /// Where the old cluster's files are to go.
    #[error("{} is there already: move it elsewhere; nothing was changed", .0.display())]
    Kept(PathBuf),
    /// The data folder.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The state cannot be read or written.
    #[error("{what}: {source}")]
    Io {
        /// What was done.
        what: String,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The new cluster was not made.
    #[error(transparent)]
    Restore(#[from] RestoreError),
}

impl From<InitError> for RecoverError {
    fn from(error: InitError) -> Self {
        Self::Restore(error.into())
    }
}

fn failed(what: impl Into<String>) -> impl FnOnce(io::Error) -> RecoverError {
    let what = what.into();
    move |source| RecoverError::Io { what, source }
}

/// What would be recovered, and what is lost.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Survey {
    /// The cluster's name.
    pub cluster_name: String,
    /// Its id.
    pub cluster_id: String,
    /// This node's id in it.
    pub node_id: NodeId,
    /// This node's name in it.
    pub node_name: String,
    /// The store's revision, the whole log applied.
    pub revision: u64,
    /// The last log entry that this node has: what others had after it is lost.
    pub last_index: u64,
    /// The last one that it knew to be committed: what is after it may never have been
    /// acknowledged, and is kept.
    pub committed_index: u64,
    /// The machine lost power while the agent ran: what had not reached the disk is lost as well.
    pub lost_tail: bool,
    /// Who is dropped.
    pub dropped: Vec<Member>,
    /// Those of them whose machine is on: it refused the connection, so VMs may still run there.
    pub powered: Vec<NodeId>,
}

/// A stopped member's locked data folder.
#[derive(Debug)]
pub struct Survivor {
    config: ClusterConfig,
    identity: Identity,
    db: Arc<Frozen>,
    survey: Survey,
    /// Held to the end: no agent opens the folder in between.
    _lock: FolderLock,
}

impl Survivor {
    /// Opens a data folder, and asks all other members whether they are there.
    ///
    /// # Errors
    /// [`RecoverError`]; [`RecoverError::Answers`] where one is.
    pub async fn find(config: ClusterConfig) -> Result<Self, RecoverError> {
        let folder = config.data_dir.clone();
        if !folder.join(PARTS[0]).exists() {
            return Err(RecoverError::NoMember(folder));
        }
        let lock = FolderLock::take(&folder)?;
        if folder.join("removed").exists() {
            return Err(OpenError::Removed { path: folder }.into());
        }
        let identity = Identity::load(&folder)?.ok_or(RecoverError::NoMember(folder.clone()))?;
        let boot = config.host.boot_id();
        let opening = tokio::task::spawn_blocking(move || Frozen::open(&folder, &boot));
        let db = opening.await.map_err(|error| OpenError::Raft(error.to_string()))??;
        let db = Arc::new(db);
        let survey = Self::look(&config, &identity, &db).await?;
        Ok(Self { config, identity, db, survey, _lock: lock })
    }

    async fn look(
        config: &ClusterConfig,
        identity: &Identity,
        db: &Arc<Frozen>,
    ) -> Result<Survey, RecoverError> {
        let reading = db.clone();
        let read = tokio::task::spawn_blocking(move || {
            reading.view(|view| Ok(held(&reading.log(), view)?.0))
        });
        let held = read.await.map_err(io::Error::other).and_then(|held| held);
        let held: Held = held.map_err(failed("the member's state cannot be read"))?;
        let me = identity.record.node_id;
        let members: Vec<Member> = held
            .members
            .into_iter()
            .map(|(id, node, voter)| Member {
                node_id: NodeId(id),
                name: node.name,
                api_address: node.api_address,
                enrol_address: node.enrol_address,
                voter,
                zone: node.zone,
                witness: node.witness,
            })
            .collect();
        let own = members.iter().find(|member| member.node_id == me);
        let node_name = own.map_or(&identity.record.node_name, |own| &own.name).clone();
        let dropped: Vec<Member> =
            members.into_iter().filter(|member| member.node_id != me).collect();
        let powered = nobody_answers(config, identity, &dropped).await?;
        Ok(Survey {
            cluster_name: identity.record.cluster_name.clone(),
            cluster_id: identity.record.cluster_id.clone(),
            node_id: me,
            node_name,
            revision: held.revision,
            last_index: held.last,
            committed_index: held.committed,
            lost_tail: db.lost_tail,
            dropped,
            powered,
        })
    }

    /// What would be recovered, and what is lost.
    #[must_use]
    pub fn survey(&self) -> &Survey {
        &self.survey
    }

    /// Makes this node a cluster of its own. An empty name: as the old one's. The folder can be
    /// opened by an agent afterwards.
    ///
    /// # Errors
    /// [`RecoverError`]
    pub async fn recover(self, cluster_name: &str) -> Result<Recovered, RecoverError> {
        let folder = self.config.data_dir.clone();
        let name = if cluster_name.is_empty() { &self.survey.cluster_name } else { cluster_name };
        name.parse::<Name>().map_err(InitError::from)?;
        let kept = folder.join(format!("{KEPT}{}", self.identity.record.cluster_id));
        if kept.exists() {
            return Err(RecoverError::Kept(kept));
        }
        // A person may have thought about it for long.
        look_again(&self.config, &self.identity, &self.survey).await?;
        let mut left = Unfinished(Some(folder.clone()));
        let (file, own) = self.export().await?;
        let checked = Checked::read(file, Some(own)).await?;
        let made = folder.join(RECOVERED);
        match fs::remove_dir_all(&made) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(failed(format!("cannot empty {}", made.display()))(error));
            }
            _ => {}
        }
        let asking = self.config.clone();
        let config = ClusterConfig { data_dir: made.clone(), ..self.config };
        let cluster = match open(config).await? {
            Opened::Fresh(fresh) => {
                fresh.form(name, &self.survey.node_name, Some(&checked)).await?
            }
            Opened::Member(_) => return Err(RecoverError::NoMember(made)),
        };
        let recovered = Recovered {
            cluster_id: cluster.cluster_id().to_owned(),
            cluster_name: cluster.cluster_name().to_owned(),
            ca_fingerprint: cluster.ca_fingerprint().to_owned(),
            kept,
            restored: checked.restored,
        };
        cluster.shutdown().await;
        // Read to its end, which took a while.
        drop(self.db);
        look_again(&asking, &self.identity, &self.survey).await?;
        left.0 = None;
        swap(&folder, &recovered.kept).map_err(failed(UNFINISHED))?;
        Ok(recovered)
    }

    /// Writes the state as a backup, which has its name once it is whole and on the disk; and says
    /// which VMs are this node's.
    async fn export(&self) -> Result<(File, Own), RecoverError> {
        let folder = self.config.data_dir.clone();
        let (db, record) = (self.db.clone(), self.identity.record.clone());
        let (id, name) = (self.survey.node_id, self.survey.node_name.clone());
        let lost_tail = self.survey.lost_tail;
        let shown = folder.join(BACKUP).display().to_string();
        let writing = tokio::task::spawn_blocking(move || {
            let partial = folder.join(format!("{BACKUP}.tmp"));
            remove(&partial)?;
            let mut options = File::options();
            let options = options.read(true).write(true).create_new(true).mode(0o600);
            let mut file = options.open(&partial)?;
            let settled = db.view(|view| {
                let (_, state) = held(&db.log(), view)?;
                let header = backup::header(&record, name, &state)?;
                backup::write(rows(&state, b""), &header, |piece| file.write_all(&piece))?;
                // What a power loss took from the log's end may have been acted on already.
                if lost_tail {
                    Ok(BTreeMap::new())
                } else {
                    left_to(id, &settled(&db.log(), view)?)
                }
            })?;
            file.sync_all()?;
            fs::rename(&partial, folder.join(BACKUP))?;
            sync(&folder)?;
            Ok((file, Own { id, settled }))
        });
        let written = writing.await.map_err(io::Error::other).and_then(|written| written);
        written.map_err(failed(format!("cannot write {shown}")))
    }
}

/// Asks once more. Who has come since is not gone, and whose machine was switched on since may be
/// there in a moment.
async fn look_again(
    config: &ClusterConfig,
    identity: &Identity,
    survey: &Survey,
) -> Result<(), RecoverError> {
    let powered = nobody_answers(config, identity, &survey.dropped).await?;
    let came = survey.dropped.iter().filter(|member| {
        powered.contains(&member.node_id) && !survey.powered.contains(&member.node_id)
    });
    let came: Vec<Heard> = came
        .map(|member| Heard {
            name: member.name.clone(),
            address: member.api_address.clone(),
            seen: "its machine was switched on meanwhile".to_owned(),
        })
        .collect();
    if came.is_empty() { Ok(()) } else { Err(RecoverError::Answers(came)) }
}

/// What a recovery has written before it exchanges files. It is removed where it does not come to
/// that: a cluster that was made and never used must not be found by a later one.
struct Unfinished(Option<PathBuf>);

impl Drop for Unfinished {
    fn drop(&mut self) {
        if let Some(folder) = self.0.take() {
            let _ = fs::remove_dir_all(folder.join(RECOVERED));
            let _ = remove(&folder.join(BACKUP));
        }
    }
}

/// What a recovery made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recovered {
    /// The new cluster's id.
    pub cluster_id: String,
    /// Its name.
    pub cluster_name: String,
    /// SHA-256 of its new CA certificate's DER, hexadecimal.
    pub ca_fingerprint: String,
    /// Where the old one's files are.
    pub kept: PathBuf,
    /// What was taken over.
    pub restored: Restored,
}

/// The VMs that a state leaves to a node.
fn left_to(node: NodeId, state: &Overlay<'_, View<'_>>) -> io::Result<BTreeMap<String, VmId>> {
    let mut found = BTreeMap::new();
    for row in rows(state, keys::PLACEMENTS.as_bytes()) {
        let (key, value) = row?;
        if !key.starts_with(keys::PLACEMENTS.as_bytes()) {
            break;
        }
        let record: Record = decode(&value)?;
        let placement: Placement = serde_json::from_slice(&record.value)?;
        if runs_on(&placement, node) {
            found.insert(String::from_utf8_lossy(&key).into_owned(), placement.vm_id);
        }
    }
    Ok(found)
}

/// The rows of a state with changes on top, in order, from a key on.
fn rows<'a>(
    state: &'a Overlay<'_, View<'_>>,
    from: &[u8],
) -> impl Iterator<Item = io::Result<(Vec<u8>, Vec<u8>)>> + 'a {
    let (mut from, mut page) = (from.to_vec(), Vec::new().into_iter());
    std::iter::from_fn(move || {
        if let Some(row) = page.next() {
            return Some(Ok(row));
        }
        let found = match state.scan(Table::Data, &from, None, PAGE) {
            Ok(found) => found,
            Err(error) => return Some(Err(error)),
        };
        let (last, _) = found.last()?;
        from = [last.as_slice(), &[0]].concat();
        page = found.into_iter();
        page.next().map(Ok)
    })
}

const UNFINISHED: &str = "the files cannot be exchanged; once the cause is gone, run `node-agent recover` again: it goes on from here";

/// Whether a recovery was interrupted while files were exchanged.
pub(crate) fn is_interrupted(folder: &Path) -> bool {
    // The first thing that an exchange does is to make the folder for the old files.
    let begun = || {
        let entries = fs::read_dir(folder).into_iter().flatten().flatten();
        entries.into_iter().any(|entry| entry.file_name().to_string_lossy().starts_with(KEPT))
    };
    !folder.join(PARTS[0]).exists() && folder.join(RECOVERED).join(PARTS[0]).exists() && begun()
}

/// Does the rest of a recovery that was interrupted while files were exchanged; where the old
/// cluster's files are. `None`: none was.
///
/// # Errors
/// [`RecoverError`]; it can be tried again.
pub fn finish_recovery(folder: &Path) -> Result<Option<PathBuf>, RecoverError> {
    if !is_interrupted(folder) {
        return Ok(None);
    }
    let _lock = FolderLock::take(folder)?;
    let mut kept: Option<PathBuf> = None;
    for entry in fs::read_dir(folder).map_err(failed(UNFINISHED))? {
        let path = entry.map_err(failed(UNFINISHED))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if let Some(of) = name.strip_prefix(KEPT).and_then(|of| of.strip_suffix(PARTIAL)) {
            let whole = folder.join(format!("{KEPT}{of}"));
            move_out(folder, &whole).map_err(failed(UNFINISHED))?;
            kept = Some(whole);
        } else if name.starts_with(KEPT) && kept.is_none() {
            kept = Some(path);
        }
    }
    move_in(folder).map_err(failed(UNFINISHED))?;
    Ok(kept.or_else(|| Some(folder.to_owned())))
}

/// Of the name of the folder that the old cluster's files are being moved to.
const PARTIAL: &str = ".partial";

fn partial(kept: &Path) -> PathBuf {
    let mut name = kept.as_os_str().to_owned();
    name.push(PARTIAL);
    name.into()
}

/// Moves the old cluster's files away and the new one's in.
fn swap(folder: &Path, kept: &Path) -> io::Result<()> {
    // With the old CA's key in it, and what opens it, also where it is moved to some day.
    match fs::DirBuilder::new().mode(0o700).create(partial(kept)) {
        // Of an attempt that moved nothing.
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => sync(folder)?,
    }
    move_out(folder, kept)?;
    move_in(folder)
}

/// The identity goes first: from then on the folder is that of no member.
fn move_out(folder: &Path, kept: &Path) -> io::Result<()> {
    let leaving = partial(kept);
    for part in PARTS {
        rename(&folder.join(part), &leaving.join(part))?;
        sync(&leaving)?;
        sync(folder)?;
    }
    fs::rename(&leaving, kept)?;
    sync(folder)
}

/// The identity comes last.
fn move_in(folder: &Path) -> io::Result<()> {
    let made = folder.join(RECOVERED);
    for part in PARTS.iter().rev() {
        rename(&made.join(part), &folder.join(part))?;
        sync(folder)?;
    }
    fs::remove_dir_all(made)
}

fn rename(from: &Path, to: &Path) -> io::Result<()> {
    match fs::rename(from, to) {
        // A member has no snapshot at first; or it was moved before an interruption.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

fn remove(file: &Path) -> io::Result<()> {
    match fs::remove_file(file) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn sync(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    const OLD: [&str; 6] = ["identity.json", "node.pem", "ca.crt", SEALING_KEY, LOG, STATE];

    fn folder() -> io::Result<tempfile::TempDir> {
        let folder = tempfile::tempdir()?;
        let made = folder.path().join(RECOVERED);
        fs::create_dir(&made)?;
        for part in OLD {
            fs::write(folder.path().join(part), "old")?;
        }
        for part in PARTS {
            fs::write(made.join(part), "new")?;
        }
        fs::write(made.join("lock"), "1")?;
        Ok(folder)
    }

    fn is_exchanged(folder: &Path, kept: &Path) -> io::Result<()> {
        for part in PARTS {
            assert_eq!(fs::read_to_string(folder.join(part))?, "new", "{part}");
        }
        for part in OLD {
            assert_eq!(fs::read_to_string(kept.join(part))?, "old", "{part}");
        }
        assert!(!kept.join("snapshots").exists() && !folder.join(RECOVERED).exists());
        Ok(())
    }

    #[test]
    fn files_are_exchanged() -> io::Result<()> {
        let folder = folder()?;
        fs::rename(folder.path().join(PARTS[0]), folder.path().join("aside"))?;
        assert!(!is_interrupted(folder.path()), "an identity that is lost is no recovery");
        fs::rename(folder.path().join("aside"), folder.path().join(PARTS[0]))?;
        let kept = folder.path().join("before-recover-c1");
        assert!(!is_interrupted(folder.path()), "nothing was moved yet");
        swap(folder.path(), &kept)?;
        is_exchanged(folder.path(), &kept)
    }

    /// Interrupted after each step there is: `finish_recovery` comes to the same.
    #[test]
    fn an_exchange_that_was_interrupted_anywhere_is_finished() -> Result<(), RecoverError> {
        let io = || failed("the test");
        for steps in 1..=OLD.len() + 1 + PARTS.len() - 1 {
            let folder = folder().map_err(io())?;
            let kept = folder.path().join("before-recover-c1");
            let (leaving, made) = (partial(&kept), folder.path().join(RECOVERED));
            let mut left = steps;
            let mut step = |from: PathBuf, to: PathBuf| {
                if left > 0 {
                    left -= 1;
                    fs::rename(from, to).map_err(io())?;
                }
                Ok::<_, RecoverError>(())
            };
            fs::create_dir(&leaving).map_err(io())?;
            for part in OLD {
                step(folder.path().join(part), leaving.join(part))?;
            }
            step(leaving.clone(), kept.clone())?;
            for part in PARTS.iter().rev() {
                step(made.join(part), folder.path().join(part))?;
            }
            assert!(is_interrupted(folder.path()), "after {steps} steps");
            assert_eq!(finish_recovery(folder.path())?, Some(kept.clone()), "after {steps} steps");
            is_exchanged(folder.path(), &kept).map_err(io())?;
            assert_eq!(finish_recovery(folder.path())?, None);
        }
        Ok(())
    }
}
