//! What users of the mount have open, and how that ends.

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use vhdfs::error::{DiskError, ErrorKind, chain};
use vhdfs::library::{DiskHandle, Library};

use super::Handles;

/// Why a request for an open disk was not done.
#[derive(Debug)]
pub(crate) enum Refused {
    /// It is open for reading alone.
    NotWritable,
    /// All of it lies beyond the disk's end.
    BeyondEnd,
    /// The disk failed, which has been logged.
    Failed(DiskError),
}

/// An open disk.
pub(crate) struct OpenFile {
    pub(crate) handle: DiskHandle,
    /// The disk's size in bytes.
    pub(crate) len: u64,
    /// The kinds of failure that have been logged.
    told: Mutex<Vec<ErrorKind>>,
}

impl OpenFile {
    pub(crate) fn new(handle: DiskHandle) -> Self {
        let len = handle.disk().len();
        Self {
            handle,
            len,
            told: Mutex::default(),
        }
    }

    /// How many of `len` bytes at `offset` the disk has.
    pub(crate) fn inside(&self, offset: u64, len: usize) -> usize {
        let room = self.len.saturating_sub(offset);
        usize::try_from(room).map_or(len, |room| room.min(len))
    }

    /// Fills the start of `buffer`, as far as the disk goes. How many bytes that are.
    pub(crate) fn read(&self, buffer: &mut [u8], offset: u64) -> Result<usize, Refused> {
        let len = self.inside(offset, buffer.len());
        // Far beyond the end is no place of the disk's at all.
        if len == 0 {
            return Ok(0);
        }
        let done = self.handle.disk().read_at(&mut buffer[..len], offset);
        done.map_err(|error| self.failed("read", offset, error))?;
        Ok(len)
    }

    /// Writes the start of `data`, as far as the disk goes. How many bytes that are.
    pub(crate) fn write(&self, data: &[u8], offset: u64) -> Result<usize, Refused> {
        self.for_writing()?;
        let len = self.inside(offset, data.len());
        if len == 0 {
            return match data.is_empty() {
                true => Ok(0),
                false => Err(Refused::BeyondEnd),
            };
        }
        let done = self.handle.disk().write_at(&data[..len], offset);
        done.map_err(|error| self.failed("write", offset, error))?;
        Ok(len)
    }

    /// Makes durable what was written, by others too, whom this may be a mere reader of.
    pub(crate) fn flush(&self) -> Result<(), Refused> {
        let disk = self.handle.disk();
        if disk.is_read_only() {
            return Ok(());
        }
        disk.flush().map_err(|error| self.failed("flush", 0, error))
    }

    /// Whether it may be written.
    pub(crate) fn for_writing(&self) -> Result<(), Refused> {
        match self.handle.is_writable() {
            true => Ok(()),
            false => Err(Refused::NotWritable),
        }
    }

    /// The answer to a request that failed. The first failure of each kind is logged as an error,
    /// further ones of a handle are not worth a full log.
    pub(crate) fn failed(&self, action: &str, offset: u64, error: DiskError) -> Refused {
        let kind = error.kind();
        let mut told = self.told.lock();
        let level = match told.contains(&kind) {
            false => log::Level::Error,
            true => log::Level::Debug,
        };
        if level == log::Level::Error {
            told.push(kind);
        }
        drop(told);
        let text = chain(&error);
        log::log!(
            level,
            "{}: {action} at {offset}: {text}",
            self.handle.path().display()
        );
        Refused::Failed(error)
    }
}

/// Ends service while users still have disks open.
pub(crate) struct Brake {
    library: Arc<Library>,
    files: Arc<Handles<OpenFile>>,
}

impl Brake {
    pub(crate) fn new(library: Arc<Library>, files: Arc<Handles<OpenFile>>) -> Self {
        Self { library, files }
    }

    /// Lets no disk be opened any more if none is open; how many are, otherwise.
    pub(crate) fn stop_if_unused(&self) -> Result<(), usize> {
        self.files.close_if_empty()
    }

    /// Lets the requests that are being served finish and refuses all others, so that no disk
    /// changes any more. Waits, but not for ever.
    pub(crate) fn stop(&self) {
        const PATIENCE: Duration = Duration::from_secs(10);
        self.files.close();
        let begun = Instant::now();
        while self.library.status().iter().any(|disk| disk.handles > 0) {
            if begun.elapsed() > PATIENCE {
                log::error!("requests are still being served; their disks may not be clean");
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}
