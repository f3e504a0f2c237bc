//! Why a migration failed: on a connection, on the source, on the target.

use std::io;
use std::time::Duration;

use super::VmError;
use super::converge::GaveUp;

/// What went wrong on a connection.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// The operating system refused or lost the connection.
    #[error("the migration connection failed while {doing}; check the network between the nodes")]
    Io {
        /// What was being done.
        doing: &'static str,
        /// What the operating system said.
        #[source]
        source: io::Error,
    },
    /// The peer closed the connection.
    #[error("the other side closed the migration connection while {doing}; its log says why")]
    Closed {
        /// What was being done.
        doing: &'static str,
    },
    /// Nothing moved for too long.
    #[error(
        "the other side did not answer within {limit:?} while {doing}; check the network and the load of the other node"
    )]
    Stalled {
        /// What was being done.
        doing: &'static str,
        /// How long was waited.
        limit: Duration,
    },
    /// The TLS handshake failed: the peer is not the one that was announced, or does not speak TLS 1.3.
    #[error("the peer of the migration is not the expected one: {reason}")]
    NotThePeer {
        /// What was wrong.
        reason: String,
    },
    /// TLS can't be set up here.
    #[error("cannot set up TLS for the migration: {reason}")]
    Tls {
        /// What was wrong.
        reason: String,
    },
    /// The peer sent something that does not belong there.
    #[error("the other side broke the migration protocol: {reason}")]
    Protocol {
        /// What was wrong.
        reason: String,
    },
    /// The peer gave up and said why.
    #[error("the other side refused: {reason}")]
    Refused {
        /// The peer's words.
        reason: String,
    },
    /// The migration was cancelled here.
    #[error("the migration was cancelled")]
    Cancelled,
}

impl StreamError {
    pub(crate) fn protocol(reason: impl Into<String>) -> Self {
        Self::Protocol { reason: reason.into() }
    }
}

/// Why a migration failed on the source. Unless it is [`NotResumed`](Self::NotResumed), the VM
/// runs on here as before.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// A connection failed, or the target refused.
    #[error(transparent)]
    Stream(#[from] StreamError),
    /// The machine failed at a step.
    #[error("the VM could not {doing} for the migration")]
    Vm {
        /// The step.
        doing: &'static str,
        /// The machine's error.
        #[source]
        source: VmError,
    },
    /// The VM writes faster than the connection carries.
    #[error(
        "the migration does not converge: {reason}; raise the downtime limit or the bandwidth, or lower the guest's load"
    )]
    NotConverging {
        /// The figures.
        reason: GaveUp,
    },
    /// The migration was cancelled before the commit.
    #[error("the migration was cancelled; the VM runs on here")]
    Cancelled,
    /// The commit was refused.
    #[error("the commit of the migration was refused: {reason}; the VM runs on here")]
    CommitRefused {
        /// What the caller said.
        reason: String,
    },
    /// The migration failed, and then the VM did not resume either.
    #[error("the migration failed ({cause}), and the VM could not resume here; stop and start it")]
    NotResumed {
        /// Why the migration failed.
        cause: Box<SourceError>,
        /// Why the VM did not resume.
        #[source]
        source: VmError,
    },
    /// The subject or the memory layout cannot be described on the wire.
    #[error("this VM cannot be migrated: {reason}")]
    Unsupported {
        /// What is in the way.
        reason: String,
    },
}

/// Why a migration failed on the target. The VM that was to receive it has never run.
#[derive(Debug, thiserror::Error)]
pub enum TargetError {
    /// A connection failed, or the source gave up.
    #[error(transparent)]
    Stream(#[from] StreamError),
    /// The source's VM is not the one that was announced, or does not fit the one that was built.
    #[error("the incoming VM does not fit: {reason}")]
    Mismatch {
        /// What differs.
        reason: String,
    },
    /// The state does not fit the machine that was built for it.
    #[error("the incoming VM's state could not be restored")]
    Restore {
        /// The machine's error.
        #[source]
        source: VmError,
    },
    /// Guest memory could not be written.
    #[error("guest memory at {address:#x} could not be written: {reason}")]
    Memory {
        /// Guest-physical address.
        address: u64,
        /// What was wrong.
        reason: String,
    },
}
