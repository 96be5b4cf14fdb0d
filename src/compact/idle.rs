//! Compaction of one disk in the background: at full speed while it is idle, at a small share of the time
//! while its guest is active.
//!
//! A run survives the guest: what was scanned, planned and copied stays, and what the guest changes
//! meanwhile is looked at again. Nothing is begun anew unless there is something new.

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::ahead::Ahead;
use super::execute::{Budget, Compactor, Step};
use super::ledger::Ledger;
use super::pace::{Beside, LowSpace, Pace};
use super::report::Kept;
use super::{CompactError, CompactOptions, CompactReport, LastWord, Outlook, Phase};
use crate::disk::Disk;
use crate::storage::host::PUNCH_BY_DEFAULT;

/// How disks are compacted in the background.
#[derive(Clone, Copy, Debug)]
pub struct IdlePolicy {
    /// How long the guest must have asked for nothing for the disk to count as idle.
    pub idle_after: Duration,
    /// Of how much of the time work goes on while the guest is active, in hundredths; less where that makes
    /// guests slower. 0: not at all, but that the space of what was discarded is punched now and then.
    pub busy_share: u8,
    /// How many bytes must be there to be given back.
    pub min_reclaim: u64,
    /// When the host counts as about to be full: then `min_reclaim` does not count, and work beside active
    /// guests takes more and more of the time, up to a half.
    pub low_space: LowSpace,
    /// Whether zeros inside live blocks are punched out of the host file.
    pub punch_holes: bool,
    /// Whether what the guest's filesystems call free is given up, too, while nobody has announced
    /// writing: see [`CompactOptions::fs_aware`]. Only of filesystems that would say on the disk that
    /// they are mounted ([`crate::guest::Rest::Unmounted`]).
    pub fs_aware: bool,
}

impl Default for IdlePolicy {
    /// 5 seconds, 5 %, 16 MiB, a tenth of the host, with holes, and without asking filesystems.
    fn default() -> Self {
        Self {
            idle_after: Duration::from_secs(5),
            busy_share: 5,
            min_reclaim: 16 << 20,
            low_space: LowSpace::Percent(10),
            punch_holes: PUNCH_BY_DEFAULT,
            fs_aware: false,
        }
    }
}

/// When to call [`IdleWork::step`] again.
#[derive(Debug)]
pub enum Next {
    /// At once: there is more to do.
    Again,
    /// After this time: there is, or may be, more to do, and not now.
    Wait(Duration),
    /// When [`Disk::io_count`] has changed: there is nothing more to do.
    Done,
    /// When [`Disk::io_count`] has changed: the compaction failed, the disk is sound.
    Failed(CompactError),
}

/// A run under way.
#[derive(Debug)]
struct Run {
    compactor: Compactor,
    /// The disk's count of changes when it began.
    count: u64,
    begun: Instant,
    last_step: Instant,
    /// Bytes that must be there to be given back.
    least: u64,
    /// The time in which the guest was active.
    beside_guest: Duration,
    /// What its steps gave back to the host, and took of it.
    freed: Freed,
}

/// Bytes that the host got back from compaction, and those that it took for copies.
#[derive(Clone, Copy, Debug, Default)]
struct Freed {
    given: u64,
    taken: u64,
}

impl Freed {
    /// Of a step that copied so many bytes, while the host stored this before and after it. What it stores
    /// more beyond that is its guest's.
    fn of(before: u64, after: u64, copied: u64) -> Self {
        Self {
            given: before.saturating_sub(after),
            taken: after.saturating_sub(before).min(copied),
        }
    }

    fn add(&mut self, other: Self) {
        self.given = self.given.saturating_add(other.given);
        self.taken = self.taken.saturating_add(other.taken);
    }

    fn net(self) -> u64 {
        self.given.saturating_sub(self.taken)
    }
}

/// The background compaction of one disk. Whoever owns it calls [`Self::step`] from one thread.
#[derive(Debug)]
pub struct IdleWork {
    disk: Arc<Disk>,
    policy: IdlePolicy,
    /// That of the host device.
    pace: Arc<Mutex<Pace>>,
    ahead: Ahead,
    /// Bytes that the last run kept ahead, or would have.
    kept: u64,
    /// The disk's count of changes when the last run began that left nothing to do.
    seen: Option<u64>,
    running: Option<Run>,
    /// The runs in a row that left something because the guest was at it, and when the next may begin.
    left: u32,
    not_before: Instant,
    /// When the disk was last found idle, or busy for so long that something was done about it.
    last_turn: Instant,
    last_word: Option<LastWord>,
    /// What the last run came to.
    report: Option<CompactReport>,
    /// Bytes that could go, where they are not worth a run.
    too_little: u64,
    /// As last estimated.
    outlook: Outlook,
    /// In all.
    freed: Freed,
    /// What moves beside guests have cost, and whether there were none in the last run for that.
    ledger: Ledger,
    held_back: bool,
    /// Whether something stayed in the last run because the host has no room to move it.
    lacks_room: bool,
}

/// How many times [`IdlePolicy::idle_after`] a disk may be busy before what it freed is given back
/// to the host in place, where nothing else is done beside its guest.
const BUSY_TURNS: u32 = 12;

/// How long after a run that left what the guest was at the next one begins; twice as long after each more, up
/// to [`LONGEST_PAUSE`].
const PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(300);

/// How long after a run for which the host had no room the next one begins.
const WITHOUT_ROOM: Duration = Duration::from_secs(30);

/// How often it is looked for something to do while something is kept ahead, or beside a guest.
const LOOK: Duration = Duration::from_secs(1);

impl IdleWork {
    /// Of `disk`, of which nothing is known yet.
    pub fn new(disk: Arc<Disk>, policy: IdlePolicy) -> Self {
        let now = Instant::now();
        Self {
            outlook: Outlook::unseen(&disk),
            disk,
            policy,
            pace: Arc::new(Mutex::new(Pace::new(policy.busy_share))),
            ahead: Ahead::new(now),
            kept: 0,
            seen: None,
            running: None,
            left: 0,
            not_before: now,
            last_turn: now,
            last_word: None,
            report: None,
            too_little: 0,
            freed: Freed::default(),
            ledger: Ledger::new(now),
            held_back: false,
            lacks_room: false,
        }
    }

    /// At the pace of all work on the disk's host device.
    pub(crate) fn at_pace(mut self, pace: Arc<Mutex<Pace>>) -> Self {
        self.pace = pace;
        self
    }

    /// Asks `last_word` before anything goes that only filesystems call free.
    pub(crate) fn asking(mut self, last_word: LastWord) -> Self {
        self.last_word = Some(last_word);
        self
    }

    /// Goes by another policy from now on. Where that is about filesystems or holes, all is
    /// begun anew.
    pub fn set_policy(&mut self, policy: IdlePolicy) {
        if self.policy.fs_aware != policy.fs_aware || self.policy.punch_holes != policy.punch_holes
        {
            self.running = None;
            self.seen = None;
            // Zeros inside blocks were of no interest before, perhaps.
            self.disk.maintenance().note_all_news();
        }
        self.policy = policy;
    }

    /// The disk.
    pub fn disk(&self) -> &Arc<Disk> {
        &self.disk
    }

    /// What the last run that came to its end did, where it had an effect or has left something, and was not
    /// taken yet.
    pub fn take_report(&mut self) -> Option<CompactReport> {
        self.report.take()
    }

    /// Bytes that could go, and are less than [`IdlePolicy::min_reclaim`].
    pub fn too_little(&self) -> u64 {
        self.too_little
    }

    /// As after so many bytes that were moved for nothing.
    #[cfg(test)]
    pub(crate) fn owe(&mut self, bytes: u64) {
        self.ledger.note(Instant::now(), bytes, 0);
    }

    /// Whether something stays only because the host has no room to move it.
    pub(crate) fn lacks_room(&self) -> bool {
        self.lacks_room
    }

    /// Bytes that the host has got back so far, less what it had to give for that.
    pub(crate) fn freed(&self) -> u64 {
        self.freed.net()
    }

    /// Whether a run is under way.
    pub(crate) fn is_running(&self) -> bool {
        self.running.is_some()
    }

    /// The count of changes that the last run knows of; `None` where another one may find more.
    pub(crate) fn seen(&self) -> Option<u64> {
        self.seen
    }

    /// What there is to be gained, as far as is known.
    pub(crate) fn outlook(&self) -> Outlook {
        let run = self.running.as_ref();
        run.map_or(self.outlook, |run| {
            self.outlook.after(run.compactor.progress())
        })
    }

    /// Does one bounded step, if it is time for it and there is something to do.
    pub fn step(&mut self) -> Next {
        self.step_while(&|| true)
    }

    /// As [`Self::step`]; where `go_on` says no, it ends early.
    pub fn step_while(&mut self, go_on: &dyn Fn() -> bool) -> Next {
        let now = Instant::now();
        let (count, idle) = (self.disk.io_count(), self.disk.idle_for());
        let beside = match idle >= self.policy.idle_after {
            true => Beside::Nobody,
            false => Beside::Guest,
        };
        self.observe(now);
        if beside == Beside::Nobody {
            self.last_turn = now;
        } else if self.policy.busy_share == 0 {
            return self.busy_step(self.policy.idle_after.saturating_sub(idle));
        }
        // Less is kept ahead, or less is worth a run, than when it was looked last.
        let may_move = beside == Beside::Nobody || self.ledger.allows(now);
        let is_more = self.spare_wanted() < self.kept
            || self.too_little > 0 && self.too_little >= self.min_reclaim()
            || self.held_back && may_move;
        if self.running.is_none() && self.seen == Some(count) && !is_more {
            return self.rest(now);
        }
        if self.running.is_none() && now < self.not_before {
            return Next::Wait(self.not_before - now);
        }
        let disk = Arc::clone(&self.disk);
        // A compaction that somebody asked for comes first.
        let Some(_only) = disk.try_turn() else {
            return Next::Wait(self.policy.idle_after.max(Duration::from_millis(100)));
        };
        match self.work(now, count, beside, go_on) {
            Ok(next) => next,
            Err(error) => {
                self.running = None;
                self.seen = Some(count);
                Next::Failed(error)
            }
        }
    }

    /// Takes in what guests asked for since the last call.
    fn observe(&mut self, now: Instant) {
        let reading = self.disk.meter().take();
        let slots = reading
            .allocated
            .saturating_mul(self.disk.geometry().slot.len);
        self.ahead.note(now, slots, self.policy.idle_after);
        let last_request = self.disk.meter().activity().last_request();
        let idle_after = self.policy.idle_after;
        (self.pace.lock()).observe(now, &reading, last_request, idle_after);
    }

    /// Bytes that are to stay free at the end of the file, if its blocks can come to need them: none once nobody
    /// may write.
    fn spare_wanted(&self) -> u64 {
        if !self.disk.has_writers() {
            return 0;
        }
        let slots = self.disk.maintenance().present_count();
        self.ahead
            .spare(slots.saturating_mul(self.disk.geometry().slot.len))
    }

    fn spare(&self) -> u64 {
        let disk = self.disk.maintenance();
        let absent = u64::from(disk.block_count()).saturating_sub(disk.present_count());
        let most = absent.saturating_mul(self.disk.geometry().slot.len);
        self.spare_wanted().min(most)
    }

    /// Where there is nothing to do: when to look again, if there may be something to do without a change of the
    /// disk, because something is kept ahead.
    fn rest(&mut self, now: Instant) -> Next {
        self.kept = self.spare_wanted();
        if self.held_back {
            return Next::Wait(self.policy.idle_after.clamp(LOOK, LOOK * 5));
        }
        match self.ahead.expires(now, self.policy.idle_after) {
            Some(wait) if self.kept > 0 => Next::Wait(wait.min(LOOK)),
            _ => Next::Done,
        }
    }

    /// Where nothing else is done beside a guest: the host still gets the space of what was discarded, now and
    /// then and a bounded part at a time.
    fn busy_step(&mut self, wait: Duration) -> Next {
        if let Some(run) = &mut self.running {
            // The guest would write to both places of a block for as long as it is active.
            run.compactor.let_go();
        }
        let patience = self.policy.idle_after.saturating_mul(BUSY_TURNS);
        if !self.policy.punch_holes || self.last_turn.elapsed() < patience {
            return Next::Wait(wait);
        }
        self.last_turn = Instant::now();
        if self.disk.maintenance().punchable_free() < self.min_reclaim().max(1) {
            return Next::Wait(wait);
        }
        let before = self.disk.allocated_bytes();
        let punched = self.disk.maintenance().punch_free(u64::MAX);
        if let (Ok(before), Ok(after)) = (before, self.disk.allocated_bytes()) {
            self.freed.add(Freed::of(before, after, 0));
        }
        match punched {
            Ok(_) => Next::Wait(wait),
            Err(error) => Next::Failed(error.into()),
        }
    }

    /// Bytes that must be there to be given back: any, on a host that is about to be full.
    fn min_reclaim(&self) -> u64 {
        match self.pace.lock().is_urgent() {
            true => 1,
            false => self.policy.min_reclaim,
        }
    }

    fn begin(&mut self, now: Instant, count: u64) -> Result<Run, CompactError> {
        self.held_back = false;
        let options = CompactOptions {
            punch_holes: self.policy.punch_holes,
            // It costs reading both disks, for what is seldom there: on request only.
            drop_identical: false,
            fs_aware: self.policy.fs_aware && !self.disk.has_writers(),
            ..CompactOptions::default()
        };
        let compactor = Compactor::new(Arc::clone(&self.disk), options)?;
        Ok(Run {
            compactor: (compactor.cautious().of_news())
                .asking(self.last_word.clone())
                .measured_from_now()?,
            count,
            begun: now,
            last_step: now,
            least: match self.spare_wanted() < self.kept {
                // What was kept ahead counted before.
                true => 1,
                false => self.min_reclaim().max(1),
            },
            beside_guest: Duration::ZERO,
            freed: Freed::default(),
        })
    }

    fn work(
        &mut self,
        now: Instant,
        count: u64,
        beside: Beside,
        go_on: &dyn Fn() -> bool,
    ) -> Result<Next, CompactError> {
        let mut run = match self.running.take() {
            Some(running) => running,
            None => match self.begin(now, count) {
                Err(CompactError::Fixed) => {
                    self.seen = Some(count);
                    return Ok(Next::Done);
                }
                begun => begun?,
            },
        };
        let looking = |phase| matches!(phase, Phase::Survey | Phase::Scan);
        let was_looking = looking(run.compactor.phase());
        let may_move = beside == Beside::Nobody || self.ledger.allows(now);
        run.compactor.allow_moves(may_move);
        let (step, pause) = self.paced_step(&mut run, beside, go_on)?;
        if was_looking && !looking(run.compactor.phase()) {
            let gain = run.compactor.reclaimable();
            self.too_little = if gain < run.least { gain } else { 0 };
            self.outlook.gain = gain;
            if gain < run.least {
                let path = self.disk.path().display();
                log::debug!("{path}: not compacted: {gain} bytes could go");
                self.seen = Some(run.count);
                self.held_back = !may_move;
                self.put_off(beside, pause);
                return Ok(self.rest(now));
            }
        }
        if step == Step::Done {
            return self.conclude(run, beside, pause);
        }
        self.running = Some(run);
        Ok(match pause {
            Some(Duration::ZERO) => Next::Again,
            Some(pause) => Next::Wait(pause),
            // Only once the disk is idle.
            None => Next::Wait(self.policy.idle_after),
        })
    }

    /// One step, and how long to do nothing after it; `None`: until the disk is idle.
    fn paced_step(
        &mut self,
        run: &mut Run,
        beside: Beside,
        go_on: &dyn Fn() -> bool,
    ) -> Result<(Step, Option<Duration>), CompactError> {
        let (disk, idle_after) = (Arc::clone(&self.disk), self.policy.idle_after);
        let budget = Budget {
            bytes: self.pace.lock().budget(beside),
            beside_guest: beside == Beside::Guest,
        };
        run.compactor.keep_ahead(self.spare());
        let before = (run.compactor.bytes_done(), run.compactor.bytes_moved());
        // A guest that comes back to an idle disk finds a step as long as one of an active guest.
        let is_as_before = || beside == Beside::Guest || disk.idle_for() >= idle_after;
        let stored = disk.allocated_bytes()?;
        let activity = Arc::clone(disk.meter().activity());
        let begun = Instant::now();
        let step = {
            let _working = activity.working();
            let go_on = || is_as_before() && go_on() && !disk.maintenance().is_wanted();
            run.compactor.step(budget, &go_on)
        };
        let took = begun.elapsed();
        if beside == Beside::Guest {
            // With the pause before it.
            run.beside_guest += begun.duration_since(run.last_step) + took;
        }
        run.last_step = begun + took;
        let bytes = run.compactor.bytes_done() - before.0;
        let (copied, cut) = run.compactor.bytes_moved();
        let (copied, cut) = (copied - before.1.0, cut - before.1.1);
        let paid_for = if beside == Beside::Guest { copied } else { 0 };
        self.ledger.note(run.last_step, paid_for, cut);
        let freed = Freed::of(stored, disk.allocated_bytes()?, copied);
        run.freed.add(freed);
        self.freed.add(freed);
        let pause = self.pace.lock().after(beside, took, bytes);
        match step {
            Ok(step) => Ok((step, pause)),
            // What it had begun it goes on with.
            Err(CompactError::Cancelled) => Ok((Step::More, pause)),
            Err(error) => Err(error),
        }
    }

    /// Ends a run that has come to its end.
    fn conclude(
        &mut self,
        run: Run,
        beside: Beside,
        pause: Option<Duration>,
    ) -> Result<Next, CompactError> {
        let now = Instant::now();
        let has_skipped = run.compactor.has_skipped();
        let is_cut_short = run.compactor.is_cut_short();
        self.held_back = run.compactor.is_held_back();
        self.lacks_room = run.compactor.without_room() > 0;
        let mut report = run.compactor.into_report()?;
        // Its guest may have allocated, and dropped, meanwhile: what counts is what the run did.
        report.length_before = report.length_after.saturating_add(report.bytes_cut);
        report.allocated_before = report.allocated_after.saturating_add(run.freed.net());
        report.took = now.duration_since(run.begun);
        report.beside_guest = run.beside_guest;
        if self.held_back {
            let slot_len = self.disk.geometry().slot.len;
            let free = self.disk.maintenance().free_runs();
            let slots: u64 = free.iter().map(|run| run.len / slot_len).sum();
            let reason = "moves beside the active guest have cost much more than they gave back";
            let bytes = slots.saturating_mul(slot_len).saturating_sub(self.spare());
            if bytes > 0 {
                let reason = reason.to_owned();
                report.left.push(Kept { reason, bytes });
            }
        }
        if self.policy.fs_aware && self.disk.has_writers() {
            // What its guest has deleted and not discarded.
            let reason = "the guest has the disk open for writing";
            report.not_surveyed.get_or_insert_with(|| reason.to_owned());
        }
        let level = match report.has_effect() {
            true => log::Level::Info,
            false => log::Level::Debug,
        };
        log::log!(level, "{}: compacted {report}", self.disk.path().display());
        if report.has_effect() || !report.left.is_empty() {
            self.report = Some(report);
        }
        self.outlook = Outlook::seen(&self.disk);
        if has_skipped {
            let pause = PAUSE.saturating_mul(1 << self.left.min(16));
            self.left += 1;
            self.seen = None;
            self.not_before = now + pause.min(LONGEST_PAUSE);
            return Ok(Next::Wait(self.not_before - now));
        }
        self.left = 0;
        self.put_off(beside, pause);
        if self.lacks_room {
            self.seen = None;
            self.not_before = now + WITHOUT_ROOM;
            return Ok(Next::Wait(WITHOUT_ROOM));
        }
        if is_cut_short {
            self.seen = None;
            return Ok(Next::Wait(self.not_before.saturating_duration_since(now)));
        }
        self.seen = Some(run.count);
        Ok(self.rest(now))
    }

    /// Has the next run beside a guest, which may change the disk all the time, begin no sooner than that.
    fn put_off(&mut self, beside: Beside, pause: Option<Duration>) {
        if beside == Beside::Guest {
            self.not_before = Instant::now() + pause.unwrap_or_default().max(LOOK);
        }
    }
}
