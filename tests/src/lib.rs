//! The lab (real nodes on one machine), the guest that the end-to-end suites run in it, and what
//! both share. The suites themselves are in `tests/`, the programs in `src/bin/`.

pub mod guest;
pub mod lab;
pub mod ports;
pub mod scale;
pub mod skip;
pub mod violation;
