//! A walk through a free-space btree of an allocation group, which believes nothing.
//!
//! Each group has two: one sorted by where the free runs begin, one by how long they are. Every block
//! of them is checked for itself (checksum, place, owner), against its parent (level, first key) and
//! against its neighbours (siblings, order). As the records of the whole walk must ascend, no block
//! can be met twice. [xfs_format.h `xfs_btree_block`, xfs_alloc_btree.c]

use zerocopy::byteorder::big_endian::{U16, U32 as Be32, U64};
use zerocopy::byteorder::little_endian::U32 as Le32;
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use super::damaged;
use super::superblock::Superblock;
use crate::guest::Trouble;
use crate::guest::raw::{crc32c_without, structure};
use crate::guest::view::View;
use crate::units::usize_from_u32;

/// The most levels of a btree in a group. [xfs_types.h `XFS_BTREE_MAXLEVELS`]
pub(super) const MAX_LEVELS: u32 = 9;
const NO_SIBLING: u32 = u32::MAX;
const CRC_AT: usize = 52;
const RECORD_LEN: usize = 8;
const POINTER_LEN: usize = 4;

/// What every block begins with.
#[derive(Clone, Copy, FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawBlock {
    /// 0: which btree, and which version.
    magic: [u8; 4],
    /// 4: 0 for a leaf.
    level: U16,
    /// 6: records, or keys and pointers.
    count: U16,
    /// 8: block before it in its level.
    left: Be32,
    /// 12: block behind it in its level.
    right: Be32,
}

/// What follows in version 5.
#[derive(Clone, Copy, FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawIdentity {
    /// 16: its place, in 512-byte units of the device.
    place: U64,
    /// 24: last write.
    lsn: U64,
    /// 32: of the filesystem.
    uuid: [u8; 16],
    /// 48: allocation group.
    owner: Be32,
    /// 52: CRC-32C of the block.
    crc: Le32,
}

const HEADER_LEN: usize = size_of::<RawBlock>();
const _: () = assert!(HEADER_LEN == 16 && size_of::<RawIdentity>() == 40);

/// A free run; records and keys are the same here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawRun {
    start: Be32,
    count: Be32,
}

/// A run of free blocks in a group, not empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) start: u32,
    pub(super) count: u32,
}

impl Run {
    /// The block behind it.
    pub(super) fn end(self) -> u64 {
        u64::from(self.start) + u64::from(self.count)
    }
}

/// Which of the two btrees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    ByBlock,
    ByCount,
}

impl Kind {
    fn magic(self, has_crc: bool) -> [u8; 4] {
        match (self, has_crc) {
            (Self::ByBlock, false) => *b"ABTB",
            (Self::ByBlock, true) => *b"AB3B",
            (Self::ByCount, false) => *b"ABTC",
            (Self::ByCount, true) => *b"AB3C",
        }
    }

    /// Whether `next` may follow `run`.
    fn in_order(self, run: Run, next: Run) -> bool {
        match self {
            Self::ByBlock => run.end() <= u64::from(next.start),
            Self::ByCount => (run.count, run.start) < (next.count, next.start),
        }
    }
}

/// Which btree, and where it begins.
#[derive(Clone, Copy, Debug)]
pub(super) struct Root {
    pub(super) kind: Kind,
    pub(super) group: u32,
    pub(super) block: u32,
    /// At least 1.
    pub(super) levels: u32,
}

/// A walk from a root to all records.
pub(super) struct Walk<'a, 'v, F> {
    view: &'a View<'v>,
    fs: &'a Superblock,
    root: Root,
    /// For each level, the block met last, and the one that it says comes next.
    met: Vec<Option<(u32, u32)>>,
    last: Option<Run>,
    /// All blocks of the btree.
    pub(super) blocks: Vec<u32>,
    each: F,
}

impl<'a, 'v, F: FnMut(Run) -> Result<(), Trouble>> Walk<'a, 'v, F> {
    /// Gives every free run to `each`, in the order of the btree. The blocks of the btree are what is
    /// returned.
    ///
    /// # Errors
    /// [`Trouble::Skip`] where it is not a sound btree; what `each` says.
    pub(super) fn all(
        view: &'a View<'v>,
        fs: &'a Superblock,
        root: Root,
        each: F,
    ) -> Result<Vec<u32>, Trouble> {
        if !(1..=MAX_LEVELS).contains(&root.levels) {
            return Err(damaged(format_args!("the AGF of group {}", root.group)));
        }
        let mut walk = Self {
            view,
            fs,
            root,
            met: vec![None; usize_from_u32(root.levels)],
            last: None,
            blocks: Vec::new(),
            each,
        };
        walk.visit(root.block, root.levels - 1, None)?;
        // Nothing may follow the last block of a level.
        if (walk.met.iter().flatten()).any(|(_, right)| *right != NO_SIBLING) {
            return Err(walk.damaged(root.block));
        }
        Ok(walk.blocks)
    }

    fn damaged(&self, block: u32) -> Trouble {
        damaged(format_args!(
            "block {block} of group {}, in its free-space btrees",
            self.root.group
        ))
    }

    /// Walks through `block` and all below. `first` is what the parent says it begins with.
    fn visit(&mut self, block: u32, level: u32, first: Option<Run>) -> Result<(), Trouble> {
        let bytes = self.read(block)?;
        let header: RawBlock = structure(&bytes, 0)?;
        let header_len = if self.fs.has_crc { 56 } else { HEADER_LEN };
        let entry_len = RECORD_LEN + if level > 0 { POINTER_LEN } else { 0 };
        let room = (bytes.len() - header_len) / entry_len;
        let count = usize::from(header.count.get());
        // Only the root may be empty, and then it is a leaf.
        let is_empty_root = first.is_none() && level == 0 && count == 0;
        let before = self.met[usize_from_u32(level)];
        let sound = u32::from(header.level.get()) == level
            && (count > 0 || is_empty_root)
            && count <= room
            && header.left.get() == before.map_or(NO_SIBLING, |(block, _)| block)
            && before.is_none_or(|(_, right)| right == block);
        if !sound {
            return Err(self.damaged(block));
        }
        self.met[usize_from_u32(level)] = Some((block, header.right.get()));
        let mut first = first;
        for index in 0..count {
            let raw: RawRun = structure(&bytes, header_len + index * RECORD_LEN)?;
            let run = self.run(block, raw)?;
            // Of the btree by blocks, only where a run begins is kept up to date further up.
            let as_announced = first.take().is_none_or(|first| match self.root.kind {
                Kind::ByBlock => first.start == run.start,
                Kind::ByCount => first == run,
            });
            if !as_announced {
                return Err(self.damaged(block));
            }
            if level > 0 {
                let at = header_len + room * RECORD_LEN + index * POINTER_LEN;
                let child: Be32 = structure(&bytes, at)?;
                self.visit(child.get(), level - 1, Some(run))?;
            } else {
                if (self.last).is_some_and(|last| !self.root.kind.in_order(last, run)) {
                    return Err(self.damaged(block));
                }
                self.last = Some(run);
                (self.each)(run)?;
            }
        }
        Ok(())
    }

    /// Checks a record or key, found in `block`, by itself.
    fn run(&self, block: u32, raw: RawRun) -> Result<Run, Trouble> {
        let run = Run {
            start: raw.start.get(),
            count: raw.count.get(),
        };
        let inside = run.start >= self.fs.header_blocks()
            && run.count > 0
            && run.end() <= u64::from(self.fs.blocks_of(self.root.group));
        if inside {
            Ok(run)
        } else {
            Err(self.damaged(block))
        }
    }

    /// Reads a block and checks that it is one of this btree.
    fn read(&mut self, block: u32) -> Result<Vec<u8>, Trouble> {
        let (fs, group) = (self.fs, self.root.group);
        // More blocks than the group has would be a btree with a loop in it.
        let in_group = (fs.header_blocks()..fs.blocks_of(group)).contains(&block);
        if !in_group || self.blocks.len() >= usize_from_u32(fs.blocks_of(group)) {
            return Err(self.damaged(block));
        }
        self.blocks.push(block);
        let offset = fs.offset(group, block);
        let bytes = self.view.read(offset, fs.block_size)?;
        let header: RawBlock = structure(&bytes, 0)?;
        if header.magic != self.root.kind.magic(fs.has_crc) {
            return Err(self.damaged(block));
        }
        if fs.has_crc {
            let identity: RawIdentity = structure(&bytes, HEADER_LEN)?;
            let sound = identity.crc.get() == crc32c_without(&bytes, CRC_AT)
                && identity.place.get() == offset / 512
                && identity.uuid == fs.meta_uuid
                && identity.owner.get() == group;
            if !sound {
                return Err(self.damaged(block));
            }
        }
        Ok(bytes)
    }
}
