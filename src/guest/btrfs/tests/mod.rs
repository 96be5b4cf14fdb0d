//! All that can be wrong with a btrfs.

mod damage;
mod image;

use self::image::{
    BLOCK_GROUP_TREE, CHECKSUM_TREE, CHUNK_TREE, COPY, DATA, DEVICE_TREE, Disk, EXTENT_LEAF_1,
    EXTENT_LEAF_2, EXTENT_TREE, FREE_SPACE_TREE, GENERATION, Image, Item, KIB, METADATA, MIB,
    MODERN, NODE, OLD_STYLE, ROOT_TREE, SUBVOLUMES, SUPERBLOCK, SWAP, Shape, TOTAL, device_extents,
    places, root_item,
};
use super::*;
use crate::units::{u64_from, usize_from};

fn look(bytes: &[u8]) -> Result<Volume, String> {
    let disk = Disk(bytes);
    let view = View::whole(&disk);
    match read(&view) {
        Ok(volume) => Ok(volume),
        Err(Trouble::Skip { reason, hibernated }) => {
            assert!(!hibernated);
            Err(reason)
        }
        Err(Trouble::Io(error)) => panic!("{error}"),
    }
}

/// Why an image is in use after a `change`.
fn skipped(shape: Shape, change: impl Fn(&mut Image)) -> String {
    let mut image = Image::new(shape);
    change(&mut image);
    image.seal();
    look(&image.bytes).expect_err("in use")
}

/// That nothing is free, or exactly what was.
fn same_or_skipped(image: &Image) {
    if let Ok(volume) = look(&image.bytes) {
        assert_eq!(volume.free, image.free());
    }
}

/// Where a node lies.
fn node(logical: u64) -> usize {
    usize_from(places(logical)[0])
}

/// Where the data of an item lie in a leaf.
fn item(image: &Image, leaf: u64, index: usize) -> usize {
    let at = node(leaf) + 101 + index * 25 + 17;
    let offset = u32::from_le_bytes(image.bytes[at..at + 4].try_into().unwrap());
    node(leaf) + 101 + usize_from(u64::from(offset))
}

fn shapes() -> impl Iterator<Item = Shape> {
    (0..64_u16).map(|bits| Shape {
        checksum: bits / 16,
        block_group_tree: bits & 1 != 0,
        free_space_tree: bits & 2 != 0,
        skinny: bits & 4 != 0,
        own_metadata_uuid: bits & 8 != 0,
    })
}

#[test]
fn every_shape() {
    for shape in shapes() {
        let image = Image::new(shape);
        let volume = look(&image.bytes).unwrap_or_else(|reason| panic!("{shape:?}: {reason}"));
        assert_eq!(volume.free, image.free(), "{shape:?}");
        assert_eq!(volume.size, TOTAL);
        assert_eq!(volume.reported_free, image.reported());
    }
}

#[test]
fn the_name_is_told_by_the_magic_number() {
    let name = |bytes: &[u8]| {
        let disk = Disk(bytes);
        is_here(&View::whole(&disk)).unwrap()
    };
    let image = Image::new(MODERN);
    assert_eq!(name(&image.bytes), Some("btrfs"));
    assert_eq!(name(&image.bytes[..SUPERBLOCK + 4095]), None);
    assert_eq!(name(&image.bytes[1..]), None);
    assert_eq!(name(&[]), None);
}

#[test]
fn what_is_not_known_is_left_alone() {
    let at = SUPERBLOCK;
    let cases: [(usize, u64, &str); 16] = [
        (0xac, 1, "features that are not known here (compat 0x1)"),
        (
            0xb4,
            0x1b,
            "features that are not known here (compat_ro 0x10)",
        ),
        (
            0xbc,
            0x1401,
            "features that are not known here (incompat 0x1000)",
        ),
        (
            0xbc,
            0x2401,
            "features that are not known here (incompat 0x2000)",
        ),
        (
            0xbc,
            0x4401,
            "features that are not known here (incompat 0x4000)",
        ),
        (
            0xbc,
            0x2_0401,
            "features that are not known here (incompat 0x20000)",
        ),
        (0xbc, 0x400, "given up in 2009"),
        (0x38, 0x5, "(flags 0x5)"),
        (0x38, 0x1_0000_0001, "(flags 0x100000001)"),
        (0x38, 0x4_0000_0001, "(flags 0x400000001)"),
        (0x60, METADATA.0, "its log of fsync calls"),
        (0x88, 2, "spans 2 devices"),
        (0x70, TOTAL + 512, "damaged metadata (its superblock)"),
        (0x90, 512 | NODE << 32, "damaged metadata (its superblock)"),
        (0xa4, GENERATION + 1, "damaged metadata (its superblock)"),
        (0xc9 + 82, 0, "share devices"),
    ];
    for (field, value, reason) in cases {
        let found = skipped(MODERN, |image| image.put64(at + field, value));
        assert!(found.contains(reason), "{found}");
    }
    let large = skipped(MODERN, |image| {
        image.put64(at + 0x70, TOTAL + 512);
        image.put64(at + 0xc9 + 8, TOTAL + 512);
    });
    assert!(large.contains("more than the"), "{large}");
    // Simple quotas.
    let mut image = Image::new(MODERN);
    image.put64(at + 0xbc, 0x1_0fff);
    image.seal();
    assert_eq!(look(&image.bytes).unwrap().free, image.free());
}

#[test]
fn copies_of_the_superblock_must_say_the_same() {
    let mut image = Image::new(MODERN);
    for (field, value) in [
        (0x48, GENERATION - 1),
        (0x48, GENERATION + 1),
        (0x60, 5),
        (0x30, 0),
    ] {
        let mut image = Image::new(MODERN);
        image.put64(COPY + field, value);
        image.seal_block(COPY);
        let found = look(&image.bytes).unwrap_err();
        assert!(
            found.contains("copies of its superblock that differ"),
            "{found}"
        );
    }
    image.put(COPY, &[0; 4096]);
    assert!(look(&image.bytes).is_err());
}

#[test]
fn what_has_a_checksum_is_not_free() {
    let mut checksums = Image::new(OLD_STYLE).checksums();
    let change = |items: &[Item]| {
        let mut image = Image::new(OLD_STYLE);
        image.leaf(CHECKSUM_TREE, 7, items);
        image.seal();
        look(&image.bytes)
    };
    assert!(change(&checksums[1..]).is_ok());
    let free = ((checksums[0].0.0, 128, DATA.0 + NODE), vec![0; 4]);
    checksums.insert(0, free);
    assert!(
        change(&checksums)
            .unwrap_err()
            .contains("where something is free")
    );
    // The second one of two.
    checksums[0].0.2 = DATA.0;
    assert!(change(&checksums).is_ok());
    checksums[0].1 = vec![0; 8];
    assert!(
        change(&checksums)
            .unwrap_err()
            .contains("where something is free")
    );
    for key in [(5, 128, DATA.0), (checksums[0].0.0, 129, DATA.0)] {
        let found = change(&[(key, vec![0; 4])]).unwrap_err();
        assert!(found.contains("the checksum tree, with"), "{found}");
    }
}

/// With the items of a leaf changed.
fn with_items(leaf: u64, owner: u64, items: &[Item]) -> String {
    skipped(MODERN, |image| image.leaf(leaf, owner, items))
}

#[test]
fn work_that_goes_on_with_the_next_mount() {
    let mut roots = Image::new(MODERN).roots();
    roots.push(((u64::MAX - 3, 248, 0), vec![0; 16]));
    let found = with_items(ROOT_TREE, 1, &roots);
    assert!(found.contains("balance under way"), "{found}");

    for (state, refused) in [
        (0, false),
        (1, true),
        (2, false),
        (3, false),
        (4, true),
        (9, true),
    ] {
        let mut image = Image::new(MODERN);
        let mut extents = device_extents();
        let mut replace = vec![0; 80];
        replace[32] = state;
        extents.insert(1, ((0, 250, 0), replace));
        image.leaf(DEVICE_TREE, 4, &extents);
        image.seal();
        let found = look(&image.bytes);
        assert_eq!(found.is_err(), refused, "state {state}");
        if let Err(found) = found {
            assert!(found.contains("is replacing a device"), "{found}");
        }
    }
}

#[test]
fn roots_must_be_there_once() {
    let roots = Image::new(MODERN).roots();
    for (shape, tree) in [
        (MODERN, 2),
        (MODERN, 4),
        (MODERN, 10),
        (MODERN, 11),
        (OLD_STYLE, 7),
    ] {
        let roots = Image::new(shape).roots();
        let with_items =
            |leaf, owner, items: &[Item]| skipped(shape, |image| image.leaf(leaf, owner, items));
        let without: Vec<_> = (roots.iter().filter(|item| item.0.0 != tree).cloned()).collect();
        let found = with_items(ROOT_TREE, 1, &without);
        assert!(
            found.contains(&format!("the root of tree {tree}")),
            "{found}"
        );
        let mut twice = roots.clone();
        twice.push(((tree, 132, 9), root_item(METADATA.0, 0, 239)));
        twice.sort();
        let found = with_items(ROOT_TREE, 1, &twice);
        assert!(
            found.contains(&format!("the root of tree {tree}")),
            "{found}"
        );
    }
    // A subvolume whose root is where all is free.
    let mut lost = roots.clone();
    lost.push(((257, 132, 0), root_item(SUBVOLUMES[1] + NODE, 0, 239)));
    let found = with_items(ROOT_TREE, 1, &lost);
    assert!(found.contains("where all is free"), "{found}");
    let mut high = roots;
    high.push(((257, 132, 0), root_item(SUBVOLUMES[1], 8, 239)));
    assert!(with_items(ROOT_TREE, 1, &high).contains("the root of tree 257"));
}

#[test]
fn the_device_tree_must_say_what_the_chunk_tree_says() {
    let extents = device_extents();
    for index in 1..extents.len() {
        let mut fewer = extents.clone();
        fewer.remove(index);
        let found = with_items(DEVICE_TREE, 4, &fewer);
        assert!(found.contains("device tree"), "{found}");
        for at in [16, 24] {
            let mut other = extents.clone();
            other[index].1[at + 2] ^= 0x10;
            let found = with_items(DEVICE_TREE, 4, &other);
            assert!(found.contains("device tree"), "{found}");
        }
    }
    let mut more = extents;
    more.push(((2, 204, 40 * MIB), more[1].1.clone()));
    assert!(with_items(DEVICE_TREE, 4, &more).contains("the device tree, with"));
}

#[test]
fn chunks_must_lie_on_this_device() {
    // Items: the device, then the chunks in their order.
    let changed = |index, at: usize, bytes: &[u8]| {
        skipped(MODERN, |image| {
            let at = item(image, CHUNK_TREE, index) + at;
            image.put(at, bytes);
        })
    };
    for (index, at, bytes, reason) in [
        (0, 0, 2, "names other devices"),
        (0, 9, 0, "names other devices"),
        (0, 17, 1, "names other devices"),
        (0, 66, 0, "names other devices"),
        (2, 48, 2, "on other devices"),
        (2, 64, 0, "on other devices"),
        (2, 56 + 1, 1, "the chunk at 16777216"),
        (2, 56 + 5, 1, "the chunk at 16777216"),
        (2, 44, 1, "the chunk at 16777216"),
        (2, 24, 0x0c, "the chunk at 16777216"),
        (2, 24, 0x44, "profile 0x40"),
        (2, 24, 0x84, "profile 0x80"),
        (2, 25, 0x08, "profile 0x820"),
        (2, 24, 0x20, "the chunk at 16777216"),
        (2, 7, 0xff, "the chunk at 16777216"),
        (1, 24, 0x24, "the superblock has otherwise"),
        (1, 57, 0x20, "the superblock has otherwise"),
    ] {
        let found = changed(index, at, &[bytes]);
        assert!(found.contains(reason), "{index} {at}: {found}");
    }
    // Two chunks, one address.
    let found = changed(3, 2, &[0x19]);
    assert!(found.contains("the chunk at 35127296"), "{found}");
}

#[test]
fn counts_must_agree() {
    let one_more = skipped(MODERN, |image| {
        let used = image.get64(SUPERBLOCK + 0x78);
        image.put64(SUPERBLOCK + 0x78, used + NODE);
    });
    assert!(
        one_more.contains("count of bytes that are allocated"),
        "{one_more}"
    );
    for index in 0..4 {
        let found = skipped(MODERN, |image| {
            let at = item(image, BLOCK_GROUP_TREE, index);
            image.put64(at, image.get64(at) + NODE);
        });
        assert!(found.contains("extents are not what it counts"), "{found}");
        let found = skipped(MODERN, |image| {
            let at = item(image, BLOCK_GROUP_TREE, index);
            image.put64(at + 16, 0x10);
        });
        assert!(found.contains("the block group at"), "{found}");
    }
    let used = skipped(MODERN, |image| {
        for at in [SUPERBLOCK + 0xc9 + 16, item(image, CHUNK_TREE, 0) + 16] {
            image.put64(at, image.get64(at) - NODE);
        }
    });
    assert!(used.contains("count of bytes that chunks have"), "{used}");
}

#[test]
fn extents_must_be_sound() {
    for leaf in [EXTENT_LEAF_1, EXTENT_LEAF_2] {
        for (at, value) in [(0, 0), (16, 0), (16, 3)] {
            let found = skipped(MODERN, |image| {
                let at = item(image, leaf, 3) + at;
                image.put64(at, value);
            });
            assert!(found.contains("the extent at"), "{found}");
        }
        // An item of a kind that is not known; an extent that reaches into the next.
        let key = |image: &mut Image, index: usize, at: usize, bytes: &[u8]| {
            image.put(node(leaf) + 101 + index * 25 + at, bytes);
        };
        let found = skipped(OLD_STYLE, |image| key(image, 20, 8, &[175]));
        assert!(found.contains("the extent tree, with"), "{found}");
        let found = skipped(OLD_STYLE, |image| key(image, 20, 9, &[0, 0x30]));
        assert!(found.contains("the extent at"), "{found}");
        let found = skipped(OLD_STYLE, |image| key(image, 20, 9, &[1]));
        assert!(found.contains("the extent at"), "{found}");
        let found = skipped(OLD_STYLE, |image| key(image, 20, 9, &[0xff; 8]));
        assert!(found.contains("the extent at"), "{found}");
    }
}

#[test]
fn what_is_read_must_be_in_use() {
    // The device tree moves to a free place, and its old one stays allocated: all counts are right.
    let free = SUBVOLUMES[1] + 5 * NODE;
    let found = skipped(MODERN, |image| {
        image.leaf(free, 4, &device_extents());
        let mut roots = image.roots();
        roots[1].1 = root_item(free, 0, 439);
        image.write_root_tree(&roots);
    });
    assert!(found.contains("where all is free"), "{found}");
}

#[test]
fn nodes_must_be_where_they_belong() {
    let header = |at: usize, value: &[u8]| {
        skipped(MODERN, |image| image.put(node(EXTENT_LEAF_2) + at, value))
    };
    for (at, value) in [
        (32, &[0][..]),
        (48, &[1]),
        (56, &[0]),
        (80, &[76]),
        (80, &[78]),
        (88, &[5]),
        (96, &[0]),
        (96, &[0xff]),
        (96, &[0xff; 4]),
        (100, &[1]),
    ] {
        let found = header(at, value);
        assert!(found.contains("of tree 2"), "{at} {value:?}: {found}");
    }
    let pointer = node(EXTENT_TREE) + 101;
    for (at, value) in [
        (pointer, 1),
        (pointer + 17, EXTENT_LEAF_2),
        (pointer + 17, EXTENT_TREE),
        (pointer + 17, EXTENT_LEAF_1 + 1),
        (pointer + 17, u64::MAX - 4095),
        (pointer + 17, 40 * MIB),
        (pointer + 25, GENERATION - 1),
        (pointer + 25, GENERATION + 1),
        (pointer + 33 + 17, EXTENT_LEAF_1),
    ] {
        let found = skipped(MODERN, |image| image.put64(at, value));
        assert!(found.contains("damaged metadata"), "{found}");
    }
    // The same leaf twice, under its own key.
    let found = skipped(MODERN, |image| {
        let first = image.bytes[pointer..pointer + 33].to_vec();
        image.put(pointer + 33, &first);
    });
    assert!(found.contains("of tree 2"), "{found}");
    // Items that overlap, or leave room between them, or reach into their list.
    for (at, value) in [(17, 1), (21, 1), (42, 1)] {
        let found = skipped(MODERN, |image| {
            let at = node(EXTENT_LEAF_2) + 101 + at;
            image.bytes[at] = image.bytes[at].wrapping_add(value);
        });
        assert!(found.contains("of tree 2"), "{found}");
    }
}

#[test]
fn the_free_space_tree_must_list_the_same() {
    let list = Image::new(MODERN).free_space();
    let gone = |item: &Item| item.0.0 < MIB || item.0.0 >= 50 * MIB;
    for index in 0..list.len() {
        let mut fewer = list.clone();
        fewer.remove(index);
        if gone(&list[index]) {
            // Of a block group that is gone, nothing matters.
            let mut image = Image::new(MODERN);
            image.leaf(FREE_SPACE_TREE, 10, &fewer);
            image.seal();
            assert_eq!(look(&image.bytes).unwrap().free, image.free());
            continue;
        }
        let found = with_items(FREE_SPACE_TREE, 10, &fewer);
        assert!(found.contains("free space tree"), "{found}");
        let mut other = list.clone();
        match other[index].0.1 {
            198 => other[index].1[0] ^= 1,
            199 => other[index].0.2 -= NODE,
            _ => other[index].1[0] ^= 8,
        }
        let found = with_items(FREE_SPACE_TREE, 10, &other);
        assert!(found.contains("free space tree"), "{found}");
    }
    // Which nobody believes if the superblock does not.
    let mut image = Image::new(OLD_STYLE);
    let mut roots = image.roots();
    roots.insert(5, ((10, 132, 0), root_item(SUBVOLUMES[0], 0, 439)));
    image.write_root_tree(&roots);
    image.bytes[SUPERBLOCK + 0xb4] = 0x01;
    image.seal();
    assert_eq!(look(&image.bytes).unwrap().free, image.free());
    image.bytes[SUPERBLOCK + 0xb4] = 0x03;
    image.seal();
    assert!(look(&image.bytes).is_err());
}

#[test]
fn a_guest_that_sleeps_in_a_file() {
    for shape in [MODERN, OLD_STYLE] {
        let mut image = Image::new(shape);
        let page = node(SWAP.0);
        image.put(page + 4086, b"SWAPSPACE2");
        assert_eq!(look(&image.bytes).unwrap().free, image.free());
        image.put(page + 4086, b"S1SUSPEND\0");
        let disk = Disk(&image.bytes);
        match read(&View::whole(&disk)) {
            Err(Trouble::Skip { reason, hibernated }) => {
                assert!(hibernated && reason.contains("sleeps"), "{reason}");
            }
            other => panic!("{other:?}"),
        }
        // No other file has all that it takes.
        image.put(page + 4086, b"SWAPSPACE2");
        image.put(node(DATA.0) + 4086, b"S1SUSPEND\0");
        assert_eq!(look(&image.bytes).unwrap().free, image.free());
    }
}

#[test]
fn nothing_reserved_is_free() {
    let volume = look(&Image::new(MODERN).bytes).unwrap();
    for place in [
        0,
        64 * KIB,
        MIB - 1,
        64 * MIB,
        64 * MIB + 64 * KIB - 1,
        TOTAL - 1,
    ] {
        assert!(!volume.free.contains(&place), "{place}");
    }
    for place in [
        64 * MIB - 1,
        64 * MIB + 64 * KIB + NODE,
        40 * MIB,
        TOTAL - 513,
    ] {
        assert!(volume.free.contains(&place), "{place}");
    }
    assert_eq!(u64_from(Image::new(MODERN).bytes.len()), TOTAL);
}
