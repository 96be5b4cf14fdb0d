//! The host file under an image: positional I/O, length, holes, durability.
//!
//! [`host::HostFile`] is the real one. `sim::SimStorage` (feature `sim`) is the simulated one of the
//! crash tests; it implements the model below literally.
//!
//! # Model of a host file
//! Every change (a write, [`Storage::set_len`], a punched hole, a copy) is seen by later reads at
//! once and survives the death of this process. It survives a power cut only once a
//! [`Storage::sync`] that began after it has returned. Until then any subset of the changes may
//! have reached the disk, in any order; of a write, any subset of its 512-byte sectors. A sector is
//! never torn, and carries what earlier changes of parts of it left there. A longer length whose sync is outstanding may be lost while writes beyond the old
//! length are not, and the other way round. Space that a longer length exposes reads as zeros.

pub mod holes;
pub mod host;
#[cfg(unix)]
pub mod lock;
#[cfg(any(test, feature = "sim"))]
pub mod sim;
#[cfg(test)]
mod tests;

use std::io;

use crate::units::{FileOffset, FileRange};

/// The error of a range that reaches beyond the end of the file, which is `len` bytes long.
pub(crate) fn past_end(range: FileRange, len: u64) -> io::Error {
    let text = format!("{range} reaches beyond the end of the file at {len:#x}: it was cut");
    io::Error::new(io::ErrorKind::UnexpectedEof, text)
}

/// That a copy inside a file of `len` bytes is one that [`Storage::copy_within`] allows.
pub(crate) fn check_copy(from: FileRange, to: FileOffset, len: u64) -> io::Result<()> {
    if from.end().get() > len {
        return Err(past_end(from, len));
    }
    if from.overlaps(FileRange::new(to, from.len)) {
        let text = format!("{from} overlaps its copy at {to}");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    Ok(())
}

/// Makes `range` read as zeros, writing only where the host stores something: a hole is zero already.
pub(crate) fn zero_stored(storage: &dyn Storage, range: FileRange) -> io::Result<()> {
    let mut at = range.start;
    while let Some(data) = storage.next_data(at, range.end())? {
        storage.write_zeroes(data)?;
        at = data.end();
    }
    Ok(())
}

/// The host file that holds an image. Shared by all threads; every call is positional.
///
/// Reads and writes may overlap in time; where two overlapping ones do, each byte comes from one of
/// them. No method here has a default: a forgotten one would be a lost byte.
#[expect(
    clippy::len_without_is_empty,
    reason = "a length that may fail, of a file that never is"
)]
pub trait Storage: Send + Sync + std::fmt::Debug {
    /// The file's length in bytes, as it is now on the host.
    fn len(&self) -> io::Result<u64>;

    /// Fills `buf` from `offset` on. [`io::ErrorKind::UnexpectedEof`] where the file ends before.
    fn read_exact_at(&self, buf: &mut [u8], offset: FileOffset) -> io::Result<()>;

    /// Writes all of `buf` at `offset`, extending the file where it reaches beyond its end. After
    /// an error, any part of it may have been written.
    fn write_all_at(&self, buf: &[u8], offset: FileOffset) -> io::Result<()>;

    /// Cuts or extends the file. An extension reads as zeros.
    fn set_len(&self, len: u64) -> io::Result<()>;

    /// Makes `range` read as zeros and gives its space back to the host; the length stays. Any
    /// alignment: bytes of a host block that is only partly covered are zeroed instead of freed;
    /// what lies beyond the end of the file is ignored.
    /// [`io::ErrorKind::Unsupported`] where the host cannot (then nothing has changed).
    fn punch_hole(&self, range: FileRange) -> io::Result<()>;

    /// Makes `range` read as zeros while keeping its space allocated where the host can. Falls back
    /// to writing zeros: always supported. [`io::ErrorKind::UnexpectedEof`] where the range reaches
    /// beyond the end of the file; nothing has changed then.
    fn write_zeroes(&self, range: FileRange) -> io::Result<()>;

    /// Copies `from` to the same number of bytes at `to` inside this file, by reflink or
    /// `copy_file_range` where the host can, else through memory; holes stay holes where it can.
    /// Extends the file where the target reaches beyond its end. [`io::ErrorKind::UnexpectedEof`]
    /// where the source does, [`io::ErrorKind::InvalidInput`] where the two overlap; nothing has
    /// changed then. After any other error the target holds anything.
    fn copy_within(&self, from: FileRange, to: FileOffset) -> io::Result<()>;

    /// The first run at or after `from`, and before `end`, that the host stores as data, cut to
    /// `end`; `None` where only holes are left. A hole reads as zeros; data may hold zeros too. A
    /// host that cannot tell answers that all is data.
    fn next_data(&self, from: FileOffset, end: FileOffset) -> io::Result<Option<FileRange>>;

    /// Bytes that the host stores for the file (`st_blocks * 512`).
    fn allocated_bytes(&self) -> io::Result<u64>;

    /// Bytes that the host's file system has left for the file; `None` where that is not known: some tell no sizes.
    fn room(&self) -> Option<u64>;

    /// Whether another program waits to open the file, which this one has to itself: to be asked between
    /// two steps of work that no guest asked for, which then ends. Nobody waits for a file that is open for
    /// guests.
    fn is_wanted(&self) -> bool;

    /// Has the host write what changed in `range` to its device, as far as it can, and waits for that.
    /// Promises nothing of what is durable: it only spares the next [`Self::sync`] the work. An error is as
    /// bad as one of a sync, and may be the only one that tells.
    fn write_back(&self, range: FileRange) -> io::Result<()>;

    /// Makes every change that was complete when this was called durable, length included
    /// (`fdatasync`). An error leaves it unknown which of them are, and may undo the others: the caller
    /// must not go on, nor trust what it knows of the file.
    fn sync(&self) -> io::Result<()>;
}
