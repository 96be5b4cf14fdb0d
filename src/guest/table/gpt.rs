//! The GUID partition table. \[UEFI 5.3\]

use uuid::{Uuid, uuid};
use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{Kept, SECTOR_SIZES, Slot, apart, claims, decode, piece, sectors};
use crate::guest::Trouble;
use crate::guest::view::View;
use crate::units::{u64_from, usize_from};

const SIGNATURE: [u8; 8] = *b"EFI PART";
const REVISION: u32 = 0x0001_0000;
const PRIMARY: u64 = 1;
const CRC_AT: usize = 16;
/// The most bytes of entries that are read: 128 times what every tool makes.
const MAX_ENTRIES_LEN: u64 = 2 << 20;

/// A header as it lies on the disk. \[UEFI 5.3.2\]
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawHeader {
    /// 0: `EFI PART`.
    signature: [u8; 8],
    /// 8: 1.0.
    revision: U32,
    /// 12: bytes of the header.
    size: U32,
    /// 16: CRC-32 of the header with this field 0.
    crc: U32,
    /// 20: 0.
    reserved: U32,
    /// 24: where this header lies. All places count sectors.
    my_lba: U64,
    /// 32: where the other header lies.
    alternate_lba: U64,
    /// 40: the first sector that a partition may use.
    first_usable: U64,
    /// 48: the last one.
    last_usable: U64,
    /// 56: which disk it is.
    disk: [u8; 16],
    /// 72: where the entries start.
    entries_lba: U64,
    /// 80: how many there are.
    entry_count: U32,
    /// 84: bytes of each.
    entry_size: U32,
    /// 88: CRC-32 of all of them.
    entries_crc: U32,
}

/// An entry as it lies on the disk. \[UEFI 5.3.3\]
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawEntry {
    /// 0: what it is for; all 0: not used.
    kind: [u8; 16],
    /// 16: which one it is.
    id: [u8; 16],
    /// 32: its first sector.
    first: U64,
    /// 40: its last sector.
    last: U64,
    /// 48: flags.
    attributes: U64,
    /// 56: its name, in UTF-16.
    name: [u8; 72],
}

const _: () = assert!(size_of::<RawHeader>() == 92);
const _: () = assert!(size_of::<RawEntry>() == 128);

/// What was found.
pub(super) enum Found {
    /// No GPT.
    Nothing,
    /// One, and what it says is beyond doubt, but for what its partitions' ranges have to do with each
    /// other.
    Partitions(Vec<Slot>),
    /// One that counts in sectors of another size.
    Foreign(u64),
    /// One that cannot be relied on: the end of a sentence that begins with the disk's name.
    Doubtful(String),
}

/// A header and its entries whose checksums are right.
struct Copy {
    header: RawHeader,
    entries: Vec<u8>,
}

/// Whether a header lies where it should, for any size of sectors.
///
/// # Errors
/// [`Trouble::Io`].
pub(super) fn is_here(disk: &View<'_>) -> Result<bool, Trouble> {
    for sector in SECTOR_SIZES {
        let found = piece(disk, Some(sector), u64_from(SIGNATURE.len()))?;
        if found.is_some_and(|bytes| bytes == SIGNATURE) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Reads the GPT of a disk with sectors of `sector` bytes.
///
/// # Errors
/// [`Trouble::Io`].
pub(super) fn read(disk: &View<'_>, sector: u64) -> Result<Found, Trouble> {
    let last = (disk.len() / sector).saturating_sub(1);
    let Some(primary) = copy(disk, sector, PRIMARY)? else {
        for other in SECTOR_SIZES {
            if other != sector && copy(disk, other, PRIMARY)?.is_some() {
                return Ok(Found::Foreign(other));
            }
        }
        return Ok(match copy(disk, sector, last)? {
            None => Found::Nothing,
            Some(backup) => slots(disk, sector, &backup, None),
        });
    };
    // After the disk was grown, this is in its middle.
    let backup = match primary.header.alternate_lba.get() {
        PRIMARY => None,
        other => copy(disk, sector, other)?,
    };
    if (backup.as_ref()).is_some_and(|backup| backup.entries != primary.entries) {
        return Ok(Found::Doubtful(
            "has a GPT whose two copies disagree: repair it with gdisk or sgdisk".to_owned(),
        ));
    }
    Ok(slots(disk, sector, &primary, backup.as_ref()))
}

/// The header in sector `lba` with its entries, if their checksums are right.
fn copy(disk: &View<'_>, sector: u64, lba: u64) -> Result<Option<Copy>, Trouble> {
    let Some(bytes) = piece(disk, lba.checked_mul(sector), sector)? else {
        return Ok(None);
    };
    let Some(header) = header(&bytes, lba) else {
        return Ok(None);
    };
    let len = u64::from(header.entry_count.get()) * u64::from(header.entry_size.get());
    if len > MAX_ENTRIES_LEN {
        return Ok(None);
    }
    let entries = piece(disk, header.entries_lba.get().checked_mul(sector), len)?;
    Ok(entries
        .filter(|entries| crc32fast::hash(entries) == header.entries_crc.get())
        .map(|entries| Copy { header, entries }))
}

/// The header that lies in sector `lba`, of which these are the `bytes`.
fn header(bytes: &[u8], lba: u64) -> Option<RawHeader> {
    let header: RawHeader = decode(bytes)?;
    let size = usize::try_from(header.size.get()).ok()?;
    let mut covered = bytes.get(..size)?.to_vec();
    covered.get_mut(CRC_AT..CRC_AT + 4)?.fill(0);
    let entry = header.entry_size.get();
    let good = header.signature == SIGNATURE
        && header.revision.get() == REVISION
        && size >= size_of::<RawHeader>()
        && header.my_lba.get() == lba
        && entry.is_power_of_two()
        && u64::from(entry) >= u64_from(size_of::<RawEntry>())
        && crc32fast::hash(&covered) == header.crc.get();
    good.then_some(header)
}

/// The partitions that `copy` tells of.
fn slots(disk: &View<'_>, sector: u64, copy: &Copy, other: Option<&Copy>) -> Found {
    match partitions(disk, sector, copy, other) {
        Ok(slots) => Found::Partitions(slots),
        Err(reason) => Found::Doubtful(reason),
    }
}

fn partitions(
    disk: &View<'_>,
    sector: u64,
    copy: &Copy,
    other: Option<&Copy>,
) -> Result<Vec<Slot>, String> {
    let usable = copy.header.first_usable.get()..=copy.header.last_usable.get();
    let mut slots = Vec::new();
    let size = usize_from(u64::from(copy.header.entry_size.get()));
    for (number, bytes) in (1_u32..).zip(copy.entries.chunks_exact(size)) {
        let Some(entry) = decode::<RawEntry>(bytes).filter(|entry| entry.kind != [0; 16]) else {
            continue;
        };
        let kind = Uuid::from_bytes_le(entry.kind);
        if matches!(kind, LDM_METADATA | LDM_DATA) {
            return Err("is a dynamic disk of Windows (LDM)".to_owned());
        }
        let (first, last) = (entry.first.get(), entry.last.get());
        let range = (last.checked_sub(first))
            .and_then(|more| sectors(first, more.checked_add(1)?, sector))
            .filter(|_| usable.contains(&first) && usable.contains(&last));
        slots.push(Slot {
            name: format!("partition {number}"),
            range: range.ok_or_else(|| {
                format!("has a GPT whose partition {number} lies outside of what it may use")
            })?,
            kept: kept(kind),
        });
    }
    let mut claims = claims(&slots);
    let end = disk.len() / sector * sector;
    // Where a primary header is missing, one may be written again, and a backup as well.
    claims.push((0..2 * sector, "the GPT"));
    for copy in [Some(copy), other].into_iter().flatten() {
        let header = &copy.header;
        let tables = [
            sectors(header.my_lba.get(), 1, sector),
            sectors(header.alternate_lba.get(), 1, sector),
            (header.entries_lba.get().checked_mul(sector))
                .map(|start| start..start.saturating_add(u64_from(copy.entries.len()))),
        ];
        for table in tables.into_iter().flatten() {
            let known = claims.iter().any(|(range, name)| {
                *name == "the GPT" && range.start <= table.start && table.end <= range.end
            });
            if !known && table.start < end {
                claims.push((table, "the GPT"));
            }
        }
    }
    match apart(claims) {
        Err(super::Trouble::Skip { reason, .. }) => Err(reason),
        _ => Ok(slots),
    }
}

const LDM_METADATA: Uuid = uuid!("5808c8aa-7e8f-42e0-85d2-e1e90434cfb3");
const LDM_DATA: Uuid = uuid!("af9b60a0-1431-4f62-bc68-3311714a69ad");

/// What is in use by its type.
fn kept(kind: Uuid) -> Option<Kept> {
    const BOOT: &str = "holds a boot loader outside of any filesystem";
    const RAID: &str = "is marked as a member of a RAID array";
    const VMWARE: &str = "is for VMware's own use";
    const WINDOWS: &str = "is for Windows' own use";
    const POOL: &str = "is marked as a part of a storage pool";
    const ENCRYPTED: &str = "is marked as encrypted";
    const TABLE: &[(Uuid, Option<&str>, &str)] = &[
        (
            uuid!("21686148-6449-6e6f-744e-656564454649"),
            Some("BIOS boot"),
            BOOT,
        ),
        (
            uuid!("9e1a2d38-c612-4316-aa26-8b49521e5a8b"),
            Some("PReP boot"),
            BOOT,
        ),
        (
            uuid!("e3c9e316-0b5c-4db8-817d-f92df00215ae"),
            Some("Microsoft reserved"),
            WINDOWS,
        ),
        (
            uuid!("558d43c5-a1ac-43c0-aac8-d1472b2923d1"),
            Some("Storage Replica"),
            WINDOWS,
        ),
        (
            uuid!("e75caf8f-f680-4cee-afa3-b001e56efc2d"),
            Some("Storage Spaces"),
            POOL,
        ),
        (
            uuid!("6a898cc3-1dd2-11b2-99a6-080020736631"),
            Some("ZFS"),
            POOL,
        ),
        (
            uuid!("516e7cba-6ecf-11d6-8ff8-00022d09712b"),
            Some("ZFS"),
            POOL,
        ),
        (
            uuid!("53746f72-6167-11aa-aa11-00306543ecac"),
            Some("Core Storage"),
            POOL,
        ),
        (
            uuid!("a19d880f-05fc-4d3b-a006-743f0f84911e"),
            Some("Linux RAID"),
            RAID,
        ),
        (
            uuid!("52414944-0000-11aa-aa11-00306543ecac"),
            Some("Apple RAID"),
            RAID,
        ),
        (
            uuid!("52414944-5f4f-11aa-aa11-00306543ecac"),
            Some("Apple RAID"),
            RAID,
        ),
        (
            uuid!("49f48daa-b10e-11dc-b99b-0019d1879648"),
            Some("NetBSD RAID"),
            RAID,
        ),
        (
            uuid!("7ffec5c9-2d00-49b7-8941-3ea10a5586b7"),
            Some("dm-crypt"),
            ENCRYPTED,
        ),
        (
            uuid!("ca7d7ccb-63ed-4c53-861c-1742536059cc"),
            Some("LUKS"),
            ENCRYPTED,
        ),
        (
            uuid!("aa31e02a-400f-11db-9590-000c2911d1b8"),
            Some("VMFS"),
            VMWARE,
        ),
        (uuid!("9d275380-40ad-11db-bf97-000c2911d1b8"), None, VMWARE),
        (uuid!("381cfccc-7288-11e0-92ee-000c2911d0b2"), None, VMWARE),
        (uuid!("9198effc-31c0-11db-8f78-000c2911d1b8"), None, VMWARE),
    ];
    let &(_, content, reason) = TABLE.iter().find(|(id, ..)| *id == kind)?;
    Some(Kept { content, reason })
}
