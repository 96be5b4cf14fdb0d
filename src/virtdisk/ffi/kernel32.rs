//! What a program that uses virtual disks needs of Windows' kernel beside them, where there is none:
//! handles, events, errors. Named as there.

use std::cell::Cell;
use std::ffi::c_void;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use super::handles::{self, Object};
use super::types::{Overlapped, STATUS_PENDING};
use super::{Handle, event_of, write};
use crate::units::usize_from_u32;
use crate::virtdisk::disk::VirtualDisk;
use crate::virtdisk::error::*;
use crate::virtdisk::event::Event;

const WAIT_OBJECT_0: u32 = 0;
const WAIT_TIMEOUT: u32 = 0x102;
const WAIT_FAILED: u32 = u32::MAX;
const INFINITE: u32 = u32::MAX;

const FALSE: i32 = 0;
const TRUE: i32 = 1;

thread_local! {
    static LAST_ERROR: Cell<u32> = const { Cell::new(0) };
}

/// An event that an operation signals; the object lives on when its handle is closed.
pub(super) type EventRef = Arc<Event>;

/// The event of an `OVERLAPPED`; none where it has none.
pub(super) fn event(event: Handle, _disk: Handle) -> Result<Option<EventRef>, Win32Error> {
    match event.is_null() {
        true => Ok(None),
        false => find_event(event).map(Some),
    }
}

fn find_event(handle: Handle) -> Result<EventRef, Win32Error> {
    match handles::find(handle.addr()) {
        Some(Object::Event(event)) => Ok(event),
        _ => Err(ERROR_INVALID_HANDLE),
    }
}

pub(super) fn disk(handle: Handle) -> Result<Arc<VirtualDisk>, Win32Error> {
    match handles::find(handle.addr()) {
        Some(Object::Disk(disk)) => Ok(disk),
        Some(Object::Event(_)) => Err(ERROR_VIRTDISK_NOT_VIRTUAL_DISK),
        None => Err(ERROR_INVALID_HANDLE),
    }
}

/// Gives out a handle of `disk`.
pub(super) fn keep(disk: VirtualDisk) -> Result<Handle, Win32Error> {
    give_out(Object::Disk(Arc::new(disk)))
}

fn give_out(object: Object) -> Result<Handle, Win32Error> {
    let number = handles::insert(object).ok_or(ERROR_NOT_ENOUGH_MEMORY)?;
    Ok(ptr::without_provenance_mut(number))
}

/// What `OVERLAPPED.Internal` holds of an operation that has ended so.
pub(super) fn internal_of(status: Win32Error) -> usize {
    usize_from_u32(status.code())
}

/// The path that these UTF-16 units name.
pub(super) fn path_of(units: &[u16]) -> Result<PathBuf, Win32Error> {
    let path = String::from_utf16(units).map_err(|_| ERROR_INVALID_NAME)?;
    Ok(PathBuf::from(path))
}

/// Runs the body of a function that says whether it succeeded, and leaves why not for `GetLastError`.
fn told(body: impl FnOnce() -> Result<(), Win32Error>) -> i32 {
    let result = catch_unwind(AssertUnwindSafe(body));
    match result.unwrap_or(Err(ERROR_INTERNAL_ERROR)) {
        Ok(()) => TRUE,
        Err(error) => {
            LAST_ERROR.set(error.code());
            FALSE
        }
    }
}

fn timeout(milliseconds: u32) -> Option<Duration> {
    (milliseconds != INFINITE).then(|| Duration::from_millis(milliseconds.into()))
}

/// Waits for an event, or until no operation runs on a disk; says whether that has come.
fn wait(handle: Handle, timeout: Option<Duration>) -> Result<bool, Win32Error> {
    match handles::find(handle.addr()) {
        Some(Object::Event(event)) => Ok(event.wait(timeout)),
        Some(Object::Disk(disk)) => Ok(disk.wait(timeout)),
        None => Err(ERROR_INVALID_HANDLE),
    }
}

#[unsafe(no_mangle)]
extern "system" fn GetLastError() -> u32 {
    LAST_ERROR.get()
}

#[unsafe(no_mangle)]
extern "system" fn Sleep(milliseconds: u32) {
    match timeout(milliseconds) {
        Some(time) => thread::sleep(time),
        None => loop {
            thread::park();
        },
    }
}

/// Closes a handle. What a disk's handle has running is cancelled, and has ended on return.
#[unsafe(no_mangle)]
extern "system" fn CloseHandle(handle: Handle) -> i32 {
    told(|| match handles::remove(handle.addr()) {
        Some(Object::Disk(disk)) => {
            // Not left to the last reference: another thread's call may hold one for a while.
            disk.close();
            Ok(())
        }
        Some(Object::Event(_)) => Ok(()),
        None => Err(ERROR_INVALID_HANDLE),
    })
}

/// Creates an event. Security attributes have no meaning; names are not supported.
#[unsafe(no_mangle)]
extern "system" fn CreateEventW(
    _attributes: *const c_void,
    manual_reset: i32,
    initial_state: i32,
    name: *const u16,
) -> Handle {
    let mut handle = ptr::null_mut();
    told(|| {
        if !name.is_null() {
            return Err(ERROR_NOT_SUPPORTED);
        }
        let event = Event::new(manual_reset != 0, initial_state != 0);
        handle = give_out(Object::Event(Arc::new(event)))?;
        Ok(())
    });
    handle
}

#[unsafe(no_mangle)]
extern "system" fn SetEvent(handle: Handle) -> i32 {
    told(|| {
        find_event(handle)?.set();
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "system" fn ResetEvent(handle: Handle) -> i32 {
    told(|| {
        find_event(handle)?.reset();
        Ok(())
    })
}

/// Waits for an event, or, with a disk's handle, until no operation runs on the disk.
#[unsafe(no_mangle)]
extern "system" fn WaitForSingleObject(handle: Handle, milliseconds: u32) -> u32 {
    let mut outcome = WAIT_FAILED;
    told(|| {
        outcome = match wait(handle, timeout(milliseconds))? {
            true => WAIT_OBJECT_0,
            false => WAIT_TIMEOUT,
        };
        Ok(())
    });
    outcome
}

#[unsafe(no_mangle)]
extern "system" fn CancelIoEx(handle: Handle, overlapped: *const Overlapped) -> i32 {
    told(|| {
        let key = (!overlapped.is_null()).then(|| overlapped.addr());
        disk(handle)?.cancel(key)
    })
}

#[unsafe(no_mangle)]
unsafe extern "system" fn GetOverlappedResult(
    handle: Handle,
    overlapped: *mut Overlapped,
    transferred: *mut u32,
    wait_for_it: i32,
) -> i32 {
    told(|| {
        // SAFETY: the caller's promise: the header.
        let event = unsafe { event_of(overlapped) }?;
        let status = || {
            // SAFETY: as above; neither null nor misaligned, or there was no event.
            let internal = unsafe { AtomicUsize::from_ptr(&raw mut (*overlapped).internal) };
            internal.load(Ordering::Acquire)
        };
        if status() == STATUS_PENDING {
            if wait_for_it == 0 {
                return Err(ERROR_IO_INCOMPLETE);
            }
            wait(if event.is_null() { handle } else { event }, None)?;
        }
        if !transferred.is_null() {
            // SAFETY: as above.
            unsafe { write(transferred, 0) }?;
        }
        match status() {
            0 => Ok(()),
            STATUS_PENDING => Err(ERROR_IO_INCOMPLETE),
            status => Err(Win32Error::of_internal(status)),
        }
    })
}
