//! Tells the network where the VM is now: RARP through its taps, and a word to the guest's driver.

use std::fs::File;
use std::io::Write;
use std::sync::Arc;
use std::time::Duration;

use vmm_core::machine::Machine;

use crate::network::{VNET_HEADER_BYTES, rarp_frame};

/// A frame may be lost: it is sent again, after growing pauses.
const PAUSES: [Duration; 5] = [
    Duration::ZERO,
    Duration::from_millis(50),
    Duration::from_millis(150),
    Duration::from_millis(300),
    Duration::from_millis(600),
];

/// The VM's taps (a second descriptor of each) and its addresses on them.
#[derive(Debug, Default)]
pub(super) struct Announcer(Arc<Vec<(File, [u8; 6])>>);

impl Announcer {
    pub(super) fn new(nics: Vec<(File, [u8; 6])>) -> Self {
        Self(Arc::new(nics))
    }

    /// Sends the first frames at once and the others from a thread of their own.
    pub(super) fn announce(&self, machine: &Arc<Machine>) {
        let (nics, machine) = (Arc::clone(&self.0), Arc::clone(machine));
        if nics.is_empty() {
            return;
        }
        let thread = std::thread::Builder::new().name("announce".into());
        let spawned = thread.spawn(move || {
            machine.pci().announce();
            for pause in PAUSES {
                std::thread::sleep(pause);
                nics.iter().for_each(|(tap, mac)| send(tap, *mac));
            }
        });
        if let Err(error) = spawned {
            tracing::warn!(%error, "switches are not told; the guest's next frame tells them");
        }
    }
}

fn send(mut tap: &File, mac: [u8; 6]) {
    const HEADER: usize = VNET_HEADER_BYTES as usize;
    let mut packet = [0; HEADER + 60];
    packet[HEADER..].copy_from_slice(&rarp_frame(mac));
    if let Err(error) = tap.write(&packet) {
        tracing::debug!(%error, "announcement lost");
    }
}
