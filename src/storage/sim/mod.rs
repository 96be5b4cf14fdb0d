//! A simulated host file: power cuts, failures, and a log of what was asked for.
//!
//! # What is simulated
//! The file has a *volatile* content, which reads see, and a *durable* one; between them stands a
//! journal of the changes since the last sync, in the order of issue. [`SimStorage::crash`] builds
//! the file as a power cut would leave it: the durable content, and on top of it, in that order, what
//! a [`CrashChoice`] keeps of the journal. All that follows from that is possible on a real host, or
//! stricter:
//!
//! 1. A write, copy, zeroing or punched hole consists of sectors of 512 bytes. Each is kept or lost
//!    by itself, so any subset of a change and of all changes may be there. [`Choice::Seeded`] can be
//!    asked for a disk that writes 4096 bytes as a whole.
//! 2. A sector is never torn. A change that covers a part of a sector carries the sector as the page
//!    cache had it then: with earlier changes of it, whether those are kept or not.
//! 3. A change of the length is kept or lost by itself. Where an extension is lost and a write beyond
//!    the old end is kept, the file ends with the last sector that is kept. Where a truncation is
//!    lost, the old bytes stay, and a later extension that is kept brings them back into the file.
//!    Else what an extension exposes reads as zeros. Punched holes and zeroed ranges never extend the
//!    file; copies do, as writes do.
//! 4. A sync makes durable what was recorded when it was called. What other threads change while it
//!    runs (the hook of [`SimStorage::on_op`] is called then) stays in the journal.
//! 5. A failed operation may have done a part of its work: see [`Fault`]. A failed sync may have
//!    thrown away what it did not write ([`Effect::Scatter`]).
//! 6. The death of the process ([`SimStorage::kill`]) loses nothing that was issued and makes nothing
//!    durable.
//!
//! # What is not
//! Corruption at rest, sectors written to a wrong place, torn sectors, and an operation that is
//! itself half visible to a concurrent read: every operation is atomic for readers.
//!
//! The content is sparse, in pages of 4 KiB: a file of many GiB costs what was written to it.

mod content;
mod faults;
mod journal;
mod ops;
#[cfg(test)]
mod tests;

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;

pub use faults::{Counters, Effect, Fault, Op, OpKind, is_power_cut};
pub use journal::{Change, Choice, CrashChoice, Keep, Random};

use self::content::{Content, PAGE};
use self::faults::Faults;
use self::journal::Journal;
use super::Storage;
use super::host::{HostFile, HostOptions};
use crate::units::{FileOffset, u64_from, usize_from};

/// The longest file, as on Linux.
const MAX_LEN: u64 = u64::MAX >> 1;

/// Bytes that [`SimStorage::from_file`] reads at once.
const LOAD_CHUNK: u64 = 1 << 20;

type Hook = Arc<dyn Fn(&SimStorage, &Op) + Send + Sync>;

/// A host file in memory that can lose power. Shared by threads like a real one.
#[derive(Default)]
pub struct SimStorage {
    state: Mutex<State>,
    hook: Mutex<Option<Hook>>,
    wanted: AtomicBool,
}

#[derive(Debug, Default)]
struct State {
    volatile: Content,
    durable: Content,
    journal: Journal,
    faults: Faults,
    dead: bool,
    capacity: Option<u64>,
    no_punch: bool,
    log: Vec<Op>,
    counters: Counters,
}

impl SimStorage {
    /// An empty file.
    pub fn new() -> Self {
        Self::default()
    }

    /// As if another program waited to open the file from now on, or no longer.
    pub fn set_wanted(&self, wanted: bool) {
        self.wanted.store(wanted, Ordering::Relaxed);
    }

    /// A file that holds `bytes`, durably. Pages of zeros are data, not holes.
    pub fn from_bytes(bytes: &[u8]) -> Self {
        let mut content = Content::default();
        content.write(bytes, FileOffset::new(0));
        Self::from_content(content)
    }

    /// What the file at `path` holds, durably, holes included. No lock is taken.
    ///
    /// # Errors
    /// Those of opening and reading the file.
    pub fn from_file(path: &Path) -> io::Result<Self> {
        let options = HostOptions {
            read_only: true,
            lock: false,
            ..HostOptions::default()
        };
        let file = HostFile::open(path, &options).map_err(io::Error::other)?;
        let end = FileOffset::new(file.len()?);
        let mut content = Content::default();
        content.set_len(end.get());
        let mut at = FileOffset::new(0);
        let mut buffer = vec![0; usize_from(LOAD_CHUNK)];
        while let Some(data) = file.next_data(at, end)? {
            let part = &mut buffer[..usize_from(data.len.min(LOAD_CHUNK))];
            file.read_exact_at(part, data.start)?;
            content.write(part, data.start);
            at = data.start.plus(u64_from(part.len()));
        }
        Ok(Self::from_content(content))
    }

    fn from_content(content: Content) -> Self {
        let state = State {
            volatile: content.clone(),
            durable: content,
            ..State::default()
        };
        Self {
            state: Mutex::new(state),
            ..Self::default()
        }
    }

    /// All bytes of the file, as reads see them now.
    pub fn to_bytes(&self) -> Vec<u8> {
        let state = self.state.lock();
        let mut bytes = vec![0; usize_from(state.volatile.len())];
        assert!(
            state.volatile.read(&mut bytes, FileOffset::new(0)),
            "the length is right"
        );
        bytes
    }

    /// A file of its own in the same state: content, what is durable, and the outstanding changes.
    /// Limits of the host are kept; hook, failures to come, log and counters are not.
    pub fn fork(&self) -> Self {
        let state = self.state.lock();
        let forked = State {
            volatile: state.volatile.clone(),
            durable: state.durable.clone(),
            journal: state.journal.clone(),
            capacity: state.capacity,
            no_punch: state.no_punch,
            ..State::default()
        };
        Self {
            state: Mutex::new(forked),
            ..Self::default()
        }
    }

    /// The file after the death of the process: all that was issued is there, and as durable as
    /// before. Every later call here fails.
    pub fn kill(&self) -> Self {
        let survivor = self.fork();
        self.state.lock().dead = true;
        survivor
    }

    /// The file after a power cut now, all of it durable. Nothing changes here.
    pub fn crash(&self, choice: &mut dyn CrashChoice) -> Self {
        let (mut content, journal, capacity, no_punch) = {
            let state = self.state.lock();
            (
                state.durable.clone(),
                state.journal.clone(),
                state.capacity,
                state.no_punch,
            )
        };
        journal.apply(&mut content, choice);
        let crashed = Self::from_content(content);
        {
            let mut state = crashed.state.lock();
            (state.capacity, state.no_punch) = (capacity, no_punch);
        }
        crashed
    }

    /// The changes that a power cut now could lose, oldest first.
    pub fn unsynced(&self) -> Vec<Change> {
        self.state.lock().journal.changes()
    }

    /// How many changes a power cut now could lose.
    pub fn unsynced_len(&self) -> usize {
        self.state.lock().journal.len()
    }

    /// Choices that are worth trying now: all lost, all kept, the order kept up to each change, all
    /// but each one, only each one, and then every subset of the units if there are at most
    /// `1 << exhaustive_bits`, else `random` seeded ones, every fourth on a disk that writes 4096
    /// bytes as a whole.
    ///
    /// Of very many outstanding changes only the last 64 are singled out.
    pub fn choices(&self, exhaustive_bits: u32, random: u64, seed: u64) -> Vec<Choice> {
        let changes = self.unsynced();
        let Some(last) = changes.last() else {
            return vec![Choice::AllKept];
        };
        let units = last.first_unit + last.units;
        if units <= u64::from(exhaustive_bits.min(20)) {
            return (0..1 << units).map(Choice::Units).collect();
        }
        let mut choices = vec![Choice::AllLost, Choice::AllKept];
        for index in changes.len().saturating_sub(64)..changes.len() {
            choices.extend([
                Choice::Before(index),
                Choice::AllBut(index),
                Choice::Only(index),
            ]);
        }
        if changes.len() <= usize_from(u64::from(exhaustive_bits.min(20))) {
            choices.extend((0..1 << changes.len()).map(Choice::Changes));
        }
        let mut seeds = Random::new(seed);
        choices.extend((0..random).map(|n| {
            let atomic = if n % 4 == 3 {
                PAGE
            } else {
                crate::units::SECTOR_SIZE
            };
            Choice::Seeded {
                seed: seeds.next(),
                atomic,
            }
        }));
        choices
    }

    /// Lets an operation fail. Several may be armed.
    pub fn inject(&self, fault: Fault) {
        self.state.lock().faults.arm(fault);
    }

    /// Forgets the failures that are armed. A power cut stays.
    pub fn clear_faults(&self) {
        self.state.lock().faults.clear();
    }

    /// Cuts power after that many further operations that change something (syncs among them): every
    /// later call fails, see [`is_power_cut`], and [`Self::crash`] gives the states as of then.
    pub fn cut_after(&self, changing_ops: u64) {
        self.state.lock().faults.cut_after(changing_ops);
    }

    /// Whether power was cut.
    pub fn is_cut(&self) -> bool {
        self.state.lock().faults.is_cut()
    }

    /// The most bytes that the host stores for the file; what needs more fails with
    /// [`io::ErrorKind::StorageFull`], a write after the part that fitted. `None`: no limit.
    pub fn set_capacity(&self, bytes: Option<u64>) {
        self.state.lock().capacity = bytes;
    }

    /// Whether the host can punch holes; it can at first.
    pub fn set_punch_supported(&self, supported: bool) {
        self.state.lock().no_punch = !supported;
    }

    /// Has `hook` called before each operation, on the thread that asks for it and without a lock
    /// held: it may use this storage, and is called for what it asks of it too. What happens while it
    /// runs for a sync is not covered by that sync. Replaces the earlier hook.
    pub fn on_op(&self, hook: impl Fn(&SimStorage, &Op) + Send + Sync + 'static) {
        *self.hook.lock() = Some(Arc::new(hook));
    }

    /// Has no hook called any more.
    pub fn clear_hook(&self) {
        *self.hook.lock() = None;
    }

    /// The operations since the last call, in order, failed ones included.
    pub fn take_log(&self) -> Vec<Op> {
        std::mem::take(&mut self.state.lock().log)
    }

    /// What was done so far.
    pub fn counters(&self) -> Counters {
        self.state.lock().counters
    }
}
