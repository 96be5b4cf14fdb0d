//! Free space of the file that moves of blocks have taken as their targets, and keep over many steps. On a full host it
//! may be all that a guest could get: then the guest takes it back, and waits for nobody's next step.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::{Condvar, Mutex, MutexGuard};

use super::{Disk, Move, Twin};

/// A block of a batch. Its target is taken.
#[derive(Debug)]
pub(super) struct Moving {
    pub(super) step: Move,
    pub(super) twin: Twin,
}

impl Moving {
    /// Leaves the block where it is. How many bytes of it were copied.
    pub(super) fn give_back(self, disk: &Disk) -> u64 {
        let copied = self.twin.copied();
        // No guest may write there any more.
        drop(self.twin);
        disk.image.give_back(self.step.to);
        copied
    }
}

/// The moves of a batch until it is concluded.
#[derive(Debug, Default)]
pub(super) struct Moves {
    /// In the order in which they are copied.
    pub(super) list: Vec<Moving>,
    /// It is being concluded: what it has taken is in use, or free, soon.
    concluding: bool,
    /// A guest has taken the targets back, of which so many bytes had been copied.
    pub(super) let_go: Option<u64>,
}

/// A batch of moves, locked while a piece is copied.
#[derive(Debug, Default)]
pub(super) struct Batch {
    moves: Mutex<Moves>,
    concluded: Condvar,
}

impl Batch {
    pub(super) fn moves(&self) -> MutexGuard<'_, Moves> {
        self.moves.lock()
    }

    /// What is left of it, to be concluded.
    pub(super) fn conclude(&self) -> Moves {
        let mut moves = self.moves.lock();
        moves.concluding = true;
        Moves {
            list: std::mem::take(&mut moves.list),
            concluding: false,
            let_go: moves.let_go,
        }
    }

    fn let_go(&self, disk: &Disk) {
        let mut moves = self.moves.lock();
        while moves.concluding {
            self.concluded.wait(&mut moves);
        }
        for moving in std::mem::take(&mut moves.list) {
            let copied = moving.give_back(disk);
            moves.let_go = Some(moves.let_go.unwrap_or_default().saturating_add(copied));
        }
    }
}

/// The batches that are under way.
#[derive(Debug, Default)]
pub(super) struct Withheld {
    batches: Mutex<Vec<Arc<Batch>>>,
    /// How many have ended.
    ended: AtomicU64,
}

impl Withheld {
    /// A batch begins.
    pub(super) fn begin(&self) -> Arc<Batch> {
        let batch = Arc::new(Batch::default());
        self.batches.lock().push(Arc::clone(&batch));
        batch
    }

    /// It has ended; what it had is free again, or in use.
    pub(super) fn end(&self, batch: &Arc<Batch>) {
        self.batches
            .lock()
            .retain(|other| !Arc::ptr_eq(other, batch));
        self.ended.fetch_add(1, Ordering::SeqCst);
        batch.moves.lock().concluding = false;
        batch.concluded.notify_all();
    }

    #[cfg(test)]
    pub(super) fn any(&self) -> bool {
        !self.batches.lock().is_empty()
    }

    /// How many batches have ended.
    pub(super) fn ended(&self) -> u64 {
        self.ended.load(Ordering::SeqCst)
    }

    /// Has all batches of `disk` let go of what they have taken: once a piece is copied, or, of one that is being
    /// concluded, once that is done. Whether there were any. No gate may be held.
    pub(super) fn let_go(&self, disk: &Disk) -> bool {
        let batches = self.batches.lock().clone();
        batches.iter().for_each(|batch| batch.let_go(disk));
        !batches.is_empty()
    }
}
