//! Connections within this process: an address leads to whoever serves it, at once and without loss.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use cluster::host::{Connection, GroupCommit, Host, Listen, SyncNow, ThisHost};
use tokio::io::DuplexStream;
use tokio::sync::mpsc;

/// What one end may send before the other has read, bytes.
const BUFFER: usize = 64 << 10;

type Serve = Arc<dyn Fn(DuplexStream) -> bool + Send + Sync>;

/// The network; clones share it. It is also what a voter dials by: the rest of its machine is this
/// one.
#[derive(Clone, Default)]
pub(crate) struct Net(Arc<Mutex<HashMap<String, Serve>>>);

impl fmt::Debug for Net {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Net")
    }
}

impl Net {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, Serve>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has what is dialled at an address served; `false`: nobody is there any more.
    pub(crate) fn serve(
        &self,
        address: &str,
        serve: impl Fn(DuplexStream) -> bool + Send + Sync + 'static,
    ) {
        self.lock().insert(address.to_owned(), Arc::new(serve));
    }

    pub(crate) fn listen(&self, address: &str) -> Listener {
        let (arrive, arrivals) = mpsc::unbounded_channel();
        self.serve(address, move |stream| arrive.send(stream).is_ok());
        Listener(arrivals)
    }

    pub(crate) fn dial(&self, address: &str) -> io::Result<DuplexStream> {
        let refused = || io::Error::from(io::ErrorKind::ConnectionRefused);
        let serve = self.lock().get(address).cloned().ok_or_else(refused)?;
        let (here, there) = tokio::io::duplex(BUFFER);
        if serve(there) { Ok(here) } else { Err(refused()) }
    }
}

#[async_trait]
impl Host for Net {
    async fn dial(&self, address: &str) -> io::Result<Connection> {
        Ok(Box::new(Self::dial(self, address)?))
    }
    fn group_commit(&self, folder: &Path, sync: SyncNow) -> io::Result<Box<dyn GroupCommit>> {
        ThisHost.group_commit(folder, sync)
    }
    fn blocking(&self, work: Box<dyn FnOnce() + Send>) {
        ThisHost.blocking(work);
    }
    fn free_bytes(&self, folder: &Path) -> Option<u64> {
        ThisHost.free_bytes(folder)
    }
    fn boot_id(&self) -> String {
        ThisHost.boot_id()
    }
}

/// Connections to one address.
#[derive(Debug)]
pub(crate) struct Listener(mpsc::UnboundedReceiver<DuplexStream>);

#[async_trait]
impl Listen for Listener {
    async fn accept(&mut self) -> io::Result<(Connection, SocketAddr)> {
        match self.0.recv().await {
            Some(stream) => Ok((Box::new(stream), SocketAddr::from((Ipv4Addr::LOCALHOST, 1)))),
            // Another one listens there now.
            None => std::future::pending().await,
        }
    }
}
