//! What the root leads to: all of it must be in use, and once only.

use std::ops::Range;

use super::boot::Boot;
use super::folder::{BITMAP, Folder, Found, Stream, UP_CASE};
use crate::guest::Trouble;
use crate::guest::clusters::{CHECK_IT, Chains, Claims, ENTRY_LEN, Heap, capacity};
use crate::guest::view::View;
use crate::units::{div_ceil, u64_from};

/// The most folders that are walked.
const MAX_FOLDERS: usize = 4 << 20;

/// The most bytes of a folder. [exFAT 7.4]
const MAX_FOLDER_LEN: u64 = 256 << 20;

/// What the volume itself is made of, all claimed.
#[derive(Debug, Default)]
pub(super) struct System {
    /// Where the root folder lies, in bytes of the part.
    pub(super) root: Vec<Range<u64>>,
    /// Which one and where, in bytes of the part, of each bitmap: with room for all clusters.
    pub(super) bitmaps: Vec<(u8, Vec<Range<u64>>)>,
}

/// Finds the bitmaps and claims them, the root and the up-case table.
///
/// # Errors
/// [`Trouble::Skip`] where one is missing or wrong; [`Trouble::Io`].
pub(super) fn system(
    view: &View<'_>,
    boot: &Boot,
    chains: &Chains,
    claims: &mut Claims,
) -> Result<System, Trouble> {
    let heap = &boot.heap;
    let runs = chains.follow(boot.root, claims)?;
    check_folder_len(capacity(heap, &runs))?;
    let root = heap.all_bytes(&runs);
    let mut bitmaps = Vec::new();
    let mut up_case = 0;
    let mut folder = Folder::new(view, root.clone());
    while let Some(found) = folder.next()? {
        match found[..] {
            [Found::System(BITMAP, flags, stream)] => {
                let place = owned(heap, stream, chains, claims)?;
                if stream.len < div_ceil(heap.count(), 8) || bitmaps.len() > 1 {
                    return Err(bad_bitmap());
                }
                bitmaps.push((flags & 1, heap.all_bytes(&place)));
            }
            [Found::System(UP_CASE, _, stream)] => {
                owned(heap, stream, chains, claims)?;
                up_case += 1;
            }
            _ => {}
        }
    }
    bitmaps.sort_by_key(|(id, _)| *id);
    let ids = bitmaps.iter().map(|(id, _)| *id);
    if !ids.eq(0..boot.fats) {
        return Err(bad_bitmap());
    }
    if up_case != 1 {
        return Err(Trouble::skip(format!(
            "has {up_case} up-case tables, not one: {CHECK_IT}"
        )));
    }
    Ok(System { root, bitmaps })
}

fn bad_bitmap() -> Trouble {
    Trouble::skip(format!(
        "has not the allocation bitmap that it should have: {CHECK_IT}"
    ))
}

fn check_folder_len(len: u64) -> Result<(), Trouble> {
    if len > MAX_FOLDER_LEN || !len.is_multiple_of(u64_from(ENTRY_LEN)) {
        return Err(Trouble::skip(format!(
            "has a folder of {len} bytes, which none can have: {CHECK_IT}"
        )));
    }
    Ok(())
}

/// Claims a stream's clusters, of which it must have enough, and gives them.
fn owned(
    heap: &Heap,
    stream: Stream,
    chains: &Chains,
    claims: &mut Claims,
) -> Result<Vec<Range<u64>>, Trouble> {
    if stream.first == 0 && stream.len == 0 {
        return Ok(Vec::new());
    }
    let first = heap.first(stream.first)?;
    let runs = if stream.contiguous {
        let start = u64::from(first);
        let run = start..start.saturating_add(heap.clusters_for(stream.len));
        claims.take(&run)?;
        vec![run]
    } else {
        chains.follow(first, claims)?
    };
    if stream.len == 0 || capacity(heap, &runs) < stream.len {
        return Err(Trouble::skip(format!(
            "has a file of {} bytes with clusters for {}: {CHECK_IT}",
            stream.len,
            capacity(heap, &runs)
        )));
    }
    Ok(runs)
}

/// Walks all folders from the root, which is claimed, and claims what they and their files own.
///
/// # Errors
/// [`Trouble::Skip`] where something is wrong; [`Trouble::Io`].
pub(super) fn check(
    view: &View<'_>,
    heap: &Heap,
    root: Vec<Range<u64>>,
    chains: &Chains,
    claims: &mut Claims,
) -> Result<(), Trouble> {
    let mut pending = Vec::new();
    let mut count = 0;
    let mut next = Some((root, true));
    while let Some((ranges, is_root)) = next {
        let mut folder = Folder::new(view, ranges);
        while let Some(set) = folder.next()? {
            for found in set {
                match found {
                    Found::Data(stream) => {
                        owned(heap, stream, chains, claims)?;
                    }
                    Found::Folder(stream) => pending.push(stream),
                    Found::System(..) if is_root => {}
                    Found::System(kind, ..) => {
                        let problem = format!("has an entry of its root elsewhere, {kind:#x}");
                        return Err(Trouble::skip(format!("{problem}: {CHECK_IT}")));
                    }
                }
            }
            if pending.len() > MAX_FOLDERS {
                let problem = format!("has more than {MAX_FOLDERS} folders");
                return Err(Trouble::skip(problem));
            }
        }
        count += 1;
        if count > MAX_FOLDERS {
            let problem = format!("has more than {MAX_FOLDERS} folders");
            return Err(Trouble::skip(problem));
        }
        next = match pending.pop() {
            Some(stream) => Some((contents(heap, stream, chains, claims)?, false)),
            None => None,
        };
    }
    Ok(())
}

/// Where a folder's entries lie, in bytes of the part. It is claimed.
fn contents(
    heap: &Heap,
    stream: Stream,
    chains: &Chains,
    claims: &mut Claims,
) -> Result<Vec<Range<u64>>, Trouble> {
    check_folder_len(stream.len)?;
    let runs = owned(heap, stream, chains, claims)?;
    let mut rest = stream.len;
    let mut ranges = heap.all_bytes(&runs);
    for range in &mut ranges {
        let len = (range.end - range.start).min(rest);
        range.end = range.start + len;
        rest -= len;
    }
    Ok(ranges)
}
