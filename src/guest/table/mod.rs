//! Partition tables: which parts a disk has, if that can be told beyond doubt.
//!
//! What no partition holds, the table itself among it, is in use by never being part of anything.

mod gpt;
mod mbr;

use std::ops::Range;

use super::Trouble;
use super::view::View;
use crate::units::usize_from;

/// Bytes that a master boot record has, whatever the sector size.
const RECORD_LEN: u64 = 512;
/// Bytes in a sector that disks come with.
const SECTOR_SIZES: [u64; 2] = [512, 4096];

/// A partition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Slot {
    /// `partition 2`, numbered as Linux and Windows do.
    pub(super) name: String,
    /// Its bytes, on the disk.
    pub(super) range: Range<u64>,
    /// What to call it, and why it counts as in use whatever it seems to hold, by its type.
    pub(super) kept: Option<Kept>,
}

/// What a type of partition tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Kept {
    /// What the partition holds, if anything that has a name.
    pub(super) content: Option<&'static str>,
    /// Why it counts as in use: the end of a sentence that begins with the partition's name.
    pub(super) reason: &'static str,
}

/// The partitions of a disk, in the order of their numbers. `None` where it has no partition table.
///
/// # Errors
/// [`Trouble::Skip`] where there is one, but it cannot be relied on: all of the disk is in use;
/// [`Trouble::Io`].
pub(super) fn read(disk: &View<'_>) -> Result<Option<Vec<Slot>>, Trouble> {
    let sector = disk.sector_size();
    if !SECTOR_SIZES.contains(&sector) {
        return Err(Trouble::skip(format!("has sectors of {sector} bytes")));
    }
    if disk.len() < RECORD_LEN {
        return Ok(None);
    }
    let first = disk.read(0, RECORD_LEN)?;
    let entries = mbr::entries(&first);
    let guided = gpt::read(disk, sector)?;
    let protective =
        entries.is_some_and(|entries| entries.iter().any(mbr::RawEntry::is_protective));
    match (guided, entries) {
        (gpt::Found::Partitions(slots), Some(entries)) if protective => {
            mbr::agrees(&entries, sector, &slots)?;
            checked(disk, slots).map(Some)
        }
        (gpt::Found::Partitions(_), _) => Err(Trouble::skip(
            "has a GPT that its first sector does not tell of: one of the two is a remnant (wipefs)",
        )),
        (gpt::Found::Foreign(other), _) => Err(Trouble::skip(format!(
            "has a GPT that counts in sectors of {other} bytes, but has itself sectors of {sector}"
        ))),
        (gpt::Found::Doubtful(reason), _) => Err(Trouble::skip(reason)),
        (gpt::Found::Nothing, Some(entries)) => by_mbr(disk, &first, &entries),
        (gpt::Found::Nothing, None) if mbr::is_garbled(&first) && !is_boot_sector(&first) => Err(
            Trouble::skip("has a first sector that is neither a partition table nor a boot sector"),
        ),
        (gpt::Found::Nothing, None) => Ok(None),
    }
}

/// The partitions of a disk without a GPT whose first sector has these `entries`, unless that is a boot
/// sector with code where entries would be.
fn by_mbr(
    disk: &View<'_>,
    first: &[u8],
    entries: &[mbr::RawEntry; 4],
) -> Result<Option<Vec<Slot>>, Trouble> {
    let sector = disk.sector_size();
    let slots = mbr::read(disk, sector, entries).and_then(|slots| checked(disk, slots));
    let likely = (entries.iter()).any(|entry| entry.is_likely(disk.len() / sector));
    match slots {
        Err(Trouble::Skip { .. }) if is_boot_sector(first) && !likely => Ok(None),
        slots => slots.map(Some),
    }
}

/// Whether a part, which should hold one filesystem, seems to be a disk with partitions of its own,
/// as a virtual machine's in a logical volume.
pub(super) fn is_here(part: &View<'_>) -> Result<Option<&'static str>, Trouble> {
    if gpt::is_here(part)? {
        return Ok(Some("a GPT"));
    }
    if part.len() < RECORD_LEN {
        return Ok(None);
    }
    let first = part.read(0, RECORD_LEN)?;
    let Some(entries) = mbr::entries(&first) else {
        return Ok(None);
    };
    match by_mbr(part, &first, &entries) {
        Ok(None) => Ok(None),
        Err(Trouble::Io(error)) => Err(Trouble::Io(error)),
        Ok(Some(_)) | Err(Trouble::Skip { .. }) => Ok(Some("a partition table")),
    }
}

/// Whether the first sector is that of a FAT, NTFS or exFAT volume, or made like one (extlinux): a jump,
/// and either a size of sectors or a name that makes sense. A master boot record has none of it.
fn is_boot_sector(first: &[u8]) -> bool {
    let jumps = matches!(first, [0xeb, _, 0x90, ..] | [0xe9, ..]);
    let names: [&[u8]; 2] = [b"NTFS    ", b"EXFAT   "];
    let named = names.iter().any(|name| first[3..].starts_with(name));
    let sector = u16::from_le_bytes([first[11], first[12]]);
    jumps && (named || matches!(sector, 512 | 1024 | 2048 | 4096))
}

/// The slots, if they lie on the disk, clear of its first sector and of each other.
fn checked(disk: &View<'_>, slots: Vec<Slot>) -> Result<Vec<Slot>, Trouble> {
    for slot in &slots {
        if slot.range.end > disk.len() {
            return Err(Trouble::skip(format!(
                "is too small for its partition table: {} ends at {} of {} bytes",
                slot.name,
                slot.range.end,
                disk.len()
            )));
        }
    }
    let mut claims = claims(&slots);
    claims.push((0..RECORD_LEN, "the partition table"));
    apart(claims)?;
    Ok(slots)
}

/// A range of the disk, and whose it is.
type Claim<'a> = (Range<u64>, &'a str);

fn claims(slots: &[Slot]) -> Vec<Claim<'_>> {
    (slots.iter())
        .map(|slot| (slot.range.clone(), slot.name.as_str()))
        .collect()
}

/// That no two of the claims share a byte.
///
/// # Errors
/// [`Trouble::Skip`] where two do.
fn apart(mut claims: Vec<Claim<'_>>) -> Result<(), Trouble> {
    claims.sort_by_key(|(range, _)| (range.start, range.end));
    for pair in claims.windows(2) {
        let [(first, its), (second, others)] = pair else {
            continue;
        };
        if second.start < first.end {
            return Err(Trouble::skip(format!(
                "has partitions that overlap: {its} and {others}"
            )));
        }
    }
    Ok(())
}

/// The byte range of `count` sectors from `start` on. `None` where no disk is so large.
fn sectors(start: u64, count: u64, sector: u64) -> Option<Range<u64>> {
    let start = start.checked_mul(sector)?;
    Some(start..start.checked_add(count.checked_mul(sector)?)?)
}

/// The structure `T` that `bytes` begin with; callers pass enough of them.
fn decode<T: zerocopy::FromBytes>(bytes: &[u8]) -> Option<T> {
    T::read_from_prefix(bytes).ok().map(|(value, _)| value)
}

/// All of a `len`-byte piece of the disk at `start`; `None` where it lies beyond the disk.
fn piece(disk: &View<'_>, start: Option<u64>, len: u64) -> Result<Option<Vec<u8>>, Trouble> {
    let start = start.filter(|start| start.checked_add(len).is_some_and(|end| end <= disk.len()));
    let Some(start) = start else { return Ok(None) };
    let mut bytes = vec![0; usize_from(len)];
    disk.read_at(&mut bytes, start)?;
    Ok(Some(bytes))
}

#[cfg(test)]
mod tests;
