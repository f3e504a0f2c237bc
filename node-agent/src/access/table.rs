//! The one table of who may call what. What is not in it nobody may call.
//!
//! Why so: what only shows is a viewer's, console logs among it; what makes, runs, moves and removes
//! VMs and images is an operator's, consoles among it (whoever types into a guest changes it); what
//! concerns machines, pools, networks, certificates and the cluster itself is an administrator's, and
//! so is `Verify`, which has every member read all it holds. Secrets (a backup), and the beginning of
//! a cluster, are for root on the node.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use proto::documents::{DocumentPath, PathKind, PathRefused, Role, classify};
use proto::methods::{METHODS, PACKAGE};

/// What a call needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Needs {
    /// A certificate of the cluster, with a role or without; or root on the node.
    Identity,
    /// A client's role, or a greater one. Root has all; so has a node, which speaks for somebody
    /// whom another node has judged, or for itself.
    Role(Role),
    /// A node's certificate.
    Node,
    /// Root on the node that is asked, over its local socket.
    Root,
}

impl Needs {
    /// For people.
    #[must_use]
    pub fn words(self) -> &'static str {
        match self {
            Self::Identity => "a certificate",
            Self::Role(role) => role.word(),
            Self::Node => "a node's certificate",
            Self::Root => "root on the node",
        }
    }
}

const IDENTITY: Needs = Needs::Identity;
const VIEWER: Needs = Needs::Role(Role::Viewer);
const OPERATOR: Needs = Needs::Role(Role::Operator);
const ADMIN: Needs = Needs::Role(Role::Admin);
const NODE: Needs = Needs::Node;
const ROOT: Needs = Needs::Root;

const PATHS: &str = "admin, but for vms/ and files that are not documents";
/// The call whose transaction says what it was judged by, see [`Rule::carries`].
const CARRIES: &str = "Config.Txn";
const SECRETS: &str = "it holds the secrets under priv/";

/// By service: the method, what it needs, and what else is to be said.
type Rows = &'static [(&'static str, Needs, &'static str)];

pub(super) const TABLE: &[(&str, Rows)] = &[
    (
        "Config",
        &[
            ("Get", VIEWER, ""),
            ("Range", VIEWER, ""),
            ("Txn", OPERATOR, PATHS),
            ("Commit", OPERATOR, PATHS),
            ("Watch", VIEWER, ""),
            ("History", VIEWER, ""),
        ],
    ),
    (
        "Nodes",
        &[
            ("List", VIEWER, ""),
            ("Show", VIEWER, ""),
            ("Drain", ADMIN, ""),
            ("Resume", ADMIN, ""),
            ("Rename", ADMIN, ""),
            ("Fence", ADMIN, ""),
        ],
    ),
    (
        "Vms",
        &[
            ("Create", OPERATOR, ""),
            ("List", VIEWER, ""),
            ("Show", VIEWER, ""),
            ("Start", OPERATOR, ""),
            ("Shutdown", OPERATOR, ""),
            ("Stop", OPERATOR, ""),
            ("Reset", OPERATOR, ""),
            ("Pause", OPERATOR, ""),
            ("Resume", OPERATOR, ""),
            ("Migrate", OPERATOR, ""),
            ("Delete", OPERATOR, ""),
            ("Console", OPERATOR, ""),
            ("Log", VIEWER, ""),
        ],
    ),
    ("Ha", &[("Status", VIEWER, "")]),
    (
        "Tasks",
        &[
            ("List", VIEWER, ""),
            ("Get", VIEWER, ""),
            ("Follow", VIEWER, ""),
            ("Cancel", OPERATOR, "admin, but for tasks of VMs"),
        ],
    ),
    (
        "Storage",
        &[
            ("ListPools", VIEWER, ""),
            ("CreatePool", ADMIN, ""),
            ("DeletePool", ADMIN, ""),
            ("ListImages", VIEWER, ""),
            ("ImportImage", OPERATOR, ""),
            ("DeleteImage", OPERATOR, ""),
            ("ListNetworks", VIEWER, ""),
            ("CreateNetwork", ADMIN, ""),
            ("DeleteNetwork", ADMIN, ""),
        ],
    ),
    (
        "Membership",
        &[
            ("Init", ROOT, ""),
            ("Join", ROOT, ""),
            ("CreateToken", ADMIN, ""),
            ("Status", VIEWER, ""),
            ("RemoveNode", ADMIN, ""),
            ("TransferLeader", ADMIN, ""),
            ("IssueClient", VIEWER, "admin, but for one's own next certificate"),
            ("Verify", ADMIN, ""),
            ("Backup", ROOT, SECRETS),
            ("Restore", ROOT, ""),
            ("ListCertificates", VIEWER, ""),
            ("RenewCertificates", ADMIN, ""),
            ("RevokeCertificates", ADMIN, ""),
            ("GetCaStatus", VIEWER, ""),
            ("RotateCa", ADMIN, ""),
            ("WhoAmI", IDENTITY, ""),
        ],
    ),
    (
        "Peer",
        &[
            ("Heartbeat", NODE, ""),
            ("PrepareMigration", NODE, ""),
            ("FinishMigration", NODE, ""),
            ("AbortMigration", NODE, ""),
        ],
    ),
    (
        "Raft",
        &[
            ("Append", NODE, ""),
            ("AppendOnce", NODE, ""),
            ("Vote", NODE, ""),
            ("PreVote", NODE, ""),
            ("TransferLeader", NODE, ""),
            ("InstallSnapshot", NODE, ""),
            ("Forward", NODE, ""),
            ("Renew", NODE, ""),
        ],
    ),
];

/// A row of the table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    /// For people: `Vms.Start`.
    pub call: String,
    /// At least.
    pub needs: Needs,
    /// What else is to be said of it.
    pub detail: &'static str,
    /// It is, or takes, a stream: whoever may not call it any more is cut off.
    pub streams: bool,
    /// What it was judged by goes along with the transaction that it comes to, which comes to nothing
    /// where that is old: no quorum is asked before. (The one call that is made by the thousand.)
    pub carries: bool,
}

impl Rule {
    /// Whether a role that this node has heard of is not enough for it: it may be old.
    #[must_use]
    pub fn changes(&self) -> bool {
        matches!(self.needs, Needs::Role(role) if role > Role::Viewer)
    }
}

static RULES: LazyLock<BTreeMap<String, Rule>> = LazyLock::new(|| {
    let rows = TABLE.iter().flat_map(|(service, rows)| rows.iter().map(move |row| (service, row)));
    let rules = rows.map(|(service, (name, needs, detail))| {
        let is_it = |m: &&proto::methods::Method| m.service == *service && m.name == *name;
        let streams = METHODS.iter().find(is_it).is_some_and(|method| method.streams);
        let call = format!("{service}.{name}");
        let carries = call == CARRIES;
        let rule = Rule { call, needs: *needs, detail, streams, carries };
        (format!("/{PACKAGE}.{service}/{name}"), rule)
    });
    rules.collect()
});

/// The rule for the path of a request. `None`: nobody may call it.
pub(super) fn rule(path: &str) -> Option<&'static Rule> {
    RULES.get(path)
}

/// All rules.
pub fn rules() -> impl Iterator<Item = &'static Rule> {
    RULES.values()
}

/// Who may write a path.
///
/// # Errors
/// [`PathRefused`]: nobody.
pub fn to_write(path: &str) -> Result<Role, PathRefused> {
    let folder = path.split_once('/').map_or("", |(folder, _)| folder);
    Ok(match classify(path)? {
        PathKind::Document(DocumentPath::Vm(_)) => Role::Operator,
        PathKind::Document(_) => Role::Admin,
        PathKind::Plain | PathKind::Folder => match folder {
            // Beside the documents there, and what their folders will hold.
            "access" | "nodes" | "ha" => Role::Admin,
            _ => Role::Operator,
        },
    })
}

/// Who may have a certificate made with this name.
#[must_use]
pub fn to_issue(name: &str, caller: &str) -> Role {
    if name == caller { Role::Viewer } else { Role::Admin }
}

/// Who may cancel a task of a kind such as `vm.migrate`.
#[must_use]
pub fn to_cancel(kind: &str) -> Role {
    if kind.starts_with("vm.") { Role::Operator } else { Role::Admin }
}
