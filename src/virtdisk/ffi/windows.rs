//! The same on Windows, whose own kernel has the rest. A disk's handle is one of an event of the
//! kernel's, which is set whenever an operation on the disk ends, so that its number is no other
//! object's and it can be waited for. The header leads `CloseHandle` and `CancelIoEx` here.

use std::collections::HashMap;
use std::ffi::{OsString, c_void};
use std::os::windows::ffi::OsStringExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::{Arc, LazyLock};

use parking_lot::Mutex;

use super::Handle;
use super::types::Overlapped;
use crate::units::usize_from_u32;
use crate::virtdisk::disk::VirtualDisk;
use crate::virtdisk::error::*;

#[link(name = "kernel32")]
unsafe extern "system" {
    fn CreateEventW(
        attributes: *const c_void,
        manual_reset: i32,
        initial_state: i32,
        name: *const u16,
    ) -> Handle;
    safe fn SetEvent(event: Handle) -> i32;
    safe fn ResetEvent(event: Handle) -> i32;
    safe fn CloseHandle(object: Handle) -> i32;
    fn GetHandleInformation(object: Handle, flags: *mut u32) -> i32;
    fn CancelIoEx(file: Handle, overlapped: *const Overlapped) -> i32;
    safe fn SetLastError(code: u32);
}

/// An event that an operation signals. Its owner does not close it before.
#[derive(Clone, Copy, Debug)]
pub(super) struct EventRef(usize);

impl EventRef {
    fn handle(self) -> Handle {
        std::ptr::with_exposed_provenance_mut(self.0)
    }

    pub(super) fn set(self) {
        SetEvent(self.handle());
    }

    pub(super) fn reset(self) {
        ResetEvent(self.handle());
    }
}

static DISKS: LazyLock<Mutex<HashMap<usize, Arc<VirtualDisk>>>> = LazyLock::new(Mutex::default);

/// The event of an `OVERLAPPED`, or else the disk's own.
pub(super) fn event(event: Handle, disk: Handle) -> Result<Option<EventRef>, Win32Error> {
    if event.is_null() {
        return Ok(Some(EventRef(disk.expose_provenance())));
    }
    // The operation would do so first; it also tells whether that is one.
    match ResetEvent(event) {
        0 => Err(ERROR_INVALID_HANDLE),
        _ => Ok(Some(EventRef(event.expose_provenance()))),
    }
}

pub(super) fn disk(handle: Handle) -> Result<Arc<VirtualDisk>, Win32Error> {
    let disk = DISKS.lock().get(&handle.addr()).cloned();
    disk.ok_or_else(|| match is_open(handle) {
        true => ERROR_VIRTDISK_NOT_VIRTUAL_DISK,
        false => ERROR_INVALID_HANDLE,
    })
}

/// Whether it is a handle of anything.
fn is_open(handle: Handle) -> bool {
    /// `INVALID_HANDLE_VALUE`, which stands for the process as well.
    const NONE: usize = usize::MAX;
    let mut flags = 0;
    // SAFETY: it writes one number.
    ![0, NONE].contains(&handle.addr()) && unsafe { GetHandleInformation(handle, &mut flags) } != 0
}

/// Gives out a handle of `disk`.
pub(super) fn keep(disk: VirtualDisk) -> Result<Handle, Win32Error> {
    // SAFETY: an event without attributes or a name.
    let handle = unsafe { CreateEventW(std::ptr::null(), 1, 1, std::ptr::null()) };
    if handle.is_null() {
        return Err(ERROR_NOT_ENOUGH_MEMORY);
    }
    DISKS.lock().insert(handle.addr(), Arc::new(disk));
    Ok(handle)
}

/// What `OVERLAPPED.Internal` holds of an operation that has ended so: an `NTSTATUS` that the kernel
/// translates back.
pub(super) fn internal_of(status: Win32Error) -> usize {
    usize_from_u32(match status.code() {
        0 => 0,
        code @ 0xc000_0000.. => code,
        code => 0xc007_0000 | (code & 0xffff),
    })
}

/// The path that these UTF-16 units name.
pub(super) fn path_of(units: &[u16]) -> Result<PathBuf, Win32Error> {
    Ok(PathBuf::from(OsString::from_wide(units)))
}

/// `CloseHandle`, of disks too.
#[unsafe(no_mangle)]
extern "system" fn VhdfsCloseHandle(handle: Handle) -> i32 {
    let disk = DISKS.lock().remove(&handle.addr());
    if let Some(disk) = disk {
        // Not left to the last reference: another thread's call may hold one for a while.
        let closed = catch_unwind(AssertUnwindSafe(|| disk.close()));
        if closed.is_err() {
            SetLastError(ERROR_INTERNAL_ERROR.code());
            return 0;
        }
    }
    CloseHandle(handle)
}

/// `CancelIoEx`, of disks too.
#[unsafe(no_mangle)]
unsafe extern "system" fn VhdfsCancelIoEx(handle: Handle, overlapped: *const Overlapped) -> i32 {
    let Ok(disk) = disk(handle) else {
        // SAFETY: the caller's promise, passed on.
        return unsafe { CancelIoEx(handle, overlapped) };
    };
    let key = (!overlapped.is_null()).then(|| overlapped.addr());
    match catch_unwind(AssertUnwindSafe(|| disk.cancel(key))) {
        Ok(Ok(())) => 1,
        Ok(Err(error)) => {
            SetLastError(error.code());
            0
        }
        Err(_) => {
            SetLastError(ERROR_INTERNAL_ERROR.code());
            0
        }
    }
}
