//! Bridges and taps, in a network namespace of the test's own.

use std::fs;
use std::io::{Read, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use crate::common::{LIMIT, Node, launch, name};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use node_agent::network::{NetworkError, Tap, VNET_HEADER_BYTES, ensure_bridge, rarp_frame};
use node_agent::supervisor::{Nic, Stop};

/// Runs a test on a thread with its own network and its own view of /sys, which shows it.
fn in_own_network<F: Future<Output = ()>>(test: impl FnOnce() -> F + Send + 'static) {
    if !nix::unistd::geteuid().is_root() {
        crate::skip::this_test("needs root to make a network namespace");
        return;
    }
    let thread = std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).unwrap();
        let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
        mount(None::<&str>, "/", None::<&str>, private, None::<&str>).unwrap();
        mount(Some("sysfs"), "/sys", Some("sysfs"), MsFlags::empty(), None::<&str>).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(test());
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

fn attribute(interface: &str, attribute: &str) -> String {
    let path = Path::new("/sys/class/net").join(interface).join(attribute);
    fs::read_to_string(path).unwrap().trim().to_owned()
}

/// The next frame of a kind that arrives at a tap.
fn receive(tap: &Tap, ether_type: [u8; 2]) -> Vec<u8> {
    let header = usize::try_from(VNET_HEADER_BYTES).unwrap();
    let begin = Instant::now();
    let mut packet = [0; 2048];
    loop {
        assert!(begin.elapsed() < LIMIT, "no such frame came");
        match (&tap.file).read(&mut packet) {
            Ok(length)
                if length >= header + 14 && packet[header + 12..header + 14] == ether_type =>
            {
                return packet[header..length].to_vec();
            }
            Ok(_) => {}
            Err(_) => std::thread::sleep(Duration::from_millis(5)),
        }
    }
}

#[test]
fn a_bridge_is_made_once_and_others_are_left_alone() {
    in_own_network(|| async {
        ensure_bridge("hfbr0", "").await.unwrap();
        let index = attribute("hfbr0", "ifindex");
        ensure_bridge("hfbr0", "").await.unwrap();
        assert_eq!(attribute("hfbr0", "ifindex"), index);
        let flags = attribute("hfbr0", "flags");
        let flags = u32::from_str_radix(flags.trim_start_matches("0x"), 16).unwrap();
        assert_eq!(flags & 1, 1, "not up");
        let refused = ensure_bridge("lo", "").await.unwrap_err();
        assert!(matches!(refused, NetworkError::NotABridge(_)), "{refused}");
        let refused = ensure_bridge("hfbr0", "eth99").await.unwrap_err();
        assert!(matches!(refused, NetworkError::NoUplink(_)), "{refused}");
        let refused = ensure_bridge("a name with blanks", "").await.unwrap_err();
        assert!(matches!(refused, NetworkError::BadName(_)), "{refused}");
        assert!(Tap::open("none").is_err());
    });
}

#[test]
fn taps_are_plugged_in_and_vanish_with_their_owner() {
    in_own_network(|| async {
        ensure_bridge("hfbr0", "").await.unwrap();
        let (first, second) = (Tap::open("hfbr0").unwrap(), Tap::open("hfbr0").unwrap());
        assert_ne!(first.name, second.name);
        assert_eq!(attribute(&first.name, "mtu"), attribute("hfbr0", "mtu"));
        assert!(Path::new("/sys/class/net/hfbr0/brif").join(&first.name).exists());
        let frame = rarp_frame([0x52, 0x54, 0, 1, 2, 3]);
        let mut packet = vec![0; usize::try_from(VNET_HEADER_BYTES).unwrap()];
        packet.extend(frame);
        (&first.file).write_all(&packet).unwrap();
        assert_eq!(receive(&second, [0x80, 0x35]), frame);
        let name = first.name.clone();
        drop(first);
        assert!(!Path::new("/sys/class/net").join(name).exists());
    });
}

#[test]
fn a_vm_is_plugged_in_while_it_runs() {
    if crate::common::lacks_kvm_or_root() {
        return;
    }
    in_own_network(|| async {
        let node = Node::new();
        let mut wanted = launch(node.folder.path(), "web");
        let mac = [0x52, 0x54, 0, 1, 2, 3];
        wanted.nics.push(Nic { bridge: "hfbr7".into(), uplink: String::new(), mac });
        node.supervisor.start(wanted).await.unwrap();
        let ports = || fs::read_dir("/sys/class/net/hfbr7/brif").unwrap().count();
        assert_eq!(ports(), 1);
        node.supervisor.stop(&name("web"), Stop::Kill).await.unwrap();
        assert_eq!(ports(), 0);
    });
}
