//! What changes in a VHDX that nobody has open: where its parent lies, and its identity.
//!
//! The parent locator is a metadata item, so that one entry of the log replaces it and what the table says
//! of its place and length: as a whole or not at all. No guest reads anything else than before, and
//! `DataWriteGuid` stays, so that the disk's own children still know it. A new identity is what
//! announces a change of the disk's content: see `session.rs`.

use std::io;
use std::sync::Arc;

use super::Vhdx;
use super::commit::Draft;
use super::log::MAX_PAGES;
use super::open::open_writable;
use super::parameters::{read_item, read_items, read_regions};
use crate::error::{DiskError, FormatError, OpenProblem};
use crate::format::parent::{Identity, NewParent};
use crate::format::vhdx::ParentLocator;
use crate::format::vhdx::metadata::PARENT_LOCATOR;
use crate::image::{Image, ImageOptions};
use crate::storage::Storage;
use crate::units::u64_from;

const OPTIONS: ImageOptions = ImageOptions {
    read_only: false,
    punch_holes: false,
};

/// Writes where `parent` lies into the differencing VHDX in `storage`, durably; what was put right before,
/// for people. See [`crate::image::relink()`].
///
/// # Errors
/// As opening it for writing; where its metadata has no room; and what the host answers.
pub(crate) fn relink(
    storage: Arc<dyn Storage>,
    parent: &NewParent,
) -> Result<Vec<String>, OpenProblem> {
    let (image, repaired) = open_writable(storage, OPTIONS, &|_| Ok(()))?;
    let written = image.write_parent_paths(&parent.relative, &parent.absolute);
    // Also after a failure, so that the file is left clean.
    let settled = image.settle().map_err(not_written);
    written.and(settled).map(|()| repaired)
}

/// Gives the VHDX in `storage` a new identity, durably; which one. See [`crate::image::renew_identity`].
///
/// # Errors
/// As opening it for writing, and what the host answers.
pub(crate) fn renew_identity(storage: Arc<dyn Storage>) -> Result<Identity, OpenProblem> {
    let (image, _) = open_writable(storage, OPTIONS, &|_| Ok(()))?;
    let renewed = image.begin_change().and_then(|()| image.settle());
    renewed.map_err(not_written)?;
    Ok(image.identity())
}

fn not_written(error: DiskError) -> OpenProblem {
    OpenProblem::Io {
        action: "write its headers",
        source: io::Error::other(error),
    }
}

impl Vhdx {
    fn write_parent_paths(&self, relative: &str, absolute: &str) -> Result<(), OpenProblem> {
        let storage = &*self.file.storage;
        let file_len = self.file_len();
        let failed = |source| OpenProblem::Io {
            action: "write where its parent is",
            source,
        };
        let (_, region) = read_regions(storage)?.table.check()?;
        let items = read_items(storage, region, file_len)?;
        let item = items.find(PARENT_LOCATOR).ok_or_else(|| {
            FormatError::corrupt(
                "metadata",
                "no parent locator",
                "one of a differencing disk",
            )
        })?;
        let locator = ParentLocator::parse(&read_item(storage, region, item, file_len)?)?;
        let bytes = locator.with_paths(relative, absolute).to_bytes();
        let too_long = || {
            let found = format!("{} bytes of paths to its parent", bytes.len());
            FormatError::incompatible(found, "its metadata has no room for them: use shorter ones")
        };
        let room = items.room_for(PARENT_LOCATOR, u64_from(bytes.len()), region.len);
        let room = room.ok_or_else(too_long)?;

        let mut transaction = self.file.begin().map_err(not_written)?;
        let mut draft = Draft::new(&self.file);
        for (at, part) in [(room.at, &bytes[..]), (room.entry_at, &room.entry)] {
            draft.put(region.start.plus(at), part).map_err(failed)?;
        }
        let pages = draft.into_changed();
        if pages.len() > MAX_PAGES {
            return Err(too_long().into());
        }
        transaction.write(pages).map_err(not_written)
    }
}
