mod rescue;

use std::sync::Arc;

use uuid::Uuid;

use super::super::layout::tests::{BAT, BLOCK, DATA, ITEMS, at, create_in, new, set_entry, with};
use super::*;
use crate::check::{CheckOptions, check_storage};
use crate::format::DiskType::{Differencing, Dynamic, Fixed};
use crate::format::vhdx::log::{Change, LogEntry};
use crate::format::vhdx::{
    BAT_REGION, CurrentHeader, HEADER_1, HEADER_2, Header, METADATA_REGION, MIB, Region,
};
use crate::image::vhdx::replay::update_both;
use crate::storage::sim::{Random, SimStorage};
use crate::units::{BlockIndex, FileOffset, FileRange, usize_from};

const CHECK: Repair = Repair::Nothing;
const REPAIR: Repair = Repair::Safe;
const DRY_RUN: CheckOptions = CheckOptions {
    repair: true,
    zero_lost: false,
    dry_run: true,
    backup: false,
    quiet_time: std::time::Duration::ZERO,
};

/// A sound disk with blocks 0 and 2 in the file, and block 1 zero.
fn good() -> SimStorage {
    let sim = with(Dynamic, &[(0, 6, DATA), (1, 2, 0), (2, 6, DATA + BLOCK)]);
    sim.set_len(DATA + 2 * BLOCK).unwrap();
    sim
}

/// A sound child with block 0 in the file, block 2 in parts and block 1 zero.
fn child() -> SimStorage {
    let bitmap = DATA + 2 * BLOCK;
    let entries = [
        (0, 6, DATA),
        (1, 2, 0),
        (2, 7, DATA + BLOCK),
        (2048, 6, bitmap),
    ];
    let sim = with(Differencing, &entries);
    sim.set_len(bitmap + MIB).unwrap();
    sim
}

fn check(sim: &SimStorage, repair: Repair) -> CheckReport {
    verify(sim, repair).unwrap()
}

/// That a check finds `text`, as an error or as a warning, and writes nothing.
#[track_caller]
fn finds(sim: &SimStorage, is_error: bool, text: &str) {
    let before = sim.to_bytes();
    let report = check(sim, CHECK);
    let list = if is_error {
        &report.errors
    } else {
        assert!(report.is_clean(), "{report:?}");
        &report.warnings
    };
    assert!(list.iter().any(|found| found.contains(text)), "{report:?}");
    assert_eq!(report.repaired, Vec::<String>::new());
    assert!(sim.to_bytes() == before, "a check wrote");
}

/// As [`finds`], of an error that cannot be put right.
#[track_caller]
fn only_finds(sim: &SimStorage, text: &str) {
    finds(sim, true, text);
    let report = check(sim, REPAIR);
    assert!(
        report.errors.iter().any(|found| found.contains(text)),
        "{report:?}"
    );
}

/// Which header is current, and where the blocks lie.
fn look(sim: &SimStorage) -> (CurrentHeader, Vec<(BlockIndex, FileOffset)>) {
    let (view, current) = replayed_look(sim).unwrap();
    let examined = Layout::examine(&view, current.clone()).unwrap();
    (current, examined.layout.map.present().collect())
}

/// As [`finds`]; and that a repair says `repair`, leaves nothing to find and changes nothing that a
/// guest reads, even where it is interrupted.
#[track_caller]
fn repairs(sim: &SimStorage, is_error: bool, text: &str, repair: &str) {
    sim.sync().unwrap();
    finds(sim, is_error, text);
    let (header, blocks) = look(sim);
    let before = sim.to_bytes();
    let report = check_storage(sim, &DRY_RUN).unwrap();
    assert!(
        report.repaired.iter().any(|done| done.contains(repair)),
        "{report:?}"
    );
    assert!(sim.to_bytes() == before, "a dry run wrote");
    for ops in 0..40 {
        let cut = sim.fork();
        cut.cut_after(ops);
        if let Ok(done) = verify(&cut, REPAIR) {
            assert_eq!(done, report);
        }
        for mut choice in cut.choices(4, 8, ops) {
            let crashed = cut.crash(&mut choice);
            let (now, now_blocks) = look(&crashed);
            assert_eq!(now_blocks, blocks, "cut after {ops}: {choice:?}");
            assert_eq!(now.header.data_write_guid, header.header.data_write_guid);
            check(&crashed, REPAIR);
            let after = check(&crashed, CHECK);
            assert_eq!(after, CheckReport::default(), "cut after {ops}: {choice:?}");
        }
        if !cut.is_cut() {
            let (now, _) = look(&cut);
            let other = now.other.unwrap();
            assert_ne!(now.header.file_write_guid, header.header.file_write_guid);
            assert_eq!(now.header.file_write_guid, other.file_write_guid);
            assert!(now.header.log_guid.is_nil() && other.log_guid.is_nil());
            return;
        }
    }
    panic!("a repair of over 40 steps");
}

/// Writes the next header with `change`, and the same behind it to the other place.
fn change_headers(sim: &SimStorage, change: &dyn Fn(&mut Header)) {
    let mut current = read_header(sim).unwrap();
    update_both(sim, &mut current, change).unwrap();
}

/// Leaves a log with one entry that makes these changes, in headers that name it.
fn leave_log(sim: &SimStorage, changes: Vec<Change>, flushed: u64) {
    let entry = LogEntry {
        sequence_number: 5,
        tail: 0,
        log_guid: Uuid::from_u128(77),
        flushed_file_offset: flushed,
        last_file_offset: sim.len().unwrap(),
        changes,
    };
    sim.write_all_at(&entry.encode(), at(MIB)).unwrap();
    change_headers(sim, &|header| header.log_guid = Uuid::from_u128(77));
    sim.sync().unwrap();
}

#[test]
fn sound_disks_are_clean() {
    let fixed = new(Fixed);
    let large = SimStorage::new();
    create_in(&large, Dynamic, 64 << 40, 256 << 20).unwrap();
    for sim in [good(), child(), fixed, large] {
        let before = sim.len().unwrap();
        assert_eq!(check(&sim, CHECK), CheckReport::default());
        assert_eq!(check(&sim, REPAIR), CheckReport::default());
        assert_eq!(sim.len().unwrap(), before);
    }
}

#[test]
fn duplicate_places() {
    let sim = good();
    set_entry(&sim, 5, 6, DATA);
    only_finds(&sim, "block 5 at 0x400000..0x600000 overlaps block 0");
}

#[test]
fn overlapping_blocks() {
    let sim = good();
    set_entry(&sim, 5, 6, DATA + BLOCK - MIB);
    only_finds(&sim, "block 5 at 0x500000..0x700000 overlaps block 0");
}

#[test]
fn blocks_over_log_metadata_and_table() {
    for (place, what) in [
        (MIB, "the log"),
        (2 * MIB, "the metadata region"),
        (BAT, "the block table"),
    ] {
        let sim = good();
        set_entry(&sim, 5, 6, place);
        only_finds(&sim, what);
    }
}

#[test]
fn a_block_over_a_sector_bitmap_and_over_a_kept_place() {
    let sim = child();
    set_entry(&sim, 5, 6, DATA + 2 * BLOCK);
    sim.set_len(DATA + 3 * BLOCK).unwrap();
    only_finds(&sim, "the sector bitmap of chunk 0");
    let sim = good();
    set_entry(&sim, 5, 3, DATA);
    only_finds(&sim, "the place kept for block 5");
}

#[test]
fn blocks_beyond_the_end() {
    let sim = good();
    set_entry(&sim, 5, 6, DATA + 2 * BLOCK);
    only_finds(&sim, "block 5 lies at 0x800000..0xa00000, beyond the end");
    let sim = child();
    sim.set_len(DATA + 2 * BLOCK).unwrap();
    only_finds(&sim, "sector bitmap of chunk 0");
}

#[test]
fn many_of_a_kind_are_counted() {
    let sim = SimStorage::new();
    create_in(&sim, Dynamic, 100 * BLOCK, 2 << 20).unwrap();
    for index in 0..100 {
        set_entry(&sim, index, 6, DATA);
    }
    let report = check(&sim, CHECK);
    assert!(report.errors.contains(&"79 more of this kind".to_owned()));
    assert_eq!(
        report.errors.len(),
        43,
        "21 overlaps, 21 beyond the end, and what that comes to"
    );
}

#[test]
fn reserved_states() {
    for state in [4, 5] {
        let sim = good();
        set_entry(&sim, 5, state, 0);
        only_finds(&sim, &format!("(block 5): the reserved state {state}"));
    }
}

#[test]
fn a_present_block_without_a_place() {
    let sim = good();
    set_entry(&sim, 5, 6, 0);
    only_finds(&sim, "(block 5): state 6, present, with the file offset 0");
}

#[test]
fn a_partial_block_without_a_parent() {
    let sim = good();
    set_entry(&sim, 2, 7, DATA + BLOCK);
    only_finds(
        &sim,
        "(block 2): state 7, partially present, of a disk without",
    );
}

#[test]
fn a_partial_block_without_a_sector_bitmap() {
    let sim = child();
    set_entry(&sim, 2048, 0, 0);
    only_finds(
        &sim,
        "(block 2): state 7, partially present, in a chunk without",
    );
}

#[test]
fn reserved_bits() {
    for (index, what) in [(2, "block 2"), (5, "block 5")] {
        let sim = good();
        let place = if index == 2 { DATA + BLOCK } else { 0 };
        set_entry(&sim, index, 0x10 | if index == 2 { 6 } else { 0 }, place);
        only_finds(&sim, &format!("({what}): reserved bits 0x10"));
    }
}

#[test]
fn a_place_in_a_state_that_has_none() {
    for state in [0, 2] {
        let sim = good();
        // Even one that is in use: nobody reads it.
        set_entry(&sim, 5, state, DATA);
        let found = format!("(block 5): state {state} with the file offset 0x400000");
        repairs(&sim, true, &found, "cleared of their places: 1");
    }
}

#[test]
fn a_kept_place_beyond_the_end() {
    for state in [1, 3] {
        let sim = good();
        set_entry(&sim, 5, state, DATA + BLOCK + MIB);
        let found = format!("(block 5): state {state} with the file offset 0x700000");
        repairs(&sim, true, &found, "kept places beyond the end");
    }
}

#[test]
fn sector_bitmaps_where_there_is_no_parent() {
    // Two chunks, with the entry of the first one's sector bitmap between them.
    for (state, place, is_error) in [(6, DATA + 256 * MIB, true), (2, 0, false)] {
        let sim = SimStorage::new();
        create_in(&sim, Dynamic, 17 * 256 * MIB, 256 << 20).unwrap();
        set_entry(&sim, 0, 6, DATA);
        set_entry(&sim, 16, state, place);
        sim.set_len(DATA + 256 * MIB).unwrap();
        let cleared = "entries of sector bitmaps that the disk does not have cleared: 1";
        repairs_large(&sim, is_error, "(sector bitmap of chunk 0)", cleared);
    }
}

/// As [`repairs`], for a file that is too long to be compared.
#[track_caller]
fn repairs_large(sim: &SimStorage, is_error: bool, text: &str, repair: &str) {
    let report = check(sim, CHECK);
    assert_eq!(report.errors.len(), usize::from(is_error), "{report:?}");
    let all = [report.errors, report.warnings].concat();
    assert!(all.iter().any(|found| found.contains(text)), "{all:?}");
    assert_eq!(check(sim, REPAIR).repaired, [repair]);
    assert_eq!(check(sim, CHECK), CheckReport::default());
}

#[test]
fn sector_bitmaps_in_wrong_states() {
    for (state, place) in [(2, 0), (3, DATA), (6, 0), (0, DATA), (6 | 8, DATA)] {
        let sim = with(Differencing, &[(2048, state, place)]);
        sim.set_len(DATA + MIB).unwrap();
        only_finds(&sim, "(sector bitmap of chunk 0)");
    }
    let sim = child();
    set_entry(&sim, 2048, 7, DATA + 2 * BLOCK);
    finds(&sim, false, "(sector bitmap of chunk 0): state 7");
}

#[test]
fn entries_behind_the_last_block() {
    for (state, place, is_error) in [(6, DATA, true), (2, 0, false)] {
        let sim = good();
        set_entry(&sim, 16, state, place);
        set_entry(&sim, MIB / 8 - 1, state, place);
        let cleared = "entries behind the last block's cleared: 2";
        repairs(
            &sim,
            is_error,
            "entry 131071 (behind the last block)",
            cleared,
        );
    }
}

#[test]
fn an_unused_tail() {
    let sim = good();
    sim.set_len(DATA + 2 * BLOCK + 5 * MIB + 512).unwrap();
    repairs(&sim, false, "5243392 unused bytes", "cut off");
    // disk2vhd leaves a sector behind the last MiB.
    let sim = good();
    sim.set_len(DATA + 2 * BLOCK + 512).unwrap();
    assert_eq!(check(&sim, CHECK), CheckReport::default());
}

#[test]
fn a_damaged_header() {
    for (place, slot) in [(HEADER_1, 0), (HEADER_2, 1)] {
        let sim = good();
        sim.write_all_at(b"x", place.plus(100)).unwrap();
        sim.sync().unwrap();
        assert_eq!(look(&sim).0.slot, 1 - slot);
        let found = format!("the other header, at file offset {place}: corrupt header: checksum");
        repairs(&sim, false, &found, "both headers written anew");
    }
    let sim = good();
    sim.write_all_at(b"x", HEADER_1).unwrap();
    sim.write_all_at(b"x", HEADER_2).unwrap();
    only_finds(&sim, "at least one good header");
}

#[test]
fn headers_with_one_number() {
    let sim = good();
    let mut header = read_header(&sim).unwrap().header;
    sim.write_all_at(&header.to_bytes(), HEADER_1).unwrap();
    repairs(&sim, false, "both headers are numbered 1", "both headers");
    let sim = good();
    header.data_write_guid = Uuid::from_u128(3);
    sim.write_all_at(&header.to_bytes(), HEADER_1).unwrap();
    only_finds(&sim, "two different ones numbered 1");
}

#[test]
fn a_header_that_names_a_log_beside_one_that_does_not() {
    let sim = good();
    let mut header = read_header(&sim).unwrap().header;
    header.sequence_number = 0;
    header.log_guid = Uuid::from_u128(3);
    sim.write_all_at(&header.to_bytes(), HEADER_1).unwrap();
    repairs(&sim, false, "name different logs", "both headers");
}

#[test]
fn headers_that_cannot_be_followed() {
    let sim = good();
    change_headers(&sim, &|header| header.sequence_number = u64::MAX - 1);
    only_finds(&sim, "room for a larger one");
}

#[test]
fn a_log_without_entries() {
    let sim = good();
    change_headers(&sim, &|header| header.log_guid = Uuid::from_u128(3));
    only_finds(&sim, "no valid entry of log");
}

#[test]
fn a_file_that_is_shorter_than_its_log_says() {
    let sim = good();
    leave_log(&sim, Vec::new(), DATA + 3 * BLOCK);
    only_finds(&sim, "the file was cut");
}

#[test]
fn a_log_to_be_replayed() {
    let sim = good();
    let mut page = [0; 4096];
    sim.read_exact_at(&mut page, at(BAT)).unwrap();
    // Block 2 is dropped, and block 3 has its place: as of the log, and not of the table.
    page[16..24].copy_from_slice(&2_u64.to_le_bytes());
    page[24..32].copy_from_slice(&(6 | (DATA + BLOCK)).to_le_bytes());
    let bytes = Arc::new(page);
    leave_log(&sim, vec![Change::Page { at: at(BAT), bytes }], DATA);
    assert_eq!(look(&sim).1[1].0, BlockIndex::new(3));
    repairs(
        &sim,
        false,
        "a log to be replayed (entries: 1)",
        "the log replayed",
    );

    // What the log does not cure is found nevertheless, and cured with it.
    set_entry(&sim, 5, 2, DATA);
    let report = check(&sim, REPAIR);
    assert_eq!(
        report.repaired.len(),
        1,
        "the page in the log is without it"
    );
    assert_eq!(check(&sim, CHECK), CheckReport::default());
}

#[test]
fn a_mark_of_an_open_file() {
    let sim = good();
    leave_log(&sim, Vec::new(), DATA);
    repairs(&sim, false, "marked as open", "the mark of an open file");
}

#[test]
fn a_damaged_region_table() {
    for (place, is_error) in [(REGION_TABLE_1, true), (REGION_TABLE_2, false)] {
        let sim = good();
        sim.write_all_at(b"x", place.plus(60000)).unwrap();
        let found = format!("region table at file offset {place}: checksum");
        repairs(&sim, is_error, &found, "region table written from the");
    }
    let sim = good();
    sim.write_all_at(b"x", REGION_TABLE_1).unwrap();
    sim.write_all_at(b"x", REGION_TABLE_2.plus(60000)).unwrap();
    only_finds(&sim, "region table at file offset 0x30000: no `regi`");
    only_finds(&sim, "region table at file offset 0x40000: checksum");
}

/// A table with these regions.
fn regions(list: &[(Uuid, u64, bool)]) -> RegionTable {
    let region = |(id, start, required): &(Uuid, u64, bool)| Region {
        id: *id,
        range: FileRange::new(at(*start), MIB),
        required: *required,
    };
    RegionTable::new(list.iter().map(region).collect())
}

#[test]
fn region_tables_that_differ() {
    let sim = good();
    let other = regions(&[(BAT_REGION, BAT, false), (METADATA_REGION, 2 * MIB, false)]);
    sim.write_all_at(other.bytes(), REGION_TABLE_2).unwrap();
    repairs(
        &sim,
        false,
        "the two region tables differ",
        "written from the first",
    );
}

#[test]
fn regions_that_overlap_or_are_unknown() {
    let (bat, metadata) = ((BAT_REGION, BAT, true), (METADATA_REGION, 2 * MIB, true));
    let unknown = Uuid::from_u128(9);
    for (third, text) in [
        ((unknown, BAT, false), "overlaps the block table"),
        ((unknown, MIB, false), "the log"),
        ((unknown, DATA, false), "block 0"),
        ((unknown, 20 * MIB, true), "marked as required"),
    ] {
        let sim = good();
        let table = regions(&[bat, metadata, third]);
        sim.write_all_at(table.bytes(), REGION_TABLE_1).unwrap();
        sim.write_all_at(table.bytes(), REGION_TABLE_2).unwrap();
        only_finds(&sim, text);
    }
}

#[test]
fn metadata_oddities() {
    // The entry of the second item starts at 64, its flags 24 bytes on.
    let sim = good();
    sim.write_all_at(&[0], at(2 * MIB + 64 + 24)).unwrap();
    finds(
        &sim,
        false,
        "flags of the metadata item `disk size` are 0x0",
    );
    // The third item lies where the second does.
    let sim = good();
    sim.write_all_at(&(64_u32 << 10).to_le_bytes(), at(2 * MIB + 96 + 16))
        .unwrap();
    finds(&sim, false, "overlap");
    let sim = child();
    sim.write_all_at(&[0], at(ITEMS + 4)).unwrap();
    set_entry(&sim, 2, 6, DATA + BLOCK);
    let report = check(&sim, CHECK);
    let text = "a parent locator of a disk that is said to have no parent";
    assert!(report.warnings.contains(&text.to_owned()), "{report:?}");
}

#[test]
fn a_fixed_disk_without_room() {
    let sim = new(Fixed);
    set_entry(&sim, 3, 0, 0);
    finds(
        &sim,
        false,
        "1 of the 16 blocks of this fixed disk have no place",
    );
    set_entry(&sim, 3, 3, DATA + 3 * BLOCK);
    assert_eq!(check(&sim, CHECK), CheckReport::default());
}

#[test]
fn a_file_that_is_no_vhdx() {
    let sim = good();
    sim.write_all_at(b"x", at(0)).unwrap();
    only_finds(&sim, "not a VHDX");
    for len in [0, 5, 70_000, MIB, 2 * MIB] {
        let sim = good();
        sim.set_len(len).unwrap();
        let report = check(&sim, REPAIR);
        assert!(!report.is_clean(), "{len}");
    }
}

#[test]
fn no_damage_makes_a_check_fail_or_a_repair_do_harm() {
    let mut random = Random::new(8);
    for round in 0..400 {
        let sim = if round % 2 == 0 { good() } else { child() };
        for _ in 0..1 + random.below(3) {
            let (start, len) = [
                (64 << 10, 80),
                (128 << 10, 80),
                (192 << 10, 128),
                (2 * MIB, 256),
                (ITEMS, 200),
                (BAT, 160),
                (BAT + 2048 * 8, 8),
            ][usize_from(random.below(7))];
            let place = at(start + random.below(len));
            let bytes = random.next().to_le_bytes();
            sim.write_all_at(&bytes[..1 + usize_from(random.below(8))], place)
                .unwrap();
        }
        let found = check(&sim, CHECK);
        let repaired = check(&sim, REPAIR);
        // What is left is what could not be put right.
        let left = check(&sim, CHECK);
        assert_eq!(left.errors, repaired.errors, "{found:?}");
        assert_eq!(check(&sim, REPAIR).repaired, Vec::<String>::new());
    }
}
