//! A client in a node that does not stop talking to a guest.

use super::Lab;
use super::guest::Guest;
use crate::guest::client::TalkReport;

impl Lab {
    /// Starts a client in a node that does not stop talking to a guest.
    ///
    /// # Errors
    /// If it does not start.
    pub fn talk(&self, node: u32, guest: &Guest) -> anyhow::Result<Talk<'_>> {
        let report = format!("/tmp/talk-{}.json", guest.name);
        self.sh(
            node,
            &format!(
                "rm -f {report}; setsid lab-node talk --report {report} {} >/dev/null 2>&1 </dev/null & echo $!",
                guest.address()
            ),
        )
        .map(|pid| Talk { lab: self, node, pid: pid.trim().to_owned(), report })
    }
}

/// A client that talks to a guest; see `lab-node talk`.
#[derive(Debug)]
pub struct Talk<'a> {
    lab: &'a Lab,
    node: u32,
    pid: String,
    report: String,
}

impl Talk<'_> {
    /// What it has noticed so far (at most a second old).
    ///
    /// # Errors
    /// If the node does not answer, or nothing was answered yet.
    pub fn report(&self) -> anyhow::Result<TalkReport> {
        Ok(serde_json::from_str(&self.lab.exec(self.node, &["cat", &self.report])?)?)
    }

    /// Ends it; what it noticed in all.
    ///
    /// # Errors
    /// If the node does not answer.
    pub fn finish(self) -> anyhow::Result<TalkReport> {
        let pid = &self.pid;
        // Its last report is written before it ends.
        self.lab.sh(
            self.node,
            &format!("kill -TERM {pid}; while kill -0 {pid} 2>/dev/null; do usleep 20000; done"),
        )?;
        self.report()
    }
}
