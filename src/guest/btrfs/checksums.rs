//! The checksum tree: whatever of files has a checksum is allocated. Where there is no free space tree,
//! this is the second opinion about what is not free.

use super::damaged;
use super::extents::Extents;
use super::tree::{Forest, Root};
use crate::guest::Trouble;
use crate::units::u64_from;

/// Checksums of consecutive sectors, of which the key tells the first.
const ITEM: u8 = 128;
/// The object of all keys. [btrfs_tree.h `BTRFS_EXTENT_CSUM_OBJECTID`]
const OBJECT: u64 = 10_u64.wrapping_neg();

/// Checks that nothing that has a checksum is free.
///
/// # Errors
/// [`Trouble::Skip`] where something is, or the tree is damaged; [`Trouble::Io`].
pub(super) fn check(
    forest: &mut Forest<'_, '_>,
    tree: Root,
    extents: &Extents,
) -> Result<(), Trouble> {
    let (unit, len) = (forest.fs.sector_size, forest.fs.checksum.len());
    forest.walk(tree, &mut |key, data| {
        let sectors = u64_from(data.len()) / len;
        // A leaf has room for less than 2^14 checksums.
        let end = key.offset.checked_add(sectors * unit);
        match end.filter(|_| (key.object, key.kind) == (OBJECT, ITEM)) {
            None => Err(damaged(format_args!("the checksum tree, with {key:?}"))),
            Some(end) if extents.has_free(&(key.offset..end)) => Err(damaged(format_args!(
                "checksums of {}..{end}, where something is free",
                key.offset
            ))),
            Some(_) => Ok(()),
        }
    })
}
