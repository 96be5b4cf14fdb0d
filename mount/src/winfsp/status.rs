//! The status values that users of the mount get.

use std::io;

use vhdfs::error::{DiskError, ErrorKind};
use vhdfs::library::LibraryError;
use windows_sys::Win32::Foundation::{
    ERROR_LOCK_VIOLATION, ERROR_SHARING_VIOLATION, NTSTATUS, STATUS_ACCESS_DENIED,
    STATUS_DISK_FULL, STATUS_FILE_CORRUPT_ERROR, STATUS_FILE_INVALID, STATUS_FILE_IS_A_DIRECTORY,
    STATUS_INVALID_PARAMETER, STATUS_IO_DEVICE_ERROR, STATUS_MEDIA_WRITE_PROTECTED,
    STATUS_NOT_A_DIRECTORY, STATUS_NOT_SUPPORTED, STATUS_OBJECT_NAME_NOT_FOUND,
    STATUS_OBJECT_PATH_NOT_FOUND, STATUS_SHARING_VIOLATION, STATUS_VOLUME_DISMOUNTED,
};
use winfsp::FspError;

use crate::front::Refused;

impl From<Refused> for FspError {
    fn from(refused: Refused) -> Self {
        Self::NTSTATUS(match refused {
            Refused::NotWritable => STATUS_ACCESS_DENIED,
            Refused::BeyondEnd => STATUS_DISK_FULL,
            Refused::Failed(error) => of_disk(&error),
        })
    }
}

/// For an operation on an open disk.
fn of_disk(error: &DiskError) -> NTSTATUS {
    match error.kind() {
        ErrorKind::ReadOnly => STATUS_MEDIA_WRITE_PROTECTED,
        ErrorKind::OutOfRange | ErrorKind::InvalidInput => STATUS_INVALID_PARAMETER,
        ErrorKind::NoSpace => STATUS_DISK_FULL,
        // A poisoned disk does not get better: the guest is to see a broken one.
        _ => STATUS_IO_DEVICE_ERROR,
    }
}

/// For finding and opening.
pub(super) fn of_library(error: &LibraryError) -> NTSTATUS {
    match error {
        LibraryError::NotFound { .. } => STATUS_OBJECT_NAME_NOT_FOUND,
        LibraryError::Stale { .. } => STATUS_FILE_INVALID,
        LibraryError::NotADirectory { .. } => STATUS_NOT_A_DIRECTORY,
        LibraryError::IsADirectory { .. } => STATUS_FILE_IS_A_DIRECTORY,
        LibraryError::Unopenable { kind, .. } => match kind {
            // May be free the next moment, unlike all other reasons.
            ErrorKind::InUse => STATUS_SHARING_VIOLATION,
            ErrorKind::NotADisk | ErrorKind::Corrupt => STATUS_FILE_CORRUPT_ERROR,
            ErrorKind::Incompatible => STATUS_NOT_SUPPORTED,
            _ => STATUS_IO_DEVICE_ERROR,
        },
        LibraryError::ReadOnly { .. } | LibraryError::Denied { .. } => STATUS_ACCESS_DENIED,
        LibraryError::Closed => STATUS_VOLUME_DISMOUNTED,
        LibraryError::Io { source, .. } => of_host(source),
        _ => STATUS_IO_DEVICE_ERROR,
    }
}

/// For a directory on the way to what was asked for.
pub(super) fn of_way(error: &LibraryError) -> NTSTATUS {
    match of_library(error) {
        STATUS_OBJECT_NAME_NOT_FOUND | STATUS_NOT_A_DIRECTORY => STATUS_OBJECT_PATH_NOT_FOUND,
        other => other,
    }
}

fn of_host(error: &io::Error) -> NTSTATUS {
    let number = error
        .raw_os_error()
        .and_then(|number| u32::try_from(number).ok());
    match error.kind() {
        io::ErrorKind::PermissionDenied => STATUS_ACCESS_DENIED,
        io::ErrorKind::StorageFull => STATUS_DISK_FULL,
        io::ErrorKind::ReadOnlyFilesystem => STATUS_MEDIA_WRITE_PROTECTED,
        _ => match number {
            Some(ERROR_SHARING_VIOLATION | ERROR_LOCK_VIOLATION) => STATUS_SHARING_VIOLATION,
            _ => STATUS_IO_DEVICE_ERROR,
        },
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    #[test]
    fn disk_errors() {
        let io = DiskError::Io {
            action: "read",
            source: io::Error::other("no"),
        };
        assert_eq!(of_disk(&io), STATUS_IO_DEVICE_ERROR);
        assert_eq!(of_disk(&DiskError::NoSpace(None)), STATUS_DISK_FULL);
        assert_eq!(of_disk(&DiskError::ReadOnly), STATUS_MEDIA_WRITE_PROTECTED);
        let poisoned = DiskError::Poisoned(String::new());
        assert_eq!(of_disk(&poisoned), STATUS_IO_DEVICE_ERROR);
    }

    #[test]
    fn library_errors() {
        let path = PathBuf::from("a");
        let unopenable = |kind| LibraryError::Unopenable {
            path: "a".into(),
            reason: String::new(),
            kind,
        };
        let io = |number| LibraryError::Io {
            path: "a".into(),
            action: "open",
            source: io::Error::from_raw_os_error(number),
        };
        let not_found = LibraryError::NotFound { path: path.clone() };
        assert_eq!(of_way(&not_found), STATUS_OBJECT_PATH_NOT_FOUND);
        for (error, expected) in [
            (not_found, STATUS_OBJECT_NAME_NOT_FOUND),
            (
                LibraryError::Stale { path: path.clone() },
                STATUS_FILE_INVALID,
            ),
            (unopenable(ErrorKind::Corrupt), STATUS_FILE_CORRUPT_ERROR),
            (unopenable(ErrorKind::ParentMissing), STATUS_IO_DEVICE_ERROR),
            (unopenable(ErrorKind::InUse), STATUS_SHARING_VIOLATION),
            (
                LibraryError::ReadOnly {
                    path: path.clone(),
                    reason: "why".to_owned(),
                },
                STATUS_ACCESS_DENIED,
            ),
            (
                LibraryError::IsADirectory { path },
                STATUS_FILE_IS_A_DIRECTORY,
            ),
            (LibraryError::Closed, STATUS_VOLUME_DISMOUNTED),
            (io(5), STATUS_ACCESS_DENIED),
            (io(32), STATUS_SHARING_VIOLATION),
            (io(112), STATUS_DISK_FULL),
            (io(1117), STATUS_IO_DEVICE_ERROR),
        ] {
            assert_eq!(of_library(&error), expected, "{error}");
        }
    }
}
