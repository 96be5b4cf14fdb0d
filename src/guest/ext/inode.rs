//! Inodes, and where a file's blocks lie: needed of the journal and of the file of orphans only.

use std::ops::Range;

use rangemap::RangeSet;
use zerocopy::byteorder::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::blocks::Blocks;
use super::checksum::{Checksums, without};
use super::groups::Groups;
use super::superblock::Geometry;
use crate::guest::Trouble;
use crate::units::usize_from;

/// The mode of a regular file, and the bits that tell it. (`S_IFREG`, `S_IFMT`)
const REGULAR: u16 = 0x8000;
const KIND: u16 = 0xf000;
/// The file's blocks are found by a tree of extents. (`EXT4_EXTENTS_FL`)
const FLAG_EXTENTS: u32 = 0x8_0000;
/// Flags of files whose bytes do not simply lie in their blocks: compressed, encrypted, with verity,
/// inline.
const FLAGS_ODD: u32 = 0x1010_0804;
/// Where in an inode the halves of its checksum are, and what `i_extra_isize` is at least where there
/// is an upper half.
const CHECKSUM_LO_AT: u64 = 0x7c;
const CHECKSUM_HI_AT: u64 = 0x82;
const EXTRA_WITH_CHECKSUM: u16 = 4;
/// In how many pieces a journal may lie: they are a few, unless somebody means mischief.
const MAX_RUNS: usize = 1 << 16;
/// More than a journal may have (`JBD2_MAX_JOURNAL_BLOCKS`).
const MAX_BLOCKS: u64 = 16 << 20;

const EXTENT_MAGIC: u16 = 0xf30a;
/// Levels of a tree of extents (`EXT4_MAX_EXTENT_DEPTH`).
const MAX_DEPTH: u16 = 5;
/// An extent of more blocks is one that was never written.
const MAX_EXTENT_LEN: u16 = 1 << 15;
const EXTENT_LEN: usize = 12;

/// The start of an inode. `struct ext4_inode`, `fs/ext4/ext4.h`
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawInode {
    /// 0x00: `i_mode`.
    mode: U16,
    /// 0x02: `i_uid`.
    uid: U16,
    /// 0x04: `i_size_lo`, in bytes.
    size_lo: U32,
    /// 0x08: `i_atime` to `i_gid`.
    times: [u8; 18],
    /// 0x1a: `i_links_count`.
    links_count: U16,
    /// 0x1c: `i_blocks_lo`.
    blocks_lo: U32,
    /// 0x20: `i_flags`.
    flags: U32,
    /// 0x24: `i_osd1`.
    osd1: U32,
    /// 0x28: `i_block`: block numbers, or the root of a tree of extents.
    block: [u8; 60],
    /// 0x64: `i_generation`.
    generation: U32,
    /// 0x68: `i_file_acl_lo`.
    file_acl_lo: U32,
    /// 0x6c: `i_size_high`.
    size_high: U32,
    /// 0x70: `i_obso_faddr`, `i_osd2` up to the checksum.
    osd2: [u8; 12],
    /// 0x7c: `l_i_checksum_lo`.
    checksum_lo: U16,
    /// 0x7e: `l_i_reserved`.
    reserved: U16,
}

/// What a node of a tree of extents begins with. `struct ext4_extent_header`, `fs/ext4/ext4_extents.h`
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawExtentHeader {
    /// 0: `eh_magic`.
    magic: U16,
    /// 2: `eh_entries`.
    entries: U16,
    /// 4: `eh_max`: how many fit.
    max: U16,
    /// 6: `eh_depth`: 0 of a leaf.
    depth: U16,
    /// 8: `eh_generation`.
    generation: U32,
}

/// `struct ext4_extent`.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawExtent {
    /// 0: `ee_block`: the first of the file's blocks.
    block: U32,
    /// 4: `ee_len`.
    len: U16,
    /// 6: `ee_start_hi`.
    start_hi: U16,
    /// 8: `ee_start_lo`: where it lies.
    start_lo: U32,
}

/// `struct ext4_extent_idx`.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawExtentIndex {
    /// 0: `ei_block`: the first of the file's blocks below it.
    block: U32,
    /// 4: `ei_leaf_lo`: the block of the node.
    leaf_lo: U32,
    /// 8: `ei_leaf_hi`.
    leaf_hi: U16,
    /// 10: `ei_unused`.
    unused: U16,
}

const _: () = {
    assert!(size_of::<RawInode>() == 128);
    assert!(size_of::<RawExtentHeader>() == EXTENT_LEN);
    assert!(size_of::<RawExtent>() == EXTENT_LEN);
    assert!(size_of::<RawExtentIndex>() == EXTENT_LEN);
};

/// A regular file without holes: where its blocks lie.
#[derive(Clone, Debug, Default)]
pub(super) struct File {
    /// In the file's order, each with the number of its first block in the file.
    runs: Vec<(u64, Range<u64>)>,
    /// All its blocks, and those that say where they are.
    own: RangeSet<u64>,
    /// How many blocks the runs have.
    found: u64,
    /// How many the file's size says.
    pub(super) blocks: u64,
}

impl File {
    /// Finds the blocks of inode `number`.
    ///
    /// # Errors
    /// [`Trouble::Skip`] where it is no regular file, is damaged, or has holes.
    pub(super) fn open(
        blocks: &Blocks<'_>,
        geometry: &Geometry,
        number: u32,
    ) -> Result<Self, Trouble> {
        let (inode, checksums) = read(blocks, geometry, number)?;
        let odd = inode.flags.get() & FLAGS_ODD != 0;
        if inode.mode.get() & KIND != REGULAR || inode.links_count.get() == 0 || odd {
            return Err(bad(number, "is no plain file"));
        }
        let size = u64::from(inode.size_high.get()) << 32 | u64::from(inode.size_lo.get());
        let mut file = Self {
            blocks: size / geometry.block_size,
            ..Self::default()
        };
        if size == 0 || size % geometry.block_size != 0 || file.blocks > MAX_BLOCKS {
            return Err(bad(number, "has a wrong size"));
        }
        let mut walk = Walk {
            blocks,
            geometry,
            checksums,
            number,
            file: &mut file,
        };
        match inode.flags.get() & FLAG_EXTENTS {
            0 => walk.indirect(&inode.block)?,
            _ => walk.extents(&inode.block, None)?,
        }
        if file.found < file.blocks {
            return Err(bad(number, "has holes"));
        }
        Ok(file)
    }

    /// Where the file's block `index` lies.
    pub(super) fn place(&self, index: u64) -> Option<u64> {
        let behind = self.runs.partition_point(|(first, _)| *first <= index);
        let (first, run) = self.runs.get(behind.checked_sub(1)?)?;
        let place = run.start + (index - first);
        (place < run.end).then_some(place)
    }

    /// All blocks that belong to the file, those that say where it lies among them.
    pub(super) fn all(&self) -> impl Iterator<Item = Range<u64>> {
        self.own.iter().cloned()
    }

    /// Whether `block` belongs to the file.
    pub(super) fn holds(&self, block: u64) -> bool {
        self.own.contains(&block)
    }
}

fn bad(number: u32, what: &str) -> Trouble {
    Trouble::skip(format!("has an inode {number} that {what}"))
}

/// Reads inode `number`, with the checksums of what belongs to it.
fn read(
    blocks: &Blocks<'_>,
    geometry: &Geometry,
    number: u32,
) -> Result<(RawInode, Checksums), Trouble> {
    let index = u64::from(number).checked_sub(1);
    let Some(index) = index.filter(|index| index / geometry.inodes_per_group < geometry.groups)
    else {
        return Err(bad(number, "does not exist"));
    };
    let group = Groups::new(blocks, geometry).get(index / geometry.inodes_per_group)?;
    let at = index % geometry.inodes_per_group * geometry.inode_size;
    let block = blocks.read(group.inode_table + at / geometry.block_size)?;
    let at = usize_from(at % geometry.block_size);
    let bytes = &block[at..at + usize_from(geometry.inode_size)];
    let (inode, rest) =
        RawInode::read_from_prefix(bytes).map_err(|_| bad(number, "is too short"))?;
    let checksums = geometry.checksums.of_inode(number, inode.generation.get());
    let extra = rest
        .first_chunk()
        .map_or(0, |size| u16::from_le_bytes(*size));
    let wide = extra >= EXTRA_WITH_CHECKSUM;
    let mut sum = u32::from(inode.checksum_lo.get());
    let mut blank = without(bytes, CHECKSUM_LO_AT, 2);
    if wide {
        let high = usize_from(CHECKSUM_HI_AT);
        sum |= u32::from(u16::from_le_bytes([bytes[high], bytes[high + 1]])) << 16;
        blank = without(&blank, CHECKSUM_HI_AT, 2);
    }
    match checksums.is_right(&blank, sum, wide) {
        true => Ok((inode, checksums)),
        false => Err(bad(number, "has a wrong checksum")),
    }
}

/// On the way through what says where a file's blocks lie.
struct Walk<'w> {
    blocks: &'w Blocks<'w>,
    geometry: &'w Geometry,
    checksums: Checksums,
    number: u32,
    file: &'w mut File,
}

impl Walk<'_> {
    fn bad(&self, what: &str) -> Trouble {
        bad(self.number, what)
    }

    /// Takes blocks that exist and are not the file's yet.
    fn take(&mut self, start: u64, len: u64) -> Result<Range<u64>, Trouble> {
        let run = start..start.saturating_add(len);
        if !self.geometry.has_blocks(&run) {
            return Err(self.bad("has blocks that do not exist"));
        }
        if self.file.own.overlaps(&run) {
            return Err(self.bad("has a block twice"));
        }
        self.file.own.insert(run.clone());
        match self.file.own.len() > MAX_RUNS || self.file.found > MAX_BLOCKS {
            true => Err(self.bad("lies in too many pieces")),
            false => Ok(run),
        }
    }

    /// Adds `len` blocks from `start` on, which are the file's next.
    fn add(&mut self, start: u64, len: u64) -> Result<(), Trouble> {
        let run = self.take(start, len)?;
        match self.file.runs.last_mut() {
            Some((_, last)) if last.end == run.start => last.end = run.end,
            _ => self.file.runs.push((self.file.found, run)),
        }
        self.file.found += len;
        Ok(())
    }

    fn node(&mut self, block: u64) -> Result<Vec<u8>, Trouble> {
        self.take(block, 1)?;
        self.blocks.read(block)
    }

    /// A node of a tree of extents, of this `depth` unless it is the root.
    fn extents(&mut self, node: &[u8], depth: Option<u16>) -> Result<(), Trouble> {
        let number = self.number;
        let damaged = || bad(number, "has a damaged tree of extents");
        let (header, body) = RawExtentHeader::read_from_prefix(node).map_err(|_| damaged())?;
        let (entries, max) = (
            usize::from(header.entries.get()),
            usize::from(header.max.get()),
        );
        let found = header.depth.get();
        if header.magic.get() != EXTENT_MAGIC
            || depth.is_some_and(|depth| depth != found)
            || found > MAX_DEPTH
            || entries > max
            || max > body.len() / EXTENT_LEN
            || depth.is_some() && entries == 0
        {
            return Err(damaged());
        }
        if depth.is_some() {
            let (covered, sum) = node.split_at(EXTENT_LEN * (1 + max));
            let sum = sum.first_chunk().map_or(0, |sum| u32::from_le_bytes(*sum));
            if !self.checksums.is_right(covered, sum, true) {
                return Err(damaged());
            }
        }
        for entry in body.chunks_exact(EXTENT_LEN).take(entries) {
            if found > 0 {
                let entry = RawExtentIndex::read_from_bytes(entry).map_err(|_| damaged())?;
                if u64::from(entry.block.get()) != self.file.found {
                    return Err(damaged());
                }
                let at = u64::from(entry.leaf_hi.get()) << 32 | u64::from(entry.leaf_lo.get());
                let below = self.node(at)?;
                self.extents(&below, Some(found - 1))?;
                continue;
            }
            let entry = RawExtent::read_from_bytes(entry).map_err(|_| damaged())?;
            let len = entry.len.get();
            if u64::from(entry.block.get()) != self.file.found || len == 0 || len > MAX_EXTENT_LEN {
                return Err(self.bad("has holes"));
            }
            let at = u64::from(entry.start_hi.get()) << 32 | u64::from(entry.start_lo.get());
            self.add(at, u64::from(len))?;
        }
        Ok(())
    }

    /// 12 block numbers, then one of a block of them, one of a block of such, and once more.
    fn indirect(&mut self, numbers: &[u8; 60]) -> Result<(), Trouble> {
        for (place, number) in numbers.chunks_exact(4).enumerate() {
            let levels = place.saturating_sub(11);
            self.below(number, levels)?;
        }
        Ok(())
    }

    /// What the block number in `number` stands for: a block of the file, or one of numbers.
    fn below(&mut self, number: &[u8], levels: usize) -> Result<(), Trouble> {
        if self.file.found >= self.file.blocks {
            return Ok(());
        }
        let number = number.first_chunk().map_or(0, |n| u32::from_le_bytes(*n));
        if number == 0 {
            return Err(self.bad("has holes"));
        }
        if levels == 0 {
            return self.add(u64::from(number), 1);
        }
        let numbers = self.node(u64::from(number))?;
        for number in numbers.chunks_exact(4) {
            self.below(number, levels - 1)?;
        }
        Ok(())
    }
}

/// The list of inodes that are to be deleted or cut when the filesystem is mounted next, where a file
/// has it. (`fs/ext4/orphan.c`)
///
/// # Errors
/// [`Trouble`] where it cannot be read.
pub(super) fn has_orphans(
    blocks: &Blocks<'_>,
    geometry: &Geometry,
    number: u32,
) -> Result<bool, Trouble> {
    /// What ends each block: a magic number and a checksum.
    const TAIL_LEN: usize = 8;
    const MAGIC: u32 = 0x0b10_ca04;
    /// As many as e2fsprogs makes (`EXT4_MAX_ORPHAN_FILE_BLOCKS`).
    const MAX_LEN: u64 = 512;
    let (_, checksums) = read(blocks, geometry, number)?;
    let file = File::open(blocks, geometry, number)?;
    if file.blocks > MAX_LEN {
        return Err(bad(number, "is no list of orphans"));
    }
    for place in (0..file.blocks).filter_map(|index| file.place(index)) {
        let bytes = blocks.read(place)?;
        let (list, tail) = bytes.split_at(bytes.len() - TAIL_LEN);
        let word = |at: usize| {
            let word = tail[at..].first_chunk();
            word.map_or(0, |word| u32::from_le_bytes(*word))
        };
        let mut covered = place.to_le_bytes().to_vec();
        covered.extend_from_slice(list);
        if word(0) != MAGIC || !checksums.is_right(&covered, word(4), true) {
            return Err(bad(number, "is a damaged list of orphans"));
        }
        if list.iter().any(|byte| *byte != 0) {
            return Ok(true);
        }
    }
    Ok(false)
}
