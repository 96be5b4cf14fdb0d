//! Free space of the file that moves of blocks have taken as their targets, and keep over many steps: on a full host
//! it may be all that a guest could get.

use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

/// How long a guest waits for it: a bit longer than background work rests at most.
const PATIENCE: Duration = Duration::from_secs(15);

#[derive(Debug, Default)]
struct State {
    /// Batches of moves that have taken some.
    batches: usize,
    /// Who waits for them to end.
    waiting: usize,
}

/// What has been taken, and who wants it.
#[derive(Debug, Default)]
pub(super) struct Withheld {
    state: Mutex<State>,
    ended: Condvar,
}

impl Withheld {
    /// A batch begins.
    pub(super) fn begin(&self) {
        self.state.lock().batches += 1;
    }

    /// A batch has ended; what it had is free again, or in use.
    pub(super) fn end(&self) {
        let mut state = self.state.lock();
        state.batches = state.batches.saturating_sub(1);
        drop(state);
        self.ended.notify_all();
    }

    /// Whether somebody waits for the batches to end.
    pub(super) fn is_wanted(&self) -> bool {
        self.state.lock().waiting > 0
    }

    /// Has the batches that are under way end, calls `tell` once that is asked for, and waits for it. Whether there
    /// were any, and they have ended.
    pub(super) fn wait(&self, tell: impl FnOnce()) -> bool {
        let mut state = self.state.lock();
        if state.batches == 0 {
            return false;
        }
        state.waiting += 1;
        drop(state);
        tell();
        let until = Instant::now() + PATIENCE;
        let mut state = self.state.lock();
        while state.batches > 0 {
            if self.ended.wait_until(&mut state, until).timed_out() {
                break;
            }
        }
        state.waiting = state.waiting.saturating_sub(1);
        state.batches == 0
    }
}
