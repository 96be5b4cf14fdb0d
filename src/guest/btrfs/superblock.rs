//! The superblock and its copies.

use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use super::checksum::Checksum;
use super::damaged;
use super::tree::{MAX_LEVEL, Root};
use crate::guest::Trouble;
use crate::guest::raw::structure;
use crate::guest::view::View;
use crate::units::usize_from_u32;

/// Where the superblock lies, and its copies. [fs.h `btrfs_sb_offset`]
pub(super) const PLACES: [u64; 3] = [64 << 10, 64 << 20, 256 << 30];
/// Bytes of a superblock.
const LEN: u64 = 4096;
const MAGIC: [u8; 8] = *b"_BHRfS_M";
const MAGIC_AT: u64 = 64;
/// It was written; nothing else may be the matter, as an error, a seed device, a dump of metadata
/// only, or a change by btrfstune that was cut short.
const FLAG_WRITTEN: u64 = 1;

/// `compat_ro_flags`: a free space tree, that is valid, fs-verity, a block group tree.
const FREE_SPACE_TREE: u64 = 1 << 0;
const FREE_SPACE_TREE_VALID: u64 = 1 << 1;
const BLOCK_GROUP_TREE: u64 = 1 << 3;
const KNOWN_RO_COMPAT: u64 = 0x0f;
/// `incompat_flags`: back references as they are since 2009.
const MIXED_BACKREF: u64 = 1 << 0;
const METADATA_UUID: u64 = 1 << 10;
/// mixed backref, default subvolume, mixed groups, lzo, zstd, big metadata, extended iref, RAID56,
/// skinny metadata, no holes, metadata uuid, RAID1C34; simple quota. Not zoned, the second extent
/// tree, the RAID stripe tree or the remap tree.
const KNOWN_INCOMPAT: u64 = 0x0fff | 1 << 16;

/// A device as the superblock and the chunk tree have it. [btrfs_tree.h `btrfs_dev_item`]
#[derive(Clone, Copy, PartialEq, Eq, FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct RawDevice {
    /// 0: its number.
    pub(super) id: U64,
    /// 8: its bytes.
    pub(super) total_bytes: U64,
    /// 16: bytes that chunks have.
    pub(super) bytes_used: U64,
    /// 24: alignment, width, sector size.
    pub(super) sizes: [U32; 3],
    /// 36: 0.
    pub(super) kind: U64,
    /// 44: 0.
    pub(super) generation: U64,
    /// 52: 0.
    pub(super) start_offset: U64,
    /// 60: 0.
    pub(super) group: U32,
    /// 64: seek speed and bandwidth: 0.
    pub(super) speeds: [u8; 2],
    /// 66: its identity.
    pub(super) uuid: [u8; 16],
    /// 82: of the filesystem.
    pub(super) fsid: [u8; 16],
}

/// A superblock as it lies on the device. [btrfs_tree.h `btrfs_super_block`]
#[derive(Clone, Copy, FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawSuperblock {
    /// 0: of all that follows.
    checksum: [u8; 32],
    /// 0x20: as users see it.
    fsid: [u8; 16],
    /// 0x30: its own place.
    place: U64,
    /// 0x38: see [`FLAG_WRITTEN`].
    flags: U64,
    /// 0x40: `_BHRfS_M`.
    magic: [u8; 8],
    /// 0x48: number of the last commit.
    generation: U64,
    /// 0x50: node of the root tree.
    root: U64,
    /// 0x58: of the chunk tree.
    chunk_root: U64,
    /// 0x60: of the log, 0 for none.
    log_root: U64,
    /// 0x68: not used.
    log_root_generation: U64,
    /// 0x70: bytes of all devices.
    total_bytes: U64,
    /// 0x78: bytes that are allocated, each copy counted once.
    bytes_used: U64,
    /// 0x80: 6.
    root_directory: U64,
    /// 0x88: devices.
    device_count: U64,
    /// 0x90: bytes of a sector, a node, a leaf, a stripe.
    sizes: [U32; 4],
    /// 0xa0: bytes of the array of system chunks.
    system_chunks_len: U32,
    /// 0xa4: commit that wrote the root of the chunk tree.
    chunk_root_generation: U64,
    /// 0xac: features that others need not know.
    compat: U64,
    /// 0xb4: features that writers must know.
    ro_compat: U64,
    /// 0xbc: features that readers must know.
    incompat: U64,
    /// 0xc4: kind of the checksums.
    checksum_type: U16,
    /// 0xc6: level of the root tree.
    root_level: u8,
    /// 0xc7: of the chunk tree.
    chunk_root_level: u8,
    /// 0xc8: of the log.
    log_root_level: u8,
    /// 0xc9: this device.
    device: RawDevice,
    /// 0x12b: name.
    label: [u8; 256],
    /// 0x22b: commits of the space cache and the UUID tree.
    other_generations: [U64; 2],
    /// 0x23b: what nodes carry, if the user changed theirs.
    metadata_uuid: [u8; 16],
    /// 0x24b: for the second extent tree, and reserved.
    reserved: [u8; 224],
    /// 0x32b: chunks that the chunk tree lies in.
    system_chunks: [u8; 2048],
    /// 0xb2b: four backups of the roots, and padding.
    rest: [u8; 1237],
}

const _: () = assert!(size_of::<RawDevice>() == 98);
const _: () = assert!(size_of::<RawSuperblock>() == 4096);

/// What the superblock says, checked.
#[derive(Clone)]
pub(super) struct Superblock {
    /// Number of the last commit.
    pub(super) generation: u64,
    pub(super) checksum: Checksum,
    /// What nodes carry.
    pub(super) metadata_uuid: [u8; 16],
    /// Bytes of the device, which lie in the view.
    pub(super) total_bytes: u64,
    /// See [`RawSuperblock::bytes_used`].
    pub(super) bytes_used: u64,
    /// Bytes of a sector, a power of two.
    pub(super) sector_size: u64,
    /// Bytes of a node, a power of two, at least a sector and at most 64 KiB.
    pub(super) node_size: u64,
    pub(super) device: RawDevice,
    pub(super) root: Root,
    pub(super) chunk_root: Root,
    /// The array of system chunks.
    pub(super) system_chunks: Vec<u8>,
    /// Block groups have a tree of their own.
    pub(super) block_group_tree: bool,
    /// There is a free space tree, and it may be believed.
    pub(super) free_space_tree: bool,
}

/// Whether there is a superblock at its first place.
pub(super) fn is_here(view: &View<'_>) -> Result<bool, Trouble> {
    if view.len() < PLACES[0] + LEN {
        return Ok(false);
    }
    let mut magic = [0; 8];
    view.read_at(&mut magic, PLACES[0] + MAGIC_AT)?;
    Ok(magic == MAGIC)
}

impl Superblock {
    /// Reads and checks the superblock, and its copies.
    ///
    /// The kernel mounts by the first one and rewrites the others with each commit, so that there is
    /// nothing to choose: a copy that differs tells of a commit that was cut short.
    ///
    /// # Errors
    /// [`Trouble::Skip`] where it is damaged, or says something that this reader must not be used with.
    pub(super) fn read(view: &View<'_>) -> Result<Self, Trouble> {
        let first = view.read(PLACES[0], LEN)?;
        let raw: RawSuperblock = structure(&first, 0)?;
        let checksum = Checksum::new(raw.checksum_type.get())?;
        if !is_sound(&first, checksum, PLACES[0])? {
            return Err(damaged("its superblock"));
        }
        refuse_unknown(&raw)?;
        let found = Self::checked(&raw, checksum)?;
        if found.total_bytes > view.len() {
            return Err(Trouble::skip(format!(
                "spans {} bytes, more than the {} of its part",
                found.total_bytes,
                view.len()
            )));
        }
        // There is a copy wherever the device has room for more than one.
        let copies = PLACES[1..].iter();
        for place in copies.filter(|place| **place + LEN < found.total_bytes) {
            let copy = view.read(*place, LEN)?;
            if !is_sound(&copy, checksum, *place)? || !is_same(&first, &copy) {
                return Err(Trouble::skip(
                    "has copies of its superblock that differ: let its own system mount it once and \
                     write something",
                ));
            }
        }
        Ok(found)
    }

    fn checked(raw: &RawSuperblock, checksum: Checksum) -> Result<Self, Trouble> {
        let [sector_size, node_size, leaf_size, _] = raw.sizes.map(|size| u64::from(size.get()));
        let generation = raw.generation.get();
        let sane = sector_size.is_power_of_two()
            && (4096..=65536).contains(&sector_size)
            && node_size.is_power_of_two()
            && (sector_size..=65536).contains(&node_size)
            && leaf_size == node_size
            && raw.total_bytes == raw.device.total_bytes
            && raw.chunk_root_generation.get() <= generation
            && raw.root_level < MAX_LEVEL
            && raw.chunk_root_level < MAX_LEVEL;
        let array = (raw.system_chunks).get(..usize_from_u32(raw.system_chunks_len.get()));
        let Some(system_chunks) = array.filter(|_| sane) else {
            return Err(damaged("its superblock"));
        };
        let metadata_uuid = if raw.incompat.get() & METADATA_UUID != 0 {
            raw.metadata_uuid
        } else {
            raw.fsid
        };
        if raw.device.fsid != metadata_uuid {
            return Err(Trouble::skip("is one of several that share devices"));
        }
        let valid = FREE_SPACE_TREE | FREE_SPACE_TREE_VALID;
        Ok(Self {
            generation,
            checksum,
            metadata_uuid,
            total_bytes: raw.total_bytes.get(),
            bytes_used: raw.bytes_used.get(),
            sector_size,
            node_size,
            device: raw.device,
            root: Root {
                tree: 1,
                node: raw.root.get(),
                level: raw.root_level,
                generation,
            },
            chunk_root: Root {
                tree: 3,
                node: raw.chunk_root.get(),
                level: raw.chunk_root_level,
                generation: raw.chunk_root_generation.get(),
            },
            system_chunks: system_chunks.to_vec(),
            block_group_tree: raw.ro_compat.get() & BLOCK_GROUP_TREE != 0,
            free_space_tree: raw.ro_compat.get() & valid == valid,
        })
    }
}

/// Whether a superblock has the right checksum and lies where it belongs.
fn is_sound(bytes: &[u8], checksum: Checksum, place: u64) -> Result<bool, Trouble> {
    let raw: RawSuperblock = structure(bytes, 0)?;
    Ok(raw.magic == MAGIC && raw.place.get() == place && checksum.is_right(bytes))
}

/// Whether two superblocks say the same: all but checksum and place.
fn is_same(first: &[u8], copy: &[u8]) -> bool {
    first[0x20..0x30] == copy[0x20..0x30] && first[0x38..] == copy[0x38..]
}

/// Refuses what may mean that free space is not free. [disk-io.c `btrfs_check_features`]
fn refuse_unknown(raw: &RawSuperblock) -> Result<(), Trouble> {
    for (what, bits, known) in [
        ("compat", raw.compat, 0),
        ("compat_ro", raw.ro_compat, KNOWN_RO_COMPAT),
        ("incompat", raw.incompat, KNOWN_INCOMPAT),
    ] {
        let unknown = bits.get() & !known;
        if unknown != 0 {
            return Err(Trouble::skip(format!(
                "has features that are not known here ({what} {unknown:#x})"
            )));
        }
    }
    if raw.incompat.get() & MIXED_BACKREF == 0 {
        return Err(Trouble::skip("is of a format that was given up in 2009"));
    }
    if raw.flags.get() != FLAG_WRITTEN {
        return Err(Trouble::skip(format!(
            "is marked as damaged, a seed, or half changed (flags {:#x})",
            raw.flags.get()
        )));
    }
    if raw.device_count.get() != 1 {
        return Err(Trouble::skip(format!(
            "spans {} devices",
            raw.device_count.get()
        )));
    }
    if raw.log_root.get() != 0 {
        return Err(Trouble::skip(
            "was not unmounted cleanly (its log of fsync calls is to be replayed): let its own system \
             mount it once",
        ));
    }
    Ok(())
}
