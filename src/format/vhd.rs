//! Structures of the Virtual Hard Disk format 1.0: footer, dynamic header, block allocation table.
//!
//! Field tables, deviations and their sources stand in `mount/docs/reference/vhd.md`; the
//! names here are the specification's. All integers are big-endian, a sector has 512 bytes.

use zerocopy::byteorder::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::DiskType;
use crate::error::FormatError;
use crate::units::{
    BlockIndex, FileOffset, FileRange, SECTOR_SIZE, div_ceil, low_u32, round_up, u64_from_u32,
};

mod differencing;
mod geometry;
mod locator;
#[cfg(test)]
mod tests;

pub use differencing::ParentFields;
pub use geometry::Geometry;
pub use locator::{Locator, MAX_LOCATOR_LEN, Platform};

/// Bytes in a footer.
pub const FOOTER_LEN: u64 = 512;
/// Bytes in a dynamic header.
pub const HEADER_LEN: u64 = 1024;
/// Bytes in an entry of the block allocation table.
pub const BAT_ENTRY_LEN: u64 = 4;
/// The entry of a block that has no slot.
pub const BAT_UNUSED: u32 = 0xffff_ffff;
/// The `DataOffset` of a footer without, and a header without a further, header.
pub const NO_OFFSET: u64 = u64::MAX;
/// Seconds from the Unix epoch to the VHD epoch, 2000-01-01 00:00:00 UTC.
pub const EPOCH: u64 = 946_684_800;
/// The largest disk: 2040 GiB. A 32-bit sector number reaches 2 TiB; the rest is for bitmaps.
pub const MAX_DISK_LEN: u64 = 0xff00_0000 * SECTOR_SIZE;
/// One past the last file offset at which a slot may start: `BAT_UNUSED` is no sector number.
pub const MAX_SLOT_START: u64 = 0xffff_ffff * SECTOR_SIZE;
/// The most blocks a disk of ours may have: 2040 GiB in blocks of 128 KiB, a table of 64 MiB.
pub const MAX_BLOCKS: u64 = 1 << 24;
/// Block sizes that are accepted, in bytes; each a power of two.
pub const BLOCK_SIZES: std::ops::RangeInclusive<u32> = 4096..=256 << 20;

const COOKIE: [u8; 8] = *b"conectix";
/// Xen's mark of a disk that was disabled on purpose (blktap, `vhd_kill_footer`).
const POISON_COOKIE: [u8; 8] = *b"v_poison";
const HEADER_COOKIE: [u8; 8] = *b"cxsparse";
const VERSION_1: u32 = 0x0001_0000;

/// The footer as it lies in the file. [VHD 1.0, "Hard Disk Footer Format"]
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned,
)]
#[repr(C)]
struct RawFooter {
    /// 0: `conectix`.
    cookie: [u8; 8],
    /// 8: bit 1 always set, bit 0 a temporary disk.
    features: U32,
    /// 12: 1.0.
    file_format_version: U32,
    /// 16: file offset of the dynamic header, all ones for a fixed disk.
    data_offset: U64,
    /// 24: creation, in seconds since 2000.
    time_stamp: U32,
    /// 28: four characters that name the creating program.
    creator_application: [u8; 4],
    /// 32: its version, major in the high half.
    creator_version: U32,
    /// 36: `Wi2k`, `Mac `; Xen writes zeros.
    creator_host_os: [u8; 4],
    /// 40: size at creation, informational.
    original_size: U64,
    /// 48: the disk's size in bytes.
    current_size: U64,
    /// 56: cylinders.
    cylinders: U16,
    /// 58: heads.
    heads: u8,
    /// 59: sectors per track.
    sectors_per_track: u8,
    /// 60: 2 fixed, 3 dynamic, 4 differencing.
    disk_type: U32,
    /// 64: ones' complement of the sum of all other bytes.
    checksum: U32,
    /// 68: identity; a child names its parent by it.
    unique_id: [u8; 16],
    /// 84: 1 while a saved machine state belongs to the disk.
    saved_state: u8,
    /// 85: Xen's "hidden" flag; reserved in the specification. Kept.
    hidden: u8,
    /// 86: reserved. Kept, since the checksum covers it.
    reserved: [u8; 426],
}

impl RawFooter {
    /// With the checksum that fits.
    fn sealed(mut self) -> Footer {
        self.checksum = U32::new(0);
        self.checksum = U32::new(checksum(self.as_bytes()));
        Footer { raw: self }
    }
}

/// The dynamic header as it lies in the file. [VHD 1.0, "Dynamic Disk Header Format"]
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned,
)]
#[repr(C)]
struct RawHeader {
    /// 0: `cxsparse`.
    cookie: [u8; 8],
    /// 8: file offset of a further header; none is defined, so all ones.
    data_offset: U64,
    /// 16: file offset of the block allocation table.
    table_offset: U64,
    /// 24: 1.0.
    header_version: U32,
    /// 28: entries of the table; may be more than the disk needs (Xen, old QEMU).
    max_table_entries: U32,
    /// 32: bytes of data in a block, without its sector bitmap.
    block_size: U32,
    /// 36: as in the footer, over the 1024 bytes.
    checksum: U32,
    /// 40: the parent's `unique_id`.
    parent_unique_id: [u8; 16],
    /// 56: the parent file's modification time, in seconds since 2000.
    parent_time_stamp: U32,
    /// 60: 0.
    reserved_1: U32,
    /// 64: the parent's name, UTF-16 big-endian.
    parent_unicode_name: [u8; 512],
    /// 576: where the parent may be found.
    parent_locators: [RawLocator; 8],
    /// 768: 0.
    reserved_2: [u8; 256],
}

/// A parent locator entry.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned,
)]
#[repr(C)]
struct RawLocator {
    platform_code: U32,
    platform_data_space: U32,
    platform_data_length: U32,
    reserved: U32,
    platform_data_offset: U64,
}

const _: () = {
    assert!(size_of::<RawFooter>() == 512);
    assert!(size_of::<RawHeader>() == 1024);
    assert!(size_of::<RawLocator>() == 24);
};

/// The checksum of footer, header: ones' complement of the sum of `bytes`, in which the four bytes
/// of the checksum field itself must be 0 or be taken off by the caller.
fn checksum(bytes: &[u8]) -> u32 {
    !bytes
        .iter()
        .fold(0_u32, |sum, byte| sum.wrapping_add(u32::from(*byte)))
}

/// [`checksum`] of a structure whose field at present holds `field`.
fn checksum_without(bytes: &[u8], field: [u8; 4]) -> u32 {
    let own = field
        .iter()
        .fold(0_u32, |sum, byte| sum.wrapping_add(u32::from(*byte)));
    !(!checksum(bytes)).wrapping_sub(own)
}

/// Why bytes are not a usable footer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FooterFault {
    /// No cookie: something else lies there.
    NoFooter,
    /// Xen's `v_poison`: disabled on purpose.
    Poisoned,
    /// 512 bytes of 0xC7: a tapdisk has the file open, or died while it had.
    InUseByTapdisk,
    /// The checksum does not fit.
    Checksum {
        /// In the file.
        stored: u32,
        /// Of the bytes.
        computed: u32,
    },
    /// A format version other than 1.x.
    Version(u32),
    /// A disk type that is not fixed, dynamic or differencing.
    DiskType(u32),
}

impl FooterFault {
    /// The fault as an error about the footer at `place`.
    pub fn into_error(self, place: &str) -> FormatError {
        let structure = format!("footer {place}");
        match self {
            Self::NoFooter => FormatError::corrupt(structure, "no `conectix` cookie", "a footer"),
            Self::Poisoned => FormatError::incompatible(
                "a disk that Xen has disabled (cookie `v_poison`)",
                "enable it with the tool that disabled it",
            ),
            Self::InUseByTapdisk => FormatError::incompatible(
                "a footer filled with 0xC7: a tapdisk has this disk open, or died with it open",
                "close it there; if no tapdisk runs, `vhdfs check --repair` restores the footer",
            ),
            Self::Checksum { stored, computed } => FormatError::corrupt(
                structure,
                format!("checksum {stored:#010x}"),
                format!("{computed:#010x}, the sum of its bytes"),
            ),
            Self::Version(version) => FormatError::incompatible(
                format!("format version {:#010x} in the footer {place}", version),
                "only 1.0 is known",
            ),
            Self::DiskType(disk_type) => FormatError::incompatible(
                format!("disk type {disk_type} in the footer {place}"),
                "known are 2 (fixed), 3 (dynamic) and 4 (differencing)",
            ),
        }
    }
}

/// A footer whose checksum, version and type are good. Unknown bytes are kept as they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Footer {
    raw: RawFooter,
}

impl Footer {
    /// Decodes a footer. Files of Virtual PC before 2004 have only its first 511 bytes: the caller
    /// adds the missing zero.
    ///
    /// # Errors
    /// What is wrong with the bytes; they are not changed or interpreted further.
    pub fn parse(bytes: &[u8; 512]) -> Result<Self, FooterFault> {
        let raw: RawFooter = zerocopy::transmute!(*bytes);
        if raw.cookie == POISON_COOKIE {
            return Err(FooterFault::Poisoned);
        }
        if bytes.iter().all(|byte| *byte == 0xc7) {
            return Err(FooterFault::InUseByTapdisk);
        }
        if raw.cookie != COOKIE {
            return Err(FooterFault::NoFooter);
        }
        let stored = raw.checksum.get();
        let computed = checksum_without(bytes, raw.checksum.to_bytes());
        // Xen before 1.2 computed it as if the hidden flag were clear (blktap, vhd_validate_footer).
        let unhidden = computed.wrapping_add(u32::from(raw.hidden));
        let old_xen = raw.creator_application == *b"tap\0"
            && matches!(raw.creator_version.get(), 0x0000_0001 | 0x0001_0001);
        if stored != computed && !(old_xen && stored == unhidden) {
            return Err(FooterFault::Checksum { stored, computed });
        }
        if raw.file_format_version.get() >> 16 != VERSION_1 >> 16 {
            return Err(FooterFault::Version(raw.file_format_version.get()));
        }
        match raw.disk_type.get() {
            2..=4 => Ok(Self { raw }),
            other => Err(FooterFault::DiskType(other)),
        }
    }

    /// A footer of which nothing is wrong but its checksum.
    ///
    /// # Errors
    /// As [`Self::parse`].
    pub fn resealed(bytes: &[u8; 512]) -> Result<Self, FooterFault> {
        let raw: RawFooter = zerocopy::transmute!(*bytes);
        Self::parse(&raw.sealed().to_bytes())
    }

    /// A footer for a new disk of `disk_len` bytes, with a fresh identity.
    ///
    /// The creator is ours where every reader then sees `disk_len`; otherwise `win `, for which
    /// QEMU of any age takes `CurrentSize` and not the product of the geometry.
    pub fn new(disk_type: DiskType, disk_len: u64, now: std::time::SystemTime) -> Self {
        let geometry = Geometry::for_disk(disk_len);
        let exact = geometry.disk_len() == disk_len || geometry.is_largest();
        let (creator, version) = if exact {
            (*b"vhfs", 0x0000_0001)
        } else {
            (*b"win ", 0x000a_0000)
        };
        let data_offset = if disk_type == DiskType::Fixed {
            NO_OFFSET
        } else {
            FOOTER_LEN
        };
        let raw = RawFooter {
            cookie: COOKIE,
            features: U32::new(2),
            file_format_version: U32::new(VERSION_1),
            data_offset: U64::new(data_offset),
            time_stamp: U32::new(since_2000(now)),
            creator_application: creator,
            creator_version: U32::new(version),
            creator_host_os: *b"Wi2k",
            original_size: U64::new(disk_len),
            current_size: U64::new(disk_len),
            cylinders: U16::new(geometry.cylinders),
            heads: geometry.heads,
            sectors_per_track: geometry.sectors_per_track,
            disk_type: U32::new(match disk_type {
                DiskType::Fixed => 2,
                DiskType::Dynamic => 3,
                DiskType::Differencing => 4,
            }),
            checksum: U32::new(0),
            unique_id: *uuid::Uuid::new_v4().as_bytes(),
            saved_state: 0,
            hidden: 0,
            reserved: [0; 426],
        };
        raw.sealed()
    }

    /// This footer with the dynamic header at `at`.
    pub fn with_data_offset(&self, at: FileOffset) -> Self {
        let data_offset = U64::new(at.get());
        RawFooter {
            data_offset,
            ..self.raw
        }
        .sealed()
    }

    /// The bytes, as read or as made.
    pub fn to_bytes(&self) -> [u8; 512] {
        zerocopy::transmute!(self.raw)
    }

    /// The same disk, but for an identity of its own: children of the old one do not accept it.
    pub fn with_new_identity(&self, now: std::time::SystemTime) -> Self {
        RawFooter {
            unique_id: *uuid::Uuid::new_v4().as_bytes(),
            time_stamp: U32::new(since_2000(now)),
            ..self.raw
        }
        .sealed()
    }

    /// How the image stores its disk.
    pub fn disk_type(&self) -> DiskType {
        match self.raw.disk_type.get() {
            2 => DiskType::Fixed,
            3 => DiskType::Dynamic,
            _ => DiskType::Differencing,
        }
    }

    /// The disk's size in bytes: `CurrentSize`, as Windows, Xen and VirtualBox take it. QEMU and
    /// Virtual PC take the smaller product of the geometry for creators `vpc ` and `qemu`.
    pub fn disk_len(&self) -> u64 {
        self.raw.current_size.get()
    }

    /// File offset of the dynamic header.
    pub fn data_offset(&self) -> u64 {
        self.raw.data_offset.get()
    }

    /// The geometry that old guests see.
    pub fn geometry(&self) -> Geometry {
        Geometry {
            cylinders: self.raw.cylinders.get(),
            heads: self.raw.heads,
            sectors_per_track: self.raw.sectors_per_track,
        }
    }

    /// The four characters that name the creating program.
    pub fn creator(&self) -> [u8; 4] {
        self.raw.creator_application
    }

    /// The creating program's version, major in the high half.
    pub fn creator_version(&self) -> u32 {
        self.raw.creator_version.get()
    }

    /// Name and version of the creating program for people, e.g. `win  10.0`; empty where the footer
    /// names none.
    pub fn creator_text(&self) -> String {
        let name: String = (self.raw.creator_application.iter())
            .filter(|byte| **byte != 0)
            .map(|byte| {
                if byte.is_ascii_graphic() || *byte == b' ' {
                    char::from(*byte)
                } else {
                    '?'
                }
            })
            .collect();
        let name = name.trim();
        let version = self.creator_version();
        match (name.is_empty(), version) {
            (true, 0) => String::new(),
            (true, _) => format!("version {}.{}", version >> 16, version & 0xffff),
            (false, _) => format!("{name} {}.{}", version >> 16, version & 0xffff),
        }
    }

    /// Whether a saved machine state belongs to the disk; its bytes must not change then.
    pub fn has_saved_state(&self) -> bool {
        self.raw.saved_state != 0
    }

    /// The disk's identity.
    pub fn unique_id(&self) -> [u8; 16] {
        self.raw.unique_id
    }
}

/// A time as the format counts it.
fn since_2000(now: std::time::SystemTime) -> u32 {
    let now = now.duration_since(std::time::UNIX_EPOCH);
    now.map_or(0, |time| low_u32(time.as_secs().saturating_sub(EPOCH)))
}

/// A dynamic header whose checksum and fields are good.
#[derive(Clone, Debug)]
pub struct DynamicHeader {
    raw: RawHeader,
}

impl DynamicHeader {
    /// Decodes the dynamic header found at `at`.
    ///
    /// # Errors
    /// [`FormatError::Corrupt`] for a wrong cookie, checksum, table offset or entry count;
    /// [`FormatError::Incompatible`] for another version or a block size that is not supported.
    pub fn parse(bytes: &[u8; 1024], at: FileOffset) -> Result<Self, FormatError> {
        let raw: RawHeader = zerocopy::transmute!(*bytes);
        let structure = || format!("dynamic header at file offset {at}");
        if raw.cookie != HEADER_COOKIE {
            return Err(FormatError::corrupt(
                structure(),
                "no `cxsparse` cookie",
                "a header",
            ));
        }
        let computed = checksum_without(bytes, raw.checksum.to_bytes());
        if raw.checksum.get() != computed {
            return Err(FormatError::corrupt(
                structure(),
                format!("checksum {:#010x}", raw.checksum.get()),
                format!("{computed:#010x}, the sum of its bytes"),
            ));
        }
        if raw.header_version.get() >> 16 != VERSION_1 >> 16 {
            return Err(FormatError::incompatible(
                format!(
                    "version {:#010x} of the {}",
                    raw.header_version.get(),
                    structure()
                ),
                "only 1.0 is known",
            ));
        }
        let block_size = raw.block_size.get();
        if !block_size.is_power_of_two() || !BLOCK_SIZES.contains(&block_size) {
            return Err(FormatError::incompatible(
                format!("block size {block_size} in the {}", structure()),
                "supported are powers of two from 4096 bytes to 256 MiB",
            ));
        }
        if !raw.table_offset.get().is_multiple_of(SECTOR_SIZE) {
            return Err(FormatError::corrupt(
                structure(),
                format!("table offset {:#x}", raw.table_offset.get()),
                "a multiple of 512, so that an entry is written atomically",
            ));
        }
        Ok(Self { raw })
    }

    /// What may be halves of two headers, unchecked: for what it says of places, which are to be checked.
    pub fn torn(bytes: &[u8; 1024]) -> Self {
        let raw = zerocopy::transmute!(*bytes);
        Self { raw }
    }

    /// A header for a new dynamic disk of `blocks` blocks, its table right behind it.
    pub fn new(blocks: u32, block_size: u32, table_offset: FileOffset) -> Self {
        let mut raw = RawHeader {
            cookie: HEADER_COOKIE,
            data_offset: U64::new(NO_OFFSET),
            table_offset: U64::new(table_offset.get()),
            header_version: U32::new(VERSION_1),
            max_table_entries: U32::new(blocks),
            block_size: U32::new(block_size),
            checksum: U32::new(0),
            parent_unique_id: [0; 16],
            parent_time_stamp: U32::new(0),
            reserved_1: U32::new(0),
            parent_unicode_name: [0; 512],
            parent_locators: [RawLocator::new_zeroed(); 8],
            reserved_2: [0; 256],
        };
        raw.checksum = U32::new(checksum(raw.as_bytes()));
        Self { raw }
    }

    /// The bytes, as read or as made.
    pub fn to_bytes(&self) -> [u8; 1024] {
        zerocopy::transmute!(self.raw)
    }

    /// Where the block allocation table starts; a multiple of 512.
    pub fn table_offset(&self) -> FileOffset {
        FileOffset::new(self.raw.table_offset.get())
    }

    /// Entries of the block allocation table.
    pub fn max_table_entries(&self) -> u32 {
        self.raw.max_table_entries.get()
    }

    /// The table's bytes in the file, padding to whole sectors included.
    pub fn table_range(&self) -> FileRange {
        let bytes = u64::from(self.max_table_entries()).saturating_mul(BAT_ENTRY_LEN);
        FileRange::new(self.table_offset(), round_up(bytes, SECTOR_SIZE))
    }

    /// Bytes of data in a block.
    pub fn block_size(&self) -> u32 {
        self.raw.block_size.get()
    }

    /// The identity that the parent of a differencing disk must have.
    pub fn parent_unique_id(&self) -> [u8; 16] {
        self.raw.parent_unique_id
    }

    /// The bytes that the parent locators claim. `PlatformDataSpace` counts sectors in the
    /// specification and bytes in Microsoft's files, so a value below 512 is taken as sectors.
    pub fn locator_ranges(&self) -> impl Iterator<Item = FileRange> + '_ {
        self.raw
            .parent_locators
            .iter()
            .filter(|locator| locator.platform_code.get() != 0)
            .map(|locator| {
                let space = u64::from(locator.platform_data_space.get());
                let space = if space < SECTOR_SIZE {
                    space.saturating_mul(SECTOR_SIZE)
                } else {
                    space
                };
                let len = space.max(u64::from(locator.platform_data_length.get()));
                FileRange::new(FileOffset::new(locator.platform_data_offset.get()), len)
            })
    }
}

/// Bytes of the sector bitmap in front of a block's data: a bit a sector, padded to whole sectors.
pub const fn bitmap_len(block_size: u32) -> u64 {
    let bits = div_ceil(u64_from_u32(block_size), SECTOR_SIZE);
    round_up(div_ceil(bits, 8), SECTOR_SIZE)
}

/// What an entry of the block allocation table says.
pub fn decode_bat_entry(entry: [u8; 4]) -> Option<FileOffset> {
    match u32::from_be_bytes(entry) {
        BAT_UNUSED => None,
        sector => Some(FileOffset::new(
            u64::from(sector).saturating_mul(SECTOR_SIZE),
        )),
    }
}

/// The entry of a block whose slot starts at `slot`, or of one that has none.
///
/// # Panics
/// Where `slot` is no sector below [`MAX_SLOT_START`]: our allocator never gives such a place.
pub fn encode_bat_entry(slot: Option<FileOffset>) -> [u8; 4] {
    let Some(slot) = slot else {
        return BAT_UNUSED.to_be_bytes();
    };
    assert!(slot.get().is_multiple_of(SECTOR_SIZE) && slot.get() < MAX_SLOT_START);
    low_u32(slot.get() / SECTOR_SIZE).to_be_bytes()
}

/// File offset of `block`'s entry in the table at `table`.
pub fn bat_entry_at(table: FileOffset, block: BlockIndex) -> FileOffset {
    table.plus(u64::from(block.get()).saturating_mul(BAT_ENTRY_LEN))
}
