//! The work on one device: who waits for a turn there, and the one thread that gives it.
//!
//! A turn is I/O, and may take as long as the host likes: for ever, where it does not answer. So nobody waits for
//! a turn but the worker that has it, and no lock of the queue is held meanwhile. A worker that has not come back
//! for [`Limits::hung`] has lost the device: another one goes on with what else there is, a few times; the disk
//! whose turn it was has no other until the first worker is back, if ever.
//!
//! Workers come and go: [`Queue::hire`] says when one is needed, and who finds nothing to do for
//! [`Limits::linger`] leaves. An idle device costs nothing.

use std::collections::{BTreeSet, HashMap};
use std::hash::Hash;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, MutexGuard};

use super::agent::Bell;
use super::turns::{After, Choice, Kind, Turns};
use crate::compact::Outlook;

#[cfg(test)]
mod tests;

/// How many workers of one device may be lost to a host that does not answer.
pub(super) const MAX_STUCK: usize = 2;

/// How often it is looked whether another program wants what is held.
const LOOK: Duration = Duration::from_millis(50);

/// How long things may take.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// A turn that takes longer has lost the device.
    pub(super) hung: Duration,
    /// A worker with nothing to do leaves after that.
    pub(super) linger: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            hung: Duration::from_secs(30),
            linger: Duration::from_secs(10),
        }
    }
}

/// What a turn leaves behind.
#[derive(Clone, Copy, Debug)]
pub(super) struct Turned {
    pub(super) after: After,
    /// Whether it keeps what another program may come to want.
    pub(super) holds: bool,
}

/// What is done in a turn.
pub(super) trait Work<T>: Send + Sync {
    /// A turn of bounded work. `None` where there will be nothing more to do.
    fn turn(&self, task: &T) -> Option<Turned>;

    /// As [`Self::turn`], after one that ended in a panic.
    fn panicked(&self, task: &T) -> Option<Turned>;

    /// Whether another program waits for what the task holds. Does no I/O.
    fn is_wanted(&self, task: &T) -> bool;
}

struct Entry<T> {
    task: T,
    /// Tells it from others of the same key.
    serial: u64,
}

struct Running<K> {
    key: K,
    since: Instant,
}

/// A turn that has begun.
struct Given<K, T> {
    key: K,
    task: T,
    serial: u64,
    since: Instant,
}

struct State<K, T> {
    turns: Turns<K>,
    tasks: HashMap<K, Entry<T>>,
    /// Those that keep what another program may want.
    holding: BTreeSet<K>,
    /// Who has the device.
    worker: Option<u64>,
    running: Option<Running<K>>,
    /// Workers that have lost it.
    stuck: usize,
    serial: u64,
    stopped: bool,
}

impl<K: Copy + Ord + Hash, T> State<K, T> {
    fn next_serial(&mut self) -> u64 {
        self.serial += 1;
        self.serial
    }

    /// Those that keep what another program may want, and can have a turn: what a lost worker is at cannot.
    fn held(&self) -> impl Iterator<Item = &K> {
        let is_free = |key: &&K| !self.turns.is_running(key);
        self.holding.iter().filter(is_free)
    }
}

impl<K: Copy + Ord + Hash, T: Clone> State<K, T> {
    /// The turn of `key` that was just taken.
    fn begin(&mut self, key: K) -> Option<Given<K, T>> {
        let entry = self.tasks.get(&key)?;
        let since = Instant::now();
        let (task, serial) = (entry.task.clone(), entry.serial);
        self.running = Some(Running { key, since });
        Some(Given {
            key,
            task,
            serial,
            since,
        })
    }
}

/// Whether a queue needs a worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Need {
    /// It has one, or nothing to do.
    Nobody,
    /// Not before that time.
    At(Instant),
    /// The one of this number, who is to [work](Queue::work) now.
    Worker(u64),
}

/// All that is to be done on one device.
pub(super) struct Queue<K, T> {
    state: Mutex<State<K, T>>,
    /// For the worker: there is something new. For who waits for its end: it has left.
    changed: Condvar,
    /// Rung where a worker is needed.
    bell: Arc<Bell>,
    limits: Limits,
}

impl<K: Copy + Ord + Hash, T: Clone> Queue<K, T> {
    pub(super) fn new(bell: Arc<Bell>, limits: Limits) -> Self {
        let state = State {
            turns: Turns::new(),
            tasks: HashMap::new(),
            holding: BTreeSet::new(),
            worker: None,
            running: None,
            stuck: 0,
            serial: 0,
            stopped: false,
        };
        Self {
            state: Mutex::new(state),
            changed: Condvar::new(),
            bell,
            limits,
        }
    }

    /// One more to be looked after, or another one in its place. `holds` as in [`Turned`].
    pub(super) fn add(&self, key: K, task: T, outlook: Outlook, holds: bool) {
        self.insert(self.state.lock(), key, task, outlook, holds);
    }

    /// As [`Self::add`]; but one that has its turn stays, and has another one when that is over, if ever.
    pub(super) fn ensure(&self, key: K, task: T, outlook: Outlook) {
        let mut state = self.state.lock();
        match state.turns.is_running(&key) {
            true => drop(state.turns.wake(key, Instant::now())),
            false => self.insert(state, key, task, outlook, false),
        }
    }

    fn insert(
        &self,
        mut state: MutexGuard<'_, State<K, T>>,
        key: K,
        task: T,
        outlook: Outlook,
        holds: bool,
    ) {
        if state.stopped {
            return;
        }
        match holds {
            true => state.holding.insert(key),
            false => state.holding.remove(&key),
        };
        let serial = state.next_serial();
        let before = state.tasks.insert(key, Entry { task, serial });
        state.turns.add(key, outlook, Instant::now());
        self.call(state);
        drop(before);
    }

    /// There is nothing more to do about that one.
    pub(super) fn remove(&self, key: &K) {
        let mut state = self.state.lock();
        state.turns.remove(key);
        state.holding.remove(key);
        let gone = state.tasks.remove(key);
        drop(state);
        drop(gone);
    }

    /// Something has changed with it.
    pub(super) fn wake(&self, key: K) {
        let mut state = self.state.lock();
        if state.turns.wake(key, Instant::now()) {
            self.call(state);
        }
    }

    fn call(&self, state: MutexGuard<'_, State<K, T>>) {
        match state.worker {
            Some(_) => drop(self.changed.notify_all()),
            None => self.bell.ring(),
        }
    }

    /// No more turns are begun, and nothing is kept any more.
    pub(super) fn stop(&self) {
        let mut state = self.state.lock();
        state.stopped = true;
        let tasks = std::mem::take(&mut state.tasks);
        drop(state);
        self.changed.notify_all();
        drop(tasks);
    }

    /// Waits until the last turn is over. Whether it is.
    pub(super) fn wait_for_end(&self, until: Instant) -> bool {
        let mut state = self.state.lock();
        while state.worker.is_some() || state.stuck > 0 {
            if self.changed.wait_until(&mut state, until).timed_out() {
                return false;
            }
        }
        true
    }

    /// How long no step of that kind is to be done.
    pub(super) fn rest(&self, kind: Kind) -> Option<Duration> {
        self.state.lock().turns.rest(kind, Instant::now())
    }

    /// Whether the device does not answer.
    pub(super) fn is_stuck(&self) -> bool {
        self.state.lock().stuck > 0
    }

    /// Whether there is nobody to look after, and nobody who does.
    pub(super) fn is_empty(&self) -> bool {
        let state = self.state.lock();
        state.tasks.is_empty() && state.worker.is_none() && state.stuck == 0
    }

    /// How many threads it has.
    pub(super) fn workers(&self) -> usize {
        let state = self.state.lock();
        usize::from(state.worker.is_some()) + state.stuck
    }

    /// Takes the device from a worker that is not coming back. The task that it is at.
    pub(super) fn watch(&self, now: Instant) -> Option<T> {
        let mut state = self.state.lock();
        let running = state.running.as_ref()?;
        if now.saturating_duration_since(running.since) < self.limits.hung
            || state.stuck >= MAX_STUCK
        {
            return None;
        }
        let key = running.key;
        (state.worker, state.running) = (None, None);
        state.stuck += 1;
        state.tasks.get(&key).map(|entry| entry.task.clone())
    }

    /// When to look again whether its worker comes back.
    pub(super) fn watched_until(&self, now: Instant) -> Option<Instant> {
        let state = self.state.lock();
        state.worker.filter(|_| state.stuck < MAX_STUCK)?;
        let since = state.running.as_ref().map_or(now, |running| running.since);
        Some(since + self.limits.hung)
    }

    /// Whether it needs a worker; who is named has the device from now on.
    pub(super) fn hire(&self, now: Instant) -> Need {
        let mut state = self.state.lock();
        if state.worker.is_some() || state.stopped {
            return Need::Nobody;
        }
        // What is held is watched at all times.
        let is_held = state.held().next().is_some();
        match state.turns.next(now) {
            Some(at) if at > now && !is_held => Need::At(at),
            None if !is_held => Need::Nobody,
            _ => {
                let worker = state.next_serial();
                state.worker = Some(worker);
                Need::Worker(worker)
            }
        }
    }

    /// There is no thread for the worker of that number.
    pub(super) fn dismiss(&self, worker: u64) {
        let mut state = self.state.lock();
        if state.worker == Some(worker) {
            state.worker = None;
        }
        self.changed.notify_all();
    }

    /// Gives turns, as the worker of that number, until there is nothing to do, or the device is lost.
    pub(super) fn work(&self, me: u64, work: &dyn Work<T>) {
        let mut leaves = Instant::now() + self.limits.linger;
        loop {
            if let Some(given) = self.wanted(me, work) {
                self.give_turn(me, given, work);
                continue;
            }
            let mut state = self.state.lock();
            if state.stopped || state.worker != Some(me) {
                break;
            }
            let now = Instant::now();
            let next = match state.turns.take(now) {
                Choice::Turn(key) => {
                    let given = state.begin(key);
                    drop(state);
                    if let Some(given) = given {
                        self.give_turn(me, given, work);
                    }
                    leaves = Instant::now() + self.limits.linger;
                    continue;
                }
                Choice::At(at) => Some(at),
                Choice::Never => None,
            };
            let watches = state.held().next().is_some();
            if !watches && now >= leaves {
                break;
            }
            let until = if watches { now + LOOK } else { leaves };
            let until = next.map_or(until, |at| at.min(until));
            self.changed.wait_until(&mut state, until);
        }
        self.dismiss(me);
        // There may be a later turn.
        self.bell.ring();
    }

    /// One that keeps what another program waits for; its turn has begun.
    fn wanted(&self, me: u64, work: &dyn Work<T>) -> Option<Given<K, T>> {
        let held: Vec<(K, T)> = {
            let state = self.state.lock();
            state
                .held()
                .filter_map(|key| Some((*key, state.tasks.get(key)?.task.clone())))
                .collect()
        };
        let (key, _) = held.iter().find(|(_, task)| work.is_wanted(task))?;
        let mut state = self.state.lock();
        let is_ours = state.worker == Some(me) && !state.stopped;
        if is_ours && state.turns.take_that(*key) {
            return state.begin(*key);
        }
        None
    }

    fn give_turn(&self, me: u64, given: Given<K, T>, work: &dyn Work<T>) {
        let Given {
            key,
            task,
            serial,
            since,
        } = given;
        let turned = catch_unwind(AssertUnwindSafe(|| work.turn(&task)))
            .unwrap_or_else(|_| work.panicked(&task));
        let gone = {
            let mut state = self.state.lock();
            if state.worker == Some(me) {
                state.running = None;
            } else {
                state.stuck = state.stuck.saturating_sub(1);
                if state.worker.is_none() && !state.stopped {
                    state.worker = Some(me);
                }
            }
            self.conclude(&mut state, key, serial, since.elapsed(), turned)
        };
        self.changed.notify_all();
        // Not under the lock: the last reference closes a file.
        drop((gone, task));
    }

    fn conclude(
        &self,
        state: &mut State<K, T>,
        key: K,
        serial: u64,
        took: Duration,
        turned: Option<Turned>,
    ) -> Option<Entry<T>> {
        // Another one may have taken its place.
        if state.tasks.get(&key)?.serial != serial {
            return None;
        }
        state.holding.remove(&key);
        let again = || {
            state.turns.is_woken(&key).then(|| Turned {
                after: After::default(),
                holds: false,
            })
        };
        let Some(Turned { after, holds }) = turned.or_else(again) else {
            state.turns.remove(&key);
            return state.tasks.remove(&key);
        };
        if holds {
            state.holding.insert(key);
        }
        state.turns.end(key, took, after, Instant::now());
        None
    }
}
