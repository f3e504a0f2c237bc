//! A [`Platform`] that records, for tests.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use vmm_sys_util::eventfd::EventFd;

use super::{InterruptError, MsiVector, Platform};

#[derive(Debug, Default)]
pub(crate) struct Record {
    /// Messages in the order they were sent.
    pub(crate) sent: Vec<(u64, u32)>,
    /// Doorbells by address.
    pub(crate) doorbells: BTreeMap<u64, i32>,
}

#[derive(Debug, Default, Clone)]
pub(crate) struct FakePlatform {
    pub(crate) record: Arc<Mutex<Record>>,
}

impl FakePlatform {
    pub(crate) fn take_sent(&self) -> Vec<(u64, u32)> {
        std::mem::take(&mut self.record.lock().unwrap().sent)
    }
}

#[derive(Debug)]
struct FakeVector {
    route: Option<(u64, u32)>,
    record: Arc<Mutex<Record>>,
}

impl MsiVector for FakeVector {
    fn route(&mut self, address: u64, data: u32) -> Result<(), InterruptError> {
        self.route = Some((address, data));
        Ok(())
    }

    fn signal(&self) -> Result<(), InterruptError> {
        if let Some(message) = self.route {
            self.record.lock().unwrap().sent.push(message);
        }
        Ok(())
    }
}

impl Platform for FakePlatform {
    fn new_vector(&self) -> Result<Box<dyn MsiVector>, InterruptError> {
        Ok(Box::new(FakeVector { route: None, record: self.record.clone() }))
    }

    fn add_doorbell(&self, address: u64, event: &EventFd) -> Result<(), InterruptError> {
        use std::os::fd::AsRawFd;
        let mut record = self.record.lock().unwrap();
        assert!(record.doorbells.insert(address, event.as_raw_fd()).is_none());
        Ok(())
    }

    fn remove_doorbell(&self, address: u64, event: &EventFd) -> Result<(), InterruptError> {
        use std::os::fd::AsRawFd;
        let mut record = self.record.lock().unwrap();
        assert_eq!(record.doorbells.remove(&address), Some(event.as_raw_fd()));
        Ok(())
    }
}
