//! Opening a data folder: a member goes on, a fresh one is initialized or joins.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use proto::{Name, NodeId};
use tokio::sync::Mutex as AsyncMutex;
use tokio::time::Instant;

use crate::authority::CaRecord;
use crate::consensus::{MemberNode, lead};
use crate::host::{Host, blocking};
use crate::identity::{
    Ca, Identity, Life, NodeIdentity, Pair, SEALING_KEY, SealingKey, Trusted, request,
};
use crate::node::{self, Node};
use crate::storage::{Db, FolderLock, LOG, STATE};
use crate::{Cluster, ClusterConfig, InitError, JoinError, OpenError, StoreError};
use crate::{membership, recover, restore};

/// What a data folder turned out to be.
#[derive(Debug)]
pub enum Opened {
    /// Belongs to no cluster yet.
    Fresh(Uninitialized),
    /// A member; Raft is running.
    Member(Cluster),
}

/// A locked data folder that belongs to no cluster.
#[derive(Debug)]
pub struct Uninitialized {
    config: Box<ClusterConfig>,
    lock: Mutex<Option<FolderLock>>,
    /// One attempt at a time.
    busy: AsyncMutex<()>,
}

/// Locks the data folder and opens what is in it.
///
/// # Errors
/// [`OpenError`]: in use by another agent, damaged, disk full.
pub async fn open(config: ClusterConfig) -> Result<Opened, OpenError> {
    let lock = FolderLock::take(&config.data_dir)?;
    let folder = &config.data_dir;
    if folder.join("removed").exists() {
        return Err(OpenError::Removed { path: folder.clone() });
    }
    let Some(identity) = Identity::load(folder)? else {
        if recover::is_interrupted(folder) {
            return Err(OpenError::Unusable {
                path: folder.clone(),
                detail: "a recovery was interrupted while its files were exchanged; run `node-agent recover` again: it goes on from there".to_owned(),
            });
        }
        // Not where joining was interrupted just before its end: that is tried again.
        let joining = folder.join(crate::enrol::KEY).exists();
        if !joining && ["node.pem", "ca.crt", STATE].iter().all(|part| folder.join(part).exists()) {
            return Err(OpenError::Unusable {
                path: folder.join("identity.json"),
                detail: "is missing, and the rest of a member is here: put it back; or, if this node is of no cluster any more, empty the data folder".to_owned(),
            });
        }
        return Ok(Opened::Fresh(Uninitialized {
            config: Box::new(config),
            lock: Mutex::new(Some(lock)),
            busy: AsyncMutex::new(()),
        }));
    };
    // Of an attempt to join that came before: it must not excuse an identity that is lost some day.
    crate::enrol::forget_key(folder);
    if let Some(part) = [LOG, STATE].into_iter().find(|part| !folder.join(part).exists()) {
        return Err(OpenError::Unusable {
            path: folder.join(part),
            detail: "is missing: a member that forgot its votes must not take part; remove this node from the cluster, empty its data folder and join again".to_owned(),
        });
    }
    let db = open_db(&config, lock, Db::open).await?;
    Ok(Opened::Member(Cluster::new(node::start(config, identity, db).await?)))
}

/// [`Db::open`] or [`Db::create`].
type OpenDb = fn(&Path, FolderLock, Arc<dyn Host>) -> Result<Db, OpenError>;

async fn open_db(
    config: &ClusterConfig,
    lock: FolderLock,
    open: OpenDb,
) -> Result<Arc<Db>, OpenError> {
    let (folder, host) = (config.data_dir.clone(), config.host.clone());
    let opened = blocking(config.host.as_ref(), move || open(&folder, lock, host)).await;
    let db = opened.map_err(|error| OpenError::Raft(error.to_string()))??;
    Ok(Arc::new(db))
}

impl Uninitialized {
    /// Makes a new cluster with this node as its only member. Can be tried again after an error.
    ///
    /// # Errors
    /// [`InitError`]
    pub async fn init(&self, cluster_name: &str, node_name: &str) -> Result<Cluster, InitError> {
        self.form(cluster_name, node_name, None).await
    }

    /// The same, with what a backup holds.
    pub(crate) async fn form(
        &self,
        cluster_name: &str,
        node_name: &str,
        data: Option<&restore::Checked>,
    ) -> Result<Cluster, InitError> {
        let _one = self.busy.lock().await;
        let cluster_name: Name = cluster_name.parse()?;
        let node_name: Name = node_name.parse()?;
        let made = |error: &dyn std::fmt::Display| InitError::Identity(error.to_string());
        let (key_pem, csr) = request().map_err(|error| made(&error))?;
        let cluster_id = new_id().map_err(|error| made(&error))?;
        let ca = Ca::make(&cluster_id).map_err(|error| made(&error))?;
        let sealing_key = SealingKey::make().map_err(|error| made(&error))?;
        let sealed = CaRecord::first(&ca, &sealing_key, &cluster_id).map_err(|e| made(&e))?;
        let node_id = NodeId(1);
        let life = Life::from_now(self.config.certificates.node);
        let certificate =
            ca.sign_node(&cluster_id, node_id, &csr, life).map_err(|error| made(&error))?;
        let identity = Identity {
            pair: Pair::new(&key_pem, &certificate),
            previous: None,
            trusted: Trusted::only(&ca.certificate_pem),
            record: NodeIdentity {
                cluster_id,
                cluster_name: cluster_name.to_string(),
                node_id,
                node_name: node_name.to_string(),
            },
        };
        let node = self.start_empty(identity.clone()).await?;
        let mut done = self.first_records(&node, &sealed, &node_name).await;
        if let (Ok(()), Some(data)) = (&done, data) {
            done = data.write(&node).await;
        }
        if let Err(error) = done.and_then(|()| Ok(self.keep(&sealing_key, &identity)?)) {
            self.give_back(&node).await;
            return Err(error);
        }
        crate::enrol::forget_key(&self.config.data_dir);
        Ok(Cluster::new(node))
    }

    /// Puts the identity on disk: from then on the folder is a member's.
    fn keep(&self, sealing_key: &SealingKey, identity: &Identity) -> Result<(), OpenError> {
        let folder = &self.config.data_dir;
        sealing_key
            .store(folder)
            .map_err(|source| OpenError::Io { path: folder.join(SEALING_KEY), source })?;
        identity.store(folder)
    }

    async fn first_records(
        &self,
        node: &Node,
        ca: &CaRecord,
        name: &Name,
    ) -> Result<(), InitError> {
        let member = MemberNode::of(name.as_str(), &self.config);
        lead::initialize(node.raft(), 1, member)
            .await
            .map_err(|why| InitError::Store(StoreError::Failed { why }))?;
        membership::write_first_records(node, ca, name).await?;
        Ok(())
    }

    /// Joins the cluster that made the token. The others reach this node at its advertised
    /// addresses once the agent serves there. Can be tried again after an error.
    ///
    /// # Errors
    /// [`JoinError`]
    pub async fn join(&self, token: &str, node_name: &str) -> Result<Cluster, JoinError> {
        let _one = self.busy.lock().await;
        let name: Name = node_name.parse()?;
        let (identity, sealing_key) = crate::enrol::enrol(&self.config, token, &name).await?;
        let node = self.start_empty(identity.clone()).await?;
        if let Err(error) = self.keep(&sealing_key, &identity) {
            self.give_back(&node).await;
            return Err(error.into());
        }
        crate::enrol::forget_key(&self.config.data_dir);
        Ok(Cluster::new(node))
    }

    /// Starts a member on an empty database; what an earlier attempt left is removed first.
    async fn start_empty(&self, identity: Identity) -> Result<Arc<Node>, OpenError> {
        let lock = self.lock.lock().unwrap_or_else(PoisonError::into_inner).take();
        let lock = lock.ok_or_else(|| OpenError::Unusable {
            path: self.config.data_dir.clone(),
            detail: "belongs to a cluster already".to_owned(),
        })?;
        let result = async {
            for part in [LOG, STATE, "snapshots"] {
                let path = self.config.data_dir.join(part);
                match std::fs::remove_dir_all(&path) {
                    Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
                        return Err(OpenError::Io { path, source });
                    }
                    _ => {}
                }
            }
            let db = open_db(&self.config, lock, Db::create).await?;
            let started = node::start((*self.config).clone(), identity, db.clone()).await;
            if started.is_err() {
                db.close();
            }
            started
        }
        .await;
        if result.is_err() {
            self.lock_again().await;
        }
        result
    }

    /// After a failed attempt: ends it and takes the folder back.
    async fn give_back(&self, node: &Node) {
        node.shutdown().await;
        self.lock_again().await;
    }

    async fn lock_again(&self) {
        let until = Instant::now() + Duration::from_secs(1);
        while Instant::now() < until {
            if let Ok(lock) = FolderLock::take(&self.config.data_dir) {
                *self.lock.lock().unwrap_or_else(PoisonError::into_inner) = Some(lock);
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

/// A random cluster id that is a DNS label.
fn new_id() -> Result<String, getrandom::Error> {
    let mut bytes = [0; 10];
    getrandom::fill(&mut bytes)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}
