//! The house rules that the compiler does not know: layers, sizes, leftovers, documents.

#[path = "tidy/documents.rs"]
mod documents;

use std::fs;
use std::path::{Path, PathBuf};

/// The layers, lowest first. A module may use those before it, and its equals.
const LAYERS: &[&[&str]] = &[
    &["units", "error", "sync"],
    &["format", "storage"],
    &["map"],
    &["image"],
    &["lineage"],
    &["check", "create"],
    &["disk", "guest"],
    &["compact"],
    &["library", "virtdisk"],
];
/// What the layers above must know nothing of, and who may.
const ONLY_IN_MOUNT: &[&str] = &["fuser::", "winfsp::", "clap::", "libc::", "Errno"];
const MAX_LINES: usize = 600;

fn sources(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir)
        .expect("a source folder")
        .map(|entry| entry.expect("an entry"))
    {
        let path = entry.path();
        if path.is_dir() {
            if path.file_name().is_some_and(|name| name != "target") {
                sources(&path, found);
            }
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

fn all(dirs: &[&str]) -> Vec<(PathBuf, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut found = Vec::new();
    for dir in dirs {
        sources(&root.join(dir), &mut found);
    }
    found.sort();
    (found.into_iter())
        .map(|path| {
            let text = fs::read_to_string(&path).expect("a readable source");
            (path.strip_prefix(root).expect("inside").to_owned(), text)
        })
        .collect()
}

fn layer(module: &str) -> Option<usize> {
    LAYERS.iter().position(|layer| layer.contains(&module))
}

#[test]
fn imports_point_downward() {
    let mut upward = Vec::new();
    for (path, text) in all(&["src"]) {
        let module = path
            .components()
            .nth(1)
            .expect("src/x")
            .as_os_str()
            .to_string_lossy();
        let module = module.trim_end_matches(".rs");
        // Tests of a layer may build what they need from above.
        let Some(own) = layer(module) else { continue };
        if path
            .components()
            .any(|part| part.as_os_str().to_string_lossy().starts_with("tests"))
        {
            continue;
        }
        for (number, line) in text.lines().enumerate() {
            if line.starts_with("mod tests") {
                break;
            }
            let code = line.split("//").next().unwrap_or_default();
            for used in code.split("crate::").skip(1) {
                let name: String = used
                    .chars()
                    .take_while(|c| c.is_alphanumeric() || *c == '_')
                    .collect();
                if layer(&name).is_some_and(|used| used > own) {
                    upward.push(format!(
                        "{}:{}: {}",
                        path.display(),
                        number + 1,
                        line.trim()
                    ));
                }
            }
        }
    }
    assert!(
        upward.is_empty(),
        "imports from a higher layer:\n{}",
        upward.join("\n")
    );
}

#[test]
fn the_library_knows_no_front_end() {
    for (path, text) in all(&["src"]) {
        let in_lock = path.ends_with("src/storage/lock.rs");
        for word in ONLY_IN_MOUNT {
            let found = text.lines().any(|line| {
                line.split("//")
                    .next()
                    .is_some_and(|code| code.contains(word))
            });
            assert!(
                !found || in_lock || path.starts_with("src/storage"),
                "{word} in {}",
                path.display()
            );
        }
    }
}

/// Lines of code, comments left out, of the files in `dirs` that hold `word`, and are none of `allowed`.
fn found_in(dirs: &[&str], word: &str, allowed: &[&str]) -> Vec<String> {
    let mut found = Vec::new();
    for (path, text) in all(dirs) {
        if allowed.iter().any(|allowed| path.starts_with(allowed)) {
            continue;
        }
        for (number, line) in text.lines().enumerate() {
            let code = line.split("//").next().unwrap_or_default();
            let mut words = code.split(|c: char| !c.is_alphanumeric() && c != '_' && c != ':');
            if words.any(|found| found == word) {
                found.push(format!(
                    "{}:{}: {}",
                    path.display(),
                    number + 1,
                    line.trim()
                ));
            }
        }
    }
    found
}

#[test]
fn only_reviewed_files_are_unsafe() {
    // The C interface of Windows' virtual disk service, the calls to Windows, and the one to Linux that no safe crate has (leases);
    // everything else is checked by the compiler.
    let reviewed = [
        "src/virtdisk/ffi.rs",
        "src/virtdisk/ffi",
        "src/storage/host/unix/sys.rs",
        "src/storage/host/windows/sys.rs",
        "mount/src/winfsp/raw.rs",
    ];
    for word in ["unsafe", "unsafe_code"] {
        let found = found_in(&["src", "mount"], word, &reviewed);
        assert!(found.is_empty(), "{word}:\n{}", found.join("\n"));
    }
    let manifest = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml"));
    assert!(
        manifest
            .expect("a manifest")
            .contains("unsafe_code = \"deny\"")
    );
}

#[test]
fn nothing_rests_on_the_clock_on_the_wall() {
    // The time of creation, which the format has; and how old a file is where nothing else tells whether
    // somebody is at it.
    let allowed = ["src/image/vhd/create.rs", "src/storage/host/unix/age.rs"];
    for word in ["SystemTime::now", "Utc::now", "Local::now"] {
        let mut found = found_in(&["src", "mount/src"], word, &allowed);
        found.retain(|place| !place.contains("tests.rs:"));
        assert!(found.is_empty(), "{}", found.join("\n"));
    }
}

#[test]
fn files_stay_small_and_finished() {
    let marks = [
        "TO".to_owned() + "DO",
        "FIX".to_owned() + "ME",
        "todo".to_owned() + "!(",
    ];
    for (path, text) in all(&["src", "mount", "tests"]) {
        let lines = text.lines().count();
        assert!(
            lines <= MAX_LINES,
            "{} has {lines} lines: is there a wall missing?",
            path.display()
        );
        assert!(text.is_ascii(), "{} is not all ASCII", path.display());
        for mark in &marks {
            assert!(
                !text.contains(mark.as_str()),
                "{mark} in {}",
                path.display()
            );
        }
    }
}

/// Where the source of a break's test is, and its name; `red` is what `cargo test` is told.
fn test_of(red: &str) -> (&'static str, &str) {
    let dir = match red {
        _ if red.contains("-p vhdfs-mount") => "mount",
        _ if red.contains("--manifest-path tests/models/") => "tests/models",
        _ if red.contains("--lib") => "src",
        _ => "tests",
    };
    (dir, red.rsplit([' ', ':']).next().unwrap_or_default())
}

/// `scripts/mutations` runs them; here only that they are what it needs.
#[test]
fn breaks_on_purpose_apply_and_name_their_tests() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let git = || {
        let mut git = std::process::Command::new("git");
        git.current_dir(root);
        git
    };
    if !root.join(".git").exists() || git().arg("--version").output().is_err() {
        println!("skipped: this is no git checkout, or there is no git");
        return;
    }
    let mut patches: Vec<PathBuf> = (fs::read_dir(root.join("tests/mutations")).expect("a folder"))
        .map(|entry| entry.expect("an entry").path())
        .collect();
    patches.sort();
    assert!(patches.len() > 40);
    let sources = ["src", "tests", "tests/models", "mount"].map(|dir| (dir, all(&[dir])));
    let mut stale = Vec::new();
    for patch in patches {
        let text = fs::read_to_string(&patch).expect("a readable patch");
        let head = text.split("\ndiff ").next().unwrap_or_default();
        let field = |name: &str| -> Vec<&str> {
            let values = head.lines().filter_map(|line| line.strip_prefix(name));
            values.map(str::trim).collect()
        };
        let name = patch.display();
        if field("Rule:").len() != 1 || field("Break:").len() != 1 || field("Red:").is_empty() {
            stale.push(format!("{name}: one Rule:, one Break:, and Red:"));
        }
        for red in field("Red:") {
            let (dir, test) = test_of(red);
            let header = format!("fn {test}(");
            let is_there = (sources.iter().filter(|(name, _)| *name == dir))
                .any(|(_, files)| files.iter().any(|(_, text)| text.contains(&header)));
            if test.is_empty() || !is_there {
                stale.push(format!("{name}: no test {test} in {dir}"));
            }
        }
        let applies = git().args(["apply", "--check"]).arg(&patch).output();
        let applies = applies.expect("git runs");
        if !applies.status.success() {
            let error = String::from_utf8_lossy(&applies.stderr).into_owned();
            stale.push(format!("{name}: {error}"));
        }
    }
    assert!(stale.is_empty(), "to be renewed:\n{}", stale.join("\n"));
}
