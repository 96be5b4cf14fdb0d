//! A small btrfs, built byte by byte.

use std::io;

use rangemap::RangeSet;

use crate::guest::Source;
use crate::guest::btrfs::checksum::Checksum;
use crate::units::{u64_from, usize_from};

pub(super) const NODE: u64 = 4096;
const NODE_ROOM: usize = 4096 - 101;
pub(super) const KIB: u64 = 1 << 10;
pub(super) const MIB: u64 = 1 << 20;
/// With room for the second superblock, and no multiple of a sector.
pub(super) const TOTAL: u64 = 68 * MIB + 512;
pub(super) const GENERATION: u64 = 77;
const FSID: [u8; 16] = *b"the filesystem's";
const METADATA_UUID: [u8; 16] = *b"was another once";
const DEVICE_UUID: [u8; 16] = *b"the device's own";
pub(super) const SUPERBLOCK: usize = 64 << 10;
pub(super) const COPY: usize = 64 << 20;

/// A chunk: logical address, bytes, kind, copies on the device.
pub(super) type RawChunk = (u64, u64, u64, &'static [u64]);

pub(super) const SYSTEM: RawChunk = (MIB, 256 * KIB, 0x22, &[MIB, 2 * MIB]);
pub(super) const METADATA: RawChunk = (16 * MIB, 512 * KIB, 0x24, &[4 * MIB, 8 * MIB]);
/// Around the second superblock.
pub(super) const DATA: RawChunk = (32 * MIB, 1536 * KIB, 0x01, &[63 * MIB + 512 * KIB]);
/// In the reserved part, as old versions of mkfs.btrfs had it; and right behind the one before.
pub(super) const OLD: RawChunk = (33 * MIB + 512 * KIB, 256 * KIB, 0x01, &[768 * KIB]);
pub(super) const CHUNKS: [RawChunk; 4] = [SYSTEM, METADATA, DATA, OLD];

// Nodes.
pub(super) const CHUNK_TREE: u64 = SYSTEM.0;
pub(super) const ROOT_TREE: u64 = METADATA.0;
pub(super) const EXTENT_TREE: u64 = METADATA.0 + NODE;
pub(super) const EXTENT_LEAF_1: u64 = METADATA.0 + 2 * NODE;
pub(super) const EXTENT_LEAF_2: u64 = METADATA.0 + 3 * NODE;
pub(super) const DEVICE_TREE: u64 = METADATA.0 + 4 * NODE;
pub(super) const FREE_SPACE_TREE: u64 = METADATA.0 + 5 * NODE;
pub(super) const BLOCK_GROUP_TREE: u64 = METADATA.0 + 6 * NODE;
pub(super) const CHECKSUM_TREE: u64 = METADATA.0 + 7 * NODE;
/// A subvolume and its snapshot, which nothing here reads.
pub(super) const SUBVOLUMES: [u64; 2] = [METADATA.0 + 9 * NODE, METADATA.0 + 10 * NODE];

/// A file that may be swap space, which has no checksums.
pub(super) const SWAP: (u64, u64) = (DATA.0 + MIB, 256 * KIB);

pub(super) type Key = (u64, u8, u64);
pub(super) type Item = (Key, Vec<u8>);

/// A disk in memory.
pub(super) struct Disk<'a>(pub(super) &'a [u8]);

impl Source for Disk<'_> {
    fn len(&self) -> u64 {
        u64_from(self.0.len())
    }

    fn sector_size(&self) -> u64 {
        512
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        buf.copy_from_slice(&self.0[usize_from(offset)..][..buf.len()]);
        Ok(())
    }
}

/// What kind of a filesystem to build.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    pub(super) checksum: u16,
    pub(super) block_group_tree: bool,
    pub(super) free_space_tree: bool,
    /// Nodes have items of their own kind.
    pub(super) skinny: bool,
    pub(super) own_metadata_uuid: bool,
}

pub(super) const MODERN: Shape = Shape {
    checksum: 0,
    block_group_tree: true,
    free_space_tree: true,
    skinny: true,
    own_metadata_uuid: true,
};

pub(super) const OLD_STYLE: Shape = Shape {
    checksum: 0,
    block_group_tree: false,
    free_space_tree: false,
    skinny: false,
    own_metadata_uuid: false,
};

/// What is built.
pub(super) struct Image {
    pub(super) bytes: Vec<u8>,
    pub(super) shape: Shape,
    /// Logical addresses of all nodes.
    pub(super) nodes: Vec<u64>,
}

impl Image {
    pub(super) fn new(shape: Shape) -> Self {
        let mut image = Self {
            bytes: vec![0; usize_from(TOTAL)],
            shape,
            nodes: Vec::new(),
        };
        image.write_superblock();
        image.write_chunk_tree();
        image.write_root_tree(&image.roots());
        image.write_extent_tree();
        let extents = device_extents();
        image.leaf(DEVICE_TREE, 4, &extents);
        match shape.free_space_tree {
            true => image.leaf(FREE_SPACE_TREE, 10, &image.free_space()),
            false => image.leaf(CHECKSUM_TREE, 7, &image.checksums()),
        }
        if shape.block_group_tree {
            image.leaf(BLOCK_GROUP_TREE, 11, &image.block_groups());
        }
        image.seal();
        image
    }

    pub(super) fn put(&mut self, at: usize, bytes: &[u8]) {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }

    pub(super) fn put64(&mut self, at: usize, n: u64) {
        self.put(at, &n.to_le_bytes());
    }

    pub(super) fn get64(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.bytes[at..at + 8].try_into().unwrap())
    }

    fn uuid(&self) -> [u8; 16] {
        if self.shape.own_metadata_uuid {
            METADATA_UUID
        } else {
            FSID
        }
    }

    fn device_item(&self) -> Vec<u8> {
        let used: u64 = CHUNKS
            .iter()
            .map(|chunk| chunk.1 * u64_from(chunk.3.len()))
            .sum();
        let mut item = [1, TOTAL, used].map(u64::to_le_bytes).concat();
        item.resize(66, 0);
        item.extend(DEVICE_UUID);
        item.extend(self.uuid());
        item
    }

    fn write_superblock(&mut self) {
        let at = SUPERBLOCK;
        self.put(at + 0x20, &FSID);
        self.put64(at + 0x38, 1);
        self.put(at + 0x40, b"_BHRfS_M");
        for (field, value) in [
            (0x48, GENERATION),
            (0x50, ROOT_TREE),
            (0x58, CHUNK_TREE),
            (0x70, TOTAL),
            (0x78, self.extents().iter().map(|(_, len)| len).sum()),
            (0x88, 1),
            (0x90, NODE | NODE << 32),
            (0x98, NODE | NODE << 32),
            (0xa4, GENERATION),
            (0xb4, u64::from(self.shape.block_group_tree) << 3),
            (0xbc, 1),
        ] {
            self.put64(at + field, value);
        }
        if self.shape.free_space_tree {
            self.bytes[at + 0xb4] |= 3;
        }
        if self.shape.own_metadata_uuid {
            self.put64(at + 0xbc, 1 | 1 << 10);
            self.put(at + 0x23b, &METADATA_UUID);
        }
        self.put(at + 0xc4, &self.shape.checksum.to_le_bytes());
        self.put(at + 0xc9, &self.device_item());
        let array = [key_bytes((256, 228, SYSTEM.0)), chunk_item(SYSTEM)].concat();
        self.put(
            at + 0xa0,
            &u32::try_from(array.len()).unwrap().to_le_bytes(),
        );
        self.put(at + 0x32b, &array);
    }

    pub(super) fn write_chunk_tree(&mut self) {
        let mut items = vec![((1, 216, 1), self.device_item())];
        items.extend(CHUNKS.map(|chunk| ((256, 228, chunk.0), chunk_item(chunk))));
        self.leaf(CHUNK_TREE, 3, &items);
    }

    /// What the root tree holds.
    pub(super) fn roots(&self) -> Vec<Item> {
        let mut items = vec![
            ((2, 132, 0), root_item(EXTENT_TREE, 1, 439)),
            ((4, 132, 0), root_item(DEVICE_TREE, 0, 439)),
            ((5, 12, 6), vec![1; 20]),
            ((5, 132, 0), root_item(SUBVOLUMES[0], 0, 239)),
        ];
        items.push(match self.shape.free_space_tree {
            true => ((10, 132, 0), root_item(FREE_SPACE_TREE, 0, 439)),
            false => ((7, 132, 0), root_item(CHECKSUM_TREE, 0, 239)),
        });
        if self.shape.block_group_tree {
            items.push(((11, 132, 0), root_item(BLOCK_GROUP_TREE, 0, 439)));
        }
        items.push(((256, 132, 70), root_item(SUBVOLUMES[1], 0, 239)));
        items
    }

    pub(super) fn write_root_tree(&mut self, items: &[Item]) {
        self.leaf(ROOT_TREE, 1, items);
    }

    /// Allocated nodes.
    fn metadata(&self) -> Vec<u64> {
        let mut found = vec![
            CHUNK_TREE,
            ROOT_TREE,
            EXTENT_TREE,
            EXTENT_LEAF_1,
            EXTENT_LEAF_2,
            DEVICE_TREE,
        ];
        if self.shape.free_space_tree {
            found.push(FREE_SPACE_TREE);
        }
        if self.shape.block_group_tree {
            found.push(BLOCK_GROUP_TREE);
        }
        if !self.shape.free_space_tree {
            found.push(CHECKSUM_TREE);
        }
        found.extend(SUBVOLUMES);
        found
    }

    /// All that is allocated: logical address and bytes.
    pub(super) fn extents(&self) -> Vec<(u64, u64)> {
        let nodes = self.metadata().into_iter().map(|node| (node, NODE));
        let data = (0..100).map(|number| (DATA.0 + number * 2 * NODE, NODE));
        let copy = DATA.0 + 512 * KIB..DATA.0 + 576 * KIB;
        let data = data.filter(|(start, _)| !copy.contains(start));
        let last = (DATA.0 + DATA.1 - NODE, NODE);
        nodes.chain(data).chain([SWAP, last]).collect()
    }

    /// Checksums, which do not matter, of all data but the first extent's; as many as there is room for.
    pub(super) fn checksums(&self) -> Vec<Item> {
        let len = usize_from(Checksum::new(self.shape.checksum).unwrap().len());
        let extents = self
            .extents()
            .into_iter()
            .filter(|extent| extent.0 > DATA.0 && *extent != SWAP);
        let object = 10_u64.wrapping_neg();
        let item = |(start, _)| ((object, 128, start), vec![0; len]);
        extents.map(item).take(NODE_ROOM / (25 + len)).collect()
    }

    /// Bytes that are allocated of a chunk.
    fn used(&self, chunk: RawChunk) -> u64 {
        let extents = self.extents().into_iter();
        let inside = extents.filter(|(start, _)| (chunk.0..chunk.0 + chunk.1).contains(start));
        inside.map(|(_, len)| len).sum()
    }

    fn block_groups(&self) -> Vec<Item> {
        let item = |chunk: RawChunk| {
            let data = [self.used(chunk), 256, chunk.2]
                .map(u64::to_le_bytes)
                .concat();
            ((chunk.0, 192, chunk.1), data)
        };
        CHUNKS.into_iter().map(item).collect()
    }

    fn write_extent_tree(&mut self) {
        let item = |(start, len): (u64, u64)| {
            let is_data = start >= DATA.0;
            let key = if is_data || !self.shape.skinny {
                (start, 168, len)
            } else {
                (start, 169, 0)
            };
            let flags = if is_data { 1 } else { 2 };
            let mut data = [1_u64, 5, flags].map(u64::to_le_bytes).concat();
            if start == SWAP.0 || start == DATA.0 {
                // With quotas, the owner; then the file.
                if self.shape.skinny {
                    data.extend([&[172][..], &[0; 8]].concat());
                }
                data.extend([&[178][..], &[5; 16], &[0; 8], &[1, 0, 0, 0]].concat());
            }
            (key, data)
        };
        let mut items: Vec<Item> = self.extents().into_iter().map(item).collect();
        // A reference that had no room in its item.
        items.push(((DATA.0, 178, 12345), vec![0; 28]));
        if !self.shape.block_group_tree {
            items.extend(self.block_groups());
        }
        items.sort();
        let (first, second) = items.split_at(items.len() / 2);
        self.leaf(EXTENT_LEAF_1, 2, first);
        self.leaf(EXTENT_LEAF_2, 2, second);
        let pointers = [(first[0].0, EXTENT_LEAF_1), (second[0].0, EXTENT_LEAF_2)];
        self.inner(EXTENT_TREE, 2, &pointers);
    }

    /// Whether each sector of a chunk is free.
    fn free_sectors(&self, chunk: RawChunk) -> Vec<bool> {
        let extents = self.extents();
        let used = |at| {
            let mut extents = extents.iter();
            extents.any(|(start, len)| (*start..start + len).contains(&at))
        };
        (chunk.0..chunk.0 + chunk.1)
            .step_by(usize_from(NODE))
            .map(|at| !used(at))
            .collect()
    }

    /// Metadata and data in bitmaps, of which data have two; the others as extents. Behind them what
    /// was forgotten of a block group that is gone, and before them.
    pub(super) fn free_space(&self) -> Vec<Item> {
        let info = |chunk: RawChunk, extents: u32, flags: u32| {
            let data = [extents, flags].map(u32::to_le_bytes).concat();
            ((chunk.0, 198, chunk.1), data)
        };
        let gone: [RawChunk; 2] = [(0, MIB, 0, &[]), (50 * MIB, 8 * MIB, 0, &[])];
        let mut items = Vec::new();
        for chunk in gone {
            items.push(info(chunk, 1, 0));
            items.push(((chunk.0, 199, chunk.1), Vec::new()));
        }
        for chunk in CHUNKS {
            let free = self.free_sectors(chunk);
            let pieces = free.chunk_by(|a, b| a == b).filter(|run| run[0]).count();
            let by_bitmaps = chunk == METADATA || chunk == DATA;
            let pieces = u32::try_from(pieces).unwrap();
            items.push(info(chunk, pieces, u32::from(by_bitmaps)));
            if !by_bitmaps {
                let mut at = chunk.0;
                for run in free.chunk_by(|a, b| a == b) {
                    let len = u64_from(run.len()) * NODE;
                    if run[0] {
                        items.push(((at, 199, len), Vec::new()));
                    }
                    at += len;
                }
                continue;
            }
            // The first one ends in the middle of a free run.
            let per_bitmap = if chunk == DATA { 232 } else { 128 };
            let mut at = chunk.0;
            for part in free.chunks(per_bitmap) {
                let mut bitmap = vec![0_u8; part.len().div_ceil(8)];
                for bit in (0..part.len()).filter(|bit| part[*bit]) {
                    bitmap[bit / 8] |= 1 << (bit % 8);
                }
                let len = u64_from(part.len()) * NODE;
                items.push(((at, 200, len), bitmap));
                at += len;
            }
        }
        items.sort();
        items
    }

    /// What is free on the device, told the other way round: all but what is allocated or reserved.
    pub(super) fn free(&self) -> RangeSet<u64> {
        let mut free: RangeSet<u64> = std::iter::once(0..TOTAL - 512).collect();
        for (start, len) in self.extents() {
            for place in places(start) {
                free.remove(place..place + len);
            }
        }
        free.remove(0..MIB);
        free.remove(64 * MIB..64 * MIB + 64 * KIB);
        free
    }

    /// What tools call free.
    pub(super) fn reported(&self) -> u64 {
        let used = |(start, len): (u64, u64)| len * u64_from(places(start).len());
        TOTAL - self.extents().into_iter().map(used).sum::<u64>()
    }

    /// A leaf of items in their order.
    pub(super) fn leaf(&mut self, node: u64, owner: u64, items: &[Item]) {
        let at = self.header(node, owner, items.len(), 0);
        let mut end = usize_from(NODE) - 101;
        for (index, (key, data)) in items.iter().enumerate() {
            end -= data.len();
            let item = at + 101 + index * 25;
            assert!(index * 25 + 25 <= end, "too many items");
            self.put(item, &key_bytes(*key));
            let place = [end, data.len()].map(|n| u32::try_from(n).unwrap().to_le_bytes());
            self.put(item + 17, &place.concat());
            self.put(at + 101 + end, data);
        }
    }

    /// A node of level 1.
    pub(super) fn inner(&mut self, node: u64, owner: u64, children: &[(Key, u64)]) {
        let at = self.header(node, owner, children.len(), 1);
        for (index, (key, child)) in children.iter().enumerate() {
            let at = at + 101 + index * 33;
            self.put(at, &key_bytes(*key));
            self.put64(at + 17, *child);
            self.put64(at + 25, GENERATION);
        }
    }

    fn header(&mut self, node: u64, owner: u64, count: usize, level: u8) -> usize {
        let at = usize_from(places(node)[0]);
        self.put(at, &[0; 4096]);
        self.put(at + 32, &self.uuid());
        self.put64(at + 48, node);
        self.put64(at + 56, 1 | 1 << 56);
        self.put64(at + 80, GENERATION);
        self.put64(at + 88, owner);
        self.put(at + 96, &u32::try_from(count).unwrap().to_le_bytes());
        self.bytes[at + 100] = level;
        if !self.nodes.contains(&node) {
            self.nodes.push(node);
        }
        at
    }

    /// Makes all checksums right, and the copy of the superblock what it is to be a copy of.
    pub(super) fn seal(&mut self) {
        self.put64(SUPERBLOCK + 0x30, u64_from(SUPERBLOCK));
        self.bytes.copy_within(SUPERBLOCK..SUPERBLOCK + 4096, COPY);
        self.put64(COPY + 0x30, u64_from(COPY));
        self.seal_block(SUPERBLOCK);
        self.seal_block(COPY);
        self.seal_nodes();
    }

    pub(super) fn seal_nodes(&mut self) {
        for node in self.nodes.clone() {
            self.seal_block(usize_from(places(node)[0]));
        }
    }

    pub(super) fn seal_block(&mut self, at: usize) {
        let checksum = Checksum::new(self.shape.checksum).unwrap_or(Checksum::Crc32c);
        let found = checksum.of(&self.bytes[at + 32..at + 4096]);
        self.put(at, &found);
    }
}

/// Where a logical address lies on the device.
pub(super) fn places(logical: u64) -> Vec<u64> {
    let chunk = CHUNKS
        .into_iter()
        .find(|chunk| (chunk.0..chunk.0 + chunk.1).contains(&logical));
    let (start, _, _, copies) = chunk.unwrap();
    copies.iter().map(|copy| copy + (logical - start)).collect()
}

fn key_bytes((object, kind, offset): Key) -> Vec<u8> {
    [&object.to_le_bytes()[..], &[kind], &offset.to_le_bytes()].concat()
}

pub(super) fn chunk_item((_, len, kind, copies): RawChunk) -> Vec<u8> {
    let mut item = [len, 2, 65536, kind].map(u64::to_le_bytes).concat();
    item.extend([65536_u32, 65536, 4096].map(u32::to_le_bytes).concat());
    let count = u16::try_from(copies.len()).unwrap();
    item.extend([count.to_le_bytes(), [0; 2]].concat());
    for copy in copies {
        item.extend([1, *copy].map(u64::to_le_bytes).concat());
        item.extend(DEVICE_UUID);
    }
    item
}

pub(super) fn root_item(node: u64, level: u8, len: usize) -> Vec<u8> {
    let mut item = vec![0; len];
    item[160..168].copy_from_slice(&GENERATION.to_le_bytes());
    item[176..184].copy_from_slice(&node.to_le_bytes());
    item[216] = 1;
    item[238] = level;
    item
}

/// What the device tree holds.
pub(super) fn device_extents() -> Vec<Item> {
    let item = |chunk: RawChunk, copy: u64| {
        let mut data = [3, 256, chunk.0, chunk.1].map(u64::to_le_bytes).concat();
        data.extend([0; 16]);
        ((1, 204, copy), data)
    };
    let mut items = vec![((0, 249, 1), vec![0; 40])];
    for chunk in CHUNKS {
        items.extend(chunk.3.iter().map(|copy| item(chunk, *copy)));
    }
    items.sort();
    items
}
