//! Who may write at the moment, for work that must not run beside a guest that may.

use crate::sync::{AtomicUsize, Mutex, MutexGuard, Ordering};

/// Counts those who may write, and keeps them waiting while that matters.
#[derive(Debug, Default)]
pub(crate) struct Writers {
    count: AtomicUsize,
    /// Held while something is done that a writer must not meet.
    turn: Mutex<()>,
}

impl Writers {
    /// One more, who must [wait](Self::wait) before writing.
    pub(crate) fn announce(&self) {
        self.count.fetch_add(1, Ordering::SeqCst);
    }

    /// Returns once nobody [keeps writers out](Self::keep_out).
    pub(crate) fn wait(&self) {
        drop(self.turn.lock());
    }

    /// One less.
    pub(crate) fn end(&self) {
        let before = self.count.fetch_sub(1, Ordering::SeqCst);
        debug_assert_ne!(before, 0);
    }

    /// Whether there is none.
    pub(crate) fn none(&self) -> bool {
        self.count.load(Ordering::SeqCst) == 0
    }

    /// Keeps those out who would begin now; `None` where somebody writes already. To be held for a
    /// bounded time: a guest that opens the disk waits.
    pub(crate) fn keep_out(&self) -> Option<MutexGuard<'_, ()>> {
        let turn = self.turn.lock();
        // Whoever is counted later waits for the turn.
        self.none().then_some(turn)
    }
}
