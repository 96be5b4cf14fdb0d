use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::*;
use crate::error::{ErrorKind, OpenError};
use crate::storage::Storage;
use crate::storage::tests::range;
use crate::units::{FileOffset, usize_from};

fn temp() -> (tempfile::TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("file");
    (directory, path)
}

fn refusal(path: &Path, options: HostOptions) -> String {
    let error: OpenError = HostFile::open(path, &options).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Io);
    error.to_string()
}

#[test]
fn refuses_what_is_no_regular_file() {
    let (directory, path) = temp();
    let read_only = HostOptions {
        read_only: true,
        ..HostOptions::default()
    };
    for options in [HostOptions::default(), read_only] {
        assert!(refusal(directory.path(), options).contains("it is a directory"));
    }
    let missing = HostFile::open(&path, &HostOptions::default()).unwrap_err();
    assert!(
        missing.to_string().contains("cannot open the file"),
        "{missing}"
    );
}

#[cfg(unix)]
#[test]
fn refuses_devices() {
    let (directory, _) = temp();
    let read_only = HostOptions {
        read_only: true,
        ..HostOptions::default()
    };
    let fifo = directory.path().join("fifo");
    let mode = rustix::fs::Mode::from_raw_mode(0o600);
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, mode, 0).unwrap();
    for options in [HostOptions::default(), read_only] {
        assert!(
            refusal(&fifo, options).contains("it is a FIFO"),
            "and does not hang"
        );
    }
    let null = Path::new("/dev/null");
    assert!(refusal(null, HostOptions::default()).contains("it is a character device"));
}

#[cfg(unix)]
#[test]
fn follows_links_unless_told_otherwise() {
    let (directory, path) = temp();
    fs::write(&path, b"content").unwrap();
    let link = directory.path().join("link");
    std::os::unix::fs::symlink(&path, &link).unwrap();
    HostFile::open(&link, &HostOptions::default()).unwrap();
    let options = HostOptions {
        no_follow: true,
        ..HostOptions::default()
    };
    assert!(refusal(&link, options).contains("symbolic link"));
    HostFile::open(&path, &options).unwrap();
    let error = HostFile::create_new(&link).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
}

#[test]
fn read_only_takes_no_changes() {
    let (_directory, path) = temp();
    fs::write(&path, b"content").unwrap();
    let options = HostOptions {
        read_only: true,
        ..HostOptions::default()
    };
    let file = HostFile::open(&path, &options).unwrap();
    assert!(file.write_all_at(b"x", FileOffset::new(0)).is_err());
    assert!(file.set_len(0).is_err());
    assert_eq!(fs::read(&path).unwrap(), b"content");
    assert_eq!(file.metadata().unwrap().len(), 7);
}

/// Some MiB of data and of holes, moved to a place that lies alike, and to one that does not.
#[test]
fn copies_large_ranges_and_keeps_holes() {
    let (_directory, path) = temp();
    let file = HostFile::create_new(&path).unwrap();
    let mib = 1 << 20;
    file.set_len(16 * mib).unwrap();
    let data: Vec<u8> = (0..3 * mib)
        .map(|n| u8::try_from(n / 511 % 251).unwrap() | 1)
        .collect();
    file.write_all_at(&data, FileOffset::new(3584)).unwrap();
    // A hole in the middle, and an old content where it goes to.
    let punched = match file.punch_hole(range(mib, mib)) {
        // Nobody has asked Wine for it yet.
        Err(error) if cfg!(windows) && error.kind() == io::ErrorKind::Unsupported => false,
        result => {
            result.unwrap();
            true
        }
    };
    for to in [8 * mib + 3584, 8 * mib + 512] {
        file.write_all_at(&vec![9; 4 << 20], FileOffset::new(8 * mib))
            .unwrap();
        file.copy_within(range(3584, 3 * mib), FileOffset::new(to))
            .unwrap();
        let mut copied = vec![0; data.len()];
        file.read_exact_at(&mut copied, FileOffset::new(to))
            .unwrap();
        let mut source = vec![0; data.len()];
        file.read_exact_at(&mut source, FileOffset::new(3584))
            .unwrap();
        assert!(copied == source);
        let hole = file
            .next_data(FileOffset::new(to + mib), FileOffset::new(to + 2 * mib))
            .unwrap();
        assert!(
            !punched || hole.is_some_and(|data| data.start.get() > to + mib + mib / 2),
            "{hole:?}"
        );
    }
    assert_eq!(file.len().unwrap(), 16 * mib);
    assert!(!punched || file.allocated_bytes().unwrap() < 8 * mib);
    // Through memory it is the same.
    let again = 12 * mib + 7;
    #[cfg(unix)]
    file.forbid_copy_range();
    file.copy_within(range(3584, 3 * mib), FileOffset::new(again))
        .unwrap();
    let bytes = fs::read(&path).unwrap();
    let (from, to, len) = (3584, usize_from(again), usize_from(3 * mib));
    assert!(bytes[from..from + len] == bytes[to..to + len]);
}

#[test]
fn zeroes_large_ranges() {
    let (_directory, path) = temp();
    let file = HostFile::create_new(&path).unwrap();
    let mib = 1 << 20;
    file.write_all_at(&vec![7; 4 << 20], FileOffset::new(0))
        .unwrap();
    for start in [mib, mib + 511] {
        file.write_zeroes(range(start, 2 * mib)).unwrap();
    }
    let bytes = fs::read(&path).unwrap();
    let (start, end) = (usize_from(mib), usize_from(3 * mib + 511));
    assert!(bytes[start..end].iter().all(|&byte| byte == 0));
    assert!(
        bytes[..start]
            .iter()
            .chain(&bytes[end..])
            .all(|&byte| byte == 7)
    );
    let error = file.write_zeroes(range(3 * mib, 2 * mib)).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
}

#[test]
fn syncs() {
    let (_directory, path) = temp();
    let file = HostFile::create_new(&path).unwrap();
    file.write_all_at(b"durable", FileOffset::new(0)).unwrap();
    file.sync().unwrap();
    sync_directory_of(&path).unwrap();
    sync_directory_of(Path::new("relative")).unwrap();
    assert!(sync_directory_of(Path::new("nowhere/file")).is_err());
}
