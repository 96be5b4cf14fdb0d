//! Which images of a directory tree are the parents of which.

use std::collections::{HashMap, VecDeque};
use std::ffi::OsStr;
use std::hash::Hash;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::HostParents;
use crate::disk::Disk;
use crate::error::{OpenError, OpenProblem};
use crate::format::parent::{Identity, ParentLink};
use crate::image;
use crate::storage::host::pin::{Kind, Pin};
use crate::storage::host::{FileKey, HostOptions, Scope, paths};

/// Extensions of disk files, in lower case.
const EXTENSIONS: [&str; 4] = ["vhd", "avhd", "vhdx", "avhdx"];

/// How many names [`children_below`] looks at before it gives up.
const MAX_ENTRIES: usize = 200_000;

/// Directories that systems keep to themselves, often closed to others: nobody has disks in use there.
const RESERVED: [&str; 3] = ["lost+found", "System Volume Information", "$RECYCLE.BIN"];
const RESERVED_PREFIXES: [&str; 2] = [".Trash-", "systemd-private-"];

/// Whether a disk file or directory that could not be looked into, at this path below the one that is
/// searched, may be, or hold, somebody's child: not if it has just gone.
pub(crate) fn may_be_kin(path: &Path, error: &io::Error) -> bool {
    let is_reserved = |name: &OsStr| {
        let starts = |prefix: &&str| name.as_encoded_bytes().starts_with(prefix.as_bytes());
        (RESERVED.iter()).any(|reserved| name.eq_ignore_ascii_case(reserved))
            || RESERVED_PREFIXES.iter().any(starts)
    };
    let is_gone = matches!(
        error.kind(),
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
    );
    !is_gone && !path.iter().any(is_reserved)
}

/// Whether something that is neither file nor directory may be a disk: on Windows a file may only look so,
/// which is kept elsewhere or by a driver that nobody knows.
pub(crate) fn may_be_file(kind: Kind) -> bool {
    cfg!(windows) && matches!(kind, Kind::Other(_))
}

/// Whether a file of this name is taken for a disk: by its extension, in any case. Its content
/// decides only whether it can be opened.
pub(crate) fn is_disk_name(file_name: &OsStr) -> bool {
    // `extension` is `None` for a name such as `.vhd`, which is all stem.
    let extension = Path::new(file_name).extension();
    extension.is_some_and(|found| {
        EXTENSIONS
            .iter()
            .any(|known| found.eq_ignore_ascii_case(known))
    })
}

/// An image of the tree. `K` tells one file from another.
#[derive(Clone, Debug)]
pub(crate) struct Kin<K, L> {
    /// Which file.
    pub(crate) key: K,
    /// Where it is, as the source of parents knows it.
    pub(crate) path: PathBuf,
    /// Which disk it is.
    pub(crate) identity: Identity,
    /// What it says of its parent, if it has one.
    pub(crate) link: Option<L>,
}

/// Who is whose child.
#[derive(Clone, Debug)]
pub(crate) struct Family<K> {
    children: HashMap<K, Vec<PathBuf>>,
    /// Disk files and directories that could not be looked into: there may be more children.
    pub(crate) unread: Vec<PathBuf>,
}

impl<K> Default for Family<K> {
    fn default() -> Self {
        Self {
            children: HashMap::new(),
            unread: Vec::new(),
        }
    }
}

impl<K: Copy + Eq + Hash> Family<K> {
    /// Sorts `kin` out. A file is the parent of a child if it has the identity that the child
    /// names; of several, copies of each other, the one counts that the child's paths lead to, in
    /// `parents`. Where they lead to none of them all count: better one disk too many that is not
    /// written than a child that is garbled.
    pub(crate) fn of<L: AsRef<ParentLink>>(kin: &[Kin<K, L>], parents: &HostParents) -> Self {
        let tree = Tree::of(kin, parents);
        let mut family = Self::default();
        for child in kin {
            let Some(link) = &child.link else { continue };
            for parent in tree.parents_of(child, link.as_ref()) {
                let known = family.children.entry(parent).or_default();
                known.push(child.path.clone());
            }
        }
        for children in family.children.values_mut() {
            children.sort_unstable();
            children.dedup();
        }
        family
    }

    /// The children of a file, sorted.
    pub(crate) fn children(&self, of: &K) -> &[PathBuf] {
        self.children.get(of).map_or(&[], Vec::as_slice)
    }

    /// Whether it has any.
    pub(crate) fn is_parent(&self, key: &K) -> bool {
        self.children.contains_key(key)
    }
}

/// The images that may be parents.
struct Tree<'a, K, L> {
    parents: &'a HostParents,
    by_identity: HashMap<Identity, Vec<&'a Kin<K, L>>>,
    /// Those that share their identity with others.
    by_path: HashMap<PathBuf, &'a Kin<K, L>>,
}

impl<'a, K: Copy + Eq + Hash, L: AsRef<ParentLink>> Tree<'a, K, L> {
    fn of(kin: &'a [Kin<K, L>], parents: &'a HostParents) -> Self {
        let links = kin.iter().filter_map(|kin| kin.link.as_ref());
        let mut by_identity: HashMap<Identity, Vec<&Kin<K, L>>> = (links)
            .flat_map(|link| &link.as_ref().identities)
            .map(|wanted| (*wanted, Vec::new()))
            .collect();
        for kin in kin {
            if let Some(same) = by_identity.get_mut(&kin.identity) {
                same.push(kin);
            }
        }
        let several = by_identity.values().filter(|same| same.len() > 1).flatten();
        let by_path = several.map(|kin| (parents.real(&kin.path), *kin)).collect();
        Self {
            parents,
            by_identity,
            by_path,
        }
    }

    fn parents_of(&self, child: &Kin<K, L>, link: &ParentLink) -> Vec<K> {
        let able = || {
            let same = link
                .identities
                .iter()
                .filter_map(|id| self.by_identity.get(id));
            let others = same.flatten().filter(|kin| kin.key != child.key);
            others.map(|kin| kin.key)
        };
        if able().nth(1).is_none() {
            return able().collect();
        }
        match self.lead_to(child, link) {
            Some(found) => vec![found],
            None => able().collect(),
        }
    }

    /// The file that a child's paths lead to.
    fn lead_to(&self, child: &Kin<K, L>, link: &ParentLink) -> Option<K> {
        let fits =
            |kin: &&&Kin<K, L>| link.identities.contains(&kin.identity) && kin.key != child.key;
        // By the words alone: asking the host for each of many children takes its time.
        let mut named =
            (link.paths.iter()).filter_map(|path| self.parents.named(&child.path, &path.text));
        let found = named.find_map(|path| self.by_path.get(&path).filter(fits));
        let found = match found {
            Some(found) => Some(found),
            None => {
                let path = self.parents.locate(&child.path, link).ok()?;
                self.by_path.get(&path).filter(fits)
            }
        };
        found.map(|kin| kin.key)
    }
}

/// Children of a disk that were looked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Children {
    /// Their files, sorted.
    pub files: Vec<PathBuf>,
    /// Disk files and directories that could not be looked into, sorted: there may be others among them.
    pub unread: Vec<PathBuf>,
    /// There was more to look at than is sensible: there may be others.
    pub cut_off: bool,
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
            ([], []) => None,
        }
    }
}

/// The children of `disk` among the disk files below `directory`. Symbolic links are not followed
/// and other file systems not entered.
pub fn children_below(directory: &Path, disk: &Disk) -> Children {
    let mut search = match Search::new(directory, disk) {
        Ok(search) => search,
        Err(_) => {
            return Children {
                unread: vec![directory.to_owned()],
                ..Children::default()
            };
        }
    };
    // The nearest first: that is where children mostly are.
    while let Some(path) = search.directories.pop_front() {
        if let Err(error) = search.directory(&path) {
            search.failed(&error, path);
        }
    }
    let family = Family::of(&search.kin, &HostParents::within(search.scope));
    let mut children = search.children;
    children.files = family.children(&search.of).to_vec();
    children.unread.sort_unstable();
    children
}

/// A search for the children of a disk.
struct Search {
    of: FileKey,
    identity: Identity,
    scope: Scope,
    top: PathBuf,
    directories: VecDeque<PathBuf>,
    /// Names that may still be looked at.
    left: usize,
    kin: Vec<Kin<FileKey, Arc<ParentLink>>>,
    children: Children,
}

impl Search {
    fn new(directory: &Path, disk: &Disk) -> io::Result<Self> {
        let directory = paths::canonical(directory)?;
        let mut scope = Scope::new();
        scope.add(&directory)?;
        Ok(Self {
            of: Pin::file(disk.path())?.stat()?.key,
            identity: disk.identity(),
            scope,
            directories: VecDeque::from([directory.clone()]),
            top: directory,
            left: MAX_ENTRIES,
            kin: Vec::new(),
            children: Children::default(),
        })
    }

    fn failed(&mut self, error: &io::Error, path: PathBuf) {
        if may_be_kin(path.strip_prefix(&self.top).unwrap_or(&path), error) {
            self.children.unread.push(path);
        }
    }

    fn directory(&mut self, path: &Path) -> io::Result<()> {
        let directory = Pin::directory(path)?;
        for (name, kind) in directory.names()? {
            if self.left == 0 {
                self.children.cut_off = true;
                break;
            }
            self.left -= 1;
            // Most need no more than that look.
            let is_disk = (kind == Kind::File || may_be_file(kind)) && is_disk_name(&name);
            if !is_disk && kind != Kind::Directory {
                continue;
            }
            let path = path.join(&name);
            let found = match directory.stat_child(&name) {
                Ok(found) => found,
                // Another file system that is another user's: all else tells who may list its directory.
                Err(_) if cfg!(unix) && kind == Kind::Directory => continue,
                Err(error) => {
                    self.failed(&error, path);
                    continue;
                }
            };
            if found.kind == Kind::Directory && found.key.device == self.of.device {
                self.directories.push_back(path);
            } else if may_be_file(found.kind) {
                self.children.unread.push(path);
            } else if found.kind == Kind::File {
                match look(&directory, &name, &path, self.identity) {
                    Ok(kin) => self.kin.extend(kin),
                    Err(error) => self.failed(&error, path),
                }
            }
        }
        Ok(())
    }
}

/// The image at `path`, which is `name` in `directory`, if it is one of the family of `identity`.
///
/// # Errors
/// Where the host does not let us see what it is.
fn look(
    directory: &Pin,
    name: &OsStr,
    path: &Path,
    identity: Identity,
) -> io::Result<Option<Kin<FileKey, Arc<ParentLink>>>> {
    let options = HostOptions {
        read_only: true,
        lock: false,
        no_follow: false,
    };
    let pinned = directory.child(name)?;
    let file = pinned.open(&options).map_err(OpenError::into_host)?;
    let found = match image::identify(&file, path) {
        Ok(found) => found,
        Err(OpenProblem::Io { source, .. }) if source.kind() != io::ErrorKind::UnexpectedEof => {
            return Err(source);
        }
        // It can be opened by nobody, whatever it was once.
        Err(_) => return Ok(None),
    };
    let is_child = |link: &ParentLink| link.identities.contains(&identity);
    let is_kin = found.identity == identity || found.parent.as_ref().is_some_and(is_child);
    if !is_kin {
        return Ok(None);
    }
    Ok(Some(Kin {
        key: file.key()?,
        path: path.to_owned(),
        identity: found.identity,
        link: found.parent.map(Arc::new),
    }))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::disk::OpenOptions;
    use crate::disk::parents::builder::{make_child, make_disk};

    #[test]
    fn disks_go_by_their_extension() {
        for name in [
            "web.vhd",
            "WEB.VHD",
            "a.b.avhd",
            "Snap.AvHd",
            "a b.vhdx",
            "x.AVHDX",
        ] {
            assert!(is_disk_name(OsStr::new(name)), "{name}");
        }
        for name in [
            ".vhd",
            "vhd",
            "web.vhd.raw",
            "web.vhd~",
            "web.vhd.",
            "web.vhds",
            "",
        ] {
            assert!(!is_disk_name(OsStr::new(name)), "{name}");
        }
    }

    #[test]
    fn what_cannot_be_read_may_be_a_child() {
        let denied = io::Error::from(io::ErrorKind::PermissionDenied);
        let gone = io::Error::from(io::ErrorKind::NotFound);
        let counts = |path: &str, error: &io::Error| may_be_kin(Path::new(path), error);
        assert!(counts("sub/a.vhd", &denied) && counts("", &denied));
        assert!(!counts("sub/a.vhd", &gone));
        for path in [
            "lost+found",
            "$Recycle.Bin/S-1-5",
            ".Trash-1000",
            "system volume information/a.vhd",
        ] {
            assert!(!counts(path, &denied), "{path}");
        }
    }

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
        make_child(&at("two.vhd"), &at("base.vhd"), r".\BASE.vhd");
        // Nowhere, but there is only one that it can be.
        make_child(&at("lost.vhd"), &at("base.vhd"), r"..\gone.vhd");
        make_child(&at("third.vhd"), &at("two.vhd"), "two.vhd");
        #[cfg(unix)]
        std::os::unix::fs::symlink("one.vhd", at("sub/link.vhd")).unwrap();
        fs::hard_link(at("two.vhd"), at("twin.vhd")).unwrap();
        fs::write(at("junk.vhd"), [1; 5000]).unwrap();
        let of_base = ["lost.vhd", "sub/one.vhd", "twin.vhd", "two.vhd"];
        assert_eq!(names(folder.path(), "base.vhd"), of_base);
        assert_eq!(names(folder.path(), "two.vhd"), ["third.vhd"]);
        assert_eq!(names(folder.path(), "twin.vhd"), ["third.vhd"]);
        assert!(names(folder.path(), "other.vhd").is_empty());

        fs::copy(at("base.vhd"), at("sub/copy.vhd")).unwrap();
        assert_eq!(names(folder.path(), "base.vhd"), of_base);
        assert_eq!(names(folder.path(), "sub/copy.vhd"), ["lost.vhd"]);
        make_child(&at("sub/new.vhd"), &at("sub/copy.vhd"), "copy.vhd");
        assert_eq!(
            names(folder.path(), "sub/copy.vhd"),
            ["lost.vhd", "sub/new.vhd"]
        );
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
