//! Which disk an image is, and what it says of its parent, from its headers alone.

use std::path::Path;

use super::open::as_named;
use super::{detect, vhd, vhdx};
use crate::error::OpenProblem;
use crate::format::Format;
use crate::format::parent::{Identity, ParentLink};
use crate::storage::Storage;

/// What an image's headers tell of it and its parent.
#[derive(Clone, Debug)]
pub struct Identified {
    /// The format.
    pub format: Format,
    /// Which disk it is.
    pub identity: Identity,
    /// The disk's size in bytes.
    pub disk_len: u64,
    /// Bytes in a sector of the disk, as the guest addresses them.
    pub sector_size: u64,
    /// What a differencing image says of its parent.
    pub parent: Option<ParentLink>,
}

/// Reads the headers of the image in `storage`, which people call `name`. A file that passes may
/// still be one that [`super::open`] refuses: its block table is not looked at, which may be large.
/// Takes no lock and writes nothing.
///
/// # Errors
/// Where it is no image, its headers are damaged, or the host fails.
pub fn identify(storage: &dyn Storage, name: &Path) -> Result<Identified, OpenProblem> {
    match detect(storage, name)? {
        Format::Vhd => vhd::identify(storage).map_err(|error| as_named(error, name)),
        Format::Vhdx => vhdx::identify(storage),
    }
}
