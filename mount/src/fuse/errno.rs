//! The error numbers that users of the mount get.

use fuser::Errno;
use vhdfs::error::{DiskError, ErrorKind};
use vhdfs::library::LibraryError;

use crate::front::Refused;

impl From<Refused> for Errno {
    fn from(refused: Refused) -> Self {
        match refused {
            Refused::NotWritable => Self::EBADF,
            Refused::BeyondEnd => Self::EFBIG,
            Refused::Failed(error) => of_disk(&error),
        }
    }
}

/// For an operation on an open disk.
pub(super) fn of_disk(error: &DiskError) -> Errno {
    match error.kind() {
        ErrorKind::ReadOnly => Errno::EROFS,
        ErrorKind::OutOfRange | ErrorKind::InvalidInput => Errno::EINVAL,
        ErrorKind::NoSpace => Errno::ENOSPC,
        // A poisoned disk does not get better: the guest is to see a broken one.
        _ => Errno::EIO,
    }
}

/// For finding and opening.
pub(super) fn of_library(error: &LibraryError) -> Errno {
    match error {
        LibraryError::NotFound { .. } => Errno::ENOENT,
        // Makes the kernel look the name up again, and try once more.
        LibraryError::Stale { .. } => Errno::ESTALE,
        LibraryError::NotADirectory { .. } => Errno::ENOTDIR,
        LibraryError::IsADirectory { .. } => Errno::EISDIR,
        // May be free the next moment, unlike all other reasons.
        LibraryError::Unopenable {
            kind: ErrorKind::InUse,
            ..
        } => Errno::EBUSY,
        LibraryError::Unopenable {
            kind: ErrorKind::NoSpace,
            ..
        } => Errno::ENOSPC,
        LibraryError::Unopenable { .. } => Errno::EIO,
        // What a user without the write bit gets; privileged ones come this far.
        LibraryError::ReadOnly { .. } | LibraryError::Denied { .. } => Errno::EACCES,
        LibraryError::Closed => Errno::ESHUTDOWN,
        LibraryError::Io { source, .. } => match source.raw_os_error() {
            Some(number) => Errno::from_i32(number),
            None if source.kind() == std::io::ErrorKind::PermissionDenied => Errno::EACCES,
            None => Errno::EIO,
        },
        _ => Errno::EIO,
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::path::PathBuf;

    use super::*;

    fn number(errno: Errno) -> i32 {
        errno.into()
    }

    #[test]
    fn disk_errors() {
        let io = DiskError::Io {
            action: "read",
            source: io::Error::other("no"),
        };
        assert_eq!(number(of_disk(&io)), number(Errno::EIO));
        assert_eq!(
            number(of_disk(&DiskError::NoSpace(None))),
            number(Errno::ENOSPC)
        );
        assert_eq!(number(of_disk(&DiskError::ReadOnly)), number(Errno::EROFS));
        assert_eq!(
            number(of_disk(&DiskError::Poisoned(String::new()))),
            number(Errno::EIO)
        );
    }

    #[test]
    fn library_errors() {
        let path = PathBuf::from("a");
        let unopenable = |kind| LibraryError::Unopenable {
            path: "a".into(),
            reason: String::new(),
            kind,
        };
        for (error, expected) in [
            (LibraryError::NotFound { path: path.clone() }, Errno::ENOENT),
            (LibraryError::Stale { path: path.clone() }, Errno::ESTALE),
            (unopenable(ErrorKind::Corrupt), Errno::EIO),
            (unopenable(ErrorKind::NotADisk), Errno::EIO),
            (unopenable(ErrorKind::InUse), Errno::EBUSY),
            (unopenable(ErrorKind::NoSpace), Errno::ENOSPC),
            (
                LibraryError::ReadOnly {
                    path: path.clone(),
                    reason: "why".to_owned(),
                },
                Errno::EACCES,
            ),
            (
                LibraryError::Io {
                    path,
                    action: "open",
                    source: io::Error::from_raw_os_error(13),
                },
                Errno::EACCES,
            ),
        ] {
            assert_eq!(number(of_library(&error)), number(expected), "{error}");
        }
    }
}
