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
#[cfg(test)]
mod tests;

pub use family::{Children, children_below};
pub(crate) use family::{Family, Kin, is_disk_name};

use std::collections::HashMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock, Weak};

use parking_lot::Mutex;

use super::{Disk, OpenOptions};
use crate::error::{OpenError, OpenProblem, ParentProblem};
use crate::format::Format;
use crate::format::parent::{Identity, ParentLink};
use crate::image::{self, vhd};
use crate::storage::Storage;
use crate::storage::host::{
    Candidate, FileKey, Found, HostFile, HostOptions, Listings, Miss, Scope,
};

/// The most images that a disk may consist of, itself included.
pub const MAX_CHAIN_LEN: usize = 128;

/// How many places an error lists.
const LISTED: usize = 16;

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
        let link = parent_link(&*storage, self.path)
            .map_err(|problem| OpenError::new(self.path, problem))?;
        let parent = link.map(|link| self.open_parent(&link, options, parents));
        let parent = (parent.transpose()).map_err(|problem| OpenError::new(self.path, problem))?;
        let disk = Disk::open_over(storage, self.path, options, parent)?;
        if let Some(parent) = disk.parent() {
            let (own, of_parent) = (disk.geometry().sector_size, parent.geometry().sector_size);
            if own != of_parent {
                let reason = format!("it has sectors of {of_parent} bytes, its child of {own}");
                let path = parent.path().to_owned();
                return Err(OpenError::new(
                    self.path,
                    ParentProblem::Unfit { path, reason },
                ));
            }
        }
        Ok(disk)
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
        let (path, storage, key) = match parents.find(self.path, link, options.lock)? {
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

/// What the image in `storage` says of its parent, if it has one.
fn parent_link(storage: &dyn Storage, name: &Path) -> Result<Option<ParentLink>, OpenProblem> {
    // Spares all others a second reading of their metadata.
    if image::detect(storage, name)? == Format::Vhd && !vhd::may_have_parent(storage)? {
        return Ok(None);
    }
    Ok(image::probe(storage, name)?.parent)
}

/// Parents in files of the host, below certain directories alone. Disks that it gave are shared as
/// long as they are open.
#[derive(Debug)]
pub struct HostParents {
    start: Start,
    more: Vec<PathBuf>,
    scope: OnceLock<Scope>,
    open: Mutex<HashMap<FileKey, Weak<Disk>>>,
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
            scope: OnceLock::new(),
            open: Mutex::default(),
        }
    }

    /// In `scope`. Relative names of children start at its first directory.
    pub fn within(scope: Scope) -> Self {
        Self {
            start: Start::Scope,
            more: Vec::new(),
            scope: OnceLock::from(scope),
            open: Mutex::default(),
        }
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
            Start::Beside(_) => std::fs::canonicalize(name),
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

    /// Where `text`, in the image at `child`, leads to by its words alone; nothing is looked at.
    fn named(&self, child: &Path, text: &str) -> Option<PathBuf> {
        let scope = self.scope().ok()?;
        let named = scope.named(&self.real(child), text);
        named.inside.first().map(|place| scope.shown(place))
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

/// One search for a parent.
struct Hunt<'a> {
    parents: &'a HostParents,
    scope: &'a Scope,
    link: &'a ParentLink,
    lock: bool,
    listings: Listings,
    /// Files that have been looked into.
    seen: Vec<FileKey>,
    /// The first disk found that has another identity.
    mismatch: Option<(PathBuf, Identity)>,
    tried: Vec<String>,
}

impl<'a> Hunt<'a> {
    fn new(parents: &'a HostParents, scope: &'a Scope, link: &'a ParentLink, lock: bool) -> Self {
        Self {
            parents,
            scope,
            link,
            lock,
            listings: Listings::default(),
            seen: Vec::new(),
            mismatch: None,
            tried: Vec::new(),
        }
    }

    /// Finds the parent of the image at `child`, which is where it really is.
    fn run(&mut self, child: &Path) -> Result<FoundParent, ParentProblem> {
        let link = self.link;
        for text in link.paths.iter().map(|path| &path.text) {
            let named = self.scope.named(child, text);
            for place in &named.inside {
                if let Some(found) = self.look(place, true)? {
                    return Ok(found);
                }
            }
            match &named.outside {
                Some(outside) => self.note_outside(text, outside),
                None if named.inside.is_empty() => {
                    let directories = self.directories();
                    self.note(format!("{text}: nothing of that name below {directories}"));
                }
                None => {}
            }
        }
        // Only then by what is left of the paths when the files have been moved.
        for text in link.paths.iter().map(|path| &path.text) {
            for place in &self.scope.guesses(child, text) {
                if let Some(found) = self.look(place, false)? {
                    return Ok(found);
                }
            }
        }
        Err(match self.mismatch.take() {
            Some((path, found)) => ParentProblem::Mismatch {
                path,
                found: found.to_string(),
                expected: expected(self.link),
            },
            None => ParentProblem::Missing {
                tried: self.finish_tried(),
            },
        })
    }

    /// The parent, if it is at `place`. A place that was only guessed is not worth a word.
    fn look(
        &mut self,
        place: &Candidate,
        named: bool,
    ) -> Result<Option<FoundParent>, ParentProblem> {
        let files = match self.scope.look(place, &mut self.listings) {
            Ok(files) => files,
            Err(Miss::Missing) if !named => return Ok(None),
            Err(miss) => {
                let place = self.scope.shown(place);
                self.note(format!("{}: {miss}", place.display()));
                return Ok(None);
            }
        };
        for file in files {
            if self.seen.contains(&file.key) {
                continue;
            }
            self.seen.push(file.key);
            if let Some(found) = self.examine(&file)? {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }

    /// `file`, if it is the parent.
    fn examine(&mut self, file: &Found) -> Result<Option<FoundParent>, ParentProblem> {
        if let Some(disk) = self.parents.shared(file.key)
            && self.link.identities.contains(&disk.identity())
        {
            return Ok(Some(FoundParent::Open(disk)));
        }
        let mut holder = None;
        let opened = file.open(self.lock).or_else(|error| match error.problem() {
            // Whether that is bad depends on which disk it is.
            OpenProblem::InUse(who) => {
                holder = Some(who.clone());
                file.open(false)
            }
            _ => Err(error),
        });
        let opened = opened.map_err(OpenError::into_problem).and_then(|storage| {
            let probe = image::probe(&storage, &file.path)?;
            Ok((storage, probe.identity))
        });
        match opened {
            Err(problem) => {
                self.note(format!("{}: {problem}", file.path.display()));
                Ok(None)
            }
            Ok((_, identity)) if !self.link.identities.contains(&identity) => {
                self.mismatch.get_or_insert((file.path.clone(), identity));
                Ok(None)
            }
            Ok((storage, _)) => match holder {
                None => Ok(Some(FoundParent::Closed {
                    path: file.path.clone(),
                    storage: Arc::new(storage),
                    key: file.key,
                })),
                Some(holder) => Err(ParentProblem::InUse {
                    path: file.path.clone(),
                    holder,
                }),
            },
        }
    }

    fn note(&mut self, text: String) {
        // Paths out of an image may hold anything, and this goes to a terminal.
        let text: String = (text.chars())
            .map(|c| if c.is_control() { '?' } else { c })
            .collect();
        if !self.tried.contains(&text) {
            self.tried.push(text);
        }
    }

    fn note_outside(&mut self, text: &str, outside: &Path) {
        let directories = self.directories();
        let needed = outside.parent().unwrap_or(outside).display();
        self.note(format!(
            "{text} leads outside of {directories}: --parent-dir {needed} allows that"
        ));
    }

    fn directories(&self) -> String {
        let names = self.scope.directories().map(|path| path.display());
        let names: Vec<String> = names.map(|name| name.to_string()).collect();
        names.join(", ")
    }

    fn finish_tried(&mut self) -> Vec<String> {
        let mut tried = std::mem::take(&mut self.tried);
        let more = tried.len().saturating_sub(LISTED);
        tried.truncate(LISTED);
        if more > 0 {
            tried.push(format!("{more} more places"));
        }
        if !tried.is_empty() {
            tried.push("if it is elsewhere, name its directory with --parent-dir DIR".to_owned());
        }
        tried
    }
}

/// The identities of which a parent must have one, for people.
pub(super) fn expected(link: &ParentLink) -> String {
    let identities: Vec<String> = link.identities.iter().map(Identity::to_string).collect();
    identities.join(" or ")
}
