//! A directory of disks: finds them, gives them numbers and attributes, keeps the ones in use open
//! and compacts them while they are idle. What a front end (FUSE, WinFsp) serves.
//!
//! ```text
//! front end -- lookup, attributes, list --> nodes --> host_dir    (names, numbers, stat)
//!          \                                 \---> probes         (sizes of disks not open)
//!           \- open --> open_disks (LRU) --> Disk <-- agent       (background work, closing)
//! ```
//!
//! # What it shows
//! Directories as they are. Of the files, those whose name ends in `.vhd`, `.avhd`, `.vhdx` or
//! `.avhdx` in any case, under that name with `.raw` behind it. Symbolic links, special files and all others are not
//! shown, and no link is ever followed below the root, not even one that is swapped in between a
//! look and an open. On Windows junctions and places where volumes are mounted are links, too, reparse points
//! of unknown kinds and files that are elsewhere until they are read (in a cloud, on a tape) are special, a
//! name is a word (no drive, share, device or stream), and case tells no names apart. Nothing is cached that the host may change: a new, renamed or deleted file is
//! seen by the next call.
//!
//! # What it guarantees
//! 1. A backing file is open at most once, however many handles and names it has.
//! 2. A disk with handles stays open, also when its file is renamed or deleted; Windows refuses both as
//!    long as the disk is open.
//! 3. A disk that nobody uses is closed, and its lock released, soon after background work has
//!    nothing left to do.
//! 4. A file without any write permission bit, on Windows one that is marked read-only, is never written,
//!    not even by a privileged process.
//! 5. The reason why a file cannot be opened is logged once for each state of the file.
//! 6. A disk over which other disks of the tree are is not written: it is shown and opened read-only,
//!    and background work leaves it alone. Whether there are any is looked up before each opening
//!    for writing, for five seconds at most: then what was last found counts.
//! 7. Parents are looked for below the root and in [`LibraryOptions::parent_dirs`] alone, and a user
//!    opens a child only who may read all of its parents.
//! 8. No request waits for a file system below the root that needs a vhdfs mount to answer, which may be the one
//!    that asks: such directories cannot be entered.
//! 9. Background work changes a file that no guest has opened for writing only while no other program has
//!    it open, locked or not; a program that opens it gets it within a step, and as it ought to be. Where
//!    the host cannot tell, and in any case of a file that somebody still makes, it must have been quiet
//!    for [`LibraryOptions::quiet_time`].
//! 10. A file system of the host that does not answer, or a disk on one, keeps nobody waiting who does not need it:
//!     background work goes on elsewhere, and disks elsewhere are opened and closed ([`Library::close`]).
//! 11. A mode that is shown allows nobody what the file's access control list denies; on Windows the list
//!     itself is shown ([`Library::attributes`] and `Library::security_descriptor`).

mod agent;
mod device;
mod error;
mod family;
mod farewell;
mod handle;
mod host_dir;
mod look;
mod names;
mod nodes;
mod open_disk;
mod open_disks;
mod options;
mod probes;
mod queue;
mod room;
mod turn;
mod turns;
mod user;
mod visits;

#[cfg(test)]
mod tests;

use std::ffi::{OsStr, OsString};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::thread::JoinHandle;
use std::time::SystemTime;

use parking_lot::Mutex;

use crate::disk::{Disk, HostParents};
use crate::storage::host::pin::{Identity, Kind, Pin};
use crate::storage::host::{Scope, paths};
use agent::{Agent, Bell};
use device::Devices;
use family::{Families, Family};
use host_dir::HostDir;
use nodes::{Node, Nodes};
use open_disks::{Found, OpenDisks, Purpose, Refused};
use probes::{Failure, Probes};
use queue::Limits;

pub use crate::storage::host::Space;
pub use error::LibraryError;
pub use handle::DiskHandle;
pub use nodes::NodeId;
use open_disk::OpenDisk;
pub use open_disk::{DiskState, DiskStatus};
pub use options::LibraryOptions;
pub use user::User;

/// What a node is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum NodeKind {
    /// A directory.
    Directory,
    /// A disk, shown as a plain file of the disk's size.
    Disk,
}

/// Attributes of a node.
#[derive(Clone, Copy, Debug)]
pub struct Attributes {
    /// The node.
    pub node: NodeId,
    /// What it is.
    pub kind: NodeKind,
    /// A disk's size in bytes, 0 where it cannot be opened; of a directory, what the host says.
    pub size: u64,
    /// Bytes that the host stores for it.
    pub allocated: u64,
    /// Last access to the backing file.
    pub accessed: SystemTime,
    /// Last change of the backing file's bytes, by compaction too.
    pub modified: SystemTime,
    /// Last change of the backing file's bytes or attributes.
    pub changed: SystemTime,
    /// When the backing file was created.
    #[cfg(windows)]
    pub created: SystemTime,
    /// `FILE_ATTRIBUTE_*`, as far as they concern what is shown: a directory, hidden, for the system,
    /// to be archived, and read-only where a disk can only be read, or not be opened at all.
    #[cfg(windows)]
    pub file_attributes: u32,
    /// Unix permission bits. A disk has no executable or set-id bits, no write bits where it can
    /// only be read, and none at all where it cannot be opened.
    #[cfg(unix)]
    pub mode: u32,
    /// Owner.
    #[cfg(unix)]
    pub uid: u32,
    /// Group.
    #[cfg(unix)]
    pub gid: u32,
    /// Names that the backing file has.
    #[cfg(unix)]
    pub links: u32,
}

/// One name in a directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The name, as shown.
    pub name: OsString,
    /// What it is.
    pub kind: NodeKind,
}

/// A directory of a library, held.
#[derive(Debug)]
pub struct Directory {
    host: Pin,
    path: PathBuf,
}

impl Directory {
    /// Reads it: calls `visit` with what is shown of it, one entry after the other in the host's
    /// order, until that breaks off. Nothing is kept, so that a large directory takes no memory.
    ///
    /// # Errors
    /// What the host answers.
    pub fn read(
        &self,
        visit: &mut dyn FnMut(Entry) -> ControlFlow<()>,
    ) -> Result<(), LibraryError> {
        let read = (self.host).each_name(|name, kind| match self.entry(name, kind) {
            Some(entry) => visit(entry),
            None => ControlFlow::Continue(()),
        });
        read.map_err(|source| LibraryError::io(&self.path, "read the directory", source))
    }

    /// What is shown for `name`, if anything is.
    fn entry(&self, name: &OsStr, kind: Kind) -> Option<Entry> {
        // Its name is taken where a disk is shown under it.
        let is_hidden = || {
            let file = names::backing(name).map(|file| self.host.stat_child(file));
            file.is_some_and(|found| found.is_ok_and(|stat| stat.kind == Kind::File))
        };
        match kind {
            Kind::Directory if !is_hidden() => Some(Entry {
                name: name.to_owned(),
                kind: NodeKind::Directory,
            }),
            Kind::File if names::is_disk(name) => Some(Entry {
                name: names::shown(name),
                kind: NodeKind::Disk,
            }),
            Kind::Directory | Kind::File | Kind::Link | Kind::Other(_) => None,
        }
    }
}

/// What the library and its background thread share.
struct Core {
    host: HostDir,
    options: LibraryOptions,
    nodes: Mutex<Nodes>,
    probes: Probes,
    devices: Arc<Devices>,
    disks: Arc<OpenDisks>,
    families: Families,
    /// Where the root was when it was opened, without symbolic links.
    root: PathBuf,
    bell: Arc<Bell>,
}

/// A directory of disks. All methods may be called from any thread.
///
/// Dropping it closes it, see [`Library::close`].
pub struct Library {
    core: Arc<Core>,
    agent: Mutex<Option<JoinHandle<()>>>,
    surveyor: Mutex<Option<JoinHandle<()>>>,
    /// A host that did not answer was not waited for.
    gave_up: AtomicBool,
}

impl std::fmt::Debug for Library {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Library")
            .field("host", &self.core.host)
            .finish_non_exhaustive()
    }
}

impl Library {
    /// Opens the directory at `root` and starts background work. No disk is opened yet.
    ///
    /// # Errors
    /// [`LibraryError::Io`] and [`LibraryError::NotFound`] where `root` cannot be opened as a
    /// directory.
    pub fn open(root: &Path, options: LibraryOptions) -> Result<Self, LibraryError> {
        Self::open_with(root, options, Limits::default(), Identity::device)
    }

    fn open_with(
        root: &Path,
        options: LibraryOptions,
        limits: Limits,
        device: fn(&Identity) -> u64,
    ) -> Result<Self, LibraryError> {
        let fail = |source| LibraryError::io(root, "open the directory", source);
        let host = HostDir::open(root).map_err(fail)?;
        let identity = host.stat().map_err(fail)?.identity();
        let mut scope = Scope::new();
        let given = std::path::absolute(root).map_err(fail)?;
        (host.root())
            .and_then(|directory| scope.add_open(directory, &given))
            .map_err(fail)?;
        for directory in &options.parent_dirs {
            scope
                .add(directory)
                .map_err(|source| LibraryError::io(directory, "open the directory", source))?;
        }
        let root = scope.directories().next().map(Path::to_owned);
        let bell = Arc::new(Bell::default());
        let busy_share = options.compact.map_or(0, |policy| policy.busy_share);
        let devices = Arc::new(Devices::new(bell.clone(), limits, busy_share, device));
        let disks = Arc::new(OpenDisks::new(
            options.max_open,
            options.read_only,
            options.punch_holes,
            HostParents::within(scope),
            devices.clone(),
        ));
        let top = host.root().map_err(fail)?;
        let core = Arc::new(Core {
            nodes: Mutex::new(Nodes::new(identity)),
            probes: Probes::new(),
            families: Families::new(top, disks.clone(), bell.clone()),
            devices,
            disks,
            root: root.unwrap_or(given),
            host,
            options,
            bell,
        });
        let policy = core.options.compact;
        let agent = Arc::new(Agent::new(core.clone(), policy, core.options.linger));
        let surveyed = core.clone();
        let library = Self {
            surveyor: Mutex::new(Some(start("vhdfs-survey", &core.root, move || {
                surveyed.families.run(&surveyed.disks);
            })?)),
            agent: Mutex::default(),
            gave_up: AtomicBool::new(false),
            core,
        };
        let agent = start("vhdfs-idle", &library.core.root, move || agent.run())?;
        *library.agent.lock() = Some(agent);
        Ok(library)
    }

    /// Finds `name` in the directory `parent` and takes a reference to its node, which
    /// [`Library::forget`] gives back.
    ///
    /// # Errors
    /// [`LibraryError::NotFound`] where nothing is shown under that name.
    pub fn lookup(&self, parent: NodeId, name: &OsStr) -> Result<Attributes, LibraryError> {
        let node = self.core.directory_node(parent)?;
        let directory = self.core.open_directory(&node)?;
        self.core.lookup_in(&directory, &node.path, name)
    }

    /// [`Library::lookup`] in a directory that is held.
    ///
    /// # Errors
    /// As there: an entry may be gone by now.
    pub fn lookup_in(
        &self,
        directory: &Directory,
        name: &OsStr,
    ) -> Result<Attributes, LibraryError> {
        self.core.lookup_in(&directory.host, &directory.path, name)
    }

    /// Whether what is asked about `node`, or about `name` in it, has another file system to answer than the
    /// directory's own: it may keep the asker waiting, which this does not.
    #[cfg(unix)]
    pub fn is_elsewhere(&self, node: NodeId, name: Option<&OsStr>) -> bool {
        self.core.is_elsewhere(node, name)
    }

    /// Gives `count` references to `node` back. Without references, its number means nothing.
    pub fn forget(&self, node: NodeId, count: u64) {
        self.core.nodes.lock().forget(node, count);
    }

    /// Attributes of a node, as they are now.
    ///
    /// # Errors
    /// [`LibraryError::Stale`] where its file has gone and is not open.
    pub fn attributes(&self, node: NodeId) -> Result<Attributes, LibraryError> {
        self.core.attributes(node)
    }

    /// The directory of a node, held, to be read or looked into.
    ///
    /// # Errors
    /// [`LibraryError::NotADirectory`], [`LibraryError::Stale`], and what the host answers.
    pub fn directory(&self, node: NodeId) -> Result<Directory, LibraryError> {
        let node = self.core.directory_node(node)?;
        let host = self.core.open_directory(&node)?;
        Ok(Directory {
            host,
            path: node.path,
        })
    }

    /// Opens a disk for reading, or for reading and writing. It shares the open disk with every
    /// other handle to the same backing file.
    ///
    /// # Errors
    /// [`LibraryError::Stale`] where another file has taken the place of the node's,
    /// [`LibraryError::ReadOnly`] where writing is not allowed, and [`LibraryError::Unopenable`].
    pub fn open_disk(&self, node: NodeId, write: bool) -> Result<DiskHandle, LibraryError> {
        self.core.open_disk(node, write, None)
    }

    /// [`Library::open_disk`] on behalf of a user, whom the host must let read all parents of the disk:
    /// a child shows what is in them. That it lets the user read or write the disk's own file is for the
    /// front end to see to, by the attributes.
    ///
    /// # Errors
    /// As there, and [`LibraryError::Denied`].
    pub fn open_disk_for(
        &self,
        node: NodeId,
        write: bool,
        user: &User,
    ) -> Result<DiskHandle, LibraryError> {
        self.core.open_disk(node, write, Some(user))
    }

    /// Owner, group and access control list of a node's file or directory: a self-relative
    /// `SECURITY_DESCRIPTOR`.
    ///
    /// # Errors
    /// As [`Library::attributes`], and where the host does not let this process read it.
    #[cfg(windows)]
    pub fn security_descriptor(&self, node: NodeId) -> Result<Vec<u8>, LibraryError> {
        self.core.security_descriptor(node)
    }

    /// Sizes of the file system that the directory lies on.
    ///
    /// # Errors
    /// What the host answers.
    pub fn space(&self) -> Result<Space, LibraryError> {
        let space = self.core.host.space();
        space.map_err(|source| {
            LibraryError::io(Path::new(""), "read the file system's size", source)
        })
    }

    /// Bytes that background work has given back to the host since the library was opened, of all disks.
    pub fn reclaimed(&self) -> u64 {
        self.core.devices.reclaimed()
    }

    /// Every open disk and what happens to it.
    pub fn status(&self) -> Vec<DiskStatus> {
        let open = self.core.disks.all();
        let status = open.iter().filter_map(|disk| self.core.status(disk));
        status.collect()
    }

    /// The status of one disk; `None` where it is not open.
    pub fn disk_status(&self, node: NodeId) -> Option<DiskStatus> {
        let identity = self.core.nodes.lock().get(node)?.identity;
        self.core.status(&*self.core.disks.get(&identity)?)
    }

    /// Has every disk closed that nobody has open, which leaves clean files, and opens none any more but those
    /// that somebody has open.
    pub fn retire(&self) {
        self.core.disks.retire();
    }

    /// Stops background work within one step, then flushes and closes every disk, which leaves
    /// clean files. No disk can be opened any more. One with handles is flushed and cut like the
    /// others, but it is closed only when its last handle goes; drop them before to be sure of a
    /// clean file. How many disks could not be left clean; the reasons are logged.
    ///
    /// Where a host does not answer, that is not waited for longer than two minutes after the last disk was closed,
    /// on whatever device; those that are left count as not clean.
    pub fn close(&self) -> usize {
        self.close_within(farewell::PATIENCE)
    }
}

impl Drop for Library {
    fn drop(&mut self) {
        self.close();
    }
}

fn start(
    name: &str,
    root: &Path,
    work: impl FnOnce() + Send + 'static,
) -> Result<JoinHandle<()>, LibraryError> {
    let thread = std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(work);
    thread.map_err(|source| LibraryError::io(root, "start a thread", source))
}

impl Core {
    fn node(&self, id: NodeId) -> Result<Node, LibraryError> {
        let node = self.nodes.lock().get(id).cloned();
        node.ok_or_else(|| LibraryError::Stale {
            path: PathBuf::new(),
        })
    }

    fn directory_node(&self, id: NodeId) -> Result<Node, LibraryError> {
        let node = self.node(id)?;
        if !node.is_directory {
            return Err(LibraryError::NotADirectory { path: node.path });
        }
        Ok(node)
    }

    /// Opens the directory of a node, if it is still the same one.
    fn open_directory(&self, node: &Node) -> Result<Pin, LibraryError> {
        let fail = |source| LibraryError::io(&node.path, "open the directory", source);
        let directory = self.host.directory(&node.path).map_err(fail)?;
        let stat = directory.stat().map_err(fail)?;
        if stat.identity() != node.identity {
            return Err(LibraryError::Stale {
                path: node.path.clone(),
            });
        }
        Ok(directory)
    }

    fn status(&self, open: &OpenDisk) -> Option<DiskStatus> {
        let mut status = open.status()?;
        status.children = self.families.latest().children(&open.identity);
        if let Some(parent) = &mut status.parent
            && let Some(below) = paths::below(&self.root, parent)
        {
            *parent = below;
        }
        Some(status)
    }

    /// The disk file at `path`, held; `family` knows whether it has children.
    fn find_disk(&self, path: &Path, family: &Family) -> Result<Found, LibraryError> {
        let fail = |source| LibraryError::io(path, "open the file", source);
        let (directory, name) = self.host.parent(path).map_err(fail)?;
        let pinned = directory.child(name).map_err(fail)?;
        let stat = pinned.stat().map_err(fail)?;
        if stat.kind != Kind::File {
            return Err(LibraryError::Stale {
                path: path.to_owned(),
            });
        }
        let writable = directory.is_child_writable(name, &stat);
        Ok(Found {
            path: path.to_owned(),
            stat,
            pinned,
            writable,
            is_parent: family.is_parent(&stat.identity()),
        })
    }

    /// The first of its parents that `user` may not read.
    fn hidden_parent(&self, disk: &Disk, user: &User) -> Option<PathBuf> {
        let parents = std::iter::successors(disk.parent(), |disk| disk.parent());
        let hidden = { parents }.find(|parent| {
            let path = parent.path();
            let tops = std::iter::once(&self.root).chain(&self.options.parent_dirs);
            let top = tops
                .filter(|top| paths::below(top, path).is_some())
                .max_by_key(|top| top.as_os_str().len());
            // Where it is below none of them, all directories count.
            !user.may_read(path, top.map_or(Path::new("/"), PathBuf::as_path))
        });
        hidden.map(|parent| parent.path().to_owned())
    }

    fn open_disk(
        &self,
        id: NodeId,
        write: bool,
        user: Option<&User>,
    ) -> Result<DiskHandle, LibraryError> {
        let node = self.node(id)?;
        if node.is_directory {
            return Err(LibraryError::IsADirectory { path: node.path });
        }
        let path = node.path;
        let family = match write {
            _ if self.options.read_only => Some(Arc::default()),
            // A child may have come to be since the last look.
            true => self.families.renew(),
            false => self.families.known(),
        };
        let family = family.ok_or(LibraryError::Closed)?;
        let found = match self.find_disk(&path, &family) {
            Ok(found) if found.stat.identity() == node.identity => found,
            // The name leads elsewhere by now; whoever asks finds out where by looking it up.
            Ok(_) | Err(LibraryError::NotFound { .. }) => return Err(LibraryError::Stale { path }),
            Err(error) => return Err(error),
        };
        let reason = match found.is_parent {
            _ if self.options.read_only => "all disks here are".to_owned(),
            true => family::reason(&family.children(&node.identity)),
            false => "its permissions, or what it holds, do not allow more".to_owned(),
        };
        if write && found.is_parent {
            log::warn!("{}: not opened for writing: {reason}", path.display());
        }
        let stamp = found.stat.stamp();
        let purpose = if write { Purpose::Write } else { Purpose::Read };
        let mut handle = self
            .disks
            .open(&self.probes, found, purpose)
            .map_err(|refused| match refused {
                Refused::Failed(Failure { reason, kind }) => {
                    LibraryError::Unopenable { path, reason, kind }
                }
                Refused::ReadOnly => LibraryError::ReadOnly { path, reason },
                Refused::Closed | Refused::Busy => LibraryError::Closed,
            })?;
        if let Some(parent) = user.and_then(|user| self.hidden_parent(handle.disk(), user)) {
            let reason = format!(
                "its parent {} is not readable for that user",
                parent.display()
            );
            self.probes.say(&stamp, &handle.path(), &reason);
            let path = handle.path();
            return Err(LibraryError::Denied { path, reason });
        }
        let kept = self.nodes.lock().see_content(id, handle.content());
        handle.set_content_kept(kept);
        Ok(handle)
    }
}
