//! The gRPC services for clients and joining nodes, and what guards them.

mod enrolment;
mod rate;

pub use enrolment::EnrolmentService;
pub(crate) use rate::Rate;
