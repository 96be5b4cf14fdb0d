//! The calls that the compiler cannot check, each behind a safe function.

#![allow(
    unsafe_code,
    reason = "Windows' own functions, and what the driver passes as plain memory"
)]

use std::ffi::{OsStr, OsString, c_void};
use std::fs::File;
use std::io;
use std::os::windows::ffi::{OsStrExt, OsStringExt};
use std::os::windows::io::{AsRawHandle, BorrowedHandle, FromRawHandle};
use std::path::PathBuf;
use std::ptr;

use vhdfs::library::User;
use windows_sys::Win32::Foundation::{
    ERROR_PIPE_CONNECTED, ERROR_SUCCESS, INVALID_HANDLE_VALUE, LocalFree,
};
use windows_sys::Win32::Security::Authorization::{
    ConvertStringSecurityDescriptorToSecurityDescriptorW, SDDL_REVISION_1,
};
use windows_sys::Win32::Security::{PSECURITY_DESCRIPTOR, SECURITY_ATTRIBUTES};
use windows_sys::Win32::Storage::FileSystem::{FILE_FLAG_FIRST_PIPE_INSTANCE, PIPE_ACCESS_DUPLEX};
use windows_sys::Win32::System::LibraryLoader::{
    GetProcAddress, LOAD_LIBRARY_SEARCH_APPLICATION_DIR, LOAD_LIBRARY_SEARCH_SYSTEM32,
    LOAD_WITH_ALTERED_SEARCH_PATH, LoadLibraryExW, LoadLibraryW, SetDefaultDllDirectories,
};
use windows_sys::Win32::System::Pipes::{
    ConnectNamedPipe, CreateNamedPipeW, DisconnectNamedPipe, PIPE_READMODE_BYTE,
    PIPE_REJECT_REMOTE_CLIENTS, PIPE_TYPE_BYTE, PIPE_WAIT,
};
use windows_sys::Win32::System::Registry::{HKEY_LOCAL_MACHINE, RRF_RT_REG_SZ, RegGetValueW};
use winfsp::filesystem::FileSystemContext;

use super::VhdFs;

/// WinFsp's library.
const DLL: &str = if cfg!(target_arch = "aarch64") {
    "winfsp-a64.dll"
} else {
    "winfsp-x64.dll"
};

/// Who may end a mount: who made it, administrators, the system.
const ENDED_BY: &str = "D:P(A;;GA;;;OW)(A;;GA;;;BA)(A;;GA;;;SY)";

/// The longest request or answer of a pipe, in bytes.
const PIPE_BUFFER: u32 = 512;

fn wide(text: impl AsRef<OsStr>) -> Vec<u16> {
    text.as_ref().encode_wide().chain([0]).collect()
}

/// The buffer of a security descriptor as bytes.
pub(super) fn bytes(buffer: &mut [c_void]) -> &mut [u8] {
    // SAFETY: a `c_void` is one byte, and any byte is a `u8`; the borrow is passed on.
    unsafe { std::slice::from_raw_parts_mut(buffer.as_mut_ptr().cast(), buffer.len()) }
}

/// Who asks to open something, in a request to open.
///
/// # Errors
/// Where there is no such request, or its token cannot be used.
pub(super) fn user(file_system: &VhdFs) -> io::Result<User> {
    // SAFETY: only called by `open`, which is an operation that the driver asks for; the union is read
    // as what it is in such a request. Nothing of it is kept.
    let token =
        unsafe { file_system.with_operation_request(|request| request.Req.Create.AccessToken) };
    // The low half is the handle, the high one the process.
    let token = token.map(|token| token & u64::from(u32::MAX));
    let handle = token.and_then(|token| usize::try_from(token).ok());
    let Some(handle) = handle.filter(|handle| *handle != 0) else {
        return Err(io::Error::other("the request has no access token"));
    };
    // SAFETY: the driver keeps the handle open in this process until the request is answered, and it
    // is not used after this call.
    let token = unsafe { BorrowedHandle::borrow_raw(ptr::without_provenance_mut(handle)) };
    User::from_token(token)
}

/// Where WinFsp's installer has put it.
fn installed_in() -> Option<PathBuf> {
    for key in [r"SOFTWARE\WOW6432Node\WinFsp", r"SOFTWARE\WinFsp"] {
        let mut text = [0_u16; 1024];
        let mut size = u32::try_from(size_of_val(&text)).ok()?;
        // SAFETY: both strings end in zero; `size` is that of the buffer, in bytes.
        let found = unsafe {
            RegGetValueW(
                HKEY_LOCAL_MACHINE,
                wide(key).as_ptr(),
                wide("InstallDir").as_ptr(),
                RRF_RT_REG_SZ,
                ptr::null_mut(),
                text.as_mut_ptr().cast(),
                &mut size,
            )
        };
        if found == ERROR_SUCCESS {
            let text = text.split(|unit| *unit == 0).next().unwrap_or_default();
            return Some(OsString::from_wide(text).into());
        }
    }
    None
}

/// Loads WinFsp's library: the one that was installed, or one beside the program, but never one that
/// only lies in the current directory. Its version, as major and minor number.
///
/// # Errors
/// Where there is none.
pub(super) fn load() -> io::Result<(u32, u32)> {
    // SAFETY: takes no pointer.
    unsafe {
        SetDefaultDllDirectories(LOAD_LIBRARY_SEARCH_APPLICATION_DIR | LOAD_LIBRARY_SEARCH_SYSTEM32)
    };
    let installed = installed_in().map(|place| place.join("bin").join(DLL));
    let mut library = ptr::null_mut();
    if let Some(path) = installed.filter(|path| path.is_absolute()) {
        // SAFETY: the string ends in zero.
        library = unsafe {
            LoadLibraryExW(
                wide(path).as_ptr(),
                ptr::null_mut(),
                LOAD_WITH_ALTERED_SEARCH_PATH,
            )
        };
    }
    if library.is_null() {
        // SAFETY: the string ends in zero.
        library = unsafe { LoadLibraryW(wide(DLL).as_ptr()) };
    }
    if library.is_null() {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the name ends in zero, and the library is never unloaded.
    let found = unsafe { GetProcAddress(library, c"FspVersion".as_ptr().cast()) };
    let found = found.ok_or_else(io::Error::last_os_error)?;
    // SAFETY: that is the function's type in WinFsp's header.
    let version: unsafe extern "system" fn(*mut u32) -> i32 = unsafe { std::mem::transmute(found) };
    let mut number = 0;
    // SAFETY: it writes one number, and returns whether it did.
    match unsafe { version(&mut number) } {
        0 => Ok((number >> 16, number & 0xffff)),
        status => Err(io::Error::other(format!("FspVersion: {status:#x}"))),
    }
}

/// One end of a named pipe to which programs of the same user connect, one after the other.
pub(super) struct PipeServer(File);

impl PipeServer {
    /// Makes the pipe `\\.\pipe\NAME`, which no other process may have.
    ///
    /// # Errors
    /// Where somebody has it, among others.
    pub(super) fn new(name: &OsStr) -> io::Result<Self> {
        let mut descriptor: PSECURITY_DESCRIPTOR = ptr::null_mut();
        // SAFETY: the string ends in zero; the descriptor that comes back is freed below.
        let made = unsafe {
            ConvertStringSecurityDescriptorToSecurityDescriptorW(
                wide(ENDED_BY).as_ptr(),
                SDDL_REVISION_1,
                &mut descriptor,
                ptr::null_mut(),
            )
        };
        if made == 0 {
            return Err(io::Error::last_os_error());
        }
        let attributes = SECURITY_ATTRIBUTES {
            nLength: u32::try_from(size_of::<SECURITY_ATTRIBUTES>()).unwrap_or_default(),
            lpSecurityDescriptor: descriptor,
            bInheritHandle: 0,
        };
        // SAFETY: the name ends in zero, and the attributes with their descriptor live until after the call.
        let pipe = unsafe {
            CreateNamedPipeW(
                wide(name).as_ptr(),
                PIPE_ACCESS_DUPLEX | FILE_FLAG_FIRST_PIPE_INSTANCE,
                PIPE_TYPE_BYTE | PIPE_READMODE_BYTE | PIPE_WAIT | PIPE_REJECT_REMOTE_CLIENTS,
                1,
                PIPE_BUFFER,
                PIPE_BUFFER,
                0,
                &attributes,
            )
        };
        let failure = io::Error::last_os_error();
        // SAFETY: allocated by the conversion above, and not used any more.
        unsafe { LocalFree(descriptor) };
        if pipe == INVALID_HANDLE_VALUE {
            return Err(failure);
        }
        // SAFETY: just opened, and nobody else's.
        Ok(Self(unsafe { File::from_raw_handle(pipe) }))
    }

    /// Waits for a program to connect; the pipe to it.
    ///
    /// # Errors
    /// What Windows answers.
    pub(super) fn accept(&self) -> io::Result<&File> {
        // SAFETY: the handle is open, and the call waits.
        let connected = unsafe { ConnectNamedPipe(self.0.as_raw_handle(), ptr::null_mut()) };
        let failure = io::Error::last_os_error();
        let was_quicker = i32::try_from(ERROR_PIPE_CONNECTED).ok();
        if connected == 0 && failure.raw_os_error() != was_quicker {
            return Err(failure);
        }
        Ok(&self.0)
    }

    /// Lets go of the program that is connected.
    pub(super) fn disconnect(&self) {
        // SAFETY: the handle is open.
        unsafe { DisconnectNamedPipe(self.0.as_raw_handle()) };
    }
}
