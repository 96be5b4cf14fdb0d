//! Checks a VHDX against everything that the format and our own order of writes promise.

use std::io;

use super::headers::{check_signature, not_updatable};
use super::layout::{Examined, Layout};
use super::repair::{
    self, Finding, entry_findings, header_findings, region_findings, tail_finding,
};
use super::replay::{LogState, read_header, read_log, replayed_look};
use crate::error::FormatError;
use crate::format::DiskType;
use crate::format::vhdx::metadata::PARENT_LOCATOR;
use crate::format::vhdx::{REGION_TABLE_1, REGION_TABLE_2, REGION_TABLE_LEN, RegionTable};
use crate::image::{CheckReport, LayoutError, Lost, Repair};
use crate::storage::Storage;
use crate::units::{u64_from, u64_from_u32, usize_from};

#[cfg(test)]
mod tests;

/// Messages of one kind that are listed; the rest is counted.
const LISTED: usize = 20;

/// Checks the VHDX in `storage` and puts right what `repair` says.
///
/// # Errors
/// Where the host fails.
pub(crate) fn verify(storage: &dyn Storage, repair: Repair) -> io::Result<CheckReport> {
    let mut report = CheckReport::default();
    match examine(storage, &mut report) {
        Ok(findings) => finish(storage, repair, findings, &mut report)?,
        Err(LayoutError::Io(error)) => return Err(error),
        Err(LayoutError::Format(error)) => {
            report.errors.push(error.to_string());
            explain(storage, &mut report)?;
        }
    }
    Ok(report)
}

/// What a check found beside what is in the report already.
struct Findings {
    list: Vec<Finding>,
    /// Whether the file must not be changed: two things in it share their bytes, or something is
    /// beyond its end.
    is_unsafe: bool,
    /// What was cut off, and why that cannot become zeros, if it cannot.
    lost: Option<(Lost, Option<&'static str>)>,
}

fn examine(storage: &dyn Storage, report: &mut CheckReport) -> Result<Findings, LayoutError> {
    let current = read_header(storage)?;
    let log = read_log(storage, &current.header)?;
    let mut list = Vec::from_iter(log_finding(&log));
    let (view, current) = replayed_look(storage)?;
    let not_updatable = not_updatable(&current);
    let Examined {
        mut layout,
        unreadable,
    } = Layout::examine(&view, current)?;
    let is_hopeless = layout.doubt.is_some() && unreadable.is_some();
    let overlaps = check_overlaps(&layout, report) || is_hopeless;
    let lost = (layout.lost()).or_else(|| log.cut(layout.file_len).map(|_| Lost::default()));
    let is_cut = check_ends(&layout, report) || lost.is_some();
    let is_unsafe = overlaps || is_cut;
    if !is_hopeless {
        list.extend(header_findings(&layout.header));
        list.extend(region_findings(&layout));
    }
    list.extend(entry_findings(&layout));
    list.extend(tail_finding(&layout));
    // What makes the layout unreadable or unwritable is among the findings, but for a few.
    let is_known = is_unsafe || unreadable.is_some() || list.iter().any(|finding| finding.is_error);
    if let Some(error) = layout.not_writable.take()
        && !is_known
    {
        report.warnings.push(error.to_string());
    }
    check_oddities(&layout, report);
    if is_hopeless {
        report
            .errors
            .extend(unreadable.map(|error| error.to_string()));
    }
    if let Some(error) = &not_updatable {
        report.errors.push(error.to_string());
    }
    Ok(Findings {
        list,
        is_unsafe: is_unsafe || not_updatable.is_some(),
        lost: lost.map(|lost| {
            let others = overlaps || not_updatable.is_some() || layout.out_of_bounds().is_some();
            let obstacle = others.then_some("more is wrong with it");
            (lost, obstacle.or_else(|| layout.obstacle()))
        }),
    })
}

/// Puts right what is to be, and reports the rest.
fn finish(
    storage: &dyn Storage,
    repair: Repair,
    findings: Findings,
    report: &mut CheckReport,
) -> io::Result<()> {
    let zero_lost = repair == Repair::ZeroLost && matches!(findings.lost, Some((_, None)));
    let may_repair = zero_lost || repair != Repair::Nothing && !findings.is_unsafe;
    let any = zero_lost || findings.list.iter().any(|finding| finding.repair.is_some());
    if may_repair && any {
        match repair::repair(storage, zero_lost) {
            Ok(()) => {}
            Err(LayoutError::Io(error)) => return Err(error),
            Err(LayoutError::Format(error)) => {
                report.errors.push(error.to_string());
                return Ok(());
            }
        }
    }
    match findings.lost {
        Some((lost, _)) if zero_lost => {
            // Those were all: see the obstacles.
            report.errors.clear();
            report.repaired.push(lost.repaired());
        }
        Some((lost, obstacle)) => report.errors.push(lost.problem(obstacle)),
        None => {}
    }
    for finding in findings.list {
        match finding.repair {
            Some(repair) if may_repair => report.repaired.push(repair),
            _ if finding.is_error => report.errors.extend(finding.problems),
            _ => report.warnings.extend(finding.problems),
        }
    }
    Ok(())
}

fn log_finding(log: &LogState) -> Option<Finding> {
    let (problem, repair) = match log {
        LogState::Clean => return None,
        LogState::EmptyOnly(_) => (
            "marked as open: some program has it open now, or did not close it".to_owned(),
            "the mark of an open file taken away".to_owned(),
        ),
        LogState::Dirty(sequence) => {
            let count = sequence.entries.len();
            (
                format!(
                    "a log to be replayed (entries: {count}): whoever had the file open last did \
                     not close it, and not every program replays it"
                ),
                format!("the log replayed (entries: {count})"),
            )
        }
    };
    Some(Finding {
        problems: vec![problem],
        repair: Some(repair),
        is_error: false,
    })
}

/// Reports overlaps. Says whether there were any.
fn check_overlaps(layout: &Layout, report: &mut CheckReport) -> bool {
    // The list of all takes memory: only for who needs it.
    let claims = layout.has_overlaps.then(|| layout.claims());
    let overlaps = claims.iter().flat_map(|claims| claims.overlaps());
    list(overlaps.map(FormatError::from), report)
}

/// Reports what reaches beyond the end. Says whether there was any.
fn check_ends(layout: &Layout, report: &mut CheckReport) -> bool {
    let place = layout.table_place();
    let beyond = place.beyond_end(&layout.map, &layout.bitmap_blocks);
    let others = layout
        .far_behind()
        .into_iter()
        .chain(layout.out_of_bounds());
    list(beyond.chain(others), report)
}

/// Reports the first of `found` and how many more there are. Says whether there was any.
fn list(mut found: impl Iterator<Item = FormatError>, report: &mut CheckReport) -> bool {
    let listed: Vec<String> = (found.by_ref().take(LISTED))
        .map(|error| error.to_string())
        .collect();
    let more = found.count();
    let any = !listed.is_empty();
    report.errors.extend(listed);
    if more > 0 {
        report.errors.push(format!("{more} more of this kind"));
    }
    any
}

/// What harms nobody.
fn check_oddities(layout: &Layout, report: &mut CheckReport) {
    report.warnings.extend(layout.items.oddities());
    if layout.parent.is_none() && layout.items.find(PARENT_LOCATOR).is_some() {
        let text = "a parent locator of a disk that is said to have no parent";
        report.warnings.push(text.to_owned());
    }
    for (range, name) in &layout.pinned {
        if range.end().get() > layout.file_len {
            report.warnings.push(format!(
                "{name} at {range} reaches beyond the end of the file"
            ));
        }
    }
    if layout.disk_type() == DiskType::Fixed {
        let blocks = u64_from_u32(layout.map.len());
        let placed = layout
            .map
            .present_count()
            .saturating_add(u64_from(layout.anchors.len()));
        let missing = blocks.saturating_sub(placed);
        if missing > 0 {
            report.warnings.push(format!(
                "{missing} of the {blocks} blocks of this fixed disk have no place in its file"
            ));
        }
    }
}

/// Tells what else is wrong with a file that cannot be opened: the region tables.
fn explain(storage: &dyn Storage, report: &mut CheckReport) -> io::Result<()> {
    let len = storage.len()?;
    if check_signature(storage, len).is_err() {
        return Ok(());
    }
    for at in [REGION_TABLE_1, REGION_TABLE_2] {
        if at.plus(REGION_TABLE_LEN).get() > len {
            break;
        }
        let mut bytes = vec![0; usize_from(REGION_TABLE_LEN)];
        storage.read_exact_at(&mut bytes, at)?;
        if let Err(error) = RegionTable::parse(&bytes, at) {
            let message = error.to_string();
            if !report.errors.contains(&message) {
                report.errors.push(message);
            }
        }
    }
    Ok(())
}
