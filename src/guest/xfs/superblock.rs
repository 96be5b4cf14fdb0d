//! The superblock and its copies: where everything lies, and whether it is all known.

use std::ops::Range;

use zerocopy::byteorder::big_endian::{U16, U32 as Be32, U64};
use zerocopy::byteorder::little_endian::U32 as Le32;
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use super::damaged;
use crate::guest::Trouble;
use crate::guest::raw::{crc32c_without, structure};
use crate::guest::view::View;
use crate::units::u64_from;

/// What a superblock begins with.
pub(super) const MAGIC: [u8; 4] = *b"XFSB";
const CRC_AT: usize = 224;

/// `sb_versionnum`: the low four bits are the version, the others features.
const VERSION_MASK: u16 = 0x000f;
const LOG_V2: u16 = 0x0400;
const SECTOR_SIZES: u16 = 0x0800;
const MORE_BITS: u16 = 0x8000;
/// Nobody knows what a shared superblock is, the kernel says.
const SHARED: u16 = 0x0200;
/// `sb_features2`: counters that are written at unmount only, attr2, 32-bit project ids, types in
/// directories; of version 5 also its checksums.
const LAZY_COUNTERS: u32 = 0x0002;
const KNOWN_FEATURES2: u32 = 0x0002 | 0x0008 | 0x0080 | 0x0200;
const CRC_FEATURE2: u32 = 0x0100;

/// `sb_features_ro_compat`: finobt, rmapbt, reflink, inobtcnt.
const FREE_INODE_TREE: u32 = 1 << 0;
const REVERSE_MAP: u32 = 1 << 1;
const REFLINK: u32 = 1 << 2;
const KNOWN_RO_COMPAT: u32 = 0x000f;
/// `sb_features_incompat`: ftype, sparse inodes, meta_uuid, bigtime, needsrepair, nrext64, exchange,
/// parent pointers, metadata directory. None but needsrepair, which is looked at by itself, bears on
/// what is free; zoned filesystems (the next bit) have their free space elsewhere.
const META_UUID: u32 = 1 << 2;
const NEEDS_REPAIR: u32 = 1 << 4;
const METADATA_DIRECTORY: u32 = 1 << 8;
const KNOWN_INCOMPAT: u32 = 0x01ff;

/// A superblock as it lies in the first sector of each allocation group. [xfs_format.h `xfs_dsb`]
#[derive(Clone, Copy, FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawSuperblock {
    /// 0: `XFSB`.
    magic: [u8; 4],
    /// 4: bytes of a block.
    block_size: Be32,
    /// 8: blocks of the data device.
    data_blocks: U64,
    /// 16: blocks of the realtime device.
    realtime_blocks: U64,
    /// 24: extents of the realtime device.
    realtime_extents: U64,
    /// 32: as users see it; the log has it too.
    uuid: [u8; 16],
    /// 48: first block of the log; 0 where it is on a device of its own.
    log_start: U64,
    /// 56: inode of the root directory.
    root_inode: U64,
    /// 64: inodes of the realtime bitmap and summary.
    realtime_inodes: [U64; 2],
    /// 80: blocks of a realtime extent.
    realtime_extent_size: Be32,
    /// 84: blocks of an allocation group.
    group_blocks: Be32,
    /// 88: allocation groups.
    group_count: Be32,
    /// 92: blocks of the realtime bitmap.
    realtime_bitmap_blocks: Be32,
    /// 96: blocks of the log.
    log_blocks: Be32,
    /// 100: version and features.
    version: U16,
    /// 102: bytes of a sector.
    sector_size: U16,
    /// 104: bytes of an inode.
    inode_size: U16,
    /// 106: inodes of a block.
    inodes_per_block: U16,
    /// 108: label.
    label: [u8; 12],
    /// 120: log2 of the block size.
    block_log: u8,
    /// 121: log2 of the sector size.
    sector_log: u8,
    /// 122: log2 of the inode size.
    inode_log: u8,
    /// 123: log2 of inodes per block.
    inodes_per_block_log: u8,
    /// 124: log2 of blocks per group, rounded up.
    group_log: u8,
    /// 125: log2 of the realtime extents.
    realtime_extents_log: u8,
    /// 126: mkfs has not finished.
    in_progress: u8,
    /// 127: percent that inodes may take.
    inode_percent: u8,
    /// 128: inodes, and free ones.
    inodes: [U64; 2],
    /// 144: free blocks of the data device, those of free lists and free-space btrees among them.
    free_blocks: U64,
    /// 152: free realtime extents.
    free_realtime_extents: U64,
    /// 160: inodes of user and group quotas.
    quota_inodes: [U64; 2],
    /// 176: quota flags.
    quota_flags: U16,
    /// 178: flags, version of the shared superblock.
    flags: [u8; 2],
    /// 180: alignment of inodes, stripe unit and width.
    alignment: [Be32; 3],
    /// 192: log2 of blocks per directory block.
    directory_log: u8,
    /// 193: log2 of the log's sector size.
    log_sector_log: u8,
    /// 194: bytes of a log sector.
    log_sector_size: U16,
    /// 196: stripe unit of the log, in bytes.
    log_stripe_unit: Be32,
    /// 200: more features.
    features2: Be32,
    /// 204: where some kernels put them.
    bad_features2: Be32,
    /// 208: version 5: features that others need not know.
    compat: Be32,
    /// 212: features that writers must know.
    ro_compat: Be32,
    /// 216: features that readers must know.
    incompat: Be32,
    /// 220: features of what is in the log.
    log_incompat: Be32,
    /// 224: CRC-32C of the sector.
    crc: Le32,
    /// 228: alignment of sparse inodes.
    sparse_alignment: Be32,
    /// 232: inode of project quotas.
    project_quota_inode: U64,
    /// 240: last write.
    lsn: U64,
    /// 248: what metadata blocks carry, if the user changed theirs.
    meta_uuid: [u8; 16],
}

const _: () = assert!(size_of::<RawSuperblock>() == 264);

/// What the superblock says, checked: every number here is one to calculate with.
#[derive(Clone, Debug)]
pub(super) struct Superblock {
    /// Bytes of a block, a power of two from 512 to 64 KiB.
    pub(super) block_size: u64,
    /// Bytes of a sector, a power of two, at most a block.
    pub(super) sector_size: u64,
    /// Blocks of all groups, which lie in the view.
    pub(super) data_blocks: u64,
    /// Blocks of a group, but for the last.
    pub(super) group_blocks: u32,
    /// Groups, at least 1.
    pub(super) group_count: u32,
    group_log: u8,
    inodes_per_block_log: u8,
    /// Version 5: checksums, and owners, in all metadata.
    pub(super) has_crc: bool,
    /// The free blocks are counted at unmount.
    pub(super) lazy_counters: bool,
    pub(super) free_inode_tree: bool,
    pub(super) reverse_map: bool,
    pub(super) reflink: bool,
    /// As users see it.
    pub(super) uuid: [u8; 16],
    /// What metadata blocks carry.
    pub(super) meta_uuid: [u8; 16],
    /// Group that the log lies in, and its blocks there.
    pub(super) log: (u32, Range<u32>),
    /// Whether its records may have long headers.
    pub(super) log_v2: bool,
    /// See [`RawSuperblock::free_blocks`].
    pub(super) free_blocks: u64,
    /// Groups and blocks of inodes that there must be.
    pub(super) inode_blocks: Vec<(u32, u32)>,
}

impl Superblock {
    /// Reads and checks the first superblock.
    ///
    /// # Errors
    /// [`Trouble::Skip`] where it is damaged, or says something that this reader must not be used with.
    pub(super) fn read(view: &View<'_>) -> Result<Self, Trouble> {
        let raw: RawSuperblock = structure(&view.read(0, 512)?, 0)?;
        let sector_size = u64::from(raw.sector_size.get());
        if !sector_size.is_power_of_two() || !(512..=32768).contains(&sector_size) {
            return Err(damaged(format_args!("sectors of {sector_size} bytes")));
        }
        let sector = view.read(0, sector_size)?;
        let raw = checked(&sector, "its superblock")?;
        refuse_unknown(&raw)?;
        let found = Self::geometry(&raw)?;
        if found.bytes() > view.len() {
            return Err(Trouble::skip(format!(
                "spans {} bytes, more than the {} of its part",
                found.bytes(),
                view.len()
            )));
        }
        Ok(found)
    }

    fn geometry(raw: &RawSuperblock) -> Result<Self, Trouble> {
        let block_size = u64::from(raw.block_size.get());
        let sector_size = u64::from(raw.sector_size.get());
        let group_blocks = raw.group_blocks.get();
        let group_count = raw.group_count.get();
        let data_blocks = raw.data_blocks.get();
        let sane = block_size.is_power_of_two()
            && (512..=65536).contains(&block_size)
            && raw.block_log == low_log(block_size)
            && sector_size <= block_size
            && raw.sector_log == low_log(sector_size)
            && (16..1 << 31).contains(&group_blocks)
            && raw.group_log == low_log(u64::from(group_blocks).next_power_of_two())
            && group_count > 0
            && data_blocks.div_ceil(u64::from(group_blocks)) == u64::from(group_count)
            && data_blocks.checked_mul(block_size).is_some()
            // Of inodes that are at most half a block in size there are at least two.
            && raw.inodes_per_block_log <= 8
            && raw.inodes_per_block.get() == 1 << raw.inodes_per_block_log;
        if !sane {
            return Err(damaged("the geometry in its superblock"));
        }
        let version = raw.version.get();
        let has_crc = version & VERSION_MASK == 5;
        let ro_compat = if has_crc { raw.ro_compat.get() } else { 0 };
        let incompat = if has_crc { raw.incompat.get() } else { 0 };
        let mut found = Self {
            block_size,
            sector_size,
            data_blocks,
            group_blocks,
            group_count,
            group_log: raw.group_log,
            inodes_per_block_log: raw.inodes_per_block_log,
            has_crc,
            lazy_counters: has_crc || features2(raw) & LAZY_COUNTERS != 0,
            free_inode_tree: ro_compat & FREE_INODE_TREE != 0,
            reverse_map: ro_compat & REVERSE_MAP != 0,
            reflink: ro_compat & REFLINK != 0,
            uuid: raw.uuid,
            meta_uuid: if incompat & META_UUID != 0 {
                raw.meta_uuid
            } else {
                raw.uuid
            },
            log: (0, 0..0),
            log_v2: has_crc || version & LOG_V2 != 0,
            free_blocks: raw.free_blocks.get(),
            inode_blocks: Vec::new(),
        };
        found.log = found.log_place(raw)?;
        found.inode_blocks = found.inodes(raw, incompat)?;
        Ok(found)
    }

    /// Where the log lies.
    fn log_place(&self, raw: &RawSuperblock) -> Result<(u32, Range<u32>), Trouble> {
        if raw.log_start.get() == 0 {
            return Err(Trouble::skip(
                "has its log on another device, which may hold what changes it",
            ));
        }
        let wrong = || damaged("the place of its log");
        let (group, start) = self.place(raw.log_start.get()).ok_or_else(wrong)?;
        let end = start.checked_add(raw.log_blocks.get());
        let end = end.filter(|end| *end > start && *end <= self.blocks_of(group));
        Ok((group, start..end.ok_or_else(wrong)?))
    }

    /// Where the inodes lie that the superblock names.
    fn inodes(&self, raw: &RawSuperblock, incompat: u32) -> Result<Vec<(u32, u32)>, Trouble> {
        let mut numbers = vec![raw.root_inode.get()];
        // With a metadata directory, the fields of the others are something else.
        if incompat & METADATA_DIRECTORY == 0 {
            numbers.extend(raw.realtime_inodes.map(U64::get));
            numbers.extend(raw.quota_inodes.map(U64::get));
            if self.has_crc {
                numbers.push(raw.project_quota_inode.get());
            }
        }
        (numbers.into_iter())
            .filter(|number| !matches!(*number, 0 | u64::MAX))
            .map(|number| {
                let place = self.place(number >> self.inodes_per_block_log);
                place.ok_or_else(|| damaged(format_args!("inode {number} in its superblock")))
            })
            .collect()
    }

    /// Group and block in it of a filesystem block, which holds both in its bits.
    fn place(&self, block: u64) -> Option<(u32, u32)> {
        let group = u32::try_from(block >> self.group_log).ok()?;
        let in_group = u32::try_from(block & ((1 << self.group_log) - 1)).ok()?;
        (group < self.group_count && in_group < self.blocks_of(group)).then_some((group, in_group))
    }

    /// Bytes of all groups.
    pub(super) fn bytes(&self) -> u64 {
        self.data_blocks * self.block_size
    }

    /// Blocks of group `group`, of which the last may have fewer.
    pub(super) fn blocks_of(&self, group: u32) -> u32 {
        let before = u64::from(group) * u64::from(self.group_blocks);
        let rest = self.data_blocks.saturating_sub(before);
        u32::try_from(rest).map_or(self.group_blocks, |rest| rest.min(self.group_blocks))
    }

    /// Where block `block` of group `group` begins, in bytes of the view.
    pub(super) fn offset(&self, group: u32, block: u32) -> u64 {
        let before = u64::from(group) * u64::from(self.group_blocks);
        (before + u64::from(block)) * self.block_size
    }

    /// Blocks that the headers take at the beginning of each group: a sector each for the superblock,
    /// AGF, AGI and AGFL.
    pub(super) fn header_blocks(&self) -> u32 {
        u32::try_from((4 * self.sector_size).div_ceil(self.block_size)).unwrap_or(u32::MAX)
    }

    /// Checks the copy that `group` begins with. Copies are written by mkfs and when the filesystem
    /// grows, so their counters mean nothing.
    ///
    /// # Errors
    /// [`Trouble::Skip`] where it is damaged or speaks of another filesystem.
    pub(super) fn check_copy(&self, group: u32, sector: &[u8]) -> Result<(), Trouble> {
        let copy = checked(sector, &format!("the superblock of group {group}"))?;
        let same = u64::from(copy.block_size.get()) == self.block_size
            && u64::from(copy.sector_size.get()) == self.sector_size
            && copy.data_blocks.get() == self.data_blocks
            && copy.group_blocks.get() == self.group_blocks
            && copy.group_count.get() == self.group_count
            && copy.group_log == self.group_log
            && (copy.version.get() & VERSION_MASK == 5) == self.has_crc
            && self.log_place(&copy)? == self.log;
        if same {
            Ok(())
        } else {
            Err(Trouble::skip(format!(
                "has a copy of its superblock, in group {group}, that describes another filesystem: \
                 run xfs_repair"
            )))
        }
    }
}

/// The exponent of `n`, which is a power of two.
fn low_log(n: u64) -> u8 {
    u8::try_from(n.trailing_zeros()).unwrap_or(u8::MAX)
}

/// Features of version 4, wherever they were put. [xfs_sb.c `xfs_sb_has_mismatched_features2`]
fn features2(raw: &RawSuperblock) -> u32 {
    if raw.version.get() & MORE_BITS == 0 {
        return 0;
    }
    raw.features2.get() | raw.bad_features2.get()
}

/// Decodes a superblock from its sector.
fn checked(sector: &[u8], name: &str) -> Result<RawSuperblock, Trouble> {
    let raw: RawSuperblock = structure(sector, 0)?;
    let version = raw.version.get() & VERSION_MASK;
    if raw.magic != MAGIC || u64_from(sector.len()) < u64::from(raw.sector_size.get()) {
        return Err(damaged(name));
    }
    if version == 5 && raw.crc.get() != crc32c_without(sector, CRC_AT) {
        return Err(damaged(format_args!("{name}, whose checksum is wrong")));
    }
    Ok(raw)
}

/// Refuses what may mean that free blocks are not free. [xfs_sb.c `xfs_validate_sb_common`]
fn refuse_unknown(raw: &RawSuperblock) -> Result<(), Trouble> {
    let unknown = |what: &str, bits: u64| {
        Err(Trouble::skip(format!(
            "has features that are not known here ({what} {bits:#x})"
        )))
    };
    let version = raw.version.get();
    let number = version & VERSION_MASK;
    if !matches!(number, 4 | 5) {
        return unknown("version", u64::from(number));
    }
    if version & SHARED != 0 {
        return unknown("version", u64::from(version));
    }
    if version & SECTOR_SIZES == 0 && raw.sector_size.get() != 512 {
        return Err(damaged("the sector size in its superblock"));
    }
    let known = if number == 5 {
        KNOWN_FEATURES2 | CRC_FEATURE2
    } else {
        KNOWN_FEATURES2
    };
    let features2 = features2(raw);
    if features2 & !known != 0 {
        return unknown("features2", u64::from(features2 & !known));
    }
    if raw.in_progress != 0 {
        return Err(Trouble::skip("was not made to the end by mkfs.xfs"));
    }
    if raw.realtime_blocks.get() != 0 || raw.realtime_extents.get() != 0 {
        return Err(Trouble::skip("has a realtime device"));
    }
    if number == 4 {
        return Ok(());
    }
    if raw.incompat.get() & NEEDS_REPAIR != 0 {
        return Err(Trouble::skip("is marked as damaged: run xfs_repair"));
    }
    for (what, bits, known) in [
        ("compat", raw.compat, 0),
        ("ro_compat", raw.ro_compat, KNOWN_RO_COMPAT),
        ("incompat", raw.incompat, KNOWN_INCOMPAT),
    ] {
        if bits.get() & !known != 0 {
            return unknown(what, u64::from(bits.get() & !known));
        }
    }
    if raw.log_incompat.get() != 0 {
        return Err(Trouble::skip(
            "was not unmounted cleanly (its log holds what needs a feature): let its own system mount \
             and unmount it once",
        ));
    }
    Ok(())
}
