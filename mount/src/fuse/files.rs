//! An open disk, and what the kernel asks of it.

use std::sync::atomic::{AtomicBool, Ordering};

use fuser::{Errno, OpenFlags};
use rustix::fs::{FallocateFlags, OFlags};
use vhdfs::disk::ExtentKind;
use vhdfs::error::DiskError;
use vhdfs::library::DiskHandle;

use super::errno;

/// An open disk.
pub(super) struct OpenFile {
    pub(super) handle: DiskHandle,
    pub(super) len: u64,
    /// A failure has been logged.
    failed: AtomicBool,
}

impl OpenFile {
    /// The answer to a request that failed. The first failure of a handle is logged as an error,
    /// further ones are not worth a full log.
    pub(super) fn fail(&self, action: &str, offset: u64, error: &DiskError) -> Errno {
        let level = match self.failed.swap(true, Ordering::Relaxed) {
            false => log::Level::Error,
            true => log::Level::Debug,
        };
        let text = crate::text::chain(error);
        log::log!(
            level,
            "{}: {action} at {offset}: {text}",
            self.handle.path().display()
        );
        errno::of_disk(error)
    }

    pub(super) fn new(handle: DiskHandle) -> Self {
        let len = handle.disk().len();
        Self {
            handle,
            len,
            failed: AtomicBool::new(false),
        }
    }

    /// Makes what was written durable.
    pub(super) fn sync(&self) -> Result<(), Errno> {
        let disk = self.handle.disk();
        // Others may have written what this reader wants to be safe.
        if disk.is_read_only() {
            return Ok(());
        }
        disk.flush().map_err(|error| self.fail("flush", 0, &error))
    }

    /// Writes as much of `data` as the disk has room for; says how much that is.
    pub(super) fn write(&self, offset: u64, data: &[u8], flags: OpenFlags) -> Result<u32, Errno> {
        if !self.handle.is_writable() {
            return Err(Errno::EBADF);
        }
        let room = self.len.saturating_sub(offset);
        if room == 0 && !data.is_empty() {
            return Err(Errno::EFBIG);
        }
        let data = usize::try_from(room).map_or(data, |room| &data[..room.min(data.len())]);
        let disk = self.handle.disk();
        disk.write_at(data, offset)
            .map_err(|error| self.fail("write", offset, &error))?;
        if open_flags(flags).intersects(OFlags::SYNC | OFlags::DSYNC) {
            disk.flush()
                .map_err(|error| self.fail("flush", offset, &error))?;
        }
        u32::try_from(data.len()).map_err(|_| Errno::EINVAL)
    }

    /// fallocate(2): holes and zeros inside the disk, nothing else.
    pub(super) fn allocate(&self, offset: u64, len: u64, mode: i32) -> Result<(), Errno> {
        let mode = u32::from_ne_bytes(mode.to_ne_bytes());
        let mode = FallocateFlags::from_bits(mode).ok_or(Errno::EOPNOTSUPP)?;
        let keep_size = mode.contains(FallocateFlags::KEEP_SIZE);
        let action = mode.difference(FallocateFlags::KEEP_SIZE);
        let disk = self.handle.disk();
        // Nothing lies beyond the end.
        let inside = len.min(self.len.saturating_sub(offset));
        if !self.handle.is_writable() {
            return Err(Errno::EBADF);
        }
        let done = match action {
            FallocateFlags::PUNCH_HOLE if keep_size => disk.discard(offset, inside),
            FallocateFlags::ZERO_RANGE if keep_size || inside == len => {
                disk.write_zeroes(offset, inside)
            }
            FallocateFlags::ZERO_RANGE => return Err(Errno::EFBIG),
            _ => return Err(Errno::EOPNOTSUPP),
        };
        done.map_err(|error| self.fail("discard", offset, &error))
    }

    /// The first data, or hole, at or behind `offset`.
    pub(super) fn seek(&self, offset: i64, whence: i32) -> Result<i64, Errno> {
        // As lseek(2) has them.
        const SEEK_DATA: i32 = 3;
        const SEEK_HOLE: i32 = 4;
        let wanted = match whence {
            SEEK_DATA => ExtentKind::Data,
            SEEK_HOLE => ExtentKind::Hole,
            _ => return Err(Errno::EINVAL),
        };
        let from = u64::try_from(offset).map_err(|_| Errno::ENXIO)?;
        if from >= self.len {
            return Err(Errno::ENXIO);
        }
        let found = self
            .handle
            .disk()
            .extents(from)
            .find(|extent| extent.kind == wanted);
        let place = match found {
            Some(extent) => extent.offset.max(from),
            // Behind the last byte is a hole.
            None if wanted == ExtentKind::Hole => self.len,
            None => return Err(Errno::ENXIO),
        };
        i64::try_from(place).map_err(|_| Errno::EOVERFLOW)
    }
}

/// The flags of open(2); bits that nobody knows are kept.
pub(super) fn open_flags(flags: OpenFlags) -> OFlags {
    OFlags::from_bits_retain(u32::from_ne_bytes(flags.0.to_ne_bytes()))
}
