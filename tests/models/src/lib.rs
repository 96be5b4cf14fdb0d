//! Where threads meet, under a model checker: every order in which the threads of a small scenario can
//! run, as far as two switches at any place take them. `scripts/soak models` runs it.
//!
//! The code is that of the library, by its path; what it meets at ([`sync`]) is loom's.

#![cfg(test)]
#![allow(dead_code, reason = "not all of that code is called here")]

#[path = "../../../src/disk/gate.rs"]
mod gate;
#[path = "../../../src/disk/mirror.rs"]
mod mirror;
mod moves;
mod sync;
#[path = "../../../src/disk/writers.rs"]
mod writers;
mod zeros;

mod units {
    pub(crate) use vhdfs::units::{BlockIndex, FileOffset, GRANULE_SIZE, round_down, round_up};

    pub(crate) fn usize_from_u32(number: u32) -> usize {
        usize::try_from(number).expect("fits")
    }
}

use loom::sync::Arc;
use loom::thread;

use sync::{AtomicUsize, Ordering};
use units::BlockIndex;
use writers::Writers;

const BLOCK: BlockIndex = BlockIndex::new(0);

fn model(scenario: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder.check(scenario);
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
