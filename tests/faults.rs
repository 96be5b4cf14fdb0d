//! Failures of the host at any operation: no acknowledged byte is lost, and the disk knows when it can
//! no longer tell.
//!
//! Each life is lived once undisturbed, to count its operations, and then again and again with one of
//! them failing in each of several ways. `VHDFS_SOAK=n` tries n times as many lives.

#![allow(clippy::unwrap_used, reason = "a failure is what a test is for")]

mod support;

use std::io;
use std::sync::Arc;

use support::env_number;
use support::guest::{Guest, check_file, compact, open, open_over};
use support::life::Life;
use support::matrix::kinds;
use support::oracle::{After, Oracle};
use vhdfs::error::{CompactError, ErrorKind};
use vhdfs::storage::Storage;
use vhdfs::storage::sim::{Choice, Effect, Fault, OpKind, SimStorage};
use vhdfs::units::FileOffset;

/// The ways to fail.
fn faults(after: u64) -> Vec<Fault> {
    let fault = |error, effect, forever| Fault {
        on: None,
        after,
        forever,
        error,
        effect,
    };
    let (io, full) = (io::ErrorKind::Other, io::ErrorKind::StorageFull);
    vec![
        fault(io, Effect::Nothing, false),
        fault(full, Effect::Prefix(1024), false),
        fault(io, Effect::Everything, false),
        fault(io, Effect::Scatter(after), false),
        fault(io, Effect::Nothing, true),
        // A full host: it reads and syncs still.
        Fault {
            on: Some(OpKind::Write),
            ..fault(full, Effect::Prefix(512), true)
        },
        Fault {
            on: Some(OpKind::SetLen),
            ..fault(full, Effect::Nothing, true)
        },
        Fault {
            on: Some(OpKind::Sync),
            ..fault(io, Effect::Scatter(!after), false)
        },
        Fault {
            on: Some(OpKind::CopyWithin),
            ..fault(io, Effect::Prefix(4096), false)
        },
        Fault {
            on: Some(OpKind::PunchHole),
            ..fault(io, Effect::Prefix(4096), false)
        },
    ]
}

/// Lives `life` with `fault`; says whether anything failed.
fn live_with(
    life: &Life,
    (storage, oracle): &(SimStorage, Oracle),
    fault: Fault,
) -> Result<bool, String> {
    let mut guest = Guest::tolerant(storage.fork(), oracle.clone());
    guest.storage().inject(fault);
    life.live(&mut guest);
    guest.storage().clear_faults();
    let errors = guest.errors();

    let oracle = guest.oracle().lock().clone();
    oracle
        .check(guest.disk(), After::Kill, true)
        .map_err(|error| format!("go on: {error}"))?;
    // The next process, and the next one after a power cut.
    let next = Arc::new(guest.storage().fork());
    let disk = open_over(&next, oracle.parent())?;
    oracle
        .check(&disk, After::Kill, true)
        .map_err(|error| format!("killed: {error}"))?;
    drop(disk);
    let choices = [
        Choice::AllLost,
        Choice::AllKept,
        Choice::Seeded {
            seed: 1,
            atomic: 512,
        },
    ];
    for mut choice in choices {
        let next = Arc::new(guest.storage().crash(&mut choice));
        let disk = open_over(&next, oracle.parent())?;
        let result = oracle.check(&disk, After::PowerCut, true);
        result.map_err(|error| format!("power cut, {choice:?}: {error}"))?;
        drop(disk);
        check_file(&next).map_err(|error| format!("power cut, {choice:?}: {error}"))?;
    }

    let poisoned = errors.contains(&ErrorKind::Poisoned);
    match guest.disk().write_at(&[1; 512], 0) {
        Ok(()) if !poisoned => {}
        Err(error) if error.kind() == ErrorKind::Poisoned => return Ok(true),
        other => return Err(format!("after {errors:?} a write answers {other:?}")),
    }
    // Not poisoned: as if nothing had happened.
    match compact(guest.disk()) {
        Err(CompactError::Fixed) => {}
        other => other.map_err(|error| format!("compacting: {error}"))?,
    }
    guest
        .disk()
        .close()
        .map_err(|error| format!("closing: {error}"))?;
    check_file(guest.storage()).map_err(|error| format!("closed: {error}"))?;
    Ok(!errors.is_empty())
}

/// Lives `count` lives, in each of which operations fail; about `tries` of each, or all.
fn lives(part: u64, count: u64, tries: usize, life: impl Fn(u64) -> Life) {
    let seed = env_number("VHDFS_SEED", 1);
    let (mut runs, mut failed) = (0, 0);
    for n in 0..count * env_number("VHDFS_SOAK", 1) {
        let seed = seed << 32 | part << 16 | n;
        let life = life(seed);
        let start = life.start();
        let mut guest = Guest::tolerant(start.0.fork(), start.1.clone());
        guest.storage().take_log();
        life.live(&mut guest);
        assert!(
            guest.errors().is_empty(),
            "nothing fails by itself: {:?}",
            guest.errors()
        );
        let log = guest.storage().take_log();
        let changing = log.iter().filter(|op| op.kind.changes()).count();
        // Most operations are reads of a compaction: fewer of those.
        let step = log.len().div_ceil((changing.max(1) * 2).min(tries)).max(1);
        for after in (0..log.len()).step_by(step) {
            for fault in faults(u64::try_from(after).unwrap()) {
                runs += 1;
                match live_with(&life, &start, fault) {
                    Ok(did_fail) => failed += u64::from(did_fail),
                    Err(error) => panic!("life {seed:#x} with {fault:?}: {error}"),
                }
            }
        }
    }
    println!("part {part}: {runs} lives with a failure to come, which hit the guest in {failed}");
    assert!(failed > 20);
}

#[test]
fn failing_hosts_0() {
    lives(0, 12, usize::MAX, Life::new);
}

#[test]
fn failing_hosts_1() {
    lives(1, 12, usize::MAX, Life::new);
}

/// Every kind of disk in turn.
#[test]
fn failing_hosts_of_every_kind() {
    lives(2, 10, 6, |seed| {
        let kinds = kinds(128 << 10, seed);
        Life::on(kinds[usize::try_from(seed % 10).unwrap()])
    });
}

/// A host that fails while a file is opened and put right: an error, and the next open succeeds.
#[test]
fn failing_while_opening() {
    let (storage, oracle) = Life::new(5).start();
    // Cut off its footer, with something behind.
    let end = storage.len().unwrap();
    storage
        .write_all_at(&[0x5a; 9000], FileOffset::new(end - 512))
        .unwrap();
    storage.set_len(end + (1 << 20)).unwrap();
    storage.sync().unwrap();
    let mut failures = 0;
    for after in 0.. {
        for fault in faults(after) {
            let broken = Arc::new(storage.fork());
            broken.inject(fault);
            let failed = open(&broken).is_err();
            failures += u32::from(failed);
            broken.clear_faults();
            for mut choice in [Choice::AllLost, Choice::AllKept, Choice::Before(1)] {
                let next = Arc::new(broken.crash(&mut choice));
                let disk = open(&next).unwrap();
                oracle.check(&disk, After::PowerCut, true).unwrap();
                disk.close().unwrap();
                check_file(&next).unwrap();
            }
            let always = fault.on.is_none() && fault.effect == Effect::Nothing;
            if always && !failed {
                println!("opening takes {after} operations and failed {failures} times");
                assert!(failures > 20);
                return;
            }
        }
    }
}
