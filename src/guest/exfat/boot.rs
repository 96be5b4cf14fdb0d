//! The boot region and its backup: where everything lies. [exFAT 3]

use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use crate::guest::Trouble;
use crate::guest::clusters::{CHECK_IT, Heap, MAX_CLUSTERS};
use crate::guest::view::View;
use crate::units::{u64_from, usize_from};

const BOOT_LEN: usize = 512;
const JUMP: [u8; 3] = [0xeb, 0x76, 0x90];
const NAME: [u8; 8] = *b"EXFAT   ";
const SIGNATURE: [u8; 2] = [0x55, 0xaa];

/// Sectors of the boot region, and of its backup behind it.
const REGION_SECTORS: u64 = 12;
/// Those that the checksum in the last one covers.
const CHECKED_SECTORS: u64 = 11;
/// Bytes that change without the checksum's: flags and the percentage in use. [exFAT 3.4]
const UNCHECKED: [usize; 3] = [106, 107, 112];

/// Flags. [exFAT 3.1.13]
const ACTIVE_FAT: u16 = 1;
const DIRTY: u16 = 2;
const FAILED: u16 = 4;

/// The boot sector. [exFAT 3.1]
#[derive(Clone, Copy, Debug, FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawBoot {
    /// 0: EB 76 90.
    jump: [u8; 3],
    /// 3: `EXFAT   `.
    name: [u8; 8],
    /// 11: 0, where FAT has its parameters.
    must_be_zero: [u8; 53],
    /// 64: sectors of the disk before the volume.
    partition_offset: U64,
    /// 72: sectors of the volume.
    volume_length: U64,
    /// 80: first sector of the first table.
    fat_offset: U32,
    /// 84: sectors of a table.
    fat_length: U32,
    /// 88: first sector of the first cluster.
    cluster_heap_offset: U32,
    /// 92: clusters.
    cluster_count: U32,
    /// 96: the root folder's first cluster.
    root_cluster: U32,
    /// 100: serial number.
    serial: U32,
    /// 104: 1.00, the major one in the high byte.
    revision: U16,
    /// 106: [`ACTIVE_FAT`], [`DIRTY`], [`FAILED`] and more.
    flags: U16,
    /// 108: log2 of the bytes of a sector, 9 to 12.
    sector_shift: u8,
    /// 109: log2 of the sectors of a cluster; with the former 25 at most.
    cluster_shift: u8,
    /// 110: tables and bitmaps: 1, or 2 in `TexFAT`.
    fats: u8,
    /// 111: the BIOS's number of the drive.
    drive: u8,
    /// 112: how full it is: a hint.
    percent_in_use: u8,
    /// 113: reserved.
    reserved: [u8; 7],
    /// 120: code.
    code: [u8; 390],
    /// 510: 55 AA.
    signature: [u8; 2],
}

const _: () = assert!(size_of::<RawBoot>() == BOOT_LEN);

/// Where everything lies, in bytes of the part.
#[derive(Clone, Debug)]
pub(super) struct Boot {
    /// Bytes that the filesystem spans.
    pub(super) size: u64,
    pub(super) heap: Heap,
    /// The root folder's first cluster.
    pub(super) root: u32,
    /// How many bitmaps there are.
    pub(super) fats: u8,
    /// Which table and which bitmap are in use, from 0.
    pub(super) active: u8,
    /// Where the table that is in use begins.
    pub(super) table_start: u64,
}

/// Whether there is a boot sector of exFAT.
pub(super) fn has_magic(view: &View<'_>) -> Result<bool, Trouble> {
    if view.len() < u64_from(BOOT_LEN) {
        return Ok(false);
    }
    let raw = raw_boot(view)?;
    Ok((raw.jump, raw.name, raw.signature) == (JUMP, NAME, SIGNATURE))
}

fn raw_boot(view: &View<'_>) -> Result<RawBoot, Trouble> {
    let mut sector = [0; BOOT_LEN];
    view.read_at(&mut sector, 0)?;
    Ok(zerocopy::transmute!(sector))
}

impl Boot {
    /// Reads and checks both boot regions.
    ///
    /// # Errors
    /// [`Trouble::Skip`] where the volume cannot be used; [`Trouble::Io`].
    pub(super) fn read(view: &View<'_>) -> Result<Self, Trouble> {
        let raw = raw_boot(view)?;
        if !(9..=12).contains(&raw.sector_shift) {
            return Err(nonsense());
        }
        check_regions(view, 1 << raw.sector_shift)?;
        let flags = raw.flags.get();
        if flags & DIRTY != 0 {
            let how = "was not unmounted cleanly: let its own system mount and unmount it once";
            return Err(Trouble::skip(how));
        }
        if flags & FAILED != 0 {
            return Err(Trouble::skip(format!("met a bad place: {CHECK_IT}")));
        }
        if flags & !ACTIVE_FAT != 0 {
            return Err(Trouble::skip(format!("has unknown flags, {flags:#x}")));
        }
        if raw.revision.get() >> 8 != 1 {
            let revision = raw.revision.get();
            return Err(Trouble::skip(format!(
                "has the unknown revision {revision:#x}"
            )));
        }
        if raw.cluster_count.get() > MAX_CLUSTERS {
            let problem = format!("has more than {MAX_CLUSTERS} clusters");
            return Err(Trouble::skip(problem));
        }
        let boot = Self::layout(&raw).ok_or_else(nonsense)?;
        if boot.size > view.len() {
            let all = view.len();
            return Err(Trouble::skip(format!(
                "spans {} bytes and lies in {all}",
                boot.size
            )));
        }
        Ok(boot)
    }

    /// Where everything lies; `None` where that makes no sense.
    fn layout(raw: &RawBoot) -> Option<Self> {
        let sector = 1_u64 << raw.sector_shift;
        let is_possible = raw.must_be_zero == [0; 53]
            && raw.sector_shift.checked_add(raw.cluster_shift)? <= 25
            && matches!(raw.fats, 1 | 2);
        if !is_possible {
            return None;
        }
        let bytes = |sectors: u64| sectors.checked_mul(sector);
        let size = bytes(raw.volume_length.get())?;
        let fat_start = bytes(u64::from(raw.fat_offset.get()))?;
        let fat_len = bytes(u64::from(raw.fat_length.get()))?;
        let heap_start = bytes(u64::from(raw.cluster_heap_offset.get()))?;
        let cluster_size = sector << raw.cluster_shift;
        let clusters = raw.cluster_count.get();
        let heap = Heap::new(heap_start, cluster_size, clusters, size)?;

        let active = u8::from(raw.flags.get() & ACTIVE_FAT != 0);
        let table_start = fat_start.checked_add(fat_len.checked_mul(u64::from(active))?)?;
        let fats_end = fat_start.checked_add(fat_len.checked_mul(u64::from(raw.fats))?)?;
        let fits = fat_start >= 2 * REGION_SECTORS * sector
            && fats_end <= heap_start
            && fat_len >= (heap.count() + 2) * 4
            && active < raw.fats;
        fits.then_some(Self {
            size,
            heap,
            root: heap.index(raw.root_cluster.get())?,
            fats: raw.fats,
            active,
            table_start,
        })
    }
}

fn nonsense() -> Trouble {
    Trouble::skip(format!("has a boot sector that makes no sense: {CHECK_IT}"))
}

/// Whether both regions have the right checksum, and are the same but for what changes all the time.
fn check_regions(view: &View<'_>, sector: u64) -> Result<(), Trouble> {
    let len = REGION_SECTORS * sector;
    let mut main = view.read(0, len)?;
    let mut backup = view.read(len, len)?;
    for (region, name) in [(&main, "boot region"), (&backup, "backup boot region")] {
        let (checked, sums) = region.split_at(usize_from(CHECKED_SECTORS * sector));
        let sum = checksum(checked).to_le_bytes();
        let (words, _) = sums.as_chunks::<4>();
        if words.iter().any(|word| *word != sum) {
            return Err(Trouble::skip(format!(
                "has a {name} with a wrong checksum: {CHECK_IT}"
            )));
        }
    }
    for at in UNCHECKED {
        main[at] = 0;
        backup[at] = 0;
    }
    if main != backup {
        return Err(Trouble::skip(format!(
            "has a boot region that differs from its backup: {CHECK_IT}"
        )));
    }
    Ok(())
}

/// [exFAT 3.4]
pub(super) fn checksum(region: &[u8]) -> u32 {
    let bytes = region.iter().enumerate();
    bytes
        .filter(|(at, _)| !UNCHECKED.contains(at))
        .fold(0_u32, |sum, (_, byte)| {
            sum.rotate_right(1).wrapping_add(u32::from(*byte))
        })
}
