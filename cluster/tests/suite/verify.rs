//! Comparing the members' copies, on real members: while others write, with a copy that was
//! tampered with, with a member that is off.

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use cluster::Txn;
use proto::v1;

use crate::common::{Lab, Outcome};

fn outcomes(found: &v1::Verification) -> Vec<(&str, &str)> {
    found.members.iter().map(|m| (m.node.as_str(), m.outcome.as_str())).collect()
}

/// Changes the last byte of a value in a stopped member's database, as a fault would that no
/// checksum of a file shows.
fn tamper(folder: &Path, key: &str) -> Outcome {
    let path = folder.join("db");
    let options = rocksdb::Options::default();
    let families = rocksdb::DB::list_cf(&options, &path)?;
    let rocks = rocksdb::DB::open_cf(&options, &path, families)?;
    let data = rocks.cf_handle("data").ok_or("there is no data")?;
    let mut found = None;
    for row in rocks.iterator_cf(data, rocksdb::IteratorMode::Start) {
        let (row, value) = row?;
        if row.get(4..) == Some(key.as_bytes()) {
            found = Some((row, value));
        }
    }
    let (row, mut value) = found.ok_or("the key is not there")?;
    *value.last_mut().ok_or("the value is empty")? ^= 1;
    rocks.put_cf(data, row, value)?;
    rocks.flush_wal(true)?;
    Ok(())
}

#[test]
fn copies_are_the_same_while_others_write() -> Outcome {
    let lab = Lab::new(3)?;
    let (ends, writer) = (Arc::new(AtomicBool::new(false)), lab.nodes[1].cluster()?);
    let stop = ends.clone();
    let writing = std::thread::spawn(move || -> Outcome<u64> {
        let runtime = tokio::runtime::Runtime::new()?;
        let mut written = 0;
        while !stop.load(Ordering::SeqCst) {
            let txn = Txn::new().put(format!("vms/{}.toml", written % 50), vec![7u8; 2000]);
            runtime.block_on(writer.txn(txn))?;
            written += 1;
        }
        Ok(written)
    });
    let mut checked = Vec::new();
    for node in lab.nodes.iter().cycle().take(6) {
        checked.push(node.run(|c| async move { c.verify().await })??);
    }
    ends.store(true, Ordering::SeqCst);
    let written = writing.join().map_err(|_| "the writer panicked")??;
    assert!(written > 0);
    for found in &checked {
        assert_eq!(outcomes(found), [("n1", "same"), ("n2", "same"), ("n3", "same")], "{found:?}");
        assert!(!found.differs && found.summary == "3 of 3 copies are the same", "{found:?}");
        assert!(found.members.iter().all(|m| m.checksum == found.members[0].checksum));
    }
    let (first, last) = (&checked[0], &checked[5]);
    assert!(first.log_index < last.log_index && first.revision < last.revision);
    assert_ne!(first.members[0].checksum, last.members[0].checksum);
    Ok(())
}

#[test]
fn a_copy_that_differs_is_named_by_itself_and_in_the_status() -> Outcome {
    let mut lab = Lab::with(3, |config| config.verify_every = Duration::from_secs(1))?;
    lab.nodes[0]
        .run(|c| async move { c.txn(Txn::new().put("vms/a.toml", "cpus = 1")).await })??;
    lab.wait("they are compared, and are the same", |lab| {
        let status = lab.nodes[2].run(|c| async move { c.status().await })?;
        let found = status.verification.unwrap_or_default();
        assert!(!found.differs, "{found:?}");
        Ok(outcomes(&found) == [("n1", "same"), ("n2", "same"), ("n3", "same")])
    })?;
    lab.nodes[1].stop();
    tamper(&lab.nodes[1].folder, "vms/a.toml")?;
    lab.nodes[1].start()?;
    // Nobody asks for it.
    lab.wait("the difference is seen", |lab| {
        let status = lab.nodes[0].run(|c| async move { c.status().await })?;
        let found = status.verification.unwrap_or_default();
        Ok(outcomes(&found) == [("n1", "same"), ("n2", "differs"), ("n3", "same")]
            && found.differs
            && found.summary.contains("n2 (its data differ)"))
    })?;
    // It is in the store: every member says it.
    lab.wait("all of them say so", |lab| {
        for node in &lab.nodes {
            let status = node.run(|c| async move { c.status().await })?;
            if !status.verification.unwrap_or_default().differs {
                return Ok(false);
            }
        }
        Ok(true)
    })
}

/// Changes a byte in a file of a running member's database, as a fault of its disk would. It is in a
/// table that is written and hardly ever read.
fn damage(folder: &Path) -> Outcome {
    let path = folder.join("db");
    let options = rocksdb::Options::default();
    let families = rocksdb::DB::list_cf(&options, &path)?;
    let rocks = rocksdb::DB::open_cf_for_read_only(&options, &path, families, false)?;
    let files = rocks.live_files()?;
    let file = files.iter().find(|file| file.column_family_name == "journal");
    let file = file.ok_or("the journal has no file")?;
    let path = path.join(file.name.trim_start_matches('/'));
    let file = std::fs::File::options().read(true).write(true).open(path)?;
    let mut byte = [0];
    file.read_exact_at(&mut byte, 10)?;
    file.write_all_at(&[byte[0] ^ 1], 10)?;
    Ok(())
}

#[test]
fn a_copy_that_cannot_be_read_is_a_fault_of_its_node() -> Outcome {
    let mut lab = Lab::new(3)?;
    lab.nodes[0].run(|c| async move { c.txn(Txn::new().put("vms/a.toml", "x = 1")).await })??;
    // What is in the write-ahead log goes into files as it is opened again.
    lab.nodes[1].stop();
    lab.nodes[1].start()?;
    lab.wait("all are well", |lab| {
        let found = lab.nodes[1].run(|c| async move { c.verify().await })?;
        Ok(found.is_ok_and(|found| found.members.iter().all(|of| of.outcome == "same")))
    })?;
    damage(&lab.nodes[1].folder)?;
    let found = lab.nodes[0].run(|c| async move { c.verify().await })??;
    assert_eq!(outcomes(&found), [("n1", "same"), ("n2", "faulty"), ("n3", "same")], "{found:?}");
    assert!(found.faulty && !found.differs, "{found:?}");
    assert!(found.members[1].detail.contains("cannot be read"), "{found:?}");
    assert!(found.summary.starts_with("A COPY IS DAMAGED: n2 ("), "{found:?}");
    Ok(())
}

#[test]
fn a_member_that_is_off_is_not_called_the_same() -> Outcome {
    let mut lab = Lab::new(3)?;
    lab.nodes[2].kill();
    let leader = lab.leader()?;
    let found = lab.nodes[leader].run(|c| async move { c.verify().await })??;
    assert_eq!(outcomes(&found), [("n1", "same"), ("n2", "same"), ("n3", "unknown")]);
    assert!(found.members[2].detail.contains("does not answer"), "{found:?}");
    lab.nodes[1].kill();
    let left = lab.nodes.iter().find(|node| node.is_running()).ok_or("nobody is left")?;
    let refused = left.run(|c| async move { c.verify().await })?;
    assert!(refused.is_err(), "without a quorum there is no place to compare at: {refused:?}");
    Ok(())
}
