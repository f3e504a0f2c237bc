//! `clusterctl vm`: virtual machines.

use std::io::Read;
use std::path::{Path, PathBuf};

use clap::Subcommand;
use proto::v1;
use proto::v1::vms_client::VmsClient;
use serde::{Deserialize, Serialize};
use tonic::transport::Channel;

use crate::commands::{config, console};
use crate::connect::Session;
use crate::failure::{Exit, Failure};
use crate::output::{self, or_dash, yes};
use crate::wait::OnInterrupt;

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Make a VM from a document
    #[command(
        after_help = "Examples:\n  clusterctl vm create web.toml --start\n  clusterctl vm create -f web.toml --dry-run\n  clusterctl vm create - --node node2 < web.toml\n\nA document:\n  name = \"web\"\n  cpus = 2\n  memory = \"512MiB\"\n  [boot]\n  kernel = \"shared/vmlinuz\"\n  initrd = \"shared/guest.cpio.gz\"\n  cmdline = \"console=ttyS0\"\n  [[disks]]\n  image = \"shared/web.raw\"\n  size = \"1GiB\"\n  [[nics]]\n  network = \"lan\"\n  [ha]\n  enabled = true"
    )]
    Create {
        /// The document, TOML; `-` reads stdin
        #[arg(value_name = "FILE", required_unless_present = "file", conflicts_with = "file")]
        document: Option<PathBuf>,
        /// The same
        #[arg(short, long)]
        file: Option<PathBuf>,
        /// Start it too
        #[arg(long)]
        start: bool,
        /// On this node; the least loaded where absent
        #[arg(long, default_value = "", hide_default_value = true)]
        node: String,
        /// Check everything, change nothing
        #[arg(long, conflicts_with = "start")]
        dry_run: bool,
    },
    /// All VMs
    #[command(
        visible_alias = "ls",
        after_help = "Examples:\n  clusterctl vm list\n  clusterctl vm list -o json"
    )]
    List,
    /// One VM: where it is, why, and its document
    #[command(after_help = "Examples:\n  clusterctl vm show web")]
    Show {
        /// The VM
        vm: String,
    },
    /// Start it
    #[command(after_help = "Examples:\n  clusterctl vm start web")]
    Start {
        /// The VM
        vm: String,
    },
    /// Press its power button and wait until it is off
    #[command(after_help = "Examples:\n  clusterctl vm shutdown web --within 2m --force")]
    Shutdown {
        /// The VM
        vm: String,
        /// How long the guest may take
        #[arg(long, value_name = "TIME", default_value = "60s", value_parser = humantime::parse_duration)]
        within: std::time::Duration,
        /// Stop it at once when that time has passed
        #[arg(long)]
        force: bool,
    },
    /// Stop it at once, as by pulling the plug
    #[command(after_help = "Examples:\n  clusterctl vm stop web")]
    Stop {
        /// The VM
        vm: String,
    },
    /// Reset it, as by its reset button
    #[command(after_help = "Examples:\n  clusterctl vm reset web")]
    Reset {
        /// The VM
        vm: String,
    },
    /// Hold its vCPUs
    #[command(after_help = "Examples:\n  clusterctl vm pause web")]
    Pause {
        /// The VM
        vm: String,
    },
    /// Let its vCPUs go on
    #[command(after_help = "Examples:\n  clusterctl vm resume web")]
    Resume {
        /// The VM
        vm: String,
    },
    /// Move it to another node while it runs
    #[command(
        after_help = "Examples:\n  clusterctl vm migrate web\n  clusterctl vm migrate web node2 --downtime-limit-ms 30\n  clusterctl vm migrate web node2 -o json"
    )]
    Migrate {
        /// The VM
        vm: String,
        /// Where to; the least loaded node where absent
        #[arg(default_value = "", hide_default_value = true)]
        target: String,
        /// Longest pause to aim for; 0: the default, 50
        #[arg(long, value_name = "MS", default_value_t = 0, hide_default_value = true)]
        downtime_limit_ms: u32,
        /// Most bandwidth to use; 0: all
        #[arg(long, value_name = "MIB_S", default_value_t = 0, hide_default_value = true)]
        bandwidth_limit_mib_s: u32,
    },
    /// Its serial console; Ctrl-] leaves
    #[command(after_help = "Examples:\n  clusterctl vm console web")]
    Console {
        /// The VM
        vm: String,
    },
    /// What its serial console printed
    #[command(
        after_help = "Examples:\n  clusterctl vm log web\n  clusterctl vm log -f web --tail 4096"
    )]
    Log {
        /// The VM
        vm: String,
        /// Go on as more is printed
        #[arg(short, long)]
        follow: bool,
        /// Only the last so many bytes; 0: all that is kept
        #[arg(long, value_name = "BYTES", default_value_t = 0, hide_default_value = true)]
        tail: u32,
    },
    /// Change its document in $VISUAL or $EDITOR
    #[command(after_help = "Examples:\n  clusterctl vm edit web")]
    Edit {
        /// The VM
        vm: String,
    },
    /// Set keys of its document, keeping its comments and order
    #[command(
        after_help = "Examples:\n  clusterctl vm set web memory=2GiB cpus=4\n  clusterctl vm set web 'disks[0].readonly=true' --dry-run"
    )]
    Set {
        /// The VM
        vm: String,
        #[command(flatten)]
        keys: config::Assignments,
    },
    /// Delete a stopped VM; its disk images stay
    #[command(visible_alias = "rm", after_help = "Examples:\n  clusterctl vm delete web")]
    Delete {
        /// The VM
        vm: String,
    },
}

/// A migration's figures: the result of its task.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct MigrationResult {
    total_ms: u64,
    downtime_ms: u64,
    bytes: u64,
    rounds: u64,
}

pub(crate) async fn run(session: &Session, command: Command) -> Result<(), Failure> {
    let mut client = VmsClient::new(session.channel.clone());
    let format = session.global.output;
    match command {
        Command::Create { document, file, start, node, dry_run } => {
            let file = document.or(file).unwrap_or_default();
            let document = read_document(&file)?;
            let request = v1::CreateVmRequest { document, start, node, dry_run };
            create(session, &mut client, &file, request).await
        }
        Command::List => {
            let vms = session.call("list VMs", client.list(v1::ListVmsRequest {})).await?;
            output::print(format, &vms, |vms| list_table(&vms.vms))
        }
        Command::Show { vm } => {
            let what = format!("show vm {vm}");
            let vm = session.call(&what, client.show(v1::ShowVmRequest { vm })).await?;
            output::print(format, &vm, vm_table)
        }
        Command::Shutdown { vm, within, force } => {
            let what = format!("shut down vm {vm}");
            let timeout_s = u32::try_from(within.as_secs()).unwrap_or(u32::MAX).max(1);
            let request = v1::ShutdownVmRequest { vm, timeout_s, force };
            let task = session.call(&what, client.shutdown(request)).await?;
            session.finish(&what, &task.task_id).await
        }
        Command::Migrate { vm, target, downtime_limit_ms, bandwidth_limit_mib_s } => {
            let request =
                v1::MigrateVmRequest { vm, target, downtime_limit_ms, bandwidth_limit_mib_s };
            migrate(session, &mut client, request).await
        }
        Command::Console { vm } => console::attach(&mut client, vm).await,
        Command::Log { vm, follow, tail } => {
            let what = format!("read the log of vm {vm}");
            let request = v1::VmLogRequest { vm, follow, tail_bytes: tail };
            session.within(&what, console::log(session, &mut client, &what, request)).await
        }
        Command::Start { vm } => {
            let (what, request) = (format!("start vm {vm}"), v1::VmRequest { vm });
            let task = session.call(&what, client.start(request)).await?;
            session.finish(&what, &task.task_id).await
        }
        Command::Stop { vm } => {
            let (what, request) = (format!("stop vm {vm}"), v1::VmRequest { vm });
            let task = session.call(&what, client.stop(request)).await?;
            session.finish(&what, &task.task_id).await
        }
        Command::Reset { vm } => {
            let (what, request) = (format!("reset vm {vm}"), v1::VmRequest { vm });
            let task = session.call(&what, client.reset(request)).await?;
            session.finish(&what, &task.task_id).await
        }
        Command::Pause { vm } => {
            let (what, request) = (format!("pause vm {vm}"), v1::VmRequest { vm });
            let task = session.call(&what, client.pause(request)).await?;
            session.finish(&what, &task.task_id).await
        }
        Command::Resume { vm } => {
            let (what, request) = (format!("resume vm {vm}"), v1::VmRequest { vm });
            let task = session.call(&what, client.resume(request)).await?;
            session.finish(&what, &task.task_id).await
        }
        Command::Edit { vm } => config::edit(session, &document_path(&vm)?).await,
        Command::Set { vm, keys } => config::set(session, &document_path(&vm)?, &keys).await,
        Command::Delete { vm } => {
            let (what, request) = (format!("delete vm {vm}"), v1::VmRequest { vm });
            let task = session.call(&what, client.delete(request)).await?;
            session.finish(&what, &task.task_id).await
        }
    }
}

fn document_path(vm: &str) -> Result<String, Failure> {
    match vm.parse() {
        Ok(name) => Ok(proto::keys::vm_document(&name)),
        Err(error) => Err(Failure::new(Exit::Usage, format!("cannot be a VM: {vm}"))
            .why(proto::InvalidName::to_string(&error))),
    }
}

fn read_document(file: &Path) -> Result<String, Failure> {
    if file.as_os_str() == "-" {
        let mut document = String::new();
        return match std::io::stdin().read_to_string(&mut document) {
            Ok(_) => Ok(document),
            Err(error) => {
                Err(Failure::new(Exit::Failed, "cannot read stdin").why(error.to_string()))
            }
        };
    }
    std::fs::read_to_string(file).map_err(|error| Failure::file("read", file, &error))
}

async fn create(
    session: &Session,
    client: &mut VmsClient<Channel>,
    file: &Path,
    request: v1::CreateVmRequest,
) -> Result<(), Failure> {
    let dry_run = request.dry_run;
    let what = format!("create a VM from {}", file.display());
    let made = session.call(&what, client.create(request)).await?;
    let format = session.global.output;
    let vm = made.vm.clone().unwrap_or_default();
    if made.task_id.is_empty() || session.global.no_wait {
        return output::print(format, &made, |made| {
            let verb = if dry_run { "could be created" } else { "created" };
            let task = if made.task_id.is_empty() {
                String::new()
            } else {
                format!("; task {}", made.task_id)
            };
            format!("vm {} {verb} on {}{task}", vm.name, or_dash(&vm.node))
        });
    }
    let what = format!("start vm {}", vm.name);
    session.wait(&what, &made.task_id, OnInterrupt::Leave).await?;
    let show = client.show(v1::ShowVmRequest { vm: vm.name });
    let made = v1::CreateVmResponse { vm: Some(session.call("show the VM", show).await?), ..made };
    output::print(format, &made, |made| {
        let vm = made.vm.clone().unwrap_or_default();
        format!("vm {} created and {} on {}", vm.name, vm.phase, vm.node)
    })
}

async fn migrate(
    session: &Session,
    client: &mut VmsClient<Channel>,
    request: v1::MigrateVmRequest,
) -> Result<(), Failure> {
    let to =
        if request.target.is_empty() { String::new() } else { format!(" to {}", request.target) };
    let what = format!("migrate vm {}{to}", request.vm);
    let task_id = session.call(&what, client.migrate(request)).await?.task_id;
    if session.global.no_wait {
        return session.print_task_id(&task_id);
    }
    let task = session.wait(&what, &task_id, OnInterrupt::OfferCancel).await?;
    let result = migration_result(&task)?;
    output::print(session.global.output, &result, |result| {
        output::fields([
            ("total", output::duration_ms(result.total_ms)),
            ("downtime", output::duration_ms(result.downtime_ms)),
            ("sent", output::size(result.bytes)),
            ("rounds", result.rounds.to_string()),
        ])
    })
}

fn migration_result(task: &v1::Task) -> Result<MigrationResult, Failure> {
    serde_json::from_str(&task.result).map_err(|error| {
        Failure::new(Exit::Failed, "the migration is done, but its figures cannot be read")
            .why(error.to_string())
            .remedy(format!("see `clusterctl task show {}`", task.task_id))
    })
}

fn list_table(vms: &[v1::Vm]) -> String {
    let rows = vms.iter().map(|vm| {
        let state = if vm.paused { format!("{} (paused)", vm.phase) } else { vm.phase.clone() };
        [
            vm.name.clone(),
            state,
            or_dash(&vm.node),
            yes(vm.ha),
            vm.cpus.to_string(),
            output::size(vm.memory_bytes),
            or_dash(&vm.message),
        ]
    });
    output::columns(["VM", "STATE", "NODE", "HA", "CPUS", "MEMORY", "MESSAGE"], rows)
}

fn vm_table(vm: &v1::Vm) -> String {
    let state = if vm.paused { format!("{} (paused)", vm.phase) } else { vm.phase.clone() };
    output::fields([
        ("name", vm.name.clone()),
        ("id", vm.id.clone()),
        ("state", state),
        ("requested", vm.requested.clone()),
        ("node", or_dash(&vm.node)),
        ("message", vm.message.clone()),
        ("ha", yes(vm.ha)),
        ("cpus", vm.cpus.to_string()),
        ("memory", output::size(vm.memory_bytes)),
        ("generation", vm.generation.to_string()),
        ("revision", vm.revision.to_string()),
        ("events", vm.events.join("\n")),
        ("document", vm.document.clone()),
    ])
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::args::{Cli, Noun};

    #[test]
    fn a_migration_prints_exactly_its_four_figures() {
        let result = r#"{"total_ms":1400,"downtime_ms":64,"bytes":268435456,"rounds":4}"#;
        let task = v1::Task { result: result.to_owned(), ..v1::Task::default() };
        let parsed = migration_result(&task).unwrap();
        assert_eq!(serde_json::to_string(&parsed).unwrap(), result);
        assert!(migration_result(&v1::Task::default()).is_err());
    }

    #[test]
    fn the_target_of_a_migration_may_be_left_out() {
        let parse = |line: &str| match Cli::try_parse_from(line.split(' ')).unwrap().noun {
            Noun::Vm(Command::Migrate { vm, target, downtime_limit_ms, .. }) => {
                (vm, target, downtime_limit_ms)
            }
            other => panic!("{other:?}"),
        };
        assert_eq!(parse("clusterctl vm migrate web"), ("web".into(), String::new(), 0));
        let full = "clusterctl vm migrate web node2 --downtime-limit-ms 30";
        assert_eq!(parse(full), ("web".into(), "node2".into(), 30));
    }
}
