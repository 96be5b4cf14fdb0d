//! Which images are the parents of which: an index over what is known of them. Nothing is looked at on disk.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::format::parent::{self, ParentLink};
use crate::storage::host::pin::Identity;

/// Which disk a file holds, and what it says of its parent, if it has one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Lineage {
    pub(crate) identity: parent::Identity,
    pub(crate) link: Option<Arc<ParentLink>>,
}

/// An image that was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Kin {
    /// Which file.
    pub(crate) key: Identity,
    /// Where it is, as [`Words`] knows it.
    pub(crate) path: PathBuf,
    pub(crate) lineage: Lineage,
}

/// What the words of a path in an image mean.
pub(crate) trait Words {
    /// Where the image that is called `name` is, absolute and without symbolic links.
    fn real(&self, name: &Path) -> PathBuf;

    /// Where the paths of the image `child` lead first, by the words alone, in the form of [`Self::real`].
    /// `None` where that is nowhere, or no place where a parent is taken from.
    fn lead(&self, child: &Path, link: &ParentLink) -> Option<PathBuf>;
}

/// Who is whose child.
#[derive(Clone, Debug, Default)]
pub(crate) struct Family {
    /// Children whose paths tell which of several copies is their parent, by that file.
    told: HashMap<Identity, Vec<PathBuf>>,
    /// All others, by the disk that they are over. One list for all of its copies.
    over: HashMap<parent::Identity, Vec<(Identity, PathBuf)>>,
    /// Which disk a file is, if there are children over it.
    wanted: HashMap<Identity, parent::Identity>,
    /// Disk files and directories that could not be looked into, sorted: there may be more children.
    pub(crate) unread: Vec<PathBuf>,
}

impl Family {
    /// Sorts `kin` out. A file is the parent of a child if it has the identity that the child
    /// names; of several, copies of each other, the one counts that the child's first path leads to by
    /// its words. Where that is none of them all count: better one disk too many that is not
    /// written than a child that is garbled.
    pub(crate) fn of(kin: &[Kin], words: &dyn Words) -> Self {
        let links = kin.iter().filter_map(|kin| kin.lineage.link.as_ref());
        let mut same: HashMap<parent::Identity, Vec<&Kin>> = (links)
            .flat_map(|link| &link.identities)
            .map(|wanted| (*wanted, Vec::new()))
            .collect();
        for kin in kin {
            if let Some(same) = same.get_mut(&kin.lineage.identity) {
                same.push(kin);
            }
        }
        // Words are asked only where there is something to tell apart.
        let copies = same.values().filter(|same| same.len() > 1).flatten();
        let by_path: HashMap<PathBuf, &Kin> = copies
            .map(|kin| (compared(words.real(&kin.path)), *kin))
            .collect();
        let mut family = Self::default();
        for child in kin {
            let Some(link) = &child.lineage.link else {
                continue;
            };
            let able = |identity| same.get(identity).is_some_and(|same| same.len() > 1);
            let told = (link.identities.iter().any(able))
                .then(|| words.lead(&child.path, link))
                .flatten()
                .and_then(|place| by_path.get(&compared(place)))
                .filter(|parent| link.identities.contains(&parent.lineage.identity))
                .filter(|parent| parent.key != child.key);
            match told {
                Some(parent) => {
                    let children = family.told.entry(parent.key).or_default();
                    children.push(child.path.clone());
                }
                None => {
                    for identity in &link.identities {
                        let children = family.over.entry(*identity).or_default();
                        children.push((child.key, child.path.clone()));
                    }
                }
            }
        }
        for (identity, files) in same {
            if family.over.contains_key(&identity) {
                let wanted = files.iter().map(|kin| (kin.key, identity));
                family.wanted.extend(wanted);
            }
        }
        family
    }

    /// The children of a file, sorted.
    pub(crate) fn children(&self, of: &Identity) -> Vec<PathBuf> {
        let told = self.told.get(of).into_iter().flatten();
        let mut children: Vec<PathBuf> = told.chain(self.others(of)).cloned().collect();
        children.sort_unstable();
        children.dedup();
        children
    }

    /// Whether it has any.
    pub(crate) fn is_parent(&self, key: &Identity) -> bool {
        self.told.contains_key(key) || self.others(key).next().is_some()
    }

    /// Those that may be over it or over a copy of it. A file is no child of its own.
    fn others(&self, of: &Identity) -> impl Iterator<Item = &PathBuf> {
        let over = self.wanted.get(of).and_then(|disk| self.over.get(disk));
        let others = over.into_iter().flatten();
        others
            .filter(move |(key, _)| key != of)
            .map(|(_, path)| path)
    }
}

/// A path as it is compared: on Windows case tells no names apart.
fn compared(path: PathBuf) -> PathBuf {
    match path.to_str() {
        Some(text) if cfg!(windows) => text.to_lowercase().into(),
        _ => path,
    }
}
