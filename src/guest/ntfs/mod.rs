//! NTFS: what is free by $Bitmap, where all files agree with it.
//!
//! Nothing on an NTFS volume has a checksum. So beyond the marks that say that it was unmounted,
//! everything that can be seen twice is compared:
//! 1. The boot sector gives sizes that fit each other and the part, and leads to $MFT, which holds
//!    its own place and agrees with its copy, $MFTMirr.
//! 2. No record of $MFT was written in part, and its bitmap agrees with every one of them.
//! 3. Every run of every attribute of every file lies in clusters that $Bitmap has in use, and no
//!    cluster belongs to two of them.
//! 4. Every attribute that an attribute list names is there, and the other way round.
//!
//! The journal is not replayed: where it has anything to say, the volume is in use. So is a volume
//! with shadow copies: they read what they need where it was, free or not.
//!
//! ```text
//!   boot sector     boot.rs
//!   $MFT, all of it mft.rs: records (record.rs, lists.rs) and what they map (runs.rs, stream.rs)
//!   may it be read  sleep.rs: hiberfil.sys; state.rs: $Volume, $LogFile; shadows.rs
//!   $Bitmap         clusters.rs
//!   all records     owners.rs
//! ```
//!
//! In use besides what files own: what $Bitmap has in use for nobody, what lies behind the last whole
//! cluster, and the copy of the boot sector there. Not read: more than 2^32 - 1 clusters (a bit of
//! memory each), more than 2^27 records, a root folder over 64 MiB.

mod boot;
mod clusters;
mod lists;
mod mft;
mod owners;
mod record;
mod runs;
mod shadows;
mod sleep;
mod state;
mod stream;
#[cfg(test)]
mod tests;

use std::fmt;

use super::view::View;
use super::{Rest, Trouble, Volume};
use clusters::Clusters;
use mft::Mft;

/// Whether NTFS lies here: the name to show.
///
/// # Errors
/// [`Trouble::Io`].
pub(super) fn is_here(view: &View<'_>) -> Result<Option<&'static str>, Trouble> {
    Ok(boot::is_here(view)?.then_some("NTFS"))
}

/// What is free.
///
/// # Errors
/// [`Trouble::Skip`] where anything is in doubt, [`Trouble::Io`].
pub(super) fn read(view: &View<'_>) -> Result<Volume, Trouble> {
    let geometry = boot::read(view)?;
    let mft = Mft::open(view, geometry)?;
    // First, for it is news for the whole disk.
    sleep::check(&mft)?;
    state::check_flags(&mft)?;
    state::check_log(&mft)?;
    shadows::check_header(view)?;
    let mut clusters = Clusters::read(&mft)?;
    owners::check(&mft, &mut clusters)?;
    Ok(Volume {
        reported_free: clusters.free_bytes(),
        free: clusters.free,
        size: geometry.size,
        // Also with a log that Windows closed: ntfs-3g leaves it as it is, and sets no mark in $Volume.
        rest: Rest::Unmarked,
    })
}

/// Two things that do not agree.
fn damaged(what: impl fmt::Display) -> Trouble {
    Trouble::skip(format!(
        "is damaged ({what}): let Windows' chkdsk repair it"
    ))
}
