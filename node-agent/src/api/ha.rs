//! `Ha`: what the leader thinks of nodes and VMs.

use std::collections::BTreeMap;

use ha_manager::{Explainer, NodeState, VmReport};
use proto::Name;
use proto::v1::ha_client::HaClient;
use proto::v1::ha_server::Ha;
use proto::v1::{HaNode, HaResource, HaStatus, HaStatusRequest};
use tonic::transport::Channel;
use tonic::{Code, Request, Response, Status};

use super::forward::Caller;
use super::{Api, leader};
use crate::ha::observe;
use crate::node::Node;

#[tonic::async_trait]
impl Ha for Api {
    async fn status(
        &self,
        request: Request<HaStatusRequest>,
    ) -> Result<Response<HaStatus>, Status> {
        let (node, caller) = (self.node()?, Caller::of(&request)?);
        let lease_ms = u32::try_from(node.config.timing.lease_ms).unwrap_or(u32::MAX);
        match leader::ask(&node, |channel| status_of(channel, &caller)).await {
            Ok(None) => Ok(Response::new(status(&node, lease_ms).await?)),
            Ok(Some(answer)) => Ok(answer),
            Err(none) if none.code() == Code::Unavailable => Ok(Response::new(HaStatus {
                quorum: false,
                lease_ms,
                report: vec![none.message().to_owned()],
                ..HaStatus::default()
            })),
            Err(refused) => Err(refused),
        }
    }
}

/// Another node's answer, as the leader.
pub(crate) async fn status_of(
    channel: Channel,
    caller: &Caller,
) -> Result<Response<HaStatus>, Status> {
    HaClient::new(channel).status(caller.request(HaStatusRequest {})?).await
}

/// How a node is kept from running HA VMs that it should not run any more.
fn protection(watchdog: &str) -> String {
    if watchdog.is_empty() { "lease".to_owned() } else { format!("lease, watchdog ({watchdog})") }
}

async fn status(node: &Node, lease_ms: u32) -> Result<HaStatus, Status> {
    let snapshot = observe(node).await?;
    let observations = node.leader.observations(snapshot.state.nodes.keys().copied());
    let plan = node.leader.last_plan();
    let explainer = Explainer::new(&snapshot.state, &observations, &snapshot.policy, &plan);
    let explained = |name| explainer.explain(name).map(|report| (name, report));
    let reports: BTreeMap<&Name, VmReport> =
        snapshot.state.vms.keys().filter_map(explained).collect();
    let nodes = snapshot.state.nodes.iter().map(|(id, view)| {
        let state: NodeState = snapshot.state.node_state(&observations, *id);
        HaNode {
            name: view.record.name.to_string(),
            state: state.word().to_owned(),
            lease_age_ms: node.leader.look(*id).age_ms,
            protection: protection(&view.record.watchdog),
        }
    });
    let resources =
        snapshot.state.vms.iter().filter(|(_, vm)| vm.placement.ha).map(|(name, vm)| {
            let placement = &vm.placement;
            HaResource {
                vm: name.to_string(),
                state: placement.phase.word().to_owned(),
                requested: placement.requested.word().to_owned(),
                node: node.name_of(placement.owner),
                generation: placement.generation.0,
                reason: reports.get(name).map(|report| report.why.clone()).unwrap_or_default(),
            }
        });
    Ok(HaStatus {
        quorum: true,
        leader: node.name().to_string(),
        lease_ms,
        nodes: nodes.collect(),
        resources: resources.collect(),
        report: reports.iter().map(|(name, report)| format!("{name}: {report}")).collect(),
    })
}
