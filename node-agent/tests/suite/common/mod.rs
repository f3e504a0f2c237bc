//! Real VM processes for the tests: the built `node-agent vm`, a tiny guest, temporary folders.

#![allow(dead_code, reason = "each test file uses a part of it")]

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use iced_x86::code_asm::{CodeAssembler, al, ax, bx, byte_ptr, cx, ds, dx, si};
use node_agent::supervisor::{BootFiles, DiskFile, Launch, Supervisor, SupervisorConfig, VmExited};
use proto::{BootSpec, ByteSize, CpuModel, Generation, HaSpec, Name, VmId, VmSpec};
use tokio::sync::mpsc::UnboundedReceiver;

/// Longer than anything here takes on a slow machine.
pub(crate) const LIMIT: Duration = Duration::from_secs(60);

/// Says why a test cannot run here, if so.
pub(crate) fn lacks_kvm_or_root() -> bool {
    let reason = if !nix::unistd::geteuid().is_root() {
        "needs root: VM processes get users of their own"
    } else if !Path::new("/dev/kvm").exists() {
        "needs /dev/kvm"
    } else {
        return false;
    };
    crate::skip::this_test(reason);
    true
}

/// A node: a run folder and its supervisor.
pub(crate) struct Node {
    pub(crate) folder: tempfile::TempDir,
    pub(crate) supervisor: Supervisor,
    pub(crate) exits: UnboundedReceiver<VmExited>,
}

impl Node {
    pub(crate) fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let config = config(folder.path());
        Self::with(folder, config)
    }

    pub(crate) fn with(folder: tempfile::TempDir, config: SupervisorConfig) -> Self {
        let (supervisor, exits) = Supervisor::new(config).unwrap();
        Self { folder, supervisor, exits }
    }

    pub(crate) async fn exit(&mut self) -> VmExited {
        tokio::time::timeout(LIMIT, self.exits.recv()).await.unwrap().unwrap()
    }

    pub(crate) fn console(&self, name: &Name) -> String {
        let log = fs::read(self.supervisor.console_log(name)).unwrap_or_default();
        String::from_utf8_lossy(&log).into_owned()
    }

    /// Waits until the guest has printed this many bytes.
    pub(crate) async fn printed(&self, name: &Name, bytes: usize) -> String {
        let what = format!("{bytes} bytes on the console");
        wait_for(&what, || Some(self.console(name)).filter(|text| text.len() >= bytes)).await
    }
}

impl Drop for Node {
    /// Nothing is left behind, also by a test that failed.
    fn drop(&mut self) {
        for vm in self.supervisor.running() {
            let pid = i32::try_from(vm.pid).unwrap();
            let _ = nix::sys::signal::kill(
                nix::unistd::Pid::from_raw(pid),
                nix::sys::signal::Signal::SIGKILL,
            );
        }
    }
}

pub(crate) fn config(folder: &Path) -> SupervisorConfig {
    let mut config = SupervisorConfig::new(folder);
    config.binary = PathBuf::from(env!("CARGO_BIN_EXE_node-agent"));
    config.start_timeout = LIMIT;
    config
}

/// Waits for a condition, with a limit.
pub(crate) async fn wait_for<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let begin = Instant::now();
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(begin.elapsed() < LIMIT, "waited too long for {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

pub(crate) fn name(text: &str) -> Name {
    text.parse().unwrap()
}

/// A VM that prints `a` to `z` over and over, and writes to a page of its memory with each letter.
pub(crate) fn launch(folder: &Path, vm: &str) -> Launch {
    let firmware = folder.join("ticker.bin");
    fs::write(&firmware, ticker()).unwrap();
    Launch {
        name: name(vm),
        vm_id: VmId(uuid::Uuid::new_v4()),
        generation: Generation(1),
        ha: false,
        spec: VmSpec {
            name: name(vm),
            cpus: 1,
            memory: ByteSize(64 << 20),
            cpu: CpuModel::Host,
            boot: BootSpec {
                kernel: None,
                initrd: None,
                cmdline: String::new(),
                firmware: Some("test/ticker.bin".into()),
            },
            disks: Vec::new(),
            nics: Vec::new(),
            ha: HaSpec::default(),
        },
        boot: BootFiles { firmware: Some(firmware), ..BootFiles::default() },
        disks: Vec::new(),
        nics: Vec::new(),
        cpuid: Vec::new(),
        deadline_ns: None,
        incoming: None,
    }
}

pub(crate) fn disk(folder: &Path, file: &str) -> DiskFile {
    let path = folder.join(file);
    if !path.exists() {
        fs::File::create(&path).unwrap().set_len(1 << 20).unwrap();
    }
    DiskFile { path, readonly: false, image: format!("test/{file}") }
}

/// The guest: real-mode firmware of 64 KiB. What is typed at it is printed in upper case.
fn ticker() -> Vec<u8> {
    const SIZE: usize = 64 << 10;
    let mut code = CodeAssembler::new(16).unwrap();
    let mut next = code.create_label();
    let mut delay = code.create_label();
    let mut quiet = code.create_label();
    code.xor(ax, ax).unwrap();
    code.mov(ds, ax).unwrap();
    code.mov(si, 0x1000_u32).unwrap();
    code.mov(bx, u32::from(b'a')).unwrap();
    code.set_label(&mut next).unwrap();
    code.mov(ax, bx).unwrap();
    code.mov(byte_ptr(si), al).unwrap();
    code.mov(dx, 0x3f8_u32).unwrap();
    code.out(dx, al).unwrap();
    // Typed input: line status register, bit 0.
    code.mov(dx, 0x3fd_u32).unwrap();
    code.in_(al, dx).unwrap();
    code.test(al, 1).unwrap();
    code.jz(quiet).unwrap();
    code.mov(dx, 0x3f8_u32).unwrap();
    code.in_(al, dx).unwrap();
    code.and(al, 0xdf_u32).unwrap();
    code.out(dx, al).unwrap();
    code.set_label(&mut quiet).unwrap();
    code.mov(cx, 2000_u32).unwrap();
    code.set_label(&mut delay).unwrap();
    code.dec(cx).unwrap();
    code.jnz(delay).unwrap();
    code.inc(bx).unwrap();
    code.cmp(bx, u32::from(b'z') + 1).unwrap();
    code.jne(next).unwrap();
    code.mov(bx, u32::from(b'a')).unwrap();
    code.jmp(next).unwrap();
    let body = code.assemble(0).unwrap();
    let mut image = vec![0xf4; SIZE];
    image[..body.len()].copy_from_slice(&body);
    // The reset vector: a near jump to the image's begin (0xfff3 + rel16 = 0x10000).
    image[SIZE - 16..SIZE - 13].copy_from_slice(&[0xe9, 0x0d, 0x00]);
    image
}

/// Whether a text is the ticker's, without a letter lost or doubled.
pub(crate) fn is_in_order(text: &str) -> bool {
    text.as_bytes().windows(2).all(|pair| match pair {
        [b'z', second] => *second == b'a',
        [first, second] => *second == first + 1,
        _ => false,
    })
}
