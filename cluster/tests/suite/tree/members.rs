//! Three members, three mounts.

use std::collections::BTreeSet;
use std::fs;
use std::io::Write as _;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use cluster::Txn;
use nix::errno::Errno;

use super::harness::{Mounted, can_mount, close, create, errno, failure, names, open, wait, write};
use crate::common::Outcome;

#[test]
fn a_change_is_seen_on_every_member_at_once() -> Outcome {
    if !can_mount("a_change_is_seen_on_every_member_at_once") {
        return Ok(());
    }
    let tree = Mounted::new(3)?;
    write(&tree.at(0, "f"), b"0")?;
    for member in 0..3 {
        wait("it is there", || tree.at(member, "f").exists());
    }
    let mut delays = Vec::new();
    for round in 1..=30u32 {
        let (from, to) = (round as usize % 3, (round as usize + 1) % 3);
        // The reader's kernel knows the file, and has it mapped to a size.
        fs::metadata(tree.at(to, "f"))?;
        let text = "x".repeat(round as usize);
        write(&tree.at(from, "f"), text.as_bytes())?;
        delays.push(wait("the other member shows it", || {
            let length = fs::metadata(tree.at(to, "f")).map(|meta| meta.len());
            length.ok() == Some(u64::from(round))
        }));
        assert_eq!(fs::read_to_string(tree.at(to, "f"))?, text);
    }
    delays.sort();
    println!("seen elsewhere after {:?} (median), {:?} (most)", delays[15], delays[29]);
    // A second is what attributes are believed without a notice.
    assert!(delays[15] < Duration::from_millis(500), "{delays:?}");

    // An open file is read anew, a removed one is gone, a folder moves.
    let reader = open(&tree.at(2, "f"), false, 0)?;
    write(&tree.at(0, "f"), b"for the reader")?;
    wait("the open file shows it", || {
        let mut bytes = [0; 14];
        let read = std::os::unix::fs::FileExt::read_at(&reader, &mut bytes, 0);
        read.is_ok_and(|length| &bytes[..length] == b"for the reader")
    });
    fs::create_dir(tree.at(0, "d"))?;
    write(&tree.at(0, "d/x"), b"x")?;
    wait("the folder is there", || tree.at(1, "d/x").exists());
    fs::rename(tree.at(1, "d"), tree.at(1, "e"))?;
    wait("the folder has moved", || !tree.at(0, "d").exists() && tree.at(0, "e/x").exists());
    fs::remove_file(tree.at(2, "f"))?;
    wait("the file is gone", || !tree.at(0, "f").exists() && !tree.at(1, "f").exists());
    // By the store's own interface.
    tree.txn(0, Txn::new().put("api/deep/file", "x"))?;
    wait("it is there", || tree.at(2, "api/deep/file").exists());
    Ok(())
}

#[test]
fn appended_lines_of_three_members_are_all_there() -> Outcome {
    if !can_mount("appended_lines_of_three_members_are_all_there") {
        return Ok(());
    }
    const LINES: usize = 15;
    let tree = Mounted::new(3)?;
    let outcomes: Vec<_> = std::thread::scope(|scope| {
        let append = |member: usize| {
            let path = tree.at(member, "log");
            move || {
                for line in 0..LINES {
                    let mut file = create(&path, libc::O_APPEND).map_err(|e| errno(&e))?;
                    file.write_all(format!("{member} {line}\n").as_bytes())
                        .map_err(|e| errno(&e))?;
                    close(file)?;
                }
                Ok::<(), Errno>(())
            }
        };
        let threads: Vec<_> = (0..3).map(|member| scope.spawn(append(member))).collect();
        threads.into_iter().map(std::thread::ScopedJoinHandle::join).collect()
    });
    for outcome in outcomes {
        assert_eq!(outcome.ok(), Some(Ok(())));
    }
    let mut wanted = BTreeSet::new();
    for member in 0..3 {
        wanted.extend((0..LINES).map(|line| format!("{member} {line}")));
    }
    for member in 0..3 {
        wait("all lines are there", || {
            let text = fs::read_to_string(tree.at(member, "log")).unwrap_or_default();
            text.lines().count() == 3 * LINES
                && text.lines().map(str::to_owned).collect::<BTreeSet<_>>() == wanted
        });
    }
    Ok(())
}

#[test]
fn one_of_three_members_creates_exclusively_and_the_last_close_wins() -> Outcome {
    if !can_mount("one_of_three_members_creates_exclusively_and_the_last_close_wins") {
        return Ok(());
    }
    let tree = Mounted::new(3)?;
    for round in 0..10 {
        // A document, committed when it is closed, and a plain file, committed when it is made.
        for name in [format!("lock{round}"), format!("vms/v{round}.toml")] {
            let won: Vec<_> = std::thread::scope(|scope| {
                let attempt = |member: usize| {
                    let path = tree.at(member, &name);
                    move || {
                        let mut file = match create(&path, libc::O_EXCL) {
                            Ok(file) => file,
                            Err(error) => return Err(errno(&error)),
                        };
                        file.write_all(member.to_string().as_bytes()).map_err(|e| errno(&e))?;
                        close(file).map(|()| member)
                    }
                };
                let threads: Vec<_> = (0..3).map(|member| scope.spawn(attempt(member))).collect();
                threads.into_iter().map(std::thread::ScopedJoinHandle::join).collect()
            });
            let outcomes: Vec<_> = won.into_iter().flatten().collect();
            let winners: Vec<usize> = outcomes.iter().copied().flatten().collect();
            assert_eq!(winners.len(), 1, "{name}: {outcomes:?}");
            assert!(outcomes.iter().all(|one| matches!(one, Ok(_) | Err(Errno::EEXIST))));
            for member in 0..3 {
                wait("the winner's content is shown", || {
                    let text = fs::read_to_string(tree.at(member, &name));
                    text.is_ok_and(|text| text == winners[0].to_string())
                });
            }
        }
    }
    let first = create(&tree.at(0, "shared"), 0)?;
    let second = create(&tree.at(1, "shared"), 0)?;
    (&first).write_all(b"first, long")?;
    (&second).write_all(b"second")?;
    close(second)?;
    close(first)?;
    for member in 0..3 {
        wait("the last close wins", || {
            fs::read(tree.at(member, "shared")).is_ok_and(|text| text == b"first, long")
        });
    }
    Ok(())
}

#[test]
fn without_quorum_reads_go_on_and_writes_fail_within_a_second() -> Outcome {
    if !can_mount("without_quorum_reads_go_on_and_writes_fail_within_a_second") {
        return Ok(());
    }
    let mut tree = Mounted::new(3)?;
    write(&tree.at(0, "f"), b"content")?;
    let leader = tree.lab.leader()?;
    for survivor in [leader, (leader + 1) % 3] {
        for member in 0..3 {
            wait("it is there", || tree.at(member, "f").exists());
        }
        let opened = open(&tree.at(survivor, "f"), true, 0)?;
        for other in 0..3 {
            if other != survivor {
                tree.unmount(other);
                tree.lab.nodes[other].kill();
            }
        }
        // At once after the loss, while nobody can know of it yet; and later. A follower knows
        // when its patience with the leader ends: 1.2 s with this test's timings.
        let begin = Instant::now();
        let written = (&opened).write_all(b"never").map_err(|error| errno(&error));
        let failed = written.and_then(|()| close(opened));
        assert_eq!(
            (failed, begin.elapsed() < Duration::from_millis(1500)),
            (Err(Errno::EROFS), true)
        );
        println!("the first write failed after {:?}", begin.elapsed());
        let begin = Instant::now();
        assert_eq!(failure(open(&tree.at(survivor, "f"), true, 0)), Errno::EROFS);
        assert_eq!(failure(create(&tree.at(survivor, "new"), 0)), Errno::EROFS);
        assert_eq!(failure(fs::create_dir(tree.at(survivor, "d"))), Errno::EROFS);
        assert_eq!(failure(fs::remove_file(tree.at(survivor, "f"))), Errno::EROFS);
        let renamed = fs::rename(tree.at(survivor, "f"), tree.at(survivor, "g"));
        assert_eq!(failure(renamed), Errno::EROFS);
        assert!(
            begin.elapsed() < Duration::from_millis(500),
            "known by then: {:?}",
            begin.elapsed()
        );
        assert!(names(&tree.at(survivor, ""))?.contains(&"f".to_owned()));
        let members = fs::read_to_string(tree.at(survivor, ".members"))?;
        assert!(members.contains("\"quorum\": false"), "{members}");
        let content = fs::read(tree.at(survivor, "f"))?;
        assert!(content == b"content" || content == b"never", "{content:?}");
        for other in 0..3 {
            if other != survivor {
                tree.lab.nodes[other].start()?;
                tree.mount(other)?;
            }
        }
        wait("it can be written again", || write(&tree.at(survivor, "f"), b"content").is_ok());
        wait("everywhere", || {
            (0..3).all(|member| fs::read(tree.at(member, "f")).is_ok_and(|text| text == b"content"))
        });
    }
    Ok(())
}

#[test]
fn a_lost_quorum_is_told_to_who_only_looks() -> Outcome {
    if !can_mount("a_lost_quorum_is_told_to_who_only_looks") {
        return Ok(());
    }
    let mut tree = Mounted::new(3)?;
    let survivor = (tree.lab.leader()? + 1) % 3;
    let quorum = |tree: &Mounted| -> Outcome<bool> {
        let members: serde_json::Value =
            serde_json::from_slice(&fs::read(tree.at(survivor, ".members"))?)?;
        members["quorum"].as_bool().ok_or_else(|| "no word of it".into())
    };
    assert!(quorum(&tree)?);
    for other in (0..3).filter(|other| *other != survivor) {
        tree.unmount(other);
        tree.lab.nodes[other].kill();
    }
    // At the first look, and nobody has tried to write.
    assert!(!quorum(&tree)?);
    for other in (0..3).filter(|other| *other != survivor) {
        tree.lab.nodes[other].start()?;
    }
    wait("it is there again", || quorum(&tree).is_ok_and(|quorum| quorum));
    Ok(())
}

#[test]
fn a_new_leader_is_waited_for_where_it_comes_in_time() -> Outcome {
    if !can_mount("a_new_leader_is_waited_for_where_it_comes_in_time") {
        return Ok(());
    }
    let mut tree = Mounted::new(3)?;
    write(&tree.at(0, "f"), b"content")?;
    let leader = tree.lab.leader()?;
    tree.unmount(leader);
    tree.lab.nodes[leader].kill();
    let survivor = (leader + 1) % 3;
    let mut refused = 0;
    let took = wait("a survivor writes again", || match write(&tree.at(survivor, "f"), b"new") {
        Ok(()) => true,
        Err(Errno::EROFS | Errno::EIO) => {
            refused += 1;
            false
        }
        Err(other) => panic!("{other}"),
    });
    println!("written {took:?} after the leader's end, refused {refused} times");
    assert!(took < Duration::from_secs(15), "{took:?}");
    let third = 3 - leader - survivor;
    wait("the other one shows it", || fs::read(tree.at(third, "f")).is_ok_and(|t| t == b"new"));
    Ok(())
}

/// One write of a file of its own: its name, what `close` said, what is said beside it.
#[derive(Debug, Clone)]
struct Attempt {
    name: String,
    outcome: Result<(), Errno>,
    note: String,
}

/// Writes files of its own, one after the other, until it is told to end.
fn write_on(
    root: PathBuf,
    who: String,
    done: Arc<AtomicUsize>,
    end: Arc<AtomicBool>,
) -> Vec<Attempt> {
    let mut attempts = Vec::new();
    for number in 0.. {
        if end.load(Ordering::SeqCst) {
            break;
        }
        // A document is committed once, a plain file as it is made and when it is closed.
        let name = format!("{who}-{number}{}", if number % 2 == 0 { ".toml" } else { "" });
        let outcome = write(&root.join(&name), name.as_bytes());
        let note = fs::read_to_string(root.join(format!("{name}.error"))).unwrap_or_default();
        done.fetch_add(usize::from(outcome.is_ok()), Ordering::SeqCst);
        attempts.push(Attempt { name, outcome, note });
    }
    attempts
}

#[test]
fn a_write_while_the_leader_dies_is_done_or_not_or_said_to_be_unknown() -> Outcome {
    if !can_mount("a_write_while_the_leader_dies_is_done_or_not_or_said_to_be_unknown") {
        return Ok(());
    }
    let mut tree = Mounted::new(3)?;
    let leader = tree.lab.leader()?;
    tree.unmount(leader);
    let survivors: Vec<usize> = (0..3).filter(|member| *member != leader).collect();
    let (done, end) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
    let all = Arc::new(Mutex::new(Vec::new()));
    let threads: Vec<_> = survivors
        .iter()
        .flat_map(|member| (0..4).map(move |thread| (*member, thread)))
        .map(|(member, thread)| {
            let (root, done, end, all) =
                (tree.at(member, ""), done.clone(), end.clone(), all.clone());
            std::thread::spawn(move || {
                let attempts = write_on(root, format!("m{member}t{thread}"), done, end);
                all.lock().unwrap_or_else(PoisonError::into_inner).extend(attempts);
            })
        })
        .collect();
    let more = |count: usize| {
        let before = done.load(Ordering::SeqCst);
        wait("files are written", || done.load(Ordering::SeqCst) >= before + count)
    };
    more(20);
    tree.lab.nodes[leader].kill();
    // At most one of each thread was still on its way.
    more(8);
    more(20);
    end.store(true, Ordering::SeqCst);
    for thread in threads {
        thread.join().map_err(|_| "a writer panicked")?;
    }
    let attempts = all.lock().unwrap_or_else(PoisonError::into_inner).clone();
    let (mut refused, mut unknown) = (0, 0);
    for Attempt { name, outcome, note } in &attempts {
        match outcome {
            Ok(()) => {
                for member in &survivors {
                    wait("what was acknowledged is there", || {
                        fs::read(tree.at(*member, name)).is_ok_and(|text| text == name.as_bytes())
                    });
                }
            }
            Err(Errno::EROFS | Errno::EIO) if note.contains("the outcome is unknown") => {
                unknown += 1
            }
            // Whoever is told nothing of an unknown outcome relies on it.
            Err(Errno::EROFS) => {
                refused += 1;
                let stored = tree.lab.nodes[survivors[0]].run({
                    let name = name.clone();
                    move |c| async move { c.get(&name, cluster::Consistency::Linearizable).await }
                })??;
                // A plain file may have been made before its content was refused.
                let content = stored.0.map(|kv| kv.value).unwrap_or_default();
                assert!(content.is_empty(), "{name} was refused, and is there: {note:?}");
            }
            Err(other) => panic!("{name}: {other}, {note:?}"),
        }
    }
    println!("{} writes, {refused} refused, {unknown} of unknown outcome", attempts.len());
    Ok(())
}
