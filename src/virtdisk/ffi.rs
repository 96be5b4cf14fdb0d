//! The functions of the C library, over the safe ones beside it. No panic leaves them.
//!
//! A handle is a number that is looked up, never an address, so that a stale one is an error. What a
//! caller's pointers lead to is checked only as far as that can be: null and misaligned ones are
//! `ERROR_INVALID_PARAMETER`.

#![allow(
    unsafe_code,
    reason = "a C interface: its callers' pointers are read and written, and its names are exported"
)]

mod answer;
#[cfg(not(windows))]
mod handles;
#[cfg(not(windows))]
mod kernel32;
mod types;
#[cfg(windows)]
mod windows;

use std::ffi::c_void;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use uuid::Uuid;

use super::constants::*;
use super::disk::VirtualDisk;
use super::error::*;
use super::job::Waiter;
use super::rights::OpenParameters;
use super::{VirtualStorageType, attach, compact, detach_virtual_disk, open_virtual_disk};
use answer::encoded;
#[cfg(not(windows))]
use kernel32 as host;
use types::*;
#[cfg(windows)]
use windows as host;

type Handle = *mut c_void;

/// UTF-16 units of the longest path that is read: Windows' limit.
const MAX_PATH_LEN: usize = 32_767;

/// Runs the body of an exported function.
fn guarded(body: impl FnOnce() -> Result<(), Win32Error>) -> u32 {
    let result = catch_unwind(AssertUnwindSafe(body));
    let result = result.unwrap_or(Err(ERROR_INTERNAL_ERROR));
    result.err().unwrap_or(ERROR_SUCCESS).code()
}

/// What a caller's pointer leads to.
///
/// # Safety
/// Null, or valid for reads of a `T`, which any bytes are.
unsafe fn read<T: Copy>(pointer: *const T) -> Result<T, Win32Error> {
    if pointer.is_null() || !pointer.is_aligned() {
        return Err(ERROR_INVALID_PARAMETER);
    }
    // SAFETY: the caller's promise, and neither null nor misaligned.
    Ok(unsafe { pointer.read() })
}

/// Writes where a caller's pointer leads to.
///
/// # Safety
/// Null, or valid for writes of a `T`.
unsafe fn write<T>(pointer: *mut T, value: T) -> Result<(), Win32Error> {
    if pointer.is_null() || !pointer.is_aligned() {
        return Err(ERROR_INVALID_PARAMETER);
    }
    // SAFETY: the caller's promise, and neither null nor misaligned.
    unsafe { pointer.write(value) };
    Ok(())
}

/// A caller's path.
///
/// # Safety
/// Null, or a string of 16-bit units that ends with a 0.
unsafe fn read_path(pointer: *const u16) -> Result<PathBuf, Win32Error> {
    if pointer.is_null() || !pointer.is_aligned() {
        return Err(ERROR_INVALID_PARAMETER);
    }
    let mut units = Vec::new();
    loop {
        // SAFETY: all units before this one were not 0, so the string goes on to here.
        match unsafe { pointer.add(units.len()).read() } {
            0 => break,
            _ if units.len() == MAX_PATH_LEN => return Err(ERROR_FILENAME_EXCED_RANGE),
            unit => units.push(unit),
        }
    }
    host::path_of(&units)
}

/// The disk of a handle.
fn disk_of(handle: Handle) -> Result<Arc<VirtualDisk>, Win32Error> {
    host::disk(handle)
}

/// The disk of a handle, for the functions whose pages say so of a wrong one.
fn disk_or_invalid(handle: Handle) -> Result<Arc<VirtualDisk>, Win32Error> {
    disk_of(handle).map_err(|_| ERROR_INVALID_PARAMETER)
}

/// The event of an `OVERLAPPED`. The rest of it may be changing.
///
/// # Safety
/// Null, or valid for reads.
unsafe fn event_of(overlapped: *const Overlapped) -> Result<Handle, Win32Error> {
    if overlapped.is_null() || !overlapped.is_aligned() {
        return Err(ERROR_INVALID_PARAMETER);
    }
    // SAFETY: the caller's promise, and neither null nor misaligned.
    Ok(unsafe { (&raw const (*overlapped).event).read() })
}

/// A caller's `OVERLAPPED`, which it keeps until the operation has ended.
struct OverlappedPointer {
    overlapped: *mut Overlapped,
    event: Option<host::EventRef>,
}

// SAFETY: the caller keeps it valid until the operation has ended, on whichever thread that is.
unsafe impl Send for OverlappedPointer {}

impl OverlappedPointer {
    /// For an operation on the disk of `handle`.
    ///
    /// # Safety
    /// Null, or valid for reads and writes until the operation has ended.
    unsafe fn boxed(
        overlapped: *mut Overlapped,
        handle: Handle,
    ) -> Result<Option<Box<dyn Waiter>>, Win32Error> {
        if overlapped.is_null() {
            return Ok(None);
        }
        // SAFETY: the caller's promise.
        let event = host::event(unsafe { event_of(overlapped) }?, handle)?;
        Ok(Some(Box::new(Self { overlapped, event })))
    }

    fn set_status(&self, status: usize) {
        // SAFETY: valid, by the promise of `boxed`; aligned, as that has checked. Others who look at it
        // meanwhile read it, as C's `volatile` or atomically.
        let internal = unsafe { AtomicUsize::from_ptr(&raw mut (*self.overlapped).internal) };
        internal.store(status, Ordering::Release);
    }
}

impl Waiter for OverlappedPointer {
    fn key(&self) -> usize {
        self.overlapped.addr()
    }

    fn begin(&mut self) {
        if let Some(event) = &self.event {
            event.reset();
        }
        // SAFETY: valid and aligned, as above; the operation has not begun, so nobody else uses it.
        unsafe { (&raw mut (*self.overlapped).internal_high).write(0) };
        self.set_status(STATUS_PENDING);
    }

    fn end(self: Box<Self>, status: Win32Error) {
        self.set_status(host::internal_of(status));
        // From here on the caller may free the structure.
        if let Some(event) = &self.event {
            event.set();
        }
    }
}

/// # Safety
/// Pointers are null or lead to what the header says.
unsafe fn open_parameters(
    pointer: *const OpenParametersHead,
) -> Result<Option<OpenParameters>, Win32Error> {
    if pointer.is_null() {
        return Ok(None);
    }
    // SAFETY: the caller's promise. Older headers have no more than the version that is used.
    Ok(Some(match unsafe { read(pointer) }?.version {
        OPEN_VIRTUAL_DISK_VERSION_1 => {
            // SAFETY: as above.
            let OpenParameters1 { rw_depth, .. } = unsafe { read(pointer.cast()) }?;
            OpenParameters::Version1 { rw_depth }
        }
        OPEN_VIRTUAL_DISK_VERSION_2 => {
            // SAFETY: as above.
            let version_2: OpenParameters2 = unsafe { read(pointer.cast()) }?;
            OpenParameters::Version2 {
                get_info_only: version_2.get_info_only != 0,
                read_only: version_2.read_only != 0,
            }
        }
        _ => return Err(ERROR_INVALID_PARAMETER),
    }))
}

/// Fails unless the parameters, if there are any, are of version 1.
///
/// # Safety
/// Null, or a structure that begins with its version.
unsafe fn check_version(version: *const u32) -> Result<(), Win32Error> {
    // SAFETY: the caller's promise.
    match version.is_null() || unsafe { read(version) }? == 1 {
        true => Ok(()),
        false => Err(ERROR_INVALID_PARAMETER),
    }
}

/// As [`check_version`]; and version 2 is known, but no part of the disk can be attached alone.
///
/// # Safety
/// Null, or what the header says.
unsafe fn check_attach(parameters: *const AttachParametersHead) -> Result<(), Win32Error> {
    // SAFETY: the caller's promise. Older headers have no more than the version that is used.
    if parameters.is_null() || unsafe { read(parameters) }?.version != 2 {
        // SAFETY: as above.
        return unsafe { check_version(parameters.cast()) };
    }
    // SAFETY: as above.
    let version_2: AttachParameters2 = unsafe { read(parameters.cast()) }?;
    match (version_2.restricted_offset, version_2.restricted_length) {
        (0, 0) => Ok(()),
        _ => Err(ERROR_INVALID_PARAMETER),
    }
}

/// As [`check_version`], and what is reserved must be 0.
///
/// # Safety
/// Null, or what the header says.
unsafe fn check_compact(parameters: *const CompactParameters) -> Result<(), Win32Error> {
    // SAFETY: the caller's promise.
    unsafe { check_version(parameters.cast()) }?;
    // SAFETY: as above.
    match parameters.is_null() || unsafe { read(parameters) }?.reserved == 0 {
        true => Ok(()),
        false => Err(ERROR_INVALID_PARAMETER),
    }
}

#[unsafe(no_mangle)]
unsafe extern "system" fn OpenVirtualDisk(
    storage_type: *const StorageType,
    path: *const u16,
    access: u32,
    flags: u32,
    parameters: *const OpenParametersHead,
    handle: *mut Handle,
) -> u32 {
    guarded(|| {
        // SAFETY: the caller's promise: the header.
        let (storage_type, path, parameters) = unsafe {
            (
                read(storage_type)?,
                read_path(path)?,
                open_parameters(parameters)?,
            )
        };
        if handle.is_null() || !handle.is_aligned() {
            return Err(ERROR_INVALID_PARAMETER);
        }
        let vendor = storage_type.vendor_id;
        let (data1, data2, data3) = (vendor.data1, vendor.data2, vendor.data3);
        let storage_type = VirtualStorageType {
            device_id: storage_type.device_id,
            vendor_id: Uuid::from_fields(data1, data2, data3, &vendor.data4),
        };
        let disk = open_virtual_disk(&storage_type, &path, access, flags, parameters)?;
        let kept = host::keep(disk)?;
        // SAFETY: the caller's promise: the header.
        unsafe { write(handle, kept) }
    })
}

#[unsafe(no_mangle)]
unsafe extern "system" fn AttachVirtualDisk(
    handle: Handle,
    _security_descriptor: *const c_void,
    flags: u32,
    provider_flags: u32,
    parameters: *const AttachParametersHead,
    overlapped: *mut Overlapped,
) -> u32 {
    guarded(|| {
        let disk = disk_or_invalid(handle)?;
        // SAFETY: the caller's promise: the header.
        let waiter = unsafe {
            check_attach(parameters)?;
            OverlappedPointer::boxed(overlapped, handle)?
        };
        attach(&disk, flags, provider_flags, waiter)
    })
}

#[unsafe(no_mangle)]
extern "system" fn DetachVirtualDisk(handle: Handle, flags: u32, provider_flags: u32) -> u32 {
    guarded(|| detach_virtual_disk(&*disk_or_invalid(handle)?, flags, provider_flags))
}

#[unsafe(no_mangle)]
unsafe extern "system" fn CompactVirtualDisk(
    handle: Handle,
    flags: u32,
    parameters: *const CompactParameters,
    overlapped: *mut Overlapped,
) -> u32 {
    guarded(|| {
        let disk = disk_of(handle)?;
        // SAFETY: the caller's promise: the header.
        let waiter = unsafe {
            check_compact(parameters)?;
            OverlappedPointer::boxed(overlapped, handle)?
        };
        compact(&disk, flags, waiter)
    })
}

#[unsafe(no_mangle)]
unsafe extern "system" fn GetVirtualDiskOperationProgress(
    handle: Handle,
    overlapped: *const Overlapped,
    progress: *mut Progress,
) -> u32 {
    guarded(|| {
        let disk = disk_of(handle)?;
        if overlapped.is_null() {
            return Err(ERROR_INVALID_PARAMETER);
        }
        let found = disk.progress(overlapped.addr())?;
        let found = Progress {
            operation_status: found.operation_status.code(),
            current_value: found.current_value,
            completion_value: found.completion_value,
        };
        // SAFETY: the caller's promise: the header.
        unsafe { write(progress, found) }
    })
}

#[unsafe(no_mangle)]
unsafe extern "system" fn GetVirtualDiskInformation(
    handle: Handle,
    info_size: *mut u32,
    info: *mut GetInfoSize,
    size_used: *mut u32,
) -> u32 {
    guarded(|| {
        let disk = disk_of(handle)?;
        // SAFETY: the caller's promise: the header.
        let given = unsafe { read(info_size) }?;
        if info.is_null() || !info.is_aligned() {
            return Err(ERROR_INVALID_PARAMETER);
        }
        let least = length(INFO_AT)?;
        if given < least {
            // SAFETY: as above.
            unsafe { write(info_size, length(size_of::<GetInfoSize>())?) }?;
            return Err(ERROR_INSUFFICIENT_BUFFER);
        }
        // SAFETY: as above, and there are as many bytes.
        let version = unsafe { read(info.cast::<u32>()) }?;
        let answer = encoded(&disk.information(version)?);
        let needed = length(INFO_AT + answer.len())?;
        if !size_used.is_null() {
            // SAFETY: as above.
            unsafe { write(size_used, needed) }?;
        }
        if given < needed {
            // SAFETY: as above.
            unsafe { write(info_size, needed) }?;
            return Err(ERROR_INSUFFICIENT_BUFFER);
        }
        // SAFETY: as above: the caller's buffer has `given` bytes, and the answer is not in it.
        unsafe {
            let target = info.cast::<u8>().add(INFO_AT);
            target.copy_from_nonoverlapping(answer.as_ptr(), answer.len());
        }
        Ok(())
    })
}

fn length(bytes: usize) -> Result<u32, Win32Error> {
    u32::try_from(bytes).map_err(|_| ERROR_INTERNAL_ERROR)
}
