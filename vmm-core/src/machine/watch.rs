//! Gets vCPUs out of the guest when the deadline passes while they are in it.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use super::MachineEvent;
use crate::gate::WriteGate;
use crate::legacy::Notify;
use crate::vcpu::VcpuControl;

/// How often the gate is looked at: bounds how long a vCPU computes on after the deadline. Its disk
/// writes are refused from the deadline on.
const PERIOD: Duration = Duration::from_millis(50);

#[derive(Debug)]
pub(super) struct DeadlineWatch {
    stopped: Arc<(Mutex<bool>, Condvar)>,
    thread: Option<JoinHandle<()>>,
}

impl DeadlineWatch {
    pub(super) fn start(
        gate: WriteGate,
        control: VcpuControl,
        notify: Notify,
        reported: Arc<AtomicBool>,
    ) -> io::Result<Self> {
        let stopped = Arc::new((Mutex::new(false), Condvar::new()));
        let flag = Arc::clone(&stopped);
        let thread = std::thread::Builder::new().name("deadline".to_owned()).spawn(move || {
            while !wait(&flag) {
                if control.is_running() && gate.check().is_err() {
                    if !reported.swap(true, Ordering::SeqCst) {
                        notify(MachineEvent::DeadlinePassed);
                    }
                    control.request_pause();
                }
            }
        })?;
        Ok(Self { stopped, thread: Some(thread) })
    }

    pub(super) fn stop(&mut self) {
        *self.stopped.0.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.stopped.1.notify_all();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Waits one period; true if it shall end.
fn wait(stopped: &(Mutex<bool>, Condvar)) -> bool {
    let guard = stopped.0.lock().unwrap_or_else(PoisonError::into_inner);
    let waited = stopped.1.wait_timeout_while(guard, PERIOD, |stopped| !*stopped);
    *waited.unwrap_or_else(PoisonError::into_inner).0
}
