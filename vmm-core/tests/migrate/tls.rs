//! Migration over loopback TLS: only the announced peer, in both directions.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use vmm_core::migrate::tls::{Fingerprint, Identity, TlsAcceptor, TlsConnector};
use vmm_core::migrate::{
    Migrated, MigrationVm, Ready, SourceError, SourceOptions, TargetError, TargetOptions, migrate,
    receive,
};

use super::fake::{FakeIncoming, FakeVm, contents, fill, memory};
use super::{Hooks, assert_runs, source_options, target_options};

const PAGES: u64 = 8192; // 32 MiB

struct Ends {
    source: Identity,
    target: Identity,
    listener: TcpListener,
    address: SocketAddr,
    connect_limit: Duration,
}

fn ends() -> Ends {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    Ends {
        source: Identity::generate().unwrap(),
        target: Identity::generate().unwrap(),
        listener,
        address,
        connect_limit: Duration::from_secs(3),
    }
}

type Both = (Result<Migrated, SourceError>, Result<Ready<FakeIncoming>, TargetError>);

fn run(ends: Ends, vm: &FakeVm, source_expects: Fingerprint, target_expects: Fingerprint) -> Both {
    let Ends { source, target, listener, address, connect_limit } = ends;
    // No test here is about speed, and a busy machine is no reason to fail.
    let stall_limit = Duration::from_secs(60);
    let limit = Duration::from_secs(30);
    let mut connector = TlsConnector::new(address, &source, source_expects, limit).unwrap();
    let mut acceptor = TlsAcceptor::new(listener, &target, target_expects).unwrap();
    let from =
        SourceOptions { stall_limit, forced_downtime_limit: stall_limit, ..source_options() };
    let to = TargetOptions { connect_limit, stall_limit, ..target_options() };
    thread::scope(|scope| {
        let receiver = scope.spawn(move || {
            let mut ready = receive(FakeIncoming::new(memory(PAGES)), &mut acceptor, &to)?;
            ready.announce_running();
            Ok(ready)
        });
        let migrated = migrate(vm, &mut connector, &from, &mut Hooks::committing());
        (migrated, receiver.join().unwrap())
    })
}

#[test]
fn a_running_guest_moves_over_tls_past_a_stranger() {
    let ends = ends();
    let address = ends.address;
    let expected = (ends.target.fingerprint(), ends.source.fingerprint());
    let vm = Arc::new(FakeVm::new(memory(PAGES)));
    fill(vm.memory(), PAGES);
    let guest = vm.run(PAGES, 16, Duration::from_micros(300));
    // Garbage arrives first; it is turned away and the wait goes on.
    let mut stranger = TcpStream::connect(address).unwrap();
    stranger.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    let (migrated, ready) = run(ends, &vm, expected.0, expected.1);
    drop(guest);
    let (migrated, ready) = (migrated.unwrap(), ready.unwrap());
    assert!(contents(&ready.vm.memory) == contents(vm.memory()), "memory differs");
    assert!(migrated.downtime.is_some());
    let mut answer = Vec::new();
    stranger.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let _ = stranger.read_to_end(&mut answer);
    assert!(answer.len() < 64, "a stranger gets an alert at most");
}

#[test]
fn silent_strangers_delay_nobody_however_many_they_are() {
    // One by one, strangers would take five seconds each.
    let ends = Ends { connect_limit: Duration::from_secs(60), ..ends() };
    let expected = (ends.target.fingerprint(), ends.source.fingerprint());
    let vm = FakeVm::new(memory(PAGES));
    fill(vm.memory(), PAGES);
    // More than are listened to at once, all there before the source comes.
    let strangers: Vec<TcpStream> = (0..80)
        .map(|_| TcpStream::connect_timeout(&ends.address, Duration::from_secs(5)).unwrap())
        .collect();
    let (migrated, ready) = run(ends, &vm, expected.0, expected.1);
    migrated.unwrap();
    ready.unwrap();
    drop(strangers);
}

#[test]
fn a_target_that_was_not_announced_is_refused() {
    let ends = ends();
    let source = ends.source.fingerprint();
    let vm = FakeVm::new(memory(PAGES));
    let stranger = Identity::generate().unwrap().fingerprint();
    let (migrated, ready) = run(ends, &vm, stranger, source);
    let error = migrated.unwrap_err();
    assert!(error.to_string().contains("not the expected one"), "{error}");
    assert!(ready.is_err());
    assert_runs(&vm, "wrong target");
}

#[test]
fn a_source_that_was_not_announced_is_refused() {
    let ends = ends();
    let target = ends.target.fingerprint();
    let vm = FakeVm::new(memory(PAGES));
    let stranger = Identity::generate().unwrap().fingerprint();
    let (migrated, ready) = run(ends, &vm, target, stranger);
    assert!(migrated.is_err());
    let error = ready.unwrap_err();
    assert!(
        error.to_string().contains("did not answer"),
        "the target waits on for the real one: {error}"
    );
    assert_runs(&vm, "wrong source");
}
