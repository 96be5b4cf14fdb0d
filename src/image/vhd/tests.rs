mod power;

use std::sync::Arc;

use super::*;
use crate::error::{ErrorKind, FormatError, ParentProblem};
use crate::format::DiskType;
use crate::format::vhd::{BAT_UNUSED, DynamicHeader, HEADER_LEN, bitmap_len};
use crate::image::{LayoutError, read_array};
use crate::storage::sim::{Effect, Fault, OpKind, SimStorage};
use crate::units::{low_u32, round_up};

const BLOCK: u64 = 512 << 10;
const SLOT: u64 = BLOCK + 512;
const TABLE: u64 = 1536;
/// The first byte behind the table of 16 entries.
const FLOOR: u64 = 2048;

const OPTIONS: ImageOptions = ImageOptions {
    read_only: false,
    punch_holes: true,
};
const READ_ONLY: ImageOptions = ImageOptions {
    read_only: true,
    ..OPTIONS
};

fn at(offset: u64) -> FileOffset {
    FileOffset::new(offset)
}

/// An empty disk of 16 blocks of 512 KiB.
fn empty() -> SimStorage {
    let sim = SimStorage::new();
    create(&sim, DiskType::Dynamic, 16 * BLOCK, 512 << 10).unwrap();
    sim
}

/// A disk with blocks 0, 1, ... at `places`, all their bitmaps full, packed to the footer.
fn with_slots(places: &[u64]) -> SimStorage {
    let sim = empty();
    let footer = footer_of(&sim);
    let mut end = FLOOR;
    for (entry, place) in (0..).zip(places) {
        set_entry(&sim, entry, low_u32(place / 512));
        sim.write_all_at(&[0xff; 512], at(*place)).unwrap();
        end = end.max(place + SLOT);
    }
    sim.write_all_at(&[0; 512], at(FLOOR)).unwrap();
    if places.first() == Some(&FLOOR) {
        sim.write_all_at(&[0xff; 512], at(FLOOR)).unwrap();
    }
    sim.write_all_at(&footer.to_bytes(), at(end)).unwrap();
    sim
}

fn footer_of(sim: &SimStorage) -> Footer {
    Footer::parse(&read_array(sim, at(0)).unwrap()).unwrap()
}

fn set_entry(sim: &SimStorage, entry: u64, sector: u32) {
    sim.write_all_at(&sector.to_be_bytes(), at(TABLE + 4 * entry))
        .unwrap();
}

fn open(sim: &SimStorage, options: ImageOptions) -> Result<Box<dyn Image>, OpenProblem> {
    Ok(super::open(Arc::new(sim.fork()), options, &|_| Ok(()))?.image)
}

/// Opens the very file in `storage` for writing.
fn open_shared(storage: &Arc<SimStorage>) -> Box<dyn Image> {
    let storage: Arc<SimStorage> = Arc::clone(storage);
    super::open(storage, OPTIONS, &|_| Ok(())).unwrap().image
}

/// That `sim` can be read but not written, and why.
fn not_writable(sim: &SimStorage) -> FormatError {
    let before = sim.to_bytes();
    let error = match open(sim, OPTIONS) {
        Err(OpenProblem::NotWritable(error)) => error,
        other => panic!("{other:?}"),
    };
    open(sim, READ_ONLY).expect("can be read");
    assert!(sim.to_bytes() == before, "a refused file changed");
    error
}

fn end_footer(sim: &SimStorage) -> Footer {
    let len = sim.len().unwrap();
    Footer::parse(&read_array(sim, at(len - 512)).unwrap()).unwrap()
}

#[test]
fn an_opened_file_is_not_changed_while_nothing_is_wrong() {
    for sim in [empty(), with_slots(&[FLOOR, FLOOR + SLOT])] {
        let before = sim.to_bytes();
        let storage = Arc::new(sim);
        let image = open_shared(&storage);
        image.sync().unwrap();
        image.cut(Cut::ALL).unwrap();
        image.settle().unwrap();
        assert!(storage.to_bytes() == before);
    }
}

#[test]
fn a_missing_footer_is_restored_behind_the_last_block() {
    let sim = with_slots(&[FLOOR + SLOT]);
    let len = sim.len().unwrap();
    for lost in [512, 100] {
        let sim = sim.fork();
        sim.set_len(len - lost).unwrap();
        let storage = Arc::new(sim);
        // The block itself is whole.
        super::open(Arc::<SimStorage>::clone(&storage), READ_ONLY, &|_| Ok(())).unwrap();
        open_shared(&storage);
        assert_eq!(storage.len().unwrap(), len);
        assert_eq!(end_footer(&storage), footer_of(&storage));
    }
}

#[test]
fn the_footer_at_the_end_decides_and_its_copy_follows() {
    let sim = with_slots(&[FLOOR]);
    let storage = Arc::new(sim);
    let footer = end_footer(&storage);
    for damaged in [
        [0; 512],
        Footer::new(DiskType::Dynamic, 16 * BLOCK, std::time::UNIX_EPOCH).to_bytes(),
    ] {
        storage.write_all_at(&damaged, at(0)).unwrap();
        open_shared(&storage);
        assert_eq!(footer_of(&storage), footer);
    }
}

#[test]
fn an_unused_tail_is_cut_at_the_next_open() {
    let sim = with_slots(&[FLOOR]);
    let (len, footer) = (sim.len().unwrap(), end_footer(&sim));
    sim.set_len(len + 8 * SLOT).unwrap();
    sim.write_all_at(&footer.to_bytes(), at(len + 8 * SLOT - 512))
        .unwrap();
    let storage = Arc::new(sim);
    open_shared(&storage);
    assert_eq!(storage.len().unwrap(), len);
    assert_eq!(end_footer(&storage), footer);
    assert_eq!(storage.unsynced_len(), 0, "durably");
}

#[test]
fn what_must_not_be_written_is_refused_for_writing_only() {
    let overlapping = with_slots(&[FLOOR, FLOOR + SLOT - 512]);
    assert!(matches!(
        not_writable(&overlapping),
        FormatError::Overlap { .. }
    ));

    let twice = with_slots(&[FLOOR, FLOOR]);
    assert!(matches!(not_writable(&twice), FormatError::Overlap { .. }));

    let in_table = with_slots(&[FLOOR]);
    set_entry(&in_table, 3, low_u32(TABLE / 512));
    assert!(matches!(
        not_writable(&in_table),
        FormatError::Overlap { .. }
    ));

    let zero = with_slots(&[FLOOR]);
    set_entry(&zero, 3, 0);
    assert!(matches!(not_writable(&zero), FormatError::Overlap { .. }));

    let beyond = with_slots(&[FLOOR]);
    set_entry(&beyond, 3, 1 << 20);
    assert!(matches!(
        not_writable(&beyond),
        FormatError::BeyondEnd { .. }
    ));

    let tapdisk = with_slots(&[FLOOR]);
    let len = tapdisk.len().unwrap();
    tapdisk.write_all_at(&[0xc7; 512], at(len - 512)).unwrap();
    assert!(not_writable(&tapdisk).to_string().contains("tapdisk"));

    let saved = with_slots(&[FLOOR]);
    let mut bytes = end_footer(&saved).to_bytes();
    bytes[84] = 1;
    let sum = u32::from_be_bytes(bytes[64..68].try_into().unwrap()).wrapping_sub(1);
    bytes[64..68].copy_from_slice(&sum.to_be_bytes());
    saved.write_all_at(&bytes, at(len - 512)).unwrap();
    assert!(
        not_writable(&saved)
            .to_string()
            .contains("saved machine state")
    );
}

#[test]
fn numbers_of_a_file_are_not_believed() {
    let header = |entries, block_size, table| {
        let sim = with_slots(&[FLOOR]);
        let bytes = DynamicHeader::new(entries, block_size, at(table)).to_bytes();
        sim.write_all_at(&bytes, at(FOOTER_LEN)).unwrap();
        match Layout::read(&sim) {
            Err(LayoutError::Format(error)) => error.to_string(),
            other => panic!("{other:?}"),
        }
    };
    assert!(header(u32::MAX, 512 << 10, TABLE).contains("block table at"));
    assert!(header(16, 512 << 10, 1 << 60).contains("block table at"));
    assert!(header(16, 512 << 10, 1000).contains("multiple of 512"));
    assert!(header(15, 512 << 10, TABLE).contains("at least 16"));
    assert!(header(16, 3 << 20, TABLE).contains("block size"));
    assert!(header(16, 512, TABLE).contains("block size"));
    assert!(header(16, 512 << 10, 512).contains("overlaps"));

    let huge = empty();
    let bytes = Footer::new(DiskType::Dynamic, !511, std::time::UNIX_EPOCH).to_bytes();
    let len = huge.len().unwrap();
    huge.write_all_at(&bytes, at(len - 512)).unwrap();
    assert!(matches!(Layout::read(&huge), Err(LayoutError::Format(_))));

    for short in [0, 1, 510, 511, 512, 600] {
        let sim = SimStorage::new();
        sim.set_len(short).unwrap();
        let Err(LayoutError::Format(error)) = Layout::read(&sim) else {
            panic!("opened, {short} bytes long");
        };
        assert_eq!(error.kind(), ErrorKind::NotADisk, "{error}");
    }
}

#[test]
fn a_guest_cannot_make_its_fixed_disk_another() {
    let sim = SimStorage::new();
    create(&sim, DiskType::Fixed, 1 << 20, 0).unwrap();
    let forged = empty().to_bytes();
    sim.write_all_at(&forged, at(0)).unwrap();
    let image = open(&sim, READ_ONLY).unwrap();
    assert_eq!(image.geometry().disk_type, DiskType::Fixed);
    assert_eq!(image.geometry().disk_len, 1 << 20);
}

#[test]
fn a_damaged_footer_of_511_bytes_is_found_and_made_whole() {
    let sim = SimStorage::new();
    create(&sim, DiskType::Fixed, 1 << 20, 0).unwrap();
    sim.set_len((1 << 20) + 511).unwrap();
    // Where its creator's version is.
    sim.write_all_at(&[0xff], at((1 << 20) + 32)).unwrap();
    let found = stray::find(&sim).unwrap().unwrap();
    assert_eq!(found.state, stray::State::Damaged);
    assert_eq!(found.at, at(1 << 20));
    found.put(&sim).unwrap();
    let image = open(&sim, READ_ONLY).unwrap();
    assert_eq!(image.geometry().disk_len, 1 << 20);
    assert!(stray::find(&sim).unwrap().is_none());
}

#[test]
fn spare_entries_in_use_stay_where_they_are() {
    let sim = with_slots(&[FLOOR]);
    // The table of 17 entries; the disk needs 16.
    let header = DynamicHeader::new(17, 512 << 10, at(TABLE));
    sim.write_all_at(&header.to_bytes(), at(FOOTER_LEN))
        .unwrap();
    let spare = FLOOR + SLOT;
    set_entry(&sim, 16, low_u32(spare / 512));
    let footer = footer_of(&sim);
    sim.write_all_at(&footer.to_bytes(), at(spare + SLOT))
        .unwrap();
    let image = open(&sim, OPTIONS).unwrap();
    assert_eq!(
        image.frame(&|_| false).pinned,
        [FileRange::new(at(spare), SLOT)]
    );
    assert_eq!(image.reserve_at(at(spare)), None);
    image.cut(Cut::ALL).unwrap();
    assert_eq!(image.file_len(), spare + SLOT + 512);
}

/// Found by fuzzing: the next block was put behind it, and made the file 2 TiB long.
#[test]
fn what_headers_name_beyond_the_end_makes_the_file_no_longer() {
    let sim = with_slots(&[FLOOR]);
    let header = DynamicHeader::new(17, 512 << 10, at(TABLE));
    sim.write_all_at(&header.to_bytes(), at(FOOTER_LEN))
        .unwrap();
    set_entry(&sim, 16, u32::MAX - 1);
    let error = not_writable(&sim).to_string();
    assert!(error.contains("block 16, which lies beyond"), "{error}");
    let report = verify::verify(&sim, crate::image::Repair::Nothing).unwrap();
    assert_eq!(report.errors.len(), 1, "{report:?}");
}

#[test]
fn unwritten_sectors_read_as_zeros_and_become_zeros() {
    let sim = with_slots(&[FLOOR]);
    let mut bitmap = [0; 512];
    bitmap[0] = 0x80;
    sim.write_all_at(&bitmap, at(FLOOR)).unwrap();
    sim.write_all_at(&[9; 2048], at(FLOOR + 512)).unwrap();
    let storage = Arc::new(sim);
    let image = open_shared(&storage);
    let block = BlockIndex::new(0);
    let found = image.sector_bitmap(block).unwrap();
    assert!(found.is_written(0) && !found.is_written(1));
    assert!(matches!(
        image.map().get(block),
        BlockState::Present { whole: false, .. }
    ));
    image.make_whole(block).unwrap();
    assert!(matches!(
        image.map().get(block),
        BlockState::Present { whole: true, .. }
    ));
    let mut data = [1; 2048];
    storage.read_exact_at(&mut data, at(FLOOR + 512)).unwrap();
    assert!(data[..512] == [9; 512] && data[512..].iter().all(|byte| *byte == 0));
}

/// A disk as Xen's vhd-util makes it: `tap`, a batmap behind the table, here with all bits set.
fn xen() -> SimStorage {
    let sim = with_slots(&[FLOOR + 3584 + 4096 - 512]);
    let mut footer = end_footer(&sim).to_bytes();
    let old: u32 = footer[28..36].iter().map(|byte| u32::from(*byte)).sum();
    footer[28..36].copy_from_slice(b"tap\0\x00\x01\x00\x03");
    let new: u32 = footer[28..36].iter().map(|byte| u32::from(*byte)).sum();
    let sum = u32::from_be_bytes(footer[64..68].try_into().unwrap());
    let sum = sum.wrapping_add(old).wrapping_sub(new);
    footer[64..68].copy_from_slice(&sum.to_be_bytes());
    let len = sim.len().unwrap();
    sim.write_all_at(&footer, at(0)).unwrap();
    sim.write_all_at(&footer, at(len - 512)).unwrap();
    let mut batmap = [0; 512];
    batmap[..8].copy_from_slice(b"tdbatmap");
    batmap[8..16].copy_from_slice(&(FLOOR + 512).to_be_bytes());
    batmap[16..20].copy_from_slice(&1_u32.to_be_bytes());
    batmap[20..24].copy_from_slice(&0x0001_0002_u32.to_be_bytes());
    batmap[24..28].copy_from_slice(&(!0x80_u32).to_be_bytes());
    sim.write_all_at(&batmap, at(FLOOR)).unwrap();
    let mut map = [0; 512];
    map[0] = 0x80;
    sim.write_all_at(&map, at(FLOOR + 512)).unwrap();
    sim
}

#[test]
fn xens_batmap_is_emptied_before_a_block_is_dropped() {
    let storage = Arc::new(xen());
    let image = open_shared(&storage);
    assert!(image.geometry().slot.strict);
    let fits = || {
        let layout = Layout::read(&*storage).unwrap();
        layout.dynamic.unwrap().batmap.unwrap().1
    };
    assert!(fits());
    image
        .commit(&[MapEdit::Drop {
            block: BlockIndex::new(0),
            reads: Reads::Zeros,
        }])
        .unwrap();
    assert!(fits(), "the checksum follows");
    let map: [u8; 512] = read_array(&*storage, at(FLOOR + 512)).unwrap();
    assert_eq!(map, [0; 512]);
    image.sync().unwrap();
    image.cut(Cut::ALL).unwrap();
    let start = image.frame(&|_| false).start.get();
    assert!(start >= FLOOR + 1024);
    assert_eq!(image.file_len(), start + 512);
}

#[test]
fn a_wrong_batmap_is_mended_when_opened_for_writing() {
    let sim = xen();
    sim.write_all_at(&[0xff], at(FLOOR + 512)).unwrap();
    assert!(open(&sim, READ_ONLY).is_ok());
    let storage = Arc::new(sim);
    open_shared(&storage);
    assert!(
        Layout::read(&*storage)
            .unwrap()
            .dynamic
            .unwrap()
            .batmap
            .unwrap()
            .1
    );
}

#[test]
fn new_slots_are_aligned_and_the_file_ends_with_a_footer() {
    let storage = Arc::new(empty());
    let image = open_shared(&storage);
    let mut slots = Vec::new();
    for block in 0..16 {
        let slot = image.reserve().unwrap();
        assert_eq!((slot.get() + bitmap_len(512 << 10)) % 4096, 0);
        image.prepare(slot, None).unwrap();
        image
            .commit(&[MapEdit::Place {
                block: BlockIndex::new(block),
                slot,
                sectors: None,
            }])
            .unwrap();
        slots.push(slot.get());
        assert_eq!(end_footer(&storage), footer_of(&storage));
    }
    let step = round_up(SLOT, 4096);
    assert!(
        slots.windows(2).all(|pair| pair[1] - pair[0] == step),
        "{slots:?}"
    );
    image.sync().unwrap();
    image.cut(Cut::ALL).unwrap();
    assert_eq!(storage.len().unwrap(), slots[15] + SLOT + 512);
    let table: [u8; 64] = read_array(&*storage, at(TABLE)).unwrap();
    assert!(!table.as_chunks::<4>().0.contains(&BAT_UNUSED.to_be_bytes()));
    assert_eq!(HEADER_LEN + FOOTER_LEN, TABLE);
}

/// The guest of a fixed disk wrote a whole dynamic VHD to its start; then the footer is damaged.
#[test]
fn a_fixed_disk_without_its_footer_is_not_what_its_guest_wrote() {
    let damages: [fn(&SimStorage); 4] = [
        |sim| {
            sim.write_all_at(b"zzz", at(sim.len().unwrap() - 512 + 70))
                .unwrap()
        },
        |sim| {
            sim.write_all_at(b"zzz", at(sim.len().unwrap() - 512))
                .unwrap()
        },
        |sim| sim.set_len(sim.len().unwrap() - 512).unwrap(),
        |sim| sim.write_all_at(&[1; 512], at(sim.len().unwrap())).unwrap(),
    ];
    for damage in damages {
        let sim = SimStorage::new();
        create(&sim, DiskType::Fixed, 4 * BLOCK, 512 << 10).unwrap();
        let planted = empty().to_bytes();
        sim.write_all_at(&planted, at(0)).unwrap();
        sim.write_all_at(&[0x77; 1 << 20], at(2 * BLOCK)).unwrap();
        damage(&sim);
        let before = sim.to_bytes();
        assert!(open(&sim, OPTIONS).is_err());
        let storage = Arc::new(sim);
        assert!(super::open(Arc::<SimStorage>::clone(&storage), OPTIONS, &|_| Ok(())).is_err());
        let report = verify::verify(&*storage, crate::image::Repair::Safe).unwrap();
        assert!(
            !report.is_clean() && report.repaired.is_empty(),
            "{report:?}"
        );
        assert!(storage.to_bytes() == before);
    }
}

/// Found by fuzzing: the copy was put right in a file that was then refused.
#[test]
fn what_is_refused_for_its_parent_is_not_repaired_before() {
    let sim = with_slots(&[FLOOR]);
    sim.write_all_at(&[0; 512], at(0)).unwrap();
    let before = sim.counters();
    let storage = Arc::new(sim);
    let refused = || OpenProblem::Parent(ParentProblem::Missing { tried: Vec::new() });
    let opened = super::open(Arc::<SimStorage>::clone(&storage), OPTIONS, &|_| {
        Err(refused())
    });
    assert!(matches!(opened, Err(OpenProblem::Parent(_))));
    assert_eq!(storage.counters().writes, before.writes);
    let opened = super::open(storage, OPTIONS, &|_| Ok(())).unwrap();
    assert_eq!(opened.repaired.len(), 1);
}

#[test]
fn a_failed_table_or_bitmap_poisons() {
    let (first, second) = (BlockIndex::new(0), BlockIndex::new(1));
    let edits = [
        MapEdit::Write {
            block: first,
            sectors: 5..6,
        },
        MapEdit::Drop {
            block: second,
            reads: Reads::Zeros,
        },
    ];
    for edit in edits {
        let sim = with_slots(&[FLOOR, FLOOR + SLOT]);
        sim.write_all_at(&[0x80; 1], at(FLOOR)).unwrap();
        let storage = Arc::new(sim);
        let image = open_shared(&storage);
        image.sync().unwrap();
        storage.inject(Fault {
            on: Some(OpKind::Write),
            after: 0,
            forever: false,
            error: std::io::ErrorKind::Other,
            effect: Effect::Nothing,
        });
        assert!(matches!(image.commit(&[edit]), Err(DiskError::Io { .. })));
        assert!(matches!(image.sync(), Err(DiskError::Poisoned(_))));
    }
}
