//! Where threads meet, under a model checker: every order in which the threads of a small scenario can
//! run, as far as two switches at any place take them. `scripts/soak models` runs it.
//!
//! The code is that of the library, by its path; what it meets at ([`sync`]) is loom's.

#![cfg(test)]
#![allow(dead_code, reason = "not all of that code is called here")]

#[path = "../../../src/disk/gate.rs"]
mod gate;
mod sync;
#[path = "../../../src/disk/writers.rs"]
mod writers;

mod units {
    pub(crate) use vhdfs::units::BlockIndex;

    pub(crate) fn usize_from_u32(number: u32) -> usize {
        usize::try_from(number).expect("fits")
    }
}

use loom::sync::Arc;
use loom::thread;

use gate::Gates;
use sync::{AtomicUsize, Ordering};
use units::BlockIndex;
use writers::Writers;

fn model(scenario: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder.check(scenario);
}

/// A disk of one block, which is in the first of two slots.
struct Disk {
    gates: std::sync::Arc<Gates>,
    /// The slot of the block.
    map: AtomicUsize,
    slots: [AtomicUsize; 2],
}

const BLOCK: BlockIndex = BlockIndex::new(0);

impl Disk {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            gates: std::sync::Arc::new(Gates::new(1)),
            map: AtomicUsize::new(0),
            slots: [AtomicUsize::new(0), AtomicUsize::new(0)],
        })
    }

    /// As a guest's write does it.
    fn write(&self, value: usize) {
        let _gate = self.gates.shared(BLOCK);
        self.gates.touch(BLOCK);
        let slot = self.map.load(Ordering::Acquire);
        self.slots[slot].store(value, Ordering::Relaxed);
    }

    fn read(&self) -> usize {
        let _gate = self.gates.shared(BLOCK);
        self.slots[self.map.load(Ordering::Acquire)].load(Ordering::Relaxed)
    }

    /// As compaction moves a block: the copy without the gate, the rest under it.
    fn relocate(&self) {
        let watch = self.gates.watch(BLOCK);
        let copied = self.slots[0].load(Ordering::Relaxed);
        self.slots[1].store(copied, Ordering::Relaxed);
        let _gate = self.gates.exclusive(BLOCK);
        if !watch.is_touched() {
            self.map.store(1, Ordering::Release);
        }
    }
}

#[test]
fn no_write_is_lost_while_a_block_moves() {
    model(|| {
        let disk = Disk::new();
        let guest = thread::spawn({
            let disk = Arc::clone(&disk);
            move || {
                disk.write(1);
                assert_eq!(disk.read(), 1);
                disk.write(2);
            }
        });
        disk.relocate();
        guest.join().unwrap();
        assert_eq!(disk.read(), 2);
    });
}

#[test]
fn two_guests_while_a_block_moves() {
    model(|| {
        let disk = Disk::new();
        let guests = [1, 2].map(|value| {
            let disk = Arc::clone(&disk);
            thread::spawn(move || disk.write(value))
        });
        disk.relocate();
        for guest in guests {
            guest.join().unwrap();
        }
        assert_ne!(disk.read(), 0);
    });
}

/// A scan that finds zeros notes them, unless somebody wrote meanwhile.
#[test]
fn nothing_written_is_noted_as_zero() {
    model(|| {
        let disk = Disk::new();
        let guest = thread::spawn({
            let disk = Arc::clone(&disk);
            move || disk.write(1)
        });
        let is_zero = {
            let watch = disk.gates.watch(BLOCK);
            let found = disk.slots[0].load(Ordering::Relaxed) == 0;
            let gate = disk.gates.exclusive(BLOCK);
            let is_zero = found && !watch.is_touched();
            // What is noted holds as long as the gate is held.
            assert!(!is_zero || disk.slots[0].load(Ordering::Relaxed) == 0);
            drop(gate);
            is_zero
        };
        guest.join().unwrap();
        assert!(is_zero || disk.read() == 1);
    });
}

#[test]
fn nobody_writes_where_writers_are_kept_out() {
    model(|| {
        let writers = Arc::new(Writers::default());
        let inside = Arc::new(AtomicUsize::new(0));
        let guests = [(); 2].map(|()| {
            let (writers, inside) = (Arc::clone(&writers), Arc::clone(&inside));
            thread::spawn(move || {
                writers.announce();
                writers.wait();
                inside.fetch_add(1, Ordering::SeqCst);
                inside.fetch_sub(1, Ordering::SeqCst);
                writers.end();
            })
        });
        if let Some(_turn) = writers.keep_out() {
            for _ in 0..2 {
                assert_eq!(inside.load(Ordering::SeqCst), 0);
            }
        }
        for guest in guests {
            guest.join().unwrap();
        }
        assert!(writers.none());
    });
}
