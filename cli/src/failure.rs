//! What went wrong, why, what to do about it, and the exit code that scripts see.

use std::error::Error;
use std::fmt;

use rustls::AlertDescription;
use tonic::{Code, Status};

/// Exit codes. Stable: scripts rely on them; the root `--help` lists them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Exit {
    Ok,
    Failed,
    Usage,
    NotFound,
    Refused,
    Unreachable,
    Timeout,
    Interrupted,
}

impl Exit {
    pub(crate) fn code(self) -> u8 {
        match self {
            Self::Ok => 0,
            Self::Failed => 1,
            Self::Usage => 2,
            Self::NotFound => 3,
            Self::Refused => 4,
            Self::Unreachable => 5,
            Self::Timeout => 6,
            Self::Interrupted => 130,
        }
    }
}

/// A command that did not do what was asked.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) exit: Exit,
    pub(crate) what: String,
    pub(crate) why: Option<String>,
    pub(crate) remedy: Option<String>,
    /// The API's word, where that is what failed.
    pub(crate) code: Option<Code>,
}

impl Failure {
    pub(crate) fn new(exit: Exit, what: impl Into<String>) -> Self {
        Self { exit, what: what.into(), why: None, remedy: None, code: None }
    }

    pub(crate) fn why(mut self, why: impl Into<String>) -> Self {
        self.why = Some(why.into());
        self
    }

    pub(crate) fn remedy(mut self, remedy: impl Into<String>) -> Self {
        self.remedy = Some(remedy.into());
        self
    }

    /// A local file that could not be read or written.
    pub(crate) fn file(what: &str, path: &std::path::Path, error: &std::io::Error) -> Self {
        let exit = match error.kind() {
            std::io::ErrorKind::NotFound => Exit::NotFound,
            _ => Exit::Failed,
        };
        Self::new(exit, format!("cannot {what} {}", path.display())).why(error.to_string())
    }

    /// An answer of the API that says no.
    pub(crate) fn status(what: &str, status: &Status) -> Self {
        if let Some(alert) = tls_alert(status) {
            return Self::alert(what, alert);
        }
        // A status with a cause was made here, of a broken connection; the API's have none.
        let code = if status.source().is_some() { Code::Unavailable } else { status.code() };
        let mut failure = Self::new(exit_of(code), format!("cannot {what}")).why(explain(status));
        failure.code = Some(code);
        match remedy_of(code) {
            Some(remedy) => failure.remedy(remedy),
            None => failure,
        }
    }

    /// The other side ended the TLS handshake: it does not know who we are.
    pub(crate) fn alert(what: &str, alert: AlertDescription) -> Self {
        let why = match alert {
            AlertDescription::CertificateRequired => {
                "the cluster asks for a client certificate and got none"
            }
            AlertDescription::UnknownCA
            | AlertDescription::BadCertificate
            | AlertDescription::CertificateUnknown
            | AlertDescription::DecryptError
            | AlertDescription::AccessDenied => {
                "the cluster does not accept this client certificate: it was issued by another cluster's CA"
            }
            AlertDescription::CertificateExpired => "the client certificate has expired",
            AlertDescription::CertificateRevoked => "the client certificate was revoked",
            _ => "the node ended the TLS handshake",
        };
        Self::new(Exit::Refused, format!("cannot {what}"))
            .why(format!("{why} (TLS alert {alert:?})"))
            .remedy("make a new context on one of the cluster's nodes, as root: `clusterctl context create-admin NAME`")
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "error: {}", printable(&self.what))?;
        if let Some(why) = &self.why {
            write!(f, "\n  why: {}", indent(&printable(why)))?;
        }
        if let Some(remedy) = &self.remedy {
            write!(f, "\n   do: {}", indent(&printable(remedy)))?;
        }
        Ok(())
    }
}

/// What comes from elsewhere says nothing to the terminal itself.
fn printable(text: &str) -> String {
    let is_plain = |c: char| !c.is_control() || matches!(c, '\n' | '\t');
    let shown = |c: char| if is_plain(c) { c.to_string() } else { c.escape_default().to_string() };
    text.chars().map(shown).collect()
}

fn indent(text: &str) -> String {
    text.trim_end().replace('\n', "\n       ")
}

fn exit_of(code: Code) -> Exit {
    match code {
        Code::Ok => Exit::Ok,
        Code::InvalidArgument | Code::OutOfRange => Exit::Usage,
        Code::NotFound => Exit::NotFound,
        Code::AlreadyExists
        | Code::FailedPrecondition
        | Code::Aborted
        | Code::PermissionDenied
        | Code::Unauthenticated
        | Code::ResourceExhausted => Exit::Refused,
        Code::Unavailable => Exit::Unreachable,
        Code::DeadlineExceeded => Exit::Timeout,
        Code::Cancelled | Code::Unknown | Code::Unimplemented | Code::Internal | Code::DataLoss => {
            Exit::Failed
        }
    }
}

/// What to do that holds for a code whatever the message says. Messages carry their own advice.
fn remedy_of(code: Code) -> Option<&'static str> {
    match code {
        Code::Unavailable => {
            Some("see `clusterctl cluster status`; try again when a majority of the voters is up")
        }
        Code::DeadlineExceeded => {
            Some("see `clusterctl task list` for what became of it, then try again")
        }
        Code::Aborted => {
            Some("somebody else changed it at the same time: look again, then try again")
        }
        Code::Unauthenticated => {
            Some("use a context with the rights for this: `clusterctl context list`")
        }
        Code::Unimplemented => Some(
            "the node runs an older version: compare `clusterctl node list` with `clusterctl version`",
        ),
        Code::Internal | Code::DataLoss | Code::Unknown => {
            Some("see the node's log: `journalctl -u holdfast-node-agent`")
        }
        Code::Ok
        | Code::Cancelled
        | Code::InvalidArgument
        | Code::NotFound
        | Code::AlreadyExists
        | Code::PermissionDenied
        | Code::ResourceExhausted
        | Code::FailedPrecondition
        | Code::OutOfRange => None,
    }
}

/// The server's message; for a broken connection, which has none, the innermost causes.
fn explain(status: &Status) -> String {
    let mut text = status.message().to_owned();
    let mut cause = status.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text = if text.is_empty() { more } else { format!("{text}: {more}") };
        }
        cause = error.source();
    }
    match text.as_str() {
        "" => format!("the node answered {:?}", status.code()),
        // The protocol's own words name no cause.
        words if status.source().is_some() && words.contains("http2 error") => {
            format!("the node stopped answering, or the way to it broke ({words})")
        }
        _ => text,
    }
}

/// The TLS alert that ended the connection, if that is what happened.
pub(crate) fn tls_alert(error: &(dyn Error + 'static)) -> Option<AlertDescription> {
    let mut cause = Some(error);
    while let Some(error) = cause {
        let inner = error.downcast_ref::<std::io::Error>().and_then(|io| io.get_ref());
        let tls = match inner {
            Some(inner) => inner.downcast_ref::<rustls::Error>(),
            None => error.downcast_ref::<rustls::Error>(),
        };
        if let Some(rustls::Error::AlertReceived(alert)) = tls {
            return Some(*alert);
        }
        cause = error.source();
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_map_to_stable_exits() {
        let cases = [
            (Code::InvalidArgument, 2),
            (Code::NotFound, 3),
            (Code::AlreadyExists, 4),
            (Code::FailedPrecondition, 4),
            (Code::PermissionDenied, 4),
            (Code::ResourceExhausted, 4),
            (Code::Unavailable, 5),
            (Code::DeadlineExceeded, 6),
            (Code::Internal, 1),
        ];
        for (code, exit) in cases {
            let failure = Failure::status("start vm web", &Status::new(code, "because"));
            assert_eq!(failure.exit.code(), exit, "{code:?}");
            assert!(failure.to_string().starts_with("error: cannot start vm web\n  why: because"));
        }
        assert_eq!((Exit::Ok.code(), Exit::Interrupted.code()), (0, 130));
    }

    #[test]
    fn a_lost_quorum_says_what_to_do() {
        let status = Status::unavailable("no quorum: 1 of 3 voters answers");
        let text = Failure::status("start vm web", &status).to_string();
        assert!(text.contains("no quorum") && text.contains("clusterctl cluster status"), "{text}");
    }

    #[test]
    fn a_broken_connection_is_unreachable_whatever_its_code() {
        let io = std::io::Error::other("pulled out");
        let failure = Failure::status("list nodes", &Status::from_error(Box::new(io)));
        assert_eq!(failure.exit, Exit::Unreachable, "{failure}");
        assert!(failure.to_string().contains("pulled out"));
        let h2 = std::io::Error::other("http2 error");
        let failure = Failure::status("list nodes", &Status::from_error(Box::new(h2)));
        assert!(failure.to_string().contains("stopped answering"), "{failure}");
        assert_eq!(Failure::status("x", &Status::unknown("y")).exit, Exit::Failed);
    }

    #[test]
    fn a_tls_alert_is_found_in_the_chain() {
        let alert = rustls::Error::AlertReceived(AlertDescription::CertificateRequired);
        let io = std::io::Error::new(std::io::ErrorKind::InvalidData, alert);
        let status = Status::from_error(Box::new(io));
        let failure = Failure::status("list nodes", &status);
        assert_eq!(failure.exit, Exit::Refused);
        assert!(failure.to_string().contains("got none"), "{failure}");
        assert!(tls_alert(&Status::internal("x")).is_none());
    }

    #[test]
    fn longer_texts_stay_aligned() {
        let failure = Failure::new(Exit::Usage, "cannot create").why("line 1\nline 2\n");
        assert_eq!(failure.to_string(), "error: cannot create\n  why: line 1\n       line 2");
    }
}
