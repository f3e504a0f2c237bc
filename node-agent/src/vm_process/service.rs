//! The control socket: gRPC, for this VM's agent only. Everything that may block runs on a
//! blocking thread.

use std::pin::Pin;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use futures::Stream;
use proto::Generation;
use proto::v1::vm_process_server::VmProcess;
use proto::v1::{
    ConsoleInput, ConsoleOutput, MigrateOutEvent, MigrateOutRequest, MigrationIdentityResponse,
    RenewDeadlineRequest, ResolveCommitRequest, RunIncomingRequest, VmProcessEmpty,
    VmProcessStatus, VmProcessStatusRequest,
};
use tokio_stream::wrappers::{ReceiverStream, UnboundedReceiverStream};
use tonic::{Request, Response, Status, Streaming};
use vmm_core::migrate::tls::Identity;

use super::control::{Control, Phase, internal};
use super::exit::ExitRecord;
use super::{console, deadline, outgoing};

/// The answer to a stop is given this long to get out before the process ends.
const FAREWELL: Duration = Duration::from_millis(50);

type Answer = Result<Response<VmProcessEmpty>, Status>;

#[derive(Debug)]
pub(super) struct Service(pub(super) Arc<Control>);

impl Service {
    async fn blocking<T: Send + 'static>(
        &self,
        action: impl FnOnce(&Arc<Control>) -> Result<T, Status> + Send + 'static,
    ) -> Result<T, Status> {
        let control = Arc::clone(&self.0);
        let done = tokio::task::spawn_blocking(move || action(&control)).await;
        done.map_err(|error| internal(&error))?
    }

    async fn act(
        &self,
        action: impl FnOnce(&Arc<Control>) -> Result<(), Status> + Send + 'static,
    ) -> Answer {
        self.blocking(action).await?;
        Ok(Response::new(VmProcessEmpty {}))
    }
}

#[tonic::async_trait]
impl VmProcess for Service {
    async fn status(
        &self,
        _: Request<VmProcessStatusRequest>,
    ) -> Result<Response<VmProcessStatus>, Status> {
        // Off this thread too: a change under way holds the state for a moment.
        Ok(Response::new(self.blocking(|control| Ok(control.status())).await?))
    }

    async fn pause(&self, _: Request<VmProcessEmpty>) -> Answer {
        self.act(|control| control.pause()).await
    }

    async fn resume(&self, _: Request<VmProcessEmpty>) -> Answer {
        self.act(|control| control.resume()).await
    }

    async fn reset(&self, _: Request<VmProcessEmpty>) -> Answer {
        self.act(|control| control.reset()).await
    }

    async fn power_button(&self, _: Request<VmProcessEmpty>) -> Answer {
        self.act(|control| control.press_power_button()).await
    }

    async fn stop(&self, _: Request<VmProcessEmpty>) -> Answer {
        let quiet = self.act(|control| control.quiesce()).await?;
        let control = Arc::clone(&self.0);
        tokio::task::spawn_blocking(move || {
            std::thread::sleep(FAREWELL);
            control.end(&ExitRecord::Stop)
        });
        Ok(quiet)
    }

    type ConsoleStream = ReceiverStream<Result<ConsoleOutput, Status>>;

    async fn console(
        &self,
        request: Request<Streaming<ConsoleInput>>,
    ) -> Result<Response<Self::ConsoleStream>, Status> {
        let output = console::attach(self.0.machine.serial().clone(), request.into_inner());
        Ok(Response::new(ReceiverStream::new(output)))
    }

    async fn renew_deadline(&self, request: Request<RenewDeadlineRequest>) -> Answer {
        if deadline::renew(&self.0.gate, request.into_inner().deadline_ns) {
            return Ok(Response::new(VmProcessEmpty {}));
        }
        Err(Status::failed_precondition("the deadline has passed"))
    }

    type MigrateOutStream = Pin<Box<dyn Stream<Item = Result<MigrateOutEvent, Status>> + Send>>;

    async fn migrate_out(
        &self,
        request: Request<MigrateOutRequest>,
    ) -> Result<Response<Self::MigrateOutStream>, Status> {
        let request = request.into_inner();
        let events = self.blocking(|control| outgoing::begin(control, request)).await?;
        Ok(Response::new(Box::pin(UnboundedReceiverStream::new(events))))
    }

    async fn resolve_commit(&self, request: Request<ResolveCommitRequest>) -> Answer {
        let ResolveCommitRequest { migration_id, committed } = request.into_inner();
        self.act(move |control| control.resolve_commit(&migration_id, committed)).await
    }

    async fn cancel_migration(&self, _: Request<VmProcessEmpty>) -> Answer {
        self.act(|control| match &control.state().phase {
            Phase::MovingOut { cancel, .. } if cancel.cancel() => Ok(()),
            Phase::MovingOut { .. } | Phase::AwaitingCommit { .. } => {
                Err(Status::failed_precondition("its migration is being committed"))
            }
            _ => Err(Status::failed_precondition("it is not being migrated")),
        })
        .await
    }

    async fn run_incoming(&self, request: Request<RunIncomingRequest>) -> Answer {
        let RunIncomingRequest { migration_id, generation, deadline_ns } = request.into_inner();
        self.act(move |control| {
            control.run_incoming(&migration_id, Generation(generation), deadline_ns)
        })
        .await
    }

    async fn migration_identity(
        &self,
        _: Request<VmProcessEmpty>,
    ) -> Result<Response<MigrationIdentityResponse>, Status> {
        let fingerprint = self.blocking(|control| {
            let identity = Identity::generate().map_err(|error| internal(&error))?;
            let fingerprint = identity.fingerprint().to_string();
            let mut kept = control.identity.lock().unwrap_or_else(PoisonError::into_inner);
            *kept = Some(identity);
            Ok(fingerprint)
        });
        Ok(Response::new(MigrationIdentityResponse { fingerprint: fingerprint.await? }))
    }
}
