//! When a host sync is needed, and what a failed one means.

use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;

use crate::error::DiskError;
use crate::storage::Storage;
use crate::units::FileRange;

/// Tracks whether anything is unsynced, lets concurrent flushes share a sync, and remembers the
/// failure that makes further changes unsafe.
#[derive(Debug)]
pub(crate) struct Durability {
    /// Something was written since the last sync began.
    dirty: AtomicBool,
    /// Held across the host sync: who waits for it finds either that its own writes are covered
    /// (`dirty` clear) or that it has to sync itself.
    sync_lock: Mutex<()>,
    poisoned: AtomicBool,
    reason: Mutex<Option<String>>,
}

impl Durability {
    /// Of a file whose earlier writes, another process's perhaps, may still be unsynced.
    pub(crate) fn new() -> Self {
        Self {
            dirty: AtomicBool::new(true),
            sync_lock: Mutex::new(()),
            poisoned: AtomicBool::new(false),
            reason: Mutex::new(None),
        }
    }

    /// Notes a write that is complete. Cheap: after the first one it is a load.
    pub(crate) fn note_write(&self) {
        if !self.dirty.load(Ordering::SeqCst) {
            self.dirty.store(true, Ordering::SeqCst);
        }
    }

    /// Syncs `storage` if anything was written. `before` runs when the sync begins, and `after`
    /// gets its result once the sync is done; neither runs if nothing was to be done.
    ///
    /// # Errors
    /// [`DiskError::Poisoned`] after an earlier failure; a failure of this sync poisons.
    pub(crate) fn sync<T>(
        &self,
        storage: &dyn Storage,
        before: impl FnOnce() -> T,
        after: impl FnOnce(T) -> Result<(), DiskError>,
    ) -> Result<(), DiskError> {
        let _sync = self.sync_lock.lock();
        self.check()?;
        if !self.dirty.swap(false, Ordering::SeqCst) {
            return Ok(());
        }
        let begun = before();
        match storage.sync() {
            Ok(()) => after(begun),
            Err(error) => Err(self.poison("sync the file", error)),
        }
    }

    /// Has `storage` write `range` back. Not beside a sync: a host tells of a failed write once, and that must
    /// be the one who promised.
    ///
    /// # Errors
    /// As [`Self::sync`].
    pub(crate) fn write_back(
        &self,
        storage: &dyn Storage,
        range: FileRange,
    ) -> Result<(), DiskError> {
        let _sync = self.sync_lock.lock();
        self.check()?;
        (storage.write_back(range)).map_err(|error| self.poison("write back a copy", error))
    }

    /// Remembers that `action` failed in a way that leaves the file's state unknown.
    pub(crate) fn poison(&self, action: &'static str, source: std::io::Error) -> DiskError {
        self.reason
            .lock()
            .get_or_insert_with(|| format!("cannot {action}: {source}"));
        self.poisoned.store(true, Ordering::SeqCst);
        DiskError::Io { action, source }
    }

    /// Fails after a [`Self::poison`].
    pub(crate) fn check(&self) -> Result<(), DiskError> {
        if self.poisoned.load(Ordering::SeqCst) {
            let reason = self.reason.lock().clone();
            return Err(DiskError::Poisoned(reason.unwrap_or_default()));
        }
        Ok(())
    }
}
