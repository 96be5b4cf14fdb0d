//! Guest filesystems, made and filled by their own tools: what the readers call free is what those
//! tools call free, nothing else depends on it, and what is not clean is left alone.

#![cfg(unix)]
#![allow(clippy::unwrap_used, reason = "a failure is what a test is for")]

mod btrfs;
mod compacting;
mod damage;
mod exfat;
mod ext;
mod fat;
mod ntfs;
mod parts;
mod rig;
#[path = "../support/mod.rs"]
mod support;
mod volumes;
mod xfs;
