//! Directories that the kernel has open.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use vhdfs::library::{Directory, Library, LibraryError, NodeId};

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
