//! The process of one VM: `node-agent vm --launch FILE`.
//!
//! ```text
//!  root, one thread        ProcessLaunch ─► open all ─► jail ─► seccomp
//!  own user, no rights     deadline thread │ gRPC on the control socket │ vmm-core's threads
//! ```
//!
//! Owns one `vmm_core` machine and nothing else. Knows no cluster: its agent tells it what to do,
//! and it ends by itself when its deadline passes.
//!
//! Invariants: nothing of the guest runs before the jail is closed; after the deadline no vCPU
//! runs and no disk is written; after a committed migration it never resumes.

mod announce;
mod console;
mod control;
mod deadline;
mod exit;
mod incoming;
mod launch;
mod log;
mod outgoing;
mod service;
mod setup;
mod startup;

use std::error::Error;
use std::net::SocketAddr;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use proto::v1::vm_process_server::VmProcessServer;
use tokio_stream::wrappers::UnixListenerStream;
use vmm_core::migrate::tls::{Fingerprint, Identity};

use crate::jail;
use control::{Control, Parts};
use setup::Opened;
use startup::StartupChannel;

pub use exit::ExitRecord;
pub use launch::{ProcessLaunch, Startup};

type BoxError = Box<dyn Error + Send + Sync>;

/// Runs the VM of a launch file. Called before any thread is made.
#[must_use]
pub fn main(launch_file: &Path) -> ExitCode {
    let startup = match StartupChannel::take() {
        Ok(startup) => startup,
        Err(error) => {
            eprintln!("node-agent vm: {error}");
            return ExitCode::FAILURE;
        }
    };
    log::install();
    match start(launch_file, &startup) {
        Ok(started) => started.serve(startup),
        Err(error) => {
            let reason = control::chain(error.as_ref());
            tracing::error!(reason, "not started");
            startup.failed(reason);
            ExitCode::FAILURE
        }
    }
}

struct Started {
    control: Arc<Control>,
    listener: UnixListener,
    runtime: tokio::runtime::Runtime,
    /// Where it receives, and as whom.
    receiving: Option<(SocketAddr, String)>,
}

fn start(launch_file: &Path, startup: &StartupChannel) -> Result<Started, BoxError> {
    // A session of its own: no terminal and no group signal of the agent's reaches it.
    nix::unistd::setsid()?;
    startup.wait_for_go()?;
    let text = std::fs::read(launch_file)?;
    let process: ProcessLaunch = serde_json::from_slice(&text)?;
    if let Some(cgroup) = &process.cgroup {
        // A host whose cgroups are laid out otherwise may refuse; the VM then runs without limits.
        if let Err(error) = jail::cgroup::join(cgroup) {
            tracing::warn!(cgroup = %cgroup.display(), %error, "not joined");
        }
    }
    jail::enter_namespaces()?;
    let opened = setup::open(&process)?;
    jail::drop_privileges(&opened.root, process.uid)?;
    jail::seccomp::install()?;
    run(&process, opened)
}

/// In the jail: threads, then the guest.
fn run(process: &ProcessLaunch, opened: Opened) -> Result<Started, BoxError> {
    let launch = &process.launch;
    let Opened { machine, events, gate, announcer, pagemap, exit_file, .. } = opened;
    let control = Arc::new(Control::new(Parts {
        name: launch.name.clone(),
        vm_id: launch.vm_id,
        generation: launch.generation,
        ha: launch.ha,
        machine,
        gate: gate.clone(),
        pagemap,
        announcer,
        exit_file,
        incoming: launch.incoming.is_some(),
    }));
    let bound = Arc::clone(&control);
    deadline::watch(gate, opened.deadlines, move || bound.end(&ExitRecord::Lease))?;
    let eventful = Arc::clone(&control);
    std::thread::Builder::new().name("events".into()).spawn(move || {
        for event in events {
            eventful.handle_event(event);
        }
    })?;
    opened.control.set_nonblocking(true)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let receiving = match (&launch.incoming, opened.migration) {
        (Some(incoming), Some(listener)) => {
            let identity = Identity::generate()?;
            let source: Fingerprint = incoming.source_fingerprint.parse()?;
            let address = listener.local_addr()?;
            incoming::begin(&control, listener, &identity, source, &incoming.migration_id)?;
            Some((address, identity.fingerprint().to_string()))
        }
        _ => {
            control.boot()?;
            None
        }
    };
    Ok(Started { control, listener: opened.control, runtime, receiving })
}

impl Started {
    fn serve(self, startup: StartupChannel) -> ExitCode {
        let Self { control, listener, runtime, receiving } = self;
        let (address, fingerprint) = receiving.unzip();
        let served = runtime.block_on(async {
            let listener = tokio::net::UnixListener::from_std(listener)?;
            startup.ready(address, fingerprint);
            let service = VmProcessServer::new(service::Service(Arc::clone(&control)));
            tonic::transport::Server::builder()
                .add_service(service)
                .serve_with_incoming(UnixListenerStream::new(listener))
                .await?;
            Ok::<(), BoxError>(())
        });
        // A VM that nobody can command any more must not run on.
        let reason = served.err().map_or_else(|| "it ended".to_owned(), |error| error.to_string());
        control.end(&ExitRecord::Error(format!("the control socket: {reason}")))
    }
}
