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
//! units, error, sync < format, storage < map < image < lineage < disk, guest < compact < library, virtdisk
//!                (bytes) (host file)     |       |        |     (what filesystems call free)
//!                                        |       |        (what a guest sees)   (a directory of disks)
//!                                        |       (who is whose parent)
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

//!
//! # Threat model
//! Trusted are the host's kernel, its root, and whoever runs the program. Not trusted:
//!
//! **An image from a stranger** may hold any bytes. It can make its own disk unreadable, and use up to what
//! the bounds below allow. It cannot
//! - crash the process or make it allocate by a number that was not checked: decoders work on slices and
//!   checked sums, tables are bounded by the formats' largest disks (VHDX: 67 million blocks, VHD: 16 million), pieces
//!   of files that are read at once by 1 MiB (`image/*/layout.rs`, `guest`). What is listed or looked up is told
//!   by headers where a disk has over a million blocks, in less than 2 MiB. An open disk takes 5 bytes a block
//!   (VHD: 9), so that the largest has 330 MiB, and 128 for each free range of its file; the tables of all
//!   open disks take no more than half of the host's memory, or 2 GiB if that is more: then opening
//!   another fails ([`map`]). A compaction takes another 40 bytes a block while it runs, and so does `check` where
//!   blocks overlap. A file that is longer than
//!   256 TiB is not written (`tests/memory.rs`);
//! - be written in a way that loses what could be read: what is doubtful is refused ([`error::OpenProblem`]),
//!   repairs only what is safe ([`check`]);
//! - bring in another file: a parent is opened only below the image's own directory, the served one and
//!   those that the user names, without following a link out of them, or where the user names the file itself,
//!   only if it is a plain file and only if it has the identity that the child names
//!   ([`disk::HostParents`]); no file of a path in an image is opened to look what it is;
//! - write to a terminal or forge lines of a log: [`error::plain`] is between every name or text of a file
//!   and both; a path out of an image is advised as an argument only where it is neither the root nor
//!   means anything to a shell;
//! - become another format once it is open, whatever a guest writes: formats are told by the host file
//!   ([`image::detect`]).
//!
//! **A guest** reads and writes its disk, and nothing else. It sees zeros or its own or its parent's bytes in
//! what it never wrote, never another block's, also after a power cut ([`image`]). What it writes is data:
//! forged footers, headers, partition tables and file systems change nothing, but that blocks which its own
//! file systems call free may go when nobody has the disk open for writing ([`guest`]), which hurts
//! itself alone. It can fill its disk, and so the host's file system.
//!
//! **Another user of the host**, with access to the mount ([`library`] and the binary crate's `daemon`) or to
//! the served directory, who
//! - opens what is shown: gets no right that the backing file does not give. The kernel checks the modes and
//!   owners that are shown, which are the files' own, less what an access control list denies and less what
//!   the file does not let the server do; a child is opened only for who may read all of its parents, and
//!   names of other disks are told to nobody else. Directories above the served one do not count: whoever
//!   mounts with `--allow-other` shows them as a bind mount would;
//! - opens directories, however many, of however many files: what they list is kept in at most eight pages of
//!   65,536 names, whoever reads them;
//! - makes files in the served directory: links, FIFOs, sockets and devices are neither shown, followed nor
//!   opened, also if they take the place of a disk between two looks; a hard link to somebody else's file
//!   gives what that file's mode gives;
//! - changes, cuts, renames or replaces a file that is open: the disk that is open stays the one that it was;
//!   that its file was cut is noticed with the next flush, and ends it; nothing of another file is written;
//! - opens the same file: each refuses the other who asks for QEMU's image locks ([`storage`]). Who does not
//!   ask is noticed by leases: what somebody has open for writing is not opened for writing here, and work
//!   that no guest asked for ends within a step when somebody opens the file ([`storage::host::Hold`]);
//! - puts many files there, or mounts something there that does not answer: opening a disk costs a look at each
//!   file's attributes, on a thread of its own and once for all who wait, and open disks are served meanwhile; another
//!   file system is waited for a second, once. One that itself needs a vhdfs mount, a guest's on a loop device, is
//!   not touched (`lineage`).
//!
//! Not defended: who may write to an image file changes what its guest reads, as with any disk; who holds
//! a read lock on a file keeps others from opening it for writing, who has it open keeps it from being
//! compacted, and who puts a child of a disk into
//! the served directory, which takes its identity, makes the disk read-only; who may rename files in the
//! directory of a parent may exchange it between its check and its use. Nothing is encrypted, and time and
//! space that a disk takes tell about its content.
//!
//! There is no set-id program, and no unsafe code but in `virtdisk/ffi*`, the C interface, in
//! `storage/host/windows/sys.rs`, the calls to Windows' kernel, and in `storage/host/unix/sys.rs`, one call to
//! Linux' (`tests/tidy.rs`).
//!
//! On Windows the same holds with its means: files are held by handles and opened anew from these, names are
//! looked up one by one in the directory that is held, so that no drive letter, share, device, stream or
//! reparse point in a name leads out, and how a file is shared is its lock (`storage::host`). No server is
//! ever asked for a path out of an image, unless its share is one of the directories allowed.
//! The claims are tested by `mount/tests/strangers.rs` and `mount/tests/changes.rs`, as another user too, by
//! the crash tests and `tests/second_damage.rs`.

pub mod check;
pub mod compact;
pub mod create;
pub mod disk;
pub mod error;
pub mod format;
pub mod guest;
pub mod image;
pub mod library;
mod lineage;
pub mod map;
pub mod storage;
mod sync;
pub mod units;
pub mod virtdisk;
