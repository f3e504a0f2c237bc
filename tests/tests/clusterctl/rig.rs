//! Agents as processes of their own, and clusterctl.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;
use tests::lab::assets::program;
use tests::ports::free_port;

/// Longer than anything here takes on a slow machine.
pub(crate) const LIMIT: Duration = Duration::from_secs(90);

/// A VM's document.
pub(crate) const WEB: &str = "# the shop\nname = \"web\"\ncpus = 2 # enough\nmemory = \"64MiB\"\n\n[boot]\nkernel = \"shared/vmlinuz\"\n";

/// Whether agents can run here; says so if not.
pub(crate) fn can_run(test: &str) -> bool {
    if nix::unistd::geteuid().is_root() {
        return true;
    }
    tests::skip::skip(test, "agents and their sockets are root's");
    false
}

/// An agent, and where it keeps what it has.
pub(crate) struct Node {
    child: Child,
    folder: TempDir,
}

/// How a command went.
#[derive(Debug)]
pub(crate) struct Ran {
    pub(crate) exit: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Ran {
    /// What it printed; it must have succeeded.
    pub(crate) fn good(self) -> String {
        assert_eq!(self.exit, Some(0), "{self:?}");
        self.stdout
    }

    pub(crate) fn json(self) -> serde_json::Value {
        serde_json::from_str(&self.good()).unwrap()
    }

    /// Refused with this exit code and these words, and nothing on stdout.
    pub(crate) fn refused(&self, exit: i32, words: &[&str]) {
        assert_eq!(self.exit, Some(exit), "{self:?}");
        for word in words {
            assert!(self.stderr.contains(word), "no `{word}`: {self:?}");
        }
        assert_eq!(self.stdout, "", "{self:?}");
    }
}

/// Waits for a condition, with a limit.
pub(crate) fn wait(what: &str, mut holds: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !holds() {
        assert!(begin.elapsed() < LIMIT, "did not happen: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

impl Node {
    /// One that is in no cluster yet. `more`: lines for its configuration; without any its tree is
    /// not mounted.
    pub(crate) fn new(name: &str, more: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let more = if more.is_empty() { "[tree]\nmount = \"off\"\n" } else { more };
        let text = format!(
            "node_name = \"{name}\"\nlisten = \"127.0.0.1:{}\"\nenrol_listen = \"127.0.0.1:{}\"\n\
             data_dir = \"{folder}/data\"\nrun_dir = \"{folder}/run\"\nwatchdog = \"none\"\n\
             allow_ha_without_watchdog = true\n{}",
            free_port(),
            free_port(),
            more.replace("FOLDER", &folder.path().display().to_string()),
            folder = folder.path().display(),
        );
        std::fs::write(folder.path().join("agent.toml"), text).unwrap();
        let child = spawn(folder.path());
        let this = Self { child, folder };
        this.listens();
        this
    }

    /// The first of a cluster, with a pool that has a kernel.
    pub(crate) fn first(more: &str) -> Self {
        let this = Self::new("n1", more);
        this.ctl(&["cluster", "init", "--name", "test"]).good();
        let (pool, kernel) = (this.path("shared"), this.write("vmlinuz", b"\x7fELF"));
        wait("it is online", || {
            let list = this.ctl(&["node", "list", "-o", "json"]);
            list.exit == Some(0) && list.stdout.contains("\"online\"")
        });
        let create = ["storage", "create", "shared", "--kind", "shared-dir", "--create", "--path"];
        this.ctl(&[&create[..], &[pool.to_str().unwrap()]].concat()).good();
        let kernel = kernel.to_str().unwrap();
        this.ctl(&["image", "import", kernel, "--pool", "shared", "--kind", "kernel"]).good();
        this
    }

    /// With a VM besides.
    pub(crate) fn with_vm() -> Self {
        let this = Self::first("");
        let file = this.write("web.toml", WEB.as_bytes());
        this.ctl(&["config", "apply", "-f", file.to_str().unwrap()]).good();
        this
    }

    /// Lets another one join.
    pub(crate) fn join(&self, name: &str) -> Self {
        let other = Self::new(name, "");
        let token = self.ctl(&["cluster", "token", "create"]).good();
        other.ctl(&["cluster", "join", token.trim()]).good();
        other
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Writes a file beside the agent's own.
    pub(crate) fn write(&self, name: &str, content: &[u8]) -> PathBuf {
        let path = self.path(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, content).unwrap();
        path
    }

    /// clusterctl that asks this node, with nothing of the user's.
    pub(crate) fn command(&self) -> Command {
        let mut command = Command::new(program("clusterctl").unwrap());
        command.env_remove("HOLDFAST_CONTEXT").env("HOLDFAST_SOCKET", self.path("run/agent.sock"));
        command.env("HOLDFAST_CONFIG_DIR", self.path("config")).env_remove("EDITOR");
        command.env("TMPDIR", self.folder.path()).stdin(Stdio::null());
        command
    }

    pub(crate) fn ctl<S: AsRef<OsStr>>(&self, arguments: &[S]) -> Ran {
        ran(self.command().args(arguments))
    }

    /// With an editor that is a shell script; `$1` is the file, `$ctl` is clusterctl.
    pub(crate) fn edit(&self, script: &str, path: &str) -> Ran {
        let editor = self.write("editor", script.as_bytes());
        let mut command = self.command();
        command.env("VISUAL", format!("sh {}", editor.display()));
        command.env("ctl", program("clusterctl").unwrap());
        ran(command.args(["config", "edit", path]))
    }

    /// A file of the configuration.
    pub(crate) fn get(&self, path: &str) -> String {
        self.ctl(&["config", "get", path]).good()
    }

    /// The revision of a file's last change.
    pub(crate) fn last_change(&self, path: &str) -> u64 {
        let got = self.ctl(&["config", "get", path, "-o", "json"]).json();
        got["mod_revision"].as_u64().unwrap()
    }

    /// All of people's files, with the revision of each.
    pub(crate) fn files(&self) -> String {
        self.ctl(&["config", "ls", "-o", "json"]).good()
    }

    fn listens(&self) {
        // Asked, not looked at: a socket of a killed agent is there too.
        wait("it answers", || {
            let status = self.ctl(&["cluster", "status", "-o", "json"]);
            status.exit == Some(0) || status.stderr.contains("cluster init")
        });
    }

    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Still there for the kernel, which takes what is sent to it; it answers nothing, as a machine
    /// that lost its power.
    pub(crate) fn freeze(&self) {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.child.id()).unwrap());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGSTOP).unwrap();
    }

    pub(crate) fn start_again(&mut self) {
        self.child = spawn(self.folder.path());
        self.listens();
    }
}

fn ran(command: &mut Command) -> Ran {
    let output = command.output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    Ran { exit: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
}

fn spawn(folder: &Path) -> Child {
    let log = std::fs::File::options().create(true).append(true).open(folder.join("log")).unwrap();
    let mut command = Command::new(program("node-agent").unwrap());
    command.arg("--config").arg(folder.join("agent.toml")).env("RUST_LOG", "info");
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().unwrap()
}

impl Drop for Node {
    /// Nothing is left behind, also by a test that failed.
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", std::fs::read_to_string(self.path("log")).unwrap_or_default());
        }
        drop(self.child.kill());
        drop(self.child.wait());
        let detach = nix::mount::MntFlags::MNT_DETACH;
        while nix::mount::umount2(&self.path("tree"), detach).is_ok() {}
    }
}
