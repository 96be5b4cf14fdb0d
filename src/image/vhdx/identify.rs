//! Which disk it is, and what it says of its parent.

use super::parameters::{Parameters, read_items, read_regions};
use super::replay::replayed_look;
use crate::error::OpenProblem;
use crate::format::Format;
use crate::format::parent::Identity;
use crate::image::{Identified, LayoutError};
use crate::storage::Storage;

/// Reads the headers of the VHDX in `storage`, as replaying its log would leave them.
///
/// # Errors
/// Where they are damaged, or the host fails.
pub(crate) fn identify(storage: &dyn Storage) -> Result<Identified, OpenProblem> {
    let (view, current) = replayed_look(storage)?;
    let parameters = read_parameters(&view)?;
    Ok(Identified {
        format: Format::Vhdx,
        identity: Identity::Vhdx(current.header.data_write_guid),
        disk_len: parameters.disk_len,
        sector_size: parameters.sector_size,
        parent: parameters.parent,
    })
}

pub(super) fn read_parameters(storage: &dyn Storage) -> Result<Parameters, LayoutError> {
    let (_, metadata) = read_regions(storage)?.table.check()?;
    let file_len = storage.len()?;
    let items = read_items(storage, metadata, file_len)?;
    Parameters::read(storage, metadata, &items, file_len)
}
