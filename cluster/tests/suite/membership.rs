//! Who votes, who leads, what members are called and where they are, in a running cluster.

use std::time::{Duration, Instant};

use crate::common::{Lab, Outcome};
use cluster::{Cluster, Consistency, MembershipError, Txn};
use proto::record::{RemovalRecord, RemovalState};
use proto::{NodeId, keys};

fn voters(lab: &Lab, on: usize) -> Outcome<Vec<u64>> {
    let members = lab.members(on)?;
    Ok(members.iter().filter(|member| member.voter).map(|member| member.node_id.0).collect())
}

fn put(lab: &Lab, on: usize, key: &'static str) -> Outcome<bool> {
    lab.nodes[on].run(move |c| async move { c.txn(Txn::new().put(key, "1")).await.is_ok() })
}

#[test]
fn a_dead_voter_is_replaced_by_a_learner_and_comes_back_as_one() -> Outcome {
    let mut lab = Lab::with(4, |config| {
        config.voter_patience = Duration::from_secs(4);
    })?;
    assert_eq!(voters(&lab, 0)?.len(), 3);
    let leader = lab.leader()?;
    let victim = (0..3).find(|place| *place != leader).ok_or("no victim")?;
    let id = lab.nodes[victim].cluster()?.node_id().0;
    assert!(voters(&lab, leader)?.contains(&id));
    lab.nodes[victim].kill();
    lab.wait("a learner votes instead", |lab| {
        let voters = voters(lab, leader)?;
        Ok(voters.len() == 3 && !voters.contains(&id))
    })?;
    let replaced = voters(&lab, leader)?;
    lab.nodes[victim].start()?;
    lab.wait("it is a learner", |lab| {
        let members = lab.members(victim)?;
        Ok(members.iter().any(|member| member.node_id.0 == id && !member.voter))
    })?;
    assert!(put(&lab, victim, "back")?);
    assert_eq!(voters(&lab, leader)?, replaced);
    Ok(())
}

#[test]
fn a_node_that_hears_nobody_and_comes_back_disturbs_nobody() -> Outcome {
    let mut lab = Lab::new(3)?;
    let leader = lab.leader()?;
    let other = (0..3).find(|place| *place != leader).ok_or("no other")?;
    let term = lab.nodes[leader].cluster()?.term();
    let same = |lab: &Lab| {
        let cluster = lab.nodes[leader].cluster()?;
        Outcome::Ok(cluster.term() == term && cluster.leadership().borrow().is_leader)
    };
    for _ in 0..2 {
        lab.nodes[other].kill();
        lab.nodes[other].start_deaf()?;
        // For several of its election timeouts it asks for votes.
        let begin = Instant::now();
        while begin.elapsed() < Duration::from_secs(5) {
            assert!(same(&lab)?, "a node that hears nobody was listened to");
            assert!(put(&lab, leader, "on")?);
            std::thread::sleep(Duration::from_millis(100));
        }
        lab.nodes[other].hear()?;
        lab.wait("it follows again", |lab| {
            Ok(lab.nodes[other].cluster()?.leader() == lab.nodes[leader].cluster()?.leader())
        })?;
        assert!(put(&lab, other, "back")?);
        assert!(same(&lab)?, "the term rose, or the leader changed, as it came back");
    }
    Ok(())
}

#[test]
fn leadership_moves_on_request_and_before_a_planned_end() -> Outcome {
    let mut lab = Lab::new(3)?;
    let leader = lab.leader()?;
    let to = (leader + 1) % 3;
    let id = lab.nodes[to].cluster()?.node_id();
    let moved = lab.nodes[leader]
        .run(move |c: Cluster| async move { c.transfer_leader(Some(id)).await })??;
    assert_eq!(moved, id);
    assert_eq!(lab.leader()?, to);
    // Asked of a follower, to whoever fits.
    let third = (leader + 2) % 3;
    let moved =
        lab.nodes[third].run(|c: Cluster| async move { c.transfer_leader(None).await })??;
    assert_ne!(moved, id);
    let nobody = NodeId(9);
    let refused = lab.nodes[third]
        .run(move |c: Cluster| async move { c.transfer_leader(Some(nobody)).await })?;
    assert!(matches!(refused, Err(MembershipError::Invalid(_))), "{refused:?}");

    // An orderly end leaves no gap: by its end another node leads.
    let leader = lab.leader()?;
    let gone = lab.nodes[leader].cluster()?.node_id();
    let term = lab.nodes[leader].cluster()?.term();
    lab.nodes[leader].stop();
    for place in (0..3).filter(|place| *place != leader) {
        let cluster = lab.nodes[place].cluster()?;
        assert_eq!(cluster.term(), term + 1);
        assert!(cluster.leader().is_some_and(|id| id != gone), "{:?}", cluster.leader());
    }
    Ok(())
}

#[test]
fn a_node_comes_up_at_another_address() -> Outcome {
    let mut lab = Lab::new(3)?;
    let leader = lab.leader()?;
    let place = (leader + 1) % 3;
    lab.nodes[place].stop();
    assert!(put(&lab, leader, "meanwhile")?);
    lab.nodes[place].move_away()?;
    lab.nodes[place].start()?;
    let (id, address) =
        (lab.nodes[place].cluster()?.node_id(), lab.nodes[place].config.api_address.clone());
    lab.wait("the others know where it is", |lab| {
        let members = lab.members(leader)?;
        Ok(members.iter().any(|m| m.node_id == id && m.api_address == address && m.voter))
    })?;
    lab.wait("it has caught up", |lab| {
        lab.nodes[place].run(|c| async move {
            c.get("meanwhile", Consistency::Stale).await.is_ok_and(|(kv, _)| kv.is_some())
        })
    })?;
    // The others can count on it: without the third, it and the leader are a majority.
    let third = (leader + 2) % 3;
    lab.nodes[third].kill();
    lab.wait("two write on", |lab| put(lab, leader, "after"))
}

#[test]
fn a_node_gets_another_name() -> Outcome {
    let lab = Lab::new(2)?;
    let id = lab.nodes[1].cluster()?.node_id();
    let rename = |on: usize, name: &str| rename(&lab, on, id, name);
    let taken = rename(0, "n1").err().ok_or("two nodes of one name")?;
    assert!(taken.to_string().contains("choose another name"), "{taken}");
    let number = rename(0, "1").err().ok_or("a name that passes for another node's id")?;
    assert!(number.to_string().contains("would pass for a node's id"), "{number}");
    rename(0, "other")?;
    lab.wait("it knows", |lab| Ok(*lab.nodes[1].cluster()?.node_name().borrow() == "other"))?;
    // The old name is free again.
    rename(1, "n2")?;
    rename(1, "n2")?;
    lab.wait("it knows", |lab| Ok(*lab.nodes[1].cluster()?.node_name().borrow() == "n2"))
}

/// Renames a node, asked on another.
fn rename(lab: &Lab, on: usize, id: NodeId, name: &str) -> Outcome {
    let name = name.parse().map_err(|_| "no name")?;
    lab.nodes[on].run(move |c: Cluster| async move { c.rename_node(id, &name).await })??;
    Ok(())
}

#[test]
fn renames_at_the_same_time_leave_one_name_and_it_is_taken() -> Outcome {
    let lab = Lab::new(2)?;
    let (first, second) = (lab.nodes[0].cluster()?.node_id(), lab.nodes[1].cluster()?.node_id());
    for round in 0..5 {
        let names: Vec<String> = (0..4).map(|n| format!("r{round}-{n}")).collect();
        let all = names.clone();
        let ended = lab.nodes[0].run(move |c: Cluster| async move {
            let renames = all.into_iter().map(|name| {
                let c = c.clone();
                async move {
                    c.rename_node(second, &name.parse().map_err(|_| "name")?)
                        .await
                        .map_err(|e| e.to_string())
                }
            });
            futures::future::join_all(renames).await
        })?;
        assert!(ended.iter().any(Result::is_ok), "{ended:?}");
        // What is left half done by those that gave up is ended by the next.
        let called = lab.members(0)?.into_iter().find(|m| m.node_id == second).ok_or("gone")?.name;
        rename(&lab, 0, second, &called)?;
        for name in names {
            let taken = rename(&lab, 0, first, &name).is_err();
            assert_eq!(taken, name == called, "{name}, and the node is called {called}");
        }
    }
    Ok(())
}

#[test]
fn a_renamed_nodes_document_goes_with_it() -> Outcome {
    let lab = Lab::new(2)?;
    let id = lab.nodes[1].cluster()?.node_id();
    let document = "notes = \"left rack\"\n";
    lab.nodes[0].run(move |c: Cluster| async move {
        c.txn(Txn::new().put("nodes/n2.toml", document)).await
    })??;
    rename(&lab, 0, id, "left")?;
    let documents = lab.nodes[0].run(|c: Cluster| async move {
        c.range("nodes/", "", 0, Consistency::Linearizable).await
    })??;
    let documents: Vec<_> = documents.kvs.iter().map(|kv| (&*kv.key, &*kv.value)).collect();
    assert_eq!(documents, [("nodes/left.toml", document.as_bytes())]);
    Ok(())
}

#[test]
fn a_node_that_is_being_removed_takes_no_name() -> Outcome {
    let lab = Lab::new(2)?;
    let (first, second) = (lab.nodes[0].cluster()?.node_id(), lab.nodes[1].cluster()?.node_id());
    let record = RemovalRecord { name: "n2".to_owned(), state: RemovalState::Leaving };
    let record = serde_json::to_vec(&record)?;
    lab.nodes[0].run(move |c: Cluster| async move {
        c.txn(Txn::new().put(keys::removal(second), record)).await
    })??;
    let refused = rename(&lab, 0, second, "new").err().ok_or("it was renamed")?;
    assert!(refused.to_string().contains("being removed"), "{refused}");
    // The name stays free.
    rename(&lab, 0, first, "new")
}

#[test]
fn a_witness_votes_and_leaves_the_lead_to_others() -> Outcome {
    let mut lab = Lab::new(2)?;
    let mut witness = crate::common::TestNode::new(lab.folder(), "w")?;
    witness.config.witness = true;
    witness.config.zone = "far".to_owned();
    witness.join(&lab.token(0)?)?;
    let id = witness.cluster()?.node_id();
    lab.wait("it votes", |lab| {
        let members = lab.members(0)?;
        Ok(members.iter().any(|m| m.node_id == id && m.voter && m.witness && m.zone == "far"))
    })?;
    let leader = lab.leader()?;
    lab.nodes[leader].run(move |c: Cluster| async move { c.transfer_leader(Some(id)).await })??;
    lab.wait("another node leads again", |lab| {
        let cluster = lab.nodes[0].cluster()?;
        Ok(cluster.leader().is_some_and(|leader| leader != id))
    })?;
    // Two nodes and a witness survive the loss of any one.
    lab.nodes[leader].kill();
    let rest = 1 - leader;
    lab.wait("the other node writes on", |lab| put(lab, rest, "on"))
}
