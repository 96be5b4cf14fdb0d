//! Blocks that move while they are written to.

use std::sync::atomic::{AtomicBool, Ordering};

use super::*;
use crate::disk::Twin;
use crate::image::MapEdit;
use crate::storage::sim::{Effect, Fault, OpKind};
use crate::units::{BlockIndex, FileRange};

const BLOCK: BlockIndex = BlockIndex::new(2);
const PIECE: u64 = 256 << 10;

/// A disk whose third block is to move, and where to.
struct Moving {
    storage: Arc<SimStorage>,
    disk: Arc<Disk>,
    twin: Twin,
    from: FileOffset,
    to: FileOffset,
}

impl Moving {
    fn new(format: Format) -> Self {
        let (storage, disk) = full(format, DiskType::Dynamic);
        disk.discard(0, MIB).unwrap();
        disk.flush().unwrap();
        let to = disk.image.reserve().unwrap();
        let from = disk.image.map().get(BLOCK).slot().unwrap();
        let twin = Twin::new(&disk, BLOCK, from, to).unwrap();
        Self {
            storage,
            disk,
            twin,
            from,
            to,
        }
    }

    fn copy_all(&self) {
        while self.twin.copy(&self.disk, PIECE, false).unwrap() > 0 {}
    }

    fn write(&self, byte: u8, within: u64, len: u64) {
        let data = vec![byte; usize_from(len)];
        self.disk.write_at(&data, 2 * MIB + within).unwrap();
    }

    fn slots(&self) -> [Vec<u8>; 2] {
        let len = self.disk.geometry().slot.len;
        [self.from, self.to].map(|slot| in_file(&self.storage, slot, len))
    }

    fn commit(&self) {
        let _gate = self.disk.gates.exclusive(BLOCK);
        assert!(self.twin.is_whole(&self.disk));
        let (block, to) = (BLOCK, self.to);
        self.disk
            .image
            .commit(&[MapEdit::Move { block, to }])
            .unwrap();
    }
}

#[test]
fn what_is_written_meanwhile_is_in_both() {
    for format in [Format::Vhd, Format::Vhdx] {
        let moving = Moving::new(format);
        let (disk, twin) = (&moving.disk, &moving.twin);
        moving.write(1, 3 * PIECE, 5000);
        assert_eq!(twin.copy(disk, PIECE, true).unwrap(), PIECE);
        // Where it was copied, across the place that the copier has come to, and beyond.
        moving.write(2, 100, 5000);
        moving.write(3, PIECE - 5000, 10_000);
        moving.write(4, 2 * PIECE, 5000);
        // Zeros: among data, alone, as a hole; and a discard.
        let mut mixed = vec![5; 12 << 10];
        mixed[4096..8192].fill(0);
        disk.write_at(&mixed, 2 * MIB + (16 << 10)).unwrap();
        moving.write(0, 40 << 10, 4096);
        moving.write(0, 64 << 10, 64 << 10);
        disk.discard(2 * MIB + (128 << 10), 50_000).unwrap();
        assert!(!twin.is_whole(disk));
        moving.copy_all();
        moving.write(6, MIB - 4096, 4096);
        let [old, new] = moving.slots();
        assert!(old == new, "{format}");
        let before = read(disk, 2 * MIB, MIB);
        assert!(twin.is_whole(disk));
        moving.commit();
        drop(moving.twin);
        assert!(read(disk, 2 * MIB, MIB) == before, "{format}");
    }
}

/// What a guest flushed is there, whenever power goes while the block moves, and nothing older.
#[test]
fn what_is_flushed_before_the_switch_is_durable_in_the_new_place() {
    for format in [Format::Vhd, Format::Vhdx] {
        let moving = Moving::new(format);
        moving.copy_all();
        moving.disk.image.sync().unwrap();
        moving.write(3, 4096, 8192);
        moving.disk.flush().unwrap();
        moving.write(4, 8192, 512);
        moving.commit();
        for choice in moving.storage.choices(8, 20, 1) {
            let crashed = Arc::new(moving.storage.crash(&mut choice.clone()));
            let disk = open(&crashed, None);
            assert!(read(&disk, 2 * MIB, 4096) == [7; 4096], "{choice:?}");
            assert!(read(&disk, 2 * MIB + 4096, 4096) == [3; 4096], "{choice:?}");
            let last = read(&disk, 2 * MIB + 8192, 512);
            assert!(last == [3; 512] || last == [4; 512], "{choice:?}");
        }
    }
}

/// The piece that is being copied is not kept from guests; what they write to it is copied again.
#[test]
fn what_is_written_to_the_piece_that_is_copied() {
    let moving = Moving::new(Format::Vhd);
    let met = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let (moving, met) = (&moving, &met);
        let (sender, receiver) = std::sync::mpsc::channel();
        let (done, is_done) = std::sync::mpsc::channel();
        let (sender, is_done) = (
            parking_lot::Mutex::new(sender),
            parking_lot::Mutex::new(is_done),
        );
        let first = AtomicBool::new(true);
        moving.storage.on_op(move |_, op| {
            if op.kind == OpKind::CopyWithin && first.swap(false, Ordering::SeqCst) {
                sender.lock().send(()).unwrap();
                is_done.lock().recv().unwrap();
            }
        });
        scope.spawn(move || {
            receiver.recv().unwrap();
            moving.write(1, 4096, 4096);
            met.store(true, Ordering::SeqCst);
            done.send(()).unwrap();
        });
        moving.twin.copy(&moving.disk, PIECE, false).unwrap();
    });
    assert!(met.load(Ordering::SeqCst));
    moving.storage.clear_hook();
    let log = moving.storage.take_log();
    let mut copies = log.iter().rev().filter(|op| op.kind == OpKind::CopyWithin);
    assert_eq!(copies.next().unwrap().range.len, 4096, "no more than that");
    moving.copy_all();
    let [old, new] = moving.slots();
    assert!(old == new && moving.twin.is_whole(&moving.disk));
}

/// Two writes to the same bytes reach both slots in one order.
#[test]
fn overlapping_writes_take_turns() {
    let moving = Moving::new(Format::Vhd);
    moving.copy_all();
    let (first, to) = (AtomicBool::new(true), moving.to);
    moving.storage.on_op(move |_, op| {
        let is_mirrored = op.kind == OpKind::Write && op.range.overlaps(FileRange::new(to, MIB));
        if is_mirrored && first.swap(false, Ordering::SeqCst) {
            // The other one has all the time that it needs to overtake.
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
    });
    std::thread::scope(|scope| {
        scope.spawn(|| moving.write(1, 0, 4096));
        scope.spawn(|| moving.write(2, 0, 4096));
    });
    moving.storage.clear_hook();
    let [old, new] = moving.slots();
    assert!(old == new);
}

#[test]
fn a_failed_write_to_the_copy_is_no_failure_of_the_guest() {
    let moving = Moving::new(Format::Vhdx);
    moving.copy_all();
    let mut second = Fault::next(OpKind::Write);
    second.after = 1;
    moving.storage.inject(second);
    moving.write(1, 0, 4096);
    assert!(moving.twin.is_given_up() && !moving.twin.is_whole(&moving.disk));
    moving.write(2, 4096, 4096);
    assert_eq!(read(&moving.disk, 2 * MIB, 4096), [1; 4096]);
    drop(moving.twin);
}

#[test]
fn what_is_no_change_in_place_gives_the_copy_up() {
    let fails = Moving::new(Format::Vhd);
    fails.copy_all();
    let mut fault = Fault::next(OpKind::Write);
    fault.effect = Effect::Prefix(512);
    fails.storage.inject(fault);
    assert!(fails.disk.write_at(&[1; 4096], 2 * MIB).is_err());
    assert!(fails.twin.is_given_up(), "nobody knows what was written");

    let dropped = Moving::new(Format::Vhd);
    dropped.copy_all();
    dropped.disk.discard(2 * MIB, MIB).unwrap();
    assert!(dropped.twin.is_given_up());
    let (from, to) = (dropped.from, dropped.to);
    assert!(
        Twin::new(&dropped.disk, BLOCK, from, to).is_none(),
        "it is no longer there"
    );

    let (storage, _parent, disk) = child(Format::Vhd);
    disk.write_at(&[1; 4096], 2 * MIB).unwrap();
    let from = disk.image.map().get(BLOCK).slot().unwrap();
    let to = disk.image.reserve().unwrap();
    let twin = Twin::new(&disk, BLOCK, from, to).unwrap();
    while twin.copy(&disk, PIECE, false).unwrap() > 0 {}
    disk.write_at(&[2; 4096], 2 * MIB).unwrap();
    let len = disk.geometry().slot.len;
    assert!(in_file(&storage, from, len) == in_file(&storage, to, len));
    assert!(twin.is_whole(&disk), "sectors that are there stay in place");
    disk.write_at(&[2; 4096], 2 * MIB + MIB / 2).unwrap();
    assert!(twin.is_given_up(), "the sector bitmap is another one");
}
