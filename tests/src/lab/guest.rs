//! The lab's guests: made, waited for, stopped, and the records on their disks checked.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, ensure};

use super::cluster::{LIMIT, POOL, SETTLE};
use super::exec::Output;
use super::{Lab, wait_until};
use crate::guest::PORT;
use crate::guest::client::Status;
use crate::guest::records::{self, Record};
use crate::violation;

/// A guest of the lab: a stock kernel with the probe.
#[derive(Debug, Clone)]
pub struct Guest {
    /// The VM's name.
    pub name: String,
    /// Its kernel: `vmlinuz` (a bzImage), or another that was imported.
    pub kernel: &'static str,
    /// vCPUs.
    pub cpus: u32,
    /// Memory, MiB.
    pub memory_mib: u32,
    /// Whether it is started elsewhere when its node dies.
    pub ha: bool,
    /// The last octet of its address in 10.77.0.0/24, 100 to 250; `None`: no network.
    pub host: Option<u8>,
    /// Whether it has a disk for its records.
    pub disk: bool,
    /// An imported image that it has as a second disk, read-only.
    pub second_disk: Option<&'static str>,
    /// Memory that it keeps checking, MiB.
    pub checked_mib: u32,
}

impl Guest {
    /// An HA guest with network, disk and a memory check of 24 MiB: small enough that its check gets
    /// round every few seconds, and that it moves in as many.
    #[must_use]
    pub fn new(name: &str, host: u8) -> Self {
        Self {
            name: name.to_owned(),
            kernel: "vmlinuz",
            cpus: 1,
            memory_mib: 128,
            ha: true,
            host: Some(host),
            disk: true,
            second_disk: None,
            checked_mib: 24,
        }
    }

    /// Where its probe answers.
    #[must_use]
    pub fn address(&self) -> String {
        format!("10.77.0.{}:{PORT}", self.host.unwrap_or(0))
    }

    /// Its VM document.
    #[must_use]
    pub fn document(&self) -> String {
        let Self { name, kernel, cpus, memory_mib, ha, .. } = self;
        let mut cmdline = format!(
            "console=ttyS0 quiet panic=-1 init_on_free=1 probe.memory-mib={} probe.memory-rate=2",
            self.checked_mib
        );
        let mut devices = String::new();
        if let Some(host) = self.host {
            cmdline.push_str(&format!(" guest.address=10.77.0.{host}/24"));
            devices.push_str("[[nics]]\nnetwork = \"lan\"\n");
        }
        if self.disk {
            devices
                .push_str(&format!("[[disks]]\nimage = \"shared/{name}.raw\"\nsize = \"16MiB\"\n"));
        }
        if let Some(image) = self.second_disk {
            devices.push_str(&format!("[[disks]]\nimage = \"shared/{image}\"\nreadonly = true\n"));
        }
        format!(
            "name = \"{name}\"\ncpus = {cpus}\nmemory = \"{memory_mib}MiB\"\n\
             [boot]\nkernel = \"shared/{kernel}\"\ninitrd = \"shared/guest.cpio\"\ncmdline = \"{cmdline}\"\n\
             {devices}[ha]\nenabled = {ha}\n"
        )
    }
}

impl Lab {
    /// Creates and starts a guest; `node`: where, or the cluster chooses.
    ///
    /// # Errors
    /// If it is refused.
    pub fn create_guest(&self, asked: u32, guest: &Guest, node: Option<u32>) -> anyhow::Result<()> {
        let file = format!("/tmp/{}.toml", guest.name);
        let write = ["sh", "-c", "cat >\"$0\"", file.as_str()];
        self.run(asked, &write, guest.document().as_bytes(), LIMIT).and_then(Output::ok)?;
        let name = node.map(|number| format!("node{number}"));
        let mut arguments = vec!["vm", "create", "-f", &file, "--start"];
        if let Some(name) = &name {
            arguments.extend(["--node", name]);
        }
        self.ctl(asked, &arguments).map(drop)
    }

    /// Waits, in a node, until a guest's probe answers; returns what it says.
    ///
    /// # Errors
    /// If it does not answer in time.
    pub fn await_guest(&self, from: u32, guest: &Guest, limit: Duration) -> anyhow::Result<Status> {
        let seconds = limit.as_secs().to_string();
        let address = guest.address();
        let argv = ["lab-node", "await", "--seconds", &seconds, &address];
        let answer =
            self.run(from, &argv, b"", limit + Duration::from_secs(10)).and_then(Output::ok);
        let answer = answer.with_context(|| format!("{} does not serve", guest.name))?;
        serde_json::from_str(&answer).with_context(|| format!("{} answered {answer}", guest.name))
    }

    /// The ids of the VM processes in a node.
    ///
    /// # Errors
    /// If it does not answer.
    pub fn vm_pids(&self, number: u32) -> anyhow::Result<Vec<String>> {
        self.agent_processes(number, "vm")
    }

    /// The nodes in which a process of some VM runs.
    ///
    /// # Errors
    /// If a node that is powered on does not answer.
    pub fn vm_processes(&self) -> anyhow::Result<Vec<u32>> {
        let mut found = Vec::new();
        for number in self.numbers() {
            if self.is_on(number)? {
                found.extend(self.vm_pids(number)?.iter().map(|_| number));
            }
        }
        Ok(found)
    }

    /// Waits until exactly one copy of the lab's only VM runs and serves, on its owner; returns what
    /// its probe says.
    ///
    /// # Errors
    /// If that does not come about, or two are seen.
    pub fn wait_single_copy(&self, asked: u32, guest: &Guest) -> anyhow::Result<Status> {
        let status = self.await_guest(asked, guest, Duration::from_secs(120))?;
        wait_until(SETTLE, "one process of the VM is left, on its owner", || {
            Ok(self
                .owner(asked, &guest.name)
                .is_ok_and(|owner| self.vm_processes().is_ok_and(|found| found == [owner])))
        })?;
        Ok(status)
    }

    /// Stops a VM and checks that the records on its disk are in order.
    ///
    /// # Errors
    /// If they are not.
    pub fn stop_and_check(&self, asked: u32, guest: &Guest) -> anyhow::Result<Vec<Record>> {
        self.ctl(asked, &["vm", "stop", &guest.name])?;
        let records = self.records(guest)?;
        ensure!(!records.is_empty(), "{} has written nothing", guest.name);
        Ok(records)
    }

    /// Holds a running VM for a moment and checks that the records on its disk are in order: a pause
    /// leaves no write half done.
    ///
    /// # Errors
    /// If they are not, or there are none.
    pub fn pause_and_check(&self, asked: u32, guest: &Guest) -> anyhow::Result<Vec<Record>> {
        self.ctl(asked, &["vm", "pause", &guest.name])?;
        let records = self.records(guest);
        self.ctl(asked, &["vm", "resume", &guest.name])?;
        let records = records?;
        ensure!(!records.is_empty(), "{} has written nothing", guest.name);
        Ok(records)
    }

    /// The records on a guest's disk, which must be in order. The guest should not run.
    ///
    /// # Errors
    /// If a record is lost, doubled, or was written by two guests at once.
    pub fn records(&self, guest: &Guest) -> anyhow::Result<Vec<Record>> {
        let disk = self.disk_of(guest);
        let sectors =
            records::read(&disk).with_context(|| format!("reading {}", disk.display()))?;
        Ok(records::check(&sectors).inspect_err(|disorder| {
            violation::report(&format!("the disk of {}: {disorder}", guest.name));
        })?)
    }

    pub(super) fn disk_of(&self, guest: &Guest) -> PathBuf {
        self.shared().join(POOL).join(format!("{}.raw", guest.name))
    }
}
