//! Group descriptors: where each group's bitmaps and inodes lie, and how much of it is free.

use std::ops::Range;

use zerocopy::byteorder::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::blocks::Blocks;
use super::superblock::Geometry;
use crate::guest::Trouble;
use crate::units::usize_from;

/// The bitmap of blocks was never written: nothing of the group is in use but what the layout puts
/// there. (`EXT4_BG_BLOCK_UNINIT`)
const BLOCK_UNINIT: u16 = 2;

/// A group descriptor as it lies on the disk. `struct ext4_group_desc`, `fs/ext4/ext4.h`
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct RawDescriptor {
    /// 0x00: `bg_block_bitmap_lo`.
    pub(super) block_bitmap_lo: U32,
    /// 0x04: `bg_inode_bitmap_lo`.
    pub(super) inode_bitmap_lo: U32,
    /// 0x08: `bg_inode_table_lo`.
    pub(super) inode_table_lo: U32,
    /// 0x0c: `bg_free_blocks_count_lo`: in clusters.
    pub(super) free_blocks_count_lo: U16,
    /// 0x0e: `bg_free_inodes_count_lo`, `bg_used_dirs_count_lo`.
    pub(super) inodes_lo: [u8; 4],
    /// 0x12: `bg_flags`.
    pub(super) flags: U16,
    /// 0x14: `bg_exclude_bitmap_lo`.
    pub(super) exclude_bitmap_lo: U32,
    /// 0x18: `bg_block_bitmap_csum_lo`.
    pub(super) block_bitmap_csum_lo: U16,
    /// 0x1a: `bg_inode_bitmap_csum_lo`, `bg_itable_unused_lo`.
    pub(super) inode_bitmap_lo_rest: [u8; 4],
    /// 0x1e: `bg_checksum`.
    pub(super) checksum: U16,
    /// 0x20: `bg_block_bitmap_hi`. This and all that follows is only of descriptors of 64 bytes or more.
    pub(super) block_bitmap_hi: U32,
    /// 0x24: `bg_inode_bitmap_hi`.
    pub(super) inode_bitmap_hi: U32,
    /// 0x28: `bg_inode_table_hi`.
    pub(super) inode_table_hi: U32,
    /// 0x2c: `bg_free_blocks_count_hi`.
    pub(super) free_blocks_count_hi: U16,
    /// 0x2e: `bg_free_inodes_count_hi` to `bg_exclude_bitmap_hi`.
    pub(super) inodes_hi: [u8; 10],
    /// 0x38: `bg_block_bitmap_csum_hi`.
    pub(super) block_bitmap_csum_hi: U16,
    /// 0x3a: `bg_inode_bitmap_csum_hi`, `bg_reserved`.
    pub(super) reserved: [u8; 6],
}

const _: () = {
    assert!(size_of::<RawDescriptor>() == 64);
    assert!(std::mem::offset_of!(RawDescriptor, checksum) == 0x1e);
    assert!(std::mem::offset_of!(RawDescriptor, block_bitmap_csum_hi) == 0x38);
};

/// A group, as a descriptor that makes sense has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Group {
    pub(super) block_bitmap: u64,
    pub(super) inode_bitmap: u64,
    pub(super) inode_table: u64,
    pub(super) free_clusters: u64,
    /// Whether the bitmap of blocks was never written.
    pub(super) uninitialised: bool,
    /// Of the bitmap of blocks; only the lower 16 bits where descriptors are small.
    pub(super) bitmap_checksum: u32,
}

impl Group {
    /// The blocks of its bitmaps and of its inodes.
    pub(super) fn metadata(&self, geometry: &Geometry) -> [Range<u64>; 3] {
        let table = self.inode_table..self.inode_table + geometry.inode_table_blocks();
        let bitmap = |block| block..block + 1;
        [bitmap(self.block_bitmap), bitmap(self.inode_bitmap), table]
    }

    /// Whether `other` has everything at the same places.
    pub(super) fn lies_as(&self, other: &Self) -> bool {
        (self.block_bitmap, self.inode_bitmap, self.inode_table)
            == (other.block_bitmap, other.inode_bitmap, other.inode_table)
    }
}

/// All groups of a filesystem, read as they are asked for, a block of descriptors at a time.
pub(super) struct Groups<'b> {
    blocks: &'b Blocks<'b>,
    geometry: &'b Geometry,
    loaded: Option<(u64, Vec<u8>)>,
}

impl<'b> Groups<'b> {
    pub(super) fn new(blocks: &'b Blocks<'b>, geometry: &'b Geometry) -> Self {
        Self {
            blocks,
            geometry,
            loaded: None,
        }
    }

    /// Reads the descriptor of group `number`, which must exist.
    ///
    /// # Errors
    /// [`Trouble::Skip`] where it is damaged.
    pub(super) fn get(&mut self, number: u64) -> Result<Group, Trouble> {
        let geometry = self.geometry;
        let index = number / geometry.descriptors_per_block();
        if self.loaded.as_ref().is_none_or(|(at, _)| *at != index) {
            let block = geometry.descriptor_block(index);
            if !geometry.has_blocks(&(block..block + 1)) {
                return Err(Trouble::skip("has group descriptors beyond its end"));
            }
            self.loaded = Some((index, self.blocks.read(block)?));
        }
        let bytes = self.loaded.as_ref().map_or(&[][..], |(_, bytes)| bytes);
        let at = number % geometry.descriptors_per_block() * geometry.descriptor_size;
        let bytes = &bytes[usize_from(at)..usize_from(at + geometry.descriptor_size)];
        if !geometry.checksums.descriptor_is_right(number, bytes) {
            return Err(Trouble::skip(format!(
                "has a wrong checksum in the descriptor of group {number}"
            )));
        }
        self.parse(number, bytes)
    }

    fn parse(&self, number: u64, bytes: &[u8]) -> Result<Group, Trouble> {
        let mut whole = [0; 64];
        let len = bytes.len().min(64);
        whole[..len].copy_from_slice(&bytes[..len]);
        let raw: RawDescriptor = zerocopy::transmute!(whole);
        let block = |lo: U32, hi: U32| u64::from(hi.get()) << 32 | u64::from(lo.get());
        let short = |lo: U16, hi: U16| u32::from(hi.get()) << 16 | u32::from(lo.get());
        let free = short(raw.free_blocks_count_lo, raw.free_blocks_count_hi);
        let group = Group {
            block_bitmap: block(raw.block_bitmap_lo, raw.block_bitmap_hi),
            inode_bitmap: block(raw.inode_bitmap_lo, raw.inode_bitmap_hi),
            inode_table: block(raw.inode_table_lo, raw.inode_table_hi),
            free_clusters: u64::from(free),
            uninitialised: raw.flags.get() & BLOCK_UNINIT != 0,
            bitmap_checksum: short(raw.block_bitmap_csum_lo, raw.block_bitmap_csum_hi),
        };
        let places = [group.block_bitmap, group.inode_bitmap, group.inode_table];
        let own = self.geometry.group(number);
        let inside = |range: &Range<u64>| match self.geometry.flexible {
            true => self.geometry.has_blocks(range),
            false => own.start <= range.start && range.end <= own.end,
        };
        // The places first: no sum of one that is not inside.
        if places.iter().any(|place| *place >= self.geometry.blocks)
            || !group.metadata(self.geometry).iter().all(inside)
        {
            return Err(Trouble::skip(format!(
                "has the metadata of group {number} where it cannot be"
            )));
        }
        if group.uninitialised && !self.geometry.checksums.allow_uninitialised() {
            return Err(Trouble::skip(format!(
                "has no bitmap for group {number}, without the feature for that"
            )));
        }
        Ok(group)
    }
}
