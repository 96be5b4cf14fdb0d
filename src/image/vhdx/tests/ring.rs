//! The log by itself, where syncs and changes run into each other.

use parking_lot::Mutex;

use super::super::log::{Log, TailPlace};
use super::super::ring::{FileLog, read_page};
use super::*;
use crate::format::vhdx::PAGE;
use crate::format::vhdx::log::{Descriptor, EntryHeader, Page, active_sequence, read_entry};
use crate::storage::sim::{Choice, Random};

const GUID: Uuid = Uuid::from_u128(9);
const LOG: FileRange = FileRange::new(FileOffset::new(MIB), MIB);

fn started() -> (Arc<SimStorage>, Log) {
    let sim = Arc::new(SimStorage::new());
    sim.set_len(8 * MIB).unwrap();
    let log = Log::new(Arc::<SimStorage>::clone(&sim), LOG, 8 * MIB);
    log.start(GUID).unwrap();
    (sim, log)
}

/// Replaces page `number` of the table by bytes of `fill`.
fn append(log: &Log, number: u64, fill: u8) -> bool {
    let page: Arc<Page> = Arc::new([fill; 4096]);
    log.append(vec![(at(3 * MIB + number * PAGE), page)])
        .unwrap()
}

fn sync(sim: &SimStorage, log: &Log) {
    let mark = log.mark();
    sim.sync().unwrap();
    log.synced(mark);
}

/// The first byte of page `number`, in its place.
fn in_place(sim: &SimStorage, number: u64) -> u8 {
    let mut byte = [0];
    sim.read_exact_at(&mut byte, at(3 * MIB + number * PAGE))
        .unwrap();
    byte[0]
}

fn pending(log: &Log, number: u64) -> Option<u8> {
    log.pending(at(3 * MIB + number * PAGE)).map(|page| page[0])
}

/// The log of the file.
fn source(sim: &SimStorage) -> FileLog<'_> {
    FileLog::new(sim, LOG)
}

/// What page `number` is once the log is replayed.
fn replayed(sim: &SimStorage, number: u64) -> u8 {
    let sequence = active_sequence(&mut source(sim), GUID).unwrap().unwrap();
    replayed_by(sim, &sequence.entries, number)
}

/// What page `number` is once these entries are replayed.
fn replayed_by(sim: &SimStorage, entries: &[u64], number: u64) -> u8 {
    let mut value = in_place(sim, number);
    for entry in entries {
        let mut found = Vec::new();
        let visit = |descriptor| found.push(descriptor);
        let header = read_entry(&mut source(sim), GUID, *entry, visit);
        assert!(header.unwrap().is_some());
        for descriptor in found {
            if let Descriptor::Page { at: place, page } = descriptor
                && place == at(3 * MIB + number * PAGE)
            {
                value = read_page(sim, LOG, &page).unwrap()[0];
            }
        }
    }
    value
}

/// The entries that QEMU 10.0 would replay; see [`super::super::log`].
fn as_qemu(sim: &SimStorage) -> Vec<u64> {
    let entry = |at: u64| -> Option<EntryHeader> {
        read_entry(&mut source(sim), GUID, at, |_| {}).unwrap()
    };
    let behind = |at: u64, len: u64| (at + len) % LOG.len;
    let (mut best, mut highest) = (Vec::new(), 0);
    let mut at = 0;
    loop {
        let start = at;
        if let Some(first) = entry(start) {
            let mut sequence = vec![start];
            let mut number = None;
            at = behind(start, first.len);
            while let Some(next) = entry(at)
                && number.is_none_or(|number| next.sequence_number == number + 1)
            {
                sequence.push(at);
                number = Some(next.sequence_number);
                at = behind(at, next.len);
            }
            if first.sequence_number > highest {
                (best, highest) = (sequence, first.sequence_number);
            }
        }
        at = behind(at, PAGE);
        if at <= start {
            return best;
        }
    }
}

/// As the session does before it goes on at the log's start, or cuts the file.
fn retire(sim: &SimStorage, log: &Log) {
    sync(sim, log);
    log.apply().unwrap();
    sync(sim, log);
}

#[test]
fn only_what_is_durable_goes_to_its_place() {
    let (sim, log) = started();
    append(&log, 0, 1);
    append(&log, 1, 1);
    let mark = log.mark();
    sim.sync().unwrap();
    // Somebody commits while the sync runs.
    append(&log, 1, 2);
    append(&log, 2, 2);
    log.synced(mark);
    log.apply().unwrap();
    assert_eq!([0, 1, 2].map(|n| in_place(&sim, n)), [1, 1, 0]);
    assert_eq!(
        [0, 1, 2].map(|n| pending(&log, n)),
        [None, Some(2), Some(2)]
    );
    assert_eq!([0, 1, 2].map(|n| replayed(&sim, n)), [1, 2, 2]);
    let lost = sim.crash(&mut Choice::AllLost);
    assert_eq!([0, 1, 2].map(|n| replayed(&lost, n)), [1, 1, 0]);
    sync(&sim, &log);
    assert!(log.has_unretired() && !log.has_undurable());
    log.apply().unwrap();
    assert_eq!([0, 1, 2].map(|n| in_place(&sim, n)), [1, 2, 2]);
    assert_eq!([0, 1, 2].map(|n| pending(&log, n)), [None; 3]);
    sync(&sim, &log);
    assert!(!log.has_unretired());
    log.end();
}

#[test]
fn the_start_is_overwritten_only_once_nobody_needs_it() {
    let (sim, log) = started();
    let fill = |first: u8| (0_u64..).take_while(|n| append(&log, *n, first)).count();
    assert_eq!(fill(1), 127, "as the documentation says");
    retire(&sim, &log);
    assert_eq!(fill(2), 0, "retired, but there is no other tail");
    log.append_tail(TailPlace::Next).unwrap();
    assert_eq!(fill(2), 0, "the start is as it was");
    let expect = |sim: SimStorage, value: u8| {
        assert_eq!([0, 126].map(|n| replayed(&sim, n)), [value; 2]);
        let entries = as_qemu(&sim);
        assert_eq!([0, 126].map(|n| replayed_by(&sim, &entries, n)), [value; 2]);
    };
    for choice in [Choice::AllLost, Choice::AllKept] {
        expect(sim.crash(&mut { choice }), 1);
    }
    sync(&sim, &log);
    log.append_tail(TailPlace::Start).unwrap();
    for choice in [Choice::AllLost, Choice::AllKept] {
        expect(sim.crash(&mut { choice }), 1);
    }
    sync(&sim, &log);
    assert_eq!(fill(2), 127);
    expect(sim.crash(&mut Choice::AllLost), 1);
    expect(sim.crash(&mut Choice::AllKept), 2);
}

#[test]
fn readers_that_do_not_look_at_tails_replay_all_that_is_needed() {
    for seed in 0..10 {
        let mut random = Random::new(seed);
        let (sim, log) = started();
        let mut expected = [0; 16];
        let mut lens: Vec<u64> = vec![8 * MIB];
        for _ in 0..1000 {
            let what = random.below(40);
            match what {
                0 => retire(&sim, &log),
                1 => {
                    // The file is cut, and what is written from here on knows it.
                    retire(&sim, &log);
                    let len = (4 + random.below(6)) * MIB;
                    log.set_lengths(|lengths| (lengths.durable, lengths.needed) = (len, len));
                    let places = match log.has_room_apart() {
                        true => vec![TailPlace::Apart],
                        false => vec![TailPlace::Next, TailPlace::Start],
                    };
                    for place in places {
                        log.append_tail(place).unwrap();
                        sync(&sim, &log);
                    }
                    lens = vec![len];
                }
                2..5 => sync(&sim, &log),
                _ => {
                    let number = random.below(16);
                    let fill = u8::try_from(random.below(256)).unwrap();
                    if !append(&log, number, fill) {
                        retire(&sim, &log);
                        for place in [TailPlace::Next, TailPlace::Start] {
                            log.append_tail(place).unwrap();
                            sync(&sim, &log);
                        }
                        assert!(append(&log, number, fill));
                    }
                    expected[usize_from(number)] = fill;
                }
            }
            if what > 1 && random.below(8) != 0 {
                continue;
            }
            let entries = as_qemu(&sim);
            let found: Vec<u8> = (0..16).map(|n| replayed_by(&sim, &entries, n)).collect();
            assert_eq!(found, expected, "seed {seed}");
            for at in entries {
                let header = read_entry(&mut source(&sim), GUID, at, |_| {}).unwrap();
                let len = header.unwrap().flushed_file_offset;
                assert!(lens.contains(&len), "seed {seed}: {len:#x} of {lens:#x?}");
            }
        }
    }
}

#[test]
fn a_sync_of_an_earlier_session_says_nothing_of_this_one() {
    let (sim, log) = started();
    sync(&sim, &log);
    log.apply().unwrap();
    let mark = log.mark();
    sync(&sim, &log);
    log.end();
    log.start(GUID).unwrap();
    append(&log, 0, 1);
    log.synced(mark);
    assert!(log.has_undurable());
    log.apply().unwrap();
    assert_eq!(in_place(&sim, 0), 0);
}

#[test]
fn a_page_written_while_a_sync_runs_is_not_durable_after_it() {
    let (sim, log) = started();
    append(&log, 0, 1);
    sync(&sim, &log);
    let mark = log.mark();
    sim.sync().unwrap();
    // Too late for that sync: somebody drains the ring.
    log.apply().unwrap();
    log.synced(mark);
    assert!(log.has_unretired());
    sync(&sim, &log);
    assert!(!log.has_unretired());
}

/// Entries with no sync between them all need the first one, until the log has begun anew.
#[test]
fn the_log_begins_anew_though_all_of_it_was_needed() {
    const BLOCKS: u32 = 300;
    let sim = Arc::new(empty(BLOCKS.into(), 512, false));
    let image = open_shared(&sim, OPTIONS);
    for number in 0..BLOCKS {
        allocate(&*image, number);
    }
    image.settle().unwrap();
    image.begin_change().unwrap();
    // Blocks dropped so far, and those that the syncs so far cover.
    let dropped = Arc::new(Mutex::new((0, 0)));
    let seen = Arc::clone(&dropped);
    sim.on_op(move |sim, op| {
        if op.kind != OpKind::Sync {
            return;
        }
        let (issued, covered) = *seen.lock();
        for mut choice in sim.choices(0, 60, 1) {
            let left = Arc::new(sim.crash(&mut choice));
            match open(left, READ_ONLY) {
                Ok(opened) => {
                    let map = opened.image.map();
                    let first = map
                        .present()
                        .next()
                        .map_or(BLOCKS, |(block, _)| block.get());
                    assert!(
                        first >= covered,
                        "{choice:?}: {first} of {covered} are gone"
                    );
                    assert_eq!(map.present_count(), u64::from(BLOCKS - first), "{choice:?}");
                }
                Err(error) => panic!("{choice:?}: {error}"),
            }
        }
        *seen.lock() = (issued, issued);
    });
    for number in 0..BLOCKS {
        let (block, reads) = (block(number), Reads::Zeros);
        image.commit(&[MapEdit::Drop { block, reads }]).unwrap();
        dropped.lock().0 = number + 1;
    }
    assert!(dropped.lock().1 > 100, "it was full");
}
