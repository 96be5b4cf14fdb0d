//! From a host file to an image: which format it is, opening it, and a look from outside.

use std::io;
use std::path::Path;
use std::sync::Arc;

use super::{Image, vhd, vhdx};
use crate::error::{FormatError, OpenProblem};
use crate::format::parent::{Identity, ParentLink};
use crate::format::{DiskType, Format};
use crate::storage::Storage;
use crate::units::FileOffset;

/// Why an image's metadata could not be read.
#[derive(Debug)]
pub(crate) enum LayoutError {
    /// The host.
    Io(io::Error),
    /// The bytes.
    Format(FormatError),
}

impl From<io::Error> for LayoutError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl From<FormatError> for LayoutError {
    fn from(error: FormatError) -> Self {
        Self::Format(error)
    }
}

impl From<LayoutError> for OpenProblem {
    fn from(error: LayoutError) -> Self {
        match error {
            LayoutError::Io(source) => Self::Io {
                action: "read the file",
                source,
            },
            LayoutError::Format(error) => Self::Format(error),
        }
    }
}

/// How to open an image.
#[derive(Clone, Copy, Debug)]
pub struct ImageOptions {
    /// Never write to the file.
    pub read_only: bool,
    /// Whether freed space is given back to the host by punching holes.
    pub punch_holes: bool,
}

/// An image and what was put right when it was opened, for people.
#[derive(Debug)]
pub struct Opened {
    /// The image.
    pub image: Box<dyn Image>,
    /// One sentence for each thing.
    pub repaired: Vec<String>,
}

/// The format of the image in `storage`, which people call `name`.
///
/// A VHDX announces itself in its first bytes, a VHD at its end. What lies at the other end of each
/// may be a guest's bytes, so that a file with both is what its name's extension says.
///
/// # Errors
/// Where the host cannot read, or the file has both and the extension of neither.
pub fn detect(storage: &dyn Storage, name: &Path) -> Result<Format, OpenProblem> {
    let look = || -> io::Result<(bool, bool)> {
        let mut start = [0; 8];
        if storage.len()? < 8 {
            return Ok((false, false));
        }
        storage.read_exact_at(&mut start, FileOffset::new(0))?;
        let is_vhdx = start == *b"vhdxfile";
        Ok((is_vhdx, is_vhdx && vhd::ends_with_footer(storage)?))
    };
    let found = look().map_err(|source| OpenProblem::Io {
        action: "read the file",
        source,
    })?;
    let extension = name.extension().map(std::ffi::OsStr::to_ascii_lowercase);
    let extension = extension.as_deref().and_then(std::ffi::OsStr::to_str);
    match (found, extension) {
        ((false, _), _) | ((true, true), Some("vhd" | "avhd")) => Ok(Format::Vhd),
        ((true, false), _) | (_, Some("vhdx" | "avhdx")) => Ok(Format::Vhdx),
        _ => Err(OpenProblem::Format(FormatError::incompatible(
            "a file that starts as a VHDX and ends as a VHD",
            "give it the extension .vhdx or .vhd, whichever it is",
        ))),
    }
}

/// Opens the image in `storage`, which people call `name`. For writing, what an interrupted change
/// left is put right first.
///
/// # Errors
/// Where it is no image or a damaged one, is not to be written, or the host fails.
pub fn open(
    storage: Arc<dyn Storage>,
    name: &Path,
    options: ImageOptions,
) -> Result<Opened, OpenProblem> {
    match detect(&*storage, name)? {
        Format::Vhd => vhd::open(storage, options),
        Format::Vhdx => vhdx::open(storage, options),
    }
}

/// What can be told of an image without opening it as a disk.
#[derive(Debug)]
pub struct Probe {
    /// The format.
    pub format: Format,
    /// The disk's size in bytes.
    pub virtual_size: u64,
    /// How the image stores its disk.
    pub disk_type: DiskType,
    /// Which disk it is.
    pub identity: Identity,
    /// What a differencing image says of its parent.
    pub parent: Option<ParentLink>,
    /// Why it can only be opened read-only, if so.
    pub not_writable: Option<FormatError>,
}

/// Verifies the metadata of the image in `storage`, which people call `name`, and tells what it is.
/// Takes no lock and writes nothing; of a file that another program is changing the answer may be
/// outdated or an error. The parent of a differencing image is not looked for.
///
/// # Errors
/// What [`open`] would fail with.
pub fn probe(storage: &dyn Storage, name: &Path) -> Result<Probe, OpenProblem> {
    match detect(storage, name)? {
        Format::Vhd => vhd::probe(storage),
        Format::Vhdx => vhdx::probe(storage),
    }
}
