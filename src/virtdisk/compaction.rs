//! What an operation does to a disk, and how its end is told.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;

use super::error::*;
use crate::compact::{self, CompactOptions, CompactReport, Control};
use crate::disk::{Disk, children_below};

/// Compacts `disk` and leaves a clean file, whatever happens.
pub(super) fn carry_out(disk: Arc<Disk>, options: CompactOptions, control: &Control) -> Win32Error {
    let path = disk.path().to_owned();
    let compact = AssertUnwindSafe(|| compact_and_close(disk, options, control));
    match catch_unwind(compact) {
        Ok(Ok(report)) => {
            tell(&path, &report);
            ERROR_SUCCESS
        }
        Ok(Err(status)) => status,
        Err(panic) => {
            log::error!("{}: {}", path.display(), said(&*panic));
            ERROR_INTERNAL_ERROR
        }
    }
}

fn compact_and_close(
    disk: Arc<Disk>,
    options: CompactOptions,
    control: &Control,
) -> Result<CompactReport, Win32Error> {
    let mut options = options;
    if options.fs_aware
        && let Some(reason) = reliance(&disk)
    {
        log::warn!(
            "{}: what its filesystems call free stays: {reason}",
            disk.path().display()
        );
        options.fs_aware = false;
    }
    let compacted = compact::run(&disk, options, control);
    let closed = disk.close();
    let report = compacted.map_err(|error| logged(&error))?;
    closed.map_err(|error| logged(&error))?;
    Ok(report)
}

/// Why disks in the directory of its file, or below or anywhere, may rely on what is free in `disk`.
fn reliance(disk: &Disk) -> Option<String> {
    let directory = disk.path().parent();
    let directory = directory.filter(|found| !found.as_os_str().is_empty());
    let children = children_below(directory.unwrap_or(Path::new(".")), disk);
    disk.keeps_free_space(&children, false)
}

/// Logs what the caller has no other way to learn.
fn tell(path: &Path, report: &CompactReport) {
    let path = path.display();
    if let Some(reason) = &report.not_surveyed {
        log::warn!("{path}: the guest's free space was not touched: {reason}");
    }
    for part in &report.parts {
        if let Some(reason) = &part.skipped {
            let content = part.content.unwrap_or("it");
            log::warn!("{path}: {} counts as in use: {content} {reason}", part.name);
        }
    }
    let (before, after) = (report.length_before, report.length_after);
    log::info!("{path}: {before} bytes became {after}");
}

/// What a panic said.
fn said(panic: &(dyn Any + Send)) -> &str {
    let owned = panic.downcast_ref::<String>().map(String::as_str);
    let text = owned.or_else(|| panic.downcast_ref::<&str>().copied());
    text.unwrap_or("a panic")
}
