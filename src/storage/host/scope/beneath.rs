//! Opening what lies below a directory, and nothing else.

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Component, Path};

use rustix::fs::{FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use super::Miss;

/// As many symbolic links as Linux follows.
const MAX_LINKS: u32 = 40;

/// Holds what lies at `path` below `root`, which the host knows as `real`, whatever it is; symbolic
/// links are followed as long as they stay below. The file is not opened: nothing happens to a
/// device, and nothing blocks.
pub(super) fn open(root: BorrowedFd<'_>, real: &Path, path: &Path) -> Result<OwnedFd, Miss> {
    if path.as_os_str().is_empty() {
        return rustix::io::dup(root).map_err(miss);
    }
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
    match rustix::fs::openat2(root, path, flags, Mode::empty(), resolve) {
        Ok(found) => Ok(found),
        // An older kernel, a filter of system calls, a rename under way; or a link that is
        // absolute, which may all the same lead to a place below.
        Err(Errno::NOSYS | Errno::PERM | Errno::AGAIN | Errno::XDEV) => walk(root, real, path),
        Err(error) => Err(miss(error)),
    }
}

fn miss(error: Errno) -> Miss {
    match error {
        Errno::NOENT | Errno::NOTDIR | Errno::NAMETOOLONG => Miss::Missing,
        Errno::XDEV => Miss::Outside,
        error => Miss::Io(error.into()),
    }
}

/// One step of a path.
enum Step {
    Root,
    Up,
    Down(OsString),
}

/// [`open`], one name after the other, following links by hand. The way up is never asked of the
/// host: where `..` leads is where we came from.
pub(super) fn walk(root: BorrowedFd<'_>, real: &Path, path: &Path) -> Result<OwnedFd, Miss> {
    let mut steps = steps(path);
    let mut way: Vec<OwnedFd> = Vec::new();
    let mut links = 0;
    while let Some(step) = steps.pop_front() {
        let name = match step {
            Step::Root => {
                way.clear();
                continue;
            }
            Step::Up if way.pop().is_some() => continue,
            Step::Up => return Err(Miss::Outside),
            Step::Down(name) => name,
        };
        let here = way.last().map_or(root, AsFd::as_fd);
        let next = pin(here, &name)?;
        let stat = rustix::fs::fstat(&next).map_err(miss)?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Symlink => {
                links += 1;
                if links > MAX_LINKS {
                    return Err(miss(Errno::LOOP));
                }
                let mut target = target(&next, real)?;
                target.append(&mut steps);
                steps = target;
            }
            FileType::Directory => way.push(next),
            _ if steps.is_empty() => return Ok(next),
            _ => return Err(Miss::Missing),
        }
    }
    match way.pop() {
        Some(directory) => Ok(directory),
        None => rustix::io::dup(root).map_err(miss),
    }
}

fn pin(directory: BorrowedFd<'_>, name: &OsStr) -> Result<OwnedFd, Miss> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(directory, name, flags, Mode::empty()).map_err(miss)
}

fn steps(path: &Path) -> VecDeque<Step> {
    let steps = path.components().filter_map(|component| match component {
        Component::Prefix(_) | Component::CurDir => None,
        Component::RootDir => Some(Step::Root),
        Component::ParentDir => Some(Step::Up),
        Component::Normal(name) => Some(Step::Down(name.to_owned())),
    });
    steps.collect()
}

/// Where a symbolic link leads. An absolute one is good if it names a place below the root.
fn target(link: &OwnedFd, real: &Path) -> Result<VecDeque<Step>, Miss> {
    let text = rustix::fs::readlinkat(link, "", Vec::new()).map_err(miss)?;
    let text = OsString::from_vec(text.into_bytes());
    let path = Path::new(&text);
    if !path.is_absolute() {
        return Ok(steps(path));
    }
    let rest = path.strip_prefix(real).map_err(|_| Miss::Outside)?;
    let mut steps = steps(rest);
    steps.push_front(Step::Root);
    Ok(steps)
}
