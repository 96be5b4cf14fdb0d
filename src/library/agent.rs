//! The background thread of a library: compacts idle disks, closes unused ones, and visits those
//! that no guest has opened.
//!
//! It works in rounds. In each, every disk whose turn has come gets one step, which is bounded by
//! [`IdleWork`](crate::compact::IdleWork); between steps it looks whether it is to stop. A guest
//! that opens a disk shares the very [`Disk`](crate::disk::Disk) that is being worked on, and so
//! never waits for more than a step.

use std::collections::{HashMap, HashSet, VecDeque};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use parking_lot::{Condvar, Mutex};

use super::Core;
use super::family::{Asked, Family, File, Survey};
use super::open_disk::{DiskState, OpenDisk};
use super::open_disks::{Purpose, Refused};
use crate::compact::{IdlePolicy, LastWord, Next};
use crate::error::{ErrorKind, chain};
use crate::storage::host::Hold;
use crate::storage::host::pin::{Identity, Stamp, Stat};

/// How often a disk with nothing to gain is asked whether a guest has changed it.
const POLL: Duration = Duration::from_secs(1);

/// After a failure, a disk is left alone that long.
const AFTER_FAILURE: Duration = Duration::from_secs(60);

/// How often the directory is searched for disks that have changed while nobody had them open.
const SEARCH: Duration = Duration::from_secs(60);

/// The longest sleep: far enough away to cost nothing.
const FOREVER: Duration = Duration::from_secs(3600);

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

/// Where the work on one disk stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// A step may find something to do.
    Working,
    /// The last step only said when to come again.
    Waiting,
    /// Nothing to do until the count of guest requests is another one.
    Settled { io_count: u64 },
    /// Nothing to do ever.
    Off,
}

#[derive(Clone, Copy, Debug)]
struct Turn {
    due: Instant,
    phase: Phase,
}

/// What is left of [`Stamp`] when changes that do not concern the content are left out.
type Seen = (SystemTime, u64);

fn seen(stamp: &Stamp) -> Seen {
    (stamp.modified, stamp.len)
}

/// The background thread's own memory.
pub(super) struct Agent {
    core: Arc<Core>,
    /// `None`: only close what is unused.
    policy: Option<IdlePolicy>,
    linger: Duration,
    turns: HashMap<Identity, Turn>,
    /// Files that need no visit while they look like this.
    finished: HashMap<Identity, Seen>,
    /// How other files looked when they were last seen to change or to be in use, and when that was.
    watched: HashMap<Identity, (Seen, Instant)>,
    /// What was said of files that others use.
    refused: HashMap<Identity, String>,
    to_visit: VecDeque<PathBuf>,
    visiting: Option<Identity>,
    next_search: Instant,
    /// A search that is under way.
    searching: Option<Asked>,
    /// What filesystems call free was left to disks that may have had children.
    withheld: bool,
    /// Disks of which it was logged why that is left to them.
    told: HashSet<Identity>,
}

impl Agent {
    pub(super) fn new(core: Arc<Core>, policy: Option<IdlePolicy>, linger: Duration) -> Self {
        Self {
            core,
            policy,
            linger,
            turns: HashMap::new(),
            finished: HashMap::new(),
            watched: HashMap::new(),
            refused: HashMap::new(),
            to_visit: VecDeque::new(),
            visiting: None,
            next_search: Instant::now(),
            searching: None,
            withheld: false,
            told: HashSet::new(),
        }
    }

    /// Works until the bell says stop.
    pub(super) fn run(mut self) {
        let bell = self.core.bell.clone();
        while !bell.is_stopped() {
            let next = self.round();
            bell.sleep_until(next);
        }
    }

    /// One step for every disk whose turn it is. When the next turn is.
    fn round(&mut self) -> Instant {
        let open = self.core.disks.all();
        self.turns
            .retain(|identity, _| open.iter().any(|disk| disk.identity == *identity));
        self.told
            .retain(|identity| self.turns.contains_key(identity));
        let mut next = Instant::now() + FOREVER;
        for disk in &open {
            if self.core.bell.is_stopped() {
                return next;
            }
            let now = Instant::now();
            let phase = Phase::Working;
            let mut turn = *self
                .turns
                .entry(disk.identity)
                .or_insert(Turn { due: now, phase });
            if turn.due <= now
                || self
                    .closes_at(disk, &turn, now)
                    .is_some_and(|due| due <= now)
            {
                if self.close_if_unused(disk, &turn) {
                    continue;
                }
                self.take_turn(disk, &mut turn);
                // A visit keeps the file until it is closed, which is at once, or until somebody comes.
                let visits = disk.is_visiting() && disk.users() == 0;
                if turn.phase != Phase::Working && !visits {
                    disk.let_in();
                }
                self.turns.insert(disk.identity, turn);
                for disk in open.iter().filter(|disk| disk.is_wanted()) {
                    self.let_in(disk);
                }
            }
            next = next.min(turn.due);
            if let Some(due) = self.closes_at(disk, &turn, now) {
                next = next.min(due);
            }
        }
        next.min(self.visit())
    }

    /// Lets in the program that waits for a file that is being worked on.
    fn let_in(&mut self, disk: &OpenDisk) {
        let path = disk.path();
        if disk.is_wanted_to_read() {
            log::debug!("{}: another program reads it", path.display());
            disk.let_in();
            return;
        }
        log::info!(
            "{}: left to another program, which opens it for writing",
            path.display()
        );
        self.watched.remove(&disk.identity);
        self.search_soon();
        if self.close(&disk.identity).is_none() {
            // A guest has come.
            disk.let_in();
        }
    }

    fn close(&mut self, identity: &Identity) -> Option<Stat> {
        let stat = self.core.disks.close_unused(&self.core.probes, identity)?;
        self.turns.remove(identity);
        Some(stat)
    }

    /// When the disk is closed if nobody uses it until then.
    fn closes_at(&self, disk: &OpenDisk, turn: &Turn, now: Instant) -> Option<Instant> {
        if disk.users() > 0 {
            return None;
        }
        let patience = match turn.phase {
            Phase::Working => return None,
            Phase::Settled { .. } | Phase::Off if disk.is_visiting() => Duration::ZERO,
            Phase::Settled { .. } | Phase::Off => self.linger,
            // It is as it was found; if it changes no more, it is visited.
            Phase::Waiting if !disk.was_written() && !disk.is_visiting() => self.linger,
            // Work that has waited that long for a disk nobody uses will not come to anything.
            Phase::Waiting => {
                let idle_after = self
                    .policy
                    .as_ref()
                    .map_or(Duration::ZERO, |p| p.idle_after);
                self.linger + idle_after.saturating_mul(4) + Duration::from_secs(30)
            }
        };
        Some(now + patience.saturating_sub(disk.unused_for()))
    }

    fn close_if_unused(&mut self, disk: &OpenDisk, turn: &Turn) -> bool {
        let now = Instant::now();
        if self.closes_at(disk, turn, now).is_none_or(|due| due > now) {
            return false;
        }
        // A guest may have come, and gone again, since the last step.
        let done = match turn.phase {
            Phase::Settled { io_count } => io_count == disk.io_count(),
            // Not for ever, where only somebody else's use of it was the reason.
            Phase::Off => !disk.may_become_writable(),
            Phase::Working | Phase::Waiting => false,
        };
        let Some(stat) = self.close(&disk.identity) else {
            return false;
        };
        match done {
            true => {
                self.finished.insert(stat.identity(), seen(&stat.stamp()));
            }
            // What is left is for a visit.
            false => self.search_soon(),
        }
        true
    }

    fn take_turn(&mut self, disk: &OpenDisk, turn: &mut Turn) {
        let now = Instant::now();
        let left_alone = disk.is_read_only() || self.family().is_parent(&disk.identity);
        let policy = self.policy.as_ref().filter(|_| !left_alone);
        let (Some(policy), true) = (policy, turn.phase != Phase::Off) else {
            *turn = Turn {
                due: now + FOREVER,
                phase: Phase::Off,
            };
            return;
        };
        if disk.users() > 0 {
            disk.end_visit();
        }
        let io_count = disk.io_count();
        if turn.phase == (Phase::Settled { io_count }) {
            turn.due = now + POLL;
            return;
        }
        let mut policy = *policy;
        policy.fs_aware = policy.fs_aware && self.may_give_up_free(disk);
        if disk.is_visiting() {
            // Nobody used it before we came.
            policy.idle_after = Duration::ZERO;
        }
        // Else the guests that have it open may write to it, and it is theirs.
        let is_alone = !disk.has_writers();
        if is_alone && let Some(wait) = self.wait_for_others(disk, &mut policy) {
            *turn = Turn {
                due: now + wait,
                phase: Phase::Waiting,
            };
            disk.set_state(DiskState::Waiting);
            return;
        }
        let go_on = || !self.core.bell.is_stopped();
        let last_word = self.last_word(disk.identity);
        let Some(next) = disk.step(&policy, &self.core.probes, &go_on, &last_word) else {
            return;
        };
        *turn = follow(disk, next, io_count);
    }

    /// Whether no child of the disk, wherever it is, could read what its filesystems call free: none may
    /// be there, or none would be accepted.
    fn may_give_up_free(&mut self, disk: &OpenDisk) -> bool {
        if self.core.options.no_other_children {
            return true;
        }
        let all_read = self.family().unread.is_empty();
        self.withheld |= !all_read;
        let nobody_fits = disk.has_new_identity();
        if !nobody_fits && self.told.insert(disk.identity) {
            log::info!(
                "{}: what its filesystems call free stays: a disk over it may be elsewhere, and would still be \
                 accepted",
                disk.path().display()
            );
        }
        all_read && nobody_fits
    }

    /// Whether what is free may go from that disk, as of a look at the tree that begins when it is asked.
    fn last_word(&self, disk: Identity) -> LastWord {
        let core = Arc::downgrade(&self.core);
        LastWord::new(move || {
            let Some(core) = core.upgrade() else {
                return false;
            };
            let is_vouched_for = core.options.no_other_children;
            core.families.fresh().is_some_and(|family| {
                !family.is_parent(&disk) && (is_vouched_for || family.unread.is_empty())
            })
        })
    }

    /// Takes a disk that no guest may write to for a step. Where that is not possible now: when to try again.
    fn wait_for_others(&self, disk: &OpenDisk, policy: &mut IdlePolicy) -> Option<Duration> {
        if !disk.was_written() && !disk.is_visiting() {
            policy.idle_after = policy.idle_after.max(self.core.options.quiet_time);
        }
        let idle = disk.disk().map_or(Duration::ZERO, |disk| disk.idle_for());
        if idle < policy.idle_after {
            return Some(policy.idle_after.saturating_sub(idle));
        }
        match disk.take() {
            Hold::Alone | Hold::Unknown => None,
            Hold::Others => {
                if let Some(holder) = disk.holder() {
                    let path = disk.path();
                    log::info!(
                        "{}: left alone: in use by another program ({holder})",
                        path.display()
                    );
                }
                Some(POLL)
            }
            // Until it is opened anew.
            Hold::Changed => Some(FOREVER),
        }
    }

    /// Goes on with the visits: one disk at a time. When to call again at the latest.
    fn visit(&mut self) -> Instant {
        let now = Instant::now();
        if let Some(identity) = self.visiting {
            match self.core.disks.get(&identity) {
                // The rounds look after it.
                Some(disk) if disk.is_visiting() => return now + FOREVER,
                _ => self.visiting = None,
            }
        }
        if self.to_visit.is_empty() {
            // Which rings when it is over.
            if let Some(asked) = self.searching {
                let Some(survey) = self.core.families.answer(asked) else {
                    return now + FOREVER;
                };
                self.searching = None;
                self.search(&survey);
            } else if now < self.next_search {
                return self.next_search;
            } else {
                self.next_search = now + SEARCH;
                self.searching = Some(self.core.families.ask());
                return now + FOREVER;
            }
        }
        let Some(path) = self.to_visit.pop_front() else {
            return self.next_search;
        };
        self.begin_visit(path);
        // At once: the new disk's first turn, or the next visit.
        now
    }

    fn begin_visit(&mut self, path: PathBuf) {
        let Ok(found) = self.core.find_disk(&path, &self.family()) else {
            return;
        };
        let (identity, stamp) = (found.stat.identity(), found.stat.stamp());
        if self.finished.get(&identity) == Some(&seen(&stamp)) {
            return;
        }
        match self
            .core
            .disks
            .open(&self.core.probes, found, Purpose::Visit)
        {
            Ok(_handle) => {
                self.visiting = Some(identity);
                self.refused.remove(&identity);
            }
            Err(Refused::Failed(failure)) if failure.kind == ErrorKind::InUse => {
                let before = self.refused.insert(identity, failure.reason.clone());
                if before.as_ref() != Some(&failure.reason) {
                    log::info!("{}: left alone: {}", path.display(), failure.reason);
                }
                // Quiet begins when they are done.
                let now = Instant::now();
                self.watched.insert(identity, (seen(&stamp), now));
                self.search_soon();
            }
            Err(Refused::Failed(failure)) if !failure.may_pass() => {
                // Not before it has changed.
                self.finished.insert(identity, seen(&stamp));
            }
            Err(_) => {}
        }
    }

    /// Others have a file that is to be visited once they are done.
    fn search_soon(&mut self) {
        let soon = Instant::now() + self.core.options.quiet_time.clamp(POLL, SEARCH);
        self.next_search = self.next_search.min(soon);
    }

    fn family(&self) -> Arc<Family> {
        self.core.families.latest()
    }

    /// Looks through all disks that were found for those that may be worth a visit.
    fn search(&mut self, survey: &Survey) {
        let Survey { files, family } = survey;
        let Some(policy) = self.policy.filter(|_| !self.core.options.read_only) else {
            return;
        };
        let now = Instant::now();
        if self.withheld && family.unread.is_empty() {
            self.withheld = false;
            self.finished.clear();
            for turn in self.turns.values_mut() {
                if matches!(turn.phase, Phase::Settled { .. }) {
                    (turn.phase, turn.due) = (Phase::Working, now);
                }
            }
        }
        let mut present = HashSet::new();
        for File { path, stat, .. } in files {
            let now_seen = seen(&stat.stamp());
            present.insert(stat.identity());
            let is_open = self.core.disks.get(&stat.identity()).is_some();
            if is_open || self.finished.get(&stat.identity()) == Some(&now_seen) {
                continue;
            }
            // Whoever still writes to it does not always hold a lock. By our own clock: those of the
            // file's host and of the wall may be anywhere.
            let watched = self
                .watched
                .entry(stat.identity())
                .or_insert((now_seen, now));
            if watched.0 != now_seen {
                *watched = (now_seen, now);
            }
            let quiet = match self.core.probes.is_ours(&stat.stamp()) {
                true => policy.idle_after,
                false => policy.idle_after.max(self.core.options.quiet_time),
            };
            let wait = quiet.saturating_sub(now.duration_since(watched.1));
            if !wait.is_zero() {
                self.next_search = self.next_search.min(now + wait.min(SEARCH));
            } else if !family.is_parent(&stat.identity()) {
                self.to_visit.push_back(path.clone());
            }
        }
        self.watched
            .retain(|identity, _| present.contains(identity));
        self.refused
            .retain(|identity, _| present.contains(identity));
        self.finished
            .retain(|identity, _| present.contains(identity));
    }
}

/// What follows from a step that began at `io_count` guest requests.
fn follow(disk: &OpenDisk, next: Next, io_count: u64) -> Turn {
    let now = Instant::now();
    let (state, wait, phase) = match next {
        Next::Again => (DiskState::Compacting, Duration::ZERO, Phase::Working),
        Next::Wait(wait) => (DiskState::Waiting, wait.min(FOREVER), Phase::Waiting),
        Next::Done => (DiskState::Compact, POLL, Phase::Settled { io_count }),
        Next::Failed(error) if error.kind() == ErrorKind::NotCompactable => {
            (DiskState::Open, FOREVER, Phase::Off)
        }
        Next::Failed(error) => {
            let reason = chain(&error);
            let level = match error.kind() {
                // What made it so has been told.
                ErrorKind::Poisoned => log::Level::Debug,
                _ => log::Level::Warn,
            };
            let path = disk.path();
            log::log!(level, "{}: background compaction: {reason}", path.display());
            (
                DiskState::Failed(reason),
                AFTER_FAILURE,
                Phase::Settled { io_count },
            )
        }
    };
    disk.set_state(state);
    Turn {
        due: now + wait,
        phase,
    }
}
