//! The yardstick of `scripts/bench`: serves one raw file over FUSE and does nothing else, so that whatever
//! `vhdfs mount` loses against it is our own doing and not FUSE's.
//!
//! `yardstick FILE MOUNT_POINT [THREADS]` shows FILE as `MOUNT_POINT/disk.raw` until it is unmounted. Session
//! settings (threads, cloned descriptors, request sizes, caching) are those of `vhdfs mount`: keep them so.

#[cfg(not(target_os = "linux"))]
fn main() {
    eprintln!("the yardstick is a FUSE program and runs on Linux only");
}

#[cfg(target_os = "linux")]
fn main() -> std::io::Result<()> {
    serve::run(std::env::args_os().skip(1).collect())
}

#[cfg(target_os = "linux")]
mod serve {
    use std::cell::RefCell;
    use std::ffi::{OsStr, OsString};
    use std::fs::{File, Metadata};
    use std::io;
    use std::os::unix::fs::{FileExt, MetadataExt};
    use std::path::Path;
    use std::time::{Duration, SystemTime};

    use fuser::{
        Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo,
        InitFlags, KernelConfig, LockOwner, MountOption, OpenFlags, ReplyAttr, ReplyData,
        ReplyEmpty, ReplyEntry, ReplyOpen, ReplyWrite, Request, Session, WriteFlags,
    };

    const NAME: &str = "disk.raw";
    const DISK: INodeNo = INodeNo(2);
    const TTL: Duration = Duration::from_secs(60);
    const MAX_REQUEST: u32 = 1 << 20;
    const MAX_BACKGROUND: u16 = 128;

    thread_local! {
        static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
    }

    struct Yardstick {
        file: File,
        metadata: Metadata,
        /// For handles opened with O_DIRECT.
        direct: FopenFlags,
    }

    pub(super) fn run(arguments: Vec<OsString>) -> io::Result<()> {
        let (Some(path), Some(mount_point)) = (arguments.first(), arguments.get(1)) else {
            return Err(io::Error::other(
                "usage: yardstick FILE MOUNT_POINT [THREADS]",
            ));
        };
        let threads = match arguments.get(2).and_then(|text| text.to_str()) {
            Some(text) => text.parse().map_err(io::Error::other)?,
            None => std::thread::available_parallelism()?.get().clamp(4, 32),
        };
        let file = File::options().read(true).write(true).open(path)?;
        let metadata = file.metadata()?;
        let mut config = Config::default();
        config.mount_options = vec![
            MountOption::FSName("yardstick".into()),
            MountOption::DefaultPermissions,
        ];
        config.n_threads = Some(threads);
        config.clone_fd = true;
        let yardstick = Yardstick {
            file,
            metadata,
            direct: FopenFlags::empty(),
        };
        let session = Session::new(yardstick, Path::new(mount_point), &config)?;
        raise_read_ahead(Path::new(mount_point));
        session.run()
    }

    /// As root; others do with the kernel's 128 KiB, here and in `vhdfs mount`.
    fn raise_read_ahead(mount_point: &Path) {
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let mount_point = mount_point.to_string_lossy();
        for line in mounts.lines() {
            let fields: Vec<_> = line.split(' ').collect();
            if fields[4] == mount_point {
                let setting = format!("/sys/class/bdi/{}/read_ahead_kb", fields[2]);
                let _ = std::fs::write(setting, (MAX_REQUEST / 1024).to_string());
            }
        }
    }

    impl Yardstick {
        fn attributes(&self, inode: INodeNo) -> FileAttr {
            let is_disk = inode == DISK;
            FileAttr {
                ino: inode,
                size: if is_disk { self.metadata.size() } else { 0 },
                blocks: if is_disk { self.metadata.blocks() } else { 0 },
                atime: SystemTime::UNIX_EPOCH,
                mtime: SystemTime::UNIX_EPOCH,
                ctime: SystemTime::UNIX_EPOCH,
                crtime: SystemTime::UNIX_EPOCH,
                kind: if is_disk {
                    FileType::RegularFile
                } else {
                    FileType::Directory
                },
                perm: if is_disk { 0o600 } else { 0o700 },
                nlink: 1,
                uid: self.metadata.uid(),
                gid: self.metadata.gid(),
                rdev: 0,
                blksize: 4096,
                flags: 0,
            }
        }
    }

    impl Filesystem for Yardstick {
        fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
            // What an old kernel lacks or limits, it does without.
            let _ = config.add_capabilities(InitFlags::FUSE_ASYNC_DIO);
            let _ = config.add_capabilities(InitFlags::FUSE_HANDLE_KILLPRIV_V2);
            if config
                .add_capabilities(InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP)
                .is_ok()
            {
                self.direct =
                    FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES;
            }
            let _ = config.set_max_write(MAX_REQUEST);
            if let Err(most) = config.set_max_readahead(MAX_REQUEST) {
                let _ = config.set_max_readahead(most);
            }
            let _ = config.set_max_background(MAX_BACKGROUND);
            Ok(())
        }

        fn lookup(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
            if name == NAME {
                reply.entry(&TTL, &self.attributes(DISK), Generation(0));
            } else {
                reply.error(Errno::ENOENT);
            }
        }

        fn getattr(&self, _: &Request, inode: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
            reply.attr(&TTL, &self.attributes(inode));
        }

        fn open(&self, _: &Request, _: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
            let is_direct = rustix::fs::OFlags::from_bits_retain(flags.0.cast_unsigned())
                .contains(rustix::fs::OFlags::DIRECT);
            let direct = if is_direct {
                self.direct
            } else {
                FopenFlags::empty()
            };
            reply.opened(FileHandle(0), FopenFlags::FOPEN_KEEP_CACHE | direct);
        }

        fn read(
            &self,
            _: &Request,
            _: INodeNo,
            _: FileHandle,
            offset: u64,
            size: u32,
            _: OpenFlags,
            _: Option<LockOwner>,
            reply: ReplyData,
        ) {
            let wanted = u64::from(size).min(self.metadata.size().saturating_sub(offset));
            BUFFER.with_borrow_mut(|buffer| {
                let wanted = usize::try_from(wanted).expect("a request fits in memory");
                if buffer.len() < wanted {
                    buffer.resize(wanted, 0);
                }
                match self.file.read_exact_at(&mut buffer[..wanted], offset) {
                    Ok(()) => reply.data(&buffer[..wanted]),
                    Err(error) => reply.error(error.into()),
                }
            });
        }

        fn write(
            &self,
            _: &Request,
            _: INodeNo,
            _: FileHandle,
            offset: u64,
            data: &[u8],
            _: WriteFlags,
            _: OpenFlags,
            _: Option<LockOwner>,
            reply: ReplyWrite,
        ) {
            match self.file.write_all_at(data, offset) {
                Ok(()) => reply.written(u32::try_from(data.len()).expect("a request fits in u32")),
                Err(error) => reply.error(error.into()),
            }
        }

        fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
            match self.file.sync_data() {
                Ok(()) => reply.ok(),
                Err(error) => reply.error(error.into()),
            }
        }
    }
}
