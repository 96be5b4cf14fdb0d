//! The log as this program writes it: a ring of entries between "written" and "in its place".
//!
//! ```text
//!              written to the log                sync               written in place             sync
//!   changed  ----------------------> issued  ----------> durable  --------------------> applied -------> retired
//! ```
//!
//! Invariants:
//! 1. A page is written in its place only as a *durable* entry has it. So a power cut that tears the
//!    page finds it whole in the log.
//! 2. An entry's tail is the oldest entry that is not retired when it is written, or itself. So
//!    whichever entry is the last to survive a power cut, all that replaying needs is in its
//!    sequence.
//! 3. Sectors from the tail of the newest durable entry on are not overwritten. The tail of a newer
//!    one frees nothing before it is durable.
//! 4. Numbers and positions only grow, in all sessions of an open file.
//!
//! Nothing is synced here. Whoever syncs the file takes a [`Mark`] before, and hands it in after.
//!
//! # How often the ring has to be drained
//! A log of 1 MiB has 256 sectors. An entry of one page takes two, three with a sector bitmap's page.
//! Pages are written in place when a sync finds a quarter of the ring durable but not applied; two
//! syncs later its sectors are free again, so that a guest that flushes at least every 30 changes of
//! the block table never waits for the ring. One that never flushes fills it with 126 changes;
//! then it is drained, with three syncs.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::sync::Arc;

use parking_lot::Mutex;
use uuid::Uuid;

use crate::format::vhdx::log::{Change, LogEntry, Page, entry_len};
use crate::format::vhdx::{MIB, PAGE};
use crate::storage::Storage;
use crate::units::{FileOffset, FileRange, round_down, round_up, u64_from, usize_from};

/// The most bytes of a log that are in use at a time, and so about the most memory.
const MAX_IN_USE: u64 = 16 << 20;
/// The most pages in one entry: its descriptors fit one sector, the entry fits every log.
pub(super) const MAX_PAGES: usize = 126;

/// A page of metadata with its place in the file.
pub(super) type LoggedPage = (FileOffset, Arc<Page>);

/// The log of an open file.
#[derive(Debug)]
pub(super) struct Log {
    storage: Arc<dyn Storage>,
    range: FileRange,
    /// Bytes of it that may be in use at a time.
    capacity: u64,
    /// Held across the write of an entry.
    state: Mutex<State>,
    /// Held while pages are written in their places, so that an older one never follows a newer.
    applying: Mutex<()>,
}

#[derive(Debug)]
struct State {
    ring: Option<Ring>,
    next_number: u64,
    /// The latest content of each page that is logged but not in its place, with its entry's number.
    pending: BTreeMap<FileOffset, (Arc<Page>, u64)>,
    lengths: Lengths,
}

/// What entries say of the file's length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Lengths {
    /// One that it has, durably.
    pub(super) durable: u64,
    /// One that holds all that is in use.
    pub(super) needed: u64,
}

/// The entries of a session. A position counts the bytes since the session began; it is a place in
/// the log modulo the log's length.
#[derive(Debug)]
struct Ring {
    guid: Uuid,
    /// Where the next entry goes.
    head: u64,
    /// From here on nothing is overwritten.
    protected_from: u64,
    /// Those that are not retired, oldest first.
    entries: VecDeque<Entry>,
    /// The number of the newest durable entry.
    durable: u64,
    /// The number of the newest entry whose pages are in their places.
    applied: u64,
}

#[derive(Debug)]
struct Entry {
    number: u64,
    at: u64,
    tail: u64,
    /// Until they are in their places.
    pages: Vec<LoggedPage>,
}

/// What had been done when a sync began.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Mark {
    issued: u64,
    applied: u64,
}

impl Log {
    /// The log at `range`, not in use, of a file of `len` bytes.
    pub(super) fn new(storage: Arc<dyn Storage>, range: FileRange, len: u64) -> Self {
        Self {
            storage,
            range,
            capacity: range.len.min(MAX_IN_USE),
            state: Mutex::new(State {
                ring: None,
                next_number: 1,
                pending: BTreeMap::new(),
                lengths: Lengths {
                    durable: len,
                    needed: len,
                },
            }),
            applying: Mutex::new(()),
        }
    }

    /// Where it lies.
    pub(super) fn range(&self) -> FileRange {
        self.range
    }

    /// Begins a session: writes an empty entry of the new log `guid` to the start of the log.
    ///
    /// # Errors
    /// The host's; the log is then not in use.
    pub(super) fn start(&self, guid: Uuid) -> io::Result<()> {
        let mut state = self.state.lock();
        state.ring = Some(Ring {
            guid,
            head: 0,
            protected_from: 0,
            entries: VecDeque::new(),
            durable: 0,
            applied: 0,
        });
        let written = self.write(&mut state, Vec::new(), 0);
        if written.is_err() {
            state.ring = None;
        }
        written.map(drop)
    }

    /// Ends the session. Everything is in its place, and no header names the log any more.
    ///
    /// # Panics
    /// Where something is not in its place: it would be lost.
    pub(super) fn end(&self) {
        let mut state = self.state.lock();
        assert!(
            state.pending.is_empty(),
            "the log has changes that are nowhere else"
        );
        state.ring = None;
    }

    /// Writes an entry that replaces `pages`, at most [`MAX_PAGES`]. Says whether there was room.
    ///
    /// # Errors
    /// The host's; what is in the log is then unknown.
    pub(super) fn append(&self, pages: Vec<LoggedPage>) -> io::Result<bool> {
        // One sector stays for the entry that a full ring is drained with.
        self.write(&mut self.state.lock(), pages, PAGE)
    }

    /// Writes an empty entry: a tail, durable with the next sync. There is always room for one.
    ///
    /// # Errors
    /// The host's; what is in the log is then unknown.
    pub(super) fn append_tail(&self) -> io::Result<()> {
        let has_room = self.write(&mut self.state.lock(), Vec::new(), 0)?;
        assert!(has_room, "the ring has no room for a tail");
        Ok(())
    }

    /// Writes an entry where it leaves `keep` bytes of the ring, and a sector so that the head does
    /// not meet the tail.
    fn write(&self, state: &mut State, pages: Vec<LoggedPage>, keep: u64) -> io::Result<bool> {
        let State {
            ring,
            next_number,
            pending,
            lengths,
        } = state;
        let Some(ring) = ring else {
            return Err(io::Error::other("the log is not in use"));
        };
        let len = entry_len(u64_from(pages.len()), 0);
        let at = ring.head;
        let head = at.saturating_add(len);
        let needed = head.saturating_add(keep).saturating_add(PAGE);
        if needed.saturating_sub(ring.protected_from) > self.capacity {
            return Ok(false);
        }
        let tail = ring.entries.front().map_or(at, |entry| entry.at);
        let flushed = round_down(lengths.durable, MIB);
        let number = *next_number;
        let change = |(at, bytes): &LoggedPage| Change::Page {
            at: *at,
            bytes: Arc::clone(bytes),
        };
        let entry = LogEntry {
            sequence_number: number,
            tail: self.place(tail),
            log_guid: ring.guid,
            flushed_file_offset: flushed,
            last_file_offset: round_up(lengths.needed, MIB).max(flushed),
            changes: pages.iter().map(change).collect(),
        };
        self.write_around(&entry.encode(), self.place(at))?;
        for (at, bytes) in &pages {
            pending.insert(*at, (Arc::clone(bytes), number));
        }
        ring.head = head;
        ring.entries.push_back(Entry {
            number,
            at,
            tail,
            pages,
        });
        *next_number = number.saturating_add(1);
        Ok(true)
    }

    /// The place in the log of `position`.
    fn place(&self, position: u64) -> u64 {
        position.checked_rem(self.range.len).unwrap_or(0)
    }

    fn write_around(&self, bytes: &[u8], place: u64) -> io::Result<()> {
        let before_end = usize_from(self.range.len.saturating_sub(place)).min(bytes.len());
        let (first, rest) = bytes.split_at(before_end);
        self.storage
            .write_all_at(first, self.range.start.plus(place))?;
        if rest.is_empty() {
            return Ok(());
        }
        self.storage.write_all_at(rest, self.range.start)
    }

    /// What a sync that now begins covers.
    pub(super) fn mark(&self) -> Mark {
        let state = self.state.lock();
        let issued = state.next_number.saturating_sub(1);
        state.ring.as_ref().map_or_else(Mark::default, |ring| Mark {
            issued,
            applied: ring.applied,
        })
    }

    /// Notes that a sync that began at `mark` is done. Says whether the ring fills up with entries
    /// that should be applied.
    pub(super) fn synced(&self, mark: Mark) -> bool {
        let mut state = self.state.lock();
        let Some(ring) = &mut state.ring else {
            return false;
        };
        // Of an earlier session's mark, no entry here is old enough.
        let newest = (ring.entries.iter().rev()).find(|entry| entry.number <= mark.issued);
        if let Some(entry) = newest
            && entry.number > ring.durable
        {
            ring.durable = entry.number;
            ring.protected_from = entry.tail;
        }
        while let Some(entry) = ring.entries.front()
            && entry.number <= mark.applied
        {
            ring.entries.pop_front();
        }
        let oldest = (ring.entries.iter()).find(|entry| entry.number > ring.applied);
        let waiting = oldest.map_or(0, |entry| ring.head.saturating_sub(entry.at));
        waiting > self.capacity / 4
    }

    /// Writes the pages of durable entries in their places, each as the newest of them has it. They
    /// are there durably with the next sync.
    ///
    /// # Errors
    /// The host's. Pages may be in their places or torn, which the log heals.
    pub(super) fn apply(&self) -> io::Result<()> {
        let _applying = self.applying.lock();
        let mut pages: BTreeMap<FileOffset, Arc<Page>> = BTreeMap::new();
        let upto = {
            let state = self.state.lock();
            let Some(ring) = &state.ring else {
                return Ok(());
            };
            for entry in ring
                .entries
                .iter()
                .filter(|entry| entry.number <= ring.durable)
            {
                pages.extend(entry.pages.iter().cloned());
            }
            ring.durable
        };
        for (at, bytes) in &pages {
            self.storage.write_all_at(&**bytes, *at)?;
        }
        let mut state = self.state.lock();
        let State { ring, pending, .. } = &mut *state;
        if let Some(ring) = ring {
            ring.applied = ring.applied.max(upto);
            for entry in &mut ring.entries {
                if entry.number <= upto {
                    entry.pages = Vec::new();
                }
            }
        }
        for at in pages.keys() {
            if pending.get(at).is_some_and(|(_, number)| *number <= upto) {
                pending.remove(at);
            }
        }
        Ok(())
    }

    /// Whether an entry is issued that no sync covers yet.
    pub(super) fn has_undurable(&self) -> bool {
        let state = self.state.lock();
        let ring = state.ring.as_ref();
        ring.is_some_and(|ring| {
            (ring.entries.back()).is_some_and(|entry| entry.number > ring.durable)
        })
    }

    /// Whether replaying would need any entry but an empty one.
    pub(super) fn has_unretired(&self) -> bool {
        let state = self.state.lock();
        (state.ring.as_ref()).is_some_and(|ring| !ring.entries.is_empty())
    }

    /// The page at `at`, if the file does not have its latest content.
    pub(super) fn pending(&self, at: FileOffset) -> Option<Arc<Page>> {
        let state = self.state.lock();
        state.pending.get(&at).map(|(bytes, _)| Arc::clone(bytes))
    }

    /// Changes what entries say of the file's length from now on; tells what they said before.
    pub(super) fn set_lengths(&self, change: impl FnOnce(&mut Lengths)) -> Lengths {
        let mut state = self.state.lock();
        let before = state.lengths;
        change(&mut state.lengths);
        before
    }
}
