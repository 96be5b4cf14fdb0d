//! What the handles of one file have in common, and how one of them has the file.
//!
//! A handle that may attach or compact *owns* the file from its opening: nobody else writes to it, in
//! whichever process. Once it has the disk attached it owns the file no longer, for there is nothing that
//! it would read: it [marks](Attachment) the file as attached, which keeps all away but one who
//! compacts. To compact, this handle or another one owns the file again, for as long as it takes, and with
//! it opens the disk anew: no block table is kept while somebody else may change it.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, LazyLock, Weak};

use parking_lot::Mutex;

use super::error::*;
use super::job::Job;
use crate::disk::{Disk, FoundParent, HostParents, OpenOptions, ParentSource};
use crate::error::ParentProblem;
use crate::format::parent::{ParentLink, PathKind};
use crate::storage::host::{FileKey, HostFile, HostOptions, Sharing};

/// What the handles of one file have in common, in this process.
#[derive(Debug)]
pub(super) struct Shared {
    file: FileKey,
    pub(super) state: Mutex<State>,
}

#[derive(Debug, Default)]
pub(super) struct State {
    is_owned: bool,
    /// The disk, while somebody owns the file.
    disk: Weak<Disk>,
    pub(super) attachment: Option<Attachment>,
    /// The operation that runs, or the last one.
    pub(super) job: Option<Arc<Job>>,
    /// The handle that began it.
    pub(super) begun_by: u64,
}

/// Handles, as [`State`] tells them apart.
pub(super) type HandleId = u64;

impl State {
    pub(super) fn running(&self) -> Option<&Arc<Job>> {
        self.job.as_ref().filter(|job| job.is_running())
    }

    /// Makes `job`, of this handle, the one that runs, or the last one.
    ///
    /// # Errors
    /// `ERROR_VHD_INVALID_STATE` while another one runs.
    pub(super) fn begin(&mut self, job: &Arc<Job>, handle: HandleId) -> Result<(), Win32Error> {
        if self.running().is_some() {
            return Err(ERROR_VHD_INVALID_STATE);
        }
        self.begun_by = handle;
        let last = self.job.replace(Arc::clone(job));
        if let Some(last) = last {
            // It has ended, and whoever waits for it is being told.
            last.wait(None);
        }
        Ok(())
    }
}

static FILES: LazyLock<Mutex<HashMap<FileKey, Weak<Shared>>>> = LazyLock::new(Mutex::default);

impl Shared {
    /// That of `file`.
    pub(super) fn of(file: FileKey) -> Arc<Self> {
        let mut files = FILES.lock();
        if let Some(shared) = files.get(&file).and_then(Weak::upgrade) {
            return shared;
        }
        files.retain(|_, shared| shared.strong_count() > 0);
        let shared = Arc::new(Self {
            file,
            state: Mutex::default(),
        });
        files.insert(file, Arc::downgrade(&shared));
        shared
    }

    /// The disk as a handle of this process has it open.
    pub(super) fn open_disk(&self) -> Option<Arc<Disk>> {
        self.state.lock().disk.upgrade()
    }

    /// That `file`, which was opened by its name, is still the one.
    fn check(&self, file: &HostFile) -> Result<(), Win32Error> {
        let key = file.key().map_err(|error| Win32Error::host(&error))?;
        match key == self.file {
            true => Ok(()),
            false => Err(ERROR_FILE_NOT_FOUND),
        }
    }
}

/// How a handle has its file open.
#[derive(Clone, Copy, Debug)]
pub(super) struct Opening {
    /// For writing.
    pub(super) write: bool,
    /// Without its parents.
    pub(super) is_alone: bool,
    /// Without the parents' relative paths.
    pub(super) ignore_relative: bool,
}

impl Opening {
    /// Where parents of the disk at `path` are looked for.
    pub(super) fn parents(self, path: &Path) -> Parents {
        Parents {
            host: HostParents::beside(path, &[]),
            ignore_relative: self.ignore_relative,
        }
    }
}

/// The host's files, perhaps without what relative paths lead to.
#[derive(Debug)]
pub(super) struct Parents {
    host: HostParents,
    ignore_relative: bool,
}

impl ParentSource for Parents {
    fn find(
        &self,
        child: &Path,
        link: &ParentLink,
        lock: bool,
    ) -> Result<FoundParent, ParentProblem> {
        if !self.ignore_relative {
            return self.host.find(child, link, lock);
        }
        let mut link = link.clone();
        link.paths.retain(|path| path.kind != PathKind::Relative);
        self.host.find(child, &link, lock)
    }

    fn opened(&self, key: FileKey, disk: &Arc<Disk>) {
        self.host.opened(key, disk);
    }
}

/// The file, as one has it who keeps others off it. Dropping it lets them have it.
#[derive(Debug)]
pub(super) struct Ownership {
    shared: Arc<Shared>,
    /// The disk, unless it was opened without its parents; then the file.
    disk: Option<Arc<Disk>>,
    file: Option<HostFile>,
}

impl Ownership {
    /// Of the file at `path`, which must be that of `shared`.
    ///
    /// # Errors
    /// `ERROR_SHARING_VIOLATION`, and what opening a disk fails with.
    pub(super) fn take(
        shared: &Arc<Shared>,
        path: &Path,
        opening: Opening,
    ) -> Result<Self, Win32Error> {
        let file = match opening.write {
            true => HostFile::open_shared(path, Sharing::Compact),
            false => HostFile::open(path, &reading(true)),
        };
        let file = file.map_err(|error| logged(&error))?;
        shared.check(&file)?;
        let mut owned = Self::begin(shared)?;
        if opening.is_alone {
            owned.file = Some(file);
            return Ok(owned);
        }
        let options = OpenOptions {
            read_only: !opening.write,
            lock: true,
            // Windows does not attach files with holes.
            punch_holes: false,
        };
        let parents = opening.parents(path);
        let disk = Disk::open_storage_with(Arc::new(file), path, &options, &parents);
        let disk = disk.map_err(|error| logged(&error))?;
        shared.state.lock().disk = Arc::downgrade(&disk);
        owned.disk = Some(disk);
        Ok(owned)
    }

    fn begin(shared: &Arc<Shared>) -> Result<Self, Win32Error> {
        // Where the host has no locks, this alone keeps the handles of this process apart.
        if std::mem::replace(&mut shared.state.lock().is_owned, true) {
            return Err(ERROR_SHARING_VIOLATION);
        }
        Ok(Self {
            shared: Arc::clone(shared),
            disk: None,
            file: None,
        })
    }

    /// The disk to attach or compact.
    ///
    /// # Errors
    /// `ERROR_VHD_INVALID_STATE` where it was opened without its parents.
    pub(super) fn disk(&self) -> Result<Arc<Disk>, Win32Error> {
        self.disk.clone().ok_or(ERROR_VHD_INVALID_STATE)
    }
}

impl Drop for Ownership {
    fn drop(&mut self) {
        if let Some(disk) = self.disk.take()
            && let Err(error) = disk.close()
        {
            log::error!("{}: {error} while closing", disk.path().display());
        }
        // Others have the file, its lock with it, before they are told so.
        drop(self.file.take());
        let mut state = self.shared.state.lock();
        state.is_owned = false;
        state.disk = Weak::new();
    }
}

/// The mark of a file whose disk is attached, until it is dropped.
#[derive(Debug)]
pub(super) struct Attachment {
    /// The handle that has attached it.
    pub(super) handle: HandleId,
    _mark: HostFile,
    /// Kept from being written to.
    _parent: Option<Arc<Disk>>,
}

impl Attachment {
    /// Marks the file at `path`, which the handle owns meanwhile.
    ///
    /// # Errors
    /// `ERROR_VHD_INVALID_STATE` where another process has attached it.
    pub(super) fn new(
        shared: &Shared,
        path: &Path,
        disk: &Disk,
        handle: HandleId,
    ) -> Result<Self, Win32Error> {
        let mark = HostFile::open_shared(path, Sharing::Attached);
        let mark = mark.map_err(|error| match logged(&error) {
            ERROR_SHARING_VIOLATION => ERROR_VHD_INVALID_STATE,
            code => code,
        })?;
        shared.check(&mark)?;
        Ok(Self {
            handle,
            _mark: mark,
            _parent: disk.parent().cloned(),
        })
    }
}

/// How a file is opened to be read.
pub(super) fn reading(lock: bool) -> HostOptions {
    HostOptions {
        read_only: true,
        lock,
        no_follow: false,
    }
}
