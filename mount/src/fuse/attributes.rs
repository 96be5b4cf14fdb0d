//! A node's attributes as FUSE wants them.

use std::time::SystemTime;

use fuser::{FileAttr, FileType, INodeNo};
use vhdfs::library::{Attributes, NodeKind};

/// What programs are advised to read and write at once. The host's own block size.
const PREFERRED_IO: u32 = 4096;

/// The kind as FUSE has it.
pub(super) fn file_type(kind: NodeKind) -> FileType {
    match kind {
        NodeKind::Directory => FileType::Directory,
        NodeKind::Disk => FileType::RegularFile,
    }
}

/// All attributes of a node.
pub(super) fn file_attr(found: &Attributes) -> FileAttr {
    FileAttr {
        ino: INodeNo(found.node.get()),
        size: found.size,
        blocks: found.allocated.div_ceil(512),
        atime: found.accessed,
        mtime: found.modified,
        ctime: found.changed,
        crtime: SystemTime::UNIX_EPOCH,
        kind: file_type(found.kind),
        // At most 0o7777.
        perm: u16::try_from(found.mode & 0o7777).unwrap_or_default(),
        nlink: found.links,
        uid: found.uid,
        gid: found.gid,
        rdev: 0,
        blksize: PREFERRED_IO,
        flags: 0,
    }
}
