//! What a number in the tree stands for. Pure.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::buffer::Buffer;

/// The root's number.
pub(super) const ROOT: u64 = 1;

/// One file or folder.
#[derive(Debug)]
pub(super) struct Inode {
    pub(super) parent: u64,
    pub(super) name: String,
    /// Has a path. Without one it lives until nobody has it open or in a cache.
    pub(super) linked: bool,
    /// What the kernel knows of it.
    pub(super) lookups: u64,
    /// Open files, and operations under way.
    pub(super) opens: u32,
    pub(super) body: Body,
}

/// What it is.
#[derive(Debug)]
pub(super) enum Body {
    Folder(Folder),
    File(File),
    /// Made by this node, read-only.
    Generated(Generated),
}

#[derive(Debug, Default)]
pub(super) struct Folder {
    pub(super) children: BTreeMap<String, u64>,
    /// Revision of the key that marks it; None: it lives by what is in it.
    pub(super) marker: Option<u64>,
    /// Stays, whatever is in it.
    pub(super) fixed: bool,
    /// The last change of what is in it.
    pub(super) stamp: Stamp,
}

#[derive(Debug, Default)]
pub(super) struct File {
    /// None: made here and not committed yet.
    pub(super) stored: Option<Stored>,
    /// While it is open.
    pub(super) buffer: Option<Buffer>,
    /// The last change that is only here.
    pub(super) touched: Option<SystemTime>,
}

/// A file as the store has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Stored {
    pub(super) revision: u64,
    pub(super) size: u64,
    pub(super) stamp: Stamp,
}

/// A revision, and when it was made: in the order of revisions.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Stamp {
    seconds: u64,
    revision: u64,
}

/// Gives stamps in the order of revisions, though the clocks of nodes differ.
#[derive(Debug, Default)]
pub(super) struct Stamps {
    last: u64,
}

impl Stamps {
    /// The stamp of a revision made at a time, seconds since 1970. Call it in the order of
    /// revisions.
    pub(super) fn next(&mut self, revision: u64, seconds: u64) -> Stamp {
        self.last = self.last.max(seconds);
        Stamp { seconds: self.last, revision }
    }

    /// The stamp of the last revision.
    pub(super) fn last(&self, revision: u64) -> Stamp {
        Stamp { seconds: self.last, revision }
    }
}

impl Stamp {
    /// The time shown for a file: whole seconds of the change, the revision as nanoseconds.
    pub(super) fn time(self) -> SystemTime {
        let nanos = u32::try_from(self.revision % 1_000_000_000).unwrap_or(0);
        UNIX_EPOCH.checked_add(Duration::new(self.seconds, nanos)).unwrap_or(UNIX_EPOCH)
    }
}

/// A file that nobody wrote.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Generated {
    /// `.members`
    Members,
    /// `.vms`
    Vms,
    /// `.version`
    Version,
    /// `.log`
    Log,
    /// Why the file beside it was refused.
    Note(String),
}

impl Generated {
    /// Those at the top, by name.
    pub(super) const TOP: [(&'static str, Self); 4] = [
        (".log", Self::Log),
        (".members", Self::Members),
        (".version", Self::Version),
        (".vms", Self::Vms),
    ];
}

impl Inode {
    pub(super) fn folder(&self) -> Option<&Folder> {
        match &self.body {
            Body::Folder(folder) => Some(folder),
            Body::File(_) | Body::Generated(_) => None,
        }
    }
    pub(super) fn file(&self) -> Option<&File> {
        match &self.body {
            Body::File(file) => Some(file),
            Body::Folder(_) | Body::Generated(_) => None,
        }
    }
    pub(super) fn is_note(&self) -> bool {
        matches!(self.body, Body::Generated(Generated::Note(_)))
    }

    /// Whether what it says depends on the quorum.
    pub(super) fn tells_of_quorum(&self) -> bool {
        matches!(self.body, Body::Generated(Generated::Members))
    }
}

impl File {
    /// Bytes, unsaved changes included.
    pub(super) fn size(&self) -> u64 {
        match (&self.buffer, &self.stored) {
            (Some(buffer), _) => buffer.data().len() as u64,
            (None, Some(stored)) => stored.size,
            (None, None) => 0,
        }
    }
    /// Whether there are changes that are only here.
    pub(super) fn is_dirty(&self) -> bool {
        self.buffer.as_ref().is_some_and(Buffer::is_dirty)
    }
    /// When it was changed last.
    pub(super) fn time(&self) -> SystemTime {
        let own = self.touched.filter(|_| self.is_dirty() || self.stored.is_none());
        let stored = self.stored.map(|stored| stored.stamp.time());
        own.or(stored).unwrap_or(UNIX_EPOCH)
    }
}
