//! LVM2: which volumes lie on a physical volume, and which of its extents lie in none.
//!
//! Volumes are read that are nothing but runs of extents of this one physical volume. Those that are
//! more, or that another volume is made of, are in use: snapshots, thin and cached volumes, mirrors,
//! RAID, VDO.

mod group;
mod label;
mod text;

use std::ops::Range;

use rangemap::RangeSet;

use super::Trouble;
use super::view::View;

/// A volume group.
#[derive(Debug)]
pub(super) struct Group {
    /// Its name.
    pub(super) name: String,
    /// Its volumes, as far as they have extents, by name.
    pub(super) volumes: Vec<LogicalVolume>,
    /// What belongs to no volume, in bytes of the physical volume.
    pub(super) unused: RangeSet<u64>,
}

/// A logical volume.
#[derive(Debug)]
pub(super) struct LogicalVolume {
    /// Its name, without the group's.
    pub(super) name: String,
    /// Its ranges on the physical volume. Those of a volume of several stripes are not in the order of
    /// its bytes.
    pub(super) ranges: Vec<Range<u64>>,
    /// Whether `ranges` in their order are the volume's bytes.
    pub(super) linear: bool,
    /// Why it counts as in use whatever it seems to hold, if it does.
    pub(super) kept: Option<String>,
}

/// Reads the metadata of a part that has the mark of LVM2.
///
/// # Errors
/// [`Trouble::Skip`] where anything of it is in doubt, or more than one disk is involved;
/// [`Trouble::Io`].
pub(super) fn read(part: &View<'_>) -> Result<Group, Trouble> {
    let volume = label::read(part)?;
    group::read(part.len(), &volume)
}

#[cfg(test)]
pub(super) mod tests;
