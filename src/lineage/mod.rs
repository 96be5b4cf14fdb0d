//! Which disks are over which: finds the disk files of a directory tree and tells whose children they are.
//!
//! ```text
//! Tree (surveys, file system by file system) -- Walk (one file system) -- Eyes (headers, once for each state)
//!      \-- Mounts (what may be entered)              \-- names (what is a disk file)
//! Family: an index over what was found
//! ```
//!
//! A parent may be changed only in ways that no child notices, so what matters is to overlook none:
//! 1. Every directory below the one that is searched is looked into, on whatever device it is.
//! 2. What cannot be looked into is told, and counts as somebody's child: directories of other users, file systems
//!    that do not answer, more entries than there is time for.
//! 3. No file system is entered that needs a vhdfs mount to answer: who searches may be the one it waits for.
//! 4. Another file system than the first is looked into by a thread of its own. If it does not answer, the search goes
//!    on without it, with what was last found there.

mod eyes;
mod family;
mod mounts;
mod names;
mod tree;
mod walk;

#[cfg(test)]
mod tests;

pub(crate) use eyes::Asker;
pub(crate) use family::{Family, Kin, Lineage, Words};
pub(crate) use mounts::may_serve;
pub(crate) use names::{is_disk_name, may_be_file, may_be_kin};
pub(crate) use tree::{Limits, Tree, Waiting, shown};
pub(crate) use walk::File;
