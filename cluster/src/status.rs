//! Errors as gRPC says them: the one place where each gets its code.

use tonic::Status;

use crate::{MembershipError, StoreError};

impl From<&StoreError> for Status {
    fn from(error: &StoreError) -> Self {
        let text = error.to_string();
        match error {
            StoreError::NoQuorum { .. } | StoreError::Recovering | StoreError::Shutdown => {
                Self::unavailable(text)
            }
            StoreError::UnknownOutcome { .. } => Self::deadline_exceeded(text),
            StoreError::Forgotten { .. } => Self::out_of_range(text),
            StoreError::Invalid(_) | StoreError::TooLarge(_) => Self::invalid_argument(text),
            StoreError::Private(_) => Self::permission_denied(text),
            StoreError::Busy(_)
            | StoreError::DiskFull { .. }
            | StoreError::NoSpace { .. }
            | StoreError::TooOften { .. } => Self::resource_exhausted(text),
            StoreError::Overtaken => Self::aborted(text),
            StoreError::Failed { .. } => Self::internal(text),
            StoreError::Removed => Self::failed_precondition(text),
        }
    }
}

impl From<StoreError> for Status {
    fn from(error: StoreError) -> Self {
        Self::from(&error)
    }
}

impl From<MembershipError> for Status {
    fn from(error: MembershipError) -> Self {
        let text = error.to_string();
        match error {
            MembershipError::UnknownNode(_) | MembershipError::UnknownCertificate(_) => {
                Self::not_found(text)
            }
            MembershipError::NotRenewed(_) | MembershipError::CannotSign { .. } => {
                Self::unavailable(text)
            }
            MembershipError::QuorumAtRisk { .. }
            | MembershipError::LastNode(_)
            | MembershipError::OwnsVms { .. }
            | MembershipError::LastAdministrator(_)
            | MembershipError::NoAdministratorLeft(_)
            | MembershipError::Itself(_) => Self::failed_precondition(text),
            MembershipError::Invalid(_) => Self::invalid_argument(text),
            MembershipError::Timeout(_) => Self::deadline_exceeded(text),
            MembershipError::Store(error) => Self::from(&error),
        }
    }
}
