//! Where logical addresses lie on the device: the chunk tree.

use std::ops::Range;

use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use super::damaged;
use super::superblock::{RawDevice, Superblock};
use super::tree::{Forest, Key, RawKey};
use crate::guest::Trouble;
use crate::guest::raw::structure;
use crate::units::u64_from;

/// What chunks are for, and how they are kept. [btrfs_tree.h `BTRFS_BLOCK_GROUP_*`]
const DATA: u64 = 1 << 0;
const SYSTEM: u64 = 1 << 1;
const METADATA: u64 = 1 << 2;
const RAID0: u64 = 1 << 3;
const RAID1: u64 = 1 << 4;
const DUP: u64 = 1 << 5;
const RAID1C3: u64 = 1 << 9;
const RAID1C4: u64 = 1 << 10;

const DEVICE_OBJECT: u64 = 1;
const DEVICE_ITEM: u8 = 216;
const CHUNK_OBJECT: u64 = 256;
const CHUNK_ITEM: u8 = 228;

/// A chunk, without its stripes. [btrfs_tree.h `btrfs_chunk`]
#[derive(Clone, Copy, FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawChunk {
    /// 0: logical bytes.
    len: U64,
    /// 8: 2, the extent tree.
    owner: U64,
    /// 16: bytes of a stripe.
    stripe_len: U64,
    /// 24: what it is for, and how it is kept.
    kind: U64,
    /// 32: alignment, width, sector size.
    sizes: [U32; 3],
    /// 44: places on devices.
    stripe_count: U16,
    /// 46: of RAID10.
    sub_stripes: U16,
}

/// A place of a chunk. [btrfs_tree.h `btrfs_stripe`]
#[derive(Clone, Copy, FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawStripe {
    /// 0: device.
    device: U64,
    /// 8: where on it.
    offset: U64,
    /// 16: identity of the device.
    uuid: [u8; 16],
}

const CHUNK_LEN: usize = size_of::<RawChunk>();
const STRIPE_LEN: usize = size_of::<RawStripe>();
const KEY_LEN: usize = size_of::<RawKey>();
const _: () = assert!(CHUNK_LEN == 48 && STRIPE_LEN == 32 && KEY_LEN == 17);

/// A range of logical addresses, and where the device has it: at each of the places all of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Chunk {
    /// A logical address.
    pub(super) start: u64,
    pub(super) len: u64,
    /// See [`DATA`] and what follows it.
    pub(super) kind: u64,
    /// Where each copy begins on the device.
    pub(super) copies: Vec<u64>,
}

impl Chunk {
    /// The logical address behind it, which was checked to be one.
    pub(super) fn end(&self) -> u64 {
        self.start.saturating_add(self.len)
    }

    /// Whether files' data may lie in it.
    pub(super) fn holds_data(&self) -> bool {
        self.kind & DATA != 0
    }

    /// Whether nodes may lie in it.
    pub(super) fn holds_nodes(&self) -> bool {
        self.kind & (METADATA | SYSTEM) != 0
    }

    /// Decodes the chunk at logical address `start`.
    fn parse(fs: &Superblock, start: u64, bytes: &[u8]) -> Result<Self, Trouble> {
        let raw: RawChunk = structure(bytes, 0)?;
        let (len, kind) = (raw.len.get(), raw.kind.get());
        let count = u64::from(raw.stripe_count.get());
        let copies_expected = match kind & !(DATA | SYSTEM | METADATA) {
            // Striped over one device is not striped.
            0 | RAID0 => 1,
            DUP | RAID1 => 2,
            RAID1C3 => 3,
            RAID1C4 => 4,
            profile => {
                return Err(Trouble::skip(format!(
                    "spreads what it holds in a way that is not known here (profile {profile:#x})"
                )));
            }
        };
        let sound = len > 0
            && len.is_multiple_of(fs.sector_size)
            && start.is_multiple_of(fs.sector_size)
            && start.checked_add(len).is_some()
            && kind & (DATA | SYSTEM | METADATA) != 0
            && count == copies_expected
            && u64_from(bytes.len()) == 48 + 32 * count;
        if !sound {
            return Err(damaged(format_args!("the chunk at {start}")));
        }
        let mut copies = Vec::new();
        for at in (CHUNK_LEN..bytes.len()).step_by(STRIPE_LEN) {
            let stripe: RawStripe = structure(bytes, at)?;
            let offset = stripe.offset.get();
            let end = offset.checked_add(len);
            let here = stripe.device == fs.device.id && stripe.uuid == fs.device.uuid;
            let placed = offset.is_multiple_of(fs.sector_size)
                && end.is_some_and(|end| end <= fs.total_bytes);
            if !here {
                return Err(Trouble::skip("has chunks on other devices"));
            }
            if !placed {
                return Err(damaged(format_args!("the chunk at {start}")));
            }
            copies.push(offset);
        }
        Ok(Self {
            start,
            len,
            kind,
            copies,
        })
    }
}

/// All chunks, in the order of their logical addresses. None overlap.
#[derive(Clone, Debug)]
pub(super) struct Chunks(Vec<Chunk>);

impl Chunks {
    /// The chunks that the chunk tree lies in, which the superblock has.
    ///
    /// # Errors
    /// [`Trouble::Skip`] where it is damaged.
    pub(super) fn of_superblock(fs: &Superblock) -> Result<Self, Trouble> {
        let array = &fs.system_chunks;
        let mut found = Vec::new();
        let mut at = 0;
        while at < array.len() {
            let key: RawKey = structure(array, at)?;
            let key = Key::from(key);
            at += KEY_LEN;
            let chunk: RawChunk = structure(array, at)?;
            let end = at + CHUNK_LEN + usize::from(chunk.stripe_count.get()) * STRIPE_LEN;
            let bytes = array.get(at..end);
            let bytes = bytes.filter(|_| (key.object, key.kind) == (CHUNK_OBJECT, CHUNK_ITEM));
            let bytes = bytes.ok_or_else(|| damaged("the chunks in its superblock"))?;
            found.push(Chunk::parse(fs, key.offset, bytes)?);
            at = end;
        }
        found.sort_by_key(|chunk| chunk.start);
        Self::new(found)
    }

    /// All chunks, by the chunk tree, which those of the superblock lead to.
    ///
    /// # Errors
    /// [`Trouble::Skip`] where the two disagree, another device has a part in it, or anything is
    /// damaged; [`Trouble::Io`].
    pub(super) fn read(forest: &mut Forest<'_, '_>) -> Result<Self, Trouble> {
        let fs = forest.fs;
        let mut found = Vec::new();
        let mut devices = Vec::new();
        forest.walk(fs.chunk_root, &mut |key, data| {
            match (key.object, key.kind) {
                (DEVICE_OBJECT, DEVICE_ITEM) => devices.push(structure::<RawDevice>(data, 0)?),
                (CHUNK_OBJECT, CHUNK_ITEM) => found.push(Chunk::parse(fs, key.offset, data)?),
                _ => return Err(damaged(format_args!("the chunk tree, with {key:?}"))),
            }
            Ok(())
        })?;
        let own = |device: &RawDevice| {
            device.id == fs.device.id
                && device.uuid == fs.device.uuid
                && device.fsid == fs.device.fsid
                && device.total_bytes == fs.device.total_bytes
                && device.bytes_used == fs.device.bytes_used
        };
        if devices.len() != 1 || !devices.iter().all(own) {
            return Err(Trouble::skip(
                "names other devices in its chunk tree than in its superblock",
            ));
        }
        let all = Self::new(found)?;
        let known = |chunk: &Chunk| all.0.contains(chunk);
        let system = all.0.iter().filter(|chunk| chunk.kind & SYSTEM != 0);
        if !forest.chunks.0.iter().all(known) || system.count() != forest.chunks.0.len() {
            return Err(damaged("chunks that the superblock has otherwise"));
        }
        Ok(all)
    }

    /// Takes chunks in the order of their logical addresses.
    fn new(chunks: Vec<Chunk>) -> Result<Self, Trouble> {
        match chunks.windows(2).find(|pair| pair[0].end() > pair[1].start) {
            None => Ok(Self(chunks)),
            Some(pair) => Err(damaged(format_args!("the chunk at {}", pair[1].start))),
        }
    }

    /// In the order of their logical addresses.
    pub(super) fn iter(&self) -> impl Iterator<Item = &Chunk> {
        self.0.iter()
    }

    /// The chunk numbered `index`.
    pub(super) fn get(&self, index: usize) -> Option<&Chunk> {
        self.0.get(index)
    }

    /// Number of the chunk that all of a range of logical addresses, not empty, lies in.
    pub(super) fn find(&self, range: &Range<u64>) -> Option<usize> {
        let behind = (self.0).partition_point(|chunk| chunk.start <= range.start);
        let at = behind.checked_sub(1)?;
        (range.start < range.end && range.end <= self.0[at].end()).then_some(at)
    }

    /// Whether any chunk has a part of a range of logical addresses, or where that is empty, its place.
    pub(super) fn touch(&self, range: &Range<u64>) -> bool {
        let end = range.end.max(range.start.saturating_add(1));
        let behind = self.0.partition_point(|chunk| chunk.start < end);
        behind
            .checked_sub(1)
            .is_some_and(|at| self.0[at].end() > range.start)
    }

    /// Where the device has a range of logical addresses: as often as there are copies.
    ///
    /// # Errors
    /// [`Trouble::Skip`] where no chunk has it.
    pub(super) fn places(
        &self,
        range: &Range<u64>,
    ) -> Result<impl Iterator<Item = Range<u64>> + use<>, Trouble> {
        let Some(at) = self.find(range) else {
            return Err(damaged(format_args!(
                "a reference to {}..{}, where no chunk is",
                range.start, range.end
            )));
        };
        let chunk = &self.0[at];
        // In the chunk, whose copies all end on the device.
        let (from, to) = (range.start - chunk.start, range.end - chunk.start);
        let copies = chunk.copies.clone().into_iter();
        Ok(copies.map(move |copy| copy + from..copy + to))
    }
}
