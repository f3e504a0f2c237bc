//! Starting a lab: its folder, its switch, its nodes, until each answers.

use std::fs::File;
use std::net::{SocketAddr, TcpListener};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{bail, ensure};

use super::process::{self, Lifetime};
use super::state::{self, Backend, NodeState, State};
use super::{Lab, Options, assets, host, loopback, qemu, switch, wait_until};

impl Lab {
    /// Starts a lab and waits until every node answers.
    ///
    /// # Errors
    /// If one runs in that folder already, or something is missing; what was started is ended.
    pub fn up(options: &Options, say: &mut dyn FnMut(&str)) -> anyhow::Result<Self> {
        ensure!((1..=9).contains(&options.nodes), "a lab has 1 to 9 nodes");
        state::sweep(&state::cache().join("labs"));
        let lock = state::claim(&options.folder)?;
        let mut lab = Self {
            folder: std::fs::canonicalize(&options.folder)?,
            state: State {
                backend: Backend::Qemu,
                token: token()?,
                memory_mib: options.memory_mib,
                cpus: options.cpus,
                agent: options.agent,
                lease_ms: options.lease_ms,
                switch: None,
                nodes: Vec::new(),
            },
            lifetime: options.lifetime,
            _lock: Some(lock),
        };
        match lab.start(options, say) {
            Ok(()) => Ok(lab),
            Err(error) => {
                lab.lifetime = Lifetime::WithUs; // so that it is taken down whole
                Err(error)
            }
        }
    }

    /// Starts agents as plain processes on this machine; no root is needed, nor QEMU.
    ///
    /// # Errors
    /// As [`Self::up`].
    pub fn up_processes(options: &Options, say: &mut dyn FnMut(&str)) -> anyhow::Result<Self> {
        ensure!((1..=9).contains(&options.nodes), "a lab has 1 to 9 nodes");
        let lock = state::claim(&options.folder)?;
        let mut lab = Self {
            folder: std::fs::canonicalize(&options.folder)?,
            state: State {
                backend: Backend::Process,
                token: String::new(),
                memory_mib: 0,
                cpus: 0,
                agent: true,
                lease_ms: super::LEASE_MS,
                switch: None,
                nodes: Vec::new(),
            },
            lifetime: Lifetime::WithUs, // until all is up
            _lock: Some(lock),
        };
        say(loopback::LIMITS);
        let mut ports = free_ports(2 * options.nodes)?.into_iter();
        for number in 1..=options.nodes {
            let (Some(api), Some(enrol)) = (ports.next(), ports.next()) else {
                bail!("no free ports on the loopback address");
            };
            let id = loopback::start(&lab.folder, number, api, enrol, options.lifetime, false)?;
            let node = NodeState { number, softdog: false, process: Some(id), exec: enrol, api };
            lab.state.nodes.push(node);
            lab.save()?;
        }
        for number in 1..=options.nodes {
            lab.wait_agent(number)?;
            say(&format!("node{number}'s agent answers"));
        }
        lab.lifetime = options.lifetime;
        Ok(lab)
    }

    fn start(&mut self, options: &Options, say: &mut dyn FnMut(&str)) -> anyhow::Result<()> {
        let nodes = options.nodes;
        let started = Instant::now();
        say(&format!("{}", host::Accel::detect()));
        let boot = assets::node_image()?;
        for folder in ["shared", "switch", "programs"] {
            std::fs::create_dir_all(self.folder.join(folder))?;
        }
        let socket = self.folder.join("switch/control.sock");
        ensure!(
            socket.as_os_str().len() < 100,
            "{} is too long for a socket's name: give a shorter --dir",
            self.folder.display()
        );
        let agent: &[&str] = if self.state.agent { &["node-agent", "clusterctl"] } else { &[] };
        assets::collect_programs(&self.folder.join("programs"), &[&["lab-node"], agent].concat())?;
        self.start_switch(nodes)?;
        let mut ports = free_ports(2 * nodes)?.into_iter();
        for number in 1..=nodes {
            let (Some(exec), Some(api)) = (ports.next(), ports.next()) else {
                bail!("no free ports on the loopback address");
            };
            let softdog = options.softdog.contains(&number);
            self.state.nodes.push(NodeState { number, softdog, process: None, exec, api });
        }
        self.write_node_files()?;
        for number in 1..=nodes {
            qemu::prepare(&self.folder, number)?;
            self.launch(number, &boot)?;
        }
        say(&format!("{nodes} nodes are powered on"));
        for number in 1..=nodes {
            self.wait_up(number, Duration::from_secs(120))?;
            let ms = started.elapsed().as_millis();
            say(&format!("node{number} is up ({ms} ms)"));
        }
        Ok(())
    }

    fn start_switch(&mut self, nodes: u32) -> anyhow::Result<()> {
        let folder = self.folder.join("switch");
        let mut command = Command::new(assets::program("lab")?);
        command.arg("switch").arg(&folder).arg(nodes.to_string());
        command.stdin(std::process::Stdio::null()).stdout(File::create(folder.join("log"))?);
        command.stderr(File::create(folder.join("log"))?);
        let (_child, id) = process::spawn(&mut command, self.lifetime)?;
        self.state.switch = Some(id);
        self.save()?;
        let control = folder.join("control.sock");
        wait_until(Duration::from_secs(10), "the switch serves", || {
            ensure!(id.is_alive(), "the lab's switch ended: see {}", folder.join("log").display());
            Ok(switch::control(&control, &switch::Command::Get).is_ok())
        })
    }

    /// The files that each node copies to /etc.
    fn write_node_files(&self) -> anyhow::Result<()> {
        let programs = self.folder.join("programs");
        let mut hosts = String::from("127.0.0.1 localhost\n");
        for node in &self.state.nodes {
            let (number, address) = (node.number, qemu::address(node.number));
            hosts.push_str(&format!("{address} node{number}\n"));
            let own = programs.join(format!("nodes/{number}"));
            std::fs::create_dir_all(&own)?;
            std::fs::write(own.join("lab-token"), &self.state.token)?;
            std::fs::write(
                own.join("node-agent.toml"),
                agent_config(number, &address, self.state.lease_ms),
            )?;
        }
        std::fs::write(programs.join("hosts"), hosts)?;
        Ok(())
    }

    pub(super) fn launch(&mut self, number: u32, boot: &assets::BootFiles) -> anyhow::Result<()> {
        let node = self.state.node(number)?.clone();
        let (_child, id) = qemu::power_on(&self.folder, &self.state, &node, boot, self.lifetime)?;
        self.set_process(number, Some(id))
    }

    pub(super) fn set_process(
        &mut self,
        number: u32,
        id: Option<process::ProcessId>,
    ) -> anyhow::Result<()> {
        for node in self.state.nodes.iter_mut().filter(|node| node.number == number) {
            node.process = id;
        }
        self.save()
    }

    fn save(&self) -> anyhow::Result<()> {
        self.state.save(&self.folder)
    }
}

/// A secret for this lab.
fn token() -> anyhow::Result<String> {
    use std::io::Read;
    let mut bytes = [0; 16];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Ports of the loopback address that are free now, all different.
fn free_ports(count: u32) -> anyhow::Result<Vec<SocketAddr>> {
    let held: Result<Vec<_>, _> = (0..count).map(|_| TcpListener::bind(("127.0.0.1", 0))).collect();
    Ok(held?.iter().map(TcpListener::local_addr).collect::<Result<_, _>>()?)
}

/// The agent's configuration in a node.
fn agent_config(number: u32, address: &str, lease_ms: u64) -> String {
    format!(
        "node_name = \"node{number}\"\nadvertise = \"{address}:7400\"\n\
         enrol_advertise = \"{address}:7401\"\nmigration_address = \"{address}\"\n\
         [timing]\nlease_ms = {lease_ms}\n"
    )
}
