//! The free space tree: what the kernel allocates from. It is the extent tree turned round, so the two
//! must say the same.

use std::ops::Range;

use zerocopy::byteorder::little_endian::U32;
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use super::chunks::Chunks;
use super::damaged;
use super::extents::{Extents, joined};
use super::tree::{Forest, Key, Root};
use crate::guest::bits::clear_runs;
use crate::guest::raw::structure;
use crate::guest::{MAX_RUNS, Trouble};
use crate::units::u64_from;

const INFO: u8 = 198;
const EXTENT: u8 = 199;
const BITMAP: u8 = 200;

/// How a block group's free space is listed. [btrfs_tree.h `btrfs_free_space_info`]
#[derive(Clone, Copy, FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawInfo {
    /// 0: pieces of it.
    extents: U32,
    /// 4: bit 0: by bitmaps.
    flags: U32,
}

/// Checks that the free space tree lists what is free, once per block group.
///
/// # Errors
/// [`Trouble::Skip`] where it does not, or is damaged; [`Trouble::Io`].
pub(super) fn check(
    forest: &mut Forest<'_, '_>,
    tree: Root,
    extents: &Extents,
) -> Result<(), Trouble> {
    let unit = forest.fs.sector_size;
    let chunks = forest.chunks.clone();
    let mut list = List {
        chunks: &chunks,
        chunk: None,
        pieces: 0,
        pieces_expected: 0,
        infos: 0,
        free: Vec::new(),
    };
    forest.walk(tree, &mut |key, data| match key.kind {
        INFO => list.info(key, data),
        EXTENT => list.range(key, key.object..key.object.saturating_add(key.offset)),
        BITMAP => list.bitmap(key, data, unit),
        _ => Err(damaged(format_args!("the free space tree, with {key:?}"))),
    })?;
    list.end()?;
    let every = list.infos == chunks.iter().count();
    if every && joined(&list.free).eq(joined(&extents.free)) {
        Ok(())
    } else {
        Err(damaged(
            "a free space tree that disagrees with the extent tree",
        ))
    }
}

/// The free space tree, as it is read.
struct List<'a> {
    chunks: &'a Chunks,
    /// The block group that is being listed; `None` for one that is gone. Some versions of mkfs.btrfs
    /// left those in the tree.
    chunk: Option<Range<u64>>,
    /// Pieces of its free space, met and announced.
    pieces: u32,
    pieces_expected: u32,
    /// Block groups that are listed.
    infos: usize,
    /// Logical addresses, in order.
    free: Vec<Range<u64>>,
}

impl List<'_> {
    fn info(&mut self, key: Key, data: &[u8]) -> Result<(), Trouble> {
        self.end()?;
        let raw: RawInfo = structure(data, 0)?;
        let range = key.object..key.object.saturating_add(key.offset);
        let chunk = self.chunks.find(&range);
        let whole = chunk.and_then(|at| self.chunks.get(at));
        self.chunk = whole
            .filter(|chunk| chunk.start == range.start && chunk.end() == range.end)
            .map(|_| range);
        self.infos += usize::from(self.chunk.is_some());
        self.pieces = 0;
        self.pieces_expected = raw.extents.get();
        Ok(())
    }

    /// Ends the block group that is being listed.
    fn end(&self) -> Result<(), Trouble> {
        match &self.chunk {
            Some(chunk) if self.pieces != self.pieces_expected => Err(damaged(format_args!(
                "the free space tree, which counts the pieces of {} otherwise",
                chunk.start
            ))),
            _ => Ok(()),
        }
    }

    /// Notes a free range, which must lie in the block group that is being listed, or where none is.
    fn range(&mut self, key: Key, range: Range<u64>) -> Result<(), Trouble> {
        let wrong = || damaged(format_args!("the free space tree, with {key:?}"));
        let chunk = (self.chunk.as_ref())
            .filter(|chunk| chunk.start <= range.start && range.end <= chunk.end);
        let Some(chunk) = chunk.filter(|_| !range.is_empty()) else {
            return match self.chunks.touch(&range) {
                true => Err(wrong()),
                false => Ok(()),
            };
        };
        if self.free.len() >= MAX_RUNS {
            return Err(Trouble::skip("has too many pieces of free space"));
        }
        let last = self.free.last().map_or(0, |last| last.end);
        if range.start < last {
            return Err(wrong());
        }
        // A piece may go on in the next bitmap.
        let goes_on = range.start == last && range.start > chunk.start;
        self.pieces = self.pieces.saturating_add(u32::from(!goes_on));
        self.free.push(range);
        Ok(())
    }

    /// Notes the ranges of a bitmap, which has a set bit for each free `unit`.
    fn bitmap(&mut self, key: Key, data: &[u8], unit: u64) -> Result<(), Trouble> {
        let bits = key.offset / unit;
        let fits = u64_from(data.len()) == bits.div_ceil(8) && key.offset.is_multiple_of(unit);
        if !fits || key.object.checked_add(key.offset).is_none() {
            return Err(damaged(format_args!("the free space tree, with {key:?}")));
        }
        let used: Vec<u8> = data.iter().map(|byte| !byte).collect();
        for run in clear_runs(&used, bits) {
            let start = key.object + run.start * unit;
            self.range(key, start..key.object + run.end * unit)?;
        }
        Ok(())
    }
}
