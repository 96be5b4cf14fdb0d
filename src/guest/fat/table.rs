//! The file allocation table: an entry for each cluster, 0 if it is free, else which one follows.

use super::boot::{Boot, Kind, dirty};
use crate::guest::Trouble;
use crate::guest::clusters::{CHECK_IT, Chains, Claims, FIRST, Heap, Link, bitmap, set};
use crate::guest::view::View;
use crate::units::{div_ceil, u64_from, usize_from};

/// Bytes that are read of a table at a time: whole entries of 12, 16 and 32 bits. Few in the tests,
/// which should take several.
const PIECE: u64 = if cfg!(test) { 48 } else { 3 << 18 };

/// The bits of the second entry that are clear if it was not unmounted, or a bad sector was met.
/// FAT12 has none. [fatgen103, FAT\[1\]]
const CLEAN_16: u32 = 0xc000;
const CLEAN_32: u32 = 0x0c00_0000;

/// Reads the table, of which all copies must be the same.
///
/// # Errors
/// [`Trouble::Skip`] where they are not, or the table says that something is wrong; [`Trouble::Io`].
pub(super) fn read(view: &View<'_>, boot: &Boot) -> Result<(Chains, Claims), Trouble> {
    let tables = boot.tables()?;
    let mut chains = Chains::new(&boot.heap);
    let mut used = bitmap(&boot.heap);
    let mut next = 0;
    let end = boot.heap.count() + u64::from(FIRST);
    let len = div_ceil(end * boot.kind.bits(), 8);
    let mut at = 0;
    while at < len {
        let piece = same(view, &tables, at, PIECE.min(len - at))?;
        let here = (u64_from(piece.len()) * 8 / boot.kind.bits()).min(end - next);
        for number in 0..here {
            let value = entry(boot.kind, &piece, number);
            let Some(index) = (next + number).checked_sub(u64::from(FIRST)) else {
                check_reserved(boot, next + number, value)?;
                continue;
            };
            // There are fewer than 2^28 clusters.
            let Ok(short) = u32::try_from(index) else {
                continue;
            };
            if value != 0 {
                set(&mut used, index..index + 1);
                chains.push(short, link(boot.kind, &boot.heap, short, value)?)?;
            }
        }
        next += here;
        at += u64_from(piece.len());
    }
    Ok((chains, Claims::new(&boot.heap, used)))
}

/// A piece of the table, the same in all of `tables`, of which there is one at least.
fn same(view: &View<'_>, tables: &[u64], at: u64, len: u64) -> Result<Vec<u8>, Trouble> {
    let mut first = None;
    for table in tables {
        let piece = view.read(table + at, len)?;
        match &first {
            None => first = Some(piece),
            Some(first) if *first == piece => {}
            Some(_) => {
                return Err(Trouble::skip(format!(
                    "has copies of its table that differ: {CHECK_IT}"
                )));
            }
        }
    }
    Ok(first.unwrap_or_default())
}

/// An entry of a piece of the table, by its number in it.
fn entry(kind: Kind, piece: &[u8], number: u64) -> u32 {
    let at = usize_from(number * kind.bits() / 8);
    match (kind, &piece[at..]) {
        (Kind::Fat12, [low, high, ..]) => {
            let both = u32::from(u16::from_le_bytes([*low, *high]));
            if number.is_multiple_of(2) {
                both & 0xfff
            } else {
                both >> 4
            }
        }
        (Kind::Fat16, [low, high, ..]) => u32::from(u16::from_le_bytes([*low, *high])),
        // The highest four bits are nobody's.
        (Kind::Fat32, [a, b, c, d, ..]) => u32::from_le_bytes([*a, *b, *c, *d]) & 0x0fff_ffff,
        // Pieces hold whole entries.
        _ => 1,
    }
}

/// Whether the first two entries, which belong to no cluster, are what they must be.
fn check_reserved(boot: &Boot, number: u64, value: u32) -> Result<(), Trouble> {
    let ones = last_of(boot.kind);
    let good = match (number, boot.kind) {
        (0, _) => value == (ones & !0xff) | u32::from(boot.media()),
        (_, Kind::Fat12) => true,
        (_, Kind::Fat16) if value & CLEAN_16 != CLEAN_16 => return Err(dirty()),
        (_, Kind::Fat32) if value & CLEAN_32 != CLEAN_32 => return Err(dirty()),
        _ => true,
    };
    if good {
        return Ok(());
    }
    Err(Trouble::skip(format!(
        "has a table that begins with {value:#x}, not with its kind of medium: {CHECK_IT}"
    )))
}

/// What the entry of a cluster that is in use says. `value` is not 0.
fn link(kind: Kind, heap: &Heap, index: u32, value: u32) -> Result<Link, Trouble> {
    let last = last_of(kind);
    // Not before the number of clusters was looked at: FAT12 can have one numbered FF0.
    if let Some(next) = heap.index(value) {
        return Ok(Link::Next(next));
    }
    match last - value {
        0..8 => Ok(Link::End),
        // A bad one.
        8 => Ok(Link::Nowhere),
        _ => Err(Trouble::skip(format!(
            "has {value:#x} in its table for cluster {}, which means nothing: {CHECK_IT}",
            index.saturating_add(FIRST)
        ))),
    }
}

/// The largest value of an entry: all bits set.
fn last_of(kind: Kind) -> u32 {
    match kind {
        Kind::Fat12 => 0xfff,
        Kind::Fat16 => 0xffff,
        Kind::Fat32 => 0x0fff_ffff,
    }
}
