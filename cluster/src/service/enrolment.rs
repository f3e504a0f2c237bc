//! `Enrolment`: the only service that asks for no certificate.

use std::sync::Arc;
use std::time::Duration;

use proto::v1;
use proto::v1::enrolment_server::Enrolment;
use tokio::sync::Semaphore;
use tonic::{Request, Response, Status};

use crate::membership;
use crate::node::Node;

/// Strangers get this many requests at once, and wait for a turn at most so long.
const AT_ONCE: usize = 8;
const TURN: Duration = Duration::from_secs(10);

/// Lets nodes in that bring a good token.
#[derive(Debug, Clone)]
pub struct EnrolmentService {
    node: Arc<Node>,
    turns: Arc<Semaphore>,
}

impl EnrolmentService {
    pub(crate) fn new(node: Arc<Node>) -> Self {
        Self { node, turns: Arc::new(Semaphore::new(AT_ONCE)) }
    }
}

#[tonic::async_trait]
impl Enrolment for EnrolmentService {
    async fn enrol(
        &self,
        request: Request<v1::EnrolRequest>,
    ) -> Result<Response<v1::EnrolResponse>, Status> {
        let turn = tokio::time::timeout(TURN, self.turns.acquire()).await;
        let _turn = turn
            .map_err(|_| Status::resource_exhausted("many nodes are joining at once; try again"))?
            .map_err(|_| Status::unavailable("the agent is shutting down"))?;
        let request = request.into_inner();
        let name = request.node_name.clone();
        let answer = membership::enrol(&self.node, request).await;
        match &answer {
            Ok(answer) => tracing::info!(node = answer.node_id, name, "a node joins"),
            Err(status) => {
                tracing::warn!(name = %name.escape_debug(), why = status.message(), "a node was not let in");
            }
        }
        answer.map(Response::new)
    }
}
