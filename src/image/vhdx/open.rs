//! Opening a VHDX, and what is put right when it is opened for writing.
//!
//! | found | done |
//! |---|---|
//! | a log to replay | replayed: see [`super::replay`] |
//! | one good header, or one that still names a log | both written anew |
//! | a last block that ends with the disk (QEMU) | the file extended |
//! | free space at the end that a block fits in | cut off |
//! | a damaged copy of the region table | written anew, through the log |

use std::io;
use std::sync::Arc;

use uuid::Uuid;

use super::Vhdx;
use super::commit::Draft;
use super::headers::not_updatable;
use super::identify::read_parameters;
use super::layout::Layout;
use super::replay::{cut_by_log, padded_view, replay, replayed_look, replayed_view, update_both};
use crate::error::OpenProblem;
use crate::format::parent::Identity;
use crate::format::vhdx::{MIB, REGION_TABLE_1, REGION_TABLE_2};
use crate::format::{DiskType, Format};
use crate::image::open::GLANCED_BLOCKS;
use crate::image::{Fits, ImageOptions, Opened, Probe};
use crate::storage::Storage;
use crate::units::{round_up, u64_from_u32};

/// Opens the VHDX in `storage`. For writing, what an interrupted change left is put right first.
///
/// # Errors
/// Where it is no VHDX or a damaged one, is not to be written, or the host fails.
pub(crate) fn open(
    storage: Arc<dyn Storage>,
    options: ImageOptions,
    fits: Fits<'_>,
) -> Result<Opened, OpenProblem> {
    let (image, repaired) = if options.read_only {
        let (view, header) = replayed_view(storage)?;
        let layout = Layout::read(&*view, header)?;
        fits(layout.parent.as_ref())?;
        let view = padded_view(view, layout.padded_len()).map_err(failed("read the file"))?;
        (Vhdx::from_layout(view, layout, options, false), Vec::new())
    } else {
        open_writable(storage, options, fits)?
    };
    Ok(Opened {
        image: Box::new(image),
        repaired,
    })
}

fn failed(action: &'static str) -> impl Fn(io::Error) -> OpenProblem {
    move |source| OpenProblem::Io { action, source }
}

/// As [`open`], for writing; with what was put right.
///
/// # Errors
/// The same.
pub(super) fn open_writable(
    storage: Arc<dyn Storage>,
    options: ImageOptions,
    fits: Fits<'_>,
) -> Result<(Vhdx, Vec<String>), OpenProblem> {
    let mut layout = {
        let (view, header) = replayed_look(&*storage)?;
        Layout::read(&view, header)?
    };
    fits(layout.parent.as_ref())?;
    let not_writable = layout.not_writable.take();
    if let Some(error) = not_writable.or_else(|| not_updatable(&layout.header)) {
        return Err(OpenProblem::NotWritable(error));
    }
    // This syncs first: what was read above, written by whoever died with the file open perhaps, must
    // not be undone by a power cut any more once the file is written to.
    let (header, replayed) = replay(&*storage)?;
    layout.header = header;
    let mut repaired = Vec::from_iter(replayed);
    let mut is_marked = !repaired.is_empty();
    renew_headers(&*storage, &mut layout, &mut is_marked, &mut repaired)
        .map_err(failed("repair the file"))?;
    fit_end(&*storage, &mut layout, &mut is_marked, &mut repaired)
        .map_err(failed("repair the file"))?;
    let faults = layout.regions.faults.clone();
    let table = layout.regions.table.bytes().to_vec();
    let image = Vhdx::from_layout(storage, layout, options, is_marked);
    for (at, fault) in [REGION_TABLE_1, REGION_TABLE_2].into_iter().zip(faults) {
        if fault.is_some() {
            let mut transaction = image.file.begin().map_err(not_repaired)?;
            let mut draft = Draft::new(&image.file);
            draft.put(at, &table).map_err(failed("repair the file"))?;
            let written = transaction.write(draft.into_changed());
            written.map_err(not_repaired)?;
            repaired.push("a damaged copy of the region table restored from the other".to_owned());
        }
    }
    Ok((image, repaired))
}

fn not_repaired(error: crate::error::DiskError) -> OpenProblem {
    OpenProblem::Io {
        action: "repair the file",
        source: io::Error::other(error),
    }
}

/// Leaves no header that would tell an old story if the current one were damaged: one that names a
/// log whose changes are long since in their places.
fn renew_headers(
    storage: &dyn Storage,
    layout: &mut Layout,
    is_marked: &mut bool,
    repaired: &mut Vec<String>,
) -> io::Result<()> {
    if matches!(&layout.header.other, Ok(other) if other.log_guid.is_nil()) {
        return Ok(());
    }
    let guid = Uuid::new_v4();
    update_both(storage, &mut layout.header, &|header| {
        header.file_write_guid = guid;
    })?;
    *is_marked = true;
    repaired.push("a damaged or outdated header written anew".to_owned());
    Ok(())
}

/// Makes the file as long as what is in it needs, durably. The headers name no log.
fn fit_end(
    storage: &dyn Storage,
    layout: &mut Layout,
    is_marked: &mut bool,
    repaired: &mut Vec<String>,
) -> io::Result<()> {
    let end = round_up(layout.end.get(), MIB);
    let spare = layout.file_len.saturating_sub(end);
    // A fixed disk keeps room for blocks that have no place yet.
    let is_leaked = spare >= layout.block_size && layout.disk_type() != DiskType::Fixed;
    let is_short = layout.file_len < layout.end.get();
    if !is_leaked && !is_short {
        return Ok(());
    }
    if !*is_marked {
        let guid = Uuid::new_v4();
        update_both(storage, &mut layout.header, &|header| {
            header.file_write_guid = guid;
        })?;
        *is_marked = true;
    }
    storage.set_len(end)?;
    storage.sync()?;
    layout.file_len = end;
    let done = if is_leaked {
        "the unused space at the end cut off"
    } else {
        "the file extended to the end of its last block"
    };
    repaired.push(done.to_owned());
    Ok(())
}

/// What can be told of a VHDX without opening it.
///
/// # Errors
/// As [`open`], for reading.
pub(crate) fn probe(storage: &dyn Storage) -> Result<Probe, OpenProblem> {
    let cut = cut_by_log(storage)?;
    let (view, header) = replayed_look(storage)?;
    let layout = Layout::read(&view, header)?;
    Ok(Probe {
        format: Format::Vhdx,
        virtual_size: layout.disk_len,
        disk_type: layout.disk_type(),
        identity: Identity::Vhdx(layout.header.header.data_write_guid),
        parent: layout.parent,
        not_writable: (layout.not_writable.or(cut)).or_else(|| not_updatable(&layout.header)),
    })
}

/// What the headers tell of a VHDX with over [`GLANCED_BLOCKS`]; `None` of all others.
///
/// # Errors
/// Where they are damaged, or the host fails.
pub(crate) fn probe_large(storage: &dyn Storage) -> Result<Option<Probe>, OpenProblem> {
    let (view, header) = replayed_look(storage)?;
    let told = read_parameters(&view)?;
    let is_large = u64_from_u32(told.bat_geometry().blocks()) > GLANCED_BLOCKS;
    Ok(is_large.then(|| Probe {
        format: Format::Vhdx,
        virtual_size: told.disk_len,
        disk_type: told.disk_type(),
        identity: Identity::Vhdx(header.header.data_write_guid),
        parent: told.parent,
        not_writable: not_updatable(&header),
    }))
}
