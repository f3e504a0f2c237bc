//! The plan, by itself.

use cluster::{FileChange, Txn};
use proto::record::{DiskClaim, Phase, Placement};
use proto::{NodeId, Revision, VmId, VmSpec, keys};
use tonic::Code;

use super::Refusal;
use super::plan::{Largest, NewVm, Plan, Present, plan};
use crate::store::{Versioned, json};

const STORAGE: &str = "[pools.shared]\nkind = \"shared-dir\"\npath = \"/mnt/vms\"\n\
                       [pools.local]\nkind = \"local-dir\"\npath = \"/var/vms\"\n";
const NETWORKS: &str = "[networks.lan]\nbridge = \"br0\"\n";

fn web(disk: &str) -> String {
    format!(
        "name = \"web\"\ncpus = 2\nmemory = \"64MiB\"\n[boot]\nkernel = \"shared/vmlinuz\"\n\
         [[disks]]\nimage = \"{disk}\"\nsize = \"1MiB\"\n[[nics]]\nnetwork = \"lan\"\n"
    )
}

fn id() -> VmId {
    VmId(uuid::Uuid::from_u128(7))
}

fn judge(present: &Present, changes: &[FileChange]) -> Result<Plan, Vec<Refusal>> {
    plan(present, changes, &mut |_| {
        let id = VmId(uuid::Uuid::from_u128(8));
        Ok(NewVm { id, owner: NodeId(1), event: "created".to_owned() })
    })
}

fn refusal(present: &Present, change: FileChange) -> Refusal {
    let mut refusals = judge(present, &[change]).expect_err("taken");
    refusals.remove(0)
}

/// Pools and networks, and no VM.
fn empty() -> Present {
    let mut present = Present::default();
    for (path, text) in [(keys::STORAGE_DOCUMENT, STORAGE), (keys::NETWORKS_DOCUMENT, NETWORKS)] {
        let file = Versioned { value: text.as_bytes().to_vec(), revision: Revision(3) };
        present.files.insert(path.to_owned(), file);
    }
    present
}

/// With the VM `web` in a phase.
fn with_web(phase: Phase) -> (Present, Placement) {
    let mut present = empty();
    let text = web("shared/web.raw");
    let spec = VmSpec::parse(&text).expect("it holds");
    let placement = Placement {
        vm_id: id(),
        owner: NodeId(1),
        generation: proto::Generation(4),
        phase,
        requested: proto::record::Requested::Stopped,
        ha: false,
        cpus: 2,
        memory_bytes: 64 << 20,
        message: None,
        events: Vec::new(),
        start_failures: 0,
        tried: Vec::new(),
        home: None,
        lock: None,
        retry_at_unix_ms: None,
    };
    let file = Versioned { value: text.into_bytes(), revision: Revision(5) };
    present.files.insert("vms/web.toml".to_owned(), file);
    let versioned = Versioned { value: placement.clone(), revision: Revision(6) };
    present.placements.insert(spec.name.clone(), versioned);
    let claim = DiskClaim { vm_id: id(), vm: spec.name.clone() };
    let claim = Versioned { value: claim, revision: Revision(5) };
    present.claims.insert("shared/web.raw".to_owned(), claim);
    (present, placement)
}

#[test]
fn a_new_document_makes_a_vm_in_one_transaction() {
    let text = web("shared/web.raw");
    let made = judge(&empty(), &[FileChange::write("vms/web.toml", text)]).unwrap();
    for key in ["vms/web.toml", "status/vms/web", "status/disks/shared/web.raw"] {
        assert!(made.txn.names(key), "{key}");
    }
    // What it was judged by is compared.
    assert!(made.txn.names(keys::STORAGE_DOCUMENT) && made.txn.names(keys::NETWORKS_DOCUMENT));
    assert_eq!(made.look_at[0].2, NodeId(1));
}

#[test]
fn a_vm_at_rest_is_changed_and_its_claims_move() {
    let (present, placement) = with_web(Phase::Stopped);
    let text = web("shared/other.raw").replace("64MiB", "128MiB");
    let made = judge(&present, &[FileChange::write("vms/web.toml", text)]).unwrap();
    let changed = Placement { memory_bytes: 128 << 20, ..placement };
    let claim = DiskClaim { vm_id: id(), vm: "web".parse().unwrap() };
    let expected = Txn::new()
        .if_revision("vms/web.toml", Revision(5))
        .put("vms/web.toml", web("shared/other.raw").replace("64MiB", "128MiB"))
        .if_revision("status/disks/shared/web.raw", Revision(5))
        .delete("status/disks/shared/web.raw")
        .if_absent("status/disks/shared/other.raw")
        .put("status/disks/shared/other.raw", json(&claim))
        .if_revision("status/vms/web", Revision(6))
        .put("status/vms/web", json(&changed))
        .if_revision(keys::STORAGE_DOCUMENT, Revision(3))
        .if_revision(keys::NETWORKS_DOCUMENT, Revision(3));
    assert_eq!(made.txn, expected);
}

#[test]
fn no_vm_is_made_or_grows_larger_than_any_node() {
    let largest = Largest { node: "n2".parse().unwrap(), memory_bytes: 200 << 20 };
    let sized = |mut present: Present| {
        present.largest = Some(largest.clone());
        present
    };
    let of = |memory: &str| {
        let text = web("shared/web.raw").replace("64MiB", memory);
        FileChange::write("vms/web.toml", text)
    };
    let (made, changed) = (sized(empty()), sized(with_web(Phase::Stopped).0));
    for present in [&made, &changed] {
        assert!(judge(present, &[of("128MiB")]).is_ok());
        let refused = refusal(present, of("4GiB"));
        assert_eq!(refused.code, Code::InvalidArgument);
        for words in ["4GiB", "more than any node has", "n2", "200MiB"] {
            assert!(refused.fault.reason.contains(words), "{refused:?}");
        }
    }
    // It is too large since a node was lost: the rest of it can be changed still.
    let small = Present {
        largest: Some(Largest { memory_bytes: 64 << 20, ..largest.clone() }),
        ..with_web(Phase::Stopped).0
    };
    let change = FileChange::write("vms/web.toml", web("shared/other.raw"));
    assert!(judge(&small, &[change]).is_ok());
}

#[test]
fn what_runs_keeps_its_document_but_for_its_comments() {
    for phase in [
        Phase::Starting,
        Phase::Started,
        Phase::Stopping,
        Phase::Migrating { target: NodeId(2) },
        Phase::Recovering,
    ] {
        let (present, _) = with_web(phase);
        let text = web("shared/web.raw");
        let bigger = text.replace("cpus = 2", "cpus = 4");
        let refused = refusal(&present, FileChange::write("vms/web.toml", bigger));
        assert_eq!(refused.code, Code::FailedPrecondition, "{phase:?}");
        assert!(refused.fault.reason.contains("vm shutdown web"), "{refused:?}");
        let refused = refusal(&present, FileChange::remove("vms/web.toml"));
        assert_eq!(refused.code, Code::FailedPrecondition, "{phase:?}");
        let commented = format!("# the shop\n{text}");
        let made = judge(&present, &[FileChange::write("vms/web.toml", commented.clone())]);
        let expected =
            Txn::new().if_revision("vms/web.toml", Revision(5)).put("vms/web.toml", commented);
        assert_eq!(made.unwrap().txn, expected);
    }
}

#[test]
fn a_removed_document_deletes_the_vm() {
    let (present, _) = with_web(Phase::Error);
    let made = judge(&present, &[FileChange::remove("vms/web.toml")]).unwrap();
    let expected = Txn::new()
        .if_revision("vms/web.toml", Revision(5))
        .delete("vms/web.toml")
        .if_revision("status/disks/shared/web.raw", Revision(5))
        .delete("status/disks/shared/web.raw")
        .if_revision("status/vms/web", Revision(6))
        .delete("status/vms/web");
    assert_eq!(made.txn, expected);
}

#[test]
fn documents_that_do_not_fit_the_others_are_refused() {
    let (present, _) = with_web(Phase::Started);
    let thief = web("shared/web.raw").replace("\"web\"", "\"thief\"");
    let cases = [
        ("vms/thief.toml", thief.clone(), Code::FailedPrecondition, "belongs to VM `web`"),
        ("vms/other.toml", thief.clone(), Code::InvalidArgument, "the file is other.toml"),
        (
            "vms/thief.toml",
            thief.replace("shared/web.raw", "gone/x"),
            Code::NotFound,
            "pool `gone`",
        ),
        ("vms/thief.toml", thief.replace("\"lan\"", "\"wan\""), Code::NotFound, "network `wan`"),
        (
            "vms/thief.toml",
            format!("{}[ha]\nenabled = true\n", thief.replace("shared/web.raw", "local/x")),
            Code::FailedPrecondition,
            "highly available",
        ),
        (
            keys::STORAGE_DOCUMENT,
            STORAGE.replace("/mnt", "/srv"),
            Code::FailedPrecondition,
            "VM `web`",
        ),
        (keys::STORAGE_DOCUMENT, String::new(), Code::FailedPrecondition, "pool `shared` is used"),
        (keys::NETWORKS_DOCUMENT, String::new(), Code::FailedPrecondition, "network `lan` is used"),
        (keys::NETWORKS_DOCUMENT, "x = ".to_owned(), Code::InvalidArgument, ""),
        ("ha/rules.toml", String::new(), Code::PermissionDenied, "not supported"),
        ("cluster.toml", "[migrtion]\n".to_owned(), Code::InvalidArgument, "did you mean"),
        ("nodes/n1.toml", "notes = 1\n".to_owned(), Code::InvalidArgument, "invalid type"),
        ("access/eve.toml", "role = \"root\"\n".to_owned(), Code::InvalidArgument, "viewer"),
        (
            "access/eve.toml",
            "role = \"viewer\"\n".to_owned(),
            Code::FailedPrecondition,
            "name no administrator",
        ),
    ];
    for (path, text, code, words) in cases {
        let refused = refusal(&present, FileChange::write(path, text.clone()));
        assert_eq!(refused.code, code, "{path}: {text}: {refused:?}");
        assert!(refused.fault.reason.contains(words), "{path}: {text}: {refused:?}");
    }
    // Without any VM the same is fine; a pool that is new is to be looked at.
    assert!(judge(&empty(), &[FileChange::write(keys::NETWORKS_DOCUMENT, "")]).is_ok());
    let moved = FileChange::write(keys::STORAGE_DOCUMENT, STORAGE.replace("/mnt", "/srv"));
    assert_eq!(judge(&empty(), &[moved]).unwrap().new_pools.len(), 1);
}

#[test]
fn several_documents_are_judged_together() {
    let changes = [
        FileChange::write(
            keys::NETWORKS_DOCUMENT,
            format!("{NETWORKS}[networks.wan]\nbridge = \"br1\"\n"),
        ),
        FileChange::write("vms/web.toml", web("shared/web.raw").replace("\"lan\"", "\"wan\"")),
    ];
    assert!(judge(&empty(), &changes).is_ok());
    let same = [
        FileChange::write("vms/web.toml", web("shared/web.raw")),
        FileChange::write("vms/b.toml", web("shared/web.raw").replace("\"web\"", "\"b\"")),
    ];
    let refused = judge(&empty(), &same).unwrap_err();
    assert!(refused[0].fault.reason.contains("shared/web.raw"), "{refused:?}");
    let twice = [FileChange::write("a", "1"), FileChange::write("a", "2")];
    assert_eq!(judge(&empty(), &twice).unwrap_err()[0].code, Code::InvalidArgument);
}

#[test]
fn files_are_files_and_folders_folders() {
    let mut present = empty();
    let file = Versioned { value: Vec::new(), revision: Revision(9) };
    present.files.insert("notes".to_owned(), file);
    present.folders.insert("docs".to_owned());
    for change in [
        FileChange::write("notes/a", "x"),
        FileChange::write("docs", "x"),
        FileChange::write("folder/", "x"),
        FileChange::write("a", vec![0; 2 << 20]),
        FileChange::write("vms/web.toml", vec![0xff, 0xfe]),
        FileChange::write("../a", "x"),
        FileChange::write("status/vms/web", "x"),
        FileChange::write("x".repeat(300), "x"),
    ] {
        let refused = refusal(&present, change);
        assert!(!refused.fault.reason.is_empty());
    }
    for change in [
        FileChange::write("docs/a", "x"),
        FileChange::write("folder/", ""),
        FileChange::write("bytes", vec![0xff, 0xfe]),
        FileChange::write("vms/.web.toml.swp", vec![0xff]),
        FileChange::remove("notes"),
    ] {
        assert!(judge(&present, std::slice::from_ref(&change)).is_ok(), "{change:?}");
    }
    let many: Vec<FileChange> =
        (0..10_000).map(|n| FileChange::write(format!("f{n}"), "")).collect();
    assert_eq!(judge(&present, &many).unwrap_err()[0].code, Code::ResourceExhausted);
}

#[test]
fn what_was_expected_is_compared() {
    let (present, _) = with_web(Phase::Stopped);
    let text = web("shared/web.raw");
    for (expected, fine) in [(5, true), (4, false), (0, false)] {
        let change = FileChange::write("vms/web.toml", format!("# x\n{text}"));
        let judged = judge(&present, &[change.if_revision(Revision(expected))]);
        assert_eq!(judged.is_ok(), fine, "{expected}");
        if let Err(refusals) = judged {
            assert_eq!(refusals[0].present, Some(Revision(5)));
        }
    }
    let same = judge(&present, &[FileChange::write("vms/web.toml", text)]).unwrap();
    assert!(same.unchanged);
}

/// A change of one person's role; none: the document is removed.
fn role(name: &str, role: &str) -> FileChange {
    let path = format!("access/{name}.toml");
    match role {
        "" => FileChange::remove(path),
        role => FileChange::write(path, format!("role = \"{role}\"\n")),
    }
}

#[test]
fn there_is_always_one_administrator() {
    let with = |roles: &[(&str, &str)]| {
        let mut present = empty();
        for (name, word) in roles {
            let value = format!("role = \"{word}\"\n").into_bytes();
            let file = Versioned { value, revision: Revision(5) };
            present.files.insert(format!("access/{name}.toml"), file);
        }
        present.administration = Revision(7);
        present
    };
    let (ann, both) = (with(&[("ann", "admin")]), with(&[("ann", "admin"), ("bob", "viewer")]));
    for (present, changes, words) in [
        (&both, vec![role("ann", "")], "no administrator would be left"),
        (&both, vec![role("ann", "operator")], "no administrator would be left"),
        (&ann, vec![role("ann", "viewer")], "no administrator would be left"),
        (&ann, vec![role("ann", ""), role("bob", "viewer")], "no administrator would be left"),
        (&both, vec![role("ann", ""), role("bob", "")], "remove the others first"),
        (&with(&[]), vec![role("ann", "viewer")], "name no administrator"),
    ] {
        let refused = judge(present, &changes).unwrap_err();
        assert_eq!(refused[0].code, Code::FailedPrecondition, "{refused:?}");
        assert!(refused[0].fault.reason.contains(words), "{changes:?}: {refused:?}");
    }
    for (present, changes) in [
        (&with(&[]), vec![role("ann", "admin")]),
        (&with(&[]), vec![role("bob", "viewer"), role("ann", "admin")]),
        (&both, vec![role("ann", ""), role("bob", "admin")]),
        (&both, vec![role("bob", "")]),
        // Back to what there was before any document, on purpose.
        (&ann, vec![role("ann", "")]),
    ] {
        let txn = judge(present, &changes).unwrap().txn;
        assert!(txn.names(keys::ADMINISTRATION), "{changes:?}");
    }
    // Of two administrators one has a certificate: without her nobody comes in.
    let mut chiefs = with(&[("ann", "admin"), ("bob", "admin"), ("eve", "viewer")]);
    chiefs.certified = ["ann".to_owned(), "eve".to_owned()].into();
    for changes in [vec![role("ann", "viewer")], vec![role("ann", ""), role("eve", "operator")]] {
        let refused = judge(&chiefs, &changes).unwrap_err();
        assert!(refused[0].fault.reason.contains("create-admin"), "{changes:?}: {refused:?}");
    }
    judge(&chiefs, &[role("bob", "viewer")]).unwrap();
    judge(&chiefs, &[role("ann", ""), role("eve", "admin")]).unwrap();
    // Where none has one yet, as before the first certificate is made, roles alone count.
    chiefs.certified.clear();
    judge(&chiefs, &[role("ann", "viewer")]).unwrap();
    // The record is compared as it was read: of two changes at once one is judged again.
    let made = judge(&ann, &[role("bob", "viewer")]).unwrap().txn;
    let expected = Txn::new()
        .if_revision("access/bob.toml", Revision(0))
        .put("access/bob.toml", "role = \"viewer\"\n")
        .if_revision(keys::ADMINISTRATION, Revision(7))
        .put(keys::ADMINISTRATION, r#"{"administrators":["ann"]}"#);
    assert_eq!(made, expected);
    // A comment is no change of a role.
    let commented = FileChange::write("access/ann.toml", "# chief\nrole = \"admin\"\n");
    assert!(!judge(&ann, &[commented]).unwrap().txn.names(keys::ADMINISTRATION));
}
