//! The log as this program writes it: entries between "written" and "in its place".
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
//! 3. Entries lie one behind the other. The log begins again at its start only once all of them are
//!    retired and an entry behind them, its own tail, is durable: what is overwritten nobody needs.
//! 4. Numbers only grow, in all sessions of an open file.
//!
//! Nothing is synced here. Whoever syncs the file takes a [`Mark`] before, and hands it in after.
//!
//! # Readers that do not look at tails
//! By \[MS-VHDX\] 2.3.2 a sequence is replayed from its last entry's tail on. QEMU (10.0) replays all
//! of a sequence, from its first entry on; does not open a file that is shorter than one of its
//! entries says; of several sequences takes the one with the highest *first* number, also where one
//! that goes round the end of the log ends with a higher one; and takes any entry for a sequence's
//! second. Therefore entries that need each other are never on both sides of the log's end, and an
//! entry from which replaying is to begin anew is written *apart*: the sectors before and behind it
//! are no entries.
//!
//! # How often all entries have to be retired
//! A log of 1 MiB has 256 sectors. An entry of one page takes two, three with a sector bitmap's page.
//! So the log is full after at most 127 changes of the block table; then four syncs are due. Pages
//! are written in place also when a sync finds a quarter of the log durable but not applied, so that
//! there is never much to replay.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::sync::Arc;

use parking_lot::Mutex;
use uuid::Uuid;

use crate::format::vhdx::log::{Change, LogEntry, Page, entry_len};
use crate::format::vhdx::{MIB, PAGE};
use crate::storage::Storage;
use crate::units::{FileOffset, FileRange, round_down, round_up, u64_from, usize_from};

/// The most bytes of a log that are used, and so about the most memory.
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
    /// Bytes of it that are used.
    capacity: u64,
    /// Held across the write of an entry.
    state: Mutex<State>,
    /// Held while pages are written in their places, so that an older one never follows a newer.
    applying: Mutex<()>,
}

#[derive(Debug)]
struct State {
    entries: Option<Entries>,
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

/// The entries of a session.
#[derive(Debug)]
struct Entries {
    guid: Uuid,
    /// Where in the log the next one goes.
    head: u64,
    /// Those that are not retired, oldest first.
    unretired: VecDeque<Entry>,
    /// The number of the newest durable entry.
    durable: u64,
    /// The number of the newest entry whose pages are in their places.
    applied: u64,
}

#[derive(Debug)]
struct Entry {
    number: u64,
    /// Where in the log it lies.
    at: u64,
    /// Until they are in their places.
    pages: Vec<LoggedPage>,
}

/// Where an empty entry, its own tail, is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TailPlace {
    /// Behind the newest entry. There is always room.
    Next,
    /// Behind it, too, but apart; see [`Log::has_room_apart`].
    Apart,
    /// Apart, at the start of the log. The newest entry is durable and its own tail.
    Start,
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
                entries: None,
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
        state.entries = Some(Entries {
            guid,
            head: 0,
            unretired: VecDeque::new(),
            durable: 0,
            applied: 0,
        });
        // All else that is there is of other logs.
        let written = self.write(&mut state, Vec::new(), 0, 0);
        if written.is_err() {
            state.entries = None;
        }
        written
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
        state.entries = None;
    }

    /// Writes an entry that replaces `pages`, at most [`MAX_PAGES`]. Says whether there was room.
    ///
    /// # Errors
    /// The host's; what is in the log is then unknown.
    pub(super) fn append(&self, pages: Vec<LoggedPage>) -> io::Result<bool> {
        let mut state = self.state.lock();
        let len = entry_len(u64_from(pages.len()), 0);
        // A sector stays for the entry behind all others.
        if !self.has_room(&state, len.saturating_add(PAGE)) {
            return Ok(false);
        }
        self.write(&mut state, pages, 0, 0).map(|()| true)
    }

    /// Writes an empty entry. Everything before it is retired; once it is durable, nothing before it
    /// is needed.
    ///
    /// # Errors
    /// The host's; what is in the log is then unknown.
    ///
    /// # Panics
    /// Where something is not in its place, or there is no room.
    pub(super) fn append_tail(&self, place: TailPlace) -> io::Result<()> {
        let mut state = self.state.lock();
        assert!(state.pending.is_empty(), "the log has what is nowhere else");
        if let Some(entries) = &mut state.entries {
            entries.unretired.clear();
            if place == TailPlace::Start {
                entries.head = 0;
            }
        }
        let (before, behind) = match place {
            TailPlace::Next => (0, 0),
            TailPlace::Apart => (PAGE, PAGE),
            TailPlace::Start => (0, PAGE),
        };
        let len = PAGE.saturating_add(before).saturating_add(behind);
        assert!(self.has_room(&state, len), "the log has no room for a tail");
        self.write(&mut state, Vec::new(), before, behind)
    }

    /// Whether there is room for a [`TailPlace::Apart`].
    pub(super) fn has_room_apart(&self) -> bool {
        // The fourth is for the entry behind all others.
        self.has_room(&self.state.lock(), PAGE.saturating_mul(4))
    }

    /// Whether a few more entries might fill it.
    pub(super) fn is_nearly_full(&self) -> bool {
        !self.has_room(&self.state.lock(), self.capacity / 4)
    }

    fn has_room(&self, state: &State, len: u64) -> bool {
        let head = state.entries.as_ref().map_or(0, |entries| entries.head);
        head.saturating_add(len) <= self.capacity
    }

    /// Writes an entry, with so many bytes of zeros before and behind it. There is room.
    fn write(
        &self,
        state: &mut State,
        pages: Vec<LoggedPage>,
        before: u64,
        behind: u64,
    ) -> io::Result<()> {
        let State {
            entries,
            next_number,
            pending,
            lengths,
        } = state;
        let Some(entries) = entries else {
            return Err(io::Error::other("the log is not in use"));
        };
        let at = entries.head.saturating_add(before);
        let flushed = round_down(lengths.durable, MIB);
        let number = *next_number;
        let change = |(at, bytes): &LoggedPage| Change::Page {
            at: *at,
            bytes: Arc::clone(bytes),
        };
        let entry = LogEntry {
            sequence_number: number,
            tail: entries.unretired.front().map_or(at, |entry| entry.at),
            log_guid: entries.guid,
            flushed_file_offset: flushed,
            last_file_offset: round_up(lengths.needed, MIB).max(flushed),
            changes: pages.iter().map(change).collect(),
        };
        let entry = entry.encode();
        let zeros = |count| vec![0; usize_from(count)];
        let bytes = [zeros(before), entry, zeros(behind)].concat();
        let place = self.range.start.plus(entries.head);
        self.storage.write_all_at(&bytes, place)?;
        for (at, bytes) in &pages {
            pending.insert(*at, (Arc::clone(bytes), number));
        }
        let len = entry_len(u64_from(pages.len()), 0);
        entries.head = at.saturating_add(len);
        entries.unretired.push_back(Entry { number, at, pages });
        *next_number = number.saturating_add(1);
        Ok(())
    }

    /// What a sync that now begins covers.
    pub(super) fn mark(&self) -> Mark {
        let state = self.state.lock();
        let issued = state.next_number.saturating_sub(1);
        (state.entries.as_ref()).map_or_else(Mark::default, |entries| Mark {
            issued,
            applied: entries.applied,
        })
    }

    /// Notes that a sync that began at `mark` is done. Says whether the log fills up with entries
    /// that should be applied.
    pub(super) fn synced(&self, mark: Mark) -> bool {
        let mut state = self.state.lock();
        let Some(entries) = &mut state.entries else {
            return false;
        };
        // Of an earlier session's mark, no entry here is old enough.
        let newest = (entries.unretired.iter().rev()).find(|entry| entry.number <= mark.issued);
        if let Some(entry) = newest {
            entries.durable = entries.durable.max(entry.number);
        }
        while let Some(entry) = entries.unretired.front()
            && entry.number <= mark.applied
        {
            entries.unretired.pop_front();
        }
        let oldest = (entries.unretired.iter()).find(|entry| entry.number > entries.applied);
        let waiting = oldest.map_or(0, |entry| entries.head.saturating_sub(entry.at));
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
            let Some(entries) = &state.entries else {
                return Ok(());
            };
            for entry in entries
                .unretired
                .iter()
                .filter(|entry| entry.number <= entries.durable)
            {
                pages.extend(entry.pages.iter().cloned());
            }
            entries.durable
        };
        for (at, bytes) in &pages {
            self.storage.write_all_at(&**bytes, *at)?;
        }
        let mut state = self.state.lock();
        let State {
            entries, pending, ..
        } = &mut *state;
        if let Some(entries) = entries {
            entries.applied = entries.applied.max(upto);
            for entry in &mut entries.unretired {
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
        let entries = state.entries.as_ref();
        entries.is_some_and(|entries| {
            (entries.unretired.back()).is_some_and(|entry| entry.number > entries.durable)
        })
    }

    /// Whether replaying would need any entry but an empty one.
    pub(super) fn has_unretired(&self) -> bool {
        let state = self.state.lock();
        (state.entries.as_ref()).is_some_and(|entries| !entries.unretired.is_empty())
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
