//! FAT12, FAT16 and FAT32: the file allocation table says which clusters are free.
//!
//! The table has no checksum and next to no magic number, so it is believed only if
//! 1. the boot sector is one of FAT in each of its fields, and FAT32's backup of it says the same,
//! 2. none of the marks that systems leave says that it was not unmounted cleanly,
//! 3. all copies of the table are the same,
//! 4. every file and folder that the root leads to has as many clusters as it has bytes, none of
//!    them free, none in two chains.
//!
//! A volume without such a mark may be mounted all the same: DOS and others leave none.
//!
//! Free are the clusters whose entry is 0. In use is all else: what lies before the first cluster
//! and behind the last one, bad clusters, chains that no folder knows. FAT32's count of free
//! clusters is a hint by its own specification, and not looked at.
//!
//! Source: Microsoft, "FAT: General Overview of On-Disk Format" 1.03 and its fatgen103; what Linux
//! does (fs/fat) where that differs.

mod boot;
mod table;
mod tree;

#[cfg(test)]
mod tests;

use super::view::View;
use super::{Rest, Trouble, Volume};
use boot::{BOOT_LEN, Boot};

/// Which FAT begins here, if one does.
///
/// # Errors
/// [`Trouble::Io`].
pub(super) fn is_here(view: &View<'_>) -> Result<Option<&'static str>, Trouble> {
    Ok(boot_sector(view)?.map(|boot| boot.kind.name()))
}

/// What is free.
///
/// # Errors
/// [`Trouble::Skip`] for all that is in doubt; [`Trouble::Io`].
pub(super) fn read(view: &View<'_>) -> Result<Volume, Trouble> {
    let Some(boot) = boot_sector(view)? else {
        return Err(Trouble::skip("has a boot sector that makes no sense"));
    };
    boot.check(view)?;
    let (chains, mut claims) = table::read(view, &boot)?;
    tree::check(view, &boot, &chains, &mut claims)?;
    let free = claims.free(&boot.heap)?;
    let reported_free = free.iter().map(|run| run.end - run.start).sum();
    Ok(Volume {
        free,
        size: boot.size,
        reported_free,
        rest: Rest::Unmarked,
    })
}

fn boot_sector(view: &View<'_>) -> Result<Option<Boot>, Trouble> {
    let mut sector = [0; BOOT_LEN];
    if view.len() < crate::units::SECTOR_SIZE {
        return Ok(None);
    }
    view.read_at(&mut sector, 0)?;
    Ok(Boot::parse(&sector))
}
