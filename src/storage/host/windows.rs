//! The host file on Windows.
//!
//! # What keeps others away
//! How a file is shared: there are no locks beside. With a lock, a writer lets others read and a
//! reader lets others read; neither lets anybody rename or delete the file, as Windows' own virtual
//! disk service does not. Without a lock, all is shared. Hyper-V, `Mount-VHD` and QEMU share alike.

pub(crate) mod reparse;
pub(crate) mod sys;
#[cfg(test)]
mod tests;

use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::os::windows::fs::{FileExt, OpenOptionsExt};
use std::os::windows::io::AsHandle;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use windows_sys::Win32::Foundation::{
    ERROR_ACCESS_DENIED, ERROR_CALL_NOT_IMPLEMENTED, ERROR_INVALID_FUNCTION,
    ERROR_INVALID_PARAMETER, ERROR_LOCK_VIOLATION, ERROR_MORE_DATA, ERROR_NOT_SUPPORTED,
    ERROR_SHARING_VIOLATION,
};
use windows_sys::Win32::Storage::FileSystem::{
    FILE_ADD_FILE, FILE_ADD_SUBDIRECTORY, FILE_ATTRIBUTE_COMPRESSED, FILE_ATTRIBUTE_ENCRYPTED,
    FILE_ATTRIBUTE_READONLY, FILE_ATTRIBUTE_SPARSE_FILE, FILE_GENERIC_READ, FILE_GENERIC_WRITE,
    FILE_SHARE_READ,
};
use windows_sys::Win32::System::Ioctl::{
    FSCTL_QUERY_ALLOCATED_RANGES, FSCTL_SET_SPARSE, FSCTL_SET_ZERO_DATA,
};

use super::copy::Copying;
use super::pin::windows::{SHARE_ALL, is};
use super::pin::{Pin, Stat};
use super::{FileKey, Hold, HostForm, HostOptions, Sharing, Space};
use crate::error::{OpenError, OpenProblem};
use crate::storage::holes::hole_bytes;
use crate::storage::{Storage, check_copy, past_end};
use crate::units::{FileOffset, FileRange, u64_from};

pub(crate) use sys::{Descriptor, Token};

/// The rights with which a file is opened for writing.
pub(crate) const WRITING: u32 = FILE_GENERIC_READ | FILE_GENERIC_WRITE;

/// An open host file. Closing it, by dropping, lets others have it again.
#[derive(Debug)]
pub struct HostFile {
    file: File,
    read_only: bool,
    /// The host stores holes as such.
    sparse: AtomicBool,
    /// The host said that it cannot do that for this file, so it is not tried again.
    no_punch: AtomicBool,
}

impl HostFile {
    /// Opens the regular file at `path`, shared as `options` say. Nothing is read.
    ///
    /// # Errors
    /// [`OpenProblem::InUse`] where another program has it open in a way that excludes us, and
    /// [`OpenProblem::Io`] where the host refuses or `path` is no regular file.
    pub fn open(path: &Path, options: &HostOptions) -> Result<Self, OpenError> {
        let pin = Pin::at(path, !options.no_follow).map_err(|source| match source.kind() {
            io::ErrorKind::InvalidInput => not_regular(&source.to_string()),
            _ => opening(source),
        });
        pin.and_then(|pin| Self::of(&pin, options))
            .map_err(|problem| OpenError::new(path, problem))
    }

    /// Opens the regular file at `path` as a handle of the virtual disk interface has it. Who has it
    /// attached lets others write, for there is no way to let one of them alone.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub(crate) fn open_shared(path: &Path, sharing: Sharing) -> Result<Self, OpenError> {
        let options = HostOptions {
            read_only: sharing == Sharing::Attached,
            lock: sharing == Sharing::Compact,
            no_follow: false,
        };
        Self::open(path, &options)
    }

    /// Whether another process has the disk attached: that cannot be told here.
    ///
    /// # Errors
    /// None.
    pub(crate) fn is_attached(&self) -> io::Result<bool> {
        Ok(false)
    }

    /// Opens the file that `pin` holds.
    pub(super) fn of(pin: &Pin, options: &HostOptions) -> Result<Self, OpenProblem> {
        let stat = pin.stat().map_err(|source| OpenProblem::Io {
            action: "read the file's attributes",
            source,
        })?;
        match stat.kind {
            super::pin::Kind::Link => {
                let text = "it is a symbolic link, which is not followed";
                return Err(opening(io::Error::other(text)));
            }
            kind => kind
                .special()
                .map_or(Ok(()), |what| Err(not_regular(&format!("it is {what}"))))?,
        }
        if !options.read_only && stat.attributes & FILE_ATTRIBUTE_READONLY != 0 {
            let text = "its read-only attribute is set";
            return Err(opening(io::Error::new(
                io::ErrorKind::PermissionDenied,
                text,
            )));
        }
        let access = if options.read_only {
            FILE_GENERIC_READ
        } else {
            WRITING
        };
        let share = if options.lock {
            FILE_SHARE_READ
        } else {
            SHARE_ALL
        };
        let file = pin.reopen(access, share).map_err(|error| match error {
            error if is(&error, ERROR_SHARING_VIOLATION) => {
                let holder = match options.read_only {
                    true => "it has the file open for writing, or shares it with nobody",
                    false => "it has the file open and does not let others write to it",
                };
                OpenProblem::InUse(holder.to_owned())
            }
            error => opening(error),
        })?;
        Ok(Self::from_file(file.into(), options.read_only, &stat))
    }

    /// Creates an empty file at `path`, open for reading and writing and locked as a writer. Its
    /// name is durable once [`sync_directory_of`] has returned.
    ///
    /// # Errors
    /// [`io::ErrorKind::AlreadyExists`] where `path` names anything, a dangling symbolic link
    /// included; whatever else the host refuses.
    pub fn create_new(path: &Path) -> io::Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .share_mode(FILE_SHARE_READ)
            .open(path)?;
        let stat = Pin::stat_of(&file)?;
        match stat.kind.special() {
            None => Ok(Self::from_file(file, false, &stat)),
            Some(what) => Err(io::Error::other(format!("it is {what}"))),
        }
    }

    /// As [`Self::create_new`]. Who may read the new file is what its directory hands down to it, as
    /// for every file on Windows, where directories of one user are closed to others.
    ///
    /// # Errors
    /// As there.
    pub fn create_private(path: &Path) -> io::Result<Self> {
        Self::create_new(path)
    }

    /// The file's attributes and times, as they are now.
    pub fn metadata(&self) -> io::Result<Metadata> {
        self.file.metadata()
    }

    /// Which file it is.
    pub fn key(&self) -> io::Result<FileKey> {
        Ok(self.stat()?.key)
    }

    /// How a file is shared keeps all others from writing to it, and lets them read.
    ///
    /// # Errors
    /// None.
    pub fn take_lease(&self) -> io::Result<Hold> {
        Ok(Hold::Alone)
    }

    /// Nobody waits for it.
    ///
    /// # Errors
    /// None.
    pub fn lend(&self) -> io::Result<()> {
        Ok(())
    }

    /// Whether this process may go on to change it for a guest.
    pub fn free_lease(&self) -> bool {
        true
    }

    /// Nobody waits for it.
    pub fn holds_lease(&self) -> bool {
        false
    }

    /// Nobody else can have changed it, nor waits for it.
    pub fn may_finish(&self) -> bool {
        true
    }

    /// Nobody else can have changed it.
    pub fn note(&self, _goes_on: &dyn Fn() -> bool) {}

    /// Nobody waits for it.
    pub fn is_wanted_to_read(&self) -> bool {
        false
    }

    /// Who else has it open, which nobody asks: [`Self::take_lease`] names none.
    pub fn holder(&self) -> String {
        "it has the file open".to_owned()
    }

    /// How long nobody has changed it, which does not matter: see [`Self::take_lease`].
    ///
    /// # Errors
    /// None.
    pub fn unchanged_for(&self) -> io::Result<Duration> {
        Ok(Duration::MAX)
    }

    /// How the host stores it.
    ///
    /// # Errors
    /// What the host answers.
    pub fn form(&self) -> io::Result<HostForm> {
        let attributes = self.stat()?.attributes;
        Ok(HostForm {
            hole_bytes: hole_bytes(self)?,
            is_sparse: attributes & FILE_ATTRIBUTE_SPARSE_FILE != 0,
            is_compressed: attributes & FILE_ATTRIBUTE_COMPRESSED != 0,
            is_encrypted: attributes & FILE_ATTRIBUTE_ENCRYPTED != 0,
        })
    }

    /// Has the host no longer take the file for a sparse one, once it has no holes: it fills those that it
    /// still has.
    ///
    /// # Errors
    /// What the host answers.
    pub fn end_sparse(&self) -> io::Result<()> {
        if self.stat()?.attributes & FILE_ATTRIBUTE_SPARSE_FILE == 0 {
            return Ok(());
        }
        // FILE_SET_SPARSE_BUFFER: one BOOLEAN, false.
        self.control(FSCTL_SET_SPARSE, &[0], &mut [])?;
        self.sparse.store(false, Ordering::Relaxed);
        self.sync()
    }

    fn stat(&self) -> io::Result<Stat> {
        Pin::stat_of(&self.file)
    }

    fn from_file(file: File, read_only: bool, stat: &Stat) -> Self {
        Self {
            file,
            read_only,
            sparse: AtomicBool::new(stat.attributes & FILE_ATTRIBUTE_SPARSE_FILE != 0),
            no_punch: AtomicBool::new(false),
        }
    }

    fn control(&self, code: u32, input: &[u8], output: &mut [u8]) -> io::Result<usize> {
        sys::control(self.file.as_handle(), code, input, output)
    }

    /// Has the host store holes as such from now on, which changes the file's attributes.
    fn make_sparse(&self) -> io::Result<()> {
        if !self.sparse.load(Ordering::Relaxed) {
            self.control(FSCTL_SET_SPARSE, &[], &mut [])?;
            self.sparse.store(true, Ordering::Relaxed);
        }
        Ok(())
    }
}

impl Copying for HostFile {
    fn put(&self, buf: &[u8], offset: FileOffset) -> io::Result<()> {
        self.write_all_at(buf, offset)
    }

    fn clear(&self, range: FileRange) -> io::Result<()> {
        // Whether it is to have holes was decided before.
        if !self.sparse.load(Ordering::Relaxed) {
            return self.put_zeros(range);
        }
        match self.punch_hole(range) {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => self.put_zeros(range),
            result => result,
        }
    }
}

impl Storage for HostFile {
    fn len(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: FileOffset) -> io::Result<()> {
        let mut done = 0;
        while done < buf.len() {
            let at = offset.plus(u64_from(done)).get();
            match self.file.seek_read(&mut buf[done..], at).map_err(told)? {
                0 => {
                    let range = FileRange::new(offset, u64_from(buf.len()));
                    return Err(past_end(range, self.len()?));
                }
                read => done += read,
            }
        }
        Ok(())
    }

    fn write_all_at(&self, buf: &[u8], offset: FileOffset) -> io::Result<()> {
        let mut done = 0;
        while done < buf.len() {
            let at = offset.plus(u64_from(done)).get();
            match self.file.seek_write(&buf[done..], at).map_err(told)? {
                0 => return Err(io::ErrorKind::WriteZero.into()),
                written => done += written,
            }
        }
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.file.set_len(len).map_err(told)
    }

    fn punch_hole(&self, range: FileRange) -> io::Result<()> {
        let end = range.end().min(FileOffset::new(self.len()?));
        if range.start >= end {
            return Ok(());
        }
        let unsupported = || {
            let text = "the host's file system cannot punch holes into files";
            io::Error::new(io::ErrorKind::Unsupported, text)
        };
        if self.no_punch.load(Ordering::Relaxed) {
            return Err(unsupported());
        }
        // FILE_ZERO_DATA_INFORMATION
        let mut input = [0; 16];
        input[..8].copy_from_slice(&range.start.get().to_le_bytes());
        input[8..].copy_from_slice(&end.get().to_le_bytes());
        let punched = self
            .make_sparse()
            .and_then(|()| self.control(FSCTL_SET_ZERO_DATA, &input, &mut []));
        match punched {
            Ok(_) => Ok(()),
            Err(error) if is_unsupported(&error) => {
                self.no_punch.store(true, Ordering::Relaxed);
                Err(unsupported())
            }
            Err(error) => Err(told(error)),
        }
    }

    fn write_zeroes(&self, range: FileRange) -> io::Result<()> {
        let len = self.len()?;
        if range.end().get() > len {
            return Err(past_end(range, len));
        }
        // What zeroes without writing gives the space of a sparse file back.
        self.put_zeros(range)
    }

    fn copy_within(&self, from: FileRange, to: FileOffset) -> io::Result<()> {
        check_copy(from, to, self.len()?)?;
        self.copy_with_holes(from, to)
    }

    fn next_data(&self, from: FileOffset, end: FileOffset) -> io::Result<Option<FileRange>> {
        let end = end.min(FileOffset::new(self.len()?));
        if from >= end {
            return Ok(None);
        }
        let all = FileRange::between(from, end);
        if !self.sparse.load(Ordering::Relaxed) {
            return Ok(Some(all));
        }
        // FILE_ALLOCATED_RANGE_BUFFER, in and out: where it starts, and its length.
        let mut asked = [0; 16];
        asked[..8].copy_from_slice(&from.get().to_le_bytes());
        asked[8..].copy_from_slice(&all.len.to_le_bytes());
        let mut found = [0; 16];
        match self.control(FSCTL_QUERY_ALLOCATED_RANGES, &asked, &mut found) {
            Ok(0) => return Ok(None),
            Ok(_) => {}
            // There are others behind the first.
            Err(error) if is(&error, ERROR_MORE_DATA) => {}
            Err(error) if is_unsupported(&error) => return Ok(Some(all)),
            Err(error) => return Err(error),
        }
        let (numbers, _) = found.as_chunks::<8>();
        let start = FileOffset::new(u64::from_le_bytes(numbers[0]));
        let stop = start.get().saturating_add(u64::from_le_bytes(numbers[1]));
        let (start, stop) = (start.max(from), FileOffset::new(stop).min(end));
        // What makes no sense tells nothing.
        Ok(Some(match start < stop {
            true => FileRange::between(start, stop),
            false => all,
        }))
    }

    fn allocated_bytes(&self) -> io::Result<u64> {
        Ok(self.stat()?.allocated)
    }

    fn room(&self) -> Option<u64> {
        let space = Space::of(self.file.as_handle()).ok()?;
        (space.blocks > 0).then(|| space.blocks_available.saturating_mul(space.block_size))
    }

    fn is_wanted(&self) -> bool {
        false
    }

    fn write_back(&self, _range: FileRange) -> io::Result<()> {
        // There is no call for a part of a file. Of all of it, so that no guest waits for that.
        self.sync()
    }

    fn sync(&self) -> io::Result<()> {
        // `FlushFileBuffers`, which needs the right to write; without it there is nothing to flush.
        match self.read_only {
            true => Ok(()),
            false => self.file.sync_all(),
        }
    }
}

/// Makes the names in the directory of `path` durable: a file that was just created there, renamed
/// or removed.
///
/// NTFS and ReFS log changes of names in their order, so that the sync of a new file has made its
/// name durable with it. For what else there is the directory is flushed, where the host does that
/// and this process may change the directory.
pub fn sync_directory_of(path: &Path) -> io::Result<()> {
    let parent = path
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty());
    let directory = Pin::directory(parent.unwrap_or(Path::new(".")))?;
    let flushed = directory
        .reopen(FILE_ADD_FILE | FILE_ADD_SUBDIRECTORY, SHARE_ALL)
        .and_then(|directory| File::from(directory).sync_all());
    match flushed {
        Err(error) if is_unsupported(&error) || is(&error, ERROR_ACCESS_DENIED) => Ok(()),
        result => result,
    }
}

fn opening(source: io::Error) -> OpenProblem {
    OpenProblem::Io {
        action: "open the file",
        source,
    }
}

fn not_regular(found: &str) -> OpenProblem {
    let text = format!("{found}, not a regular file");
    opening(io::Error::new(io::ErrorKind::InvalidInput, text))
}

/// An error of the host, with more to say where Windows' own words are not enough.
fn told(error: io::Error) -> io::Error {
    match is(&error, ERROR_LOCK_VIOLATION) {
        true => {
            let text = "another program has locked this part of the file";
            io::Error::new(io::ErrorKind::ResourceBusy, text)
        }
        false => error,
    }
}

/// Whether the file system does not know what it was asked.
pub(super) fn is_unsupported(error: &io::Error) -> bool {
    [
        ERROR_INVALID_FUNCTION,
        ERROR_NOT_SUPPORTED,
        ERROR_INVALID_PARAMETER,
        ERROR_CALL_NOT_IMPLEMENTED,
    ]
    .iter()
    .any(|code| is(error, *code))
}
