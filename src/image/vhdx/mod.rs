//! VHDX: fixed, dynamic and differencing.

mod create;
mod faults;
mod headers;
mod layout;
mod overlay;
mod parameters;
mod repair;
pub(crate) mod replay;
mod ring;
mod table;
pub(crate) mod verify;

use std::sync::Arc;

use super::{ImageOptions, Opened, Probe};
use crate::error::{FormatError, OpenProblem};
use crate::storage::Storage;

pub(crate) use create::{NewDisk, create};

pub(crate) fn open(
    _storage: Arc<dyn Storage>,
    _options: ImageOptions,
) -> Result<Opened, OpenProblem> {
    Err(FormatError::incompatible("a VHDX", "under construction").into())
}

pub(crate) fn probe(_storage: &dyn Storage) -> Result<Probe, OpenProblem> {
    Err(FormatError::incompatible("a VHDX", "under construction").into())
}
