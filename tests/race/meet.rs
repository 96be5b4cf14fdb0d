//! One guest or compaction meets another at a chosen moment.

use super::*;

/// Waits until `flag` is set, but not for ever.
fn wait_for(flag: &AtomicBool) {
    let started = Instant::now();
    while !flag.load(Ordering::SeqCst) && started.elapsed() < Duration::from_millis(500) {
        std::thread::yield_now();
    }
}

/// Has `other` done while `act` is about to ask for what `is_it` describes, for the first time.
fn interrupt(
    storage: &SimStorage,
    is_it: impl Fn(&Op) -> bool + Send + Sync + 'static,
    act: impl FnOnce() + Send,
    other: impl FnOnce(),
) {
    let [met, done] = [(); 2].map(|()| Arc::new(AtomicBool::new(false)));
    let seen = [&met, &done].map(Arc::clone);
    storage.on_op(move |_, op| {
        if is_it(op) && !seen[0].swap(true, Ordering::SeqCst) {
            wait_for(&seen[1]);
        }
    });
    std::thread::scope(|scope| {
        scope.spawn(act);
        wait_for(&met);
        other();
        done.store(true, Ordering::SeqCst);
    });
    assert!(met.load(Ordering::SeqCst), "they met");
    storage.clear_hook();
}

/// Compacts `disk`, and has `guest` at it when `storage` is first asked for what `is_it` describes, before
/// that is done: compaction goes on once the guest is done, or, where that waits for it, after a while.
fn meet(
    (storage, disk): (&SimStorage, &Arc<Disk>),
    is_it: impl Fn(&Op) -> bool + Send + Sync + 'static,
    guest: impl FnOnce() + Send,
) {
    let [met, done] = [(); 2].map(|()| Arc::new(AtomicBool::new(false)));
    let seen = [&met, &done].map(Arc::clone);
    storage.on_op(move |_, op| {
        if is_it(op) && !seen[0].swap(true, Ordering::SeqCst) {
            wait_for(&seen[1]);
        }
    });
    std::thread::scope(|scope| {
        let done = &done;
        let guest = scope.spawn(|| {
            wait_for(&met);
            guest();
            done.store(true, Ordering::SeqCst);
        });
        let options = CompactOptions {
            punch_holes: true,
            ..CompactOptions::default()
        };
        disk.compact(&options).wait().expect("compacted");
        guest.join().expect("no panic");
    });
    assert!(met.load(Ordering::SeqCst), "they met");
    storage.clear_hook();
}

/// A disk that has written 5 to its first block and 7 to its second; where in the file the first one's
/// bytes are. In the file, those from `zeros` on are zeros, which nobody knows.
fn with_zeros(zeros: u64) -> (Arc<SimStorage>, Arc<Disk>, FileRange) {
    let folder = tempfile::tempdir().expect("a folder");
    let storage = SimStorage::from_file(&VHD.file(folder.path())).expect("loaded");
    let storage = Arc::new(storage);
    let open = || {
        let disk = Disk::open_storage(storage.clone(), Path::new("raced"), &options(true));
        disk.expect("opened")
    };
    let disk = open();
    let block = usize_from(BLOCK.into());
    disk.write_at(&vec![5; block], 0).expect("written");
    disk.write_at(&vec![7; block], BLOCK.into())
        .expect("written");
    disk.close().expect("closed");
    drop(disk);
    let bytes = storage.to_bytes();
    let start = bytes.windows(4096).position(|bytes| bytes == [5; 4096]);
    let start = u64_from(start.expect("a block"));
    let data = FileRange::new(FileOffset::new(start), BLOCK.into());
    let part = FileRange::between(data.start.plus(zeros), data.end());
    let nothing = vec![0; usize_from(part.len)];
    storage.write_all_at(&nothing, part.start).expect("written");
    let disk = open();
    (storage, disk, data)
}

fn assert_reads(disk: &Disk, offset: u64, byte: u8) {
    let mut found = [0; 4096];
    disk.read_at(&mut found, offset).expect("read");
    assert!(found == [byte; 4096], "{found:?}");
}

#[test]
fn zeros_that_are_written_to_while_they_are_looked_for() {
    let (storage, disk, data) = with_zeros(0);
    // Looked at in two pieces.
    let hole = FileRange::new(data.start.plus(16 << 10), 16 << 10);
    storage.punch_hole(hole).expect("punched");
    let is_second = move |op: &Op| op.kind == OpKind::Read && op.range.start == hole.end();
    meet((&storage, &disk), is_second, || {
        disk.write_at(&[9; 4096], 0).expect("written");
    });
    assert_reads(&disk, 0, 9);
}

#[test]
fn a_block_that_is_written_to_while_it_is_dropped() {
    let (storage, disk, _) = with_zeros(0);
    let is_table = |op: &Op| op.kind == OpKind::Write && op.range.len == 4;
    meet((&storage, &disk), is_table, || {
        disk.write_at(&[9; 4096], 0).expect("written");
    });
    assert_reads(&disk, 0, 9);
}

/// Its slot becomes another block's.
#[test]
fn a_block_that_is_dropped_while_it_is_punched() {
    let (storage, disk, data) = with_zeros(u64::from(BLOCK) / 2);
    let is_inside = move |op: &Op| op.kind == OpKind::PunchHole && op.range.start > data.start;
    meet((&storage, &disk), is_inside, || {
        disk.discard(0, BLOCK.into()).expect("discarded");
        disk.flush().expect("flushed");
        let other = vec![9; usize_from(BLOCK.into())];
        disk.write_at(&other, 5 * u64::from(BLOCK))
            .expect("written");
    });
    assert_reads(&disk, 6 * u64::from(BLOCK) - 4096, 9);
}

#[test]
fn a_block_that_is_written_to_while_it_is_compared_with_its_parent() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = Kind { child: true, ..VHD }.file(folder.path());
    let storage = Arc::new(SimStorage::from_file(&path).expect("loaded"));
    let parents = HostParents::beside(&path, &[]);
    let disk = Disk::open_storage_with(storage.clone(), &path, &options(false), &parents);
    let disk = disk.expect("opened");
    // As in the parent.
    let block = vec![0x77; usize_from(BLOCK.into())];
    disk.write_at(&block, 0).expect("written");
    let is_second = |op: &Op| op.kind == OpKind::Read && op.range.len > 64 << 10;
    meet((&storage, &disk), is_second, || {
        disk.write_at(&[9; 4096], 0).expect("written");
    });
    assert_reads(&disk, 0, 9);
}

/// A read that has found a block's slot finds the block in it, though it was copied elsewhere and the
/// file could be cut.
#[test]
fn a_block_stays_while_it_is_read() {
    const MARK: u64 = 3333;
    for format in [Format::Vhd, Format::Vhdx] {
        let folder = tempfile::tempdir().expect("a folder");
        let kind = Kind { format, ..VHD };
        let storage = SimStorage::from_file(&kind.file(folder.path())).expect("loaded");
        let storage = Arc::new(storage);
        let disk = Disk::open_storage(storage.clone(), Path::new("raced"), &options(true));
        let disk = disk.expect("opened");
        for megabyte in 0..3 {
            disk.write_at(&[7; 1 << 20], megabyte << 20)
                .expect("written");
        }
        disk.discard(0, 1 << 20).expect("discarded");
        disk.flush().expect("flushed");
        let [copied, reading, done] = [(); 3].map(|()| Arc::new(AtomicBool::new(false)));
        let seen = [&copied, &reading, &done].map(Arc::clone);
        storage.on_op(move |_, op| match op.kind {
            // A move between its copy and its commit: a guest comes to read.
            OpKind::CopyWithin if !seen[0].swap(true, Ordering::SeqCst) => wait_for(&seen[1]),
            // It knows where the block is, and takes its time.
            OpKind::Read if op.range.len == MARK => {
                seen[1].store(true, Ordering::SeqCst);
                wait_for(&seen[2]);
            }
            _ => {}
        });
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let operation = disk.compact(&CompactOptions::default());
                let report = operation.wait().expect("compacted");
                assert!(report.blocks_moved > 0);
                done.store(true, Ordering::SeqCst);
            });
            wait_for(&copied);
            assert!(copied.load(Ordering::SeqCst), "a block moves");
            let mut found = vec![0; usize_from(MARK)];
            disk.read_at(&mut found, 5 << 19).expect("read");
            assert!(found == [7; 3333], "{format}");
        });
        storage.clear_hook();
    }
}

/// All of the first block but its first `len` bytes is zero, and that is known.
fn with_data(len: u64) -> (Arc<SimStorage>, Arc<Disk>, FileRange) {
    let (storage, disk, data) = with_zeros(u64::from(BLOCK));
    disk.discard(len, u64::from(BLOCK) - len)
        .expect("discarded");
    (storage, disk, data)
}

/// A discard that frees nothing new takes the block away if nothing in it counts as data.
fn drop_if_dead(disk: &Disk) {
    disk.discard(u64::from(BLOCK) / 2, 4096).expect("discarded");
}

/// A write that was under way before zeros were written to its place, and ends after them.
#[test]
fn data_that_outlasts_zeros_is_not_taken_for_zeros() {
    let (storage, disk, data) = with_data(4096);
    let is_data = move |op: &Op| op.kind == OpKind::Write && op.range.start == data.start;
    interrupt(
        &storage,
        is_data,
        || disk.write_at(&[9; 4096], 0).expect("written"),
        || disk.write_at(&[0; 4096], 0).expect("written"),
    );
    assert_reads(&disk, 0, 9);
    drop_if_dead(&disk);
    assert_reads(&disk, 0, 9);
}

/// A write that begins and ends between zeros and the note of them.
#[test]
fn data_that_comes_after_zeros_and_before_their_note() {
    let (storage, disk, data) = with_data(128 << 10);
    // Long zeros become a hole; then the rest is written.
    let mut zeros = vec![0; 68 << 10];
    zeros[(64 << 10)..].fill(1);
    let rest = data.start.plus(64 << 10);
    interrupt(
        &storage,
        move |op| op.kind == OpKind::Write && op.range.start == rest,
        || disk.write_at(&zeros, 0).expect("written"),
        || disk.write_at(&[9; 4096], 4096).expect("written"),
    );
    disk.discard(64 << 10, 64 << 10).expect("discarded");
    drop_if_dead(&disk);
    assert_reads(&disk, 4096, 9);
}

/// A reader of a block does not wait for zeros that are written to it, nor for a discard of a part of it.
#[test]
fn nobody_waits_for_zeros() {
    let (storage, disk, _) = with_data(256 << 10);
    let mut mixed = [1; 12 << 10];
    mixed[4096..8192].fill(0);
    let acts: [(&(dyn Fn() + Sync), OpKind); 2] = [
        (
            &|| disk.write_at(&mixed, 0).expect("written"),
            OpKind::Write,
        ),
        (
            &|| disk.discard(64 << 10, 64 << 10).expect("discarded"),
            OpKind::PunchHole,
        ),
    ];
    for (act, kind) in acts {
        let started = Instant::now();
        interrupt(
            &storage,
            move |op| op.kind == kind,
            act,
            || assert_reads(&disk, 128 << 10, 5),
        );
        assert!(started.elapsed() < Duration::from_millis(400), "{kind:?}");
    }
}
