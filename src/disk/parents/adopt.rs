//! How a new child is to name its parent.

#[cfg(not(windows))]
use std::path::Component;
use std::path::{Path, PathBuf};

use super::MAX_CHAIN_LEN;
use crate::disk::Disk;
use crate::error::CreateError;
use crate::format::parent::NewParent;
use crate::storage::host::paths;

impl Disk {
    /// What a new child at `child` says of this disk: its identity, and the ways to its file as
    /// Windows writes them, from the child's directory and from the root. As long as this disk is
    /// open with a lock, it stays what the child was made over.
    ///
    /// # Errors
    /// Where the disk cannot have a child there, or a path cannot be written into an image.
    pub fn as_parent_of(&self, child: &Path) -> Result<NewParent, CreateError> {
        let invalid = |reason: String| CreateError::Invalid {
            path: child.to_owned(),
            reason,
        };
        let io = |action| {
            move |source| CreateError::Io {
                path: child.to_owned(),
                action,
                source,
            }
        };
        if self.chain_len() >= MAX_CHAIN_LEN {
            return Err(invalid(format!(
                "its parent would be the last of {MAX_CHAIN_LEN} images, which is as many as a \
                 disk may consist of"
            )));
        }
        let parent = paths::canonical(self.path()).map_err(io("find its parent"))?;
        let directory = match child.parent() {
            Some(directory) if !directory.as_os_str().is_empty() => directory,
            _ => Path::new("."),
        };
        let directory = paths::canonical(directory).map_err(io("find its directory"))?;
        let metadata = std::fs::metadata(&parent).map_err(io("look at its parent"))?;
        let text = |path: &Path| {
            windows_path(path).ok_or_else(|| {
                invalid(format!(
                    "the path {} cannot be written into an image: it has a backslash, or is no \
                     Unicode",
                    path.display()
                ))
            })
        };
        Ok(NewParent {
            identity: self.identity(),
            disk_len: self.len(),
            sector_size: self.geometry().sector_size,
            mtime: metadata.modified().map_err(io("look at its parent"))?,
            relative: way(&directory, &parent).map_or(Ok(String::new()), |way| text(&way))?,
            absolute: text(&parent)?,
        })
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
