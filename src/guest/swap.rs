//! Linux swap space: nothing in it outlives the system that wrote it, unless that system sleeps in it.
//! [Linux include/linux/swap.h, mm/swapfile.c; util-linux mkswap.c]

use rangemap::RangeSet;
use zerocopy::byteorder::little_endian::U32;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::view::View;
use super::{Rest, Trouble, Volume, add_run};
use crate::units::u64_from;

/// Pages that machines have. The signature ends the first one.
const PAGE_SIZES: [u64; 5] = [4 << 10, 8 << 10, 16 << 10, 32 << 10, 64 << 10];
const SIGNATURE_LEN: u64 = 10;
const HEADER_AT: u64 = 1024;
const VERSION: u32 = 1;

/// The header as it lies on the disk, 1 KiB into the first page.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawHeader {
    /// 0: 1.
    version: U32,
    /// 4: the number of the last page.
    last_page: U32,
    /// 8: how many pages are bad.
    bad_page_count: U32,
    /// 12: which one it is.
    uuid: [u8; 16],
    /// 28: its label.
    label: [u8; 16],
    /// 44: not used.
    padding: [U32; 117],
}

/// Where the numbers of the bad pages lie.
const BAD_PAGES_AT: u64 = HEADER_AT + u64_from(size_of::<RawHeader>());

const _: () = assert!(BAD_PAGES_AT == 1536);

/// What a signature says.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Signature {
    /// Pages to swap to.
    Swap,
    /// The same, of before 1998: no header.
    Old,
    /// The image of a system that sleeps.
    Asleep,
}

/// TuxOnIce writes it to the very start, and leaves the signature.
const TUX_ON_ICE: [u8; 8] = *b"\xed\xc3\x02\xe9\x98\x56\xe5\x0c";

fn signature(bytes: &[u8]) -> Option<Signature> {
    match bytes {
        b"SWAPSPACE2" => Some(Signature::Swap),
        b"SWAP-SPACE" => Some(Signature::Old),
        b"LINHIB0001" => Some(Signature::Asleep),
        [b'S', b'1' | b'2', rest @ ..] | [b'U', b'L', rest @ ..]
            if rest.starts_with(b"SUSPEND") =>
        {
            Some(Signature::Asleep)
        }
        _ => None,
    }
}

/// Whether a system sleeps in the swap space whose first page ends with `bytes`.
pub(super) fn is_asleep(bytes: &[u8]) -> bool {
    signature(bytes) == Some(Signature::Asleep)
}

/// Every signature, with the page size that it tells of.
fn signatures(part: &View<'_>) -> Result<Vec<(u64, Signature)>, Trouble> {
    let mut found = Vec::new();
    for page in PAGE_SIZES.into_iter().filter(|page| *page <= part.len()) {
        let bytes = part.read(page - SIGNATURE_LEN, SIGNATURE_LEN)?;
        found.extend(signature(&bytes).map(|signature| (page, signature)));
    }
    Ok(found)
}

fn tux_sleeps(part: &View<'_>) -> Result<bool, Trouble> {
    let len = u64_from(TUX_ON_ICE.len());
    Ok(part.len() >= len && part.read(0, len)? == TUX_ON_ICE)
}

/// Whether swap space is here, in use or not.
pub(super) fn is_here(part: &View<'_>) -> Result<Option<&'static str>, Trouble> {
    let here = !signatures(part)?.is_empty() || tux_sleeps(part)?;
    Ok(here.then_some("Linux swap"))
}

/// What is free of swap space: every page but the first and the bad ones.
///
/// # Errors
/// As every reader's; the guest sleeps if its image is here.
pub(super) fn read(part: &View<'_>) -> Result<Volume, Trouble> {
    let signatures = signatures(part)?;
    if tux_sleeps(part)?
        || signatures
            .iter()
            .any(|(_, kind)| *kind == Signature::Asleep)
    {
        return Err(Trouble::hibernated(
            "holds the memory of a system that sleeps: wake it and shut it down",
        ));
    }
    let &[(page, Signature::Swap)] = &signatures[..] else {
        return Err(Trouble::skip("has signatures of swap space that disagree"));
    };
    let bytes = part.read(HEADER_AT, u64_from(size_of::<RawHeader>()))?;
    let Ok((header, _)) = RawHeader::read_from_prefix(&bytes) else {
        return Err(Trouble::skip("has no header"));
    };
    let version = header.version.get();
    if version != VERSION {
        return Err(Trouble::skip(format!("is of version {version}, not 1")));
    }
    let last = u64::from(header.last_page.get());
    // Below 2^48: the pages are at most 64 KiB.
    let size = (last + 1) * page;
    if last == 0 || size > part.len() {
        return Err(Trouble::skip(format!(
            "claims {size} bytes, but has {}",
            part.len()
        )));
    }
    let bad = bad_pages(part, page, &header)?;
    let mut free = RangeSet::new();
    add_run(&mut free, page..size)?;
    for number in bad {
        if number == 0 || number > last {
            return Err(Trouble::skip(format!(
                "has a bad page {number}, but only {last} pages"
            )));
        }
        free.remove(number * page..(number + 1) * page);
    }
    let reported_free = free.iter().map(|run| run.end - run.start).sum();
    Ok(Volume {
        rest: Rest::Unmarked,
        free,
        size,
        reported_free,
    })
}

/// The numbers of the pages that must not be used.
fn bad_pages(part: &View<'_>, page: u64, header: &RawHeader) -> Result<Vec<u64>, Trouble> {
    let count = u64::from(header.bad_page_count.get());
    let room = page - SIGNATURE_LEN - BAD_PAGES_AT;
    if count > room / 4 {
        return Err(Trouble::skip(format!(
            "has {count} bad pages, more than its first page can list"
        )));
    }
    let bytes = part.read(BAD_PAGES_AT, count * 4)?;
    let (numbers, _) = bytes.as_chunks::<4>();
    let mut numbers: Vec<u64> = (numbers.iter())
        .map(|number| u64::from(u32::from_le_bytes(*number)))
        .collect();
    numbers.sort_unstable();
    numbers.dedup();
    Ok(numbers)
}

#[cfg(test)]
mod tests;
