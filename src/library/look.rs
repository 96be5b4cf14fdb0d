//! What is told of a node: its name, its attributes.

use std::ffi::OsStr;
use std::io;
use std::path::{Component, Path};

use super::probes::Known;
#[cfg(unix)]
use super::user::shown_mode;
use super::{Attributes, Core, LibraryError, NodeId, NodeKind, names};
use crate::storage::host::pin::{Kind, Pin, Stat};

impl Core {
    pub(super) fn lookup_in(
        &self,
        directory: &Pin,
        parent: &Path,
        name: &OsStr,
    ) -> Result<Attributes, LibraryError> {
        // No way up, and none further down than one step.
        if !matches!(
            Path::new(name).components().collect::<Vec<_>>()[..],
            [Component::Normal(_)]
        ) {
            return Err(LibraryError::NotFound {
                path: parent.join(name),
            });
        }
        let wanted = [
            (names::backing(name), Kind::File),
            (Some(name), Kind::Directory),
        ];
        for (host_name, kind) in wanted {
            let Some(host_name) = host_name else { continue };
            let path = parent.join(host_name);
            let stat = match kind {
                // It may be another file system's, which is not to be asked before it is known whose.
                Kind::Directory => match directory.directory_here(Path::new(host_name)) {
                    Ok(None) => self.host.directory(&path).and_then(|found| found.stat()),
                    found => found.and_then(|_| directory.stat_child(host_name)),
                },
                _ => directory.stat_child(host_name),
            };
            match stat {
                Ok(stat) if stat.kind == kind => {
                    let node = self.nodes.lock().refer(stat.identity(), kind, &path);
                    return Ok(match kind {
                        Kind::File => self.show_disk(node, &stat, &path, (directory, host_name)),
                        _ => show(
                            node,
                            &stat,
                            Held::Child(directory, host_name),
                            Shown::Directory,
                        ),
                    });
                }
                Ok(_) => {}
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
                    ) => {}
                // Windows has names that no file can have.
                Err(error) if cfg!(windows) && error.kind() == io::ErrorKind::InvalidFilename => {}
                Err(error) => return Err(LibraryError::io(&path, "read attributes", error)),
            }
        }
        Err(LibraryError::NotFound {
            path: parent.join(name),
        })
    }

    #[cfg(unix)]
    pub(super) fn is_elsewhere(&self, id: NodeId, name: Option<&OsStr>) -> bool {
        let Ok(node) = self.node(id) else {
            return false;
        };
        let Some(name) = name else {
            return self.host.is_elsewhere(&node.path);
        };
        let mut names = [names::backing(name), Some(name)].into_iter().flatten();
        names.any(|name| self.host.is_elsewhere(&node.path.join(name)))
    }

    pub(super) fn attributes(&self, id: NodeId) -> Result<Attributes, LibraryError> {
        let node = self.node(id)?;
        let fail = |source| LibraryError::io(&node.path, "read attributes", source);
        if node.is_directory {
            let directory = self.open_directory(&node)?;
            let stat = directory.stat().map_err(fail)?;
            return Ok(show(id, &stat, Held::Itself(&directory), Shown::Directory));
        }
        // Also where the file has no name any more.
        if let Some(open) = self.disks.get(&node.identity)
            && let Some(size) = open.virtual_size()
        {
            let stat = open.pinned.stat().map_err(fail)?;
            let writable = open.allows_writing() && !self.is_parent(&stat);
            let held = Held::Itself(&open.pinned);
            return Ok(show(id, &stat, held, Shown::Disk { size, writable }));
        }
        let (directory, name) = self.host.parent(&node.path).map_err(fail)?;
        let stat = directory.stat_child(name).map_err(fail)?;
        if stat.identity() != node.identity {
            return Err(LibraryError::Stale { path: node.path });
        }
        Ok(self.show_disk(id, &stat, &node.path, (&directory, name)))
    }

    /// Attributes of the disk file at `path`, which is `name` in `directory`.
    fn show_disk(
        &self,
        node: NodeId,
        stat: &Stat,
        path: &Path,
        (directory, name): (&Pin, &OsStr),
    ) -> Attributes {
        let held = Held::Child(directory, name);
        if let Some(open) = self.disks.get(&stat.identity())
            && let Some(size) = open.virtual_size()
        {
            let writable = open.allows_writing() && !self.is_parent(stat);
            return show(node, stat, held, Shown::Disk { size, writable });
        }
        let shown = match self
            .probes
            .look(&stat.stamp(), path, || directory.child(name))
        {
            Known::Disk(disk) => {
                let may_write = !disk.frozen && !self.options.read_only && !self.is_parent(stat);
                Shown::Disk {
                    size: disk.size,
                    writable: may_write && directory.is_child_writable(name, stat),
                }
            }
            Known::Unopenable(_) => Shown::Unopenable,
        };
        show(node, stat, held, shown)
    }

    #[cfg(windows)]
    pub(super) fn security_descriptor(&self, id: NodeId) -> Result<Vec<u8>, LibraryError> {
        let node = self.node(id)?;
        let fail = |source| LibraryError::io(&node.path, "read who may do what", source);
        let descriptor = if node.is_directory {
            self.open_directory(&node)?.descriptor()
        } else if let Some(open) = self.disks.get(&node.identity) {
            open.pinned.descriptor()
        } else {
            let pin = self.host.pin(&node.path).map_err(fail)?;
            if pin.stat().map_err(fail)?.identity() != node.identity {
                return Err(LibraryError::Stale { path: node.path });
            }
            pin.descriptor()
        };
        Ok(descriptor.map_err(fail)?.bytes().to_owned())
    }

    /// Whether other disks are over that one, as last looked for.
    fn is_parent(&self, stat: &Stat) -> bool {
        self.families.latest().is_parent(&stat.identity())
    }
}

/// A file or directory that is looked at, for what its attributes do not say.
#[derive(Clone, Copy)]
#[cfg_attr(
    not(unix),
    expect(dead_code, reason = "only Linux has two places to look for rights")
)]
enum Held<'a> {
    Itself(&'a Pin),
    /// By its name in this directory.
    Child(&'a Pin, &'a OsStr),
}

#[cfg(unix)]
impl Held<'_> {
    /// Its access control list.
    fn access_list(self) -> io::Result<Vec<u8>> {
        match self {
            Self::Itself(pin) => pin.access_list(),
            Self::Child(directory, name) => directory.access_list_of_child(name),
        }
    }
}

/// What is shown of it.
#[derive(Clone, Copy)]
enum Shown {
    Directory,
    Disk { size: u64, writable: bool },
    Unopenable,
}

#[cfg_attr(
    not(unix),
    expect(
        unused_variables,
        reason = "only Linux has two places to look for rights"
    )
)]
fn show(node: NodeId, stat: &Stat, held: Held<'_>, shown: Shown) -> Attributes {
    let (kind, size) = match shown {
        Shown::Directory => (NodeKind::Directory, stat.len),
        Shown::Disk { size, .. } => (NodeKind::Disk, size),
        Shown::Unopenable => (NodeKind::Disk, 0),
    };
    Attributes {
        node,
        kind,
        size,
        allocated: stat.allocated,
        accessed: stat.accessed,
        modified: stat.modified,
        changed: stat.changed,
        #[cfg(unix)]
        mode: shown_mode(stat, || held.access_list()) & shown.mode_bits(),
        #[cfg(unix)]
        uid: stat.uid,
        #[cfg(unix)]
        gid: stat.gid,
        #[cfg(unix)]
        links: stat.links,
        #[cfg(windows)]
        created: stat.born.unwrap_or(stat.modified),
        #[cfg(windows)]
        file_attributes: stat.shown_attributes(kind == NodeKind::Directory, shown.is_read_only()),
    }
}

impl Shown {
    /// Which bits of its file's mode are shown. A disk is data: nothing to execute.
    #[cfg(unix)]
    fn mode_bits(self) -> u32 {
        match self {
            Self::Directory => 0o7777,
            Self::Disk { writable: true, .. } => 0o666,
            Self::Disk { .. } => 0o444,
            Self::Unopenable => 0,
        }
    }

    #[cfg(windows)]
    fn is_read_only(self) -> bool {
        !matches!(self, Self::Directory | Self::Disk { writable: true, .. })
    }
}
