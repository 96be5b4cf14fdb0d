//! Where a filesystem keeps what is not in any group descriptor: the superblock's copies and the
//! descriptors themselves.
//!
//! Sources: the kernel's `ext4_bg_has_super`, `ext4_num_base_meta_blocks`, `descriptor_loc`;
//! e2fsprogs' `ext2fs_super_and_bgd_loc2`, `ext2fs_descriptor_block_loc2`.

use std::ops::Range;

use super::superblock::{Backups, Geometry};
use crate::units::div_ceil;

impl Geometry {
    /// Blocks of a group, but for the last one.
    pub(super) fn blocks_per_group(&self) -> u64 {
        self.clusters_per_group * self.cluster_blocks
    }

    /// The blocks of group `group`, which must exist.
    pub(super) fn group(&self, group: u64) -> Range<u64> {
        let start = self.first_data_block + group * self.blocks_per_group();
        start..self.blocks.min(start + self.blocks_per_group())
    }

    /// Whether all of `range` lies in the groups.
    pub(super) fn has_blocks(&self, range: &Range<u64>) -> bool {
        self.first_data_block <= range.start && range.start < range.end && range.end <= self.blocks
    }

    /// Blocks of an inode table.
    pub(super) fn inode_table_blocks(&self) -> u64 {
        div_ceil(self.inodes_per_group * self.inode_size, self.block_size)
    }

    pub(super) fn descriptors_per_block(&self) -> u64 {
        self.block_size / self.descriptor_size
    }

    /// Whether block 0, which with blocks of 1 KiB is before the superblock, belongs to group 0: it
    /// does with clusters, which start there.
    fn boot_block_in_group(&self) -> bool {
        self.block_size == 1024 && self.first_data_block == 0
    }

    fn has_super(&self, group: u64) -> bool {
        let is_power = |base: u64| {
            let mut power = base;
            while power < group {
                power *= base;
            }
            power == group
        };
        match self.backups {
            _ if group == 0 => true,
            Backups::All => true,
            Backups::Sparse => group == 1 || is_power(3) || is_power(5) || is_power(7),
            Backups::Two(groups) => groups.contains(&group),
        }
    }

    /// The first block of descriptors that lies in its own meta group. A larger number than there are
    /// where none does.
    fn first_meta_bg(&self) -> u64 {
        self.first_meta_bg.unwrap_or(u64::MAX)
    }

    /// The block that holds the descriptors from number `index` times [`Self::descriptors_per_block`]
    /// on.
    pub(super) fn descriptor_block(&self, index: u64) -> u64 {
        let boot = u64::from(self.boot_block_in_group());
        if index < self.first_meta_bg() {
            return self.first_data_block + boot + 1 + index;
        }
        let group = index * self.descriptors_per_block();
        let boot = if index == 0 { boot } else { 0 };
        self.group(group).start + u64::from(self.has_super(group)) + boot
    }

    /// The blocks at the start of group `group` that its copies of the superblock and of descriptors
    /// take, with what is reserved behind them; may be empty.
    pub(super) fn copies(&self, group: u64) -> Range<u64> {
        let meta_group = group / self.descriptors_per_block();
        let has_super = self.has_super(group);
        let mut count = u64::from(has_super);
        if meta_group < self.first_meta_bg() {
            let all = div_ceil(self.groups, self.descriptors_per_block());
            if has_super {
                count += self.first_meta_bg().min(all) + self.reserved_gdt_blocks;
            }
        } else {
            let place = group % self.descriptors_per_block();
            let last = self.descriptors_per_block() - 1;
            count += u64::from(place == 0 || place == 1 || place == last);
        }
        if group == 0 {
            count += u64::from(self.boot_block_in_group());
        }
        let start = self.group(group).start;
        start..self.blocks.min(start + count)
    }
}
