//! QEMU's image locks, so that its tools and this crate keep each other from an image in use.
//!
//! Who opens an image holds, for each permission it uses, a shared lock on one byte, and, for each
//! permission that it does not want others to use, a shared lock on another. Shared locks never
//! conflict, so taking them does not fail; afterwards one looks whether anybody else holds a byte
//! that contradicts. Two who start at once may therefore refuse each other, but never both go on.
//!
//! ```text
//! byte 100 + n   somebody uses permission n
//! byte 200 + n   somebody does not let others use permission n
//! byte 300       somebody has the disk attached, by our virtual disk interface; QEMU does not know it
//! ```
//!
//! Who has a disk attached reads nothing of it, and so need not keep out one who compacts it by the same
//! interface. It keeps all other writers out, by refusing one permission alone that each of them needs. A
//! reader refuses both: who compacts finds the one refused and the other not, and byte 300 held.
//!
//! The locks belong to the open file description (OFD locks): no other descriptor of this process
//! that is closed drops them, and they work between two opens of one process. They reach other hosts
//! where the file system carries locks over. Numbers and order: QEMU, `block/file-posix.c`
//! (`raw_apply_lock_bytes`, `raw_check_lock_bytes`) and `BLK_PERM_*` of its block layer.

use std::fs::File;
use std::io;
use std::sync::Once;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;

/// What the opener does to the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    /// Reads, and relies on nobody changing anything.
    Reader,
    /// Reads, writes and changes the file's length, and relies on nobody else doing so.
    Writer,
    /// As a writer, but beside one who has the disk attached.
    Compactor,
    /// Reads nothing, and lets nobody write but a compactor. Only for one who is a reader or a writer of
    /// the file until these locks are taken, so that nobody else is a writer by then.
    Attached,
}

/// Why the locks are not held.
#[derive(Debug)]
pub(crate) enum LockError {
    /// What somebody else does that excludes us; completes "in use by another program (...)".
    Conflict(&'static str),
    /// The host failed.
    Io(io::Error),
}

/// One permission of QEMU's block layer.
struct Permission {
    number: u16,
    /// What a holder does, should we not admit it.
    held: &'static str,
    /// What a holder refuses, should we need it.
    refused: &'static str,
}

const CONSISTENT_READ: Permission = Permission {
    number: 0,
    held: "it reads the file and relies on it",
    refused: "it lets nobody read the file meanwhile",
};
const WRITE: Permission = Permission {
    number: 1,
    held: "it has the file open for writing",
    refused: "it lets nobody write to the file meanwhile",
};
const RESIZE: Permission = Permission {
    number: 3,
    held: "it may change the file's length",
    refused: "it lets nobody change the file's length meanwhile",
};

const USED_BASE: u16 = 100;
const REFUSED_BASE: u16 = 200;
const ATTACHED: u16 = 300;

/// What one who holds [`ATTACHED`] does.
const ATTACHED_BY: &str = "it has the disk attached";

impl Access {
    fn used(self) -> &'static [Permission] {
        match self {
            Self::Reader => &[CONSISTENT_READ],
            Self::Writer | Self::Compactor => &[CONSISTENT_READ, WRITE, RESIZE],
            Self::Attached => &[],
        }
    }

    /// The permissions that others may not use.
    fn refused(self) -> &'static [Permission] {
        match self {
            Self::Attached => &[RESIZE],
            _ => &[WRITE, RESIZE],
        }
    }
}

/// Takes the locks for `access` on `file`, for as long as its open file description lives. A file
/// system without such locks gets a warning instead, once per process, and no lock.
///
/// On an error some locks may be held: the caller closes `file`.
pub(crate) fn lock(file: &File, access: Access) -> Result<(), LockError> {
    match take_and_check(file, access) {
        Ok(None) => Ok(()),
        Ok(Some(holder)) => Err(LockError::Conflict(holder)),
        Err(Errno::ENOLCK | Errno::EINVAL | Errno::ENOSYS | Errno::EOPNOTSUPP) => {
            warn_unlocked();
            Ok(())
        }
        Err(error) => Err(LockError::Io(error.into())),
    }
}

/// Gives the locks on `file` back, even while a child that is just being started still shares its
/// open file description.
pub(crate) fn unlock(file: &File) {
    let len = ATTACHED - USED_BASE + 1;
    // Nothing depends on it: closing the last descriptor does the same, only later.
    let all = bytes_lock(libc::F_UNLCK, USED_BASE, len);
    let _ = retry(|| fcntl(file, FcntlArg::F_OFD_SETLK(&all)));
}

/// Whether somebody else has the disk in `file` attached.
pub(crate) fn is_attached(file: &File) -> io::Result<bool> {
    match is_held(file, ATTACHED) {
        Err(Errno::ENOLCK | Errno::EINVAL | Errno::ENOSYS | Errno::EOPNOTSUPP) => Ok(false),
        held => Ok(held?),
    }
}

/// `Some` with what somebody else does that excludes us.
fn take_and_check(file: &File, access: Access) -> nix::Result<Option<&'static str>> {
    let used = access
        .used()
        .iter()
        .map(|permission| USED_BASE + permission.number);
    let refused = access
        .refused()
        .iter()
        .map(|permission| REFUSED_BASE + permission.number);
    let mark = (access == Access::Attached).then_some(ATTACHED);
    for byte in used.chain(refused).chain(mark) {
        match retry(|| fcntl(file, FcntlArg::F_OFD_SETLK(&byte_lock(libc::F_RDLCK, byte)))) {
            Ok(_) => {}
            // Not QEMU, which never locks exclusively.
            Err(Errno::EAGAIN | Errno::EACCES) => return Ok(Some("it holds an exclusive lock")),
            Err(error) => return Err(error),
        }
    }
    if access == Access::Attached {
        return Ok(is_held(file, ATTACHED)?.then_some(ATTACHED_BY));
    }
    // What somebody does tells more than what it refuses, so that is looked for first.
    for permission in access.refused() {
        if is_held(file, USED_BASE + permission.number)? {
            return Ok(Some(permission.held));
        }
    }
    for permission in access.used() {
        if !is_held(file, REFUSED_BASE + permission.number)? {
            continue;
        }
        // A reader would have been found by the permission before this one.
        let by_attached = permission.number == RESIZE.number && is_held(file, ATTACHED)?;
        match (by_attached, access) {
            (true, Access::Compactor) => {}
            (true, _) => return Ok(Some(ATTACHED_BY)),
            (false, _) => return Ok(Some(permission.refused)),
        }
    }
    Ok(None)
}

/// Whether anybody but this open file description holds a lock on `byte`.
fn is_held(file: &File, byte: u16) -> nix::Result<bool> {
    let mut lock = byte_lock(libc::F_WRLCK, byte);
    retry(|| fcntl(file, FcntlArg::F_OFD_GETLK(&mut lock)))?;
    Ok(lock.l_type != short(libc::F_UNLCK))
}

fn byte_lock(kind: i32, byte: u16) -> libc::flock {
    bytes_lock(kind, byte, 1)
}

fn bytes_lock(kind: i32, first: u16, len: u16) -> libc::flock {
    libc::flock {
        l_type: short(kind),
        l_whence: short(libc::SEEK_SET),
        l_start: first.into(),
        l_len: len.into(),
        // Must be 0 for OFD locks.
        l_pid: 0,
    }
}

fn short(constant: i32) -> i16 {
    i16::try_from(constant).expect("the constants of fcntl are small")
}

fn retry<T>(mut call: impl FnMut() -> nix::Result<T>) -> nix::Result<T> {
    loop {
        match call() {
            Err(Errno::EINTR) => {}
            result => return result,
        }
    }
}

fn warn_unlocked() {
    static WARNED: Once = Once::new();
    WARNED.call_once(|| {
        log::warn!(
            "the host's file system has no byte-range locks: nothing keeps another program from \
             writing to the same disk"
        );
    });
}

#[cfg(test)]
mod tests;
