//! The target's end of a live migration: receives the VM, and waits for the agent to run it.

use std::net::TcpListener;
use std::sync::Arc;
use std::sync::mpsc::sync_channel;
use std::time::Duration;

use vmm_core::machine::Machine;
use vmm_core::memory::GuestMemory;
use vmm_core::migrate::tls::{Fingerprint, Identity, TlsAcceptor};
use vmm_core::migrate::{
    IncomingVm, Outcome, StreamError, Subject, TargetOptions, VmError, receive,
};

use super::control::{Control, Phase, chain};
use super::exit::ExitRecord;

/// How long the source's word about the commit is waited for. A hint only: what counts is what the
/// agent reads.
const OUTCOME_LIMIT: Duration = Duration::from_secs(60);

/// The machine, as it is filled. It stays with the process.
struct Receiving(Arc<Machine>);

impl IncomingVm for Receiving {
    fn memory(&self) -> &GuestMemory {
        self.0.memory()
    }

    fn restore_state(&mut self, state: &[u8]) -> Result<(), VmError> {
        Ok(self.0.restore_state(state)?)
    }
}

/// Starts to receive. The process ends by itself if the VM does not come, or is given up.
pub(super) fn begin(
    control: &Arc<Control>,
    listener: TcpListener,
    identity: &Identity,
    source: Fingerprint,
    migration_id: &str,
) -> Result<(), StreamError> {
    let acceptor = TlsAcceptor::new(listener, identity, source)?;
    let subject = Subject {
        migration_id: migration_id.to_owned(),
        vm_id: control.vm_id,
        vm_name: control.name.to_string(),
        generation: control.state().generation,
    };
    let mut options = TargetOptions::new(subject);
    options.pagemap = control.pagemap.clone();
    let control = Arc::clone(control);
    let thread = std::thread::Builder::new().name("migrate-in".into());
    thread
        .spawn(move || run(&control, acceptor, &options))
        .map_err(|source| StreamError::Io { doing: "starting to receive", source })?;
    Ok(())
}

fn run(control: &Arc<Control>, mut acceptor: TlsAcceptor, options: &TargetOptions) {
    let machine = Receiving(Arc::clone(&control.machine));
    let mut ready = match receive(machine, &mut acceptor, options) {
        Ok(ready) => ready,
        Err(error) => control.end(&ExitRecord::IncomingAborted(chain(&error))),
    };
    tracing::info!(rounds = ready.rounds, pages = ready.pages, "received; waiting for the commit");
    let (running, runs) = sync_channel(1);
    let id = options.subject.migration_id.clone();
    if !control.set_phase(Phase::IncomingComplete { id, running }) {
        return;
    }
    match ready.wait_outcome(OUTCOME_LIMIT) {
        Outcome::Committed | Outcome::Unknown => {}
        Outcome::Abandoned(reason) => {
            let waits = matches!(control.state().phase, Phase::IncomingComplete { .. });
            if waits {
                control.end(&ExitRecord::IncomingAborted(reason));
            }
        }
    }
    // Ends when the agent runs the VM, and with the process otherwise.
    if runs.recv().is_ok() {
        ready.announce_running();
    }
}
