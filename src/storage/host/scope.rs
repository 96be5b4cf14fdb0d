//! Where files that an image names may be looked for: below some directories, and nowhere else.
//!
//! An image may come from a stranger, and the paths in it with it. So a path out of an image is
//! never given to the host as it is. It is taken apart, turned into places below the scope's
//! directories, and each of these is opened step by step from a directory that is held open:
//! whatever somebody renames or links meanwhile, the file that is opened lay below that directory.
//! Symbolic links are followed as long as they stay inside. Only regular files are opened.

mod beneath;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::ffi::OsString;
use std::fmt;
use std::io;
use std::path::{Component, Path, PathBuf};

use super::pin::Pin;
use super::{FileKey, HostFile, HostOptions, paths};
use crate::error::OpenError;
use crate::format::foreign_path::{Anchor, ForeignPath};

/// How many trailing names of a path are looked for below each directory.
const MAX_GUESSED_NAMES: usize = 32;

/// How many names that differ in case only are tried for one.
const MAX_SPELLINGS: usize = 8;

/// A set of directories.
#[derive(Debug, Default)]
pub struct Scope {
    roots: Vec<Root>,
}

#[derive(Debug)]
struct Root {
    directory: Pin,
    /// Where it was when it was added, without symbolic links.
    real: PathBuf,
    /// What else leads there, absolute: how it was named.
    others: Vec<PathBuf>,
}

/// A place below one of a scope's directories.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Candidate {
    root: usize,
    path: PathBuf,
}

/// Where a path leads: nowhere that this host knows, inside, or outside of a scope.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Named {
    /// The places inside: several where directories of the scope lie in each other.
    pub inside: Vec<Candidate>,
    /// The place, if it is outside.
    pub outside: Option<PathBuf>,
}

/// Why there is no file at a place.
#[derive(Debug)]
pub enum Miss {
    /// Nothing is there.
    Missing,
    /// A symbolic link on the way leads out of the directory.
    Outside,
    /// Something else than a regular file is there.
    Special(&'static str),
    /// The host refused.
    Io(io::Error),
}

impl fmt::Display for Miss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing => f.write_str("no such file"),
            Self::Outside => f.write_str("a symbolic link leads outside"),
            Self::Special(what) => write!(f, "it is {what}, not a regular file"),
            Self::Io(error) => error.fmt(f),
        }
    }
}

/// A regular file that was found, held without being open: no lock is taken and nothing is read.
#[derive(Debug)]
pub struct Found {
    pinned: Pin,
    /// Where it is, without symbolic links.
    pub path: PathBuf,
    /// Which file it is.
    pub key: FileKey,
}

impl Found {
    /// The regular file at `path`, wherever that is: for names that come from the user, never out of an
    /// image. Links are followed.
    ///
    /// # Errors
    /// Why there is none.
    pub fn at(path: &Path) -> Result<Self, Miss> {
        let pinned = Pin::file(path).map_err(beneath::miss)?;
        let real = paths::canonical(path);
        Self::of(pinned, real.unwrap_or_else(|_| path.to_owned()))
    }

    fn of(pinned: Pin, path: PathBuf) -> Result<Self, Miss> {
        let stat = pinned.stat().map_err(Miss::Io)?;
        match stat.kind.special() {
            Some(what) => Err(Miss::Special(what)),
            None => Ok(Self {
                path,
                key: stat.key,
                pinned,
            }),
        }
    }

    /// Opens it for reading.
    ///
    /// # Errors
    /// As [`HostFile::open`].
    pub fn open(&self, lock: bool) -> Result<HostFile, OpenError> {
        let options = HostOptions {
            read_only: true,
            lock,
            no_follow: false,
        };
        (self.pinned.open(&options))
            .map_err(|error| OpenError::new(&self.path, error.into_problem()))
    }
}

/// The names in directories, read once for each search.
#[derive(Debug, Default)]
pub struct Listings(HashMap<Candidate, Vec<(String, OsString)>>);

impl Scope {
    /// No directory at all.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds the directory at `path`.
    ///
    /// # Errors
    /// Where it cannot be opened as a directory.
    pub fn add(&mut self, path: &Path) -> io::Result<()> {
        self.add_open(Pin::directory(path)?, &std::path::absolute(path)?)
    }

    /// Adds a directory that is held already, and was named `given`.
    ///
    /// # Errors
    /// Where the host cannot tell where it is.
    pub(crate) fn add_open(&mut self, directory: Pin, given: &Path) -> io::Result<()> {
        let real = directory.real_path()?;
        if self.roots.iter().all(|known| known.real != real) {
            let mut others = directory.other_paths();
            others.push(given.to_owned());
            self.roots.push(Root {
                directory,
                real,
                others,
            });
        }
        Ok(())
    }

    /// The directories, where they were when they were added.
    pub fn directories(&self) -> impl Iterator<Item = &Path> {
        self.roots.iter().map(|root| &*root.real)
    }

    /// A place as people call it.
    pub fn shown(&self, candidate: &Candidate) -> PathBuf {
        match self.roots.get(candidate.root) {
            Some(root) => root.real.join(&candidate.path),
            None => candidate.path.clone(),
        }
    }

    /// Where `text`, found in the file at `file`, leads. `file` is absolute and without symbolic
    /// links.
    pub fn named(&self, file: &Path, text: &str) -> Named {
        let Some(path) = ForeignPath::parse(text) else {
            return Named::default();
        };
        let (Some(start), Some(names)) = (start_of(&path.anchor, file), joined(&path.names)) else {
            return Named::default();
        };
        let place = start.join(names);
        let inside = self.below(&place);
        Named {
            outside: Some(place).filter(|_| inside.is_empty()),
            inside,
        }
    }

    /// Where its last names may lead to if the files were moved: from the directory of `file` and
    /// from those of the scope, the longest part of the path first.
    pub fn guesses(&self, file: &Path, text: &str) -> Vec<Candidate> {
        let mut guesses = Vec::new();
        let Some(path) = ForeignPath::parse(text) else {
            return guesses;
        };
        let mut bases = self.below(file.parent().unwrap_or(file));
        bases.truncate(1);
        bases.extend((0..self.roots.len()).map(|root| Candidate {
            root,
            path: PathBuf::new(),
        }));
        let skipped = path.names.len().saturating_sub(MAX_GUESSED_NAMES);
        for start in skipped..path.names.len() {
            let Some(rest) = joined(&path.names[start..]) else {
                continue;
            };
            for base in &bases {
                let guess = Candidate {
                    root: base.root,
                    path: base.path.join(&rest),
                };
                if !guesses.contains(&guess) {
                    guesses.push(guess);
                }
            }
        }
        guesses
    }

    /// The places that are this one.
    fn below(&self, path: &Path) -> Vec<Candidate> {
        let mut places: Vec<Candidate> = Vec::new();
        for (root, known) in self.roots.iter().enumerate() {
            let mut names = std::iter::once(&known.real).chain(&known.others);
            if let Some(path) = names.find_map(|name| paths::below(name, path)) {
                places.push(Candidate { root, path });
            }
        }
        places
    }

    /// The regular files at a place: the one of exactly that name or, where there is none, those
    /// whose names differ in case only. At least one.
    ///
    /// # Errors
    /// Why there is none.
    pub fn look(&self, candidate: &Candidate, listings: &mut Listings) -> Result<Vec<Found>, Miss> {
        let exact = match self.find(candidate) {
            Err(Miss::Missing) => Miss::Missing,
            found => return found.map(|found| vec![found]),
        };
        let mut found = Vec::new();
        let mut miss = exact;
        for spelling in self.spellings(candidate, listings) {
            match self.find(&spelling) {
                Ok(file) => found.push(file),
                Err(Miss::Missing) => {}
                Err(other) => miss = other,
            }
        }
        if found.is_empty() {
            return Err(miss);
        }
        Ok(found)
    }

    fn find(&self, candidate: &Candidate) -> Result<Found, Miss> {
        let root = self.roots.get(candidate.root).ok_or(Miss::Missing)?;
        let pinned = root.open(&candidate.path)?;
        let path = root.real_place(&pinned, &candidate.path);
        Found::of(pinned, path)
    }

    /// Names on the host that differ from `candidate` in case only.
    fn spellings(&self, candidate: &Candidate, listings: &mut Listings) -> Vec<Candidate> {
        let mut places = vec![PathBuf::new()];
        for name in &candidate.path {
            let wanted = name.to_string_lossy().to_lowercase();
            let mut next = Vec::new();
            for place in places {
                let directory = Candidate {
                    root: candidate.root,
                    path: place,
                };
                let names = self.list(&directory, listings).iter();
                let alike = names.filter(|(lower, _)| *lower == wanted);
                next.extend(alike.map(|(_, name)| directory.path.join(name)));
            }
            next.sort();
            next.truncate(MAX_SPELLINGS);
            places = next;
        }
        let root = candidate.root;
        (places.into_iter())
            .map(|path| Candidate { root, path })
            .filter(|place| place != candidate)
            .collect()
    }

    /// The names in a directory, in lower case and as they are; none where it cannot be read.
    fn list<'a>(
        &self,
        directory: &Candidate,
        listings: &'a mut Listings,
    ) -> &'a [(String, OsString)] {
        listings.0.entry(directory.clone()).or_insert_with(|| {
            let read = || -> Option<Vec<(OsString, _)>> {
                let root = self.roots.get(directory.root)?;
                root.open(&directory.path).ok()?.names().ok()
            };
            let names = read().unwrap_or_default().into_iter();
            let lower = names.map(|(name, _)| (name.to_string_lossy().to_lowercase(), name));
            lower.collect()
        })
    }
}

impl Root {
    /// Holds what lies at `path` below it; links are followed as long as they stay below.
    fn open(&self, path: &Path) -> Result<Pin, Miss> {
        let is_below = |place: &Path| {
            let mut names = std::iter::once(&self.real).chain(&self.others);
            names.find_map(|name| paths::below(name, place))
        };
        beneath::open(&self.directory, &is_below, path)
    }

    /// Where a file is, as its own children are to find it. What the host says counts only as far
    /// as it lies below the root: it decides where to look next, not what may be opened.
    fn real_place(&self, file: &Pin, path: &Path) -> PathBuf {
        let place = || {
            let (file, root) = (file.real_path().ok()?, self.directory.real_path().ok()?);
            paths::below(&root, &file)
        };
        self.real.join(place().unwrap_or_else(|| path.to_owned()))
    }
}

/// Where a path with this anchor starts that stands in the file at `file`; `None` where that is
/// nothing that this host knows.
fn start_of(anchor: &Anchor, file: &Path) -> Option<PathBuf> {
    let home = file.parent().unwrap_or(file);
    let top = home.ancestors().last().unwrap_or(home);
    match anchor {
        Anchor::Root => Some(top.to_owned()),
        Anchor::Directory { up } => Some(home.ancestors().nth(*up).unwrap_or(top).to_owned()),
        #[cfg(windows)]
        Anchor::Drive(letter) => Some(format!(r"{letter}:\").into()),
        #[cfg(windows)]
        Anchor::Volume(name) => Some(format!(r"\\?\{name}\").into()),
        #[cfg(windows)]
        Anchor::Server(name) => Some(format!(r"\\{name}\").into()),
        _ => None,
    }
}

/// The names as one path; `None` where one of them is no name here, but something that leads
/// elsewhere, such as `C:` on Windows.
fn joined(names: &[String]) -> Option<PathBuf> {
    let is_name = |name: &&String| {
        let mut parts = Path::new(name).components();
        matches!(parts.next(), Some(Component::Normal(part)) if part == name.as_str())
    };
    names
        .iter()
        .all(|name| is_name(&name))
        .then(|| names.iter().collect())
}
