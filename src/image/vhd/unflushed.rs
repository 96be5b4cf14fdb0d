//! Blocks that were never flushed: a power cut kept the table's entry and lost the longer file.
//!
//! Some programs write the table before, or together with, the block that it names. What is left by a
//! cut then is an entry that names the place right behind the file's end, where the next block would
//! have gone, of a file that still ends with its footer as it was before. A guest's flush makes the
//! longer file durable, so no flushed byte can be in such a block, and it may be taken out.
//!
//! A file that was cut short later, by a copy that was interrupted say, does not end with a footer, and
//! its missing blocks do not begin where it ends: there data is lost, and nothing is repaired.

use std::io;

use super::layout::{DynamicLayout, Tail, sorted_slots};
use crate::error::FormatError;
use crate::format::vhd::{bat_entry_at, encode_bat_entry};
use crate::storage::Storage;
use crate::units::{BlockIndex, FileOffset, FileRange};

/// As far as programs align the place of a block.
const MAX_GAP: u64 = 4096;

/// The blocks that were never flushed, in the order of their places; with one that reaches beyond the
/// end and does not look like that, none.
pub(super) fn unflushed(tail: &Tail, dynamic: &DynamicLayout) -> Vec<BlockIndex> {
    if tail.footer.is_err() || tail.short {
        return Vec::new();
    }
    let mut expected = tail.at;
    let mut found = Vec::new();
    for (start, block) in sorted_slots(&dynamic.map) {
        let end = start.plus(dynamic.slot.len);
        if end <= tail.at {
            continue;
        }
        if start < expected || start.since(expected) >= MAX_GAP {
            return Vec::new();
        }
        expected = end;
        found.push(block);
    }
    found
}

/// What is wrong with such a block.
pub(super) fn problem(dynamic: &DynamicLayout, block: BlockIndex, end: FileOffset) -> FormatError {
    let place = dynamic.map.get(block).slot().unwrap_or_default();
    let place = FileRange::new(place, dynamic.slot.len);
    FormatError::corrupt(
        format!("block table entry {block}"),
        format!("a block at {place}, right behind the end of the file at {end}"),
        "one inside the file: it was never flushed, and `vhdfs check --repair` takes it out",
    )
}

/// Takes `blocks`, as [`unflushed`] gives them, out of the table, durably. Each step leaves a file of
/// which the same can be said.
///
/// # Errors
/// Where the host fails.
pub(super) fn take_out(
    storage: &dyn Storage,
    dynamic: &DynamicLayout,
    blocks: &[BlockIndex],
) -> io::Result<()> {
    // Before what may be lost with the next cut is relied on.
    storage.sync()?;
    // The last one first: those that are left still begin where the file ends.
    for block in blocks.iter().rev() {
        let at = bat_entry_at(dynamic.header.table_offset(), *block);
        storage.write_all_at(&encode_bat_entry(None), at)?;
        storage.sync()?;
    }
    Ok(())
}
