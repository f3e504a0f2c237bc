//! A guest moves between nodes while it works and a client talks to it; nobody notices.

use std::time::Duration;

use tests::lab::Lab;
use tests::lab::cluster::Guest;

const BOOT: Duration = Duration::from_secs(120);

#[test]
fn ten_moves_there_and_back_lose_nothing() -> anyhow::Result<()> {
    let lab = Lab::cluster(3)?;
    let web = Guest::new("web", 100);
    lab.create_guest(1, &web, Some(1))?;
    let first = lab.await_guest(3, &web, BOOT)?;
    let talk = lab.talk(3, &web)?;

    for round in 1..=10 {
        for target in [2, 1] {
            let figures = lab.migrate(3, "web", target)?;
            println!("round {round}, to node{target}: {figures:?}");
            assert_eq!(lab.owner(3, "web")?, target);
            assert!(figures.bytes > 0 && figures.rounds >= 1, "{figures:?}");
        }
    }

    let last = lab.wait_single_copy(3, &web)?;
    assert_eq!(last.boot_id, first.boot_id, "the guest was restarted");
    assert_eq!(last.memory_errors, 0);
    assert_eq!(last.disk_error, "");
    assert!(last.last_record > first.last_record);
    let report = talk.finish()?;
    println!("the client: {report:?}");
    assert_eq!((report.connections, report.wrong_answers), (1, 0));

    let records = lab.stop_and_check(3, &web)?;
    let boots = records.last().map(|record| record.boots_before);
    assert_eq!(boots, Some(0), "more than one boot wrote");
    assert!(u64::try_from(records.len())? >= last.last_record);
    lab.down()
}
