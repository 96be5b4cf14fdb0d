//! What the mount tells about itself, as extended attributes.
//!
//! The root has [`PID_ATTRIBUTE`], the daemon's process id in decimal, and `user.vhdfs.status`, a
//! JSON object about all open disks; a disk has `user.vhdfs.status`, the object about it alone. Users who
//! are neither root nor the daemon's own are told no names: those may be of directories that they cannot
//! read.

use std::ffi::OsStr;
use std::path::Path;

use fuser::{Errno, ReplyXattr};
use serde::Serialize;
use vhdfs::library::{DiskState, DiskStatus, Library, NodeId};

/// Names the daemon's process id. On the mount's root only.
pub(crate) const PID_ATTRIBUTE: &str = "user.vhdfs.pid";

const STATUS_ATTRIBUTE: &str = "user.vhdfs.status";

/// How many disks the root's status lists: the kernel allows 64 KiB for a value.
const MOST_DISKS: usize = 128;

/// How many of its children a disk's status lists.
const MOST_CHILDREN: usize = 64;

#[derive(Serialize)]
struct MountJson {
    pid: u32,
    disks_open: usize,
    handles: usize,
    reclaimed: u64,
    disks: Vec<DiskJson>,
}

#[derive(Serialize)]
struct DiskJson {
    path: String,
    state: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
    handles: usize,
    read_only: bool,
    virtual_size: u64,
    file_length: u64,
    allocated_bytes: u64,
    reclaimed: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    parent: Option<String>,
    children_count: usize,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    children: Vec<String>,
}

#[derive(Serialize)]
struct ClosedJson {
    state: &'static str,
}

impl From<DiskStatus> for DiskJson {
    fn from(status: DiskStatus) -> Self {
        let (state, reason) = match status.state {
            DiskState::Open => ("open", None),
            DiskState::Waiting => ("waiting", None),
            DiskState::Compacting => ("compacting", None),
            DiskState::Compact => ("compact", None),
            DiskState::Failed(reason) => ("failed", Some(reason)),
            _ => ("unknown", None),
        };
        Self {
            path: shown(&status.path),
            state,
            reason,
            handles: status.handles,
            read_only: status.read_only,
            virtual_size: status.virtual_size,
            file_length: status.length,
            allocated_bytes: status.allocated,
            reclaimed: status.reclaimed,
            parent: status.parent.as_deref().map(shown),
            children_count: status.children.len(),
            children: (status.children.iter().take(MOST_CHILDREN))
                .map(|path| shown(path))
                .collect(),
        }
    }
}

fn shown(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

/// The attribute names of a node, each ended by a zero byte.
pub(super) fn names(node: NodeId) -> Vec<u8> {
    let names: &[&str] = match node {
        NodeId::ROOT => &[PID_ATTRIBUTE, STATUS_ATTRIBUTE],
        _ => &[STATUS_ATTRIBUTE],
    };
    names
        .iter()
        .flat_map(|name| name.bytes().chain([0]))
        .collect()
}

/// Whether the user with that number is told the names of other files than the one asked about.
pub(super) fn may_know(uid: u32) -> bool {
    uid == 0 || uid == rustix::process::geteuid().as_raw()
}

/// The value of a node's attribute, if it has it, `named` if with the names of other files.
pub(super) fn value(library: &Library, node: NodeId, name: &OsStr, named: bool) -> Option<Vec<u8>> {
    let is_root = node == NodeId::ROOT;
    if is_root && name == PID_ATTRIBUTE {
        return Some(std::process::id().to_string().into_bytes());
    }
    if name != STATUS_ATTRIBUTE {
        return None;
    }
    let json = match is_root {
        true => serde_json::to_vec(&mount_status(library, named)),
        false => match library.disk_status(node) {
            Some(mut status) => {
                if !named {
                    (status.parent, status.children) = (None, Vec::new());
                }
                serde_json::to_vec(&DiskJson::from(status))
            }
            None => serde_json::to_vec(&ClosedJson { state: "closed" }),
        },
    };
    json.ok()
}

fn mount_status(library: &Library, named: bool) -> MountJson {
    let disks = library.status();
    MountJson {
        pid: std::process::id(),
        disks_open: disks.len(),
        handles: disks.iter().map(|disk| disk.handles).sum(),
        reclaimed: disks.iter().map(|disk| disk.reclaimed).sum(),
        disks: disks
            .into_iter()
            .take(if named { MOST_DISKS } else { 0 })
            .map(|disk| DiskJson {
                // Their number has to do: there is not room for all names.
                children: Vec::new(),
                ..DiskJson::from(disk)
            })
            .collect(),
    }
}

/// Answers with a value, or with its size where the caller asks for that alone.
pub(super) fn reply(value: &[u8], size: u32, reply: ReplyXattr) {
    match u32::try_from(value.len()) {
        Ok(len) if size == 0 => reply.size(len),
        Ok(len) if len <= size => reply.data(value),
        _ => reply.error(Errno::ERANGE),
    }
}
