//! The calls to Linux' kernel that no safe crate has: leases, `fcntl(2)`, and writing a range of a file back,
//! `sync_file_range(2)`.

#![expect(
    unsafe_code,
    reason = "fcntl with F_SETLEASE and sync_file_range are in neither rustix nor nix"
)]

use std::fs::File;
use std::os::fd::AsRawFd;

use nix::errno::Errno;
use nix::libc::{self, c_int};

/// `from <linux/fcntl.h>`: which signal tells of a lease that is wanted back.
const F_SETSIG: c_int = 10;

/// What holds on an open file description.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Nobody opens the file for writing.
    Read,
    /// Nobody opens the file.
    Write,
    /// Nothing; also of a lease that somebody waits for who opens the file for writing.
    None,
}

/// Takes a lease, or gives it up.
///
/// The holder is told of who comes by a signal, which without further ado is SIGIO and ends a process
/// that does not expect it. So it is made one that does nothing by default, before there is a lease.
pub(super) fn set_lease(file: &File, kind: Kind) -> nix::Result<()> {
    let kind = match kind {
        Kind::Read => libc::F_RDLCK,
        Kind::Write => libc::F_WRLCK,
        Kind::None => libc::F_UNLCK,
    };
    fcntl(file, F_SETSIG, libc::SIGURG)?;
    fcntl(file, libc::F_SETLEASE, kind).map(drop)
}

/// Which lease is held; of one that somebody waits for, what it has to become.
pub(super) fn lease(file: &File) -> nix::Result<Kind> {
    Ok(match fcntl(file, libc::F_GETLEASE, 0)? {
        libc::F_RDLCK => Kind::Read,
        libc::F_WRLCK => Kind::Write,
        _ => Kind::None,
    })
}

fn fcntl(file: &File, command: c_int, argument: c_int) -> nix::Result<c_int> {
    loop {
        // SAFETY: `file` is open during the call, and these commands take a number: they touch no memory
        // of this process.
        let answer = unsafe { libc::fcntl(file.as_raw_fd(), command, argument) };
        match Errno::result(answer) {
            Err(Errno::EINTR) => {}
            result => return result,
        }
    }
}

/// Starts writing the dirty pages of `len` bytes from `offset` on to the device, and waits for all of them. No
/// metadata is written, and no cache of the device.
pub(super) fn write_back(file: &File, offset: i64, len: i64) -> nix::Result<()> {
    const ALL: libc::c_uint = libc::SYNC_FILE_RANGE_WAIT_BEFORE
        | libc::SYNC_FILE_RANGE_WRITE
        | libc::SYNC_FILE_RANGE_WAIT_AFTER;
    loop {
        // SAFETY: `file` is open during the call, which takes numbers: it touches no memory of this process.
        let answer = unsafe { libc::sync_file_range(file.as_raw_fd(), offset, len, ALL) };
        match Errno::result(answer).map(drop) {
            Err(Errno::EINTR) => {}
            result => return result,
        }
    }
}
