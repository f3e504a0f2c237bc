//! The run loop of a vCPU's thread.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use kvm_ioctls::{VcpuExit, VcpuFd};

use super::control::{Goal, KickTarget, VcpuControl, install_kick_handler};
use crate::bus::Bus;
use crate::gate::WriteGate;
use crate::legacy::Notify;
use crate::machine::{MachineEvent, ResetCause};

/// Where a vCPU's port and memory accesses go.
#[derive(Debug, Clone)]
pub struct Buses {
    /// Port I/O.
    pub port: Arc<Bus>,
    /// Memory-mapped I/O.
    pub memory: Arc<Bus>,
}

/// All that a vCPU's thread needs.
pub struct VcpuContext {
    /// Which vCPU.
    pub index: u8,
    /// KVM's vCPU. The thread holds the lock while it is in the guest.
    pub vcpu: Arc<Mutex<VcpuFd>>,
    /// Buses.
    pub buses: Buses,
    /// Commands.
    pub control: VcpuControl,
    /// Until when the guest may be entered.
    pub gate: WriteGate,
    /// Where events go; it also stops all vCPUs.
    pub notify: Notify,
    /// Whether the deadline's event was sent already; shared by all vCPUs.
    pub deadline_reported: Arc<AtomicBool>,
}

impl std::fmt::Debug for VcpuContext {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VcpuContext").field("index", &self.index).finish_non_exhaustive()
    }
}

/// What an exit from the guest means for the loop.
enum After {
    Enter,
    /// A signal, or `immediate_exit`: nothing is pending.
    Interrupted,
    Stop(MachineEvent),
}

/// Starts the thread of a vCPU; it waits until the control says run.
///
/// # Errors
/// What the operating system says.
pub fn spawn(context: VcpuContext) -> io::Result<JoinHandle<()>> {
    install_kick_handler();
    let name = format!("vcpu{}", context.index);
    std::thread::Builder::new().name(name).spawn(move || context.thread())
}

impl VcpuContext {
    fn thread(self) {
        self.control.register_this_thread();
        while self.control.park() {
            let vcpu = Arc::clone(&self.vcpu);
            let mut vcpu = vcpu.lock().unwrap_or_else(PoisonError::into_inner);
            let immediate_exit = &raw mut vcpu.get_kvm_run().immediate_exit;
            // SAFETY: the byte is in the kvm_run page that `vcpu` maps; the lock on it is held for
            // longer than the target lives.
            let target = unsafe { KickTarget::new(immediate_exit) };
            self.run(&mut vcpu);
            drop(target);
        }
    }

    /// Runs the guest until the control says otherwise or something happened.
    fn run(&self, vcpu: &mut VcpuFd) {
        loop {
            self.control.count_round(self.index);
            vcpu.set_kvm_immediate_exit(0);
            if self.control.goal() != Goal::Running {
                break;
            }
            if let Err(refused) = self.gate.check() {
                self.report_deadline(&refused.to_string());
                continue;
            }
            match self.enter(vcpu) {
                After::Enter | After::Interrupted => {}
                After::Stop(event) => {
                    (self.notify)(event);
                    self.control.request_pause();
                }
            }
        }
        self.complete_io(vcpu);
    }

    fn report_deadline(&self, reason: &str) {
        if !self.deadline_reported.swap(true, Ordering::SeqCst) {
            tracing::error!(reason, "the guest is stopped");
            (self.notify)(MachineEvent::DeadlinePassed);
        }
        self.control.request_pause();
    }

    /// An access that left the guest is finished by the next KVM_RUN: without that, registers and
    /// memory do not yet show its result. Nothing of the guest runs here.
    fn complete_io(&self, vcpu: &mut VcpuFd) {
        loop {
            vcpu.set_kvm_immediate_exit(1);
            match self.enter(vcpu) {
                After::Enter => {}
                After::Interrupted => break,
                After::Stop(event) => {
                    (self.notify)(event);
                    break;
                }
            }
        }
        vcpu.set_kvm_immediate_exit(0);
    }

    fn enter(&self, vcpu: &mut VcpuFd) -> After {
        let exit = match vcpu.run() {
            Ok(exit) => exit,
            Err(error) => return self.failed(vcpu, io::Error::from(error)),
        };
        match exit {
            VcpuExit::MmioRead(address, data) => self.buses.memory.read(address, data),
            VcpuExit::MmioWrite(address, data) => self.buses.memory.write(address, data),
            VcpuExit::IoIn(port, data) => {
                let (pointer, length) = (data.as_mut_ptr(), data.len());
                let size = io_size(vcpu);
                // SAFETY: the slice lies in the kvm_run mapping of `vcpu`, which is borrowed
                // mutably for this whole function; nothing else touches it meanwhile.
                let data = unsafe { std::slice::from_raw_parts_mut(pointer, length) };
                for element in data.chunks_mut(size) {
                    self.buses.port.read(u64::from(port), element);
                }
            }
            VcpuExit::IoOut(port, data) => {
                let (pointer, length) = (data.as_ptr(), data.len());
                let size = io_size(vcpu);
                // SAFETY: as for reads.
                let data = unsafe { std::slice::from_raw_parts(pointer, length) };
                for element in data.chunks(size) {
                    self.buses.port.write(u64::from(port), element);
                }
            }
            VcpuExit::Shutdown => {
                return After::Stop(MachineEvent::Reset(ResetCause::TripleFault));
            }
            VcpuExit::Intr => return After::Interrupted,
            VcpuExit::IrqWindowOpen | VcpuExit::Hlt | VcpuExit::Nmi | VcpuExit::IoapicEoi(_) => {}
            VcpuExit::InternalError => return self.crashed(vcpu, &internal_error),
            VcpuExit::FailEntry(reason, cpu) => {
                let text = format!(
                    "the processor refused to enter the guest (reason {reason:#x}, host CPU {cpu})"
                );
                return self.crashed(vcpu, &|_| text.clone());
            }
            other => {
                let text =
                    format!("KVM left the guest for a reason this VMM does not know: {other:?}");
                return self.crashed(vcpu, &|_| text.clone());
            }
        }
        After::Enter
    }

    fn failed(&self, vcpu: &mut VcpuFd, error: io::Error) -> After {
        match error.raw_os_error() {
            Some(libc::EINTR) => After::Interrupted,
            // A vCPU that waits to be started by another (SIPI) says so once in a while.
            Some(libc::EAGAIN) if self.control.goal() != Goal::Running => After::Interrupted,
            Some(libc::EAGAIN) => After::Enter,
            _ => self.crashed(vcpu, &|_| format!("KVM_RUN failed: {error}")),
        }
    }

    fn crashed(&self, vcpu: &mut VcpuFd, what: &dyn Fn(&mut VcpuFd) -> String) -> After {
        let what = what(vcpu);
        let place = match (vcpu.get_regs(), vcpu.get_sregs()) {
            (Ok(regs), Ok(sregs)) => format!(
                "rip {:#x}, cs base {:#x}, cr0 {:#x}, cr3 {:#x}, rflags {:#x}",
                regs.rip, sregs.cs.base, sregs.cr0, sregs.cr3, regs.rflags
            ),
            _ => "its registers cannot be read".to_owned(),
        };
        let reason = format!("vCPU {}: {what}; {place}", self.index);
        After::Stop(MachineEvent::Crashed { reason })
    }
}

/// Bytes of one element of the port access that `vcpu` just left the guest for.
fn io_size(vcpu: &mut VcpuFd) -> usize {
    // SAFETY: called right after KVM_EXIT_IO, so this is the member of the union that KVM filled.
    let size = unsafe { vcpu.get_kvm_run().__bindgen_anon_1.io.size };
    usize::from(size).max(1)
}

fn internal_error(vcpu: &mut VcpuFd) -> String {
    // SAFETY: called right after KVM_EXIT_INTERNAL_ERROR, so this is the member that KVM filled.
    let internal = unsafe { vcpu.get_kvm_run().__bindgen_anon_1.internal };
    let meaning = match internal.suberror {
        1 => "an instruction could not be emulated",
        2 => "unexpected events while an exception was delivered",
        3 => "unexpected exit while an event was delivered",
        4 => "unexpected exit reason",
        _ => "unknown",
    };
    let count = usize::try_from(internal.ndata).unwrap_or(0).min(internal.data.len());
    format!(
        "KVM internal error {} ({meaning}), data {:x?}",
        internal.suberror,
        &internal.data[..count]
    )
}
