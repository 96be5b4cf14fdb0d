//! The children of one disk.

use std::collections::HashSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use super::HostParents;
use crate::disk::Disk;
use crate::lineage::{Family, Kin, Limits, Tree, Waiting, shown};
use crate::storage::host::pin::{Identity, Pin, Stat};
use crate::storage::host::{Scope, paths};
use crate::units::u64_from;

/// What [`children_below`] looks at before it gives up: it is one of several things that a user waits for.
const LIMITS: Limits = Limits {
    entries: 200_000,
    patience: Duration::from_secs(20),
    links: true,
};

/// Children of a disk that were looked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Children {
    /// Their files, sorted.
    pub files: Vec<PathBuf>,
    /// Disk files and directories that could not be looked into, sorted: there may be others among them.
    pub unread: Vec<PathBuf>,
    /// There was more to look at than is sensible: there may be others.
    pub cut_off: bool,
    /// The disk's file has that many other names (hard links) in places that were not searched, beside which
    /// there may be others.
    pub names_elsewhere: u64,
}

impl Children {
    /// Why something may rely on all that the disk holds, on what its file systems call free as well;
    /// `None` where there is nothing that does.
    pub fn reliance(&self) -> Option<String> {
        match (&self.files[..], &self.unread[..]) {
            ([_, ..], _) => Some("other disks are over this one".to_owned()),
            ([], [first, ..]) => {
                let first = first.display();
                Some(format!(
                    "{first} cannot be read, where a disk over this one may be"
                ))
            }
            ([], []) if self.cut_off => {
                Some("there is too much beside this disk to look for disks over it".to_owned())
            }
            ([], []) if self.names_elsewhere > 0 => Some(format!(
                "its file has {} more name(s) (hard links) elsewhere, beside which a disk over this one may be",
                self.names_elsewhere
            )),
            ([], []) => None,
        }
    }

    fn add(&mut self, mut others: Self) {
        self.files.append(&mut others.files);
        self.unread.append(&mut others.unread);
        for paths in [&mut self.files, &mut self.unread] {
            paths.sort_unstable();
            paths.dedup();
        }
        self.cut_off |= others.cut_off;
    }
}

/// The children of `disk` among the disk files below `directory` and below the directory that its file is
/// really in, which is another one where a symbolic link led to it: on all file systems, but for those that need
/// a vhdfs mount to answer. Links to disk files count, and links in these directories to others.
pub fn children_below(directory: &Path, disk: &Disk) -> Children {
    let mut found = Children::default();
    let mut names = HashSet::new();
    let mut search = || -> io::Result<(Stat, Vec<PathBuf>)> {
        let file = Pin::file(disk.path())?.stat()?;
        let mut directories = vec![paths::canonical(directory)?];
        let real = paths::canonical(disk.path())?;
        let own = real.parent().unwrap_or(&real).to_owned();
        names.insert(real);
        // What lies in the other is searched with it.
        if paths::below(&directories[0], &own).is_none() {
            directories.retain(|given| paths::below(&own, given).is_none());
            directories.push(own);
        }
        Ok((file, directories))
    };
    let (file, directories) = match search() {
        Ok(found) => found,
        Err(_) => {
            found.unread.push(directory.to_owned());
            return found;
        }
    };
    for directory in directories {
        match children_in(&directory, &file.identity(), &mut names) {
            Ok(others) => found.add(others),
            Err(_) => found.unread.push(directory),
        }
    }
    found.names_elsewhere = names_of(&file).saturating_sub(u64_from(names.len()));
    found
}

#[cfg(unix)]
fn names_of(file: &Stat) -> u64 {
    file.links.into()
}

/// It is not told.
#[cfg(not(unix))]
fn names_of(_: &Stat) -> u64 {
    0
}

/// The children of the file `of` below `top`, real and absolute; the names that it has itself go to `names`.
fn children_in(top: &Path, of: &Identity, names: &mut HashSet<PathBuf>) -> io::Result<Children> {
    let mut scope = Scope::new();
    scope.add(top)?;
    let tree = Tree::new(Pin::directory(top)?, LIMITS, Arc::new(Waiting));
    let survey = tree.survey()?.unwrap_or_default();
    let absolute = |kin: Kin| Kin {
        path: shown(top, &kin.path),
        ..kin
    };
    let kin: Vec<Kin> = survey.kin().map(absolute).collect();
    let own = kin.iter().filter(|kin| kin.key == *of);
    names.extend(own.map(|kin| kin.path.clone()));
    Ok(Children {
        files: Family::of(&kin, &HostParents::within(scope)).children(of),
        unread: (survey.unread.iter())
            .map(|path| shown(top, path))
            .collect(),
        cut_off: survey.cut_off,
        names_elsewhere: 0,
    })
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::disk::OpenOptions;
    use crate::disk::parents::builder::{identity_of, make_child, make_child_of, make_disk};

    fn names(directory: &Path, file: &str) -> Vec<String> {
        let options = OpenOptions {
            read_only: true,
            ..OpenOptions::default()
        };
        let disk = Disk::open(&directory.join(file), &options).unwrap();
        let children = children_below(directory, &disk);
        assert!(!children.cut_off && children.unread.is_empty());
        assert_eq!(children.reliance().is_some(), !children.files.is_empty());
        let top = paths::canonical(directory).unwrap();
        let shown = |path: &PathBuf| {
            let name = path.strip_prefix(&top).unwrap().display().to_string();
            name.replace('\\', "/")
        };
        children.files.iter().map(shown).collect()
    }

    #[test]
    fn children_are_found_by_identity_and_copies_told_apart_by_path() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        fs::create_dir(at("sub")).unwrap();
        make_disk(&at("base.vhd"));
        make_disk(&at("other.vhd"));
        make_child(&at("sub/one.vhd"), &at("base.vhd"), r"..\base.vhd");
        make_child(&at("two.vhd"), &at("base.vhd"), r".\base.vhd");
        // Nowhere, but there is only one that it can be.
        make_child(&at("lost.vhd"), &at("base.vhd"), r"..\gone.vhd");
        make_child(&at("third.vhd"), &at("two.vhd"), "two.vhd");
        #[cfg(unix)]
        std::os::unix::fs::symlink("one.vhd", at("sub/link.vhd")).unwrap();
        fs::hard_link(at("two.vhd"), at("twin.vhd")).unwrap();
        fs::write(at("junk.vhd"), [1; 5000]).unwrap();
        make_child(&at("loud.vhd"), &at("base.vhd"), r".\BASE.vhd");
        let of_base = ["lost.vhd", "loud.vhd", "sub/one.vhd", "twin.vhd", "two.vhd"];
        assert_eq!(names(folder.path(), "base.vhd"), of_base);
        assert_eq!(names(folder.path(), "two.vhd"), ["third.vhd"]);
        assert_eq!(names(folder.path(), "twin.vhd"), ["third.vhd"]);
        assert!(names(folder.path(), "other.vhd").is_empty());

        fs::copy(at("base.vhd"), at("sub/copy.vhd")).unwrap();
        assert_eq!(names(folder.path(), "base.vhd"), of_base);
        // Where the words do not tell, each copy may be the one. On Windows case makes no difference.
        let untold = ["lost.vhd", "loud.vhd"];
        let untold = if cfg!(windows) { &untold[..1] } else { &untold };
        assert_eq!(names(folder.path(), "sub/copy.vhd"), untold);
        make_child(&at("sub/new.vhd"), &at("sub/copy.vhd"), "copy.vhd");
        let with_new = [untold, &["sub/new.vhd"]].concat();
        assert_eq!(names(folder.path(), "sub/copy.vhd"), with_new);
        // It leads out of what is searched, where somebody else may find a third copy first.
        let locators: [(&[u8; 4], &str); 2] = [(b"W2ru", r"..\gone.vhd"), (b"W2ru", r".\base.vhd")];
        make_child_of(&at("far.vhd"), identity_of(&at("base.vhd")), &locators);
        for base in ["base.vhd", "sub/copy.vhd"] {
            assert!(names(folder.path(), base).contains(&"far.vhd".to_owned()));
        }
    }

    #[cfg(unix)]
    #[test]
    fn children_are_found_where_the_file_really_is() {
        use std::os::unix::fs::symlink;
        let folder = tempfile::tempdir().unwrap();
        let top = paths::canonical(folder.path()).unwrap();
        let at = |name: &str| top.join(name);
        for name in ["disks", "links", "data"] {
            fs::create_dir(at(name)).unwrap();
        }
        make_disk(&at("disks/base.vhd"));
        let child = |name: &str| make_child(&at(name), &at("disks/base.vhd"), r".\base.vhd");
        child("disks/child.vhd");
        symlink("../disks/base.vhd", at("links/base.vhd")).unwrap();
        symlink("disks", at("linked")).unwrap();
        let found = |name: &str| {
            let options = OpenOptions {
                read_only: true,
                ..OpenOptions::default()
            };
            let disk = Disk::open(&at(name), &options).unwrap();
            children_below(at(name).parent().unwrap(), &disk)
        };
        for name in ["disks/base.vhd", "links/base.vhd", "linked/base.vhd"] {
            assert_eq!(found(name).files, [at("disks/child.vhd")], "{name}");
        }
        // Beside the link, through a link to a directory, and through one to a file further down.
        child("links/beside.vhd");
        child("data/far.vhd");
        child("data/file.vhd");
        symlink("../data", at("disks/more")).unwrap();
        fs::create_dir(at("disks/deep")).unwrap();
        symlink("../../data/file.vhd", at("disks/deep/file.vhd")).unwrap();
        let mut all: Vec<PathBuf> = [
            "child.vhd",
            "deep/file.vhd",
            "more/far.vhd",
            "more/file.vhd",
        ]
        .map(|name| at("disks").join(name))
        .into();
        assert_eq!(found("disks/base.vhd").files, all);
        all.push(at("links/beside.vhd"));
        assert_eq!(found("links/base.vhd").files, all);

        make_disk(&at("data/alone.vhd"));
        assert_eq!(found("data/alone.vhd").reliance(), None);
        fs::hard_link(at("data/alone.vhd"), at("links/alone.vhd")).unwrap();
        let alone = found("data/alone.vhd");
        assert_eq!((&alone.files[..], alone.names_elsewhere), (&[][..], 1));
        assert!(alone.reliance().unwrap().contains("hard links"));
        fs::hard_link(at("data/alone.vhd"), at("data/again.vhd")).unwrap();
        assert_eq!(found("data/alone.vhd").names_elsewhere, 1);
    }

    #[cfg(windows)]
    #[test]
    fn what_somebody_else_holds_may_be_a_child() {
        use std::os::windows::fs::OpenOptionsExt;
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        make_disk(&at("base.vhd"));
        make_child(&at("child.vhd"), &at("base.vhd"), "base.vhd");
        let alone = fs::File::options()
            .read(true)
            .share_mode(0)
            .open(at("child.vhd"));
        let disk = Disk::open(&at("base.vhd"), &OpenOptions::default()).unwrap();
        let found = children_below(folder.path(), &disk);
        assert!(
            found.files.is_empty() && found.unread.len() == 1,
            "{found:?}"
        );
        assert!(
            found
                .reliance()
                .unwrap()
                .contains("child.vhd cannot be read")
        );
        drop(alone);
        assert!(children_below(folder.path(), &disk).unread.is_empty());
    }
}
