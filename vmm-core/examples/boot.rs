//! Boots a guest on this host's KVM and connects its serial line to the terminal. A tool for
//! trying kernels and images by hand and in the lab:
//!
//! ```text
//! boot --kernel vmlinuz --initrd initrd.img --cmdline 'console=ttyS0' --cpus 4 --memory 256
//! boot --firmware test.bin --memory 16
//! ```
//! Memory is in MiB. A kernel is a bzImage, or an ELF image with a PVH entry. `--disk FILE[:ro]`
//! may be given more than once, as may `--tap INTERFACE`; `--console`
//! adds a virtio console that echoes. `--save FILE --save-at TEXT` saves the VM when it has printed
//! TEXT on its serial line, and ends; `--restore FILE` goes on with it. `--power-button-at TEXT`
//! presses the button.
//! Exit status: 0 after a shutdown, 3 after a reset with `--no-reboot`, 1 after anything else.

use std::fs::File;
use std::io::{BufReader, BufWriter, Read, Write};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::RecvTimeoutError;
use std::time::{Duration, Instant};

use kvm_ioctls::Kvm;
use vmm_core::boot::BootSource;
use vmm_core::machine::{Machine, MachineConfig, MachineEvent, read_snapshot, write_snapshot};
use vmm_core::virtio::{BlockConfig, ConsolePort, Image, NetConfig, Tap};

type AnyError = Box<dyn std::error::Error>;

#[derive(Default)]
struct Options {
    kernel: Option<String>,
    firmware: Option<String>,
    initrd: Option<String>,
    cmdline: String,
    cpus: u8,
    memory_mib: u64,
    disks: Vec<String>,
    taps: Vec<String>,
    console: bool,
    save: Option<String>,
    save_at: Option<String>,
    restore: Option<String>,
    button_at: Option<String>,
    no_reboot: bool,
}

fn options() -> Result<Options, AnyError> {
    let mut options = Options { cpus: 1, memory_mib: 256, ..Options::default() };
    let mut arguments = std::env::args().skip(1);
    while let Some(name) = arguments.next() {
        match name.as_str() {
            "--no-reboot" => options.no_reboot = true,
            "--console" => options.console = true,
            _ => set(&mut options, &name, &mut arguments)?,
        }
    }
    Ok(options)
}

fn set(
    options: &mut Options,
    name: &str,
    arguments: &mut impl Iterator<Item = String>,
) -> Result<(), AnyError> {
    let value = arguments.next().ok_or_else(|| format!("{name} needs a value"))?;
    match name {
        "--kernel" => options.kernel = Some(value),
        "--firmware" => options.firmware = Some(value),
        "--initrd" => options.initrd = Some(value),
        "--cmdline" => options.cmdline = value,
        "--cpus" => options.cpus = value.parse()?,
        "--memory" => options.memory_mib = value.parse()?,
        "--disk" => options.disks.push(value),
        "--tap" => options.taps.push(value),
        "--save" => options.save = Some(value),
        "--save-at" => options.save_at = Some(value),
        "--restore" => options.restore = Some(value),
        "--power-button-at" => options.button_at = Some(value),
        _ => return Err(format!("unknown option {name}").into()),
    }
    Ok(())
}

fn config(options: &Options) -> Result<MachineConfig, AnyError> {
    let open = |path: &String| File::open(path).map_err(|error| format!("{path}: {error}"));
    let boot = match (&options.kernel, &options.firmware) {
        (Some(kernel), None) => BootSource::Linux {
            kernel: open(kernel)?,
            initrd: options.initrd.as_ref().map(open).transpose()?,
            cmdline: options.cmdline.clone(),
        },
        (None, Some(firmware)) => BootSource::Firmware(open(firmware)?),
        _ => return Err("give either --kernel or --firmware".into()),
    };
    let mut config = MachineConfig::new(options.cpus, options.memory_mib << 20, boot);
    for (index, disk) in options.disks.iter().enumerate() {
        let (path, read_only) = match disk.strip_suffix(":ro") {
            Some(path) => (path, true),
            None => (disk.as_str(), false),
        };
        let file = File::options().read(true).write(!read_only).open(path)?;
        let image = Image::from_file(file, Path::new(path), read_only)?;
        config.disks.push(BlockConfig { image, serial: format!("disk{index}"), queues: 1 });
    }
    if options.console {
        let port = ConsolePort::new()?;
        config.console = Some(port.clone());
        std::thread::spawn(move || echo_console(&port));
    }
    for (index, name) in (1_u8..).zip(&options.taps) {
        let mac = [0x52, 0x54, 0, 0, 0, index];
        config.nics.push(NetConfig { tap: Tap::open(name)?, mac, mtu: None });
    }
    Ok(config)
}

/// Prints what the guest writes to the virtio console, and sends it back.
fn echo_console(port: &ConsolePort) {
    let mut bytes = [0; 4096];
    loop {
        let count = port.read_output(&mut bytes);
        if count == 0 {
            std::thread::sleep(Duration::from_millis(20));
            continue;
        }
        eprintln!("boot: console: {}", String::from_utf8_lossy(&bytes[..count]));
        port.write_input(&bytes[..count]);
    }
}

/// A text that the guest is to print, and whether it has.
struct Awaited {
    text: String,
    printed: AtomicBool,
}

impl Awaited {
    fn new(text: Option<&String>) -> Option<Arc<Self>> {
        let text = text?.clone();
        Some(Arc::new(Self { text, printed: AtomicBool::new(false) }))
    }

    fn look(&self, printed: &str) {
        if printed.contains(&self.text) {
            self.printed.store(true, Ordering::Relaxed);
        }
    }
}

/// Prints what the guest prints, looks for what is awaited, and types what is typed here.
fn connect(machine: &Arc<Machine>, awaited: Vec<Arc<Awaited>>) {
    let output = machine.serial().output().clone();
    std::thread::spawn(move || {
        let mut offset = 0;
        let mut line = String::new();
        loop {
            let chunk = output.wait(offset, 65536, Duration::from_secs(60));
            offset = chunk.next_offset();
            line.push_str(&String::from_utf8_lossy(&chunk.bytes));
            awaited.iter().for_each(|awaited| awaited.look(&line));
            line.drain(..line.rfind('\n').map_or(0, |end| end + 1));
            let mut stdout = std::io::stdout();
            if stdout.write_all(&chunk.bytes).and_then(|()| stdout.flush()).is_err() {
                return;
            }
        }
    });
    let serial = machine.serial().clone();
    std::thread::spawn(move || {
        let mut buffer = [0; 256];
        while let Ok(count @ 1..) = std::io::stdin().read(&mut buffer) {
            serial.type_input(&buffer[..count]);
        }
    });
}

fn main() -> Result<ExitCode, AnyError> {
    let options = options()?;
    let kvm = Kvm::new().map_err(|error| format!("/dev/kvm: {error}"))?;
    let begun = Instant::now();
    let (machine, events) = match &options.restore {
        None => Machine::create(&kvm, config(&options)?)?,
        Some(path) => {
            let (machine, events) = Machine::create_incoming(&kvm, config(&options)?)?;
            read_snapshot(&machine, &mut BufReader::new(File::open(path)?))?;
            (machine, events)
        }
    };
    machine.pci().lock_disks()?;
    let machine = Arc::new(machine);
    let save_at = Awaited::new(options.save_at.as_ref());
    let button_at = Awaited::new(options.button_at.as_ref());
    connect(&machine, [&save_at, &button_at].into_iter().flatten().cloned().collect());
    machine.resume()?;
    eprintln!("boot: running after {} ms", begun.elapsed().as_millis());
    let mut button = button_at;
    loop {
        match events.recv_timeout(Duration::from_millis(20)) {
            Ok(MachineEvent::Reset(cause)) => {
                eprintln!("boot: reset ({cause:?}) after {} ms", begun.elapsed().as_millis());
                if options.no_reboot {
                    return Ok(ExitCode::from(3));
                }
                machine.reset()?;
            }
            Ok(event) => {
                eprintln!("boot: {event:?} after {} ms", begun.elapsed().as_millis());
                let shutdown = event == MachineEvent::Shutdown;
                return Ok(ExitCode::from(u8::from(!shutdown)));
            }
            Err(RecvTimeoutError::Disconnected) => return Err("the machine is gone".into()),
            Err(RecvTimeoutError::Timeout) => {}
        }
        let printed = |awaited: &Arc<Awaited>| awaited.printed.load(Ordering::Relaxed);
        if button.take_if(|button| printed(button)).is_some() {
            eprintln!("boot: power button, listened to: {}", machine.press_power_button());
        }
        if let Some(path) = &options.save
            && save_at.as_ref().is_some_and(printed)
        {
            machine.pause()?;
            write_snapshot(&machine, &mut BufWriter::new(File::create(path)?))?;
            eprintln!("boot: saved after {} ms", begun.elapsed().as_millis());
            return Ok(ExitCode::SUCCESS);
        }
    }
}
