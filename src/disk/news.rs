//! Blocks in which there may be something new for maintenance: so that a run of compaction costs what changed
//! since the last one, not what the disk has.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;

use crate::units::BlockIndex;

/// Lists of blocks: who changes blocks of different ones does not meet.
const SHARDS: usize = 16;
/// Blocks in a list. Where there are more, all are looked at.
const MOST: usize = 1024;

/// What is new on a disk.
#[derive(Debug)]
pub(super) struct News {
    /// All blocks are to be looked at, and none needs noting.
    all: AtomicBool,
    shards: Box<[Mutex<HashSet<BlockIndex>>]>,
}

impl News {
    /// Of a disk at which nobody has looked yet.
    pub(super) fn new() -> Self {
        Self {
            all: AtomicBool::new(true),
            shards: (0..SHARDS).map(|_| Mutex::default()).collect(),
        }
    }

    /// Notes that a part of `block` became unknown, or zero.
    pub(super) fn note(&self, block: BlockIndex) {
        if self.all.load(Ordering::Acquire) {
            return;
        }
        let mut blocks = self.shards[block.index() % SHARDS].lock();
        if blocks.len() < MOST || blocks.contains(&block) {
            blocks.insert(block);
        } else {
            self.all.store(true, Ordering::Release);
        }
    }

    /// Notes that all blocks are to be looked at.
    pub(super) fn note_all(&self) {
        self.all.store(true, Ordering::Release);
    }

    /// What was noted since the last call, in no order; `None` where all blocks are to be looked at. What is
    /// noted meanwhile is in it, or stays for the next call.
    pub(super) fn take(&self) -> Option<Vec<BlockIndex>> {
        // First: what comes from here on is noted again.
        let all = self.all.swap(false, Ordering::AcqRel);
        let lists = self.shards.iter();
        let blocks: Vec<_> = lists
            .flat_map(|shard| std::mem::take(&mut *shard.lock()))
            .collect();
        (!all).then_some(blocks)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taken(news: &News) -> Option<Vec<BlockIndex>> {
        let mut blocks = news.take();
        if let Some(blocks) = &mut blocks {
            blocks.sort_unstable();
        }
        blocks
    }

    #[test]
    fn what_is_too_much_to_be_listed_is_everything() {
        let news = News::new();
        assert_eq!(taken(&news), None, "nobody has looked at anything");
        let block = BlockIndex::new;
        [3, 1, 3].iter().for_each(|n| news.note(block(*n)));
        assert_eq!(taken(&news), Some(vec![block(1), block(3)]));
        assert_eq!(taken(&news), Some(vec![]));
        (0..20_000).for_each(|n| news.note(block(n)));
        assert_eq!(taken(&news), None);
        news.note(block(7));
        assert_eq!(taken(&news), Some(vec![block(7)]));
        news.note_all();
        assert_eq!(taken(&news), None);
    }
}
