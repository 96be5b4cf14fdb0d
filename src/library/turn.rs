//! A turn of background work on one open disk: a step, or closing it.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::agent::{Agent, FOREVER, POLL};
use super::open_disk::{DiskState, OpenDisk, Stepped};
use super::queue::Turned;
use super::turns::{After, Kind};
use crate::compact::{IdlePolicy, LastWord, Next, Outlook};
use crate::error::{ErrorKind, chain};
use crate::storage::host::Hold;
use crate::storage::host::pin::Stat;

/// After the first failure, a disk is left alone that long; after each further one, twice as long.
const AFTER_FAILURE: Duration = Duration::from_secs(60);

/// But no longer than that.
const AFTER_FAILURES: Duration = Duration::from_secs(3600);

/// The longest rest that a step asks for: what all others of its kind wait for.
const LONGEST_REST: Duration = Duration::from_secs(10);

/// How often it is looked whether a disk that was opened for writing still has children.
const WHILE_A_PARENT: Duration = Duration::from_secs(60);

/// How long a disk is left alone that has failed so many times.
pub(super) fn pause_after(failures: u32) -> Duration {
    let doubled = 2_u32.saturating_pow(failures.saturating_sub(1));
    AFTER_FAILURE.saturating_mul(doubled).min(AFTER_FAILURES)
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
    /// The last step failed.
    Failed,
    /// Nothing to do ever.
    Off,
}

impl Phase {
    /// As it is while the device rests.
    fn resting(self) -> Self {
        match self {
            Self::Working => Self::Working,
            _ => Self::Waiting,
        }
    }
}

/// What the last turn has left for the next one.
#[derive(Clone, Copy, Debug)]
pub(super) struct Turn {
    /// `None`: once something has changed, or never.
    due: Option<Instant>,
    phase: Phase,
    /// Failures since a run came to its end.
    failures: u32,
    outlook: Outlook,
    /// Whether it was logged why what filesystems call free is left.
    told: bool,
    /// As of the last turn.
    worked: bool,
    rest: Duration,
    /// What the next one will be.
    kind: Kind,
    /// It waits until others have left the file alone for long: not once a guest may write to it.
    waits_for_others: bool,
    /// It waits until the disk has no children any more.
    is_parent: bool,
}

impl Turn {
    /// Of a disk that has just been opened.
    pub(super) fn first() -> Self {
        Self {
            due: Some(Instant::now()),
            phase: Phase::Working,
            failures: 0,
            outlook: Outlook::default(),
            told: false,
            worked: false,
            rest: Duration::ZERO,
            kind: Kind::Look,
            waits_for_others: false,
            is_parent: false,
        }
    }

    fn put(&mut self, phase: Phase, wait: Duration) {
        (self.phase, self.due) = (phase, Some(Instant::now() + wait.min(FOREVER)));
        (self.waits_for_others, self.is_parent) = (false, false);
    }

    /// As [`Self::put`], for a step: if its guest may be idle earlier, that is looked at then.
    fn put_step(&mut self, phase: Phase, wait: Duration) {
        self.put(phase, wait);
        if let Kind::Busy(until) = self.kind {
            self.due = self.due.map(|due| due.min(until));
        }
    }

    #[cfg(test)]
    pub(super) fn is_waiting(&self) -> bool {
        self.phase == Phase::Waiting && self.due.is_some()
    }

    fn is_due(&self, now: Instant) -> bool {
        self.due.is_some_and(|due| due <= now)
    }
}

impl Agent {
    /// A turn of that disk; `None` once it is closed.
    pub(super) fn disk_turn(&self, disk: &Arc<OpenDisk>) -> Option<Turned> {
        disk.disk()?;
        let mut turn = *disk.turn.lock();
        (turn.worked, turn.rest, turn.kind) = (false, Duration::ZERO, Kind::Look);
        self.look_at_room(&disk.device, &disk.path(), || disk.pinned.space());
        if disk.is_wanted() && self.let_in(disk) {
            return None;
        }
        if disk.is_to_go() && self.close(disk).is_some() {
            return None;
        }
        if let Phase::Settled { io_count } = turn.phase
            && (disk.is_to_look_again() || io_count != disk.io_count())
        {
            turn.put(Phase::Working, Duration::ZERO);
        }
        if turn.waits_for_others && disk.has_writers() {
            // It is its guest's now.
            turn.put(Phase::Working, Duration::ZERO);
        }
        let now = Instant::now();
        let closes = self.closes_at(disk, &turn, now);
        if turn.is_due(now) || closes.is_some_and(|due| due <= now) {
            if self.close_if_unused(disk, &turn) {
                return None;
            }
            self.take_turn(disk, &mut turn);
            // A visit keeps the file until it is closed, which is at once, or until somebody comes.
            let visits = disk.is_visiting() && disk.users() == 0;
            if turn.phase != Phase::Working && !visits {
                disk.let_in();
            }
        }
        self.after(disk, turn)
    }

    /// A turn of that disk has ended in a panic, which has been told.
    pub(super) fn disk_failed(&self, disk: &Arc<OpenDisk>) -> Option<Turned> {
        disk.disk()?;
        let mut turn = *disk.turn.lock();
        self.fail(disk, &mut turn, "a panic".to_owned());
        self.after(disk, turn)
    }

    fn after(&self, disk: &Arc<OpenDisk>, turn: Turn) -> Option<Turned> {
        *disk.turn.lock() = turn;
        let now = Instant::now();
        let closes = self.closes_at(disk, &turn, now);
        let after = After {
            due: turn.due.into_iter().chain(closes).min(),
            worked: turn.worked,
            rest: turn.rest,
            kind: turn.kind,
            outlook: turn.outlook,
        };
        Some(Turned {
            after,
            holds: disk.holds_lease(),
        })
    }

    /// Lets in the program that waits for a file that is being worked on. Whether the disk is closed now.
    fn let_in(&self, disk: &Arc<OpenDisk>) -> bool {
        let path = disk.path();
        if disk.is_wanted_to_read() {
            log::debug!("{}: another program reads it", path.display());
            disk.let_in();
            return false;
        }
        log::info!(
            "{}: left to another program, which opens it for writing",
            path.display()
        );
        self.forget_look(disk.identity);
        self.search_soon();
        let is_closed = self.close(disk).is_some();
        if !is_closed {
            // A guest has come.
            disk.let_in();
        }
        is_closed
    }

    fn close(&self, disk: &OpenDisk) -> Option<Stat> {
        let was_visiting = disk.is_visiting();
        let stat = (self.core.disks).close_unused(&self.core.probes, &disk.identity)?;
        if was_visiting {
            self.visit_is_over(&disk.device);
        }
        Some(stat)
    }

    /// When the disk is closed if nobody uses it until then.
    fn closes_at(&self, disk: &OpenDisk, turn: &Turn, now: Instant) -> Option<Instant> {
        if disk.users() > 0 {
            return None;
        }
        let patience = match turn.phase {
            Phase::Working => return None,
            Phase::Settled { .. } | Phase::Failed | Phase::Off if disk.is_visiting() => {
                Duration::ZERO
            }
            Phase::Settled { .. } | Phase::Failed | Phase::Off => self.linger,
            Phase::Waiting if turn.is_parent && disk.is_visiting() => Duration::ZERO,
            // Its children may open it, then.
            Phase::Waiting if turn.is_parent => self.linger,
            // It is as it was found; if it changes no more, it is visited.
            Phase::Waiting if !disk.was_written() && !disk.is_visiting() => self.linger,
            // Work that has waited that long for a disk nobody uses will not come to anything.
            Phase::Waiting => {
                let idle_after = (self.policy.as_ref()).map_or(Duration::ZERO, |p| p.idle_after);
                self.linger + idle_after.saturating_mul(4) + Duration::from_secs(30)
            }
        };
        Some(now + patience.saturating_sub(disk.unused_for()))
    }

    fn close_if_unused(&self, disk: &OpenDisk, turn: &Turn) -> bool {
        let now = Instant::now();
        if (self.closes_at(disk, turn, now)).is_none_or(|due| due > now) {
            return false;
        }
        let lacks_room = disk.lacks_room.load(Ordering::Relaxed);
        // A guest may have come, and gone again, since the last step.
        let done = match turn.phase {
            Phase::Settled { io_count } => io_count == disk.io_count(),
            // Not for ever, where only somebody else's use of it was the reason.
            Phase::Off => !disk.may_become_writable(),
            // Once there is room again it is worth another visit.
            Phase::Waiting if disk.is_visiting() => lacks_room,
            Phase::Working | Phase::Waiting | Phase::Failed => false,
        };
        let Some(stat) = self.close(disk) else {
            return false;
        };
        match done {
            true => {
                let too_little = disk.too_little.load(Ordering::Relaxed) > 0;
                self.finish(&stat, too_little || lacks_room);
            }
            // What is left is for a visit.
            false => self.search_soon(),
        }
        true
    }

    fn take_turn(&self, disk: &Arc<OpenDisk>, turn: &mut Turn) {
        let now = Instant::now();
        let policy = self.policy.as_ref().filter(|_| !disk.is_read_only());
        let (Some(policy), true) = (policy, turn.phase != Phase::Off) else {
            (turn.phase, turn.due) = (Phase::Off, None);
            return;
        };
        if disk.users() > 0 && disk.end_visit() {
            self.visit_is_over(&disk.device);
        }
        if self.family().is_parent(&disk.identity) {
            // Nothing is kept for a run that may never go on. The child may be gone some time.
            disk.start_over();
            turn.put(Phase::Waiting, WHILE_A_PARENT);
            turn.is_parent = true;
            return disk.set_state(DiskState::Open);
        }
        let io_count = disk.io_count();
        match turn.phase {
            Phase::Settled { .. } => return self.settle(disk, turn, io_count),
            Phase::Failed if !turn.is_due(now) => return,
            Phase::Failed => disk.start_over(),
            Phase::Working | Phase::Waiting | Phase::Off => {}
        }
        let mut policy = *policy;
        policy.fs_aware = policy.fs_aware && self.may_give_up_free(disk, turn);
        if disk.is_visiting() {
            // Nobody used it before we came.
            policy.idle_after = Duration::ZERO;
        }
        let idle_after = policy.idle_after;
        // Else the guests that have it open may write to it, and it is theirs.
        let is_alone = !disk.has_writers();
        if is_alone && let Some(wait) = self.wait_for_others(disk, &mut policy) {
            turn.put(Phase::Waiting, wait);
            turn.waits_for_others = true;
            return disk.set_state(DiskState::Waiting);
        }
        let active_for = idle_after.saturating_sub(disk.idle_for());
        turn.kind = match active_for.is_zero() {
            true => Kind::Idle,
            false => Kind::Busy(now + active_for),
        };
        if let Some(wait) = disk.device.queue.rest(turn.kind) {
            // The device has done its share.
            return turn.put_step(turn.phase.resting(), wait);
        }
        let go_on = || !self.core.bell.is_stopped();
        let last_word = self.last_word(disk);
        if let Some(stepped) = disk.step(&policy, &self.core.probes, &go_on, &last_word) {
            self.follow(disk, turn, stepped, io_count);
        }
    }

    /// What follows from a step that began at `io_count` guest requests.
    fn follow(&self, disk: &Arc<OpenDisk>, turn: &mut Turn, stepped: Stepped, io_count: u64) {
        (turn.worked, turn.outlook) = (stepped.worked, stepped.outlook);
        match stepped.next {
            Next::Again => {
                turn.put(Phase::Working, Duration::ZERO);
                disk.set_state(DiskState::Compacting);
            }
            // A run that rests keeps the file.
            Next::Wait(wait) if stepped.is_running => {
                turn.put_step(Phase::Working, wait);
                if stepped.worked {
                    turn.rest = wait.min(LONGEST_REST);
                }
                disk.set_state(DiskState::Compacting);
            }
            Next::Wait(wait) => {
                turn.put(Phase::Waiting, wait);
                disk.set_state(DiskState::Waiting);
            }
            Next::Done => {
                turn.failures = 0;
                self.has_recovered(disk.identity);
                disk.set_state(DiskState::Compact);
                // What came between two steps may not have been found.
                self.settle(disk, turn, stepped.seen.unwrap_or(io_count));
            }
            Next::Failed(error) if error.kind() == ErrorKind::NotCompactable => {
                (turn.phase, turn.due) = (Phase::Off, None);
                disk.set_state(DiskState::Open);
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
                self.fail(disk, turn, reason);
            }
        }
        if turn.phase != Phase::Working {
            turn.kind = Kind::Look;
        }
    }

    /// Until a guest changes it.
    fn settle(&self, disk: &OpenDisk, turn: &mut Turn, io_count: u64) {
        let has_changed = !disk.wait_for_change(io_count);
        turn.phase = Phase::Settled { io_count };
        turn.due = has_changed.then(Instant::now);
    }

    fn fail(&self, disk: &OpenDisk, turn: &mut Turn, reason: String) {
        turn.failures = self.has_failed(disk.identity, turn.failures);
        turn.put(Phase::Failed, pause_after(turn.failures));
        disk.set_state(DiskState::Failed(reason));
    }

    /// Whether no child of the disk, wherever it is, could read what its filesystems call free: none may
    /// be there, or none would be accepted.
    fn may_give_up_free(&self, disk: &OpenDisk, turn: &mut Turn) -> bool {
        if self.core.options.no_other_children {
            return true;
        }
        let all_read = self.family().unread.is_empty();
        if !all_read {
            self.withhold();
        }
        let nobody_fits = disk.has_new_identity();
        if !nobody_fits && !std::mem::replace(&mut turn.told, true) {
            // Of thousands that are visited, too.
            let level = match disk.is_visiting() {
                true => log::Level::Debug,
                false => log::Level::Info,
            };
            log::log!(
                level,
                "{}: what its filesystems call free stays: a disk over it may be elsewhere, and would still be \
                 accepted",
                disk.path().display()
            );
        }
        all_read && nobody_fits
    }

    /// Whether what is free may go from that disk, as of a look at the tree that begins when it is asked.
    pub(super) fn last_word(&self, disk: &OpenDisk) -> LastWord {
        let (core, disk) = (Arc::downgrade(&self.core), disk.identity);
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
        let idle = disk.idle_for();
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
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_with_failures() {
        let pauses = [1, 2, 3, 6, 7, 100].map(|failures| pause_after(failures).as_secs());
        assert_eq!(pauses, [60, 120, 240, 1920, 3600, 3600]);
    }
}
