//! The C library and its header, used by programs that the system's compilers make of `tests/virtdisk/`.
//!
//! With `VHDFS_WINDOWS_LIBRARY`, the directory of a `vhdfs.dll`, the programs are made for Windows and run by
//! Wine; `scripts/test-windows` does that.

#![allow(clippy::unwrap_used, reason = "a failure is what a test is for")]
#![cfg(unix)]

#[path = "virtdisk/disks.rs"]
mod disks;
mod support;

use std::env;
use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::LazyLock;

use disks::{DISK, FORMATS, MB, Made, large, len, verify_large};
use support::tools::installed;
use vhdfs::compact::CompactOptions;
use vhdfs::disk::{Disk, OpenOptions};

const HEADER_DIR: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/src/virtdisk");
const SOURCES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/virtdisk");
const STRICT: [&str; 4] = ["-Wall", "-Wextra", "-Werror", "-O1"];
/// Nobody in particular.
const NOBODY: u32 = 65534;

/// What the programs are made with, and for.
struct System {
    cc: &'static str,
    cxx: &'static str,
    /// The directory of the library.
    library: PathBuf,
    /// What runs a program that is not for this system.
    wine: Option<&'static str>,
}

static SYSTEM: LazyLock<System> = LazyLock::new(|| match env::var_os("VHDFS_WINDOWS_LIBRARY") {
    Some(library) => System {
        cc: "x86_64-w64-mingw32-gcc-posix",
        cxx: "x86_64-w64-mingw32-g++-posix",
        library: library.into(),
        wine: Some("/usr/lib/wine/wine64"),
    },
    None => System {
        cc: "cc",
        cxx: "g++",
        library: library_dir(),
        wine: None,
    },
});

/// The directory of the library that was built together with this test.
fn library_dir() -> PathBuf {
    let own = env::current_exe().unwrap();
    let found = own.ancestors().skip(1).find(|directory| {
        directory.join("libvhdfs.so").is_file() || directory.join("libvhdfs.dylib").is_file()
    });
    found.expect("the C library beside this test").to_owned()
}

/// The name of a program's file.
fn program_name(name: &str) -> String {
    let suffix = if SYSTEM.wine.is_some() { ".exe" } else { "" };
    format!("{name}{suffix}")
}

/// How programs there name the file.
fn seen(path: &Path) -> String {
    let path = path.to_str().unwrap();
    match SYSTEM.wine {
        Some(_) => format!("Z:{}", path.replace('/', "\\")),
        None => path.to_owned(),
    }
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
        .arg(&SYSTEM.library)
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
        if !installed(&[SYSTEM.cc]) {
            return None;
        }
        let place = Path::new(env!("CARGO_TARGET_TMPDIR"));
        let path = place.join(program_name("virtdisk-compact"));
        compile(SYSTEM.cc, "-std=c99", &["-pedantic"], "compact.c", &path);
        Some(path)
    });
    PROGRAM.as_deref()
}

/// A program, and where it finds the library.
fn command(program: &Path, library: &Path) -> Command {
    let mut command = match SYSTEM.wine {
        None => Command::new(program),
        Some(wine) => {
            let mut command = Command::new(wine);
            command.arg(program);
            command
        }
    };
    command.env("LD_LIBRARY_PATH", library);
    command.env("WINEPATH", seen(library));
    command
}

/// What the C program does to a disk.
fn does(program: &Path, what: &str, disk: &Path) -> (i32, String) {
    let mut command = command(program, &SYSTEM.library);
    finished(command.args([what, &seen(disk)]).output().unwrap())
}

fn finished(output: Output) -> (i32, String) {
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text).replace('\r', "");
    (output.status.code().unwrap_or(-1), text)
}

/// Runs the program, which must find all in order, and gives what it says.
fn run(program: &Path, what: &str, disk: &Path) -> String {
    let (code, said) = does(program, what, disk);
    assert_eq!(code, 0, "{what}: {said}");
    said
}

#[test]
fn both_kinds_of_compaction() {
    let Some(program) = program() else { return };
    for made in Made::each() {
        let agnostic = made.predicted(CompactOptions::default());
        let aware = made.predicted(made.with_fs());
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
        let aware = made.predicted(made.with_fs());
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
                least = disks::predicted(&path, CompactOptions::default());
                let (code, said) = does(program, how, &path);
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
        let least = disks::predicted(&path, CompactOptions::default());
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

/// One process has the disk attached read-only, another one compacts it.
#[test]
fn attached_by_one_process_compacted_by_another() {
    let Some(program) = program() else { return };
    for made in Made::each() {
        // On Windows it cannot be told that another process has it attached.
        let predicted = match SYSTEM.wine {
            None => made.predicted(made.with_fs()),
            Some(_) => made.predicted(CompactOptions::default()),
        };
        let mut holding = command(program, &SYSTEM.library)
            .args(["hold", &seen(&made.path)])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut said = BufReader::new(holding.stdout.take().unwrap());
        let mut line = String::new();
        said.read_line(&mut line).unwrap();
        assert_eq!(line.trim_end(), "attached");
        run(program, "agnostic", &made.path);
        assert_eq!(made.len(), predicted);
        drop(holding.stdin.take());
        said.read_line(&mut line).unwrap();
        assert!(holding.wait().unwrap().success(), "{line}");
        made.verify();
    }
}

#[test]
fn opened_and_attached_as_by_go() {
    let Some(program) = program() else { return };
    for made in Made::each() {
        run(program, "as-go", &made.path);
        made.verify_all();
    }
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
        assert_eq!(line(&child, "location "), seen(&real));
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
        for name in ["libvhdfs.so", "libvhdfs.dylib", "vhdfs.dll"] {
            if SYSTEM.library.join(name).is_file() {
                fs::copy(SYSTEM.library.join(name), folder.join(name)).unwrap();
                mode(&folder.join(name), 0o755);
            }
        }
        let copy = folder.join(program_name("program"));
        fs::copy(program, &copy).unwrap();
        mode(&copy, 0o755);
        let mut command = command(&copy, folder);
        command.args(["denied", &seen(&made.path)]);
        command.current_dir(folder);
        // Wine belongs to us, and has the file's attribute instead.
        if is_root && SYSTEM.wine.is_none() {
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
    if !installed(&[SYSTEM.cxx]) {
        return;
    }
    let made = Made::new("vhdx");
    let aware = made.predicted(made.with_fs());
    let program = made.folder.path().join(program_name("windows"));
    let wide = ["-fshort-wchar"];
    compile(SYSTEM.cxx, "-std=c++17", &wide, "windows.cpp", &program);
    let mut command = command(&program, &SYSTEM.library);
    command.current_dir(made.folder.path());
    let (code, said) = finished(command.output().unwrap());
    assert_eq!((code, said.trim()), (0, "2 0 0"));
    assert_eq!(made.len(), aware);
    made.verify();
}

/// The header is C++ as well, whatever the width of `wchar_t`.
#[test]
fn the_header_in_other_languages() {
    let languages = [
        (SYSTEM.cc, "-std=c99", "c"),
        (SYSTEM.cc, "-std=c17", "c"),
        (SYSTEM.cxx, "-std=c++11", "c++"),
        (SYSTEM.cxx, "-std=c++20", "c++"),
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
    let (tool, options, file, count) = match SYSTEM.wine {
        None => ("nm", ["-D", "--defined-only"], "libvhdfs.so", 15),
        // What the kernel has is not there again, but for what goes for disks as well.
        Some(_) => (
            "x86_64-w64-mingw32-nm",
            ["-g", "--defined-only"],
            "libvhdfs.dll.a",
            8,
        ),
    };
    if !installed(&[tool]) {
        return;
    }
    let listed = support::tools::tool(tool, &options, &[&SYSTEM.library.join(file)]);
    // The code: an import library has data of its own.
    let names: Vec<&str> = (listed.lines())
        .filter_map(|line| line.split_once(" T ").map(|(_, name)| name))
        .collect();
    let header = fs::read_to_string(Path::new(HEADER_DIR).join("virtdisk.h")).unwrap();
    assert_eq!(names.len(), count, "{names:?}");
    for name in names {
        let declared = header.contains(&format!("WINAPI {name}("));
        assert!(declared, "{name} is in no header");
    }
}
