//! Strangers at a node's ports: `lab-node knock` in a node calls as one of them.

use std::time::Duration;

use anyhow::Context;
use serde::{Deserialize, Serialize};

use super::Lab;
use super::exec::Output;

/// The longest that a few calls take, waits included.
const LIMIT: Duration = Duration::from_secs(120);

/// Who calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Caller {
    /// Says 64 KiB that are no TLS.
    Garbage,
    /// Begins a TLS handshake and hangs up.
    HalfHello,
    /// Connects and says nothing.
    Silence,
    /// Speaks TLS 1.3 and has no certificate.
    NoCertificate,
    /// Speaks TLS 1.3 with a certificate that it has made itself.
    StrangeCertificate,
    /// Speaks TLS 1.3 with a certificate from files.
    Certificate,
}

impl Caller {
    /// As the command line has it.
    fn word(self) -> &'static str {
        match self {
            Self::Garbage => "garbage",
            Self::HalfHello => "half-hello",
            Self::Silence => "silence",
            Self::NoCertificate => "no-certificate",
            Self::StrangeCertificate => "strange-certificate",
            Self::Certificate => "certificate",
        }
    }
}

/// What a caller got.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Knock {
    /// Who called.
    pub caller: Caller,
    /// Bytes that it was answered with, beneath TLS where it spoke TLS.
    pub answered: usize,
    /// `answered`, `closed`, `left waiting`, or the error that it saw.
    pub end: String,
    /// How long all of it took, milliseconds.
    pub after_ms: u64,
}

impl Lab {
    /// Calls at `address` from a node, as one after the other; `files`: certificate and key for
    /// [`Caller::Certificate`].
    ///
    /// # Errors
    /// If nobody listens there, or the node does not answer.
    pub fn knock(
        &self,
        from: u32,
        address: &str,
        callers: &[Caller],
        files: Option<(&str, &str)>,
    ) -> anyhow::Result<Vec<Knock>> {
        let mut argv = vec!["lab-node", "knock", address];
        argv.extend(callers.iter().flat_map(|caller| ["--as", caller.word()]));
        if let Some((certificate, key)) = files {
            argv.extend(["--certificate", certificate, "--key", key]);
        }
        let answer = self.run(from, &argv, b"", LIMIT).and_then(Output::ok);
        let answer = answer.with_context(|| format!("node{from}: {}", argv.join(" ")))?;
        serde_json::from_str(&answer).with_context(|| format!("lab-node knock printed {answer}"))
    }
}
