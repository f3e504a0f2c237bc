//! The mounted tree on a real kernel, over real members in one process. Where there is no
//! `/dev/fuse`, or no right to mount, each test says that it was skipped.

mod crash;
mod harness;
mod members;
mod objects;
mod posix;
mod programs;
mod random;
