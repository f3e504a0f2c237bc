//! The power button: an input device that sends KEY_POWER. Powers the guest off, as a desktop does.

use std::fs::File;
use std::io::Read;

/// `struct input_event` on x86-64: time (16 bytes), type, code (2 each), value (4).
const EVENT_SIZE: usize = 24;
const EV_KEY: u16 = 1;
const KEY_POWER: u16 = 116;

/// Waits for the button on every input device; returns where there is none.
pub(crate) fn watch() {
    let Ok(devices) = std::fs::read_dir("/dev/input") else { return };
    for device in devices.flatten() {
        if let Ok(events) = File::open(device.path()) {
            std::thread::spawn(move || watch_device(events));
        }
    }
}

fn watch_device(mut events: File) {
    let mut event = [0; EVENT_SIZE];
    while events.read_exact(&mut event).is_ok() {
        let field = |at: usize| u16::from_ne_bytes([event[at], event[at + 1]]);
        if field(16) == EV_KEY && field(18) == KEY_POWER && event[20] == 1 {
            println!("guest-probe: power button");
            // SAFETY: sync and reboot take no memory of ours.
            unsafe {
                libc::sync();
                libc::reboot(libc::RB_POWER_OFF);
            }
        }
    }
}
