//! What FAT and exFAT have in common: a heap of clusters, a table that chains them, and folders of
//! 32-byte entries.
//!
//! Here a cluster goes by its *index*, from 0. On the disk the first one is numbered 2.

use std::ops::Range;

use rangemap::RangeSet;

use super::bits::{clear_runs, find};
use super::view::View;
use super::{Trouble, add_run};
use crate::units::{div_ceil, usize_from};

/// What the first cluster is called on the disk.
pub(super) const FIRST: u32 = 2;

/// The most clusters that are taken: four maps of a bit each are kept in memory, 256 MiB in all.
/// FAT32 has half as many; exFAT has as many where 128 KiB each make 64 TiB.
pub(super) const MAX_CLUSTERS: u32 = 1 << 29;

/// The most links of a table that lead elsewhere than to the cluster behind: each takes 8 bytes.
const MAX_JUMPS: usize = 8 << 20;

/// Bytes of an entry in a folder.
pub(super) const ENTRY_LEN: usize = 32;

/// The most bytes of a folder that are read at a time.
const FOLDER_PIECE: u64 = 64 << 10;

/// Where the clusters lie, in bytes of the part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Heap {
    start: u64,
    cluster_size: u64,
    count: u32,
}

impl Heap {
    /// `count` clusters of `cluster_size` bytes each, from byte `start` on. `None` where there are
    /// none, too many, or some beyond byte `limit`.
    pub(super) fn new(start: u64, cluster_size: u64, count: u32, limit: u64) -> Option<Self> {
        let end = start.checked_add(cluster_size.checked_mul(u64::from(count))?)?;
        let good = (1..=MAX_CLUSTERS).contains(&count) && cluster_size > 0 && end <= limit;
        good.then_some(Self {
            start,
            cluster_size,
            count,
        })
    }

    /// How many clusters there are.
    pub(super) fn count(&self) -> u64 {
        u64::from(self.count)
    }

    /// Bytes of a cluster.
    pub(super) fn cluster_size(&self) -> u64 {
        self.cluster_size
    }

    /// The index of the cluster that the disk calls `cluster`, if there is such a one.
    pub(super) fn index(&self, cluster: u32) -> Option<u32> {
        (cluster.checked_sub(FIRST)).filter(|index| *index < self.count)
    }

    /// As [`Self::index`], of the first cluster of something.
    ///
    /// # Errors
    /// [`Trouble::Skip`] where there is no such cluster.
    pub(super) fn first(&self, cluster: u32) -> Result<u32, Trouble> {
        self.index(cluster).ok_or_else(|| {
            Trouble::skip(format!(
                "has something in cluster {cluster}, which it does not have: {CHECK_IT}"
            ))
        })
    }

    /// How many clusters hold `len` bytes.
    pub(super) fn clusters_for(&self, len: u64) -> u64 {
        div_ceil(len, self.cluster_size)
    }

    /// Where a run of existing clusters lies, in bytes of the part.
    pub(super) fn bytes(&self, run: &Range<u64>) -> Range<u64> {
        // `new` saw that the last cluster's end is a number.
        self.start + run.start * self.cluster_size..self.start + run.end * self.cluster_size
    }

    /// Where the runs lie, in bytes of the part.
    pub(super) fn all_bytes(&self, runs: &[Range<u64>]) -> Vec<Range<u64>> {
        runs.iter().map(|run| self.bytes(run)).collect()
    }
}

/// What to do about a filesystem whose structures contradict each other.
pub(super) const CHECK_IT: &str = "have its own system check it (chkdsk, fsck)";

/// What a table says of a cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Link {
    /// The next one has this index.
    Next(u32),
    /// It is the last one.
    End,
    /// It belongs to no chain.
    Nowhere,
}

/// The chains of clusters, kept small: most links lead to the cluster behind, which takes a bit.
#[derive(Debug)]
pub(super) struct Chains {
    count: u64,
    follows: Vec<u8>,
    ends: Vec<u8>,
    /// From, to: in the order of the former.
    jumps: Vec<(u32, u32)>,
}

impl Chains {
    /// Of clusters that are all in no chain.
    pub(super) fn new(heap: &Heap) -> Self {
        Self {
            count: heap.count(),
            follows: bitmap(heap),
            ends: bitmap(heap),
            jumps: Vec::new(),
        }
    }

    /// Takes down what the table says of cluster `index`. Called with rising ones.
    ///
    /// # Errors
    /// [`Trouble::Skip`] where the chains are in too many pieces.
    pub(super) fn push(&mut self, index: u32, link: Link) -> Result<(), Trouble> {
        let at = u64::from(index);
        match link {
            Link::Next(next) if u64::from(next) == at + 1 => set(&mut self.follows, at..at + 1),
            Link::End => set(&mut self.ends, at..at + 1),
            Link::Next(_) if self.jumps.len() >= MAX_JUMPS => {
                let pieces = format!("has its files in more than {MAX_JUMPS} pieces");
                return Err(Trouble::skip(pieces));
            }
            Link::Next(next) => self.jumps.push((index, next)),
            Link::Nowhere => {}
        }
        Ok(())
    }

    /// The chain that begins at cluster `first`, run by run. All of it is claimed.
    ///
    /// # Errors
    /// [`Trouble::Skip`] where it does not come to an end, or as [`Claims::take`].
    pub(super) fn follow(
        &self,
        first: u32,
        claims: &mut Claims,
    ) -> Result<Vec<Range<u64>>, Trouble> {
        let mut runs = Vec::new();
        let mut at = u64::from(first);
        loop {
            let last = find(&self.follows, at, self.count, false);
            let run = at..last.saturating_add(1);
            // Nothing is claimed twice, so that this ends.
            claims.take(&run)?;
            runs.push(run);
            if is_set(&self.ends, last) {
                return Ok(runs);
            }
            let jump = (self.jumps).binary_search_by_key(&last, |(from, _)| u64::from(*from));
            let (_, next) = jump.ok().map(|found| self.jumps[found]).ok_or_else(|| {
                let cluster = last.saturating_add(u64::from(FIRST));
                Trouble::skip(format!(
                    "has a chain of clusters that breaks off at {cluster}: {CHECK_IT}"
                ))
            })?;
            at = u64::from(next);
        }
    }
}

/// Which clusters are in use, and which of them something that was found owns.
#[derive(Debug)]
pub(super) struct Claims {
    count: u64,
    used: Vec<u8>,
    taken: Vec<u8>,
}

impl Claims {
    /// Of a map with a bit for each cluster, least significant first, set where it is in use. Bits
    /// that it does not have count as set.
    pub(super) fn new(heap: &Heap, mut used: Vec<u8>) -> Self {
        let taken = bitmap(heap);
        used.resize(taken.len(), 0xff);
        Self {
            count: heap.count(),
            used,
            taken,
        }
    }

    /// Of no map yet: nothing is free.
    pub(super) fn unmarked(heap: &Heap) -> Self {
        Self::new(heap, Vec::new())
    }

    /// The same claims, with the map that says what is in use.
    ///
    /// # Errors
    /// [`Trouble::Skip`] where one of the claimed clusters counts as free.
    pub(super) fn marked(mut self, mut used: Vec<u8>) -> Result<Self, Trouble> {
        used.resize(self.taken.len(), 0xff);
        self.used = used;
        let mut at = 0;
        while at < self.count {
            let start = find(&self.taken, at, self.count, true);
            at = find(&self.taken, start, self.count, false);
            self.check_used(&(start..at))?;
        }
        Ok(self)
    }

    /// Says that something owns a run of clusters.
    ///
    /// # Errors
    /// [`Trouble::Skip`] where one of them does not exist, counts as free, or is owned already.
    pub(super) fn take(&mut self, run: &Range<u64>) -> Result<(), Trouble> {
        if run.end > self.count {
            let cluster = self.count + u64::from(FIRST);
            return Err(Trouble::skip(format!(
                "has something in cluster {cluster}, which it does not have: {CHECK_IT}"
            )));
        }
        self.check_used(run)?;
        let taken = find(&self.taken, run.start, run.end, true);
        if taken < run.end {
            return Err(contradiction("in two files", taken));
        }
        set(&mut self.taken, run.clone());
        Ok(())
    }

    fn check_used(&self, run: &Range<u64>) -> Result<(), Trouble> {
        let free = find(&self.used, run.start, run.end, false);
        if free < run.end {
            return Err(contradiction("in use and marked as free", free));
        }
        Ok(())
    }

    /// What is not in use, in bytes of the part.
    ///
    /// # Errors
    /// [`Trouble::Skip`] where it is in too many pieces.
    pub(super) fn free(&self, heap: &Heap) -> Result<RangeSet<u64>, Trouble> {
        let mut free = RangeSet::new();
        for run in clear_runs(&self.used, self.count) {
            add_run(&mut free, heap.bytes(&run))?;
        }
        Ok(free)
    }
}

fn contradiction(what: &str, index: u64) -> Trouble {
    let cluster = index.saturating_add(u64::from(FIRST));
    Trouble::skip(format!(
        "has a cluster that is {what}, {cluster}: {CHECK_IT}"
    ))
}

/// A bit for each cluster, all clear.
pub(super) fn bitmap(heap: &Heap) -> Vec<u8> {
    vec![0; usize_from(div_ceil(heap.count(), 8))]
}

/// Sets a run of bits, which must all be there.
pub(super) fn set(bitmap: &mut [u8], run: Range<u64>) {
    let mut at = run.start;
    while at < run.end {
        let byte = &mut bitmap[usize_from(at / 8)];
        if at.is_multiple_of(8) && run.end - at >= 8 {
            *byte = 0xff;
            at += 8;
        } else {
            *byte |= 1 << (at % 8);
            at += 1;
        }
    }
}

pub(super) fn is_set(bitmap: &[u8], at: u64) -> bool {
    let byte = bitmap.get(usize_from(at / 8));
    byte.is_some_and(|byte| byte >> (at % 8) & 1 == 1)
}

/// The entries of a folder, in order: all that its ranges have room for.
pub(super) struct Entries<'v, 'd> {
    view: &'v View<'d>,
    ranges: std::vec::IntoIter<Range<u64>>,
    /// What of the current range is not read yet.
    rest: Range<u64>,
    buf: Vec<u8>,
    at: usize,
}

impl<'v, 'd> Entries<'v, 'd> {
    /// Of the folder that lies in `ranges`, bytes of the part, each a multiple of an entry long.
    pub(super) fn new(view: &'v View<'d>, ranges: Vec<Range<u64>>) -> Self {
        Self {
            view,
            ranges: ranges.into_iter(),
            rest: 0..0,
            buf: Vec::new(),
            at: 0,
        }
    }

    /// The next one; `None` behind the last.
    ///
    /// # Errors
    /// As [`View::read`].
    pub(super) fn next(&mut self) -> Result<Option<[u8; ENTRY_LEN]>, Trouble> {
        loop {
            if let Some((entry, _)) = self.buf[self.at..].split_first_chunk() {
                self.at += ENTRY_LEN;
                return Ok(Some(*entry));
            }
            while self.rest.is_empty() {
                match self.ranges.next() {
                    Some(range) => self.rest = range,
                    None => return Ok(None),
                }
            }
            let len = (self.rest.end - self.rest.start).min(FOLDER_PIECE);
            self.buf = self.view.read(self.rest.start, len)?;
            self.at = 0;
            self.rest.start += len;
        }
    }
}

/// Bytes in all of the runs' clusters.
pub(super) fn capacity(heap: &Heap, runs: &[Range<u64>]) -> u64 {
    let clusters: u64 = runs.iter().map(|run| run.end - run.start).sum();
    clusters * heap.cluster_size()
}

/// A disk in memory, for the tests of both.
#[cfg(test)]
pub(super) mod memory {
    use std::io;

    use super::super::view::{Source, View};
    use super::super::{Trouble, Volume};
    use crate::units::{u64_from, usize_from};

    pub(in crate::guest) struct Memory<'a>(pub(in crate::guest) &'a [u8]);

    impl Source for Memory<'_> {
        fn len(&self) -> u64 {
            u64_from(self.0.len())
        }

        fn sector_size(&self) -> u64 {
            512
        }

        fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
            let at = usize_from(offset);
            buf.copy_from_slice(&self.0[at..at + buf.len()]);
            Ok(())
        }
    }

    /// What a reader finds, or why not.
    pub(in crate::guest) fn read_with(
        bytes: &[u8],
        read: impl Fn(&View<'_>) -> Result<Volume, Trouble>,
    ) -> Result<Volume, String> {
        read(&View::whole(&Memory(bytes))).map_err(|trouble| match trouble {
            Trouble::Skip { reason, hibernated } => format!("{reason} ({hibernated})"),
            Trouble::Io(error) => panic!("{error}"),
        })
    }
}
