//! What a member needs of the machine it runs on: connections, durable writes, free space, and
//! whether the machine was off in between. [`ThisHost`] is the machine itself; tests bring machines
//! whose network, disk and power fail when they are told to.

use std::fmt::Debug;
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};

use crate::storage::{Flusher, boot_id, free_bytes};

/// A stream of bytes to another process.
pub trait Io: AsyncRead + AsyncWrite + Debug + Send + Unpin + 'static {}
impl<T: AsyncRead + AsyncWrite + Debug + Send + Unpin + 'static> Io for T {}

/// A connection that was dialled or accepted.
pub type Connection = Box<dyn Io>;

/// Makes all earlier writes durable; blocks.
pub type SyncNow = Arc<dyn Fn() -> io::Result<()> + Send + Sync>;
/// Told once: the write is durable, or why it is not.
pub type Done = Box<dyn FnOnce(io::Result<()>) + Send>;

/// Makes writes durable for those who wait.
pub trait GroupCommit: Debug + Send + Sync {
    /// Calls `done` when everything written before this call is durable.
    fn submit(&self, done: Done);
    /// Makes everything written before this call durable; blocks.
    ///
    /// # Errors
    /// It is not durable.
    fn sync_now(&self) -> io::Result<()>;
}

/// The machine under a member.
#[async_trait]
pub trait Host: Debug + Send + Sync + 'static {
    /// Connects to a `host:port`.
    ///
    /// # Errors
    /// Nobody listens there, or cannot be reached.
    async fn dial(&self, address: &str) -> io::Result<Connection>;
    /// Starts making writes durable by `sync`. Dropping the result waits for what was submitted.
    ///
    /// # Errors
    /// The system refused.
    fn group_commit(&self, folder: &Path, sync: SyncNow) -> io::Result<Box<dyn GroupCommit>>;
    /// Runs work that blocks where it holds up nothing else.
    fn blocking(&self, work: Box<dyn FnOnce() + Send>);
    /// Free bytes for us on a folder's file system; None where the system does not say.
    fn free_bytes(&self, folder: &Path) -> Option<u64>;
    /// Changes with each boot of the machine; empty where the system does not say.
    fn boot_id(&self) -> String;
}

/// The answer of work that blocks.
///
/// # Errors
/// The work panicked, or the runtime ends.
pub(crate) async fn blocking<T: Send + 'static>(
    host: &dyn Host,
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<T> {
    let (answer, answered) = tokio::sync::oneshot::channel();
    host.blocking(Box::new(move || {
        let _ = answer.send(work());
    }));
    answered.await.map_err(|_| io::Error::other("the work was not finished"))
}

/// Where connections come in.
#[async_trait]
pub trait Listen: Send + 'static {
    /// The next one, and where it is from.
    ///
    /// # Errors
    /// None can be taken now; later perhaps.
    async fn accept(&mut self) -> io::Result<(Connection, SocketAddr)>;
}

/// The machine that this process runs on.
#[derive(Debug, Clone, Copy, Default)]
pub struct ThisHost;

#[async_trait]
impl Host for ThisHost {
    async fn dial(&self, address: &str) -> io::Result<Connection> {
        let tcp = TcpStream::connect(address).await?;
        tcp.set_nodelay(true)?;
        Ok(Box::new(tcp))
    }
    fn group_commit(&self, _folder: &Path, sync: SyncNow) -> io::Result<Box<dyn GroupCommit>> {
        Ok(Box::new(Flusher::start(sync)?))
    }
    fn blocking(&self, work: Box<dyn FnOnce() + Send>) {
        drop(tokio::task::spawn_blocking(work));
    }
    fn free_bytes(&self, folder: &Path) -> Option<u64> {
        free_bytes(folder)
    }
    fn boot_id(&self) -> String {
        boot_id()
    }
}

#[async_trait]
impl Listen for TcpListener {
    async fn accept(&mut self) -> io::Result<(Connection, SocketAddr)> {
        let (tcp, remote) = TcpListener::accept(self).await?;
        tcp.set_nodelay(true)?;
        Ok((Box::new(tcp), remote))
    }
}
