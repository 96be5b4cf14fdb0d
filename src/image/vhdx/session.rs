//! An open file: who may change its metadata, what its headers say of that, and when it is durable.
//!
//! # A session
//! Opening a clean file changes nothing. The first change begins a *session*:
//! 1. an empty entry of a new log, its own tail; sync;
//! 2. a header that names that log, with a new `FileWriteGuid`; sync;
//! 3. the other header, the same; sync.
//!
//! Only then is an entry with pages written. So a header never names a log without a valid entry,
//! and no header that could become current says that there is no log to replay. Where the change is
//! one that a guest can see, the headers get a new `DataWriteGuid` too; where compaction began the
//! session, the first such change writes them both once more. [`OpenFile::settle`] ends the session:
//! all pages in their places, sync, both headers without the log, each synced.
//!
//! # Cutting the file
//! The log must not claim a longer file than there is, not even in an older entry: all pages go to
//! their places, an entry that is its own tail, apart from older ones, states the new length, and once
//! that is durable the file is cut, unless it has grown by then. Others change metadata meanwhile, but for
//! the moment in which that entry is written: their entries state the new length, too.
//!
//! # Locks
//! In this order: the length lock of [`Space`]; the writer; the sync lock of [`Durability`]; those
//! of [`Log`] and of the free space, which are never held across a sync.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::{Mutex, MutexGuard};
use uuid::Uuid;

use super::headers::write_next;
use super::log::{Lengths, Log, LoggedPage, MAX_PAGES, TailPlace};
use crate::error::DiskError;
use crate::format::vhdx::log::Page;
use crate::format::vhdx::{CurrentHeader, Header, LOG_VERSION};
use crate::image::{Durability, Space};
use crate::storage::Storage;
use crate::units::{FileOffset, FileRange};

/// A log that is no longer than this is stored by the host before it is used, so that a full host
/// refuses a session instead of a change.
const MAX_STORED_LOG: u64 = 16 << 20;

/// How often a cut has all pages brought to their places while others may add new ones, before it keeps them
/// from that.
const CUT_ATTEMPTS: u32 = 3;

/// An open file, for writing or not.
#[derive(Debug)]
pub(super) struct OpenFile {
    pub(super) storage: Arc<dyn Storage>,
    pub(super) space: Space,
    pub(super) durability: Durability,
    log: Log,
    /// As last written.
    header: Mutex<CurrentHeader>,
    /// Held by whoever changes metadata.
    writer: Mutex<Writer>,
    /// Whether `DataWriteGuid` is new in this session.
    is_announced: AtomicBool,
}

#[derive(Debug)]
struct Writer {
    /// Whether the headers name the log.
    is_live: bool,
    /// Whether `FileWriteGuid` is new since the file was opened.
    is_marked: bool,
}

impl OpenFile {
    /// Of a file without a log to replay. `is_marked`: it was changed since it was opened, and says
    /// so in its headers.
    pub(super) fn new(
        space: Space,
        storage: Arc<dyn Storage>,
        header: CurrentHeader,
        is_marked: bool,
    ) -> Self {
        let log = Log::new(
            Arc::clone(&storage),
            header.header.log_range(),
            space.file_len(),
        );
        Self {
            storage,
            space,
            durability: Durability::new(),
            log,
            header: Mutex::new(header),
            writer: Mutex::new(Writer {
                is_live: false,
                is_marked,
            }),
            is_announced: AtomicBool::new(false),
        }
    }

    /// What the disk's children know it by.
    pub(super) fn data_write_guid(&self) -> Uuid {
        self.header.lock().header.data_write_guid
    }

    /// As [`crate::image::Image::sync`].
    pub(super) fn sync(&self) -> Result<(), DiskError> {
        self.durability.sync(
            &*self.storage,
            || (self.space.take_awaiting(), self.log.mark()),
            |(awaited, mark)| {
                let fills_up = self.log.synced(mark);
                self.space.freed(awaited);
                if fills_up {
                    return match self.apply() {
                        // The log has it all; it is tried again when there is need.
                        Err(DiskError::NoSpace(_)) => {
                            log::warn!("the host is full: metadata stays in the log");
                            Ok(())
                        }
                        other => other,
                    };
                }
                Ok(())
            },
        )
    }

    /// Syncs even if all that is new is what the log did for itself.
    fn sync_log(&self) -> Result<(), DiskError> {
        self.durability.note_write();
        self.sync()
    }

    /// Writes durable pages in their places.
    fn apply(&self) -> Result<(), DiskError> {
        self.log.apply().map_err(|error| {
            match DiskError::io("write metadata", error) {
                // What is in its place or torn is whole in the log: nothing is lost.
                full @ DiskError::NoSpace(_) => full,
                DiskError::Io { action, source } => self.durability.poison(action, source),
                other => other,
            }
        })
    }

    /// The page of metadata at `at`, a multiple of 4096 inside the file.
    ///
    /// # Errors
    /// The host's.
    pub(super) fn read_page(&self, at: FileOffset) -> io::Result<Arc<Page>> {
        // The log first: a page leaves it only once it is in its place.
        if let Some(page) = self.log.pending(at) {
            return Ok(page);
        }
        let mut bytes = [0; 4096];
        self.storage.read_exact_at(&mut bytes, at)?;
        Ok(Arc::new(bytes))
    }

    /// As [`Self::read_page`], of a page that is to be changed. The host has stored room for it then,
    /// so that a full host refuses the change, and not, later, to have it in its place. The writer is
    /// held.
    ///
    /// # Errors
    /// The host's.
    pub(super) fn take_page(&self, at: FileOffset) -> io::Result<Arc<Page>> {
        let page = self.read_page(at)?;
        // What is not all zeros is stored, and what the log has was taken before.
        if page.iter().all(|byte| *byte == 0) && self.log.pending(at).is_none() {
            self.storage.write_all_at(&*page, at)?;
        }
        Ok(page)
    }

    /// Announces a change that a guest can see: see [`crate::image::Image::begin_change`].
    pub(super) fn announce(&self) -> Result<(), DiskError> {
        self.durability.check()?;
        if self.is_announced.load(Ordering::Acquire) {
            return Ok(());
        }
        let writer = self.writer.lock();
        if self.is_announced.load(Ordering::Acquire) {
            return Ok(());
        }
        self.renew(writer)
    }

    /// Has the children of the disk as it is now refuse it: see [`crate::image::Image::disown`].
    pub(super) fn disown(&self) -> Result<(), DiskError> {
        self.durability.check()?;
        self.renew(self.writer.lock())
    }

    fn renew(&self, mut writer: MutexGuard<'_, Writer>) -> Result<(), DiskError> {
        let guid = Uuid::new_v4();
        let change = |header: &mut Header| header.data_write_guid = guid;
        if writer.is_live {
            self.update_headers(&change)?;
        } else {
            self.start(&mut writer, &change)?;
        }
        self.is_announced.store(true, Ordering::Release);
        Ok(())
    }

    /// Keeps everybody else from changing metadata, and begins a session if there is none.
    ///
    /// # Errors
    /// Where the file takes no changes.
    pub(super) fn begin(&self) -> Result<Transaction<'_>, DiskError> {
        let mut writer = self.writer.lock();
        self.durability.check()?;
        if !writer.is_live {
            self.start(&mut writer, &|_| {})?;
        }
        Ok(Transaction {
            file: self,
            _writer: writer,
        })
    }

    /// Begins a session, with `change` in the headers.
    fn start(&self, writer: &mut Writer, change: &dyn Fn(&mut Header)) -> Result<(), DiskError> {
        self.durability.check()?;
        // No header names the log now: whatever fails here leaves the file as it was.
        self.store_log()
            .map_err(|error| DiskError::io("make room for the log", error))?;
        let (log_guid, file_write_guid) = (Uuid::new_v4(), Uuid::new_v4());
        self.log
            .start(log_guid)
            .map_err(|error| DiskError::io("write the log", error))?;
        self.sync_log()?;
        self.update_headers(&|header| {
            header.log_guid = log_guid;
            // Of a file without a log to replay it may be any.
            header.log_version = LOG_VERSION;
            header.file_write_guid = file_write_guid;
            change(header);
        })?;
        writer.is_live = true;
        writer.is_marked = true;
        Ok(())
    }

    /// Has the host store all of the log, whose bytes stay what they are: a file comes out the same on every
    /// host. A host that has no room for it keeps what it has.
    fn store_log(&self) -> io::Result<()> {
        let holes = self.holes_of_log()?;
        let stored = holes
            .iter()
            .try_for_each(|hole| self.storage.write_zeroes(*hole));
        if stored.is_err() {
            for hole in holes {
                // Where that cannot be, it only takes more room than it need.
                let _ = self.storage.punch_hole(hole);
            }
        }
        stored
    }

    /// What the host does not store of the log.
    fn holes_of_log(&self) -> io::Result<Vec<FileRange>> {
        let log = self.log.range();
        let mut holes = Vec::new();
        let mut at = match log.len > MAX_STORED_LOG {
            true => log.end(),
            false => log.start,
        };
        while at < log.end() {
            let data = self.storage.next_data(at, log.end())?;
            let data = data.unwrap_or(FileRange::between(log.end(), log.end()));
            let hole = FileRange::between(at, data.start);
            if !hole.is_empty() {
                holes.push(hole);
            }
            at = data.end();
        }
        Ok(holes)
    }

    /// Makes `change` in both headers, durably.
    fn update_headers(&self, change: &dyn Fn(&mut Header)) -> Result<(), DiskError> {
        for _ in 0..2 {
            let mut next = self.header.lock().clone();
            write_next(&*self.storage, &mut next, change)
                .map_err(|error| self.durability.poison("write a header", error))?;
            *self.header.lock() = next;
            self.sync_log()?;
        }
        Ok(())
    }

    /// Brings all pages to their places, durably. The writer is held.
    fn retire_all(&self) -> Result<(), DiskError> {
        if self.log.has_undurable() {
            self.sync_log()?;
        }
        if self.log.has_unretired() {
            self.apply()?;
            self.sync_log()?;
        }
        Ok(())
    }

    /// Begins the log anew, at its start, durably. The writer is held, everything is retired.
    fn restart_log(&self) -> Result<(), DiskError> {
        // The start may be what the newest entry needs, but for this one.
        self.move_tail(TailPlace::Next)?;
        self.move_tail(TailPlace::Start)
    }

    fn move_tail(&self, place: TailPlace) -> Result<(), DiskError> {
        self.log
            .append_tail(place)
            .map_err(|error| self.durability.poison("write the log", error))?;
        self.sync_log()
    }

    /// As [`crate::image::Image::settle`].
    pub(super) fn settle(&self) -> Result<(), DiskError> {
        let mut writer = self.writer.lock();
        if !writer.is_live {
            return self.sync();
        }
        self.retire_all()?;
        self.update_headers(&|header| header.log_guid = Uuid::nil())?;
        self.log.end();
        writer.is_live = false;
        self.is_announced.store(false, Ordering::Release);
        Ok(())
    }

    /// Brings all pages to their places, durably, as [`Self::retire_all`] does, without keeping others from
    /// changing metadata meanwhile: what they add stays in the log.
    pub(super) fn retire_beside_others(&self) -> Result<(), DiskError> {
        self.sync()?;
        if self.log.has_unretired() {
            match self.apply() {
                // The log has it all, as long as it has room.
                Err(DiskError::NoSpace(_)) => return Ok(()),
                other => other?,
            }
            self.sync_log()?;
        }
        Ok(())
    }

    /// As [`crate::image::Image::prepare_commit`]: begins a session if there is none, and makes room in a log
    /// that is nearly full.
    pub(super) fn prepare(&self) -> Result<(), DiskError> {
        if self.log.is_nearly_full() {
            self.retire_beside_others()?;
        }
        let transaction = self.begin()?;
        match self.log.is_nearly_full() {
            true => transaction.drain(),
            false => Ok(()),
        }
    }

    /// Cuts the file of `old_len` bytes to `len`, a multiple of 1 MiB, behind which nothing is in use and
    /// nobody is given a slot. Says whether it did: not if the file has grown meanwhile.
    ///
    /// # Errors
    /// The host's; the file is then as long as before, or the image is poisoned.
    pub(super) fn cut(&self, old_len: u64, len: u64) -> Result<bool, DiskError> {
        let Some(before) = self.state_length(old_len, len)? else {
            return Ok(false);
        };
        // Others go on meanwhile: their entries come behind the one that states the length, and do so too.
        let stated = self.sync();
        let _length = self.space.lock_length();
        if self.space.file_len() != old_len {
            return stated.map(|()| false);
        }
        let cut = stated.and_then(|()| {
            self.storage.set_len(len).map_err(|error| {
                // A host may cut and fail nevertheless: what is behind its end is not ours.
                if self.storage.len().ok() == Some(old_len) {
                    DiskError::io("cut the file", error)
                } else {
                    self.durability.poison("cut the file", error)
                }
            })
        });
        if let Err(error) = cut {
            self.log.set_lengths(|lengths| *lengths = before);
            return Err(error);
        }
        self.space.set_file_len(len);
        self.durability.note_write();
        Ok(true)
    }

    /// Has the log state that the file of `old_len` bytes is `len` bytes long, by an entry that is its own
    /// tail; that is durable with the next sync. Tells what it stated before; `None` where the file has another
    /// length by now.
    fn state_length(&self, old_len: u64, len: u64) -> Result<Option<Lengths>, DiskError> {
        for attempt in 1.. {
            self.retire_beside_others()?;
            let _length = self.space.lock_length();
            if self.space.file_len() != old_len {
                return Ok(None);
            }
            let mut writer = self.writer.lock();
            if writer.is_live {
                if self.log.has_unretired() && attempt < CUT_ATTEMPTS {
                    // Somebody was faster.
                    continue;
                }
                self.retire_all()?;
            } else if !writer.is_marked {
                let guid = Uuid::new_v4();
                self.update_headers(&|header| header.file_write_guid = guid)?;
                writer.is_marked = true;
            }
            let before = self.log.set_lengths(|lengths| {
                lengths.durable = len;
                lengths.needed = len;
            });
            if writer.is_live
                && let Err(error) = self.begin_behind_others()
            {
                self.log.set_lengths(|lengths| *lengths = before);
                return Err(error);
            }
            return Ok(Some(before));
        }
        Ok(None)
    }

    /// Writes an entry that is its own tail, for readers to whom older entries still count. Everything is
    /// retired.
    fn begin_behind_others(&self) -> Result<(), DiskError> {
        if !self.log.has_room_apart() {
            return self.restart_log();
        }
        (self.log.append_tail(TailPlace::Apart))
            .map_err(|error| self.durability.poison("write the log", error))?;
        self.durability.note_write();
        Ok(())
    }

    /// Notes that the file was made `len` bytes long; durably, if so.
    pub(super) fn note_growth(&self, len: u64, is_durable: bool) {
        self.log.set_lengths(|lengths| {
            lengths.needed = len;
            if is_durable {
                lengths.durable = len;
            }
        });
    }
}

/// The right to change metadata.
#[derive(Debug)]
pub(super) struct Transaction<'a> {
    file: &'a OpenFile,
    _writer: MutexGuard<'a, Writer>,
}

impl Transaction<'_> {
    /// Writes one entry to the log that replaces `pages`, at most [`MAX_PAGES`]. It survives the
    /// death of the process, and with the next sync a power cut; then all of them do or none.
    ///
    /// # Errors
    /// [`DiskError::NoSpace`] where the log is full and a full host does not take what is in it:
    /// nothing has changed. Any other poisons.
    pub(super) fn write(&mut self, pages: Vec<LoggedPage>) -> Result<(), DiskError> {
        debug_assert!(pages.len() <= MAX_PAGES);
        if pages.is_empty() {
            return Ok(());
        }
        if !self.append(pages.clone())? {
            self.drain()?;
            let has_room = self.append(pages)?;
            assert!(has_room, "an entry does not fit an empty log");
        }
        Ok(())
    }

    fn append(&self, pages: Vec<LoggedPage>) -> Result<bool, DiskError> {
        let file = self.file;
        let has_room = (file.log.append(pages))
            .map_err(|error| file.durability.poison("write the log", error))?;
        file.durability.note_write();
        Ok(has_room)
    }

    /// Brings all pages to their places and leaves nothing in the log to replay, durably.
    ///
    /// # Errors
    /// [`DiskError::NoSpace`] where the host has no room for the pages; any other poisons.
    pub(super) fn drain(&self) -> Result<(), DiskError> {
        self.file.retire_all()?;
        self.file.restart_log()
    }
}
