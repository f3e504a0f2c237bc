//! `clusterctl config` for real: the built program against built agents on loopback, as people use
//! it. (What goes wrong on the way to an agent is in `cli/tests`, against a scripted one.) Agents and
//! their sockets are root's: without root each test says that it was skipped.

mod apply;
mod bad_input;
mod edit;
mod leader;
mod limits;
mod past;
mod rig;
mod watch;
