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

use crate::disk::Disk;
use crate::error::{ErrorKind, OpenError, OpenProblem};
use crate::image;
use crate::storage::host::pin::Pin;
use crate::storage::host::pin::{Identity, Stamp};

/// How many files are remembered: some hundred bytes each.
const REMEMBERED: NonZeroUsize = NonZeroUsize::new(1 << 16).expect("not zero");

/// Of how many it is remembered what was said of them.
const SAID: NonZeroUsize = NonZeroUsize::new(1 << 12).expect("not zero");

/// After this, a file that the host failed to give us is looked at again though it looks the same.
const RETRY_AFTER: Duration = Duration::from_secs(10);

/// What is known of a file.
#[derive(Clone, Debug)]
pub(super) enum Known {
    /// It holds a disk.
    Disk(KnownDisk),
    /// It cannot be opened.
    Unopenable(Failure),
}

/// What is known of a disk.
#[derive(Clone, Copy, Debug)]
pub(super) struct KnownDisk {
    /// Its size in bytes.
    pub(super) size: u64,
    /// It can be read but must not be written.
    pub(super) frozen: bool,
}

impl KnownDisk {
    /// What an open disk tells.
    pub(super) fn of(disk: &Disk) -> Self {
        Self {
            size: disk.len(),
            frozen: false,
        }
    }
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

    /// Whether it may be otherwise though the file stays as it is.
    pub(super) fn may_pass(&self) -> bool {
        matches!(
            self.kind,
            ErrorKind::Io
                | ErrorKind::InUse
                | ErrorKind::NoSpace
                | ErrorKind::ParentMissing
                | ErrorKind::ParentMismatch
        )
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
    /// What has been logged.
    said: Mutex<LruCache<Stamp, String>>,
    contents: Mutex<Contents>,
}

#[derive(Debug)]
struct Contents {
    closed: LruCache<Identity, (Vec<Stamp>, u64)>,
    /// What guests of ours wrote to, as it was closed.
    written: LruCache<Identity, Stamp>,
    next: u64,
}

impl Probes {
    pub(super) fn new() -> Self {
        Self {
            known: Mutex::new(LruCache::new(REMEMBERED)),
            said: Mutex::new(LruCache::new(SAID)),
            contents: Mutex::new(Contents {
                closed: LruCache::new(REMEMBERED),
                written: LruCache::new(REMEMBERED),
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
        pin: impl FnOnce() -> io::Result<Pin>,
    ) -> Known {
        if let Some(found) = self.known.lock().get(stamp)
            && found.until.is_none_or(|until| Instant::now() < until)
        {
            return found.known.clone();
        }
        match probe(path, pin) {
            Ok(disk) => {
                let known = Known::Disk(disk);
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
    pub(super) fn freeze(&self, stamp: &Stamp, disk: KnownDisk) {
        let frozen = KnownDisk {
            frozen: true,
            ..disk
        };
        self.remember(stamp, Known::Disk(frozen));
    }

    /// Remembers and logs why the file cannot be opened; says nothing where it said the same of
    /// this very file already.
    pub(super) fn fail(&self, stamp: &Stamp, path: &Path, failure: Failure) {
        self.say(stamp, path, &failure.reason);
        self.remember(stamp, Known::Unopenable(failure));
    }

    /// Logs what is wrong with the file, unless the same was logged of this very file before.
    pub(super) fn say(&self, stamp: &Stamp, path: &Path, reason: &str) {
        let before = self.said.lock().put(*stamp, reason.to_owned());
        if before.as_deref() != Some(reason) {
            log::error!("{}: {reason}", path.display());
        }
    }

    fn remember(&self, stamp: &Stamp, known: Known) {
        // The bytes of a file stay what they are while its stamp does; the host's mood, and what
        // lies beside the file, do not.
        let passes = matches!(&known, Known::Unopenable(failure) if failure.may_pass());
        let until = passes.then(|| Instant::now() + RETRY_AFTER);
        self.known.lock().put(*stamp, Remembered { known, until });
    }

    /// A number for the content of the disk that is about to be opened, from the stamps of its own
    /// file and of its parents': the one it had when it was last closed, unless it has changed since.
    pub(super) fn content_at_open(&self, stamps: &[Stamp]) -> u64 {
        let mut contents = self.contents.lock();
        if let Some(own) = stamps.first()
            && let Some((closed, content)) = contents.closed.get(&own.identity)
            && closed == stamps
        {
            return *content;
        }
        contents.next += 1;
        contents.next
    }

    /// Remembers that a guest wrote to the file, which looks like this now that it is closed.
    pub(super) fn written_so(&self, stamp: Option<&Stamp>) {
        if let Some(stamp) = stamp {
            self.contents.lock().written.put(stamp.identity, *stamp);
        }
    }

    /// Whether guests of ours have made of the file what it is.
    pub(super) fn is_ours(&self, stamp: &Stamp) -> bool {
        self.contents.lock().written.peek(&stamp.identity) == Some(stamp)
    }

    /// A number for content that nobody has seen yet.
    pub(super) fn new_content(&self) -> u64 {
        let mut contents = self.contents.lock();
        contents.next += 1;
        contents.next
    }

    /// Remembers how a file looks now that it has been closed with that content.
    pub(super) fn content_at_close(&self, stamps: Vec<Stamp>, content: u64) {
        if let Some(own) = stamps.first() {
            let identity = own.identity;
            self.contents.lock().closed.put(identity, (stamps, content));
        }
    }
}

/// Looks at the file that `pin` gives.
fn probe(path: &Path, pin: impl FnOnce() -> io::Result<Pin>) -> Result<KnownDisk, OpenError> {
    let pinned = pin().map_err(|source| {
        OpenError::new(
            path,
            OpenProblem::Io {
                action: "open the file",
                source,
            },
        )
    })?;
    let file = pinned.glance()?;
    let probe = image::glance(&file, path).map_err(|problem| OpenError::new(path, problem))?;
    Ok(KnownDisk {
        size: probe.virtual_size,
        frozen: probe.not_writable.is_some(),
    })
}
