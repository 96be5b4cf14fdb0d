//! What is known of the content of each block, granule by granule, without reading it again.
//!
//! A granule is *zero*, *data*, or *unknown* (never looked at since the disk was opened, or partly
//! overwritten with zeros). Knowledge comes from what passes by (writes, discards), from what a new
//! block starts with (zeros), and from scans.
//!
//! Of a zero granule it knows, too, whether the host may still *store* it, or whether it is a hole of the
//! host file: who discards the same again has nothing to do there.
//!
//! Memory: a byte a block, and three bits a granule for blocks of which something but not all is
//! known, that hold both zeros and data, or zeros of which some are stored.
//!
//! # Who may call what
//! Under a block's shared gate a granule may become data or unknown at any time, and data has to be noted
//! *before* the write that makes it so. It may become zero only as a watch of it concludes
//! (`gate.rs`); a write that may have met a watch notes its data once more after it. Everything else needs the
//! exclusive gate. So a granule that is known to be zero is zero whenever the gate is held exclusively; under
//! the shared gate, unless a write to it is under way.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicU8, Ordering};

use parking_lot::Mutex;
use zerocopy::FromZeros;

use super::news::News;
use crate::units::{BlockIndex, GRANULE_SIZE, div_ceil, usize_from, usize_from_u32};

/// What is known of a block as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Content {
    /// Nothing.
    Unknown,
    /// No granule is zero or unknown.
    Data,
    /// Some granules are data, or may be.
    Mixed,
    /// All granules are zero.
    Dead,
}

impl Content {
    fn decode(byte: u8) -> Self {
        match byte {
            0 => Self::Unknown,
            1 => Self::Data,
            2 => Self::Mixed,
            _ => Self::Dead,
        }
    }

    fn encode(self) -> u8 {
        match self {
            Self::Unknown => 0,
            Self::Data => 1,
            Self::Mixed => 2,
            Self::Dead => 3,
        }
    }
}

/// What a scan needs to know of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Gaps {
    /// Whether a granule is known to hold data.
    pub(crate) has_data: bool,
    /// Whether a granule is unknown.
    pub(crate) has_unknown: bool,
}

/// Whether the host may store what is zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stored(pub(crate) bool);

#[derive(Clone, Debug)]
struct Granules {
    /// Bit set: known.
    known: Box<[u64]>,
    /// Bit set: known to be zero.
    zero: Box<[u64]>,
    /// Bit set: known to be zero, and the host may still store it.
    stored: Box<[u64]>,
}

const SHARDS: u32 = 64;

/// The knowledge of one disk.
#[derive(Debug)]
pub(crate) struct Tracker {
    /// [`Content`] of each block. Changes under the shard's lock; may be read without.
    contents: Box<[AtomicU8]>,
    shards: Box<[Mutex<HashMap<BlockIndex, Granules>>]>,
    /// Granules in a block.
    granules: u64,
    /// Blocks of which something is to be found out, or to be given back.
    news: News,
}

fn bit(index: u64) -> (usize, u64) {
    (usize_from(index / 64), 1 << (index % 64))
}

impl Granules {
    fn new(count: u64, known: bool, zero: bool) -> Self {
        let words = usize_from(div_ceil(count, 64));
        let filled = |value: bool| {
            let mut bits = vec![0_u64; words].into_boxed_slice();
            if value {
                (0..count).for_each(|index| bits[bit(index).0] |= bit(index).1);
            }
            bits
        };
        Self {
            known: filled(known),
            zero: filled(zero),
            stored: filled(false),
        }
    }

    fn get(&self, index: u64) -> Option<bool> {
        let (word, mask) = bit(index);
        (self.known[word] & mask != 0).then_some(self.zero[word] & mask != 0)
    }

    /// Sets granule `index` to zero, data or unknown.
    fn set(&mut self, index: u64, zero: Option<bool>) {
        let (word, mask) = bit(index);
        self.known[word] &= !mask;
        self.zero[word] &= !mask;
        self.stored[word] &= !mask;
        if let Some(zero) = zero {
            self.known[word] |= mask;
            self.zero[word] |= if zero { mask } else { 0 };
        }
    }

    /// Sets granule `index` to zero, which the host may store or not.
    fn set_zero(&mut self, index: u64, stored: bool) {
        self.set(index, Some(true));
        let (word, mask) = bit(index);
        self.stored[word] |= if stored { mask } else { 0 };
    }

    fn is_stored(&self, index: u64) -> bool {
        let (word, mask) = bit(index);
        self.stored[word] & mask != 0
    }

    fn any_stored(&self) -> bool {
        self.stored.iter().any(|word| *word != 0)
    }

    fn content(&self, count: u64) -> Content {
        let ones = |bits: &[u64]| {
            bits.iter()
                .map(|word| u64::from(word.count_ones()))
                .sum::<u64>()
        };
        let (known, zero) = (ones(&self.known), ones(&self.zero));
        match (known, zero) {
            (0, _) => Content::Unknown,
            _ if zero == count => Content::Dead,
            (known, 0) if known == count => Content::Data,
            _ => Content::Mixed,
        }
    }

    /// Runs of granules for which `wanted` holds.
    fn runs(&self, count: u64, wanted: impl Fn(Option<bool>) -> bool) -> Vec<Range<u64>> {
        let mut found: Vec<Range<u64>> = Vec::new();
        for index in (0..count).filter(|index| wanted(self.get(*index))) {
            match found.last_mut() {
                Some(run) if run.end == index => run.end = index + 1,
                _ => found.push(index..index + 1),
            }
        }
        found
    }
}

impl Tracker {
    /// Of `blocks` blocks of `block_size` bytes, of which nothing is known.
    pub(crate) fn new(blocks: u32, block_size: u64) -> Self {
        Self {
            contents: <[AtomicU8]>::new_box_zeroed_with_elems(usize_from_u32(blocks))
                .expect("a byte for each of at most 2^26 blocks fits in memory"),
            shards: (0..SHARDS).map(|_| Mutex::new(HashMap::new())).collect(),
            granules: div_ceil(block_size, GRANULE_SIZE),
            news: News::new(),
        }
    }

    /// A copy that goes its own way. What changes meanwhile may be in it or not.
    pub(crate) fn snapshot(&self) -> Self {
        let contents = self.contents.iter();
        Self {
            shards: (self.shards.iter())
                .map(|shard| Mutex::new(shard.lock().clone()))
                .collect(),
            contents: contents
                .map(|content| AtomicU8::new(content.load(Ordering::Acquire)))
                .collect(),
            granules: self.granules,
            news: News::new(),
        }
    }

    /// Blocks in which something is new.
    pub(super) fn news(&self) -> &News {
        &self.news
    }

    /// What is known of `block`.
    pub(crate) fn content(&self, block: BlockIndex) -> Content {
        Content::decode(self.contents[block.index()].load(Ordering::Acquire))
    }

    /// `block` was just given a slot that reads as zeros.
    pub(crate) fn set_fresh(&self, block: BlockIndex) {
        self.change(block, |granules, count| {
            *granules = Granules::new(count, true, true)
        });
    }

    /// All of `block`, of which nothing was known, reads as zeros and takes no host space. Nobody writes.
    pub(crate) fn set_dead(&self, block: BlockIndex) {
        self.store(block, Content::Dead);
    }

    /// `block` lost its slot, or its content is in doubt.
    pub(crate) fn forget(&self, block: BlockIndex) {
        self.shard(block).lock().remove(&block);
        self.store(block, Content::Unknown);
    }

    /// `len` bytes that are not zero, at least not any whole granule of them, are about to be
    /// written `within` bytes into `block`. A granule at the ends that stays zero all the same
    /// counts as data. The shared gate is enough.
    pub(crate) fn note_data(&self, block: BlockIndex, within: u64, len: u64) {
        // Of an unknown block nothing needs noting: only a scan can make it dead, and that looks.
        if matches!(self.content(block), Content::Data | Content::Unknown) {
            return;
        }
        let touched = within / GRANULE_SIZE..div_ceil(within + len, GRANULE_SIZE);
        self.change(block, |granules, _| {
            touched.for_each(|index| granules.set(index, Some(false)));
        });
    }

    /// The write announced by [`Self::note_data`] failed: what is there now is unknown.
    pub(crate) fn note_unknown(&self, block: BlockIndex, within: u64, len: u64) {
        let touched = within / GRANULE_SIZE..div_ceil(within + len, GRANULE_SIZE);
        self.change(block, |granules, _| {
            touched.for_each(|index| granules.set(index, None))
        });
        self.news.note(block);
    }

    /// `len` bytes from `within` on now read as zeros. `stored` says that the host may still keep
    /// space for them. Needs the exclusive gate, or a watch that concludes.
    pub(crate) fn note_zero(&self, block: BlockIndex, within: u64, len: u64, stored: bool) {
        let end = within + len;
        self.change(block, |granules, count| {
            for index in within / GRANULE_SIZE..div_ceil(end, GRANULE_SIZE).min(count) {
                let whole = index * GRANULE_SIZE >= within && (index + 1) * GRANULE_SIZE <= end;
                if whole {
                    granules.set_zero(index, stored);
                } else if granules.get(index) == Some(false) {
                    granules.set(index, None);
                }
            }
        });
        self.news.note(block);
    }

    /// A scan found granule `index` to be zero or not. `stored` as in [`Self::note_zero`].
    pub(crate) fn note_scanned(
        &self,
        block: BlockIndex,
        found: impl IntoIterator<Item = (u64, bool)>,
        stored: bool,
    ) {
        self.change(block, |granules, _| {
            for (index, zero) in found {
                match zero {
                    true => granules.set_zero(index, stored),
                    false => granules.set(index, Some(false)),
                }
            }
        });
    }

    /// What a scan would still find out.
    pub(crate) fn gaps(&self, block: BlockIndex) -> Gaps {
        match self.content(block) {
            Content::Unknown => Gaps {
                has_data: false,
                has_unknown: true,
            },
            Content::Data => Gaps {
                has_data: true,
                has_unknown: false,
            },
            Content::Dead => Gaps {
                has_data: false,
                has_unknown: false,
            },
            Content::Mixed => {
                let shard = self.shard(block).lock();
                let any = |wanted: Option<bool>| {
                    shard.get(&block).is_some_and(|granules| {
                        (0..self.granules).any(|index| granules.get(index) == wanted)
                    })
                };
                Gaps {
                    has_data: any(Some(false)),
                    has_unknown: any(None),
                }
            }
        }
    }

    /// The unknown granules of `block`, as runs.
    pub(crate) fn unknown_runs(&self, block: BlockIndex) -> Vec<Range<u64>> {
        match self.content(block) {
            Content::Unknown => std::iter::once(0..self.granules).collect(),
            Content::Data | Content::Dead => Vec::new(),
            Content::Mixed => self.runs(block, |zero| zero.is_none()),
        }
    }

    /// Whether all of the `len` bytes from `within` on are known to be zero, and if so, whether the host may
    /// still store a whole granule of them.
    pub(crate) fn zeros(&self, block: BlockIndex, within: u64, len: u64) -> Option<Stored> {
        let end = within + len;
        match self.content(block) {
            Content::Unknown | Content::Data => return None,
            Content::Dead | Content::Mixed => {}
        }
        let shard = self.shard(block).lock();
        let Some(granules) = shard.get(&block) else {
            // Asked under the lock: what a block without granules holds, its content tells.
            return (self.content(block) == Content::Dead).then_some(Stored(false));
        };
        let mut all = within / GRANULE_SIZE..div_ceil(end, GRANULE_SIZE);
        let mut whole = div_ceil(within, GRANULE_SIZE)..end / GRANULE_SIZE;
        { all.all(|index| granules.get(index) == Some(true)) }
            .then(|| Stored(whole.any(|index| granules.is_stored(index))))
    }

    /// The zero granules of a mixed `block` that the host may still store, as runs, each with the zeros
    /// around it: a host stores in units of its own.
    pub(crate) fn punchable_runs(&self, block: BlockIndex) -> Vec<Range<u64>> {
        if self.content(block) != Content::Mixed {
            return Vec::new();
        }
        let shard = self.shard(block).lock();
        let Some(granules) = shard.get(&block).filter(|granules| granules.any_stored()) else {
            return Vec::new();
        };
        let mut runs = granules.runs(self.granules, |zero| zero == Some(true));
        runs.retain(|run| run.clone().any(|index| granules.is_stored(index)));
        runs
    }

    /// The zero granules of `block` were punched out of the host file.
    pub(crate) fn set_punched(&self, block: BlockIndex) {
        if matches!(self.content(block), Content::Mixed | Content::Dead) {
            self.change(block, |granules, _| granules.stored.fill(0));
        }
    }

    /// Bytes of zero granules, in blocks that are not dead, that the host may still store.
    pub(crate) fn punchable_bytes(&self) -> u64 {
        let in_shard = |shard: &Mutex<HashMap<BlockIndex, Granules>>| -> u64 {
            let shard = shard.lock();
            let mixed = (shard.iter()).filter(|(block, _)| self.content(**block) == Content::Mixed);
            mixed
                .flat_map(|(_, granules)| granules.stored.iter())
                .map(|word| u64::from(word.count_ones()) * GRANULE_SIZE)
                .sum()
        };
        self.shards.iter().map(in_shard).sum()
    }

    fn runs(&self, block: BlockIndex, wanted: impl Fn(Option<bool>) -> bool) -> Vec<Range<u64>> {
        let shard = self.shard(block).lock();
        shard
            .get(&block)
            .map_or_else(Vec::new, |granules| granules.runs(self.granules, wanted))
    }

    fn shard(&self, block: BlockIndex) -> &Mutex<HashMap<BlockIndex, Granules>> {
        &self.shards[usize_from(u64::from(block.get() % SHARDS))]
    }

    fn store(&self, block: BlockIndex, content: Content) {
        self.contents[block.index()].store(content.encode(), Ordering::Release);
    }

    /// Changes the granules of `block` and keeps only what is not told by its content alone.
    fn change(&self, block: BlockIndex, edit: impl FnOnce(&mut Granules, u64)) {
        let mut shard = self.shard(block).lock();
        let count = self.granules;
        let mut granules = shard
            .remove(&block)
            .unwrap_or_else(|| match self.content(block) {
                Content::Data => Granules::new(count, true, false),
                Content::Dead => Granules::new(count, true, true),
                Content::Unknown | Content::Mixed => Granules::new(count, false, false),
            });
        edit(&mut granules, count);
        let content = granules.content(count);
        if content == Content::Mixed || content == Content::Dead && granules.any_stored() {
            shard.insert(block, granules);
        }
        self.store(block, content);
    }
}

const _: () = assert!(GRANULE_SIZE.is_power_of_two());

#[cfg(test)]
mod tests {
    use super::*;

    const BLOCK: BlockIndex = BlockIndex::new(1);

    fn tracker() -> Tracker {
        Tracker::new(3, 512 << 10)
    }

    #[test]
    fn unknown_blocks_take_no_notes_of_data() {
        let tracker = tracker();
        tracker.note_data(BLOCK, 0, 4096);
        assert_eq!(tracker.content(BLOCK), Content::Unknown);
        assert_eq!(tracker.unknown_runs(BLOCK), vec![(0..128)]);
        tracker.note_zero(BLOCK, 0, 512 << 10, false);
        assert_eq!(tracker.content(BLOCK), Content::Dead);
    }

    #[test]
    fn a_fresh_block_fills_with_data_and_empties_again() {
        let tracker = tracker();
        tracker.set_fresh(BLOCK);
        assert_eq!(tracker.content(BLOCK), Content::Dead);
        tracker.note_data(BLOCK, 100, 1);
        assert_eq!(tracker.content(BLOCK), Content::Mixed);
        assert_eq!(
            tracker.gaps(BLOCK),
            Gaps {
                has_data: true,
                has_unknown: false
            }
        );
        tracker.note_data(BLOCK, 0, 512 << 10);
        assert_eq!(tracker.content(BLOCK), Content::Data);
        tracker.note_zero(BLOCK, 0, 4096, true);
        assert_eq!(tracker.punchable_runs(BLOCK), vec![(0..1)]);
        assert_eq!(tracker.punchable_bytes(), 4096);
        tracker.set_punched(BLOCK);
        assert_eq!(tracker.punchable_bytes(), 0);
        tracker.note_zero(BLOCK, 4096, 508 << 10, true);
        assert_eq!(tracker.content(BLOCK), Content::Dead);
    }

    #[test]
    fn partly_zeroed_granules_become_unknown_unless_they_were_zero() {
        let tracker = tracker();
        tracker.set_fresh(BLOCK);
        tracker.note_data(BLOCK, 0, 8192);
        tracker.note_zero(BLOCK, 2048, 8192, false);
        assert_eq!(tracker.unknown_runs(BLOCK), vec![(0..1)]);
        tracker.note_scanned(BLOCK, [(0, true)], true);
        assert_eq!(tracker.content(BLOCK), Content::Dead);
    }

    #[test]
    fn what_is_zero_and_gone_is_known_granule_by_granule() {
        let tracker = tracker();
        let zeros = |granules: Range<u64>| {
            let len = (granules.end - granules.start) * GRANULE_SIZE;
            tracker.zeros(BLOCK, granules.start * GRANULE_SIZE, len)
        };
        assert_eq!(zeros(0..1), None);
        tracker.note_zero(BLOCK, 0, 8 * 4096, false);
        assert_eq!((zeros(0..8), zeros(7..9)), (Some(Stored(false)), None));
        assert_eq!(tracker.zeros(BLOCK, 100, 20000), Some(Stored(false)));
        // Written over with zeros, a part is stored again, and again not once it is punched.
        tracker.note_zero(BLOCK, 4096, 4096, true);
        assert_eq!(zeros(0..8), Some(Stored(true)));
        assert_eq!(zeros(2..8), Some(Stored(false)));
        assert_eq!(tracker.punchable_runs(BLOCK), vec![(0..8)]);
        assert_eq!(tracker.punchable_bytes(), 4096);
        tracker.note_zero(BLOCK, 4096, 4096, false);
        assert_eq!(tracker.punchable_runs(BLOCK), []);
        tracker.note_data(BLOCK, 0, 1);
        assert_eq!((zeros(0..8), zeros(1..8)), (None, Some(Stored(false))));
        // A block that is all zero remembers it, too.
        tracker.note_zero(BLOCK, 0, 512 << 10, true);
        assert_eq!(tracker.content(BLOCK), Content::Dead);
        assert_eq!(zeros(0..128), Some(Stored(true)));
        tracker.set_punched(BLOCK);
        assert_eq!(zeros(0..128), Some(Stored(false)));
        assert!(tracker.shard(BLOCK).lock().is_empty());
    }

    #[test]
    fn a_failed_write_leaves_a_doubt() {
        let tracker = tracker();
        tracker.set_fresh(BLOCK);
        tracker.note_data(BLOCK, 4096, 4096);
        tracker.note_unknown(BLOCK, 4096, 4096);
        assert_eq!(tracker.unknown_runs(BLOCK), vec![(1..2)]);
        tracker.forget(BLOCK);
        assert_eq!(tracker.content(BLOCK), Content::Unknown);
    }
}
