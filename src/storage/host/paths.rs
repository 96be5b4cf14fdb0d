//! Paths of this host: in the one form in which they are compared, shown and kept.
//!
//! Windows has several for one place: `C:\a` and `\\?\C:\a`, in any case, and the same through the
//! volume's GUID. Elsewhere a path is its own form.

use std::io;
use std::path::{Path, PathBuf};

/// Where what is at `path` really is: absolute and without links.
///
/// # Errors
/// Where there is nothing, or the host does not say.
pub fn canonical(path: &Path) -> io::Result<PathBuf> {
    #[cfg(windows)]
    return super::pin::Pin::file(path)?.real_path();
    #[cfg(not(windows))]
    std::fs::canonicalize(path)
}

/// Whether both are names of what is there, the same for both.
pub fn is_same(one: &Path, other: &Path) -> bool {
    canonical(one).is_ok_and(|one| canonical(other).is_ok_and(|other| one == other))
}

/// What is left of `path` below `directory`, both absolute; `None` where it is not below. By the
/// words alone.
pub fn below(directory: &Path, path: &Path) -> Option<PathBuf> {
    #[cfg(windows)]
    return words::below(directory, path);
    #[cfg(not(windows))]
    path.strip_prefix(directory).ok().map(Path::to_owned)
}

#[cfg(windows)]
pub(crate) use words::simplified;

#[cfg(windows)]
mod words {
    use std::ffi::OsStr;
    use std::path::{Component, Path, PathBuf, Prefix};

    /// Longer ones need the prefix.
    const LONGEST: usize = 240;

    /// What Windows takes for devices, with any extension behind.
    const DEVICES: [&str; 6] = ["con", "prn", "aux", "nul", "conin$", "conout$"];

    /// The same path, without the prefix that tells Windows to take it word by word, where all
    /// programs understand it without.
    pub(crate) fn simplified(path: PathBuf) -> PathBuf {
        let Some(text) = path.to_str().filter(|text| text.len() <= LONGEST) else {
            return path;
        };
        let mut parts = path.components();
        let simple = match parts.next() {
            Some(Component::Prefix(prefix)) => match prefix.kind() {
                Prefix::VerbatimDisk(_) => text[4..].to_owned(),
                Prefix::VerbatimUNC(..) => format!(r"\\{}", &text[8..]),
                _ => return path,
            },
            _ => return path,
        };
        match parts.all(|part| matches!(part, Component::RootDir) || is_plain(part.as_os_str())) {
            true => simple.into(),
            false => path,
        }
    }

    /// Whether a name means the same with and without the prefix.
    fn is_plain(name: &OsStr) -> bool {
        let Some(name) = name.to_str() else {
            return false;
        };
        let stem = name.split('.').next().unwrap_or(name).trim_end();
        let stem = stem.to_ascii_lowercase();
        let is_port = |name: &str| {
            let number = stem.strip_prefix(name).and_then(|rest| rest.parse().ok());
            number.is_some_and(|number: u8| number < 10)
        };
        let is_device = DEVICES.contains(&&*stem) || is_port("com") || is_port("lpt");
        !is_device && !name.ends_with(['.', ' ']) && !name.contains(['/', ':'])
    }

    /// A part of a path as it is compared: letters in lower case, prefixes in one form.
    fn word(part: Component<'_>) -> Option<String> {
        let lower = |text: &OsStr| text.to_str().map(str::to_lowercase);
        match part {
            Component::Prefix(prefix) => Some(match prefix.kind() {
                Prefix::Disk(letter) | Prefix::VerbatimDisk(letter) => {
                    format!("{}:", char::from(letter.to_ascii_lowercase()))
                }
                Prefix::UNC(server, share) | Prefix::VerbatimUNC(server, share) => {
                    format!(r"\\{}\{}", lower(server)?, lower(share)?)
                }
                Prefix::Verbatim(name) => lower(name)?,
                Prefix::DeviceNS(name) => format!(r"\\.\{}", lower(name)?),
            }),
            Component::RootDir => Some(String::new()),
            other => lower(other.as_os_str()),
        }
    }

    pub(super) fn below(directory: &Path, path: &Path) -> Option<PathBuf> {
        let mut parts = path.components();
        for wanted in directory.components() {
            // What is no Unicode is compared as it is.
            let found = parts.next()?;
            if found != wanted && (word(found).is_none() || word(found) != word(wanted)) {
                return None;
            }
        }
        Some(parts.as_path().to_owned())
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn one_place_has_one_form() {
            for (path, simple) in [
                (r"\\?\C:\a\b c.vhd", r"C:\a\b c.vhd"),
                (r"\\?\C:\", r"C:\"),
                (r"\\?\UNC\nas\vms\a.vhd", r"\\nas\vms\a.vhd"),
                (r"C:\a", r"C:\a"),
            ] {
                assert_eq!(simplified(path.into()), Path::new(simple));
            }
            let long = format!(r"\\?\C:\{}", r"long\".repeat(60));
            for path in [
                r"\\?\Volume{1}\a",
                r"\\?\C:\a\NUL.vhd",
                r"\\?\C:\com1\a",
                r"\\?\C:\a.",
                r"\\?\C:\a \b",
                &long,
            ] {
                assert_eq!(simplified(path.into()), Path::new(path));
            }
        }

        #[test]
        fn places_below_are_found_in_every_form() {
            for (directory, path, rest) in [
                (r"C:\VMs", r"\\?\c:\vms\a\B.vhd", Some(r"a\B.vhd")),
                (r"\\?\C:\VMs", r"C:/vms/b.vhd", Some("b.vhd")),
                (r"C:\", r"c:\b.vhd", Some("b.vhd")),
                (r"\\nas\vms\x", r"\\?\UNC\NAS\vms\X\b.vhd", Some("b.vhd")),
                (r"\\?\Volume{Ab}\x", r"\\?\volume{aB}\x\b", Some("b")),
                (r"C:\VMs", r"C:\VMs", Some("")),
                (r"C:\VMs", r"D:\VMs\b.vhd", None),
                (r"C:\VMs", r"C:\VMs2\b.vhd", None),
                (r"C:\VMs", r"C:VMs\b.vhd", None),
                (r"C:\VMs", r"\\C\VMs\b.vhd", None),
                (r"C:\VMs", r"\\.\C:\VMs\b.vhd", None),
            ] {
                let found = below(Path::new(directory), Path::new(path));
                assert_eq!(found.as_deref(), rest.map(Path::new), "{directory} {path}");
            }
        }
    }
}
