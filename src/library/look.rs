//! What is told of a node: its name, its attributes.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Component, Path};

use super::host_dir::{self, HostKind, Place, Stat};
use super::probes::Known;
use super::user::shown_mode;
use super::{Attributes, Core, LibraryError, NodeId, NodeKind, names};

impl Core {
    pub(super) fn lookup_in(
        &self,
        directory: BorrowedFd<'_>,
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
            (names::backing(name), HostKind::File),
            (Some(name), HostKind::Directory),
        ];
        for (host_name, kind) in wanted {
            let Some(host_name) = host_name else { continue };
            let place = Place {
                directory,
                name: host_name,
            };
            let path = parent.join(host_name);
            match place.stat() {
                Ok(stat) if stat.kind == kind => {
                    let node = self.nodes.lock().refer(stat.identity, kind, &path);
                    return Ok(match kind {
                        HostKind::File => self.show_disk(node, &stat, &path, &place),
                        _ => {
                            let mode = shown_mode(&stat, || place.access_list());
                            show(node, NodeKind::Directory, &stat, stat.len, mode)
                        }
                    });
                }
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(LibraryError::io(&path, "read attributes", error)),
            }
        }
        Err(LibraryError::NotFound {
            path: parent.join(name),
        })
    }

    pub(super) fn attributes(&self, id: NodeId) -> Result<Attributes, LibraryError> {
        let node = self.node(id)?;
        let fail = |source| LibraryError::io(&node.path, "read attributes", source);
        if node.is_directory {
            let directory = self.open_directory(&node)?;
            let stat = host_dir::stat_open(directory.as_fd()).map_err(fail)?;
            let mode = shown_mode(&stat, || host_dir::access_list_of(directory.as_fd()));
            return Ok(show(id, NodeKind::Directory, &stat, stat.len, mode));
        }
        // Also where the file has no name any more.
        if let Some(open) = self.disks.get(&node.identity)
            && let Some(size) = open.virtual_size()
        {
            let stat = open.pinned.stat().map_err(fail)?;
            let may_write = open.allows_writing() && !self.is_parent(&stat);
            let mode = disk_mode(shown_mode(&stat, || open.pinned.access_list()), may_write);
            return Ok(show(id, NodeKind::Disk, &stat, size, mode));
        }
        let (directory, name) = self.host.parent(&node.path).map_err(fail)?;
        let place = Place {
            directory: directory.as_fd(),
            name,
        };
        let stat = place.stat().map_err(fail)?;
        if stat.identity != node.identity {
            return Err(LibraryError::Stale { path: node.path });
        }
        Ok(self.show_disk(id, &stat, &node.path, &place))
    }

    fn show_disk(&self, node: NodeId, stat: &Stat, path: &Path, place: &Place<'_>) -> Attributes {
        let allowed = shown_mode(stat, || place.access_list());
        if let Some(open) = self.disks.get(&stat.identity)
            && let Some(size) = open.virtual_size()
        {
            let mode = disk_mode(allowed, open.allows_writing() && !self.is_parent(stat));
            return show(node, NodeKind::Disk, stat, size, mode);
        }
        match self.probes.look(&stat.stamp(), path, || place.pin()) {
            Known::Disk(disk) => {
                let may_write = !disk.frozen && !self.options.read_only && !self.is_parent(stat);
                let mode = disk_mode(allowed, may_write && place.is_writable(stat));
                show(node, NodeKind::Disk, stat, disk.size, mode)
            }
            Known::Unopenable(_) => show(node, NodeKind::Disk, stat, 0, 0),
        }
    }

    /// Whether other disks are over that one, as last looked for.
    fn is_parent(&self, stat: &Stat) -> bool {
        self.families.latest().is_parent(&stat.identity)
    }
}

fn show(node: NodeId, kind: NodeKind, stat: &Stat, size: u64, mode: u32) -> Attributes {
    Attributes {
        node,
        kind,
        size,
        allocated: stat.allocated,
        accessed: stat.accessed,
        modified: stat.modified,
        changed: stat.changed,
        mode,
        uid: stat.uid,
        gid: stat.gid,
        links: stat.links,
    }
}

/// A disk is data: nothing to execute.
fn disk_mode(mode: u32, writable: bool) -> u32 {
    mode & if writable { 0o666 } else { 0o444 }
}
