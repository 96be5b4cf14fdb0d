//! FUSE's requests, one method each; see the parent module for what they mean.

use std::cell::RefCell;
use std::ffi::OsStr;
use std::io;
use std::ops::ControlFlow;
use std::time::{Duration, SystemTime};

use fuser::{
    BsdFileFlags, Errno, FileHandle, Filesystem, FopenFlags, Generation, INodeNo, IoctlFlags,
    KernelConfig, LockOwner, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData,
    ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyIoctl, ReplyLseek, ReplyOpen, ReplyStatfs,
    ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};
use vhdfs::library::{NodeId, NodeKind};

use super::attributes::{self, file_attr};
use super::{Opening, VhdFs, errno, session, user_of, xattrs};
use crate::front::{FIRST_PLACE, Reader};

/// How long the kernel may believe attributes that it did not just look up. An open file's size is
/// fixed, so only times, modes and stored bytes can be out of date.
const ATTRIBUTES_VALID: Duration = Duration::from_secs(1);

/// How long the kernel may believe that a name leads to a node.
const NAMES_VALID: Duration = Duration::ZERO;

/// Node numbers are never used twice.
const GENERATION: Generation = Generation(0);

/// Stands for the inode number of an entry that was not looked up.
const UNKNOWN_INODE: INodeNo = INodeNo(0xffff_ffff);

thread_local! {
    /// What a read passes through. One for each worker: reading neither allocates nor clears.
    static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

fn node(inode: INodeNo) -> NodeId {
    NodeId::new(inode.0)
}

impl Filesystem for VhdFs {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        self.direct = session::configure(config);
        Ok(())
    }

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let (library, parent, wanted) = (self.library.clone(), node(parent), name.to_owned());
        self.look(parent, Some(name), move || {
            match library.lookup(parent, &wanted) {
                Ok(found) => reply.entry_with_ttls(
                    &ATTRIBUTES_VALID,
                    &NAMES_VALID,
                    &file_attr(&found),
                    GENERATION,
                ),
                Err(error) => reply.error(errno::of_library(&error)),
            }
        });
    }

    fn forget(&self, _: &Request, inode: INodeNo, count: u64) {
        self.library.forget(node(inode), count);
    }

    fn getattr(&self, _: &Request, inode: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        let (library, node) = (self.library.clone(), node(inode));
        self.look(node, None, move || match library.attributes(node) {
            Ok(found) => reply.attr(&ATTRIBUTES_VALID, &file_attr(&found)),
            Err(error) => reply.error(errno::of_library(&error)),
        });
    }

    fn setattr(
        &self,
        _: &Request,
        inode: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        accessed: Option<TimeOrNow>,
        modified: Option<TimeOrNow>,
        _: Option<SystemTime>,
        _: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let (library, node) = (self.library.clone(), node(inode));
        self.look(node, None, move || {
            let found = match library.attributes(node) {
                Ok(found) => found,
                Err(error) => return reply.error(errno::of_library(&error)),
            };
            let same_time = |wanted: Option<TimeOrNow>, is: SystemTime| match wanted {
                None => true,
                Some(TimeOrNow::SpecificTime(wanted)) => wanted == is,
                Some(TimeOrNow::Now) => false,
            };
            // The kernel sets the size that is when a direct write past the end has failed, and the
            // times along with a change of size.
            let is_so = mode.is_none_or(|mode| mode & 0o7777 == found.mode)
                && uid.is_none_or(|uid| uid == found.uid)
                && gid.is_none_or(|gid| gid == found.gid)
                && match size {
                    Some(size) => size == found.size,
                    None => {
                        same_time(accessed, found.accessed) && same_time(modified, found.modified)
                    }
                };
            if is_so {
                reply.attr(&ATTRIBUTES_VALID, &file_attr(&found));
            } else {
                reply.error(Errno::EPERM);
            }
        });
    }

    fn open(&self, request: &Request, inode: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let opening = Opening {
            library: self.library.clone(),
            files: self.files.clone(),
            direct: self.direct,
            node: node(inode),
            flags,
            user: user_of(request),
        };
        let openers = match self.library.is_elsewhere(opening.node, None) {
            true => &self.elsewhere,
            false => &self.openers,
        };
        openers.run(Box::new(move || match opening.finish() {
            Ok((number, answer)) => reply.opened(FileHandle(number), answer),
            Err(error) => reply.error(errno::of_library(&error)),
        }));
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        number: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let Some(file) = self.files.get(number.0) else {
            return reply.error(Errno::ENOTCONN);
        };
        let Ok(size) = usize::try_from(size) else {
            return reply.error(Errno::EINVAL);
        };
        let wanted = file.inside(offset, size);
        BUFFER.with_borrow_mut(|buffer| {
            if buffer.len() < wanted {
                buffer.resize(wanted, 0);
            }
            let buffer = &mut buffer[..wanted];
            match file.read(buffer, offset) {
                Ok(_) => reply.data(buffer),
                Err(refused) => reply.error(refused.into()),
            }
        });
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        number: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        flags: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        match self.write_file(number, offset, data, flags) {
            Ok(written) => reply.written(written),
            Err(errno) => reply.error(errno),
        }
    }

    /// A descriptor is closed. Nothing waits to be written.
    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    fn release(
        &self,
        _: &Request,
        _: INodeNo,
        number: FileHandle,
        _: OpenFlags,
        _: Option<LockOwner>,
        _: bool,
        reply: ReplyEmpty,
    ) {
        self.files.remove(number.0);
        reply.ok();
    }

    fn fsync(&self, _: &Request, _: INodeNo, number: FileHandle, _: bool, reply: ReplyEmpty) {
        answer(reply, self.with_file(number, |file| Ok(file.flush()?)));
    }

    fn fallocate(
        &self,
        _: &Request,
        _: INodeNo,
        number: FileHandle,
        offset: u64,
        len: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        answer(reply, self.allocate(number, offset, len, mode));
    }

    fn lseek(
        &self,
        _: &Request,
        _: INodeNo,
        number: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        match self.seek(number, offset, whence) {
            Ok(place) => reply.offset(place),
            Err(errno) => reply.error(errno),
        }
    }

    fn opendir(&self, _: &Request, inode: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        let (library, node) = (self.library.clone(), node(inode));
        let directories = self.directories.clone();
        self.look(node, None, move || {
            // Whether it can be read is told now.
            let open = (library.directory(node))
                .and_then(|directory| directory.read(&mut |_| ControlFlow::Break(())));
            match open {
                Ok(()) => match directories.insert(Reader::new(node)) {
                    Some(number) => reply.opened(FileHandle(number), FopenFlags::empty()),
                    None => reply.error(Errno::ENOTCONN),
                },
                Err(error) => reply.error(errno::of_library(&error)),
            }
        });
    }

    fn readdir(
        &self,
        _: &Request,
        _: INodeNo,
        number: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        let Some(reader) = self.directories.get(number.0) else {
            return reply.error(Errno::EBADF);
        };
        let (library, listings) = (self.library.clone(), self.listings.clone());
        self.look(reader.node, None, move || {
            let from = (offset >= FIRST_PLACE).then_some(&offset);
            let page = match listings.page(&library, &reader, from, offset == 0) {
                Ok(page) => page,
                Err(error) => return reply.error(errno::of_library(&error)),
            };
            // An entry's offset is where to go on after it.
            let dots = [
                (1, INodeNo(reader.node.get()), "."),
                (2, UNKNOWN_INODE, ".."),
            ]
            .map(|(next, inode, name)| (next, inode, NodeKind::Directory, OsStr::new(name)));
            let dots = dots.into_iter().filter(|(next, ..)| *next > offset);
            let entries = (page.behind(from).iter())
                .map(|entry| (*entry.place(), UNKNOWN_INODE, entry.kind, &*entry.name));
            for (next, inode, kind, name) in dots.chain(entries) {
                if reply.add(inode, next, attributes::file_type(kind), name) {
                    break;
                }
            }
            reply.ok();
        });
    }

    fn releasedir(
        &self,
        _: &Request,
        _: INodeNo,
        number: FileHandle,
        _: OpenFlags,
        reply: ReplyEmpty,
    ) {
        self.directories.remove(number.0);
        reply.ok();
    }

    fn fsyncdir(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        reply.ok();
    }

    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        match self.library.space() {
            Ok(space) => {
                let block_size = u32::try_from(space.block_size).unwrap_or(u32::MAX);
                // Room for the suffix that shown names have.
                let name_max = u32::try_from(space.name_max)
                    .unwrap_or(u32::MAX)
                    .saturating_add(4);
                reply.statfs(
                    space.blocks,
                    space.blocks_free,
                    space.blocks_available,
                    space.files,
                    space.files_free,
                    block_size,
                    name_max,
                    block_size,
                );
            }
            Err(error) => reply.error(errno::of_library(&error)),
        }
    }

    fn getxattr(
        &self,
        request: &Request,
        inode: INodeNo,
        name: &OsStr,
        size: u32,
        reply: ReplyXattr,
    ) {
        let named = xattrs::may_know(request.uid());
        match xattrs::value(&self.library, node(inode), name, named) {
            Some(value) => xattrs::reply(&value, size, reply),
            None => reply.error(Errno::ENODATA),
        }
    }

    fn listxattr(&self, _: &Request, inode: INodeNo, size: u32, reply: ReplyXattr) {
        xattrs::reply(&xattrs::names(node(inode)), size, reply);
    }

    fn setxattr(
        &self,
        _: &Request,
        _: INodeNo,
        _: &OsStr,
        _: &[u8],
        _: i32,
        _: u32,
        reply: ReplyEmpty,
    ) {
        reply.error(Errno::EOPNOTSUPP);
    }

    fn removexattr(&self, _: &Request, _: INodeNo, _: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::EOPNOTSUPP);
    }

    fn ioctl(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _: IoctlFlags,
        _: u32,
        _: &[u8],
        _: u32,
        reply: ReplyIoctl,
    ) {
        reply.error(Errno::ENOTTY);
    }

    fn mknod(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, _: u32, _: u32, reply: ReplyEntry) {
        reply.error(Errno::EPERM);
    }

    fn mkdir(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, _: u32, reply: ReplyEntry) {
        reply.error(Errno::EPERM);
    }

    fn create(
        &self,
        _: &Request,
        _: INodeNo,
        _: &OsStr,
        _: u32,
        _: u32,
        _: i32,
        reply: ReplyCreate,
    ) {
        reply.error(Errno::EPERM);
    }

    fn unlink(&self, _: &Request, _: INodeNo, _: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::EPERM);
    }

    fn rmdir(&self, _: &Request, _: INodeNo, _: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::EPERM);
    }

    fn rename(
        &self,
        _: &Request,
        _: INodeNo,
        _: &OsStr,
        _: INodeNo,
        _: &OsStr,
        _: RenameFlags,
        reply: ReplyEmpty,
    ) {
        reply.error(Errno::EPERM);
    }

    fn link(&self, _: &Request, _: INodeNo, _: INodeNo, _: &OsStr, reply: ReplyEntry) {
        reply.error(Errno::EPERM);
    }

    fn symlink(&self, _: &Request, _: INodeNo, _: &OsStr, _: &std::path::Path, reply: ReplyEntry) {
        reply.error(Errno::EPERM);
    }
}

fn answer(reply: ReplyEmpty, result: Result<(), Errno>) {
    match result {
        Ok(()) => reply.ok(),
        Err(errno) => reply.error(errno),
    }
}
