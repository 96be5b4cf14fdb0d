//! The background work of a library: compacts disks, closes unused ones, and visits those that no guest has
//! opened.
//!
//! ```text
//! survey --> agent --(files to visit)--.        one worker for each device of the host
//!              |                       v
//!              |---(hires, watches)-> queue --(turns)--> turn.rs: a step on one disk, or closing it
//!              |                       ^     `---------> visits.rs: opening the next file
//! open, changed, unused ---(wake)------'
//! ```
//! The agent's own thread does no I/O: it asks for surveys, says what is to be visited, hires a worker where there
//! is something to do, and takes the device from one that does not come back ([`queue`](super::queue)). All that
//! touches a file (steps, closing, opening for a visit, letting others in, asking for room) is done in turns of the
//! device that the file is on, in the order of [`turns`](super::turns). So a device, or a disk, that does not answer
//! keeps nobody waiting but itself.
//!
//! A step is bounded by [`IdleWork`](crate::compact::IdleWork), and between two of them it is looked whether the
//! worker is to stop. A guest that opens a disk shares the very [`Disk`](crate::disk::Disk) that is being worked on,
//! and so never waits for more than a step.

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::Core;
use super::device::{Device, Task};
use super::family::Family;
use super::queue::{Need, Turned, Work};
use super::visits::Visits;
use crate::compact::IdlePolicy;

/// How often a file that others use is looked at.
pub(super) const POLL: Duration = Duration::from_secs(1);

/// The longest sleep: far enough away to cost nothing.
pub(super) const FOREVER: Duration = Duration::from_secs(3600);

/// How many threads do background work at most, on however many devices.
const MAX_WORKERS: usize = 64;

/// When it is tried again to start a thread.
const NO_THREAD: Duration = Duration::from_secs(5);

/// Wakes the background thread, and tells it to end.
#[derive(Debug, Default)]
pub(super) struct Bell {
    state: Mutex<BellState>,
    rung: Condvar,
}

#[derive(Debug, Default)]
struct BellState {
    rung: bool,
    stop: bool,
}

impl Bell {
    /// Something has changed: look now.
    pub(super) fn ring(&self) {
        self.state.lock().rung = true;
        self.rung.notify_one();
    }

    /// End after the current step.
    pub(super) fn stop(&self) {
        self.state.lock().stop = true;
        self.rung.notify_one();
    }

    pub(super) fn is_stopped(&self) -> bool {
        self.state.lock().stop
    }

    /// Sleeps until then, or until it is rung.
    fn sleep_until(&self, until: Instant) {
        let mut state = self.state.lock();
        while !state.rung && !state.stop {
            if self.rung.wait_until(&mut state, until).timed_out() {
                break;
            }
        }
        state.rung = false;
    }
}

/// What all background work of a library shares.
pub(super) struct Agent {
    pub(super) core: Arc<Core>,
    /// `None`: only close what is unused.
    pub(super) policy: Option<IdlePolicy>,
    pub(super) linger: Duration,
    pub(super) visits: Mutex<Visits>,
}

impl Agent {
    pub(super) fn new(core: Arc<Core>, policy: Option<IdlePolicy>, linger: Duration) -> Self {
        Self {
            core,
            policy,
            linger,
            visits: Mutex::new(Visits::new()),
        }
    }

    /// Works until the bell says stop.
    pub(super) fn run(self: Arc<Self>) {
        let bell = self.core.bell.clone();
        while !bell.is_stopped() {
            let next = self.search_if_due().min(self.staff());
            bell.sleep_until(next);
        }
    }

    /// Sees to it that each device has the worker that it needs. When to do so again at the latest.
    fn staff(self: &Arc<Self>) -> Instant {
        let now = Instant::now();
        let mut next = now + FOREVER;
        self.core.devices.forget_unused();
        let devices = self.core.devices.all();
        let mut workers: usize = devices.iter().map(|device| device.queue.workers()).sum();
        for device in &devices {
            if let Some(task) = device.queue.watch(now) {
                self.say_stuck(&task);
            }
            if workers >= MAX_WORKERS {
                next = next.min(now + POLL);
            } else {
                match device.queue.hire(now) {
                    Need::Nobody => {}
                    Need::At(at) => next = next.min(at),
                    Need::Worker(worker) if self.start(device, worker) => workers += 1,
                    Need::Worker(worker) => {
                        device.queue.dismiss(worker);
                        next = next.min(now + NO_THREAD);
                    }
                }
            }
            next = next.min(device.queue.watched_until(now).unwrap_or(next));
        }
        next
    }

    /// Starts a worker. Whether that was possible.
    fn start(self: &Arc<Self>, device: &Arc<Device>, worker: u64) -> bool {
        let (agent, its) = (Arc::clone(self), Arc::clone(device));
        let thread = std::thread::Builder::new().name("vhdfs-idle".to_owned());
        let started = thread.spawn(move || its.queue.work(worker, &*agent));
        if let Err(error) = &started {
            log::error!("background work: no thread: {error}");
        }
        started.is_ok()
    }

    fn say_stuck(&self, task: &Task) {
        let path = match task {
            Task::Disk(disk) => disk.path(),
            Task::Visits(device) => self.visited(device).unwrap_or_default(),
        };
        log::warn!(
            "{}: the host has not answered background work for half a minute; it is left alone until it does, \
             and work on others goes on",
            path.display()
        );
    }

    pub(super) fn family(&self) -> Arc<Family> {
        self.core.families.latest()
    }
}

impl Work<Task> for Agent {
    fn turn(&self, task: &Task) -> Option<Turned> {
        match task {
            Task::Disk(disk) => self.disk_turn(disk),
            Task::Visits(device) => self.visit_turn(device),
        }
    }

    fn panicked(&self, task: &Task) -> Option<Turned> {
        match task {
            Task::Disk(disk) => self.disk_failed(disk),
            Task::Visits(device) => {
                self.visits_failed(device);
                None
            }
        }
    }

    fn is_wanted(&self, task: &Task) -> bool {
        match task {
            Task::Disk(disk) => disk.is_wanted(),
            Task::Visits(_) => false,
        }
    }
}
