//! The table of chains, and the bitmaps. [exFAT 4.1, 7.1]

use super::boot::Boot;
use super::tree::System;
use crate::guest::Trouble;
use crate::guest::bits::clear_runs;
use crate::guest::clusters::{CHECK_IT, Chains, FIRST, Heap, Link};
use crate::guest::view::View;
use crate::units::{div_ceil, u64_from, usize_from};

/// Bytes that are read at a time; few in the tests, which should take several.
const PIECE: u64 = if cfg!(test) { 8 } else { 1 << 20 };

/// The first two entries of the table, which belong to no cluster. [exFAT 4.1.1, 4.1.2]
const RESERVED: [u32; 2] = [0xffff_fff8, 0xffff_ffff];

/// The last cluster of a chain.
const END: u32 = 0xffff_ffff;

/// Reads the table that is in use. Of clusters that are in no chain, it may say anything.
///
/// # Errors
/// [`Trouble::Skip`] where it does not begin as one; [`Trouble::Io`].
pub(super) fn chains(view: &View<'_>, boot: &Boot) -> Result<Chains, Trouble> {
    let mut chains = Chains::new(&boot.heap);
    let len = (boot.heap.count() + u64::from(FIRST)) * 4;
    let mut number = 0_u32;
    let mut at = 0;
    while at < len {
        let piece = view.read(boot.table_start + at, PIECE.min(len - at))?;
        let (entries, _) = piece.as_chunks::<4>();
        for entry in entries {
            let value = u32::from_le_bytes(*entry);
            match number.checked_sub(FIRST) {
                Some(index) => chains.push(index, link(&boot.heap, value))?,
                None if RESERVED.get(usize_from(u64::from(number))) == Some(&value) => {}
                None => {
                    return Err(Trouble::skip(format!(
                        "has a table that does not begin as one: {CHECK_IT}"
                    )));
                }
            }
            // There are at most `MAX_CLUSTERS`.
            number = number.saturating_add(1);
        }
        at += u64_from(piece.len());
    }
    Ok(chains)
}

fn link(heap: &Heap, value: u32) -> Link {
    match heap.index(value) {
        Some(next) => Link::Next(next),
        None if value == END => Link::End,
        None => Link::Nowhere,
    }
}

/// What the bitmaps say.
pub(super) struct Bitmaps {
    /// A bit for each cluster, set where one of them has it set.
    pub(super) used: Vec<u8>,
    /// How many are free by the one that is in use.
    pub(super) free_clusters: u64,
}

/// Reads the bitmaps. Of two, free is only what is free in both: one of them is the other's older
/// state.
///
/// # Errors
/// As [`View::read`].
pub(super) fn bitmaps(view: &View<'_>, boot: &Boot, system: &System) -> Result<Bitmaps, Trouble> {
    let mut used = Vec::new();
    let mut free_clusters = 0;
    for (id, place) in &system.bitmaps {
        let bitmap = bitmap(view, boot, place)?;
        if *id == boot.active {
            let free = clear_runs(&bitmap, boot.heap.count());
            free_clusters = free.map(|run| run.end - run.start).sum();
        }
        if used.is_empty() {
            used = bitmap;
        } else {
            (used.iter_mut().zip(&bitmap)).for_each(|(used, byte)| *used |= byte);
        }
    }
    Ok(Bitmaps {
        used,
        free_clusters,
    })
}

/// Reads the bitmap that lies in `place`, ranges with room for all of it.
fn bitmap(
    view: &View<'_>,
    boot: &Boot,
    place: &[std::ops::Range<u64>],
) -> Result<Vec<u8>, Trouble> {
    let len = usize_from(div_ceil(boot.heap.count(), 8));
    let mut bitmap = vec![0; len];
    let mut rest = &mut bitmap[..];
    for range in place {
        let mut at = range.start;
        while at < range.end && !rest.is_empty() {
            let len = (range.end - at).min(PIECE).min(u64_from(rest.len()));
            let (piece, tail) = rest.split_at_mut(usize_from(len));
            view.read_at(piece, at)?;
            rest = tail;
            at += len;
        }
    }
    Ok(bitmap)
}
