//! `config watch` through the loss of the leader and of the node that it asks.

use std::io::{BufRead as _, BufReader};
use std::process::Stdio;
use std::sync::mpsc::{Receiver, channel};

use super::rig::{LIMIT, Node, can_run, wait};

/// The keys that a watch on a node says were written.
fn watched(node: &Node) -> (std::process::Child, Receiver<String>) {
    let mut command = node.command();
    command.args(["config", "watch", "notes/", "-o", "json"]);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let (send, keys) = channel();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    std::thread::spawn(move || {
        for line in lines.map_while(Result::ok) {
            let event: serde_json::Value = serde_json::from_str(&line).unwrap();
            let key = event["put"]["key"].as_str().unwrap_or(&line).to_owned();
            if send.send(key).is_err() {
                return;
            }
        }
    });
    (child, keys)
}

#[test]
fn a_watch_survives_the_leader_and_its_own_node_without_loss_or_doubling() {
    if !can_run("a_watch_survives_the_leader_and_its_own_node_without_loss_or_doubling") {
        return;
    }
    let mut nodes = vec![Node::first("")];
    for name in ["n2", "n3"] {
        nodes.push(nodes[0].join(name));
    }
    let leader_of = |nodes: &[Node], ask: usize| -> Option<usize> {
        let status = nodes[ask].ctl(&["cluster", "status", "-o", "json"]);
        let status: serde_json::Value = serde_json::from_str(&status.stdout).ok()?;
        let id = status["leader"].as_u64().filter(|id| *id > 0)?;
        usize::try_from(id - 1).ok()
    };
    wait("all three vote", || {
        let status = nodes[0].ctl(&["cluster", "status", "-o", "json"]).stdout;
        status.matches("\"voter\": true").count() == 3
    });
    let leader = leader_of(&nodes, 0).expect("a leader");
    let (at, by) = ((leader + 1) % 3, (leader + 2) % 3);
    let file = nodes[by].write("text", b"x").display().to_string();
    let mut number = 0;
    let mut put = |nodes: &[Node]| {
        number += 1;
        let key = format!("notes/{number:03}");
        // Only to be absent: a second try of one whose outcome is unknown writes nothing twice.
        let put = ["config", "put", &key, "-f", &file, "--expect", "0"];
        wait("it is written", || {
            let ran = nodes[by].ctl(&put);
            ran.exit == Some(0) || ran.stderr.contains("changed in the meantime")
        });
    };
    let (mut watch, seen) = watched(&nodes[at]);
    // The watch begins with what comes after its begin: it has begun when it says something.
    let first = loop {
        put(&nodes);
        if let Ok(key) = seen.recv_timeout(std::time::Duration::from_millis(500)) {
            break key;
        }
    };
    for _ in 0..10 {
        put(&nodes);
    }
    nodes[leader].kill();
    for _ in 0..10 {
        put(&nodes);
    }
    nodes[leader].start_again();
    wait("there is a leader", || leader_of(&nodes, by).is_some());
    nodes[at].kill();
    for _ in 0..10 {
        put(&nodes);
    }
    nodes[at].start_again();
    for _ in 0..10 {
        put(&nodes);
    }
    let last = format!("notes/{number:03}");
    let mut keys = vec![first];
    while keys.last() != Some(&last) {
        keys.push(seen.recv_timeout(LIMIT).expect("the last one was not seen"));
    }
    let begin: usize = keys[0].trim_start_matches("notes/").parse().unwrap();
    let wanted: Vec<String> = (begin..=number).map(|number| format!("notes/{number:03}")).collect();
    assert_eq!(keys, wanted);
    watch.kill().unwrap();
    watch.wait().unwrap();
}
