//! The content of an open file, shared by all who have it open on this mount. Pure.
//!
//! Changes stay here until the file is closed or synced. How it was changed decides what happens
//! if another node changed it meanwhile: what was only appended is appended to what is there then;
//! everything else replaces it (the last close wins).

use nix::errno::Errno;

use super::names::FILE_MAX;

/// Content of an open file.
#[derive(Debug)]
pub(super) struct Buffer {
    data: Vec<u8>,
    /// The revision that `data` was read at; 0: the file is not in the store.
    base: u64,
    edit: Edit,
    /// Only an absent file may be made of it.
    exclusive: bool,
    /// Counts changes.
    sequence: u64,
    /// The change whose commit failed last: it is not tried again by itself.
    failed: Option<u64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Edit {
    Clean,
    /// Bytes from here on were appended to the base.
    Appended(usize),
    Rewritten,
}

/// A commit to try.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Plan {
    /// The whole file.
    pub(super) content: Vec<u8>,
    /// What must be there; None: anything.
    pub(super) expected: Option<u64>,
    /// Where the appended bytes begin, if nothing else was done: to be added to what is there.
    pub(super) appended_from: Option<usize>,
    /// The file must be new.
    pub(super) exclusive: bool,
    sequence: u64,
}

impl Buffer {
    /// A file of the store.
    pub(super) fn loaded(data: Vec<u8>, revision: u64) -> Self {
        Self {
            data,
            base: revision,
            edit: Edit::Clean,
            exclusive: false,
            sequence: 0,
            failed: None,
        }
    }

    /// A new file, not yet in the store. If nothing is written into it, it adds nothing to what
    /// another node made meanwhile.
    pub(super) fn created(exclusive: bool) -> Self {
        Self { edit: Edit::Appended(0), exclusive, ..Self::loaded(Vec::new(), 0) }
    }

    pub(super) fn data(&self) -> &[u8] {
        &self.data
    }
    pub(super) fn base(&self) -> u64 {
        self.base
    }
    pub(super) fn is_dirty(&self) -> bool {
        self.edit != Edit::Clean
    }
    /// Whether the last commit of exactly this content was refused.
    pub(super) fn has_failed(&self) -> bool {
        self.failed == Some(self.sequence)
    }

    /// Bytes of a read.
    pub(super) fn read(&self, offset: u64, size: u32) -> &[u8] {
        let from = usize::try_from(offset).unwrap_or(usize::MAX).min(self.data.len());
        let size = usize::try_from(size).unwrap_or(usize::MAX);
        &self.data[from..from.saturating_add(size).min(self.data.len())]
    }

    /// A write; `append`: at the end, whatever the offset.
    pub(super) fn write(&mut self, offset: u64, bytes: &[u8], append: bool) -> Result<(), Errno> {
        let from = if append { self.data.len() } else { within(offset)? };
        let to = from.checked_add(bytes.len()).filter(|to| *to <= FILE_MAX);
        let to = to.ok_or(Errno::EFBIG)?;
        self.edit = match self.edit {
            Edit::Clean if append => Edit::Appended(from),
            kept @ Edit::Appended(_) if append => kept,
            Edit::Clean | Edit::Appended(_) | Edit::Rewritten => Edit::Rewritten,
        };
        if to > self.data.len() {
            self.data.resize(to, 0);
        }
        self.data[from..to].copy_from_slice(bytes);
        self.changed();
        Ok(())
    }

    /// Cuts or extends it, by `ftruncate`.
    pub(super) fn truncate(&mut self, size: u64) -> Result<(), Errno> {
        self.data.resize(within(size)?, 0);
        self.edit = Edit::Rewritten;
        self.changed();
        Ok(())
    }

    /// Empties it, by `O_TRUNC`.
    pub(super) fn empty(&mut self) {
        self.data.clear();
        self.edit = Edit::Rewritten;
        self.changed();
    }

    fn changed(&mut self) {
        self.sequence += 1;
    }

    /// What another node made of the file. Unsaved changes stay.
    pub(super) fn refresh(&mut self, data: &[u8], revision: u64) {
        if !self.is_dirty() && revision > self.base {
            self.data.clear();
            self.data.extend_from_slice(data);
            self.base = revision;
        }
    }

    /// Gives up unsaved changes.
    pub(super) fn reset(&mut self, data: Vec<u8>, revision: u64) {
        *self = Self { sequence: self.sequence + 1, ..Self::loaded(data, revision) };
    }

    /// What is to be committed; None: nothing was changed.
    pub(super) fn plan(&self) -> Option<Plan> {
        let (expected, appended_from) = match self.edit {
            Edit::Clean => return None,
            Edit::Appended(from) => (Some(self.base), Some(from)),
            Edit::Rewritten => (self.exclusive.then_some(0), None),
        };
        Some(Plan {
            content: self.data.clone(),
            expected,
            appended_from,
            exclusive: self.exclusive,
            sequence: self.sequence,
        })
    }

    /// A plan was committed, perhaps with other content than planned (see [`Plan::rebase`]).
    pub(super) fn committed(&mut self, plan: &Plan, planned_len: usize, revision: u64) {
        self.exclusive = false;
        self.base = revision;
        if self.sequence == plan.sequence {
            self.data.clone_from(&plan.content);
            self.edit = Edit::Clean;
        } else if let Edit::Appended(_) = self.edit {
            let tail = self.data.split_off(planned_len.min(self.data.len()));
            self.data.clone_from(&plan.content);
            self.edit = Edit::Appended(self.data.len());
            self.data.extend(tail);
        }
    }

    /// A plan was refused.
    pub(super) fn refused(&mut self, plan: &Plan) {
        self.failed = Some(plan.sequence);
    }
}

impl Plan {
    /// Puts what was appended behind what another node made of the file.
    ///
    /// # Errors
    /// `EFBIG` if it becomes too large.
    pub(super) fn rebase(&mut self, present: &[u8], revision: u64) -> Result<(), Errno> {
        let from = self.appended_from.unwrap_or(0).min(self.content.len());
        let tail = self.content.split_off(from);
        if present.len() + tail.len() > FILE_MAX {
            return Err(Errno::EFBIG);
        }
        self.content = [present, &tail].concat();
        self.appended_from = Some(present.len());
        self.expected = Some(revision);
        Ok(())
    }
}

fn within(size: u64) -> Result<usize, Errno> {
    usize::try_from(size).ok().filter(|size| *size <= FILE_MAX).ok_or(Errno::EFBIG)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn appended_bytes_go_behind_what_others_wrote() {
        let mut buffer = Buffer::loaded(b"one\n".to_vec(), 5);
        assert_eq!(buffer.plan(), None);
        buffer.write(0, b"two\n", true).unwrap();
        let mut plan = buffer.plan().unwrap();
        assert_eq!((plan.expected, plan.appended_from), (Some(5), Some(4)));
        let planned = plan.content.len();
        plan.rebase(b"one\nother\n", 6).unwrap();
        assert_eq!(plan.content, b"one\nother\ntwo\n");
        buffer.write(0, b"three\n", true).unwrap();
        buffer.committed(&plan, planned, 7);
        assert_eq!(buffer.data(), b"one\nother\ntwo\nthree\n");
        let next = buffer.plan().unwrap();
        assert_eq!((next.expected, next.appended_from), (Some(7), Some(14)));
        buffer.committed(&next, next.content.len(), 8);
        assert!(!buffer.is_dirty());
    }

    #[test]
    fn any_other_write_replaces_the_file() {
        let mut buffer = Buffer::loaded(b"abc".to_vec(), 5);
        buffer.write(0, b"d", true).unwrap();
        buffer.write(5, b"x", false).unwrap();
        let plan = buffer.plan().unwrap();
        assert_eq!((plan.expected, plan.appended_from), (None, None));
        assert_eq!(plan.content, b"abcd\0x");
        buffer.refresh(b"remote", 9);
        assert_eq!(buffer.read(4, 100), b"\0x");
        buffer.reset(b"remote".to_vec(), 9);
        assert_eq!(buffer.read(2, 3), b"mot");
        assert!(buffer.read(u64::MAX, u32::MAX).is_empty());
    }

    #[test]
    fn a_new_file_is_exclusive_only_if_asked() {
        let mut lazy = Buffer::created(true);
        lazy.write(0, b"x", false).unwrap();
        assert_eq!(lazy.plan().unwrap().expected, Some(0));
        let mut plain = Buffer::created(false);
        assert!(plain.is_dirty());
        assert_eq!(plain.plan().unwrap().expected, Some(0));
        plain.write(0, b"x", false).unwrap();
        assert_eq!(plain.plan().unwrap().expected, None);
    }

    #[test]
    fn the_limit_is_the_stores() {
        let mut buffer = Buffer::created(false);
        let limit = FILE_MAX as u64;
        assert_eq!(buffer.write(limit, b"x", false), Err(Errno::EFBIG));
        assert_eq!(buffer.write(u64::MAX, b"x", false), Err(Errno::EFBIG));
        assert_eq!(buffer.truncate(limit + 1), Err(Errno::EFBIG));
        buffer.truncate(limit).unwrap();
        assert_eq!(buffer.write(0, b"x", true), Err(Errno::EFBIG));
        buffer.write(limit - 1, b"x", false).unwrap();
        assert_eq!(buffer.data().len(), FILE_MAX);
    }

    #[test]
    fn a_refused_commit_is_not_tried_again_by_itself() {
        let mut buffer = Buffer::created(false);
        buffer.write(0, b"x", false).unwrap();
        let plan = buffer.plan().unwrap();
        buffer.refused(&plan);
        assert!(buffer.has_failed() && buffer.is_dirty());
        buffer.write(0, b"y", false).unwrap();
        assert!(!buffer.has_failed());
    }
}
