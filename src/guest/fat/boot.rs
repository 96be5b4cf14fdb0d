//! The boot sector and its BIOS parameter block: where everything lies.

use std::ops::Range;

use zerocopy::byteorder::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use crate::guest::Trouble;
use crate::guest::clusters::{CHECK_IT, Heap};
use crate::guest::view::View;
use crate::units::div_ceil;

/// Bytes of the boot sector that mean something, whatever the size of a sector.
pub(super) const BOOT_LEN: usize = 512;

/// Bytes of an entry in a folder.
const ENTRY_LEN: u64 = 32;

/// FAT12 has fewer clusters than this. [fatgen103, FAT type determination]
const FAT16_MIN: u64 = 4085;
/// FAT16 has fewer clusters than this.
const FAT32_MIN: u64 = 65525;
/// FAT32 has fewer clusters than this: numbers from here on have meanings of their own.
const FAT32_END: u64 = 0x0fff_fff5;

/// The most copies of the table: `mkfs.vfat` makes up to four.
const MAX_TABLES: u8 = 4;

/// Bits of the state byte: not unmounted; a bad sector was met. [Linux: `FAT_STATE_DIRTY`]
const STATE_DIRTY: u8 = 1;
const STATE_ERRORS: u8 = 2;

/// `ext_flags`: the copies of the table are not kept the same; only one is in use.
const NOT_MIRRORED: u16 = 0x80;
/// `ext_flags`: which one, if so.
const ACTIVE: u16 = 0x0f;

/// Where BitLocker To Go, whose boot sector looks like FAT32's, has its identifier, and the two that
/// there are: 4967d63b-2e29-4ad8-8399-f6a339e3d001 and 92a84d3b-dd80-4d0e-9e4e-b1e3284eaed8.
const BITLOCKER_AT: usize = 424;
pub(super) const BITLOCKER: [[u8; 16]; 2] = [
    [
        0x3b, 0xd6, 0x67, 0x49, 0x29, 0x2e, 0xd8, 0x4a, 0x83, 0x99, 0xf6, 0xa3, 0x39, 0xe3, 0xd0,
        0x01,
    ],
    [
        0x3b, 0x4d, 0xa8, 0x92, 0x80, 0xdd, 0x0e, 0x4d, 0x9e, 0x4e, 0xb1, 0xe3, 0x28, 0x4e, 0xae,
        0xd8,
    ],
];

/// The BIOS parameter block that all three have.
#[derive(Clone, Copy, Debug, FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawBoot {
    /// 0x00: a jump to the code.
    jump: [u8; 3],
    /// 0x03: who made it. Never to be relied on, but for who else has a name here.
    oem_name: [u8; 8],
    /// 0x0B: 512, 1024, 2048 or 4096.
    bytes_per_sector: U16,
    /// 0x0D: a power of two.
    sectors_per_cluster: u8,
    /// 0x0E: sectors before the first table, the boot sector among them.
    reserved_sectors: U16,
    /// 0x10: copies of the table.
    tables: u8,
    /// 0x11: entries of the root folder; 0 in FAT32.
    root_entries: U16,
    /// 0x13: sectors of the volume, if they fit; else 0. By the book 0 in FAT32, but `mkfs.vfat` uses
    /// it there, too.
    total_sectors_16: U16,
    /// 0x15: kind of medium; in the first entry of the table, too.
    media: u8,
    /// 0x16: sectors of a table; 0 in FAT32.
    table_sectors_16: U16,
    /// 0x18: sectors per track.
    sectors_per_track: U16,
    /// 0x1A: heads.
    heads: U16,
    /// 0x1C: sectors of the disk before the volume.
    hidden_sectors: U32,
    /// 0x20: sectors of the volume, where `total_sectors_16` is 0.
    total_sectors_32: U32,
    /// 0x24: differs between FAT12/16 and FAT32.
    rest: [u8; 474],
    /// 0x1FE: 55 AA.
    signature: [u8; 2],
}

const _: () = assert!(size_of::<RawBoot>() == BOOT_LEN);

/// What follows in FAT12 and FAT16, from 0x24 on.
#[derive(Clone, Copy, Debug, FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawTail16 {
    /// 0x24: the BIOS's number of the drive.
    drive: u8,
    /// 0x25: [`STATE_DIRTY`], [`STATE_ERRORS`].
    state: u8,
    /// 0x26: 0x29 if the rest is there.
    extended: u8,
    /// 0x27: serial number.
    serial: U32,
    /// 0x2B: label.
    label: [u8; 11],
    /// 0x36: `FAT12   `, `FAT16   `, `FAT     `.
    kind: [u8; 8],
}

/// What follows in FAT32, from 0x24 on.
#[derive(Clone, Copy, Debug, FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawTail32 {
    /// 0x24: sectors of a table.
    table_sectors: U32,
    /// 0x28: [`NOT_MIRRORED`], [`ACTIVE`].
    ext_flags: U16,
    /// 0x2A: 0.
    version: U16,
    /// 0x2C: the root folder's first cluster.
    root_cluster: U32,
    /// 0x30: the sector with the hints.
    info_sector: U16,
    /// 0x32: the sector with the copy of the boot sector; 0 or FFFF for none.
    backup_sector: U16,
    /// 0x34: 0.
    reserved: [u8; 12],
    /// 0x40: and on, as in [`RawTail16`].
    tail: RawTail16,
}

/// Which FAT it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Fat12,
    Fat16,
    Fat32,
}

impl Kind {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Fat12 => "FAT12",
            Self::Fat16 => "FAT16",
            Self::Fat32 => "FAT32",
        }
    }

    /// Bits of an entry of the table.
    pub(super) fn bits(self) -> u64 {
        match self {
            Self::Fat12 => 12,
            Self::Fat16 => 16,
            Self::Fat32 => 32,
        }
    }
}

/// Where the root folder lies.
#[derive(Clone, Debug)]
pub(super) enum Root {
    /// In its own place, in bytes of the part.
    Bytes(Range<u64>),
    /// In the chain that begins at this cluster, as the disk calls it.
    Cluster(u32),
}

/// A boot sector whose every field is one of FAT.
#[derive(Clone, Debug)]
pub(super) struct Boot {
    raw: RawBoot,
    tail: RawTail16,
    /// FAT32's part.
    tail_32: Option<RawTail32>,
    pub(super) kind: Kind,
    /// Bytes that the filesystem spans.
    pub(super) size: u64,
    pub(super) heap: Heap,
    pub(super) root: Root,
    /// Where the first table begins, in bytes of the part.
    pub(super) tables_start: u64,
    /// Bytes of each table.
    pub(super) table_len: u64,
    bitlocker: bool,
}

impl Boot {
    /// `None` where this is no boot sector of FAT. Whether it is one that can be used,
    /// [`Self::check`] finds out.
    pub(super) fn parse(sector: &[u8; BOOT_LEN]) -> Option<Self> {
        let raw: RawBoot = zerocopy::transmute!(*sector);
        if !raw.looks_like_fat() || holds_partitions(sector) {
            return None;
        }
        let (tail, _) = RawTail16::read_from_prefix(&raw.rest).ok()?;
        let tail_32 = (raw.table_sectors_16.get() == 0)
            .then(|| RawTail32::read_from_prefix(&raw.rest).ok())
            .flatten()
            .map(|(tail, _)| tail);
        let tail = tail_32.map_or(tail, |tail| tail.tail);

        let bytes_per_sector = u64::from(raw.bytes_per_sector.get());
        let table_sectors = match tail_32 {
            Some(tail) => u64::from(tail.table_sectors.get()),
            None => u64::from(raw.table_sectors_16.get()),
        };
        let root_bytes = u64::from(raw.root_entries.get()) * ENTRY_LEN;
        // All below 2^41: nothing overflows.
        let tables_start = u64::from(raw.reserved_sectors.get());
        let root_start = tables_start + table_sectors * u64::from(raw.tables);
        let heap_start = root_start + div_ceil(root_bytes, bytes_per_sector);
        let heap_sectors = raw.total_sectors().checked_sub(heap_start)?;
        let clusters = heap_sectors / u64::from(raw.sectors_per_cluster);
        let kind = match tail_32 {
            Some(_) if clusters < FAT32_END => Kind::Fat32,
            None if clusters < FAT16_MIN => Kind::Fat12,
            None if clusters < FAT32_MIN => Kind::Fat16,
            _ => return None,
        };
        let is_right = match tail_32 {
            Some(tail) => {
                table_sectors > 0 && raw.root_entries.get() == 0 && tail.root_cluster.get() > 1
            }
            None => raw.root_entries.get() > 0,
        };
        if !is_right {
            return None;
        }
        let size = raw.total_sectors() * bytes_per_sector;
        let cluster_size = u64::from(raw.sectors_per_cluster) * bytes_per_sector;
        let clusters = u32::try_from(clusters).ok()?;
        let heap = Heap::new(heap_start * bytes_per_sector, cluster_size, clusters, size)?;
        let root_start = root_start * bytes_per_sector;
        Some(Self {
            raw,
            tail,
            tail_32,
            kind,
            size,
            heap,
            root: match tail_32 {
                Some(tail) => Root::Cluster(tail.root_cluster.get()),
                None => Root::Bytes(root_start..root_start + root_bytes),
            },
            tables_start: tables_start * bytes_per_sector,
            table_len: table_sectors * bytes_per_sector,
            bitlocker: BITLOCKER
                .iter()
                .any(|known| sector[BITLOCKER_AT..].starts_with(known)),
        })
    }

    /// Kind of medium.
    pub(super) fn media(&self) -> u8 {
        self.raw.media
    }

    /// The tables that must be the same, the one in use first: where they begin, in bytes of the
    /// part.
    ///
    /// # Errors
    /// [`Trouble::Skip`] where the systems do not agree on which one is in use.
    pub(super) fn tables(&self) -> Result<Vec<u64>, Trouble> {
        let flags = self.tail_32.map_or(0, |tail| tail.ext_flags.get());
        let place = |table: u8| self.tables_start + u64::from(table) * self.table_len;
        let all = 0..self.raw.tables;
        if flags & NOT_MIRRORED == 0 {
            return Ok(all.map(place).collect());
        }
        match flags & ACTIVE {
            0 => Ok(vec![place(0)]),
            // Linux uses the first one whatever the flags say, so that they must not differ.
            active if active < u16::from(self.raw.tables) => Ok(all.map(place).collect()),
            active => Err(Trouble::skip(format!(
                "uses copy {active} of its table, of which it has {}",
                self.raw.tables
            ))),
        }
    }

    /// Whether it can be used.
    ///
    /// # Errors
    /// [`Trouble::Skip`] if not; [`Trouble::Io`].
    pub(super) fn check(&self, view: &View<'_>) -> Result<(), Trouble> {
        if self.bitlocker {
            return Err(Trouble::skip("is what BitLocker To Go shows of itself"));
        }
        if self.size > view.len() {
            return Err(Trouble::skip(format!(
                "spans {} bytes and lies in {}",
                self.size,
                view.len()
            )));
        }
        let entries = self.heap.count() + 2;
        if self.table_len < div_ceil(entries * self.kind.bits(), 8) {
            let problem = format!("has a table too short for its clusters: {CHECK_IT}");
            return Err(Trouble::skip(problem));
        }
        if self.tail.state & (STATE_DIRTY | STATE_ERRORS) != 0 {
            return Err(dirty());
        }
        self.check_kind()?;
        self.check_backup(view)
    }

    /// Whether what it calls itself is what it is by its size: systems that go by either must agree.
    fn check_kind(&self) -> Result<(), Trouble> {
        let called = (self.tail.extended == 0x29).then_some(&self.tail.kind);
        let other = match self.kind {
            Kind::Fat12 => [b"FAT16   ", b"FAT32   "],
            Kind::Fat16 => [b"FAT12   ", b"FAT32   "],
            Kind::Fat32 => [b"FAT12   ", b"FAT16   "],
        };
        if called.is_some_and(|called| other.contains(&called)) {
            return Err(Trouble::skip(format!(
                "calls itself another kind of FAT: {CHECK_IT}"
            )));
        }
        let version = self.tail_32.map_or(0, |tail| tail.version.get());
        if version != 0 {
            return Err(Trouble::skip(format!("has the unknown version {version}")));
        }
        Ok(())
    }

    /// Whether FAT32's backup of the boot sector, if it has one, says where the same things are.
    fn check_backup(&self, view: &View<'_>) -> Result<(), Trouble> {
        let sector = self.tail_32.map_or(0, |tail| tail.backup_sector.get());
        if sector == 0 || sector >= self.raw.reserved_sectors.get() {
            return Ok(());
        }
        let mut backup = [0; BOOT_LEN];
        let offset = u64::from(sector) * u64::from(self.raw.bytes_per_sector.get());
        view.read_at(&mut backup, offset)?;
        let backup: RawBoot = zerocopy::transmute!(backup);
        if backup.signature != SIGNATURE || backup.places() == self.raw.places() {
            return Ok(());
        }
        Err(Trouble::skip(format!(
            "has a boot sector that differs from its backup: {CHECK_IT}"
        )))
    }
}

pub(super) fn dirty() -> Trouble {
    Trouble::skip("was not unmounted cleanly: let its own system mount and unmount it once")
}

const SIGNATURE: [u8; 2] = [0x55, 0xaa];

impl RawBoot {
    /// Whether each field on its own may stand in a boot sector of FAT.
    fn looks_like_fat(&self) -> bool {
        let jumps = matches!(self.jump, [0xeb, _, 0x90] | [0xe9, _, _]);
        let others = [b"NTFS    ", b"EXFAT   ", b"-FVE-FS-", b"ReFS\0\0\0\0"];
        jumps
            && self.signature == SIGNATURE
            && !others.contains(&&self.oem_name)
            && matches!(self.bytes_per_sector.get(), 512 | 1024 | 2048 | 4096)
            && self.sectors_per_cluster.is_power_of_two()
            && self.reserved_sectors.get() > 0
            && (1..=MAX_TABLES).contains(&self.tables)
            && matches!(self.media, 0xf0 | 0xf8..=0xff)
            && (u64::from(self.root_entries.get()) * ENTRY_LEN)
                .is_multiple_of(u64::from(self.bytes_per_sector.get()))
            && self.has_one_total()
    }

    /// Whether the two fields for the number of sectors do not contradict each other.
    fn has_one_total(&self) -> bool {
        let [short, long] = [
            u32::from(self.total_sectors_16.get()),
            self.total_sectors_32.get(),
        ];
        (short == 0) != (long == 0) || (short == long && short != 0)
    }

    fn total_sectors(&self) -> u64 {
        match self.total_sectors_16.get() {
            0 => u64::from(self.total_sectors_32.get()),
            short => u64::from(short),
        }
    }

    /// All that says where things are, of FAT32.
    fn places(&self) -> impl PartialEq {
        let tail = RawTail32::read_from_prefix(&self.rest);
        (
            (self.bytes_per_sector, self.sectors_per_cluster),
            (self.reserved_sectors, self.tables),
            (self.total_sectors_16, self.total_sectors_32),
            tail.map(|(tail, _)| (tail.table_sectors, tail.root_cluster))
                .ok(),
        )
    }
}

/// Whether the sector ends with a table of partitions. A partition that begins with this very sector
/// is none: `mkfs.vfat --mbr` writes one for Windows' sake.
fn holds_partitions(sector: &[u8; BOOT_LEN]) -> bool {
    let (entries, _) = sector[446..510].as_chunks::<16>();
    let number = |entry: &[u8; 16], at: usize| {
        entry[at..]
            .first_chunk()
            .map(|bytes| u32::from_le_bytes(*bytes))
            != Some(0)
    };
    entries.iter().all(|entry| matches!(entry[0], 0 | 0x80))
        && (entries.iter()).any(|entry| entry[4] != 0 && number(entry, 8) && number(entry, 12))
}
