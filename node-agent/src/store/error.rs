//! Errors of the typed layer, and the gRPC status each becomes.

use cluster::StoreError;
use proto::Name;
use tonic::Status;

/// A record could not be read.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Not what a record of this version looks like.
    #[error(
        "the record `{key}` cannot be read: {why}; it may be written by a newer version: upgrade this node"
    )]
    Malformed {
        /// Its key.
        key: String,
        /// What the parser said.
        why: String,
    },
}

/// A placement was not changed.
#[derive(Debug, thiserror::Error)]
pub enum UpdateError {
    /// It could not be read.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// There is no such VM.
    #[error("no VM `{0}` in this cluster: see `clusterctl vm list`")]
    Unknown(Name),
    /// The change does not fit what the placement is now.
    #[error("{0}")]
    Refused(String),
    /// Others kept changing it.
    #[error("VM `{0}` is being changed by others all the time; try again")]
    Contended(Name),
}

impl From<StoreError> for UpdateError {
    fn from(error: StoreError) -> Self {
        Self::Record(error.into())
    }
}

/// The gRPC status of a store error.
#[must_use]
pub fn store_status(error: &StoreError) -> Status {
    Status::from(error)
}

impl From<RecordError> for Status {
    fn from(error: RecordError) -> Self {
        match error {
            RecordError::Store(error) => store_status(&error),
            RecordError::Malformed { .. } => Self::data_loss(error.to_string()),
        }
    }
}

impl From<UpdateError> for Status {
    fn from(error: UpdateError) -> Self {
        match error {
            UpdateError::Record(error) => error.into(),
            UpdateError::Unknown(_) => Self::not_found(error.to_string()),
            UpdateError::Refused(text) => Self::failed_precondition(text),
            UpdateError::Contended(_) => Self::aborted(error.to_string()),
        }
    }
}
