//! How host files copy and zero where the host does not do it by itself.

use std::io;

use crate::storage::Storage;
use crate::units::{FileOffset, FileRange, usize_from};

/// Bytes that pass through memory at once.
const CHUNK: u64 = 1 << 20;

/// The parts of `range`, in order, none longer than [`CHUNK`].
fn chunks(range: FileRange) -> impl Iterator<Item = FileRange> {
    let mut rest = range;
    std::iter::from_fn(move || {
        let part = FileRange::new(rest.start, rest.len.min(CHUNK));
        rest = FileRange::between(part.end(), rest.end());
        (!part.is_empty()).then_some(part)
    })
}

/// What a host file's copies and zeros are made of. Whoever calls these has looked at the file's
/// length, and may hold what guards it: none of them asks for that again.
pub(super) trait Copying: Storage {
    /// Writes all of `buf` at `offset`, whatever the file's length.
    fn put(&self, buf: &[u8], offset: FileOffset) -> io::Result<()>;

    /// Makes `range`, which is inside the file, read as zeros with as little space as the host allows.
    fn clear(&self, range: FileRange) -> io::Result<()>;

    /// Copies bytes that the host stores.
    fn copy_data(&self, from: FileRange, to: FileOffset) -> io::Result<()> {
        self.copy_through_memory(from, to)
    }

    fn put_zeros(&self, range: FileRange) -> io::Result<()> {
        let zeros = vec![0; usize_from(range.len.min(CHUNK))];
        chunks(range).try_for_each(|part| self.put(&zeros[..usize_from(part.len)], part.start))
    }

    fn copy_through_memory(&self, from: FileRange, to: FileOffset) -> io::Result<()> {
        let mut buffer = vec![0; usize_from(from.len.min(CHUNK))];
        chunks(from).try_for_each(|part| {
            let buffer = &mut buffer[..usize_from(part.len)];
            self.read_exact_at(buffer, part.start)?;
            self.put(buffer, to.plus(part.start.since(from.start)))
        })
    }

    /// Copies data and holes, and extends the file to them. Holes stay holes: what was punched out of a
    /// block stays given back when it moves.
    fn copy_with_holes(&self, from: FileRange, to: FileOffset) -> io::Result<()> {
        let target = |at: FileOffset| to.plus(at.since(from.start));
        let mut at = from.start;
        while at < from.end() {
            let data = self.next_data(at, from.end())?;
            let data = data.unwrap_or(FileRange::between(from.end(), from.end()));
            self.clear_or_extend(FileRange::new(target(at), data.start.since(at)))?;
            self.copy_data(data, target(data.start))?;
            at = data.end();
        }
        Ok(())
    }

    /// [`Self::clear`] that extends the file to `range`.
    fn clear_or_extend(&self, range: FileRange) -> io::Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        if range.end().get() > self.len()? {
            // A write, since a new length could cut off what somebody else appends meanwhile.
            self.put(&[0], FileOffset::new(range.end().get() - 1))?;
        }
        self.clear(range)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::tests::range;

    #[test]
    fn chunks_cover_a_range() {
        let whole = range(5, 2 * CHUNK + 3);
        let parts: Vec<_> = chunks(whole).collect();
        assert_eq!(
            parts,
            [
                range(5, CHUNK),
                range(5 + CHUNK, CHUNK),
                range(5 + 2 * CHUNK, 3)
            ]
        );
        assert_eq!(chunks(range(5, 0)).count(), 0);
    }
}
