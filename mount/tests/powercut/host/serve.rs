//! The process that serves a faulty host through FUSE.
//!
//! The kernel caches nothing, unless it is let: what is asked for arrives here at once, and what is answered is
//! seen.

use std::ffi::OsStr;
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime};

use fuser::{
    BsdFileFlags, Config, CopyFileRangeFlags, Errno, FileAttr, FileHandle, FileType, Filesystem,
    FopenFlags, Generation, INodeNo, KernelConfig, LockOwner, MountOption, OpenFlags, ReplyAttr,
    ReplyCreate, ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyLseek, ReplyOpen,
    ReplyStatfs, ReplyWrite, Request, Session, TimeOrNow, WriteFlags,
};
use rustix::fs::FallocateFlags;
use vhdfs::storage::Storage;
use vhdfs::storage::sim::OpKind;
use vhdfs::units::{FileOffset, FileRange};

use super::files::{Files, Node, ROOT};
use super::orders::{Answer, Order};

const NO_TIME: Duration = Duration::ZERO;
const MAX_REQUEST: u32 = 1 << 20;
const THREADS: usize = 4;

/// Mounts an empty host, and obeys the orders that come on standard input, a socket, until it ends.
pub(crate) fn run(mount_point: &Path) -> io::Result<()> {
    let orders = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    let mut answers = orders.try_clone()?;
    let files = Arc::new(Files::new());
    let mut config = Config::default();
    config.mount_options = vec![
        MountOption::FSName("faulty".into()),
        MountOption::DefaultPermissions,
    ];
    config.n_threads = Some(THREADS);
    config.clone_fd = true;
    let session = Session::new(Host(files.clone()), mount_point, &config)?;
    let _session = session.spawn()?;
    let mut answer = |answer: &Result<Answer, String>| {
        let line = serde_json::to_string(answer).map_err(io::Error::other)?;
        writeln!(answers, "{line}")
    };
    answer(&files.obey(Order::Report))?;
    for line in BufReader::new(orders).lines() {
        let order = serde_json::from_str(&line?).map_err(io::Error::other)?;
        answer(&files.obey(order))?;
    }
    // Who gave the orders is gone, perhaps killed, and so may be all who would clear away.
    Command::new("umount").arg("-l").arg(mount_point).status()?;
    Ok(())
}

struct Host(Arc<Files>);

fn errno(error: io::Error) -> Errno {
    match error.kind() {
        io::ErrorKind::NotFound => Errno::ENOENT,
        io::ErrorKind::AlreadyExists => Errno::EEXIST,
        io::ErrorKind::StorageFull => Errno::ENOSPC,
        io::ErrorKind::InvalidInput => Errno::EINVAL,
        io::ErrorKind::FileTooLarge => Errno::EFBIG,
        io::ErrorKind::Unsupported => Errno::EOPNOTSUPP,
        _ => Errno::EIO,
    }
}

fn answer(reply: ReplyEmpty, result: io::Result<()>) {
    match result {
        Ok(()) => reply.ok(),
        Err(error) => reply.error(errno(error)),
    }
}

fn range(offset: u64, len: u64) -> FileRange {
    FileRange::new(FileOffset::new(offset), len)
}

impl Host {
    fn attributes(&self, number: INodeNo) -> io::Result<FileAttr> {
        if number.0 == ROOT {
            return Ok(attributes(
                number,
                FileType::Directory,
                0o755,
                (0, 0),
                SystemTime::UNIX_EPOCH,
            ));
        }
        self.0.work(number.0, OpKind::Query, |node| {
            let sizes = Files::sizes(node)?;
            Ok(attributes(
                number,
                FileType::RegularFile,
                node.mode,
                sizes,
                node.modified(),
            ))
        })
    }

    fn entry(&self, name: &OsStr) -> io::Result<FileAttr> {
        self.attributes(INodeNo(self.0.find(name)?))
    }

    fn open_flags(&self) -> FopenFlags {
        match self.0.is_cached.load(Ordering::SeqCst) {
            true => FopenFlags::FOPEN_KEEP_CACHE,
            false => FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES,
        }
    }

    fn query<T>(
        &self,
        number: INodeNo,
        work: impl FnOnce(&Node) -> io::Result<T>,
    ) -> io::Result<T> {
        self.0.work(number.0, OpKind::Query, work)
    }
}

fn attributes(
    ino: INodeNo,
    kind: FileType,
    mode: u32,
    (size, stored): (u64, u64),
    time: SystemTime,
) -> FileAttr {
    FileAttr {
        ino,
        size,
        blocks: stored / 512,
        atime: time,
        mtime: time,
        ctime: time,
        crtime: time,
        kind,
        perm: u16::try_from(mode & 0o7777).expect("twelve bits"),
        nlink: 1,
        uid: rustix::process::geteuid().as_raw(),
        gid: rustix::process::getegid().as_raw(),
        rdev: 0,
        blksize: 4096,
        flags: 0,
    }
}

impl Filesystem for Host {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        let _ = config.set_max_write(MAX_REQUEST);
        Ok(())
    }

    fn lookup(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match self.entry(name) {
            Ok(found) => reply.entry(&NO_TIME, &found, Generation(0)),
            Err(error) => reply.error(errno(error)),
        }
    }

    fn getattr(&self, _: &Request, number: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match self.attributes(number) {
            Ok(found) => reply.attr(&NO_TIME, &found),
            Err(error) => reply.error(errno(error)),
        }
    }

    fn setattr(
        &self,
        _: &Request,
        number: INodeNo,
        _: Option<u32>,
        _: Option<u32>,
        _: Option<u32>,
        size: Option<u64>,
        _: Option<TimeOrNow>,
        _: Option<TimeOrNow>,
        _: Option<SystemTime>,
        _: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let cut = size.map_or(Ok(()), |size| {
            self.0
                .work(number.0, OpKind::SetLen, |node| node.storage.set_len(size))
        });
        match cut.and_then(|()| self.attributes(number)) {
            Ok(found) => reply.attr(&NO_TIME, &found),
            Err(error) => reply.error(errno(error)),
        }
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        reply.opened(FileHandle(0), self.open_flags());
    }

    fn create(
        &self,
        _: &Request,
        _: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        _: i32,
        reply: ReplyCreate,
    ) {
        let created = self.0.create(name, mode & !umask);
        match created.and_then(|_| self.entry(name)) {
            Ok(found) => {
                let flags = self.open_flags();
                reply.created(&NO_TIME, &found, Generation(0), FileHandle(0), flags);
            }
            Err(error) => reply.error(errno(error)),
        }
    }

    fn unlink(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        answer(reply, self.0.remove(name));
    }

    fn read(
        &self,
        _: &Request,
        number: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let read = self.0.work(number.0, OpKind::Read, |node| {
            let there = node.storage.len()?.saturating_sub(offset).min(size.into());
            let mut bytes = vec![0; usize::try_from(there).expect("a request fits in memory")];
            node.storage
                .read_exact_at(&mut bytes, FileOffset::new(offset))?;
            Ok(bytes)
        });
        match read {
            Ok(bytes) => reply.data(&bytes),
            Err(error) => reply.error(errno(error)),
        }
    }

    fn write(
        &self,
        _: &Request,
        number: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let written = self.0.work(number.0, OpKind::Write, |node| {
            node.storage.write_all_at(data, FileOffset::new(offset))
        });
        match written {
            Ok(()) => reply.written(u32::try_from(data.len()).expect("a request fits in u32")),
            Err(error) => reply.error(errno(error)),
        }
    }

    fn fsync(&self, _: &Request, number: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        answer(reply, self.0.sync(number.0));
    }

    fn fsyncdir(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        answer(reply, self.0.sync_names());
    }

    fn fallocate(
        &self,
        _: &Request,
        number: INodeNo,
        _: FileHandle,
        offset: u64,
        len: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let mode = u32::from_ne_bytes(mode.to_ne_bytes());
        let action = FallocateFlags::from_bits_retain(mode).difference(FallocateFlags::KEEP_SIZE);
        let done = match action {
            FallocateFlags::PUNCH_HOLE => self.0.work(number.0, OpKind::PunchHole, |node| {
                node.storage.punch_hole(range(offset, len))
            }),
            FallocateFlags::ZERO_RANGE => self.0.work(number.0, OpKind::WriteZeroes, |node| {
                node.storage.write_zeroes(range(offset, len))
            }),
            _ => Err(io::ErrorKind::Unsupported.into()),
        };
        answer(reply, done);
    }

    fn lseek(
        &self,
        _: &Request,
        number: INodeNo,
        _: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        // As lseek(2) has it; the other one that arrives here is SEEK_HOLE.
        const SEEK_DATA: i32 = 3;
        let from = u64::try_from(offset).unwrap_or(u64::MAX);
        let found = self.query(number, |node| {
            let end = node.storage.len()?;
            if from >= end {
                return Ok(None);
            }
            let data = node
                .storage
                .next_data(FileOffset::new(from), FileOffset::new(end))?;
            Ok(match (whence, data) {
                (SEEK_DATA, data) => data.map(|data| data.start.get()),
                (_, Some(data)) if data.start.get() == from => Some(data.end().get()),
                _ => Some(from),
            })
        });
        match found {
            Ok(Some(place)) => reply.offset(i64::try_from(place).expect("inside a file")),
            Ok(None) => reply.error(Errno::ENXIO),
            Err(error) => reply.error(errno(error)),
        }
    }

    fn copy_file_range(
        &self,
        _: &Request,
        number: INodeNo,
        _: FileHandle,
        from: u64,
        to_number: INodeNo,
        _: FileHandle,
        to: u64,
        len: u64,
        _: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        if number != to_number {
            return reply.error(Errno::EXDEV);
        }
        let copied = self.0.work(number.0, OpKind::CopyWithin, |node| {
            let there = node.storage.len()?.saturating_sub(from).min(len);
            node.storage
                .copy_within(range(from, there), FileOffset::new(to))?;
            Ok(there)
        });
        match copied {
            Ok(copied) => reply.written(u32::try_from(copied).expect("a request fits in u32")),
            Err(error) => reply.error(errno(error)),
        }
    }

    fn readdir(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        let names = match self.0.list() {
            Ok(names) => names,
            Err(error) => return reply.error(errno(error)),
        };
        let skipped = usize::try_from(offset).expect("a directory fits in memory");
        // An entry's offset is where to go on after it.
        for (next, (number, name)) in (1..).zip(&names).skip(skipped) {
            if reply.add(INodeNo(*number), next, FileType::RegularFile, name) {
                break;
            }
        }
        reply.ok();
    }

    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        let blocks = 1 << 20;
        reply.statfs(blocks, blocks, blocks, 1000, 1000, 4096, 255, 4096);
    }
}
