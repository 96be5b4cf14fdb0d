//! Looks at one file system of a tree, directory by directory.

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::Mutex;

use super::eyes::Eyes;
use super::family::Lineage;
use super::mounts::{Mount, Mounts};
use super::names::{is_disk_name, may_be_file, may_be_kin};
use crate::storage::host::pin::{Kind, Pin, Stat};

/// How many files are looked into at a time, and how many each worker should have.
const MAX_WORKERS: usize = 8;
const FILES_PER_WORKER: usize = 16;

/// A disk file, and what it says that it is.
#[derive(Clone, Debug)]
pub(crate) struct File {
    /// Below the directory that is searched.
    pub(crate) path: PathBuf,
    pub(crate) stat: Stat,
    /// `None`: no disk that anybody could open.
    pub(crate) lineage: Option<Lineage>,
}

impl File {
    /// Whether both are the same disk in the same place, whatever else of the file has changed.
    pub(crate) fn is_same_kin(&self, other: &Self) -> bool {
        self.path.as_os_str() == other.path.as_os_str()
            && self.stat.identity() == other.stat.identity()
            && self.lineage == other.lineage
    }
}

/// What leads out of a file system.
#[derive(Clone, Debug)]
pub(super) struct Door {
    pub(super) path: PathBuf,
    /// The directory that it is in.
    pub(super) directory: Arc<Pin>,
    pub(super) kind: Kind,
    /// What is mounted there, as far as the host told; `None` of a link.
    pub(super) mount: Option<Mount>,
}

/// What a walk came to. Paths are below the directory that is searched.
#[derive(Debug, Default)]
pub(super) struct Found {
    pub(super) files: Vec<File>,
    /// What could not be looked into and may be, or hold, a child.
    pub(super) unread: Vec<PathBuf>,
    pub(super) doors: Vec<Door>,
    /// There was more than `left` allowed.
    pub(super) cut_off: bool,
}

/// A walk over one file system.
pub(super) struct Walk<'a> {
    pub(super) eyes: &'a Eyes,
    /// Entries that may still be looked at, by all who walk for the same survey.
    pub(super) left: &'a AtomicUsize,
    /// Where the walk begins.
    pub(super) top: Pin,
    /// Where that is below the directory that is searched.
    pub(super) start: PathBuf,
    /// What is mounted below `place`'s beginning.
    pub(super) mounts: &'a Mounts,
    /// Where `top` is among them.
    pub(super) place: PathBuf,
    /// Whether links count as doors: those to disk files, and of others those in `top` itself.
    pub(super) links: bool,
    pub(super) found: Found,
}

impl Walk<'_> {
    /// Walks, unless the asker loses interest.
    pub(super) fn run(mut self) -> Found {
        // The nearest first: that is where children mostly are.
        let mut directories = VecDeque::from([PathBuf::new()]);
        while let Some(path) = directories.pop_front() {
            if self.eyes.asker.is_over() || self.found.cut_off {
                break;
            }
            match self.directory(&path) {
                Ok(below) => directories.extend(below),
                Err(error) => self.failed(&error, &path),
            }
        }
        self.found
    }

    /// The one file that `name` is in `directory`, and nothing else.
    pub(super) fn file(mut self, directory: &Pin, name: &OsStr) -> Found {
        match directory.stat_child(name) {
            Ok(stat) if stat.kind == Kind::File => {
                self.files(directory, vec![(name.to_owned(), PathBuf::new(), stat)]);
            }
            Ok(_) => {}
            Err(error) => self.failed(&error, Path::new("")),
        }
        self.found
    }

    fn failed(&mut self, error: &io::Error, path: &Path) {
        let path = joined(&self.start, path);
        if may_be_kin(&path, error) {
            self.found.unread.push(path);
        }
    }

    /// Looks at the directory at `path` below the top. Those in it.
    fn directory(&mut self, path: &Path) -> io::Result<Vec<PathBuf>> {
        let Some(directory) = self.top.directory_here(path)? else {
            // It was mounted a moment ago.
            let parent = path.parent().unwrap_or(path);
            if let Some(directory) = self.top.directory_here(parent)? {
                self.door(&Arc::new(directory), path, Kind::Directory);
            }
            return Ok(Vec::new());
        };
        let directory = Arc::new(directory);
        let mut below = Vec::new();
        let mut files = Vec::new();
        for (name, kind) in directory.names()? {
            let take = |left: usize| left.checked_sub(1);
            if (self
                .left
                .fetch_update(Ordering::Relaxed, Ordering::Relaxed, take))
            .is_err()
            {
                self.found.cut_off = true;
                break;
            }
            let is_disk = is_disk_name(&name);
            // Most need no more than that look.
            let counts = match kind {
                Kind::Directory => true,
                Kind::Link => self.links && (is_disk || path.as_os_str().is_empty()),
                Kind::File => is_disk,
                Kind::Other(_) => is_disk && may_be_file(kind),
            };
            if !counts {
                continue;
            }
            let path = path.join(&name);
            match kind {
                Kind::Link => self.door(&directory, &path, kind),
                _ if self.mount_at(&path).is_some() => self.door(&directory, &path, kind),
                Kind::Directory => below.push(path),
                Kind::Other(_) => self.found.unread.push(joined(&self.start, &path)),
                Kind::File => match directory.stat_child(&name) {
                    Ok(stat) if stat.kind == Kind::File => files.push((name, path, stat)),
                    Ok(stat) if may_be_file(stat.kind) => {
                        self.found.unread.push(joined(&self.start, &path));
                    }
                    Ok(_) => {}
                    Err(error) => self.failed(&error, &path),
                },
            }
        }
        self.files(&directory, files);
        Ok(below)
    }

    fn door(&mut self, directory: &Arc<Pin>, path: &Path, kind: Kind) {
        self.found.doors.push(Door {
            path: joined(&self.start, path),
            directory: directory.clone(),
            kind,
            mount: self.mount_at(path),
        });
    }

    fn mount_at(&self, path: &Path) -> Option<Mount> {
        // Mostly there is none.
        match self.mounts.is_empty() {
            true => None,
            false => self.mounts.at(&joined(&self.place, path)),
        }
    }

    /// Finds out which disks these files are. Those that nobody has looked into yet are mostly waited for, so
    /// several are looked into at a time.
    fn files(&mut self, directory: &Pin, files: Vec<(OsString, PathBuf, Stat)>) {
        let mut unknown = Vec::new();
        for (name, path, stat) in files {
            match self.eyes.known(&stat) {
                Some(lineage) => {
                    let path = match self.start.as_os_str().is_empty() {
                        true => path,
                        false => joined(&self.start, &path),
                    };
                    self.found.files.push(File {
                        path,
                        stat,
                        lineage,
                    });
                }
                None => unknown.push((name, path, stat)),
            }
        }
        let next = AtomicUsize::new(0);
        let looked = Mutex::new(Vec::new());
        let work = || {
            while !self.eyes.asker.is_over()
                && let Some((name, path, stat)) = unknown.get(next.fetch_add(1, Ordering::Relaxed))
            {
                let lineage = self.eyes.look(directory, name, stat);
                looked.lock().push((path, *stat, lineage));
            }
        };
        std::thread::scope(|scope| {
            for _ in 1..(unknown.len() / FILES_PER_WORKER).min(MAX_WORKERS) {
                // Where there can be no more threads (a limit), fewer do.
                let thread = std::thread::Builder::new().name("vhdfs-look".to_owned());
                if thread.spawn_scoped(scope, work).is_err() {
                    break;
                }
            }
            work();
        });
        for (path, stat, lineage) in looked.into_inner() {
            match lineage {
                Ok(lineage) => self.found.files.push(File {
                    path: joined(&self.start, path),
                    stat,
                    lineage,
                }),
                Err(error) => self.failed(&error, path),
            }
        }
    }
}

/// `path` below `start`, either of which may be empty.
fn joined(start: &Path, path: &Path) -> PathBuf {
    match (start.as_os_str().is_empty(), path.as_os_str().is_empty()) {
        (true, _) => path.to_owned(),
        (_, true) => start.to_owned(),
        _ => start.join(path),
    }
}
