//! `*` and `?` in names of files, which on Windows no shell resolves.

use std::fs;
use std::path::{Path, PathBuf};

/// The files that `files` name, in their order; those of a pattern in the order of their names. Case does not
/// matter. A pattern that nothing fits stays what it is, to be told about like any name of no file.
pub(crate) fn resolved(files: &[PathBuf]) -> Vec<PathBuf> {
    let of_one = |file: &PathBuf| match fitting(file) {
        found if found.is_empty() => vec![file.clone()],
        found => found,
    };
    files.iter().flat_map(of_one).collect()
}

/// The files that fit a pattern, which only the last name of a path can be.
fn fitting(path: &Path) -> Vec<PathBuf> {
    let pattern = folded(
        path.file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .as_ref(),
    );
    if !pattern.contains(&'*') && !pattern.contains(&'?') {
        return Vec::new();
    }
    let directory = path.parent().unwrap_or(Path::new(""));
    let place = match directory.as_os_str().is_empty() {
        true => Path::new("."),
        false => directory,
    };
    let entries = fs::read_dir(place).into_iter().flatten().flatten();
    let mut found: Vec<PathBuf> = entries
        .filter(|entry| entry.file_type().is_ok_and(|kind| !kind.is_dir()))
        .map(|entry| entry.file_name())
        .filter(|name| fits(&pattern, &folded(&name.to_string_lossy())))
        .map(|name| directory.join(name))
        .collect();
    found.sort_unstable();
    found
}

fn folded(name: &str) -> Vec<char> {
    name.to_uppercase().chars().collect()
}

fn fits(pattern: &[char], name: &[char]) -> bool {
    match (pattern, name) {
        ([], name) => name.is_empty(),
        (['*', rest @ ..], name) => (0..=name.len()).any(|skipped| fits(rest, &name[skipped..])),
        (['?', rest @ ..], [_, others @ ..]) => fits(rest, others),
        ([wanted, rest @ ..], [found, others @ ..]) => wanted == found && fits(rest, others),
        (_, []) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns() {
        let fits = |pattern: &str, name: &str| fits(&folded(pattern), &folded(name));
        for (pattern, name) in [
            ("*", ""),
            ("*.vhd*", "A.VHDX"),
            ("?.vhd", "\u{e4}.vhd"),
            ("*a*b", "xaxbxab"),
            ("[1].vhd", "[1].vhd"),
        ] {
            assert!(fits(pattern, name), "{pattern} {name}");
        }
        for (pattern, name) in [
            ("?", ""),
            ("*.vhd", "a.vhdx"),
            ("a?", "a"),
            ("[1].vhd", "1.vhd"),
        ] {
            assert!(!fits(pattern, name), "{pattern} {name}");
        }
    }

    #[test]
    fn files_are_found() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["b.vhd", "A.VHD", "c.vhdx"] {
            fs::write(folder.path().join(name), "").unwrap();
        }
        fs::create_dir(folder.path().join("d.vhd")).unwrap();
        let at = |name: &str| folder.path().join(name);
        let files = [at("c.vhdx"), at("?.vhd"), at("*.raw")];
        let found = resolved(&files);
        assert_eq!(found, [at("c.vhdx"), at("A.VHD"), at("b.vhd"), at("*.raw")]);
    }
}
