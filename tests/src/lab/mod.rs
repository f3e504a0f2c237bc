//! A cluster's worth of machines on this one: nodes with a kernel, a disk, a watchdog and a power
//! button, on a network that can be cut. No root is needed.
//!
//! ```text
//! Lab ─┬─ QEMU 1 … N   each with its own /dev/kvm          [`qemu`]
//!      ├─ switch       their network, with scissors        [`switch`]
//!      ├─ exec         programs in the nodes               [`exec`]
//!      └─ FOLDER       disks, logs, who runs               [`state`]
//! ```
//! Invariants: every process is known by pid and start time; a [`Lab`] made with
//! [`Lifetime::WithUs`] leaves neither processes nor files, however it ends.

pub mod assets;
pub mod cluster;
pub mod exec;
pub mod host;
pub mod loopback;
pub mod process;
pub mod qemu;
pub mod state;
pub mod switch;

use std::fs::File;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::Signal;

use exec::{ExecError, Output, Request};
use process::Lifetime;
use state::{Backend, NodeState, State};

/// How a lab is to be.
#[derive(Debug, Clone)]
pub struct Options {
    /// Its folder; anything in it is the lab's.
    pub folder: PathBuf,
    /// How many nodes, 1 to 9.
    pub nodes: u32,
    /// CPUs of a node.
    pub cpus: u32,
    /// Memory of a node, MiB.
    pub memory_mib: u32,
    /// Whether the nodes run an agent.
    pub agent: bool,
    /// Whether it outlives this process.
    pub lifetime: Lifetime,
}

impl Options {
    /// A lab that ends with this process, in a folder of its own.
    #[must_use]
    pub fn temporary(nodes: u32) -> Self {
        let folder = state::cache().join(format!("labs/{}", std::process::id()));
        let lifetime = Lifetime::WithUs;
        Self { folder, nodes, cpus: 1, memory_mib: 1536, agent: true, lifetime }
    }
}

/// A running lab.
#[derive(Debug)]
pub struct Lab {
    folder: PathBuf,
    state: State,
    lifetime: Lifetime,
    /// Held while the lab belongs to this process.
    _lock: Option<Flock<File>>,
}

impl Lab {
    /// Starts a lab and waits until every node answers.
    ///
    /// # Errors
    /// If one runs in that folder already, or something is missing; what was started is ended.
    pub fn up(options: &Options, say: &mut dyn FnMut(&str)) -> anyhow::Result<Self> {
        ensure!((1..=9).contains(&options.nodes), "a lab has 1 to 9 nodes");
        sweep(&state::cache().join("labs"));
        let lock = claim(&options.folder)?;
        let mut lab = Self {
            folder: std::fs::canonicalize(&options.folder)?,
            state: State {
                backend: Backend::Qemu,
                token: token()?,
                memory_mib: options.memory_mib,
                cpus: options.cpus,
                agent: options.agent,
                switch: None,
                nodes: Vec::new(),
            },
            lifetime: options.lifetime,
            _lock: Some(lock),
        };
        match lab.start(options.nodes, say) {
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
        let lock = claim(&options.folder)?;
        let mut lab = Self {
            folder: std::fs::canonicalize(&options.folder)?,
            state: State {
                backend: Backend::Process,
                token: String::new(),
                memory_mib: 0,
                cpus: 0,
                agent: true,
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
            let id = loopback::start(&lab.folder, number, api, enrol, options.lifetime)?;
            lab.state.nodes.push(NodeState { number, process: Some(id), exec: enrol, api });
            lab.save()?;
        }
        for number in 1..=options.nodes {
            lab.wait_agent(number)?;
            say(&format!("node{number}'s agent answers"));
        }
        lab.lifetime = options.lifetime;
        Ok(lab)
    }

    /// The lab that runs in a folder.
    ///
    /// # Errors
    /// If there is none.
    pub fn attach(folder: &Path) -> anyhow::Result<Self> {
        let state = State::load(folder)?;
        let folder = std::fs::canonicalize(folder)?;
        Ok(Self { folder, state, lifetime: Lifetime::Detached, _lock: None })
    }

    fn start(&mut self, nodes: u32, say: &mut dyn FnMut(&str)) -> anyhow::Result<()> {
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
            self.state.nodes.push(NodeState { number, process: None, exec, api });
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
            std::fs::write(own.join("node-agent.toml"), agent_config(number, &address))?;
        }
        std::fs::write(programs.join("hosts"), hosts)?;
        Ok(())
    }

    fn launch(&mut self, number: u32, boot: &assets::BootFiles) -> anyhow::Result<()> {
        let node = self.state.node(number)?.clone();
        let (_child, id) = qemu::power_on(&self.folder, &self.state, &node, boot, self.lifetime)?;
        self.set_process(number, Some(id))
    }

    fn set_process(&mut self, number: u32, id: Option<process::ProcessId>) -> anyhow::Result<()> {
        for node in self.state.nodes.iter_mut().filter(|node| node.number == number) {
            node.process = id;
        }
        self.save()
    }

    fn save(&self) -> anyhow::Result<()> {
        self.state.save(&self.folder)
    }

    /// Ends every process of the lab and removes its folder.
    ///
    /// # Errors
    /// If a process does not die or the folder cannot be removed.
    pub fn down(mut self) -> anyhow::Result<()> {
        self.lifetime = Lifetime::Detached; // nothing is left for drop
        self.end()
    }

    /// Copies the nodes' logs to where they outlive the lab.
    fn keep_logs(&self) -> anyhow::Result<PathBuf> {
        let name = self.folder.file_name().context("the lab has no folder")?;
        let kept = state::cache().join("lab-logs").join(name);
        for number in self.numbers() {
            let to = kept.join(number.to_string());
            std::fs::create_dir_all(&to)?;
            for log in ["agent.log", "console.log", "qemu.log"] {
                let from = self.folder.join(number.to_string()).join(log);
                if from.exists() {
                    std::fs::copy(from, to.join(log))?;
                }
            }
        }
        Ok(kept)
    }

    fn end(&mut self) -> anyhow::Result<()> {
        for process in self.state.processes() {
            // A frozen process takes SIGKILL too.
            ensure!(process.kill_and_wait(), "process {} does not end", process.pid);
        }
        std::fs::remove_dir_all(&self.folder)
            .with_context(|| format!("removing {}", self.folder.display()))
    }

    /// The lab's folder.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The folder that all nodes have at /shared.
    #[must_use]
    pub fn shared(&self) -> PathBuf {
        self.folder.join("shared")
    }

    /// What is known of it.
    #[must_use]
    pub fn state(&self) -> &State {
        &self.state
    }

    /// The nodes' numbers.
    #[must_use]
    pub fn numbers(&self) -> Vec<u32> {
        self.state.nodes.iter().map(|node| node.number).collect()
    }

    /// What a program in a node is asked for with.
    #[must_use]
    pub fn request(&self, argv: &[&str], terminal: Option<(u16, u16)>) -> Request {
        let argv = argv.iter().map(|word| (*word).to_owned()).collect();
        Request { token: self.state.token.clone(), argv, terminal }
    }

    /// Where a node's `lab-node serve` is.
    ///
    /// # Errors
    /// If there is no such node.
    pub fn exec_address(&self, number: u32) -> anyhow::Result<SocketAddr> {
        Ok(self.state.node(number)?.exec)
    }

    /// Runs a program in a node, with an input and a limit, and returns how it ended.
    ///
    /// # Errors
    /// If the node does not answer, or the program takes too long.
    pub fn run(
        &self,
        number: u32,
        argv: &[&str],
        stdin: &[u8],
        limit: Duration,
    ) -> Result<Output, ExecError> {
        if self.state.backend == Backend::Process {
            return loopback::run(&self.folder, number, argv, stdin);
        }
        let address =
            self.exec_address(number).map_err(|error| ExecError::Refused(error.to_string()))?;
        exec::run(address, &self.request(argv, None), stdin, limit)
    }

    /// Runs a program in a node that must succeed within a minute; returns what it printed.
    ///
    /// # Errors
    /// If it does not.
    pub fn exec(&self, number: u32, argv: &[&str]) -> anyhow::Result<String> {
        let output = self.run(number, argv, b"", Duration::from_secs(60)).and_then(Output::ok);
        output.with_context(|| format!("node{number}: {}", argv.join(" ")))
    }

    /// Runs a line of shell in a node; as [`Self::exec`].
    ///
    /// # Errors
    /// If it does not succeed.
    pub fn sh(&self, number: u32, line: &str) -> anyhow::Result<String> {
        self.exec(number, &["sh", "-c", line])
    }

    /// Waits until a node runs programs.
    ///
    /// # Errors
    /// If its QEMU ends or the limit passes.
    pub fn wait_up(&self, number: u32, limit: Duration) -> anyhow::Result<()> {
        wait_until(limit, &format!("node{number} answers"), || {
            let process = self.state.node(number)?.process;
            if !process.is_some_and(|process| process.is_alive()) {
                let folder = self.folder.join(number.to_string());
                let log = std::fs::read_to_string(folder.join("qemu.log")).unwrap_or_default();
                bail!("node{number}'s QEMU ended (see {}): {log}", folder.display());
            }
            Ok(self.run(number, &["true"], b"", Duration::from_secs(2)).is_ok())
        })
    }

    /// Cuts a node's power.
    ///
    /// # Errors
    /// If its QEMU does not end.
    pub fn power_off(&mut self, number: u32) -> anyhow::Result<()> {
        self.needs_machines("power")?;
        if let Some(process) = self.state.node(number)?.process {
            ensure!(process.kill_and_wait(), "node{number}'s QEMU does not end");
        }
        self.set_process(number, None)
    }

    /// Cuts a node's power without noting it: for a thread that holds the lab shared. Call
    /// [`Self::power_off`] afterwards.
    ///
    /// # Errors
    /// If its QEMU does not end.
    pub fn cut_power(&self, number: u32) -> anyhow::Result<()> {
        self.needs_machines("power")?;
        let process = self.state.node(number)?.process;
        ensure!(process.is_none_or(|p| p.kill_and_wait()), "node{number}'s QEMU does not end");
        Ok(())
    }

    /// Powers a node on again; it comes up with its old disk. Does not wait for it.
    ///
    /// # Errors
    /// If it is on already, or QEMU does not start.
    pub fn power_on(&mut self, number: u32) -> anyhow::Result<()> {
        self.needs_machines("power")?;
        if self.is_on(number)? {
            bail!("node{number} is powered on already");
        }
        self.launch(number, &assets::node_image()?)
    }

    /// Whether a node has power.
    ///
    /// # Errors
    /// If there is no such node.
    pub fn is_on(&self, number: u32) -> anyhow::Result<bool> {
        Ok(self.state.node(number)?.process.is_some_and(|process| process.is_alive()))
    }

    /// Stops a whole node as it stands (its clock sees the lost time when it goes on).
    ///
    /// # Errors
    /// If there is no such node.
    pub fn freeze(&self, number: u32) -> anyhow::Result<()> {
        self.signal_node(number, Signal::SIGSTOP)
    }

    /// Lets a frozen node go on.
    ///
    /// # Errors
    /// If there is no such node.
    pub fn unfreeze(&self, number: u32) -> anyhow::Result<()> {
        self.signal_node(number, Signal::SIGCONT)
    }

    fn needs_machines(&self, what: &str) -> anyhow::Result<()> {
        ensure!(
            self.state.backend == Backend::Qemu,
            "plain processes have no {what} to cut: start the lab with `--backend qemu`"
        );
        Ok(())
    }

    fn signal_node(&self, number: u32, signal: Signal) -> anyhow::Result<()> {
        let process = self.state.node(number)?.process;
        process.with_context(|| format!("node{number} is powered off"))?.signal(signal);
        Ok(())
    }

    /// Stops the agent's process inside a node, and nothing else.
    ///
    /// # Errors
    /// If there is none.
    pub fn hang_agent(&self, number: u32) -> anyhow::Result<()> {
        self.signal_agent(number, Signal::SIGSTOP)
    }

    /// Lets a hung agent go on.
    ///
    /// # Errors
    /// If there is none.
    pub fn thaw_agent(&self, number: u32) -> anyhow::Result<()> {
        self.signal_agent(number, Signal::SIGCONT)
    }

    /// Kills the agent's process inside a node; it is started again, its VMs run on.
    ///
    /// # Errors
    /// If there is none.
    pub fn kill_agent(&self, number: u32) -> anyhow::Result<()> {
        self.signal_agent(number, Signal::SIGKILL)
    }

    /// The VM processes are the same program: only the daemon has `--config` as its first argument.
    fn signal_agent(&self, number: u32, signal: Signal) -> anyhow::Result<()> {
        if self.state.backend == Backend::Process {
            return self.signal_node(number, signal);
        }
        let signal = signal.as_str().trim_start_matches("SIG");
        let pids = self.agent_processes(number, "--config")?;
        ensure!(!pids.is_empty(), "node{number} runs no agent");
        self.sh(number, &format!("kill -{signal} {}", pids.join(" "))).map(drop)
    }

    /// The ids, in a node, of the processes of `node-agent` whose first argument is `role`.
    pub(crate) fn agent_processes(&self, number: u32, role: &str) -> anyhow::Result<Vec<String>> {
        // BusyBox as Debian builds it has no pgrep. A VM process was executed as /proc/self/exe.
        let line = format!(
            "for p in /proc/[0-9]*; do read -r comm 2>/dev/null <$p/comm || continue; \
             case $comm in node-agent | exe) ;; *) continue ;; esac; \
             set -- $(tr '\\0' ' ' 2>/dev/null <$p/cmdline); \
             [ \"$2\" = {role} ] && echo ${{p##*/}}; done; true"
        );
        Ok(self.sh(number, &line)?.lines().map(str::to_owned).collect())
    }

    /// Changes the network's rules.
    ///
    /// # Errors
    /// If the switch does not answer.
    pub fn network(&self, change: impl FnOnce(&mut switch::Rules)) -> anyhow::Result<()> {
        let mut rules = self.network_rules()?;
        change(&mut rules);
        let control = self.folder.join("switch/control.sock");
        switch::control(&control, &switch::Command::Set(rules)).map(drop)
    }

    /// The network's rules.
    ///
    /// # Errors
    /// If the switch does not answer.
    pub fn network_rules(&self) -> anyhow::Result<switch::Rules> {
        self.needs_machines("network")?;
        let control = self.folder.join("switch/control.sock");
        Ok(serde_json::from_str(&switch::control(&control, &switch::Command::Get)?)?)
    }

    /// Cuts the link between two nodes.
    ///
    /// # Errors
    /// If the switch does not answer.
    pub fn partition(&self, a: u32, b: u32) -> anyhow::Result<()> {
        self.network(|rules| rules.cut_pair(a, b))
    }

    /// Cuts a node off from all others.
    ///
    /// # Errors
    /// If the switch does not answer.
    pub fn isolate(&self, number: u32) -> anyhow::Result<()> {
        self.network(|rules| rules.isolate(number, self.numbers()))
    }

    /// Takes all cuts, delays and limits back.
    ///
    /// # Errors
    /// If the switch does not answer.
    pub fn heal(&self) -> anyhow::Result<()> {
        self.network(|rules| *rules = switch::Rules::default())
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if self.lifetime != Lifetime::WithUs {
            return;
        }
        // Nobody called `down`: something failed, and the logs may say what.
        match self.keep_logs() {
            Ok(kept) => eprintln!("lab: the nodes' logs are kept in {}", kept.display()),
            Err(error) => eprintln!("lab: the nodes' logs are lost: {error:#}"),
        }
        if let Err(error) = self.end() {
            eprintln!("lab: {error:#}");
        }
    }
}

/// Waits for a condition: asks again every 50 ms.
///
/// # Errors
/// If the limit passes first, or the condition itself fails.
pub fn wait_until(
    limit: Duration,
    what: &str,
    mut condition: impl FnMut() -> anyhow::Result<bool>,
) -> anyhow::Result<()> {
    let deadline = Instant::now() + limit;
    loop {
        if condition()? {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "waited {limit:?} in vain: {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Makes the folder ours: refuses a lab that runs, clears what a former one left.
fn claim(folder: &Path) -> anyhow::Result<Flock<File>> {
    let busy = || format!("a lab runs in {} already: `lab down` ends it", folder.display());
    std::fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
    let lock = File::create(folder.join("lab.lock"))?;
    let lock =
        Flock::lock(lock, FlockArg::LockExclusiveNonblock).map_err(|_| anyhow::anyhow!(busy()))?;
    if let Ok(old) = State::load(folder) {
        ensure!(!old.processes().any(|process| process.is_alive()), busy());
    }
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_name() == "lab.lock" {
            continue;
        }
        if entry.file_type()?.is_dir() {
            std::fs::remove_dir_all(entry.path())?;
        } else {
            std::fs::remove_file(entry.path())?;
        }
    }
    Ok(lock)
}

/// Removes what temporary labs left whose process was killed; their nodes died with it.
fn sweep(labs: &Path) {
    let Ok(entries) = std::fs::read_dir(labs) else { return };
    for folder in entries.flatten().map(|entry| entry.path()) {
        let Ok(lock) = File::open(folder.join("lab.lock")) else { continue };
        let unused = Flock::lock(lock, FlockArg::LockExclusiveNonblock).is_ok();
        if unused && !State::load(&folder).is_ok_and(|old| old.processes().any(|p| p.is_alive())) {
            // What cannot be removed now is tried again by the next lab.
            let _ = std::fs::remove_dir_all(&folder);
        }
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
fn agent_config(number: u32, address: &str) -> String {
    format!(
        "node_name = \"node{number}\"\nadvertise = \"{address}:7400\"\n\
         enrol_advertise = \"{address}:7401\"\nmigration_address = \"{address}\"\n"
    )
}
