//! The WinFsp front end: translates requests to a [`Library`] and back.
//!
//! # Caching
//! The kernel may believe attributes for a second and keeps no content but that of mapped files, which
//! it is told to forget when the last handle goes. So a write that was acknowledged has reached the disk file
//! and survives our death.
//!
//! # Who may do what
//! WinFsp checks each open against the security descriptor of the backing file or directory, which is what is
//! shown, and against the read-only attribute, which every disk has that cannot be written. That the
//! parents of a differencing disk may be read is asked with the access token of whoever opens it.
//!
//! # What is refused
//! Names are the directory's business, so making, renaming and removing fail with "access denied", and so does a
//! change of size, attributes, times or security; asking for what is so already succeeds. Opening with
//! "create always" is a change of size. Writing past the disk's end, and asking for a larger size, fail with
//! "disk full", and nothing is written then. On a volume that is read-only all of these say so.
//!
//! Windows' way to discard, `FSCTL_SET_ZERO_DATA` and trim, does not come through to programs like this one.

mod adapter;
mod attributes;
mod control;
mod directory;
mod host;
mod names;
mod raw;
mod service;
mod status;

use std::ffi::OsString;
use std::ops::ControlFlow;
use std::os::windows::ffi::OsStrExt;
use std::sync::Arc;

use vhdfs::library::{Attributes, Library, LibraryError, NodeId, NodeKind, User};
use windows_sys::Win32::Foundation::{
    NTSTATUS, STATUS_ACCESS_DENIED, STATUS_MEDIA_WRITE_PROTECTED,
};
use winfsp::FspError;

use crate::front::{Brake, Handles, Listings, OpenFile, Reader};

pub(crate) use control::unmount;
pub(crate) use service::mount;

/// The file system that the driver calls.
pub(crate) struct VhdFs {
    library: Arc<Library>,
    files: Arc<Handles<OpenFile>>,
    listings: Listings,
    /// What the volume is called.
    label: String,
    read_only: bool,
}

/// A reference to a node, given back when it is dropped.
struct Reference {
    library: Arc<Library>,
    node: NodeId,
}

impl Drop for Reference {
    fn drop(&mut self) {
        // The root needs none.
        if self.node != NodeId::ROOT {
            self.library.forget(self.node, 1);
        }
    }
}

/// What a handle of the driver's stands for.
pub(crate) struct Opened {
    reference: Reference,
    kind: NodeKind,
    /// The number of the open disk, where the handle is for its content.
    file: Option<u64>,
    reader: Reader,
}

impl VhdFs {
    fn new(library: Arc<Library>, label: String, read_only: bool) -> Self {
        Self {
            library,
            files: Arc::new(Handles::new()),
            listings: Listings::new(),
            label,
            read_only,
        }
    }

    fn brake(&self) -> Brake {
        Brake::new(self.library.clone(), self.files.clone())
    }

    /// What changes are refused with.
    fn refusal(&self) -> FspError {
        FspError::NTSTATUS(match self.read_only {
            true => STATUS_MEDIA_WRITE_PROTECTED,
            false => STATUS_ACCESS_DENIED,
        })
    }

    /// Holds a node that was looked up.
    fn hold(&self, node: NodeId) -> Reference {
        Reference {
            library: self.library.clone(),
            node,
        }
    }

    /// Finds what is at a path; its attributes as they are now.
    fn find(&self, path: &[OsString]) -> Result<(Reference, Attributes), NTSTATUS> {
        let mut reference = self.hold(NodeId::ROOT);
        let mut last = None;
        for (index, name) in path.iter().enumerate() {
            let is_last = index + 1 == path.len();
            let found = (self.library.lookup(reference.node, name))
                .map_err(|error| status::of_lookup(&error, is_last))?;
            // The directory before goes only now that what is in it has been found.
            reference = self.hold(found.node);
            last = Some(found);
        }
        let attributes = match last {
            Some(found) => Ok(found),
            None => self.library.attributes(NodeId::ROOT),
        };
        let attributes = attributes.map_err(|error| status::of_library(&error))?;
        Ok((reference, attributes))
    }

    /// The path as the host spells it, if all of it is still there.
    fn spelled(&self, path: &[OsString]) -> Option<Vec<u16>> {
        let mut spelled = Vec::new();
        let mut reference = self.hold(NodeId::ROOT);
        for name in path {
            let directory = self.library.directory(reference.node).ok()?;
            let mut same = None;
            let read = directory.read(&mut |entry| match names::same(name, &entry.name) {
                true => {
                    same = Some(entry.name);
                    ControlFlow::Break(())
                }
                false => ControlFlow::Continue(()),
            });
            let name = read.ok().and(same)?;
            spelled.push(names::SEPARATOR);
            spelled.extend(name.encode_wide());
            let found = self.library.lookup_in(&directory, &name).ok()?;
            reference = self.hold(found.node);
        }
        Some(spelled)
    }

    /// Opens a disk for its content, for whoever has asked the driver for it.
    fn open_content(&self, node: NodeId, write: bool, user: &User) -> Result<u64, LibraryError> {
        let handle = self.library.open_disk_for(node, write, user)?;
        let number = self.files.insert(OpenFile::new(handle));
        number.ok_or(LibraryError::Closed)
    }
}
