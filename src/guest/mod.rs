//! What the guest's filesystems call free.
//!
//! Each reader looks at a part of a disk, read-only, and says which bytes of it hold nothing that
//! the guest may still want, by the filesystem's own allocation structures. A reader believes
//! nothing it cannot check: counts must agree, checksums be right, the filesystem cleanly
//! unmounted, every feature known. Where anything is in doubt, all of the part is in use, and the
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

/// How sure it is that nobody has a filesystem mounted. One that is mounted by a machine that was
/// suspended, its state saved elsewhere, is consistent on the disk, and yet that machine knows more of
/// it: what it wrote last may lie where the disk still calls it free.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Rest {
    /// It was mounted, and its journal is not empty: what is free was told with the journal replayed in
    /// memory, and is free without it, too.
    Replayed,
    /// It is consistent, and never says whether it is mounted (btrfs).
    Unmarked,
    /// By its own marks it was unmounted.
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
