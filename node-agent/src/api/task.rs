//! `Tasks`: each task lives on the node that its id names.

use futures::StreamExt as _;
use proto::NodeId;
use proto::documents::Role;
use proto::v1::tasks_client::TasksClient;
use proto::v1::tasks_server::Tasks;
use proto::v1::{GetTaskRequest, ListTasksRequest, ListTasksResponse, Task, TaskUpdate};
use std::time::Duration;
use tonic::transport::Channel;
use tonic::{Request, Response, Status};

use super::forward::{Caller, channel, relayed, unreachable};
use super::{Answers, Api};
use crate::access::may_cancel;
use crate::node::Node;
use crate::task::parse_id;

/// How long another node has to list its tasks.
const LIST_LIMIT: Duration = Duration::from_secs(2);

fn unknown(id: &str) -> Status {
    Status::not_found(format!(
        "no task `{id}`: tasks are kept by the node that ran them, the newest ones, until its agent \
         restarts; see `clusterctl task list`"
    ))
}

/// Where a task is: `None` if here.
fn home(node: &Node, id: &str) -> Result<Option<(NodeId, Channel)>, Status> {
    let (of, _) = parse_id(id).ok_or_else(|| {
        Status::invalid_argument(format!("`{id}` is not a task id: it looks like 1-42"))
    })?;
    if of == node.id {
        return Ok(None);
    }
    let channel = channel(node, of).map_err(|_| unknown(id))?;
    Ok(Some((of, channel)))
}

/// What a task is, where it is.
async fn kind_of(
    node: &Node,
    caller: &Caller,
    home: Option<&(NodeId, Channel)>,
    wanted: &GetTaskRequest,
) -> Result<String, Status> {
    let Some((of, channel)) = home else {
        let task = node.tasks.get(&wanted.task_id);
        return task.map(|task| task.kind).ok_or_else(|| unknown(&wanted.task_id));
    };
    let answer = TasksClient::new(channel.clone()).get(caller.request(wanted.clone())?).await;
    Ok(answer.map_err(|status| unreachable(node, *of, &status))?.into_inner().kind)
}

#[tonic::async_trait]
impl Tasks for Api {
    async fn list(
        &self,
        request: Request<ListTasksRequest>,
    ) -> Result<Response<ListTasksResponse>, Status> {
        let (node, caller) = (self.node()?, Caller::of(&request)?);
        let limit = match request.into_inner().limit {
            0 => 50,
            limit => usize::try_from(limit).unwrap_or(usize::MAX).min(1_000),
        };
        let mut tasks = node.tasks.list(limit);
        if !caller.is_forwarded() {
            let others = node.cluster().members().into_iter().filter(|m| m.node_id != node.id);
            let lists = others.map(|member| {
                let (node, caller) = (node.clone(), caller.clone());
                async move {
                    let channel = channel(&node, member.node_id)?;
                    let message = ListTasksRequest { limit: u32::try_from(limit).unwrap_or(0) };
                    let mut client = TasksClient::new(channel);
                    let list = client.list(caller.request(message)?);
                    let answer = tokio::time::timeout(LIST_LIMIT, list).await;
                    answer.map_err(|_| Status::deadline_exceeded(""))?.map(Response::into_inner)
                }
            });
            // A node that does not answer has its tasks missing; the list says which node each is of.
            let lists: Vec<Result<ListTasksResponse, Status>> =
                futures::future::join_all(lists).await;
            tasks.extend(lists.into_iter().flatten().flat_map(|list| list.tasks));
        }
        tasks.sort_by_key(|task| std::cmp::Reverse(task.started_unix_ms));
        tasks.truncate(limit);
        Ok(Response::new(ListTasksResponse { tasks }))
    }

    async fn get(&self, request: Request<GetTaskRequest>) -> Result<Response<Task>, Status> {
        let (node, caller) = (self.node()?, Caller::of(&request)?);
        let message = request.into_inner();
        if let Some((of, channel)) = home(&node, &message.task_id)? {
            let answer = TasksClient::new(channel).get(caller.request(message)?).await;
            return answer.map_err(|status| unreachable(&node, of, &status));
        }
        let task = node.tasks.get(&message.task_id);
        task.map(Response::new).ok_or_else(|| unknown(&message.task_id))
    }

    type FollowStream = Answers<TaskUpdate>;

    async fn follow(
        &self,
        request: Request<GetTaskRequest>,
    ) -> Result<Response<Self::FollowStream>, Status> {
        let (node, caller) = (self.node()?, Caller::of(&request)?);
        let message = request.into_inner();
        if let Some((of, channel)) = home(&node, &message.task_id)? {
            let answer = TasksClient::new(channel).follow(caller.request(message)?).await;
            let updates = answer.map_err(|status| unreachable(&node, of, &status))?.into_inner();
            return Ok(Response::new(relayed(&node, of, updates)));
        }
        let updates = node.tasks.follow(&message.task_id);
        let updates = updates.ok_or_else(|| unknown(&message.task_id))?;
        Ok(Response::new(updates.map(Ok).boxed()))
    }

    async fn cancel(&self, request: Request<GetTaskRequest>) -> Result<Response<Task>, Status> {
        let (node, caller) = (self.node()?, Caller::of(&request)?);
        let message = request.into_inner();
        let home = home(&node, &message.task_id)?;
        if caller.role < Role::Admin {
            may_cancel(&caller, &kind_of(&node, &caller, home.as_ref(), &message).await?)?;
        }
        if let Some((of, channel)) = home {
            let answer = TasksClient::new(channel).cancel(caller.request(message)?).await;
            return answer.map_err(|status| unreachable(&node, of, &status));
        }
        tracing::info!(task = %message.task_id, user = %caller.user, "asked to cancel");
        let task = node.tasks.cancel(&message.task_id);
        task.map(Response::new).ok_or_else(|| unknown(&message.task_id))
    }
}
