//! What is known of files that are not open: their disk's size, or why they have none.
//!
//! A file is looked at once for each of its stamps, so listing thousands of disks again costs no
//! more than their attributes; what is remembered is bounded. Looking takes no lock.

use std::io;
use std::num::NonZeroUsize;
use std::path::Path;
use std::time::{Duration, Instant};

use lru::LruCache;
use parking_lot::Mutex;

use super::host_dir::{Identity, Pinned, Stamp};
use crate::error::{ErrorKind, OpenError, OpenProblem};
use crate::image;
use crate::storage::host::{HostFile, HostOptions};

/// How many files are remembered: some hundred bytes each.
const REMEMBERED: NonZeroUsize = NonZeroUsize::new(1 << 16).expect("not zero");

/// After this, a file that the host failed to give us is looked at again though it looks the same.
const RETRY_AFTER: Duration = Duration::from_secs(10);

/// What is known of a file.
#[derive(Clone, Debug)]
pub(super) enum Known {
    /// It holds a disk of `size` bytes; `frozen` where it can be read but must not be written.
    Disk { size: u64, frozen: bool },
    /// It cannot be opened.
    Unopenable(Failure),
}

/// Why a file cannot be opened as a disk.
#[derive(Clone, Debug)]
pub(super) struct Failure {
    pub(super) reason: String,
    pub(super) kind: ErrorKind,
}

impl Failure {
    /// `error` without its path, which may be one that means nothing to the reader.
    pub(super) fn of(error: &OpenError) -> Self {
        Self {
            reason: error.problem().to_string(),
            kind: error.kind(),
        }
    }
}

#[derive(Debug)]
struct Remembered {
    known: Known,
    until: Option<Instant>,
}

/// The memory of all files looked at, and of the content that each held when it was closed.
#[derive(Debug)]
pub(super) struct Probes {
    known: Mutex<LruCache<Stamp, Remembered>>,
    contents: Mutex<Contents>,
}

#[derive(Debug)]
struct Contents {
    closed: LruCache<Identity, (Stamp, u64)>,
    next: u64,
}

impl Probes {
    pub(super) fn new() -> Self {
        Self {
            known: Mutex::new(LruCache::new(REMEMBERED)),
            contents: Mutex::new(Contents {
                closed: LruCache::new(REMEMBERED),
                next: 0,
            }),
        }
    }

    /// What is known of the file with this `stamp`; looks at it, as `pin` gives it, where that is
    /// nothing yet. `path` is for the log.
    pub(super) fn look(
        &self,
        stamp: &Stamp,
        path: &Path,
        pin: impl FnOnce() -> io::Result<Pinned>,
    ) -> Known {
        if let Some(found) = self.known.lock().get(stamp)
            && found.until.is_none_or(|until| Instant::now() < until)
        {
            return found.known.clone();
        }
        match probe(path, pin) {
            Ok(known) => {
                self.remember(stamp, known.clone());
                known
            }
            Err(error) => {
                let failure = Failure::of(&error);
                self.fail(stamp, path, failure.clone());
                Known::Unopenable(failure)
            }
        }
    }

    /// Remembers that the disk can only be opened for reading.
    pub(super) fn freeze(&self, stamp: &Stamp, size: u64) {
        self.remember(stamp, Known::Disk { size, frozen: true });
    }

    /// Remembers and logs why the file cannot be opened; says nothing where it said the same of
    /// this very file already.
    pub(super) fn fail(&self, stamp: &Stamp, path: &Path, failure: Failure) {
        let said = self.known.lock().peek(stamp).is_some_and(|found| {
            matches!(&found.known, Known::Unopenable(known) if known.reason == failure.reason)
        });
        if !said {
            log::error!("{}: {}", path.display(), failure.reason);
        }
        self.remember(stamp, Known::Unopenable(failure));
    }

    fn remember(&self, stamp: &Stamp, known: Known) {
        // The bytes of a file stay what they are while its stamp does; the host's mood does not.
        let passes = matches!(&known, Known::Unopenable(failure) if failure.kind == ErrorKind::Io);
        let until = passes.then(|| Instant::now() + RETRY_AFTER);
        self.known.lock().put(*stamp, Remembered { known, until });
    }

    /// A number for the content of the file that is about to be opened: the one it had when it was
    /// last closed, unless it has changed since.
    pub(super) fn content_at_open(&self, stamp: &Stamp) -> u64 {
        let mut contents = self.contents.lock();
        if let Some((closed, content)) = contents.closed.get(&stamp.identity)
            && closed == stamp
        {
            return *content;
        }
        contents.next += 1;
        contents.next
    }

    /// Remembers how a file looks now that it has been closed with that content.
    pub(super) fn content_at_close(&self, stamp: &Stamp, content: u64) {
        self.contents
            .lock()
            .closed
            .put(stamp.identity, (*stamp, content));
    }
}

/// Looks at the file that `pin` gives.
fn probe(path: &Path, pin: impl FnOnce() -> io::Result<Pinned>) -> Result<Known, OpenError> {
    let pinned = pin().map_err(|source| {
        OpenError::new(
            path,
            OpenProblem::Io {
                action: "open the file",
                source,
            },
        )
    })?;
    let options = HostOptions {
        read_only: true,
        lock: false,
        no_follow: false,
    };
    let file = HostFile::open(&pinned.path(), &options)?;
    let probe = image::probe(&file, path).map_err(|problem| OpenError::new(path, problem))?;
    Ok(Known::Disk {
        size: probe.virtual_size,
        frozen: probe.not_writable.is_some(),
    })
}
