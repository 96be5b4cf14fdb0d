//! Which images of a directory tree are the parents of which.

use std::collections::{HashMap, VecDeque};
use std::ffi::OsStr;
use std::hash::Hash;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::HostParents;
use crate::disk::Disk;
use crate::format::parent::{Identity, ParentLink};
use crate::image;
use crate::storage::host::pin::{Kind, Pin};
use crate::storage::host::{FileKey, HostOptions, Scope, paths};

/// Extensions of disk files, in lower case.
const EXTENSIONS: [&str; 4] = ["vhd", "avhd", "vhdx", "avhdx"];

/// How many names [`children_below`] looks at before it gives up.
const MAX_ENTRIES: usize = 200_000;

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
}

impl<K> Default for Family<K> {
    fn default() -> Self {
        Self {
            children: HashMap::new(),
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
    /// There was more to look at than is sensible: there may be others.
    pub cut_off: bool,
}

/// The children of `disk` among the disk files below `directory`. Symbolic links are not followed
/// and other file systems not entered; what cannot be read is passed over.
pub fn children_below(directory: &Path, disk: &Disk) -> Children {
    let mut children = Children::default();
    let of_disk = Pin::file(disk.path()).and_then(|file| Ok(file.stat()?.key));
    let (Ok(directory), Ok(of_disk)) = (paths::canonical(directory), of_disk) else {
        return children;
    };
    let mut scope = Scope::new();
    if scope.add(&directory).is_err() {
        return children;
    }
    let identity = disk.identity();
    let mut kin: Vec<Kin<FileKey, Arc<ParentLink>>> = Vec::new();
    let mut left = MAX_ENTRIES;
    // The nearest first: that is where children mostly are.
    let mut directories = VecDeque::from([directory]);
    while let Some(path) = directories.pop_front() {
        let Ok(directory) = Pin::directory(&path) else {
            continue;
        };
        for (name, kind) in directory.names().unwrap_or_default() {
            if left == 0 {
                children.cut_off = true;
                break;
            }
            left -= 1;
            // Most need no more than that look.
            let is_disk = kind == Kind::File && is_disk_name(&name);
            if !is_disk && kind != Kind::Directory {
                continue;
            }
            let Ok(found) = directory.stat_child(&name) else {
                continue;
            };
            let path = path.join(&name);
            if found.kind == Kind::Directory && found.key.device == of_disk.device {
                directories.push_back(path);
            } else if found.kind == Kind::File {
                kin.extend(look(&directory, &name, path, identity));
            }
        }
    }
    let family = Family::of(&kin, &HostParents::within(scope));
    children.files = family.children(&of_disk).to_vec();
    children
}

/// The image at `path`, which is `name` in `directory`, if it is of the family of `identity`.
fn look(
    directory: &Pin,
    name: &OsStr,
    path: PathBuf,
    identity: Identity,
) -> Option<Kin<FileKey, Arc<ParentLink>>> {
    let options = HostOptions {
        read_only: true,
        lock: false,
        no_follow: false,
    };
    let pinned = directory.child(name).ok()?;
    let file = pinned.open(&options).ok()?;
    let found = image::identify(&file, &path).ok()?;
    let is_child = |link: &ParentLink| link.identities.contains(&identity);
    let is_kin = found.identity == identity || found.parent.as_ref().is_some_and(is_child);
    is_kin.then_some(Kin {
        key: file.key().ok()?,
        path,
        identity: found.identity,
        link: found.parent.map(Arc::new),
    })
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

    fn names(directory: &Path, file: &str) -> Vec<String> {
        let options = OpenOptions {
            read_only: true,
            ..OpenOptions::default()
        };
        let disk = Disk::open(&directory.join(file), &options).unwrap();
        let children = children_below(directory, &disk);
        assert!(!children.cut_off);
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
}
