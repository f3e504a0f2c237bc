//! The records that the system keeps in the replicated configuration, as JSON. Additive only: a
//! new field has a default, an unknown one is kept out of the way.

use serde::{Deserialize, Serialize};

pub use crate::documents::PoolKind;
use crate::{Generation, Name, NodeId, VmId};

/// Who runs a VM, at which generation, and what is being done with it.
///
/// Invariant: only a committed transaction that compares the record's revision changes it, and
/// each change of owner raises the generation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Placement {
    /// The VM's id for life.
    pub vm_id: VmId,
    /// The one node that may run it.
    pub owner: NodeId,
    /// Raised with each change of owner, and when the owner is fenced.
    pub generation: Generation,
    /// What is happening to it.
    pub phase: Phase,
    /// What was asked for.
    pub requested: Requested,
    /// Copied from the document, so that decisions need no document.
    pub ha: bool,
    /// vCPUs, for placement.
    pub cpus: u32,
    /// Guest memory in bytes, for placement.
    pub memory_bytes: u64,
    /// Starts that failed at this owner since it last ran or a person last asked for it. The owner
    /// counts; it puts the VM into [`Phase::Recovering`] with each, and the plan tries again, there
    /// or elsewhere, or gives up.
    #[serde(default)]
    pub start_failures: u32,
    /// Nodes that it left because it could not be started there, since it last ran for a while or a
    /// person last asked for it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tried: Vec<NodeId>,
    /// The node that it left for that node's maintenance or shutdown, and returns to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub home: Option<NodeId>,
    /// The operation that holds it (a backup, say): until that ends it is not moved.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lock: Option<String>,
    /// After a failed start: not before this moment, in Unix milliseconds of the leader that wrote
    /// it. A courtesy between tries, never a matter of safety: a leader whose clock makes the wait
    /// longer than the back-off is writes it anew.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_at_unix_ms: Option<u64>,
    /// Why it is in this phase, where that needs saying.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// What happened to it, newest last, at most [`Placement::EVENTS_MAX`].
    #[serde(default)]
    pub events: Vec<String>,
}

impl Placement {
    /// How many events a record keeps.
    pub const EVENTS_MAX: usize = 20;

    /// Adds an event, dropping the oldest beyond the limit.
    pub fn note(&mut self, event: String) {
        self.events.push(event);
        let excess = self.events.len().saturating_sub(Self::EVENTS_MAX);
        self.events.drain(..excess);
    }
}

/// Resource states (DESIGN's words; Proxmox and Pacemaker operators will know them).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "state")]
pub enum Phase {
    /// Not running, and not to be.
    Stopped,
    /// The owner is to start it, or is doing so.
    Starting,
    /// Running at its owner.
    Started,
    /// The owner is to stop it, or is doing so.
    Stopping,
    /// Live migration under way; the owner still runs it.
    Migrating {
        /// Where to.
        target: NodeId,
    },
    /// It cannot move while it runs: the owner stops it, gives it to the target, which starts it.
    Relocating {
        /// Where to.
        target: NodeId,
    },
    /// Its owner was fenced, or could not start it: it runs nowhere, and waits for a new owner or
    /// another try.
    Recovering,
    /// It cannot be run; see the message. An operator's `vm start` tries again.
    Error,
    /// No node can take it at present; tried again when something changes.
    Unplaceable,
    /// Its owner stops it, or has, for a planned shutdown, and starts it again when it is back.
    Frozen,
}

impl Phase {
    /// The word shown to people.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Stopped => "stopped",
            Self::Starting => "starting",
            Self::Started => "started",
            Self::Stopping => "stopping",
            Self::Migrating { .. } => "migrating",
            Self::Relocating { .. } => "relocating",
            Self::Recovering => "recovering",
            Self::Error => "error",
            Self::Unplaceable => "unplaceable",
            Self::Frozen => "frozen",
        }
    }
}

/// What was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Requested {
    /// To run.
    Started,
    /// Not to run.
    Stopped,
    /// Whatever it does: HA leaves it alone, running or not, until a person asks for something else.
    Ignored,
}

impl Requested {
    /// The word shown to people.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Started => "started",
            Self::Stopped => "stopped",
            Self::Ignored => "ignored",
        }
    }
}

/// A node as the cluster knows it. Written by the node when it comes up, and for maintenance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeRecord {
    /// Id for life.
    pub node_id: NodeId,
    /// The label people see.
    pub name: Name,
    /// `host:port` of its gRPC service.
    pub api_address: String,
    /// Logical CPUs.
    pub cpus: u32,
    /// Memory that VMs may use, bytes.
    pub memory_bytes: u64,
    /// Set by `node drain`, cleared by `node resume`: takes no VMs, gives its VMs away.
    #[serde(default)]
    pub maintenance: bool,
    /// What its KVM offers guests, for the CPU model that all nodes share; empty: no KVM.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub cpuid: Vec<CpuidRecord>,
    /// Identity of the watchdog that guards it; empty: none.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub watchdog: String,
    /// svm | vmx | pvm | none.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub kvm: String,
    /// The agent's version.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub version: String,
    /// What fails together with it; empty: nothing else.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub zone: String,
    /// Here to vote: it runs no VMs.
    #[serde(default)]
    pub witness: bool,
    /// Its machine goes down as planned, or has; the node takes it back when it is up again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub absence: Option<Absence>,
}

/// A planned absence.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Absence {
    /// What its operator asked for.
    pub kind: AbsenceKind,
    /// No HA VM runs there any more, by the node's own word: nothing need be fenced.
    #[serde(default)]
    pub clear: bool,
}

/// How a node goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AbsenceKind {
    /// For now.
    Shutdown,
    /// It comes back at once.
    Reboot,
}

/// One answer of the CPUID instruction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuidRecord {
    /// EAX on input.
    pub leaf: u32,
    /// ECX on input, where the leaf has subleaves.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subleaf: Option<u32>,
    /// EAX on output.
    pub eax: u32,
    /// EBX on output.
    pub ebx: u32,
    /// ECX on output.
    pub ecx: u32,
    /// EDX on output.
    pub edx: u32,
}

/// Which leader may act for HA, and acknowledge heartbeats. Each new leader writes it before it
/// does either; whatever an earlier leader still has in flight compares it and so comes to nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct HaLeaderRecord {
    /// Who.
    pub node: NodeId,
    /// In which Raft term.
    pub term: u64,
}

/// A node was declared dead: its VMs' generations were raised in the same transaction.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FencedRecord {
    /// The Raft term in which it was declared.
    pub term: u64,
    /// The node that declared it.
    pub by: NodeId,
    /// Why, for people.
    pub reason: String,
}

/// A node leaves the cluster, or has left it. It stays for ever: ids are never given twice.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RemovalRecord {
    /// The name it had.
    pub name: String,
    /// How far it is.
    pub state: RemovalState,
}

/// How far a removal is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RemovalState {
    /// Asked for: the node is given no VMs any more.
    Leaving,
    /// It is no member, its records are gone, and it is answered nothing.
    Removed,
}

/// Who administers the cluster. Changes that may each leave one administrator, and together none,
/// meet here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AdministrationRecord {
    /// Those with the role `admin` by their documents, who have a certificate or not.
    pub administrators: Vec<Name>,
}

/// How the members' copies of the configuration compared, each at the same place of the log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VerificationRecord {
    /// When, in Unix milliseconds of the node that compared them; for people.
    pub at_unix_ms: u64,
    /// The log entry after which each computed its checksum.
    pub log_index: u64,
    /// The store's revision there.
    pub revision: u64,
    /// By node id.
    pub members: Vec<MemberVerification>,
}

/// One member's part of a [`VerificationRecord`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemberVerification {
    /// Who.
    pub node: NodeId,
    /// Its name then.
    pub name: String,
    /// How its copy compares.
    pub outcome: VerificationOutcome,
    /// SHA-256, hexadecimal; empty: unknown.
    #[serde(default)]
    pub checksum: String,
    /// What differs, why it is unknown, or how it cannot be read.
    #[serde(default)]
    pub detail: String,
}

/// How a member's copy compares with what most members have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VerificationOutcome {
    /// It is the same.
    Same,
    /// It is not; or there is no telling which copies are right.
    Differs,
    /// It gave no checksum.
    Unknown,
    /// It cannot be read: its node has a fault.
    Faulty,
}

impl VerificationOutcome {
    /// The word shown to people.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Same => "same",
            Self::Differs => "differs",
            Self::Unknown => "unknown",
            Self::Faulty => "faulty",
        }
    }
}

/// A certificate that the cluster's CA, or one before it, has issued. It stays until some time after its end; one that
/// was revoked stays for ever.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CertificateRecord {
    /// Whose it is.
    pub holder: CertificateHolder,
    /// Seconds since 1970, by the clock of the node that signed it.
    pub issued_unix_s: u64,
    /// Its end, seconds since 1970.
    pub expires_unix_s: u64,
    /// SHA-256 of its public key, hexadecimal: no key gets a second certificate.
    pub key_hash: String,
    /// Its node may show it. Set before the node first does, cleared once the node shows another
    /// one; of a client's nothing is known.
    #[serde(default)]
    pub in_use: bool,
    /// It counts no more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revoked: Option<Revocation>,
    /// Why its holder, a node, has not got the next one yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trouble: Option<String>,
    /// Which CA signed it: the identifier of that one's key, lower-case hexadecimal.
    pub authority: String,
}

/// Whom a certificate names.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CertificateHolder {
    /// A node of the cluster.
    Node(NodeId),
    /// A client.
    Client(String),
}

/// When a certificate was revoked, and by whom.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Revocation {
    /// Seconds since 1970.
    pub at_unix_s: u64,
    /// Who asked for it.
    pub by: String,
}

/// One VM's exclusive right to write an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskClaim {
    /// Who.
    pub vm_id: VmId,
    /// Its name, for the message to whoever else wants the image.
    pub vm: Name,
}

/// A storage pool: a folder, on each node by itself or shared by all.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolRecord {
    /// Name.
    pub name: Name,
    /// Shared or local.
    pub kind: PoolKind,
    /// Folder, the same path on every node.
    pub path: String,
}

/// A network that NICs plug into: a bridge of this name on every node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkRecord {
    /// Name.
    pub name: Name,
    /// Bridge interface, made where missing.
    pub bridge: String,
    /// NIC to enslave to a bridge that was made; empty: none.
    #[serde(default)]
    pub uplink: String,
}
