//! Whose turn it is on one device. Nothing here knows a clock, a thread or a disk: the time is told.
//!
//! ```text
//!               due                    take                end
//!   waiting  --------->  ready  ---------------->  running ------> waiting, asleep or gone
//!      ^                                               |
//!      '-------------- wake (asleep, waiting) <--------'
//! ```
//!
//! # The order
//! Who is ready has a deadline, which does not change while it waits: when it got ready, and the [`patience`]
//! that can be asked of it, which is the shorter the more it gives back for its work. The earliest deadline is
//! first. So
//! 1. of those that get ready together, the most bytes for the least work come first, small disks among them;
//! 2. nobody is overtaken by one that gets ready later than its deadline, and all that were before it have one
//!    [`SLICE`] each: that bounds how long anybody waits, whatever else there is to do;
//! 3. who goes on after a step keeps its place for a slice: what was begun is finished before more is begun.
//!
//! # The share of the device
//! A step may end with a rest. Until that is over no other disk of the same [`Kind`] has a step (those whose guests
//! are active are one kind, those at rest another), so that all of a kind together take the share that one may.
//! Turns of which it is not known that they are steps are given at all times: disks are closed, opened and looked at
//! meanwhile, and ask for the [rest](Turns::rest) themselves before they do more.

use std::collections::{BTreeSet, HashMap};
use std::hash::Hash;
use std::time::{Duration, Instant};

use crate::compact::Outlook;

#[cfg(test)]
mod tests;

/// What is asked of the one that gives least for most work.
pub(super) const PATIENCE: Duration = Duration::from_secs(30);

/// How much work one does before it queues up anew.
pub(super) const SLICE: Duration = Duration::from_millis(250);

/// Work that is never worth waiting for: about what it costs to look at a disk.
const SMALL: u64 = 64 << 20;

/// How long it is asked to wait for others who give back more for less work.
pub(super) fn patience(outlook: Outlook) -> Duration {
    let Outlook { gain, work } = outlook;
    let all = u128::from(work) + u128::from(gain) + u128::from(SMALL);
    let millis = PATIENCE.as_millis() * u128::from(work) / all;
    Duration::from_millis(u64::try_from(millis).unwrap_or(u64::MAX))
}

/// What is next on the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Choice<K> {
    /// A turn of that one, which now runs.
    Turn(K),
    /// Nothing before that time.
    At(Instant),
    /// Nothing until somebody is woken.
    Never,
}

/// What the next turn of somebody will be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Kind {
    /// That is for the turn to find out.
    #[default]
    Look,
    /// A step on a disk whose guest asks for nothing.
    Idle,
    /// A step on a disk whose guest counts as active until then at least.
    Busy(Instant),
}

impl Kind {
    fn index(self) -> usize {
        match self {
            Self::Look => 0,
            Self::Idle => 1,
            Self::Busy(_) => 2,
        }
    }
}

/// What follows from a turn.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct After {
    /// When the next one is to be; `None`: once it is woken.
    pub(super) due: Option<Instant>,
    /// Whether the device was used, rather than only looked whether there is something to do.
    pub(super) worked: bool,
    /// How long the device is to rest from steps of this kind.
    pub(super) rest: Duration,
    pub(super) kind: Kind,
    pub(super) outlook: Outlook,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Asleep,
    Waiting(Instant),
    /// With this deadline.
    Ready(Instant),
    Running {
        /// Woken meanwhile.
        again: bool,
    },
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    state: State,
    outlook: Outlook,
    kind: Kind,
    /// When it got ready for the slice that it has begun.
    since: Option<Instant>,
    /// How much of it is used.
    used: Duration,
}

/// All who may want a turn on one device.
#[derive(Debug)]
pub(super) struct Turns<K> {
    entries: HashMap<K, Entry>,
    waiting: BTreeSet<(Instant, K)>,
    /// Who is ready, by kind.
    ready: [Ready<K>; 3],
    /// When the guests of busy ones may have become idle.
    expiring: BTreeSet<(Instant, K)>,
}

/// Who is ready of one kind.
#[derive(Debug)]
struct Ready<K> {
    /// By their deadlines.
    keys: BTreeSet<(Instant, K)>,
    /// Until then none of them has a turn.
    rest_until: Option<Instant>,
}

impl<K: Copy + Ord> Ready<K> {
    /// Who is first, and whether it may have its turn.
    fn first(&self, now: Instant) -> Option<(Instant, K)> {
        let rests = self.rest_until.is_some_and(|until| until > now);
        self.keys.first().filter(|_| !rests).copied()
    }

    /// When one may have its turn, if there is any.
    fn next(&self, now: Instant) -> Option<Instant> {
        let until = self.rest_until.map_or(now, |until| until.max(now));
        (!self.keys.is_empty()).then_some(until)
    }
}

impl<K: Copy + Ord + Hash> Turns<K> {
    pub(super) fn new() -> Self {
        Self {
            entries: HashMap::new(),
            waiting: BTreeSet::new(),
            ready: std::array::from_fn(|_| Ready {
                keys: BTreeSet::new(),
                rest_until: None,
            }),
            expiring: BTreeSet::new(),
        }
    }

    /// One more, whose first turn is at once.
    pub(super) fn add(&mut self, key: K, outlook: Outlook, now: Instant) {
        self.remove(&key);
        let entry = Entry {
            state: State::Asleep,
            outlook,
            kind: Kind::Look,
            since: None,
            used: Duration::ZERO,
        };
        self.entries.insert(key, entry);
        self.put(key, State::Waiting(now));
    }

    pub(super) fn remove(&mut self, key: &K) {
        if self.entries.contains_key(key) {
            self.put(*key, State::Asleep);
            self.entries.remove(key);
        }
    }

    /// Something has changed: a turn now, or again after the present one. Whether that makes a difference.
    pub(super) fn wake(&mut self, key: K, now: Instant) -> bool {
        let Some(entry) = self.entries.get_mut(&key) else {
            return false;
        };
        let next = match &mut entry.state {
            State::Running { again } => return !std::mem::replace(again, true),
            State::Ready(_) if entry.kind == Kind::Look => return false,
            State::Waiting(due) if *due <= now && entry.kind == Kind::Look => return false,
            State::Ready(deadline) => State::Ready(*deadline),
            State::Waiting(due) => State::Waiting(now.min(*due)),
            State::Asleep => State::Waiting(now),
        };
        self.look(key, next);
        true
    }

    /// Who is to have a turn at `now`.
    pub(super) fn take(&mut self, now: Instant) -> Choice<K> {
        while let Some((due, key)) = self.waiting.first().copied().filter(|(due, _)| *due <= now) {
            let Some(entry) = self.entries.get_mut(&key) else {
                self.waiting.remove(&(due, key));
                continue;
            };
            let since = *entry.since.get_or_insert(due);
            let deadline = since + patience(entry.outlook);
            self.put(key, State::Ready(deadline));
        }
        while let Some((_, key)) = self
            .expiring
            .first()
            .copied()
            .filter(|(until, _)| *until <= now)
        {
            let state = self.leave(key);
            self.look(key, state);
        }
        let first = self.ready.iter().filter_map(|ready| ready.first(now)).min();
        if let Some((_, key)) = first {
            self.put(key, State::Running { again: false });
            return Choice::Turn(key);
        }
        self.next(now).map_or(Choice::Never, Choice::At)
    }

    /// Whether that one has its turn.
    pub(super) fn is_running(&self, key: &K) -> bool {
        let entry = self.entries.get(key);
        entry.is_some_and(|entry| matches!(entry.state, State::Running { .. }))
    }

    /// Whether it was woken in its turn.
    pub(super) fn is_woken(&self, key: &K) -> bool {
        let entry = self.entries.get(key);
        entry.is_some_and(|entry| entry.state == State::Running { again: true })
    }

    /// A turn of that one, out of turn; whether it is not having one already.
    pub(super) fn take_that(&mut self, key: K) -> bool {
        let is_free = self.entries.contains_key(&key) && !self.is_running(&key);
        if is_free {
            self.put(key, State::Running { again: false });
        }
        is_free
    }

    /// The turn that was taken is over.
    pub(super) fn end(&mut self, key: K, took: Duration, after: After, now: Instant) {
        let Some(entry) = self.entries.get_mut(&key) else {
            return;
        };
        let again = matches!(entry.state, State::Running { again: true });
        entry.outlook = after.outlook;
        entry.kind = after.kind;
        if after.worked {
            entry.used += took;
        }
        if !after.worked || entry.used >= SLICE {
            (entry.since, entry.used) = (None, Duration::ZERO);
        }
        if !after.rest.is_zero() {
            let ready = &mut self.ready[after.kind.index()];
            ready.rest_until = ready.rest_until.max(Some(now + after.rest));
        }
        let next = match after.due {
            _ if again => State::Waiting(now),
            Some(due) => State::Waiting(due),
            None => State::Asleep,
        };
        self.put(key, next);
    }

    /// When the next turn can be, as [`Self::take`] would say.
    pub(super) fn next(&self, now: Instant) -> Option<Instant> {
        let due = self.waiting.first().map(|(due, _)| *due);
        let idle = self.expiring.first().map(|(until, _)| *until);
        let ready = self.ready.iter().filter_map(|ready| ready.next(now));
        ready.chain(due).chain(idle).min()
    }

    /// How long no step of that kind is to be done.
    pub(super) fn rest(&self, kind: Kind, now: Instant) -> Option<Duration> {
        let until = self.ready[kind.index()].rest_until;
        Some(until.filter(|until| *until > now)? - now)
    }

    /// What is the matter with it is for its turn to find out.
    fn look(&mut self, key: K, state: State) {
        self.leave(key);
        if let Some(entry) = self.entries.get_mut(&key) {
            entry.kind = Kind::Look;
            // It has been taken from where it was.
            entry.state = State::Asleep;
        }
        self.put(key, state);
    }

    /// Takes it from where it waits. What it was in.
    fn leave(&mut self, key: K) -> State {
        let Some(entry) = self.entries.get(&key) else {
            return State::Asleep;
        };
        match entry.state {
            State::Waiting(due) => self.waiting.remove(&(due, key)),
            State::Ready(deadline) => {
                if let Kind::Busy(until) = entry.kind {
                    self.expiring.remove(&(until, key));
                }
                self.ready[entry.kind.index()].keys.remove(&(deadline, key))
            }
            State::Asleep | State::Running { .. } => false,
        };
        entry.state
    }

    fn put(&mut self, key: K, state: State) {
        self.leave(key);
        let Some(entry) = self.entries.get_mut(&key) else {
            return;
        };
        entry.state = state;
        match state {
            State::Waiting(due) => self.waiting.insert((due, key)),
            State::Ready(deadline) => {
                if let Kind::Busy(until) = entry.kind {
                    self.expiring.insert((until, key));
                }
                self.ready[entry.kind.index()].keys.insert((deadline, key))
            }
            State::Asleep | State::Running { .. } => false,
        };
    }
}
