//! Mounting: how we come by the descriptor that the kernel's requests arrive at.
//!
//! `fuser` could do that as well, but it unmounts whatever it mounted once the session has ended, which may
//! be another mount at the same place by then.

use std::ffi::CString;
use std::fs::{self, File};
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use rustix::io::Errno;
use rustix::mount::MountFlags;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};

/// How it is mounted.
#[derive(Debug)]
pub(super) struct Options {
    /// The source as mount tables show it, without a comma.
    pub(super) source: String,
    pub(super) subtype: &'static str,
    pub(super) read_only: bool,
    pub(super) allow_other: bool,
}

/// Mounts at `mount_point`.
///
/// # Errors
/// What mount(2) or fusermount3 say.
pub(super) fn mount(mount_point: &Path, options: &Options) -> io::Result<OwnedFd> {
    match directly(mount_point, options) {
        // Ordinary users have a helper.
        Err(error) if error.raw_os_error() == Some(Errno::PERM.raw_os_error()) => {
            by_helper(mount_point, options)
        }
        done => done,
    }
}

fn directly(mount_point: &Path, options: &Options) -> io::Result<OwnedFd> {
    let mode = fs::metadata(mount_point)?.mode();
    let device = File::options().read(true).write(true).open("/dev/fuse")?;
    let mut data = format!(
        "fd={},rootmode={mode:o},user_id={},group_id={},subtype={},default_permissions",
        device.as_raw_fd(),
        rustix::process::getuid().as_raw(),
        rustix::process::getgid().as_raw(),
        options.subtype,
    );
    if options.allow_other {
        data.push_str(",allow_other");
    }
    let mut flags = MountFlags::NOSUID | MountFlags::NODEV;
    flags.set(MountFlags::RDONLY, options.read_only);
    let data = CString::new(data)?;
    rustix::mount::mount(&*options.source, mount_point, "fuse", flags, &*data)?;
    Ok(device.into())
}

fn by_helper(mount_point: &Path, options: &Options) -> io::Result<OwnedFd> {
    let mut text = format!(
        "fsname={},subtype={},default_permissions,nosuid,nodev",
        options.source, options.subtype
    );
    for (word, is_set) in [
        ("ro", options.read_only),
        ("allow_other", options.allow_other),
    ] {
        if is_set {
            text.push(',');
            text.push_str(word);
        }
    }
    let (ours, theirs) = UnixStream::pair()?;
    // The command, which holds the other end, goes with this statement.
    let helper = (Command::new("fusermount3").arg("-o").arg(text).arg("--"))
        .arg(mount_point)
        .env("_FUSE_COMMFD", "0")
        .stdin(OwnedFd::from(theirs))
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| {
            let text = format!("cannot run fusermount3 (package fuse3): {error}");
            io::Error::new(error.kind(), text)
        })?;
    let received = receive(&ours);
    let said = end_of(helper)?;
    received?.ok_or_else(|| io::Error::other(said))
}

/// The descriptor that the helper sends; `None` where it ends without.
fn receive(socket: &UnixStream) -> io::Result<Option<OwnedFd>> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    rustix::io::retry_on_intr(|| {
        let mut buffer = [IoSliceMut::new(&mut byte)];
        rustix::net::recvmsg(socket, &mut buffer, &mut ancillary, RecvFlags::CMSG_CLOEXEC)
    })?;
    let received = ancillary.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    });
    Ok(received)
}

/// Waits for the helper. What it says where it fails.
fn end_of(helper: Child) -> io::Result<String> {
    let output = helper.wait_with_output()?;
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Ok(match said.is_empty() {
        true => format!("fusermount3 gave no descriptor ({})", output.status),
        false => said,
    })
}
