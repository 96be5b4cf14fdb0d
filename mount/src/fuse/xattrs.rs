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
use vhdfs::compact::{CompactReport, Kept};
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
    /// Of how much of the time it is compacted beside its guest now, from 0 to 1.
    busy_share: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    last_run: Option<RunJson>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    left: Vec<LeftJson>,
    #[serde(skip_serializing_if = "Option::is_none")]
    host_free: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    parent: Option<String>,
    children_count: usize,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    children: Vec<String>,
}

/// What the last compaction in the background came to.
#[derive(Serialize)]
struct RunJson {
    seconds: f64,
    /// Of those, with the guest active.
    seconds_beside_guest: f64,
    bytes_read: u64,
    bytes_moved: u64,
    bytes_moved_in_vain: u64,
    moves_given_up: u64,
    /// By which the file got shorter.
    length_given_back: u64,
    /// By which the host stores less.
    allocated_given_back: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    not_fs_aware: Option<String>,
}

impl From<&CompactReport> for RunJson {
    fn from(run: &CompactReport) -> Self {
        Self {
            seconds: run.took.as_secs_f64(),
            seconds_beside_guest: run.beside_guest.as_secs_f64(),
            bytes_read: run.bytes_read,
            bytes_moved: run.bytes_moved,
            bytes_moved_in_vain: run.bytes_in_vain,
            moves_given_up: run.given_up,
            length_given_back: run.length_before.saturating_sub(run.length_after),
            allocated_given_back: run.allocated_before.saturating_sub(run.allocated_after),
            not_fs_aware: run.not_surveyed.clone(),
        }
    }
}

/// What could go and is left, and why.
#[derive(Serialize)]
struct LeftJson {
    reason: String,
    bytes: u64,
}

fn left(status: &DiskStatus) -> Vec<LeftJson> {
    let too_little = Kept {
        reason: "less than --min-reclaim".to_owned(),
        bytes: status.too_little,
    };
    let of_run = status.last_run.iter().flat_map(|run| &run.left);
    of_run
        .chain(std::iter::once(&too_little))
        .filter(|left| left.bytes > 0)
        .map(|left| LeftJson {
            reason: left.reason.clone(),
            bytes: left.bytes,
        })
        .collect()
}

#[derive(Serialize)]
struct ClosedJson {
    state: &'static str,
}

impl From<DiskStatus> for DiskJson {
    fn from(status: DiskStatus) -> Self {
        let left = left(&status);
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
            busy_share: status.busy_share,
            last_run: status.last_run.as_deref().map(RunJson::from),
            left,
            host_free: status.room.map(|room| room.free),
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
        reclaimed: library.reclaimed(),
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
