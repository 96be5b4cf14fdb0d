//! The log of a file, read from its storage.

use std::io;

use crate::format::vhdx::PAGE;
use crate::format::vhdx::log::{LogSource, LoggedPage, Page};
use crate::storage::Storage;
use crate::units::{FileRange, round_down, u64_from, usize_from};

/// Bytes that are read ahead.
const PIECE: u64 = 64 << 10;

/// A log in a file.
#[derive(Debug)]
pub(super) struct FileLog<'a> {
    storage: &'a dyn Storage,
    log: FileRange,
    /// A piece of the log, and where in it it lies.
    piece: Vec<u8>,
    piece_at: u64,
}

impl<'a> FileLog<'a> {
    /// The log at `log`, inside the file.
    pub(super) fn new(storage: &'a dyn Storage, log: FileRange) -> Self {
        Self {
            storage,
            log,
            piece: Vec::new(),
            piece_at: 0,
        }
    }
}

impl LogSource for FileLog<'_> {
    type Error = io::Error;

    fn len(&self) -> u64 {
        self.log.len
    }

    fn read(&mut self, at: u64, sector: &mut Page) -> io::Result<()> {
        let is_here = at >= self.piece_at
            && at.saturating_add(PAGE) <= self.piece_at.saturating_add(u64_from(self.piece.len()));
        if !is_here {
            let start = round_down(at, PIECE);
            let len = PIECE.min(self.log.len.saturating_sub(start));
            self.piece.resize(usize_from(len), 0);
            let read = self
                .storage
                .read_exact_at(&mut self.piece, self.log.start.plus(start));
            if let Err(error) = read {
                self.piece.clear();
                return Err(error);
            }
            self.piece_at = start;
        }
        let from = usize_from(at.saturating_sub(self.piece_at));
        let bytes = self.piece.get(from..).and_then(|rest| rest.first_chunk());
        *sector = *bytes.ok_or_else(|| io::Error::other("a piece of the log is too short"))?;
        Ok(())
    }

    fn next_data(&mut self, at: u64) -> io::Result<Option<u64>> {
        let from = self.log.start.plus(at);
        let data = self.storage.next_data(from, self.log.end())?;
        Ok(data.map(|data| round_down(data.start.since(self.log.start), PAGE)))
    }
}

/// The page that `page` names, from the log at `log`.
///
/// # Errors
/// The host's, and where another program has overwritten that part of the log.
pub(super) fn read_page(
    storage: &(impl Storage + ?Sized),
    log: FileRange,
    page: &LoggedPage,
) -> io::Result<Page> {
    let mut bytes = [0; 4096];
    storage.read_exact_at(&mut bytes, log.start.plus(page.data_at))?;
    if page.restore(&mut bytes) {
        Ok(bytes)
    } else {
        Err(io::Error::other(
            "the file's log changes: another program has it open",
        ))
    }
}
