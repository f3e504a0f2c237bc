//! `Vms`: creating and starting go to the leader, which chooses the node; everything else to the
//! VM's owner.

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use proto::record::Phase;
use proto::v1::vms_client::VmsClient;
use proto::v1::vms_server::Vms;
use proto::v1::{
    ConsoleInput, ConsoleOutput, CreateVmRequest, CreateVmResponse, ListVmsRequest,
    ListVmsResponse, MigrateVmRequest, ShowVmRequest, ShutdownVmRequest, TaskRef, Vm, VmLogRequest,
    VmRequest,
};
use proto::{Name, NodeId};
use tokio::io::{AsyncReadExt as _, AsyncSeekExt as _};
use tonic::transport::Channel;
use tonic::{Request, Response, Status, Streaming};

use super::forward::{Caller, channel, relayed, unreachable};
use super::{Answers, Api, leader, parse_name};
use crate::node::Node;
use crate::vms;

/// How long the owner has to say whether a VM is paused, before this node answers by itself.
const SHOW_LIMIT: Duration = Duration::from_secs(2);
/// How often a followed console log is looked at.
const LOG_EVERY: Duration = Duration::from_millis(200);

/// The VM's owner, if it is not this node. The placement as applied here tells; the owner, if it
/// is not it any more, passes the request on.
async fn owner(node: &Node, vm: &Name) -> Result<Option<(NodeId, Channel)>, Status> {
    let placement = match node.board.get(vm) {
        Some(placement) => placement,
        None => node.store.placement(vm).await?.ok_or_else(|| vms::unknown_vm(vm))?,
    };
    let owner = placement.value.owner;
    if owner == node.id {
        return Ok(None);
    }
    Ok(Some((owner, channel(node, owner)?)))
}

fn task(id: String) -> Response<TaskRef> {
    Response::new(TaskRef { task_id: id })
}

/// Serves a [`VmRequest`] at the owner: here by `$local`, else by the same call over there.
macro_rules! at_owner {
    ($self:ident, $request:ident, $method:ident) => {{
        let (node, caller) = ($self.node()?, Caller::of(&$request)?);
        let message = $request.into_inner();
        let vm = parse_name(&message.vm)?;
        match owner(&node, &vm).await? {
            None => vms::$method(&node, &caller, &vm).await.map(task),
            Some((to, channel)) => {
                let answer = VmsClient::new(channel).$method(caller.request(message)?).await;
                answer.map_err(|status| unreachable(&node, to, &status))
            }
        }
    }};
}

#[tonic::async_trait]
impl Vms for Api {
    async fn create(
        &self,
        request: Request<CreateVmRequest>,
    ) -> Result<Response<CreateVmResponse>, Status> {
        let (node, caller) = (self.node()?, Caller::of(&request)?);
        let message = request.into_inner();
        let there = |channel| {
            let request = caller.request(message.clone());
            async move { VmsClient::new(channel).create(request?).await }
        };
        match leader::have_done(&node, there).await? {
            None => vms::create(&node, &caller, message).await.map(Response::new),
            Some(answer) => Ok(answer),
        }
    }

    async fn list(
        &self,
        request: Request<ListVmsRequest>,
    ) -> Result<Response<ListVmsResponse>, Status> {
        Caller::of(&request)?;
        let vms = vms::list(&*self.node()?).await?;
        Ok(Response::new(ListVmsResponse { vms }))
    }

    async fn show(&self, request: Request<ShowVmRequest>) -> Result<Response<Vm>, Status> {
        let (node, caller) = (self.node()?, Caller::of(&request)?);
        let message = request.into_inner();
        let vm = parse_name(&message.vm)?;
        if !caller.is_forwarded()
            && let Ok(Some((_, channel))) = owner(&node, &vm).await
        {
            let mut client = VmsClient::new(channel);
            let asked = client.show(caller.request(message)?);
            if let Ok(Ok(answer)) = tokio::time::timeout(SHOW_LIMIT, asked).await {
                return Ok(answer);
            }
        }
        Ok(Response::new(vms::show(&node, &vm).await?))
    }

    async fn start(&self, request: Request<VmRequest>) -> Result<Response<TaskRef>, Status> {
        let (node, caller) = (self.node()?, Caller::of(&request)?);
        let message = request.into_inner();
        let vm = parse_name(&message.vm)?;
        let there = |channel| {
            let request = caller.request(message.clone());
            async move { VmsClient::new(channel).start(request?).await }
        };
        match leader::have_done(&node, there).await? {
            None => vms::start(&node, &caller, &vm).await.map(task),
            Some(answer) => Ok(answer),
        }
    }

    async fn shutdown(
        &self,
        request: Request<ShutdownVmRequest>,
    ) -> Result<Response<TaskRef>, Status> {
        let (node, caller) = (self.node()?, Caller::of(&request)?);
        let message = request.into_inner();
        let vm = parse_name(&message.vm)?;
        if let Some((to, channel)) = owner(&node, &vm).await? {
            let answer = VmsClient::new(channel).shutdown(caller.request(message)?).await;
            return answer.map_err(|status| unreachable(&node, to, &status));
        }
        let (timeout_s, force) = (message.timeout_s, message.force);
        vms::shutdown(&node, &caller, &vm, timeout_s, force).await.map(task)
    }

    async fn stop(&self, request: Request<VmRequest>) -> Result<Response<TaskRef>, Status> {
        let node = self.node()?;
        let vm = parse_name(&request.get_ref().vm)?;
        // What runs nowhere needs no owner to be stopped: the owner may be dead.
        let nowhere = node.store.placement(&vm).await?.is_some_and(|placement| {
            matches!(
                placement.value.phase,
                Phase::Stopped | Phase::Recovering | Phase::Unplaceable | Phase::Error
            )
        });
        if nowhere {
            let caller = Caller::of(&request)?;
            return vms::stop(&node, &caller, &vm).await.map(task);
        }
        at_owner!(self, request, stop)
    }

    async fn reset(&self, request: Request<VmRequest>) -> Result<Response<TaskRef>, Status> {
        at_owner!(self, request, reset)
    }

    async fn pause(&self, request: Request<VmRequest>) -> Result<Response<TaskRef>, Status> {
        at_owner!(self, request, pause)
    }

    async fn resume(&self, request: Request<VmRequest>) -> Result<Response<TaskRef>, Status> {
        at_owner!(self, request, resume)
    }

    async fn migrate(
        &self,
        request: Request<MigrateVmRequest>,
    ) -> Result<Response<TaskRef>, Status> {
        let (node, caller) = (self.node()?, Caller::of(&request)?);
        let message = request.into_inner();
        let vm = parse_name(&message.vm)?;
        match owner(&node, &vm).await? {
            None => vms::migrate(&node, &caller, &vm, message).await.map(task),
            Some((to, channel)) => {
                let answer = VmsClient::new(channel).migrate(caller.request(message)?).await;
                answer.map_err(|status| unreachable(&node, to, &status))
            }
        }
    }

    async fn delete(&self, request: Request<VmRequest>) -> Result<Response<TaskRef>, Status> {
        let (node, caller) = (self.node()?, Caller::of(&request)?);
        let vm = parse_name(&request.into_inner().vm)?;
        vms::delete(&node, &caller, &vm).await.map(task)
    }

    type ConsoleStream = Answers<ConsoleOutput>;

    async fn console(
        &self,
        request: Request<Streaming<ConsoleInput>>,
    ) -> Result<Response<Self::ConsoleStream>, Status> {
        let (node, caller) = (self.node()?, Caller::of(&request)?);
        let mut input = request.into_inner();
        let first = input.message().await?;
        let first = first.ok_or_else(|| Status::invalid_argument("no VM is named"))?;
        let vm = parse_name(&first.vm)?;
        // A broken input ends the session as a closed one does.
        let rest = input.take_while(|message| futures::future::ready(message.is_ok()));
        let rest = rest.filter_map(|message| futures::future::ready(message.ok()));
        if let Some((to, channel)) = owner(&node, &vm).await? {
            let messages = futures::stream::iter([first]).chain(rest);
            let answer = VmsClient::new(channel).console(caller.request(messages)?).await;
            let answer = answer.map_err(|status| unreachable(&node, to, &status))?;
            return Ok(Response::new(relayed(&node, to, answer.into_inner())));
        }
        let bytes = futures::stream::iter([first]).chain(rest).map(|message| message.data);
        let bytes = bytes.filter(|data| futures::future::ready(!data.is_empty()));
        let output = node.supervisor.console(&vm, bytes).await;
        let output = output.map_err(|error| Status::failed_precondition(error.to_string()))?;
        Ok(Response::new(output.boxed()))
    }

    type LogStream = Answers<ConsoleOutput>;

    async fn log(
        &self,
        request: Request<VmLogRequest>,
    ) -> Result<Response<Self::LogStream>, Status> {
        let (node, caller) = (self.node()?, Caller::of(&request)?);
        let message = request.into_inner();
        let vm = parse_name(&message.vm)?;
        if let Some((to, channel)) = owner(&node, &vm).await? {
            let answer = VmsClient::new(channel).log(caller.request(message)?).await;
            let answer = answer.map_err(|status| unreachable(&node, to, &status))?;
            return Ok(Response::new(relayed(&node, to, answer.into_inner())));
        }
        Ok(Response::new(follow_log(&node, &vm, message).await?))
    }
}

struct LogReader {
    node: Arc<Node>,
    vm: Name,
    file: tokio::fs::File,
    follow: bool,
}

impl LogReader {
    /// The next piece of the log; `None` at its end, or when the VM is gone.
    async fn next(&mut self) -> std::io::Result<Option<Vec<u8>>> {
        let mut buffer = vec![0; 16 << 10];
        loop {
            let length = self.file.read(&mut buffer).await?;
            if length > 0 {
                buffer.truncate(length);
                return Ok(Some(buffer));
            }
            if !self.follow || !self.node.supervisor.is_busy(&self.vm) {
                return Ok(None);
            }
            tokio::time::sleep(LOG_EVERY).await;
        }
    }
}

async fn follow_log(
    node: &Arc<Node>,
    vm: &Name,
    request: VmLogRequest,
) -> Result<Answers<ConsoleOutput>, Status> {
    let path = node.supervisor.console_log(vm);
    let file = tokio::fs::File::open(&path).await;
    let mut file = match file {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Err(Status::not_found(format!(
                "VM `{vm}` has no console log on {}",
                node.name()
            )));
        }
        Err(error) => return Err(log_failed(&error)),
    };
    let length = file.metadata().await.map_err(|error| log_failed(&error))?.len();
    if request.tail_bytes > 0 {
        let from = length.saturating_sub(u64::from(request.tail_bytes));
        let sought = file.seek(std::io::SeekFrom::Start(from)).await;
        sought.map_err(|error| log_failed(&error))?;
    }
    let reader = LogReader { node: node.clone(), vm: vm.clone(), file, follow: request.follow };
    let pieces = futures::stream::unfold(Some(reader), |reader| async move {
        let mut reader = reader?;
        match reader.next().await {
            Ok(Some(data)) => Some((Ok(ConsoleOutput { data }), Some(reader))),
            Ok(None) => None,
            Err(error) => Some((Err(log_failed(&error)), None)),
        }
    });
    Ok(pieces.boxed())
}

fn log_failed(error: &std::io::Error) -> Status {
    Status::internal(format!("cannot read the console log: {error}"))
}
