//! Which files are taken for disks, and which of those that cannot be looked into count.

use std::ffi::OsStr;
use std::io;
use std::path::Path;

use crate::storage::host::pin::Kind;

/// Extensions of disk files, in lower case.
const EXTENSIONS: [&str; 4] = ["vhd", "avhd", "vhdx", "avhdx"];

/// Directories that systems keep to themselves, often closed to others: nobody has disks in use there.
const RESERVED: [&str; 3] = ["lost+found", "System Volume Information", "$RECYCLE.BIN"];
const RESERVED_PREFIXES: [&str; 2] = [".Trash-", "systemd-private-"];

/// Whether a file of this name is taken for a disk: by its extension, in any case. Its content
/// decides only whether it can be opened.
pub(crate) fn is_disk_name(file_name: &OsStr) -> bool {
    // `extension` is `None` for a name such as `.vhd`, which is all stem.
    let extension = Path::new(file_name).extension();
    extension.is_some_and(|found| {
        EXTENSIONS
            .iter()
            .any(|known| found.eq_ignore_ascii_case(known))
    })
}

/// Whether a disk file or directory that could not be looked into, at this path below the one that is
/// searched, may be, or hold, somebody's child: not if it has just gone.
pub(crate) fn may_be_kin(path: &Path, error: &io::Error) -> bool {
    let is_reserved = |name: &OsStr| {
        let starts = |prefix: &&str| name.as_encoded_bytes().starts_with(prefix.as_bytes());
        (RESERVED.iter()).any(|reserved| name.eq_ignore_ascii_case(reserved))
            || RESERVED_PREFIXES.iter().any(starts)
    };
    let is_gone = matches!(
        error.kind(),
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
    );
    !is_gone && !path.iter().any(is_reserved)
}

/// Whether something that is neither file nor directory may be a disk: on Windows a file may only look so,
/// which is kept elsewhere or by a driver that nobody knows.
pub(crate) fn may_be_file(kind: Kind) -> bool {
    cfg!(windows) && matches!(kind, Kind::Other(_))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_go_by_their_extension() {
        for name in [
            "web.vhd",
            "WEB.VHD",
            "a.b.avhd",
            "Snap.AvHd",
            "a b.vhdx",
            "x.AVHDX",
        ] {
            assert!(is_disk_name(OsStr::new(name)), "{name}");
        }
        for name in [
            ".vhd",
            "vhd",
            "web.vhd.raw",
            "web.vhd~",
            "web.vhd.",
            "web.vhds",
            "",
        ] {
            assert!(!is_disk_name(OsStr::new(name)), "{name}");
        }
    }

    #[test]
    fn what_cannot_be_read_may_be_a_child() {
        let denied = io::Error::from(io::ErrorKind::PermissionDenied);
        let gone = io::Error::from(io::ErrorKind::NotFound);
        let counts = |path: &str, error: &io::Error| may_be_kin(Path::new(path), error);
        assert!(counts("sub/a.vhd", &denied) && counts("", &denied));
        assert!(!counts("sub/a.vhd", &gone));
        for path in [
            "lost+found",
            "$Recycle.Bin/S-1-5",
            ".Trash-1000",
            "system volume information/a.vhd",
        ] {
            assert!(!counts(path, &denied), "{path}");
        }
    }
}
