//! Reads what a VHDX says of itself: identifier, region tables, metadata items.

use std::io;

use crate::error::FormatError;
use crate::format::DiskType;
use crate::format::parent::ParentLink;
use crate::format::vhdx::metadata::{
    DISK_ID, DISK_SIZE, FILE_PARAMETERS, FileParameters, LOGICAL_SECTOR_SIZE, METADATA_TABLE_LEN,
    MetadataItem, MetadataTable, PARENT_LOCATOR, PHYSICAL_SECTOR_SIZE, parse_disk_len,
    parse_sector_size,
};
use crate::format::vhdx::{
    BatGeometry, IDENTIFIER, ParentLocator, REGION_TABLE_1, REGION_TABLE_2, REGION_TABLE_LEN,
    RegionTable,
};
use crate::image::{LayoutError, read_array};
use crate::storage::Storage;
use crate::units::{FileRange, u64_from_u32, usize_from};

/// The two copies of the region table.
#[derive(Debug)]
pub(crate) struct RegionCopies {
    /// The one to go by: the first that is good, or what two bad ones agree in.
    pub(crate) table: RegionTable,
    /// What is wrong with each.
    pub(crate) faults: [Option<FormatError>; 2],
    /// Whether both are good, but not the same.
    pub(crate) differ: bool,
}

pub(super) fn cut(what: &str, at: u64, file_len: u64) -> FormatError {
    FormatError::corrupt(
        what,
        format!("file offset {at:#x}, in a file of {file_len:#x} bytes"),
        "all of it inside the file: the file was cut",
    )
}

/// Who made the file, from its identifier.
pub(super) fn read_creator(storage: &dyn Storage) -> Result<String, LayoutError> {
    let bytes: [u8; 520] = read_array(storage, IDENTIFIER)?;
    let (signature, creator) = bytes.split_at(8);
    if signature != b"vhdxfile" {
        return Err(FormatError::NotVhdx.into());
    }
    let (units, _) = creator.as_chunks::<2>();
    let units: Vec<u16> = units
        .iter()
        .map(|unit| u16::from_le_bytes(*unit))
        .take_while(|unit| *unit != 0)
        .collect();
    let printable = |c: char| if c.is_control() { '?' } else { c };
    let text = String::from_utf16_lossy(&units);
    Ok(text.trim().chars().map(printable).collect())
}

impl RegionCopies {
    /// What is wrong, where both are damaged and the table is what they agree in.
    pub(super) fn doubt(&self) -> Option<FormatError> {
        let [Some(first), Some(_)] = &self.faults else {
            return None;
        };
        Some(FormatError::corrupt(
            format!("region tables at file offsets {REGION_TABLE_1} and {REGION_TABLE_2}"),
            format!("neither of them fits its checksum ({first})"),
            "at least one good table: both have the same entries, so that the disk can be read; `vhdfs \
             check --repair` writes them anew",
        ))
    }
}

pub(super) fn read_regions(storage: &dyn Storage) -> Result<RegionCopies, LayoutError> {
    let read = |at| -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; usize_from(REGION_TABLE_LEN)];
        storage.read_exact_at(&mut bytes, at)?;
        Ok(bytes)
    };
    let (first, second) = (read(REGION_TABLE_1)?, read(REGION_TABLE_2)?);
    let parsed = (
        RegionTable::parse(&first, REGION_TABLE_1),
        RegionTable::parse(&second, REGION_TABLE_2),
    );
    Ok(match parsed {
        (Ok(table), Ok(second)) => RegionCopies {
            differ: table != second,
            table,
            faults: [None, None],
        },
        (Ok(table), Err(fault)) => RegionCopies {
            table,
            faults: [None, Some(fault)],
            differ: false,
        },
        (Err(fault), Ok(table)) => RegionCopies {
            table,
            faults: [Some(fault), None],
            differ: false,
        },
        (Err(fault), Err(other)) => match RegionTable::agreed(&first, &second) {
            Some(table) => RegionCopies {
                table,
                faults: [Some(fault), Some(other)],
                differ: false,
            },
            None => return Err(fault.into()),
        },
    })
}

pub(super) fn read_items(
    storage: &dyn Storage,
    metadata: FileRange,
    file_len: u64,
) -> Result<MetadataTable, LayoutError> {
    if metadata.start.plus(METADATA_TABLE_LEN).get() > file_len {
        return Err(cut("metadata region", metadata.start.get(), file_len).into());
    }
    let mut bytes = vec![0; usize_from(METADATA_TABLE_LEN)];
    storage.read_exact_at(&mut bytes, metadata.start)?;
    Ok(MetadataTable::parse(&bytes, metadata.len)?)
}

/// The bytes of an item of the region at `metadata`.
pub(super) fn read_item(
    storage: &dyn Storage,
    metadata: FileRange,
    item: &MetadataItem,
    file_len: u64,
) -> Result<Vec<u8>, LayoutError> {
    let at = metadata.start.plus(u64_from_u32(item.offset));
    if at.plus(u64_from_u32(item.len)).get() > file_len {
        return Err(cut("metadata item", at.get(), file_len).into());
    }
    // At most 1 MiB: the table's decoder made sure.
    let mut bytes = vec![0; usize_from(u64_from_u32(item.len))];
    storage.read_exact_at(&mut bytes, at)?;
    Ok(bytes)
}

/// What the metadata items say.
pub(super) struct Parameters {
    pub(super) file: FileParameters,
    pub(super) disk_len: u64,
    pub(super) sector_size: u64,
    pub(super) physical_sector_size: u64,
    pub(super) parent: Option<ParentLink>,
}

impl Parameters {
    pub(super) fn read(
        storage: &dyn Storage,
        metadata: FileRange,
        items: &MetadataTable,
        file_len: u64,
    ) -> Result<Self, LayoutError> {
        let bytes_of = |item: &MetadataItem| read_item(storage, metadata, item, file_len);
        let file = bytes_of(items.need(FILE_PARAMETERS, "file parameters", 8)?)?;
        let file = FileParameters::parse(array(&file))?;
        let name = "logical sector size";
        let sector = bytes_of(items.need(LOGICAL_SECTOR_SIZE, name, 4)?)?;
        let sector_size = parse_sector_size(array(&sector), name)?;
        let name = "physical sector size";
        let physical = bytes_of(items.need(PHYSICAL_SECTOR_SIZE, name, 4)?)?;
        let physical_sector_size = parse_sector_size(array(&physical), name)?;
        let disk_len = bytes_of(items.need(DISK_SIZE, "disk size", 8)?)?;
        let disk_len = parse_disk_len(array(&disk_len), sector_size)?;
        // Of no use here, but every other program wants one.
        items.need(DISK_ID, "disk identifier", 16)?;
        let parent = if file.has_parent {
            let item = items.find(PARENT_LOCATOR).ok_or_else(|| {
                FormatError::corrupt(
                    "metadata of a differencing disk",
                    "no parent locator",
                    "one that names the parent",
                )
            })?;
            Some(ParentLocator::parse(&bytes_of(item)?)?.link()?)
        } else {
            None
        };
        Ok(Self {
            file,
            disk_len,
            sector_size,
            physical_sector_size,
            parent,
        })
    }

    /// How the image stores its disk.
    pub(super) fn disk_type(&self) -> DiskType {
        if self.parent.is_some() {
            DiskType::Differencing
        } else if self.file.leave_blocks_allocated {
            DiskType::Fixed
        } else {
            DiskType::Dynamic
        }
    }

    pub(super) fn bat_geometry(&self) -> BatGeometry {
        BatGeometry {
            block_size: u64_from_u32(self.file.block_size),
            sector_size: self.sector_size,
            disk_len: self.disk_len,
            differencing: self.parent.is_some(),
        }
    }
}

/// The first `N` bytes; the caller knows that there are as many.
fn array<const N: usize>(bytes: &[u8]) -> [u8; N] {
    bytes.first_chunk().copied().unwrap_or([0; N])
}
