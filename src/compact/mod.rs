//! Compaction: dead blocks leave the block table, blocks move from the end of the file into holes,
//! the file is cut.
//!
//! ```text
//!   survey        what the guest's filesystems call free, if that is on [freed.rs, guest/]
//!    |
//!   scan          what nobody has looked at: which granules are zero
//!    |            blocks that hold what the parent has leave the table
//!    |
//!   drop          dead blocks leave the table, sync, cut the free end
//!    |
//!   plan          the last block into the first hole ...               [plan.rs, pure]
//!    |
//!   move          copy a batch, sync, commit, sync, cut
//!    |            then what blocks of metadata can move, and plan again
//!    |
//!   punch         holes for zeros inside live blocks, if that is on
//! ```
//! Fixed disks go another way: no block of theirs is dropped [fixed.rs].
//!
//! What is here decides what is done to which block, and when. How it is done beside a guest is the business
//! of the room that [`crate::disk`] has for maintenance.
//!
//! All of it runs in bounded steps beside guest I/O, and may stop after each; `execute.rs` says what a step
//! may hold up. [`Operation`] runs the steps on a thread until they are done; [`IdleWork`] runs them in the
//! background.
//!
//! # Moving a block, crash-safely
//! 1. Reserve the target: free, and named by no durable table entry.
//! 2. Have the block make a twin there: what a guest writes to it from here on goes to the copy as well, as far
//!    as it goes. What else changes the block has its move given up.
//! 3. Copy the whole slot, in pieces, and do so with the others of the batch; then sync. Both copies of each
//!    are the same; what was flushed, and what will be from here on, is durable in both.
//! 4. Under the gates of the blocks whose twins are whole, 16 at most: write the table entries, in one
//!    commit, and the map. From here on the guest writes to the copies; its next flush covers the entries.
//! 5. Sync. Only then are the old slots free, to be reused, punched or cut off.
//!
//! Any number of steps may lie between, in which guests do what they like. A cut at any point leaves an entry
//! that names the old or the new slot, each with the block's last
//! flushed content or later writes. Host space grows by at most one slot: a batch takes at most one
//! target that the host does not already store, and the file is cut before the next batch.

mod ahead;
mod execute;
mod fixed;
mod freed;
mod idle;
mod ledger;
mod outlook;
mod pace;
mod plan;
mod report;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::thread::JoinHandle;

pub use crate::error::CompactError;
pub use idle::{IdlePolicy, IdleWork, Next};
pub(crate) use outlook::Outlook;
pub(crate) use pace::Pace;
pub use pace::{LowSpace, Room};
pub use plan::{Move, Plan, plan};
pub use report::{CompactReport, Kept, PartReport};

use crate::disk::Disk;
use crate::format::DiskType;
use execute::{Budget, Compactor, Step};

/// What a compaction does.
#[derive(Clone, Copy, Debug)]
pub struct CompactOptions {
    /// Change nothing; report what a run would do, with the exact length it would reach.
    pub dry_run: bool,
    /// Read the blocks of which nothing is known, to find those that are all zero.
    pub scan: bool,
    /// Move blocks into holes, so that the file can be cut. Without it only what is free at the end
    /// is cut off.
    pub move_blocks: bool,
    /// Also give zeros inside live blocks back to the host, by punching holes in the file. Then a
    /// scan reads all of a live block, not only its start.
    pub punch_holes: bool,
    /// Of a differencing disk: drop the blocks that hold nothing but what the parent has, and would have
    /// if all went that its filesystems call free. Reads all of a block that is the same, and of others up
    /// to the first difference.
    pub drop_identical: bool,
    /// Also give up what the guest's filesystems call free, where that can be told beyond doubt: see
    /// [`crate::guest`]. Only while nobody has announced writing with [`Disk::begin_writing`]. Reads of
    /// what is free change: to zeros, never to what a parent has. Before the first of them a VHDX gets a
    /// new identity, durably, so that disks over it are refused instead of misled. A VHD cannot: see
    /// [`Disk::keeps_free_space`]. Not while a suspended machine uses the disk.
    pub fs_aware: bool,
    /// With `fs_aware`: give what is free inside live blocks back to the host, by punching holes in the
    /// file, though `punch_holes` is off. Nothing more is read for it.
    pub punch_free: bool,
    /// With `fs_aware`: count the pages of Linux swap space as free.
    pub free_swap: bool,
    /// With `fs_aware`: also believe a filesystem that was not unmounted cleanly, if it tells what is
    /// free once its journal is replayed, which is done in memory. For a machine that has crashed.
    pub replay_journal: bool,
    /// With `fs_aware`: no other disk is over a fixed VHD, so that it keeps its identity though what is free
    /// goes. Otherwise it gets a new one before, as a VHDX does in any case.
    pub no_children: bool,
}

impl Default for CompactOptions {
    fn default() -> Self {
        Self {
            dry_run: false,
            scan: true,
            move_blocks: true,
            punch_holes: false,
            drop_identical: true,
            fs_aware: false,
            punch_free: false,
            free_swap: false,
            replay_journal: false,
            no_children: false,
        }
    }
}

/// Asked right before bytes go that only filesystems call free, and again while more do: whether nobody has
/// come who reads them.
#[derive(Clone)]
pub(crate) struct LastWord(Arc<dyn Fn() -> bool + Send + Sync>);

impl LastWord {
    pub(crate) fn new(ask: impl Fn() -> bool + Send + Sync + 'static) -> Self {
        Self(Arc::new(ask))
    }

    pub(crate) fn may_go(&self) -> bool {
        (self.0)()
    }
}

impl std::fmt::Debug for LastWord {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LastWord").finish_non_exhaustive()
    }
}

/// What a compaction is at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Phase {
    /// Finding out what the guest's filesystems call free.
    Survey,
    /// Finding out which blocks are zero.
    Scan,
    /// Taking dead blocks out of the block table.
    Drop,
    /// Moving blocks towards the start of the file.
    Move,
    /// Giving zeros inside blocks back to the host.
    Punch,
    /// Finished.
    Done,
}

/// How far a compaction is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// What it is at.
    pub phase: Phase,
    /// Bytes of blocks that this phase has been through.
    pub completed: u64,
    /// Bytes of blocks that this phase will go through.
    pub total: u64,
}

#[derive(Debug, Default)]
struct Shared {
    phase: AtomicU8,
    completed: AtomicU64,
    total: AtomicU64,
    cancelled: AtomicBool,
}

impl Shared {
    fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
    }

    fn publish(&self, progress: Progress) {
        let phase = match progress.phase {
            Phase::Survey => 0,
            Phase::Scan => 1,
            Phase::Drop => 2,
            Phase::Move => 3,
            Phase::Punch => 4,
            Phase::Done => 5,
        };
        self.phase.store(phase, Ordering::Relaxed);
        self.completed.store(progress.completed, Ordering::Relaxed);
        self.total.store(progress.total, Ordering::Relaxed);
    }
}

/// Watches and cancels one compaction, whichever thread runs it. Clones are of the same one.
#[derive(Clone, Debug, Default)]
pub struct Control {
    shared: Arc<Shared>,
}

impl Control {
    /// How far it is.
    pub fn progress(&self) -> Progress {
        Progress {
            phase: match self.shared.phase.load(Ordering::Relaxed) {
                0 => Phase::Survey,
                1 => Phase::Scan,
                2 => Phase::Drop,
                3 => Phase::Move,
                4 => Phase::Punch,
                _ => Phase::Done,
            },
            completed: self.shared.completed.load(Ordering::Relaxed),
            total: self.shared.total.load(Ordering::Relaxed),
        }
    }

    /// Makes it stop after the step it is at, or before the first. What was done stays done; it ends
    /// with [`CompactError::Cancelled`], unless it had finished already.
    pub fn cancel(&self) {
        self.shared.cancelled.store(true, Ordering::Relaxed);
    }
}

/// A compaction that runs on a thread of its own.
#[derive(Debug)]
pub struct Operation {
    control: Control,
    thread: JoinHandle<Result<CompactReport, CompactError>>,
}

impl Operation {
    fn start(disk: Arc<Disk>, options: CompactOptions) -> Self {
        let control = Control::default();
        let thread = std::thread::spawn({
            let control = control.clone();
            move || run(&disk, options, &control)
        });
        Self { control, thread }
    }

    /// How far it is.
    pub fn progress(&self) -> Progress {
        self.control.progress()
    }

    /// Makes it stop after the step it is at. What was done stays done; [`Self::wait`] then returns
    /// [`CompactError::Cancelled`], unless it had finished already.
    pub fn cancel(&self) {
        self.control.cancel();
    }

    /// Whether [`Self::wait`] would return at once.
    pub fn is_finished(&self) -> bool {
        self.thread.is_finished()
    }

    /// Waits until it ends. Everything it did is durable then.
    ///
    /// # Errors
    /// [`CompactError::Fixed`] of a fixed disk with nothing to gain but holes where those are not asked for,
    /// [`CompactError::Cancelled`], [`CompactError::Wanted`], [`CompactError::NoRoom`], or the disk's failure. The disk is
    /// sound after each.
    pub fn wait(self) -> Result<CompactReport, CompactError> {
        match self.thread.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
}

impl Disk {
    /// Starts to compact the disk on a thread of its own, while it stays in use.
    ///
    /// One compaction runs at a time; a second one waits for the first.
    pub fn compact(self: &Arc<Self>, options: &CompactOptions) -> Operation {
        Operation::start(Arc::clone(self), *options)
    }

    /// Looks at every block that nobody has looked at yet, so that [`Self::regions`] can tell which hold
    /// data. Changes nothing.
    ///
    /// # Errors
    /// [`CompactError::Fixed`], or the disk's failure.
    pub fn scan(self: &Arc<Self>) -> Result<(), CompactError> {
        let _only = self.take_turn();
        let options = CompactOptions {
            dry_run: true,
            fs_aware: false,
            drop_identical: false,
            ..CompactOptions::default()
        };
        let mut compactor = Compactor::new(Arc::clone(self), options)?;
        while compactor.step(Budget::IDLE, &|| true)? == Step::More {}
        Ok(())
    }
}

/// Compacts `disk` on the calling thread; others follow it and cancel it with `control`. Waits for
/// another compaction of the disk that is under way.
///
/// # Errors
/// As [`Operation::wait`].
pub(crate) fn run(
    disk: &Arc<Disk>,
    options: CompactOptions,
    control: &Control,
) -> Result<CompactReport, CompactError> {
    let shared = &*control.shared;
    let _only = disk.take_turn();
    let is_wanted = || disk.maintenance().is_wanted();
    let go_on = || !shared.is_cancelled() && !is_wanted();
    let ended = |error| match error {
        CompactError::Cancelled if is_wanted() => CompactError::Wanted,
        error => error,
    };
    if disk.geometry().disk_type == DiskType::Fixed {
        return fixed::run(disk, options, shared).map_err(ended);
    }
    let mut compactor = Compactor::new(Arc::clone(disk), options)?;
    loop {
        shared.publish(compactor.progress());
        if !go_on() {
            return Err(ended(CompactError::Cancelled));
        }
        if compactor.step(Budget::IDLE, &go_on).map_err(ended)? == Step::Done {
            shared.publish(compactor.progress());
            return match compactor.without_room() {
                0 => Ok(compactor.into_report()?),
                blocks => Err(CompactError::NoRoom { blocks }),
            };
        }
    }
}
