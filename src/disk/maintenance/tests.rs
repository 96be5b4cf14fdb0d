mod full;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::Duration;

use parking_lot::Mutex;

use super::*;
use crate::compact::{IdlePolicy, IdleWork, Next};
use crate::create::{CreateOptions, create};
use crate::disk::OpenOptions;
use crate::error::ErrorKind;
use crate::format::{DiskType, Format};
use crate::storage::sim::{Fault, OpKind, SimStorage};
use crate::units::{u64_from, usize_from};

const BLOCK: u64 = 2 << 20;
const BLOCKS: u64 = 16;

fn open(storage: &Arc<SimStorage>, punch_holes: bool) -> Arc<Disk> {
    let options = OpenOptions {
        punch_holes,
        ..OpenOptions::default()
    };
    let storage: Arc<SimStorage> = Arc::clone(storage);
    Disk::open_storage(storage, Path::new("maintained"), &options).unwrap()
}

/// A disk whose first `blocks` blocks hold their numbers, counted from 1, and whose file holds nothing else.
fn disk(format: Format, blocks: u64, punch_holes: bool) -> (Arc<SimStorage>, Arc<Disk>) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk");
    let options = CreateOptions::new(format, DiskType::Dynamic, BLOCKS * BLOCK);
    create(&path, &options).unwrap();
    let storage = Arc::new(SimStorage::from_file(&path).unwrap());
    let disk = open(&storage, punch_holes);
    (0..blocks).for_each(|n| disk.write_at(&content(n), n * BLOCK).unwrap());
    disk.flush().unwrap();
    disk.maintenance().cut(Cut::ALL).unwrap();
    (storage, disk)
}

fn content(n: u64) -> Vec<u8> {
    vec![u8::try_from(n + 1).unwrap(); usize_from(BLOCK)]
}

fn holds(disk: &Disk, n: u64, wanted: &[u8]) {
    let mut found = vec![0; usize_from(BLOCK)];
    disk.read_at(&mut found, n * BLOCK).unwrap();
    assert!(found == wanted, "block {n}");
}

/// Whether blocks hold their numbers.
fn hold(disk: &Disk, blocks: &[u64]) {
    blocks.iter().for_each(|n| holds(disk, *n, &content(*n)));
}

fn slot(disk: &Disk, n: u32) -> FileOffset {
    disk.maintenance().slot_of(BlockIndex::new(n)).unwrap()
}

/// The first two blocks are gone; moves of the last two into their places.
fn holes_and_moves(disk: &Arc<Disk>) -> [Move; 2] {
    let holes = [slot(disk, 0), slot(disk, 1)];
    disk.discard(0, 2 * BLOCK).unwrap();
    disk.flush().unwrap();
    let step = |block: u32, to| Move {
        block: BlockIndex::new(block),
        from: slot(disk, block),
        to,
    };
    [step(5, holes[0]), step(4, holes[1])]
}

/// A guest that writes to a block of a batch does so in both places; one that drops it has it go from the batch.
/// The others go on, over as many steps as it takes.
#[test]
fn a_batch_goes_on_over_many_steps_beside_its_guest() {
    let formats = [Format::Vhd, Format::Vhdx];
    for (format, drops) in formats
        .map(|format| [(format, false), (format, true)])
        .as_flattened()
    {
        let (storage, disk) = disk(*format, 6, true);
        let moves = holes_and_moves(&disk);
        let mut batch = Relocation::new(Arc::clone(&disk));
        assert_eq!(moves.map(|step| batch.add(step, true)), [Added::Taken; 2]);
        let mut pieces = 0;
        let mut touched = content(5);
        storage.take_log();
        while batch.has_more() {
            batch.advance(256 << 10, true);
            pieces += 1;
            if pieces == 12 {
                // In the block that is all copied, in the middle of the other one.
                touched[7..10].fill(0xee);
                disk.write_at(&[0xee; 3], 5 * BLOCK + 7).unwrap();
                if *drops {
                    touched.fill(0);
                    disk.discard(5 * BLOCK, BLOCK).unwrap();
                }
                disk.flush().unwrap();
            }
        }
        let log = storage.take_log();
        let count = |kind| log.iter().filter(|op| op.kind == kind).count();
        let copies = count(OpKind::CopyWithin);
        assert!(copies >= 16 && count(OpKind::WriteBack) == copies);
        let (moved, concluded) = batch.conclude();
        concluded.unwrap();
        let [first, second] = moves.map(|step| step.block);
        let (blocks, given_up) = match drops {
            true => (vec![second], vec![first]),
            false => (vec![first, second], vec![]),
        };
        assert_eq!((moved.blocks, moved.given_up), (blocks, given_up));
        assert_eq!(moved.copied_in_vain >= BLOCK, *drops);
        let killed = Arc::new(storage.fork().kill());
        for disk in [&disk, &open(&killed, true)] {
            holds(disk, 5, &touched);
            hold(disk, &[2, 3, 4]);
        }
        // A place that was not used is free once, and so are those that were left.
        let (used, unused) = match drops {
            true => (vec![moves[1].to], vec![moves[0].to]),
            false => (vec![moves[0].to, moves[1].to], vec![]),
        };
        for place in { unused }.into_iter().chain(moves.map(|step| step.from)) {
            let taken = [(); 2].map(|()| disk.image.reserve_at(place).is_some());
            assert_eq!(taken, [true, false], "{format}");
            disk.image.give_back(place);
        }
        for place in used {
            assert_eq!(disk.image.reserve_at(place), None);
        }
    }
}

/// What is not concluded has changed nothing.
#[test]
fn a_batch_that_is_dropped_gives_back_its_targets() {
    let (_storage, disk) = disk(Format::Vhdx, 6, true);
    let moves = holes_and_moves(&disk);
    let mut batch = Relocation::new(Arc::clone(&disk));
    moves
        .iter()
        .for_each(|step| assert_eq!(batch.add(*step, true), Added::Taken));
    assert_eq!(disk.image.reserve_at(moves[0].to), None);
    for _ in 0..5 {
        batch.advance(1 << 20, false);
    }
    drop(batch);
    for step in moves {
        assert!(disk.image.reserve_at(step.to).is_some());
        assert_eq!(disk.maintenance().slot_of(step.block), Some(step.from));
    }
}

/// What the host tells of a write-back that failed, it does not tell the next sync.
#[test]
fn a_failed_write_back_is_as_bad_as_a_failed_sync() {
    for format in [Format::Vhd, Format::Vhdx] {
        let (storage, disk) = disk(format, 6, true);
        let moves = holes_and_moves(&disk);
        let mut batch = Relocation::new(Arc::clone(&disk));
        batch.add(moves[0], true);
        storage.inject(Fault::next(OpKind::WriteBack));
        batch.advance(1 << 20, true);
        let (moved, concluded) = batch.conclude();
        assert_eq!(moved.blocks, []);
        assert!(concluded.is_err());
        let after = disk.flush().unwrap_err();
        assert_eq!(after.kind(), ErrorKind::Poisoned, "{format}");
    }
}

/// A copy that failed has the batch go no further; what was complete by then counts.
#[test]
fn a_failed_copy_leaves_what_was_copied_before() {
    let (storage, disk) = disk(Format::Vhdx, 6, true);
    let moves = holes_and_moves(&disk);
    let mut batch = Relocation::new(Arc::clone(&disk));
    moves
        .iter()
        .for_each(|step| assert_eq!(batch.add(*step, true), Added::Taken));
    batch.advance(BLOCK, false);
    storage.inject(Fault::next(OpKind::CopyWithin));
    while batch.has_more() {
        batch.advance(BLOCK, false);
    }
    let (moved, concluded) = batch.conclude();
    assert!(concluded.is_err());
    assert_eq!(moved.blocks, [moves[0].block]);
    assert_eq!(
        disk.maintenance().slot_of(moves[0].block),
        Some(moves[0].to)
    );
    assert!(disk.image.reserve_at(moves[1].to).is_some());
    hold(&disk, &[2, 3, 4, 5]);
}

/// The syncs of a cut keep nobody from growing the file, and then it is not cut.
#[test]
fn a_file_that_grows_meanwhile_is_not_cut() {
    for format in [Format::Vhd, Format::Vhdx] {
        let (storage, disk) = disk(format, 4, false);
        disk.discard(2 * BLOCK, 2 * BLOCK).unwrap();
        disk.flush().unwrap();
        let slot_len = disk.geometry().slot.len;
        let piece = Cut {
            spare: 0,
            most: slot_len,
        };
        // One slot of two; all that the log had to do is done by it.
        assert!(disk.maintenance().cut(piece).unwrap());
        let old_len = disk.file_len();
        let [stated, grows, begun] = [(); 3].map(|()| Arc::new(AtomicBool::new(false)));
        let seen = [&stated, &grows, &begun].map(Arc::clone);
        storage.on_op(move |_, op| match op.kind {
            OpKind::SetLen if op.range.len > old_len => seen[1].store(true, Ordering::SeqCst),
            OpKind::Write if op.range.end().get() > old_len => {
                seen[1].store(true, Ordering::SeqCst)
            }
            OpKind::Write => seen[0].store(true, Ordering::SeqCst),
            OpKind::Sync if seen[0].load(Ordering::SeqCst) => {
                seen[2].store(true, Ordering::SeqCst);
                while !seen[1].load(Ordering::SeqCst) {
                    std::thread::yield_now();
                }
            }
            _ => {}
        });
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !begun.load(Ordering::SeqCst) {
                    std::thread::yield_now();
                }
                disk.write_at(&content(9), 9 * BLOCK).unwrap();
            });
            assert!(!disk.maintenance().cut(piece).unwrap());
        });
        storage.clear_hook();
        assert!(disk.file_len() > old_len && u64_from(storage.to_bytes().len()) == disk.file_len());
        disk.flush().unwrap();
        let killed = Arc::new(storage.fork().kill());
        for disk in [&disk, &open(&killed, false)] {
            hold(disk, &[0, 1, 9]);
        }
        // Later it can be.
        disk.maintenance().cut(Cut::ALL).unwrap();
        hold(&disk, &[0, 1, 9]);
    }
}

/// Who allocates while free space is punched gets another place.
#[test]
fn what_is_being_punched_is_nobodys() {
    for format in [Format::Vhd, Format::Vhdx] {
        let (storage, disk) = disk(format, 6, true);
        disk.discard(BLOCK, 2 * BLOCK).unwrap();
        disk.flush().unwrap();
        let guest = Arc::clone(&disk);
        let came = AtomicBool::new(false);
        storage.on_op(move |_, op| {
            if op.kind == OpKind::PunchHole && !came.swap(true, Ordering::SeqCst) {
                guest.write_at(&content(9), 9 * BLOCK).unwrap();
            }
        });
        while disk.maintenance().punch_free(u64::MAX).unwrap() {}
        storage.clear_hook();
        hold(&disk, &[0, 3, 4, 5, 9]);
    }
}

/// Long enough for what does not wait, where it ought to.
const A_WHILE: Duration = Duration::from_millis(150);

/// Who only overwrites changes nothing that there is to be found: runs to look for it have a pause in between, too.
#[test]
fn a_guest_that_only_overwrites_is_not_looked_at_all_the_time() {
    let (_storage, disk) = disk(Format::Vhdx, 4, true);
    let policy = IdlePolicy {
        idle_after: Duration::from_secs(3600),
        ..IdlePolicy::default()
    };
    let mut idle = IdleWork::new(Arc::clone(&disk), policy);
    let settled = (0..1000).any(|_| matches!(idle.step(), Next::Done));
    assert!(settled);
    disk.write_at(&[1; 4096], 0).unwrap();
    assert!(idle.seen() != Some(disk.io_count()));
    match idle.step() {
        Next::Wait(wait) => assert!(wait > A_WHILE, "{wait:?}"),
        other => panic!("{other:?}"),
    }
    assert!(!idle.is_running());
}

/// Where moves have cost too much beside a guest, what needs none goes all the same; the rest once the guest rests.
#[test]
fn what_needs_no_move_goes_whatever_moves_have_cost() {
    for format in [Format::Vhd, Format::Vhdx] {
        let (_storage, disk) = disk(format, 12, true);
        let mut policy = IdlePolicy {
            idle_after: Duration::from_secs(3600),
            busy_share: 100,
            min_reclaim: 1,
            punch_holes: true,
            ..IdlePolicy::default()
        };
        let mut idle = IdleWork::new(Arc::clone(&disk), policy);
        idle.owe(1 << 40);
        // The end of the file, and a place in the middle.
        disk.discard(8 * BLOCK, 4 * BLOCK).unwrap();
        disk.discard(2 * BLOCK, BLOCK).unwrap();
        disk.flush().unwrap();
        let (stored, len) = (disk.allocated_bytes().unwrap(), disk.file_len());
        let ended = (0..5000).any(|_| match idle.step() {
            Next::Wait(wait) if !idle.is_running() => wait > A_WHILE,
            Next::Done => panic!("moves are left"),
            _ => false,
        });
        assert!(ended);
        assert!(disk.allocated_bytes().unwrap() <= stored - 5 * BLOCK);
        assert!((len - 5 * BLOCK + 1..=len - 4 * BLOCK).contains(&disk.file_len()));
        let report = idle.take_report().unwrap();
        assert!((report.left.iter()).any(|left| left.reason.contains("cost much more")));
        policy.idle_after = Duration::ZERO;
        idle.set_policy(policy);
        std::thread::sleep(Duration::from_millis(1));
        let mut ended = false;
        for _ in 0..5000 {
            ended = matches!(idle.step(), Next::Done);
            if ended {
                break;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        assert!(ended && disk.file_len() <= len - 5 * BLOCK);
        hold(&disk, &[0, 1, 3, 4, 5, 6, 7]);
    }
}

/// The host tells of a failed write once: were that a write-back's to hear beside a sync, the guest's flush would
/// succeed without the bytes.
#[test]
fn a_copy_is_not_written_back_beside_a_sync() {
    for format in [Format::Vhd, Format::Vhdx] {
        let (storage, disk) = disk(format, 4, true);
        let (done, is_done) = mpsc::channel();
        let (done, is_done) = (Mutex::new(done), Mutex::new(is_done));
        let (other, once) = (Arc::clone(&disk), AtomicBool::new(false));
        let threads = Arc::new(Mutex::new(Vec::new()));
        let started = Arc::clone(&threads);
        storage.on_op(move |_, op| {
            if op.kind == OpKind::Sync && !once.swap(true, Ordering::SeqCst) {
                let (disk, done) = (Arc::clone(&other), done.lock().clone());
                let writing = std::thread::spawn(move || {
                    let range = FileRange::new(slot(&disk, 0), 4096);
                    let result = disk.image.write_back(range);
                    let _ = done.send(());
                    result
                });
                started.lock().push(writing);
                let beside = is_done.lock().recv_timeout(A_WHILE);
                assert!(beside.is_err(), "written back beside a sync");
            }
        });
        disk.write_at(&[1; 512], 0).unwrap();
        disk.flush().unwrap();
        storage.clear_hook();
        for thread in threads.lock().drain(..) {
            thread.join().unwrap().unwrap();
        }
    }
}

/// Beside a guest, a host that is to give up much is asked for a little at a time, and then cuts what it does
/// not store.
#[test]
fn a_long_tail_is_given_up_in_pieces() {
    for (format, punches) in [
        (Format::Vhd, true),
        (Format::Vhdx, true),
        (Format::Vhd, false),
        (Format::Vhdx, false),
    ] {
        let (storage, disk) = disk(format, 8, punches);
        let len = disk.file_len();
        disk.discard(2 * BLOCK, 6 * BLOCK).unwrap();
        disk.flush().unwrap();
        storage.take_log();
        let piece = Cut {
            spare: 0,
            most: BLOCK,
        };
        let mut steps = 0;
        while disk.maintenance().cut(piece).unwrap() {
            steps += 1;
        }
        assert!((5..9).contains(&steps), "{format}, {punches}: {steps}");
        let slot_len = disk.geometry().slot.len;
        let log = storage.take_log();
        let punched = log.iter().filter(|op| op.kind == OpKind::PunchHole);
        assert!({ punched }.all(|op| op.range.len <= slot_len));
        let mut before = len;
        for cut in log.iter().filter(|op| op.kind == OpKind::SetLen) {
            assert!(punches || before - cut.range.len <= slot_len + BLOCK / 2);
            before = cut.range.len;
        }
        assert!(disk.file_len() <= len - 6 * slot_len);
        hold(&disk, &[0, 1]);
        // And some of it may stay.
        disk.write_at(&content(7), 7 * BLOCK).unwrap();
        let spare = 3 << 20;
        let used = slot(&disk, 7).plus(slot_len).get();
        disk.maintenance().cut(Cut { spare, ..Cut::ALL }).unwrap();
        assert!((used + spare..used + spare + (2 << 20)).contains(&disk.file_len()));
    }
}

/// What a flush of the guest frees while a full host lets a VHD grow by one slot only is not what it grows into.
#[test]
fn a_file_grows_past_its_end_whatever_was_freed() {
    let (storage, disk) = disk(Format::Vhd, 10, true);
    let len = disk.file_len();
    disk.discard(5 * BLOCK, 5 * BLOCK).unwrap();
    let once = AtomicBool::new(false);
    let other = Arc::clone(&disk);
    storage.on_op(move |storage, op| {
        let grows = op.kind == OpKind::Write && op.range.start.get() >= len;
        if grows && !once.swap(true, Ordering::SeqCst) {
            other.flush().unwrap();
            storage.inject(Fault {
                error: std::io::ErrorKind::StorageFull,
                ..Fault::next(OpKind::Write)
            });
        }
    });
    for block in 5..10 {
        disk.write_at(&content(block), block * BLOCK).unwrap();
        // Nothing of the file is past its footer, where it would be lost.
        let found = crate::storage::Storage::len(&*storage).unwrap();
        assert_eq!(disk.file_len(), found);
        assert!(found >= len);
    }
    storage.clear_hook();
    for block in 0..10 {
        holds(&disk, block, &content(block));
    }
}

/// Two compactions of one disk, the one in the background in the middle of a batch: what a guest writes is in the
/// copy that counts, or in none.
#[test]
fn a_block_has_one_copy_that_counts() {
    use crate::compact::{CompactOptions, Operation};
    for format in [Format::Vhd, Format::Vhdx] {
        let (storage, disk) = disk(format, 8, true);
        let mut was: Vec<Vec<u8>> = (0..8).map(content).collect();
        let mut discard = |blocks: std::ops::Range<u64>| {
            disk.discard(blocks.start * BLOCK, (blocks.end - blocks.start) * BLOCK)
                .unwrap();
            blocks.for_each(|block| was[usize_from(block)].fill(0));
            disk.flush().unwrap();
        };
        discard(0..2);
        let policy = IdlePolicy {
            idle_after: Duration::from_secs(3600),
            min_reclaim: 1,
            ..IdlePolicy::default()
        };
        let mut idle = IdleWork::new(Arc::clone(&disk), policy);
        let before = storage.counters().copies;
        while storage.counters().copies < before + 2 {
            idle.step();
        }
        // The guest frees more; somebody asks for a compaction, and thinks better of it.
        discard(2..4);
        let operation = Arc::new(Mutex::new(None::<Operation>));
        let (guest, asked) = (Arc::clone(&disk), Arc::clone(&operation));
        let once = AtomicBool::new(false);
        storage.on_op(move |_, op| {
            if op.kind == OpKind::CopyWithin && !once.swap(true, Ordering::SeqCst) {
                for block in 4..8 {
                    guest.write_at(&[0xee; 3], block * BLOCK + 7).unwrap();
                }
                guest.flush().unwrap();
                asked.lock().as_ref().unwrap().cancel();
            }
        });
        {
            let mut slot = operation.lock();
            *slot = Some(disk.compact(&CompactOptions::default()));
        }
        let asked = loop {
            let mut slot = operation.lock();
            if slot.as_ref().is_some_and(Operation::is_finished) {
                break slot.take().unwrap();
            }
            drop(slot);
            std::thread::yield_now();
        };
        // Cancelled, or done before.
        let _ = asked.wait();
        storage.clear_hook();
        (4..8).for_each(|block: usize| was[block][7..10].fill(0xee));
        for _ in 0..2000 {
            if matches!(idle.step(), Next::Done) {
                break;
            }
        }
        for (block, wanted) in (0..).zip(&was) {
            holds(&disk, block, wanted);
        }
    }
}
