//! What the guest's filesystems call free.
//!
//! Each reader looks at a part of a disk, read-only, and says which bytes of it hold nothing that
//! the guest may still want, by the filesystem's own allocation structures. A reader believes
//! nothing it cannot check: counts must agree, checksums be right, no mark say that the filesystem was
//! not unmounted, every feature known. Where anything is in doubt, all of the part is in use, and the
//! survey says why. What no reader understands is in use.
//!
//! ```text
//!   survey    partition table, LVM2 -> parts               [table/, lvm/]
//!     |       what each part holds                          [survey/, container.rs]
//!   readers   NTFS, ext2/3/4, XFS, btrfs, FAT, exFAT, swap
//!     |
//!   Survey    free disk ranges, a line per part, and the evidence: a hash of every read
//! ```
//!
//! Free bytes may be lost only while nobody can write to the disk, and only if
//! [`Evidence::still_holds`] right before.
//!
//! # Who says on the disk that a filesystem is mounted
//! A machine that was suspended, its state saved elsewhere, will go on with what it knows: data that it has
//! written may lie where the disk calls all free. So a filesystem may be believed without asking somebody
//! who knows of all such machines only if its driver puts a mark on the disk *before the first data of a
//! mount*. Such a filesystem without the mark is [`Rest::Unmounted`]. All others are [`Rest::Unmarked`],
//! whichever driver wrote to the disk last: that cannot be seen on it. A driver that takes the mark away
//! while it has the filesystem mounted (frozen, or all is flushed) does no harm: nothing is missing then.
//!
//! | filesystem | driver | mark before the first data | source |
//! |---|---|---|---|
//! | ext3, ext4 | Linux | the feature `needs_recovery`; mount, remount and thaw wait for it | `fs/ext4/super.c`: `ext4_setup_super`, `ext4_unfreeze`, `ext4_commit_super`; tested |
//! | ext2; ext3 and ext4 without a journal or with `noload` | Linux | `s_state` is not 1, likewise | the same; `fs/ext2/super.c`: `ext2_write_super`; tested |
//! | ext2, ext3, ext4 | FreeBSD, NetBSD; fuse2fs | `s_state`, likewise | `ext2_vfsops.c`: `ext2_mountfs`; `ext2fs_vfsops.c`: `ext2fs_mount`; `fuse2fs.c`: `op_init` |
//! | ext2, ext3, ext4 | Ext2Fsd, Ext4Fsd (Windows) | **none** | `Ext2SaveSuper` and its callers: `s_state` is never written |
//! | XFS | Linux | **none**: the log ends with the unmount record until the first log write, up to 30 s later, also after a remount | `fs/xfs/xfs_log.c`: `xfs_log_mount_finish`, `xfs_log_worker`; tested |
//! | btrfs | Linux | **none** | `fs/btrfs/disk-io.c`: there is no such field; tested |
//! | NTFS | Windows | the log is of version 2.0, or loses its mark of being clean, at mount | Microsoft, "Windows 8 volume compatibility considerations"; ntfs-3g's `logfile.h` |
//! | NTFS | ntfs-3g | **none**: a log that Windows closed stays as it is | `libntfs-3g/volume.c`: `ntfs_device_mount`; tested |
//! | NTFS | Linux ntfs3 | the log is emptied at mount, and with the first change the volume is dirty | `fs/ntfs3/fsntfs.c`: `ntfs_loadlog_and_replay`, `ntfs_set_state` |
//! | FAT | Linux | dirty in the boot sector at mount; older ones: **none** | `fs/fat/inode.c`: `fat_set_state` |
//! | FAT | Windows NT | dirty with the first change, clean again when all is flushed | fastfat's `cachesup.c`: `FatSetDirtyBcb` |
//! | FAT | macOS, FreeBSD | dirty in the table; FAT12: **none** | `msdosfs_fat.c`: `markvoldirty` |
//! | FAT | DOS, FatFs in devices | **none** | fatgen103: drivers "may use" the bits; FatFs's `ff.c`: `BS_NTres` is never written |
//! | exFAT | Linux | dirty with the first cluster that is given out, clean again after `sync` | `fs/exfat/super.c`: `exfat_set_vol_flags`, `exfat_sync_fs` |
//! | exFAT | exfat-fuse | dirty at mount | `libexfat/mount.c`: `exfat_soil_super_block`; tested |
//! | exFAT | Windows, macOS | not known: the specification says "should" | exFAT 3.1.13.2 |
//! | exFAT | FatFs in devices | **none** | FatFs's `ff.c`: `BPB_VolFlagEx` is never written |
//! | swap space | Linux | **none** | `mm/swapfile.c`: the header is only read |
//! | what no volume has of a group | LVM2 | the group's description is written before a volume is there to be written to | `lib/metadata/lv_manip.c`: `vg_write`, `vg_commit`, then activation |
//!
//! ext2, ext3 and ext4 are believed in spite of Ext2Fsd and Ext4Fsd: no system brings these along, and
//! without ext4 there would be nothing left. A suspended Windows with one of them is not noticed.

mod bits;
mod btrfs;
mod clusters;
mod container;
mod exfat;
mod ext;
mod fat;
mod lvm;
mod ntfs;
mod raw;
mod survey;
mod swap;
mod table;
#[cfg(test)]
mod testing;
mod view;
mod xfs;

use std::io;
use std::ops::Range;

use rangemap::RangeSet;

pub use survey::survey;
pub use view::{Evidence, Source};

/// Why a reader gives up a part.
#[derive(Debug)]
pub(crate) enum Trouble {
    /// The part counts as in use, for this reason: the end of a sentence that begins with the name
    /// of the filesystem ("was not unmounted cleanly").
    Skip {
        /// For people.
        reason: String,
        /// The guest sleeps, with what it knows of its filesystems in memory: nothing on this disk
        /// may be touched.
        hibernated: bool,
    },
    /// The host cannot read.
    Io(io::Error),
}

impl Trouble {
    pub(crate) fn skip(reason: impl Into<String>) -> Self {
        Self::Skip {
            reason: reason.into(),
            hibernated: false,
        }
    }

    pub(crate) fn hibernated(reason: impl Into<String>) -> Self {
        Self::Skip {
            reason: reason.into(),
            hibernated: true,
        }
    }
}

impl From<io::Error> for Trouble {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

/// How sure it is that nobody has a filesystem mounted: see
/// [above](self#who-says-on-the-disk-that-a-filesystem-is-mounted). One that is mounted by a machine that
/// was suspended is consistent on the disk, and yet that machine knows more of it: what it wrote last may
/// lie where the disk still calls it free.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Rest {
    /// It was mounted, and its journal is not empty: what is free was told with the journal replayed in
    /// memory, and is free without it, too.
    Replayed,
    /// It is consistent, and may be mounted: not all drivers that write it mark it first.
    Unmarked,
    /// It does not have the mark that it would have if it were mounted.
    Unmounted,
}

/// What a reader found in a part whose every doubt is settled.
#[derive(Debug)]
pub(crate) struct Volume {
    /// What is free, in bytes of the part. Whole allocation units, but for what the part's end cuts.
    pub(crate) free: RangeSet<u64>,
    /// Bytes that the filesystem spans; the rest of the part is in use.
    pub(crate) size: u64,
    /// Bytes that the filesystem's own tools call free. Equal to the sum of `free`, unless some of it
    /// must be kept all the same (XFS's free lists).
    pub(crate) reported_free: u64,
    /// How sure it is that nobody has it mounted.
    pub(crate) rest: Rest,
}

/// The most free runs that are taken from one part: more is no filesystem that compaction helps, and
/// each takes memory.
const MAX_RUNS: usize = 4 << 20;

/// Adds a run to the free ones of a volume, in bytes.
///
/// # Errors
/// [`Trouble::Skip`] where there are too many.
pub(crate) fn add_run(free: &mut RangeSet<u64>, run: Range<u64>) -> Result<(), Trouble> {
    if !run.is_empty() {
        free.insert(run);
    }
    if free.len() > MAX_RUNS {
        return Err(Trouble::skip(format!(
            "has its free space in more than {MAX_RUNS} pieces"
        )));
    }
    Ok(())
}

/// What to look for.
#[derive(Clone, Copy, Debug, Default)]
pub struct SurveyOptions {
    /// Count the pages of Linux swap space as free. They are, unless the guest sleeps, which is looked
    /// for; off by default.
    pub swap: bool,
}

/// What became of a part of the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Its filesystem told what is free.
    Read {
        /// Bytes that the filesystem's own tools call free.
        reported_free: u64,
        /// Bytes of them that may go.
        free: u64,
        /// How sure it is that nobody has it mounted.
        rest: Rest,
    },
    /// All of it counts as in use.
    Skipped {
        /// Why: the end of a sentence that begins with the part's name.
        reason: String,
    },
}

/// A partition, a logical volume, or the whole disk where it has no partitions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// What to call it: `partition 2`, `volume vg0/root`, `the disk`.
    pub name: String,
    /// Where its first byte lies on the disk.
    pub start: u64,
    /// Its bytes.
    pub size: u64,
    /// Where all of it lies: disjoint disk ranges, in the order of its bytes.
    pub ranges: Vec<Range<u64>>,
    /// What it holds, if that is known: `ext4`, `NTFS`, `LUKS`.
    pub content: Option<&'static str>,
    /// What became of it.
    pub outcome: Outcome,
}

/// What may be freed on a disk, by its guest's filesystems.
#[derive(Debug)]
pub struct Survey {
    /// Every part, in the order of the partition table. No two share a free byte.
    pub parts: Vec<Part>,
    /// Disk ranges that hold nothing that the guest may want.
    pub free: RangeSet<u64>,
    /// What all this rests on.
    pub evidence: Evidence,
}
