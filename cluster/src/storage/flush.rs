//! Group commit: writers put their batch into the write-ahead log and queue here; one thread takes
//! all that wait, does one fsync for them, and tells each.

use std::io;
use std::sync::mpsc;
use std::thread::JoinHandle;

use crate::host::{Done, GroupCommit, SyncNow};

struct Sync(SyncNow);

impl std::fmt::Debug for Sync {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Sync")
    }
}

/// The queue and its thread. Dropping it waits for what is queued.
#[derive(Debug)]
pub(crate) struct Flusher {
    sync: Sync,
    queue: Option<mpsc::Sender<Done>>,
    thread: Option<JoinHandle<()>>,
}

impl Flusher {
    /// Starts the thread; `sync` makes all earlier writes durable.
    pub(crate) fn start(sync: SyncNow) -> io::Result<Self> {
        let of_thread = sync.clone();
        let (queue, waiting) = mpsc::channel::<Done>();
        let thread = std::thread::Builder::new().name("log-fsync".to_owned()).spawn(move || {
            while let Ok(first) = waiting.recv() {
                // Taken before the fsync begins: whoever queues later waits for the next one.
                let batch: Vec<Done> = std::iter::once(first).chain(waiting.try_iter()).collect();
                let result = of_thread();
                for done in batch {
                    done(copy(&result));
                }
            }
        })?;
        Ok(Self { sync: Sync(sync), queue: Some(queue), thread: Some(thread) })
    }
}

impl GroupCommit for Flusher {
    fn submit(&self, done: Done) {
        let refused = match &self.queue {
            Some(queue) => queue.send(done).err().map(|unsent| unsent.0),
            None => Some(done),
        };
        if let Some(done) = refused {
            done(Err(io::Error::other("the database is closed")));
        }
    }

    fn sync_now(&self) -> io::Result<()> {
        (self.sync.0)()
    }
}

fn copy(result: &io::Result<()>) -> io::Result<()> {
    match result {
        Ok(()) => Ok(()),
        Err(error) => Err(io::Error::new(error.kind(), error.to_string())),
    }
}

impl Drop for Flusher {
    fn drop(&mut self) {
        drop(self.queue.take());
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the fsync thread panicked");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn many_writers_share_an_fsync_and_none_is_told_before_it() -> io::Result<()> {
        let syncs = Arc::new(AtomicUsize::new(0));
        let counter = syncs.clone();
        let (gate, opened) = mpsc::channel::<()>();
        let opened = std::sync::Mutex::new(opened);
        let flusher = Flusher::start(Arc::new(move || {
            let _ = opened.lock().map(|opened| opened.recv());
            counter.fetch_add(1, Ordering::SeqCst);
            Ok(())
        }))?;
        let (told, heard) = mpsc::channel();
        for _ in 0..100 {
            let (told, syncs) = (told.clone(), syncs.clone());
            flusher.submit(Box::new(move |result| {
                let _ = told.send(result.is_ok() && syncs.load(Ordering::SeqCst) > 0);
            }));
        }
        assert!(heard.try_recv().is_err(), "told before the fsync");
        drop(gate);
        assert!((0..100).all(|_| heard.recv() == Ok(true)));
        assert!(syncs.load(Ordering::SeqCst) < 100);
        Ok(())
    }
}
