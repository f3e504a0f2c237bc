//! A backup: the latest values of one view of the database, in the format of [`proto::backup`].
//!
//! A thread reads the view and hands out pieces through a channel that holds a few; so neither the
//! state nor the file is ever in memory, and writes go on meanwhile. The view keeps RocksDB from
//! forgetting what it shows, and the database from being closed: a reader that takes nothing for
//! [`STALLED`] is given up, and so is every one when the node ends.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::stream::{BoxStream, StreamExt};
use proto::backup::{Header, Writer, is_kept};
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;
use tokio_stream::wrappers::ReceiverStream;

use crate::identity::NodeIdentity;
use crate::machine::{Read, Record, Table, decode, revision, used_bytes};
use crate::node::{Node, unix_now_ms};
use crate::{Consistency, StoreError};

/// Backups that one node sends at the same time.
pub(crate) const AT_ONCE: usize = 2;
/// Pieces (of 256 KiB, about) that wait to be sent.
const WAITING: usize = 4;
/// A reader that takes nothing for so long is given up.
const STALLED: Duration = Duration::from_secs(60);
/// Between two looks whether the node ends.
const LOOK: Duration = Duration::from_millis(10);

type Piece = Result<Vec<u8>, StoreError>;

/// The pieces of a backup.
pub(crate) async fn backup(
    node: &Arc<Node>,
    consistency: Consistency,
) -> Result<BoxStream<'static, Piece>, StoreError> {
    let Ok(slot) = node.backup_slots().clone().try_acquire_owned() else {
        let why = format!("it sends {AT_ONCE} backups already; wait for one, or ask another node");
        return Err(StoreError::Busy(why));
    };
    node.ready(consistency).await?;
    let (pieces, waiting) = mpsc::channel(WAITING);
    let node = node.clone();
    tokio::task::spawn_blocking(move || {
        let _slot = slot;
        let sending = Sending { node: &node, pieces: &pieces };
        let sent = node.db().view(|view| {
            let header = header(node.identity(), node.label().borrow().clone(), view)?;
            write(view.all_rows(Table::Data, b"")?, &header, |piece| sending.send(Ok(piece)))
        });
        if let Err(error) = sent {
            tracing::warn!(%error, "a backup was not sent to its end");
            // Whoever is gone hears nothing; whoever is slow finds the end without its last part.
            let _ = sending.send(Err(StoreError::Failed { why: error.to_string() }));
        }
    });
    Ok(ReceiverStream::new(waiting).boxed())
}

struct Sending<'a> {
    node: &'a Node,
    pieces: &'a mpsc::Sender<Piece>,
}

impl Sending<'_> {
    /// Waits for room, but not for ever.
    fn send(&self, piece: Piece) -> io::Result<()> {
        let begin = Instant::now();
        loop {
            if self.node.alive().is_err() {
                return Err(io::Error::other("the node is ending"));
            }
            // Without the runtime: its timers stand still while its threads wait for the database
            // that is read here.
            match self.pieces.try_reserve() {
                Ok(room) => {
                    room.send(piece);
                    return Ok(());
                }
                Err(TrySendError::Closed(())) => {
                    return Err(io::Error::other("the other side hung up"));
                }
                Err(TrySendError::Full(())) if begin.elapsed() >= STALLED => {
                    return Err(io::Error::other("the other side takes nothing"));
                }
                Err(TrySendError::Full(())) => std::thread::sleep(LOOK),
            }
        }
    }
}

/// What a backup of a state says of itself.
pub(crate) fn header(
    of: &NodeIdentity,
    node_name: String,
    state: &impl Read,
) -> io::Result<Header> {
    Ok(Header {
        cluster_name: of.cluster_name.clone(),
        cluster_id: of.cluster_id.clone(),
        revision: revision(state)?,
        at_unix_ms: unix_now_ms(),
        node: node_name,
        agent_version: env!("CARGO_PKG_VERSION").to_owned(),
        about_bytes: used_bytes(state)?,
    })
}

/// Writes all that belongs into a backup, of the rows of [`Table::Data`].
pub(crate) fn write<V: AsRef<[u8]>>(
    rows: impl Iterator<Item = io::Result<(Vec<u8>, V)>>,
    header: &Header,
    mut piece: impl FnMut(Vec<u8>) -> io::Result<()>,
) -> io::Result<()> {
    let (mut writer, begin) = Writer::begin(header).map_err(io::Error::other)?;
    piece(begin)?;
    for row in rows {
        let (key, value) = row?;
        let key = String::from_utf8(key).map_err(io::Error::other)?;
        if !is_kept(&key) {
            continue;
        }
        let record: Record = decode(value.as_ref())?;
        if let Some(ready) = writer.row(&key, &record.value).map_err(io::Error::other)? {
            piece(ready)?;
        }
    }
    piece(writer.finish())
}
