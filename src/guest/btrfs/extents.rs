//! The extent tree, and the block groups: what of the chunks is allocated, and how much.

use std::ops::Range;

use zerocopy::byteorder::little_endian::U64;
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use super::chunks::{Chunk, Chunks};
use super::damaged;
use super::roots::Roots;
use super::tree::{Forest, Key};
use crate::guest::raw::structure;
use crate::guest::{MAX_RUNS, Trouble};

/// An extent of any kind, its length in the key; a node, its level there.
const EXTENT_ITEM: u8 = 168;
const METADATA_ITEM: u8 = 169;
/// Who refers to an extent: owner, tree block, data, shared block, shared data.
const REFERENCES: [u8; 5] = [OWNER, 176, DATA_REFERENCE, 182, 184];
const OWNER: u8 = 172;
const DATA_REFERENCE: u8 = 178;
const BLOCK_GROUP_ITEM: u8 = 192;

const FLAG_DATA: u64 = 1 << 0;
const FLAG_NODE: u64 = 1 << 1;

/// What an extent's item begins with. [btrfs_tree.h `btrfs_extent_item`]
#[derive(Clone, Copy, FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawExtent {
    references: U64,
    generation: U64,
    flags: U64,
}

/// A block group, which is what a chunk is seen from inside. [btrfs_tree.h `btrfs_block_group_item`]
#[derive(Clone, Copy, FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawBlockGroup {
    /// 0: bytes that are allocated.
    used: U64,
    /// 8: 256.
    chunk_object: U64,
    /// 16: the chunk's kind.
    flags: U64,
}

const EXTENT_LEN: usize = size_of::<RawExtent>();
const _: () = assert!(EXTENT_LEN == 24 && size_of::<RawBlockGroup>() == 24);

/// The reference that a file's data has most often. [btrfs_tree.h `btrfs_extent_data_ref`]
#[derive(Clone, Copy, FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawDataReference {
    /// 0: 178.
    kind: u8,
    /// 1: tree and inode of the file.
    file: [U64; 2],
    /// 17: where in the file.
    offset: U64,
}

/// The shortest beginning of a file that swap space is looked for in. Files for it are made in one
/// piece, and are as large as memory.
const MIN_SWAP: u64 = 256 << 10;

/// What of all chunks is free.
pub(super) struct Extents {
    /// Logical addresses, in order, none empty, each inside one chunk.
    pub(super) free: Vec<Range<u64>>,
    /// Logical addresses of what may be the beginnings of swap files.
    pub(super) may_be_swap: Vec<u64>,
}

impl Extents {
    /// Reads the extent tree and the block groups, which must agree.
    ///
    /// # Errors
    /// [`Trouble::Skip`] where they do not, or anything is damaged; [`Trouble::Io`].
    pub(super) fn read(forest: &mut Forest<'_, '_>, roots: &Roots) -> Result<Self, Trouble> {
        let fs = forest.fs;
        // The walk needs the forest, and what it finds the chunks.
        let chunks = forest.chunks.clone();
        let mut groups = BlockGroups::new(&chunks);
        if roots.block_group != roots.extent {
            forest.walk(roots.block_group, &mut |key, data| match key.kind {
                BLOCK_GROUP_ITEM => groups.add(key, data),
                _ => Err(damaged(format_args!("the block group tree, with {key:?}"))),
            })?;
        }
        let mut sweep = Sweep::new(&chunks);
        forest.walk(roots.extent, &mut |key, data| match key.kind {
            EXTENT_ITEM => sweep.extent(key, key.offset, fs.sector_size, data),
            METADATA_ITEM => sweep.extent(key, fs.node_size, fs.sector_size, data),
            BLOCK_GROUP_ITEM if roots.block_group == roots.extent => groups.add(key, data),
            kind if REFERENCES.contains(&kind) => Ok(()),
            _ => Err(damaged(format_args!("the extent tree, with {key:?}"))),
        })?;
        sweep.finish()?;
        let mut sum = 0_u64;
        for (index, chunk) in chunks.iter().enumerate() {
            if groups.used[index] != Some(sweep.used[index]) {
                return Err(damaged(format_args!(
                    "the block group at {}, whose extents are not what it counts",
                    chunk.start
                )));
            }
            sum = sum.saturating_add(sweep.used[index]);
        }
        if sum != fs.bytes_used {
            return Err(damaged("the count of bytes that are allocated"));
        }
        Ok(Self {
            free: sweep.free,
            may_be_swap: sweep.may_be_swap,
        })
    }

    /// Whether a logical address is free.
    pub(super) fn is_free(&self, address: u64) -> bool {
        self.has_free(&(address..address.saturating_add(1)))
    }

    /// Whether any part of a range of logical addresses is free.
    pub(super) fn has_free(&self, range: &Range<u64>) -> bool {
        let behind = (self.free).partition_point(|free| free.start < range.end);
        behind
            .checked_sub(1)
            .is_some_and(|at| self.free[at].end > range.start)
    }
}

/// What the block groups count.
struct BlockGroups<'a> {
    chunks: &'a Chunks,
    /// Of each chunk.
    used: Vec<Option<u64>>,
}

impl<'a> BlockGroups<'a> {
    fn new(chunks: &'a Chunks) -> Self {
        Self {
            chunks,
            used: vec![None; chunks.iter().count()],
        }
    }

    /// Notes a block group, of which each chunk must have one.
    fn add(&mut self, key: Key, data: &[u8]) -> Result<(), Trouble> {
        let raw: RawBlockGroup = structure(data, 0)?;
        let wrong = || damaged(format_args!("the block group at {}", key.object));
        let end = key.object.checked_add(key.offset).ok_or_else(wrong)?;
        let index = self.chunks.find(&(key.object..end)).ok_or_else(wrong)?;
        let same = |chunk: &Chunk| {
            chunk.start == key.object && chunk.len == key.offset && chunk.kind == raw.flags.get()
        };
        if !self.chunks.get(index).is_some_and(same) {
            return Err(wrong());
        }
        match self.used[index].replace(raw.used.get()) {
            None => Ok(()),
            Some(_) => Err(wrong()),
        }
    }
}

/// Finds what lies between the extents, as they come.
struct Sweep<'a> {
    chunks: Vec<&'a Chunk>,
    all: &'a Chunks,
    /// The chunk that the last extent lay in, and where that ended.
    chunk: usize,
    at: u64,
    /// Allocated bytes of each chunk.
    used: Vec<u64>,
    free: Vec<Range<u64>>,
    may_be_swap: Vec<u64>,
}

impl<'a> Sweep<'a> {
    fn new(all: &'a Chunks) -> Self {
        let chunks: Vec<_> = all.iter().collect();
        Self {
            all,
            chunk: 0,
            at: chunks.first().map_or(0, |chunk| chunk.start),
            used: vec![0; chunks.len()],
            chunks,
            free: Vec::new(),
            may_be_swap: Vec::new(),
        }
    }

    /// Notes the extent of `len` bytes at `key`.
    fn extent(&mut self, key: Key, len: u64, unit: u64, data: &[u8]) -> Result<(), Trouble> {
        let wrong = || damaged(format_args!("the extent at {}", key.object));
        let raw: RawExtent = structure(data, 0)?;
        let end = key.object.checked_add(len).ok_or_else(wrong)?;
        let index = self.all.find(&(key.object..end)).ok_or_else(wrong)?;
        let chunk = self.chunks[index];
        let of_its_kind = match raw.flags.get() & (FLAG_DATA | FLAG_NODE) {
            FLAG_DATA => chunk.holds_data() && key.kind == EXTENT_ITEM,
            FLAG_NODE => chunk.holds_nodes(),
            _ => false,
        };
        let sound = index >= self.chunk
            && (index > self.chunk || key.object >= self.at)
            && key.object.is_multiple_of(unit)
            && len.is_multiple_of(unit)
            && raw.references.get() > 0
            && of_its_kind;
        if !sound {
            return Err(wrong());
        }
        if len >= MIN_SWAP && begins_a_file(&raw, data)? {
            self.may_be_swap.push(key.object);
        }
        self.go_to(index)?;
        self.gap(key.object)?;
        self.at = end;
        self.used[index] += len;
        Ok(())
    }

    /// Ends all chunks before number `index`.
    fn go_to(&mut self, index: usize) -> Result<(), Trouble> {
        while self.chunk < index {
            self.gap(self.chunks[self.chunk].end())?;
            self.chunk += 1;
            self.at = self.chunks[self.chunk].start;
        }
        Ok(())
    }

    /// What lies between here and `end` of the same chunk is free.
    fn gap(&mut self, end: u64) -> Result<(), Trouble> {
        if self.free.len() >= MAX_RUNS {
            return Err(Trouble::skip("has too many pieces of free space"));
        }
        if self.at < end {
            self.free.push(self.at..end);
        }
        Ok(())
    }

    /// Ends the last chunk.
    fn finish(&mut self) -> Result<(), Trouble> {
        let Some(last) = self.chunks.len().checked_sub(1) else {
            return Ok(());
        };
        self.go_to(last)?;
        self.gap(self.chunks[last].end())
    }
}

/// Whether an extent is the beginning of one file, as each file for swap space must have it for itself.
fn begins_a_file(raw: &RawExtent, data: &[u8]) -> Result<bool, Trouble> {
    if raw.references.get() != 1 || raw.flags.get() & FLAG_DATA == 0 {
        return Ok(false);
    }
    // With simple quotas, the owner stands in front.
    let at = match data.get(EXTENT_LEN) {
        Some(&OWNER) => EXTENT_LEN + 9,
        _ => EXTENT_LEN,
    };
    if data.len() < at + size_of::<RawDataReference>() {
        return Ok(false);
    }
    let reference: RawDataReference = structure(data, at)?;
    Ok(reference.kind == DATA_REFERENCE && reference.offset.get() == 0)
}

/// Joins ranges that touch.
pub(super) fn joined(ranges: &[Range<u64>]) -> impl Iterator<Item = Range<u64>> + '_ {
    let mut at = 0;
    std::iter::from_fn(move || {
        let mut found = ranges.get(at)?.clone();
        at += 1;
        while let Some(next) = ranges.get(at).filter(|next| next.start == found.end) {
            found.end = next.end;
            at += 1;
        }
        Some(found)
    })
}
