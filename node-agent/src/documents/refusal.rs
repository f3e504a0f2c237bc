//! Why a change of documents is refused, for each of those who ask.

use cluster::{FileRefused, StoreError};
use proto::document::Fault;
use proto::{DocumentError, Revision, v1};
use tonic::{Code, Status};

/// One file's change, refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// The file.
    pub path: String,
    /// What is wrong, where, and what to do.
    pub fault: Fault,
    /// Which kind of wrong, in the API's words.
    pub code: Code,
    /// The file is not what was expected: its last change (0: absent).
    pub present: Option<Revision>,
}

impl Refusal {
    /// With a reason alone.
    pub(super) fn new(path: &str, code: Code, reason: impl Into<String>) -> Self {
        Self { path: path.to_owned(), fault: Fault::new(None, &reason.into()), code, present: None }
    }
    /// All that is wrong with a document by itself.
    pub(super) fn document(path: &str, error: &DocumentError) -> Vec<Self> {
        let refusal = |fault: &Fault| Self {
            path: path.to_owned(),
            fault: fault.clone(),
            code: Code::InvalidArgument,
            present: None,
        };
        error.faults().iter().map(refusal).collect()
    }
    /// Not what was expected.
    pub(super) fn conflict(path: &str, present: Revision) -> Self {
        let now = if present.0 == 0 {
            "it is gone".to_owned()
        } else {
            format!("its last change is revision {present}")
        };
        let reason = format!("changed in the meantime ({now}); look at it again, then repeat");
        Self { present: Some(present), ..Self::new(path, Code::AlreadyExists, reason) }
    }
    /// For the API's answer.
    #[must_use]
    pub fn message(&self) -> v1::Refusal {
        v1::Refusal {
            path: self.path.clone(),
            reason: self.fault.reason.clone(),
            line: self.fault.at.map_or(0, |at| at.line),
            column: self.fault.at.map_or(0, |at| at.column),
            present_revision: self.present.map(|revision| revision.0),
            code: u32::try_from(i32::from(self.code)).unwrap_or(0),
        }
    }
    /// For a request that writes this document alone.
    #[must_use]
    pub fn status(&self) -> Status {
        Status::new(self.code, self.fault.to_string())
    }
}

impl From<Refusal> for FileRefused {
    fn from(refusal: Refusal) -> Self {
        if let Some(present) = refusal.present {
            return Self::Conflict { path: refusal.path, present };
        }
        match refusal.code {
            Code::PermissionDenied => Self::Denied(refusal.fault.to_string()),
            Code::ResourceExhausted => Self::TooLarge(refusal.fault.to_string()),
            _ => Self::Invalid {
                path: refusal.path,
                line: refusal.fault.at.map(|at| at.line),
                column: refusal.fault.at.map(|at| at.column),
                reason: refusal.fault.reason,
            },
        }
    }
}

/// The store's refusal in the words of the mounted tree.
pub(super) fn store_refused(error: &StoreError) -> FileRefused {
    let text = error.to_string();
    match error {
        StoreError::NoQuorum { .. } | StoreError::Recovering => FileRefused::NoQuorum(text),
        StoreError::UnknownOutcome { .. } => FileRefused::Unknown(text),
        StoreError::Private(_) => FileRefused::Denied(text),
        StoreError::TooLarge(_) | StoreError::Invalid(_) => FileRefused::TooLarge(text),
        StoreError::NoSpace { .. } | StoreError::DiskFull { .. } => FileRefused::Full(text),
        _ => FileRefused::Busy(text),
    }
}

/// A status of the leader's answer in the words of the mounted tree.
pub(super) fn status_refused(status: &Status) -> FileRefused {
    let text = status.message().to_owned();
    match status.code() {
        Code::Unavailable => FileRefused::NoQuorum(text),
        Code::DeadlineExceeded | Code::Cancelled => FileRefused::Unknown(text),
        Code::PermissionDenied | Code::Unauthenticated => FileRefused::Denied(text),
        Code::InvalidArgument | Code::OutOfRange => FileRefused::TooLarge(text),
        Code::ResourceExhausted => FileRefused::Full(text),
        _ => FileRefused::Busy(text),
    }
}
