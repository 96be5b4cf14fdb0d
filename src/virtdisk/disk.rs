//! Open virtual disks: what a handle may do.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
#[cfg(any(test, not(windows)))]
use std::time::Duration;

use parking_lot::Mutex;

use super::compaction::carry_out;
use super::constants::*;
use super::error::*;
use super::job::{Job, VirtualDiskProgress, Waiter};
use super::rights::Rights;
use super::shared::{Attachment, HandleId, Opening, Ownership, Shared, reading};
use crate::compact::CompactOptions;
use crate::disk::Disk;
use crate::error::{ErrorKind, FormatError, OpenProblem};
use crate::format::{DiskType, Format};
use crate::image::{self, Identified};
use crate::storage::host::HostFile;

/// A handle of an open virtual disk. Dropping it closes it.
#[derive(Debug)]
pub struct VirtualDisk {
    id: HandleId,
    pub(super) rights: Rights,
    pub(super) path: PathBuf,
    pub(super) opening: Opening,
    shared: Arc<Shared>,
    /// The file, to ask what it is; `None` once it is closed.
    file: Mutex<Option<Arc<HostFile>>>,
    /// While it keeps others off the file.
    owned: Mutex<Option<Arc<Ownership>>>,
}

impl VirtualDisk {
    /// Opens the file at `path`, with `flags` that were looked at.
    pub(super) fn open(
        storage_type: &VirtualStorageType,
        path: &Path,
        rights: Rights,
        flags: u32,
    ) -> Result<Self, Win32Error> {
        static LAST: AtomicU64 = AtomicU64::new(0);
        let look = HostFile::open(path, &reading(false)).map_err(|error| logged(&error))?;
        let identified = image::identify(&look, path);
        let identified = expected(storage_type, path, identified)?;
        let is_child = identified.parent.is_some();
        let has = |flag| flags & flag != 0;
        let opening = Opening {
            write: rights.writes && (rights.rw_depth > 0 || !is_child),
            is_alone: is_child && has(OPEN_VIRTUAL_DISK_FLAG_NO_PARENTS),
            ignore_relative: has(OPEN_VIRTUAL_DISK_FLAG_IGNORE_RELATIVE_PARENT_LOCATOR),
        };
        let handle = Self {
            id: LAST.fetch_add(1, Ordering::Relaxed) + 1,
            rights,
            path: path.to_owned(),
            opening,
            shared: Shared::of(look.key().map_err(|error| Win32Error::host(&error))?),
            file: Mutex::new(Some(Arc::new(look))),
            owned: Mutex::default(),
        };
        if rights.owns() {
            handle.own()?;
        }
        if !rights.owns() || opening.is_alone {
            handle.look()?;
        }
        Ok(handle)
    }

    /// Has the file, and the disk open: until the handle is closed, but while it has the disk attached only
    /// until what this gives is dropped.
    ///
    /// # Errors
    /// `ERROR_SHARING_VIOLATION`, and what opening a disk fails with.
    fn own(&self) -> Result<Arc<Ownership>, Win32Error> {
        let mut owned = self.owned.lock();
        if let Some(owned) = &*owned {
            return Ok(Arc::clone(owned));
        }
        let taken = Arc::new(Ownership::take(&self.shared, &self.path, self.opening)?);
        // Not beside a thread that closes the handle: that waits for the lock held here.
        self.file()?;
        if !self.has_attached() {
            *owned = Some(Arc::clone(&taken));
        }
        Ok(taken)
    }

    /// The file, unless the handle was closed.
    pub(super) fn file(&self) -> Result<Arc<HostFile>, Win32Error> {
        self.file.lock().clone().ok_or(ERROR_INVALID_HANDLE)
    }

    /// The disk as a handle of this process has it open.
    pub(super) fn open_disk(&self) -> Option<Arc<Disk>> {
        self.shared.open_disk()
    }

    /// Whether it was by this handle that the disk was attached.
    fn has_attached(&self) -> bool {
        let state = self.shared.state.lock();
        (state.attachment.as_ref()).is_some_and(|found| found.handle == self.id)
    }

    /// Whether the disk is attached, by whichever process.
    pub(super) fn is_attached(&self) -> Result<bool, Win32Error> {
        if self.shared.state.lock().attachment.is_some() {
            return Ok(true);
        }
        let attached = self.file()?.is_attached();
        attached.map_err(|error| Win32Error::host(&error))
    }

    pub(super) fn attach(&self, waiter: Option<Box<dyn Waiter>>) -> Result<(), Win32Error> {
        if !self.rights.attach {
            return Err(ERROR_ACCESS_DENIED);
        }
        self.file()?;
        if self.is_attached()? || self.shared.state.lock().running().is_some() {
            return Err(ERROR_VHD_INVALID_STATE);
        }
        let owned = self.own()?;
        let attachment = Attachment::new(&self.shared, &self.path, &*owned.disk()?, self.id)?;
        let mut state = self.shared.state.lock();
        self.file()?;
        if state.attachment.is_some() {
            return Err(ERROR_VHD_INVALID_STATE);
        }
        // There is nothing to wait for, but whoever waits is told.
        let job = Arc::new(Job::new(waiter.as_ref().map(|waiter| waiter.key())));
        state.begin(&job, self.id)?;
        state.attachment = Some(attachment);
        drop(state);
        *self.owned.lock() = None;
        drop(owned);
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
        let attachment = state.attachment.take();
        let job = state.job.clone();
        drop(state);
        let Some(attachment) = attachment else {
            return Err(match self.is_attached()? {
                // By another process.
                true => ERROR_NOT_SUPPORTED,
                false => ERROR_NOT_READY,
            });
        };
        stop(job);
        // Before others can have the file. If one of them compacts it already, whatever this handle is
        // asked for next tries again.
        if attachment.handle == self.id
            && let Err(code) = self.own()
        {
            log::info!("{}: {code} after detaching it", self.path.display());
        }
        drop(attachment);
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
        self.file()?;
        if self.shared.state.lock().running().is_some() {
            return Err(ERROR_VHD_INVALID_STATE);
        }
        let owned = self.own()?;
        let disk = owned.disk()?;
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
            drop(owned);
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
                    // Whoever is told may open the file at once.
                    drop(owned);
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
        let is_attached = self.is_attached()?;
        let mut state = self.shared.state.lock();
        // Not beside a thread that closes the handle: that waits for what runs by then.
        self.file()?;
        state.begin(job, self.id)?;
        Ok(is_attached)
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
        let running = state.running().filter(|_| state.begun_by == self.id);
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
        let mut state = self.shared.state.lock();
        let attached = state.attachment.take_if(|found| found.handle == self.id);
        let is_begun_here = state.begun_by == self.id;
        let job = match is_begun_here || attached.is_some() {
            true => state.job.clone(),
            false => None,
        };
        drop(state);
        stop(job);
        drop(attached);
        drop(self.owned.lock().take());
        let mut state = self.shared.state.lock();
        if state.begun_by == self.id {
            state.job = None;
        }
    }
}

impl Drop for VirtualDisk {
    fn drop(&mut self) {
        self.close();
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
        (Err(problem), None) if !named && problem.kind() == ErrorKind::NotADisk => {
            logged(&problem);
            Err(ERROR_VIRTDISK_PROVIDER_NOT_FOUND)
        }
        (Err(problem), Some(Format::Vhdx)) if problem.kind() == ErrorKind::NotADisk => {
            logged(&problem);
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
