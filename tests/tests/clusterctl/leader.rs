//! What only the leader can answer or do, asked of another node while the leader says nothing.

use std::time::{Duration, Instant};

use super::rig::{Node, Ran, WEB, can_run, wait};

/// An election, and asking again. HTTP/2 alone would give the leader up after ten seconds.
const SOON: Duration = Duration::from_secs(8);

/// Three that vote; the first one leads.
fn three() -> [Node; 3] {
    let first = Node::first("");
    let (second, third) = (first.join("n2"), first.join("n3"));
    let file = first.write("web.toml", WEB.as_bytes());
    first.ctl(&["config", "apply", "-f", file.to_str().unwrap()]).good();
    wait("all vote and are online", || {
        let status = first.ctl(&["cluster", "status", "-o", "json"]).json();
        let members = status["members"].as_array().unwrap();
        let voters = members.iter().filter(|member| member["member"]["voter"] == true).count();
        let list = first.ctl(&["node", "list", "-o", "json"]).good();
        voters == 3 && list.matches("\"online\"").count() == 3
    });
    let nodes = [first, second, third];
    wait("they agree on who leads", || {
        nodes.iter().all(|node| node.ctl(&["ha", "status", "-o", "json"]).json()["leader"] == "n1")
    });
    nodes
}

/// The connection's own words are nobody's answer.
fn in_words(ran: &Ran) {
    for words in ["http2", "h2 ", "transport error"] {
        assert!(!ran.stderr.contains(words) && !ran.stdout.contains(words), "{ran:?}");
    }
}

#[test]
fn a_silent_leader_is_not_waited_for() {
    if !can_run("a_silent_leader_is_not_waited_for") {
        return;
    }
    let [first, second, third] = three();
    first.freeze();
    let begin = Instant::now();
    let (seen, started) = std::thread::scope(|scope| {
        let seen = scope.spawn(|| second.ctl(&["ha", "status", "-o", "json"]));
        let started = scope.spawn(|| third.ctl(&["vm", "start", "web", "--no-wait"]));
        // What the loss of each would mean is the leader's word, too.
        let told = scope.spawn(|| third.ctl(&["cluster", "status"]));
        in_words(&told.join().unwrap());
        (seen.join().unwrap(), started.join().unwrap())
    });
    assert!(begin.elapsed() < SOON, "after {:?}: {seen:?}, {started:?}", begin.elapsed());
    let seen = seen.json();
    assert_eq!(seen["quorum"], true, "{seen}");
    assert!(["n2", "n3"].contains(&seen["leader"].as_str().unwrap()), "{seen}");
    // It never reached the old leader, and the new one says what it thinks of it.
    in_words(&started);
    assert_ne!(started.exit, Some(6), "an outcome that is not known: {started:?}");
    assert_ne!(started.exit, Some(5), "{started:?}");

    let leader = seen["leader"].as_str().unwrap();
    let (leads, follows) = if leader == "n2" { (second, third) } else { (third, second) };
    leads.freeze();
    let begin = Instant::now();
    let seen = follows.ctl(&["ha", "status"]);
    in_words(&seen);
    let shown = seen.good();
    assert!(shown.contains("NO: HA VMs stop"), "{shown}");
    let started = follows.ctl(&["vm", "start", "web"]);
    in_words(&started);
    started.refused(5, &["cluster status"]);
    assert!(begin.elapsed() < SOON * 2, "after {:?}", begin.elapsed());
}
