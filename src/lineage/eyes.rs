//! Looks into disk files, once for each state of theirs.

use std::ffi::OsStr;
use std::io;
use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::Arc;

use lru::LruCache;
use parking_lot::Mutex;

use super::family::Lineage;
use crate::error::{OpenError, OpenProblem};
use crate::image;
use crate::storage::host::pin::{Identity, Pin, Stamp, Stat};

/// How many files are remembered at least: some hundred bytes each.
const REMEMBERED: NonZeroUsize = NonZeroUsize::new(1 << 16).expect("not zero");

/// Who wants to know.
pub(crate) trait Asker: Send + Sync {
    /// Whether the answer is of no use any more.
    fn is_over(&self) -> bool;

    /// Which disk a file is that the asker has open, whose headers may be about to change.
    fn open(&self, file: &Identity) -> Option<Lineage>;
}

/// What is known of the files that were seen.
pub(super) struct Eyes {
    pub(super) asker: Arc<dyn Asker>,
    /// `None` of a file that is no disk, or whose headers mean nothing.
    known: Mutex<LruCache<Stamp, Option<Lineage>>>,
}

impl Eyes {
    pub(super) fn new(asker: Arc<dyn Asker>) -> Self {
        Self {
            asker,
            known: Mutex::new(LruCache::unbounded()),
        }
    }

    /// What is known without looking; `Some(None)` where that is that it is no disk.
    pub(super) fn known(&self, stat: &Stat) -> Option<Option<Lineage>> {
        match self.asker.open(&stat.identity()) {
            Some(lineage) => Some(Some(lineage)),
            None => self.known.lock().get(&stat.stamp()).cloned(),
        }
    }

    /// Which disk the file `name` in `directory` is, which looked like `stat`; `None` of what is no disk, and
    /// can be opened by nobody, whatever it was once.
    ///
    /// # Errors
    /// What the host answers, which it may not the next time.
    pub(super) fn look(
        &self,
        directory: &Pin,
        name: &OsStr,
        stat: &Stat,
    ) -> io::Result<Option<Lineage>> {
        let pinned = directory.child(name)?;
        let file = pinned.glance().map_err(OpenError::into_host)?;
        let found = match image::identify(&file, Path::new(name)) {
            Ok(found) => Some(Lineage {
                identity: found.identity,
                link: found.parent.map(Arc::new),
            }),
            Err(OpenProblem::Io { source, .. })
                if source.kind() != io::ErrorKind::UnexpectedEof =>
            {
                return Err(source);
            }
            Err(_) => None,
        };
        // Another file may have taken its place, or somebody be writing to it.
        if pinned.stat().is_ok_and(|now| now.stamp() == stat.stamp()) {
            self.known.lock().put(stat.stamp(), found.clone());
        }
        Ok(found)
    }

    /// Forgets what was not seen for longest, of a tree with `files` disk files: what changes is seen in many
    /// states, of which one is of use.
    pub(super) fn forget(&self, files: usize) {
        let most = REMEMBERED.saturating_add(files.saturating_mul(2));
        let mut known = self.known.lock();
        while known.len() > most.get() {
            known.pop_lru();
        }
    }
}
