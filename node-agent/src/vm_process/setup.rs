//! Opening all that a VM needs, while the process may still open things.

use std::error::Error;
use std::fs::{self, File, OpenOptions};
use std::net::TcpListener;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::Receiver;

use kvm_ioctls::Kvm;
use proto::CpuModel;
use vmm_core::boot::BootSource;
use vmm_core::cpuid::{CpuidEntry, CpuidList, CpuidPolicy};
use vmm_core::gate::{NO_DEADLINE, WriteGate};
use vmm_core::legacy::log_ring::LogFile;
use vmm_core::machine::{Machine, MachineConfig, MachineEvent};
use vmm_core::migrate::Pagemap;
use vmm_core::virtio::{BlockConfig, DeviceEvent, EventSink, Image, NetConfig, Tap};

use super::announce::Announcer;
use super::launch::ProcessLaunch;
use crate::network;
use crate::supervisor::{CpuidLeaf, Files, Launch};

/// The console's log on disk is cut at this size.
const CONSOLE_LOG_BYTES: u64 = 8 << 20;

type BoxError = Box<dyn Error + Send + Sync>;

/// Everything that is open when the jail closes.
pub(super) struct Opened {
    pub(super) machine: Arc<Machine>,
    pub(super) events: Receiver<MachineEvent>,
    pub(super) gate: WriteGate,
    pub(super) announcer: Announcer,
    pub(super) pagemap: Option<Arc<Pagemap>>,
    pub(super) control: UnixListener,
    pub(super) deadlines: UnixDatagram,
    pub(super) exit_file: File,
    pub(super) migration: Option<TcpListener>,
    /// An empty folder: the process's root from now on.
    pub(super) root: PathBuf,
}

/// Opens it all, and makes the machine.
pub(super) fn open(process: &ProcessLaunch) -> Result<Opened, BoxError> {
    let launch = &process.launch;
    let files = Files::at(&process.folder);
    let exit_file = create(&files.exit_record())?;
    let control =
        UnixListener::bind(files.control_socket()).map_err(at(&files.control_socket()))?;
    let deadlines =
        UnixDatagram::bind(files.deadline_socket()).map_err(at(&files.deadline_socket()))?;
    let migration = match &launch.incoming {
        Some(incoming) => Some(TcpListener::bind(incoming.listen).map_err(|error| {
            format!("cannot listen for the migration at {}: {error}", incoming.listen)
        })?),
        None => None,
    };
    let root = files.empty_root();
    fs::DirBuilder::new().recursive(true).mode(0o755).create(&root).map_err(at(&root))?;
    let gate = WriteGate::new(launch.deadline_ns.filter(|_| launch.ha).unwrap_or(NO_DEADLINE));
    let (config, announcer) = machine_config(launch, &files, gate.clone())?;
    let kvm = Kvm::new().map_err(|error| {
        format!(
            "cannot open /dev/kvm: {error}; load kvm_amd or kvm_intel, and check its permissions"
        )
    })?;
    let (machine, events) = match launch.incoming {
        Some(_) => Machine::create_incoming(&kvm, config)?,
        None => Machine::create(&kvm, config)?,
    };
    let pagemap = Pagemap::open().ok().map(Arc::new);
    let machine = Arc::new(machine);
    Ok(Opened {
        machine,
        events,
        gate,
        announcer,
        pagemap,
        control,
        deadlines,
        exit_file,
        migration,
        root,
    })
}

fn machine_config(
    launch: &Launch,
    files: &Files,
    gate: WriteGate,
) -> Result<(MachineConfig, Announcer), BoxError> {
    let vcpus = u8::try_from(launch.spec.cpus)?;
    let mut config = MachineConfig::new(vcpus, launch.spec.memory.0, boot_source(launch)?);
    config.gate = gate;
    config.cpuid = cpuid_policy(launch);
    config.device_events = log_device_events();
    let file = append(&files.console_log())?;
    config.serial_log = Some(LogFile { file, limit_bytes: CONSOLE_LOG_BYTES });
    for (index, disk) in launch.disks.iter().enumerate() {
        let image = if launch.ha && !disk.readonly {
            Image::open_write_through(&disk.path)?
        } else {
            Image::open(&disk.path, disk.readonly)?
        };
        let serial = format!("disk{index}");
        config.disks.push(BlockConfig { image, serial, queues: 1 });
    }
    let mut taps = Vec::new();
    for nic in &launch.nics {
        let tap = network::Tap::open(&nic.bridge)?;
        taps.push((tap.file.try_clone()?, nic.mac));
        let tap = Tap::from_fd(tap.file.into())?;
        config.nics.push(NetConfig { tap, mac: nic.mac, mtu: None });
    }
    Ok((config, Announcer::new(taps)))
}

fn boot_source(launch: &Launch) -> Result<BootSource, BoxError> {
    let read = |path: &Path| File::open(path).map_err(at(path));
    match (&launch.boot.kernel, &launch.boot.firmware) {
        (Some(kernel), _) => Ok(BootSource::Linux {
            kernel: read(kernel)?,
            initrd: launch.boot.initrd.as_deref().map(read).transpose()?,
            cmdline: launch.spec.boot.cmdline.clone(),
        }),
        (None, Some(firmware)) => Ok(BootSource::Firmware(read(firmware)?)),
        (None, None) => Err("it has neither a kernel nor a firmware image".into()),
    }
}

fn cpuid_policy(launch: &Launch) -> CpuidPolicy {
    if launch.spec.cpu == CpuModel::Host || launch.cpuid.is_empty() {
        return CpuidPolicy::Host;
    }
    CpuidPolicy::Baseline(CpuidList { entries: launch.cpuid.iter().map(entry).collect() })
}

/// KVM_CPUID_FLAG_SIGNIFCANT_INDEX (Documentation/virt/kvm/api.rst, 4.20): the subleaf matters.
const SIGNIFICANT_INDEX: u32 = 1;

fn entry(leaf: &CpuidLeaf) -> CpuidEntry {
    CpuidEntry {
        leaf: leaf.function,
        subleaf: (leaf.flags & SIGNIFICANT_INDEX != 0).then_some(leaf.index),
        eax: leaf.eax,
        ebx: leaf.ebx,
        ecx: leaf.ecx,
        edx: leaf.edx,
    }
}

fn log_device_events() -> EventSink {
    Arc::new(|event| match event {
        DeviceEvent::WriteRefused { device, reason } => tracing::warn!(device, %reason, "refused"),
        DeviceEvent::NeedsReset { device, reason } => {
            tracing::warn!(device, reason, "waits for the guest's reset");
        }
        DeviceEvent::BackendFailed { device, reason } => tracing::error!(device, reason, "failed"),
    })
}

fn create(path: &Path) -> Result<File, BoxError> {
    let opened = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path);
    Ok(opened.map_err(at(path))?)
}

fn append(path: &Path) -> Result<File, BoxError> {
    let opened = OpenOptions::new().append(true).create(true).mode(0o600).open(path);
    Ok(opened.map_err(at(path))?)
}

fn at(path: &Path) -> impl FnOnce(std::io::Error) -> String {
    let path = path.to_owned();
    move |error| format!("{}: {error}", path.display())
}
