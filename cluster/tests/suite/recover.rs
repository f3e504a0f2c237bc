//! One survivor becomes a cluster again: what it keeps, when it is refused, and that the old
//! cluster and the new one stay strangers.

use std::os::unix::fs::PermissionsExt;

use cluster::{Cluster, Consistency, OpenError, RecoverError, Recovered, Survivor, Txn};
use proto::record::{Phase, Placement, Requested};
use proto::v1::RaftMessage;
use proto::v1::raft_client::RaftClient;
use proto::{Generation, Name, NodeId, VmId, keys};

use crate::common::{Lab, Outcome, TestNode};
use crate::joining::{Papers, dial};

fn vm(owner: u64, ha: bool, phase: Phase) -> Placement {
    Placement {
        vm_id: VmId(uuid::Uuid::from_u128(u128::from(owner))),
        owner: NodeId(owner),
        generation: Generation(7),
        phase,
        requested: Requested::Started,
        ha,
        cpus: 2,
        memory_bytes: 1 << 30,
        start_failures: 0,
        tried: Vec::new(),
        home: None,
        lock: None,
        retry_at_unix_ms: None,
        message: None,
        events: Vec::new(),
    }
}

async fn placement(cluster: &Cluster, vm: &str) -> Outcome<Placement> {
    let key = keys::placement(&vm.parse::<Name>()?);
    let kept = cluster.get(&key, Consistency::Linearizable).await?.0.ok_or("no placement")?;
    Ok(serde_json::from_slice(&kept.value)?)
}

fn find(node: &TestNode) -> Outcome<Result<Survivor, RecoverError>> {
    if !node.is_running() {
        node.wait_closed();
    }
    Ok(tokio::runtime::Runtime::new()?.block_on(Survivor::find(node.config.clone())))
}

/// Who keeps a node from being recovered, and whether it greeted as a member does.
fn answering(node: &TestNode) -> Outcome<Vec<(String, bool)>> {
    match find(node)?.map(drop) {
        Err(RecoverError::Answers(heard)) => {
            Ok(heard.into_iter().map(|of| (of.name, of.seen == "it answers")).collect())
        }
        other => Err(format!("it was not refused so: {other:?}").into()),
    }
}

fn try_recover(node: &TestNode) -> Outcome<Result<Recovered, RecoverError>> {
    let runtime = tokio::runtime::Runtime::new()?;
    let config = node.config.clone();
    node.wait_closed();
    Ok(runtime.block_on(async { Survivor::find(config).await?.recover("").await }))
}

fn recover(node: &TestNode) -> Outcome<Recovered> {
    Ok(try_recover(node)??)
}

#[test]
fn a_survivor_goes_on_alone_and_the_old_majority_stays_another_cluster() -> Outcome {
    let mut lab = Lab::new(3)?;
    let put = |txn: Txn, name: &str, vm: &Placement| -> Outcome<Txn> {
        Ok(txn.put(keys::placement(&name.parse()?), serde_json::to_vec(vm)?))
    };
    let txn = Txn::new().put("vms/own.toml", "x = 1").put(keys::node(NodeId(1)), "{}");
    let txn = put(txn, "own", &vm(3, false, Phase::Started))?;
    let txn = put(txn, "ha", &vm(3, true, Phase::Started))?;
    let txn = put(txn, "theirs", &vm(1, false, Phase::Started))?;
    let txn = put(txn, "moving", &vm(3, false, Phase::Migrating { target: NodeId(1) }))?;
    let written = lab.nodes[0].run(|c| async move { c.txn(txn).await })??.revision();
    lab.wait("the survivor has it", |lab| {
        let status = lab.nodes[2].run(|c| async move { c.status().await })?;
        Ok(status.revision >= written.0)
    })?;
    let old_id = lab.nodes[2].cluster()?.cluster_id().to_owned();
    assert!(matches!(find(&lab.nodes[2])?, Err(RecoverError::Open(OpenError::InUse { .. }))));
    lab.nodes[2].stop();
    // Even one that answers is one too many.
    assert_eq!(answering(&lab.nodes[2])?, [("n1".to_owned(), true), ("n2".to_owned(), true)]);
    lab.nodes[0].kill();
    assert_eq!(answering(&lab.nodes[2])?, [("n2".to_owned(), true)]);
    lab.nodes[1].kill();

    // To look changes nothing.
    let survivor = find(&lab.nodes[2])??;
    let survey = survivor.survey().clone();
    drop(survivor);
    assert_eq!((survey.node_id, survey.node_name.as_str()), (NodeId(3), "n3"));
    assert!(survey.revision >= written.0 && survey.last_index >= survey.committed_index);
    let dropped: Vec<_> = survey.dropped.iter().map(|member| member.name.as_str()).collect();
    assert_eq!(dropped, ["n1", "n2"]);

    // A folder that is in the way, and one that an interruption left.
    let node = &lab.nodes[2];
    let kept = node.folder.join(format!("before-recover-{old_id}"));
    std::fs::create_dir(&kept)?;
    let refused = try_recover(node)?.map(drop);
    assert!(matches!(&refused, Err(RecoverError::Kept(path)) if *path == kept), "{refused:?}");
    std::fs::remove_dir(&kept)?;
    std::fs::create_dir_all(node.folder.join("recovered/db"))?;
    let recovered = recover(node)?;
    assert_ne!(recovered.cluster_id, old_id);
    let mode = std::fs::metadata(node.folder.join("recover.hfb"))?.permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    assert!(!node.folder.join("recover.hfb.tmp").exists());
    assert_eq!(recovered.restored.vms, 4);
    // The old CA's key is in it.
    let mode = std::fs::metadata(&recovered.kept)?.permissions().mode();
    assert_eq!(mode & 0o777, 0o700);
    assert!(
        recovered.kept.join("db").exists()
            && recovered.kept.join("log").exists()
            && recovered.kept.join("identity.json").exists()
    );
    let keys = [&recovered.kept, &node.folder].map(|folder| folder.join("sealing.key"));
    assert!(std::fs::read(&keys[0])? != std::fs::read(&keys[1])?, "what opens the old CA's key");
    lab.nodes[2].start()?;
    lab.nodes[2].run(|c| async move {
        assert_eq!((c.cluster_name(), c.node_id()), ("test", NodeId(1)));
        assert_eq!(c.node_name().borrow().as_str(), "n3");
        let own = placement(&c, "own").await?;
        assert_eq!(c.members().len(), 1);
        assert_eq!(
            (own.owner, own.generation, own.phase),
            (NodeId(1), Generation(7), Phase::Started)
        );
        for other in ["ha", "theirs", "moving"] {
            let other = placement(&c, other).await?;
            assert_eq!((other.owner, other.phase), (NodeId(1), Phase::Stopped), "{other:?}");
            assert!(other.generation > Generation(100_000), "{other:?}");
        }
        let node = c.get(&keys::node(NodeId(1)), Consistency::Linearizable).await?;
        assert_eq!(node.0, None);
        Outcome::Ok(())
    })??;

    // The old majority comes back all the same: it is the old cluster, and hears nothing of this one.
    lab.nodes[0].start()?;
    lab.nodes[1].start()?;
    for turn in 0..20u8 {
        let old = lab.nodes[usize::from(turn % 2)]
            .run(move |c| async move { c.txn(Txn::new().put("side", "old")).await })??;
        let new = lab.nodes[2]
            .run(move |c| async move { c.txn(Txn::new().put("side", "new")).await })??;
        assert!(old.committed() && new.committed());
    }
    let seen = |node: &TestNode| {
        node.run(|c| async move {
            let side = c.get("side", Consistency::Linearizable).await?.0.map(|kv| kv.value);
            let members: Vec<_> = c.members().into_iter().map(|member| member.name).collect();
            Outcome::Ok((side, members, c.cluster_id().to_owned()))
        })?
    };
    let (side, members, id) = seen(&lab.nodes[0])?;
    assert_eq!((side.as_deref(), id), (Some(b"old".as_slice()), old_id));
    assert_eq!(members, ["n1", "n2", "n3"]);
    let (side, members, id) = seen(&lab.nodes[2])?;
    assert_eq!((side.as_deref(), id), (Some(b"new".as_slice()), recovered.cluster_id));
    assert_eq!(members, ["n3"]);
    // And it takes nodes in.
    let token = lab.token(2)?;
    let mut fourth = TestNode::new(lab.folder(), "n4")?;
    fourth.join(&token)?;
    fourth.stop();
    Ok(())
}

#[test]
fn what_was_acknowledged_and_reached_the_survivor_is_kept() -> Outcome {
    // Each acknowledged write is on both of two; whether the second knew that it was committed when
    // the power went is chance.
    let mut lab = Lab::new(2)?;
    let leader = lab.leader()?;
    let last = lab.nodes[leader].run(|c| async move {
        let mut last = 0;
        for n in 0..50u32 {
            last = c.txn(Txn::new().put(format!("f{n}"), n.to_string())).await?.revision().0;
        }
        Outcome::Ok(last)
    })??;
    let survivor = 1 - leader;
    lab.nodes[survivor].kill();
    lab.nodes[leader].kill();
    let recovered = recover(&lab.nodes[survivor])?;
    assert!(recovered.restored.header.revision >= last, "{recovered:?}");
    lab.nodes[survivor].start()?;
    lab.nodes[survivor].run(|c| async move {
        for n in 0..50u32 {
            let kept = c.get(&format!("f{n}"), Consistency::Linearizable).await?.0;
            assert_eq!(kept.map(|kv| kv.value), Some(n.to_string().into_bytes()), "f{n}");
        }
        Outcome::Ok(())
    })??;
    // Interrupted in the middle it would be that of no member: no agent may begin anew there.
    let node = &mut lab.nodes[survivor];
    node.stop();
    std::fs::create_dir(node.folder.join("recovered"))?;
    let (there, made) = (node.folder.join("identity.json"), node.folder.join("recovered"));
    std::fs::rename(&there, made.join("identity.json"))?;
    let refused = node.start().map_err(|error| error.to_string());
    assert!(refused.is_err_and(|text| text.contains("run `node-agent recover` again")));
    assert!(cluster::finish_recovery(&node.folder)?.is_some() && !made.exists());
    node.start()?;
    // A folder of no member, and one that is recovered twice.
    let fresh = TestNode::new(lab.folder(), "fresh")?;
    assert!(matches!(find(&fresh)?, Err(RecoverError::NoMember(_))));
    lab.nodes[survivor].stop();
    let again = recover(&lab.nodes[survivor])?;
    assert_ne!(again.cluster_id, recovered.cluster_id);
    assert_eq!(again.restored.keys, recovered.restored.keys);
    Ok(())
}

#[test]
fn what_was_not_agreed_to_gives_the_survivor_no_vm() -> Outcome {
    // A leader that hears nobody for two of these proposes nothing any more.
    let mut lab = Lab::with(3, |config| config.timings.election_max_ms = 3000)?;
    let leader = lab.leader()?;
    let me = lab.nodes[leader].cluster()?.node_id().0;
    let put = |name: &str, vm: &Placement| -> Outcome<Txn> {
        Ok(Txn::new().put(keys::placement(&name.parse()?), serde_json::to_vec(vm)?))
    };
    let (mine, theirs) = (vm(me, false, Phase::Started), vm(me + 1, false, Phase::Started));
    let mut last = 0;
    for txn in [put("own", &mine)?, put("taken", &theirs)?, Txn::new().put("last", "1")] {
        last = lab.nodes[leader].run(|c| async move { c.txn(txn).await })??.revision().0;
    }
    // The migration's commit reaches only the log of the one that is left.
    for other in (0..3).filter(|other| *other != leader) {
        lab.nodes[other].kill();
    }
    let commit = put("taken", &mine)?;
    let lost = lab.nodes[leader].run(|c| async move { c.txn(commit).await })?;
    assert!(lost.is_err(), "{lost:?}");
    lab.nodes[leader].stop();
    let recovered = recover(&lab.nodes[leader])?;
    assert!(recovered.restored.header.revision > last, "the commit is in its log: {recovered:?}");
    assert_eq!(recovered.restored.vms, 2);
    lab.nodes[leader].start()?;
    lab.nodes[leader].run(|c| async move {
        let own = placement(&c, "own").await?;
        assert_eq!((own.generation, own.phase), (Generation(7), Phase::Started));
        let taken = placement(&c, "taken").await?;
        assert_eq!((taken.phase, taken.requested), (Phase::Stopped, Requested::Stopped));
        assert!(taken.generation > Generation(100_000), "{taken:?}");
        Outcome::Ok(())
    })?
}

#[test]
fn who_refuses_a_revoked_certificate_is_there() -> Outcome {
    let mut lab = Lab::new(2)?;
    let folder = lab.nodes[1].config.data_dir.clone();
    let old = std::fs::read(folder.join("node.pem"))?;
    let serial = lab.nodes[1].cluster()?.certificate().serial;
    lab.nodes[1].run(|c| async move { c.renew_certificate().await })??;
    let revoked = serial.clone();
    lab.nodes[1].run(move |c| async move { c.revoke_certificates(&revoked, "root").await })??;
    lab.wait("the other one knows of it", |lab| {
        let listed = lab.nodes[0].run(|c| async move { c.certificates().await })??;
        Ok(listed.iter().any(|one| one.serial == serial && one.state == "revoked"))
    })?;
    lab.nodes[1].stop();
    // As after its folder was restored from a copy of the machine's disk.
    std::fs::write(folder.join("node.pem"), old)?;
    lab.wait("it is refused for what it was told", |lab| {
        let refused = find(&lab.nodes[1])?.map(drop);
        let Err(RecoverError::Answers(heard)) = &refused else {
            return Err(format!("it was not refused so: {refused:?}").into());
        };
        assert!(heard.len() == 1 && heard[0].name == "n1", "{heard:?}");
        Ok(heard[0].seen.contains("was revoked"))
    })
}

/// A log entry that this version cannot read: not passed over, and no panic.
#[test]
fn a_log_entry_of_another_version_stops_a_member_and_says_so() -> Outcome {
    let mut lab = Lab::new(1)?;
    lab.nodes[0].run(|c| async move { c.txn(Txn::new().put("a", "1")).await })??;
    // From a leader of another version: not taken, and said.
    let folder = lab.nodes[0].config.data_dir.clone();
    let pem = std::fs::read_to_string(folder.join("node.pem"))?;
    let ca = std::fs::read_to_string(folder.join("ca.crt"))?;
    let name = format!("{}.holdfast", lab.nodes[0].cluster()?.cluster_id());
    let address = lab.nodes[0].config.api_address.clone();
    let answer = tokio::runtime::Runtime::new()?.block_on(async {
        let papers = Papers { key: pem.clone(), certificate: pem };
        let mut leader = RaftClient::new(dial(&address, &ca, &name, Some(papers))?);
        Outcome::Ok(leader.append_once(RaftMessage { payload: vec![0xff; 40] }).await)
    })?;
    let refused = answer.err().ok_or("it was taken")?;
    assert_eq!(refused.code(), tonic::Code::FailedPrecondition, "{refused}");
    assert!(refused.message().contains("run the same version"), "{refused}");
    // In its own log.
    lab.nodes[0].stop();
    lab.nodes[0].wait_closed();
    {
        let path = lab.nodes[0].config.data_dir.join("log");
        let options = rocksdb::Options::default();
        let families = rocksdb::DB::list_cf(&options, &path)?;
        let rocks = rocksdb::DB::open_cf(&options, &path, families)?;
        let log = rocks.cf_handle("log").ok_or("there is no log")?;
        let last = rocks.iterator_cf(log, rocksdb::IteratorMode::End).next();
        let (key, _) = last.ok_or("the log is empty")??;
        let next = u64::from_be_bytes(key.as_ref().try_into()?) + 1;
        rocks.put_cf(log, next.to_be_bytes(), [0xff; 40])?;
        rocks.flush_wal(true)?;
    }
    let started = lab.nodes[0].start().map_err(|error| error.to_string());
    let recovered = find(&lab.nodes[0])?.map(drop).map_err(|error| error.to_string());
    for refused in [started, recovered] {
        let text = refused.err().ok_or("it was taken")?;
        assert!(text.contains("cannot be read by this agent"), "{text}");
        assert!(text.contains("run the same version"), "{text}");
    }
    Ok(())
}
