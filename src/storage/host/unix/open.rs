//! Opening a host file, beside others who have it open.

use std::fs::{File, FileType};
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags};
use rustix::io::{Errno, retry_on_intr};

use super::{holders, lease};
use crate::error::{OpenError, OpenProblem};
use crate::storage::host::HostOptions;
use crate::storage::host::pin::Pin;
use crate::storage::lock::{self, Access, LockError};

/// How long somebody may take to give up a lease before the file counts as in use, where it is to be worked
/// on.
pub(super) const FOR_A_LEASE: Duration = Duration::from_secs(2);

/// How long a process that is just being started may keep a descriptor that was closed already.
const FOR_A_CHILD: Duration = Duration::from_millis(100);

/// How long between two tries.
const AGAIN: Duration = Duration::from_millis(5);

pub(super) fn open_file(path: &Path, flags: OFlags) -> rustix::io::Result<File> {
    Ok(File::from(retry_on_intr(|| {
        rustix::fs::open(path, flags, Mode::empty())
    })?))
}

/// Opens the regular file at `path`. Who has a lease on it is waited for with `patience`.
pub(super) fn open_regular(
    path: &Path,
    options: &HostOptions,
    patience: Duration,
) -> Result<File, OpenError> {
    let mut flags = OFlags::CLOEXEC | OFlags::NOCTTY;
    // A FIFO without a writer must not hang us. Regular files ignore the flag, but for leases.
    flags |= OFlags::NONBLOCK;
    flags |= if options.read_only {
        OFlags::RDONLY
    } else {
        OFlags::RDWR
    };
    if options.no_follow {
        flags |= OFlags::NOFOLLOW;
    }
    let io = |action| move |source| OpenError::new(path, OpenProblem::Io { action, source });
    let begun = Instant::now();
    let opened = loop {
        match open_file(path, flags) {
            Err(Errno::AGAIN) if begun.elapsed() < patience => std::thread::sleep(AGAIN),
            opened => break opened,
        }
    };
    let file = opened.map_err(|error| match error {
        // What the host answers to O_NOFOLLOW says nothing to a user.
        Errno::LOOP if options.no_follow => io("open the file")(io::Error::other(
            "it is a symbolic link, which is not followed",
        )),
        // Opening a directory for writing: name it as below.
        Errno::ISDIR => io("open the file")(not_regular("a directory")),
        // A FIFO without a reader, or a socket.
        Errno::NXIO => io("open the file")(not_regular("a socket or a FIFO")),
        Errno::AGAIN => {
            let holder = "it has a lease on the file and does not give it up".to_owned();
            OpenError::new(path, OpenProblem::InUse(holder))
        }
        error => io("open the file")(error.into()),
    })?;
    let file_type = file
        .metadata()
        .map_err(io("read the file's attributes"))?
        .file_type();
    match file_type.is_file() {
        true => Ok(file),
        false => Err(io("open the file")(not_regular(type_name(file_type)))),
    }
}

/// Opens a file again for writing, of which others have seen to be users, once none of them writes: only
/// when we do not have it open ourselves does the host tell.
pub(super) fn open_beside_readers(
    file: File,
    access: Access,
    path: &Path,
) -> Result<File, OpenError> {
    let io = |source| {
        let action = "find out who else has the file open";
        OpenError::new(path, OpenProblem::Io { action, source })
    };
    let pin = Pin::of(&file).map_err(io)?;
    lock::unlock(&file);
    drop(file);
    let begun = Instant::now();
    let options = HostOptions::default();
    let reading = HostOptions {
        read_only: true,
        ..options
    };
    loop {
        let reader = open_regular(&pin.path(), &reading, FOR_A_LEASE)
            .map_err(|error| error.renamed(path))?;
        if lease::has_writer(&reader) != Some(true) {
            break;
        }
        if begun.elapsed() > FOR_A_CHILD {
            let holder = holders::of(&reader);
            return Err(OpenError::new(path, OpenProblem::InUse(holder)));
        }
        drop(reader);
        std::thread::sleep(AGAIN);
    }
    let file =
        open_regular(&pin.path(), &options, FOR_A_LEASE).map_err(|error| error.renamed(path))?;
    lock_as(&file, access, path)?;
    Ok(file)
}

pub(super) fn lock_as(file: &File, access: Access, path: &Path) -> Result<(), OpenError> {
    lock::lock(file, access).map_err(|error| {
        let problem = match error {
            LockError::Conflict(holder) => {
                OpenProblem::InUse(format!("{holder}, perhaps a mounted vhdfs"))
            }
            LockError::Io(source) => OpenProblem::Io {
                action: "lock the file",
                source,
            },
        };
        OpenError::new(path, problem)
    })
}

fn not_regular(what: &str) -> io::Error {
    let text = format!("it is {what}, not a regular file");
    io::Error::new(io::ErrorKind::InvalidInput, text)
}

fn type_name(file_type: FileType) -> &'static str {
    if file_type.is_dir() {
        "a directory"
    } else if file_type.is_fifo() {
        "a FIFO"
    } else if file_type.is_block_device() {
        "a block device"
    } else if file_type.is_char_device() {
        "a character device"
    } else {
        "something special"
    }
}
