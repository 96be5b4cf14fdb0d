//! Telling a child where its parent is now, and a disk who it is.

use std::path::Path;
use std::sync::Arc;

use super::adopt::Place;
use super::{ParentSource, children_below};
use crate::disk::{Disk, OpenOptions};
use crate::error::{IdentityError, OpenError, OpenProblem, ParentProblem};
use crate::format::parent::Identity;
use crate::image;
use crate::storage::Storage;
use crate::storage::host::{Found, HostFile, HostOptions};

/// What [`relink`] wrote.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Relinked {
    /// The way to the parent from the child's directory; empty where there is none.
    pub relative: String,
    /// The way to it from a root.
    pub absolute: String,
    /// What an interrupted change had left, and was put right, for people.
    pub repaired: Vec<String>,
}

/// Writes where its parent is into the differencing disk at `child`: that is the disk at `parent`, by its
/// identity. Durable on return; after a power cut at any moment the child names the old place or the new
/// one. Nobody else may have the child open, nor the parent for writing. The parent's own parents are not
/// looked for.
///
/// # Errors
/// Where `parent` is not the disk that `child` was made over ([`ParentProblem::Mismatch`]); where one of
/// them is in use or damaged, or the child is not to be written. Nothing is written then. Where the host
/// fails.
pub fn relink(child: &Path, parent: &Path) -> Result<Relinked, OpenError> {
    let io = |action| move |source| OpenProblem::Io { action, source };
    let about_child = |problem| OpenError::new(child, problem);
    let file = HostFile::open(child, &HostOptions::default())?;
    let key = file.key().map_err(io("look at the file"));
    let key = key.map_err(about_child)?;
    // Our own lock on it is nobody else's.
    if Found::at(parent).is_ok_and(|found| found.key == key) {
        let path = parent.to_owned();
        return Err(about_child(ParentProblem::Circle { path }.into()));
    }
    let options = HostOptions {
        read_only: true,
        ..HostOptions::default()
    };
    // Held to the end, so that it stays what it is.
    let parent_file = HostFile::open(parent, &options)?;
    let found = image::identify(&parent_file, parent);
    let found = found.map_err(|problem| OpenError::new(parent, problem))?;
    let place = Place::of(parent, child)
        .map_err(|(action, source)| about_child(OpenProblem::Io { action, source }))?;
    let new = place.parent(found.identity, found.disk_len, found.sector_size);
    let repaired = image::relink(Arc::new(file), child, &new, parent).map_err(about_child)?;
    Ok(Relinked {
        relative: new.relative,
        absolute: new.absolute,
        repaired,
    })
}

/// Gives the disk at `path`, whose parents are looked for in `parents`, an identity that no other disk has,
/// so that it can be a parent: see [`crate::error::CreateError::ParentIdentity`]. Durable on return; nobody
/// else may have it open.
///
/// # Errors
/// [`IdentityError::HasChildren`] where disks are over it, or may be, in its directory or below: they would
/// no longer take it for their parent.
pub fn give_identity(path: &Path, parents: &dyn ParentSource) -> Result<Identity, IdentityError> {
    let storage: Arc<dyn Storage> = Arc::new(HostFile::open(path, &HostOptions::default())?);
    let options = OpenOptions {
        read_only: true,
        ..OpenOptions::default()
    };
    let disk = Disk::open_storage_with(Arc::clone(&storage), path, &options, parents)?;
    // Nothing opens a child of a VHD without one.
    if disk.identity() != Identity::Vhd([0; 16]) {
        let directory = path.parent().filter(|found| !found.as_os_str().is_empty());
        let children = children_below(directory.unwrap_or(Path::new(".")), &disk);
        if let Some(reason) = children.reliance() {
            let path = path.to_owned();
            return Err(IdentityError::HasChildren { path, reason });
        }
    }
    drop(disk);
    let renewed = image::renew_identity(storage, path);
    Ok(renewed.map_err(|problem| OpenError::new(path, problem))?)
}
