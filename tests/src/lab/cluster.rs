//! A Holdfast cluster in the lab, driven as a person drives it: with `clusterctl` in a node, its
//! JSON read into the API's own types.

use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use proto::v1::{ClusterStatus, CreateTokenResponse, HaStatus, Vm};
use serde::de::DeserializeOwned;

use super::exec::{ExecError, Output};
use super::{Lab, Options, assets, wait_until};

/// The longest a command may take; a migration on emulated machines is the slowest.
pub(super) const LIMIT: Duration = Duration::from_secs(180);
/// Time that agents and the cluster get to come up or settle, on emulated machines.
pub(super) const SETTLE: Duration = Duration::from_secs(90);
/// Where the shared pool is in the nodes, and in the lab's shared folder.
pub(super) const POOL: &str = "pool";

impl Lab {
    /// A temporary lab with a formed cluster, ready for guests. Says each step on standard output.
    ///
    /// # Errors
    /// If a step fails.
    pub fn cluster(options: &Options) -> anyhow::Result<Self> {
        let started = Instant::now();
        let mut say =
            move |text: &str| println!("[{:6.1} s] {text}", started.elapsed().as_secs_f64());
        let lab = Self::up(options, &mut say)?;
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

    /// Waits until a node's agent answers, for its cluster or that it is in none (exit code 4).
    ///
    /// # Errors
    /// If it does not in time.
    pub fn wait_agent(&self, number: u32) -> anyhow::Result<()> {
        let log = self.folder().join(format!("{number}/agent.log"));
        wait_until(SETTLE, &format!("node{number}'s agent answers (see {})", log.display()), || {
            let asked = self.ctl_output(number, &["cluster", "status"]);
            Ok(asked.is_ok_and(|output| matches!(output.code, 0 | 4)))
        })
    }

    /// Waits until as many nodes vote as the cluster has voters (an odd number up to seven, but two
    /// of two), there is a quorum, and the leader heard from each node.
    ///
    /// # Errors
    /// If that does not come about in time.
    pub fn wait_healthy(&self, asked: u32) -> anyhow::Result<()> {
        let nodes = self.numbers().len();
        let wanted = if nodes <= 2 { nodes } else { (nodes - (nodes + 1) % 2).min(7) };
        wait_until(SETTLE, &format!("{wanted} nodes vote, all are online"), || {
            let status = self.ctl_json::<ClusterStatus>(asked, &["cluster", "status"]);
            let voters = |status: &ClusterStatus| {
                let members = status.members.iter().filter_map(|member| member.member.as_ref());
                members.filter(|member| member.voter).count()
            };
            if !status.is_ok_and(|status| status.quorum && voters(&status) == wanted) {
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
        self.import("vmlinuz", "kernel")?;
        self.import("guest.cpio", "initrd")
    }

    /// Imports the test guest's kernel once more, unpacked: an ELF image, entered by PVH.
    ///
    /// # Errors
    /// If a step fails.
    pub fn import_unpacked_kernel(&self) -> anyhow::Result<()> {
        let unpacked = assets::guest_image()?.kernel.with_file_name("vmlinux");
        std::fs::copy(unpacked, self.shared().join("import/vmlinux"))?;
        self.import("vmlinux", "kernel")
    }

    /// Imports a disk image with this content.
    ///
    /// # Errors
    /// If a step fails.
    pub fn import_disk(&self, name: &str, content: &[u8]) -> anyhow::Result<()> {
        std::fs::write(self.shared().join("import").join(name), content)?;
        self.import(name, "disk")
    }

    fn import(&self, name: &str, kind: &str) -> anyhow::Result<()> {
        let file = format!("/shared/import/{name}");
        let import = ["image", "import", &file, "--pool", "shared", "--name", name, "--kind", kind];
        self.ctl(1, &import).map(drop)
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
        let mut last = None;
        let waited = wait_until(limit, what, || {
            let vm = self.vm(asked, name);
            let fulfilled = vm.as_ref().is_ok_and(&condition);
            last = Some((vm, Instant::now()));
            Ok(fulfilled)
        });
        match (waited, last) {
            (Ok(()), Some((vm, at))) => Ok((vm?, at)),
            (waited, last) => {
                waited.with_context(|| format!("the last that was seen: {last:?}"))?;
                bail!("{name} was not looked at")
            }
        }
    }
}

/// The number in `nodeN`.
fn node_number(name: &str) -> Option<u32> {
    name.strip_prefix("node")?.parse().ok()
}
