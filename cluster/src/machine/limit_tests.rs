//! How much the store takes: of data, of one transaction, of history under churn.

use std::io;

use proptest::prelude::*;

use super::command::{KeyWrite, Unfit, validate};
use super::model_tests::Rows;
use super::usage::{DataLimits, Share, Usage, kept, used};
use super::{Command, Lane, Read, Reply, Table, TxnCommand, floor, revision, unswept};

fn txn(writes: &[(&str, Option<usize>)]) -> TxnCommand {
    let write = |(key, size): &(&str, Option<usize>)| KeyWrite {
        key: (*key).to_owned(),
        value: size.map(|size| vec![7; size]),
    };
    TxnCommand {
        compares: Vec::new(),
        writes: writes.iter().map(write).collect(),
        client: String::new(),
        sequence: 0,
        author: "ann".to_owned(),
        at_ms: 0,
    }
}

fn limited(files: Usage) -> io::Result<Rows> {
    let mut rows = Rows::default();
    let system = Usage { keys: 10, bytes: 10_000 };
    rows.apply(1, &Command::Limit(DataLimits { files, system, largest_file: 1 << 20 }))?;
    Ok(rows)
}

#[test]
fn full_data_takes_deletes_and_the_systems_records_but_nothing_more() -> io::Result<()> {
    let mut rows = limited(Usage { keys: 3, bytes: 1000 })?;
    let mut write = |writes: &[(&str, Option<usize>)]| rows.apply(2, &Command::Txn(txn(writes)));
    assert!(matches!(write(&[("a", Some(900))])?, Reply::Committed { .. }));
    let Reply::Full(full) = write(&[("b", Some(200))])? else { panic!("it was taken") };
    assert_eq!((full.share, full.used), (Share::Files, Usage { keys: 1, bytes: 901 }));
    // In exchange, smaller, or of the system: yes.
    assert!(matches!(write(&[("a", Some(800)), ("b", Some(90))])?, Reply::Committed { .. }));
    assert!(matches!(write(&[("status/x", Some(2000))])?, Reply::Committed { .. }));
    assert!(matches!(write(&[("a", Some(810)), ("b", Some(300))])?, Reply::Full(_)));
    assert!(matches!(write(&[("c", Some(1))])?, Reply::Committed { .. }));
    // By number as well.
    assert!(matches!(write(&[("d", Some(1))])?, Reply::Full(_)));
    assert!(matches!(write(&[("c", None), ("d", Some(1))])?, Reply::Committed { .. }));
    assert!(matches!(write(&[("a", None), ("b", None), ("d", None)])?, Reply::Committed { .. }));
    assert_eq!(used(&rows, Share::Files)?, Usage::default());
    Ok(())
}

#[test]
fn the_systems_own_records_are_taken_however_full_it_is() -> io::Result<()> {
    let mut rows = limited(Usage { keys: 100, bytes: 100_000 })?;
    let mut write = |writes: &[(&str, Option<usize>)]| rows.apply(2, &Command::Txn(txn(writes)));
    // People's: a new VM's placement comes with its document; a join token.
    let vm = [("vms/a.toml", Some(10)), ("status/vms/a", Some(9900))];
    assert!(matches!(write(&vm)?, Reply::Committed { .. }));
    let vm = [("vms/b.toml", Some(10)), ("status/vms/b", Some(500))];
    let Reply::Full(full) = write(&vm)? else { panic!("it was taken") };
    assert_eq!(full.share, Share::System);
    assert!(matches!(write(&[("priv/tokens/t", Some(500))])?, Reply::Full(_)));
    // The system's: a leader's epoch, a node that is fenced, with the VMs' events.
    assert!(matches!(write(&[("status/ha/leader", Some(500))])?, Reply::Committed { .. }));
    let fencing = [("status/fenced/2", Some(200)), ("status/vms/a", Some(12_000))];
    assert!(matches!(write(&fencing)?, Reply::Committed { .. }));
    // Over the limit, what makes it smaller is taken from everyone.
    let delete = [("vms/a.toml", None), ("status/vms/a", None)];
    assert!(matches!(write(&delete)?, Reply::Committed { .. }));
    assert!(matches!(write(&vm)?, Reply::Committed { .. }));
    Ok(())
}

#[test]
fn a_refusal_for_want_of_space_is_no_answer_to_a_repetition() -> io::Result<()> {
    let mut rows = limited(Usage { keys: 1, bytes: 1000 })?;
    rows.apply(2, &Command::Txn(txn(&[("a", Some(1))])))?;
    let named = TxnCommand { client: "c".to_owned(), sequence: 1, ..txn(&[("b", Some(1))]) };
    assert!(matches!(rows.apply(3, &Command::Txn(named.clone()))?, Reply::Full(_)));
    rows.apply(4, &Command::Txn(txn(&[("a", None)])))?;
    let Reply::Committed { revision } = rows.apply(5, &Command::Txn(named.clone()))? else {
        panic!("there is room")
    };
    assert_eq!(rows.apply(6, &Command::Txn(named))?, Reply::Committed { revision });
    Ok(())
}

#[test]
fn a_limit_on_files_that_is_lowered_refuses_only_what_grows() -> io::Result<()> {
    let mut rows = limited(Usage { keys: 10, bytes: 10_000 })?;
    let mut index = 2;
    let mut apply = |command: Command| {
        index += 1;
        rows.apply(index, &command)
    };
    let write = |writes: &[(&str, Option<usize>)]| Command::Txn(txn(writes));
    assert!(matches!(apply(write(&[("a", Some(900)), ("b", Some(50))]))?, Reply::Committed { .. }));
    let usage = Usage { keys: 10, bytes: 10_000 };
    apply(Command::Limit(DataLimits { files: usage, system: usage, largest_file: 100 }))?;
    let Reply::Oversized(found) = apply(write(&[("b", Some(100)), ("c", Some(101))]))? else {
        panic!("it was taken")
    };
    assert_eq!((found.key.as_str(), found.bytes, found.limit), ("c", 101, 100));
    assert!(matches!(apply(write(&[("a", Some(901))]))?, Reply::Oversized(_)));
    assert!(matches!(apply(write(&[("a", Some(900))]))?, Reply::Committed { .. }));
    assert!(matches!(apply(write(&[("a", Some(899))]))?, Reply::Committed { .. }));
    assert!(matches!(apply(write(&[("c", Some(100))]))?, Reply::Committed { .. }));
    assert!(matches!(apply(write(&[("status/x", Some(500))]))?, Reply::Committed { .. }));
    assert!(matches!(apply(write(&[("a", None)]))?, Reply::Committed { .. }));
    // By number: what is there stays, and may be changed; nothing comes.
    let few = Usage { keys: 1, bytes: 10_000 };
    apply(Command::Limit(DataLimits { files: few, system: usage, largest_file: 100 }))?;
    assert!(matches!(apply(write(&[("c", Some(90))]))?, Reply::Committed { .. }));
    assert!(matches!(apply(write(&[("d", Some(1))]))?, Reply::Full(_)));
    assert!(matches!(apply(write(&[("b", None), ("c", None)]))?, Reply::Committed { .. }));
    assert!(matches!(apply(write(&[("d", Some(1))]))?, Reply::Committed { .. }));
    Ok(())
}

#[test]
fn one_transaction_is_bounded() {
    let refused = |writes: &[(&str, Option<usize>)]| validate(&txn(writes)).unwrap_err();
    let Unfit::TooLarge(why) = refused(&[("vms/a", Some((1 << 20) + 1))]) else {
        panic!("not for its size")
    };
    assert!(why.contains("vms/a") && why.contains("1048576"), "{why}");
    let most = [("a", Some(1 << 20)), ("b", Some(1 << 20)), ("c", Some(1 << 20))];
    assert!(matches!(refused(&most), Unfit::TooLarge(_)));
    assert_eq!(validate(&txn(&most[..2])), Ok(()));
    assert!(matches!(refused(&[("a", None), ("a", None)]), Unfit::Invalid(_)));
    let many = TxnCommand { compares: vec![("a".to_owned(), 0); 9000], ..txn(&[]) };
    assert!(matches!(validate(&many), Err(Unfit::TooLarge(_))));
    let keys: Vec<String> = (0..10_000).map(|number| format!("f{number}")).collect();
    let puts: Vec<_> = keys.iter().map(|key| (key.as_str(), Some(1))).collect();
    let Unfit::TooLarge(why) = refused(&puts) else { panic!("not for its size") };
    assert!(why.contains("8192"), "{why}");
    assert_eq!(validate(&txn(&puts[..8192])), Ok(()));
    let author = TxnCommand { author: "a\nb".to_owned(), ..txn(&[]) };
    assert!(matches!(validate(&author), Err(Unfit::Invalid(_))));
}

proptest! {
    #[test]
    fn what_is_counted_is_what_is_there(
        txns in prop::collection::vec(
            prop::collection::btree_map(
                prop::sample::select(vec!["a", "b/c", "status/a", "priv/a"]),
                prop::option::of(0usize..300),
                1..4,
            ),
            0..40,
        ),
    ) {
        let mut rows = limited(Usage { keys: 2, bytes: 400 })?;
        for (index, writes) in (2u64..).zip(&txns) {
            let writes: Vec<_> = writes.iter().map(|(key, size)| (*key, *size)).collect();
            rows.apply(index, &Command::Txn(txn(&writes)))?;
            let (mut files, mut system) = (Usage::default(), Usage::default());
            for (key, (_, _, value)) in rows.data()? {
                let own = if Lane::of(&key) == Lane::Files { &mut files } else { &mut system };
                own.keys += 1;
                own.bytes += (key.len() + value.len()) as u64;
            }
            prop_assert_eq!(used(&rows, Share::Files)?, files);
            prop_assert_eq!(used(&rows, Share::System)?, system);
            prop_assert!(files.keys <= 2 && files.bytes <= 400);
        }
    }
}

#[test]
fn churn_leaves_as_many_rows_as_are_kept() -> io::Result<()> {
    let mut rows = Rows::default();
    let (mut most, mut least, mut index) = (0, 0, 0);
    for round in 0..100_000u64 {
        index += 1;
        let key = if round.is_multiple_of(2) { "status/a" } else { "vms/a.toml" };
        rows.apply(index, &Command::Txn(txn(&[(key, Some(16))])))?;
        if round.is_multiple_of(1000) {
            most = most.max(rows.0.len());
            let before = revision(&rows)?.saturating_sub(100);
            for lane in Lane::ALL {
                while floor(&rows, lane)? < before || unswept(&rows, lane)? {
                    index += 1;
                    rows.apply(index, &Command::Compact { lane, before, keep: 10 })?;
                }
            }
            least = least.max(rows.0.len());
        }
    }
    // Two rows for each write since the last step, three for those of a file in a folder.
    assert!(most < 3500 && least < 600, "{most} rows before a step, {least} after it");
    let versions = rows.scan(Table::Versions, b"v", Some(b"w"), usize::MAX)?;
    assert_eq!(kept(&rows)?.keys, versions.len() as u64);
    Ok(())
}
