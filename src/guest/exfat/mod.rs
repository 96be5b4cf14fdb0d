//! exFAT: the allocation bitmap says which clusters are free.
//!
//! It is believed only if
//! 1. the boot region and its backup have the right checksums and say the same,
//! 2. the volume is not marked as dirty or damaged, and holds nothing critical that is unknown,
//! 3. every file and folder that the root leads to has as many clusters as it has bytes, none of
//!    them free, none owned twice, and the right checksum over its entries; so do the bitmap itself
//!    and the up-case table.
//!
//! A volume that is not marked as dirty may be mounted all the same: the specification says that
//! systems "should" set the mark (3.1.13.2), and some never do.
//!
//! In use is all else: what lies before the first cluster and behind the last one, and what is
//! marked but no folder knows. The percentage in use is a hint by its own specification, and not
//! looked at.
//!
//! Source: Microsoft, "exFAT file system specification", revision 1.00; numbers of its sections are
//! given.

mod boot;
mod folder;
mod table;
mod tree;

#[cfg(test)]
mod tests;

use super::clusters::Claims;
use super::view::View;
use super::{Rest, Trouble, Volume};
use boot::Boot;

/// Whether exFAT begins here.
///
/// # Errors
/// [`Trouble::Io`].
pub(super) fn is_here(view: &View<'_>) -> Result<Option<&'static str>, Trouble> {
    Ok(boot::has_magic(view)?.then_some("exFAT"))
}

/// What is free.
///
/// # Errors
/// [`Trouble::Skip`] for all that is in doubt; [`Trouble::Io`].
pub(super) fn read(view: &View<'_>) -> Result<Volume, Trouble> {
    let boot = Boot::read(view)?;
    let heap = &boot.heap;
    let chains = table::chains(view, &boot)?;
    let mut claims = Claims::unmarked(heap);
    let system = tree::system(view, &boot, &chains, &mut claims)?;
    let bitmaps = table::bitmaps(view, &boot, &system)?;
    let reported_free = bitmaps.free_clusters * heap.cluster_size();
    let mut claims = claims.marked(bitmaps.used)?;
    tree::check(view, heap, system.root, &chains, &mut claims)?;
    Ok(Volume {
        free: claims.free(heap)?,
        size: boot.size,
        reported_free,
        rest: Rest::Unmarked,
    })
}
