//! The cluster's CA: who can sign with its key.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;

use cluster::{MembershipError, Txn};
use proto::NodeId;

use crate::common::{Lab, Outcome, TestNode};
use crate::joining::papers_from;

/// The key that opens the CA's, on a member's disk.
fn sealing_key(node: &TestNode) -> std::path::PathBuf {
    node.config.data_dir.join("sealing.key")
}

fn lead(lab: &Lab, place: usize) -> Outcome {
    let to = lab.nodes[place].cluster()?.node_id();
    lab.nodes[0].run(move |c| async move { c.transfer_leader(Some(to)).await })??;
    lab.wait("it leads", |lab| Ok(lab.leader()? == place))
}

#[test]
fn a_node_that_joined_signs_once_it_leads() -> Outcome {
    let mut lab = Lab::new(3)?;
    let key = fs::read(sealing_key(&lab.nodes[0]))?;
    for node in &lab.nodes {
        assert!(fs::read(sealing_key(node))? == key, "{} has another key", node.name);
        let mode = fs::metadata(sealing_key(node))?.permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }
    lead(&lab, 1)?;
    // The one that made the CA is gone.
    lab.nodes[0].kill();
    assert_eq!(lab.leader()?, 1);
    papers_from(&lab, 1, "ann")?;
    let before = lab.nodes[2].cluster()?.certificate().serial;
    let renewed = lab.nodes[2].run(|c| async move { c.renew_certificate().await })??;
    assert_ne!(renewed.serial, before);
    let token = lab.token(1)?;
    let mut fourth = TestNode::new(lab.folder(), "n4")?;
    fourth.join(&token)?;
    assert!(fs::read(sealing_key(&fourth))? == key);
    Ok(())
}

#[test]
fn a_node_without_its_sealing_key_works_and_says_why_it_does_not_sign() -> Outcome {
    let mut lab = Lab::new(2)?;
    let (here, there) = (sealing_key(&lab.nodes[1]), sealing_key(&lab.nodes[0]));
    let good = fs::read_to_string(&here)?;
    let wrong = format!("{}=\n", "A".repeat(43));
    let cases: [(&str, Option<&str>, u32); 4] = [
        ("cannot be decrypted", Some(&wrong), 0o600),
        ("is damaged", Some("not a key"), 0o600),
        ("may be read by others", Some(&good), 0o644),
        ("cannot be read", None, 0o600),
    ];
    for (words, content, mode) in cases {
        lab.nodes[1].stop();
        lab.nodes[1].wait_closed();
        let _ = fs::remove_file(&here);
        if let Some(content) = content {
            fs::write(&here, content)?;
            fs::set_permissions(&here, Permissions::from_mode(mode))?;
        }
        lab.nodes[1].start()?;
        lab.wait("it serves", |lab| {
            lab.nodes[1].run(|c| async move { c.txn(Txn::new().put("x", "1")).await.is_ok() })
        })?;
        let refused = papers_from(&lab, 1, "ann").map(drop).err().ok_or("it signed")?;
        let refused = refused.downcast::<MembershipError>()?;
        assert!(matches!(*refused, MembershipError::CannotSign { .. }), "{refused:?}");
        let text = refused.to_string();
        assert!(text.contains(words) && text.contains("node `n2`"), "{text}");
        assert!(text.contains("join again"), "what helps: {text}");
        papers_from(&lab, 0, "ann")?;
    }
    // Who asks it first to be let in goes on to the next one, with the same token.
    let token = lab.token(1)?;
    let mut third = TestNode::new(lab.folder(), "n3")?;
    third.join(&token)?;
    assert!(fs::read_to_string(sealing_key(&third))? == good);
    // As the leader it says so to who asks for the next certificate; that one goes on as it is.
    lead(&lab, 1)?;
    let before = lab.nodes[0].cluster()?.certificate().serial;
    let refused = lab.nodes[0].run(|c| async move { c.renew_certificate().await })?;
    let text = refused.map(drop).err().ok_or("it signed")?.to_string();
    assert!(text.contains("node `n2` cannot sign"), "{text}");
    assert_eq!(lab.nodes[0].cluster()?.certificate().serial, before);
    // With another member's copy it signs again, at once.
    fs::copy(&there, &here)?;
    fs::set_permissions(&here, Permissions::from_mode(0o600))?;
    lab.nodes[0].run(|c| async move { c.renew_certificate().await })??;
    papers_from(&lab, 1, "ann")?;
    assert_eq!(lab.nodes[1].cluster()?.node_id(), NodeId(2));
    Ok(())
}
