//! A directory tree that is searched, once or again and again, over all of its file systems.

use std::collections::{HashMap, HashSet};
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::eyes::{Asker, Eyes};
use super::mounts::{Access, Mounts};
use super::walk::{Door, File, Found, Walk};
use super::{Kin, names};
use crate::storage::host::paths;
use crate::storage::host::pin::{Kind, Pin};

/// What was found on a file system that does not answer now counts for so long.
const COUNTS_FOR: Duration = Duration::from_secs(150);

/// What a search may cost.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// The most directory entries that are looked at.
    pub(crate) entries: usize,
    /// How long other file systems than the tree's own are waited for.
    pub(crate) patience: Duration,
    /// Whether links count, too: those to disk files, and those beside them to directories.
    pub(crate) links: bool,
}

/// What a search came to. All paths are below the tree's directory.
#[derive(Debug, Default)]
pub(crate) struct Survey {
    /// Every disk file.
    pub(crate) files: Vec<File>,
    /// Disk files and directories that could not be looked into, sorted.
    pub(crate) unread: Vec<PathBuf>,
    /// There was more than the limits allow.
    pub(crate) cut_off: bool,
}

impl Survey {
    /// Those of the files that are images.
    pub(crate) fn kin(&self) -> impl Iterator<Item = Kin> {
        self.files.iter().filter_map(|file| {
            Some(Kin {
                key: file.stat.identity(),
                path: file.path.clone(),
                lineage: file.lineage.clone()?,
            })
        })
    }

    fn add(&mut self, found: &Found) {
        self.files.extend_from_slice(&found.files);
        self.unread.extend_from_slice(&found.unread);
        self.cut_off |= found.cut_off;
    }
}

/// A tree that is searched.
pub(crate) struct Tree {
    top: Pin,
    limits: Limits,
    eyes: Arc<Eyes>,
    parts: Arc<Parts>,
}

impl Tree {
    pub(crate) fn new(top: Pin, limits: Limits, asker: Arc<dyn Asker>) -> Self {
        Self {
            top,
            limits,
            eyes: Arc::new(Eyes::new(asker)),
            parts: Arc::default(),
        }
    }

    /// Looks at the whole tree. `None` where the asker has lost interest.
    ///
    /// # Errors
    /// Where not even its directory can be held.
    pub(crate) fn survey(&self) -> io::Result<Option<Survey>> {
        let errand = Arc::new(Errand {
            mounts: Mounts::below(&self.top.real_path()?),
            real: self.top.real_path()?,
            left: AtomicUsize::new(self.limits.entries),
            eyes: self.eyes.clone(),
        });
        let top = self.top.try_clone()?;
        let found = errand.walk(top, PathBuf::new(), self.limits.links).run();
        let mut survey = Survey {
            files: found.files,
            unread: found.unread,
            cut_off: found.cut_off,
        };
        let mut met = HashSet::new();
        let mut doors = found.doors;
        while !doors.is_empty() {
            // All at a time.
            let entered: Vec<Place> = (doors.drain(..))
                .filter_map(|door| self.enter(door, &errand, &mut survey))
                .filter(|place| met.insert(place.clone()))
                .collect();
            for place in entered {
                let part = self.parts.wait(&place, self.limits.patience);
                if !part.counts() {
                    survey.unread.push(place.path);
                }
                if let Some(found) = part.found {
                    survey.add(&found);
                    doors.extend_from_slice(&found.doors);
                }
            }
        }
        self.parts.keep(&met);
        self.eyes.forget(survey.files.len());
        survey.unread.sort_unstable();
        Ok((!self.eyes.asker.is_over()).then_some(survey))
    }

    /// Has somebody look behind `door`; `None` where nobody may.
    fn enter(&self, door: Door, errand: &Arc<Errand>, survey: &mut Survey) -> Option<Place> {
        let mount = door.mount;
        match mount.map(|mount| mount.access) {
            Some(Access::Empty) => return None,
            None if door.kind == Kind::Link => {}
            Some(Access::Foreign) => {}
            // Mounted a moment ago, or nothing for us.
            None | Some(Access::Closed) => {
                survey.unread.push(door.path);
                return None;
            }
        }
        let place = Place {
            path: door.path.clone(),
            mount: mount.map_or(0, |mount| mount.id),
        };
        self.parts.begin(&place, door, errand.clone());
        Some(place)
    }
}

/// What those who walk for one survey share.
struct Errand {
    mounts: Mounts,
    /// Where the tree is.
    real: PathBuf,
    left: AtomicUsize,
    eyes: Arc<Eyes>,
}

impl Errand {
    fn walk(&self, top: Pin, start: PathBuf, links: bool) -> Walk<'_> {
        Walk {
            eyes: &self.eyes,
            left: &self.left,
            top,
            place: start.clone(),
            start,
            mounts: &self.mounts,
            links,
            found: Found::default(),
        }
    }

    /// Looks at what is behind a door, however long that takes.
    fn look_behind(&self, door: &Door) -> io::Result<Found> {
        let name = door.path.file_name().unwrap_or_default();
        let start = door.path.clone();
        match door.kind {
            Kind::Link => self.follow(door),
            Kind::Directory => {
                let top = door.directory.subdirectory(name)?;
                Ok(self.walk(top, start, false).run())
            }
            Kind::File | Kind::Other(_) => {
                let top = door.directory.try_clone()?;
                Ok(self.walk(top, start, false).file(&door.directory, name))
            }
        }
    }

    fn follow(&self, door: &Door) -> io::Result<Found> {
        let name = door.path.file_name().unwrap_or_default();
        let target = door.directory.followed(name)?;
        let (kind, real) = (target.stat()?.kind, target.real_path()?);
        // What lies in the tree is found without the link.
        if paths::below(&self.real, &real).is_some() {
            return Ok(Found::default());
        }
        let is_disk = names::is_disk_name(name);
        match (kind, real.parent(), real.file_name()) {
            (Kind::Directory, ..) => {
                let mounts = Mounts::below(&real);
                let walk = Walk {
                    mounts: &mounts,
                    place: PathBuf::new(),
                    ..self.walk(target, door.path.clone(), false)
                };
                Ok(walk.run())
            }
            (Kind::File, Some(directory), Some(name)) if is_disk => {
                let directory = Pin::directory(directory)?;
                let walk = self.walk(target, door.path.clone(), false);
                Ok(walk.file(&directory, name))
            }
            _ => Ok(Found::default()),
        }
    }
}

/// A file system in the tree, or what a link leads to.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Place {
    path: PathBuf,
    /// The mount's number; 0 of a link.
    mount: u64,
}

/// What was found in other file systems than the tree's own.
#[derive(Default)]
struct Parts {
    by_place: Mutex<HashMap<Place, Part>>,
    /// Somebody has come back.
    back: Condvar,
}

/// What is known of one of them.
#[derive(Clone, Default)]
struct Part {
    /// When they set out who look at it now.
    walked_since: Option<Instant>,
    /// Nobody needs to wait for them: others have already.
    is_slow: bool,
    /// When the last set out who came back with something, and with what.
    since: Option<Instant>,
    found: Option<Arc<Found>>,
    /// The last came back with nothing.
    refused: bool,
}

impl Part {
    /// Whether what was found is as good as what is there.
    fn counts(&self) -> bool {
        let since = self.since.filter(|_| !self.refused);
        since.is_some_and(|since| since.elapsed() < COUNTS_FOR)
    }
}

impl Parts {
    /// Sends somebody, unless the last one is not back yet.
    fn begin(self: &Arc<Self>, place: &Place, door: Door, errand: Arc<Errand>) {
        let mut by_place = self.by_place.lock();
        let part = by_place.entry(place.clone()).or_default();
        if part.walked_since.is_some() {
            part.is_slow = true;
            return;
        }
        let (parts, at, begun) = (self.clone(), place.clone(), Instant::now());
        let walk = move || {
            // Nobody would ever be sent again, if a panic ended it here.
            let look = AssertUnwindSafe(|| errand.look_behind(&door));
            let found =
                match catch_unwind(look).unwrap_or_else(|_| Err(io::Error::other("a panic"))) {
                    Err(error) if !names::may_be_kin(&door.path, &error) => Ok(Found::default()),
                    found => found,
                };
            let mut by_place = parts.by_place.lock();
            let part = by_place.entry(at).or_default();
            (part.walked_since, part.is_slow) = (None, false);
            part.refused = found.is_err();
            if let Ok(found) = found {
                (part.since, part.found) = (Some(begun), Some(Arc::new(found)));
            }
            parts.back.notify_all();
        };
        let thread = std::thread::Builder::new().name("vhdfs-elsewhere".to_owned());
        part.walked_since = thread.spawn(walk).is_ok().then_some(begun);
    }

    /// What is known of `place` once those are back who look at it, or are late. Where nobody has ever come back
    /// from is waited for longest.
    fn wait(&self, place: &Place, patience: Duration) -> Part {
        let mut by_place = self.by_place.lock();
        loop {
            let Some(part) = by_place.get(place) else {
                return Part::default();
            };
            let patience = match &part.found {
                Some(_) => patience / 8,
                None => patience,
            };
            let until = part.walked_since.map(|since| since + patience);
            match until.filter(|until| !part.is_slow && Instant::now() < *until) {
                Some(until) => drop(self.back.wait_until(&mut by_place, until)),
                None => return part.clone(),
            }
        }
    }

    /// Forgets what is not there any more.
    fn keep(&self, met: &HashSet<Place>) {
        let mut by_place = self.by_place.lock();
        by_place.retain(|place, part| part.walked_since.is_some() || met.contains(place));
    }
}

/// Somebody who asks once and waits for the answer.
pub(crate) struct Waiting;

impl Asker for Waiting {
    fn is_over(&self) -> bool {
        false
    }

    fn open(&self, _: &crate::storage::host::pin::Identity) -> Option<super::Lineage> {
        None
    }
}

/// Where a path is below the one that is searched, as people know it.
pub(crate) fn shown(top: &Path, path: &Path) -> PathBuf {
    match path.as_os_str().is_empty() {
        true => top.to_owned(),
        false => top.join(path),
    }
}
