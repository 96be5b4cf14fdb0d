//! What changes in the headers of an image that nobody has open: where its parent lies, and which disk it is.

use std::path::Path;
use std::sync::Arc;

use super::{detect, identify, vhd, vhdx};
use crate::error::{FormatError, OpenProblem, ParentProblem};
use crate::format::Format;
use crate::format::parent::{Identity, NewParent};
use crate::storage::Storage;

/// Writes where `parent`, the image in the file at `place`, lies into the differencing image in `storage`,
/// which people call `name`. Durable on return. What else of places stood there is gone: it led elsewhere.
/// After a power cut at any moment, the old places stand there or the new ones.
///
/// What an interrupted change left is put right first; returned is what was done, for people. The caller
/// keeps everybody else from the image.
///
/// # Errors
/// [`ParentProblem::Mismatch`] and [`ParentProblem::Unfit`] where it is not the parent: then nothing is
/// written. Where the image has no parent, is damaged or not to be written; where the host fails.
pub fn relink(
    storage: Arc<dyn Storage>,
    name: &Path,
    parent: &NewParent,
    place: &Path,
) -> Result<Vec<String>, OpenProblem> {
    let own = identify(&*storage, name)?;
    let Some(link) = own.parent else {
        let advice = "only a differencing disk can be told where its parent is";
        return Err(FormatError::incompatible("a disk without a parent", advice).into());
    };
    let path = || place.to_owned();
    if !link.identities.contains(&parent.identity) {
        return Err(ParentProblem::Mismatch {
            path: path(),
            found: parent.identity.to_string(),
            expected: link.expected(),
        }
        .into());
    }
    if own.sector_size != parent.sector_size {
        return Err(ParentProblem::sectors(path(), parent.sector_size, own.sector_size).into());
    }
    match own.format {
        Format::Vhd => vhd::relink(&*storage, parent),
        Format::Vhdx => vhdx::relink(storage, parent),
    }
}

/// Gives the image in `storage`, which people call `name`, an identity that no other has: a VHD's
/// `UniqueID`, a VHDX's `DataWriteGuid`. Durable on return. No child of it is accepted from then on. After
/// a power cut at any moment it has the old one or the new one.
///
/// The caller keeps everybody else from the image.
///
/// # Errors
/// Where the image is damaged or not to be written, or the host fails.
pub fn renew_identity(storage: Arc<dyn Storage>, name: &Path) -> Result<Identity, OpenProblem> {
    match detect(&*storage, name)? {
        Format::Vhd => vhd::renew_identity(&*storage),
        Format::Vhdx => vhdx::renew_identity(storage),
    }
}
