//! What can be said on the command line, above the nouns.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::commands::{cluster, config, context, ha, image, network, node, storage, task, vm};

const AFTER_HELP: &str = "\
Which node is asked, the first of these that is given:
  --socket PATH, --context NAME, $HOLDFAST_SOCKET, $HOLDFAST_CONTEXT, the context in use
  (`clusterctl context use`), else the local agent at /run/holdfast/agent.sock (as root).

Exit codes:
  0    done
  1    failed
  2    wrong usage, or an invalid document
  3    not found
  4    refused: not allowed in the present state, or not permitted
  5    unreachable, or the cluster has no quorum
  6    time limit passed
  130  interrupted; a task goes on without its watcher

Examples:
  clusterctl cluster status
  clusterctl vm create -f web.toml --start
  clusterctl vm migrate web node2
  clusterctl -o json vm show web";

/// Talk to a Holdfast cluster: virtual machines, nodes, storage, networks.
#[derive(Debug, Parser)]
#[command(name = "clusterctl", version, after_help = AFTER_HELP, propagate_version = true)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) noun: Noun,
}

/// Flags that every command takes.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Options of every command")]
pub(crate) struct Global {
    /// How to print
    #[arg(short, long, value_enum, default_value_t, global = true)]
    pub(crate) output: Format,
    /// Talk to the agent at this Unix socket
    #[arg(long, value_name = "PATH", global = true, conflicts_with = "context")]
    pub(crate) socket: Option<PathBuf>,
    /// Talk to the cluster of this context (see `clusterctl context`)
    #[arg(long, value_name = "NAME", global = true)]
    pub(crate) context: Option<String>,
    /// Print the task's id instead of waiting for it
    #[arg(long, global = true)]
    pub(crate) no_wait: bool,
    /// Give up waiting after this long, as in 30s or 5m; the task goes on
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration, global = true)]
    pub(crate) timeout: Option<Duration>,
}

/// Forms of output. JSON and YAML have the API's own shape and field names.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// Aligned columns, human sizes
    #[default]
    Table,
    /// JSON
    Json,
    /// YAML
    Yaml,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Noun {
    /// Form the cluster, let nodes join, see how it is
    #[command(subcommand)]
    Cluster(cluster::Command),
    /// The machines that VMs run on
    #[command(subcommand)]
    Node(node::Command),
    /// Virtual machines
    #[command(subcommand)]
    Vm(vm::Command),
    /// Kernels, initramfs, firmware and disks in storage pools
    #[command(subcommand)]
    Image(image::Command),
    /// Storage pools
    #[command(subcommand)]
    Storage(storage::Command),
    /// Networks that VMs plug into
    #[command(subcommand)]
    Network(network::Command),
    /// The replicated configuration as files: read, edit, apply, history
    #[command(subcommand)]
    Config(config::Command),
    /// High availability
    #[command(subcommand)]
    Ha(ha::Command),
    /// Changes that take time: what runs, what ran, their logs
    #[command(subcommand)]
    Task(task::Command),
    /// Which cluster to talk to, and as whom
    #[command(subcommand)]
    Context(context::Command),
    /// Print a shell's completion script
    #[command(
        after_help = "Examples:\n  clusterctl completion bash > /etc/bash_completion.d/clusterctl"
    )]
    Completion {
        /// Which shell
        shell: clap_complete::Shell,
    },
    /// Print the version of clusterctl
    Version,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_verb_has_help_with_an_example() {
        for noun in Cli::command().get_subcommands() {
            for verb in noun.get_subcommands().filter(|verb| verb.get_subcommands().count() == 0) {
                let name = format!("{} {}", noun.get_name(), verb.get_name());
                assert!(verb.get_about().is_some(), "`{name}` has no description");
                let help = verb.get_after_help().map(ToString::to_string).unwrap_or_default();
                let example = format!("clusterctl {name}");
                assert!(help.contains(&example), "`{name}` has no example: {help}");
            }
        }
    }

    /// The command lines of clusterctl that stand, indented, on lines of their own.
    fn command_lines(text: &str) -> Vec<Vec<String>> {
        // What a shell puts in is one word.
        let filled = |part: &str| match (part.find("$("), part.rfind(')')) {
            (Some(from), Some(to)) if from < to => format!("{}x{}", &part[..from], &part[to + 1..]),
            _ => part.to_owned(),
        };
        let lines = text.lines().filter_map(|line| line.strip_prefix("  "));
        let lines = lines.filter_map(|line| line.split(" #").next());
        let parts = lines.flat_map(|line| line.split(['|', ';', '&', '<', '>']));
        let calls = parts.filter_map(|part| {
            let part = part
                .trim()
                .trim_start_matches("ssh node1 ")
                .trim_start_matches("deploy/lab ssh 1 ");
            part.starts_with("clusterctl ").then(|| filled(part))
        });
        let words =
            |call: String| call.split(' ').map(|word| word.trim_matches('\'').to_owned()).collect();
        calls.map(words).collect()
    }

    #[test]
    fn every_example_parses_here_and_in_the_documentation() {
        let mut tried = 0;
        let mut parse = |from: &str, text: &str| {
            for words in command_lines(text) {
                let parsed = Cli::try_parse_from(&words);
                assert!(parsed.is_ok(), "{from}: {}: {}", words.join(" "), parsed.unwrap_err());
                tried += 1;
            }
        };
        parse("README.md", include_str!("../../README.md"));
        parse("deploy/lab --help", include_str!("../../tests/src/bin/lab/help.txt"));
        let mut left = vec![Cli::command()];
        while let Some(command) = left.pop() {
            let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            parse(command.get_name(), &help);
            left.extend(command.get_subcommands().cloned());
        }
        assert!(tried > 100, "only {tried} examples were found");
    }

    #[test]
    fn the_documentations_vm_is_a_valid_one() {
        let readme = include_str!("../../README.md");
        let document = readme.split("```toml\n").nth(1).and_then(|rest| rest.split("```").next());
        proto::VmSpec::parse(document.expect("the README has a VM document")).unwrap();
    }

    #[test]
    fn the_global_flags_may_stand_anywhere() {
        for line in ["clusterctl -o json vm list", "clusterctl vm list -o json"] {
            let cli = Cli::try_parse_from(line.split(' ')).unwrap();
            assert_eq!(cli.global.output, Format::Json);
        }
        let both = "clusterctl --socket /a --context b vm list";
        assert_eq!(Cli::try_parse_from(both.split(' ')).unwrap_err().exit_code(), 2);
        let limit = Cli::try_parse_from("clusterctl vm stop web --timeout 2m".split(' ')).unwrap();
        assert_eq!(limit.global.timeout, Some(Duration::from_secs(120)));
    }
}
