//! Agents with their trees mounted, in this process and as processes of their own.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use node_agent::config::{Config, Tree};
use proto::v1::config_client::ConfigClient;
use proto::v1::membership_client::MembershipClient;
use proto::v1::storage_client::StorageClient;
use proto::v1::{
    ClusterStatusRequest, CreateNetworkRequest, GetRequest, HistoryRequest, InitRequest, Network,
};
use tempfile::TempDir;

use crate::rig::{self, Rig};

/// Longer than anything here takes on a slow machine.
const LIMIT: Duration = Duration::from_secs(60);

/// A VM's document. Its second line says how many CPUs it has.
pub(crate) const WEB: &str = "name = \"web\"\ncpus = 1\nmemory = \"64MiB\"\n[boot]\nkernel = \"shared/vmlinuz\"\n[[disks]]\nimage = \"shared/web.raw\"\nsize = \"1MiB\"\n[[nics]]\nnetwork = \"lan\"\n";

/// Whether the tree can be mounted here; says so if not.
pub(crate) fn can_mount(test: &str) -> bool {
    let device = std::fs::File::options().read(true).write(true).open("/dev/fuse");
    let reason = match device {
        Err(error) => format!("/dev/fuse cannot be used: {error}"),
        Ok(_) if !nix::unistd::geteuid().is_root() => "mounting needs root".to_owned(),
        Ok(_) => return true,
    };
    crate::skip::skip(test, &reason);
    false
}

/// Whether a program is installed.
pub(crate) fn has(program: &str) -> bool {
    let found = Command::new("sh").args(["-c", &format!("command -v {program}")]).output();
    found.is_ok_and(|output| output.status.success())
}

/// Whether a tree is mounted exactly there.
pub(crate) fn is_mounted(path: &Path) -> bool {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    let point = path.to_string_lossy();
    mounts.lines().any(|line| line.split(' ').nth(4) == Some(&point))
}

/// Waits for a condition, with a limit.
pub(crate) async fn until(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let begin = Instant::now();
    while !holds().await {
        assert!(begin.elapsed() < LIMIT, "did not happen: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Runs a script in a folder, apart from the agents' threads: what it said, as an error where it
/// failed.
pub(crate) async fn run(folder: &Path, script: &str) -> Result<String, String> {
    let mut command = Command::new("bash");
    command.args(["-ec", script]).current_dir(folder).stdin(Stdio::null());
    command.env("LC_ALL", "C").env("HOME", "/nonexistent");
    command.env("OUTSIDE", folder.parent().unwrap_or(folder));
    let output = tokio::task::spawn_blocking(move || command.output());
    let output = output.await.unwrap().map_err(|error| error.to_string())?;
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text).into_owned();
    if output.status.success() { Ok(text) } else { Err(format!("{}: {text}", output.status)) }
}

/// Types into nano, which wants a terminal: goes to the line of the CPUs, writes it anew, saves.
pub(crate) fn nano(cpus: u32) -> String {
    format!(
        r#"cat > $OUTSIDE/nano.py <<'END'
import os, pty, select, sys, time
pid, fd = pty.fork()
if pid == 0:
    os.environ["TERM"] = "xterm"
    os.execvp("nano", ["nano", "-I", "+2,1", "vms/web.toml"])
end, keys = time.time() + 40, [b"\x0b", b"cpus = {cpus}\r", b"\x13", b"\x18"]
while time.time() < end:
    ready, _, _ = select.select([fd], [], [], 1.0)
    if ready:
        try:
            got = os.read(fd, 65536)
        except OSError:
            got = b""
        if not got:
            break
    elif keys:
        os.write(fd, keys.pop(0))
else:
    os.kill(pid, 9)
_, status = os.waitpid(pid, 0)
sys.exit(os.waitstatus_to_exitcode(status))
END
python3 $OUTSIDE/nano.py"#
    )
}

/// A temporary folder with a tree mounted in it; nothing stays mounted, also after a test that
/// failed.
pub(crate) struct Folder(TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }
    fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // It fails where nothing is mounted, as it should be.
        let detach = nix::mount::MntFlags::MNT_DETACH;
        while nix::mount::umount2(&self.path().join("tree"), detach).is_ok() {}
    }
}

/// An agent in this process, a member, with its tree mounted.
pub(crate) struct Mounted {
    pub(crate) rig: Rig,
    folder: Folder,
}

fn config(folder: &Path) -> Config {
    Config { tree: Tree { mount: folder.join("tree") }, ..rig::config(folder) }
}

impl Mounted {
    /// The first of a cluster, with a pool, a kernel and a network.
    pub(crate) async fn new() -> Self {
        let folder = Folder::new();
        let rig = Rig::with(config(folder.path())).await;
        rig.init("n1").await;
        rig.online(1).await;
        rig.pool("shared", "shared-dir", &folder.path().join("shared")).await;
        rig.image("shared", "vmlinuz", "kernel", b"\x7fELF".to_vec()).await;
        let network =
            Network { name: "lan".into(), bridge: "hf-test".into(), uplink: String::new() };
        let mut storage = StorageClient::new(rig.channel.clone());
        storage.create_network(CreateNetworkRequest { network: Some(network) }).await.unwrap();
        let this = Self { rig, folder };
        this.mounted().await;
        this
    }

    /// Another member.
    pub(crate) async fn another(&self, name: &str) -> Self {
        let folder = Folder::new();
        let rig = Rig::with(config(folder.path())).await;
        rig.join(&self.rig, name).await;
        self.rig.online(2).await;
        let this = Self { rig, folder };
        this.mounted().await;
        this
    }

    async fn mounted(&self) {
        let storage = self.top().join("storage.toml");
        until("it is mounted", async || storage.exists()).await;
    }

    /// Where its tree is mounted.
    pub(crate) fn top(&self) -> PathBuf {
        self.folder.path().join("tree")
    }

    /// Runs a script in the tree.
    pub(crate) async fn shell(&self, script: &str) -> Result<String, String> {
        run(&self.top(), script).await
    }

    /// The VM's document, by the API.
    pub(crate) async fn text(&self) -> String {
        let get = GetRequest { key: "vms/web.toml".into(), ..GetRequest::default() };
        let got = ConfigClient::new(self.rig.channel.clone()).get(get).await.unwrap().into_inner();
        String::from_utf8(got.kv.map(|kv| kv.value).unwrap_or_default()).unwrap()
    }

    /// Author and path of a file's last change.
    pub(crate) async fn last_change(&self, path: &str) -> (String, String) {
        let request =
            HistoryRequest { prefix: path.into(), exact: true, ..HistoryRequest::default() };
        let mut config = ConfigClient::new(self.rig.channel.clone());
        let history = config.history(request).await.unwrap().into_inner();
        let change = history.changes.into_iter().next().unwrap();
        (change.author, change.path)
    }

    /// Ends the agent; its folder is left.
    pub(crate) async fn end(self) -> Folder {
        self.rig.agent.end().await;
        self.folder
    }
}

/// An agent as a process of its own, a member.
pub(crate) struct Process {
    child: Child,
    config: Config,
    before: String,
    folder: Folder,
}

impl Process {
    /// Starts one, in a mount namespace of its own if a script is to run `before` it.
    pub(crate) async fn start(before: &str) -> Self {
        let folder = Folder::new();
        let config = config(folder.path());
        let text = format!(
            "node_name = \"n1\"\nlisten = \"{}\"\nenrol_listen = \"{}\"\ndata_dir = \"{}\"\n\
             run_dir = \"{}\"\nwatchdog = \"none\"\nallow_ha_without_watchdog = true\n[tree]\n\
             mount = \"{}\"\n",
            config.listen,
            config.enrol_listen,
            config.data_dir.display(),
            config.run_dir.display(),
            config.tree.mount.display()
        );
        std::fs::write(folder.path().join("agent.toml"), text).unwrap();
        let before = before.to_owned();
        let child = spawn(&before, folder.path());
        let this = Self { child, config, before, folder };
        let socket = this.config.socket_path();
        until("it listens", async || socket.exists()).await;
        let request = InitRequest { cluster_name: "test".into(), node_name: "n1".into() };
        let channel = rig::connect(socket).await;
        MembershipClient::new(channel).init(request).await.unwrap();
        this
    }

    pub(crate) fn top(&self) -> PathBuf {
        self.folder.path().join("tree")
    }

    /// The one line of its log with these words, once there is one.
    pub(crate) async fn log_line(&self, words: &str) -> String {
        let log = self.folder.path().join("log");
        let lines = || -> Vec<String> {
            let text = std::fs::read_to_string(&log).unwrap_or_default();
            text.lines().filter(|line| line.contains(words)).map(str::to_owned).collect()
        };
        until(words, async || !lines().is_empty()).await;
        let lines = lines();
        assert_eq!(lines.len(), 1, "{lines:?}");
        lines[0].clone()
    }

    /// It is a member, and says so.
    pub(crate) async fn init_is_known(&self) {
        let channel = rig::connect(self.config.socket_path()).await;
        let status = MembershipClient::new(channel).status(ClusterStatusRequest {}).await;
        assert!(status.unwrap().into_inner().initialized);
    }

    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    pub(crate) fn start_again(&mut self) {
        self.child = spawn(&self.before, self.folder.path());
    }

    /// Ends it with SIGTERM.
    pub(crate) fn terminate(&mut self) {
        let pid = nix::unistd::Pid::from_raw(self.child.id().try_into().unwrap());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
        assert!(self.child.wait().unwrap().success());
    }
}

fn spawn(before: &str, folder: &Path) -> Child {
    let program = env!("CARGO_BIN_EXE_node-agent");
    let config = folder.join("agent.toml");
    let log = std::fs::File::options().create(true).append(true).open(folder.join("log")).unwrap();
    let run = format!("{before} && exec {program} --config {}", config.display());
    let mut command = match before {
        "true" => Command::new("sh"),
        _ => {
            let mut own = Command::new("unshare");
            own.args(["--mount", "sh"]);
            own
        }
    };
    command.args(["-c", &run]).env("RUST_LOG", "info").stderr(log).spawn().unwrap()
}

impl Drop for Process {
    /// Nothing is left behind, also by a test that failed.
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}
