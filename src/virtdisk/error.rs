//! System error codes of Windows, and what becomes one.

use std::error::Error;
use std::fmt;
use std::io::{self, ErrorKind};
use std::path::Path;

use crate::error::{CompactError, DiskError, FormatError, OpenError, OpenProblem, ParentProblem};

/// A system error code of Windows (`winerror.h`). [`ERROR_IO_PENDING`] is one too: an operation has
/// been started.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Win32Error(u32);

impl Win32Error {
    /// The number.
    pub const fn code(self) -> u32 {
        self.0
    }

    /// The one that an `OVERLAPPED` holds.
    #[cfg(not(windows))]
    pub(super) fn of_internal(status: usize) -> Self {
        u32::try_from(status).map_or(ERROR_INTERNAL_ERROR, Self)
    }

    /// `Err` with it, unless it is [`ERROR_SUCCESS`].
    pub(super) fn into_result(self) -> Result<(), Self> {
        match self {
            ERROR_SUCCESS => Ok(()),
            error => Err(error),
        }
    }

    /// The code for what the host answered about a file.
    pub(super) fn host(error: &io::Error) -> Self {
        #[cfg(windows)]
        if let Some(Ok(code)) = error.raw_os_error().map(u32::try_from) {
            return Self(code);
        }
        match error.kind() {
            ErrorKind::NotFound => ERROR_FILE_NOT_FOUND,
            ErrorKind::NotADirectory => ERROR_PATH_NOT_FOUND,
            // The second is what opening something else than a file is answered with.
            ErrorKind::PermissionDenied | ErrorKind::InvalidInput | ErrorKind::IsADirectory => {
                ERROR_ACCESS_DENIED
            }
            ErrorKind::ReadOnlyFilesystem => ERROR_WRITE_PROTECT,
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge => {
                ERROR_DISK_FULL
            }
            ErrorKind::InvalidFilename => ERROR_FILENAME_EXCED_RANGE,
            ErrorKind::ExecutableFileBusy | ErrorKind::ResourceBusy => ERROR_SHARING_VIOLATION,
            ErrorKind::OutOfMemory => ERROR_NOT_ENOUGH_MEMORY,
            ErrorKind::UnexpectedEof => ERROR_FILE_CORRUPT,
            _ => ERROR_IO_DEVICE,
        }
    }
}

impl fmt::Display for Win32Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let code = self.0;
        let known = KNOWN.iter().find(|(error, _)| error == self);
        let name = known.map_or("error", |(_, name)| *name);
        match code {
            0xc000_0000.. => write!(f, "{name} ({code:#010X})"),
            _ => write!(f, "{name} ({code})"),
        }
    }
}

impl fmt::Debug for Win32Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Error for Win32Error {}

macro_rules! errors {
    ($($(#[$doc:meta])* $name:ident = $code:literal;)*) => {
        $($(#[$doc])* pub const $name: Win32Error = Win32Error($code);)*

        const KNOWN: &[(Win32Error, &str)] = &[$(($name, stringify!($name)),)*];
    };
}

errors! {
    /// Done.
    ERROR_SUCCESS = 0;
    /// There is no such file.
    ERROR_FILE_NOT_FOUND = 2;
    /// There is no such directory.
    ERROR_PATH_NOT_FOUND = 3;
    /// The handle, or the caller, has no right to it.
    ERROR_ACCESS_DENIED = 5;
    /// No handle of this library, or one that was closed.
    ERROR_INVALID_HANDLE = 6;
    /// The host has no memory, or no thread, to spare.
    ERROR_NOT_ENOUGH_MEMORY = 8;
    /// The host's file system is read-only.
    ERROR_WRITE_PROTECT = 19;
    /// Nothing is attached that could be detached.
    ERROR_NOT_READY = 21;
    /// Somebody else has the file open in a way that excludes it.
    ERROR_SHARING_VIOLATION = 32;
    /// Windows knows it; this library does not do it.
    ERROR_NOT_SUPPORTED = 50;
    /// An argument is not possible.
    ERROR_INVALID_PARAMETER = 87;
    /// The host, or the format's largest file, has no room left.
    ERROR_DISK_FULL = 112;
    /// The answer does not fit.
    ERROR_INSUFFICIENT_BUFFER = 122;
    /// No name for a file.
    ERROR_INVALID_NAME = 123;
    /// A name that is too long for the host.
    ERROR_FILENAME_EXCED_RANGE = 206;
    /// Cancelled, or detached while it ran.
    ERROR_OPERATION_ABORTED = 995;
    /// It has not ended yet.
    ERROR_IO_INCOMPLETE = 996;
    /// It has begun, and its end will be told.
    ERROR_IO_PENDING = 997;
    /// The host failed.
    ERROR_IO_DEVICE = 1117;
    /// There is nothing to cancel.
    ERROR_NOT_FOUND = 1168;
    /// A fault of this library.
    ERROR_INTERNAL_ERROR = 1359;
    /// The file breaks its format.
    ERROR_FILE_CORRUPT = 1392;
    /// No footer where a VHD has one: no VHD, or a damaged one.
    ERROR_VHD_DRIVE_FOOTER_MISSING = 0xc03a_0001;
    /// A version or a feature of the format that is not known here.
    ERROR_VHD_FORMAT_UNSUPPORTED_VERSION = 0xc03a_0005;
    /// Blocks that overlap, or lie outside the file.
    ERROR_VHD_BLOCK_ALLOCATION_TABLE_CORRUPT = 0xc03a_000a;
    /// The parent of a differencing disk is not where it should be.
    ERROR_VHD_PARENT_VHD_NOT_FOUND = 0xc03a_000d;
    /// What is there is another disk, or has changed.
    ERROR_VHD_CHILD_PARENT_ID_MISMATCH = 0xc03a_000e;
    /// The disk takes no more changes since an earlier failure to write.
    ERROR_VHD_METADATA_WRITE_FAILURE = 0xc03a_0011;
    /// Not a kind of virtual disk file that is supported.
    ERROR_VIRTDISK_PROVIDER_NOT_FOUND = 0xc03a_0014;
    /// The handle is another object's.
    ERROR_VIRTDISK_NOT_VIRTUAL_DISK = 0xc03a_0015;
    /// The parent cannot be read with the caller's rights.
    ERROR_VHD_PARENT_VHD_ACCESS_DENIED = 0xc03a_0016;
    /// The parent's size does not fit.
    ERROR_VHD_CHILD_PARENT_SIZE_MISMATCH = 0xc03a_0017;
    /// A disk that is its own ancestor.
    ERROR_VHD_DIFFERENCING_CHAIN_CYCLE_DETECTED = 0xc03a_0018;
    /// A parent is there, but cannot be opened.
    ERROR_VHD_DIFFERENCING_CHAIN_ERROR_IN_PARENT = 0xc03a_0019;
    /// Not on a disk of this type: compacting a fixed one.
    ERROR_VHD_INVALID_TYPE = 0xc03a_001b;
    /// Not now: attached already, or an operation is running.
    ERROR_VHD_INVALID_STATE = 0xc03a_001c;
}

/// Whether the file at `path` lacks even the directory that it should be in.
fn has_no_directory(path: &Path) -> bool {
    let directory = path.parent().filter(|found| !found.as_os_str().is_empty());
    directory.is_some_and(|directory| !directory.is_dir())
}

impl From<&FormatError> for Win32Error {
    fn from(error: &FormatError) -> Self {
        match error {
            FormatError::NotVhd
            | FormatError::NoFooter
            | FormatError::Foreign { wanted: "VHD", .. } => ERROR_VHD_DRIVE_FOOTER_MISSING,
            FormatError::NotVhdx | FormatError::Foreign { .. } | FormatError::Corrupt { .. } => {
                ERROR_FILE_CORRUPT
            }
            FormatError::Incompatible { .. } => ERROR_VHD_FORMAT_UNSUPPORTED_VERSION,
            FormatError::Overlap { .. } | FormatError::BeyondEnd { .. } => {
                ERROR_VHD_BLOCK_ALLOCATION_TABLE_CORRUPT
            }
        }
    }
}

impl From<&ParentProblem> for Win32Error {
    fn from(problem: &ParentProblem) -> Self {
        match problem {
            ParentProblem::Missing { .. } => ERROR_VHD_PARENT_VHD_NOT_FOUND,
            ParentProblem::Mismatch { .. } => ERROR_VHD_CHILD_PARENT_ID_MISMATCH,
            ParentProblem::Unfit { .. } => ERROR_VHD_CHILD_PARENT_SIZE_MISMATCH,
            ParentProblem::InUse { .. } => ERROR_SHARING_VIOLATION,
            ParentProblem::Circle { .. } => ERROR_VHD_DIFFERENCING_CHAIN_CYCLE_DETECTED,
            ParentProblem::TooLong { .. } | ParentProblem::Ambiguous { .. } => {
                ERROR_VHD_DIFFERENCING_CHAIN_ERROR_IN_PARENT
            }
            ParentProblem::Unopenable(error) => match Self::from(&**error) {
                ERROR_ACCESS_DENIED => ERROR_VHD_PARENT_VHD_ACCESS_DENIED,
                ERROR_SHARING_VIOLATION => ERROR_SHARING_VIOLATION,
                _ => ERROR_VHD_DIFFERENCING_CHAIN_ERROR_IN_PARENT,
            },
        }
    }
}

impl From<&OpenProblem> for Win32Error {
    fn from(problem: &OpenProblem) -> Self {
        match problem {
            OpenProblem::Format(error) | OpenProblem::NotWritable(error) => error.into(),
            OpenProblem::InUse(_) | OpenProblem::NotQuiet { .. } => ERROR_SHARING_VIOLATION,
            OpenProblem::Parent(problem) => problem.into(),
            OpenProblem::Io { source, .. } => Self::host(source),
        }
    }
}

impl From<&OpenError> for Win32Error {
    fn from(error: &OpenError) -> Self {
        match error.problem().into() {
            ERROR_FILE_NOT_FOUND if has_no_directory(error.path()) => ERROR_PATH_NOT_FOUND,
            code => code,
        }
    }
}

impl From<&DiskError> for Win32Error {
    fn from(error: &DiskError) -> Self {
        match error {
            DiskError::ReadOnly => ERROR_ACCESS_DENIED,
            DiskError::OutOfRange { .. } => ERROR_INVALID_PARAMETER,
            DiskError::NoSpace(_) => ERROR_DISK_FULL,
            DiskError::Poisoned(_) => ERROR_VHD_METADATA_WRITE_FAILURE,
            DiskError::Io { source, .. } => Self::host(source),
        }
    }
}

impl From<&CompactError> for Win32Error {
    fn from(error: &CompactError) -> Self {
        match error {
            CompactError::Fixed => ERROR_VHD_INVALID_TYPE,
            CompactError::Cancelled => ERROR_OPERATION_ABORTED,
            CompactError::Wanted => ERROR_SHARING_VIOLATION,
            CompactError::NoRoom { .. } => ERROR_DISK_FULL,
            CompactError::Disk(error) => error.into(),
        }
    }
}

/// The code of `error`, which is logged: nothing else says what is wrong.
pub(super) fn logged<'a, E>(error: &'a E) -> Win32Error
where
    E: Error,
    Win32Error: From<&'a E>,
{
    log::warn!("{}", crate::error::chain(error));
    error.into()
}
