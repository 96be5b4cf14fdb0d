//! A block that moves under its guests.

use loom::sync::Arc;
use loom::thread;

use crate::gate::Gates;
use crate::mirror::Mirror;
use crate::sync::{AtomicUsize, Ordering};
use crate::units::FileOffset;
use crate::{BLOCK, model};

/// A disk of one block of two bytes, which is in the first of two slots.
struct Disk {
    gates: std::sync::Arc<Gates>,
    /// The slot of the block.
    map: AtomicUsize,
    slots: [[AtomicUsize; 2]; 2],
}

impl Disk {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            gates: std::sync::Arc::new(Gates::new(1)),
            map: AtomicUsize::new(0),
            slots: [(); 2].map(|()| [(); 2].map(|()| AtomicUsize::new(0))),
        })
    }

    /// As a guest's write does it.
    fn write(&self, byte: usize, value: usize) {
        let _gate = self.gates.shared(BLOCK);
        let part = u64::try_from(byte).unwrap()..u64::try_from(byte + 1).unwrap();
        let change = self.gates.change_in_place(BLOCK, part.clone(), None);
        let slot = self.map.load(Ordering::Acquire);
        let changing = change.mirror().and_then(|mirror| mirror.begin(part));
        self.slots[slot][byte].store(value, Ordering::Relaxed);
        if changing.is_some_and(|changing| {
            let is_due = changing.is_due();
            if is_due {
                self.slots[1 - slot][byte].store(value, Ordering::Relaxed);
            }
            is_due
        }) {
            assert_eq!(slot, 0);
        }
    }

    fn read(&self, byte: usize) -> usize {
        let _gate = self.gates.shared(BLOCK);
        self.slots[self.map.load(Ordering::Acquire)][byte].load(Ordering::Relaxed)
    }

    fn copy(&self, bytes: std::ops::Range<usize>) {
        for byte in bytes {
            let value = self.slots[0][byte].load(Ordering::Relaxed);
            self.slots[1][byte].store(value, Ordering::Relaxed);
        }
    }

    /// As compaction moves a block that nobody may write to meanwhile.
    fn relocate(&self) {
        let watch = self.gates.watch(BLOCK);
        self.copy(0..2);
        let _gate = self.gates.exclusive(BLOCK);
        if !watch.is_touched() {
            self.map.store(1, Ordering::Release);
        }
    }

    /// As compaction moves a block that is written to: says whether it did.
    fn relocate_mirrored(&self) -> bool {
        let mirror = std::sync::Arc::new(Mirror::new(FileOffset::new(1)));
        let _watch = self.gates.mirror(BLOCK, std::sync::Arc::clone(&mirror));
        for end in 1..=2 {
            let copied = mirror.copy(end, |part| {
                let place = |at| usize::try_from(at).unwrap();
                self.copy(place(part.start)..place(part.end));
                Ok::<(), ()>(())
            });
            copied.unwrap();
        }
        let _gate = self.gates.exclusive(BLOCK);
        if mirror.is_given_up() {
            return false;
        }
        for byte in 0..2 {
            let [old, new] = [0, 1].map(|slot| self.slots[slot][byte].load(Ordering::Relaxed));
            assert_eq!(old, new, "nobody sees a byte flip back");
        }
        self.map.store(1, Ordering::Release);
        mirror.close();
        true
    }
}

#[test]
fn no_write_is_lost_while_a_block_moves() {
    model(|| {
        let disk = Disk::new();
        let guest = thread::spawn({
            let disk = Arc::clone(&disk);
            move || {
                disk.write(0, 1);
                assert_eq!(disk.read(0), 1);
                disk.write(0, 2);
            }
        });
        disk.relocate();
        guest.join().unwrap();
        assert_eq!(disk.read(0), 2);
    });
}

#[test]
fn two_guests_while_a_block_moves() {
    model(|| {
        let disk = Disk::new();
        let guests = [1, 2].map(|value| {
            let disk = Arc::clone(&disk);
            thread::spawn(move || disk.write(0, value))
        });
        disk.relocate();
        for guest in guests {
            guest.join().unwrap();
        }
        assert_ne!(disk.read(0), 0);
    });
}

#[test]
fn a_block_moves_though_it_is_written_to() {
    model(|| {
        let disk = Disk::new();
        let guest = thread::spawn({
            let disk = Arc::clone(&disk);
            move || {
                disk.write(0, 1);
                disk.write(1, 2);
                assert_eq!(disk.read(0), 1);
            }
        });
        assert!(disk.relocate_mirrored());
        guest.join().unwrap();
        assert_eq!([disk.read(0), disk.read(1)], [1, 2]);
    });
}

#[test]
fn two_guests_write_the_same_while_a_block_moves() {
    model(|| {
        let disk = Disk::new();
        let guests = [1, 2].map(|value| {
            let disk = Arc::clone(&disk);
            thread::spawn(move || disk.write(0, value))
        });
        assert!(disk.relocate_mirrored());
        for guest in guests {
            guest.join().unwrap();
        }
        assert_ne!(disk.read(0), 0);
    });
}

/// What cannot be mirrored gives the move up; the slot is somebody else's then.
#[test]
fn nobody_writes_to_a_slot_that_was_given_away() {
    model(|| {
        let disk = Disk::new();
        let guest = thread::spawn({
            let disk = Arc::clone(&disk);
            move || disk.write(0, 1)
        });
        let mirror = std::sync::Arc::new(Mirror::new(FileOffset::new(1)));
        let watch = disk.gates.mirror(BLOCK, std::sync::Arc::clone(&mirror));
        let copied = mirror.copy(1, |_| {
            disk.copy(0..1);
            Ok::<(), ()>(())
        });
        copied.unwrap();
        mirror.close();
        disk.slots[1][0].store(9, Ordering::Relaxed);
        drop(watch);
        guest.join().unwrap();
        assert_eq!(disk.slots[1][0].load(Ordering::Relaxed), 9);
        assert_eq!(disk.read(0), 1);
    });
}

#[test]
fn a_block_does_not_move_that_was_changed_otherwise() {
    model(|| {
        let disk = Disk::new();
        let guest = thread::spawn({
            let disk = Arc::clone(&disk);
            move || {
                let _gate = disk.gates.exclusive(BLOCK);
                let _change = disk.gates.change(BLOCK);
                let slot = disk.map.load(Ordering::Acquire);
                disk.slots[slot][0].store(1, Ordering::Relaxed);
            }
        });
        disk.relocate_mirrored();
        guest.join().unwrap();
        assert_eq!(disk.read(0), 1);
    });
}
