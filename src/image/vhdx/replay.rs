//! What to do with a log that was left behind.
//!
//! A file whose header names a log has to be read as if the log's active sequence was applied. For
//! reading that is done in memory ([`super::overlay`]); for writing in the file, in this order:
//!
//! 1. sync: what the file's last user left unsynced, its log among it, is not to be lost under us;
//! 2. both headers with a new `FileWriteGuid` and the *old* `LogGuid`, each synced;
//! 3. the pages in their places, the file's length; sync;
//! 4. both headers without `LogGuid`, each synced.
//!
//! A cut before the end of 3 leaves the log to be replayed again: it is not changed meanwhile, and
//! applying it twice is applying it once. `DataWriteGuid` stays: a guest reads what it read before.

use std::io;
use std::sync::Arc;

use uuid::Uuid;

use super::headers::{not_updatable, write_next};
use super::overlay::{Changes, Overlay};
use super::ring::{FileLog, read_page};
use crate::error::{FormatError, OpenProblem};
use crate::format::vhdx::log::{Descriptor, Sequence, active_sequence, read_entry};
use crate::format::vhdx::{CurrentHeader, Header, PAGE, REGION_TABLE_1};
use crate::image::LayoutError;
use crate::storage::{Storage, zero_stored};
use crate::units::{FileOffset, FileRange};

pub(crate) use super::headers::read_header;

/// The most changes that a log may hold; the largest log has a quarter as many pages.
const MAX_CHANGES: usize = 1 << 20;
/// No file is longer.
const MAX_FILE_LEN: u64 = u64::MAX >> 1;

/// What a header's log means for the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum LogState {
    /// There is none.
    Clean,
    /// Somebody has, or had, the file open, but has changed no metadata yet.
    EmptyOnly(Sequence),
    /// It has to be replayed.
    Dirty(Sequence),
}

/// Finds the part of the log that `header` names which has to be replayed.
///
/// # Errors
/// Where the log or the file is damaged, or the host cannot read.
pub(crate) fn read_log(storage: &dyn Storage, header: &Header) -> Result<LogState, LayoutError> {
    if header.log_guid.is_nil() {
        return Ok(LogState::Clean);
    }
    let log = header.log_range();
    let file_len = storage.len()?;
    if log.end().get() > file_len {
        return Err(too_short(file_len, log.end().get(), "for its log").into());
    }
    let found = active_sequence(&mut FileLog::new(storage, log), header.log_guid)?;
    let Some(sequence) = found else {
        return Err(FormatError::corrupt(
            format!("log at {log}"),
            format!("no valid entry of log {}", header.log_guid),
            "those that the header says are to be replayed; restore the file from a backup",
        )
        .into());
    };
    if sequence.last_file_offset > MAX_FILE_LEN {
        return Err(FormatError::corrupt(
            format!("log at {log}"),
            format!("a file length of {} bytes", sequence.last_file_offset),
            "one that a file can have",
        )
        .into());
    }
    Ok(if sequence.is_empty {
        LogState::EmptyOnly(sequence)
    } else {
        LogState::Dirty(sequence)
    })
}

fn too_short(file_len: u64, needed: u64, by: &str) -> FormatError {
    FormatError::corrupt(
        "file",
        format!("{file_len} bytes"),
        format!("at least {needed}, {by}: the file was cut"),
    )
}

impl LogState {
    /// Why the log must not be replayed in a file of `file_len` bytes, if so: the file was cut. What is
    /// left of it is read as the log has it, but does not become as long as that says.
    pub(crate) fn cut(&self, file_len: u64) -> Option<FormatError> {
        let (Self::EmptyOnly(sequence) | Self::Dirty(sequence)) = self else {
            return None;
        };
        let flushed = sequence.flushed_file_offset;
        (flushed > file_len).then(|| too_short(file_len, flushed, "as its log says"))
    }
}

/// Why the log of the file in `storage` must not be replayed, if so: see [`LogState::cut`].
///
/// # Errors
/// As [`read_header`] and [`read_log`].
pub(super) fn cut_by_log(storage: &dyn Storage) -> Result<Option<FormatError>, LayoutError> {
    let current = read_header(storage)?;
    Ok(read_log(storage, &current.header)?.cut(storage.len()?))
}

/// Reads what the entries of `sequence` change.
fn read_changes(
    storage: &dyn Storage,
    header: &Header,
    sequence: &Sequence,
) -> Result<Changes, LayoutError> {
    let log = header.log_range();
    let mut source = FileLog::new(storage, log);
    let mut changes = Changes::default();
    changes.len = sequence.last_file_offset;
    let mut found = Vec::new();
    let mut count = 0_usize;
    for at in &sequence.entries {
        found.clear();
        let entry = read_entry(&mut source, header.log_guid, *at, |descriptor| {
            count = count.saturating_add(1);
            if count <= MAX_CHANGES {
                found.push(descriptor);
            }
        })?;
        if entry.is_none() {
            return Err(
                io::Error::other("the file's log changes: another program has it open").into(),
            );
        }
        if count > MAX_CHANGES {
            return Err(FormatError::incompatible(
                "a log of over a million changes",
                "open the file once with the program that wrote it",
            )
            .into());
        }
        for descriptor in &found {
            add(&mut changes, *descriptor, log)?;
        }
    }
    Ok(changes)
}

fn add(changes: &mut Changes, descriptor: Descriptor, log: FileRange) -> Result<(), FormatError> {
    let target = match descriptor {
        Descriptor::Page { at, .. } => FileRange::new(at, PAGE),
        Descriptor::Zeros(range) => range,
    };
    let is_allowed = target.start >= REGION_TABLE_1
        && target.end().get() <= MAX_FILE_LEN
        && !target.overlaps(log);
    if !is_allowed {
        return Err(FormatError::corrupt(
            format!("log at {log}"),
            format!("a change of file offset {target}"),
            "changes behind the headers and outside the log",
        ));
    }
    match descriptor {
        Descriptor::Page { at, page } => changes.add_page(at, page),
        Descriptor::Zeros(range) => changes.add_zeros(range),
    }
    Ok(())
}

/// The current header of the file in `storage`, and what is to be replayed.
fn pending(storage: &dyn Storage) -> Result<(CurrentHeader, Option<Changes>), LayoutError> {
    let current = read_header(storage)?;
    let state = read_log(storage, &current.header)?;
    let is_cut = state.cut(storage.len()?).is_some();
    let changes = match &state {
        LogState::Clean => None,
        LogState::EmptyOnly(sequence) | LogState::Dirty(sequence) => {
            let mut changes = read_changes(storage, &current.header, sequence)?;
            if is_cut {
                // What was cut off is not to read as zeros.
                changes.len = 0;
            }
            Some(changes)
        }
    };
    Ok((current, changes))
}

/// Shows the file in `storage` as it is once its log is replayed, with its current header. Nothing
/// is written; what it shows takes no writes where it is not `storage` itself.
///
/// # Errors
/// As [`read_header`] and [`read_log`].
pub(crate) fn replayed_view(
    storage: Arc<dyn Storage>,
) -> Result<(Arc<dyn Storage>, CurrentHeader), LayoutError> {
    let (current, changes) = pending(&*storage)?;
    let Some(changes) = changes else {
        return Ok((storage, current));
    };
    let overlay = Overlay::new(storage, current.header.log_range(), changes, 0)?;
    Ok((Arc::new(overlay), current))
}

/// As [`replayed_view`], of a borrowed file.
///
/// # Errors
/// The same.
pub(crate) fn replayed_look(
    storage: &dyn Storage,
) -> Result<(impl Storage, CurrentHeader), LayoutError> {
    let (current, changes) = pending(storage)?;
    let changes = changes.unwrap_or_default();
    let overlay = Overlay::new(storage, current.header.log_range(), changes, 0)?;
    Ok((overlay, current))
}

/// Shows the file in `storage` as one of at least `len` bytes; nothing is written.
///
/// # Errors
/// Where the host cannot tell the file's length.
pub(super) fn padded_view(storage: Arc<dyn Storage>, len: u64) -> io::Result<Arc<dyn Storage>> {
    if storage.len()? >= len {
        return Ok(storage);
    }
    let no_log = FileRange::new(FileOffset::new(0), 0);
    let overlay = Overlay::new(storage, no_log, Changes::default(), len)?;
    Ok(Arc::new(overlay))
}

/// Leaves the file in `storage`, which is opened for writing, without a log to replay, durably; tells
/// what it did, if anything. What was there before is durable in any case.
///
/// # Errors
/// Where the file cannot be used, or the host fails; then it is as good as before.
pub(crate) fn replay(
    storage: &dyn Storage,
) -> Result<(CurrentHeader, Option<String>), OpenProblem> {
    replay_with(storage, None)
}

/// As [`replay`]. With `zero_lost`, a new `DataWriteGuid`, also where the file was cut: what was cut off
/// becomes zeros as far as the log says how long the file was.
///
/// # Errors
/// As [`replay`].
pub(super) fn replay_with(
    storage: &dyn Storage,
    zero_lost: Option<Uuid>,
) -> Result<(CurrentHeader, Option<String>), OpenProblem> {
    let failed = |source| OpenProblem::Io {
        action: "replay the log",
        source,
    };
    storage.sync().map_err(failed)?;
    let mut current = read_header(storage)?;
    if let Some(error) = not_updatable(&current) {
        return Err(OpenProblem::NotWritable(error));
    }
    let state = read_log(storage, &current.header)?;
    let cut = state.cut(storage.len().map_err(failed)?);
    if let (Some(error), None) = (cut, zero_lost) {
        return Err(OpenProblem::NotWritable(error));
    }
    let (sequence, done) = match state {
        LogState::Clean => return Ok((current, None)),
        LogState::EmptyOnly(sequence) => (sequence, "the mark of an open file removed".to_owned()),
        LogState::Dirty(sequence) => {
            let done = match sequence.entries.len() {
                1 => "an entry of the log replayed".to_owned(),
                count => format!("{count} entries of the log replayed"),
            };
            (sequence, done)
        }
    };
    let changes = read_changes(storage, &current.header, &sequence)?;
    let mut work = || {
        let new = Uuid::new_v4();
        update_both(storage, &mut current, &|header| {
            header.file_write_guid = new;
            header.data_write_guid = zero_lost.unwrap_or(header.data_write_guid);
        })?;
        apply(storage, current.header.log_range(), &changes)?;
        storage.sync()?;
        update_both(storage, &mut current, &|header| {
            header.log_guid = Uuid::nil()
        })
    };
    work().map_err(failed)?;
    Ok((current, Some(done)))
}

/// Makes `change` in both headers, durably.
pub(super) fn update_both(
    storage: &dyn Storage,
    current: &mut CurrentHeader,
    change: &dyn Fn(&mut Header),
) -> io::Result<()> {
    for _ in 0..2 {
        write_next(storage, current, change)?;
        storage.sync()?;
    }
    Ok(())
}

/// Writes `changes` to their places.
fn apply(storage: &dyn Storage, log: FileRange, changes: &Changes) -> io::Result<()> {
    let file_len = storage.len()?;
    if file_len < changes.len {
        storage.set_len(changes.len)?;
    }
    // What the host does not store is zero already: a damaged log is no reason to fill the host.
    let file = FileRange::new(FileOffset::new(0), file_len);
    for zeros in changes.zeros_in(file) {
        zero_stored(storage, zeros)?;
    }
    for (at, page) in &changes.pages {
        storage.write_all_at(&read_page(storage, log, page)?, *at)?;
    }
    Ok(())
}
