//! Paths as the driver passes them.

use std::ffi::{OsStr, OsString};
use std::os::windows::ffi::OsStringExt;

use windows_sys::Win32::Foundation::{NTSTATUS, STATUS_OBJECT_NAME_INVALID};

/// Stands before each name of a path.
pub(super) const SEPARATOR: u16 = 0x5c;

/// What no name has in it: separators, the mark of an alternate stream, wildcards.
const FORBIDDEN: &[u8] = b"\\/:*?\"<>|";

/// The names of a path such as `\a\b.vhdx.raw`; none for the root.
///
/// # Errors
/// `STATUS_OBJECT_NAME_INVALID` where one of them can be no name: nothing of it reaches the host.
pub(super) fn components(path: &[u16]) -> Result<Vec<OsString>, NTSTATUS> {
    let names = path.split(|unit| *unit == SEPARATOR);
    let names = names.filter(|name| !name.is_empty());
    names
        .map(|name| match is_name(name) {
            true => Ok(OsString::from_wide(name)),
            false => Err(STATUS_OBJECT_NAME_INVALID),
        })
        .collect()
}

/// Whether it is a name that Windows' own file systems could have.
fn is_name(name: &[u16]) -> bool {
    let byte = |unit: &u16| u8::try_from(*unit).ok();
    let forbidden = |unit| byte(unit).is_some_and(|byte| byte < 0x20 || FORBIDDEN.contains(&byte));
    // One that ends in dots or spaces is another one's to Windows.
    let ends_well = !matches!(name.last().and_then(byte), Some(b'.' | b' '));
    ends_well && !name.iter().any(forbidden)
}

/// Whether two names differ in case at most.
pub(super) fn same(one: &OsStr, other: &OsStr) -> bool {
    let folded = |name: &OsStr| name.to_string_lossy().to_uppercase();
    one == other || folded(one) == folded(other)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn split(path: &str) -> Result<Vec<OsString>, NTSTATUS> {
        components(&path.encode_utf16().collect::<Vec<_>>())
    }

    #[test]
    fn paths_come_apart() {
        let names = |path: &str| split(path).unwrap();
        assert!(names(r"\").is_empty() && names("").is_empty());
        assert_eq!(names(r"\a\b c.vhdx.raw"), ["a", "b c.vhdx.raw"]);
        assert_eq!(names(r"\a\\b\"), ["a", "b"]);
        // Half of a surrogate pair is a name like any other.
        let lone = components(&[SEPARATOR, 0xd800, 0x61]).unwrap();
        assert_eq!(lone, [OsString::from_wide(&[0xd800, 0x61])]);
    }

    #[test]
    fn what_is_no_name_is_refused() {
        for path in [
            r"\a.raw:stream",
            r"\a.raw::$DATA",
            r"\C:\x",
            r"\..\x",
            r"\.",
            r"\a/b",
            r"\a.",
            r"\a ",
            r"\*.raw",
            "\\a\u{1}",
        ] {
            assert_eq!(split(path), Err(STATUS_OBJECT_NAME_INVALID), "{path}");
        }
    }

    #[test]
    fn case_does_not_matter() {
        let same = |one: &str, other: &str| super::same(OsStr::new(one), OsStr::new(other));
        assert!(same("Web.VHD.raw", "web.vhd.RAW") && same("\u{e4}.vhd", "\u{c4}.VHD"));
        assert!(!same("a.vhd.raw", "b.vhd.raw"));
    }
}
