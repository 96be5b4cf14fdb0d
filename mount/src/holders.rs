//! Who has a copy of a mount in a mount namespace of their own.
//!
//! `unshare -m`, containers and sandboxes start with copies of all mounts; unmounting ours leaves theirs.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::mounts::{self, Mounted};
use crate::text::plain;

/// How many of a namespace's processes are named.
const NAMED: usize = 3;

/// A mount namespace that is not ours, and has the mount.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Holder {
    /// The numbers of the copies, which other mounts get once these are gone.
    ids: Vec<String>,
    processes: Vec<(u32, String)>,
}

/// What could be seen of them.
#[derive(Debug, Default)]
pub(crate) struct Holders {
    pub(crate) found: Vec<Holder>,
    /// Whether there are processes whose mounts we may not see.
    pub(crate) are_some_hidden: bool,
}

impl Holders {
    /// Those that have the file system with that device number.
    ///
    /// # Errors
    /// Where there is no `/proc`.
    pub(crate) fn of(device: &str) -> io::Result<Self> {
        let namespace = |process: &Path| fs::read_link(process.join("ns/mnt"));
        let own = namespace(Path::new("/proc/self"))?;
        let mut holders = Self::default();
        let mut spaces: HashMap<PathBuf, Holder> = HashMap::new();
        for entry in fs::read_dir("/proc")? {
            let process = entry?.path();
            let Some(number) = number_of(&process) else {
                continue;
            };
            let space = match namespace(&process) {
                Ok(space) if space == own => continue,
                Ok(space) => space,
                Err(error) => {
                    // Else it has ended.
                    holders.are_some_hidden |= error.kind() == io::ErrorKind::PermissionDenied;
                    continue;
                }
            };
            let holder = spaces.entry(space).or_insert_with(|| Holder {
                ids: ids_in(&number.to_string(), device).unwrap_or_default(),
                processes: Vec::new(),
            });
            if !holder.ids.is_empty() {
                let name = fs::read_to_string(process.join("comm")).unwrap_or_default();
                holder.processes.push((number, name.trim_end().to_owned()));
            }
        }
        holders.found = { spaces.into_values() }
            .filter(|holder| !holder.ids.is_empty())
            .collect();
        holders
            .found
            .sort_by_key(|holder| holder.processes.first().map(|(number, _)| *number));
        Ok(holders)
    }

    /// Leaves out what was not there `before`: it belongs to a later mount.
    pub(crate) fn also_in(mut self, before: &Self) -> Self {
        let was_there = |id: &String| before.found.iter().any(|holder| holder.ids.contains(id));
        self.found.retain(|holder| holder.ids.iter().any(was_there));
        self
    }
}

impl fmt::Display for Holders {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (n, holder) in self.found.iter().enumerate() {
            let mut processes = holder.processes.clone();
            processes.sort_unstable();
            let more = processes.len().saturating_sub(NAMED);
            processes.truncate(NAMED);
            f.write_str(if n > 0 { "; " } else { "" })?;
            for (n, (number, name)) in processes.iter().enumerate() {
                f.write_str(if n > 0 { ", " } else { "" })?;
                write!(f, "{} (process {number})", plain(name))?;
            }
            if more > 0 {
                write!(f, " and {more} more")?;
            }
        }
        if self.found.is_empty() {
            f.write_str("a process of another user; root is told which")?;
        }
        Ok(())
    }
}

fn number_of(process: &Path) -> Option<u32> {
    process.file_name().and_then(OsStr::to_str)?.parse().ok()
}

fn ids_in(process: &str, device: &str) -> io::Result<Vec<String>> {
    let is_it = |mounted: &Mounted| mounted.device == device;
    let found = mounts::of_process(process)?.into_iter().filter(is_it);
    Ok(found.map(|mounted| mounted.id).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn holder(id: &str, processes: &[(u32, &str)]) -> Holder {
        let processes = processes
            .iter()
            .map(|(number, name)| (*number, (*name).to_owned()));
        Holder {
            ids: vec![id.to_owned()],
            processes: processes.collect(),
        }
    }

    #[test]
    fn they_are_named_and_later_mounts_are_not_theirs() {
        let holders = |found| Holders {
            found,
            are_some_hidden: false,
        };
        let before = holders(vec![holder("7", &[(4, "sh")])]);
        let sleepers = [(12, "sleep"), (9, "sh"), (30, "a\nb"), (31, "c"), (32, "d")];
        let after = holders(vec![holder("7", &sleepers), holder("8", &[(5, "new")])]);
        let text = after.also_in(&before).to_string();
        assert!(
            text.starts_with("sh (process 9), sleep (process 12), a"),
            "{text}"
        );
        assert!(
            text.ends_with(" and 2 more") && !text.contains('\n'),
            "{text}"
        );
        assert!(holders(vec![]).to_string().contains("another user"));
    }
}
