//! Which files of a directory are disks, and under which name they are shown.

use std::ffi::{OsStr, OsString};
use std::path::Path;

/// What a disk's file name is followed by where it is shown.
const SUFFIX: &str = ".raw";

/// Extensions of disk files, in lower case.
const EXTENSIONS: [&str; 2] = ["vhd", "avhd"];

/// Whether a file of this name is taken for a disk: by its extension, in any case. Its content
/// decides only whether it can be opened.
pub(super) fn is_disk(file_name: &OsStr) -> bool {
    // `extension` is `None` for a name such as `.vhd`, which is all stem.
    let extension = Path::new(file_name).extension();
    extension.is_some_and(|found| {
        EXTENSIONS
            .iter()
            .any(|known| found.eq_ignore_ascii_case(known))
    })
}

/// The name that the disk file `file_name` is shown under.
pub(super) fn shown(file_name: &OsStr) -> OsString {
    let mut name = file_name.to_owned();
    name.push(SUFFIX);
    name
}

/// The disk file that is shown as `name`; `None` where no disk can have that name.
pub(super) fn backing(name: &OsStr) -> Option<&OsStr> {
    let path = Path::new(name);
    // Exactly the suffix that `shown` appends: one name for each disk.
    if path.extension()? != OsStr::new(&SUFFIX[1..]) {
        return None;
    }
    path.file_stem().filter(|stem| is_disk(stem))
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
            "with space.vhd",
        ] {
            let name = OsStr::new(name);
            assert!(is_disk(name), "{name:?}");
            let shown = shown(name);
            assert_eq!(backing(&shown), Some(name));
        }
        for name in [
            ".vhd",
            "vhd",
            "web.vhdx",
            "web.vhd.raw",
            "web.vhd~",
            "web.vhd.",
            "",
        ] {
            assert!(!is_disk(OsStr::new(name)), "{name:?}");
        }
    }

    #[test]
    fn only_shown_names_have_a_backing_file() {
        for name in [
            "web.vhd",
            "web.raw",
            "web.vhd.RAW",
            ".vhd.raw",
            ".raw",
            "..",
            "web.vhdx.raw",
        ] {
            assert_eq!(backing(OsStr::new(name)), None, "{name}");
        }
    }

    #[cfg(unix)]
    #[test]
    fn names_need_not_be_unicode() {
        use std::os::unix::ffi::OsStrExt;
        let name = OsStr::from_bytes(b"\xff\xfe.vhd");
        assert_eq!(backing(&shown(name)), Some(name));
    }
}
