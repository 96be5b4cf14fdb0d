//! What `check` may put right in a VHDX, and how.
//!
//! | found | done |
//! |---|---|
//! | a log to replay | replayed |
//! | both headers without a right checksum, alike and without a log, all else whole | both written anew |
//! | both region tables without a right checksum and with the same entries, all else whole | both written anew |
//! | a header that is damaged, numbered like the other, or names a log that is done with | both headers written anew |
//! | a copy of the region table that is damaged or differs from the first | written from the good one |
//! | a place in an entry that must have none, or in one that nobody reads | the place taken out |
//! | unused space at the end | cut off |
//! | blocks beyond the end of the file, on request | the file made as long as it was |
//!
//! First the log is replayed, if there is one; from then on there is none. What is changed after
//! that, in this order and with a sync behind each, is legal in every mixture of old and new sectors:
//! a copy of the region table beside a good one, and single entries of the block table, each inside
//! one sector. So it is written in its place without the log. No guest reads anything else than
//! before: `DataWriteGuid` stays.
//!
//! What was cut off a file reads as an error. Where somebody wants it to read as zeros
//! ([`crate::check::CheckOptions::zero_lost`]), the headers get a new `DataWriteGuid` first, and then the
//! file its old length.

use std::io;

use uuid::Uuid;

use super::faults::{FaultKind, Severity};
use super::layout::Layout;
use super::replay::{replay_with, update_both};
use crate::error::OpenProblem;
use crate::format::DiskType;
use crate::format::vhdx::{CurrentHeader, MIB, REGION_TABLE_1, REGION_TABLE_2};
use crate::image::LayoutError;
use crate::storage::Storage;
use crate::units::round_up;

/// Something that a check found.
#[derive(Debug)]
pub(super) struct Finding {
    /// What is wrong, a sentence each.
    pub(super) problems: Vec<String>,
    /// What is, or would be, done about it, if anything.
    pub(super) repair: Option<String>,
    /// Whether something reads wrongly, or some program cannot use the file as it is.
    pub(super) is_error: bool,
}

impl Finding {
    fn new(is_error: bool, problem: String, repair: &str) -> Self {
        Self {
            problems: vec![problem],
            repair: Some(repair.to_owned()),
            is_error,
        }
    }
}

/// What is to be said of the headers.
pub(super) fn header_findings(current: &CurrentHeader) -> Option<Finding> {
    let place = CurrentHeader::offset_of(usize::from(current.slot == 0));
    let header = &current.header;
    if let Some(doubt) = &current.doubt {
        let repair = "both headers written anew, with what they agree in";
        return Some(Finding::new(true, doubt.to_string(), repair));
    }
    let problem = match &current.other {
        Err(fault) => format!("the other header, at file offset {place}: {fault}"),
        Ok(other) if other.sequence_number == header.sequence_number => {
            let number = header.sequence_number;
            format!("both headers are numbered {number}, as disk2vhd writes them")
        }
        Ok(other) if other.log_guid != header.log_guid => {
            "the headers name different logs: whoever had the file open last was interrupted while \
             opening or closing it"
                .to_owned()
        }
        Ok(_) => return None,
    };
    Some(Finding::new(false, problem, "both headers written anew"))
}

/// What is to be said of the region tables.
pub(super) fn region_findings(layout: &Layout) -> Option<Finding> {
    let regions = &layout.regions;
    if let Some(doubt) = regions.doubt() {
        let repair = "both region tables written anew, with what they agree in";
        return Some(Finding::new(true, doubt.to_string(), repair));
    }
    Some(match &regions.faults {
        // QEMU reads only the first.
        [Some(fault), _] => Finding::new(
            true,
            fault.to_string(),
            "the first region table written from the second",
        ),
        [None, Some(fault)] => Finding::new(
            false,
            fault.to_string(),
            "the second region table written from the first",
        ),
        [None, None] if regions.differ => Finding::new(
            false,
            "the two region tables differ; every program goes by the first".to_owned(),
            "the second region table written from the first",
        ),
        [None, None] => return None,
    })
}

/// What is to be said of single entries of the block table.
pub(super) fn entry_findings(layout: &Layout) -> impl Iterator<Item = Finding> + '_ {
    layout.faults.kinds().map(|(kind, listed, count)| {
        let more = usize::try_from(count)
            .unwrap_or(usize::MAX)
            .saturating_sub(listed.len());
        let mut problems: Vec<String> = listed
            .iter()
            .map(|fault| fault.error().to_string())
            .collect();
        if more > 0 {
            problems.push(format!("{more} more of this kind"));
        }
        let repair = match kind {
            FaultKind::UnusedPlace => Some("blocks without content cleared of their places"),
            FaultKind::KeptBeyondEnd => Some("kept places beyond the end of the file cleared"),
            FaultKind::StaleBitmap | FaultKind::StaleBitmapState => {
                Some("entries of sector bitmaps that the disk does not have cleared")
            }
            FaultKind::StalePadding | FaultKind::StalePaddingState => {
                Some("entries behind the last block's cleared")
            }
            _ => None,
        };
        Finding {
            problems,
            repair: repair.map(|text| format!("{text}: {count}")),
            is_error: kind.severity() != Severity::Harmless,
        }
    })
}

/// What is to be said of the end of the file.
pub(super) fn tail_finding(layout: &Layout) -> Option<Finding> {
    let spare = layout.file_len.saturating_sub(shortest(layout));
    // A fixed disk keeps room for blocks that have no place yet.
    let is_unused = spare >= layout.block_size && layout.disk_type() != DiskType::Fixed;
    is_unused.then(|| {
        Finding::new(
            false,
            format!("{spare} unused bytes at the end of the file"),
            "the unused space at the end cut off",
        )
    })
}

/// The file's length with nothing behind the last thing in use.
fn shortest(layout: &Layout) -> u64 {
    round_up(layout.end.get(), MIB)
}

/// Puts everything right that can be, durably. The caller has made sure that no two things in the
/// file share their bytes. With `zero_lost`, what was cut off becomes zeros.
///
/// # Errors
/// Where the host fails, or the file turns out not to be writable. Each step leaves the file no worse
/// than it was.
pub(super) fn repair(storage: &dyn Storage, zero_lost: bool) -> Result<(), LayoutError> {
    let data_write_guid = zero_lost.then(Uuid::new_v4);
    let current = match replay_with(storage, data_write_guid) {
        Ok((current, _)) => current,
        Err(OpenProblem::Format(error) | OpenProblem::NotWritable(error)) => {
            return Err(error.into());
        }
        Err(OpenProblem::Io { source, .. }) => return Err(source.into()),
        Err(other) => return Err(io::Error::other(other.to_string()).into()),
    };
    let mut layout = Layout::examine(storage, current)?.layout;
    let new = Uuid::new_v4();
    if let (Some(data_write_guid), Some(_)) = (data_write_guid, layout.lost()) {
        update_both(storage, &mut layout.header, &|header| {
            header.file_write_guid = new;
            header.data_write_guid = data_write_guid;
        })?;
        storage.set_len(shortest(&layout))?;
        storage.sync()?;
        layout = Layout::examine(storage, layout.header)?.layout;
    }
    let findings = [header_findings(&layout.header), region_findings(&layout)];
    let has_more = findings.iter().any(Option::is_some)
        || entry_findings(&layout).any(|finding| finding.repair.is_some())
        || tail_finding(&layout).is_some();
    if !has_more {
        return Ok(());
    }
    update_both(storage, &mut layout.header, &|header| {
        header.file_write_guid = new;
    })?;
    repair_rest(storage, &layout)?;
    Ok(())
}

fn repair_rest(storage: &dyn Storage, layout: &Layout) -> io::Result<()> {
    let regions = &layout.regions;
    let second = regions.differ || regions.faults[1].is_some();
    let bad = [
        regions.faults[0].as_ref().map(|_| REGION_TABLE_1),
        second.then_some(REGION_TABLE_2),
    ];
    for at in bad.into_iter().flatten() {
        storage.write_all_at(regions.table.bytes(), at)?;
        storage.sync()?;
    }
    if entry_findings(layout).any(|finding| finding.repair.is_some()) {
        layout.table_place().repair(storage)?;
        storage.sync()?;
    }
    if tail_finding(layout).is_some() {
        storage.set_len(shortest(layout))?;
        storage.sync()?;
    }
    Ok(())
}
