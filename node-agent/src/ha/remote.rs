//! The leader's verdicts, for decisions that another node takes (the owner, about a migration).

use std::collections::BTreeMap;

use ha_manager::{Observations, Verdict};
use proto::v1::HaStatusRequest;
use proto::v1::ha_client::HaClient;
use tonic::Status;

use super::Snapshot;
use crate::api::forward::{Caller, leader_channel};
use crate::node::Node;

/// What the leader observes of the nodes.
///
/// # Errors
/// `UNAVAILABLE` without a leader.
pub async fn observations(
    node: &Node,
    caller: &Caller,
    snapshot: &Snapshot,
) -> Result<Observations, Status> {
    let Some(channel) = leader_channel(node).await? else {
        return Ok(node.leader.observations(snapshot.state.nodes.keys().copied()));
    };
    let request = caller.request(HaStatusRequest {})?;
    let status = HaClient::new(channel).status(request).await?.into_inner();
    let by_name: BTreeMap<String, Verdict> = status
        .nodes
        .into_iter()
        .map(|told| {
            let age_ms = told.lease_age_ms.unwrap_or(0);
            let verdict = match told.state.as_str() {
                // A fenced record is in the snapshot and weighs more than this.
                "online" | "maintenance" | "fenced" => Verdict::Alive { age_ms },
                "fencing" => Verdict::Dead { age_ms },
                _ => Verdict::Unknown { age_ms },
            };
            (told.name, verdict)
        })
        .collect();
    let verdicts = snapshot
        .state
        .nodes
        .iter()
        .filter_map(|(id, view)| Some((*id, *by_name.get(view.record.name.as_str())?)))
        .collect();
    Ok(Observations { verdicts, ..Observations::default() })
}
