//! A VM without KVM: memory, and a thread that keeps dirtying it until the VM is paused.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};
use vmm_core::memory::GuestMemory;
use vmm_core::migrate::{DirtyPages, IncomingVm, MigrationVm, PAGE_SIZE, VmError};
use vmm_core::state::{Section, find_section, read_sections, write_sections};

/// Two regions with a hole between them, as a VM with a device hole has them.
pub(crate) fn memory(pages: u64) -> GuestMemory {
    let low = usize::try_from(pages / 2 * PAGE_SIZE).unwrap();
    let high = usize::try_from((pages - pages / 2) * PAGE_SIZE).unwrap();
    let ranges = [(GuestAddress(0), low), (GuestAddress(1 << 32), high)];
    GuestMemory::from_ranges(&ranges).unwrap()
}

/// All bytes of guest memory.
pub(crate) fn contents(memory: &GuestMemory) -> Vec<u8> {
    let mut all = Vec::new();
    for region in memory.iter() {
        let mut bytes = vec![0; usize::try_from(region.len()).unwrap()];
        memory.read_slice(&mut bytes, region.start_addr()).unwrap();
        all.extend(bytes);
    }
    all
}

/// The address of the `index`-th page, over all regions.
pub(crate) fn page_address(memory: &GuestMemory, index: u64) -> GuestAddress {
    let mut left = index * PAGE_SIZE;
    for region in memory.iter() {
        if left < region.len() {
            return GuestAddress(region.start_addr().0 + left);
        }
        left -= region.len();
    }
    panic!("page {index} is not there");
}

/// A small generator of pseudo-random numbers (xorshift64), seeded by its first state.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub(crate) fn page(&mut self) -> Vec<u8> {
        (0..PAGE_SIZE / 8).flat_map(|_| self.next().to_le_bytes()).collect()
    }
}

/// Fills every page with noise, so that nothing is a zero page.
pub(crate) fn fill(memory: &GuestMemory, pages: u64) {
    let mut random = Random(0x1234_5678_9abc_def1);
    for index in 0..pages {
        memory.write_slice(&random.page(), page_address(memory, index)).unwrap();
    }
}

/// What is observed of a fake VM.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) paused: bool,
    pub(crate) tracking: bool,
    pub(crate) resumed: u32,
    /// How often the disks were flushed while the VM ran.
    pub(crate) flushed: u32,
    /// Pages the guest wrote; the VM's "register".
    pub(crate) writes: u64,
}

/// The source's VM.
pub(crate) struct FakeVm {
    memory: GuestMemory,
    seen: Mutex<Seen>,
    changed: Condvar,
    over: AtomicBool,
    /// The step that fails.
    fail_at: Option<&'static str>,
    /// How long the first flush of the disks takes.
    pub(crate) first_flush: Duration,
}

impl FakeVm {
    pub(crate) fn new(memory: GuestMemory) -> Self {
        Self {
            memory,
            seen: Mutex::default(),
            changed: Condvar::new(),
            over: AtomicBool::new(false),
            fail_at: None,
            first_flush: Duration::ZERO,
        }
    }

    pub(crate) fn failing_at(memory: GuestMemory, step: &'static str) -> Self {
        Self { fail_at: Some(step), ..Self::new(memory) }
    }

    fn lock(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn seen(&self) -> Seen {
        self.lock().clone()
    }

    fn step(&self, name: &'static str) -> Result<MutexGuard<'_, Seen>, VmError> {
        if self.fail_at == Some(name) {
            return Err(format!("{name} fails by request").into());
        }
        Ok(self.lock())
    }

    /// Runs the guest: writes random pages among the first `working_set`, `burst` at a time with
    /// `rest` between, until it is told to end. Some writes clear the page.
    pub(crate) fn run(self: &Arc<Self>, working_set: u64, burst: u64, rest: Duration) -> Guest {
        let vm = Arc::clone(self);
        let thread = thread::spawn(move || {
            let mut random = Random(0xdead_beef_cafe_f00d);
            while !vm.over.load(Ordering::Acquire) {
                let mut seen = vm.lock();
                while seen.paused && !vm.over.load(Ordering::Acquire) {
                    seen = vm.changed.wait_timeout(seen, Duration::from_millis(20)).unwrap().0;
                }
                if vm.over.load(Ordering::Acquire) {
                    return;
                }
                for _ in 0..burst {
                    seen.writes += 1;
                    let address = page_address(&vm.memory, random.next() % working_set);
                    if random.next().is_multiple_of(8) {
                        vm.memory.write_slice(&[0; 4096], address).unwrap();
                    } else {
                        let offset = random.next() % (PAGE_SIZE - 8);
                        vm.memory.write_obj(seen.writes, GuestAddress(address.0 + offset)).unwrap();
                    }
                }
                drop(seen);
                thread::sleep(rest);
            }
        });
        Guest { vm: Arc::clone(self), thread: Some(thread) }
    }
}

/// The running guest; ends when dropped.
pub(crate) struct Guest {
    vm: Arc<FakeVm>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.vm.over.store(true, Ordering::Release);
        self.vm.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

impl MigrationVm for FakeVm {
    fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    fn start_dirty_tracking(&self) -> Result<(), VmError> {
        self.step("start_dirty_tracking")?.tracking = true;
        let _ = DirtyPages::take_vmm_writes(&self.memory);
        Ok(())
    }

    fn take_dirty(&self) -> Result<DirtyPages, VmError> {
        let seen = self.step("take_dirty")?;
        assert!(seen.tracking, "take_dirty without tracking");
        Ok(DirtyPages::take_vmm_writes(&self.memory))
    }

    fn stop_dirty_tracking(&self) -> Result<(), VmError> {
        self.lock().tracking = false;
        Ok(())
    }

    fn flush_disks(&self) -> Result<(), VmError> {
        let mut seen = self.step("flush_disks")?;
        assert!(!seen.paused, "a flush inside the downtime");
        seen.flushed += 1;
        let first = seen.flushed == 1;
        drop(seen);
        if first {
            thread::sleep(self.first_flush);
        }
        Ok(())
    }

    fn pause(&self) -> Result<(), VmError> {
        assert!(self.lock().flushed > 0, "paused with disks that were not flushed before");
        self.step("pause")?.paused = true;
        Ok(())
    }

    fn resume(&self) -> Result<(), VmError> {
        let mut seen = self.step("resume")?;
        seen.paused = false;
        seen.resumed += 1;
        self.changed.notify_all();
        Ok(())
    }

    fn save_state(&self) -> Result<Vec<u8>, VmError> {
        let seen = self.step("save_state")?;
        assert!(seen.paused, "the state of a running VM");
        Ok(write_sections(&[Section::encode(1, 0, 1, &seen.writes)?])?)
    }
}

/// The target's VM.
pub(crate) struct FakeIncoming {
    pub(crate) memory: GuestMemory,
    pub(crate) writes: Option<u64>,
    pub(crate) restored: Arc<AtomicBool>,
    pub(crate) refuses_state: bool,
}

impl FakeIncoming {
    pub(crate) fn new(memory: GuestMemory) -> Self {
        Self { memory, writes: None, restored: Arc::default(), refuses_state: false }
    }
}

impl IncomingVm for FakeIncoming {
    fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    fn restore_state(&mut self, state: &[u8]) -> Result<(), VmError> {
        if self.refuses_state {
            return Err("the state is refused by request".into());
        }
        self.writes = Some(find_section(&read_sections(state)?, 1, 0)?.decode(1)?);
        self.restored.store(true, Ordering::Release);
        Ok(())
    }
}
