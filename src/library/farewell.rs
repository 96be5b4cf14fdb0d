//! The end of a library: closes all disks, on hosts that may not answer.
//!
//! Each device has a few threads that close its disks one after the other, so that the devices do not wait for each
//! other, and those of a device seldom for one disk. How long that takes says nothing: a guest may have left
//! gigabytes to be made durable. So it is waited as long as disks are closed; when none has been closed for
//! [`PATIENCE`], the host counts as one that does not answer. What is left then is as after a kill: what guests
//! flushed is safe, and what is not finished is so when the disk is opened next.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::{Core, Library};

/// How long no disk at all may be closed.
pub(super) const PATIENCE: Duration = Duration::from_secs(120);

/// How long turns are waited for that only look at something.
const LAST_TURNS: Duration = Duration::from_secs(2);

/// Threads for one device at most.
const CLOSERS: usize = 4;

#[derive(Default)]
struct Count {
    /// Threads that have not ended.
    closers: usize,
    closed: usize,
    unclean: usize,
}

#[derive(Default)]
struct Progress {
    count: Mutex<Count>,
    changed: Condvar,
}

impl Progress {
    fn note(&self, change: impl FnOnce(&mut Count)) {
        change(&mut self.count.lock());
        self.changed.notify_all();
    }

    /// Closes what is on that device.
    fn close(&self, core: &Core, device: u64) {
        while let Some(is_clean) = core.disks.close_next(&core.probes, device) {
            self.note(|count| {
                count.closed += 1;
                count.unclean += usize::from(!is_clean);
            });
        }
        self.note(|count| count.closers -= 1);
    }
}

impl Library {
    /// [`Library::close`], which gives up when no disk was closed for `patience`.
    pub(super) fn close_within(&self, patience: Duration) -> usize {
        let core = &self.core;
        core.bell.stop();
        core.devices.stop();
        let ended = core.families.end();
        let surveyor = self.surveyor.lock().take().filter(|_| ended);
        let agent = self.agent.lock().take();
        for thread in agent.into_iter().chain(surveyor) {
            if thread.join().is_err() {
                log::error!("background work ended with a panic");
            }
        }
        let patience = match self.gave_up.load(Ordering::Relaxed) {
            // It has had its time.
            true => Duration::ZERO,
            false => patience,
        };
        let (unclean, left) = close_all(core, patience);
        if left > 0 {
            if !self.gave_up.swap(true, Ordering::Relaxed) {
                log::error!(
                    "{left} disks are not closed: the host has not answered for {} s. What their guests flushed is \
                     safe; what is unfinished in the files is finished when they are opened next",
                    patience.as_secs()
                );
            }
            return unclean + left;
        }
        // Closing has waited for the steps that were under way.
        let soon = Instant::now() + LAST_TURNS;
        for device in core.devices.all() {
            device.queue.wait_for_end(soon);
        }
        unclean
    }
}

/// Closes every disk; none can be opened any more. How many were not left clean, and how many not closed when
/// none had been for `patience`.
fn close_all(core: &Arc<Core>, patience: Duration) -> (usize, usize) {
    let progress = Arc::new(Progress::default());
    for (device, disks) in core.disks.refuse() {
        for _ in 0..disks.min(CLOSERS) {
            progress.note(|count| count.closers += 1);
            let (its, shared) = (Arc::clone(&progress), Arc::clone(core));
            let thread = std::thread::Builder::new().name("vhdfs-close".to_owned());
            let started = thread.spawn(move || its.close(&shared, device));
            if let Err(error) = started {
                log::debug!("no thread to close disks with: {error}");
                progress.close(core, device);
            }
        }
    }
    let mut count = progress.count.lock();
    while count.closers > 0 {
        let (before, until) = (count.closed, Instant::now() + patience);
        while count.closers > 0 && count.closed == before {
            if progress.changed.wait_until(&mut count, until).timed_out() {
                return (count.unclean, core.disks.left());
            }
        }
    }
    (count.unclean, 0)
}
