//! Finding and opening the parents of differencing disks.
//!
//! A child names its parent by an identity, and says where it may be. A [`ParentSource`] looks
//! there; [`HostParents`] is the one for files of the host. What is found counts only if it has the
//! identity, so that a path from a stranger's image never brings in anything but the disk that the
//! child was made over.
//!
//! Before anything of a child is written, all of its parents are there and fit.

mod adopt;
#[cfg(test)]
pub(crate) mod builder;
mod family;
mod hunt;
mod relink;
#[cfg(test)]
mod tests;

pub use family::{Children, children_below};
pub use relink::{Relinked, give_identity, relink};

use std::collections::HashMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, OnceLock, Weak};

use parking_lot::Mutex;

use super::{Disk, OpenOptions};
use crate::error::{OpenError, OpenProblem, ParentProblem};
use crate::format::parent::ParentLink;
use crate::image;
use crate::lineage::Words;
use crate::storage::Storage;
use crate::storage::host::{FileKey, HostFile, HostOptions, Scope, paths};
use hunt::Hunt;

/// The most images that a disk may consist of, itself included.
pub const MAX_CHAIN_LEN: usize = 128;

/// Where parents are found.
pub trait ParentSource: Send + Sync + fmt::Debug {
    /// Finds the parent that the image at `child` names by `link`. `child` is the name that the
    /// disk was opened by, or one that an earlier find gave. With `lock`, nobody else may change
    /// what is found.
    ///
    /// # Errors
    /// Why there is none.
    fn find(
        &self,
        child: &Path,
        link: &ParentLink,
        lock: bool,
    ) -> Result<FoundParent, ParentProblem>;

    /// Told of each parent that was found and then opened, for a source that shares open disks.
    fn opened(&self, key: FileKey, disk: &Arc<Disk>);
}

/// What a [`ParentSource`] found.
#[derive(Debug)]
pub enum FoundParent {
    /// An image that is to be opened.
    Closed {
        /// Its name, for people and for finding its own parent.
        path: PathBuf,
        /// Its host file.
        storage: Arc<dyn Storage>,
        /// Which file that is.
        key: FileKey,
    },
    /// A disk that is open already, read-only.
    Open(Arc<Disk>),
}

impl Disk {
    /// Opens the image at `path`; its parents are looked for in `parents`. See [`Self::open`].
    ///
    /// # Errors
    /// As there, and [`OpenProblem::Parent`].
    pub fn open_with(
        path: &Path,
        options: &OpenOptions,
        parents: &dyn ParentSource,
    ) -> Result<Arc<Self>, OpenError> {
        let host = HostOptions {
            read_only: options.read_only,
            lock: options.lock,
            ..HostOptions::default()
        };
        let file = HostFile::open(path, &host)?;
        Self::open_storage_with(Arc::new(file), path, options, parents)
    }

    /// Opens the image in `storage`, which messages call `name`; its parents are looked for in
    /// `parents`.
    ///
    /// # Errors
    /// As [`Self::open_with`].
    pub fn open_storage_with(
        storage: Arc<dyn Storage>,
        name: &Path,
        options: &OpenOptions,
        parents: &dyn ParentSource,
    ) -> Result<Arc<Self>, OpenError> {
        let level = Level {
            path: name,
            child: None,
        };
        level.open(storage, options, parents)
    }

    /// What the image says of its parent, if it has one.
    pub fn parent_link(&self) -> Option<&ParentLink> {
        self.image.parent()
    }

    /// Bytes in a sector as the guest addresses them, and as it is advised to write them.
    pub fn sector_sizes(&self) -> (u64, u64) {
        let geometry = self.geometry();
        (geometry.sector_size, geometry.physical_sector_size)
    }

    /// How many images it consists of, itself included.
    pub fn chain_len(&self) -> usize {
        std::iter::successors(self.parent(), |disk| disk.parent()).count() + 1
    }
}

/// One image of a chain that is being opened.
struct Level<'a> {
    path: &'a Path,
    child: Option<&'a Level<'a>>,
}

impl Level<'_> {
    fn open(
        &self,
        storage: Arc<dyn Storage>,
        options: &OpenOptions,
        parents: &dyn ParentSource,
    ) -> Result<Arc<Disk>, OpenError> {
        let parent = self
            .parent_of(&*storage, options, parents)
            .map_err(|problem| OpenError::new(self.path, problem))?;
        Disk::open_over(storage, self.path, options, parent)
    }

    /// The parent of the image in `storage`, open, if it has one.
    fn parent_of(
        &self,
        storage: &dyn Storage,
        options: &OpenOptions,
        parents: &dyn ParentSource,
    ) -> Result<Option<Arc<Disk>>, OpenProblem> {
        let own = image::identify(storage, self.path)?;
        let Some(link) = &own.parent else {
            return Ok(None);
        };
        let parent = self.open_parent(link, options, parents)?;
        let (sector, of_parent) = (own.sector_size, parent.geometry().sector_size);
        if sector != of_parent {
            let path = parent.path().to_owned();
            return Err(ParentProblem::sectors(path, of_parent, sector).into());
        }
        Ok(Some(parent))
    }

    fn open_parent(
        &self,
        link: &ParentLink,
        options: &OpenOptions,
        parents: &dyn ParentSource,
    ) -> Result<Arc<Disk>, ParentProblem> {
        let levels = || std::iter::successors(Some(self), |level| level.child);
        let most = MAX_CHAIN_LEN;
        let too_long = |len| (len > most).then_some(ParentProblem::TooLong { len, most });
        let len = levels().count();
        let found = parents.find(self.path, link, options.lock);
        let found = found.map_err(|problem| match problem {
            // By us, who have the chain below open.
            ParentProblem::InUse { path, .. }
                if levels().any(|level| paths::is_same(level.path, &path)) =>
            {
                ParentProblem::Circle { path }
            }
            other => other,
        });
        let (path, storage, key) = match found? {
            FoundParent::Closed { path, storage, key } => (path, storage, key),
            FoundParent::Open(disk) => {
                return too_long(len + disk.chain_len()).map_or(Ok(disk), Err);
            }
        };
        if levels().any(|level| level.path == path) {
            return Err(ParentProblem::Circle { path });
        }
        if let Some(problem) = too_long(len + 1) {
            return Err(problem);
        }
        let options = OpenOptions {
            read_only: true,
            ..*options
        };
        let level = Level {
            path: &path,
            child: Some(self),
        };
        let disk = level.open(storage, &options, parents).map_err(|error| {
            match error.into_problem() {
                // About the chain as a whole: not to be told once for each level.
                OpenProblem::Parent(
                    problem @ (ParentProblem::TooLong { .. } | ParentProblem::Circle { .. }),
                ) => problem,
                problem => ParentProblem::Unopenable(Box::new(OpenError::new(&path, problem))),
            }
        })?;
        parents.opened(key, &disk);
        Ok(disk)
    }
}

/// Parents in files of the host: below certain directories alone, and those that the user names. Disks
/// that it gave are shared as long as they are open.
#[derive(Debug)]
pub struct HostParents {
    start: Start,
    more: Vec<PathBuf>,
    files: Vec<NamedFile>,
    scope: OnceLock<Scope>,
    open: Mutex<HashMap<FileKey, Weak<Disk>>>,
}

/// A file that the user names: the parent of whichever child it has the identity for.
#[derive(Debug)]
struct NamedFile {
    path: PathBuf,
    /// Whether it is known to be of the chain.
    was_found: AtomicBool,
}

#[derive(Debug)]
enum Start {
    /// The directory of this file.
    Beside(PathBuf),
    /// A scope that has been made; children have names below its first directory.
    Scope,
}

impl HostParents {
    /// Below the directory of the image at `file`, and below those in `more`. Nothing is opened
    /// until a parent is looked for.
    pub fn beside(file: &Path, more: &[PathBuf]) -> Self {
        Self {
            start: Start::Beside(file.to_owned()),
            more: more.to_owned(),
            files: Vec::new(),
            scope: OnceLock::new(),
            open: Mutex::default(),
        }
    }

    /// In `scope`. Relative names of children start at its first directory.
    pub fn within(scope: Scope) -> Self {
        Self {
            start: Start::Scope,
            more: Vec::new(),
            files: Vec::new(),
            scope: OnceLock::from(scope),
            open: Mutex::default(),
        }
    }

    /// And `files`, wherever they are and whatever they are called: each is the parent of the child that
    /// names its identity, and they are asked before the paths in the child. For names that come from the
    /// user. Where they have parents themselves, the rules for those are the same.
    #[must_use]
    pub fn with_files(mut self, files: &[PathBuf]) -> Self {
        self.files.extend(files.iter().map(|path| NamedFile {
            path: path.clone(),
            was_found: AtomicBool::new(false),
        }));
        self
    }

    fn scope(&self) -> Result<&Scope, ParentProblem> {
        if let Some(scope) = self.scope.get() {
            return Ok(scope);
        }
        let mut scope = Scope::new();
        let own = match &self.start {
            Start::Beside(file) => self.real(file).parent().map(Path::to_owned),
            Start::Scope => None,
        };
        for directory in own.iter().chain(&self.more) {
            scope.add(directory).map_err(|error| {
                let place = directory.display();
                let tried = vec![format!("the directory {place} cannot be opened: {error}")];
                ParentProblem::Missing { tried }
            })?;
        }
        Ok(self.scope.get_or_init(|| scope))
    }

    /// Where the image that is called `name` is, without symbolic links.
    fn real(&self, name: &Path) -> PathBuf {
        match &self.start {
            Start::Beside(_) => paths::canonical(name),
            Start::Scope if name.is_absolute() => return name.to_owned(),
            Start::Scope => {
                let scope = self.scope.get();
                let root = scope.and_then(|scope| scope.directories().next());
                return root.map_or_else(|| name.to_owned(), |root| root.join(name));
            }
        }
        .or_else(|_| std::path::absolute(name))
        .unwrap_or_else(|_| name.to_owned())
    }

    fn shared(&self, key: FileKey) -> Option<Arc<Disk>> {
        self.open.lock().get(&key)?.upgrade()
    }

    /// The place that an image at `child` names by `link`, if the file there has the identity; see
    /// [`ParentSource::find`].
    ///
    /// # Errors
    /// Why there is none.
    pub fn locate(&self, child: &Path, link: &ParentLink) -> Result<PathBuf, ParentProblem> {
        match self.find(child, link, false)? {
            FoundParent::Closed { path, .. } => Ok(path),
            FoundParent::Open(disk) => Ok(disk.path().to_owned()),
        }
    }
}

impl Words for HostParents {
    fn real(&self, name: &Path) -> PathBuf {
        Self::real(self, name)
    }

    fn lead(&self, child: &Path, link: &ParentLink) -> Option<PathBuf> {
        let scope = self.scope().ok()?;
        let child = self.real(child);
        let named = link
            .paths
            .iter()
            .map(|path| scope.named(&child, &path.text));
        // What means nothing to this host is passed over, as in a search; a place outside is not: with
        // another scope it is where the parent is taken from.
        let first = { named }.find(|named| named.outside.is_some() || !named.inside.is_empty())?;
        first.inside.first().map(|place| scope.shown(place))
    }
}

impl ParentSource for HostParents {
    fn find(
        &self,
        child: &Path,
        link: &ParentLink,
        lock: bool,
    ) -> Result<FoundParent, ParentProblem> {
        Hunt::new(self, self.scope()?, link, lock).run(&self.real(child))
    }

    fn opened(&self, key: FileKey, disk: &Arc<Disk>) {
        let mut open = self.open.lock();
        open.retain(|_, disk| disk.strong_count() > 0);
        open.insert(key, Arc::downgrade(disk));
    }
}
