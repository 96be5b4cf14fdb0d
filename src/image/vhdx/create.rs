//! New VHDX files.
//!
//! They are laid out as Windows does it: log, metadata, block table, blocks.

use std::io;

use uuid::Uuid;

use crate::format::DiskType;
use crate::format::parent::{Identity, NewParent};
use crate::format::vhdx::metadata::{
    DISK_ID, DISK_SIZE, FILE_PARAMETERS, FileParameters, ItemFlags, LOGICAL_SECTOR_SIZE,
    PARENT_LOCATOR, PHYSICAL_SECTOR_SIZE, encode_metadata,
};
use crate::format::vhdx::{
    BAT_ENTRY_LEN, BAT_REGION, BatEntry, BatGeometry, BatSlot, HEADER_1, HEADER_2, Header,
    IDENTIFIER, METADATA_REGION, MIB, ParentLocator, PayloadState, REGION_TABLE_1, REGION_TABLE_2,
    Region, RegionTable, guid_to_bytes,
};
use crate::storage::Storage;
use crate::units::{FileOffset, FileRange, round_up, u64_from, u64_from_u32};

/// Bytes of the log: room for the changes of 250 pages at a time.
const LOG: FileRange = FileRange::new(FileOffset::new(MIB), MIB);
const METADATA: FileRange = FileRange::new(FileOffset::new(2 * MIB), MIB);
const BAT: FileOffset = FileOffset::new(3 * MIB);

/// What disk to create. The caller has checked that it is possible.
#[derive(Clone, Copy, Debug)]
pub(crate) struct NewDisk<'a> {
    /// How the image stores its disk.
    pub(crate) disk_type: DiskType,
    /// The disk's size in bytes.
    pub(crate) disk_len: u64,
    /// Bytes in a block.
    pub(crate) block_size: u32,
    /// Bytes in a logical sector.
    pub(crate) sector_size: u32,
    /// Bytes in a physical sector.
    pub(crate) physical_sector_size: u32,
    /// The parent of a differencing disk: a VHDX.
    pub(crate) parent: Option<&'a NewParent>,
}

/// Makes an empty disk, or one that reads as its parent, in the empty file `storage`, durably.
///
/// Nobody takes the file for a disk before it is one: identifier and headers are written once all
/// else is durable.
///
/// # Errors
/// Where the host fails; the file is then to be removed.
pub(crate) fn create(storage: &dyn Storage, disk: &NewDisk<'_>) -> io::Result<()> {
    let geometry = BatGeometry {
        block_size: u64_from_u32(disk.block_size),
        sector_size: u64_from_u32(disk.sector_size),
        disk_len: disk.disk_len,
        differencing: disk.parent.is_some(),
    };
    let bat_len = round_up(geometry.entries().saturating_mul(BAT_ENTRY_LEN), MIB);
    let bat = FileRange::new(BAT, bat_len);
    let is_fixed = disk.disk_type == DiskType::Fixed;
    let data_len = if is_fixed {
        u64_from_u32(geometry.blocks()).saturating_mul(geometry.block_size)
    } else {
        0
    };
    // Zeros are what the log, an empty block table and the blocks of a fixed disk start with.
    storage.set_len(bat.end().plus(data_len).get())?;
    if is_fixed {
        write_fixed_table(storage, &geometry, bat)?;
    }
    storage.write_all_at(&encode_metadata(&items(disk)?), METADATA.start)?;
    let region = |id, range| Region {
        id,
        range,
        required: true,
    };
    let regions = RegionTable::new(vec![
        region(BAT_REGION, bat),
        region(METADATA_REGION, METADATA),
    ]);
    storage.write_all_at(regions.bytes(), REGION_TABLE_1)?;
    storage.write_all_at(regions.bytes(), REGION_TABLE_2)?;
    storage.sync()?;

    let first = Header::new(0, LOG);
    let mut second = first.clone();
    second.sequence_number = 1;
    storage.write_all_at(&first.to_bytes(), HEADER_1)?;
    storage.write_all_at(&second.to_bytes(), HEADER_2)?;
    storage.write_all_at(&identifier(), IDENTIFIER)?;
    storage.sync()
}

/// The file type identifier: signature, and the program that made the file.
fn identifier() -> Vec<u8> {
    let creator = concat!("vhdfs ", env!("CARGO_PKG_VERSION"));
    let mut bytes = b"vhdxfile".to_vec();
    bytes.extend(creator.encode_utf16().flat_map(u16::to_le_bytes));
    bytes.resize(520, 0);
    bytes
}

/// The metadata items.
fn items(disk: &NewDisk<'_>) -> io::Result<Vec<(Uuid, ItemFlags, Vec<u8>)>> {
    let parameters = FileParameters {
        block_size: disk.block_size,
        leave_blocks_allocated: disk.disk_type == DiskType::Fixed,
        has_parent: disk.parent.is_some(),
    };
    let id = guid_to_bytes(Uuid::new_v4());
    let mut items = vec![
        (
            FILE_PARAMETERS,
            ItemFlags::FILE,
            parameters.to_bytes().to_vec(),
        ),
        (
            DISK_SIZE,
            ItemFlags::DISK,
            disk.disk_len.to_le_bytes().to_vec(),
        ),
        (DISK_ID, ItemFlags::DISK, id.to_vec()),
        (
            LOGICAL_SECTOR_SIZE,
            ItemFlags::DISK,
            disk.sector_size.to_le_bytes().to_vec(),
        ),
        (
            PHYSICAL_SECTOR_SIZE,
            ItemFlags::DISK,
            disk.physical_sector_size.to_le_bytes().to_vec(),
        ),
    ];
    if let Some(parent) = disk.parent {
        let Identity::Vhdx(linkage) = parent.identity else {
            return Err(io::Error::other("the parent of a VHDX is a VHDX"));
        };
        let locator = ParentLocator::new(linkage, &parent.relative, &parent.absolute);
        items.push((PARENT_LOCATOR, ItemFlags::FILE, locator.to_bytes()));
    }
    Ok(items)
}

/// Writes a table whose blocks lie one behind the other, right behind it.
fn write_fixed_table(
    storage: &dyn Storage,
    geometry: &BatGeometry,
    bat: FileRange,
) -> io::Result<()> {
    const PIECE: usize = 512 << 10;
    let mut buf = Vec::new();
    let mut at = bat.start;
    for index in 0..geometry.entries() {
        let entry = match geometry.slot(index) {
            BatSlot::Payload(block) => {
                let start = u64_from_u32(block.get()).saturating_mul(geometry.block_size);
                BatEntry::payload(PayloadState::FullyPresent, bat.end().plus(start))
            }
            BatSlot::Bitmap(_) | BatSlot::Padding => BatEntry::default(),
        };
        buf.extend(entry.to_bytes());
        if buf.len() >= PIECE {
            storage.write_all_at(&buf, at)?;
            at = at.plus(u64_from(buf.len()));
            buf.clear();
        }
    }
    storage.write_all_at(&buf, at)
}
