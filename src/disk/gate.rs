//! Who may do what to a block at the same time.
//!
//! Every block has a gate, a reader-writer lock of one word. Guest reads hold it shared, and so do changes
//! that leave the block where it is. What changes a block's place, or which sectors of it count, holds it
//! exclusively.
//! A request that spans blocks holds one gate at a time.
//!
//! # Watches
//! Long work on a block (a scan, the copy of a move) holds no gate: it *watches* the block instead. Who
//! changes a part of a block says so at both ends of the change ([`Change`]), which marks the watches of that
//! part. The change goes on; the work finds the mark when it concludes, and starts over or gives up. Nobody
//! waits for it.
//!
//! A watch may begin in the middle of a change: it is marked at the change's end. So a watch that has no mark
//! while its block's gate is held exclusively saw no change and met none. And where it *concludes* under the
//! shared gate ([`Watch::conclude`]), what it takes for granted holds unless a change that is still under
//! way contradicts it: that one is told at its end that it may have met a watch ([`Change::end`]), and
//! puts right what was noted, still under its gate.
//!
//! Where nothing is watched, a change costs two loads. The orders: a change looks after its bytes are written,
//! a watch begins before it reads or writes any; with a fence between on both sides, one of them sees the
//! other.
//!
//! # Copies that are kept the same
//! A block that moves may have a [`Mirror`], registered like a watch of the whole block. Changes in place
//! take part in it instead of marking it; others end it.

use std::ops::Range;
use std::sync::atomic::AtomicU8;
use std::sync::{Arc, OnceLock};

use rangemap::RangeSet;

use super::mirror::Mirror;
use crate::sync::{
    AtomicU64, Mutex, MutexGuard, Ordering, RwLock, RwLockReadGuard, RwLockWriteGuard, fence,
};
use crate::units::{BlockIndex, GRANULE_SIZE, round_down, round_up, usize_from_u32};

/// Gates that are made together.
const GROUP: usize = 1024;

/// Lists of watches: writes to blocks of others do not meet.
const SHARDS: usize = 16;

/// What a watch that begins adds to the count of all that began; below it stands how many there are.
const BEGUN: u64 = 1 << 24;

/// All of a block, its slot's header included.
const WHOLE: Range<u64> = 0..u64::MAX;

/// Some gates, and how often each block was written to lately.
#[derive(Debug)]
struct Group {
    gates: Box<[RwLock<()>]>,
    heat: Box<[AtomicU8]>,
}

impl Group {
    fn new() -> Self {
        Self {
            gates: (0..GROUP).map(|_| RwLock::new(())).collect(),
            heat: (0..GROUP).map(|_| AtomicU8::new(0)).collect(),
        }
    }
}

/// The gates of one disk.
#[derive(Debug)]
pub(crate) struct Gates {
    /// In groups, made when the first of a group is asked for: a large disk has millions of blocks
    /// and uses few at a time.
    groups: Box<[OnceLock<Group>]>,
    shards: Box<[Shard]>,
}

/// The watches of some of the blocks.
#[derive(Debug)]
struct Shard {
    /// How many there are, and how many ever began, in units of [`BEGUN`]: two equal looks that find none
    /// mean that there was none between.
    count: AtomicU64,
    watched: Mutex<Vec<Watched>>,
}

/// A part of a block that somebody watches.
#[derive(Debug)]
struct Watched {
    id: u64,
    block: BlockIndex,
    part: Range<u64>,
    /// What of it was touched, in whole granules; all of it if it is the whole block.
    touched: RangeSet<u64>,
    mirror: Option<Arc<Mirror>>,
}

impl Watched {
    fn touch(&mut self, part: &Range<u64>) {
        let start = round_down(part.start, GRANULE_SIZE).max(self.part.start);
        let end = round_up(part.end, GRANULE_SIZE).min(self.part.end);
        if self.part == WHOLE {
            self.touched.insert(WHOLE);
        } else if start < end {
            self.touched.insert(start..end);
        }
    }
}

impl Gates {
    pub(crate) fn new(blocks: u32) -> Self {
        let shard = |_| Shard {
            count: AtomicU64::new(0),
            watched: Mutex::new(Vec::new()),
        };
        Self {
            groups: (0..usize_from_u32(blocks).div_ceil(GROUP))
                .map(|_| OnceLock::new())
                .collect(),
            shards: (0..SHARDS).map(shard).collect(),
        }
    }

    fn group(&self, block: BlockIndex) -> &Group {
        self.groups[block.index() / GROUP].get_or_init(Group::new)
    }

    fn gate(&self, block: BlockIndex) -> &RwLock<()> {
        &self.group(block).gates[block.index() % GROUP]
    }

    /// Holds `block` where it is.
    pub(crate) fn shared(&self, block: BlockIndex) -> RwLockReadGuard<'_, ()> {
        self.gate(block).read()
    }

    /// Keeps everybody else off `block`.
    pub(crate) fn exclusive(&self, block: BlockIndex) -> RwLockWriteGuard<'_, ()> {
        self.gate(block).write()
    }

    /// As [`Self::exclusive`], or `None` where somebody is at it now.
    pub(crate) fn try_exclusive(&self, block: BlockIndex) -> Option<RwLockWriteGuard<'_, ()>> {
        self.gate(block).try_write()
    }

    /// Begins a change of something of `block` that no mirror can follow. Its gate is held exclusively.
    pub(crate) fn change(&self, block: BlockIndex) -> Change<'_> {
        self.begin_change(block, WHOLE, None, false)
    }

    /// Begins a change of the bytes `part` of `block`, which stays where it is. Its gate is held, and
    /// longer than the change. If the caller watches that part itself, `own` is that watch.
    pub(crate) fn change_in_place(
        &self,
        block: BlockIndex,
        part: Range<u64>,
        own: Option<&Watch>,
    ) -> Change<'_> {
        self.warm(block);
        self.begin_change(block, part, own.map(|watch| watch.id), true)
    }

    fn begin_change(
        &self,
        block: BlockIndex,
        part: Range<u64>,
        own: Option<u64>,
        in_place: bool,
    ) -> Change<'_> {
        let mut change = Change {
            gates: self,
            block,
            part,
            own,
            in_place,
            before: self.shard(block).count.load(Ordering::SeqCst),
            mirror: None,
            is_ended: false,
        };
        change.touch(change.before);
        change
    }

    /// Watches `block` for changes from now on.
    pub(crate) fn watch(self: &Arc<Self>, block: BlockIndex) -> Watch {
        self.watch_part(block, WHOLE)
    }

    /// Watches the bytes `part` of `block` for changes from now on.
    pub(crate) fn watch_part(self: &Arc<Self>, block: BlockIndex, part: Range<u64>) -> Watch {
        self.begin_watch(block, part, None)
    }

    /// Has every change in place of `block` from now on take part in `mirror`. A change that was under way
    /// is complete on return.
    pub(super) fn mirror(self: &Arc<Self>, block: BlockIndex, mirror: Arc<Mirror>) -> Watch {
        let _nobody = self.exclusive(block);
        // One at a time: a change in place takes part in one.
        for watched in self.shard(block).watched.lock().iter() {
            if let (true, Some(before)) = (watched.block == block, &watched.mirror) {
                before.give_up();
            }
        }
        self.begin_watch(block, WHOLE, Some(mirror))
    }

    fn begin_watch(
        self: &Arc<Self>,
        block: BlockIndex,
        part: Range<u64>,
        mirror: Option<Arc<Mirror>>,
    ) -> Watch {
        let shard = self.shard(block);
        let id = {
            let mut watched = shard.watched.lock();
            let id = shard.count.fetch_add(BEGUN + 1, Ordering::SeqCst) / BEGUN;
            let touched = RangeSet::new();
            watched.push(Watched {
                id,
                block,
                part,
                touched,
                mirror,
            });
            id
        };
        fence(Ordering::SeqCst);
        let gates = Arc::clone(self);
        Watch { gates, block, id }
    }

    /// How often `block` was written to in place lately, at most 255 times.
    pub(crate) fn heat(&self, block: BlockIndex) -> u8 {
        let group = self.groups[block.index() / GROUP].get();
        group.map_or(0, |group| {
            group.heat[block.index() % GROUP].load(Ordering::Relaxed)
        })
    }

    /// Halves the heat of all blocks: to be called now and then.
    pub(crate) fn cool(&self) {
        for group in self.groups.iter().filter_map(OnceLock::get) {
            for heat in &group.heat {
                let now = heat.load(Ordering::Relaxed);
                if now != 0 {
                    heat.store(now / 2, Ordering::Relaxed);
                }
            }
        }
    }

    /// Two writes at a time may count as one: the heat is a hint, and orders nothing.
    fn warm(&self, block: BlockIndex) {
        let heat = &self.group(block).heat[block.index() % GROUP];
        let now = heat.load(Ordering::Relaxed);
        if now < u8::MAX {
            heat.store(now + 1, Ordering::Relaxed);
        }
    }

    fn shard(&self, block: BlockIndex) -> &Shard {
        &self.shards[block.index() % SHARDS]
    }
}

/// A change of a part of a block that is under way, until dropped.
#[derive(Debug)]
pub(crate) struct Change<'a> {
    gates: &'a Gates,
    block: BlockIndex,
    part: Range<u64>,
    own: Option<u64>,
    in_place: bool,
    before: u64,
    mirror: Option<Arc<Mirror>>,
    is_ended: bool,
}

impl Change<'_> {
    /// The copy that has to be changed, too.
    pub(super) fn mirror(&self) -> Option<&Arc<Mirror>> {
        self.mirror.as_ref()
    }

    /// Ends the change; says whether somebody may have watched the block meanwhile, so that what was noted
    /// of it has to be noted again.
    pub(crate) fn end(mut self) -> bool {
        self.look_again()
    }

    /// Marks the watches, of which some may have come since the change began; says whether any did, or are
    /// there.
    fn look_again(&mut self) -> bool {
        if std::mem::replace(&mut self.is_ended, true) {
            return false;
        }
        // The bytes are written, now look.
        fence(Ordering::SeqCst);
        let count = self.gates.shard(self.block).count.load(Ordering::SeqCst);
        self.touch(count);
        count != self.before || self.others(count) != 0
    }

    /// Of the watches that `count` tells of, those that are not the caller's own.
    fn others(&self, count: u64) -> u64 {
        count % BEGUN - u64::from(self.own.is_some())
    }

    /// Marks the watches of the part, `count` of the shard's.
    fn touch(&mut self, count: u64) {
        if self.others(count) == 0 {
            return;
        }
        let mut watched = self.gates.shard(self.block).watched.lock();
        let met = watched.iter_mut().filter(|watched| {
            watched.block == self.block
                && Some(watched.id) != self.own
                && watched.part.start < self.part.end
                && self.part.start < watched.part.end
        });
        for watched in met {
            match &watched.mirror {
                None => watched.touch(&self.part),
                Some(mirror) if mirror.is_given_up() => {}
                Some(mirror) if self.in_place => self.mirror = Some(Arc::clone(mirror)),
                Some(mirror) => mirror.give_up(),
            }
        }
    }
}

impl Drop for Change<'_> {
    fn drop(&mut self) {
        self.look_again();
    }
}

/// A part of a block that is being watched, until dropped.
#[derive(Debug)]
pub(crate) struct Watch {
    gates: Arc<Gates>,
    block: BlockIndex,
    id: u64,
}

impl Watch {
    /// The block.
    pub(crate) fn block(&self) -> BlockIndex {
        self.block
    }

    /// Whether the part was changed, or is about to be, since the watch began. The answer stays
    /// right while the caller holds the block's gate exclusively.
    pub(crate) fn is_touched(&self) -> bool {
        self.conclude(|touched| !touched.is_empty())
    }

    /// Has `note` note what holds of the part but for what was touched of it, in bytes of the block. A
    /// change that begins, or ends, meanwhile waits for it, and comes later.
    pub(crate) fn conclude<T>(&self, note: impl FnOnce(&RangeSet<u64>) -> T) -> T {
        let watched = self.gates.shard(self.block).watched.lock();
        note(&watched[self.place(&watched)].touched)
    }

    fn place(&self, watched: &MutexGuard<'_, Vec<Watched>>) -> usize {
        let place = watched.iter().position(|watched| watched.id == self.id);
        place.expect("a watch is in the list until it is dropped")
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let shard = self.gates.shard(self.block);
        let mut watched = shard.watched.lock();
        let place = self.place(&watched);
        watched.swap_remove(place);
        shard.count.fetch_sub(1, Ordering::SeqCst);
    }
}
