//! The cluster's CA is replaced while the cluster works.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use cluster::{MembershipError, Txn};
use proto::v1::CaStatus;

use crate::certificates::{any, connect, hangs_up, list, node_papers};
use crate::common::{Lab, Outcome, TestNode};
use crate::joining::{Papers, answered, dial, papers, papers_from};

/// Writes on one member until it is told to stop. A write that fails ends it.
struct Writer {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Outcome<u64>>,
}

impl Writer {
    fn begin(lab: &Lab, on: usize) -> Outcome<Self> {
        let (stop, cluster) = (Arc::new(AtomicBool::new(false)), lab.nodes[on].cluster()?);
        let ends = stop.clone();
        let thread = std::thread::spawn(move || -> Outcome<u64> {
            let (runtime, mut written) = (tokio::runtime::Runtime::new()?, 0);
            while !ends.load(Ordering::SeqCst) {
                let txn = Txn::new().put(format!("written/{on}"), written.to_string());
                runtime.block_on(cluster.txn(txn)).map_err(|e| format!("n{}: {e}", on + 1))?;
                written += 1;
                std::thread::sleep(Duration::from_millis(20));
            }
            Ok(written)
        });
        Ok(Self { stop, thread })
    }

    fn end(self) -> Outcome<u64> {
        self.stop.store(true, Ordering::SeqCst);
        self.thread.join().map_err(|_| "a writer panicked")?
    }
}

/// One writer on each member; all of them count.
struct Writers {
    running: Vec<Option<Writer>>,
    written: u64,
}

impl Writers {
    fn begin(lab: &Lab) -> Outcome<Self> {
        let running = (0..lab.nodes.len()).map(|on| Writer::begin(lab, on).map(Some));
        Ok(Self { running: running.collect::<Outcome<_>>()?, written: 0 })
    }

    fn end(&mut self, on: usize) -> Outcome {
        if let Some(writer) = self.running[on].take() {
            self.written += writer.end()?;
        }
        Ok(())
    }
}

/// The leader dies and comes back, while those on the others write on.
fn leader_dies(lab: &mut Lab, writers: &mut Writers) -> Outcome {
    let dies = lab.leader()?;
    writers.end(dies)?;
    lab.nodes[dies].kill();
    let next = lab.leader()?;
    assert_ne!(next, dies);
    lab.nodes[dies].wait_closed();
    lab.nodes[dies].start()?;
    lab.wait("it is back", |lab| {
        lab.nodes[dies].run(|c| async move { c.txn(Txn::new().put("back", "1")).await.is_ok() })
    })?;
    writers.running[dies] = Some(Writer::begin(lab, dies)?);
    Ok(())
}

fn status(lab: &Lab, on: usize) -> Outcome<CaStatus> {
    Ok(lab.nodes[on].run(|c| async move { c.ca_status().await })??)
}

/// Waits until the rotation is in a phase, and waits for these alone.
fn waits(lab: &Lab, on: usize, phase: &str, names: &[&str]) -> Outcome<CaStatus> {
    let mut last = CaStatus::default();
    let waited = lab.wait(phase, |lab| {
        // Without a leader for a moment it cannot be told.
        let Ok(found) = status(lab, on) else { return Ok(false) };
        let all = found.waiting_for.len() == names.len()
            && names.iter().all(|name| found.waiting_for.iter().any(|of| of.starts_with(name)));
        last = found;
        Ok(last.phase == phase && all)
    });
    waited.map_err(|error| format!("{error}: {last:?}"))?;
    Ok(last)
}

/// Whether a client that trusts a CA is served by each running member.
fn is_served(lab: &Lab, papers: &Papers, ca: &str) -> Outcome<bool> {
    let (name, runtime) = (any(lab)?, tokio::runtime::Runtime::new()?);
    let mut served = true;
    for node in lab.nodes.iter().filter(|node| node.is_running()) {
        let (address, papers) = (node.config.api_address.clone(), papers.clone());
        let answer = runtime.block_on(async {
            Outcome::Ok(answered(dial(&address, ca, &name, Some(papers))?).await)
        })?;
        served &= answer.is_some();
    }
    Ok(served)
}

#[test]
fn the_ca_is_replaced_while_clients_write_and_leaders_die() -> Outcome {
    let mut lab = Lab::with(3, |config| config.request_timeout = Duration::from_secs(15))?;
    let (ann, old_ca) = papers(&lab, "ann")?;
    let (early, late) = (lab.token(0)?, lab.token(0)?);
    let (name, of_node) = (any(&lab)?, node_papers(&lab, 1)?);
    let client = tokio::runtime::Runtime::new()?;
    let address = lab.nodes[0].config.api_address.clone();
    let before: Vec<_> = (0..3)
        .map(|on| Ok(lab.nodes[on].cluster()?.certificate().serial))
        .collect::<Outcome<_>>()?;
    let first = status(&lab, 0)?;
    assert_eq!((first.phase.as_str(), first.other_fingerprint.as_str()), ("stable", ""));

    let mut writers = Writers::begin(&lab)?;
    // It cannot keep the new CA on its disk: so it does not say that it trusts it.
    let held = (lab.leader()? + 1) % 3;
    let held_name = lab.nodes[held].name.clone();
    let folder = lab.nodes[held].config.data_dir.clone();
    std::fs::create_dir(folder.join("ca.tmp"))?;
    let begun = lab.nodes[held].run(|c| async move { c.rotate_ca("root").await })??;
    assert_eq!(begun.phase, "trusting");
    let found = waits(&lab, 0, "trusting", &[&held_name])?;
    leader_dies(&mut lab, &mut writers)?;
    let again = lab.nodes[0].run(|c| async move { c.rotate_ca("root").await })??;
    assert_eq!(again.other_fingerprint, found.other_fingerprint, "another one was made");
    waits(&lab, 0, "trusting", &[&held_name])?;
    assert_eq!(status(&lab, 0)?.fingerprint, first.fingerprint, "it signs before it is trusted");

    // It trusts the new one now, and cannot keep a certificate of it.
    std::fs::create_dir(folder.join("node.tmp"))?;
    std::fs::remove_dir(folder.join("ca.tmp"))?;
    let found = waits(&lab, 0, "renewing", &[&held_name])?;
    assert_eq!(found.other_fingerprint, first.fingerprint);
    assert!(is_served(&lab, &ann, &old_ca)?, "who trusts the old CA alone is locked out");
    let early_to_end =
        lab.nodes[0].run(|c| async move { c.finish_ca_rotation("root", false).await })?;
    let text = early_to_end.err().ok_or("a node was locked out")?.to_string();
    assert!(text.contains(&held_name) && text.contains("renewing"), "{text}");
    // It shows the old one's, and knows which one counts from now on: a token that it makes lets a
    // node in elsewhere, and a client trusts the new CA alone.
    let mut meanwhile = TestNode::new(lab.folder(), "n6")?;
    meanwhile.join(&lab.token(held)?)?;
    let (_, of_carl) = papers_from(&lab, (held + 1) % 3, "carl")?;
    assert!(!of_carl.contains(old_ca.trim()) && of_carl.matches("BEGIN").count() == 1);
    leader_dies(&mut lab, &mut writers)?;
    waits(&lab, 0, "renewing", &[&held_name])?;

    std::fs::remove_dir(folder.join("node.tmp"))?;
    waits(&lab, 0, "renewed", &[])?;
    for (on, before) in before.iter().enumerate() {
        assert_ne!(lab.nodes[on].cluster()?.certificate().serial, *before);
    }
    leader_dies(&mut lab, &mut writers)?;
    // The old CA's client, and its token, are good until the end.
    assert!(is_served(&lab, &ann, &old_ca)?);
    let mut open = client.block_on(connect(&address, &name, &old_ca, ann.clone()))?;
    let (bob, new_ca) = papers(&lab, "bob")?;
    assert!(new_ca != old_ca && new_ca.matches("BEGIN").count() == 1);
    assert!(is_served(&lab, &bob, &new_ca)?);
    let mut fourth = TestNode::new(lab.folder(), "n4")?;
    fourth.join(&early)?;
    lab.nodes.push(fourth);
    assert_eq!(waits(&lab, 3, "renewed", &[])?.clients, ["ann"]);

    let ended =
        lab.nodes[1].run(|c| async move { c.finish_ca_rotation("root", false).await })??;
    assert_eq!((ended.phase.as_str(), ended.clients.len()), ("stable", 0));
    assert_ne!(ended.fingerprint, first.fingerprint);
    assert!(client.block_on(hangs_up(&mut open)), "an open connection was left to the old CA's");
    lab.wait("no member takes what the old CA signed", |lab| {
        let mut taken = false;
        for papers in [&ann, &of_node] {
            for node in &lab.nodes {
                let (address, papers) = (&node.config.api_address, Some(papers.clone()));
                let answer = client.block_on(async {
                    Outcome::Ok(answered(dial(address, &new_ca, &name, papers)?).await)
                })?;
                taken |= answer.is_some();
            }
        }
        Ok(!taken)
    })?;
    let refused = client.block_on(connect(&address, &name, &old_ca, bob.clone()));
    assert!(refused.is_err(), "a node still shows what the old CA vouches for");
    assert!(is_served(&lab, &bob, &new_ca)?);
    let of_ann = list(&lab, 0)?.into_iter().find(|one| one.name == "ann").ok_or("not listed")?;
    assert_eq!(of_ann.state, "untrusted");
    let again =
        lab.nodes[0].run(|c| async move { c.finish_ca_rotation("root", false).await })??;
    assert_eq!(again.phase, "stable");

    leader_dies(&mut lab, &mut writers)?;
    for on in 0..3 {
        writers.end(on)?;
    }
    assert!(writers.written > 100, "{} written", writers.written);
    // Tokens of before are refused with the reason, new ones let in.
    let mut fifth = TestNode::new(lab.folder(), "n5")?;
    let why = fifth.join(&late).err().ok_or("it was let in")?.to_string();
    assert!(why.contains("CA was replaced since"), "{why}");
    fifth.join(&lab.token(2)?)?;
    assert!(is_served(&lab, &papers_from(&lab, 3, "eve")?.0, &new_ca)?);
    Ok(())
}

#[test]
fn a_member_that_is_down_holds_a_rotation_up_until_it_is_removed() -> Outcome {
    let mut lab = Lab::new(3)?;
    // Of the first CA; good by its dates for long after that is gone.
    papers(&lab, "ann")?;
    let down = (lab.leader()? + 1) % 3;
    let asked = (down + 1) % 3;
    let name = lab.nodes[down].name.clone();
    lab.nodes[down].kill();
    lab.nodes[asked].run(|c| async move { c.rotate_ca("root").await })??;
    waits(&lab, asked, "trusting", &[&name])?;
    let refused =
        lab.nodes[asked].run(|c| async move { c.finish_ca_rotation("root", false).await })?;
    let Err(error @ MembershipError::Invalid(_)) = refused else {
        return Err(format!("{refused:?}").into());
    };
    let text = error.to_string();
    assert!(text.contains(&name) && text.contains("cluster remove"), "{text}");
    lab.nodes[asked].run(move |c| async move { c.remove_node(&name).await })??;
    waits(&lab, asked, "renewed", &[])?;
    let ended =
        lab.nodes[asked].run(|c| async move { c.finish_ca_rotation("root", false).await })??;
    assert_eq!(ended.phase, "stable");
    // What was its place is free: with what the old CA signed nobody comes in.
    let mut node = TestNode::new(&lab.folder().join("again"), "n4")?;
    node.join(&lab.token(asked)?)?;
    // One rotation after the other. Who got a certificate of each CA needs another one still.
    papers(&lab, "ann")?;
    let second = lab.nodes[asked].run(|c| async move { c.rotate_ca("root").await })??;
    assert_ne!(second.phase, "stable");
    assert_eq!(waits(&lab, asked, "renewed", &[])?.clients, ["ann"]);
    // The only administrator.
    let document = Txn::new().put("access/ann.toml", "role = \"admin\"\n");
    lab.nodes[asked].run(|c| async move { c.txn(document).await })??;
    let refused =
        lab.nodes[asked].run(|c| async move { c.finish_ca_rotation("root", false).await })?;
    assert!(
        matches!(&refused, Err(MembershipError::NoAdministratorLeft(names)) if names == &["ann"]),
        "{refused:?}"
    );
    assert_eq!(status(&lab, asked)?.phase, "renewed");
    papers(&lab, "ann")?;
    assert!(status(&lab, asked)?.clients.is_empty());
    node.run(|c| async move { c.finish_ca_rotation("root", false).await })??;
    // Against a person's better knowledge.
    lab.nodes[asked].run(|c| async move { c.rotate_ca("root").await })??;
    waits(&lab, asked, "renewed", &[])?;
    node.run(|c| async move { c.finish_ca_rotation("root", true).await })??;
    Ok(())
}
