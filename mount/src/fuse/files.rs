//! What the kernel has open, and how that ends.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use fuser::Errno;
use parking_lot::Mutex;
use vhdfs::error::{DiskError, ErrorKind, chain};
use vhdfs::library::{Directory, DiskHandle, Library, LibraryError, NodeId};

use super::errno;
use super::handles::Handles;

/// An open disk.
pub(super) struct OpenFile {
    pub(super) handle: DiskHandle,
    /// The disk's size in bytes.
    pub(super) len: u64,
    /// The kinds of failure that have been logged.
    told: Mutex<Vec<ErrorKind>>,
}

impl OpenFile {
    pub(super) fn new(handle: DiskHandle) -> Self {
        let len = handle.disk().len();
        Self {
            handle,
            len,
            told: Mutex::default(),
        }
    }

    /// The answer to a request that failed. The first failure of each kind is logged as an error,
    /// further ones of a handle are not worth a full log.
    pub(super) fn fail(&self, action: &str, offset: u64, error: &DiskError) -> Errno {
        let kind = error.kind();
        let mut told = self.told.lock();
        let level = match told.contains(&kind) {
            false => log::Level::Error,
            true => log::Level::Debug,
        };
        if level == log::Level::Error {
            told.push(kind);
        }
        drop(told);
        let text = chain(error);
        log::log!(
            level,
            "{}: {action} at {offset}: {text}",
            self.handle.path().display()
        );
        errno::of_disk(error)
    }
}

/// Ends service while the kernel still has disks open.
pub(crate) struct Brake {
    pub(super) library: Arc<Library>,
    pub(super) files: Arc<Handles<OpenFile>>,
}

impl Brake {
    /// Lets the requests that are being served finish and refuses all others, so that no disk
    /// changes any more. Waits, but not for ever.
    pub(crate) fn stop(&self) {
        const PATIENCE: Duration = Duration::from_secs(10);
        self.files.close();
        let begun = Instant::now();
        while self.library.status().iter().any(|disk| disk.handles > 0) {
            if begun.elapsed() > PATIENCE {
                log::error!("requests are still being served; their disks may not be clean");
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// An open directory, as it was when it was opened or rewound.
pub(super) struct OpenDirectory {
    node: NodeId,
    listing: Mutex<Arc<Directory>>,
    begun: AtomicBool,
}

impl OpenDirectory {
    pub(super) fn new(node: NodeId, listing: Directory) -> Self {
        Self {
            node,
            listing: Mutex::new(Arc::new(listing)),
            begun: AtomicBool::new(false),
        }
    }

    pub(super) fn node(&self) -> NodeId {
        self.node
    }

    /// The listing to go on with at `offset`; read anew when the reader goes back to the start.
    pub(super) fn listing(
        &self,
        library: &Library,
        offset: u64,
    ) -> Result<Arc<Directory>, LibraryError> {
        if offset == 0 && self.begun.swap(true, Ordering::Relaxed) {
            *self.listing.lock() = Arc::new(library.read_directory(self.node)?);
        }
        Ok(self.listing.lock().clone())
    }
}
