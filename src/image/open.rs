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

/// Reads `N` bytes at `at`.
pub(crate) fn read_array<const N: usize>(
    storage: &dyn Storage,
    at: FileOffset,
) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    storage.read_exact_at(&mut bytes, at)?;
    Ok(bytes)
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
/// may be a guest's bytes, so that a name with an extension is believed before those: a fixed VHD
/// whose footer is damaged does not become what its guest wrote to its first sector.
///
/// # Errors
/// Where the host cannot read, or name and content leave it open.
pub fn detect(storage: &dyn Storage, name: &Path) -> Result<Format, OpenProblem> {
    let look = || -> io::Result<(bool, bool)> {
        let mut start = [0; 8];
        if storage.len()? < 8 {
            return Ok((false, false));
        }
        storage.read_exact_at(&mut start, FileOffset::new(0))?;
        Ok((start == *b"vhdxfile", vhd::ends_with_footer(storage)?))
    };
    let (starts_as_vhdx, ends_as_vhd) = look().map_err(|source| OpenProblem::Io {
        action: "read the file",
        source,
    })?;
    let unclear =
        |found: &str, advice: &str| OpenProblem::Format(FormatError::incompatible(found, advice));
    match (named_format(name), starts_as_vhdx, ends_as_vhd) {
        (Some(Format::Vhd), true, false) => Err(unclear(
            "a file named as a VHD that starts as a VHDX and has no valid footer",
            "only if it never was a VHD, name it .vhdx; a fixed VHD's guest may have written that",
        )),
        (None, true, true) => Err(unclear(
            "a file that starts as a VHDX and ends as a VHD",
            "give it the extension .vhdx or .vhd, whichever it is",
        )),
        (Some(Format::Vhd), ..) | (_, false, true) => Ok(Format::Vhd),
        (Some(Format::Vhdx), ..) | (None, true, false) => Ok(Format::Vhdx),
        // Neither; what is missing of a VHD may be put right.
        (None, false, false) => Ok(Format::Vhd),
    }
}

/// Whether `name` has the extension of a VHD.
pub(crate) fn is_named_vhd(name: &Path) -> bool {
    named_format(name) == Some(Format::Vhd)
}

/// Under the name of a VHD, what has no footer may have lost it.
pub(super) fn as_named(problem: OpenProblem, name: &Path) -> OpenProblem {
    match problem {
        OpenProblem::Format(FormatError::NotVhd) if is_named_vhd(name) => {
            FormatError::NoFooter.into()
        }
        other => other,
    }
}

/// The format that the extension of `name` stands for.
fn named_format(name: &Path) -> Option<Format> {
    let extension = name.extension()?.to_ascii_lowercase();
    match extension.to_str()? {
        "vhd" | "avhd" => Some(Format::Vhd),
        "vhdx" | "avhdx" => Some(Format::Vhdx),
        _ => None,
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
    open_if(storage, name, options, &|_| Ok(()))
}

/// As [`open`], where `fits` has nothing against what the image says of its parent: it is asked
/// before anything is put right, for a file that is refused is not written to.
///
/// # Errors
/// As [`open`], and those of `fits`.
pub(crate) fn open_if(
    storage: Arc<dyn Storage>,
    name: &Path,
    options: ImageOptions,
    fits: Fits<'_>,
) -> Result<Opened, OpenProblem> {
    match detect(&*storage, name)? {
        Format::Vhd => vhd::open(storage, options, fits).map_err(|error| as_named(error, name)),
        Format::Vhdx => vhdx::open(storage, options, fits),
    }
}

/// Whether an image that says this of its parent may be opened.
pub(crate) type Fits<'a> = &'a dyn Fn(Option<&ParentLink>) -> Result<(), OpenProblem>;

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
        Format::Vhd => vhd::probe(storage).map_err(|error| as_named(error, name)),
        Format::Vhdx => vhdx::probe(storage),
    }
}

/// Tables of disks of more blocks are not read by [`glance`]: 1 TiB of the smallest blocks of a VHDX.
pub(super) const GLANCED_BLOCKS: u64 = 1 << 20;

/// As [`probe`], in a time and with memory that no file has a say in: of a disk of over a million blocks, the
/// headers alone are read. Whether its table is sound is found when it is opened.
///
/// # Errors
/// What [`open`] would fail with, but for the table of such a disk.
pub fn glance(storage: &dyn Storage, name: &Path) -> Result<Probe, OpenProblem> {
    let large = match detect(storage, name)? {
        Format::Vhd => vhd::probe_large(storage),
        Format::Vhdx => vhdx::probe_large(storage),
    };
    // What is wrong with headers is told by who reads all.
    match large {
        Ok(Some(found)) => Ok(found),
        Ok(None) | Err(_) => probe(storage, name),
    }
}
