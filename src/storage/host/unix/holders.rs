//! Which programs have a file open, as far as `/proc` shows it.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::path::Path;

use rustix::fs::OFlags;

use crate::error::plain;

/// How many descriptors of others are looked at.
const MOST: usize = 100_000;

/// One who has the file open.
struct Holder {
    process: String,
    writes: bool,
}

/// Who has `file` open besides this very descriptor, one of those that write first: completes "in use by
/// another program (...)".
pub(super) fn of(file: &File) -> String {
    let writes = |holder: &Holder| match holder.writes {
        true => "has it open for writing",
        false => "has it open for reading",
    };
    let found = find(file).into_iter().max_by_key(|holder| holder.writes);
    found.map_or_else(
        || "it has the file open; /proc does not show who".to_owned(),
        |holder| format!("process {} {}", holder.process, writes(&holder)),
    )
}

/// Those that have it open by the name that it has here. Nothing is asked of any file: one on a mount that
/// does not answer would keep us waiting.
fn find(file: &File) -> Vec<Holder> {
    let link = Path::new("/proc/self/fd").join(file.as_raw_fd().to_string());
    let Ok(sought) = fs::read_link(link) else {
        return Vec::new();
    };
    let own = std::process::id();
    let mut left = MOST;
    let mut found = Vec::new();
    for process in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let name = process.file_name();
        let id = name.to_str().and_then(|name| name.parse::<u32>().ok());
        let Some(id) = id.filter(|id| *id != own) else {
            continue;
        };
        let path = process.path();
        // Those of other users cannot be looked into but by root.
        let descriptors = fs::read_dir(path.join("fd"))
            .into_iter()
            .flatten()
            .flatten();
        for descriptor in descriptors.take(left) {
            left -= 1;
            if fs::read_link(descriptor.path()).is_ok_and(|link| link == sought) {
                found.push(Holder {
                    process: called(id, &path),
                    writes: writes(&path.join("fdinfo").join(descriptor.file_name())),
                });
            }
        }
    }
    found
}

/// The number and the name of a process.
fn called(id: u32, path: &Path) -> String {
    // Anybody may give a process any name.
    let name = fs::read_to_string(path.join("comm")).unwrap_or_default();
    format!("{id}, {},", plain(name.trim_end()))
}

/// Whether the descriptor of which `info` tells is open for writing.
fn writes(info: &Path) -> bool {
    let text = fs::read_to_string(info).unwrap_or_default();
    let flags = text.lines().find_map(|line| line.strip_prefix("flags:"));
    let flags = flags.and_then(|octal| u32::from_str_radix(octal.trim(), 8).ok());
    flags.is_some_and(|flags| {
        OFlags::from_bits_retain(flags).intersects(OFlags::WRONLY | OFlags::RDWR)
    })
}
