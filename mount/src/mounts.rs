//! The kernel's table of mounts, and unmounting.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::mount::UnmountFlags;

/// The type that our mounts have in mount tables.
pub(crate) const FILE_SYSTEM_TYPE: &str = "fuse.vhdfs";

/// One line of the table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Mounted {
    /// The mount's number, which is another one's once it is gone.
    pub(crate) id: String,
    /// The file system's device number, as `MAJOR:MINOR`.
    pub(crate) device: String,
    /// Where it is mounted.
    pub(crate) mount_point: PathBuf,
    /// Its type.
    pub(crate) file_system: String,
}

/// Everything that is mounted, in the order in which it was.
pub(crate) fn all() -> io::Result<Vec<Mounted>> {
    of_process("self")
}

/// Everything that is mounted in the namespace of a process.
///
/// # Errors
/// Where it has ended, or is somebody else's.
pub(crate) fn of_process(process: &str) -> io::Result<Vec<Mounted>> {
    let table = fs::read(format!("/proc/{process}/mountinfo"))?;
    Ok(table
        .split(|byte| *byte == b'\n')
        .filter_map(parse)
        .collect())
}

/// What is mounted at `path`, on top if there is more. `path` must be as [`resolve`] has it.
pub(crate) fn at(path: &Path) -> io::Result<Option<Mounted>> {
    Ok(all()?
        .into_iter()
        .rfind(|mounted| mounted.mount_point == path))
}

/// Whether the FUSE file system with that device number is served still, by whomever it is used; `false` where
/// the host does not tell.
pub(crate) fn is_served(device: &str) -> bool {
    let minor = device.split_once(':').map_or(device, |(_, minor)| minor);
    Path::new("/sys/fs/fuse/connections").join(minor).exists()
}

/// Returns once no mount of the file system with that device number is left in our mount namespace.
pub(crate) fn wait_until_gone(device: &str) -> io::Result<()> {
    /// A table that changes while it is read may lack a line for once.
    const LOOKS: usize = 3;
    const BETWEEN_LOOKS: Duration = Duration::from_millis(50);
    let table = fs::File::open("/proc/self/mountinfo")?;
    loop {
        let mut is_gone = true;
        for _ in 0..LOOKS {
            is_gone &= all()?.iter().all(|mounted| mounted.device != device);
            if !is_gone {
                break;
            }
            std::thread::sleep(BETWEEN_LOOKS);
        }
        if is_gone {
            return Ok(());
        }
        // The kernel reports a change of the table as something exceptional.
        let mut changed = [PollFd::new(&table, PollFlags::PRI)];
        rustix::io::retry_on_intr(|| rustix::event::poll(&mut changed, None))?;
    }
}

/// The absolute path without links, also where what is mounted there does not answer.
pub(crate) fn resolve(path: &Path) -> io::Result<PathBuf> {
    match fs::canonicalize(path) {
        Err(error) if error.raw_os_error() == Some(Errno::NOTCONN.raw_os_error()) => {}
        done => return done,
    }
    let absolute = std::path::absolute(path)?;
    match (absolute.parent(), absolute.file_name()) {
        (Some(parent), Some(name)) => Ok(fs::canonicalize(parent)?.join(name)),
        _ => Ok(absolute),
    }
}

/// Takes away what is mounted at `path`. With `lazy` the name goes at once, and the file system
/// when nobody uses it any more.
///
/// # Errors
/// [`io::ErrorKind::ResourceBusy`] where it is in use; then nothing has changed.
pub(crate) fn unmount(path: &Path, lazy: bool) -> io::Result<()> {
    let flags = if lazy {
        UnmountFlags::DETACH
    } else {
        UnmountFlags::empty()
    };
    match rustix::mount::unmount(path, flags | UnmountFlags::NOFOLLOW) {
        // Ordinary users have a helper for what they mounted.
        Err(Errno::PERM) => fusermount(path, lazy),
        done => Ok(done?),
    }
}

fn fusermount(path: &Path, lazy: bool) -> io::Result<()> {
    let mut command = Command::new("fusermount3");
    command
        .arg("-u")
        .args(lazy.then_some("-z"))
        .arg("--")
        .arg(path)
        .stdin(Stdio::null());
    let output = command.env("LC_ALL", "C").output().map_err(|error| {
        io::Error::new(
            error.kind(),
            format!("cannot run fusermount3 (package fuse3): {error}"),
        )
    })?;
    if output.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    if text.contains("busy") {
        return Err(io::ErrorKind::ResourceBusy.into());
    }
    Err(io::Error::other(text))
}

/// Reads a line: `36 35 98:0 /root /mount/point options optional... - type source options`.
fn parse(line: &[u8]) -> Option<Mounted> {
    let mut fields = line.split(|byte| *byte == b' ');
    let id = fields.next()?;
    let device = fields.nth(1)?;
    let mount_point = fields.nth(1)?;
    let file_system = fields.skip_while(|field| *field != b"-").nth(1)?;
    Some(Mounted {
        id: String::from_utf8_lossy(id).into_owned(),
        device: String::from_utf8_lossy(device).into_owned(),
        mount_point: PathBuf::from(OsString::from_vec(unescape(mount_point))),
        file_system: String::from_utf8_lossy(file_system).into_owned(),
    })
}

/// Undoes the table's escapes: `\040` for a space, and so on.
fn unescape(text: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((&first, behind)) = rest.split_first() {
        let octal = |digits: &[u8]| {
            let digits = std::str::from_utf8(digits).ok()?;
            u8::from_str_radix(digits, 8).ok()
        };
        match behind.get(..3).and_then(octal) {
            Some(byte) if first == b'\\' => {
                plain.push(byte);
                rest = &behind[3..];
            }
            _ => {
                plain.push(first);
                rest = behind;
            }
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_read() {
        let line =
            br"136 29 0:52 / /tmp/my\040disks\134x rw,nosuid shared:7 - fuse.vhdfs /srv/a rw";
        let expected = Mounted {
            id: "136".into(),
            device: "0:52".into(),
            mount_point: r"/tmp/my disks\x".into(),
            file_system: FILE_SYSTEM_TYPE.into(),
        };
        assert_eq!(parse(line), Some(expected));
        assert_eq!(parse(b""), None);
        assert!(at(Path::new("/")).unwrap().is_some());
    }
}
