//! A filesystem of four groups with blocks of 1 KiB, a journal, and checksums of everything.
//!
//! ```text
//!   0     boot block
//!   1     group 0: superblock, descriptors 2, bitmap 3, inode bitmap 4, inodes 5-6
//!   65    group 1: superblock, descriptors 66, bitmap 67, inode bitmap 68, inodes 69-70
//!   129   group 2: bitmap, inode bitmap 130, inodes 131-132, journal 140-171
//!   193   group 3: superblock, descriptors 194, bitmap 195, inode bitmap 196, inodes 197-198; it has
//!         60 of 64 blocks
//! ```

use std::io;
use std::ops::Range;

use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::super::checksum::crc32c;
use super::super::groups::RawDescriptor;
use super::super::journal::RawJournalSuperblock;
use super::super::superblock::RawSuperblock;
use crate::guest::Source;
use crate::units::{low_u8, low_u32, u64_from, usize_from};

pub(super) const GROUPS: u64 = 4;
pub(super) const BLOCKS: u64 = 253;
pub(super) const JOURNAL_INODE: u64 = 8;
pub(super) const JOURNAL_AT: u64 = 140;
pub(super) const JOURNAL_LEN: u64 = 32;
/// What every checksum begins with.
pub(super) const SEED: u32 = 0x5eed_5eed;

/// A disk in memory.
#[derive(Clone)]
pub(super) struct Image {
    pub(super) bytes: Vec<u8>,
}

impl Source for Image {
    fn len(&self) -> u64 {
        u64_from(self.bytes.len())
    }

    fn sector_size(&self) -> u64 {
        512
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        buf.copy_from_slice(&self.bytes[usize_from(offset)..][..buf.len()]);
        Ok(())
    }
}

impl Image {
    pub(super) fn new() -> Self {
        let mut image = Self {
            bytes: vec![0; usize_from(BLOCKS * 1024)],
        };
        image.superblock(|raw| {
            raw.inodes_count.set(8 * 4);
            raw.blocks_count_lo.set(low_u32(BLOCKS));
            raw.first_data_block.set(1);
            raw.blocks_per_group.set(64);
            raw.clusters_per_group.set(64);
            raw.inodes_per_group.set(8);
            raw.magic.set(0xef53);
            raw.state.set(1);
            raw.rev_level.set(1);
            raw.inode_size.set(256);
            raw.feature_compat.set(0x4);
            raw.feature_incompat.set(0x2 | 0x40 | 0x80 | 0x200 | 0x2000);
            raw.feature_ro_compat.set(0x1 | 0x400);
            raw.uuid = [0x11; 16];
            raw.checksum_seed.set(SEED);
            raw.journal_inum.set(8);
            raw.desc_size.set(64);
            raw.checksum_type = 1;
        });
        for number in 0..GROUPS {
            let start = image.group(number).start;
            let copies = if number == 2 { 0 } else { 2 };
            image.descriptor(number, |raw| {
                raw.block_bitmap_lo.set(low_u32(start + copies));
                raw.inode_bitmap_lo.set(low_u32(start + copies + 1));
                raw.inode_table_lo.set(low_u32(start + copies + 2));
            });
            (start..start + copies + 4).for_each(|block| image.set(block, true));
            for behind in BLOCKS..(start + 64) {
                image.set_in(number, behind - start, true);
            }
        }
        (JOURNAL_AT..JOURNAL_AT + JOURNAL_LEN).for_each(|block| image.set(block, true));
        image.journal_inode();
        image.journal(|raw| {
            raw.header.magic = [0xc0, 0x3b, 0x39, 0x98];
            raw.header.blocktype.set(4);
            raw.blocksize.set(1024);
            raw.maxlen.set(low_u32(JOURNAL_LEN));
            raw.first.set(1);
            raw.sequence.set(7);
            raw.uuid = [0x77; 16];
        });
        // Some that somebody uses.
        for block in [20, 21, 22, 100, 188, 230, 252] {
            image.set(block, true);
        }
        for number in 0..GROUPS {
            let free = image.free_in(number);
            image.descriptor(number, |raw| raw.free_blocks_count_lo.set(free));
        }
        let free = image.clear_blocks().len();
        image.superblock(|raw| raw.free_blocks_count_lo.set(low_u32(u64_from(free))));
        image.seal();
        image
    }

    pub(super) fn group(&self, number: u64) -> Range<u64> {
        let start = 1 + number * 64;
        start..BLOCKS.min(start + 64)
    }

    fn change<T: FromBytes + IntoBytes + Immutable>(
        &mut self,
        at: u64,
        change: impl FnOnce(&mut T),
    ) {
        let bytes = &mut self.bytes[usize_from(at)..][..size_of::<T>()];
        let mut raw = T::read_from_bytes(bytes).unwrap();
        change(&mut raw);
        raw.write_to(bytes).unwrap();
    }

    pub(super) fn superblock(&mut self, change: impl FnOnce(&mut RawSuperblock)) {
        self.change(1024, change);
    }

    pub(super) fn descriptor(&mut self, group: u64, change: impl FnOnce(&mut RawDescriptor)) {
        self.change(2048 + 64 * group, change);
    }

    pub(super) fn journal(&mut self, change: impl FnOnce(&mut RawJournalSuperblock)) {
        self.change(JOURNAL_AT * 1024, change);
    }

    fn raw_descriptor(&self, group: u64) -> RawDescriptor {
        let bytes = &self.bytes[usize_from(2048 + 64 * group)..][..64];
        RawDescriptor::read_from_bytes(bytes).unwrap()
    }

    pub(super) fn bitmap_block(&self, group: u64) -> u64 {
        u64::from(self.raw_descriptor(group).block_bitmap_lo.get())
    }

    pub(super) fn inode_at(&self, number: u64) -> u64 {
        let group = self.raw_descriptor((number - 1) / 8);
        u64::from(group.inode_table_lo.get()) * 1024 + (number - 1) % 8 * 256
    }

    /// Marks a block as in use or free, in the bitmap alone.
    pub(super) fn set(&mut self, block: u64, used: bool) {
        self.set_in((block - 1) / 64, (block - 1) % 64, used);
    }

    fn set_in(&mut self, group: u64, bit: u64, used: bool) {
        let at = usize_from(self.bitmap_block(group) * 1024 + bit / 8);
        let mask = low_u8(1 << (bit % 8));
        self.bytes[at] = if used {
            self.bytes[at] | mask
        } else {
            self.bytes[at] & !mask
        };
    }

    pub(super) fn is_set(&self, block: u64) -> bool {
        let (group, bit) = ((block - 1) / 64, (block - 1) % 64);
        let at = usize_from(self.bitmap_block(group) * 1024 + bit / 8);
        self.bytes[at] >> (bit % 8) & 1 == 1
    }

    /// The blocks that the bitmaps have clear.
    pub(super) fn clear_blocks(&self) -> Vec<u64> {
        (1..BLOCKS).filter(|block| !self.is_set(*block)).collect()
    }

    pub(super) fn free_in(&self, group: u64) -> u16 {
        let clear = self.group(group).filter(|block| !self.is_set(*block));
        u16::try_from(clear.count()).unwrap()
    }

    /// Has the bitmap of a group elsewhere, which only the descriptor is told.
    pub(super) fn move_bitmap(&mut self, group: u64, to: u64) {
        let from = usize_from(self.bitmap_block(group) * 1024);
        let bytes = self.bytes[from..][..1024].to_vec();
        self.block(to).copy_from_slice(&bytes);
        self.descriptor(group, |raw| raw.block_bitmap_lo.set(low_u32(to)));
    }

    pub(super) fn block(&mut self, block: u64) -> &mut [u8] {
        &mut self.bytes[usize_from(block * 1024)..][..1024]
    }

    fn journal_inode(&mut self) {
        let at = usize_from(self.inode_at(JOURNAL_INODE));
        let inode = &mut self.bytes[at..][..256];
        let mut put = |at: usize, bytes: &[u8]| inode[at..][..bytes.len()].copy_from_slice(bytes);
        put(0, &0x8180_u16.to_le_bytes());
        put(4, &low_u32(JOURNAL_LEN * 1024).to_le_bytes());
        put(0x1a, &[1, 0]);
        put(0x20, &0x8_0000_u32.to_le_bytes());
        // A root of one extent.
        put(0x28, &[0x0a, 0xf3, 1, 0, 4, 0, 0, 0]);
        put(0x38, &[low_u8(JOURNAL_LEN), 0]);
        put(0x3c, &low_u32(JOURNAL_AT).to_le_bytes());
        put(0x80, &[32, 0]);
    }

    /// Makes all checksums right.
    pub(super) fn seal(&mut self) {
        self.seal_inode(JOURNAL_INODE);
        for group in 0..GROUPS {
            let bitmap = self.bitmap_block(group);
            // Mischief may have it anywhere.
            let bytes = self
                .bytes
                .get(usize_from(bitmap * 1024)..)
                .unwrap_or_default();
            let sum = crc32c(SEED, &bytes[..bytes.len().min(8)]);
            self.descriptor(group, |raw| {
                let halves = sum.to_le_bytes();
                raw.block_bitmap_csum_lo
                    .set(u16::from_le_bytes([halves[0], halves[1]]));
                raw.block_bitmap_csum_hi
                    .set(u16::from_le_bytes([halves[2], halves[3]]));
                raw.checksum.set(0);
            });
            let raw = self.raw_descriptor(group);
            let sum = crc32c(crc32c(SEED, &low_u32(group).to_le_bytes()), raw.as_bytes());
            let sum = sum.to_le_bytes();
            self.descriptor(group, |raw| {
                raw.checksum.set(u16::from_le_bytes([sum[0], sum[1]]))
            });
        }
        let sum = crc32c(!0, &self.bytes[1024..2044]);
        self.superblock(|raw| raw.checksum.set(sum));
    }

    pub(super) fn seal_inode(&mut self, number: u64) {
        let at = usize_from(self.inode_at(number));
        let Some(inode) = self.bytes.get_mut(at..at.saturating_add(256)) else {
            return;
        };
        inode[0x7c..0x7e].fill(0);
        inode[0x82..0x84].fill(0);
        let seed = crc32c(SEED, &low_u32(number).to_le_bytes());
        let seed = crc32c(seed, &inode[0x64..0x68]);
        let sum = crc32c(seed, inode).to_le_bytes();
        inode[0x7c..0x7e].copy_from_slice(&sum[..2]);
        inode[0x82..0x84].copy_from_slice(&sum[2..]);
    }
}
