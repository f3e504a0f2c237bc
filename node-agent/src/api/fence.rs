//! `Nodes.Fence`: passed to the leader, which alone knows who is dead.

use proto::v1::nodes_client::NodesClient;
use proto::v1::{FenceNodeRequest, FenceNodeResponse};
use tonic::{Response, Status};

use super::forward::Caller;
use super::leader;
use crate::ha::fence_by_hand;
use crate::node::Node;

pub(super) async fn fence(
    node: &std::sync::Arc<Node>,
    caller: &Caller,
    request: FenceNodeRequest,
) -> Result<Response<FenceNodeResponse>, Status> {
    let there = |channel| {
        let request = caller.request(request.clone());
        async move { NodesClient::new(channel).fence(request?).await }
    };
    if let Some(answer) = leader::have_done(node, there).await? {
        return Ok(answer);
    }
    let target = node.find(&request.node).ok_or_else(|| super::node::unknown(&request.node))?;
    let vms = fence_by_hand(node, target, request.machine_is_off, &caller.user).await?;
    Ok(Response::new(FenceNodeResponse { vms }))
}
