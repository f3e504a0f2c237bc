//! What the lab breaks and mends: a node's power, a node or an agent that hangs, links.

use anyhow::{Context, bail, ensure};
use nix::sys::signal::Signal;

use super::state::Backend;
use super::{Lab, assets, switch};

impl Lab {
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

    /// The id, in its node, of the agent's process.
    ///
    /// # Errors
    /// If there is none.
    pub fn agent_pid(&self, number: u32) -> anyhow::Result<String> {
        let pids = self.agent_processes(number, "--config")?;
        pids.into_iter().next().with_context(|| format!("node{number} runs no agent"))
    }

    /// The VM processes are the same program: only the daemon has `--config` as its first argument.
    fn signal_agent(&self, number: u32, signal: Signal) -> anyhow::Result<()> {
        if self.state.backend == Backend::Process {
            return self.signal_node(number, signal);
        }
        let signal = signal.as_str().trim_start_matches("SIG");
        let pid = self.agent_pid(number)?;
        self.sh(number, &format!("kill -{signal} {pid}")).map(drop)
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
