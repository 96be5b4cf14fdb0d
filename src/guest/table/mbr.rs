//! The master boot record, and the chain of extended boot records that logical partitions lie in.

use zerocopy::byteorder::little_endian::U32;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{Kept, RECORD_LEN, Slot, apart, claims, decode, piece, sectors};
use crate::guest::Trouble;
use crate::guest::view::View;
use crate::units::u64_from;

/// Links that a chain of extended boot records may have. Linux follows 100.
const MAX_LINKS: usize = 128;

/// An entry of the table.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct RawEntry {
    /// 0: 80h if the system boots from it, else 0.
    status: u8,
    /// 1: in cylinders, heads and sectors: not used any more.
    first: [u8; 3],
    /// 4: what it is for.
    kind: u8,
    /// 5: as `first`.
    last: [u8; 3],
    /// 8: where it starts, in sectors.
    start: U32,
    /// 12: its sectors.
    count: U32,
}

/// A boot record, master or extended.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawRecord {
    /// 0: code, and the disk's signature.
    code: [u8; 446],
    /// 446: the table.
    entries: [RawEntry; 4],
    /// 510: 55h AAh.
    signature: [u8; 2],
}

const _: () = assert!(u64_from(size_of::<RawRecord>()) == RECORD_LEN);

const SIGNATURE: [u8; 2] = [0x55, 0xaa];
const UNTYPED: u8 = 0x00;
const LDM: u8 = 0x42;
const PROTECTIVE: u8 = 0xee;

impl RawEntry {
    /// Whether Linux takes it for a partition: whatever type it has.
    fn is_used(&self) -> bool {
        self.count.get() != 0
    }

    fn has_status(&self) -> bool {
        matches!(self.status, 0x00 | 0x80)
    }

    fn is_extended(&self) -> bool {
        matches!(self.kind, 0x05 | 0x0f | 0x85)
    }

    /// Whether it says that the disk has a GPT.
    pub(super) fn is_protective(&self) -> bool {
        self.is_used() && self.kind == PROTECTIVE
    }

    /// Whether it can be a partition of a disk with so many `sectors`, and is no piece of code that lies
    /// where an entry would.
    pub(super) fn is_likely(&self, sectors: u64) -> bool {
        let (start, count) = (u64::from(self.start.get()), u64::from(self.count.get()));
        self.is_used() && self.kind != UNTYPED && start > 0 && start + count <= sectors
    }

    fn kept(&self) -> Option<Kept> {
        let (content, reason) = match self.kind {
            UNTYPED => (None, "has no type: Linux sees it, Windows does not"),
            0xfb | 0xfc => (Some("VMFS"), "is for VMware's own use"),
            0xfd => (Some("Linux RAID"), "is marked as a member of a RAID array"),
            _ => return None,
        };
        Some(Kept { content, reason })
    }
}

/// The entries of a boot record, if `sector` is one and says anything.
pub(super) fn entries(sector: &[u8]) -> Option<[RawEntry; 4]> {
    let entries = signed(sector)?;
    let good = entries.iter().all(RawEntry::has_status) && entries.iter().any(RawEntry::is_used);
    good.then_some(entries)
}

/// Whether `sector` has the signature of a boot record, but something else where its entries would be.
pub(super) fn is_garbled(sector: &[u8]) -> bool {
    signed(sector).is_some_and(|entries| !entries.iter().all(RawEntry::has_status))
}

fn signed(sector: &[u8]) -> Option<[RawEntry; 4]> {
    let record: RawRecord = decode(sector)?;
    (record.signature == SIGNATURE).then_some(record.entries)
}

/// The partitions that the master boot record's `entries` tell of.
///
/// # Errors
/// [`Trouble::Skip`] where they cannot be relied on; [`Trouble::Io`].
pub(super) fn read(
    disk: &View<'_>,
    sector: u64,
    entries: &[RawEntry; 4],
) -> Result<Vec<Slot>, Trouble> {
    let mut slots = Vec::new();
    let mut extended = None;
    for (number, entry) in (1..).zip(entries).filter(|(_, entry)| entry.is_used()) {
        if entry.kind == LDM {
            return Err(Trouble::skip("is a dynamic disk of Windows (LDM)"));
        }
        if entry.is_protective() {
            return Err(Trouble::skip(
                "has a GPT of which neither copy is intact: repair it with gdisk or sgdisk",
            ));
        }
        if !entry.is_extended() {
            slots.push(slot(number, 0, entry, sector)?);
        } else if extended.replace(entry).is_some() {
            return Err(Trouble::skip("has more than one extended partition"));
        }
    }
    if let Some(extended) = extended {
        let logical = logical(disk, sector, extended)?;
        let area = slot(0, 0, extended, sector)?.range;
        let mut claims = claims(&slots);
        claims.push((area, "the extended partition"));
        apart(claims)?;
        slots.extend(logical);
    }
    Ok(slots)
}

/// The partition that `entry` tells of, which counts from sector `base` on.
fn slot(number: u32, base: u64, entry: &RawEntry, sector: u64) -> Result<Slot, Trouble> {
    let start = base + u64::from(entry.start.get());
    let range = sectors(start, u64::from(entry.count.get()), sector);
    Ok(Slot {
        name: format!("partition {number}"),
        range: range.ok_or_else(|| Trouble::skip("has a partition beyond all bounds"))?,
        kept: entry.kept(),
    })
}

/// The logical partitions. Each has a boot record of its own, whose first entry counts from that
/// record, and whose second leads to the next record, counted from the start of the `extended`
/// partition.
fn logical(disk: &View<'_>, sector: u64, extended: &RawEntry) -> Result<Vec<Slot>, Trouble> {
    let first = u64::from(extended.start.get());
    let area = slot(0, 0, extended, sector)?.range;
    let mut slots = Vec::new();
    let mut number = 5;
    let mut records = Vec::new();
    let mut next = Some(first);
    while let Some(base) = next.take() {
        let at = base.checked_mul(sector).filter(|at| area.contains(at));
        let record = piece(disk, at, RECORD_LEN)?.and_then(|bytes| decode::<RawRecord>(&bytes));
        let Some(record) = record.filter(|record| record.signature == SIGNATURE) else {
            return Err(Trouble::skip(format!(
                "has a chain of logical partitions that breaks off at sector {base}"
            )));
        };
        if records.contains(&base) || records.len() >= MAX_LINKS {
            return Err(Trouble::skip(
                "has a chain of logical partitions without an end",
            ));
        }
        records.push(base);
        let mut data = None;
        for entry in record.entries.iter().filter(|entry| entry.is_used()) {
            if !entry.is_extended() {
                if data.replace(entry).is_some() {
                    return Err(Trouble::skip("has two logical partitions in one record"));
                }
                continue;
            }
            let link = first + u64::from(entry.start.get());
            if next.replace(link).is_some() {
                return Err(Trouble::skip(
                    "has a chain of logical partitions that forks",
                ));
            }
        }
        if let Some(data) = data {
            slots.push(slot(number, base, data, sector)?);
            number += 1;
        }
    }
    let mut claims = claims(&slots);
    let ranges = records.iter().filter_map(|base| sectors(*base, 1, sector));
    claims.extend(ranges.map(|range| (range, "the record of a logical partition")));
    if (claims.iter()).any(|(range, _)| range.start < area.start || range.end > area.end) {
        return Err(Trouble::skip(
            "has a logical partition outside of the extended one",
        ));
    }
    apart(claims)?;
    Ok(slots)
}

/// That all other partitions that the `entries` beside a GPT tell of are the GPT's `slots`: a disk may
/// carry both for the sake of old systems.
///
/// # Errors
/// [`Trouble::Skip`] where one is not.
pub(super) fn agrees(entries: &[RawEntry; 4], sector: u64, slots: &[Slot]) -> Result<(), Trouble> {
    for (number, entry) in (1..).zip(entries) {
        if !entry.is_used() || entry.is_protective() {
            continue;
        }
        let other = slot(number, 0, entry, sector)?;
        if !slots.iter().any(|slot| slot.range == other.range) {
            return Err(Trouble::skip(
                "has two partition tables, MBR and GPT, that disagree",
            ));
        }
    }
    Ok(())
}
