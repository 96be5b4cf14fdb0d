//! Virtual hard disks that stay small: read, write, discard, and compact them in place, crash-safely,
//! while they are in use.
//!
//! A [`disk::Disk`] is what a guest sees: bytes at disk offsets, whatever the format of the image
//! underneath. It keeps book of what becomes zero. [`disk::Disk::compact`] takes dead blocks out of
//! the image's block table, moves blocks from the end of the file into the holes, and cuts the file.
//!
//! ```
//! use vhdfs::compact::CompactOptions;
//! use vhdfs::create::{CreateOptions, create};
//! use vhdfs::disk::{Disk, OpenOptions};
//!
//! # let folder = tempfile::tempdir()?;
//! # let path = folder.path().join("web.vhd");
//! create(&path, &CreateOptions::dynamic(1 << 30))?;
//! let disk = Disk::open(&path, &OpenOptions::default())?;
//!
//! disk.write_at(&[7; 8 << 20], 0)?;
//! disk.discard(0, 6 << 20)?; // the guest deleted a file
//! disk.flush()?; // durable from here on
//!
//! let operation = disk.compact(&CompactOptions::default());
//! println!("{:?}", operation.progress()); // and `operation.cancel()` at any time
//! let report = operation.wait()?;
//! assert!(report.length_after < 3 << 20);
//!
//! let mut byte = [0];
//! disk.read_at(&mut byte, 7 << 20)?;
//! assert_eq!(byte, [7]);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Layers
//! Each imports only what stands left of it; `tests/tidy.rs` fails otherwise.
//!
//! ```text
//! units, error, sync < format, storage < map < image < disk, guest < compact < library, virtdisk
//!                (bytes) (host file)     |        |     (what filesystems call free)
//!                                        |        (what a guest sees)   (a directory of disks)
//!                                        (one file, its metadata)
//! ```
//!
//! [`create`] and [`check`] stand beside `disk`. The binary crate `vhdfs-mount` serves a
//! [`library`] through FUSE; [`virtdisk`] is Windows' `CompactVirtualDisk` and its kin, for C too.
//!
//! # Crash model
//! [`storage`] says what a host file promises, [`image`] what is durable when, [`map`] when freed
//! space may be used again, [`compact`] how a block moves. All of it holds for any subset of the
//! writes that were not yet synced, and is tested so on a simulated host (feature `sim`).

pub mod check;
pub mod compact;
pub mod create;
pub mod disk;
pub mod error;
pub mod format;
pub mod guest;
pub mod image;
#[cfg(unix)]
pub mod library;
pub mod map;
pub mod storage;
mod sync;
pub mod units;
pub mod virtdisk;
