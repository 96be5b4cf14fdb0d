//! Windows' virtual disk functions, for any host: `OpenVirtualDisk`, `CompactVirtualDisk` and what
//! belongs to them. In C they are in `libvhdfs.so` or `vhdfs.dll`, with the header
//! `src/virtdisk/virtdisk.h`; here they are safe functions with the same contract, without the
//! parameters that only have a version.
//!
//! ```
//! use vhdfs::create::{CreateOptions, create};
//! use vhdfs::virtdisk::*;
//!
//! # let folder = tempfile::tempdir()?;
//! # let path = folder.path().join("web.vhd");
//! # create(&path, &CreateOptions::dynamic(1 << 30))?;
//! // With METAOPS alone only blocks of zeros go. To ask the guest's filesystems what is free, the
//! // disk is attached.
//! let access = VIRTUAL_DISK_ACCESS_METAOPS
//!     | VIRTUAL_DISK_ACCESS_ATTACH_RO
//!     | VIRTUAL_DISK_ACCESS_DETACH;
//! let disk = open_virtual_disk(
//!     &VirtualStorageType::UNKNOWN,
//!     &path,
//!     access,
//!     OPEN_VIRTUAL_DISK_FLAG_NONE,
//!     None,
//! )?;
//! attach_virtual_disk(&disk, ATTACH_VIRTUAL_DISK_FLAG_READ_ONLY, 0)?;
//!
//! let overlapped = Overlapped::new();
//! let flags = COMPACT_VIRTUAL_DISK_FLAG_NONE;
//! let started = compact_virtual_disk(&disk, flags, Some(&overlapped));
//! assert_eq!(started, Err(ERROR_IO_PENDING));
//! while !overlapped.wait_for(std::time::Duration::from_millis(100)) {
//!     let progress = get_virtual_disk_operation_progress(&disk, &overlapped)?;
//!     println!("{}%", progress.current_value * 100 / progress.completion_value);
//! }
//! overlapped.wait()?;
//! detach_virtual_disk(&disk, DETACH_VIRTUAL_DISK_FLAG_NONE, 0)?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # What is kept of Windows' contract
//! * A handle may do what its access mask says, and nobody is let in beside one that may attach or
//!   compact: `ERROR_SHARING_VIOLATION`. Handles that may only ask or detach do not count.
//! * While a disk is attached, another handle may open it to compact it, in this process or another one:
//!   first mounting a disk read-only, then optimizing it, is the documented way. One of them compacts at a time:
//!   else `ERROR_SHARING_VIOLATION`. All other writers are kept off as before, those of QEMU among
//!   them, and while another program reads the file nobody compacts it.
//! * [`compact_virtual_disk`] compacts dynamic and differencing disks, not fixed ones
//!   (`ERROR_VHD_INVALID_TYPE`), one at a time (`ERROR_VHD_INVALID_STATE`). While the disk is attached
//!   it is file-system-aware, else it looks for blocks of zeros alone.
//! * Cancelled, detached while it runs, or its handle closed, it ends with `ERROR_OPERATION_ABORTED`,
//!   and the file is sound. It can be run again. A file whose compaction was cut short may become
//!   smaller when it is next opened for compaction.
//! * Everything is done with the caller's own rights.
//!
//! # What is not
//! * There is no device: attaching makes a disk known as attached, to be compacted with what its
//!   filesystems call free. Nothing of it can be read through the handle. It cannot outlive the
//!   handle (`ATTACH_VIRTUAL_DISK_FLAG_PERMANENT_LIFETIME`) nor be for writing, both `ERROR_NOT_SUPPORTED`. A
//!   handle of another process cannot detach it (`ERROR_NOT_SUPPORTED`), and a compaction by another
//!   process goes on when it is detached.
//! * On Windows it is not seen that another process has the disk attached: it is compacted as one that is
//!   detached. Nor are other programs that write kept off while it is attached.
//! * A file-system-aware compaction also drops blocks of zeros, and knows more filesystems than NTFS.
//!   It falls back to blocks of zeros where other disks in the file's directory, or below, are
//!   children of the disk; of a VHD always, for a child that is elsewhere could not tell.
//! * What a path of a disk's type is, is told by what the file holds, and only where that leaves it
//!   open by its extension.
//! * A caller who closes a handle while an operation runs waits for its end.
//!
//! # What may be asked for
//! As `virtdisk.h` of the Windows SDK has it, and each function's page. What is not listed is
//! `ERROR_INVALID_PARAMETER`, as those pages say of unknown flags.
//!
//! | call | flags or version | here |
//! |---|---|---|
//! | `OpenVirtualDisk` | `NO_PARENTS` | can only be asked what it is |
//! | | `IGNORE_RELATIVE_PARENT_LOCATOR` | parents are not looked for by relative paths |
//! | | `CACHED_IO`, `PARENT_CACHED_IO`, `NO_WRITE_HARDENING`, `SUPPORT_COMPRESSED_VOLUMES`, `SUPPORT_SPARSE_FILES_ANY_FS`, `SUPPORT_ENCRYPTED_FILES` | in any combination; nothing to do: files are read through the host's cache and synced as ever, whatever stores them |
//! | | `BLANK_FILE`, `CUSTOM_DIFF_CHAIN`, `VHDSET_FILE_ONLY` | refused: no such files, and no `AddVirtualDiskParent` |
//! | | `BOOT_DRIVE` | refused: for the kernel alone |
//! | | no parameters, versions 1 and 2 | version 3 is for Windows' own use |
//! | `AttachVirtualDisk` | `READ_ONLY` | needed, else `ERROR_NOT_SUPPORTED` |
//! | | `PERMANENT_LIFETIME` | `ERROR_NOT_SUPPORTED` |
//! | | `NO_DRIVE_LETTER`, `NO_LOCAL_HOST`, `NO_SECURITY_DESCRIPTOR`, `BYPASS_DEFAULT_ENCRYPTION_POLICY` | nothing to do: there is no device |
//! | | those above 0x20 | refused, as the page has it: each is about the device |
//! | | no parameters, version 1, version 2 with a range of 0 | version 2 as go-winio attaches; a part of a disk is not attached |
//! | `DetachVirtualDisk` | none | |
//! | `CompactVirtualDisk` | `NO_ZERO_SCAN`, `NO_BLOCK_MOVES` | together, too |
//! | | no parameters, version 1 | |
//! | `GetVirtualDiskInformation` | 1 to 4, 6, 7, 10, 13 | |
//! | | 5, 8, 9, 11, 12, 14, 15 | `ERROR_NOT_SUPPORTED` |
//!
//! Detaching what is not attached is `ERROR_NOT_READY`. The page says only that it fails; this is what
//! callers of Windows' function have met: Octopus Deploy's Calamari allows for it, and Docker reports it
//! (moby issue 40723).

mod compaction;
mod constants;
mod disk;
mod error;
mod event;
mod ffi;
mod info;
mod job;
mod rights;
mod shared;
#[cfg(test)]
mod tests;

use std::path::Path;

pub use constants::*;
pub use disk::VirtualDisk;
pub use error::*;
pub use info::VirtualDiskInfo;
pub use job::{Overlapped, VirtualDiskProgress};
pub use rights::OpenParameters;

use job::Waiter;
use rights::Rights;

/// Open flags that are understood; all but the first two ask for what is done anyway.
const OPEN_FLAGS: u32 = OPEN_VIRTUAL_DISK_FLAG_NO_PARENTS
    | OPEN_VIRTUAL_DISK_FLAG_IGNORE_RELATIVE_PARENT_LOCATOR
    | OPEN_VIRTUAL_DISK_FLAG_CACHED_IO
    | OPEN_VIRTUAL_DISK_FLAG_PARENT_CACHED_IO
    | OPEN_VIRTUAL_DISK_FLAG_NO_WRITE_HARDENING
    | OPEN_VIRTUAL_DISK_FLAG_SUPPORT_COMPRESSED_VOLUMES
    | OPEN_VIRTUAL_DISK_FLAG_SUPPORT_SPARSE_FILES_ANY_FS
    | OPEN_VIRTUAL_DISK_FLAG_SUPPORT_ENCRYPTED_FILES;

/// Attach flags that mean something to Windows.
const ATTACH_FLAGS: u32 = 0x3f;

/// Opens the virtual disk file at `path`, for what `access` says (`VIRTUAL_DISK_ACCESS_*`).
///
/// The file is opened for writing if `access` has [`VIRTUAL_DISK_ACCESS_METAOPS`]; opening it then
/// finishes what an interrupted compaction left, which may make the file smaller. The parents of a
/// differencing disk are looked for below the file's own directory.
///
/// # Errors
/// * `ERROR_INVALID_PARAMETER`: bits in `access` that mean nothing, or any with parameters of version
///   2; flags that are not in the module's table.
/// * `ERROR_FILE_NOT_FOUND`, `ERROR_PATH_NOT_FOUND`; `ERROR_ACCESS_DENIED`, where the caller's rights do
///   not reach; `ERROR_SHARING_VIOLATION`, where somebody else has the file open.
/// * `ERROR_VIRTDISK_PROVIDER_NOT_FOUND`: another type than VHD and VHDX.
/// * `ERROR_FILE_CORRUPT`, `ERROR_VHD_DRIVE_FOOTER_MISSING`, `ERROR_VHD_BLOCK_ALLOCATION_TABLE_CORRUPT`,
///   `ERROR_VHD_FORMAT_UNSUPPORTED_VERSION`: the file's bytes.
/// * `ERROR_VHD_PARENT_VHD_NOT_FOUND`, `ERROR_VHD_CHILD_PARENT_ID_MISMATCH`,
///   `ERROR_VHD_CHILD_PARENT_SIZE_MISMATCH`, `ERROR_VHD_PARENT_VHD_ACCESS_DENIED`,
///   `ERROR_VHD_DIFFERENCING_CHAIN_CYCLE_DETECTED`, `ERROR_VHD_DIFFERENCING_CHAIN_ERROR_IN_PARENT`.
/// * What the host answers: `ERROR_IO_DEVICE`, `ERROR_WRITE_PROTECT` and the like.
pub fn open_virtual_disk(
    storage_type: &VirtualStorageType,
    path: &Path,
    access: u32,
    flags: u32,
    parameters: Option<OpenParameters>,
) -> Result<VirtualDisk, Win32Error> {
    if flags & !OPEN_FLAGS != 0 {
        return Err(ERROR_INVALID_PARAMETER);
    }
    let rights = Rights::new(access, parameters)?;
    VirtualDisk::open(storage_type, path, rights, flags)
}

/// Attaches the disk, read-only, until [`detach_virtual_disk`] or the handle's end: a compaction, by
/// this handle or another one, is then file-system-aware. The handle no longer keeps off who compacts.
///
/// # Errors
/// * `ERROR_INVALID_PARAMETER`: flags above 0x3f, or any `provider_flags`.
/// * `ERROR_NOT_SUPPORTED`: without `ATTACH_VIRTUAL_DISK_FLAG_READ_ONLY`, or with
///   `ATTACH_VIRTUAL_DISK_FLAG_PERMANENT_LIFETIME`. Other flags have no meaning here.
/// * `ERROR_ACCESS_DENIED`: the handle may not attach.
/// * `ERROR_VHD_INVALID_STATE`: attached already, opened without its parents, or an operation runs.
/// * `ERROR_SHARING_VIOLATION`: after it was detached, another handle has it to compact it.
pub fn attach_virtual_disk(
    disk: &VirtualDisk,
    flags: u32,
    provider_flags: u32,
) -> Result<(), Win32Error> {
    attach(disk, flags, provider_flags, None)
}

fn attach(
    disk: &VirtualDisk,
    flags: u32,
    provider_flags: u32,
    waiter: Option<Box<dyn Waiter>>,
) -> Result<(), Win32Error> {
    if flags & !ATTACH_FLAGS != 0 || provider_flags != 0 {
        return Err(ERROR_INVALID_PARAMETER);
    }
    let has = |flag| flags & flag != 0;
    if !has(ATTACH_VIRTUAL_DISK_FLAG_READ_ONLY) || has(ATTACH_VIRTUAL_DISK_FLAG_PERMANENT_LIFETIME)
    {
        return Err(ERROR_NOT_SUPPORTED);
    }
    disk.attach(waiter)
}

/// Detaches the disk. A compaction that runs in this process ends with `ERROR_OPERATION_ABORTED`, and has
/// ended on return.
///
/// # Errors
/// * `ERROR_INVALID_PARAMETER`: any `flags` or `provider_flags`.
/// * `ERROR_ACCESS_DENIED`: the handle may not detach.
/// * `ERROR_NOT_READY`: it is not attached. `ERROR_NOT_SUPPORTED`: another process has attached it.
pub fn detach_virtual_disk(
    disk: &VirtualDisk,
    flags: u32,
    provider_flags: u32,
) -> Result<(), Win32Error> {
    if flags != DETACH_VIRTUAL_DISK_FLAG_NONE || provider_flags != 0 {
        return Err(ERROR_INVALID_PARAMETER);
    }
    disk.detach()
}

/// Makes the file smaller: drops the blocks that hold nothing but zeros, or what the parent has, and
/// of an attached disk those that its filesystems call free; then moves blocks from the end of the
/// file into the gaps, and cuts it. Everything it did is durable at its end.
///
/// With `overlapped` it returns `ERROR_IO_PENDING` at once and goes on; else it ends before it returns.
///
/// # Errors
/// At once:
/// * `ERROR_INVALID_PARAMETER`: flags other than `COMPACT_VIRTUAL_DISK_FLAG_NO_ZERO_SCAN` and
///   `COMPACT_VIRTUAL_DISK_FLAG_NO_BLOCK_MOVES`.
/// * `ERROR_ACCESS_DENIED`: the handle lacks `VIRTUAL_DISK_ACCESS_METAOPS`, or the file was opened
///   read-only.
/// * `ERROR_VHD_INVALID_TYPE`: a fixed disk.
/// * `ERROR_VHD_INVALID_STATE`: an operation runs, or the disk was opened without its parents.
/// * `ERROR_SHARING_VIOLATION`: the disk is attached, and another handle or program has the file; what
///   else opening fails with, for an attached disk is opened anew.
/// * `ERROR_IO_PENDING`: it has begun.
///
/// At its end, from here or from `overlapped`:
/// * `ERROR_OPERATION_ABORTED`: cancelled, detached, or closed.
/// * `ERROR_DISK_FULL`: the host has no room to move a block; what needed none was done.
/// * `ERROR_VHD_METADATA_WRITE_FAILURE`, or what the host answers.
pub fn compact_virtual_disk(
    disk: &VirtualDisk,
    flags: u32,
    overlapped: Option<&Overlapped>,
) -> Result<(), Win32Error> {
    let waiter = overlapped.map(|overlapped| -> Box<dyn Waiter> { Box::new(overlapped.clone()) });
    compact(disk, flags, waiter)
}

fn compact(
    disk: &VirtualDisk,
    flags: u32,
    waiter: Option<Box<dyn Waiter>>,
) -> Result<(), Win32Error> {
    let known = COMPACT_VIRTUAL_DISK_FLAG_NO_ZERO_SCAN | COMPACT_VIRTUAL_DISK_FLAG_NO_BLOCK_MOVES;
    if flags & !known != 0 {
        return Err(ERROR_INVALID_PARAMETER);
    }
    let has = |flag| flags & flag != 0;
    disk.compact(
        !has(COMPACT_VIRTUAL_DISK_FLAG_NO_ZERO_SCAN),
        !has(COMPACT_VIRTUAL_DISK_FLAG_NO_BLOCK_MOVES),
        waiter,
    )
}

/// How far the operation is that was begun with `overlapped`; its outcome, once it has ended, until
/// the next operation on the disk begins.
///
/// # Errors
/// `ERROR_INVALID_PARAMETER`: no such operation.
pub fn get_virtual_disk_operation_progress(
    disk: &VirtualDisk,
    overlapped: &Overlapped,
) -> Result<VirtualDiskProgress, Win32Error> {
    disk.progress(overlapped.key())
}

/// Asks an operation on the disk to stop: the one that was begun with `overlapped`, or whichever runs.
/// It ends soon after with `ERROR_OPERATION_ABORTED`, unless it was done before it noticed.
///
/// # Errors
/// `ERROR_NOT_FOUND`: there is none.
pub fn cancel_io_ex(disk: &VirtualDisk, overlapped: Option<&Overlapped>) -> Result<(), Win32Error> {
    disk.cancel(overlapped.map(Overlapped::key))
}

/// What the disk is; `version` is one of `GET_VIRTUAL_DISK_INFO_*`.
///
/// # Errors
/// * `ERROR_ACCESS_DENIED`: the handle lacks `VIRTUAL_DISK_ACCESS_GET_INFO`.
/// * `ERROR_INVALID_PARAMETER`: no such version; `ERROR_NOT_SUPPORTED`: one that is not supported here.
/// * `ERROR_VHD_INVALID_TYPE`: asked for the parent of a disk that has none.
/// * As [`open_virtual_disk`], if the file has changed.
pub fn get_virtual_disk_information(
    disk: &VirtualDisk,
    version: u32,
) -> Result<VirtualDiskInfo, Win32Error> {
    disk.information(version)
}
