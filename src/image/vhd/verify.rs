//! Checks a VHD against everything that the format and our own order of writes promise.

use std::io;

use super::create::renewed;
use super::layout::{DynamicLayout, Layout, problems, sorted_slots};
use super::recover::{recover, repairs};
use super::unflushed;
use crate::error::FormatError;
use crate::format::DiskType;
use crate::format::vhd::{DynamicHeader, FOOTER_LEN, Footer, FooterFault, HEADER_LEN};
use crate::image::{CheckReport, LayoutError, Lost, Repair, read_array};
use crate::storage::Storage;
use crate::units::{FileOffset, FileRange, u64_from, u64_from_u32};

/// Messages of one kind that are listed; the rest is counted.
const LISTED: usize = 20;

/// Checks the VHD in `storage` and puts right what `repair` says.
///
/// # Errors
/// Where the host fails.
pub(crate) fn verify(storage: &dyn Storage, repair: Repair) -> io::Result<CheckReport> {
    let mut report = CheckReport::default();
    let mut layout = match Layout::read(storage) {
        Ok(layout) => layout,
        Err(LayoutError::Io(error)) => return Err(error),
        Err(LayoutError::Format(error)) => {
            report.errors.push(error.to_string());
            explain(storage, &mut report)?;
            return Ok(report);
        }
    };
    let open_elsewhere = matches!(layout.tail.footer, Err(FooterFault::InUseByTapdisk));
    let mut is_unsafe = match &layout.dynamic {
        Some(dynamic) => check_blocks(dynamic, &layout, &mut report),
        None => false,
    };
    let lost = lost(&layout);
    let has_unflushed = !layout.unflushed.is_empty();
    if layout.is_doubtful {
        report
            .errors
            .extend(layout.not_writable.take().map(|error| error.to_string()));
        is_unsafe = true;
    }
    if let Some(error) = layout.not_writable.take()
        && !is_unsafe
        && !open_elsewhere
        && (!has_unflushed || layout.footer.has_saved_state())
    {
        report.warnings.push(error.to_string());
    }
    check_geometry(&layout, &mut report);
    if let Some((lost, obstacle)) = lost {
        if repair == Repair::ZeroLost && obstacle.is_none() {
            zero_lost(storage, &mut layout)?;
            // Those were all: see the obstacles.
            report.errors.clear();
            report.repaired.push(lost.repaired());
            is_unsafe = false;
        } else {
            report.errors.push(lost.problem(obstacle));
        }
    }
    if repair != Repair::Nothing && !is_unsafe {
        if has_unflushed {
            layout = match take_out(storage, layout, &mut report)? {
                Some(layout) => layout,
                None => return Ok(report),
            };
        }
        report.repaired.extend(recover(storage, &mut layout)?);
    } else {
        report_unflushed(&layout, &mut report);
        for finding in repairs(&layout) {
            let list = if finding.is_error {
                &mut report.errors
            } else {
                &mut report.warnings
            };
            list.push(finding.problem);
        }
    }
    Ok(report)
}

/// Where the headers and the block table of the VHD in `storage` lie; nowhere in a fixed disk.
///
/// # Errors
/// Where the host fails.
pub(crate) fn metadata(storage: &dyn Storage) -> io::Result<Vec<FileRange>> {
    match Layout::read(storage) {
        Ok(layout) => Ok((layout.dynamic.into_iter())
            .flat_map(|dynamic| dynamic.metadata)
            .map(|(range, _)| range)
            .filter(|range| range.end().get() <= layout.file_len)
            .collect()),
        Err(LayoutError::Io(error)) => Err(error),
        Err(LayoutError::Format(_)) => Ok(Vec::new()),
    }
}

/// Takes the blocks out that were never flushed. What is there then, where it can be read.
fn take_out(
    storage: &dyn Storage,
    layout: Layout,
    report: &mut CheckReport,
) -> io::Result<Option<Layout>> {
    if let Some(dynamic) = &layout.dynamic {
        unflushed::take_out(storage, dynamic, &layout.unflushed)?;
    }
    report.repaired.push(format!(
        "blocks behind the end of the file, which were never flushed, taken out: {}",
        layout.unflushed.len()
    ));
    match Layout::read(storage) {
        Ok(layout) => Ok(Some(layout)),
        Err(LayoutError::Io(error)) => Err(error),
        Err(LayoutError::Format(error)) => {
            report.errors.push(error.to_string());
            Ok(None)
        }
    }
}

/// Lists the first blocks that were never flushed, and counts the others.
fn report_unflushed(layout: &Layout, report: &mut CheckReport) {
    let Some(dynamic) = &layout.dynamic else {
        return;
    };
    let listed = layout.unflushed.iter().take(LISTED);
    (report.errors).extend(
        listed.map(|block| unflushed::problem(dynamic, *block, layout.tail.at).to_string()),
    );
    let more = layout.unflushed.len().saturating_sub(LISTED);
    if more > 0 {
        report.errors.push(format!("{more} more of this kind"));
    }
}

/// What was cut off with the end of the file, if any block was, and why it cannot become zeros, if it
/// cannot.
fn lost(layout: &Layout) -> Option<(Lost, Option<&'static str>)> {
    let dynamic = layout.dynamic.as_ref()?;
    if !layout.unflushed.is_empty() {
        return None;
    }
    let limit = limit(layout);
    let slots = sorted_slots(&dynamic.map);
    let is_beyond = |slot: &FileOffset| slot.plus(dynamic.slot.len) > limit;
    let mut blocks: Vec<_> = (slots.iter())
        .filter(|(slot, _)| is_beyond(slot))
        .map(|(_, block)| *block)
        .collect();
    if blocks.is_empty() {
        return None;
    }
    blocks.sort_unstable();
    let others = problems(&slots, &dynamic.metadata, dynamic.slot, limit)
        .any(|error| !matches!(error, FormatError::BeyondEnd { .. }));
    let all = u64_from_u32(dynamic.map.len()).saturating_mul(dynamic.slot.len);
    let longest = dynamic.start.get().saturating_add(all.saturating_mul(2));
    let obstacle = if others || layout.is_doubtful {
        Some("more is wrong with it")
    } else if layout.footer.disk_type() == DiskType::Differencing {
        Some("a VHD has no way to say of what is lost that it is not the parent's")
    } else if layout.footer.has_saved_state() {
        Some("a saved machine state belongs to it")
    } else if layout.tail.footer.is_ok() {
        Some("it ends with a footer all the same, which no cut leaves")
    } else if matches!(layout.tail.footer, Err(FooterFault::InUseByTapdisk)) {
        Some("a tapdisk may have it open")
    } else if dynamic.end.get() > longest {
        Some("blocks lie further off than this disk's file ever was")
    } else {
        None
    };
    let block_size = u64_from_u32(dynamic.header.block_size());
    let lost = Lost::new(blocks.into_iter(), block_size, layout.footer.disk_len());
    Some((lost, obstacle))
}

/// Where blocks have to end.
fn limit(layout: &Layout) -> FileOffset {
    match layout.tail.footer {
        Ok(_) => layout.tail.at,
        Err(_) => FileOffset::new(layout.file_len),
    }
}

/// Gives a file of which the end was cut off a new identity, durably: what its children read changes. It
/// gets its old length with the footer behind its last block, which every repair writes.
fn zero_lost(storage: &dyn Storage, layout: &mut Layout) -> io::Result<()> {
    storage.sync()?;
    layout.footer = renewed(&layout.footer);
    storage.write_all_at(&layout.footer.to_bytes(), FileOffset::new(0))?;
    if let Some(dynamic) = &mut layout.dynamic {
        dynamic.copy = Ok(layout.footer);
    }
    storage.sync()
}

/// Overlaps, blocks beyond the end, entries that no block can have. Says whether there were any.
fn check_blocks(dynamic: &DynamicLayout, layout: &Layout, report: &mut CheckReport) -> bool {
    let slots = sorted_slots(&dynamic.map);
    let limit = limit(layout);
    // Those that were never flushed are told of elsewhere.
    let is_other = |error: &FormatError| {
        !matches!(error, FormatError::BeyondEnd { .. }) || layout.unflushed.is_empty()
    };
    let mut found = problems(&slots, &dynamic.metadata, dynamic.slot, limit).filter(is_other);
    let listed: Vec<FormatError> = found.by_ref().take(LISTED).collect();
    let more = u64_from(found.count());
    let any = !listed.is_empty();
    report
        .errors
        .extend(listed.iter().map(FormatError::to_string));
    if more > 0 {
        report.errors.push(format!("{more} more of this kind"));
    }
    any
}

/// What other programs may take exception to.
fn check_geometry(layout: &Layout, report: &mut CheckReport) {
    let footer = &layout.footer;
    let chs = footer.geometry();
    let by_product = matches!(&footer.creator(), b"vpc " | b"qemu") && !chs.is_largest();
    if by_product && chs.disk_len() != footer.disk_len() {
        report.warnings.push(format!(
            "geometry {}/{}/{} makes QEMU and Virtual PC see {} bytes of {}",
            chs.cylinders,
            chs.heads,
            chs.sectors_per_track,
            chs.disk_len(),
            footer.disk_len()
        ));
    }
}

/// Tells what else is wrong with a file that cannot be opened: each footer and the header.
fn explain(storage: &dyn Storage, report: &mut CheckReport) -> io::Result<()> {
    let len = storage.len()?;
    let mut copy = None;
    let end = len.saturating_sub(FOOTER_LEN);
    for (at, place) in [
        (0, "copy at file offset 0x0".to_owned()),
        (end, format!("at file offset {end:#x}")),
    ] {
        if len < FOOTER_LEN {
            return Ok(());
        }
        let bytes: [u8; 512] = read_array(storage, FileOffset::new(at))?;
        match Footer::parse(&bytes) {
            Ok(footer) => copy = Some(footer),
            Err(FooterFault::NoFooter) => {}
            Err(fault) => push_new(report, fault.into_error(&place).to_string()),
        }
    }
    let header_at = match copy {
        Some(footer) if footer.disk_type() != DiskType::Fixed => footer.data_offset(),
        Some(_) => return Ok(()),
        // Where all dynamic disks have it.
        None => FOOTER_LEN,
    };
    if header_at.saturating_add(HEADER_LEN) <= len {
        let at = FileOffset::new(header_at);
        let bytes: [u8; 1024] = read_array(storage, at)?;
        if bytes.starts_with(b"cxsparse")
            && let Err(error) = DynamicHeader::parse(&bytes, at)
        {
            push_new(report, error.to_string());
        }
    }
    Ok(())
}

fn push_new(report: &mut CheckReport, message: String) {
    if !report.errors.contains(&message) {
        report.errors.push(message);
    }
}
