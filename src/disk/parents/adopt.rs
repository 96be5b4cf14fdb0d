//! How a child is to name its parent.

use std::io;
#[cfg(not(windows))]
use std::path::Component;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use super::MAX_CHAIN_LEN;
use crate::disk::Disk;
use crate::error::CreateError;
use crate::format::parent::{Identity, NewParent};
use crate::storage::host::paths;

impl Disk {
    /// What a new child at `child` says of this disk: its identity, and the ways to its file as
    /// Windows writes them, from the child's directory and from the root. As long as this disk is
    /// open with a lock, it stays what the child was made over.
    ///
    /// # Errors
    /// Where the disk cannot have a child there, [`CreateError::ParentIdentity`] among it, or a path cannot
    /// be written into an image.
    pub fn as_parent_of(&self, child: &Path) -> Result<NewParent, CreateError> {
        let invalid = |reason: String| CreateError::Invalid {
            path: child.to_owned(),
            reason,
        };
        if self.chain_len() >= MAX_CHAIN_LEN {
            return Err(invalid(format!(
                "its parent would be the last of {MAX_CHAIN_LEN} images, which is as many as a \
                 disk may consist of"
            )));
        }
        self.check_identity()?;
        let place =
            Place::of(self.path(), child).map_err(|(action, source)| match source.kind() {
                io::ErrorKind::InvalidInput => invalid(source.to_string()),
                _ => CreateError::Io {
                    path: child.to_owned(),
                    action,
                    source,
                },
            })?;
        let sector_size = self.geometry().sector_size;
        Ok(place.parent(self.identity(), self.len(), sector_size))
    }

    /// That no other disk could be taken for it: none at all, and none of its own parents.
    fn check_identity(&self) -> Result<(), CreateError> {
        let identity = self.identity();
        let mut ancestors = std::iter::successors(self.parent(), |disk| disk.parent());
        let found = if identity.is_nil() {
            "its identity is nil, which is none".to_owned()
        } else if let Some(same) = ancestors.find(|disk| disk.identity() == identity) {
            let same = same.path().display();
            format!("it has the same identity as {same}, which it is over: {identity}")
        } else {
            return Ok(());
        };
        Err(CreateError::ParentIdentity {
            path: self.path().to_owned(),
            found,
        })
    }
}

/// Where a parent is, as its child is to say.
#[derive(Debug)]
pub(super) struct Place {
    mtime: SystemTime,
    /// The way from the child's directory; empty for none.
    pub(super) relative: String,
    /// The way from the root.
    pub(super) absolute: String,
}

impl Place {
    /// Of the file `parent`, for a child at `child`.
    ///
    /// # Errors
    /// What was tried and failed; [`io::ErrorKind::InvalidInput`] for a path that cannot be written into an
    /// image.
    pub(super) fn of(parent: &Path, child: &Path) -> Result<Self, (&'static str, io::Error)> {
        let failed = |action| move |source| (action, source);
        let parent = paths::canonical(parent).map_err(failed("find its parent"))?;
        let directory = match child.parent() {
            Some(directory) if !directory.as_os_str().is_empty() => directory,
            _ => Path::new("."),
        };
        let directory = paths::canonical(directory).map_err(failed("find its directory"))?;
        let metadata = std::fs::metadata(&parent).and_then(|found| found.modified());
        let text = |path: &Path| {
            windows_path(path).ok_or_else(|| {
                let path = path.display();
                let text = format!(
                    "the path {path} cannot be written into an image: it has a backslash, or is no Unicode"
                );
                let source = io::Error::new(io::ErrorKind::InvalidInput, text);
                ("write where its parent is", source)
            })
        };
        Ok(Self {
            mtime: metadata.map_err(failed("look at its parent"))?,
            relative: way(&directory, &parent).map_or(Ok(String::new()), |way| text(&way))?,
            absolute: text(&parent)?,
        })
    }

    /// The parent that is there.
    pub(super) fn parent(self, identity: Identity, disk_len: u64, sector_size: u64) -> NewParent {
        NewParent {
            identity,
            disk_len,
            sector_size,
            mtime: self.mtime,
            relative: self.relative,
            absolute: self.absolute,
        }
    }
}

/// The way from a directory to a file; both are absolute and without symbolic links. `None` from one
/// drive to another.
fn way(from: &Path, to: &Path) -> Option<PathBuf> {
    let mut steps = from.ancestors().enumerate();
    let (up, rest) = steps.find_map(|(up, shared)| Some((up, paths::below(shared, to)?)))?;
    let mut way: PathBuf = match up {
        0 => Path::new(".").to_owned(),
        up => std::iter::repeat_n("..", up).collect(),
    };
    way.push(rest);
    Some(way)
}

/// A path as Windows writes it.
#[cfg(windows)]
fn windows_path(path: &Path) -> Option<String> {
    path.to_str().map(str::to_owned)
}

/// A path with backslashes; `None` where it would mean another one.
#[cfg(not(windows))]
fn windows_path(path: &Path) -> Option<String> {
    let mut text = String::new();
    for (n, component) in path.components().enumerate() {
        let name = match component {
            Component::RootDir | Component::Prefix(_) => "",
            Component::CurDir => ".",
            Component::ParentDir => "..",
            Component::Normal(name) => name.to_str().filter(|name| !name.contains('\\'))?,
        };
        if n > 0 {
            text.push('\\');
        }
        text.push_str(name);
    }
    Some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(windows)]
    #[test]
    fn ways_are_those_of_windows() {
        for (from, to, relative) in [
            (r"C:\VMs", r"C:\VMs\base.vhd", Some(r".\base.vhd")),
            (r"C:\VMs\a", r"C:\base.vhd", Some(r"..\..\base.vhd")),
            (r"C:\VMs", r"\\?\c:\vms\b\base.vhd", Some(r".\b\base.vhd")),
            (r"\\nas\vms\a", r"\\nas\vms\base.vhd", Some(r"..\base.vhd")),
            (r"C:\VMs", r"D:\VMs\base.vhd", None),
        ] {
            let found = way(Path::new(from), Path::new(to)).and_then(|way| windows_path(&way));
            assert_eq!(found.as_deref(), relative, "{from} {to}");
        }
    }

    #[cfg(not(windows))]
    #[test]
    fn ways_are_written_as_windows_does() {
        for (from, to, relative) in [
            ("/srv/vms", "/srv/vms/base.vhd", r".\base.vhd"),
            ("/srv/vms", "/srv/vms/a/b c/base.vhd", r".\a\b c\base.vhd"),
            ("/srv/vms/a", "/srv/base.vhd", r"..\..\base.vhd"),
            ("/srv/vms", "/srv/bases/base.vhd", r"..\bases\base.vhd"),
            ("/a", "/b/base.vhd", r"..\b\base.vhd"),
            ("/", "/base.vhd", r".\base.vhd"),
        ] {
            let found = way(Path::new(from), Path::new(to)).and_then(|way| windows_path(&way));
            assert_eq!(found.as_deref(), Some(relative), "{from} {to}");
        }
        let absolute = windows_path(Path::new("/srv/a/base.vhd"));
        assert_eq!(absolute.as_deref(), Some(r"\srv\a\base.vhd"));
        assert_eq!(windows_path(Path::new(r"/srv/a\b.vhd")), None);
    }
}
