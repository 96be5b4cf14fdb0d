//! The superblock: what shape the filesystem has, and in what state it was left.

use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::checksum::{Checksums, crc32c};
use super::features::{self, Features};
use crate::guest::Trouble;

/// Where the primary superblock starts, in bytes, and how many it has.
pub(super) const SUPERBLOCK_AT: u64 = 1024;
pub(super) const SUPERBLOCK_LEN: u64 = 1024;

const MAGIC: u16 = 0xef53;
/// The block size is 1 KiB shifted by at most this.
const MAX_LOG_BLOCK_SIZE: u32 = 6;
/// The cluster size is 1 KiB shifted by at most this (`EXT2_MAX_CLUSTER_LOG_SIZE`).
const MAX_LOG_CLUSTER_SIZE: u32 = 19;
/// The only algorithm of `metadata_csum`: CRC-32C.
const CHECKSUM_CRC32C: u8 = 1;
/// More groups than the largest disk has with blocks of 4 KiB. Each takes memory.
const MAX_GROUPS: u64 = 1 << 20;

/// The superblock as it lies on the disk. `struct ext4_super_block`, `fs/ext4/ext4.h`
#[derive(Clone, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct RawSuperblock {
    /// 0x000: `s_inodes_count`.
    pub(super) inodes_count: U32,
    /// 0x004: `s_blocks_count_lo`.
    pub(super) blocks_count_lo: U32,
    /// 0x008: `s_r_blocks_count_lo`.
    pub(super) reserved_blocks_count_lo: U32,
    /// 0x00c: `s_free_blocks_count_lo`: in blocks, even where clusters are larger. Stale while mounted.
    pub(super) free_blocks_count_lo: U32,
    /// 0x010: `s_free_inodes_count`.
    pub(super) free_inodes_count: U32,
    /// 0x014: `s_first_data_block`: the block at which group 0 starts.
    pub(super) first_data_block: U32,
    /// 0x018: `s_log_block_size`: of 1 KiB.
    pub(super) log_block_size: U32,
    /// 0x01c: `s_log_cluster_size`: of 1 KiB.
    pub(super) log_cluster_size: U32,
    /// 0x020: `s_blocks_per_group`.
    pub(super) blocks_per_group: U32,
    /// 0x024: `s_clusters_per_group`.
    pub(super) clusters_per_group: U32,
    /// 0x028: `s_inodes_per_group`.
    pub(super) inodes_per_group: U32,
    /// 0x02c: `s_mtime`, `s_wtime`, `s_mnt_count`, `s_max_mnt_count`.
    pub(super) mounts: [u8; 12],
    /// 0x038: `s_magic`.
    pub(super) magic: U16,
    /// 0x03a: `s_state`: 1 clean, 2 errors, 4 orphans being recovered, 0x20 fast commits being replayed.
    pub(super) state: U16,
    /// 0x03c: `s_errors`, `s_minor_rev_level`, `s_lastcheck`, `s_checkinterval`, `s_creator_os`.
    pub(super) checks: [u8; 16],
    /// 0x04c: `s_rev_level`: 0 or 1.
    pub(super) rev_level: U32,
    /// 0x050: `s_def_resuid`, `s_def_resgid`, `s_first_ino`.
    pub(super) defaults: [u8; 8],
    /// 0x058: `s_inode_size`, in bytes. This and all that follows is only of revision 1.
    pub(super) inode_size: U16,
    /// 0x05a: `s_block_group_nr`: the group of this copy of the superblock.
    pub(super) block_group_nr: U16,
    /// 0x05c: `s_feature_compat`.
    pub(super) feature_compat: U32,
    /// 0x060: `s_feature_incompat`.
    pub(super) feature_incompat: U32,
    /// 0x064: `s_feature_ro_compat`.
    pub(super) feature_ro_compat: U32,
    /// 0x068: `s_uuid`.
    pub(super) uuid: [u8; 16],
    /// 0x078: `s_volume_name` to `s_prealloc_dir_blocks`.
    pub(super) names: [u8; 86],
    /// 0x0ce: `s_reserved_gdt_blocks`: kept free behind each copy of the descriptors, to grow.
    pub(super) reserved_gdt_blocks: U16,
    /// 0x0d0: `s_journal_uuid`: of a journal on another device.
    pub(super) journal_uuid: [u8; 16],
    /// 0x0e0: `s_journal_inum`.
    pub(super) journal_inum: U32,
    /// 0x0e4: `s_journal_dev`.
    pub(super) journal_dev: U32,
    /// 0x0e8: `s_last_orphan`: the first of a list of inodes to be deleted or cut.
    pub(super) last_orphan: U32,
    /// 0x0ec: `s_hash_seed` to `s_jnl_backup_type`.
    pub(super) hashing: [u8; 18],
    /// 0x0fe: `s_desc_size`: bytes of a group descriptor, with the feature `64bit`.
    pub(super) desc_size: U16,
    /// 0x100: `s_default_mount_opts`.
    pub(super) default_mount_opts: U32,
    /// 0x104: `s_first_meta_bg`: the first block of descriptors that lies in its own meta group.
    pub(super) first_meta_bg: U32,
    /// 0x108: `s_mkfs_time`, `s_jnl_blocks`.
    pub(super) journal_backup: [u8; 72],
    /// 0x150: `s_blocks_count_hi`.
    pub(super) blocks_count_hi: U32,
    /// 0x154: `s_r_blocks_count_hi`.
    pub(super) reserved_blocks_count_hi: U32,
    /// 0x158: `s_free_blocks_count_hi`.
    pub(super) free_blocks_count_hi: U32,
    /// 0x15c: `s_min_extra_isize` to `s_mmp_update_interval`.
    pub(super) sizes: [u8; 12],
    /// 0x168: `s_mmp_block`.
    pub(super) mmp_block: U64,
    /// 0x170: `s_raid_stripe_width`, `s_log_groups_per_flex`.
    pub(super) stripes: [u8; 5],
    /// 0x175: `s_checksum_type`.
    pub(super) checksum_type: u8,
    /// 0x176: `s_encryption_level` to `s_overhead_clusters`.
    pub(super) various: [u8; 214],
    /// 0x24c: `s_backup_bgs`: the groups with copies, with the feature `sparse_super2`.
    pub(super) backup_bgs: [U32; 2],
    /// 0x254: `s_encrypt_algos` to `s_prj_quota_inum`.
    pub(super) encryption: [u8; 28],
    /// 0x270: `s_checksum_seed`.
    pub(super) checksum_seed: U32,
    /// 0x274: `s_wtime_hi` to `s_encoding_flags`.
    pub(super) times: [u8; 12],
    /// 0x280: `s_orphan_file_inum`.
    pub(super) orphan_file_inum: U32,
    /// 0x284: `s_reserved`.
    pub(super) reserved: [u8; 376],
    /// 0x3fc: `s_checksum`: of all before it.
    pub(super) checksum: U32,
}

const _: () = {
    assert!(size_of::<RawSuperblock>() == 1024);
    assert!(std::mem::offset_of!(RawSuperblock, magic) == 0x38);
    assert!(std::mem::offset_of!(RawSuperblock, reserved_gdt_blocks) == 0xce);
    assert!(std::mem::offset_of!(RawSuperblock, desc_size) == 0xfe);
    assert!(std::mem::offset_of!(RawSuperblock, blocks_count_hi) == 0x150);
    assert!(std::mem::offset_of!(RawSuperblock, mmp_block) == 0x168);
    assert!(std::mem::offset_of!(RawSuperblock, backup_bgs) == 0x24c);
    assert!(std::mem::offset_of!(RawSuperblock, checksum_seed) == 0x270);
    assert!(std::mem::offset_of!(RawSuperblock, orphan_file_inum) == 0x280);
};

/// Which groups have copies of the superblock and of the descriptors, beside group 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Backups {
    /// All.
    All,
    /// 1 and the powers of 3, 5 and 7.
    Sparse,
    /// These; 0 where there is none.
    Two([u64; 2]),
}

/// What does not change while a filesystem is in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Geometry {
    /// Bytes, a power of two.
    pub(super) block_size: u64,
    /// Blocks that the filesystem spans, those before the first group among them.
    pub(super) blocks: u64,
    /// Where group 0 starts.
    pub(super) first_data_block: u64,
    /// Blocks that a bit of a bitmap stands for, a power of two.
    pub(super) cluster_blocks: u64,
    /// A multiple of 8.
    pub(super) clusters_per_group: u64,
    /// At least 1.
    pub(super) groups: u64,
    pub(super) inodes_per_group: u64,
    /// Bytes, a power of two, at most a block.
    pub(super) inode_size: u64,
    /// Bytes, a power of two, at most a block.
    pub(super) descriptor_size: u64,
    pub(super) reserved_gdt_blocks: u64,
    /// The first block of descriptors that lies in its own meta group, if some do.
    pub(super) first_meta_bg: Option<u64>,
    pub(super) backups: Backups,
    /// Whether bitmaps and inode tables may lie in other groups than their own.
    pub(super) flexible: bool,
    pub(super) checksums: Checksums,
}

/// A superblock that makes sense.
#[derive(Clone, Debug)]
pub(super) struct Superblock {
    pub(super) geometry: Geometry,
    pub(super) features: Features,
    /// 1 is clean.
    pub(super) state: u16,
    /// In blocks; stale while mounted.
    pub(super) free_blocks: u64,
    /// The first orphan, 0 for none.
    pub(super) last_orphan: u32,
    /// The journal's inode, 0 for none.
    pub(super) journal_inode: u32,
    /// Whether the journal is on another device.
    pub(super) journal_elsewhere: bool,
    /// The block that says who has it mounted, with the feature `mmp`.
    pub(super) mmp_block: Option<u64>,
    /// The inode of the file that lists orphans, 0 for none.
    pub(super) orphan_file_inode: u32,
}

impl Superblock {
    /// Whether it says that the file of orphans may list some.
    pub(super) fn has_orphan_mark(&self) -> bool {
        self.features.ro_compat & features::RO_COMPAT_ORPHAN_PRESENT != 0
    }
}

impl RawSuperblock {
    /// Whether this is a superblock at all.
    pub(super) fn is_one(&self) -> bool {
        self.magic.get() == MAGIC
            && self.log_block_size.get() <= MAX_LOG_BLOCK_SIZE
            && self.blocks_per_group.get() != 0
    }

    pub(super) fn features(&self) -> Features {
        Features {
            compat: self.feature_compat.get(),
            incompat: self.feature_incompat.get(),
            ro_compat: self.feature_ro_compat.get(),
        }
    }

    /// What it says, once it has been seen to make sense.
    ///
    /// # Errors
    /// [`Trouble::Skip`] where it does not, or has features that are not known.
    pub(super) fn parse(&self) -> Result<Superblock, Trouble> {
        let features = self.features();
        if !self.is_one() {
            return Err(Trouble::skip("has a damaged superblock"));
        }
        match self.rev_level.get() {
            0 if features.compat | features.incompat | features.ro_compat != 0 => {
                return Err(Trouble::skip(
                    "has features that its revision 0 cannot have",
                ));
            }
            0 | 1 => {}
            other => return Err(Trouble::skip(format!("has the unknown revision {other}"))),
        }
        features.check()?;
        let checksums = self.checksums(features)?;
        let wide = features.incompat & features::INCOMPAT_64BIT != 0;
        let number = |lo: U32, hi: U32| match wide {
            true => u64::from(hi.get()) << 32 | u64::from(lo.get()),
            false => u64::from(lo.get()),
        };
        let blocks = number(self.blocks_count_lo, self.blocks_count_hi);
        let has_mmp = features.incompat & features::INCOMPAT_MMP != 0;
        Ok(Superblock {
            geometry: self.geometry(features, checksums, blocks)?,
            features,
            state: self.state.get(),
            free_blocks: number(self.free_blocks_count_lo, self.free_blocks_count_hi),
            last_orphan: self.last_orphan.get(),
            journal_inode: self.journal_inum.get(),
            journal_elsewhere: self.journal_dev.get() != 0 || self.journal_uuid != [0; 16],
            mmp_block: has_mmp.then(|| self.mmp_block.get()),
            orphan_file_inode: self.orphan_file_inum.get(),
        })
    }

    fn checksums(&self, features: Features) -> Result<Checksums, Trouble> {
        let has = |bit| features.ro_compat & bit != 0;
        if !has(features::RO_COMPAT_METADATA_CSUM) {
            return Ok(match has(features::RO_COMPAT_GDT_CSUM) {
                true => Checksums::crc16(&self.uuid),
                false => Checksums::None,
            });
        }
        if self.checksum_type != CHECKSUM_CRC32C {
            return Err(Trouble::skip("has checksums of an unknown kind"));
        }
        let bytes = self.as_bytes();
        if crc32c(!0, &bytes[..bytes.len() - 4]) != self.checksum.get() {
            return Err(Trouble::skip("has a superblock with a wrong checksum"));
        }
        let seed = match features.incompat & features::INCOMPAT_CSUM_SEED {
            0 => crc32c(!0, &self.uuid),
            _ => self.checksum_seed.get(),
        };
        Ok(Checksums::Crc32c { seed })
    }

    fn backups(&self, features: Features) -> Backups {
        if features.compat & features::COMPAT_SPARSE_SUPER2 != 0 {
            Backups::Two(self.backup_bgs.map(|group| u64::from(group.get())))
        } else if features.ro_compat & features::RO_COMPAT_SPARSE_SUPER != 0 {
            Backups::Sparse
        } else {
            Backups::All
        }
    }

    /// The shape, by the rules by which the kernel (`ext4_fill_super`) and e2fsprogs (`ext2fs_open2`)
    /// take or refuse a filesystem.
    fn geometry(
        &self,
        features: Features,
        checksums: Checksums,
        blocks: u64,
    ) -> Result<Geometry, Trouble> {
        let block_size = 1024_u64 << self.log_block_size.get();
        let blocks_per_group = u64::from(self.blocks_per_group.get());
        let clustered = features.ro_compat & features::RO_COMPAT_BIGALLOC != 0;
        let cluster_blocks = self.cluster_blocks(clustered)?;
        let clusters_per_group = blocks_per_group / cluster_blocks;
        if clusters_per_group == 0
            || clusters_per_group % 8 != 0
            || clusters_per_group > block_size * 8
            || clusters_per_group * cluster_blocks != blocks_per_group
            || clustered && clusters_per_group != u64::from(self.clusters_per_group.get())
        {
            return Err(wrong("size of groups"));
        }
        let first_data_block = u64::from(block_size == 1024 && !clustered);
        if u64::from(self.first_data_block.get()) != first_data_block {
            return Err(wrong("first block"));
        }
        if self.rev_level.get() != 0 && self.block_group_nr.get() != 0 {
            return Err(Trouble::skip("begins with a copy of its superblock"));
        }
        let groups = blocks
            .saturating_sub(first_data_block)
            .div_ceil(blocks_per_group);
        if groups == 0 || groups > MAX_GROUPS {
            return Err(wrong("number of blocks"));
        }
        let inodes_per_group = u64::from(self.inodes_per_group.get());
        if inodes_per_group == 0
            || inodes_per_group > block_size * 8
            || inodes_per_group * groups != u64::from(self.inodes_count.get())
        {
            return Err(wrong("number of inodes"));
        }
        let reserved_gdt_blocks = u64::from(self.reserved_gdt_blocks.get());
        let in_meta_groups = features.incompat & features::INCOMPAT_META_BG != 0;
        // With `meta_bg`, the kernel and e2fsprogs disagree on which blocks are reserved.
        if reserved_gdt_blocks > block_size / 4 || in_meta_groups && reserved_gdt_blocks != 0 {
            return Err(wrong("number of reserved blocks"));
        }
        Ok(Geometry {
            block_size,
            blocks,
            first_data_block,
            cluster_blocks,
            clusters_per_group,
            groups,
            inodes_per_group,
            inode_size: self.inode_size(block_size)?,
            descriptor_size: self.descriptor_size(features)?,
            reserved_gdt_blocks,
            first_meta_bg: in_meta_groups.then(|| u64::from(self.first_meta_bg.get())),
            backups: self.backups(features),
            flexible: features.incompat & features::INCOMPAT_FLEX_BG != 0,
            checksums,
        })
    }

    fn cluster_blocks(&self, clustered: bool) -> Result<u64, Trouble> {
        let (cluster, block) = (self.log_cluster_size.get(), self.log_block_size.get());
        let most = if clustered {
            MAX_LOG_CLUSTER_SIZE
        } else {
            block
        };
        match cluster.checked_sub(block) {
            Some(more) if cluster <= most => Ok(1 << more),
            _ => Err(wrong("cluster size")),
        }
    }

    fn inode_size(&self, block_size: u64) -> Result<u64, Trouble> {
        let size = match self.rev_level.get() {
            0 => 128,
            _ => u64::from(self.inode_size.get()),
        };
        match size.is_power_of_two() && (128..=block_size).contains(&size) {
            true => Ok(size),
            false => Err(wrong("size of inodes")),
        }
    }

    fn descriptor_size(&self, features: Features) -> Result<u64, Trouble> {
        if features.incompat & features::INCOMPAT_64BIT == 0 {
            return Ok(32);
        }
        let size = u64::from(self.desc_size.get());
        match size.is_power_of_two() && (64..=1024).contains(&size) {
            true => Ok(size),
            false => Err(wrong("size of group descriptors")),
        }
    }
}

fn wrong(what: &str) -> Trouble {
    Trouble::skip(format!("has a superblock with a wrong {what}"))
}
