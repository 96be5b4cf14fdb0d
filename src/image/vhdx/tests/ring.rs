//! The ring by itself, where syncs and changes run into each other.

use super::super::log::Log;
use super::super::ring::{FileLog, read_page};
use super::*;
use crate::format::vhdx::PAGE;
use crate::format::vhdx::log::{Descriptor, Page, active_sequence, read_entry};
use crate::storage::sim::Choice;

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

/// What page `number` is once the log is replayed.
fn replayed(sim: &SimStorage, number: u64) -> u8 {
    let mut source = FileLog::new(sim, LOG);
    let sequence = active_sequence(&mut source, GUID).unwrap().unwrap();
    let mut value = in_place(sim, number);
    for entry in sequence.entries {
        let mut found = Vec::new();
        let header = read_entry(&mut source, GUID, entry, |descriptor| {
            found.push(descriptor)
        });
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
fn a_tail_frees_nothing_before_it_is_durable() {
    let (sim, log) = started();
    let fill = |first: u8| (0_u64..).take_while(|n| append(&log, *n, first)).count();
    assert_eq!(fill(1), 126, "as the documentation says");
    sync(&sim, &log);
    log.apply().unwrap();
    sync(&sim, &log);
    assert_eq!(
        fill(2),
        0,
        "retired, but the newest durable entry's tail is the old one"
    );
    log.append_tail().unwrap();
    assert_eq!(fill(2), 0, "the new tail is not durable");
    let lost = sim.crash(&mut Choice::AllLost);
    assert_eq!([0, 125].map(|n| replayed(&lost, n)), [1, 1]);
    sync(&sim, &log);
    assert_eq!(fill(2), 126);
    let lost = sim.crash(&mut Choice::AllLost);
    assert_eq!([0, 125].map(|n| replayed(&lost, n)), [1, 1]);
    let kept = sim.crash(&mut Choice::AllKept);
    assert_eq!([0, 125].map(|n| replayed(&kept, n)), [2, 2]);
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
fn a_guest_that_flushes_never_waits_for_the_ring() {
    // Changes between two flushes, each with another page: the worst.
    for changes in [1, 2, 7, 20, 30] {
        let (sim, log) = started();
        for round in 0..200_u64 {
            for n in 0..changes {
                assert!(
                    append(&log, round * changes + n, 1),
                    "{changes} changes: full"
                );
            }
            let mark = log.mark();
            sim.sync().unwrap();
            if log.synced(mark) {
                log.apply().unwrap();
            }
        }
    }
}
