//! Who may do what to a block at the same time.
//!
//! Every block has a gate, a reader-writer lock of one word. Guest reads, and writes that change
//! nothing but data, hold it shared. What changes a block's place, or turns data into known zeros,
//! holds it exclusively, and no longer than it takes to write a table entry or that piece of data.
//! A request that spans blocks holds one gate at a time.
//!
//! Long work on a block (a scan, the copy of a move) holds no gate: it *watches* the block instead.
//! A guest write to a watched block marks the watch and goes on; the work finds the mark when it
//! takes the gate to conclude, and starts over or gives up. The guest never waits for it.

use std::collections::HashMap;
use std::sync::{Arc, OnceLock};

use crate::sync::{AtomicUsize, Mutex, Ordering, RwLock, RwLockReadGuard, RwLockWriteGuard};
use crate::units::{BlockIndex, usize_from_u32};

/// Gates that are made together.
const GROUP: usize = 1024;

type Group = Box<[RwLock<()>]>;

/// 1 once a watched block was changed.
type Touched = AtomicUsize;

/// The gates of one disk.
#[derive(Debug)]
pub(crate) struct Gates {
    /// In groups, made when the first of a group is asked for: a large disk has millions of blocks
    /// and uses few at a time.
    groups: Box<[OnceLock<Group>]>,
    /// How many watches there are: 0 spares every write the look into `watched`.
    watching: AtomicUsize,
    /// Those who watch each block.
    watched: Mutex<HashMap<BlockIndex, Vec<Arc<Touched>>>>,
}

impl Gates {
    pub(crate) fn new(blocks: u32) -> Self {
        Self {
            groups: (0..usize_from_u32(blocks).div_ceil(GROUP))
                .map(|_| OnceLock::new())
                .collect(),
            watching: AtomicUsize::new(0),
            watched: Mutex::new(HashMap::new()),
        }
    }

    fn gate(&self, block: BlockIndex) -> &RwLock<()> {
        let group = self.groups[block.index() / GROUP]
            .get_or_init(|| (0..GROUP).map(|_| RwLock::new(())).collect());
        &group[block.index() % GROUP]
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

    /// Says that `block` is about to be changed. The caller holds its gate, in either way.
    pub(crate) fn touch(&self, block: BlockIndex) {
        if self.watching.load(Ordering::SeqCst) != 0
            && let Some(watches) = self.watched.lock().get(&block)
        {
            for touched in watches {
                touched.store(1, Ordering::SeqCst);
            }
        }
    }

    /// Watches `block` for changes from now on: one that was under way is finished on return.
    pub(crate) fn watch(self: &Arc<Self>, block: BlockIndex) -> Watch {
        let touched = Arc::new(Touched::new(0));
        let watches = Arc::clone(&touched);
        (self.watched.lock().entry(block).or_default()).push(watches);
        self.watching.fetch_add(1, Ordering::SeqCst);
        drop(self.exclusive(block));
        Watch {
            gates: Arc::clone(self),
            block,
            touched,
        }
    }
}

/// A block that is being watched, until dropped.
#[derive(Debug)]
pub(crate) struct Watch {
    gates: Arc<Gates>,
    block: BlockIndex,
    touched: Arc<Touched>,
}

impl Watch {
    /// Whether the block was changed, or is about to be, since the watch began. The answer stays
    /// right while the caller holds the block's gate exclusively.
    pub(crate) fn is_touched(&self) -> bool {
        self.touched.load(Ordering::SeqCst) != 0
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let mut watched = self.gates.watched.lock();
        if let Some(watches) = watched.get_mut(&self.block) {
            watches.retain(|touched| !Arc::ptr_eq(touched, &self.touched));
            if watches.is_empty() {
                watched.remove(&self.block);
            }
        }
        self.gates.watching.fetch_sub(1, Ordering::SeqCst);
    }
}
