//! The gRPC services for clients and joining nodes.

mod enrolment;

pub use enrolment::EnrolmentService;
