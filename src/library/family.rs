//! Which disks of the directory are parents of others, and so must not change.
//!
//! That is found out by looking at every disk file of the tree: at its attributes each time, and at
//! its headers once for each state of the file. Whoever is about to write wants to know it as it is
//! now; for what is only shown, the latest findings do.

#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::{Condvar, Mutex, MutexGuard};

use super::host_dir::Identity;
use super::probes::Lineage;
use super::{Core, names};
use crate::disk::{self, Kin};
use crate::format::parent::ParentLink;
use crate::storage::host::pin::{Kind, Stat};

/// How many files are looked into at a time, and how many each worker should have.
const MAX_WORKERS: usize = 8;
const FILES_PER_WORKER: usize = 16;

type KinFile = Kin<Identity, Arc<ParentLink>>;

/// Who is whose child; children by their path below the root.
pub(super) type Family = disk::Family<Identity>;

/// A look at the whole tree.
pub(super) struct Survey {
    /// Every disk file, below the root.
    pub(super) files: Vec<(PathBuf, Stat)>,
    pub(super) family: Arc<Family>,
}

/// The latest findings.
#[derive(Default)]
pub(super) struct Families {
    state: Mutex<State>,
    /// A survey is over.
    over: Condvar,
}

#[derive(Default)]
struct State {
    latest: Option<Arc<Family>>,
    /// Surveys that were begun and that are over. One runs at a time.
    begun: u64,
    over: u64,
}

impl Families {
    /// As of the last survey.
    pub(super) fn latest(&self) -> Arc<Family> {
        self.state.lock().latest.clone().unwrap_or_default()
    }

    /// As of any survey: waits for the first. `None` where the library is being closed.
    pub(super) fn known(&self, core: &Core) -> Option<Arc<Family>> {
        let mut state = self.state.lock();
        loop {
            if let Some(latest) = &state.latest {
                return Some(latest.clone());
            }
            if state.begun == state.over {
                return self.run(state, core).map(|survey| survey.family);
            }
            self.over.wait(&mut state);
        }
    }

    /// As of a survey that began after the call, shared with others who want the same. `None` where
    /// the library is being closed.
    pub(super) fn renew(&self, core: &Core) -> Option<Arc<Family>> {
        let mut state = self.state.lock();
        let wanted = state.begun + 1;
        while state.over < wanted {
            if state.begun == state.over {
                return self.run(state, core).map(|survey| survey.family);
            }
            self.over.wait(&mut state);
        }
        let latest = state.latest.clone();
        latest.filter(|_| !core.bell.is_stopped())
    }

    /// Looks at the tree. `None` where the library is being closed.
    pub(super) fn survey(&self, core: &Core) -> Option<Survey> {
        let mut state = self.state.lock();
        while state.begun != state.over {
            self.over.wait(&mut state);
        }
        self.run(state, core)
    }

    fn run(&self, mut state: MutexGuard<'_, State>, core: &Core) -> Option<Survey> {
        state.begun += 1;
        drop(state);
        let found = core.survey();
        let mut state = self.state.lock();
        state.over = state.begun;
        if let Some(found) = &found {
            state.latest = Some(found.family.clone());
        }
        drop(state);
        self.over.notify_all();
        found
    }
}

impl Core {
    fn survey(&self) -> Option<Survey> {
        let mut unread = Vec::new();
        let files = self.disk_files(&mut unread)?;
        let kin = self.kin(&files, &mut unread)?;
        let mut family = Family::of(&kin, self.disks.parents());
        unread.sort_unstable();
        if let Some(first) = unread.first()
            && self.families.latest().unread.first() != Some(first)
        {
            let first = Path::new(".").join(first);
            log::warn!(
                "{} cannot be read, and may be, or hold, a child of other disks: what filesystems call free \
                 stays everywhere",
                first.display()
            );
        }
        family.unread = unread;
        let family = Arc::new(family);
        Some(Survey { files, family })
    }

    /// Every disk file below the root; what could not be looked into goes to `unread`.
    fn disk_files(&self, unread: &mut Vec<PathBuf>) -> Option<Vec<(PathBuf, Stat)>> {
        let mut files = Vec::new();
        let mut directories = vec![PathBuf::new()];
        while let Some(path) = directories.pop() {
            if self.bell.is_stopped() {
                return None;
            }
            let found = (self.host.directory(&path))
                .and_then(|directory| Ok((directory.names()?, directory)));
            let (entries, directory) = match found {
                Ok(found) => found,
                Err(error) => {
                    unread.extend(disk::may_be_kin(&path, &error).then_some(path));
                    continue;
                }
            };
            for (name, kind) in entries {
                let path = path.join(&name);
                match kind {
                    Kind::Directory => directories.push(path),
                    Kind::File if names::is_disk(&name) => match directory.stat_child(&name) {
                        Ok(stat) => files.push((path, stat)),
                        Err(error) => {
                            unread.extend(disk::may_be_kin(&path, &error).then_some(path))
                        }
                    },
                    Kind::Other(_) if disk::may_be_file(kind) && names::is_disk(&name) => {
                        unread.push(path);
                    }
                    Kind::File | Kind::Link | Kind::Other(_) => {}
                }
            }
        }
        Some(files)
    }

    /// Which disks they are. Files that nobody has looked into yet are mostly waited for, so several
    /// are looked into at a time.
    fn kin(&self, files: &[(PathBuf, Stat)], unread: &mut Vec<PathBuf>) -> Option<Vec<KinFile>> {
        let mut kin = Vec::with_capacity(files.len());
        let mut unknown = Vec::new();
        for (path, stat) in files {
            match self.known_lineage(stat) {
                Some(lineage) => kin.extend(lineage.map(|found| kin_file(path, stat, found))),
                None => unknown.push((path, stat)),
            }
        }
        let next = AtomicUsize::new(0);
        let found = Mutex::new((Vec::new(), Vec::new()));
        let work = || {
            while !self.bell.is_stopped()
                && let Some((path, stat)) = unknown.get(next.fetch_add(1, Ordering::Relaxed))
            {
                let lineage = self
                    .probes
                    .lineage(&stat.stamp(), path, || self.host.pin(path));
                let mut found = found.lock();
                match lineage {
                    Ok(lineage) => (found.0).extend(lineage.map(|of| kin_file(path, stat, of))),
                    Err(error) if disk::may_be_kin(path, &error) => {
                        found.1.push(path.to_path_buf())
                    }
                    Err(_) => {}
                }
            }
        };
        std::thread::scope(|scope| {
            for _ in 1..(unknown.len() / FILES_PER_WORKER).min(MAX_WORKERS) {
                scope.spawn(work);
            }
            work();
        });
        let (mut found, mut failed) = found.into_inner();
        kin.append(&mut found);
        unread.append(&mut failed);
        (!self.bell.is_stopped()).then_some(kin)
    }

    /// `Some(None)` of a file that is known to be no disk.
    fn known_lineage(&self, stat: &Stat) -> Option<Option<Lineage>> {
        let open = self.disks.get(&stat.identity());
        match open.and_then(|open| open.disk()) {
            Some(disk) => Some(Some(Lineage {
                identity: disk.identity(),
                link: disk.parent_link().cloned().map(Arc::new),
            })),
            None => self.probes.known_lineage(&stat.stamp()),
        }
    }
}

fn kin_file(path: &Path, stat: &Stat, found: Lineage) -> KinFile {
    Kin {
        key: stat.identity(),
        path: path.to_owned(),
        identity: found.identity,
        link: found.link,
    }
}

/// Why a disk with these children is not written.
pub(super) fn reason(children: &[PathBuf]) -> String {
    const LISTED: usize = 3;
    let mut names: Vec<String> = (children.iter().take(LISTED))
        .map(|path| path.display().to_string())
        .collect();
    let more = children.len().saturating_sub(LISTED);
    if more > 0 {
        names.push(format!("{more} more"));
    }
    format!(
        "has children, which rely on its content: {}",
        names.join(", ")
    )
}
