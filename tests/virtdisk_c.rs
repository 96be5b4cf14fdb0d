//! The C library and its header, used by programs that the system's compilers make of `tests/virtdisk/`.

#![allow(clippy::unwrap_used, reason = "a failure is what a test is for")]
#![cfg(unix)]

#[path = "virtdisk/disks.rs"]
mod disks;
mod support;

use std::env;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::LazyLock;

use disks::{DISK, FORMATS, MB, Made, large, len, verify_large, with_fs};
use support::tools::installed;
use vhdfs::compact::CompactOptions;
use vhdfs::disk::{Disk, OpenOptions};

const HEADER_DIR: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/src/virtdisk");
const SOURCES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/virtdisk");
const STRICT: [&str; 4] = ["-Wall", "-Wextra", "-Werror", "-O1"];
/// Nobody in particular.
const NOBODY: u32 = 65534;

/// The directory of the library that was built together with this test.
fn library_dir() -> PathBuf {
    let own = env::current_exe().unwrap();
    let found = own.ancestors().skip(1).find(|directory| {
        directory.join("libvhdfs.so").is_file() || directory.join("libvhdfs.dylib").is_file()
    });
    found.expect("the C library beside this test").to_owned()
}

/// Runs a compiler, which must have nothing to say.
fn compile(compiler: &str, standard: &str, more: &[&str], source: &str, to: &Path) {
    let output = Command::new(compiler)
        .arg(standard)
        .args(STRICT)
        .args(more)
        .args(["-I", HEADER_DIR])
        .arg(Path::new(SOURCES).join(source))
        .arg("-L")
        .arg(library_dir())
        .args(["-lvhdfs", "-o"])
        .arg(to)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.is_empty(), "{said}");
}

/// The C program of the tests; `None`, and it is said, without a compiler.
fn program() -> Option<&'static Path> {
    static PROGRAM: LazyLock<Option<PathBuf>> = LazyLock::new(|| {
        if !installed(&["cc"]) {
            return None;
        }
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join("virtdisk-compact");
        compile("cc", "-std=c99", &["-pedantic"], "compact.c", &path);
        Some(path)
    });
    PROGRAM.as_deref()
}

fn command(program: &Path, what: &str, disk: &Path) -> Command {
    let mut command = Command::new(program);
    command.arg(what).arg(disk);
    command.env("LD_LIBRARY_PATH", library_dir());
    command
}

fn finished(output: Output) -> (i32, String) {
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text).into_owned();
    (output.status.code().unwrap_or(-1), text)
}

/// Runs the program, which must find all in order, and gives what it says.
fn run(program: &Path, what: &str, disk: &Path) -> String {
    let (code, said) = finished(command(program, what, disk).output().unwrap());
    assert_eq!(code, 0, "{what}: {said}");
    said
}

#[test]
fn both_kinds_of_compaction() {
    let Some(program) = program() else { return };
    for made in Made::each() {
        let agnostic = made.predicted(CompactOptions::default());
        let aware = made.predicted(with_fs());
        run(program, "agnostic", &made.path);
        assert_eq!(made.len(), agnostic);
        made.verify_all();
        run(program, "aware", &made.path);
        assert_eq!(made.len(), aware);
        made.verify();
    }
}

#[test]
fn version_2_without_an_event() {
    let Some(program) = program() else { return };
    for made in Made::each() {
        let aware = made.predicted(with_fs());
        run(program, "version-2", &made.path);
        assert_eq!(made.len(), aware);
        made.verify();
    }
}

/// Cancelled, detached or closed in the middle, it can be run again, to the same end.
#[test]
fn stopped_and_run_again() {
    let Some(program) = program() else { return };
    for extension in FORMATS {
        for how in ["cancel", "detach", "close"] {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("disk").with_extension(extension);
            let mut least = 0;
            let tries = (0..10).find(|_| {
                let _ = fs::remove_file(&path);
                large(&path);
                least = disks::predicted(&path, with_fs());
                let (code, said) = finished(command(program, how, &path).output().unwrap());
                assert!(code == 0 || code == 3, "{how}: {said}");
                code == 0
            });
            assert!(tries.is_some(), "{how}: always over before it was stopped");
            verify_large(&path);
            run_to_the_end(program, &path, least);
        }
    }
}

/// So does one whose process ended in the middle.
#[test]
fn abandoned_and_run_again() {
    let Some(program) = program() else { return };
    for extension in FORMATS {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk").with_extension(extension);
        large(&path);
        let least = disks::predicted(&path, with_fs());
        run(program, "abandon", &path);
        verify_large(&path);
        run_to_the_end(program, &path, least);
    }
}

/// Runs it again; the file ends as short as one that nobody stopped.
fn run_to_the_end(program: &Path, path: &Path, least: u64) {
    run(program, "aware", path);
    assert_eq!(len(path), least);
    verify_large(path);
}

#[test]
fn wrong_pointers_and_handles() {
    let Some(program) = program() else { return };
    for made in Made::each() {
        run(program, "refused", &made.path);
        made.verify_all();
    }
}

#[test]
fn information() {
    let Some(program) = program() else { return };
    for made in Made::each() {
        let child = made.child();
        let told = |path: &Path| run(program, "info", path);
        let line = |text: &str, name: &str| {
            let found = text.lines().find_map(|line| line.strip_prefix(name));
            found
                .unwrap_or_else(|| panic!("no {name} in {text}"))
                .to_owned()
        };
        let (parent, child) = (told(&made.path), told(&child));
        assert_eq!(line(&parent, "virtual "), DISK.to_string());
        assert_eq!(line(&parent, "physical "), made.len().to_string());
        assert_eq!(line(&parent, "block "), MB.to_string());
        assert_eq!(line(&parent, "sector "), "512");
        let device = match made.path.extension().unwrap() == "vhdx" {
            true => "3",
            false => "2",
        };
        assert_eq!(line(&parent, "device "), device);
        assert_eq!(
            (line(&parent, "subtype "), line(&child, "subtype ")),
            ("3".to_owned(), "4".to_owned())
        );
        assert_eq!(line(&child, "parent "), line(&parent, "identifier "));
        let disk = Disk::open(
            &made.path,
            &OpenOptions {
                read_only: true,
                ..OpenOptions::default()
            },
        )
        .unwrap();
        let identity = disk.identity().to_string();
        assert!(
            identity.starts_with(&line(&parent, "identifier ")),
            "{identity}"
        );
        let real = fs::canonicalize(&made.path).unwrap();
        assert_eq!(line(&child, "location "), real.to_str().unwrap());
    }
}

/// Nothing is done with other rights than the caller's own.
#[test]
fn the_callers_rights() {
    let Some(program) = program() else { return };
    let is_root = rustix::process::geteuid().is_root();
    for made in Made::each() {
        // Where somebody else may look, and not write.
        let folder = made.folder.path();
        let mode = |path: &Path, mode| {
            fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        };
        mode(folder, 0o755);
        mode(&made.path, 0o444);
        for name in ["libvhdfs.so", "libvhdfs.dylib"] {
            if library_dir().join(name).is_file() {
                fs::copy(library_dir().join(name), folder.join(name)).unwrap();
                mode(&folder.join(name), 0o755);
            }
        }
        let copy = folder.join("program");
        fs::copy(program, &copy).unwrap();
        mode(&copy, 0o755);
        let mut command = command(&copy, "denied", &made.path);
        command.env("LD_LIBRARY_PATH", folder).current_dir(folder);
        if is_root {
            command.uid(NOBODY).gid(NOBODY);
        }
        let (code, said) = finished(command.output().unwrap());
        assert_eq!(code, 0, "{said}");
        made.verify_all();
    }
}

/// A C++ program as it is written for Windows, wide literals and all.
#[test]
fn a_program_for_windows() {
    if !installed(&["g++"]) {
        return;
    }
    let made = Made::new("vhdx");
    let aware = made.predicted(with_fs());
    let program = made.folder.path().join("windows");
    compile(
        "g++",
        "-std=c++17",
        &["-fshort-wchar"],
        "windows.cpp",
        &program,
    );
    let mut command = Command::new(&program);
    command.current_dir(made.folder.path());
    command.env("LD_LIBRARY_PATH", library_dir());
    let (code, said) = finished(command.output().unwrap());
    assert_eq!((code, said.trim()), (0, "2 0 0"));
    assert_eq!(made.len(), aware);
    made.verify();
}

/// The header is C++ as well, whatever the width of `wchar_t`.
#[test]
fn the_header_in_other_languages() {
    let languages = [
        ("cc", "-std=c99", "c"),
        ("cc", "-std=c17", "c"),
        ("g++", "-std=c++11", "c++"),
        ("g++", "-std=c++20", "c++"),
    ];
    for (compiler, standard, language) in languages {
        if !installed(&[compiler]) {
            continue;
        }
        for width in ["-fno-short-wchar", "-fshort-wchar"] {
            let header = Path::new(HEADER_DIR).join("virtdisk.h");
            let output = Command::new(compiler)
                .args([
                    standard,
                    width,
                    "-pedantic",
                    "-fsyntax-only",
                    "-x",
                    language,
                ])
                .args(STRICT)
                .args(["-include"])
                .arg(header)
                .arg("/dev/null")
                .output()
                .unwrap();
            let said = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success() && said.is_empty(), "{said}");
        }
    }
}

/// Nothing is exported but the functions of the header.
#[test]
fn exports() {
    if !installed(&["nm"]) {
        return;
    }
    let library = library_dir().join("libvhdfs.so");
    let listed = support::tools::tool("nm", &["-D", "--defined-only"], &[&library]);
    let names: Vec<&str> = listed
        .lines()
        .filter_map(|line| line.split(' ').nth(2))
        .collect();
    let header = fs::read_to_string(Path::new(HEADER_DIR).join("virtdisk.h")).unwrap();
    assert_eq!(names.len(), 15, "{names:?}");
    for name in names {
        let declared = header.contains(&format!("WINAPI {name}("));
        assert!(declared, "{name} is in no header");
    }
}
