use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;
use crate::storage::tests::{content, range};

mod model;

fn at(offset: u64) -> FileOffset {
    FileOffset::new(offset)
}

/// `sectors` sectors that hold `byte`.
fn sectors(byte: u8, sectors: usize) -> Vec<u8> {
    vec![byte; sectors * 512]
}

fn crashed(sim: &SimStorage, mut choice: Choice) -> Vec<u8> {
    sim.crash(&mut choice).to_bytes()
}

/// The first byte of each sector.
fn firsts(bytes: &[u8]) -> Vec<u8> {
    bytes.chunks(512).map(|sector| sector[0]).collect()
}

#[test]
fn unsynced_writes_tear_at_sectors() {
    let sim = SimStorage::from_bytes(&sectors(1, 4));
    sim.write_all_at(&sectors(2, 3), at(512)).unwrap();
    assert_eq!(firsts(&crashed(&sim, Choice::AllLost)), [1, 1, 1, 1]);
    assert_eq!(firsts(&crashed(&sim, Choice::AllKept)), [1, 2, 2, 2]);
    assert_eq!(firsts(&crashed(&sim, Choice::Units(0b101))), [1, 2, 1, 2]);
    let [change] = sim.unsynced()[..] else {
        panic!("one change")
    };
    let written = Change {
        index: 0,
        kind: OpKind::Write,
        range: range(512, 1536),
        first_unit: 0,
        units: 3,
    };
    assert_eq!(change, written);
    assert_eq!(sim.choices(8, 0, 0).len(), 8, "every subset of three units");
    sim.sync().unwrap();
    assert_eq!(firsts(&crashed(&sim, Choice::AllLost)), [1, 2, 2, 2]);
    assert_eq!(sim.choices(8, 5, 0), [Choice::AllKept]);
}

#[test]
fn changes_reach_the_disk_in_any_order() {
    let sim = SimStorage::from_bytes(&sectors(1, 2));
    sim.write_all_at(&sectors(2, 2), at(0)).unwrap();
    sim.write_all_at(&sectors(3, 1), at(0)).unwrap();
    assert_eq!(firsts(&crashed(&sim, Choice::Only(1))), [3, 1]);
    assert_eq!(firsts(&crashed(&sim, Choice::AllBut(1))), [2, 2]);
    assert_eq!(firsts(&crashed(&sim, Choice::Before(1))), [2, 2]);
    assert_eq!(firsts(&crashed(&sim, Choice::Changes(0b10))), [3, 1]);
    assert_eq!(firsts(&crashed(&sim, Choice::Units(0b110))), [3, 2]);
}

#[test]
fn a_sector_carries_earlier_changes_of_it() {
    let sim = SimStorage::from_bytes(&sectors(1, 1));
    sim.write_all_at(&[2; 100], at(0)).unwrap();
    sim.write_all_at(&[3; 100], at(100)).unwrap();
    let bytes = crashed(&sim, Choice::Only(1));
    assert_eq!((bytes[0], bytes[100], bytes[200]), (2, 3, 1));
}

#[test]
fn lost_extension_under_a_kept_write() {
    let sim = SimStorage::from_bytes(&sectors(1, 1));
    sim.set_len(8 * 512).unwrap();
    sim.write_all_at(&sectors(2, 2), at(4 * 512)).unwrap();
    assert_eq!(
        firsts(&crashed(&sim, Choice::Only(0))),
        [1, 0, 0, 0, 0, 0, 0, 0]
    );
    assert_eq!(firsts(&crashed(&sim, Choice::Only(1))), [1, 0, 0, 0, 2, 2]);
    // Unit 0 is the length.
    assert_eq!(
        firsts(&crashed(&sim, Choice::Units(0b010))),
        [1, 0, 0, 0, 2]
    );
    assert_eq!(
        firsts(&crashed(&sim, Choice::Units(0b101))),
        [1, 0, 0, 0, 0, 2, 0, 0]
    );
}

#[test]
fn lost_truncation_brings_old_bytes_back() {
    let sim = SimStorage::from_bytes(&sectors(1, 4));
    sim.set_len(512).unwrap();
    sim.set_len(3 * 512).unwrap();
    assert_eq!(firsts(&sim.to_bytes()), [1, 0, 0]);
    assert_eq!(firsts(&crashed(&sim, Choice::AllLost)), [1, 1, 1, 1]);
    assert_eq!(firsts(&crashed(&sim, Choice::Only(0))), [1]);
    assert_eq!(
        firsts(&crashed(&sim, Choice::Only(1))),
        [1, 1, 1],
        "the truncation is lost"
    );
    assert_eq!(firsts(&crashed(&sim, Choice::AllKept)), [1, 0, 0]);
}

#[test]
fn zeros_never_extend_and_copies_do() {
    let sim = SimStorage::from_bytes(&sectors(1, 1));
    sim.set_len(4 * 512).unwrap();
    sim.punch_hole(range(0, 4 * 512)).unwrap();
    assert_eq!(firsts(&crashed(&sim, Choice::Only(1))), [0]);
    let sim = SimStorage::from_bytes(&sectors(1, 1));
    sim.set_len(4 * 512).unwrap();
    sim.copy_within(range(0, 512), at(1024)).unwrap();
    assert_eq!(firsts(&crashed(&sim, Choice::Only(1))), [1, 0, 1]);
}

#[test]
fn punched_holes_tear_too() {
    let sim = SimStorage::from_bytes(&sectors(1, 32));
    sim.punch_hole(range(0, 16384)).unwrap();
    assert_eq!(sim.allocated_bytes().unwrap(), 0);
    let torn = firsts(&crashed(&sim, Choice::Units(0xf0)));
    assert_eq!(torn[..10], [1, 1, 1, 1, 0, 0, 0, 0, 1, 1]);
    assert_eq!(
        sim.crash(&mut Choice::AllLost).allocated_bytes().unwrap(),
        16384
    );
    sim.sync().unwrap();
    assert_eq!(
        sim.crash(&mut Choice::AllLost).allocated_bytes().unwrap(),
        0
    );
}

#[test]
fn death_keeps_everything_and_syncs_nothing() {
    let sim = SimStorage::from_bytes(&sectors(1, 2));
    sim.write_all_at(&sectors(2, 1), at(0)).unwrap();
    let survivor = sim.kill();
    assert!(sim.read_exact_at(&mut [0], at(0)).is_err());
    assert!(sim.sync().is_err());
    assert_eq!(firsts(&survivor.to_bytes()), [2, 1]);
    assert_eq!(firsts(&crashed(&survivor, Choice::AllLost)), [1, 1]);
    survivor.sync().unwrap();
    assert_eq!(firsts(&crashed(&survivor, Choice::AllLost)), [2, 1]);
}

#[test]
fn a_sync_covers_what_was_there_when_it_began() {
    let sim = SimStorage::from_bytes(&sectors(1, 3));
    sim.on_op(|sim, op| {
        // Another thread, as it were.
        if op.kind == OpKind::Sync {
            sim.write_all_at(&sectors(3, 1), at(512)).unwrap();
        }
    });
    sim.write_all_at(&sectors(2, 1), at(0)).unwrap();
    sim.sync().unwrap();
    sim.clear_hook();
    assert_eq!(firsts(&sim.to_bytes()), [2, 3, 1]);
    assert_eq!(firsts(&crashed(&sim, Choice::AllLost)), [2, 1, 1]);
    sim.sync().unwrap();
    assert_eq!(firsts(&crashed(&sim, Choice::AllLost)), [2, 3, 1]);
}

#[test]
fn power_cuts() {
    let sim = SimStorage::from_bytes(&sectors(1, 3));
    sim.cut_after(2);
    sim.write_all_at(&sectors(2, 1), at(0)).unwrap();
    sim.read_exact_at(&mut [0], at(0)).unwrap();
    assert!(!sim.is_cut());
    sim.write_all_at(&sectors(2, 1), at(512)).unwrap();
    assert!(sim.is_cut());
    let errors = [
        sim.write_all_at(&sectors(2, 1), at(1024)).unwrap_err(),
        sim.read_exact_at(&mut [0], at(0)).unwrap_err(),
        sim.len().unwrap_err(),
        sim.sync().unwrap_err(),
    ];
    assert!(errors.iter().all(is_power_cut));
    assert!(!is_power_cut(&io::Error::other("another")));
    assert_eq!(firsts(&crashed(&sim, Choice::AllKept)), [2, 2, 1]);
    let after = sim.crash(&mut Choice::AllLost);
    after.write_all_at(&sectors(4, 1), at(0)).unwrap();
    assert_eq!(firsts(&after.to_bytes()), [4, 1, 1], "power is back");
    assert_eq!(
        firsts(&crashed(&sim, Choice::AllKept)),
        [2, 2, 1],
        "and files are apart"
    );
}

#[test]
fn failures_hit_the_chosen_operation() {
    let sim = SimStorage::from_bytes(&sectors(1, 4));
    let error = io::ErrorKind::StorageFull;
    sim.inject(Fault {
        after: 1,
        error,
        ..Fault::next(OpKind::Write)
    });
    sim.write_all_at(&sectors(2, 1), at(0)).unwrap();
    sim.read_exact_at(&mut [0], at(0)).unwrap();
    assert_eq!(
        sim.write_all_at(&sectors(2, 1), at(512))
            .unwrap_err()
            .kind(),
        error
    );
    sim.write_all_at(&sectors(2, 1), at(1024)).unwrap();
    assert_eq!(firsts(&sim.to_bytes()), [2, 1, 2, 1]);

    sim.inject(Fault {
        on: None,
        forever: true,
        ..Fault::next(OpKind::Read)
    });
    assert!(sim.len().is_err() && sim.set_len(0).is_err());
    sim.clear_faults();
    assert_eq!(sim.len().unwrap(), 2048);

    sim.inject(Fault {
        effect: Effect::Prefix(700),
        ..Fault::next(OpKind::Write)
    });
    assert!(sim.write_all_at(&sectors(5, 2), at(1024)).is_err());
    let bytes = sim.to_bytes();
    assert_eq!(
        (bytes[1024], bytes[1024 + 699], bytes[1024 + 700]),
        (5, 5, 1)
    );
    sim.inject(Fault {
        effect: Effect::Everything,
        ..Fault::next(OpKind::SetLen)
    });
    assert!(sim.set_len(100).is_err());
    assert_eq!(sim.len().unwrap(), 100);
}

#[test]
fn failed_syncs() {
    let write = |effect| {
        let sim = SimStorage::from_bytes(&sectors(1, 8));
        sim.write_all_at(&sectors(2, 8), at(0)).unwrap();
        sim.inject(Fault {
            effect,
            ..Fault::next(OpKind::Sync)
        });
        sim.sync().unwrap_err();
        sim
    };
    assert_eq!(
        firsts(&crashed(&write(Effect::Nothing), Choice::AllLost)),
        [1; 8]
    );
    assert_eq!(
        firsts(&crashed(&write(Effect::Everything), Choice::AllLost)),
        [2; 8]
    );
    let durable = |seed| {
        let sim = write(Effect::Scatter(seed));
        assert_eq!(
            firsts(&sim.to_bytes()),
            [2; 8],
            "reads see what was thrown away"
        );
        sim.sync().unwrap();
        firsts(&crashed(&sim, Choice::AllKept))
    };
    let all: std::collections::HashSet<_> = (0..64).map(durable).collect();
    assert!(all.contains([1; 8].as_slice()) && all.contains([2; 8].as_slice()) && all.len() > 8);
}

#[test]
fn capacity() {
    let sim = SimStorage::new();
    sim.set_capacity(Some(2 * PAGE));
    sim.set_len(100 * PAGE).unwrap();
    let error = sim.write_all_at(&[7; 3 * 4096], at(4000)).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::StorageFull);
    let bytes = sim.to_bytes();
    assert_eq!(
        (bytes[4000], bytes[8191], bytes[8192]),
        (7, 7, 0),
        "the part that fits"
    );
    assert_eq!(sim.crash(&mut Choice::AllKept).to_bytes(), bytes);
    sim.write_all_at(&[8; 4096], at(4000)).unwrap();
    assert!(sim.write_zeroes(range(9000, 10)).is_err());
    assert!(sim.copy_within(range(4000, 10), at(9000)).is_err());
    sim.copy_within(range(20 * PAGE, PAGE), at(9000)).unwrap();
    sim.punch_hole(range(0, 4096)).unwrap();
    sim.write_all_at(&[9; 10], at(9000)).unwrap();
    assert_eq!(sim.allocated_bytes().unwrap(), 2 * PAGE);
}

#[test]
fn hosts_without_holes() {
    let sim = SimStorage::from_bytes(&sectors(1, 8));
    sim.set_punch_supported(false);
    let error = sim.punch_hole(range(0, 4096)).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::Unsupported);
    assert_eq!(
        (firsts(&sim.to_bytes()), sim.unsynced_len()),
        (vec![1; 8], 0)
    );
    assert!(
        sim.fork().punch_hole(range(0, 4096)).is_err(),
        "the host stays the same"
    );
}

#[test]
fn counts_and_logs() {
    let sim = SimStorage::new();
    sim.write_all_at(&[1; 1000], at(24)).unwrap();
    sim.copy_within(range(0, 500), at(600)).unwrap();
    sim.read_exact_at(&mut [0; 10], at(0)).unwrap();
    sim.read_exact_at(&mut [0; 10], at(2000)).unwrap_err();
    sim.sync().unwrap();
    let expected = Counters {
        reads: 1,
        bytes_read: 10,
        writes: 1,
        bytes_written: 1000,
        copies: 1,
        bytes_copied: 500,
        syncs: 1,
        ..Counters::default()
    };
    assert_eq!(sim.counters(), expected);
    let kinds: Vec<_> = sim.take_log().iter().map(|op| op.kind).collect();
    let read = OpKind::Read;
    assert_eq!(
        kinds,
        [OpKind::Write, OpKind::CopyWithin, read, read, OpKind::Sync]
    );
    assert!(sim.take_log().is_empty());
}

#[test]
fn huge_files_cost_what_is_written() {
    let sim = SimStorage::new();
    let tib = 1 << 40;
    sim.set_len(tib).unwrap();
    sim.write_all_at(&[1; 512], at(tib / 2)).unwrap();
    sim.punch_hole(range(0, tib / 2)).unwrap();
    sim.sync().unwrap();
    assert_eq!(sim.allocated_bytes().unwrap(), PAGE);
    assert_eq!(
        sim.next_data(at(0), at(tib)).unwrap(),
        Some(range(tib / 2, PAGE))
    );
    assert!(sim.set_len(u64::MAX).is_err());
    assert!(sim.write_all_at(&[1], at(u64::MAX - 5)).is_err());
}

#[test]
fn loads_sparse_files() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("file");
    let file = HostFile::create_new(&path).unwrap();
    file.set_len((8 << 20) + 511).unwrap();
    file.write_all_at(&vec![3; 3 << 20], at(1 << 20)).unwrap();
    let sim = SimStorage::from_file(&path).unwrap();
    assert!(sim.to_bytes() == std::fs::read(&path).unwrap());
    // Not all hosts of Windows have holes.
    assert!(cfg!(windows) || sim.allocated_bytes().unwrap() < 4 << 20);
    assert_eq!(sim.unsynced_len(), 0);
}

#[test]
fn seeded_choices_tear_in_every_way() {
    let sim = SimStorage::from_bytes(&sectors(1, 32));
    sim.write_all_at(&sectors(2, 24), at(4 * 512)).unwrap();
    let states = |atomic| {
        let state = |seed| firsts(&crashed(&sim, Choice::Seeded { seed, atomic }));
        assert_eq!(state(5), state(5), "the same seed, the same state");
        (0..4000)
            .map(state)
            .collect::<std::collections::HashSet<_>>()
    };
    let torn = states(512);
    assert!(torn.len() > 600, "{}", torn.len());
    let only = |n: usize| {
        (0..32)
            .map(|m| if m == n { 2 } else { 1 })
            .collect::<Vec<_>>()
    };
    assert!(torn.contains(&only(4)) && torn.contains(&only(27)));
    // The write covers half a block of 4096 bytes, two whole ones, and half of a fourth.
    assert_eq!(states(4096).len(), 16);
}

#[test]
fn threads_share_it() {
    let sim = Arc::new(SimStorage::new());
    let syncs = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for n in 0..4u8 {
            let (sim, syncs) = (&sim, &syncs);
            scope.spawn(move || {
                for round in 0..50 {
                    let place = at((u64::from(n) * 50 + round) * 512);
                    sim.write_all_at(&sectors(n + 1, 1), place).unwrap();
                    if round % 10 == 0 {
                        sim.sync().unwrap();
                        syncs.fetch_add(1, Ordering::Relaxed);
                        // Whatever else goes on: what this thread wrote before is durable.
                        let durable = sim.crash(&mut Choice::AllLost);
                        let mut sector = [0; 512];
                        durable.read_exact_at(&mut sector, place).unwrap();
                        assert_eq!(sector, [n + 1; 512]);
                    }
                }
            });
        }
    });
    assert_eq!(syncs.into_inner(), 20);
    assert!(
        content(&*sim)
            .chunks(512)
            .enumerate()
            .all(|(n, s)| usize::from(s[0]) == n / 50 + 1)
    );
}
