//! vCPUs: one thread each, their state, and how they are started and stopped.
//!
//! Owns the run loop and the order in which a vCPU's state is read and written. Knows no device:
//! port and memory accesses go to the buses it is given.

mod control;
mod pulse;
mod run;
mod state;

pub use control::{PauseTimeout, VcpuControl};
pub use pulse::Pulse;
pub use run::{Buses, VcpuContext, spawn};
pub use state::{MsrIndices, VcpuState, VcpuStateError};
