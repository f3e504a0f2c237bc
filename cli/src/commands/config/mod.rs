//! `clusterctl config`: the replicated configuration as files.
//!
//! Every verb reads and commits through [`Files`]; nothing is validated here, the cluster does.

mod apply;
mod assign;
mod change;
mod edit;
mod explain;
mod history;
mod local;
mod read;
mod set;
mod watch;

use std::path::PathBuf;

use clap::Subcommand;

use crate::connect::Session;
use crate::failure::Failure;
use crate::files::Files;
use crate::paths::{At, Span};

pub(crate) use edit::edit;
pub(crate) use explain::explain;
pub(crate) use set::set;

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// The files under a prefix
    #[command(
        visible_alias = "list",
        after_help = "Examples:\n  clusterctl config ls\n  clusterctl config ls vms/\n  clusterctl config ls --all"
    )]
    Ls {
        /// What the paths begin with
        #[arg(default_value = "", hide_default_value = true)]
        prefix: String,
        /// The system's records too (status/)
        #[arg(short, long)]
        all: bool,
        /// What the asked node has; answers without a quorum
        #[arg(long)]
        stale: bool,
    },
    /// Print a file
    #[command(
        after_help = "Examples:\n  clusterctl config get vms/web\n  clusterctl config get storage.toml\n  clusterctl config get status/vms/web -o json"
    )]
    Get {
        /// The file; the .toml of a document may be left out
        path: String,
        /// What the asked node has; answers without a quorum
        #[arg(long)]
        stale: bool,
    },
    /// Write a file, whatever is there
    #[command(
        after_help = "Examples:\n  clusterctl config put notes/readme -f README\n  clusterctl config put vms/web -f web.toml --dry-run\n  clusterctl config put vms/web --expect 42 < web.toml"
    )]
    Put {
        /// The file; the .toml of a document may be left out
        path: String,
        /// What to write; stdin where absent or `-`
        #[arg(short, long, default_value = "-", hide_default_value = true)]
        file: PathBuf,
        /// Only if its last change is this revision; 0: only if it is absent
        #[arg(long, value_name = "REVISION")]
        expect: Option<u64>,
        /// Check everything, change nothing
        #[arg(long)]
        dry_run: bool,
    },
    /// Remove a file
    #[command(after_help = "Examples:\n  clusterctl config rm notes/readme")]
    Rm {
        /// The file; the .toml of a document may be left out
        path: String,
        /// Check everything, change nothing
        #[arg(long)]
        dry_run: bool,
    },
    /// Every change under a prefix as it happens, until Ctrl-C; survives lost connections
    #[command(
        after_help = "Examples:\n  clusterctl config watch vms/\n  clusterctl config watch status/vms/ --from-revision 100 -o json"
    )]
    Watch {
        /// What the paths begin with
        #[arg(default_value = "", hide_default_value = true)]
        prefix: String,
        /// The system's records too (status/)
        #[arg(short, long)]
        all: bool,
        /// Begin with the changes of this revision; 0: from now on
        #[arg(long, value_name = "REVISION", default_value_t = 0, hide_default_value = true)]
        from_revision: u64,
    },
    /// Change a file in $VISUAL or $EDITOR
    #[command(
        after_help = "Examples:\n  clusterctl config edit vms/web\n  EDITOR='code --wait' clusterctl config edit networks"
    )]
    Edit {
        /// The file; the .toml of a document may be left out. It is made if it is absent
        path: String,
    },
    /// Set keys of a document, keeping its comments and order. One that is absent is made, except a VM's
    #[command(
        after_help = "Examples:\n  clusterctl config set vms/web memory=2GiB cpus=4\n  clusterctl config set access/ann role=operator\n  clusterctl config set vms/web 'disks[0].readonly=true' --dry-run\n  clusterctl config set vms/web 'nics[+].network=lan' --unset boot.cmdline"
    )]
    Set {
        /// The document; its .toml may be left out
        path: String,
        #[command(flatten)]
        keys: Assignments,
    },
    /// What differs: files here from the cluster's, or a file from what it was
    #[command(
        after_help = "Examples:\n  clusterctl config diff -f web.toml\n  clusterctl config diff -f conf/ --exit-code\n  clusterctl config diff vms/web -f web.toml\n  clusterctl config diff vms/web@12..40\n  clusterctl config diff vms/web@12"
    )]
    Diff {
        /// The file the cluster has, with the revisions to compare: PATH, PATH@A..B, PATH@A
        #[arg(required_unless_present = "file")]
        path: Option<Span>,
        /// A file or a folder to compare with it; `-`: stdin
        #[arg(short, long)]
        file: Option<PathBuf>,
        /// Exit with 1 if something differs
        #[arg(long)]
        exit_code: bool,
    },
    /// Make the cluster's files those of a folder or a file, in one commit where they fit in one
    #[command(
        after_help = "Examples:\n  clusterctl config apply -f conf/\n  clusterctl config apply -f conf/ --prune --dry-run\n  clusterctl config apply -f web.toml\n  clusterctl config apply vms/web -f - < web.toml"
    )]
    Apply {
        /// Where a single file belongs; told from its name or content where absent
        path: Option<String>,
        /// A file, a folder as `config export` makes it, or `-` for stdin
        #[arg(short, long)]
        file: PathBuf,
        /// Remove the cluster's files that the folder lacks
        #[arg(long)]
        prune: bool,
        /// Show what differs, check everything, change nothing
        #[arg(long)]
        dry_run: bool,
        /// Do not ask before files are removed
        #[arg(short, long)]
        yes: bool,
    },
    /// Write all files into a folder; `config apply -f` of it changes nothing
    #[command(
        after_help = "Examples:\n  clusterctl config export conf/\n  clusterctl config export conf/ --force"
    )]
    Export {
        /// The folder; made if it is missing
        folder: PathBuf,
        /// Even if the folder is not empty
        #[arg(long)]
        force: bool,
    },
    /// What a document, or a key of one, means
    #[command(
        after_help = "Examples:\n  clusterctl config explain\n  clusterctl config explain vm\n  clusterctl config explain vm.disks.image\n  clusterctl config explain vm --recursive"
    )]
    Explain {
        /// A document's kind and a key in it; all documents where absent
        #[arg(default_value = "", hide_default_value = true)]
        key: String,
        /// All keys below it too
        #[arg(short, long)]
        recursive: bool,
    },
    /// Who changed what and when, newest first
    #[command(
        after_help = "Examples:\n  clusterctl config history\n  clusterctl config history vms/web --patch\n  clusterctl config history vms/ --limit 5 -o json"
    )]
    History {
        /// A file, or a folder with its slash; all files where absent
        #[arg(default_value = "", hide_default_value = true)]
        path: String,
        /// At most so many
        #[arg(short = 'n', long, default_value_t = 20)]
        limit: u32,
        /// Only changes before this revision; 0: up to now
        #[arg(long, value_name = "REVISION", default_value_t = 0, hide_default_value = true)]
        before: u64,
        /// With what each change did
        #[arg(short, long)]
        patch: bool,
        /// The system's records too (status/)
        #[arg(short, long)]
        all: bool,
    },
    /// Print a file as it was right after a revision
    #[command(after_help = "Examples:\n  clusterctl config show vms/web@12")]
    Show {
        /// PATH@REVISION
        path: At,
    },
    /// Make a file, or a folder with its slash, what it was, as a new revision
    #[command(
        after_help = "Examples:\n  clusterctl config rollback vms/web --to 12\n  clusterctl config rollback vms/ --to 12 --dry-run"
    )]
    Rollback {
        /// The file, or the folder with its slash
        path: String,
        /// As right after this revision
        #[arg(long, value_name = "REVISION")]
        to: u64,
        /// Show what differs, check everything, change nothing
        #[arg(long)]
        dry_run: bool,
        /// Do not ask before files are removed
        #[arg(short, long)]
        yes: bool,
    },
}

/// What `set` does to a document.
#[derive(Debug, clap::Args)]
pub(crate) struct Assignments {
    /// KEY=VALUE; KEY as in boot.kernel or disks[0].size, `[+]` adds one; VALUE in TOML, or plain
    /// text
    #[arg(value_name = "KEY=VALUE", required_unless_present = "unset")]
    pub(crate) assignments: Vec<String>,
    /// Remove a key
    #[arg(long, value_name = "KEY")]
    pub(crate) unset: Vec<String>,
    /// Show what differs, check everything, change nothing
    #[arg(long)]
    pub(crate) dry_run: bool,
}

pub(crate) async fn run(session: &Session, command: Command) -> Result<(), Failure> {
    let mut files = Files::new(session);
    match command {
        Command::Ls { prefix, all, stale } => read::ls(&mut files, &prefix, all, stale).await,
        Command::Get { path, stale } => read::get(&mut files, &path, stale).await,
        Command::Show { path } => read::show(&mut files, path).await,
        Command::Put { path, file, expect, dry_run } => {
            change::put(&mut files, &path, &file, expect, dry_run).await
        }
        Command::Rm { path, dry_run } => change::rm(&mut files, &path, dry_run).await,
        Command::Watch { prefix, all, from_revision } => {
            let watch = watch::watch(&mut files, &prefix, all, from_revision);
            tokio::select! {
                outcome = session.within("watch", watch) => outcome,
                () = crate::wait::interrupt() => Ok(()),
            }
        }
        Command::Edit { path } => edit(session, &path).await,
        Command::Set { path, keys } => set(session, &path, &keys).await,
        Command::Diff { path, file: Some(file), exit_code } => {
            apply::diff(&mut files, path, &file, exit_code).await
        }
        Command::Diff { path, file: None, exit_code } => {
            history::diff(&mut files, path, exit_code).await
        }
        Command::Apply { path, file, prune, dry_run, yes } => {
            let options = change::Options { dry_run, yes };
            apply::apply(&mut files, path.as_deref(), &file, prune, options).await
        }
        Command::Explain { key, recursive } => explain(session.global.output, &key, recursive),
        Command::Export { folder, force } => local::export(&mut files, &folder, force).await,
        Command::History { path, limit, before, patch, all } => {
            let wanted = history::Wanted { limit, before, patch, all };
            history::history(&mut files, &path, &wanted).await
        }
        Command::Rollback { path, to, dry_run, yes } => {
            let options = change::Options { dry_run, yes };
            history::rollback(&mut files, &path, to, options).await
        }
    }
}
