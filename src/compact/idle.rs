//! Compaction of one disk whenever it is idle.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::execute::{Compactor, Step};
use super::{CompactError, CompactOptions, LastWord, Phase};
use crate::disk::Disk;
use crate::storage::host::PUNCH_BY_DEFAULT;

/// When an idle disk is compacted.
#[derive(Clone, Copy, Debug)]
pub struct IdlePolicy {
    /// How long the guest must have asked for nothing.
    pub idle_after: Duration,
    /// How many bytes must be there to be given back.
    pub min_reclaim: u64,
    /// Whether zeros inside live blocks are punched out of the host file.
    pub punch_holes: bool,
    /// Whether what the guest's filesystems call free is given up, too, while nobody has announced
    /// writing: see [`CompactOptions::fs_aware`]. Only of filesystems that would say on the disk that
    /// they are mounted ([`crate::guest::Rest::Unmounted`]).
    pub fs_aware: bool,
}

impl Default for IdlePolicy {
    /// 5 seconds, 16 MiB, with holes, and without asking filesystems.
    fn default() -> Self {
        Self {
            idle_after: Duration::from_secs(5),
            min_reclaim: 16 << 20,
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
    /// After this time: the guest is, or was just now, active.
    Wait(Duration),
    /// When [`Disk::io_count`] has changed: there is nothing more to do.
    Done,
    /// When [`Disk::io_count`] has changed: the compaction failed, the disk is sound.
    Failed(CompactError),
}

/// The background compaction of one disk. Whoever owns it calls [`Self::step`] from one thread.
#[derive(Debug)]
pub struct IdleWork {
    disk: Arc<Disk>,
    policy: IdlePolicy,
    /// The disk's count of changes when the present, or last, run began.
    seen: Option<u64>,
    running: Option<Compactor>,
    /// When the disk was last found idle, or busy for so long that something was done about it.
    last_turn: Instant,
    last_word: Option<LastWord>,
}

/// How many times [`IdlePolicy::idle_after`] a disk may be busy before what it freed is given back
/// to the host in place, without the file becoming shorter.
const BUSY_TURNS: u32 = 12;

impl IdleWork {
    /// Of `disk`, of which nothing is known yet.
    pub fn new(disk: Arc<Disk>, policy: IdlePolicy) -> Self {
        Self {
            disk,
            policy,
            seen: None,
            running: None,
            last_turn: Instant::now(),
            last_word: None,
        }
    }

    /// Asks `last_word` before anything goes that only filesystems call free.
    pub(crate) fn asking(mut self, last_word: LastWord) -> Self {
        self.last_word = Some(last_word);
        self
    }

    /// Goes by another policy from now on. Where that is about filesystems, all is begun anew.
    pub fn set_policy(&mut self, policy: IdlePolicy) {
        if self.policy.fs_aware != policy.fs_aware {
            self.running = None;
            self.seen = None;
        }
        self.policy = policy;
    }

    /// The disk.
    pub fn disk(&self) -> &Arc<Disk> {
        &self.disk
    }

    /// Does one bounded step, if the disk is idle and there is something to do.
    ///
    /// A guest that comes back ends the run: what was learned and done so far stays, and the next
    /// run goes on from there.
    pub fn step(&mut self) -> Next {
        self.step_while(&|| true)
    }

    /// As [`Self::step`]; where `go_on` says no, it ends early.
    pub fn step_while(&mut self, go_on: &dyn Fn() -> bool) -> Next {
        let idle = self.disk.idle_for();
        if idle < self.policy.idle_after {
            if self.running.take().is_some() {
                // It may only have read: what the run had left is still there.
                self.seen = None;
            }
            return self.busy_step(self.policy.idle_after.saturating_sub(idle));
        }
        self.last_turn = Instant::now();
        let count = self.disk.io_count();
        if self.running.is_none() && self.seen == Some(count) {
            return Next::Done;
        }
        let disk = Arc::clone(&self.disk);
        // A compaction that somebody asked for comes first.
        let Some(_only) = disk.try_turn() else {
            return Next::Wait(self.policy.idle_after.max(Duration::from_millis(100)));
        };
        match self.work(count, go_on) {
            Ok(next) => next,
            // A guest came back, or the caller has enough, in the middle of a step.
            Err(CompactError::Cancelled) => {
                self.running = None;
                self.seen = None;
                Next::Wait(self.policy.idle_after)
            }
            Err(error) => {
                self.running = None;
                self.seen = Some(count);
                Next::Failed(error)
            }
        }
    }

    /// A disk that is never idle still gives the host the space of what was discarded, now and then
    /// and a bounded part at a time.
    fn busy_step(&mut self, wait: Duration) -> Next {
        let patience = self.policy.idle_after.saturating_mul(BUSY_TURNS);
        if !self.policy.punch_holes || self.last_turn.elapsed() < patience {
            return Next::Wait(wait);
        }
        self.last_turn = Instant::now();
        if self.disk.maintenance().punchable_free() < self.policy.min_reclaim.max(1) {
            return Next::Wait(wait);
        }
        match self.disk.maintenance().punch_free() {
            Ok(_) => Next::Wait(wait),
            Err(error) => Next::Failed(error.into()),
        }
    }

    fn work(&mut self, count: u64, go_on: &dyn Fn() -> bool) -> Result<Next, CompactError> {
        let disk = Arc::clone(&self.disk);
        let mut compactor = match self.running.take() {
            Some(running) => running,
            None => {
                self.seen = Some(count);
                let options = CompactOptions {
                    punch_holes: self.policy.punch_holes,
                    // It costs reading both disks, for what is seldom there: on request only.
                    drop_identical: false,
                    fs_aware: self.policy.fs_aware && !disk.has_writers(),
                    ..CompactOptions::default()
                };
                match Compactor::new(Arc::clone(&disk), options) {
                    Err(CompactError::Fixed) => return Ok(Next::Done),
                    other => (other?.cautious())
                        .asking(self.last_word.clone())
                        .measured_from_now()?,
                }
            }
        };
        let looking = |phase| matches!(phase, Phase::Survey | Phase::Scan);
        let scanned = !looking(compactor.phase());
        let is_idle = || disk.io_count() == count && disk.idle_for() >= self.policy.idle_after;
        let step = compactor.step(&|| is_idle() && go_on() && !disk.maintenance().is_wanted())?;
        if !scanned
            && !looking(compactor.phase())
            && compactor.reclaimable() < self.policy.min_reclaim
        {
            log::debug!("{}: nothing worth compacting", disk.path().display());
            return Ok(Next::Done);
        }
        if step == Step::Done {
            if compactor.has_skipped() {
                self.seen = None;
            }
            let report = compactor.into_report()?;
            log::info!(
                "{}: compacted from {} to {} bytes ({} to {} on the host), {} blocks dropped, {} moved",
                disk.path().display(),
                report.length_before,
                report.length_after,
                report.allocated_before,
                report.allocated_after,
                report.blocks_dropped,
                report.blocks_moved,
            );
            return Ok(Next::Done);
        }
        self.running = Some(compactor);
        Ok(Next::Again)
    }
}
