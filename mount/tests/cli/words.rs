//! What a user reads about files that are no disks or damaged ones, and readers that go away.

use std::io::pipe;
use std::process::Stdio;

use super::*;

/// What `vhdfs info` says of a file of this name and these bytes.
fn said_of(name: &str, bytes: &[u8]) -> String {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join(name);
    fs::write(&path, bytes).unwrap();
    let output = run([Path::new("info"), &path]);
    assert_eq!(exit_code(&output), 1);
    stderr(&output)
}

#[test]
fn what_else_a_file_is_is_said() {
    let start = |at: usize, magic: &[u8]| {
        let mut bytes = vec![0; 40 << 10];
        bytes[at..at + magic.len()].copy_from_slice(magic);
        bytes
    };
    for (bytes, found) in [
        (
            start(0, b"QFI\xfb\0\0\0\x03"),
            "a qcow2 image; `qemu-img convert -f qcow2 -O ",
        ),
        (start(0x8001, b"CD001"), "an image of a CD (ISO 9660); "),
        (
            b"\x1f\x8b\x08".to_vec(),
            "compressed by gzip; unpack it first",
        ),
        (
            b"<html>404 not found</html>".to_vec(),
            "an HTML page; if it was downloaded",
        ),
        (b"Not Found\n".to_vec(), "text; if it was downloaded"),
    ] {
        for (name, format) in [("a.vhdx", "VHDX"), ("a.vhd", "VHD"), ("a", "VHD")] {
            let said = said_of(name, &bytes);
            let words = format!("{name}: not a {format}: it is {found}");
            // An ISO may be the guest's disk of a fixed VHD.
            assert!(said.contains(&words) || found.contains("CD"), "{said}");
            assert!(said.contains(found), "{said}");
            assert!(!said.contains("cut"), "{said}");
        }
    }
    for name in ["a.vhdx", "a.vhd"] {
        let said = said_of(name, b"");
        assert!(
            said.contains("it is an empty file; a copy or a download"),
            "{said}"
        );
    }
    for bytes in [vec![0; 100], vec![0; 2 << 20]] {
        let said = said_of("a.vhdx", &bytes);
        assert!(
            said.contains("not a VHDX: no `vhdxfile` at the start"),
            "{said}"
        );
    }
    // And what begins as a VHDX was one.
    let said = said_of("a.vhdx", b"vhdxfile and no more");
    assert!(said.contains("the file was cut"), "{said}");
}

/// Wherever a file was cut, what is said of it names the place, and is not Rust's own.
#[test]
fn cut_files_are_spoken_of_in_words() {
    for name in ["a.vhd", "a.vhdx"] {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join(name);
        create(&path, &["--size", "64M"]);
        let disk = vhdfs::disk::Disk::open(&path, &vhdfs::disk::OpenOptions::default()).unwrap();
        disk.write_at(&vec![7; 3 << 20], 0).unwrap();
        disk.close().unwrap();
        drop(disk);
        let whole = fs::read(&path).unwrap();
        let cut = root.path().join(format!("cut-{name}"));
        let lengths = [
            1,
            7,
            8,
            511,
            512,
            600,
            1536,
            65_535,
            66_000,
            200_000,
            300_000,
            1 << 20,
        ];
        let longer = [
            (1 << 20) + 1,
            2 << 20,
            (2 << 20) + 70_000,
            3 << 20,
            (5 << 20) + 9,
        ];
        for len in lengths.into_iter().chain(longer) {
            let Some(bytes) = whole.get(..len) else {
                continue;
            };
            fs::write(&cut, bytes).unwrap();
            for command in [
                &["info"][..],
                &["map"],
                &["check"],
                &["compact", "--dry-run"],
            ] {
                let output = vhdfs().args(command).arg(&cut).output().unwrap();
                let said = stderr(&output) + &String::from_utf8_lossy(&output.stdout);
                for word in ["fill whole buffer", "unexpected end", "panicked"] {
                    assert!(!said.contains(word), "{name} of {len} bytes: {said}");
                }
            }
        }
    }
}

#[test]
fn a_file_is_not_its_own_backup() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("a.vhd");
    create(&path, &["--size", "8M"]);
    let output = run([Path::new("check"), Path::new("--restore"), &path, &path]);
    assert_eq!(exit_code(&output), 1);
    let said = stderr(&output);
    assert!(
        said.contains("not a usable backup: it is the file itself"),
        "{said}"
    );
}

/// Zeros where the name of the program that made the file would be.
#[test]
fn who_made_a_file_may_be_unknown() {
    let root = tempfile::tempdir().unwrap();
    for name in ["a.vhd", "a.vhdx"] {
        let path = root.path().join(name);
        create(&path, &["--size", "8M"]);
        let mut bytes = fs::read(&path).unwrap();
        if name == "a.vhdx" {
            bytes[8..520].fill(0);
        } else {
            for at in [0, bytes.len() - 512] {
                let footer = &mut bytes[at..at + 512];
                footer[28..36].fill(0);
                footer[64..68].fill(0);
                let sum: u32 = footer.iter().map(|byte| u32::from(*byte)).sum();
                footer[64..68].copy_from_slice(&(!sum).to_be_bytes());
            }
        }
        fs::write(&path, bytes).unwrap();
        let file = path.to_str().unwrap();
        assert_eq!(json(&run(["info", "--json", file]))["creator"], Value::Null);
        let text = String::from_utf8(run(["info", file]).stdout).unwrap();
        assert!(text.contains("  creator         unknown\n"), "{text}");
    }
}

/// As `vhdfs info ... | grep -q` under `pipefail`: the reader may be gone before the first byte.
#[test]
fn a_reader_that_has_seen_enough_is_no_failure() {
    let root = tempfile::tempdir().unwrap();
    let path = |name: &str| root.path().join(name).to_str().unwrap().to_owned();
    let (one, two, bad) = (path("1.vhd"), path("2.vhdx"), path("bad.vhd"));
    create(Path::new(&one), &["--size", "64M"]);
    create(Path::new(&two), &["--size", "64M"]);
    fs::write(&bad, "no disk").unwrap();
    let unread = |arguments: &[&str]| {
        let (reader, writer) = pipe().unwrap();
        drop(reader);
        let mut command = vhdfs();
        command
            .args(arguments)
            .stdout(writer)
            .stderr(Stdio::piped());
        let output = command.output().unwrap();
        (exit_code(&output), stderr(&output))
    };
    let fine = (0, String::new());
    for arguments in [
        &["info", &one, &two][..],
        &["info", "--json", &one],
        &["check", &one, &two],
        &["check", "--json", &one],
        &["map", &one],
        &["--help"],
        &["--version"],
    ] {
        assert_eq!(unread(arguments), fine, "{arguments:?}");
    }
    // What is wrong is told by the exit code all the same, and what follows has its turn.
    let (code, said) = unread(&["check", &bad, &one]);
    assert_eq!((code, said.as_str()), (1, ""));
    assert_eq!(unread(&["info", &one, &bad]).0, 1);

    // Work that is to be done is done, whoever reads of it.
    let lengths = [&one, &two].map(|file| {
        let image = vhdfs::disk::Disk::open(Path::new(file), &vhdfs::disk::OpenOptions::default());
        let disk = image.unwrap();
        disk.write_at(&vec![7; 8 << 20], 0).unwrap();
        disk.write_at(&vec![0; 8 << 20], 0).unwrap();
        drop(disk);
        fs::metadata(file).unwrap().len()
    });
    assert_eq!(unread(&["compact", &one, &two]), fine);
    for (file, before) in [&one, &two].into_iter().zip(lengths) {
        let now = fs::metadata(file).unwrap().len();
        assert!(now + (4 << 20) < before, "{file}: {before}, {now}");
    }
}
