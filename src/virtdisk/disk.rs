//! Open virtual disks: what a handle may do, and what the handles of one file share.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock, Weak};
use std::thread;
#[cfg(any(test, not(windows)))]
use std::time::Duration;

use parking_lot::Mutex;

use super::compaction::carry_out;
use super::constants::*;
use super::error::*;
use super::job::{Job, VirtualDiskProgress, Waiter};
use super::rights::Rights;
use crate::compact::CompactOptions;
use crate::disk::{Disk, HostParents, OpenOptions};
use crate::error::{FormatError, OpenProblem};
use crate::format::{DiskType, Format};
use crate::image::{self, Identified};
use crate::storage::host::{FileKey, HostFile, HostOptions};

/// What the handles of one file have in common, in this process.
#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Whether there is a handle that keeps others off.
    is_owned: bool,
    is_attached: bool,
    /// The disk of that handle.
    disk: Weak<Disk>,
    /// The operation that runs, or the last one.
    job: Option<Arc<Job>>,
}

impl State {
    fn running(&self) -> Option<&Arc<Job>> {
        self.job.as_ref().filter(|job| job.is_running())
    }

    /// Makes `job` the one that runs, or the last one.
    ///
    /// # Errors
    /// `ERROR_VHD_INVALID_STATE` while another one runs.
    fn begin(&mut self, job: &Arc<Job>) -> Result<(), Win32Error> {
        if self.running().is_some() {
            return Err(ERROR_VHD_INVALID_STATE);
        }
        let last = self.job.replace(Arc::clone(job));
        if let Some(last) = last {
            // It has ended, and whoever waits for it is being told.
            last.wait(None);
        }
        Ok(())
    }
}

static FILES: LazyLock<Mutex<HashMap<FileKey, Weak<Shared>>>> = LazyLock::new(Mutex::default);

fn shared_of(file: FileKey) -> Arc<Shared> {
    let mut files = FILES.lock();
    if let Some(shared) = files.get(&file).and_then(Weak::upgrade) {
        return shared;
    }
    files.retain(|_, shared| shared.strong_count() > 0);
    let shared = Arc::new(Shared::default());
    files.insert(file, Arc::downgrade(&shared));
    shared
}

/// A handle of an open virtual disk. Dropping it closes it.
#[derive(Debug)]
pub struct VirtualDisk {
    pub(super) rights: Rights,
    pub(super) path: PathBuf,
    /// Whether parents are not to be looked for.
    pub(super) is_alone: bool,
    shared: Arc<Shared>,
    /// The file, to ask what it is; `None` once it is closed.
    file: Mutex<Option<Arc<HostFile>>>,
    /// The disk, of a handle that keeps others off, if it can be used as one.
    disk: Mutex<Option<Arc<Disk>>>,
    is_owner: bool,
}

impl VirtualDisk {
    /// Opens the file at `path`.
    pub(super) fn open(
        storage_type: &VirtualStorageType,
        path: &Path,
        rights: Rights,
        is_alone: bool,
    ) -> Result<Self, Win32Error> {
        let look =
            HostFile::open(path, &host_options(false, false)).map_err(|error| logged(&error))?;
        let identified = image::identify(&look, path);
        let identified = expected(storage_type, path, identified)?;
        let is_child = identified.parent.is_some();
        let mut handle = Self {
            rights,
            path: path.to_owned(),
            is_alone: is_alone && is_child,
            shared: shared_of(look.key().map_err(|error| Win32Error::host(&error))?),
            file: Mutex::new(Some(Arc::new(look))),
            disk: Mutex::default(),
            is_owner: false,
        };
        if !rights.owns() {
            handle.look()?;
            return Ok(handle);
        }
        let write = rights.writes && (rights.rw_depth > 0 || !is_child);
        handle.own(write)?;
        Ok(handle)
    }

    /// Opens the disk, and keeps others off it.
    fn own(&mut self, write: bool) -> Result<(), Win32Error> {
        let file = HostFile::open(&self.path, &host_options(write, true));
        let file = Arc::new(file.map_err(|error| logged(&error))?);
        {
            let mut state = self.shared.state.lock();
            if std::mem::replace(&mut state.is_owned, true) {
                return Err(ERROR_SHARING_VIOLATION);
            }
        }
        // From here on closing this handle gives that up again.
        self.is_owner = true;
        *self.file.get_mut() = Some(Arc::clone(&file));
        if self.is_alone {
            self.look()?;
            return Ok(());
        }
        let options = OpenOptions {
            read_only: !write,
            lock: true,
            // Windows does not attach files with holes.
            punch_holes: false,
        };
        let parents = HostParents::beside(&self.path, &[]);
        let disk = Disk::open_storage_with(file, &self.path, &options, &parents);
        let disk = disk.map_err(|error| logged(&error))?;
        self.shared.state.lock().disk = Arc::downgrade(&disk);
        *self.disk.get_mut() = Some(disk);
        Ok(())
    }

    /// The file, unless the handle was closed.
    pub(super) fn file(&self) -> Result<Arc<HostFile>, Win32Error> {
        self.file.lock().clone().ok_or(ERROR_INVALID_HANDLE)
    }

    /// The disk as a handle of this process has it open.
    pub(super) fn open_disk(&self) -> Option<Arc<Disk>> {
        self.shared.state.lock().disk.upgrade()
    }

    pub(super) fn is_attached(&self) -> bool {
        self.shared.state.lock().is_attached
    }

    /// The disk to attach or compact.
    fn own_disk(&self) -> Result<Arc<Disk>, Win32Error> {
        let disk = self.disk.lock().clone();
        // There is none, too, once the handle is closed.
        self.file()?;
        disk.ok_or(ERROR_VHD_INVALID_STATE)
    }

    pub(super) fn attach(&self, waiter: Option<Box<dyn Waiter>>) -> Result<(), Win32Error> {
        if !self.rights.attach {
            return Err(ERROR_ACCESS_DENIED);
        }
        let _disk = self.own_disk()?;
        let mut state = self.shared.state.lock();
        self.file()?;
        if state.is_attached {
            return Err(ERROR_VHD_INVALID_STATE);
        }
        // There is nothing to wait for, but whoever waits is told.
        let job = Arc::new(Job::new(waiter.as_ref().map(|waiter| waiter.key())));
        state.begin(&job)?;
        state.is_attached = true;
        drop(state);
        let Some(mut waiter) = waiter else {
            job.end(ERROR_SUCCESS, None);
            return Ok(());
        };
        waiter.begin();
        job.end(ERROR_SUCCESS, Some(waiter));
        Err(ERROR_IO_PENDING)
    }

    pub(super) fn detach(&self) -> Result<(), Win32Error> {
        if !self.rights.detach {
            return Err(ERROR_ACCESS_DENIED);
        }
        self.file()?;
        let mut state = self.shared.state.lock();
        if !std::mem::take(&mut state.is_attached) {
            return Err(ERROR_VHD_INVALID_STATE);
        }
        let job = state.job.clone();
        drop(state);
        stop(job);
        Ok(())
    }

    pub(super) fn compact(
        &self,
        scan: bool,
        move_blocks: bool,
        waiter: Option<Box<dyn Waiter>>,
    ) -> Result<(), Win32Error> {
        if !self.rights.metaops {
            return Err(ERROR_ACCESS_DENIED);
        }
        let disk = self.own_disk()?;
        if disk.is_read_only() {
            return Err(ERROR_ACCESS_DENIED);
        }
        if disk.geometry().disk_type == DiskType::Fixed {
            return Err(ERROR_VHD_INVALID_TYPE);
        }
        let job = Arc::new(Job::new(waiter.as_ref().map(|waiter| waiter.key())));
        let fs_aware = self.begin(&job)?;
        let options = CompactOptions {
            scan,
            move_blocks,
            fs_aware,
            ..CompactOptions::default()
        };
        let Some(mut waiter) = waiter else {
            let status = carry_out(disk, options, &job.control);
            job.end(status, None);
            return status.into_result();
        };
        waiter.begin();
        let started = thread::Builder::new()
            .name("vhdfs-compact".to_owned())
            .spawn({
                let job = Arc::clone(&job);
                move || {
                    let status = carry_out(disk, options, &job.control);
                    job.end(status, Some(waiter));
                }
            });
        if started.is_err() {
            job.end(ERROR_NOT_ENOUGH_MEMORY, None);
            return Err(ERROR_NOT_ENOUGH_MEMORY);
        }
        Err(ERROR_IO_PENDING)
    }

    /// Makes `job` the one that runs; says whether the disk is attached.
    fn begin(&self, job: &Arc<Job>) -> Result<bool, Win32Error> {
        let mut state = self.shared.state.lock();
        // Not beside a thread that closes the handle: that waits for what runs by then.
        self.file()?;
        state.begin(job)?;
        Ok(state.is_attached)
    }

    pub(super) fn progress(&self, key: usize) -> Result<VirtualDiskProgress, Win32Error> {
        self.file()?;
        let job = self.shared.state.lock().job.clone();
        let meant = job.filter(|job| job.has_key(key));
        Ok(meant.ok_or(ERROR_INVALID_PARAMETER)?.progress())
    }

    /// Asks the operation that runs to stop, if it is the one with `key`; with none, whichever runs.
    pub(super) fn cancel(&self, key: Option<usize>) -> Result<(), Win32Error> {
        self.file()?;
        let state = self.shared.state.lock();
        let running = state.running().filter(|_| self.is_owner);
        let meant = running.filter(|job| key.is_none_or(|key| job.has_key(key)));
        meant.ok_or(ERROR_NOT_FOUND)?.control.cancel();
        Ok(())
    }

    /// Waits until no operation runs, for `timeout` at most; says whether none does.
    #[cfg(any(test, not(windows)))]
    pub(super) fn wait(&self, timeout: Option<Duration>) -> bool {
        let job = self.shared.state.lock().job.clone();
        job.is_none_or(|job| job.wait(timeout))
    }

    /// Ends what runs, detaches the disk, and closes the file.
    pub(super) fn close(&self) {
        let Some(file) = self.file.lock().take() else {
            return;
        };
        drop(file);
        if !self.is_owner {
            return;
        }
        let mut state = self.shared.state.lock();
        state.is_attached = false;
        let job = state.job.clone();
        drop(state);
        stop(job);
        if let Some(disk) = self.disk.lock().take()
            && let Err(error) = disk.close()
        {
            log::error!("{}: {error} while closing", self.path.display());
        }
        let mut state = self.shared.state.lock();
        *state = State::default();
    }
}

impl Drop for VirtualDisk {
    fn drop(&mut self) {
        self.close();
    }
}

fn host_options(write: bool, lock: bool) -> HostOptions {
    HostOptions {
        read_only: !write,
        lock,
        no_follow: false,
    }
}

/// What a file is, if it is of the type that was asked for.
fn expected(
    storage_type: &VirtualStorageType,
    path: &Path,
    identified: Result<Identified, OpenProblem>,
) -> Result<Identified, Win32Error> {
    let vendor = storage_type.vendor_id;
    if vendor != VIRTUAL_STORAGE_TYPE_VENDOR_MICROSOFT
        && vendor != VIRTUAL_STORAGE_TYPE_VENDOR_UNKNOWN
    {
        return Err(ERROR_VIRTDISK_PROVIDER_NOT_FOUND);
    }
    let wanted = match storage_type.device_id {
        VIRTUAL_STORAGE_TYPE_DEVICE_UNKNOWN => None,
        VIRTUAL_STORAGE_TYPE_DEVICE_VHD => Some(Format::Vhd),
        VIRTUAL_STORAGE_TYPE_DEVICE_VHDX => Some(Format::Vhdx),
        _ => return Err(ERROR_VIRTDISK_PROVIDER_NOT_FOUND),
    };
    let named = path.file_name().is_some_and(crate::lineage::is_disk_name);
    match (identified, wanted) {
        (Ok(found), Some(wanted)) if found.format != wanted => Err(match wanted {
            Format::Vhd => (&FormatError::NotVhd).into(),
            Format::Vhdx => (&FormatError::NotVhdx).into(),
        }),
        (Ok(found), _) => Ok(found),
        // Neither name nor content say that it is a virtual disk at all.
        (Err(OpenProblem::Format(FormatError::NotVhd)), None) if !named => {
            Err(ERROR_VIRTDISK_PROVIDER_NOT_FOUND)
        }
        (Err(OpenProblem::Format(FormatError::NotVhd)), Some(Format::Vhdx)) => {
            Err((&FormatError::NotVhdx).into())
        }
        (Err(problem), _) => Err(logged(&problem)),
    }
}

/// Cancels an operation, if it has not ended, and waits until everybody was told of its end.
fn stop(job: Option<Arc<Job>>) {
    if let Some(job) = job {
        job.control.cancel();
        job.wait(None);
    }
}
