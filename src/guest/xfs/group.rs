//! An allocation group: its headers, and what its btrees call free.

use std::ops::Range;

use zerocopy::byteorder::big_endian::{U32 as Be32, U64};
use zerocopy::byteorder::little_endian::U32 as Le32;
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use super::btree::{Kind, Root, Run, Walk};
use super::damaged;
use super::superblock::Superblock;
use crate::guest::raw::{crc32c_without, structure};
use crate::guest::view::View;
use crate::guest::{MAX_RUNS, Trouble};
use crate::units::{u64_from, usize_from};

const VERSION: u32 = 1;
const AGF_CRC_AT: usize = 216;
const AGI_CRC_AT: usize = 312;
const AGFL_CRC_AT: usize = 32;

/// The second sector: free space. [xfs_format.h `xfs_agf`]
#[derive(Clone, Copy, FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawAgf {
    /// 0: `XAGF`.
    magic: [u8; 4],
    /// 4: 1.
    version: Be32,
    /// 8: number of the group.
    group: Be32,
    /// 12: its blocks.
    length: Be32,
    /// 16: roots by block, by count, of the reverse map.
    roots: [Be32; 3],
    /// 28: their levels.
    levels: [Be32; 3],
    /// 40: first entry of the free list that is in use.
    list_first: Be32,
    /// 44: the last one.
    list_last: Be32,
    /// 48: how many are.
    list_count: Be32,
    /// 52: blocks in the free-space btrees' records.
    free_blocks: Be32,
    /// 56: the longest run.
    longest: Be32,
    /// 60: blocks of the three btrees, without their roots.
    btree_blocks: Be32,
    /// 64: of the filesystem.
    uuid: [u8; 16],
    /// 80: blocks of the reverse map.
    reverse_map_blocks: Be32,
    /// 84: blocks of the reference counts.
    refcount_blocks: Be32,
    /// 88: their root.
    refcount_root: Be32,
    /// 92: their levels.
    refcount_levels: Be32,
    /// 96: spare.
    spare: [U64; 14],
    /// 208: last write.
    lsn: U64,
    /// 216: CRC-32C of the sector.
    crc: Le32,
    /// 220: spare.
    spare2: Be32,
}

/// The third sector: inodes. [xfs_format.h `xfs_agi`]
#[derive(Clone, Copy, FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawAgi {
    /// 0: `XAGI`.
    magic: [u8; 4],
    /// 4: 1.
    version: Be32,
    /// 8: number of the group.
    group: Be32,
    /// 12: its blocks.
    length: Be32,
    /// 16: inodes.
    inodes: Be32,
    /// 20: root of the inode btree.
    root: Be32,
    /// 24: its levels, free inodes, the newest inode, a relic.
    numbers: [Be32; 4],
    /// 40: inodes that are unlinked and open.
    unlinked: [Be32; 64],
    /// 296: of the filesystem.
    uuid: [u8; 16],
    /// 312: CRC-32C of the sector.
    crc: Le32,
    /// 316: padding.
    padding: Be32,
    /// 320: last write.
    lsn: U64,
    /// 328: root of the free-inode btree.
    free_root: Be32,
}

/// What the fourth sector begins with in version 5: the free list. [xfs_format.h `xfs_agfl`]
#[derive(Clone, Copy, FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawAgfl {
    /// 0: `XAFL`.
    magic: [u8; 4],
    /// 4: number of the group.
    group: Be32,
    /// 8: of the filesystem.
    uuid: [u8; 16],
    /// 24: last write.
    lsn: U64,
    /// 32: CRC-32C of the sector.
    crc: Le32,
}

const _: () = assert!(size_of::<RawAgf>() == 224);
const _: () = assert!(size_of::<RawAgi>() == 332);
const _: () = assert!(size_of::<RawAgfl>() == 36);

/// What is free in a group.
pub(super) struct Group {
    /// In ascending order.
    pub(super) free: Vec<Run>,
    /// Blocks in its free list.
    pub(super) at_hand: u64,
    /// Blocks of its btrees that count as free.
    pub(super) in_btrees: u64,
}

/// Reads group `index`.
///
/// # Errors
/// [`Trouble::Skip`] where anything about it is in doubt; [`Trouble::Io`].
pub(super) fn read(view: &View<'_>, fs: &Superblock, index: u32) -> Result<Group, Trouble> {
    let headers = view.read(fs.offset(index, 0), 4 * fs.sector_size)?;
    let sector = |number: u64| {
        &headers[usize_from(number * fs.sector_size)..usize_from((number + 1) * fs.sector_size)]
    };
    fs.check_copy(index, sector(0))?;
    let agf = agf(fs, index, sector(1))?;
    let agi = agi(fs, index, sector(2))?;
    let list = free_list(fs, index, &agf, sector(3))?;

    let by_block = |kind: usize| Root {
        kind: [Kind::ByBlock, Kind::ByCount][kind],
        group: index,
        block: agf.roots[kind].get(),
        levels: agf.levels[kind].get(),
    };
    let mut free: Vec<Run> = Vec::new();
    let block_tree = Walk::all(view, fs, by_block(0), |run| {
        if free.len() >= MAX_RUNS {
            return Err(Trouble::skip("has too many pieces of free space"));
        }
        free.push(run);
        Ok(())
    })?;
    let mut met = 0_usize;
    let mut longest = 0;
    let count_tree = Walk::all(view, fs, by_block(1), |run| {
        let same = free.binary_search_by_key(&run.start, |run| run.start);
        if same.is_ok_and(|at| free[at] == run) {
            met += 1;
            longest = run.count;
            return Ok(());
        }
        Err(disagree(index))
    })?;
    // Both have each run once, so that as many are the same ones.
    let sum: u64 = free.iter().map(|run| u64::from(run.count)).sum();
    if met != free.len() || sum != u64::from(agf.free_blocks.get()) || longest != agf.longest.get()
    {
        return Err(disagree(index));
    }
    let in_btrees = btree_blocks(fs, index, &agf, &block_tree, &count_tree)?;
    let mut used: Vec<_> = std::iter::once(0..fs.header_blocks()).collect();
    let single = |block: &u32| *block..block.saturating_add(1);
    used.extend((block_tree.iter().chain(&count_tree).chain(&list)).map(single));
    used.extend(known_in_use(fs, index, &agf, &agi));
    if let Some(wrong) = used.iter().find(|range| overlaps(&free, range)) {
        return Err(damaged(format_args!(
            "block {} of group {index}, which is both free and in use",
            wrong.start
        )));
    }
    Ok(Group {
        free,
        at_hand: u64_from(list.len()),
        in_btrees,
    })
}

fn disagree(group: u32) -> Trouble {
    damaged(format_args!(
        "group {group}, where what counts its free blocks disagrees"
    ))
}

fn agf(fs: &Superblock, index: u32, sector: &[u8]) -> Result<RawAgf, Trouble> {
    let agf: RawAgf = structure(sector, 0)?;
    let sound = agf.magic == *b"XAGF"
        && agf.version.get() == VERSION
        && agf.group.get() == index
        && agf.length.get() == fs.blocks_of(index)
        && (!fs.has_crc
            || (agf.uuid == fs.meta_uuid && agf.crc.get() == crc32c_without(sector, AGF_CRC_AT)));
    if sound {
        Ok(agf)
    } else {
        Err(damaged(format_args!("the AGF of group {index}")))
    }
}

fn agi(fs: &Superblock, index: u32, sector: &[u8]) -> Result<RawAgi, Trouble> {
    let agi: RawAgi = structure(sector, 0)?;
    let sound = agi.magic == *b"XAGI"
        && agi.version.get() == VERSION
        && agi.group.get() == index
        && agi.length.get() == fs.blocks_of(index)
        && (!fs.has_crc
            || (agi.uuid == fs.meta_uuid && agi.crc.get() == crc32c_without(sector, AGI_CRC_AT)));
    if sound {
        Ok(agi)
    } else {
        Err(damaged(format_args!("the AGI of group {index}")))
    }
}

/// The blocks that a group keeps at hand for its btrees: a ring of entries in the AGFL.
/// [xfs_alloc.c `xfs_agfl_needs_reset`]
fn free_list(
    fs: &Superblock,
    index: u32,
    agf: &RawAgf,
    sector: &[u8],
) -> Result<Vec<u32>, Trouble> {
    let wrong = || damaged(format_args!("the AGFL of group {index}"));
    let mut entries_at = 0;
    if fs.has_crc {
        let agfl: RawAgfl = structure(sector, 0)?;
        let sound = agfl.magic == *b"XAFL"
            && agfl.group.get() == index
            && agfl.uuid == fs.meta_uuid
            && agfl.crc.get() == crc32c_without(sector, AGFL_CRC_AT);
        if !sound {
            return Err(wrong());
        }
        entries_at = size_of::<RawAgfl>();
    }
    let size = u64_from((sector.len() - entries_at) / 4);
    let first = u64::from(agf.list_first.get());
    let last = u64::from(agf.list_last.get());
    let count = u64::from(agf.list_count.get());
    if first >= size || last >= size || count > size {
        return Err(wrong());
    }
    if count > 0 && (first + count - 1) % size != last {
        return Err(wrong());
    }
    let mut list = Vec::new();
    for number in 0..count {
        let at = entries_at + usize_from((first + number) % size) * 4;
        let block = structure::<Be32>(sector, at)?.get();
        if !(fs.header_blocks()..fs.blocks_of(index)).contains(&block) {
            return Err(wrong());
        }
        list.push(block);
    }
    Ok(list)
}

/// Blocks of the btrees that count as free, which are all but the roots, of the btrees for free space
/// and for the reverse map: they come from the free list.
fn btree_blocks(
    fs: &Superblock,
    index: u32,
    agf: &RawAgf,
    block_tree: &[u32],
    count_tree: &[u32],
) -> Result<u64, Trouble> {
    let mut found = u64_from(block_tree.len() + count_tree.len()).saturating_sub(2);
    if fs.reverse_map {
        found += u64::from(agf.reverse_map_blocks.get()).saturating_sub(1);
    }
    // Before there were lazy counters, nothing needed the field.
    if fs.lazy_counters && found != u64::from(agf.btree_blocks.get()) {
        return Err(disagree(index));
    }
    Ok(found)
}

/// What else must be in use: roots of the other btrees, the log, inodes that the superblock names.
fn known_in_use(fs: &Superblock, index: u32, agf: &RawAgf, agi: &RawAgi) -> Vec<Range<u32>> {
    let mut blocks = vec![agi.root.get()];
    if fs.free_inode_tree {
        blocks.push(agi.free_root.get());
    }
    if fs.reverse_map {
        blocks.push(agf.roots[2].get());
    }
    if fs.reflink {
        blocks.push(agf.refcount_root.get());
    }
    let inodes = (fs.inode_blocks.iter()).filter(|(group, _)| *group == index);
    blocks.extend(inodes.map(|(_, block)| *block));
    let mut used: Vec<_> = (blocks.into_iter())
        .map(|block| block..block.saturating_add(1))
        .collect();
    if fs.log.0 == index {
        used.push(fs.log.1.clone());
    }
    used
}

/// Whether a block of `range` is in `free`, which ascends.
fn overlaps(free: &[Run], range: &Range<u32>) -> bool {
    let behind = free.partition_point(|run| run.start < range.end);
    behind
        .checked_sub(1)
        .is_some_and(|at| free[at].end() > u64::from(range.start))
}
