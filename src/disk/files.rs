//! The disk files of a directory.

use std::io;
use std::path::{Path, PathBuf};

use crate::lineage::{is_disk_name, may_be_file, may_be_kin};
use crate::storage::host::pin::{Kind, Pin};

/// What [`disk_files`] found.
#[derive(Debug, Default)]
pub struct DiskFiles {
    /// The files, sorted.
    pub files: Vec<PathBuf>,
    /// The directories that could not be read, sorted, with what the host answered.
    pub unread: Vec<(PathBuf, io::Error)>,
}

/// The files in `directory` that are taken for disks by their extension, in any case: `.vhd`, `.avhd`,
/// `.vhdx` and `.avhdx`; with `recursive` also those below it. Symbolic links are not followed, but for
/// `directory` itself. Nothing is opened.
pub fn disk_files(directory: &Path, recursive: bool) -> DiskFiles {
    let mut found = DiskFiles::default();
    let mut directories = vec![directory.to_owned()];
    while let Some(path) = directories.pop() {
        let entries = Pin::directory(&path).and_then(|directory| directory.names());
        let entries = match entries {
            Ok(entries) => entries,
            // Its own name is always told; what systems keep to themselves below it is not.
            Err(error) => {
                let below = path.strip_prefix(directory).unwrap_or(&path);
                if below.as_os_str().is_empty() || may_be_kin(below, &error) {
                    found.unread.push((path, error));
                }
                continue;
            }
        };
        for (name, kind) in entries {
            if kind == Kind::Directory {
                if recursive {
                    directories.push(path.join(name));
                }
            } else if (kind == Kind::File || may_be_file(kind)) && is_disk_name(&name) {
                found.files.push(path.join(name));
            }
        }
    }
    found.files.sort_unstable();
    found
        .unread
        .sort_unstable_by(|(one, _), (other, _)| one.cmp(other));
    found
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn disk_files_are_found_sorted() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        fs::create_dir_all(at("sub/deep.vhd")).unwrap();
        let names = [
            "b.VHD",
            "a.vhdx",
            "a.vhd.raw",
            "notes",
            "sub/c.avhd",
            "sub/deep.vhd/d.avhdx",
        ];
        for name in names {
            fs::write(at(name), "").unwrap();
        }
        #[cfg(unix)]
        {
            std::os::unix::fs::symlink("a.vhdx", at("link.vhd")).unwrap();
            std::os::unix::fs::symlink(".", at("loop")).unwrap();
        }
        let here = disk_files(folder.path(), false);
        assert!(here.unread.is_empty());
        assert_eq!(here.files, [at("a.vhdx"), at("b.VHD")]);
        let below = disk_files(folder.path(), true);
        let deep = at("sub").join("deep.vhd").join("d.avhdx");
        let expected = [at("a.vhdx"), at("b.VHD"), at("sub").join("c.avhd"), deep];
        assert_eq!(below.files, expected);
    }

    #[test]
    fn what_cannot_be_read_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let nowhere = folder.path().join("nowhere");
        let found = disk_files(&nowhere, true);
        assert!(found.files.is_empty());
        assert_eq!(found.unread.len(), 1);
        assert_eq!(found.unread[0].0, nowhere);
    }
}
