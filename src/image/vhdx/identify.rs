//! Which disk it is, and what it says of its parent.

use std::io;

use super::parameters::{Parameters, read_items};
use super::replay::replayed_look;
use crate::error::{FormatError, OpenProblem};
use crate::format::Format;
use crate::format::parent::Identity;
use crate::format::vhdx::{REGION_TABLE_1, REGION_TABLE_2, REGION_TABLE_LEN, RegionTable};
use crate::image::{Identified, LayoutError};
use crate::storage::Storage;
use crate::units::{FileOffset, usize_from};

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
        sector_size: parameters.sector_size,
        parent: parameters.parent,
    })
}

pub(super) fn read_parameters(storage: &dyn Storage) -> Result<Parameters, LayoutError> {
    let mut bytes = vec![0; usize_from(REGION_TABLE_LEN)];
    let mut read = |at: FileOffset| -> io::Result<Result<RegionTable, FormatError>> {
        storage.read_exact_at(&mut bytes, at)?;
        Ok(RegionTable::parse(&bytes, at))
    };
    // The second is a copy.
    let table = match read(REGION_TABLE_1)? {
        Ok(table) => table,
        Err(fault) => read(REGION_TABLE_2)?.map_err(|_| fault)?,
    };
    let (_, metadata) = table.check()?;
    let file_len = storage.len()?;
    let items = read_items(storage, metadata, file_len)?;
    Parameters::read(storage, metadata, &items, file_len)
}
