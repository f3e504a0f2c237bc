//! The gRPC services for clients and joining nodes.

mod enrolment;
mod membership;

pub use enrolment::EnrolmentService;
pub use membership::MembershipService;
