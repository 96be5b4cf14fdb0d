//! Full hosts: a guest can use all free space of the file, also what compaction has reserved or is punching.

use super::*;

/// A disk with free space at its end, and holes in its first two blocks; a full host.
fn full_with_holes(format: Format) -> (Arc<SimStorage>, Arc<Disk>) {
    let (storage, disk) = disk(format, 10, true);
    for block in [0, BLOCK] {
        disk.discard(block, BLOCK / 2).unwrap();
    }
    disk.discard(5 * BLOCK, 5 * BLOCK).unwrap();
    disk.flush().unwrap();
    fill(&storage, &disk);
    (storage, disk)
}

/// Moves to the two holes of a disk, and a batch of them.
fn begun(disk: &Arc<Disk>) -> ([Move; 2], Relocation) {
    let moves = holes_and_moves(disk);
    let mut batch = Relocation::new(Arc::clone(disk));
    for step in moves {
        assert_eq!(batch.add(step, true), Added::Taken);
    }
    (moves, batch)
}

fn fill(storage: &SimStorage, disk: &Disk) {
    storage.set_capacity(Some(disk.allocated_bytes().unwrap()));
}

#[test]
fn who_finds_no_space_waits_for_what_is_being_punched() {
    for format in [Format::Vhd, Format::Vhdx] {
        let (storage, disk) = disk(format, 10, true);
        disk.discard(5 * BLOCK, 5 * BLOCK).unwrap();
        disk.flush().unwrap();
        fill(&storage, &disk);
        let (punches, punching) = mpsc::channel();
        let (written, is_written) = mpsc::channel();
        let (punches, is_written) = (Mutex::new(punches), Mutex::new(is_written));
        let once = AtomicBool::new(false);
        storage.on_op(move |_, op| {
            if op.kind == OpKind::PunchHole && !once.swap(true, Ordering::SeqCst) {
                punches.lock().send(()).unwrap();
                let _ = is_written.lock().recv_timeout(A_WHILE);
            }
        });
        std::thread::scope(|scope| {
            scope.spawn(|| while disk.maintenance().punch_free(u64::MAX).unwrap() {});
            punching.recv().unwrap();
            let result = disk.write_at(&content(5), 5 * BLOCK);
            let _ = written.send(());
            result.unwrap();
        });
        storage.clear_hook();
        hold(&disk, &[0, 4, 5]);
    }
}

/// What a guest would make room with may be taken by then; what comes of it is room for him, too.
#[test]
fn what_others_punch_while_room_is_looked_for_counts() {
    let data = vec![9; usize_from(BLOCK / 2)];
    for format in [Format::Vhd, Format::Vhdx] {
        let (storage, disk) = full_with_holes(format);
        let (other, once) = (Arc::clone(&disk), AtomicBool::new(false));
        let (punches, punching) = mpsc::channel();
        let (punches, punching) = (Mutex::new(punches), Mutex::new(punching));
        let worker = Arc::new(Mutex::new(None));
        let started = Arc::clone(&worker);
        storage.on_op(move |_, op| match op.kind {
            OpKind::PunchHole => drop(punches.lock().send(())),
            // The guest's, before it looks what can be punched.
            OpKind::Sync if !once.swap(true, Ordering::SeqCst) => {
                let disk = Arc::clone(&other);
                *started.lock() = Some(std::thread::spawn(move || {
                    while disk.maintenance().punch_free(u64::MAX).unwrap() {}
                }));
                punching
                    .lock()
                    .recv_timeout(Duration::from_secs(5))
                    .unwrap();
            }
            _ => {}
        });
        disk.write_at(&data, 0).unwrap();
        storage.clear_hook();
        worker.lock().take().unwrap().join().unwrap();
    }
    // Two guests.
    for _ in 0..5 {
        let (storage, disk) = full_with_holes(Format::Vhdx);
        storage.on_op(|_, op| {
            if op.kind == OpKind::Sync {
                std::thread::sleep(Duration::from_millis(2));
            }
        });
        std::thread::scope(|scope| {
            let write = |block| disk.write_at(&data, block).unwrap();
            scope.spawn(move || write(0));
            scope.spawn(move || write(BLOCK));
        });
    }
}

/// What moves have taken as their targets goes back to a guest that needs it, at once: whether anybody steps on or
/// not, and in the middle of a batch.
#[test]
fn a_guest_takes_back_what_moves_have_taken() {
    for format in [Format::Vhd, Format::Vhdx] {
        let (storage, disk) = disk(format, 6, true);
        let (moves, mut batch) = begun(&disk);
        batch.advance(256 << 10, true);
        fill(&storage, &disk);
        disk.write_at(&content(9), 9 * BLOCK).unwrap();
        assert!(batch.is_empty() && !batch.has_more());
        let (moved, concluded) = batch.conclude();
        concluded.unwrap();
        assert!(moved.is_let_go);
        assert_eq!((moved.blocks.len(), moved.copied_in_vain), (0, 256 << 10));
        hold(&disk, &[2, 3, 4, 5, 9]);
        // Each place is somebody's, or free, once.
        let taken: Vec<_> = moves.map(|step| disk.image.reserve_at(step.to)).into();
        assert_eq!(taken.iter().flatten().count(), 1, "{format}");
    }
    for busy_share in [0, 5] {
        let (storage, disk) = disk(Format::Vhdx, 8, true);
        disk.discard(0, 2 * BLOCK).unwrap();
        disk.flush().unwrap();
        let mut policy = IdlePolicy {
            idle_after: Duration::from_secs(3600),
            min_reclaim: 1,
            punch_holes: true,
            ..IdlePolicy::default()
        };
        let mut idle = IdleWork::new(Arc::clone(&disk), policy);
        let before = storage.counters().copies;
        while storage.counters().copies < before + 2 {
            idle.step();
        }
        policy.busy_share = busy_share;
        idle.set_policy(policy);
        fill(&storage, &disk);
        disk.write_at(&content(9), 9 * BLOCK).unwrap();
        storage.set_capacity(None);
        (0..2000).any(|_| matches!(idle.step(), Next::Done));
        hold(&disk, &[2, 3, 4, 5, 6, 7, 9]);
    }
}

/// One that is just being switched over is waited for.
#[test]
fn a_guest_waits_for_a_batch_that_is_concluded() {
    for format in [Format::Vhd, Format::Vhdx] {
        let (storage, disk) = disk(format, 6, true);
        let (_, mut batch) = begun(&disk);
        while batch.has_more() {
            batch.advance(BLOCK, true);
        }
        fill(&storage, &disk);
        let (guest, once) = (Arc::clone(&disk), AtomicBool::new(false));
        let writing = Arc::new(Mutex::new(None));
        let started = Arc::clone(&writing);
        let (written, is_written) = mpsc::channel();
        let (written, is_written) = (Mutex::new(written), Mutex::new(is_written));
        storage.on_op(move |_, op| {
            if op.kind == OpKind::Sync && !once.swap(true, Ordering::SeqCst) {
                let (disk, written) = (Arc::clone(&guest), written.lock().clone());
                *started.lock() = Some(std::thread::spawn(move || {
                    let result = disk.write_at(&content(9), 9 * BLOCK);
                    let _ = written.send(());
                    result
                }));
                let early = is_written.lock().recv_timeout(A_WHILE);
                assert!(early.is_err(), "it did not wait");
            }
        });
        let (moved, concluded) = batch.conclude();
        concluded.unwrap();
        assert_eq!(moved.blocks.len(), 2);
        let writing = writing.lock().take().unwrap();
        writing.join().unwrap().unwrap();
        storage.clear_hook();
        hold(&disk, &[2, 3, 4, 5, 9]);
    }
}

/// A move to a place that the host does not store takes a slot of it before it gives one back. In the background it is
/// not begun where that would be the last that there is: it would fail, and others would fail meanwhile.
#[test]
fn what_the_host_has_no_room_for_is_not_begun() {
    for format in [Format::Vhd, Format::Vhdx] {
        let (storage, disk) = disk(format, 6, true);
        disk.discard(0, 2 * BLOCK).unwrap();
        disk.flush().unwrap();
        while disk.maintenance().punch_free(u64::MAX).unwrap() {}
        let stored = disk.allocated_bytes().unwrap();
        let policy = IdlePolicy {
            idle_after: Duration::ZERO,
            min_reclaim: 1,
            punch_holes: true,
            ..IdlePolicy::default()
        };
        // Less than a slot, or no more than a slot.
        for room in [BLOCK / 2, 2 * BLOCK] {
            storage.set_capacity(Some(stored + room));
            let before = storage.counters().copies;
            let mut idle = IdleWork::new(Arc::clone(&disk), policy);
            let ended = (0..1000).find_map(|_| {
                idle.step();
                idle.take_report()
            });
            assert_eq!(storage.counters().copies, before, "{format}");
            let report = ended.unwrap();
            let left = (report.left.iter()).find(|left| left.reason.contains("no room"));
            assert_eq!(left.unwrap().bytes, 2 * disk.geometry().slot.len);
            assert_eq!(idle.freed(), 0);
        }
        storage.set_capacity(Some(stored + 32 * BLOCK));
        let len = disk.file_len();
        let mut idle = IdleWork::new(Arc::clone(&disk), policy);
        assert!((0..1000).any(|_| matches!(idle.step(), Next::Done)));
        assert!(disk.file_len() <= len - 2 * BLOCK);
        hold(&disk, &[2, 3, 4, 5]);
    }
}

/// A compaction that somebody asked for has the file's own free space make the room that it needs.
#[test]
fn who_asks_for_it_gets_room_made() {
    for format in [Format::Vhd, Format::Vhdx] {
        let (storage, disk) = disk(format, 8, true);
        disk.discard(0, 2 * BLOCK).unwrap();
        disk.flush().unwrap();
        while disk.maintenance().punch_free(u64::MAX).unwrap() {}
        disk.discard(2 * BLOCK, BLOCK).unwrap();
        disk.flush().unwrap();
        fill(&storage, &disk);
        let before = disk.file_len();
        let report = disk.compact(&Default::default()).wait().unwrap();
        assert!(report.length_after <= before - 3 * BLOCK, "{format}");
        hold(&disk, &[3, 4, 5, 6, 7]);
    }
}
