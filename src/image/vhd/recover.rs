//! What an interrupted change may leave, and how it is put right: when the file is opened for
//! writing, and by `check --repair`.
//!
//! | found | done |
//! |---|---|
//! | the footer's last byte is missing (Virtual PC before 2004) | the byte added |
//! | no footer at the end | written behind the last block, then what follows is cut |
//! | free space at the end that a block fits in | the same |
//! | the copy at 0 is missing, damaged or different | written from the footer at the end |
//! | Xen's batmap does not fit its checksum | emptied |
//!
//! One thing is done by `check --repair` alone: see [`super::unflushed`].

use std::io;

use super::layout::Layout;
use crate::error::{OpenProblem, is_full};
use crate::format::vhd::FOOTER_LEN;
use crate::image::Fits;
use crate::storage::Storage;
use crate::units::{FileOffset, SECTOR_SIZE, round_up};

/// Something that [`recover`] puts right.
#[derive(Debug)]
pub(super) struct Finding {
    /// What is wrong.
    pub(super) problem: String,
    /// What is done about it.
    pub(super) repair: String,
    /// Whether some program cannot use the file as it is.
    pub(super) is_error: bool,
    kind: Kind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    ShortFooter,
    End,
    Copy,
    Batmap,
}

/// What [`recover`] would put right.
pub(super) fn repairs(layout: &Layout) -> Vec<Finding> {
    let mut found = Vec::new();
    let mut add = |kind, is_error, problem: String, repair: &str| {
        found.push(Finding {
            problem,
            repair: repair.to_owned(),
            is_error,
            kind,
        });
    };
    if layout.tail.short && layout.tail.footer.is_ok() {
        let problem = "the footer at the end has 511 bytes, as of Virtual PC before 2004";
        add(
            Kind::ShortFooter,
            false,
            problem.to_owned(),
            "the footer's missing last byte added",
        );
    }
    let Some(dynamic) = &layout.dynamic else {
        return found;
    };
    let spare = layout.file_len.saturating_sub(shortest(dynamic.end));
    if let Err(fault) = &layout.tail.footer {
        let problem = fault
            .clone()
            .into_error(&format!("at file offset {}", layout.tail.at));
        add(
            Kind::End,
            true,
            problem.to_string(),
            "the footer written behind the last block",
        );
    } else if spare >= dynamic.slot.len {
        let problem = format!("{spare} unused bytes in front of the footer at the end");
        add(
            Kind::End,
            false,
            problem,
            "the unused space at the end cut off",
        );
    }
    match &dynamic.copy {
        Ok(copy) if *copy == layout.footer => {}
        Ok(_) => {
            let problem = "the footer's copy at the start of the file differs from the footer";
            add(
                Kind::Copy,
                true,
                problem.to_owned(),
                "the copy replaced by the footer",
            );
        }
        Err(fault) => {
            let problem = fault
                .clone()
                .into_error("copy at file offset 0x0")
                .to_string();
            add(
                Kind::Copy,
                true,
                problem,
                "the copy at the start restored from the footer",
            );
        }
    }
    if let Some((_, false)) = &dynamic.batmap {
        let problem = "the batmap does not fit its checksum, so that Xen does not open the disk";
        add(Kind::Batmap, true, problem.to_owned(), "the batmap emptied");
    }
    found
}

/// The file's length with nothing behind `end` but the footer.
fn shortest(end: FileOffset) -> u64 {
    round_up(end.get(), SECTOR_SIZE).saturating_add(FOOTER_LEN)
}

/// The metadata of the file in `storage`, which is to be written, once [`recover`] has put it right, and
/// what that did. `fits` is asked what it thinks of the parent before anything is written.
///
/// # Errors
/// Where the file is damaged or not to be written, or the host fails.
pub(super) fn read_recovered(
    storage: &dyn Storage,
    fits: Fits<'_>,
) -> Result<(Layout, Vec<String>), OpenProblem> {
    let mut layout = Layout::read(storage)?;
    fits(layout.parent())?;
    if let Some(error) = layout.not_writable.take() {
        return Err(OpenProblem::NotWritable(error));
    }
    let repaired = recover(storage, &mut layout).map_err(|source| OpenProblem::Io {
        action: "repair the file",
        source,
    })?;
    Ok((layout, repaired))
}

/// Puts right what [`repairs`] lists, durably, and updates `layout`. The caller has made sure that
/// the file may be written.
///
/// Returns what was done, for people.
///
/// # Errors
/// Where the host fails. Each step leaves the file no worse than it was.
pub(super) fn recover(storage: &dyn Storage, layout: &mut Layout) -> io::Result<Vec<String>> {
    // What the file's last user left unsynced when it died must not be undone by a power cut any
    // more once free space is written to: the table on the disk may still name it.
    storage.sync()?;
    let mut done = Vec::new();
    for finding in repairs(layout) {
        match finding.kind {
            Kind::ShortFooter => {
                storage.write_all_at(&[0], FileOffset::new(layout.file_len))?;
                layout.file_len = layout.file_len.saturating_add(1);
                layout.tail.short = false;
            }
            Kind::End => match write_end(storage, layout) {
                // The file is good as it is, only longer than it need be.
                Err(error) if is_full(&error) && layout.tail.footer.is_ok() => {
                    log::warn!("{}; they stay: the host is full", finding.problem);
                    continue;
                }
                other => other?,
            },
            Kind::Copy => {
                storage.write_all_at(&layout.footer.to_bytes(), FileOffset::new(0))?;
                if let Some(dynamic) = &mut layout.dynamic {
                    dynamic.copy = Ok(layout.footer);
                }
            }
            Kind::Batmap => {
                if let Some((batmap, fits)) = layout
                    .dynamic
                    .as_mut()
                    .and_then(|dynamic| dynamic.batmap.as_mut())
                {
                    storage.write_zeroes(batmap.map_range())?;
                    storage.write_all_at(&batmap.emptied(), batmap.range().start)?;
                    *fits = true;
                }
            }
        }
        // One thing at a time: a cut between two leaves each done or not.
        storage.sync()?;
        done.push(finding.repair);
    }
    Ok(done)
}

/// Writes the footer behind the last thing in use and cuts what follows, in this order: until the
/// cut is done, the footer that was there, or the copy at 0, still serves.
fn write_end(storage: &dyn Storage, layout: &mut Layout) -> io::Result<()> {
    let Some(dynamic) = &layout.dynamic else {
        return Ok(());
    };
    let end = FileOffset::new(round_up(dynamic.end.get(), SECTOR_SIZE));
    let len = shortest(dynamic.end);
    let footer = layout.footer.to_bytes();
    match storage.write_all_at(&footer, end) {
        // There is no footer at the end to lose: what is cut off makes room for it.
        Err(error) if is_full(&error) && layout.tail.footer.is_err() => {
            storage.set_len(end.get())?;
            storage.sync()?;
            storage.write_all_at(&footer, end)?;
        }
        other => other?,
    }
    storage.sync()?;
    storage.set_len(len)?;
    layout.file_len = len;
    layout.tail.at = end;
    layout.tail.footer = Ok(layout.footer);
    Ok(())
}
