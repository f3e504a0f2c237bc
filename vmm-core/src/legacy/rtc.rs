//! The CMOS clock (MC146818 at ports 0x70 and 0x71): reads as the host's time in UTC.
//!
//! It has no alarm and no interrupts, and setting the time has no effect: the host's clock is the
//! one that is kept right. It is never in an update, so that no kernel waits for it.

use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::bus::BusDevice;

/// First of the two ports.
pub const PORT: u16 = 0x70;

const REGISTER_SECONDS: u8 = 0x00;
const REGISTER_MINUTES: u8 = 0x02;
const REGISTER_HOURS: u8 = 0x04;
const REGISTER_WEEKDAY: u8 = 0x06;
const REGISTER_DAY: u8 = 0x07;
const REGISTER_MONTH: u8 = 0x08;
const REGISTER_YEAR: u8 = 0x09;
const REGISTER_A: u8 = 0x0a;
const REGISTER_B: u8 = 0x0b;
const REGISTER_C: u8 = 0x0c;
const REGISTER_D: u8 = 0x0d;
/// Where the FADT says the century is.
pub const REGISTER_CENTURY: u8 = 0x32;

/// Divider for 32.768 kHz, rate 1024 Hz; the update-in-progress bit is clear.
const A_RUNNING: u8 = 0x26;
/// 24 hours, BCD.
const B_24_HOURS: u8 = 0x02;
/// The time is valid.
const D_VALID: u8 = 0x80;

/// The clock. It is also its own saved state: the time itself is never saved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rtc {
    index: u8,
    /// What the guest stored, by register; 128 of them.
    stored: Vec<u8>,
}

impl Default for Rtc {
    fn default() -> Self {
        Self { index: 0, stored: vec![0; 128] }
    }
}

fn bcd(value: u64) -> u8 {
    u8::try_from(((value / 10 % 10) << 4) | (value % 10)).unwrap_or(0)
}

/// Year, month (1..), day (1..) of a number of days since 1970-01-01, by the proleptic Gregorian
/// calendar: eras of 400 years that begin on 1 March.
fn civil(days: u64) -> (u64, u64, u64) {
    let days = days + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    (era * 400 + year_of_era + u64::from(month <= 2), month, day)
}

impl Rtc {
    /// A register at `unix_seconds`.
    fn register(&self, index: u8, unix_seconds: u64) -> u8 {
        let (days, seconds) = (unix_seconds / 86_400, unix_seconds % 86_400);
        let (year, month, day) = civil(days);
        match index {
            REGISTER_SECONDS => bcd(seconds % 60),
            REGISTER_MINUTES => bcd(seconds / 60 % 60),
            REGISTER_HOURS => bcd(seconds / 3600),
            REGISTER_WEEKDAY => bcd((days + 4) % 7 + 1),
            REGISTER_DAY => bcd(day),
            REGISTER_MONTH => bcd(month),
            REGISTER_YEAR => bcd(year % 100),
            REGISTER_CENTURY => bcd(year / 100),
            REGISTER_A => A_RUNNING,
            REGISTER_B => B_24_HOURS,
            REGISTER_C => 0,
            REGISTER_D => D_VALID,
            _ => self.stored.get(usize::from(index)).copied().unwrap_or(0),
        }
    }
}

impl BusDevice for Rtc {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let (1, [byte]) = (offset, data) {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            *byte = self.register(self.index, now.as_secs());
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        match (offset, data) {
            (0, [index]) => self.index = index & 0x7f,
            (1, [value]) => {
                if let Some(stored) = self.stored.get_mut(usize::from(self.index)) {
                    *stored = *value;
                }
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tells_the_time_in_bcd() {
        let rtc = Rtc::default();
        let registers = [0x32, 0x09, 0x08, 0x07, 0x06, 0x04, 0x02, 0x00];
        let at = |seconds| registers.map(|index| rtc.register(index, seconds));
        // Thursday, the first of January 1970.
        assert_eq!(at(0), [0x19, 0x70, 1, 1, 5, 0, 0, 0]);
        // Tuesday, 29 February 2000, 23:59:58.
        assert_eq!(at(951_868_798), [0x20, 0, 2, 0x29, 3, 0x23, 0x59, 0x58]);
        // Saturday, 21 November 2026, 01:20:05.
        assert_eq!(at(1_795_224_005), [0x20, 0x26, 0x11, 0x21, 7, 1, 0x20, 5]);
    }

    #[test]
    fn is_never_in_an_update_and_keeps_what_is_stored() {
        let mut rtc = Rtc::default();
        let mut value = [0];
        rtc.write(0, &[0x80 | REGISTER_A]);
        rtc.read(1, &mut value);
        assert_eq!(value[0] & 0x80, 0);
        rtc.write(0, &[0x40]);
        rtc.write(1, &[7]);
        rtc.read(1, &mut value);
        assert_eq!(value, [7]);
    }
}
