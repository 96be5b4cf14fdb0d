//! A sparse file in memory.

use std::collections::BTreeMap;
use std::sync::{Arc, LazyLock};

use crate::units::{FileOffset, FileRange, round_down, u64_from, usize_from};

/// Bytes in a page: what the simulated host allocates at once.
pub(super) const PAGE: u64 = 4096;

type Page = [u8; usize_from(PAGE)];

static ZERO_PAGE: LazyLock<Arc<Page>> = LazyLock::new(|| Arc::new([0; usize_from(PAGE)]));

/// The bytes of a file. Pages are shared between clones until they are changed, so a clone costs
/// some bytes a page.
///
/// Invariant: no page starts at or behind the length, and bytes of the last page that lie behind the
/// length are zero. So an extension reads as zeros without doing anything.
#[derive(Clone, Debug, Default)]
pub(super) struct Content {
    len: u64,
    /// By offset; a missing one is a hole.
    pages: BTreeMap<u64, Arc<Page>>,
}

/// How a run of bytes is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RunKind {
    /// No pages.
    Hole,
    /// Pages that were zeroed as a whole and not written since.
    Zero,
    /// Pages with any content.
    Bytes,
}

/// A part of one page.
struct Piece {
    page: u64,
    /// Inside the page.
    bytes: std::ops::Range<usize>,
}

/// The parts of the pages that `range` touches, in order.
fn pieces(range: FileRange) -> impl Iterator<Item = Piece> {
    let (mut at, end) = (range.start.get(), range.end().get());
    std::iter::from_fn(move || {
        if at >= end {
            return None;
        }
        let page = round_down(at, PAGE);
        let stop = end.min(page.saturating_add(PAGE));
        let bytes = usize_from(at - page)..usize_from(stop - page);
        at = stop;
        Some(Piece { page, bytes })
    })
}

impl Content {
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// Bytes of the pages that are there.
    pub(super) fn allocated(&self) -> u64 {
        u64_from(self.pages.len()) * PAGE
    }

    /// How many bytes of `range` can be written, from its start, if no more than `new_pages` pages
    /// can be added.
    pub(super) fn fitting(&self, range: FileRange, new_pages: u64) -> u64 {
        let missing = |piece: &Piece| !self.pages.contains_key(&piece.page);
        let first_without = pieces(range).filter(missing).nth(usize_from(new_pages));
        first_without.map_or(range.len, |piece| {
            piece.page.saturating_sub(range.start.get())
        })
    }

    /// Fills `buf`; false where the file ends before.
    pub(super) fn read(&self, buf: &mut [u8], offset: FileOffset) -> bool {
        let range = FileRange::new(offset, u64_from(buf.len()));
        if range.end().get() > self.len {
            return false;
        }
        let mut rest = buf;
        for piece in pieces(range) {
            let (part, behind) = rest.split_at_mut(piece.bytes.len());
            match self.pages.get(&piece.page) {
                Some(page) => part.copy_from_slice(&page[piece.bytes]),
                None => part.fill(0),
            }
            rest = behind;
        }
        true
    }

    /// Writes, extending the file where needed.
    pub(super) fn write(&mut self, buf: &[u8], offset: FileOffset) {
        let range = FileRange::new(offset, u64_from(buf.len()));
        if range.is_empty() {
            return;
        }
        let mut rest = buf;
        for piece in pieces(range) {
            let (part, behind) = rest.split_at(piece.bytes.len());
            let page = self
                .pages
                .entry(piece.page)
                .or_insert_with(|| ZERO_PAGE.clone());
            Arc::make_mut(page)[piece.bytes].copy_from_slice(part);
            rest = behind;
        }
        self.len = self.len.max(range.end().get());
    }

    /// Makes the part of `range` inside the file read as zeros. Whole pages are given back if
    /// `release`, and else are there afterwards.
    pub(super) fn zero(&mut self, range: FileRange, release: bool) {
        let range = self.clip(range);
        if release {
            self.release(range);
            return;
        }
        for piece in pieces(range) {
            if piece.bytes.len() == usize_from(PAGE) {
                self.pages.insert(piece.page, ZERO_PAGE.clone());
            } else {
                let page = self
                    .pages
                    .entry(piece.page)
                    .or_insert_with(|| ZERO_PAGE.clone());
                Arc::make_mut(page)[piece.bytes].fill(0);
            }
        }
    }

    /// Only looks at pages that are there: a range may span many GiB of holes.
    fn release(&mut self, range: FileRange) {
        let (start, end) = (range.start.get(), range.end().get());
        if start >= end {
            return;
        }
        let touched: Vec<u64> = self
            .pages
            .range(round_down(start, PAGE)..end)
            .map(|(&page, _)| page)
            .collect();
        for page in touched {
            let (from, to) = (start.max(page), end.min(page + PAGE));
            // The tail of the last page counts as covered: there is nothing in it.
            if from == page && (to == page + PAGE || to == self.len) {
                self.pages.remove(&page);
            } else if let Some(bytes) = self.pages.get_mut(&page) {
                Arc::make_mut(bytes)[usize_from(from - page)..usize_from(to - page)].fill(0);
            }
        }
    }

    /// Makes the file at least `len` bytes long.
    pub(super) fn extend_to(&mut self, len: u64) {
        self.len = self.len.max(len);
    }

    pub(super) fn set_len(&mut self, len: u64) {
        if len < self.len {
            // Releases the pages behind, and zeroes what stays of the last one.
            self.release(FileRange::between(
                FileOffset::new(len),
                FileOffset::new(self.len),
            ));
        }
        self.len = len;
    }

    /// The part of `range` inside the file.
    pub(super) fn clip(&self, range: FileRange) -> FileRange {
        FileRange::between(range.start, range.end().min(FileOffset::new(self.len)))
    }

    /// What `range`, which lies inside the file, is stored as: runs of one kind, in order, without
    /// gaps.
    pub(super) fn runs(&self, range: FileRange) -> Vec<(FileRange, RunKind)> {
        let mut runs: Vec<(FileRange, RunKind)> = Vec::new();
        let mut push = |start: u64, end: u64, kind: RunKind| {
            let part = FileRange::between(
                range.start.max(FileOffset::new(start)),
                range.end().min(FileOffset::new(end)),
            );
            match runs.last_mut() {
                _ if part.is_empty() => {}
                Some((last, last_kind)) if *last_kind == kind => last.len += part.len,
                _ => runs.push((part, kind)),
            }
        };
        let mut at = round_down(range.start.get(), PAGE);
        for (&page, bytes) in self.pages.range(at..range.end().get().max(at)) {
            push(at, page, RunKind::Hole);
            let zero = Arc::ptr_eq(bytes, &ZERO_PAGE);
            push(
                page,
                page + PAGE,
                if zero { RunKind::Zero } else { RunKind::Bytes },
            );
            at = page + PAGE;
        }
        push(at, range.end().get(), RunKind::Hole);
        runs
    }

    /// The first run of pages that are there, inside `from..end` and the file.
    pub(super) fn next_data(&self, from: FileOffset, end: FileOffset) -> Option<FileRange> {
        let end = end.get().min(self.len);
        let first = round_down(from.get(), PAGE);
        if from.get() >= end {
            return None;
        }
        let mut pages = self.pages.range(first..end).map(|(&page, _)| page);
        let start = pages.next()?;
        let mut stop = start + PAGE;
        for page in pages {
            if page != stop {
                break;
            }
            stop += PAGE;
        }
        let start = FileOffset::new(start.max(from.get()));
        Some(FileRange::between(start, FileOffset::new(stop.min(end))))
    }

    /// Panics where the invariant above does not hold.
    #[cfg(test)]
    pub(super) fn assert_valid(&self) {
        if let Some((&page, bytes)) = self.pages.last_key_value() {
            assert!(
                page < self.len,
                "page {page:#x} lies behind the end {:#x}",
                self.len
            );
            let used = usize_from((self.len - page).min(PAGE));
            assert!(
                bytes[used..].iter().all(|&byte| byte == 0),
                "bytes behind the end"
            );
        }
    }
}
