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
//! - it is refused while any other member answers,
//! - a person says that the machines of the dropped members are off and stay off,
//! - every VM that may run on them comes back stopped, for a person to start ([`crate::restore`]).
//!
//! # What becomes of the folder
//!
//! The state (the whole log applied: nobody is left to commit the rest, and some of it was) goes
//! into `recover.hfb`, a backup; from it a cluster is made in `recovered/`; then the old identity
//! and database are moved to `before-recover-ID/` and the new ones in, the identity last. Nothing of
//! the old is changed or deleted. Interrupted before the move, nothing has happened; in it, the
//! folder belongs to no cluster, and the backup can be restored.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use proto::{Name, NodeId};

use crate::backup;
use crate::consensus::{Forward, Forwarded, Held, Peers, ask, held};
use crate::identity::Identity;
use crate::machine::{Overlay, Read, Table};
use crate::restore::{Checked, Restored};
use crate::storage::{Db, FolderLock, View};
use crate::tls::member_client;
use crate::{ClusterConfig, InitError, Member, OpenError, Opened, RestoreError, open};

/// How long a member may take to answer.
const ANSWER: Duration = Duration::from_secs(5);
/// Rows that are read at once of a state with changes on top.
const PAGE: usize = 16;
const BACKUP: &str = "recover.hfb";
const RECOVERED: &str = "recovered";
/// What a member's folder holds of its cluster; the identity first.
const PARTS: [&str; 6] = ["identity.json", "node.key", "node.crt", "ca.crt", "db", "snapshots"];

/// Why a node was not recovered. Nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum RecoverError {
    /// There is nothing to recover.
    #[error("{} belongs to no cluster; to begin with a backup, use `clusterctl cluster restore`", .0.display())]
    NoMember(PathBuf),
    /// Others are up.
    #[error(
        "{0} of the old cluster still answers: recovering makes sense only where all others are lost. Start this node's agent and see `clusterctl cluster status`; if the others are too few for a quorum and cannot be brought back, stop their agents first"
    )]
    Answers(String),
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
    /// Who is dropped.
    pub dropped: Vec<Member>,
}

/// A stopped member's locked data folder.
#[derive(Debug)]
pub struct Survivor {
    config: ClusterConfig,
    identity: Identity,
    db: Arc<Db>,
    survey: Survey,
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
        let opening = tokio::task::spawn_blocking(move || Db::open(&folder, lock));
        let db = opening.await.map_err(|error| OpenError::Raft(error.to_string()))??;
        let db = Arc::new(db);
        let found = Self::look(&config, &identity, &db).await;
        match found {
            Ok(survey) => Ok(Self { config, identity, db, survey }),
            Err(error) => {
                db.close();
                Err(error)
            }
        }
    }

    async fn look(
        config: &ClusterConfig,
        identity: &Identity,
        db: &Arc<Db>,
    ) -> Result<Survey, RecoverError> {
        let reading = db.clone();
        let read = tokio::task::spawn_blocking(move || reading.view(|view| Ok(held(view)?.0)));
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
        nobody_answers(config, identity, &dropped).await?;
        Ok(Survey {
            cluster_name: identity.record.cluster_name.clone(),
            cluster_id: identity.record.cluster_id.clone(),
            node_id: me,
            node_name,
            revision: held.revision,
            last_index: held.last,
            committed_index: held.committed,
            dropped,
        })
    }

    /// What would be recovered, and what is lost.
    #[must_use]
    pub fn survey(&self) -> &Survey {
        &self.survey
    }

    /// Leaves all as it is.
    pub fn give_up(self) {
        self.db.close();
    }

    /// Makes this node a cluster of its own. An empty name: as the old one's. The folder can be
    /// opened by an agent afterwards.
    ///
    /// # Errors
    /// [`RecoverError`]
    pub async fn recover(self, cluster_name: &str) -> Result<Recovered, RecoverError> {
        let folder = self.config.data_dir.clone();
        let file = self.export().await;
        self.db.close();
        let file = file?;
        // Closing gave the lock up.
        let _lock = FolderLock::take(&folder)?;
        let name = if cluster_name.is_empty() { &self.survey.cluster_name } else { cluster_name };
        name.parse::<Name>().map_err(InitError::from)?;
        let checked = Checked::read(file, Some(self.survey.node_id)).await?;
        let made = folder.join(RECOVERED);
        match fs::remove_dir_all(&made) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(failed(format!("cannot empty {}", made.display()))(error));
            }
            _ => {}
        }
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
            kept: folder.join(format!("before-recover-{}", self.identity.record.cluster_id)),
            restored: checked.restored,
        };
        cluster.shutdown().await;
        swap(&folder, &made, &recovered.kept)
            .map_err(failed("the new cluster's files cannot be moved to their place"))?;
        Ok(recovered)
    }

    /// Writes the state as a backup.
    async fn export(&self) -> Result<File, RecoverError> {
        let path = self.config.data_dir.join(BACKUP);
        let (db, record) = (self.db.clone(), self.identity.record.clone());
        let (name, shown) = (self.survey.node_name.clone(), path.display().to_string());
        let writing = tokio::task::spawn_blocking(move || {
            let mut options = File::options();
            let options = options.read(true).write(true).create(true).truncate(true).mode(0o600);
            let mut file = options.open(&path)?;
            db.view(|view| {
                let (_, state) = held(view)?;
                let header = backup::header(&record, name, &state)?;
                backup::write(rows(&state), &header, |piece| file.write_all(&piece))
            })?;
            file.sync_all()?;
            Ok(file)
        });
        let written = writing.await.map_err(io::Error::other).and_then(|written| written);
        written.map_err(failed(format!("cannot write {shown}")))
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

/// The rows of a state with changes on top, in order.
fn rows<'a>(
    state: &'a Overlay<'_, View<'_>>,
) -> impl Iterator<Item = io::Result<(Vec<u8>, Vec<u8>)>> + 'a {
    let (mut from, mut page) = (Vec::new(), Vec::new().into_iter());
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

/// Asks every other member, voter or not: one that is up knows of a majority where there is one, or
/// goes on in the old cluster once its others are back.
async fn nobody_answers(
    config: &ClusterConfig,
    identity: &Identity,
    others: &[Member],
) -> Result<(), RecoverError> {
    let unusable = |error: &dyn std::fmt::Display| OpenError::Unusable {
        path: config.data_dir.clone(),
        detail: error.to_string(),
    };
    let tls = member_client(identity).map_err(|error| unusable(&error))?;
    let peers = Peers::new(tls, identity.record.cluster_id.clone());
    let removed = tokio::sync::watch::channel(false).0;
    let asked = others.iter().map(|member| {
        let channel = peers.shared(member.node_id.0, &member.api_address);
        let removed = &removed;
        async move {
            let answer = ask(channel?, &Forward::Hello, ANSWER, removed).await;
            matches!(answer, Forwarded::Done).then_some(member.name.as_str())
        }
    });
    let answers: Vec<&str> = futures::future::join_all(asked).await.into_iter().flatten().collect();
    if *removed.borrow() {
        return Err(OpenError::Removed { path: config.data_dir.clone() }.into());
    }
    if answers.is_empty() { Ok(()) } else { Err(RecoverError::Answers(answers.join(", "))) }
}

/// Moves the old cluster's files away and the new one's in.
fn swap(folder: &Path, made: &Path, kept: &Path) -> io::Result<()> {
    fs::create_dir(kept)?;
    for part in PARTS {
        rename(&folder.join(part), &kept.join(part))?;
    }
    sync(kept)?;
    sync(folder)?;
    for part in PARTS.iter().rev() {
        rename(&made.join(part), &folder.join(part))?;
        sync(folder)?;
    }
    fs::remove_dir_all(made)
}

fn rename(from: &Path, to: &Path) -> io::Result<()> {
    match fs::rename(from, to) {
        // A member has no snapshot at first.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

fn sync(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}
