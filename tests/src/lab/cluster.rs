//! A Holdfast cluster in the lab, driven as a person drives it: with `clusterctl` in a node, its
//! JSON read into the API's own types.

use std::io::{Read, Seek, SeekFrom};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use proto::v1::{
    ClusterStatus, CreateTokenResponse, HaStatus, ListTasksResponse, TaskProgress, Vm,
};
use serde::de::DeserializeOwned;

use super::exec::{ExecError, Output};
use super::{Lab, assets, wait_until};
use crate::guest::PORT;
use crate::guest::client::{Status, TalkReport};
use crate::guest::records::{self, Record};

/// The longest a command may take; a migration on emulated machines is the slowest.
const LIMIT: Duration = Duration::from_secs(180);
/// Time that agents and the cluster get to come up or settle, on emulated machines.
const SETTLE: Duration = Duration::from_secs(90);
/// Where the shared pool is in the nodes, and in the lab's shared folder.
const POOL: &str = "pool";

/// A guest of the lab: a stock kernel with the probe.
#[derive(Debug, Clone)]
pub struct Guest {
    /// The VM's name.
    pub name: String,
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
    /// Memory that it keeps checking, MiB.
    pub checked_mib: u32,
}

impl Guest {
    /// An HA guest with network, disk and a memory check of 64 MiB.
    #[must_use]
    pub fn new(name: &str, host: u8) -> Self {
        Self {
            name: name.to_owned(),
            cpus: 1,
            memory_mib: 256,
            ha: true,
            host: Some(host),
            disk: true,
            checked_mib: 64,
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
        let Self { name, cpus, memory_mib, ha, .. } = self;
        let mut cmdline =
            format!("console=ttyS0 quiet panic=-1 probe.memory-mib={}", self.checked_mib);
        let mut devices = String::new();
        if let Some(host) = self.host {
            cmdline.push_str(&format!(" guest.address=10.77.0.{host}/24"));
            devices.push_str("[[nics]]\nnetwork = \"lan\"\n");
        }
        if self.disk {
            devices
                .push_str(&format!("[[disks]]\nimage = \"shared/{name}.raw\"\nsize = \"16MiB\"\n"));
        }
        format!(
            "name = \"{name}\"\ncpus = {cpus}\nmemory = \"{memory_mib}MiB\"\n\
             [boot]\nkernel = \"shared/vmlinuz\"\ninitrd = \"shared/guest.cpio\"\ncmdline = \"{cmdline}\"\n\
             {devices}[ha]\nenabled = {ha}\n"
        )
    }
}

/// What `vm migrate -o json` prints, and the demo's figures repeat.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Migration {
    /// From the request to the target's running and the source's end.
    pub total_ms: u64,
    /// How long the vCPUs stood still.
    pub downtime_ms: u64,
    /// Bytes on the wire.
    pub bytes: u64,
    /// Precopy rounds, the last one (stop-and-copy) included.
    pub rounds: u64,
}

impl Lab {
    /// A temporary lab with a formed cluster, ready for guests. Says each step on standard output.
    ///
    /// # Errors
    /// If a step fails.
    pub fn cluster(nodes: u32) -> anyhow::Result<Self> {
        let started = Instant::now();
        let mut say =
            move |text: &str| println!("[{:6.1} s] {text}", started.elapsed().as_secs_f64());
        let lab = Self::up(&super::Options::temporary(nodes), &mut say)?;
        lab.form_cluster(&mut say)?;
        lab.prepare_guests()?;
        say("the cluster is ready for guests");
        Ok(lab)
    }

    /// Runs `clusterctl` in a node and returns how it ended.
    ///
    /// # Errors
    /// If the node does not answer or it takes too long.
    pub fn ctl_output(&self, node: u32, arguments: &[&str]) -> Result<Output, ExecError> {
        self.run(node, &[&["clusterctl"], arguments].concat(), b"", LIMIT)
    }

    /// Runs `clusterctl` in a node; returns what it printed.
    ///
    /// # Errors
    /// If it fails, with what it said.
    pub fn ctl(&self, node: u32, arguments: &[&str]) -> anyhow::Result<String> {
        let output = self.ctl_output(node, arguments).and_then(Output::ok);
        output.with_context(|| format!("node{node}: clusterctl {}", arguments.join(" ")))
    }

    /// Runs `clusterctl -o json` in a node and reads what it printed.
    ///
    /// # Errors
    /// If it fails, or prints something else.
    pub fn ctl_json<T: DeserializeOwned>(
        &self,
        node: u32,
        arguments: &[&str],
    ) -> anyhow::Result<T> {
        let text = self.ctl(node, &[&["-o", "json"], arguments].concat())?;
        serde_json::from_str(&text)
            .with_context(|| format!("clusterctl {} printed {text}", arguments.join(" ")))
    }

    /// A VM as the cluster sees it.
    ///
    /// # Errors
    /// If there is none, or the node cannot say.
    pub fn vm(&self, node: u32, name: &str) -> anyhow::Result<Vm> {
        self.ctl_json(node, &["vm", "show", name])
    }

    /// The number of the node that owns a VM.
    ///
    /// # Errors
    /// If none does.
    pub fn owner(&self, node: u32, name: &str) -> anyhow::Result<u32> {
        let vm = self.vm(node, name)?;
        node_number(&vm.node).with_context(|| format!("{name} is {}, on no node", vm.phase))
    }

    /// Forms a cluster of all nodes and waits until each is a voter that was heard.
    ///
    /// # Errors
    /// If a step fails.
    pub fn form_cluster(&self, say: &mut dyn FnMut(&str)) -> anyhow::Result<()> {
        for number in self.numbers() {
            self.wait_agent(number)?;
        }
        say("the agents answer");
        self.ctl(1, &["cluster", "init", "--name", "lab"])?;
        say("node1 has formed the cluster");
        for number in self.numbers().into_iter().filter(|number| *number != 1) {
            let token: CreateTokenResponse = self.ctl_json(1, &["cluster", "token", "create"])?;
            self.ctl(number, &["cluster", "join", &token.token])?;
            say(&format!("node{number} has joined"));
        }
        self.wait_healthy(1)
    }

    /// Waits until a node's agent answers.
    ///
    /// # Errors
    /// If it does not in time.
    pub fn wait_agent(&self, number: u32) -> anyhow::Result<()> {
        let log = self.folder().join(format!("{number}/agent.log"));
        wait_until(SETTLE, &format!("node{number}'s agent answers (see {})", log.display()), || {
            Ok(self.ctl_output(number, &["cluster", "status"]).is_ok_and(|output| output.code == 0))
        })
    }

    /// Waits until every node is a voter, there is a quorum, and the leader heard from each.
    ///
    /// # Errors
    /// If that does not come about in time.
    pub fn wait_healthy(&self, asked: u32) -> anyhow::Result<()> {
        let nodes = self.numbers().len();
        wait_until(SETTLE, "all nodes are voters and online", || {
            let status = self.ctl_json::<ClusterStatus>(asked, &["cluster", "status"]);
            let voters = |status: &ClusterStatus| {
                let members = status.members.iter().filter_map(|member| member.member.as_ref());
                members.filter(|member| member.voter).count()
            };
            if !status.is_ok_and(|status| status.quorum && voters(&status) == nodes) {
                return Ok(false);
            }
            let ha = self.ctl_json::<HaStatus>(asked, &["ha", "status"]);
            Ok(ha.is_ok_and(|ha| {
                ha.nodes.len() == nodes && ha.nodes.iter().all(|node| node.state == "online")
            }))
        })
    }

    /// The number of the Raft leader's node.
    ///
    /// # Errors
    /// If there is none.
    pub fn leader(&self, asked: u32) -> anyhow::Result<u32> {
        let ha: HaStatus = self.ctl_json(asked, &["ha", "status"])?;
        node_number(&ha.leader).context("the cluster has no leader now")
    }

    /// Makes the shared pool and the network, and imports the guest.
    ///
    /// # Errors
    /// If a step fails.
    pub fn prepare_guests(&self) -> anyhow::Result<()> {
        let guest = assets::guest_image()?;
        let folder = self.shared().join("import");
        std::fs::create_dir_all(&folder)?;
        std::fs::copy(&guest.kernel, folder.join("vmlinuz"))?;
        std::fs::copy(&guest.initrd, folder.join("guest.cpio"))?;
        let path = format!("/shared/{POOL}");
        let create = ["storage", "create", "shared", "--kind", "shared-dir", "--path", &path];
        self.ctl(1, &[&create[..], &["--create"]].concat())?;
        self.ctl(1, &["network", "create", "lan", "--bridge", "hfbr0"])?;
        for (name, kind) in [("vmlinuz", "kernel"), ("guest.cpio", "initrd")] {
            let file = format!("/shared/import/{name}");
            self.ctl(
                1,
                &["image", "import", &file, "--pool", "shared", "--name", name, "--kind", kind],
            )?;
        }
        Ok(())
    }

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

    /// Moves a VM live.
    ///
    /// # Errors
    /// If it fails, with what `clusterctl` said.
    pub fn migrate(&self, asked: u32, vm: &str, target: u32) -> anyhow::Result<Migration> {
        self.ctl_json(asked, &["vm", "migrate", vm, &format!("node{target}")])
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

    /// Waits until a live migration of a VM has begun to send memory.
    ///
    /// # Errors
    /// If none does.
    pub fn wait_precopy(&self, asked: u32, vm: &str) -> anyhow::Result<()> {
        wait_until(SETTLE, "the migration sends memory", || {
            Ok(self.migration_progress(asked, vm)?.is_some_and(|progress| progress.done > 0))
        })
    }

    /// How long a node's agent log is now, bytes; for [`Self::wait_log`].
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn log_length(&self, number: u32) -> anyhow::Result<u64> {
        Ok(std::fs::metadata(self.agent_log(number))?.len())
    }

    fn agent_log(&self, number: u32) -> PathBuf {
        self.folder().join(format!("{number}/agent.log"))
    }

    /// Waits until a node's agent has logged a text since its log had a length. The log reaches
    /// this machine as it is written, so this is precise to milliseconds.
    ///
    /// # Errors
    /// If it does not in time.
    pub fn wait_log(&self, number: u32, since: u64, text: &str) -> anyhow::Result<()> {
        let deadline = Instant::now() + LIMIT;
        let mut log = std::fs::File::open(self.agent_log(number))?;
        log.seek(SeekFrom::Start(since))?;
        let mut seen = Vec::new();
        loop {
            log.read_to_end(&mut seen)?;
            if String::from_utf8_lossy(&seen).contains(text) {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "node{number} did not log `{text}`");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// How far a VM's live migration is; `None` if none runs.
    ///
    /// # Errors
    /// If the node cannot say.
    pub fn migration_progress(&self, asked: u32, vm: &str) -> anyhow::Result<Option<TaskProgress>> {
        let tasks = self.ctl_json::<ListTasksResponse>(asked, &["task", "list"])?.tasks;
        let running = tasks.into_iter().find(|task| {
            task.subject == vm && task.kind.contains("migrate") && task.state == "running"
        });
        Ok(running.and_then(|task| task.progress))
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

    /// Starts a client in a node that does not stop talking to a guest.
    ///
    /// # Errors
    /// If it does not start.
    pub fn talk(&self, node: u32, guest: &Guest) -> anyhow::Result<Talk<'_>> {
        let report = format!("/tmp/talk-{}.json", guest.name);
        self.sh(
            node,
            &format!(
                "rm -f {report}; setsid lab-node talk --report {report} {} >/dev/null 2>&1 </dev/null & echo $!",
                guest.address()
            ),
        )
        .map(|pid| Talk { lab: self, node, pid: pid.trim().to_owned(), report })
    }

    /// The records on a guest's disk, which must be in order. The guest should not run.
    ///
    /// # Errors
    /// If a record is lost, doubled, or was written by two guests at once.
    pub fn records(&self, guest: &Guest) -> anyhow::Result<Vec<Record>> {
        let disk = self.shared().join(POOL).join(format!("{}.raw", guest.name));
        let sectors =
            records::read(&disk).with_context(|| format!("reading {}", disk.display()))?;
        Ok(records::check(&sectors)?)
    }

    /// Waits until a VM fulfils a condition; returns it and when that was.
    ///
    /// # Errors
    /// If it does not in time; the last thing seen is in the message.
    pub fn wait_vm(
        &self,
        asked: u32,
        name: &str,
        limit: Duration,
        what: &str,
        condition: impl Fn(&Vm) -> bool,
    ) -> anyhow::Result<(Vm, Instant)> {
        let deadline = Instant::now() + limit;
        loop {
            let vm = self.vm(asked, name);
            match vm {
                Ok(vm) if condition(&vm) => return Ok((vm, Instant::now())),
                last => {
                    ensure!(Instant::now() < deadline, "waited {limit:?} in vain: {what}; {last:?}")
                }
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

/// The number in `nodeN`.
fn node_number(name: &str) -> Option<u32> {
    name.strip_prefix("node")?.parse().ok()
}

/// A client that talks to a guest; see `lab-node talk`.
#[derive(Debug)]
pub struct Talk<'a> {
    lab: &'a Lab,
    node: u32,
    pid: String,
    report: String,
}

impl Talk<'_> {
    /// What it has noticed so far (at most a second old).
    ///
    /// # Errors
    /// If the node does not answer, or nothing was answered yet.
    pub fn report(&self) -> anyhow::Result<TalkReport> {
        Ok(serde_json::from_str(&self.lab.exec(self.node, &["cat", &self.report])?)?)
    }

    /// Ends it; what it noticed in all.
    ///
    /// # Errors
    /// If the node does not answer.
    pub fn finish(self) -> anyhow::Result<TalkReport> {
        let pid = &self.pid;
        // Its last report is written before it ends.
        self.lab.sh(
            self.node,
            &format!("kill -TERM {pid}; while kill -0 {pid} 2>/dev/null; do usleep 20000; done"),
        )?;
        self.report()
    }
}
