//! The gRPC services for clients and joining nodes.

mod config;
mod enrolment;
mod membership;

pub use config::ConfigService;
pub(crate) use config::public;
pub use enrolment::EnrolmentService;
pub use membership::MembershipService;
