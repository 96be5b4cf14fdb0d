//! Which disks of the directory are parents of others, and so must not change.
//!
//! That is found out by looking at every disk file of the tree: at its attributes each time, and at
//! its headers once for each state of the file. Whoever is about to write wants to know it as it is
//! now; for what is only shown, the latest findings do.
//!
//! A thread of its own looks, one survey at a time, and is asked by whoever needs one: so no request of a front end
//! does, on whose answer the host of some directory may depend. Who is about to write waits for it, together with all
//! others who ask meanwhile, until [`DEADLINE`]; then the latest findings have to do.

#[cfg(test)]
mod tests;

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::agent::Bell;
use super::open_disks::OpenDisks;
use crate::lineage::{Asker, Kin, Limits, Lineage, Tree, shown};
use crate::storage::host::pin::{Identity, Pin};

pub(super) use crate::lineage::{Family, File};

/// How long somebody who is about to write waits for a survey, where there are older findings.
const DEADLINE: Duration = Duration::from_secs(5);

/// How long the end waits for a survey that is under way.
const FAREWELL: Duration = Duration::from_secs(2);

/// What a survey may cost.
const LIMITS: Limits = Limits {
    entries: 2_000_000,
    patience: Duration::from_secs(1),
    links: false,
};

/// A look at the whole tree.
pub(super) struct Survey {
    /// Every disk file, below the root.
    pub(super) files: Vec<File>,
    pub(super) family: Arc<Family>,
}

/// Stands for a survey that was asked for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Asked(u64);

/// The latest findings.
pub(super) struct Families {
    tree: Tree,
    bell: Arc<Bell>,
    state: Mutex<State>,
    /// A survey is asked for or over, or all is at an end.
    changed: Condvar,
}

#[derive(Default)]
struct State {
    latest: Option<Arc<Survey>>,
    /// Surveys that were asked for, that were begun and that are over. One runs at a time.
    asked: u64,
    begun: u64,
    over: u64,
    /// Nobody looks any more.
    ended: bool,
    /// It has been logged that there are only older findings.
    said_late: bool,
}

impl Families {
    pub(super) fn new(root: Pin, disks: Arc<OpenDisks>, bell: Arc<Bell>) -> Self {
        let owner = Owner {
            disks,
            bell: bell.clone(),
        };
        Self {
            tree: Tree::new(root, LIMITS, Arc::new(owner)),
            bell,
            state: Mutex::default(),
            changed: Condvar::new(),
        }
    }

    /// As of the last survey.
    pub(super) fn latest(&self) -> Arc<Family> {
        let state = self.state.lock();
        let latest = state.latest.as_ref();
        latest.map_or_else(Arc::default, |survey| survey.family.clone())
    }

    /// As of any survey: waits for the first. `None` where the library is being closed.
    pub(super) fn known(&self) -> Option<Arc<Family>> {
        let mut state = self.state.lock();
        loop {
            if let Some(latest) = &state.latest {
                return Some(latest.family.clone());
            }
            if state.ended {
                return None;
            }
            self.demand(&mut state);
            self.changed.wait(&mut state);
        }
    }

    /// As of a survey that began after the call, shared with others who want the same; where that takes longer than
    /// [`DEADLINE`], as of the last one. `None` where the library is being closed.
    pub(super) fn renew(&self) -> Option<Arc<Family>> {
        self.renew_until(Instant::now() + DEADLINE)
    }

    /// As of a survey that began after the call; `None` where that takes longer than [`DEADLINE`], or the
    /// library is being closed.
    pub(super) fn fresh(&self) -> Option<Arc<Family>> {
        let until = Instant::now() + DEADLINE;
        let mut state = self.state.lock();
        let wanted = self.demand(&mut state);
        while state.over < wanted {
            if state.ended || self.bell.is_stopped() {
                return None;
            }
            if self.changed.wait_until(&mut state, until).timed_out() {
                return None;
            }
        }
        state.latest.as_ref().map(|survey| survey.family.clone())
    }

    fn renew_until(&self, deadline: Instant) -> Option<Arc<Family>> {
        let mut state = self.state.lock();
        let wanted = self.demand(&mut state);
        loop {
            if state.ended || self.bell.is_stopped() {
                return None;
            }
            let latest = state.latest.as_ref().map(|survey| survey.family.clone());
            match latest {
                Some(latest) if state.over >= wanted => return Some(latest),
                Some(latest) if Instant::now() >= deadline => {
                    if !std::mem::replace(&mut state.said_late, true) {
                        log::warn!(
                            "looking for children takes long: disks are opened for writing by what was last found"
                        );
                    }
                    return Some(latest);
                }
                Some(_) => drop(self.changed.wait_until(&mut state, deadline)),
                // There is nothing to go by.
                None => self.changed.wait(&mut state),
            }
        }
    }

    /// Asks for a survey that begins after the call; the bell is rung when it is over.
    pub(super) fn ask(&self) -> Asked {
        Asked(self.demand(&mut self.state.lock()))
    }

    /// What that one, or one after it, has found.
    pub(super) fn answer(&self, asked: Asked) -> Option<Arc<Survey>> {
        let state = self.state.lock();
        let is_over = state.over >= asked.0;
        state.latest.clone().filter(|_| is_over)
    }

    fn demand(&self, state: &mut State) -> u64 {
        state.asked = state.begun + 1;
        self.changed.notify_all();
        state.asked
    }

    /// Makes the surveys that are asked for, until the bell says stop.
    pub(super) fn run(&self, words: &OpenDisks) {
        let mut state = self.state.lock();
        while !self.bell.is_stopped() {
            if state.asked == state.begun {
                self.changed.wait(&mut state);
                continue;
            }
            state.begun = state.asked;
            let last = state.latest.clone();
            drop(state);
            let found = self.survey(last, words);
            state = self.state.lock();
            state.over = state.begun;
            if let Some(found) = found {
                state.latest = Some(Arc::new(found));
                state.said_late = false;
            }
            self.changed.notify_all();
            self.bell.ring();
        }
        state.ended = true;
        self.changed.notify_all();
    }

    /// To be called once the bell says stop: nobody waits any longer. Whether nobody looks any more, either;
    /// on a host that does not answer that cannot be waited for.
    pub(super) fn end(&self) -> bool {
        let until = Instant::now() + FAREWELL;
        let mut state = self.state.lock();
        self.changed.notify_all();
        while !state.ended {
            if self.changed.wait_until(&mut state, until).timed_out() {
                break;
            }
        }
        let ended = std::mem::replace(&mut state.ended, true);
        self.changed.notify_all();
        ended
    }

    /// Looks at the tree. `None` where the library is being closed.
    fn survey(&self, last: Option<Arc<Survey>>, words: &OpenDisks) -> Option<Survey> {
        // A panic, which has been told, must not end all surveys.
        let look = AssertUnwindSafe(|| self.look(last.clone(), words));
        let failed = catch_unwind(look).unwrap_or_else(|_| Err(io::Error::other("a panic")));
        failed.unwrap_or_else(|error| {
            let (files, mut family) = last.map_or_else(Default::default, |last| {
                (last.files.clone(), Family::clone(&last.family))
            });
            if !is_all(&family.unread) {
                log::error!("the directory cannot be searched for children: {error}");
                family.unread.insert(0, PathBuf::new());
            }
            Some(Survey {
                files,
                family: Arc::new(family),
            })
        })
    }

    /// As [`Families::survey`], where nothing fails.
    fn look(&self, last: Option<Arc<Survey>>, words: &OpenDisks) -> io::Result<Option<Survey>> {
        let Some(mut found) = self.tree.survey()? else {
            return Ok(None);
        };
        let before = last.as_ref().map_or(&[][..], |last| &last.family.unread);
        if let Some(warning) = warning(&found.unread, found.cut_off, before) {
            log::warn!("{warning}");
        }
        if found.cut_off && !is_all(&found.unread) {
            found.unread.insert(0, PathBuf::new());
        }
        let is_same = |last: &Survey| {
            let mut files = last.files.iter().zip(&found.files);
            last.files.len() == found.files.len()
                && last.family.unread == found.unread
                && files.all(|(last, now)| last.is_same_kin(now))
        };
        // Mostly nothing has changed.
        let family = match last.filter(|last| is_same(last)) {
            Some(last) => last.family.clone(),
            None => {
                let kin: Vec<Kin> = found.kin().collect();
                let mut family = Family::of(&kin, words.parents());
                family.unread = found.unread;
                Arc::new(family)
            }
        };
        Ok(Some(Survey {
            files: found.files,
            family,
        }))
    }
}

/// Whether all may be among what could not be looked into.
fn is_all(unread: &[PathBuf]) -> bool {
    (unread.first()).is_some_and(|first| first.as_os_str().is_empty())
}

/// What is to be said of what could not be looked into, where that is not the same as before.
fn warning(unread: &[PathBuf], cut_off: bool, before: &[PathBuf]) -> Option<String> {
    let stays = "what filesystems call free stays everywhere";
    if cut_off {
        return (!is_all(before)).then(|| {
            format!(
                "there are more than {} files and directories, and children of other disks may be among them: {stays}",
                LIMITS.entries
            )
        });
    }
    let first = unread
        .first()
        .filter(|first| Some(*first) != before.first())?;
    Some(format!(
        "{} cannot be looked into (it is closed to us, does not answer, or needs a vhdfs mount to), and may be, or \
         hold, a child of other disks: {stays}",
        shown(Path::new("."), first).display()
    ))
}

/// What a survey needs to know of the library.
struct Owner {
    disks: Arc<OpenDisks>,
    bell: Arc<Bell>,
}

impl Asker for Owner {
    fn is_over(&self) -> bool {
        self.bell.is_stopped()
    }

    fn open(&self, file: &Identity) -> Option<Lineage> {
        let disk = self.disks.get(file)?.disk()?;
        Some(Lineage {
            identity: disk.identity(),
            link: disk.parent_link().cloned().map(Arc::new),
        })
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
