//! The file's length and free space as every format handles them: cleaning, punching, reserving.
//! How a file grows and is cut is each format's own business.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::{Condvar, Mutex, MutexGuard};

use super::{Cut, Image, Reserved};
use crate::error::DiskError;
use crate::map::{FreeSpace, SlotShape};
use crate::storage::Storage;
use crate::units::{FileOffset, FileRange, round_up};

/// The most bytes of free space that one call cleans or punches.
const CLEAN_BATCH: u64 = 64 << 20;

/// The free space at the end of a file, and what of it may be cut off now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Tail {
    /// Nothing.
    Nothing,
    /// The host gave up a part of what it stored there: come again.
    Hollowed,
    /// This range, which is the caller's now.
    Taken {
        /// Up to the end of what can be free.
        range: FileRange,
        /// Whether there is more in front of it.
        more: bool,
    },
}

/// The space of one image's file.
#[derive(Debug)]
pub(crate) struct Space {
    storage: Arc<dyn Storage>,
    shape: SlotShape,
    free: Mutex<FreeSpace>,
    /// Held across the I/O that changes the file's length, or cleans free space for somebody who waits.
    length_lock: Mutex<()>,
    file_len: AtomicU64,
    punch_holes: bool,
    /// Cleared when the host says that it cannot punch holes.
    host_punches: AtomicBool,
    /// What of the tail was punched, for being cut off; a hint.
    hollowed: Mutex<Option<FileRange>>,
    /// How many have taken free space for a while, to clean it or to cut it off.
    absent: Mutex<usize>,
    returned: Condvar,
    /// How often the host was given space back.
    gained: AtomicU64,
}

/// Some free space is away for a while, until this is dropped.
#[derive(Debug)]
pub(crate) struct Absent<'a>(&'a Space);

impl Drop for Absent<'_> {
    fn drop(&mut self) {
        let mut absent = self.0.absent.lock();
        *absent = absent.saturating_sub(1);
        drop(absent);
        self.0.returned.notify_all();
    }
}

impl Space {
    /// Of a file of `file_len` bytes with `free` space for slots of `shape`.
    pub(crate) fn new(
        storage: Arc<dyn Storage>,
        shape: SlotShape,
        free: FreeSpace,
        file_len: u64,
        punch_holes: bool,
    ) -> Self {
        Self {
            storage,
            shape,
            free: Mutex::new(free),
            length_lock: Mutex::new(()),
            file_len: AtomicU64::new(file_len),
            punch_holes,
            host_punches: AtomicBool::new(true),
            hollowed: Mutex::new(None),
            absent: Mutex::new(0),
            returned: Condvar::new(),
            gained: AtomicU64::new(0),
        }
    }

    /// The file's length in bytes, as last set.
    pub(crate) fn file_len(&self) -> u64 {
        self.file_len.load(Ordering::Acquire)
    }

    /// Notes that the file's length was changed, under the length lock.
    pub(crate) fn set_file_len(&self, len: u64) {
        if self.file_len.swap(len, Ordering::AcqRel) > len {
            self.note_gain();
        }
    }

    /// The free space. Not to be held across I/O.
    pub(crate) fn free(&self) -> MutexGuard<'_, FreeSpace> {
        self.free.lock()
    }

    /// Keeps everybody else from changing the file's length, and from cleaning free space for a slot.
    pub(crate) fn lock_length(&self) -> MutexGuard<'_, ()> {
        self.length_lock.lock()
    }

    /// Takes a slot that is durably zero; where there is none, cleans free space, or has the file
    /// extended by `grow`, which is called with the length lock held.
    ///
    /// # Errors
    /// [`DiskError::NoSpace`], and what `grow` and the host answer.
    pub(crate) fn reserve(
        &self,
        image: &dyn Image,
        grow: &dyn Fn() -> Result<(), DiskError>,
    ) -> Result<FileOffset, DiskError> {
        image.check_writable()?;
        loop {
            if let Some(slot) = self.free().take_clean() {
                return Ok(slot);
            }
            self.replenish(image, grow)?;
        }
    }

    /// As [`Image::reserve_at`].
    pub(crate) fn reserve_at(&self, slot: FileOffset) -> Option<Reserved> {
        let mut free = self.free();
        let range = FileRange::new(slot, self.shape.len);
        let clean = free.is_clean(range);
        free.take(range).then_some(Reserved { clean })
    }

    /// As [`Image::give_back`].
    pub(crate) fn give_back(&self, slot: FileOffset) {
        self.free().give_back(FileRange::new(slot, self.shape.len));
    }

    /// The ranges that a sync that now begins will free, to be handed to [`Self::freed`] after it.
    pub(crate) fn take_awaiting(&self) -> Vec<FileRange> {
        self.free().take_awaiting()
    }

    /// Notes that no durable table entry names `ranges` any more.
    pub(crate) fn freed(&self, ranges: Vec<FileRange>) {
        let mut free = self.free();
        for range in ranges {
            free.give_back(range);
        }
    }

    /// Provides at least one clean slot.
    ///
    /// Free space inside the file is cleaned before the file grows; both cost the same syncs.
    fn replenish(
        &self,
        image: &dyn Image,
        grow: &dyn Fn() -> Result<(), DiskError>,
    ) -> Result<(), DiskError> {
        let _length = self.lock_length();
        {
            let mut free = self.free();
            if let Some(slot) = free.take_clean() {
                // Somebody else was faster.
                free.give_back_clean(FileRange::new(slot, self.shape.len));
                return Ok(());
            }
        }
        if self.clean_dirty_slots(image)? {
            return Ok(());
        }
        match grow() {
            Err(DiskError::NoSpace(source)) => {
                // What waits for a sync may be all that is left.
                image.sync()?;
                if self.clean_dirty_slots(image)? {
                    Ok(())
                } else {
                    Err(DiskError::NoSpace(source))
                }
            }
            other => other,
        }
    }

    /// Zeroes a batch of free slots, durably. Says whether there was any.
    fn clean_dirty_slots(&self, image: &dyn Image) -> Result<bool, DiskError> {
        let batch = self.free().take_dirty(CLEAN_BATCH);
        self.clean(image, batch, |range| self.zero_free(range))
    }

    /// Zeroes the free ranges of `batch`, which are taken, and gives them back: as clean once that
    /// is durable, else as they were. Says whether any became clean. Ranges for which a full host
    /// has no room are left for another time.
    fn clean(
        &self,
        image: &dyn Image,
        batch: Vec<FileRange>,
        zero: impl Fn(FileRange) -> io::Result<()>,
    ) -> Result<bool, DiskError> {
        let mut zeroed = Vec::new();
        let mut result = Ok(());
        for range in batch {
            let done = result.is_ok().then(|| zero(range));
            match done {
                Some(Ok(())) => zeroed.push(range),
                Some(Err(error)) => {
                    self.free().give_back(range);
                    match DiskError::io("clean free space", error) {
                        DiskError::NoSpace(_) => {}
                        other => result = Err(other),
                    }
                }
                None => self.free().give_back(range),
            }
        }
        if !zeroed.is_empty() {
            image.note_payload();
            result = result.and(image.sync());
        }
        let any = !zeroed.is_empty();
        if any {
            self.note_gain();
        }
        let mut free = self.free();
        for range in zeroed {
            match result {
                Ok(()) => free.give_back_clean(range),
                Err(_) => free.give_back(range),
            }
        }
        result.map(|()| any)
    }

    /// Zeroes free space, by a hole where that is allowed and possible.
    pub(crate) fn zero_free(&self, range: FileRange) -> io::Result<()> {
        if self.may_punch() {
            match self.storage.punch_hole(range) {
                Err(error) if error.kind() == io::ErrorKind::Unsupported => {
                    self.host_punches.store(false, Ordering::Relaxed);
                }
                other => return other,
            }
        }
        self.storage.write_zeroes(range)
    }

    fn may_punch(&self) -> bool {
        self.punch_holes && self.host_punches.load(Ordering::Relaxed)
    }

    /// Has those who find no space wait until what is taken now is back, or cut off.
    pub(crate) fn absent(&self) -> Absent<'_> {
        let mut absent = self.absent.lock();
        *absent = absent.saturating_add(1);
        drop(absent);
        Absent(self)
    }

    /// Waits until no free space is away; says whether any was. Nobody who has some may call this, nor who
    /// holds the length lock.
    fn wait_for_absent(&self) -> bool {
        let mut absent = self.absent.lock();
        let any = *absent > 0;
        while *absent > 0 {
            self.returned.wait(&mut absent);
        }
        any
    }

    /// As [`Image::room_gained`].
    pub(crate) fn gained(&self) -> u64 {
        self.gained.load(Ordering::SeqCst)
    }

    /// Notes that the host has more room than before.
    fn note_gain(&self) {
        self.gained.fetch_add(1, Ordering::SeqCst);
    }

    /// As [`Image::make_room`].
    pub(crate) fn make_room(&self, image: &dyn Image, seen: u64) -> Result<bool, DiskError> {
        image.check_writable()?;
        let was_away = self.wait_for_absent();
        image.sync()?;
        if !self.may_punch() {
            let _length = self.lock_length();
            return Ok(self.clean_dirty_slots(image)? || was_away);
        }
        let any = self.punchable() > 0;
        while self.punch_some(image, CLEAN_BATCH)? {}
        // Or somebody else has it in hand, or has done it since.
        Ok(any || self.wait_for_absent() || was_away || self.gained() != seen)
    }

    /// As [`Image::punch_free`]. The ranges are taken while they are punched, so that no lock is needed; who
    /// wants a slot meanwhile gets another one.
    pub(crate) fn punch_some(&self, image: &dyn Image, most: u64) -> Result<bool, DiskError> {
        image.check_writable()?;
        if !self.may_punch() || image.map().is_empty() {
            return Ok(false);
        }
        let _absent = self.absent();
        let mut left = most.clamp(1, CLEAN_BATCH);
        let mut batch = Vec::new();
        let mut more = false;
        {
            let mut free = self.free();
            for run in self.punchable_runs(&free) {
                if left == 0 {
                    more = true;
                    break;
                }
                let part = FileRange::new(run.start, run.len.min(left));
                more |= part.len < run.len;
                left = left.saturating_sub(part.len);
                if free.take(part) {
                    batch.push(part);
                }
            }
        }
        let punched = self.clean(image, batch, |range| self.storage.punch_hole(range));
        match punched {
            Err(DiskError::Io { source, .. }) if source.kind() == io::ErrorKind::Unsupported => {
                self.host_punches.store(false, Ordering::Relaxed);
                Ok(false)
            }
            other => other.map(|any| any && more),
        }
    }

    /// Takes what may be cut off now of the free space in front of `end`, where the file was seen to end:
    /// whole multiples of `align`, at least `least` bytes.
    ///
    /// The host has work with a cut in proportion to what it stores there, and lets nobody write meanwhile.
    /// So where that is more than `how` allows, it is punched away before, piece by piece; or, where that
    /// cannot be, only a piece of the tail is taken.
    pub(crate) fn take_tail(
        &self,
        end: FileOffset,
        align: u64,
        least: u64,
        how: Cut,
    ) -> Result<Tail, DiskError> {
        let most = how.most.max(self.shape.len).max(least);
        let Some(tail) = self.tail_beyond(end, align, how.spare) else {
            return Ok(Tail::Nothing);
        };
        if tail.len < least {
            return Ok(Tail::Nothing);
        }
        if tail.len > most && self.hollow_out(tail, most)? {
            return Ok(Tail::Hollowed);
        }
        let bound = match self.may_punch() {
            true => tail.start,
            false => FileOffset::new(round_up(end.get().saturating_sub(most), align)),
        };
        let range = FileRange::between(tail.start.max(bound), end);
        let more = range.start > tail.start;
        match !range.is_empty() && self.free().take(range) {
            true => Ok(Tail::Taken { range, more }),
            false => Ok(Tail::Nothing),
        }
    }

    /// The free space in front of `end`, but for `spare` bytes of it.
    fn tail_beyond(&self, end: FileOffset, align: u64, spare: u64) -> Option<FileRange> {
        let tail = self.free().tail(end)?;
        let start = FileOffset::new(round_up(tail.start.plus(spare.min(tail.len)).get(), align));
        (start < end).then_some(FileRange::between(start, end))
    }

    /// Has the host give up `most` bytes of what it stores in `tail`, which is free; says whether there were
    /// any.
    fn hollow_out(&self, tail: FileRange, most: u64) -> Result<bool, DiskError> {
        if !self.may_punch() {
            return Ok(false);
        }
        // Not what was punched before: some hosts cannot tell, or keep a block that is punched in part.
        let hollowed = *self.hollowed.lock();
        let hollowed = hollowed.filter(|hollowed| hollowed.start <= tail.start);
        let from = hollowed.map_or(tail.start, |hollowed| hollowed.end().max(tail.start));
        let stored = match from < tail.end() {
            true => (self.storage.next_data(from, tail.end()))
                .map_err(|error| DiskError::io("look for holes in the file", error))?,
            false => None,
        };
        let part = stored.map(|data| FileRange::new(data.start, data.len.min(most)));
        let Some(part) = part.filter(|part| self.free().take(*part)) else {
            // Nothing is left, or somebody was given a part of it.
            *self.hollowed.lock() = None;
            return Ok(false);
        };
        let punched = self.storage.punch_hole(part);
        self.free().give_back(part);
        match punched {
            Ok(()) => {
                self.note_gain();
                let start = hollowed.map_or(tail.start, |hollowed| hollowed.start);
                *self.hollowed.lock() = Some(FileRange::between(start, part.end()));
                Ok(true)
            }
            Err(error) if error.kind() == io::ErrorKind::Unsupported => {
                self.host_punches.store(false, Ordering::Relaxed);
                Ok(false)
            }
            Err(error) => Err(DiskError::io("cut the file", error)),
        }
    }

    /// The free ranges that the host may still store, but for the gaps that alignment leaves: those
    /// are shorter than a host block and not worth a call.
    fn punchable_runs(&self, free: &FreeSpace) -> Vec<FileRange> {
        const HOST_BLOCK: u64 = 4096;
        let mut runs = free.dirty_runs();
        runs.retain(|run| run.len >= HOST_BLOCK);
        runs
    }

    /// Their bytes, if holes may be punched at all.
    pub(crate) fn punchable(&self) -> u64 {
        if !self.may_punch() {
            return 0;
        }
        self.punchable_runs(&self.free())
            .iter()
            .map(|run| run.len)
            .sum()
    }

    /// As [`Image::awaiting_bytes`].
    pub(crate) fn awaiting_bytes(&self) -> u64 {
        self.free().awaiting_bytes()
    }

    /// The free ranges, sorted.
    pub(crate) fn free_runs(&self) -> Vec<FileRange> {
        self.free().runs().collect()
    }
}
