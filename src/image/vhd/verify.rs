//! Checks a VHD against everything that the format and our own order of writes promise.

use std::io;

use super::layout::{DynamicLayout, Layout, problems, sorted_slots};
use super::recover::{recover, repairs};
use crate::error::FormatError;
use crate::format::DiskType;
use crate::format::vhd::{DynamicHeader, FOOTER_LEN, Footer, FooterFault, HEADER_LEN};
use crate::image::{CheckOptions, CheckReport, LayoutError, read_array};
use crate::storage::Storage;
use crate::units::{FileOffset, u64_from};

/// Messages of one kind that are listed; the rest is counted.
const LISTED: usize = 20;

/// Checks the VHD in `storage` and repairs it as `options` say.
///
/// # Errors
/// Where the host fails.
pub(crate) fn verify(storage: &dyn Storage, options: &CheckOptions) -> io::Result<CheckReport> {
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
    if layout.is_doubtful {
        report
            .errors
            .extend(layout.not_writable.take().map(|error| error.to_string()));
        is_unsafe = true;
    }
    if let Some(error) = layout.not_writable.take()
        && !is_unsafe
        && !open_elsewhere
    {
        report.warnings.push(error.to_string());
    }
    check_geometry(&layout, &mut report);
    let findings = repairs(&layout);
    if options.repair && !is_unsafe {
        report.repaired = if options.dry_run {
            findings.into_iter().map(|finding| finding.repair).collect()
        } else {
            recover(storage, &mut layout)?
        };
    } else {
        for finding in findings {
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

/// Overlaps, blocks beyond the end, entries that no block can have. Says whether there were any.
fn check_blocks(dynamic: &DynamicLayout, layout: &Layout, report: &mut CheckReport) -> bool {
    let slots = sorted_slots(&dynamic.map);
    let limit = match layout.tail.footer {
        Ok(_) => layout.tail.at,
        Err(_) => FileOffset::new(layout.file_len),
    };
    let mut found = problems(&slots, &dynamic.metadata, dynamic.slot, limit);
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
