//! Threads that open disks, so that none of the kernel's requests for open ones has to wait for that.
//!
//! An open may take long: it looks for children in the whole directory, on whatever is mounted there, replays
//! what was interrupted, and waits for locks. What it waits for may even need this very mount to answer.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

/// How many disks are opened at a time; all that wait for the same search share it.
const MOST: usize = 64;

/// How long a thread waits for the next.
const PATIENCE: Duration = Duration::from_secs(10);

type Job = Box<dyn FnOnce() + Send>;

/// Starts threads as they are needed.
#[derive(Default)]
pub(super) struct Openers(Arc<Shared>);

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    arrived: Condvar,
}

#[derive(Default)]
struct State {
    jobs: VecDeque<Job>,
    threads: usize,
    idle: usize,
}

impl Openers {
    /// Has `job` done, in its turn. Where there can be no thread at all, at once.
    pub(super) fn run(&self, job: Job) {
        let mut state = self.0.state.lock();
        state.jobs.push_back(job);
        if state.jobs.len() <= state.idle {
            self.0.arrived.notify_one();
            return;
        }
        if state.threads == MOST {
            return;
        }
        let shared = self.0.clone();
        let thread = std::thread::Builder::new().name("vhdfs-open".to_owned());
        if thread.spawn(move || shared.work()).is_ok() {
            state.threads += 1;
        } else if state.threads == 0 {
            let job = state.jobs.pop_back();
            drop(state);
            job.into_iter().for_each(|job| job());
        }
    }
}

impl Shared {
    fn work(&self) {
        let mut state = self.state.lock();
        loop {
            if let Some(job) = state.jobs.pop_front() {
                drop(state);
                // Its caller gets an error, and the panic has been told; the next are not to suffer.
                let _ = catch_unwind(AssertUnwindSafe(job));
                state = self.state.lock();
                continue;
            }
            state.idle += 1;
            let waited = self.arrived.wait_for(&mut state, PATIENCE);
            state.idle -= 1;
            if waited.timed_out() && state.jobs.is_empty() {
                state.threads -= 1;
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn many_are_opened_at_a_time_and_none_is_forgotten() {
        let openers = Openers::default();
        let (done, ends) = mpsc::channel();
        let gate = Arc::new(Mutex::new(()));
        let shut = gate.lock();
        for n in 0..3 * MOST {
            let (done, gate) = (done.clone(), gate.clone());
            openers.run(Box::new(move || {
                // The last of the first does not wait for those before it.
                if n != MOST - 1 {
                    drop(gate.lock());
                }
                done.send(n).unwrap();
            }));
        }
        assert_eq!(ends.recv().unwrap(), MOST - 1);
        drop(shut);
        let mut all: Vec<usize> = (1..3 * MOST).map(|_| ends.recv().unwrap()).collect();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), 3 * MOST - 1);
        assert!(openers.0.state.lock().threads <= MOST);
    }
}
