use std::fs;
use std::path::PathBuf;

use super::*;
use crate::error::{DiskError, ErrorKind};
use crate::storage::host::paths;
use crate::storage::host::pin::Kind;

const UNLOCKED: HostOptions = HostOptions {
    read_only: true,
    lock: false,
    no_follow: false,
};
const READER: HostOptions = HostOptions {
    lock: true,
    ..UNLOCKED
};
const WRITER: HostOptions = HostOptions {
    read_only: false,
    ..READER
};

fn temp() -> (tempfile::TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("file.vhd");
    fs::write(&path, b"content").unwrap();
    (directory, path)
}

fn open(path: &Path, options: HostOptions) -> Result<HostFile, OpenError> {
    HostFile::open(path, &options)
}

#[test]
fn who_shares_with_whom() {
    let (_directory, path) = temp();
    for (first, second, together) in [
        (WRITER, WRITER, false),
        (WRITER, READER, false),
        (READER, WRITER, false),
        (READER, READER, true),
        (WRITER, UNLOCKED, true),
        (UNLOCKED, WRITER, true),
        (READER, UNLOCKED, true),
        (UNLOCKED, READER, true),
    ] {
        let held = open(&path, first).unwrap();
        match open(&path, second) {
            Ok(_) => assert!(together, "{first:?} {second:?}"),
            Err(error) => {
                assert!(!together, "{first:?} {second:?}: {error}");
                assert_eq!(error.kind(), ErrorKind::InUse, "{error}");
            }
        }
        drop(held);
        open(&path, WRITER).unwrap();
    }
    // Nor may others who know nothing of us.
    let writer = open(&path, WRITER).unwrap();
    assert!(fs::OpenOptions::new().write(true).open(&path).is_err());
    assert!(fs::remove_file(&path).is_err());
    drop(writer);
    let foreign = OpenOptions::new()
        .read(true)
        .share_mode(0)
        .open(&path)
        .unwrap();
    for options in [WRITER, READER, UNLOCKED] {
        assert_eq!(open(&path, options).unwrap_err().kind(), ErrorKind::InUse);
    }
    drop(foreign);
    fs::remove_file(&path).unwrap();
}

#[test]
fn a_new_file_is_a_writers() {
    let (directory, path) = temp();
    let new = directory.path().join("new.vhd");
    let file = HostFile::create_new(&new).unwrap();
    assert_eq!(open(&new, WRITER).unwrap_err().kind(), ErrorKind::InUse);
    drop(file);
    for create in [HostFile::create_new, HostFile::create_private] {
        let error = create(&path).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
    }
}

#[test]
fn a_pin_stays_on_its_file() {
    let (directory, path) = temp();
    let at = |name: &str| directory.path().join(name);
    let root = Pin::directory(directory.path()).unwrap();
    let pin = root.child("FILE.vhd".as_ref()).unwrap();
    let before = pin.stat().unwrap();
    assert_eq!((before.kind, before.len), (Kind::File, 7));
    assert_eq!(open(&path, WRITER).unwrap().key().unwrap(), before.key);
    // Held, but in nobody's way.
    fs::rename(&path, at("moved.vhd")).unwrap();
    fs::write(&path, b"another").unwrap();
    assert_eq!(pin.stat().unwrap().key, before.key);
    match pin.open(&READER) {
        Ok(file) => {
            assert_eq!(file.key().unwrap(), before.key);
            let mut text = [0; 7];
            file.read_exact_at(&mut text, FileOffset::new(0)).unwrap();
            assert_eq!(&text, b"content");
            assert!(pin.real_path().unwrap().ends_with("moved.vhd"));
        }
        // Wine goes by the name: then it is not opened at all.
        Err(error) => assert!(
            error.to_string().contains("cannot open the file"),
            "{error}"
        ),
    }
    let moved = root.child("moved.vhd".as_ref()).unwrap();
    let by_path = moved
        .reopen_by_path(FILE_GENERIC_READ, SHARE_ALL, 0)
        .unwrap();
    assert_eq!(Pin::stat_of(&by_path.into()).unwrap().key, before.key);
    assert_ne!(
        root.stat_child("file.vhd".as_ref()).unwrap().key,
        before.key
    );
}

#[test]
fn names_are_words() {
    let (directory, _path) = temp();
    fs::create_dir(directory.path().join("sub")).unwrap();
    let root = Pin::directory(directory.path()).unwrap();
    let mut names = root.names().unwrap();
    names.sort_by(|one, other| one.0.cmp(&other.0));
    assert_eq!(
        names,
        [
            ("file.vhd".into(), Kind::File),
            ("sub".into(), Kind::Directory)
        ]
    );
    for name in [
        "",
        ".",
        "..",
        "file.vhd.",
        "file.vhd ",
        r"sub\x",
        "sub/x",
        "C:",
        "file.vhd:s",
        "a\0",
    ] {
        let error = root.child(name.as_ref()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidFilename, "{name}");
    }
    let file = root.child("file.vhd".as_ref()).unwrap();
    assert!(file.child("x".as_ref()).is_err());
    let error = root.subdirectory("file.vhd".as_ref()).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::NotADirectory);
    // More than are told at once.
    for n in 0..1500 {
        fs::write(directory.path().join(format!("sub/{n:060}")), b"").unwrap();
    }
    assert_eq!(
        root.subdirectory("SUB".as_ref())
            .unwrap()
            .names()
            .unwrap()
            .len(),
        1500
    );
}

#[test]
fn devices_are_not_opened() {
    for name in [
        "NUL",
        r"\\.\NUL",
        r"\\.\PhysicalDrive0",
        r"\\.\pipe\none",
        r"\\.\C:",
        "CON",
    ] {
        for options in [WRITER, READER, UNLOCKED] {
            let text = open(Path::new(name), options).unwrap_err().to_string();
            assert!(text.contains("it is a device"), "{text}");
        }
    }
}

#[test]
fn paths_may_be_long() {
    let (directory, _path) = temp();
    let mut long = paths::canonical(directory.path()).unwrap();
    let root = Pin::directory(&long).unwrap();
    while long.as_os_str().len() < 400 {
        long.push("a directory with a name of some length");
        fs::create_dir(&long).unwrap();
    }
    let path = long.join("disk.vhd");
    let file = HostFile::create_new(&path).unwrap();
    file.write_all_at(b"far down", FileOffset::new(0)).unwrap();
    file.sync().unwrap();
    sync_directory_of(&path).unwrap();
    drop(file);
    let file = open(&path, READER).unwrap();
    assert_eq!(file.len().unwrap(), 8);
    let mut pin = root.try_clone().unwrap();
    for name in &paths::below(&root.real_path().unwrap(), &path).unwrap() {
        pin = pin.child(name).unwrap();
    }
    match pin.real_path() {
        Ok(real) => assert!(open(&real, READER).is_ok(), "{}", real.display()),
        Err(error) => println!("Wine does not tell where that is: {error}"),
    }
    assert_eq!(
        pin.open(&READER).unwrap().key().unwrap(),
        file.key().unwrap()
    );
}

/// Wine has no holes, nor has FAT: what NTFS does then is not to be had here.
#[test]
fn without_holes_zeros_are_written() {
    let (_directory, path) = temp();
    let file = open(&path, WRITER).unwrap();
    file.write_all_at(&[7; 10_000], FileOffset::new(0)).unwrap();
    let hole = FileRange::new(FileOffset::new(4096), 4096);
    for _ in 0..2 {
        match file.punch_hole(hole) {
            Ok(()) => println!("this host has holes"),
            Err(error) => {
                assert_eq!(error.kind(), io::ErrorKind::Unsupported);
                let bytes = fs::read(&path).unwrap();
                assert!(bytes.iter().all(|byte| *byte == 7), "nothing has changed");
            }
        }
    }
    file.clear(FileRange::new(FileOffset::new(4096), 8192))
        .unwrap();
    let bytes = fs::read(&path).unwrap();
    assert_eq!(bytes.len(), 12_288);
    assert!(bytes[..4096].iter().all(|byte| *byte == 7));
    assert!(bytes[4096..].iter().all(|byte| *byte == 0));
    let all = file
        .next_data(FileOffset::new(0), FileOffset::new(1 << 20))
        .unwrap();
    assert_eq!(all.unwrap().start.get(), 0);
    assert_eq!(
        file.next_data(FileOffset::new(12_288), FileOffset::new(1 << 20))
            .unwrap(),
        None
    );
    assert!(file.allocated_bytes().unwrap() >= 8192);
}

#[test]
fn errors_of_the_host_say_what_they_mean() {
    use windows_sys::Win32::Foundation::{
        ERROR_DISK_FULL, ERROR_DISK_QUOTA_EXCEEDED, ERROR_HANDLE_DISK_FULL,
    };
    let error = |code: u32| io::Error::from_raw_os_error(code.try_into().unwrap());
    for code in [
        ERROR_DISK_FULL,
        ERROR_HANDLE_DISK_FULL,
        ERROR_DISK_QUOTA_EXCEEDED,
    ] {
        let full = DiskError::io("write", told(error(code)));
        assert_eq!(full.kind(), ErrorKind::NoSpace, "{full}");
    }
    let locked = told(error(ERROR_LOCK_VIOLATION));
    assert!(
        locked.to_string().contains("another program has locked"),
        "{locked}"
    );
    assert!(!is_unsupported(&error(ERROR_ACCESS_DENIED)));
}
