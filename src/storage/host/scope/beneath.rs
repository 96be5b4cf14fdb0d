//! Opening what lies below a directory, and nothing else.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::io;
use std::path::{Component, Path, PathBuf};

use super::Miss;
use crate::storage::host::pin::{Kind, Pin};

/// As many symbolic links as Linux follows.
const MAX_LINKS: u32 = 40;

/// What is left of an absolute path below the root; `None` where it is not below.
pub(super) type Below<'a> = &'a dyn Fn(&Path) -> Option<PathBuf>;

/// Holds what lies at `path` below `root`, whatever it is; symbolic links are followed as long as
/// they stay below. The file is not opened: nothing happens to a device, and nothing blocks.
pub(super) fn open(root: &Pin, below: Below<'_>, path: &Path) -> Result<Pin, Miss> {
    if path.as_os_str().is_empty() {
        return root.try_clone().map_err(miss);
    }
    match root.beneath(path).map_err(miss)? {
        Some(found) => Ok(found),
        None => walk(root, below, path),
    }
}

pub(super) fn miss(error: io::Error) -> Miss {
    match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory | io::ErrorKind::InvalidFilename => {
            Miss::Missing
        }
        _ => Miss::Io(error),
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
pub(super) fn walk(root: &Pin, below: Below<'_>, path: &Path) -> Result<Pin, Miss> {
    let mut steps = steps(path)?;
    let mut way: Vec<Pin> = Vec::new();
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
        let here = way.last().unwrap_or(root);
        let next = here.child(&name).map_err(miss)?;
        match next.stat().map_err(miss)?.kind {
            Kind::Link => {
                links += 1;
                if links > MAX_LINKS {
                    return Err(miss(io::Error::other("too many symbolic links")));
                }
                let mut target = target(&next, below)?;
                target.append(&mut steps);
                steps = target;
            }
            Kind::Directory => way.push(next),
            _ if steps.is_empty() => return Ok(next),
            _ => return Err(Miss::Missing),
        }
    }
    match way.pop() {
        Some(directory) => Ok(directory),
        None => root.try_clone().map_err(miss),
    }
}

fn steps(path: &Path) -> Result<VecDeque<Step>, Miss> {
    let steps = path.components().filter_map(|component| match component {
        Component::CurDir => None,
        // Of another drive than the root's, or of who knows which.
        Component::Prefix(_) => Some(Err(Miss::Outside)),
        Component::RootDir => Some(Ok(Step::Root)),
        Component::ParentDir => Some(Ok(Step::Up)),
        Component::Normal(name) => Some(Ok(Step::Down(name.to_owned()))),
    });
    steps.collect()
}

/// Where a symbolic link leads. An absolute one is good if it names a place below the root.
fn target(link: &Pin, below: Below<'_>) -> Result<VecDeque<Step>, Miss> {
    let path = link.link_target().map_err(miss)?;
    if !path.has_root() {
        return steps(&path);
    }
    let mut steps = steps(&below(&path).ok_or(Miss::Outside)?)?;
    steps.push_front(Step::Root);
    Ok(steps)
}
