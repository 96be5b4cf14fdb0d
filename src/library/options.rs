//! How a library works.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::Duration;

use crate::compact::IdlePolicy;
use crate::storage::host::{PUNCH_BY_DEFAULT, QUIET_TIME};

/// How a [`Library`](super::Library) works.
#[derive(Clone, Debug)]
pub struct LibraryOptions {
    /// Open every disk for reading alone. No background compaction then.
    pub read_only: bool,
    /// Give freed parts of live blocks back to the host, which makes the backing files sparse.
    pub punch_holes: bool,
    /// How many disks stay open. Those with handles do in any case, and may be more.
    pub max_open: NonZeroUsize,
    /// How long a disk without handles stays open, for the next one to come.
    pub linger: Duration,
    /// How idle disks are compacted in the background; `None` for not at all.
    pub compact: Option<IdlePolicy>,
    /// How long a file that no guest has opened for writing must not have changed before background work
    /// does. It is for programs that close a file between two pieces of it, and for hosts that cannot tell
    /// who has a file open: others are noticed as long as they have it open.
    pub quiet_time: Duration,
    /// Further directories in which, and below which, parents of differencing disks may be.
    pub parent_dirs: Vec<PathBuf>,
    /// No disks are over those of the directory but the ones that are found below it. Without that word,
    /// background work leaves what filesystems call free to a disk over which another one may be that would
    /// still be accepted: to a VHD always, to a VHDX until somebody has written to it.
    pub no_other_children: bool,
}

impl Default for LibraryOptions {
    /// Read-write, punching holes but on Windows, no background compaction, and at most 256 disks
    /// open, or a quarter of what this process may have open if that is less.
    fn default() -> Self {
        const MOST: NonZeroUsize = NonZeroUsize::new(256).expect("not zero");
        #[cfg(unix)]
        let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
        // As many as there is memory for.
        #[cfg(windows)]
        let limit: Option<u64> = None;
        let quarter = limit.and_then(|limit| usize::try_from(limit / 4).ok());
        let max_open = quarter
            .and_then(NonZeroUsize::new)
            .map_or(MOST, |some| some.min(MOST));
        Self {
            read_only: false,
            punch_holes: PUNCH_BY_DEFAULT,
            max_open,
            linger: Duration::from_secs(5),
            compact: None,
            quiet_time: QUIET_TIME,
            parent_dirs: Vec::new(),
            no_other_children: false,
        }
    }
}
