use std::io;

use uuid::Uuid;

use super::*;
use crate::error::ErrorKind;
use crate::format::parent::{Identity, NewParent};
use crate::format::vhdx::{
    BAT_REGION, HEADER_1, HEADER_2, Header, METADATA_REGION, REGION_TABLE_1, Region, RegionTable,
    choose_header,
};
use crate::image::vhdx::{NewDisk, create};
use crate::map::BlockState;
use crate::storage::sim::SimStorage;

pub(in crate::image::vhdx) const BLOCK: u64 = 2 * MIB;
pub(in crate::image::vhdx) const BAT: u64 = 3 * MIB;
/// The first byte behind the table of a small disk.
pub(in crate::image::vhdx) const DATA: u64 = 4 * MIB;
/// Where the metadata items lie.
pub(in crate::image::vhdx) const ITEMS: u64 = 2 * MIB + (64 << 10);

pub(in crate::image::vhdx) fn at(offset: u64) -> FileOffset {
    FileOffset::new(offset)
}

/// An empty disk of 16 blocks of 2 MiB, the last one half, in a file with room for 8.
pub(in crate::image::vhdx) fn new(disk_type: DiskType) -> SimStorage {
    let sim = SimStorage::new();
    create_in(&sim, disk_type, 15 * BLOCK + MIB, 2 << 20).unwrap();
    if disk_type != DiskType::Fixed {
        sim.set_len(DATA + 8 * BLOCK).unwrap();
    }
    sim
}

/// Creates a disk.
pub(in crate::image::vhdx) fn create_in(
    sim: &SimStorage,
    disk_type: DiskType,
    disk_len: u64,
    block_size: u32,
) -> io::Result<()> {
    let parent = NewParent {
        identity: Identity::Vhdx(Uuid::from_u128(1)),
        disk_len,
        sector_size: 512,
        mtime: std::time::UNIX_EPOCH,
        relative: ".\\a.vhdx".to_owned(),
        absolute: String::new(),
    };
    let disk = NewDisk {
        disk_type,
        disk_len,
        block_size,
        sector_size: 512,
        physical_sector_size: 4096,
        parent: (disk_type == DiskType::Differencing).then_some(&parent),
    };
    create(sim, &disk)
}

fn read(sim: &SimStorage) -> Result<Layout, FormatError> {
    let header = |at| {
        let mut bytes = [0; 4096];
        sim.read_exact_at(&mut bytes, at).unwrap();
        Header::parse(&bytes)
    };
    let header = choose_header(header(HEADER_1), header(HEADER_2))?;
    Layout::read(sim, header).map_err(|error| match error {
        LayoutError::Format(error) => error,
        LayoutError::Io(error) => panic!("{error}"),
    })
}

/// Sets entry `index` of the table to `state` and `place`.
pub(in crate::image::vhdx) fn set_entry(sim: &SimStorage, index: u64, state: u64, place: u64) {
    sim.write_all_at(&(place | state).to_le_bytes(), at(BAT + 8 * index))
        .unwrap();
}

/// A disk with these entries.
pub(in crate::image::vhdx) fn with(disk_type: DiskType, entries: &[(u64, u64, u64)]) -> SimStorage {
    let sim = new(disk_type);
    for (index, state, place) in entries {
        set_entry(&sim, *index, *state, *place);
    }
    sim
}

/// Why a dynamic disk with these entries can be read but not written.
fn not_writable(entries: &[(u64, u64, u64)]) -> String {
    let layout = read(&with(DiskType::Dynamic, entries)).expect("can be read");
    layout.not_writable.expect("cannot be written").to_string()
}

fn state(layout: &Layout, block: u32) -> BlockState {
    layout.map.get(BlockIndex::new(block))
}

fn present(place: u64, whole: bool) -> BlockState {
    BlockState::Present {
        slot: at(place),
        whole,
    }
}

#[test]
fn a_new_disk_is_what_was_asked_for() {
    for disk_type in [DiskType::Dynamic, DiskType::Fixed, DiskType::Differencing] {
        let sim = new(disk_type);
        let layout = read(&sim).unwrap();
        assert_eq!(layout.disk_type(), disk_type);
        assert_eq!(layout.disk_len, 15 * BLOCK + MIB);
        assert_eq!((layout.block_size, layout.sector_size), (BLOCK, 512));
        assert_eq!(layout.physical_sector_size, 4096);
        assert!(layout.creator.starts_with("vhdfs "), "{}", layout.creator);
        assert!(layout.not_writable.is_none(), "{:?}", layout.not_writable);
        assert_eq!(layout.faults.kinds().count(), 0);
        assert_eq!(layout.items.oddities(), Vec::<String>::new());
        let starts: Vec<u64> = (layout.pinned.iter())
            .map(|(range, _)| range.start.get())
            .collect();
        assert_eq!(starts, [0, MIB, 2 * MIB, 3 * MIB]);
        let blocks = if disk_type == DiskType::Fixed { 16 } else { 0 };
        assert_eq!(layout.map.present_count(), blocks);
        assert_eq!(layout.end.get(), DATA + blocks * BLOCK);
        let number = layout.header.header.sequence_number;
        assert_eq!((layout.header.slot, number), (1, 1));
    }
    let layout = read(&new(DiskType::Fixed)).unwrap();
    assert_eq!(state(&layout, 3), present(DATA + 3 * BLOCK, true));
    let parent = read(&new(DiskType::Differencing)).unwrap().parent.unwrap();
    assert_eq!(parent.identities, [Identity::Vhdx(Uuid::from_u128(1))]);
}

#[test]
fn states_of_a_disk_without_a_parent() {
    let entries = [
        (0, 1, 0),
        (1, 2, 0),
        (2, 3, DATA),
        (3, 6, DATA + BLOCK),
        (4, 1, DATA + 2 * BLOCK),
    ];
    let layout = read(&with(DiskType::Dynamic, &entries)).unwrap();
    assert!(layout.not_writable.is_none());
    for block in [0, 1, 2, 4, 5] {
        assert_eq!(state(&layout, block), BlockState::NotPresent);
    }
    assert_eq!(state(&layout, 3), present(DATA + BLOCK, true));
    let anchors: Vec<_> = layout.anchors.into_iter().collect();
    let block = BlockIndex::new;
    assert_eq!(
        anchors,
        [(block(2), at(DATA)), (block(4), at(DATA + 2 * BLOCK))]
    );
    assert_eq!(layout.end.get(), DATA + 3 * BLOCK);
}

#[test]
fn states_of_a_child() {
    let entries = [
        (0, 1, 0),
        (1, 2, 0),
        (2, 3, 0),
        (3, 6, DATA + MIB),
        (4, 7, DATA + MIB + BLOCK),
        (2048, 6, DATA),
    ];
    let layout = read(&with(DiskType::Differencing, &entries)).unwrap();
    assert!(layout.not_writable.is_none());
    for block in [0, 1, 2] {
        assert_eq!(state(&layout, block), BlockState::Zero);
    }
    assert_eq!(state(&layout, 3), present(DATA + MIB, true));
    assert_eq!(state(&layout, 4), present(DATA + MIB + BLOCK, false));
    assert_eq!(state(&layout, 5), BlockState::NotPresent);
    assert_eq!(layout.bitmap_blocks[&0], at(DATA));

    let no_bitmap = read(&with(DiskType::Differencing, &entries[..5])).unwrap_err();
    assert!(no_bitmap.to_string().contains("block 4"), "{no_bitmap}");
}

#[test]
fn what_cannot_be_read_is_refused() {
    for (state, place) in [(4, 0), (4, DATA), (6, 0), (7, 0)] {
        let error = read(&with(DiskType::Dynamic, &[(3, state, place)])).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        assert!(error.to_string().contains("block 3"), "{error}");
    }
}

#[test]
fn what_a_change_could_harm_is_not_writable() {
    for (entries, text) in [
        (&[(3, 5, 0)][..], "reserved state 5"),
        (&[(3, 7, DATA)], "state 7"),
        (&[(3, 6 | 8, DATA)], "reserved bits 0x8"),
        (&[(3, 2, DATA)], "state 2 with the file offset"),
        (&[(3, 0, DATA)], "state 0 with the file offset"),
        (&[(3, 3, DATA + 8 * BLOCK)], "inside the file"),
        (&[(16, 6, DATA)], "behind the last block"),
        (&[(3, 6, DATA), (5, 6, DATA)], "block 5 at 0x400000"),
        (&[(3, 6, DATA), (5, 6, DATA + MIB)], "overlaps block 3"),
        (&[(3, 6, DATA), (5, 3, DATA + MIB)], "kept for block 5"),
        (&[(3, 6, MIB)], "overlaps"),
        (&[(3, 6, 2 * MIB)], "overlaps"),
        (&[(3, 6, BAT)], "overlaps the block table"),
        (&[(3, 6, DATA + 7 * BLOCK + MIB)], "beyond the end"),
        (&[(3, 6, 0xffff_ffff_fff0_0000)], "beyond the end"),
    ] {
        let error = not_writable(entries);
        assert!(error.contains(text), "{entries:x?}: {error}");
    }
}

#[test]
fn harmless_leftovers_are_harmless() {
    for index in [16, 2048] {
        let layout = read(&with(DiskType::Dynamic, &[(index, 2, 0)])).unwrap();
        assert!(layout.not_writable.is_none());
        assert_eq!(layout.faults.kinds().count(), 1);
    }
}

#[test]
fn the_last_block_may_be_cut() {
    let sim = with(DiskType::Dynamic, &[(15, 6, DATA)]);
    sim.set_len(DATA + MIB).unwrap();
    let layout = read(&sim).unwrap();
    assert!(layout.not_writable.is_none());
    assert_eq!(layout.end.get(), DATA + BLOCK);
    sim.set_len(DATA + MIB - 512).unwrap();
    assert!(read(&sim).unwrap().not_writable.is_some());
    let other = with(DiskType::Dynamic, &[(14, 6, DATA)]);
    other.set_len(DATA + MIB).unwrap();
    assert!(read(&other).unwrap().not_writable.is_some());
}

#[test]
fn one_good_region_table_is_enough() {
    for (copy, place) in [REGION_TABLE_1, REGION_TABLE_2].into_iter().enumerate() {
        let sim = new(DiskType::Dynamic);
        sim.write_all_at(b"x", place).unwrap();
        let layout = read(&sim).unwrap();
        assert!(layout.not_writable.is_none());
        let bad: Vec<bool> = layout.regions.faults.iter().map(Option::is_some).collect();
        assert_eq!(bad, [copy == 0, copy == 1]);
        sim.write_all_at(b"x", REGION_TABLE_1).unwrap();
        sim.write_all_at(b"x", REGION_TABLE_2).unwrap();
        assert_eq!(read(&sim).unwrap_err().kind(), ErrorKind::Corrupt);
    }
}

/// A disk with these regions.
fn with_regions(regions: &[(Uuid, u64, u64, bool)]) -> SimStorage {
    let sim = new(DiskType::Dynamic);
    let regions = (regions.iter())
        .map(|(id, start, len, required)| Region {
            id: *id,
            range: FileRange::new(at(*start), *len),
            required: *required,
        })
        .collect();
    let table = RegionTable::new(regions);
    sim.write_all_at(table.bytes(), REGION_TABLE_1).unwrap();
    sim
}

#[test]
fn regions_that_nobody_needs_to_know_keep_their_space() {
    let id = Uuid::from_u128(9);
    let regions = [
        (BAT_REGION, BAT, MIB, false),
        (METADATA_REGION, 2 * MIB, MIB, false),
        (id, DATA, MIB, false),
    ];
    let sim = with_regions(&regions);
    let layout = read(&sim).unwrap();
    assert!(layout.not_writable.is_none() && layout.regions.differ);
    assert_eq!(
        layout.pinned.last().unwrap().0,
        FileRange::new(at(DATA), MIB)
    );
    assert_eq!(layout.end.get(), DATA + MIB);
    set_entry(&sim, 0, 6, DATA);
    let error = read(&sim).unwrap().not_writable.unwrap().to_string();
    assert!(error.contains(&id.to_string()), "{error}");

    for (region, kind) in [
        ((id, DATA, MIB, true), ErrorKind::Incompatible),
        ((BAT_REGION, DATA, MIB, true), ErrorKind::Corrupt),
    ] {
        let mut regions = regions;
        regions[2] = region;
        assert_eq!(read(&with_regions(&regions)).unwrap_err().kind(), kind);
    }
    let mut over_log = regions;
    over_log[2].1 = MIB;
    let error = read(&with_regions(&over_log)).unwrap().not_writable;
    assert!(error.unwrap().to_string().contains("the log"));
}

#[test]
fn tables_that_do_not_fit_are_refused() {
    let sim = new(DiskType::Dynamic);
    // 16 TiB in blocks of 2 MiB need 64 MiB of table.
    sim.write_all_at(&(16_u64 << 40).to_le_bytes(), at(ITEMS + 8))
        .unwrap();
    let error = read(&sim).unwrap_err().to_string();
    assert!(
        error.contains("1048576 bytes for the block table"),
        "{error}"
    );

    for (len, what) in [
        (300 << 10, "region tables"),
        (2 * MIB, "metadata region"),
        (BAT, "block table"),
    ] {
        let sim = new(DiskType::Dynamic);
        sim.set_len(len).unwrap();
        let error = read(&sim).unwrap_err().to_string();
        assert!(
            error.contains(what) && error.contains("the file was cut"),
            "{error}"
        );
    }
}

#[test]
fn impossible_items_are_refused() {
    for (offset, bytes, kind) in [
        (0, &[1][..], ErrorKind::Corrupt),
        (4, &[0x10], ErrorKind::Incompatible),
        (4, &[2], ErrorKind::Corrupt),
        (8, &[1], ErrorKind::Corrupt),
        (32, &[1], ErrorKind::Corrupt),
        (36, &[1], ErrorKind::Corrupt),
    ] {
        let sim = new(DiskType::Dynamic);
        sim.write_all_at(bytes, at(ITEMS + offset)).unwrap();
        let error = read(&sim).unwrap_err();
        assert_eq!(error.kind(), kind, "{offset}: {error}");
    }
    let sim = new(DiskType::Dynamic);
    sim.write_all_at(b"x", at(0)).unwrap();
    assert_eq!(read(&sim).unwrap_err(), FormatError::NotVhdx);
}

#[test]
fn a_file_without_a_log_is_not_writable() {
    let sim = new(DiskType::Dynamic);
    let mut header = read(&sim).unwrap().header.header;
    header.sequence_number = 2;
    header.log_len = 0;
    sim.write_all_at(&header.to_bytes(), HEADER_1).unwrap();
    assert!(read(&sim).unwrap().not_writable.is_some());
}

#[test]
fn an_interrupted_creation_leaves_no_disk() {
    let whole = new(DiskType::Fixed);
    let made = read(&whole).unwrap();
    for ops in 0..12 {
        let sim = SimStorage::new();
        sim.cut_after(ops);
        let done = create_in(&sim, DiskType::Fixed, 15 * BLOCK + MIB, 2 << 20).is_ok();
        for mut choice in sim.choices(8, 40, ops) {
            let crashed = sim.crash(&mut choice);
            let len = crashed.len().unwrap();
            let found = (len >= MIB).then(|| read(&crashed));
            match found {
                Some(Ok(layout)) => {
                    assert!(layout.not_writable.is_none());
                    assert_eq!(layout.map.present_count(), made.map.present_count());
                    assert_eq!((layout.end, len), (made.end, made.file_len));
                }
                _ => assert!(!done, "{choice:?}"),
            }
        }
    }
}
