//! Gives zeros inside live blocks back to the host.

use std::ops::Range;

use super::{Announcement, Doubt, FreeBook, Maintenance};
use crate::disk::Content;
use crate::error::DiskError;
use crate::units::{BlockIndex, FileOffset, FileRange, GRANULE_SIZE, div_ceil};

/// What became of the zeros of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Punched {
    /// So many bytes were given back, and no more are there; durable with the next sync.
    All(u64),
    /// So many were, and there are more.
    Part(u64),
    /// Somebody was at the block.
    Busy,
    /// The host cannot: no block can be punched.
    Unsupported,
}

impl Maintenance<'_> {
    /// Whether the present `block` has zeros, or what is free by `book`, that the host may still store.
    pub(crate) fn is_worth_punching(
        self,
        block: BlockIndex,
        slot: FileOffset,
        book: Option<&FreeBook>,
    ) -> bool {
        let known = self.disk.known(book);
        match known.content(block) {
            // It stays, for without it the parent would show.
            Content::Dead => {
                let data = self.disk.geometry().data_range(slot);
                let stored = self.disk.image.storage().next_data(data.start, data.end());
                stored.map_or(true, |stored| stored.is_some())
            }
            _ => !known.punchable_runs(block).is_empty(),
        }
    }

    /// The zero granules of `block`, which lies in `slot`, and where they are in the file.
    pub(crate) fn punchable(
        self,
        block: BlockIndex,
        slot: FileOffset,
        book: Option<&FreeBook>,
    ) -> Vec<(Range<u64>, FileRange)> {
        let known = self.disk.known(book);
        let data = self.disk.geometry().data_range(slot);
        let runs = match known.content(block) {
            Content::Dead => vec![0..div_ceil(data.len, GRANULE_SIZE)],
            _ => known.punchable_runs(block),
        };
        let in_file = runs.into_iter().map(|run| {
            let start = data.start.plus(run.start * GRANULE_SIZE);
            let end = data.start.plus(run.end * GRANULE_SIZE).min(data.end());
            (run, FileRange::between(start, end))
        });
        in_file.collect()
    }

    /// Gives the zero granules of one block back to the host: `most` runs of them that it stores. With a
    /// `book`, when no guest is there to wait, all of them and what is free.
    ///
    /// # Errors
    /// The host's. With a [`Doubt`], nothing has changed.
    pub(crate) fn punch_block(
        self,
        block: BlockIndex,
        most: usize,
        book: Option<&FreeBook>,
        announcement: &mut Announcement,
    ) -> Result<Result<Punched, Doubt>, DiskError> {
        let disk = self.disk;
        let alone = book.map(|_| disk.writers.keep_out());
        if alone.as_ref().is_some_and(Option::is_none) {
            return Ok(Err(Doubt::WriterCame));
        }
        let Some(_gate) = disk.gates.try_exclusive(block) else {
            return Ok(Ok(Punched::Busy));
        };
        let Some(slot) = disk.image.map().get(block).slot() else {
            return Ok(Ok(Punched::All(0)));
        };
        // Asked under the gate: a write that comes later waits for it.
        if book.is_some_and(|book| !book.is_untouched(disk)) {
            return Ok(Err(Doubt::Written));
        }
        if book.is_some() && disk.tracker.content(block) != Content::Dead {
            announcement.make(disk)?;
        }
        let _change = disk.gates.change(block);
        let (mut bytes, mut left) = (0, most);
        for (run, range) in self.punchable(block, slot, book) {
            let stored = disk.image.storage().next_data(range.start, range.end());
            if book.is_none() && stored.is_ok_and(|stored| stored.is_none()) {
                continue;
            }
            if left == 0 && book.is_none() {
                return Ok(Ok(Punched::Part(bytes)));
            }
            left = left.saturating_sub(1);
            match disk.image.storage().punch_hole(range) {
                Ok(()) => bytes += range.len,
                Err(error) if error.kind() == std::io::ErrorKind::Unsupported => {
                    return Ok(Ok(Punched::Unsupported));
                }
                Err(error) => return Err(DiskError::io("punch zeros out of a block", error)),
            }
            disk.image.note_payload();
            if book.is_some() {
                let within = run.start * GRANULE_SIZE;
                for part in disk.written_parts(block, within..within + range.len)? {
                    disk.tracker
                        .note_zero(block, part.start, part.end - part.start, false);
                }
            }
        }
        disk.known(book).set_punched(block);
        disk.tracker.set_punched(block);
        Ok(Ok(Punched::All(bytes)))
    }
}
