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
    let name = path.file_name().unwrap_or_default();
    let pattern = folded(&name.to_string_lossy());
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
        .map(|entry| entry.file_name())
        .filter(|name| fits(&pattern, &folded(&name.to_string_lossy())))
        .map(|name| directory.join(name))
        // Nor what leads to one.
        .filter(|path| !path.is_dir())
        .collect();
    found.sort_unstable();
    found
}

/// As Windows compares names: one character for one.
fn folded(name: &str) -> Vec<char> {
    let upper = |letter: char| {
        let mut upper = letter.to_uppercase();
        match (upper.next(), upper.next()) {
            (Some(only), None) => only,
            _ => letter,
        }
    };
    name.chars().map(upper).collect()
}

fn fits(pattern: &[char], name: &[char]) -> bool {
    let (mut at, mut done) = (0, 0);
    // The last star, and how much of the name is behind what it stands for.
    let mut star = None;
    while done < name.len() {
        match pattern.get(at) {
            Some('*') => {
                star = Some((at, done));
                at += 1;
            }
            Some(wanted) if *wanted == '?' || *wanted == name[done] => {
                at += 1;
                done += 1;
            }
            _ => match &mut star {
                Some((place, taken)) => {
                    *taken += 1;
                    (at, done) = (*place + 1, *taken);
                }
                None => return false,
            },
        }
    }
    pattern[at..].iter().all(|left| *left == '*')
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
            ("?.vhd", "\u{df}.vhd"),
            ("a*a*a*a*a*a*a*a*b", &format!("{}b", "a".repeat(200))),
        ] {
            assert!(fits(pattern, name), "{pattern} {name}");
        }
        for (pattern, name) in [
            ("?", ""),
            ("*.vhd", "a.vhdx"),
            ("a?", "a"),
            ("[1].vhd", "1.vhd"),
            ("stra\u{df}e*", "strasse1"),
            ("a*a*a*a*a*a*a*a*b", &"a".repeat(200)),
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
