//! Who has which role: kept in memory, as this node has applied the documents under `access/`.
//!
//! A request that only looks costs a look into memory, and no quorum. A node that is cut off goes on
//! showing what it has to whom it knew. What changes anything is judged by what a quorum has confirmed
//! since it was asked ([`Access::catch_up`]), or takes along what it was judged by ([`Known::revision`])
//! and comes to nothing where that is old: a copy may be behind without its node knowing it.
//!
//! Invariant: until a quorum has confirmed that this node is up to date, nobody is taken for more than
//! a viewer, and without a document for nothing. A node that has joined just now, or was off for long,
//! would else take everybody for an administrator, or somebody who is none any more.

use std::sync::Arc;
use std::time::Duration;

use cluster::{Consistency, StoreError};
use futures::StreamExt as _;
use proto::documents::{Role, RolesByName, roles};
use proto::{Name, Revision, keys};
use tokio::sync::{Mutex, watch};

use crate::store::Store;

/// Before the documents are read again, where that failed.
const PAUSE: Duration = Duration::from_millis(200);

/// What is known of roles.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Roles {
    /// Nothing: no client may do anything.
    #[default]
    Unread,
    /// The documents. None at all: every client is an administrator.
    Read(Arc<RolesByName>),
}

/// What a client has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Has {
    /// Not known yet.
    Unread,
    /// All rights: nobody has a document.
    Everything,
    /// What its document says.
    Role(Role),
    /// No document, while others have one.
    Nothing,
    /// A document that does not hold.
    Broken,
}

impl Has {
    /// The role, if there is one.
    #[must_use]
    pub fn role(self) -> Option<Role> {
        match self {
            Self::Everything => Some(Role::Admin),
            Self::Role(role) => Some(role),
            Self::Unread | Self::Nothing | Self::Broken => None,
        }
    }
}

impl Roles {
    /// What the client with this name in its certificate has.
    #[must_use]
    pub fn of(&self, client: &str) -> Has {
        let Self::Read(documents) = self else { return Has::Unread };
        if documents.is_empty() {
            return Has::Everything;
        }
        match client.parse::<Name>().ok().and_then(|name| documents.get(&name)) {
            Some(Some(role)) => Has::Role(*role),
            Some(None) => Has::Broken,
            None => Has::Nothing,
        }
    }
}

/// The roles of a copy that may be old: whoever had one may see, and change nothing.
fn seeing(documents: RolesByName) -> RolesByName {
    let seeing = |(name, role): (Name, Option<Role>)| (name, role.map(|_| Role::Viewer));
    documents.into_iter().map(seeing).collect()
}

/// What is known, and how new that is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Known {
    /// Of whom.
    pub roles: Roles,
    /// The last write of [`keys::ADMINISTRATION`], which every change of roles writes; perhaps of an
    /// earlier one than the last that `roles` know of, never of a later one.
    pub revision: Revision,
}

/// The followed roles. Clones share them.
#[derive(Debug, Clone, Default)]
pub struct Access {
    known: Arc<watch::Sender<Known>>,
    /// Whether this node has been up to date since it started. Held while the documents are read: the
    /// later one of two reads counts.
    confirmed: Arc<Mutex<bool>>,
}

impl Access {
    /// What is known now.
    #[must_use]
    pub fn known(&self) -> Known {
        self.known.borrow().clone()
    }

    /// What is known of roles now.
    #[must_use]
    pub fn roles(&self) -> Roles {
        self.known.borrow().roles.clone()
    }

    /// What a client has now.
    #[must_use]
    pub fn of(&self, client: &str) -> Has {
        self.known.borrow().roles.of(client)
    }

    /// Told of every change.
    #[must_use]
    pub fn subscribe(&self) -> watch::Receiver<Known> {
        self.known.subscribe()
    }

    /// Reads the documents as this node has applied them. Where it cannot, nothing is known any
    /// more: better no client than one that should not.
    ///
    /// # Errors
    /// The store's.
    pub async fn load(&self, store: &Store) -> anyhow::Result<Revision> {
        let confirmed = self.confirmed.lock().await;
        self.read(store, *confirmed).await
    }

    async fn read(&self, store: &Store, confirmed: bool) -> anyhow::Result<Revision> {
        // Before the documents: so what they say is never taken for older than it is.
        let record = store.cluster().get(keys::ADMINISTRATION, Consistency::Stale).await;
        let range = match record {
            Ok(_) => store.cluster().range(keys::ACCESS, "", 0, Consistency::Stale).await,
            Err(ref error) => Err(error.clone()),
        };
        let roles = match &range {
            Ok(range) => {
                let files = range.kvs.iter().map(|kv| (kv.key.as_str(), kv.value.as_slice()));
                let documents = roles(files);
                match (confirmed, documents.is_empty()) {
                    (true, _) => Roles::Read(Arc::new(documents)),
                    (false, true) => Roles::Unread,
                    (false, false) => Roles::Read(Arc::new(seeing(documents))),
                }
            }
            Err(_) => Roles::Unread,
        };
        let written = record.ok().and_then(|(record, _)| record).map(|kv| kv.mod_revision);
        let now = Known { roles, revision: written.unwrap_or_default() };
        self.known.send_if_modified(|known| {
            let changed = *known != now;
            *known = now;
            changed
        });
        Ok(range?.revision)
    }

    /// Reads the documents after a quorum has confirmed that this node has all there were when this
    /// was called. Calls that wait at the same time ask the quorum together.
    ///
    /// # Errors
    /// The store's.
    pub async fn catch_up(&self, store: &Store) -> Result<(), StoreError> {
        store.cluster().get(keys::ADMINISTRATION, Consistency::Linearizable).await?;
        let mut confirmed = self.confirmed.lock().await;
        *confirmed = true;
        if let Err(error) = self.read(store, true).await {
            tracing::warn!("the documents under access/ cannot be read: {error}");
        }
        Ok(())
    }

    /// Follows the documents until the task is dropped.
    pub async fn follow(&self, store: &Store) {
        futures::join!(self.confirm(store), self.follow_changes(store));
    }

    /// Asks a quorum until it answers.
    async fn confirm(&self, store: &Store) {
        loop {
            match self.catch_up(store).await {
                Ok(()) => return,
                Err(error) => tracing::debug!("who may do what is not confirmed yet: {error}"),
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    async fn follow_changes(&self, store: &Store) {
        loop {
            if let Err(error) = self.follow_once(store).await {
                tracing::warn!("following the documents under access/: {error}; again");
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    async fn follow_once(&self, store: &Store) -> anyhow::Result<()> {
        let revision = self.load(store).await?;
        let mut watch = store.cluster().watch(keys::ACCESS, Revision(revision.0 + 1))?;
        while let Some(batch) = watch.next().await {
            batch?;
            self.load(store).await?;
        }
        Ok(())
    }
}
