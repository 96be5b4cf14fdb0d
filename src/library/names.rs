//! Which files of a directory are disks, and under which name they are shown.

use std::ffi::{OsStr, OsString};
use std::path::Path;

pub(super) use crate::lineage::is_disk_name as is_disk;

/// What a disk's file name is followed by where it is shown.
const SUFFIX: &str = ".raw";

/// The name that the disk file `file_name` is shown under.
pub(super) fn shown(file_name: &OsStr) -> OsString {
    let mut name = file_name.to_owned();
    name.push(SUFFIX);
    name
}

/// The disk file that is shown as `name`; `None` where no disk can have that name.
pub(super) fn backing(name: &OsStr) -> Option<&OsStr> {
    let path = Path::new(name);
    // Exactly the suffix that `shown` appends, as far as names are told apart at all: one name for
    // each disk.
    if !is_same(path.extension()?, OsStr::new(&SUFFIX[1..])) {
        return None;
    }
    path.file_stem().filter(|stem| is_disk(stem))
}

/// Whether the host takes two names for one.
pub(super) fn is_same(one: &OsStr, other: &OsStr) -> bool {
    let lower = |name: &OsStr| name.to_str().map(str::to_lowercase);
    one == other || cfg!(windows) && lower(one).is_some() && lower(one) == lower(other)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shown_names_lead_back_to_their_files() {
        for name in ["web.vhd", "WEB.VHDX", "a.b.avhd", "Snap.AvHdX", "a b.vhd"] {
            let name = OsStr::new(name);
            let shown = shown(name);
            assert_eq!(backing(&shown), Some(name));
        }
    }

    #[test]
    fn only_shown_names_have_a_backing_file() {
        for name in [
            "web.vhd",
            "web.raw",
            ".vhd.raw",
            ".raw",
            "..",
            "web.vhdy.raw",
        ] {
            assert_eq!(backing(OsStr::new(name)), None, "{name}");
        }
    }

    #[test]
    fn case_counts_where_the_host_says_so() {
        let found = backing(OsStr::new("web.vhd.RAW"));
        assert_eq!(found, cfg!(windows).then_some(OsStr::new("web.vhd")));
    }

    #[cfg(unix)]
    #[test]
    fn names_need_not_be_unicode() {
        use std::os::unix::ffi::OsStrExt;
        let name = OsStr::from_bytes(b"\xff\xfe.vhd");
        assert_eq!(backing(&shown(name)), Some(name));
    }
}
