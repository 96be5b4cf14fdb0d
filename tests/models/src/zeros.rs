//! What is noted as zero is zero whenever a block's gate is held exclusively.

use std::ops::Range;

use loom::sync::Arc;
use loom::thread;

use crate::gate::Gates;
use crate::sync::{AtomicUsize, Mutex, Ordering};
use crate::{BLOCK, model};

const ALL: Range<u64> = 0..4096;

/// A disk of one block of one granule.
struct Disk {
    gates: std::sync::Arc<Gates>,
    file: AtomicUsize,
    /// What is known of it: zero, or not.
    zero: Mutex<Option<bool>>,
}

impl Disk {
    fn new(value: usize, zero: Option<bool>) -> Arc<Self> {
        Arc::new(Self {
            gates: std::sync::Arc::new(Gates::new(1)),
            file: AtomicUsize::new(value),
            zero: Mutex::new(zero),
        })
    }

    fn note(&self, zero: bool) {
        *self.zero.lock() = Some(zero);
    }

    /// Of what is unknown, data is not noted (see the tracker).
    fn note_data(&self) {
        let mut zero = self.zero.lock();
        *zero = zero.map(|_| false);
    }

    fn write(&self, value: usize) {
        let _gate = self.gates.shared(BLOCK);
        let change = self.gates.change_in_place(BLOCK, ALL, None);
        self.note_data();
        self.file.store(value, Ordering::Relaxed);
        if change.end() {
            self.note_data();
        }
    }

    fn zero(&self) {
        let _gate = self.gates.shared(BLOCK);
        let watch = self.gates.watch_part(BLOCK, ALL);
        let change = self.gates.change_in_place(BLOCK, ALL, Some(&watch));
        self.file.store(0, Ordering::Relaxed);
        change.end();
        watch.conclude(|touched| {
            if touched.is_empty() {
                self.note(true);
            }
        });
    }

    /// As what holds zeros elsewhere, and data here.
    fn write_beside_zeros(&self, value: usize) {
        let _gate = self.gates.shared(BLOCK);
        let watch = self.gates.watch_part(BLOCK, ALL);
        let change = self.gates.change_in_place(BLOCK, ALL, Some(&watch));
        self.note_data();
        self.file.store(value, Ordering::Relaxed);
        change.end();
        self.note_data();
        drop(watch);
    }

    fn scan(&self) {
        let watch = self.gates.watch(BLOCK);
        let zero = self.file.load(Ordering::Relaxed) == 0;
        let _gate = self.gates.exclusive(BLOCK);
        if !watch.is_touched() {
            self.note(zero);
        }
    }

    fn check(&self) {
        let _gate = self.gates.exclusive(BLOCK);
        if *self.zero.lock() == Some(true) {
            assert_eq!(self.file.load(Ordering::Relaxed), 0, "what would be dropped");
        }
    }
}

fn meet(
    first: (usize, Option<bool>),
    one: impl Fn(&Disk) + Send + Sync + Copy + 'static,
    other: impl Fn(&Disk) + Send + Sync + Copy + 'static,
) {
    model(move || {
        let disk = Disk::new(first.0, first.1);
        let guests = [
            thread::spawn({
                let disk = Arc::clone(&disk);
                move || one(&disk)
            }),
            thread::spawn({
                let disk = Arc::clone(&disk);
                move || other(&disk)
            }),
        ];
        disk.check();
        for guest in guests {
            guest.join().unwrap();
        }
        disk.check();
    });
}

#[test]
fn zeros_and_data_at_the_same_place() {
    meet((1, Some(false)), |disk| disk.write(2), Disk::zero);
}

#[test]
fn zeros_and_data_where_nothing_is_known() {
    meet((1, None), |disk| disk.write(2), Disk::zero);
}

#[test]
fn zeros_and_data_beside_zeros() {
    meet((1, None), |disk| disk.write_beside_zeros(2), Disk::zero);
}

#[test]
fn zeros_twice() {
    meet((1, Some(false)), Disk::zero, Disk::zero);
}

#[test]
fn a_scan_and_data() {
    meet((0, None), |disk| disk.write(2), Disk::scan);
}

#[test]
fn a_scan_and_zeros() {
    meet((1, Some(false)), Disk::zero, Disk::scan);
}
