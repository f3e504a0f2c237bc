//! `node-agent recover`: makes the one survivor of a lost majority a cluster again, while its agent
//! is stopped. What it does, and why so, is in `cluster::recover`.

use std::fmt::Write as _;
use std::io::{IsTerminal as _, Write as _};

use anyhow::Context as _;
use cluster::{Recovered, Survey, Survivor, finish_recovery};

use crate::agent::{cluster_config, lock_run_folder, on_a_runtime};
use crate::config::Config;

/// As [`recover`], on a runtime of its own.
///
/// # Errors
/// As there.
pub fn run(config: Config, name: &str, confirm: Option<&str>) -> anyhow::Result<()> {
    on_a_runtime(recover(config, name, confirm))
}

/// Looks, says what is lost, asks, recovers. `confirm`: what a person would type.
///
/// # Errors
/// Nothing was changed, or the error says what was.
pub async fn recover(config: Config, name: &str, confirm: Option<&str>) -> anyhow::Result<()> {
    // The agent that runs has it, and the data folder too.
    let _agent =
        lock_run_folder(&config.run_dir).context("this node's agent must be stopped first")?;
    if let Some(kept) = finish_recovery(&config.data_dir)? {
        println!(
            "a recovery that was interrupted is finished; the old files are in {}; start the agent",
            kept.display()
        );
        return Ok(());
    }
    let survivor = Survivor::find(cluster_config(&config)).await?;
    let word = word(survivor.survey());
    eprintln!("{}", described(survivor.survey()));
    let typed = confirm.map(str::to_owned).or_else(|| ask(&word)).unwrap_or_default();
    if typed != word {
        anyhow::bail!(
            "not confirmed, nothing was changed: type `{word}` on a terminal, or give --confirm {word}"
        );
    }
    let recovered = survivor.recover(name).await?;
    println!("{}", done(&recovered));
    Ok(())
}

/// What is lost, and what a person promises.
fn described(survey: &Survey) -> String {
    let mut text = format!(
        "cluster      {} ({})\nthis node    {} (id {})\nrevision     {}\nlog          up to {}, known to be committed up to {}\n",
        survey.cluster_name,
        survey.cluster_id,
        survey.node_name,
        survey.node_id,
        survey.revision,
        survey.last_index,
        survey.committed_index
    );
    if survey.lost_tail {
        text.push_str(
            "POWER LOSS   what this machine had not written to its disk is lost as well\n",
        );
    }
    let mut dropped = String::new();
    for member in &survey.dropped {
        let role = if member.voter { "voter" } else { "learner" };
        // Writing into a String does not fail.
        let _ = write!(dropped, "  {} ({role}, {})", member.name, member.api_address);
        dropped.push_str(if survey.powered.contains(&member.node_id) {
            ": THIS MACHINE IS ON (no agent listens there, its VMs may run): power it off\n"
        } else {
            "\n"
        });
    }
    if dropped.is_empty() {
        dropped.push_str("  nobody: this node was alone\n");
    }
    let own = if survey.lost_tail {
        "so do this node's own VMs: what is lost may have given them away."
    } else {
        "this node's own VMs without HA go on."
    };
    let _ = write!(
        text,
        "dropped members:\n{dropped}\n\
         LOST: everything that the others had committed and this node had not received; the history.\n\
         THE MACHINES OF THE DROPPED MEMBERS MUST BE OFF AND STAY OFF until they are emptied and join\n\
         anew: the new cluster cannot see what runs there, and two VMs on one disk destroy it.\n\
         This node becomes the first of a new cluster, with a new id and a new CA. VMs of the dropped\n\
         members, HA VMs and VMs that were migrating or changed hands last come back stopped, for a\n\
         person to start; {own}"
    );
    text
}

/// What a person types to go on: it says which node becomes which cluster, so that neither a habit
/// nor a script that was meant for another machine does it.
fn word(survey: &Survey) -> String {
    format!("{}/{}", survey.cluster_name, survey.node_name)
}

/// What was typed; `None` where there is no terminal to ask on.
fn ask(word: &str) -> Option<String> {
    if !(std::io::stdin().is_terminal() && std::io::stderr().is_terminal()) {
        return None;
    }
    eprint!("\nType `{word}`, the cluster's and this node's name, to go on: ");
    let _ = std::io::stderr().flush();
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).ok()?;
    Some(line.trim().to_owned())
}

fn done(recovered: &Recovered) -> String {
    format!(
        "cluster      {} ({})\nCA SHA-256   {} (new)\nkeys         {}\nVMs          {}\nold files    {}\nnext         start the agent; `clusterctl vm list`; `clusterctl cluster token create` for each node that joins anew; `clusterctl context create-admin` for each context",
        recovered.cluster_name,
        recovered.cluster_id,
        recovered.ca_fingerprint,
        recovered.restored.keys,
        recovered.restored.vms,
        recovered.kept.display()
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use cluster::Member;
    use proto::NodeId;

    #[test]
    fn it_says_what_is_lost_and_who_is_dropped() {
        let member = |id, name: &str, voter| Member {
            node_id: NodeId(id),
            name: name.to_owned(),
            api_address: format!("{name}:7400"),
            enrol_address: String::new(),
            voter,
            zone: String::new(),
            witness: false,
        };
        let survey = Survey {
            cluster_name: "prod".to_owned(),
            cluster_id: "c1".to_owned(),
            node_id: NodeId(3),
            node_name: "n3".to_owned(),
            revision: 42,
            last_index: 57,
            committed_index: 55,
            lost_tail: false,
            dropped: vec![member(1, "n1", true), member(2, "n2", false)],
            powered: vec![NodeId(2)],
        };
        let text = described(&survey);
        for part in [
            "revision     42",
            "up to 57, known to be committed up to 55",
            "  n1 (voter, n1:7400)\n  n2 (learner, n2:7400): THIS MACHINE IS ON",
            "MUST BE OFF",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert!(!text.contains("POWER LOSS") && text.contains("without HA go on"), "{text}");
        assert_eq!(word(&survey), "prod/n3");
        let alone = Survey { dropped: Vec::new(), lost_tail: true, ..survey };
        let text = described(&alone);
        assert!(text.contains("nobody") && text.contains("POWER LOSS"), "{text}");
        assert!(text.contains("so do this node's own VMs"), "{text}");
    }
}
