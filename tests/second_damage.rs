//! The second reading of the formats follows logs, and finds what is wrong with a file.

#![allow(clippy::unwrap_used, reason = "a failure is what a test is for")]

mod support;

use std::sync::Arc;

use support::image::Style;
use support::second::build::log::{Damage, LogEntry, LogImage};
use support::second::build::model::{Model, compare};
use support::second::build::vhd::VhdImage;
use support::second::build::vhdx::{Layout, Slot, VhdxImage};
use support::second::build::vhdx_file::{Built, table_entry};
use support::second::build::{Bits, Fill};
use support::second::log::Write;
use support::second::{Chain, Image, State, read};
use vhdfs::storage::Storage;
use vhdfs::storage::sim::SimStorage;
use vhdfs::units::FileOffset;

const MIB: u64 = 1 << 20;

/// A disk, and how it was before a log named its blocks 0 and 3.
fn before_and_after() -> (Built, VhdxImage) {
    let after = VhdxImage::dynamic(2 * MIB, 20 * MIB, Layout::Packed, &[5, 0, 3]);
    let mut before = after.clone();
    before.slot_mut(0).linked = false;
    before.slot_mut(3).linked = false;
    (before.build(), after)
}

fn expect(file: &SimStorage, models: &[&dyn Model]) -> Image {
    let image = read(file).unwrap();
    image.check().unwrap();
    let read = |buf: &mut [u8], offset| image.read_at(file, None, buf, offset);
    compare(models, &read).unwrap();
    image
}

#[test]
fn a_log_is_followed_and_nothing_written() {
    // Anywhere in the ring; the last two go on at its start.
    for start in [0, 4096, MIB - 4096, MIB - 8192] {
        let (mut built, after) = before_and_after();
        let link = LogEntry::of(built.pages_to(&after.build()));
        let mut log = LogImage::new(vec![LogEntry::default(), link]);
        (log.start, log.first) = (start, 80_117_443_871_106_387);
        built.write_log(&log);
        let bytes = built.sim.to_bytes();
        let image = expect(&built.sim, &[&after]);
        let log = &image.vhdx().log;
        assert!(log.is_live() && log.needs_replay() && log.entries.len() == 2);
        assert_eq!(image.check_closed().unwrap_err(), "the log is in use");
        assert!(built.sim.to_bytes() == bytes && built.sim.unsynced_len() == 0);
    }
}

#[test]
fn damaged_entries_never_happened() {
    for damage in [
        Damage::Torn,
        Damage::Checksum,
        Damage::OtherLog,
        Damage::OtherEntry,
    ] {
        let (mut built, mut after) = before_and_after();
        let place = built.blocks[&0];
        let first = LogEntry::of(vec![built.change_entry(0, State::Full, place)]);
        let place = built.blocks[&3];
        let mut second = LogEntry::of(vec![built.change_entry(3, State::Full, place)]);
        second.damage = Some(damage);
        built.write_log(&LogImage::new(vec![first.clone(), second.clone()]));
        after.slot_mut(3).linked = false;
        expect(&built.sim, &[&after]);
        // The first one: then there is none.
        second.tail = 0;
        built.write_log(&LogImage::new(vec![second, first]));
        let error = read(&built.sim).unwrap_err();
        assert!(error.contains("no sequence"), "{damage:?}: {error}");
    }
}

#[test]
fn replay_begins_at_the_tail_of_the_last_entry() {
    let (mut built, mut after) = before_and_after();
    let place = built.blocks[&0];
    let first = LogEntry::of(vec![built.change_entry(0, State::Full, place)]);
    // As if the first one had been applied, which it was not.
    built.change_entry(0, State::NotPresent, 0);
    let place = built.blocks[&3];
    let mut second = LogEntry::of(vec![built.change_entry(3, State::Full, place)]);
    second.tail = 1;
    built.write_log(&LogImage::new(vec![first, second]));
    after.slot_mut(0).linked = false;
    let image = expect(&built.sim, &[&after]);
    assert_eq!(image.vhdx().log.entries.len(), 1);
}

#[test]
fn the_youngest_sequence_of_this_log_counts() {
    let (mut built, mut after) = before_and_after();
    let zero = LogEntry::of(vec![built.change_entry(5, State::Zero, 0)]);
    let mut old = LogImage::new(vec![zero.clone(); 3]);
    (old.guid, old.first) = ([0x66; 16], 1 << 50);
    built.write_log(&old);
    let mut earlier = LogImage::new(vec![zero; 3]);
    (earlier.start, earlier.first) = (64 << 10, 20);
    built.write_log(&earlier);
    let empty = LogEntry::default();
    let mut log = LogImage::new(vec![empty.clone(), empty]);
    (log.start, log.first) = (32 << 10, 30);
    built.write_log(&log);
    for block in [0, 3] {
        after.slot_mut(block).linked = false;
    }
    let image = expect(&built.sim, &[&after]);
    // It was attached, and nothing happened.
    assert!(image.vhdx().log.is_live() && !image.vhdx().log.needs_replay());
    let flushed = [None, Some(MIB << 10)];
    for (flushed, cut) in flushed.into_iter().zip([false, true]) {
        log.entries[1].flushed = flushed;
        built.write_log(&log);
        assert_eq!(read(&built.sim).is_err(), cut);
    }
}

#[test]
fn a_log_makes_the_file_longer() {
    let mut after = VhdxImage::dynamic(2 * MIB, 20 * MIB, Layout::Packed, &[5, 3]);
    after.slot_mut(3).fill = Fill::Zeros;
    let mut before = after.clone();
    before.slot_mut(3).linked = false;
    before.cut = 2 * MIB;
    let mut built = before.build();
    let mut entry = LogEntry::of(built.pages_to(&after.build()));
    entry.last = Some(built.sim.len().unwrap() + 2 * MIB);
    built.write_log(&LogImage::new(vec![entry]));
    let image = expect(&built.sim, &[&after]);
    assert_eq!(image.vhdx().grown_len(), image.file_len() + 2 * MIB);
}

#[test]
fn a_log_changes_bitmaps_and_fills_with_zeros() {
    let base = VhdxImage::dynamic(MIB, 8 * MIB, Layout::Packed, &[0, 1, 2, 3]);
    let slots = [0, 2].map(|n| Slot::partial(n, Bits::Random(n)));
    let mut before = VhdxImage::child(&base, Layout::Packed, &slots);
    before.junk_bits = false;
    let mut after = before.clone();
    after.slot_mut(0).bits = Bits::None;
    after.slot_mut(2).bits = Bits::None;
    let mut built = before.build();
    let writes = built.pages_to(&after.build());
    assert!(matches!(writes[..], [Write::Zero { .. }]), "{writes:?}");
    built.write_log(&LogImage::new(vec![LogEntry::of(writes)]));
    let files = [Arc::new(built.sim), Arc::new(base.build().sim)];
    let chain = Chain::open(files.map(|file| -> Arc<dyn Storage> { file })).unwrap();
    chain.check().unwrap();
    compare(&[&after, &base], &|buf, offset| chain.read_at(buf, offset)).unwrap();
}

#[test]
fn what_a_log_may_not_change_is_noticed() {
    for at in [64 << 10, MIB, 0] {
        let (mut built, _) = before_and_after();
        let write = Write::Zero { at, len: 4096 };
        built.write_log(&LogImage::new(vec![LogEntry::of(vec![write])]));
        let error = read(&built.sim).unwrap().check().unwrap_err();
        assert!(error.contains("log entry 1 changes"), "{error}");
    }
}

/// Changes what is at `at` of the file.
fn poke(file: &SimStorage, at: u64, bytes: &[u8]) {
    file.write_all_at(bytes, FileOffset::new(at)).unwrap();
}

/// The file is read, and the check says something of `reason`.
fn found(file: &SimStorage, reason: &str) {
    let error = read(file).unwrap().check().unwrap_err();
    assert!(error.contains(reason), "{error:?} instead of {reason:?}");
}

fn refused(file: &SimStorage, reason: &str) {
    let error = read(file).unwrap_err();
    assert!(error.contains(reason), "{error:?} instead of {reason:?}");
}

#[test]
fn wrong_entries_of_a_vhdx_are_found() {
    let image = VhdxImage::dynamic(2 * MIB, 20 * MIB, Layout::Packed, &[5, 0, 3]);
    let built = image.build();
    let (place, end) = (built.blocks[&0], built.sim.len().unwrap());
    let full = |at| table_entry(State::Full, at);
    for (entry, reason) in [
        (full(place), "overlaps block 0"),
        (full(place + MIB), "overlaps"),
        (full(end), "reaches beyond"),
        (full(end - MIB), "reaches beyond"),
        (full(0), "not on whole MiB behind the first"),
        (full(MIB), "overlaps"),
        (full(2 * MIB), "overlaps"),
        (full(3 * MIB), "overlaps"),
        (full(place) | 1 << 19, "has the entry"),
        (full(place) | 8, "has the entry"),
        (4, "has the entry"),
        (5, "has the entry"),
        (table_entry(State::Zero, place), "a place of nothing"),
        (table_entry(State::NotPresent, place), "a place of nothing"),
        (table_entry(State::Unmapped, place), "overlaps"),
        (table_entry(State::Partial, end), "no parent"),
    ] {
        let file = built.sim.fork();
        poke(&file, built.bat.0 + 7 * 8, &entry.to_le_bytes());
        found(&file, reason);
    }
    let child = VhdxImage::child(&image, Layout::Packed, &[Slot::partial(1, Bits::All)]);
    let built = child.build();
    assert_eq!(built.bitmaps.len(), 1);
    poke(&built.sim, built.bat.0 + 2048 * 8, &[0; 8]);
    found(&built.sim, "its chunk no bitmap");
}

#[test]
fn wrong_structures_of_a_vhdx_are_found() {
    let image = VhdxImage::dynamic(2 * MIB, 20 * MIB, Layout::Packed, &[5, 0, 3]);
    let built = image.build();
    let damaged = |at: u64, bytes: &[u8]| {
        let file = built.sim.fork();
        poke(&file, at, bytes);
        file
    };
    found(&damaged(256 << 10, b"X"), "a region table");
    found(&damaged((192 << 10) + 100, b"X"), "a region table");
    let both = damaged((192 << 10) + 65535, b"X");
    poke(&both, (256 << 10) + 65535, b"X");
    refused(&both, "region tables");

    let one = damaged((128 << 10) + 4000, b"X");
    let header = read(&one).unwrap();
    assert_eq!(header.vhdx().current, 0);
    header.check().unwrap();
    assert_eq!(header.check_closed().unwrap_err(), "a header is not valid");
    poke(&one, 64 << 10, b"X");
    refused(&one, "no header");

    let items = built.metadata_at;
    refused(&damaged(items, b"X"), "no signature");
    refused(&damaged(items + 32, &[0; 16]), "not known, but required");
    refused(&damaged(items + 65536, &[1]), "blocks of");
    found(&damaged(items + 32 + 24, &[0]), "has the flags");
    found(&damaged(items + 96 + 16, &[0xf]), "overlap");
    found(&damaged(items + 96 + 16, &[0, 0, 0]), "lies at");
}

#[test]
fn wrong_vhds_are_found() {
    const SMALL: u64 = 128 << 10;
    let image = VhdImage::dynamic(SMALL, 12 * SMALL, Style::Packed, &[3, 0, 11]);
    let built = image.build();
    let end = built.len().unwrap();
    let damaged = |at: u64, bytes: &[u8]| {
        let file = built.fork();
        poke(&file, at, bytes);
        file
    };
    let entry = |at: u64| {
        damaged(
            image.table_at() + 4,
            &u32::try_from(at / 512).unwrap().to_be_bytes(),
        )
    };
    let first = read(&built).unwrap().blocks()[&3].at;
    found(&entry(first), "overlaps");
    found(&entry(first + 512), "overlaps");
    found(&entry(image.table_at()), "overlaps");
    found(&entry(0), "overlaps");
    found(&entry(end), "reaches beyond");
    found(&damaged(100, b"X"), "no footer at the start");
    refused(&damaged(512 + 60, b"X"), "the header's checksum");
    refused(&damaged(512 + 40, b"X"), "the header's checksum");

    let cut = built.fork();
    cut.set_len(end - 512).unwrap();
    let cut = read(&cut).unwrap();
    cut.check().unwrap();
    assert_eq!(cut.check_closed().unwrap_err(), "no footer at the end");
    let mut other = image.clone();
    other.unique_id = [8; 16];
    let other = other.build();
    let mut footer = [0; 512];
    let at = FileOffset::new(end - 512);
    other.read_exact_at(&mut footer, at).unwrap();
    found(&damaged(end - 512, &footer), "the two footers differ");
    poke(&built, 100, b"X");
    poke(&built, end - 100, b"X");
    refused(&built, "no footer");

    let mut junk = VhdImage::dynamic(SMALL, 12 * SMALL, Style::Packed, &[3]);
    junk.slots[0].bits = Bits::Sectors(vec![0..7, 9..200]);
    let check = |image: &VhdImage| {
        let file = image.build();
        let read = read(&file).unwrap();
        compare(&[image], &|buf, offset| {
            read.read_at(&file, None, buf, offset)
        })
        .unwrap();
        read.vhd().check_unnamed_sectors(&file)
    };
    check(&junk).unwrap();
    junk.junk = true;
    assert!(check(&junk).unwrap_err().contains("sector 7"));
}
