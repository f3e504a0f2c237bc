//! Every method of every service in the .proto files, as they were compiled: for whatever must know
//! them all, such as who may call which.

/// The package of all services.
pub const PACKAGE: &str = "holdfast.v1";

/// One method of a service.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Method {
    /// Its service, without the package.
    pub service: &'static str,
    /// Its name in the .proto file.
    pub name: &'static str,
    /// The request or the answer is a stream.
    pub streams: bool,
}

/// All of them.
pub const METHODS: &[Method] = include!(concat!(env!("OUT_DIR"), "/methods.rs"));
