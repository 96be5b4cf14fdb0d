//! The calls to Windows' kernel that Rust's standard library does not have, each behind a safe
//! function. Nothing else of the host storage is unsafe.

#![allow(unsafe_code, reason = "foreign functions; reviewed as one file")]

use std::io;
use std::os::windows::io::{AsHandle, AsRawHandle, BorrowedHandle, FromRawHandle, OwnedHandle};
use std::ptr;

use windows_sys::Wdk::Foundation::OBJECT_ATTRIBUTES;
use windows_sys::Wdk::Storage::FileSystem::{
    FILE_OPEN, FS_INFORMATION_CLASS, NtCreateFile, NtQueryVolumeInformationFile,
};
use windows_sys::Win32::Foundation::{
    GENERIC_ALL, HANDLE, NTSTATUS, OBJ_CASE_INSENSITIVE, RtlNtStatusToDosError,
    STATUS_DELETE_PENDING, UNICODE_STRING,
};
use windows_sys::Win32::Security::{
    AccessCheck, DACL_SECURITY_INFORMATION, DuplicateTokenEx, GENERIC_MAPPING,
    GROUP_SECURITY_INFORMATION, GetKernelObjectSecurity, OWNER_SECURITY_INFORMATION, PRIVILEGE_SET,
    SecurityIdentification, TOKEN_DUPLICATE, TOKEN_QUERY, TokenImpersonation,
};
use windows_sys::Win32::Storage::FileSystem::{
    BY_HANDLE_FILE_INFORMATION, FILE_ALL_ACCESS, FILE_GENERIC_EXECUTE, FILE_GENERIC_READ,
    FILE_GENERIC_WRITE, FILE_INFO_BY_HANDLE_CLASS, GETFINALPATHNAMEBYHANDLE_FLAGS,
    GetFileInformationByHandle, GetFileInformationByHandleEx, GetFileType,
    GetFinalPathNameByHandleW,
};
use windows_sys::Win32::System::IO::{DeviceIoControl, IO_STATUS_BLOCK};
use windows_sys::Win32::System::Threading::{GetCurrentProcess, OpenProcessToken};
use zerocopy::{FromBytes, IntoBytes};

use crate::units::usize_from_u32;

/// How much room the kernel is told of: never more than there is.
fn u32_of_len(len: usize) -> u32 {
    u32::try_from(len).unwrap_or(u32::MAX)
}

fn last_error<T>() -> io::Result<T> {
    Err(io::Error::last_os_error())
}

/// What a call that answers with a status says.
fn answer(status: NTSTATUS) -> io::Result<()> {
    match status {
        0.. => Ok(()),
        // To be deleted once its last handle is closed; nobody can open it any more.
        STATUS_DELETE_PENDING => Err(io::ErrorKind::NotFound.into()),
        // SAFETY: takes a number, gives a number.
        failed => Err(match unsafe { RtlNtStatusToDosError(failed) }.try_into() {
            Ok(code) => io::Error::from_raw_os_error(code),
            Err(_) => io::Error::other("an error of the host without a number"),
        }),
    }
}

/// Opens what `name` is in the directory `root`, or, where `name` is empty, the very file that is
/// open as `root`. The name is taken word by word: it is no drive, no share and no device. `access`,
/// `share` and `options` are those of `NtCreateFile`.
pub(crate) fn open_relative(
    root: BorrowedHandle<'_>,
    name: &[u16],
    access: u32,
    share: u32,
    options: u32,
) -> io::Result<OwnedHandle> {
    let Ok(len) = u16::try_from(size_of_val(name)) else {
        return Err(io::ErrorKind::InvalidFilename.into());
    };
    let name = UNICODE_STRING {
        Length: len,
        MaximumLength: len,
        Buffer: name.as_ptr().cast_mut(),
    };
    let attributes = OBJECT_ATTRIBUTES {
        Length: u32_of_len(size_of::<OBJECT_ATTRIBUTES>()),
        RootDirectory: root.as_raw_handle(),
        ObjectName: &raw const name,
        Attributes: OBJ_CASE_INSENSITIVE,
        SecurityDescriptor: ptr::null(),
        SecurityQualityOfService: ptr::null(),
    };
    let mut handle: HANDLE = ptr::null_mut();
    let mut status = IO_STATUS_BLOCK::default();
    // SAFETY: all pointers are to values that live until the call returns; `name` describes the
    // slice that it borrows, which the call only reads.
    let result = unsafe {
        NtCreateFile(
            &raw mut handle,
            access,
            &raw const attributes,
            &raw mut status,
            ptr::null(),
            0,
            share,
            FILE_OPEN,
            options,
            ptr::null(),
            0,
        )
    };
    answer(result)?;
    // SAFETY: the call succeeded, so this is an open handle that nobody else has.
    Ok(unsafe { OwnedHandle::from_raw_handle(handle) })
}

/// What `GetFileInformationByHandleEx` tells of `class`, for which the caller names the right type.
pub(crate) fn information<T: FromBytes + IntoBytes>(
    file: BorrowedHandle<'_>,
    class: FILE_INFO_BY_HANDLE_CLASS,
) -> io::Result<T> {
    let mut found = T::new_zeroed();
    let len = u32_of_len(size_of::<T>());
    // SAFETY: at most `len` bytes are written to `found`, and any bytes are a `T`.
    let done = unsafe {
        GetFileInformationByHandleEx(file.as_raw_handle(), class, (&raw mut found).cast(), len)
    };
    if done == 0 { last_error() } else { Ok(found) }
}

/// The same into a buffer, for what has no fixed length; the buffer is cleared first.
pub(crate) fn information_in(
    file: BorrowedHandle<'_>,
    class: FILE_INFO_BY_HANDLE_CLASS,
    buffer: &mut [u64],
) -> io::Result<()> {
    buffer.fill(0);
    let len = u32_of_len(size_of_val(buffer));
    // SAFETY: at most `len` bytes are written to `buffer`, whose elements may hold any bytes.
    let done = unsafe {
        let start = buffer.as_mut_ptr().cast();
        GetFileInformationByHandleEx(file.as_raw_handle(), class, start, len)
    };
    if done == 0 { last_error() } else { Ok(()) }
}

/// What `NtQueryVolumeInformationFile` tells of `class`, for which the caller names the right type.
pub(crate) fn volume_information<T: FromBytes + IntoBytes>(
    file: BorrowedHandle<'_>,
    class: FS_INFORMATION_CLASS,
) -> io::Result<T> {
    let mut found = T::new_zeroed();
    let len = u32_of_len(size_of::<T>());
    let mut status = IO_STATUS_BLOCK::default();
    // SAFETY: at most `len` bytes are written to `found`, and any bytes are a `T`.
    let result = unsafe {
        NtQueryVolumeInformationFile(
            file.as_raw_handle(),
            &raw mut status,
            (&raw mut found).cast(),
            len,
            class,
        )
    };
    answer(result).map(|()| found)
}

/// The volume's serial number and the file's index, as file systems without 128-bit numbers have it.
pub(crate) fn file_index(file: BorrowedHandle<'_>) -> io::Result<(u32, u64)> {
    let mut found = BY_HANDLE_FILE_INFORMATION::default();
    // SAFETY: `found` lives until the call returns.
    let done = unsafe { GetFileInformationByHandle(file.as_raw_handle(), &raw mut found) };
    if done == 0 {
        return last_error();
    }
    let index = u64::from(found.nFileIndexHigh) << 32 | u64::from(found.nFileIndexLow);
    Ok((found.dwVolumeSerialNumber, index))
}

/// `FILE_TYPE_*`.
pub(crate) fn file_type(file: BorrowedHandle<'_>) -> u32 {
    // SAFETY: an open handle, borrowed.
    unsafe { GetFileType(file.as_raw_handle()) }
}

/// Where the file is; `flags` choose the form.
pub(crate) fn final_path(
    file: BorrowedHandle<'_>,
    flags: GETFINALPATHNAMEBYHANDLE_FLAGS,
) -> io::Result<Vec<u16>> {
    let mut path = vec![0_u16; 512];
    loop {
        let room = u32_of_len(path.len());
        // SAFETY: at most `room` units are written to `path`.
        let len = unsafe {
            GetFinalPathNameByHandleW(file.as_raw_handle(), path.as_mut_ptr(), room, flags)
        };
        match usize_from_u32(len) {
            0 => return last_error(),
            len if len < path.len() => {
                path.truncate(len);
                return Ok(path);
            }
            // Longer: `len` counts the zero at the end then.
            len => path.resize(len + 1, 0),
        }
    }
}

/// Asks the file system something. How many bytes it answered.
pub(crate) fn control(
    file: BorrowedHandle<'_>,
    code: u32,
    input: &[u8],
    output: &mut [u8],
) -> io::Result<usize> {
    let mut answered = 0;
    // SAFETY: `input` is only read, at most its length; at most the length of `output` is written
    // to it. The handle is a synchronous one, or the call would fail without an `OVERLAPPED`.
    let done = unsafe {
        DeviceIoControl(
            file.as_raw_handle(),
            code,
            input.as_ptr().cast(),
            u32_of_len(input.len()),
            output.as_mut_ptr().cast(),
            u32_of_len(output.len()),
            &raw mut answered,
            ptr::null_mut(),
        )
    };
    match done {
        0 => last_error(),
        _ => Ok(usize_from_u32(answered)),
    }
}

/// Owner, group and access control list of a file, as one piece.
#[derive(Debug)]
pub(crate) struct Descriptor {
    /// As the kernel aligns it.
    bytes: Vec<u64>,
    len: usize,
}

impl Descriptor {
    /// Of a file that is open with `READ_CONTROL`.
    pub(crate) fn of(file: BorrowedHandle<'_>) -> io::Result<Self> {
        let wanted =
            OWNER_SECURITY_INFORMATION | GROUP_SECURITY_INFORMATION | DACL_SECURITY_INFORMATION;
        let mut bytes = vec![0_u64; 64];
        loop {
            let room = u32_of_len(size_of_val(&bytes[..]));
            let mut needed = 0;
            // SAFETY: at most `room` bytes are written to `bytes`, whose elements may hold any.
            let done = unsafe {
                let start = bytes.as_mut_ptr().cast();
                GetKernelObjectSecurity(file.as_raw_handle(), wanted, start, room, &raw mut needed)
            };
            if done != 0 {
                let len = usize_from_u32(needed).min(size_of_val(&bytes[..]));
                return Ok(Self { bytes, len });
            }
            if needed <= room {
                return last_error();
            }
            bytes.resize(usize_from_u32(needed).div_ceil(size_of::<u64>()), 0);
        }
    }

    /// Its bytes: a self-relative `SECURITY_DESCRIPTOR`.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes.as_bytes()[..self.len]
    }
}

/// A token that stands for somebody, for asking what they may do.
#[derive(Debug)]
pub(crate) struct Token(OwnedHandle);

impl Token {
    /// One that says the same as `token`, which must allow to be duplicated.
    pub(crate) fn duplicate(token: BorrowedHandle<'_>) -> io::Result<Self> {
        let mut copy: HANDLE = ptr::null_mut();
        // SAFETY: an open handle, borrowed; `copy` lives until the call returns.
        let done = unsafe {
            DuplicateTokenEx(
                token.as_raw_handle(),
                TOKEN_QUERY,
                ptr::null(),
                SecurityIdentification,
                TokenImpersonation,
                &raw mut copy,
            )
        };
        match done {
            0 => last_error(),
            // SAFETY: the call succeeded, so this is an open handle that nobody else has.
            _ => Ok(Self(unsafe { OwnedHandle::from_raw_handle(copy) })),
        }
    }

    /// That of this process.
    pub(crate) fn own() -> io::Result<Self> {
        Self::duplicate(own_token()?.as_handle())
    }

    /// Whether a file with this descriptor lets whom it stands for do all of `wanted`.
    pub(crate) fn allows(&self, descriptor: &Descriptor, wanted: u32) -> io::Result<bool> {
        let mapping = GENERIC_MAPPING {
            GenericRead: FILE_GENERIC_READ,
            GenericWrite: FILE_GENERIC_WRITE,
            GenericExecute: FILE_GENERIC_EXECUTE,
            GenericAll: FILE_ALL_ACCESS,
        };
        debug_assert!(wanted & GENERIC_ALL == 0, "not a right of files");
        // As many privileges as there can be.
        let mut privileges = [PRIVILEGE_SET::default(); 64];
        let mut room = u32_of_len(size_of_val(&privileges));
        let (mut granted, mut allowed) = (0, 0);
        // SAFETY: the descriptor is one that the kernel gave, whole and aligned, and is only read;
        // all other pointers are to values that live until the call returns, of the length told.
        let done = unsafe {
            AccessCheck(
                descriptor.bytes.as_ptr().cast_mut().cast(),
                self.0.as_raw_handle(),
                wanted,
                &raw const mapping,
                privileges.as_mut_ptr(),
                &raw mut room,
                &raw mut granted,
                &raw mut allowed,
            )
        };
        if done == 0 {
            last_error()
        } else {
            Ok(allowed != 0)
        }
    }
}

/// The token of this process, which may be duplicated.
pub(crate) fn own_token() -> io::Result<OwnedHandle> {
    let mut token: HANDLE = ptr::null_mut();
    // SAFETY: the handle of this process is always good; `token` lives until the call returns.
    let done = unsafe {
        OpenProcessToken(
            GetCurrentProcess(),
            TOKEN_DUPLICATE | TOKEN_QUERY,
            &raw mut token,
        )
    };
    match done {
        0 => last_error(),
        // SAFETY: the call succeeded, so this is an open handle that nobody else has.
        _ => Ok(unsafe { OwnedHandle::from_raw_handle(token) }),
    }
}
