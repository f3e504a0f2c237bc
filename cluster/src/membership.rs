//! Forming and changing the cluster: typed layers on the store's transactions.
//!
//! Keys: `priv/ca`, `priv/tokens/ID`, `priv/next-node-id`, `priv/names/NAME` (a name is taken).

use std::time::{SystemTime, UNIX_EPOCH};

use proto::record::{RemovalRecord, RemovalState};
use proto::{Name, NodeId, keys, v1};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::time::Instant;
use tonic::Status;

use crate::authority::{self, CA_KEY, CaRecord, Signer};
use crate::certificates;
use crate::consensus::{Forward, Forwarded, MemberNode};
use crate::identity::token::{Token, TokenRecord, TokenUse};
use crate::identity::{Life, request_key_hash};
use crate::node::Node;
use crate::{
    Consistency, InitError, KeyValue, Member, MembershipError, StoreError, Txn, TxnOutcome,
};

/// How far a joining node's clock may be off, seconds.
const CLOCK_MAX_S: u64 = 300;
const TOKEN_TTL_S: u32 = 3600;
const TOKEN_TTL_MAX_S: u32 = 7 * 24 * 3600;
/// Attempts of a transaction whose compares meet concurrent changes.
const ATTEMPTS: usize = 16;

fn key(rest: &str) -> String {
    format!("{}{rest}", keys::PRIV)
}
/// Longest address of a node, bytes: a DNS name has 253 (RFC 1035), and there is a port.
const ADDRESS_MAX: usize = 260;
/// A token names so many members at most: with the longest addresses it is not too long to be read.
const TOKEN_ADDRESSES: usize = 16;
/// Tokens that are looked at when one is made.
const OLD_TOKENS: usize = 64;
/// So long an expired token is remembered, seconds.
const TOKEN_MEMORY_S: u64 = 7 * 86_400;

fn token_key(id: &str) -> String {
    key(&format!("tokens/{id}"))
}
pub(crate) fn name_key(name: &str) -> String {
    key(&format!("names/{name}"))
}

/// Seconds since 1970 by this machine's clock.
pub(crate) fn unix_now_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

pub(crate) fn to_json<T: Serialize>(value: &T) -> Result<Vec<u8>, StoreError> {
    serde_json::to_vec(value).map_err(|error| StoreError::Invalid(error.to_string()))
}

pub(crate) fn from_json<T: DeserializeOwned>(kv: &KeyValue) -> Result<T, StoreError> {
    serde_json::from_slice(&kv.value).map_err(|error| StoreError::Failed {
        why: format!("the record `{}` is damaged: {error}", kv.key),
    })
}

/// The records that every cluster has from its beginning.
pub(crate) async fn write_first_records(
    node: &Node,
    ca: &CaRecord,
    name: &Name,
) -> Result<(), InitError> {
    // The node records its certificate by itself, now or a moment later: here it would be a conflict.
    let txn = Txn::new()
        .by("system")
        .if_absent(CA_KEY)
        .put(CA_KEY, to_json(ca)?)
        .put(key("next-node-id"), to_json(&2u64)?)
        .put(name_key(name.as_str()), to_json(&1u64)?);
    match node.txn(txn).await? {
        TxnOutcome::Committed { .. } => Ok(()),
        TxnOutcome::Conflict { .. } => {
            Err(StoreError::Invalid("this cluster exists already".to_owned()).into())
        }
    }
}

async fn read(node: &Node, key: &str) -> Result<Option<KeyValue>, StoreError> {
    Ok(node.get(key, Consistency::Linearizable).await?.0)
}

/// Makes a one-time token.
pub(crate) async fn create_token(
    node: &Node,
    ttl_s: u32,
) -> Result<v1::CreateTokenResponse, MembershipError> {
    let ttl_s = if ttl_s == 0 { TOKEN_TTL_S } else { ttl_s };
    if ttl_s > TOKEN_TTL_MAX_S {
        let text =
            format!("a token is valid for at most 7 days ({TOKEN_TTL_MAX_S} s), not {ttl_s} s");
        return Err(MembershipError::Invalid(text));
    }
    let random = |error: &dyn std::fmt::Display| MembershipError::Invalid(error.to_string());
    let record = node.identity();
    // This node first: it is surely up.
    let mut members = node.members();
    let first = |member: &Member| (member.node_id != record.node_id, !member.voter, member.node_id);
    members.sort_by_key(first);
    let addresses = members.into_iter().take(TOKEN_ADDRESSES).map(|member| member.enrol_address);
    let addresses = addresses.collect();
    let trusted = node.trusted();
    let fingerprint = trusted.signer_fingerprint();
    // While the CA is replaced: who joins knows the new one alone, and asks this node first.
    node.shows(&trusted.signer_key_id()).await;
    let token = Token::make(record.cluster_id.clone(), fingerprint, addresses)
        .map_err(|error| random(&error))?;
    let expires_unix_s = unix_now_s().saturating_add(u64::from(ttl_s));
    let value = to_json(&TokenRecord::of(&token, expires_unix_s))?;
    let made = Txn::new().if_absent(token_key(&token.id)).put(token_key(&token.id), value);
    node.txn(without_old_tokens(node, made).await?).await?;
    let token = token.encode().map_err(|error| random(&error))?;
    Ok(v1::CreateTokenResponse { token, expires_unix_s })
}

/// Has a transaction also delete tokens that expired long ago: so long whoever tries one hears why
/// it is worth nothing.
async fn without_old_tokens(node: &Node, mut txn: Txn) -> Result<Txn, MembershipError> {
    let now_s = unix_now_s();
    let found = node.range(&token_key(""), "", OLD_TOKENS, Consistency::Linearizable, true).await?;
    for kv in found.kvs {
        let token: TokenRecord = from_json(&kv)?;
        if token.expires_unix_s.saturating_add(TOKEN_MEMORY_S) < now_s {
            txn = txn.delete(kv.key);
        }
    }
    Ok(txn)
}

/// Signs a client's certificate.
pub(crate) async fn issue_client(
    node: &Node,
    name: &str,
    csr_pem: &str,
    caller: Option<&str>,
) -> Result<v1::IssueClientResponse, MembershipError> {
    let name: Name = name
        .parse()
        .map_err(|error: proto::InvalidName| MembershipError::Invalid(error.to_string()))?;
    check_client(&name)?;
    let (certificate_pem, record) =
        certificates::issue_client(node, name.as_str(), csr_pem, caller).await?;
    // Its holder trusts the CA that signs alone.
    node.shows(&record.signer_key_id()).await;
    let api_addresses = node.members().into_iter().map(|member| member.api_address).collect();
    Ok(v1::IssueClientResponse {
        certificate_pem,
        ca_pem: record.for_clients(),
        api_addresses,
        // The agent says it: it judges by it.
        role: String::new(),
    })
}

/// Names that stand in the history for somebody else.
const RESERVED: [&str; 2] = ["root", "system"];

/// Refuses a client the names by which the cluster itself, and root on a node, sign their changes.
fn check_client(name: &Name) -> Result<(), MembershipError> {
    if RESERVED.contains(&name.as_str()) {
        let text = format!(
            "no client is named `{name}`: it stands for the cluster itself, or root on a node, in the history; choose another name"
        );
        return Err(MembershipError::Invalid(text));
    }
    Ok(())
}

/// What a stranger is told of a failure: nothing of this node's folders.
fn for_strangers(error: MembershipError) -> Status {
    let why = match &error {
        MembershipError::CannotSign { .. } => "it cannot sign certificates",
        MembershipError::Store(StoreError::Failed { .. }) => "its database failed",
        MembershipError::Store(StoreError::DiskFull { .. }) => "the disk is full",
        _ => return error.into(),
    };
    tracing::warn!(%error, "a node that joins was sent elsewhere");
    Status::unavailable(format!("this member cannot let nodes in: {why}; its log says more"))
}

/// Refuses names that are numbers: people name nodes by id, too.
pub(crate) fn check_label(name: &Name) -> Result<(), MembershipError> {
    if name.as_str().bytes().all(|byte| byte.is_ascii_digit()) {
        let text =
            format!("`{name}` would pass for a node's id; choose a name with a letter in it");
        return Err(MembershipError::Invalid(text));
    }
    Ok(())
}

/// Refuses what a node cannot say of itself.
pub(crate) fn check_described(api: &str, enrol: &str, zone: &str) -> Result<(), String> {
    for address in [api, enrol] {
        let parts = address.rsplit_once(':').filter(|_| address.len() <= ADDRESS_MAX);
        if !parts.is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok()) {
            let shown: String = address.chars().take(ADDRESS_MAX).collect();
            return Err(format!("`{shown}` is not an address: host:port is needed"));
        }
    }
    if !zone.is_empty() && zone.parse::<Name>().is_err() {
        return Err("the zone is not a valid name".to_owned());
    }
    Ok(())
}

/// Lets a node in that brings a good token.
pub(crate) async fn enrol(
    node: &Node,
    request: v1::EnrolRequest,
) -> Result<v1::EnrolResponse, Status> {
    let name: Name = request
        .node_name
        .parse()
        .map_err(|error: proto::InvalidName| Status::invalid_argument(error.to_string()))?;
    check_clock(request.now_unix_s, unix_now_s())?;
    check_label(&name).map_err(|error| Status::invalid_argument(error.to_string()))?;
    check_described(&request.api_address, &request.enrol_address, &request.zone)
        .map_err(Status::invalid_argument)?;
    let key_hash = request_key_hash(&request.csr_pem)
        .map_err(|error| Status::invalid_argument(error.to_string()))?;
    // Before the token is used up: where this member cannot sign, another one may.
    let signer = authority::signer(node).await.map_err(for_strangers)?;
    let id = admit(node, &request, &name, &key_hash).await?;
    let (certificate_pem, signer) = sign_in(node, id, &request.csr_pem, signer).await?;
    let member = MemberNode {
        name: name.to_string(),
        api_address: request.api_address,
        enrol_address: request.enrol_address,
        zone: request.zone,
        witness: request.witness,
    };
    let add = Forward::AddLearner { id: id.0, node: member };
    let deadline = Instant::now() + node.config().request_timeout;
    match node.ask_leader(add, deadline).await? {
        Forwarded::Done => {}
        Forwarded::Refused(_) => return Err(removed_since(id)),
        other => return Err(Status::unavailable(format!("the node was not added: {other:?}"))),
    }
    take_back_if_removed(node, id).await?;
    let (record, trusted) = (node.identity(), signer.record.trusted(signer.revision));
    Ok(v1::EnrolResponse {
        cluster_id: record.cluster_id.clone(),
        cluster_name: record.cluster_name.clone(),
        node_id: id.0,
        certificate_pem,
        ca_pem: trusted.bundle(),
        ca_revision: trusted.revision,
        members: node.members().into_iter().map(Into::into).collect(),
        sealing_key: signer.sealing_key.bytes().to_vec(),
    })
}

/// Signs and records the certificate that a node comes in with, as the CA is at that moment.
async fn sign_in(
    node: &Node,
    id: NodeId,
    csr_pem: &str,
    mut signer: Signer,
) -> Result<(String, Signer), Status> {
    for _ in 0..ATTEMPTS {
        let life = Life::from_now(node.config().certificates.node);
        let signed = signer
            .ca
            .sign_node(&node.identity().cluster_id, id, csr_pem, life)
            .map_err(|error| certificates::not_signed(&error))?;
        // Also for one that was let in before, but did not get the answer. Not for one that was
        // removed since: an id is given once, and its token is used up.
        let present = signer.unchanged(Txn::new().by("system").if_absent(keys::removal(id)));
        if node.txn(certificates::enrolled(present, &signed)?).await?.committed() {
            return Ok((signed, signer));
        }
        if read(node, &keys::removal(id)).await?.is_some() {
            return Err(removed_since(id));
        }
        // The CA was rotated meanwhile.
        signer = authority::signer(node).await.map_err(for_strangers)?;
    }
    Err(Status::unavailable("the cluster's CA is being rotated; join again"))
}

fn removed_since(id: NodeId) -> Status {
    Status::permission_denied(format!(
        "node {id}, which came in with this join token, was removed from the cluster: empty the data folder, make a new token with `clusterctl cluster token create` and join with that"
    ))
}

/// A removal that ran while the node was added may have found nobody to take out.
async fn take_back_if_removed(node: &Node, id: NodeId) -> Result<(), Status> {
    let Some(kv) = read(node, &keys::removal(id)).await? else { return Ok(()) };
    // One that is only announced takes the node out itself.
    if from_json::<RemovalRecord>(&kv)?.state == RemovalState::Removed {
        let until = Instant::now() + node.config().request_timeout;
        if let Err(error) = node.ask_leader(Forward::Remove { id: id.0 }, until).await {
            tracing::warn!(node = %id, %error, "it was removed, and is listed as a member again");
        }
    }
    Err(removed_since(id))
}

fn check_clock(theirs: u64, ours: u64) -> Result<(), Status> {
    let off = theirs.abs_diff(ours);
    if off <= CLOCK_MAX_S {
        return Ok(());
    }
    let way = if theirs > ours { "ahead of" } else { "behind" };
    Err(Status::failed_precondition(format!(
        "the joining node's clock is {off} s {way} this cluster's, at most {CLOCK_MAX_S} s are allowed; set it (`timedatectl set-ntp true`) and join again"
    )))
}

/// Uses the token up: id and name are given in the transaction that marks it used.
async fn admit(
    node: &Node,
    request: &v1::EnrolRequest,
    name: &Name,
    key_hash: &str,
) -> Result<NodeId, Status> {
    let unknown = || {
        Status::permission_denied(
            "the join token is not known here: it is forged, or was made by another cluster; make a new one with `clusterctl cluster token create`",
        )
    };
    if request.token_id.is_empty() || request.token_id.len() > 64 || request.token_id.contains('/')
    {
        return Err(unknown());
    }
    let token_key = token_key(&request.token_id);
    for _ in 0..ATTEMPTS {
        let kv = read(node, &token_key).await?.ok_or_else(unknown)?;
        let mut record: TokenRecord = from_json(&kv)?;
        if !record.matches(&request.token_secret) {
            return Err(unknown());
        }
        let expired = unix_now_s() >= record.expires_unix_s;
        if let Some(used) = &record.used {
            // The same node asks again: it did not get the answer. Not for ever: whoever has found
            // its key since must not get certificates on it.
            if !expired && used.key_hash == key_hash && used.node_name == name.as_str() {
                return Ok(NodeId(used.node_id));
            }
            if expired && used.node_name == name.as_str() {
                return Err(Status::permission_denied(format!(
                    "the join token was used for node `{name}`, and its time is over; remove that node (`clusterctl cluster remove {name}`), make a new token with `clusterctl cluster token create` and join with that"
                )));
            }
            return Err(Status::permission_denied(format!(
                "the join token was used already, by node `{}`; each node needs a token of its own: make one with `clusterctl cluster token create`",
                used.node_name
            )));
        }
        if expired {
            return Err(Status::permission_denied(
                "the join token has expired; make a new one with `clusterctl cluster token create`",
            ));
        }
        let taken = read(node, &name_key(name.as_str())).await?;
        if taken.is_some() {
            return Err(Status::already_exists(format!(
                "a node named `{name}` is in the cluster already; choose another name, or remove that node first"
            )));
        }
        let next_key = key("next-node-id");
        let next = read(node, &next_key).await?;
        let next = next.ok_or_else(|| Status::internal("the node counter is missing"))?;
        let id: u64 = from_json(&next)?;
        let (node_name, key_hash) = (name.to_string(), key_hash.to_owned());
        record.used = Some(TokenUse { node_id: id, node_name, key_hash });
        let txn = Txn::new()
            .if_revision(token_key.as_str(), kv.mod_revision)
            .if_revision(next_key.as_str(), next.mod_revision)
            .if_absent(name_key(name.as_str()))
            .put(token_key.as_str(), to_json(&record)?)
            .put(next_key, to_json(&(id + 1))?)
            .put(name_key(name.as_str()), to_json(&id)?);
        if node.txn(txn).await?.committed() {
            return Ok(NodeId(id));
        }
    }
    Err(Status::aborted("many nodes are joining at once; try again"))
}

/// Has another voter lead.
pub(crate) async fn transfer_leader(
    node: &Node,
    to: Option<NodeId>,
) -> Result<NodeId, MembershipError> {
    let limit = node.config().request_timeout;
    let until = Instant::now() + limit;
    let mut from = node.metrics().current_leader.unwrap_or(0);
    for _ in 0..3 {
        let asked = Forward::Transfer { from, to: to.map(|to| to.0) };
        let leader = match node.ask_leader(asked, until).await {
            Ok(Forwarded::Leader(leader)) => leader,
            Ok(Forwarded::Refused(why)) => {
                let text = format!("leadership stays where it is: {why}");
                return Err(MembershipError::Invalid(text));
            }
            Err(StoreError::UnknownOutcome { .. }) => return Err(MembershipError::Timeout(limit)),
            Ok(other) => {
                return Err(StoreError::UnknownOutcome { why: format!("{other:?}") }.into());
            }
            Err(error) => return Err(error.into()),
        };
        // Nothing is done where this node was wrong about who leads: now it knows.
        if to.map_or(from != 0 && leader != from, |to| to.0 == leader) {
            return Ok(NodeId(leader));
        }
        from = leader;
    }
    Err(MembershipError::Timeout(limit))
}

/// A member that has not answered the leader for longer does not count as up.
pub(crate) fn up(node: &Node, contact_ms: Option<u64>) -> bool {
    let limit = node.config().timings.silence_limit();
    contact_ms.is_some_and(|ms| std::time::Duration::from_millis(ms) <= limit)
}

/// A log that is this much longer than a member's is worth saying, entries.
const BEHIND: u64 = 200;

fn health(node: &Node, leads: bool, lag: Option<u64>, contact_ms: Option<u64>) -> &'static str {
    match (leads, up(node, contact_ms), lag) {
        (true, _, _) => "leader",
        (false, false, None) => "unknown",
        (false, false, Some(_)) => "silent",
        (false, true, Some(lag)) if lag <= BEHIND => "well",
        (false, true, _) => "behind",
    }
}

/// What `cluster status` shows.
pub(crate) async fn status(node: &Node) -> v1::ClusterStatus {
    let deadline = Instant::now() + node.config().request_timeout / 2;
    let quorum =
        matches!(node.ask_leader(Forward::ReadIndex, deadline).await, Ok(Forwarded::ReadIndex(_)));
    let progress = if quorum {
        match node.ask_leader(Forward::Progress, deadline).await {
            Ok(Forwarded::Progress(progress)) => progress,
            _ => Vec::new(),
        }
    } else {
        Vec::new()
    };
    let metrics = node.metrics();
    let record = node.identity();
    let members = node.members();
    let voters = members.iter().filter(|member| member.voter).count();
    let up = members
        .iter()
        .filter(|member| {
            let of = progress.iter().find(|(id, _, _)| *id == member.node_id.0);
            member.voter && of.is_some_and(|(_, _, contact)| up(node, *contact))
        })
        .count();
    let failures = if quorum { up.saturating_sub(voters / 2 + 1) } else { 0 };
    v1::ClusterStatus {
        cluster_id: record.cluster_id.clone(),
        cluster_name: record.cluster_name.clone(),
        answered_by: record.node_id.0,
        leader: metrics.current_leader,
        term: metrics.current_term,
        quorum,
        members: members
            .into_iter()
            .map(|member| {
                let of = progress.iter().find(|(id, _, _)| *id == member.node_id.0);
                let (lag, contact) = of.map_or((None, None), |(_, lag, contact)| (*lag, *contact));
                let leads = quorum && metrics.current_leader == Some(member.node_id.0);
                v1::MemberStatus {
                    lag,
                    last_contact_ms: contact,
                    health: health(node, leads, lag, contact).to_owned(),
                    member: Some(member.into()),
                }
            })
            .collect(),
        revision: node.revision(),
        initialized: true,
        failures_tolerated: u32::try_from(failures).unwrap_or(u32::MAX),
        // The agent knows what runs where.
        if_fails: Vec::new(),
        verification: crate::verify::last(node),
        ca: authority::rotation::under_way(node).await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stranger_hears_nothing_of_this_nodes_folders() {
        let path = || std::path::PathBuf::from("/srv/secret");
        let errors = [
            MembershipError::CannotSign { node: "n1".to_owned(), why: "/srv/secret/x".to_owned() },
            StoreError::Failed { why: "/srv/secret/db".to_owned() }.into(),
            StoreError::DiskFull { path: path(), free_bytes: 1 }.into(),
        ];
        for error in errors {
            let told = for_strangers(error);
            assert_eq!(told.code(), tonic::Code::Unavailable, "{told}");
            assert!(!told.message().contains("/srv"), "{told}");
        }
    }

    #[test]
    fn a_token_of_a_large_cluster_can_be_read() {
        let longest = format!("{}:65535", "h".repeat(ADDRESS_MAX - 6));
        let addresses = vec![longest; TOKEN_ADDRESSES];
        let token = Token::make("c".repeat(36), "ab".repeat(32), addresses).expect("chance");
        let text = token.encode().expect("it is plain");
        assert_eq!(Token::decode(&text), Ok(token));
    }

    #[test]
    fn no_client_passes_for_the_cluster_or_root() {
        for (name, fine) in [("root", false), ("system", false), ("roots", true), ("ann", true)] {
            assert_eq!(check_client(&name.parse().unwrap()).is_ok(), fine, "{name}");
        }
    }

    #[test]
    fn what_a_node_says_of_itself_is_bounded() {
        let long = format!("{}:7400", "a".repeat(300));
        assert_eq!(check_described("10.0.0.1:7400", "[::1]:7401", "rack-1"), Ok(()));
        assert_eq!(check_described("host:7400", "host:7401", ""), Ok(()));
        for (api, zone) in [("host", ""), (":7400", ""), ("h:99999", ""), (&long, "")] {
            let refused = check_described(api, "host:7401", zone).unwrap_err();
            assert!(refused.contains("host:port") && refused.len() < 320, "{refused}");
        }
        for zone in ["Rack 1", "a\nb", &"z".repeat(1 << 20)] {
            assert!(check_described("h:1", "h:2", zone).unwrap_err().contains("zone"));
        }
    }
}
