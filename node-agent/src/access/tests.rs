//! The table, and what it comes to for everybody.

use std::collections::BTreeSet;
use std::sync::Arc;

use cluster::tls::PeerIdentity;
use proto::NodeId;
use proto::documents::{Role, RolesByName};
use proto::methods::{METHODS, PACKAGE};
use tonic::Code;

use super::table::{TABLE, rule};
use super::{Has, Needs, Refused, Roles, judge, may_cancel, may_issue, may_write, rules, to_write};
use crate::api::forward::Caller;

/// Services of the .proto files that the guard does not stand before, and why.
const ELSEWHERE: [&str; 2] = [
    "Enrolment", // a port of its own; a join token is asked for
    "VmProcess", // a VM process's own socket, for its agent
];

fn roles(documents: &[(&str, Option<Role>)]) -> Roles {
    let named = |(name, role): &(&str, Option<Role>)| (name.parse().expect("a name"), *role);
    Roles::Read(Arc::new(documents.iter().map(named).collect::<RolesByName>()))
}

fn given() -> Roles {
    roles(&[
        ("ann", Some(Role::Admin)),
        ("olga", Some(Role::Operator)),
        ("vera", Some(Role::Viewer)),
        ("rex", None),
    ])
}

fn client(name: &str) -> PeerIdentity {
    PeerIdentity::Client(name.to_owned())
}

/// The calls that somebody may make.
fn allowed(peer: &PeerIdentity, roles: &Roles) -> BTreeSet<String> {
    let allowed = rules().filter(|rule| judge(rule, peer, roles).is_ok());
    allowed.map(|rule| rule.call.clone()).collect()
}

#[test]
fn every_method_of_every_service_is_in_the_table_and_nothing_else() {
    let served = METHODS.iter().filter(|method| !ELSEWHERE.contains(&method.service));
    let served: BTreeSet<_> = served.map(|method| (method.service, method.name)).collect();
    let rows: Vec<_> = TABLE
        .iter()
        .flat_map(|(service, rows)| rows.iter().map(move |(name, ..)| (*service, *name)))
        .collect();
    let ruled: BTreeSet<_> = rows.iter().copied().collect();
    assert_eq!(ruled, served, "who may call a method is said in the table");
    assert_eq!(rows.len(), ruled.len(), "a row is there twice");
    assert!(served.len() > 50, "the methods were not found");
    for method in METHODS {
        let rule = rule(&format!("/{PACKAGE}.{}/{}", method.service, method.name));
        assert_eq!(rule.is_none(), ELSEWHERE.contains(&method.service), "{method:?}");
        assert!(rule.is_none_or(|rule| rule.streams == method.streams), "{method:?}");
    }
    for path in ["", "/", "/holdfast.v1.Vms/Explode", "/holdfast.v1.Vms/Start/", "/Vms/Start"] {
        assert!(rule(path).is_none(), "{path}");
    }
}

#[test]
fn each_role_may_do_what_it_may_and_no_more() {
    let roles = given();
    let of = |name: &str| allowed(&client(name), &roles);
    let (admin, operator, viewer) = (of("ann"), of("olga"), of("vera"));
    assert!(viewer.is_subset(&operator) && operator.is_subset(&admin));
    let more = |a: &BTreeSet<String>, b: &BTreeSet<String>| -> Vec<String> {
        a.difference(b).cloned().collect()
    };
    let sees = "Config.Get Config.History Config.Range Config.Watch Ha.Status \
                Membership.GetCaStatus Membership.IssueClient Membership.ListCertificates \
                Membership.Status Membership.WhoAmI Nodes.List \
                Nodes.Show Storage.ListImages Storage.ListNetworks Storage.ListPools Tasks.Follow \
                Tasks.Get Tasks.List Vms.List Vms.Log Vms.Show";
    assert_eq!(viewer.iter().cloned().collect::<Vec<_>>().join(" "), sees);
    let works = "Config.Commit Config.Txn Storage.DeleteImage Storage.ImportImage Tasks.Cancel \
                 Vms.Console Vms.Create Vms.Delete Vms.Migrate Vms.Pause Vms.Reset Vms.Resume \
                 Vms.Shutdown Vms.Start Vms.Stop";
    assert_eq!(more(&operator, &viewer).join(" "), works);
    let administers = "Membership.CreateToken Membership.RemoveNode \
                       Membership.RenewCertificates Membership.RevokeCertificates \
                       Membership.RotateCa Membership.TransferLeader Membership.Verify \
                       Nodes.Drain Nodes.Fence Nodes.Rename Nodes.Resume Storage.CreateNetwork Storage.CreatePool \
                       Storage.DeleteNetwork Storage.DeletePool";
    assert_eq!(more(&admin, &operator).join(" "), administers);
    // Without a document, with one that does not hold, and before anything is known.
    let asks = BTreeSet::from(["Membership.WhoAmI".to_owned()]);
    for nobody in ["eve", "rex", "", "Not A Name"] {
        assert_eq!(of(nobody), asks, "{nobody:?}");
    }
    assert_eq!(allowed(&client("ann"), &Roles::Unread), asks);
    // While there is no document everybody administers.
    assert_eq!(allowed(&client("eve"), &self::roles(&[])), admin);
    // One that does not hold is one all the same.
    assert_eq!(allowed(&client("eve"), &self::roles(&[("rex", None)])), asks);
}

#[test]
fn nodes_and_root_are_limited_by_no_document_and_secrets_are_for_root() {
    for roles in [given(), roles(&[]), Roles::Unread] {
        let node = allowed(&PeerIdentity::Node(NodeId(2)), &roles);
        let root = allowed(&PeerIdentity::LocalRoot, &roles);
        let only_root: Vec<_> = root.difference(&node).map(String::as_str).collect();
        let secret =
            ["Membership.Backup", "Membership.Init", "Membership.Join", "Membership.Restore"];
        assert_eq!(only_root, secret);
        let only_node: BTreeSet<_> = node.difference(&root).collect();
        assert_eq!(only_node.len(), 12, "{only_node:?}");
        assert!(
            only_node.iter().all(|call| call.starts_with("Peer.") || call.starts_with("Raft."))
        );
    }
}

#[test]
fn a_refusal_names_who_has_what_and_what_would_help() {
    let start = rule("/holdfast.v1.Vms/Start").unwrap();
    for (name, has) in [
        ("vera", "the role `viewer`"),
        ("eve", "none (there is no access/eve.toml)"),
        ("rex", "none (access/rex.toml does not hold)"),
    ] {
        let refused = judge(start, &client(name), &given()).unwrap_err();
        let status = refused.status(None);
        assert_eq!(status.code(), Code::PermissionDenied);
        let remedy = format!("`clusterctl config set access/{name} role=operator`");
        let who = format!("the certificate `{name}` has {has}");
        for words in ["Vms.Start needs the role `operator`", &who, &remedy] {
            assert!(status.message().contains(words), "{status}");
        }
    }
    let unread = judge(start, &client("ann"), &Roles::Unread).unwrap_err();
    assert_eq!(unread, Refused::Unread);
    assert_eq!(unread.status(None).code(), Code::Unavailable);
    assert_eq!(Refused::Unknown("x".into()).status(None).code(), Code::Unimplemented);
    assert_eq!(Refused::Nobody.status(None).code(), Code::Unauthenticated);
}

fn caller(role: Role) -> Caller {
    let mut caller = Caller::local("olga");
    caller.role = role;
    caller
}

#[test]
fn an_operator_writes_vms_and_plain_files_and_nothing_else() {
    for path in ["vms/web.toml", "vms/.web.toml.swp", "notes/a", "notes/", "README", "vms/"] {
        assert_eq!(to_write(path).ok(), Some(Role::Operator), "{path}");
        assert!(may_write(&caller(Role::Operator), [path]).is_ok(), "{path}");
    }
    for path in [
        "access/olga.toml",
        "access/README",
        "access/",
        "nodes/n1.toml",
        "nodes/x/y",
        "ha/README",
        "storage.toml",
        "networks.toml",
        "cluster.toml",
    ] {
        assert_eq!(to_write(path).ok(), Some(Role::Admin), "{path}");
        // One among several is enough.
        let refused = may_write(&caller(Role::Operator), ["notes/a", path]).unwrap_err();
        assert_eq!(refused.code(), Code::PermissionDenied, "{path}");
        assert!(refused.message().contains(&format!("writing `{path}` needs")), "{refused}");
        assert!(refused.message().contains("access/olga role=admin"), "{refused}");
    }
    for path in ["priv/ca", "status/vms/web", "status/administration", "ha/x.toml", "", "a//b"] {
        assert!(may_write(&caller(Role::Operator), [path]).is_err(), "{path:?}");
    }
    assert!(may_write(&caller(Role::Viewer), ["notes/a"]).is_err());
    assert!(may_cancel(&caller(Role::Operator), "vm.migrate").is_ok());
    assert!(may_cancel(&caller(Role::Operator), "node.drain").is_err());
    assert!(may_cancel(&caller(Role::Admin), "node.drain").is_ok());
}

#[test]
fn one_renews_ones_own_certificate_and_only_an_administrator_makes_others() {
    for role in [Role::Viewer, Role::Operator] {
        assert!(may_issue(&caller(role), "olga").is_ok());
        let refused = may_issue(&caller(role), "ann").unwrap_err();
        assert_eq!(refused.code(), Code::PermissionDenied);
        assert!(refused.message().contains("a certificate for `ann` needs the role `admin`"));
    }
    assert!(may_issue(&caller(Role::Admin), "ann").is_ok());
}

#[test]
fn what_a_call_needs_is_said_in_words() {
    for rule in rules() {
        assert!(!rule.needs.words().is_empty() && rule.call.contains('.'), "{rule:?}");
        let depends = [
            "Config.Commit",
            "Config.Txn",
            "Tasks.Cancel",
            "Membership.Backup",
            "Membership.IssueClient",
        ];
        assert_eq!(!rule.detail.is_empty(), depends.contains(&rule.call.as_str()), "{rule:?}");
    }
    assert_eq!(Needs::Role(Role::Viewer).words(), "viewer");
    assert_eq!((Has::Everything.role(), Has::Broken.role()), (Some(Role::Admin), None));
}
