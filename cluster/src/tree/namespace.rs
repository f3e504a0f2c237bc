//! The tree in memory: every path that the store has, and what is only here yet. Pure: it follows
//! the store by [`Namespace::apply`] and tells what the kernel must forget.
//!
//! Invariants: a linked inode is the child of its parent under its name; a path keeps its inode
//! as long as it lives; a folder that is neither fixed nor marked has something in it.

use std::collections::{BTreeMap, HashMap};
use std::time::SystemTime;

use nix::errno::Errno;

use super::buffer::Buffer;
use super::inode::{Body, File, Folder, Generated, Inode, ROOT, Stamp, Stamps, Stored};
use super::names::{self, FIXED, NOTE};

/// One key's change, as the store tells it.
#[derive(Debug, Clone)]
pub(super) struct Change {
    pub(super) key: String,
    /// None: removed.
    pub(super) content: Option<Vec<u8>>,
}

/// What the kernel may remember and is not so any more.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Stale {
    /// Attributes and content.
    Inode(u64),
    /// A name, and what it stood for.
    Entry { parent: u64, name: String, inode: u64 },
}

/// A rename that is being committed here: what moves keeps its inode.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Move {
    pub(super) inode: u64,
    pub(super) to_parent: u64,
    pub(super) to_name: String,
    /// One of the keys that go, and what becomes of it: by them the commit is known.
    pub(super) from_key: String,
    pub(super) to_key: String,
}

/// All of it.
#[derive(Debug)]
pub(super) struct Namespace {
    inodes: HashMap<u64, Inode>,
    next: u64,
    /// Files whose path is a folder as well: another client of the store may write both.
    hidden: BTreeMap<String, Stored>,
    stamps: Stamps,
    moves: Vec<Move>,
    notes: usize,
    /// All changes up to this revision are here.
    pub(super) revision: u64,
}

/// Most notes about refused files that are kept at once.
const NOTES_MAX: usize = 256;

impl Namespace {
    /// The fixed folders and the generated files.
    pub(super) fn new() -> Self {
        let mut this = Self {
            inodes: HashMap::new(),
            next: ROOT,
            hidden: BTreeMap::new(),
            stamps: Stamps::default(),
            moves: Vec::new(),
            notes: 0,
            revision: 0,
        };
        let fixed = || Body::Folder(Folder { fixed: true, ..Folder::default() });
        this.add(0, String::new(), fixed());
        for name in FIXED {
            this.link(ROOT, name, fixed());
        }
        for (name, generated) in Generated::TOP {
            this.link(ROOT, name, Body::Generated(generated));
        }
        this
    }

    fn add(&mut self, parent: u64, name: String, body: Body) -> u64 {
        let number = self.next;
        self.next += 1;
        let inode = Inode { parent, name, linked: true, lookups: 0, opens: 0, body };
        self.inodes.insert(number, inode);
        number
    }

    fn link(&mut self, parent: u64, name: &str, body: Body) -> u64 {
        let number = self.add(parent, name.to_owned(), body);
        if let Some(folder) = self.folder_mut(parent) {
            folder.children.insert(name.to_owned(), number);
        }
        number
    }

    pub(super) fn get(&self, number: u64) -> Result<&Inode, Errno> {
        self.inodes.get(&number).ok_or(Errno::ESTALE)
    }
    pub(super) fn get_mut(&mut self, number: u64) -> Result<&mut Inode, Errno> {
        self.inodes.get_mut(&number).ok_or(Errno::ESTALE)
    }
    /// A file; `EISDIR` for a folder, `EACCES` for a generated one.
    pub(super) fn file(&mut self, number: u64) -> Result<&mut File, Errno> {
        match &mut self.get_mut(number)?.body {
            Body::File(file) => Ok(file),
            Body::Folder(_) => Err(Errno::EISDIR),
            Body::Generated(_) => Err(Errno::EACCES),
        }
    }
    pub(super) fn folder(&self, number: u64) -> Result<&Folder, Errno> {
        self.get(number)?.folder().ok_or(Errno::ENOTDIR)
    }
    fn folder_mut(&mut self, number: u64) -> Option<&mut Folder> {
        match &mut self.inodes.get_mut(&number)?.body {
            Body::Folder(folder) => Some(folder),
            Body::File(_) | Body::Generated(_) => None,
        }
    }

    /// What a name in a folder stands for.
    pub(super) fn child(&self, parent: u64, name: &str) -> Option<u64> {
        self.inodes.get(&parent)?.folder()?.children.get(name).copied()
    }

    /// A linked inode's path; the root's is empty. `ENOENT` where it has none any more.
    pub(super) fn path(&self, number: u64) -> Result<String, Errno> {
        let mut parts = Vec::new();
        let mut at = number;
        while at != ROOT {
            let inode = self.get(at)?;
            if !inode.linked {
                return Err(Errno::ENOENT);
            }
            parts.push(inode.name.as_str());
            at = inode.parent;
        }
        parts.reverse();
        Ok(parts.join("/"))
    }

    /// The inode at a path.
    pub(super) fn resolve(&self, path: &str) -> Option<u64> {
        let parts = path.split('/').filter(|part| !part.is_empty());
        parts.into_iter().try_fold(ROOT, |at, part| self.child(at, part))
    }

    /// The kernel learned of an inode once more.
    pub(super) fn looked_up(&mut self, number: u64) {
        if let Some(inode) = self.inodes.get_mut(&number) {
            inode.lookups += 1;
        }
    }
    /// The kernel forgot it so many times.
    pub(super) fn forget(&mut self, number: u64, times: u64) {
        if let Some(inode) = self.inodes.get_mut(&number) {
            inode.lookups = inode.lookups.saturating_sub(times);
        }
        self.drop_unused(number);
    }
    /// Keeps an inode until [`Namespace::unpin`].
    pub(super) fn pin(&mut self, number: u64) {
        if let Some(inode) = self.inodes.get_mut(&number) {
            inode.opens += 1;
        }
    }
    pub(super) fn unpin(&mut self, number: u64) {
        if let Some(inode) = self.inodes.get_mut(&number) {
            inode.opens = inode.opens.saturating_sub(1);
        }
        self.drop_unused(number);
    }

    fn drop_unused(&mut self, number: u64) {
        let unused = |inode: &Inode| !inode.linked && inode.lookups == 0 && inode.opens == 0;
        if self.inodes.get(&number).is_some_and(unused) {
            self.inodes.remove(&number);
        }
    }

    /// A new file that is only here yet.
    pub(super) fn create(
        &mut self,
        parent: u64,
        name: &str,
        exclusive: bool,
        now: SystemTime,
    ) -> Result<u64, Errno> {
        self.live_folder(parent)?;
        if self.child(parent, name).is_some() {
            return Err(Errno::EEXIST);
        }
        let file =
            File { stored: None, buffer: Some(Buffer::created(exclusive)), touched: Some(now) };
        Ok(self.link(parent, name, Body::File(file)))
    }

    /// A folder that can take something: it has a path.
    pub(super) fn live_folder(&self, number: u64) -> Result<&Folder, Errno> {
        let inode = self.get(number)?;
        let folder = inode.folder().ok_or(Errno::ENOTDIR)?;
        if number == ROOT || inode.linked { Ok(folder) } else { Err(Errno::ENOENT) }
    }

    /// Takes a file's path from it, here alone.
    pub(super) fn unlink(&mut self, number: u64) -> Vec<Stale> {
        let mut stale = Vec::new();
        self.detach(number, &mut stale);
        stale
    }

    /// As [`Namespace::unlink`], of a file that was refused: the note that says why stays.
    pub(super) fn abandon(&mut self, number: u64) -> Vec<Stale> {
        let mut stale = Vec::new();
        if let Some((parent, _)) = self.cut(number, &mut stale) {
            self.prune(parent, &mut stale);
        }
        stale
    }

    fn detach(&mut self, number: u64, stale: &mut Vec<Stale>) {
        if let Some((parent, name)) = self.cut(number, stale) {
            self.clear_note(parent, &name, stale);
            self.prune(parent, stale);
        }
    }

    /// Takes an inode out of its folder. The answer is where it was.
    fn cut(&mut self, number: u64, stale: &mut Vec<Stale>) -> Option<(u64, String)> {
        let inode = self.inodes.get_mut(&number).filter(|inode| inode.linked)?;
        inode.linked = false;
        let (parent, name, note) = (inode.parent, inode.name.clone(), inode.is_note());
        self.notes -= usize::from(note);
        if let Some(folder) = self.folder_mut(parent) {
            folder.children.remove(&name);
        }
        stale.push(Stale::Entry { parent, name: name.clone(), inode: number });
        self.drop_unused(number);
        Some((parent, name))
    }

    /// Removes a folder that has no reason to be there, and looks at the one above.
    fn prune(&mut self, number: u64, stale: &mut Vec<Stale>) {
        let Some(folder) = self.inodes.get(&number).and_then(Inode::folder) else { return };
        let linked = number != ROOT && self.inodes[&number].linked;
        let is_note = |child: &u64| self.inodes.get(child).is_some_and(Inode::is_note);
        if !linked || folder.fixed || folder.marker.is_some() {
            return;
        }
        if !folder.children.values().all(is_note) {
            return;
        }
        let notes: Vec<u64> = folder.children.values().copied().collect();
        let path = self.path(number);
        for note in notes {
            self.cut(note, stale);
        }
        self.detach(number, stale);
        if let Ok(path) = path
            && let Some(stored) = self.hidden.remove(&path)
        {
            self.put_file(&path, stored, None, stale);
        }
    }

    /// Applies one revision of the store, made at a time (seconds since 1970).
    pub(super) fn apply(&mut self, revision: u64, seconds: u64, changes: &[Change]) -> Vec<Stale> {
        let mut stale = Vec::new();
        let stamp = self.stamps.next(revision, seconds);
        self.move_first(changes, &mut stale);
        // What is written first: no folder goes and comes back within one revision.
        for change in changes {
            if let Some(content) = &change.content {
                self.put(&change.key, content, revision, stamp, &mut stale);
            }
        }
        for change in changes.iter().filter(|change| change.content.is_none()) {
            self.delete(&change.key, revision, stamp, &mut stale);
        }
        self.revision = self.revision.max(revision);
        stale
    }

    fn put(
        &mut self,
        key: &str,
        content: &[u8],
        revision: u64,
        stamp: Stamp,
        stale: &mut Vec<Stale>,
    ) {
        let size = content.len() as u64;
        let stored = Stored { revision, size, stamp };
        self.put_file(key, stored, Some(content), stale);
    }

    /// Puts a key; `content` is not known where the whole store is listed.
    fn put_file(
        &mut self,
        key: &str,
        stored: Stored,
        content: Option<&[u8]>,
        stale: &mut Vec<Stale>,
    ) {
        let Some(place) = names::place(key) else { return };
        let mut parent = ROOT;
        for name in &place.folders {
            match self.folder_in(parent, name, stored.stamp, stale) {
                Some(folder) => parent = folder,
                None => return,
            }
        }
        let Some(name) = place.file else {
            if let Some(folder) = self.folder_mut(parent) {
                folder.marker = Some(stored.revision);
            }
            return;
        };
        let Some(number) = self.child(parent, name) else {
            self.link(parent, name, Body::File(File { stored: Some(stored), ..File::default() }));
            self.changed_in(parent, stored.stamp, stale);
            return;
        };
        let Some(inode) = self.inodes.get_mut(&number) else { return };
        match &mut inode.body {
            Body::Folder(_) => {
                self.hidden.insert(key.to_owned(), stored);
            }
            Body::Generated(Generated::Note(_)) => {
                self.detach(number, stale);
                self.put_file(key, stored, content, stale);
            }
            Body::Generated(_) => {}
            Body::File(file) => {
                if file.stored.is_some_and(|present| present.revision > stored.revision) {
                    return;
                }
                file.stored = Some(stored);
                if let (Some(buffer), Some(content)) = (&mut file.buffer, content) {
                    buffer.refresh(content, stored.revision);
                }
                stale.push(Stale::Inode(number));
            }
        }
    }

    /// The folder of this name, made where it is missing; a file of this name is hidden by it.
    fn folder_in(
        &mut self,
        parent: u64,
        name: &str,
        stamp: Stamp,
        stale: &mut Vec<Stale>,
    ) -> Option<u64> {
        let made = |this: &mut Self, stale: &mut Vec<Stale>| {
            let folder = Folder { stamp, ..Folder::default() };
            let number = this.link(parent, name, Body::Folder(folder));
            this.changed_in(parent, stamp, stale);
            number
        };
        let Some(number) = self.child(parent, name) else { return Some(made(self, stale)) };
        let path = self.path(number).ok()?;
        match &self.inodes.get(&number)?.body {
            Body::Folder(_) => Some(number),
            Body::Generated(Generated::Note(_)) => self.replace_by(number, parent, stale, made),
            Body::Generated(_) => None,
            Body::File(file) => {
                if let Some(stored) = file.stored {
                    self.hidden.insert(path, stored);
                }
                self.replace_by(number, parent, stale, made)
            }
        }
    }

    /// Makes something where something else was, without its folder going in between.
    fn replace_by(
        &mut self,
        number: u64,
        parent: u64,
        stale: &mut Vec<Stale>,
        made: impl Fn(&mut Self, &mut Vec<Stale>) -> u64,
    ) -> Option<u64> {
        let kept = self.folder_mut(parent)?.marker.replace(0);
        self.detach(number, stale);
        let new = made(self, stale);
        self.folder_mut(parent)?.marker = kept;
        Some(new)
    }

    fn delete(&mut self, key: &str, revision: u64, stamp: Stamp, stale: &mut Vec<Stale>) {
        let Some(place) = names::place(key) else { return };
        if self.hidden.get(key).is_some_and(|stored| stored.revision <= revision) {
            self.hidden.remove(key);
            return;
        }
        let Some(number) = self.resolve(key) else { return };
        let parent = self.inodes.get(&number).map_or(ROOT, |inode| inode.parent);
        match self.inodes.get_mut(&number).map(|inode| &mut inode.body) {
            Some(Body::Folder(folder)) if place.file.is_none() => {
                if folder.marker.is_some_and(|marked| marked <= revision) {
                    folder.marker = None;
                }
                self.prune(number, stale);
            }
            Some(Body::File(File { stored: Some(stored), .. }))
                if place.file.is_some() && stored.revision <= revision =>
            {
                self.changed_in(parent, stamp, stale);
                self.detach(number, stale);
            }
            _ => {}
        }
    }

    fn changed_in(&mut self, parent: u64, stamp: Stamp, stale: &mut Vec<Stale>) {
        if let Some(folder) = self.folder_mut(parent) {
            folder.stamp = folder.stamp.max(stamp);
            stale.push(Stale::Inode(parent));
        }
    }

    /// Replaces everything under a prefix by what the store has there: key, revision, size and
    /// time (seconds since 1970) of each, in any order.
    pub(super) fn replace(
        &mut self,
        prefix: &str,
        mut listing: Vec<(String, u64, u64, u64)>,
    ) -> Vec<Stale> {
        let mut stale = Vec::new();
        let mut gone = self.keys(prefix);
        listing.sort_by_key(|(_, revision, _, _)| *revision);
        for (key, revision, size, seconds) in &listing {
            let stamp = self.stamps.next(*revision, *seconds);
            let stored = Stored { revision: *revision, size: *size, stamp };
            if gone.remove(key.as_str()) != Some(*revision) {
                self.put_file(key, stored, None, &mut stale);
            }
        }
        for (key, revision) in gone {
            self.delete(&key, revision, Stamp::default(), &mut stale);
        }
        stale
    }

    /// All keys under a prefix that are known to be in the store, and their revisions.
    pub(super) fn keys(&self, prefix: &str) -> BTreeMap<String, u64> {
        let hidden = self.hidden.iter().filter(|(key, _)| key.starts_with(prefix));
        let mut found: BTreeMap<String, u64> =
            hidden.map(|(key, stored)| (key.clone(), stored.revision)).collect();
        let start = self.resolve(prefix.trim_end_matches('/'));
        let mut left: Vec<(u64, String)> = start
            .map(|number| (number, prefix.trim_end_matches('/').to_owned()))
            .into_iter()
            .collect();
        while let Some((number, path)) = left.pop() {
            let Some(folder) = self.inodes.get(&number).and_then(Inode::folder) else { continue };
            if let Some(marker) = folder.marker {
                found.insert(names::marker(&path), marker);
            }
            for (name, child) in &folder.children {
                let at = if path.is_empty() { name.clone() } else { format!("{path}/{name}") };
                match self.inodes.get(child).map(|inode| &inode.body) {
                    Some(Body::Folder(_)) => left.push((*child, at)),
                    Some(Body::File(File { stored: Some(stored), .. })) => {
                        found.insert(at, stored.revision);
                    }
                    _ => {}
                }
            }
        }
        found
    }

    /// Expects a rename; whoever commits it also ends the expectation.
    pub(super) fn expect_move(&mut self, expected: Move) {
        self.moves.push(expected);
    }
    pub(super) fn end_move(&mut self, expected: &Move) {
        self.moves.retain(|one| one != expected);
    }

    fn move_first(&mut self, changes: &[Change], stale: &mut Vec<Stale>) {
        let holds = |key: &str, there: bool| {
            changes.iter().any(|change| change.key == key && change.content.is_some() == there)
        };
        let known = self
            .moves
            .iter()
            .position(|one| holds(&one.from_key, false) && holds(&one.to_key, true));
        if let Some(at) = known {
            let Move { inode, to_parent, to_name, .. } = self.moves.remove(at);
            self.relink(inode, to_parent, &to_name, stale);
        }
    }

    /// Gives an inode another path, here alone; what was there loses its own.
    pub(super) fn relink(
        &mut self,
        number: u64,
        to_parent: u64,
        to_name: &str,
        stale: &mut Vec<Stale>,
    ) {
        if !self.inodes.get(&number).is_some_and(|inode| inode.linked)
            || self.folder_mut(to_parent).is_none()
        {
            return;
        }
        let target = self.child(to_parent, to_name);
        if target == Some(number) {
            return;
        }
        if let Some(target) = target {
            // Not `detach`: the folder must not go, it is about to get a child.
            self.cut(target, stale);
        }
        let Some(inode) = self.inodes.get_mut(&number) else { return };
        let from_parent = std::mem::replace(&mut inode.parent, to_parent);
        let from_name = std::mem::replace(&mut inode.name, to_name.to_owned());
        if let Some(folder) = self.folder_mut(to_parent) {
            folder.children.insert(to_name.to_owned(), number);
        }
        if let Some(folder) = self.folder_mut(from_parent) {
            folder.children.remove(&from_name);
        }
        let last = self.stamps.last(self.revision);
        for parent in [from_parent, to_parent] {
            self.changed_in(parent, last, stale);
        }
        self.clear_note(from_parent, &from_name, stale);
        self.clear_note(to_parent, to_name, stale);
        stale.push(Stale::Inode(number));
        self.prune(from_parent, stale);
    }

    /// Says beside a file why it was refused.
    pub(super) fn note(&mut self, path: &str, reason: &str) -> Vec<Stale> {
        let mut stale = Vec::new();
        let (folder, file) = path.rsplit_once('/').unwrap_or(("", path));
        let Some(parent) = self.resolve(folder) else { return stale };
        let name = format!("{file}{NOTE}");
        if names::name(name.as_ref()).is_err() || self.folder_mut(parent).is_none() {
            return stale;
        }
        let body = Body::Generated(Generated::Note(reason.to_owned()));
        match self.child(parent, &name) {
            Some(number) => match self.inodes.get_mut(&number) {
                Some(inode) if inode.is_note() => {
                    inode.body = body;
                    stale.push(Stale::Inode(number));
                }
                // A file that somebody wrote has this name.
                _ => {}
            },
            None if self.notes < NOTES_MAX => {
                self.link(parent, &name, body);
                self.notes += 1;
                stale.push(Stale::Inode(parent));
            }
            None => {}
        }
        stale
    }

    /// Takes back what was said about a file.
    pub(super) fn clear_note(&mut self, parent: u64, file: &str, stale: &mut Vec<Stale>) {
        let note = self.child(parent, &format!("{file}{NOTE}"));
        if let Some(number) = note.filter(|n| self.inodes.get(n).is_some_and(Inode::is_note)) {
            self.cut(number, stale);
        }
    }

    /// Open files without unsaved changes that the store has newer.
    pub(super) fn behind(&self) -> Vec<u64> {
        let is_behind = |inode: &Inode| {
            let Some(File { stored: Some(stored), buffer: Some(buffer), .. }) = inode.file() else {
                return false;
            };
            !buffer.is_dirty() && buffer.base() < stored.revision
        };
        let behind = self.inodes.iter().filter(|(_, inode)| inode.linked && is_behind(inode));
        behind.map(|(number, _)| *number).collect()
    }

    /// When anything was changed last.
    pub(super) fn last_change(&self) -> SystemTime {
        self.stamps.last(self.revision).time()
    }

    /// How many files and folders there are.
    pub(super) fn len(&self) -> usize {
        self.inodes.len()
    }
}
