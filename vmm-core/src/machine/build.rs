//! Making a machine, part by part in the order that KVM wants.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Mutex};

use kvm_bindings::{
    KVM_CAP_PMU_CAPABILITY, KVM_CAP_XSAVE2, KVM_MEM_READONLY, KVM_PIT_SPEAKER_DUMMY,
    KVM_PMU_CAP_DISABLE, kvm_enable_cap, kvm_pit_config,
};
use kvm_ioctls::{Cap, Kvm, VmFd};

use super::chips::ChipState;
use super::error::{kvm, os};
use super::legacy::LegacyDevices;
use super::watch::DeadlineWatch;
use super::{
    Machine, MachineConfig, MachineError, MachineEvent, PowerOn, RunState, VCPUS_MAX, Vcpu,
};
use crate::boot::set_boot_registers;
use crate::bus::Bus;
use crate::cpuid::{CpuidList, CpuidPolicy};
use crate::interrupt::KvmPlatform;
use crate::legacy::Notify;
use crate::legacy::log_ring::LogRing;
use crate::memory::dirty::DirtyLog;
use crate::memory::{self, layout};
use crate::pci::{PciLayout, PciRoot};
use crate::vcpu::{self, Buses, MsrIndices, VcpuContext, VcpuControl, VcpuState};

impl Machine {
    /// Makes a machine and loads what it begins with. It stands still until
    /// [`resume`](Self::resume). Its events come from the receiver.
    ///
    /// # Errors
    /// [`MachineError`]; nothing is left behind then.
    pub fn create(
        kvm: &Kvm,
        config: MachineConfig,
    ) -> Result<(Self, Receiver<MachineEvent>), MachineError> {
        let (machine, events) = Self::create_incoming(kvm, config)?;
        machine.load_boot_source()?;
        Ok((machine, events))
    }

    /// Makes a machine whose memory and state come from elsewhere: nothing is loaded, no memory is
    /// touched. [`restore_state`](Self::restore_state) must come before it runs.
    ///
    /// # Errors
    /// [`MachineError`]; nothing is left behind then.
    pub fn create_incoming(
        kvm: &Kvm,
        config: MachineConfig,
    ) -> Result<(Self, Receiver<MachineEvent>), MachineError> {
        if !(1..=VCPUS_MAX).contains(&config.vcpus) {
            return Err(MachineError::Vcpus(config.vcpus));
        }
        let vm = create_vm(kvm)?;
        let firmware_bytes = config.boot.firmware_bytes()?;
        let memory = memory::create(config.memory_bytes, firmware_bytes)?;
        let read_only = vm.check_extension(Cap::ReadonlyMem);
        let firmware_start = layout::HIGH_RAM_START - firmware_bytes;
        let dirty = DirtyLog::new(Arc::clone(&vm), memory.clone(), |start| {
            let firmware = firmware_bytes > 0 && start == firmware_start;
            if firmware && read_only { KVM_MEM_READONLY } else { 0 }
        })?;

        let (sender, events) = mpsc::channel();
        let control = VcpuControl::new(usize::from(config.vcpus));
        let halted = Arc::new(AtomicBool::new(false));
        let notify: Notify = {
            let (control, halted) = (control.clone(), Arc::clone(&halted));
            Arc::new(move |event| {
                halted.store(true, Ordering::SeqCst);
                control.request_pause();
                // Nobody may be listening any more; the machine stands still all the same.
                let _ = sender.send(event);
            })
        };

        let (mut ports, mut mmio) = (Bus::default(), Bus::default());
        let ring = LogRing::new(config.serial_ring_bytes, config.serial_log);
        let legacy = LegacyDevices::new(&vm, ring, &notify, &mut ports)?;
        let platform = Arc::new(KvmPlatform::new(Arc::clone(&vm)));
        let pci = PciRoot::new(
            PciLayout::default(),
            memory.clone(),
            platform,
            config.gate.clone(),
            config.device_events,
        );
        pci.attach(&mut ports, &mut mmio)?;
        for disk in config.disks {
            pci.add_block(disk)?;
        }
        for nic in config.nics {
            pci.add_net(nic)?;
        }
        if config.rng {
            pci.add_rng()?;
        }
        if let Some(console) = config.console {
            pci.add_console(console)?;
        }

        let vcpus = create_vcpus(kvm, &vm, config.vcpus, &config.cpuid)?;
        let xsave_size = usize::try_from(vm.check_extension_raw(u64::from(KVM_CAP_XSAVE2)));
        let xsave_size = xsave_size.unwrap_or(0);
        let msrs = MsrIndices::probe(kvm, &lock(&vcpus[0].fd))
            .map_err(|source| MachineError::Vcpu { index: 0, source })?;
        let buses = Buses { port: Arc::new(ports), memory: Arc::new(mmio) };
        let deadline_reported = Arc::new(AtomicBool::new(false));
        let watch = DeadlineWatch::start(
            config.gate.clone(),
            control.clone(),
            Arc::clone(&notify),
            Arc::clone(&deadline_reported),
        )
        .map_err(os("start a thread"))?;
        let mut machine = Self {
            power_on: PowerOn { chips: ChipState::save(&vm)?, vcpus: Vec::new() },
            vcpus,
            control,
            threads: Vec::new(),
            watch,
            halted,
            pci,
            legacy,
            dirty,
            memory,
            memory_bytes: config.memory_bytes,
            vm,
            boot: config.boot,
            msrs,
            xsave_size,
            gate: config.gate,
            pulse: Mutex::default(),
            state: Mutex::new(RunState::Created),
        };
        machine.power_on.vcpus = machine.save_vcpus()?;
        for (index, vcpu) in (0u8..).zip(&machine.vcpus) {
            let context = VcpuContext {
                index,
                vcpu: Arc::clone(&vcpu.fd),
                buses: buses.clone(),
                control: machine.control.clone(),
                gate: machine.gate.clone(),
                notify: Arc::clone(&notify),
                deadline_reported: Arc::clone(&deadline_reported),
            };
            machine.threads.push(vcpu::spawn(context).map_err(os("start a vCPU's thread"))?);
        }
        Ok((machine, events))
    }

    /// Loads what the machine begins with, and sets the registers for it.
    pub(super) fn load_boot_source(&self) -> Result<(), MachineError> {
        let vcpus = u8::try_from(self.vcpus.len()).unwrap_or(VCPUS_MAX);
        let registers = self.boot.load(&self.memory, vcpus)?;
        for (index, vcpu) in (0u8..).zip(&self.vcpus) {
            set_boot_registers(&lock(&vcpu.fd), index, &self.memory, registers)?;
        }
        Ok(())
    }

    pub(super) fn save_vcpus(&self) -> Result<Vec<VcpuState>, MachineError> {
        let vcpus = self.vcpus.iter().enumerate();
        vcpus
            .map(|(index, vcpu)| {
                let cpuid = lock(&vcpu.cpuid);
                VcpuState::save(&lock(&vcpu.fd), &cpuid, &self.msrs, self.xsave_size)
                    .map_err(|source| MachineError::Vcpu { index, source })
            })
            .collect()
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

fn create_vm(kvm: &Kvm) -> Result<Arc<VmFd>, MachineError> {
    let vm = kvm.create_vm().map_err(self::kvm("create a VM"))?;
    // Only some processors need these two; where they are refused they are not needed.
    let reserved = [
        vm.set_identity_map_address(layout::KVM_IDENTITY_MAP),
        vm.set_tss_address(layout::KVM_TSS),
    ];
    for error in reserved.into_iter().filter_map(Result::err) {
        tracing::debug!(%error, "KVM takes no address for real mode");
    }
    // Performance counters are not part of the saved state.
    let mut no_pmu = kvm_enable_cap { cap: KVM_CAP_PMU_CAPABILITY, ..Default::default() };
    no_pmu.args[0] = u64::from(KVM_PMU_CAP_DISABLE);
    if let Err(error) = vm.enable_cap(&no_pmu) {
        tracing::debug!(%error, "KVM cannot hide its performance counters");
    }
    vm.create_irq_chip().map_err(self::kvm("create the interrupt controllers"))?;
    let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
    vm.create_pit2(pit).map_err(self::kvm("create the timer"))?;
    Ok(Arc::new(vm))
}

fn create_vcpus(
    kvm: &Kvm,
    vm: &VmFd,
    count: u8,
    policy: &CpuidPolicy,
) -> Result<Vec<Vcpu>, MachineError> {
    let host = CpuidList::supported(kvm)?;
    let model = match policy {
        CpuidPolicy::Host => &host,
        CpuidPolicy::Baseline(baseline) => {
            host.covers(baseline)?;
            baseline
        }
    };
    let mut vcpus = Vec::new();
    for index in 0..count {
        let fd = vm.create_vcpu(u64::from(index)).map_err(self::kvm("create a vCPU"))?;
        let cpuid = model.for_vcpu(index, count);
        fd.set_cpuid2(&cpuid.to_kvm()?).map_err(self::kvm("set a vCPU's CPUID"))?;
        vcpus.push(Vcpu {
            fd: Arc::new(Mutex::new(fd)),
            host_cpuid: host.for_vcpu(index, count),
            cpuid: Mutex::new(cpuid),
        });
    }
    Ok(vcpus)
}
