//! Running programs in a lab's nodes, and waiting until they can.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, bail};

use super::exec::{self, ExecError, Output, Request};
use super::state::Backend;
use super::{Lab, loopback, wait_until};

impl Lab {
    /// What a program in a node is asked for with.
    #[must_use]
    pub fn request(&self, argv: &[&str], terminal: Option<(u16, u16)>) -> Request {
        let argv = argv.iter().map(|word| (*word).to_owned()).collect();
        Request { token: self.state.token.clone(), argv, terminal }
    }

    /// Where a node's `lab-node serve` is.
    ///
    /// # Errors
    /// If there is no such node.
    pub fn exec_address(&self, number: u32) -> anyhow::Result<SocketAddr> {
        Ok(self.state.node(number)?.exec)
    }

    /// Runs a program in a node, with an input and a limit, and returns how it ended.
    ///
    /// # Errors
    /// If the node does not answer, or the program takes too long.
    pub fn run(
        &self,
        number: u32,
        argv: &[&str],
        stdin: &[u8],
        limit: Duration,
    ) -> Result<Output, ExecError> {
        let address =
            self.exec_address(number).map_err(|error| ExecError::Refused(error.to_string()))?;
        if self.state.backend == Backend::Process {
            return loopback::run(&self.folder, number, argv, stdin);
        }
        exec::run(address, &self.request(argv, None), stdin, limit)
    }

    /// Runs a program in a node that must succeed within a minute; returns what it printed.
    ///
    /// # Errors
    /// If it does not.
    pub fn exec(&self, number: u32, argv: &[&str]) -> anyhow::Result<String> {
        let output = self.run(number, argv, b"", Duration::from_secs(60)).and_then(Output::ok);
        output.with_context(|| format!("node{number}: {}", argv.join(" ")))
    }

    /// Runs a line of shell in a node; as [`Self::exec`].
    ///
    /// # Errors
    /// If it does not succeed.
    pub fn sh(&self, number: u32, line: &str) -> anyhow::Result<String> {
        self.exec(number, &["sh", "-c", line])
    }

    /// Waits until a node runs programs.
    ///
    /// # Errors
    /// If its QEMU ends or the limit passes.
    pub fn wait_up(&self, number: u32, limit: Duration) -> anyhow::Result<()> {
        wait_until(limit, &format!("node{number} answers"), || {
            let process = self.state.node(number)?.process;
            if !process.is_some_and(|process| process.is_alive()) {
                let folder = self.folder.join(number.to_string());
                let log = std::fs::read_to_string(folder.join("qemu.log")).unwrap_or_default();
                bail!("node{number}'s QEMU ended (see {}): {log}", folder.display());
            }
            Ok(self.run(number, &["true"], b"", Duration::from_secs(2)).is_ok())
        })
    }
}
