//! What the load needs of a store, whoever made it.

use std::time::Duration;

use futures::future::BoxFuture;
use futures::stream::BoxStream;

use crate::process::Process;

/// A connection of one client to one member.
pub(crate) trait Connection: Clone + Send + 'static {
    /// Sets a key.
    fn put(&mut self, key: &str, value: Vec<u8>) -> BoxFuture<'_, anyhow::Result<()>>;
    /// Reads a key, linearizably.
    fn get(&mut self, key: &str) -> BoxFuture<'_, anyhow::Result<()>>;
    /// The values put under a prefix from now on.
    fn watch(
        &mut self,
        prefix: &str,
    ) -> BoxFuture<'_, anyhow::Result<BoxStream<'static, anyhow::Result<Vec<u8>>>>>;
}

/// Three members.
pub(crate) trait Members {
    type Connection: Connection;
    /// A new connection to one of them.
    fn connect(&self, member: usize) -> Self::Connection;
    /// Which of them leads.
    fn leader(&self) -> BoxFuture<'_, anyhow::Result<usize>>;
    /// Their processes.
    fn processes(&self) -> &[Process];
    /// Ends one of them in good order and starts it again, until it answers a linearizable read.
    fn restart(&mut self, member: usize) -> BoxFuture<'_, anyhow::Result<Duration>>;
}
