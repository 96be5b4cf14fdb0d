//! `vhdfs unmount`.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Pid, PidfdFlags};

use crate::fuse::PID_ATTRIBUTE;
use crate::holders::Holders;
use crate::mounts::{self, FILE_SYSTEM_TYPE};
use crate::text::say;
use crate::{Failure, Outcome};

/// After that many seconds of waiting, the user is told what for, or who else has the mount. A daemon
/// whose disks nobody uses any more has ended by then.
const PATIENCE: Timespec = Timespec {
    tv_sec: 3,
    tv_nsec: 0,
};

/// Runs the command: returns when the daemon has closed every disk and ended, or somebody with a mount
/// namespace of their own uses the mount on.
pub(crate) fn unmount(mount_point: &Path) -> Result<Outcome, Failure> {
    let about = |text: &str| Failure::from(format!("{}: {text}", mount_point.display()));
    let path = mounts::resolve(mount_point).map_err(|error| about(&error.to_string()))?;
    let mounted = mounts::at(&path)?.ok_or_else(|| about("not a mount point"))?;
    if mounted.file_system != FILE_SYSTEM_TYPE {
        return Err(about(&format!(
            "not a vhdfs mount but {}",
            mounted.file_system
        )));
    }
    // A daemon that died cannot tell, and need not be waited for. Held before the unmount, since
    // the number may soon be another process's.
    let daemon = daemon_of(&path);
    // From before, too: the device's number may at once be that of somebody's new mount.
    let mut others = mounts::all()?;
    others.retain(|other| other.device == mounted.device && other.id != mounted.id);
    let before = Holders::of(&mounted.device).unwrap_or_default();
    mounts::unmount(&path, false).map_err(|error| match error.kind() {
        io::ErrorKind::ResourceBusy => {
            about("in use; nothing has changed (`fuser -vm` shows by whom)")
        }
        _ => about(&format!("cannot unmount: {error}")),
    })?;
    let left = mounts::all()?;
    if let Some(other) = others.iter().find(|other| left.contains(other)) {
        let (path, other) = (path.display(), other.mount_point.display());
        say(&format!(
            "{path} is unmounted; its disks stay in use at {other}"
        ));
        return Ok(Outcome::Fine);
    }
    let Some((pid, daemon)) = daemon else {
        return Ok(Outcome::Fine);
    };
    if ends_within(&daemon, Some(&PATIENCE))? {
        return Ok(Outcome::Fine);
    }
    let holders = Holders::of(&mounted.device)
        .unwrap_or_default()
        .also_in(&before);
    let is_hidden = holders.are_some_hidden && mounts::is_served(&mounted.device);
    if !holders.found.is_empty() || is_hidden {
        return Err(about(&format!(
            "unmounted here, but still mounted in another mount namespace, that of {holders}; the \
             daemon (process {pid}) closes each disk when nobody there has it open"
        )));
    }
    say(&format!(
        "waiting for the daemon (process {pid}) to close its disks"
    ));
    ends_within(&daemon, None)?;
    Ok(Outcome::Fine)
}

/// The process that serves the mount.
fn daemon_of(path: &Path) -> Option<(String, OwnedFd)> {
    let mut value = [0; 32];
    let len = rustix::fs::getxattr(path, PID_ATTRIBUTE, &mut value).ok()?;
    let pid = std::str::from_utf8(value.get(..len)?).ok()?;
    let number = Pid::from_raw(pid.parse().ok()?)?;
    let daemon = rustix::process::pidfd_open(number, PidfdFlags::empty()).ok()?;
    Some((pid.to_owned(), daemon))
}

/// Whether the daemon has ended by then.
fn ends_within(daemon: &OwnedFd, patience: Option<&Timespec>) -> io::Result<bool> {
    // Readable once the process has ended.
    let mut waited_for = [PollFd::new(daemon, PollFlags::IN)];
    let ended = rustix::io::retry_on_intr(|| rustix::event::poll(&mut waited_for, patience))?;
    Ok(ended > 0)
}
