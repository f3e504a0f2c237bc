//! A raw disk image: a file or a block device, with an OFD lock.
//!
//! The lock is explicit: a migration target opens the image before it owns it, and takes the lock
//! only when it runs. Taking it drops cached pages, since another machine may have written.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

/// Bytes of a sector of the virtio block device.
pub(crate) const SECTOR: u64 = 512;
/// Zeros written at once where the file system cannot make them.
static ZEROS: [u8; 128 << 10] = [0; 128 << 10];

/// Why an image cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// What was written cannot be made durable.
    #[error("cannot flush disk image {path}: what the guest wrote last may be lost")]
    Flush {
        /// The image.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// It cannot be opened.
    #[error("cannot open disk image {path}")]
    Open {
        /// The image.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// It is neither a file nor a block device.
    #[error("disk image {path} is neither a file nor a block device")]
    Kind {
        /// The image.
        path: PathBuf,
    },
    /// Its size makes no disk.
    #[error("disk image {path} has {bytes} bytes: a disk needs at least one sector of 512")]
    Size {
        /// The image.
        path: PathBuf,
        /// Bytes.
        bytes: u64,
    },
    /// Another process holds the lock.
    #[error("disk image {path} is in use by another process; stop that virtual machine first")]
    InUse {
        /// The image.
        path: PathBuf,
    },
    /// Locking failed otherwise.
    #[error("cannot lock disk image {path}")]
    Lock {
        /// The image.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

/// An open raw image.
#[derive(Debug)]
pub struct Image {
    file: File,
    path: PathBuf,
    readonly: bool,
    sectors: u64,
    /// The file system was seen to know no FALLOC_FL_ZERO_RANGE.
    no_zero_range: AtomicBool,
    /// A flush that the guest did not ask for failed, and the guest has not heard of it.
    untold: AtomicBool,
}

impl Image {
    /// Opens an image, without locking it.
    ///
    /// # Errors
    /// [`ImageError`].
    pub fn open(path: &Path, readonly: bool) -> Result<Self, ImageError> {
        let file = OpenOptions::new()
            .read(true)
            .write(!readonly)
            .open(path)
            .map_err(|source| ImageError::Open { path: path.to_owned(), source })?;
        Self::from_file(file, path, readonly)
    }

    /// As [`Image::open`] for writing, but each write is on the storage before it is complete
    /// (O_DSYNC). So nothing that the [`crate::gate::WriteGate`] let through waits in this
    /// machine's page cache, to reach a shared disk after the VM has begun to run elsewhere.
    ///
    /// # Errors
    /// [`ImageError`].
    pub fn open_write_through(path: &Path) -> Result<Self, ImageError> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_DSYNC)
            .open(path)
            .map_err(|source| ImageError::Open { path: path.to_owned(), source })?;
        Self::from_file(file, path, false)
    }

    /// An image that somebody else opened, with the access that `readonly` says. `path` is for
    /// messages.
    ///
    /// # Errors
    /// [`ImageError`].
    pub fn from_file(mut file: File, path: &Path, readonly: bool) -> Result<Self, ImageError> {
        let path = path.to_owned();
        let open = |source| ImageError::Open { path: path.clone(), source };
        let kind = file.metadata().map_err(open)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(ImageError::Kind { path });
        }
        let bytes = file.seek(SeekFrom::End(0)).map_err(open)?;
        let sectors = bytes / SECTOR;
        if sectors == 0 {
            return Err(ImageError::Size { path, bytes });
        }
        Ok(Self {
            file,
            path,
            readonly,
            sectors,
            no_zero_range: AtomicBool::new(false),
            untold: AtomicBool::new(false),
        })
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether it was opened for reading only.
    #[must_use]
    pub fn readonly(&self) -> bool {
        self.readonly
    }

    /// Sectors of 512 bytes; a rest at the end is not part of the disk.
    #[must_use]
    pub fn sectors(&self) -> u64 {
        self.sectors
    }

    pub(crate) fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    /// Takes the lock of this open file (F_OFD_SETLK): exclusive, or shared when read-only.
    ///
    /// # Errors
    /// [`ImageError::InUse`] or [`ImageError::Lock`].
    pub fn lock(&self) -> Result<(), ImageError> {
        let kind = if self.readonly { libc::F_RDLCK } else { libc::F_WRLCK };
        match self.set_lock(kind) {
            Ok(()) => {}
            Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => {
                return Err(ImageError::InUse { path: self.path.clone() });
            }
            Err(source) => return Err(ImageError::Lock { path: self.path.clone(), source }),
        }
        // SAFETY: plain advice on an open file; nothing depends on its success.
        unsafe { libc::posix_fadvise(self.fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
        Ok(())
    }

    /// Gives the lock up.
    ///
    /// # Errors
    /// [`ImageError::Lock`].
    pub fn unlock(&self) -> Result<(), ImageError> {
        self.set_lock(libc::F_UNLCK)
            .map_err(|source| ImageError::Lock { path: self.path.clone(), source })
    }

    fn set_lock(&self, kind: libc::c_int) -> io::Result<()> {
        let whole = libc::flock {
            l_type: libc::c_short::try_from(kind).map_err(io::Error::other)?,
            l_whence: libc::c_short::try_from(libc::SEEK_SET).map_err(io::Error::other)?,
            l_start: 0,
            l_len: 0,
            l_pid: 0,
        };
        // SAFETY: the kernel reads one `flock` that lives across the call.
        check(unsafe { libc::fcntl(self.fd(), libc::F_OFD_SETLK, &raw const whole) })
    }

    /// Waits until all completed writes are on stable storage: a flush by the machine's keeper.
    ///
    /// # Errors
    /// What fdatasync says. It says so once: the guest is told with its next flush.
    pub fn flush(&self) -> io::Result<()> {
        self.sync().inspect_err(|_| self.untold.store(true, Ordering::Release))
    }

    /// Waits until all completed writes are on stable storage: a flush by the guest.
    ///
    /// # Errors
    /// What fdatasync says, or EIO if a [`flush`](Self::flush) before has failed.
    pub(crate) fn flush_for_guest(&self) -> io::Result<()> {
        self.sync()?;
        if self.untold.swap(false, Ordering::AcqRel) {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        if self.readonly { Ok(()) } else { self.file.sync_data() }
    }

    /// Gives a range back to the storage; it reads as zeros.
    ///
    /// # Errors
    /// What `gate` or fallocate say; `Unsupported` when the storage cannot.
    pub(crate) fn punch(
        &self,
        offset: u64,
        length: u64,
        gate: impl Fn() -> io::Result<()>,
    ) -> io::Result<()> {
        gate()?;
        self.fallocate(libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE, offset, length)
    }

    /// Makes a range read as zeros and keeps its space.
    ///
    /// # Errors
    /// What `gate`, fallocate or pwrite say.
    pub(crate) fn zero(
        &self,
        offset: u64,
        length: u64,
        gate: impl Fn() -> io::Result<()>,
    ) -> io::Result<()> {
        if !self.no_zero_range.load(Ordering::Relaxed) {
            gate()?;
            let flags = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;
            match self.fallocate(flags, offset, length) {
                Err(error) if error.kind() == io::ErrorKind::Unsupported => {
                    self.no_zero_range.store(true, Ordering::Relaxed);
                }
                result => return result,
            }
        }
        self.write_zeros(offset, length, gate)
    }

    fn write_zeros(
        &self,
        offset: u64,
        length: u64,
        gate: impl Fn() -> io::Result<()>,
    ) -> io::Result<()> {
        use std::os::unix::fs::FileExt;
        let end = offset.saturating_add(length);
        let mut at = offset;
        while at < end {
            gate()?;
            let part = usize::try_from(end - at).unwrap_or(usize::MAX).min(ZEROS.len());
            match self.file.write_at(&ZEROS[..part], at) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => at += written as u64,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// The fallback of [`Self::zero`], where the file system has no zero range.
    #[cfg(test)]
    pub(crate) fn write_zeros_for_test(&self, offset: u64, length: u64) {
        self.write_zeros(offset, length, || Ok(())).unwrap();
    }

    fn fallocate(&self, flags: libc::c_int, offset: u64, length: u64) -> io::Result<()> {
        let offset = i64::try_from(offset).map_err(io::Error::other)?;
        let length = i64::try_from(length).map_err(io::Error::other)?;
        loop {
            // SAFETY: fallocate touches no memory of ours.
            let result = check(unsafe { libc::fallocate64(self.fd(), flags, offset, length) });
            match result {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.raw_os_error() == Some(libc::ENODEV) => {
                    return Err(io::ErrorKind::Unsupported.into());
                }
                result => return result,
            }
        }
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_locked_image_is_refused_to_others_until_it_is_given_up() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(4096).unwrap();
        let open = |readonly| Image::open(file.path(), readonly).unwrap();
        let (writer, other, reader, reader2) = (open(false), open(false), open(true), open(true));
        writer.lock().unwrap();
        writer.lock().unwrap();
        assert!(matches!(other.lock(), Err(ImageError::InUse { .. })));
        assert!(matches!(reader.lock(), Err(ImageError::InUse { .. })));
        writer.unlock().unwrap();
        reader.lock().unwrap();
        reader2.lock().unwrap();
        assert!(matches!(other.lock(), Err(ImageError::InUse { .. })));
        drop((reader, reader2));
        other.lock().unwrap();
    }

    #[test]
    fn a_failed_flush_is_told_to_the_guest_once() {
        let good = tempfile::tempfile().unwrap();
        good.set_len(512).unwrap();
        let mut image = Image::from_file(good, Path::new("disk"), false).unwrap();
        let (pipe, _writer) = std::io::pipe().unwrap();
        // fdatasync of a pipe fails.
        let good = std::mem::replace(&mut image.file, File::from(std::os::fd::OwnedFd::from(pipe)));
        image.flush().unwrap_err();
        image.file = good;
        image.flush().unwrap();
        assert_eq!(image.flush_for_guest().unwrap_err().raw_os_error(), Some(libc::EIO));
        image.flush_for_guest().unwrap();
    }

    #[test]
    fn what_is_no_disk_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        assert!(matches!(Image::open(folder.path(), true), Err(ImageError::Kind { .. })));
        let path = folder.path().join("tiny");
        assert!(matches!(Image::open(&path, true), Err(ImageError::Open { .. })));
        std::fs::write(&path, [0; 511]).unwrap();
        assert!(matches!(Image::open(&path, true), Err(ImageError::Size { bytes: 511, .. })));
        std::fs::write(&path, [0; 1025]).unwrap();
        assert_eq!(Image::open(&path, true).unwrap().sectors(), 2);
    }
}
