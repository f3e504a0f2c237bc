//! What an agent is told about its node: a TOML file, then command-line flags that override it.
//!
//! Owns the keys, their defaults and their checks. Never reads the replicated configuration.
//! Every path, port and timing is here, so that several agents can run side by side on one host.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use proto::Name;
use serde::Deserialize;

/// Where the configuration is looked for when no `--config` is given; it may be missing there.
pub const DEFAULT_PATH: &str = "/etc/holdfast/node-agent.toml";

/// An agent's configuration. `deploy/node-agent.toml` shows every key with its default.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// The node's name in the cluster; absent: the host name's first label.
    pub node_name: Option<String>,
    /// Address and port of the gRPC service for nodes and clients.
    pub listen: SocketAddr,
    /// Address and port that joining nodes enrol at.
    pub enrol_listen: SocketAddr,
    /// `host:port` that the other nodes reach `listen` at; absent: this host's address.
    pub advertise: Option<String>,
    /// `host:port` that joining nodes reach `enrol_listen` at; absent: as `advertise`.
    pub enrol_advertise: Option<String>,
    /// Address that this node's receiving VM processes listen on; absent: `advertise`'s host.
    pub migration_address: Option<String>,
    /// The replicated configuration's database, the node's key, task counters.
    pub data_dir: PathBuf,
    /// Sockets, launch descriptions and state files of VM processes. Emptied by a reboot.
    pub run_dir: PathBuf,
    /// The local Unix socket, for root only; absent: `agent.sock` in `run_dir`.
    pub socket: Option<PathBuf>,
    /// The watchdog that resets this machine when it hangs.
    pub watchdog: Watchdog,
    /// Run HA VMs although no watchdog guards this node.
    pub allow_ha_without_watchdog: bool,
    /// First of the user ids that VM processes get, one each.
    pub uid_base: u32,
    /// Memory that is kept for the host itself, MiB; the rest is for VMs.
    pub reserve_memory_mib: u64,
    /// The program that VM processes run; absent: this one.
    pub vm_program: Option<PathBuf>,
    /// The mounted tree.
    pub tree: Tree,
    /// What this node is to the cluster.
    pub node: NodeRole,
    /// What clients may ask of this node.
    pub limits: Limits,
    /// Timings.
    pub timing: Timing,
    /// What is logged.
    pub log: Log,
}

/// What a node is to its cluster.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct NodeRole {
    /// What fails together with it (a rack, a room): voters are spread over zones. Empty: nothing.
    pub zone: String,
    /// Here to vote: no KVM, no watchdog, no VMs.
    pub witness: bool,
}

/// Which watchdog is used.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case", try_from = "String")]
pub enum Watchdog {
    /// The first of `/dev/watchdog0`, `/dev/watchdog`, that is there.
    Auto,
    /// None: a hung machine is not reset.
    None,
    /// This device.
    Device(PathBuf),
}

impl TryFrom<String> for Watchdog {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        match text.as_str() {
            "auto" => Ok(Self::Auto),
            "none" => Ok(Self::None),
            path if path.starts_with('/') => Ok(Self::Device(path.into())),
            other => {
                Err(format!("`{other}` is not a watchdog: write auto, none or a device's path"))
            }
        }
    }
}

/// The replicated configuration as files.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Tree {
    /// Where it is mounted: an absolute path, or `off`.
    pub mount: PathBuf,
}

impl Default for Tree {
    fn default() -> Self {
        Self { mount: "/etc/holdfast/cluster".into() }
    }
}

impl Tree {
    /// The mount point; `None` where there is to be none.
    #[must_use]
    pub fn path(&self) -> Option<&Path> {
        (self.mount != Path::new("off")).then_some(&*self.mount)
    }

    /// Whether a path is in it. The agent reads nothing there: it would wait for itself.
    #[must_use]
    pub fn holds(&self, path: &Path) -> bool {
        self.path().is_some_and(|mount| path.starts_with(mount))
    }
}

/// What clients may ask of a node. How much the configuration may take is `cluster.toml`'s to say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Watches of the configuration at the same time.
    pub client_watches: usize,
    /// Requests of one client to the configuration in a second; 0: no limit.
    pub client_requests_per_s: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self { client_watches: 2_000, client_requests_per_s: 500 }
    }
}

/// Timings, in milliseconds. All nodes of a cluster must agree on `lease_ms`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Timing {
    /// The node lease `L`: this long after it was last heard, a node is declared dead.
    pub lease_ms: u64,
    /// How often the Raft leader sends its own.
    pub raft_heartbeat_ms: u64,
    /// Least time without the leader before a node campaigns.
    pub election_min_ms: u64,
    /// Most time without the leader before a node campaigns.
    pub election_max_ms: u64,
    /// How long a request waits for a quorum before it is refused.
    pub quorum_wait_ms: u64,
    /// A VM process that gives no sign of life for this long hangs: that of an HA VM is ended and
    /// started again.
    pub hang_limit_ms: u64,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            lease_ms: 10_000,
            raft_heartbeat_ms: 200,
            election_min_ms: 500,
            election_max_ms: 1_000,
            quorum_wait_ms: 3_500,
            hang_limit_ms: 30_000,
        }
    }
}

impl Timing {
    /// The node lease `L`.
    #[must_use]
    pub fn lease(&self) -> Duration {
        Duration::from_millis(self.lease_ms)
    }
}

/// What is logged, to standard error.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Log {
    /// tracing's filter; `RUST_LOG` overrides it.
    pub filter: String,
    /// One JSON object a line, for journald and collectors.
    pub json: bool,
}

impl Default for Log {
    fn default() -> Self {
        Self { filter: "info,openraft=warn".to_owned(), json: false }
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            node_name: None,
            listen: SocketAddr::from(([0, 0, 0, 0], 7400)),
            enrol_listen: SocketAddr::from(([0, 0, 0, 0], 7401)),
            advertise: None,
            enrol_advertise: None,
            migration_address: None,
            data_dir: "/var/lib/holdfast".into(),
            run_dir: "/run/holdfast".into(),
            socket: None,
            watchdog: Watchdog::Auto,
            allow_ha_without_watchdog: false,
            uid_base: 900_000,
            reserve_memory_mib: 128,
            vm_program: None,
            tree: Tree::default(),
            node: NodeRole::default(),
            limits: Limits::default(),
            timing: Timing::default(),
            log: Log::default(),
        }
    }
}

/// Command-line flags; each overrides its key of the file.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct Flags {
    /// Configuration file [default: /etc/holdfast/node-agent.toml, if it is there]
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// The node's name in the cluster
    #[arg(long, value_name = "NAME")]
    pub node_name: Option<String>,
    /// Address and port of the gRPC service
    #[arg(long, value_name = "ADDR:PORT")]
    pub listen: Option<SocketAddr>,
    /// Address and port that joining nodes enrol at
    #[arg(long, value_name = "ADDR:PORT")]
    pub enrol_listen: Option<SocketAddr>,
    /// host:port that the others reach the gRPC service at
    #[arg(long, value_name = "HOST:PORT")]
    pub advertise: Option<String>,
    /// host:port that joining nodes reach the enrolment service at
    #[arg(long, value_name = "HOST:PORT")]
    pub enrol_advertise: Option<String>,
    /// Address for incoming migrations
    #[arg(long, value_name = "ADDR")]
    pub migration_address: Option<String>,
    /// Data folder
    #[arg(long, value_name = "DIR")]
    pub data_dir: Option<PathBuf>,
    /// Run folder
    #[arg(long, value_name = "DIR")]
    pub run_dir: Option<PathBuf>,
    /// Local Unix socket
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,
    /// auto, none or a device
    #[arg(long, value_name = "WATCHDOG")]
    pub watchdog: Option<String>,
    /// Run HA VMs although no watchdog guards this node
    #[arg(long)]
    pub allow_ha_without_watchdog: bool,
    /// First user id for VM processes
    #[arg(long, value_name = "UID")]
    pub uid_base: Option<u32>,
    /// What fails together with this node: voters are spread over zones
    #[arg(long, value_name = "ZONE")]
    pub zone: Option<String>,
    /// Only vote: no KVM, no VMs
    #[arg(long)]
    pub witness: bool,
    /// The node lease in milliseconds
    #[arg(long, value_name = "MS")]
    pub lease_ms: Option<u64>,
    /// One JSON object a line on standard error
    #[arg(long)]
    pub log_json: bool,
}

/// Why a configuration is refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is not what it should be; the text names line and column.
    #[error("{path}: {text}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Line, column and reason.
        text: String,
    },
    /// A value makes no sense.
    #[error("configuration: {0}")]
    Value(String),
}

impl Config {
    /// Reads the file, applies the flags, checks the result.
    ///
    /// # Errors
    /// A file that was named and is missing, a bad key or value.
    pub fn load(flags: &Flags) -> Result<Self, ConfigError> {
        let mut config = match &flags.config {
            Some(path) => Self::read(path)?,
            None if Path::new(DEFAULT_PATH).exists() => Self::read(Path::new(DEFAULT_PATH))?,
            None => Self::default(),
        };
        config.apply(flags)?;
        config.check()?;
        // A dead mount over it would keep the next agent from reading it.
        config
            .check_visible("--config", flags.config.as_deref().unwrap_or(DEFAULT_PATH.as_ref()))?;
        Ok(config)
    }

    fn read(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        toml::from_str(&text).map_err(|error| ConfigError::Parse {
            path: path.to_owned(),
            text: error.to_string().trim_end().to_owned(),
        })
    }

    fn apply(&mut self, flags: &Flags) -> Result<(), ConfigError> {
        fn set<T: Clone>(key: &mut T, flag: Option<&T>) {
            if let Some(value) = flag {
                key.clone_from(value);
            }
        }
        fn set_some<T: Clone>(key: &mut Option<T>, flag: Option<&T>) {
            if let Some(value) = flag {
                *key = Some(value.clone());
            }
        }
        set_some(&mut self.node_name, flags.node_name.as_ref());
        set(&mut self.listen, flags.listen.as_ref());
        set(&mut self.enrol_listen, flags.enrol_listen.as_ref());
        set_some(&mut self.advertise, flags.advertise.as_ref());
        set_some(&mut self.enrol_advertise, flags.enrol_advertise.as_ref());
        set_some(&mut self.migration_address, flags.migration_address.as_ref());
        set(&mut self.data_dir, flags.data_dir.as_ref());
        set(&mut self.run_dir, flags.run_dir.as_ref());
        set_some(&mut self.socket, flags.socket.as_ref());
        if let Some(watchdog) = &flags.watchdog {
            self.watchdog = watchdog.clone().try_into().map_err(ConfigError::Value)?;
        }
        self.allow_ha_without_watchdog |= flags.allow_ha_without_watchdog;
        set(&mut self.uid_base, flags.uid_base.as_ref());
        set(&mut self.node.zone, flags.zone.as_ref());
        self.node.witness |= flags.witness;
        set(&mut self.timing.lease_ms, flags.lease_ms.as_ref());
        self.log.json |= flags.log_json;
        Ok(())
    }

    fn check(&self) -> Result<(), ConfigError> {
        let timing = &self.timing;
        let refuse = |text: String| Err(ConfigError::Value(text));
        ha_manager::Timing::new(timing.lease_ms)
            .map_err(|error| ConfigError::Value(format!("timing.lease_ms: {error}")))?;
        if !(1_000..=3_600_000).contains(&timing.hang_limit_ms) {
            return Err(ConfigError::Value(format!(
                "timing.hang_limit_ms = {}: give 1000 to 3600000",
                timing.hang_limit_ms
            )));
        }
        let raft = (timing.raft_heartbeat_ms, timing.election_min_ms, timing.election_max_ms);
        if raft.0 == 0 || raft.1 < raft.0.saturating_mul(2) || raft.2 <= raft.1 {
            return refuse(format!(
                "timing: raft_heartbeat_ms = {}, election_min_ms = {}, election_max_ms = {} are \
                 refused: the election must wait for two heartbeats or more, and max exceed min",
                raft.0, raft.1, raft.2
            ));
        }
        if let Some(name) = &self.node_name {
            name.parse::<Name>().map_err(|e| ConfigError::Value(format!("node_name: {e}")))?;
        }
        for (key, value) in
            [("advertise", &self.advertise), ("enrol_advertise", &self.enrol_advertise)]
        {
            if let Some(value) = value
                && split_host_port(value).is_none()
            {
                return refuse(format!("{key} = \"{value}\" is refused: write host:port"));
            }
        }
        if let Some(path) = self.tree.path().filter(|path| !path.is_absolute()) {
            return refuse(format!(
                "tree.mount = \"{}\" is refused: give an absolute path, or \"off\"",
                path.display()
            ));
        }
        if !self.node.zone.is_empty() {
            let zone = self.node.zone.parse::<Name>();
            zone.map_err(|e| ConfigError::Value(format!("node.zone: {e}")))?;
        }
        self.check_visible("data_dir", &self.data_dir)?;
        self.check_visible("run_dir", &self.run_dir)?;
        self.check_visible("socket", &self.socket_path())?;
        if !(1..=100_000).contains(&self.limits.client_watches) {
            return refuse(format!(
                "limits.client_watches = {} is refused: give 1 to 100000",
                self.limits.client_watches
            ));
        }
        if self.uid_base < 1000 {
            return refuse(format!("uid_base = {} is refused: give 1000 or more", self.uid_base));
        }
        Ok(())
    }

    fn check_visible(&self, key: &str, path: &Path) -> Result<(), ConfigError> {
        if !self.tree.holds(path) {
            return Ok(());
        }
        Err(ConfigError::Value(format!(
            "tree.mount = \"{}\" is refused: it would hide {key} = \"{}\"; give an empty folder, or \
             \"off\"",
            self.tree.mount.display(),
            path.display()
        )))
    }

    /// The local Unix socket.
    #[must_use]
    pub fn socket_path(&self) -> PathBuf {
        self.socket.clone().unwrap_or_else(|| self.run_dir.join("agent.sock"))
    }

    /// The node's name: as configured, else the host name's first label.
    ///
    /// # Errors
    /// If neither gives a valid name.
    pub fn default_node_name(&self) -> Result<Name, ConfigError> {
        let text = match &self.node_name {
            Some(name) => name.clone(),
            None => nix::unistd::gethostname()
                .ok()
                .and_then(|name| name.into_string().ok())
                .map(|name| name.split('.').next().unwrap_or_default().to_ascii_lowercase())
                .unwrap_or_default(),
        };
        text.parse().map_err(|error| {
            ConfigError::Value(format!("{error}; set node_name in the configuration"))
        })
    }

    /// `host:port` that the others reach the gRPC service at.
    #[must_use]
    pub fn advertised_api(&self) -> String {
        self.advertise.clone().unwrap_or_else(|| advertised(self.listen))
    }

    /// `host:port` that joining nodes reach the enrolment service at.
    #[must_use]
    pub fn advertised_enrol(&self) -> String {
        if let Some(address) = &self.enrol_advertise {
            return address.clone();
        }
        match self.advertise.as_deref().and_then(split_host_port) {
            Some((host, _)) => format!("{host}:{}", self.enrol_listen.port()),
            None => advertised(self.enrol_listen),
        }
    }

    /// The address that receiving VM processes bind: `migration_address` where it is one of this
    /// host's own in numbers, else all.
    #[must_use]
    pub fn migration_listen(&self) -> IpAddr {
        let own = self.advertised_migration().parse().ok();
        own.filter(|address| std::net::UdpSocket::bind((*address, 0)).is_ok())
            .unwrap_or(IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED))
    }

    /// The address, without a port, that receiving VM processes listen on and are reached at.
    #[must_use]
    pub fn advertised_migration(&self) -> String {
        if let Some(address) = &self.migration_address {
            return address.clone();
        }
        let api = self.advertised_api();
        split_host_port(&api).map_or_else(|| api.clone(), |(host, _)| host.to_owned())
    }
}

/// Splits `host:port` and `[v6]:port`; `None` if it is neither.
fn split_host_port(text: &str) -> Option<(&str, u16)> {
    let (host, port) = text.rsplit_once(':')?;
    let bare = host.strip_prefix('[').map_or(Some(host), |host| host.strip_suffix(']'))?;
    (!bare.is_empty()).then_some((host, port.parse().ok()?))
}

/// The address a wildcard listener is most likely reached at: the source address of the default
/// route (a connected UDP socket sends nothing), else loopback.
fn advertised(listen: SocketAddr) -> String {
    if !listen.ip().is_unspecified() {
        return listen.to_string();
    }
    let local = std::net::UdpSocket::bind("0.0.0.0:0").and_then(|socket| {
        socket.connect("192.0.2.1:9")?;
        socket.local_addr()
    });
    let ip = local.map_or(std::net::Ipv4Addr::LOCALHOST.into(), |address| address.ip());
    SocketAddr::new(ip, listen.port()).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_documented_file_is_the_default() {
        let text = include_str!("../../deploy/node-agent.toml");
        // The file shows every key commented out; uncommented, it must parse to the defaults.
        let uncommented: String = text
            .lines()
            .map(|line| line.strip_prefix("#= ").unwrap_or(line))
            .flat_map(|line| [line, "\n"])
            .collect();
        let shown: Config = toml::from_str(&uncommented).unwrap();
        let expected = Config {
            node_name: Some("node1".into()),
            advertise: Some("192.0.2.1:7400".into()),
            enrol_advertise: Some("192.0.2.1:7401".into()),
            migration_address: Some("192.0.2.1".into()),
            socket: Some("/run/holdfast/agent.sock".into()),
            vm_program: Some("/usr/bin/node-agent".into()),
            node: NodeRole { zone: "rack1".into(), witness: false },
            ..Config::default()
        };
        assert_eq!(shown, expected);
        assert_eq!(toml::from_str::<Config>(text).unwrap(), Config::default());
    }

    #[test]
    fn flags_override_the_file_and_nonsense_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.toml");
        std::fs::write(&path, "listen = \"127.0.0.1:1\"\n[timing]\nlease_ms = 5000\n").unwrap();
        let flags = Flags {
            config: Some(path.clone()),
            listen: Some(([127, 0, 0, 1], 2).into()),
            watchdog: Some("none".into()),
            ..Flags::default()
        };
        let config = Config::load(&flags).unwrap();
        assert_eq!(config.listen.port(), 2);
        assert_eq!(config.timing.lease_ms, 5000);
        assert_eq!(config.watchdog, Watchdog::None);

        for (text, expected) in [
            ("nonsense = 1", "nonsense"),
            ("watchdog = \"dog\"", "auto, none or a device"),
            ("[timing]\nlease_ms = 10", "give 3000"),
            ("[timing]\nelection_max_ms = 100", "election"),
            ("node_name = \"Node_1\"", "not a valid name"),
            ("advertise = \"host\"", "host:port"),
            ("uid_base = 0", "uid_base"),
            ("[limits]\nclient_watches = 0", "give 1 to 100000"),
            ("[limits]\nclient_requests_per_s = -1", "client_requests_per_s"),
            ("[tree]\nmount = \"here\"", "an absolute path, or \"off\""),
            ("[node]\nzone = \"Rack 1\"", "node.zone"),
            ("[tree]\nmount = \"/var/lib\"", "it would hide data_dir"),
            ("socket = \"/etc/a/s\"\n[tree]\nmount = \"/etc/a\"", "it would hide socket"),
        ] {
            std::fs::write(&path, text).unwrap();
            let flags = Flags { config: Some(path.clone()), ..Flags::default() };
            let error = Config::load(&flags).unwrap_err().to_string();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }

    #[test]
    fn addresses_follow_from_each_other() {
        let config = Config { advertise: Some("n1.example:7400".into()), ..Config::default() };
        assert_eq!(config.advertised_enrol(), "n1.example:7401");
        assert_eq!(config.advertised_migration(), "n1.example");
        assert_eq!(split_host_port("[::1]:7400"), Some(("[::1]", 7400)));
        for bad in ["", "host", ":1", "host:", "host:99999", "[]:1"] {
            assert_eq!(split_host_port(bad), None, "{bad}");
        }
    }
}
