//! What a guest sees: a disk of bytes, over an image.
//!
//! The only mover of guest data. It reads and writes payload straight in the host file where the
//! image says, asks the image for slots, and keeps book of what became zero, so that compaction
//! knows without reading.
//!
//! # Semantics
//! * A read of a range that overlaps a concurrent write returns, for each byte, the old or the new
//!   one. The same holds for two overlapping writes.
//! * A write that has returned survives the death of the process; one that [`Disk::flush`] has
//!   covered survives a power cut.
//! * A discarded range reads as zeros from then on.
//! * A failed write may have written a part of its range. Nothing else is affected.

mod chain;
mod changes;
mod files;
mod gate;
mod in_place;
mod io;
mod layout;
mod maintenance;
mod meter;
mod mirror;
mod news;
pub(crate) mod parents;
#[cfg(test)]
mod tests;
mod tracker;
mod twin;
mod withheld;
mod writers;
pub(crate) mod zero;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::error::{DiskError, OpenError, OpenProblem, ParentProblem};
use crate::format::parent::{Identity, ParentLink};
pub use crate::format::{DiskType, Format};
use crate::image::{self, Cut, Geometry, Image, ImageOptions};
use crate::storage::Storage;
use crate::storage::host::PUNCH_BY_DEFAULT;
use crate::units::{DiskOffset, DiskRange};

use changes::Changes;
pub use files::{DiskFiles, disk_files};
use gate::Gates;
pub use layout::{BeyondEnd, Extent, ExtentKind, Region, RegionKind};
pub use maintenance::Move;
pub(crate) use maintenance::{
    Added, Announcement, Candidates, Comparison, Doubt, FreeBook, Hollow, MOST, Punched,
    Relocation, Scanned, Scanner, drop_if_same,
};
#[cfg(test)]
pub(crate) use meter::Latency;
pub(crate) use meter::{Activity, Meter, Reading, Request};
pub use parents::{
    Children, FoundParent, HostParents, MAX_CHAIN_LEN, ParentSource, Relinked, children_below,
    give_identity, relink,
};
use tracker::{Content, Tracker};
use twin::Twin;
use withheld::Withheld;
use writers::Writers;

/// How to open a [`Disk`].
#[derive(Clone, Copy, Debug)]
pub struct OpenOptions {
    /// Never write to the file, not even to finish an interrupted change.
    pub read_only: bool,
    /// Take the lock that keeps other programs from writing (QEMU's, on Linux). Without it nobody
    /// is kept off: only for a look at a file that somebody else is using, and read-only.
    pub lock: bool,
    /// Give what becomes zero back to the host at once, by punching holes in the file. Windows
    /// does not attach files with holes.
    pub punch_holes: bool,
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self {
            read_only: false,
            lock: true,
            punch_holes: PUNCH_BY_DEFAULT,
        }
    }
}

/// What [`Disk::info`] tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskInfo {
    /// The image's format.
    pub format: Format,
    /// How the image stores its disk.
    pub disk_type: DiskType,
    /// The disk's size in bytes, as the guest sees it.
    pub virtual_size: u64,
    /// The file's length in bytes.
    pub file_length: u64,
    /// Bytes that the host stores for the file.
    pub allocated_bytes: u64,
    /// Bytes in a block; 0 for a fixed disk, which has none.
    pub block_size: u64,
    /// Blocks of the disk.
    pub blocks_total: u64,
    /// Blocks that have a place in the file.
    pub blocks_allocated: u64,
    /// The program that made the image, and its version; empty where the image does not say.
    pub creator: String,
}

/// An open disk, shared by all threads that use it.
///
/// Dropping the last reference does what [`Disk::close`] does, without telling of errors.
#[derive(Debug)]
pub struct Disk {
    image: Box<dyn Image>,
    /// What shows where the image has nothing. Read-only.
    parent: Option<Arc<Disk>>,
    gates: Arc<Gates>,
    tracker: Tracker,
    writers: Writers,
    /// Set when bytes that the guest's filesystems call free were given up.
    gave_up_free: AtomicBool,
    /// Set when the file belongs to others now: nothing is written any more.
    given_up: AtomicBool,
    /// Held by the one compaction that may run.
    compacting: Mutex<()>,
    punch_holes: bool,
    /// Cleared when the host says that it cannot punch holes.
    host_punches: AtomicBool,
    path: PathBuf,
    read_only: bool,
    length_at_open: u64,
    allocated_at_open: u64,
    /// As others can have seen it last: when it was opened, or lent to them.
    identity_seen: Mutex<Identity>,
    opened: Instant,
    /// Milliseconds from `opened` to the last guest request.
    last_io: AtomicU64,
    changes: Changes,
    withheld: Withheld,
    meter: Meter,
}

impl Disk {
    /// Opens the image at `path`.
    ///
    /// For writing, this finishes what an interrupted change left: see the image's module. The
    /// parents of a differencing disk are looked for below the file's own directory.
    ///
    /// # Errors
    /// [`OpenError`] names the file, what is wrong and what to do. A file that is sound to read but
    /// not to be written fails with [`crate::error::ErrorKind::ReadOnly`]; a read-only open of it
    /// succeeds.
    pub fn open(path: &Path, options: &OpenOptions) -> Result<Arc<Self>, OpenError> {
        Self::open_with(path, options, &HostParents::beside(path, &[]))
    }

    /// Opens the image in `storage`, which has no parent; error messages call it `name`.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_storage(
        storage: Arc<dyn Storage>,
        name: &Path,
        options: &OpenOptions,
    ) -> Result<Arc<Self>, OpenError> {
        Self::open_over(storage, name, options, None)
    }

    /// Opens the image in `storage`, which error messages call `name`, over `parent`.
    ///
    /// # Errors
    /// As [`Self::open`]; also where the image has a parent and there is none, or another one.
    pub fn open_over(
        storage: Arc<dyn Storage>,
        name: &Path,
        options: &OpenOptions,
        parent: Option<Arc<Self>>,
    ) -> Result<Arc<Self>, OpenError> {
        let io = |source| {
            OpenError::new(
                name,
                OpenProblem::Io {
                    action: "read the file",
                    source,
                },
            )
        };
        let length_at_open = storage.len().map_err(io)?;
        let allocated_at_open = storage.allocated_bytes().map_err(io)?;
        let image_options = ImageOptions {
            read_only: options.read_only,
            punch_holes: options.punch_holes,
        };
        let fits = |link: Option<&ParentLink>| Ok(check_parent(link, parent.as_deref())?);
        let opened = image::open_if(storage, name, image_options, &fits)
            .map_err(|problem| OpenError::new(name, problem))?;
        for repair in opened.repaired {
            log::info!("{}: {repair}", name.display());
        }
        let image = opened.image;
        let geometry = *image.geometry();
        let blocks = image.map().len();
        let identity_seen = Mutex::new(image.identity());
        Ok(Arc::new(Self {
            image,
            parent,
            gates: Arc::new(Gates::new(blocks.max(1))),
            tracker: Tracker::new(blocks, geometry.block_size),
            writers: Writers::default(),
            gave_up_free: AtomicBool::new(false),
            given_up: AtomicBool::new(false),
            compacting: Mutex::new(()),
            punch_holes: options.punch_holes,
            host_punches: AtomicBool::new(true),
            path: name.to_owned(),
            read_only: options.read_only,
            length_at_open,
            allocated_at_open,
            identity_seen,
            opened: Instant::now(),
            last_io: AtomicU64::new(0),
            changes: Changes::default(),
            withheld: Withheld::default(),
            meter: Meter::default(),
        }))
    }

    /// The disk that shows where this one has nothing.
    pub fn parent(&self) -> Option<&Arc<Self>> {
        self.parent.as_ref()
    }

    /// Which disk it is, as children refer to it. A VHDX's changes with its content.
    pub fn identity(&self) -> Identity {
        self.image.identity()
    }

    /// Whether it is another disk for its children than when it was opened, or last let others in: those that
    /// were made over it before are refused from now on. Never of a dynamic or differencing VHD, which keeps
    /// its identity whatever changes.
    pub fn has_new_identity(&self) -> bool {
        self.identity() != *self.identity_seen.lock()
    }

    /// Says that others are let in, who may make children over the disk that it is now.
    pub(crate) fn note_seen(&self) {
        *self.identity_seen.lock() = self.identity();
    }

    /// Why compaction must leave what this disk's filesystems call free where it is, if it must: because of
    /// the `children` that were looked for or, unless `no_others` vouches that there are none but those,
    /// because of one that may be anywhere and would be accepted all the same.
    pub fn keeps_free_space(&self, children: &Children, no_others: bool) -> Option<String> {
        if no_others && children.files.is_empty() {
            return None;
        }
        let unnoticed = || {
            // VirtualBox knows its disks by their identity.
            let may_change = self.geometry().is_flat && !self.image.creator().starts_with("vbox");
            let is_kept = matches!(self.identity(), Identity::Vhd(_)) && !may_change;
            is_kept.then(|| {
                "a disk over this one may be elsewhere, and could not tell: a VHD keeps its identity \
                 when its content changes"
                    .to_owned()
            })
        };
        children.reliance().or_else(unnoticed)
    }

    /// The disk's size in bytes. Never 0.
    #[expect(clippy::len_without_is_empty, reason = "a disk is never empty")]
    pub fn len(&self) -> u64 {
        self.geometry().disk_len
    }

    /// Whether it takes no changes.
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// Whether it takes no changes because of an earlier failure: every one fails with
    /// [`DiskError::Poisoned`] until the image is opened anew.
    pub fn is_poisoned(&self) -> bool {
        matches!(self.image.check_writable(), Err(DiskError::Poisoned(_)))
    }

    /// The file's name, as given to [`Self::open`].
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file's length in bytes and the bytes that the host stored for it, when it was opened.
    pub fn size_at_open(&self) -> (u64, u64) {
        (self.length_at_open, self.allocated_at_open)
    }

    /// Bytes that the host stores for the file now.
    ///
    /// # Errors
    /// Where the host cannot tell.
    pub fn allocated_bytes(&self) -> Result<u64, DiskError> {
        let storage = self.image.storage();
        storage
            .allocated_bytes()
            .map_err(|error| DiskError::io("read the file's size", error))
    }

    /// What the disk is and how much of the file it uses.
    ///
    /// # Errors
    /// Where the host cannot tell the file's size.
    pub fn info(&self) -> Result<DiskInfo, DiskError> {
        let geometry = self.geometry();
        Ok(DiskInfo {
            format: geometry.format,
            disk_type: geometry.disk_type,
            virtual_size: geometry.disk_len,
            file_length: self.image.file_len(),
            allocated_bytes: self.allocated_bytes()?,
            block_size: if geometry.is_flat {
                0
            } else {
                geometry.block_size
            },
            blocks_total: u64::from(self.image.map().len()),
            blocks_allocated: self.image.map().present_count(),
            creator: self.image.creator(),
        })
    }

    /// How long ago the last read, write, discard or flush was; since opening, if there was none.
    pub fn idle_for(&self) -> Duration {
        let last = Duration::from_millis(self.last_io.load(Ordering::Relaxed));
        self.opened.elapsed().saturating_sub(last)
    }

    /// Counts what changed, or may have changed, the disk. Equal counts mean that compaction would find
    /// nothing new.
    pub fn io_count(&self) -> u64 {
        self.changes.count()
    }

    /// How long its requests take.
    pub(crate) fn meter(&self) -> &Meter {
        &self.meter
    }

    /// Has `tell` called, from the guest's thread, for each change that is [asked](Self::wait_for_change) for.
    pub(crate) fn on_change(&self, tell: impl Fn() + Send + Sync + 'static) {
        self.changes.set_tell(Box::new(tell));
    }

    /// Asks to be told when [`Self::io_count`] is no longer `seen`. Says no where it is not.
    pub(crate) fn wait_for_change(&self, seen: u64) -> bool {
        self.changes.wait_for_next(seen)
    }

    /// Says that somebody may write from now on, though nothing is written yet: what the guest's
    /// filesystems call free is not touched until [`Self::end_writing`], and no longer touched when
    /// this returns, which takes no longer than one commit of the block table.
    ///
    /// Writes are allowed without it; they only end such work by themselves.
    pub fn begin_writing(&self) {
        self.announce_writing();
        self.wait_to_write();
    }

    /// Ends what [`Self::begin_writing`] began, which may be nested.
    pub fn end_writing(&self) {
        self.writers.end();
        // What the guest's filesystems call free may be looked at now: there may be something new. Not before:
        // who is woken by it must find nobody.
        self.changes.note();
    }

    /// Leaves a clean file: everything durable, unused space at the end cut off, and other unused
    /// space given back to the host where hole punching is on. The disk stays usable; a change after
    /// it makes another close necessary.
    ///
    /// # Errors
    /// [`DiskError::Poisoned`] after an earlier failure, or what the host answers.
    pub fn close(&self) -> Result<(), DiskError> {
        if self.read_only || self.given_up.load(Ordering::Acquire) {
            return Ok(());
        }
        self.image.sync()?;
        self.image.cut(Cut::ALL)?;
        // What was discarded and not filled again takes no host space from here on.
        while self.image.punch_free(u64::MAX)? {}
        self.image.settle()
    }

    /// Leaves the file as it is, which others use: from here on [`Self::close`] does nothing. What is not
    /// durable yet stays so; what was begun is finished by who opens the file next.
    pub(crate) fn give_up(&self) {
        self.given_up.store(true, Ordering::Release);
    }

    /// The file's length in bytes, as last set.
    pub(crate) fn file_len(&self) -> u64 {
        self.image.file_len()
    }

    pub(crate) fn geometry(&self) -> &Geometry {
        self.image.geometry()
    }

    /// Notes that the guest asked for something.
    fn note_io(&self) {
        let now = u64::try_from(self.opened.elapsed().as_millis()).unwrap_or(u64::MAX);
        // The line is shared by all threads: do not take it for writing when nothing changes.
        if self.last_io.load(Ordering::Relaxed) != now {
            self.last_io.store(now, Ordering::Relaxed);
        }
    }

    /// Announces a change of the disk to its image, and counts it.
    fn note_change(&self) -> Result<(), DiskError> {
        self.image.begin_change()?;
        self.changes.note();
        Ok(())
    }

    /// Checks that a request lies inside the disk.
    fn range(&self, offset: u64, len: u64) -> Result<DiskRange, DiskError> {
        let disk_len = self.len();
        match offset.checked_add(len) {
            Some(end) if end <= disk_len => Ok(DiskRange::new(DiskOffset::new(offset), len)),
            _ => Err(DiskError::OutOfRange {
                offset,
                len,
                disk_len,
            }),
        }
    }
}

/// Whether `parent` is what an image that says `link` of its parent needs.
fn check_parent(link: Option<&ParentLink>, parent: Option<&Disk>) -> Result<(), ParentProblem> {
    match (link, parent) {
        (None, None) => Ok(()),
        (Some(_), None) => Err(ParentProblem::Missing { tried: Vec::new() }),
        (Some(link), Some(parent)) if link.identities.contains(&parent.identity()) => Ok(()),
        (link, Some(parent)) => Err(ParentProblem::Mismatch {
            path: parent.path().to_owned(),
            found: parent.identity().to_string(),
            expected: link.map_or_else(|| "none".to_owned(), ParentLink::expected),
        }),
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        match self.close() {
            // Somebody was told when it failed.
            Ok(()) | Err(DiskError::Poisoned(_)) => {}
            Err(error) => log::error!("{}: {error} while closing", self.path.display()),
        }
    }
}
