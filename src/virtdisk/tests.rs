//! What may happen while an operation runs. It is held at its start by the lock that it takes.

use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::Duration;

use super::*;
use crate::create::{CreateOptions, create};
use crate::disk::{Disk, Format, OpenOptions};

const MB: u64 = 1 << 20;
const ACCESS: u32 = VIRTUAL_DISK_ACCESS_METAOPS
    | VIRTUAL_DISK_ACCESS_ATTACH_RO
    | VIRTUAL_DISK_ACCESS_DETACH
    | VIRTUAL_DISK_ACCESS_GET_INFO;

/// A dynamic disk of 16 MiB that is all there, and zero but for its last two blocks.
fn make(path: &Path) {
    let format = match path.extension().is_some_and(|name| name == "vhdx") {
        true => Format::Vhdx,
        false => Format::Vhd,
    };
    let options = CreateOptions::new(format, crate::disk::DiskType::Dynamic, 16 * MB);
    create(path, &options).unwrap();
    let options = OpenOptions {
        punch_holes: false,
        ..OpenOptions::default()
    };
    let disk = Disk::open(path, &options).unwrap();
    disk.write_at(&vec![7; 16 << 20], 0).unwrap();
    disk.write_at(&vec![0; 12 << 20], 0).unwrap();
    disk.close().unwrap();
}

fn open(path: &Path) -> VirtualDisk {
    open_virtual_disk(&VirtualStorageType::UNKNOWN, path, ACCESS, 0, None).unwrap()
}

fn len(path: &Path) -> u64 {
    std::fs::metadata(path).unwrap().len()
}

/// Calls `test` for a disk of each format, with what an operation on it waits for.
fn held(test: impl Fn(&VirtualDisk, &Path, &mut dyn FnMut())) {
    for name in ["a.vhd", "a.vhdx"] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        make(&path);
        let before = len(&path);
        let handle = open(&path);
        let disk = handle.open_disk().unwrap();
        let mut hold = Some(disk.take_turn());
        test(&handle, &path, &mut || hold = None);
        drop(hold);
        drop(disk);
        drop(handle);
        // Whatever became of it, it can be run again.
        let again = open(&path);
        assert_eq!(compact_virtual_disk(&again, 0, None), Ok(()));
        drop(again);
        assert!(len(&path) < before - 10 * MB, "{}", len(&path));
        let disk = Disk::open(&path, &OpenOptions::default()).unwrap();
        let mut found = vec![1; 16 << 20];
        disk.read_at(&mut found, 0).unwrap();
        assert!(found[..12 << 20].iter().all(|byte| *byte == 0));
        assert!(found[12 << 20..].iter().all(|byte| *byte == 7));
    }
}

fn start(handle: &VirtualDisk) -> Overlapped {
    let overlapped = Overlapped::new();
    let started = compact_virtual_disk(handle, 0, Some(&overlapped));
    assert_eq!(started, Err(ERROR_IO_PENDING));
    overlapped
}

#[test]
fn runs_until_it_is_told() {
    held(|handle, _, release| {
        let overlapped = start(handle);
        assert_eq!(overlapped.status(), None);
        assert!(!overlapped.wait_for(Duration::from_millis(20)));
        assert!(!handle.wait(Some(Duration::from_millis(20))));
        let progress = get_virtual_disk_operation_progress(handle, &overlapped).unwrap();
        assert_eq!(progress.operation_status, ERROR_IO_PENDING);
        assert!(progress.current_value < progress.completion_value);

        release();
        assert_eq!(overlapped.wait(), Ok(()));
        assert!(handle.wait(None));
        let progress = get_virtual_disk_operation_progress(handle, &overlapped).unwrap();
        assert_eq!(progress.operation_status, ERROR_SUCCESS);
        assert_eq!(progress.current_value, progress.completion_value);
        assert_eq!(overlapped.status(), Some(ERROR_SUCCESS));
    });
}

#[test]
fn one_at_a_time() {
    held(|handle, _, release| {
        let overlapped = start(handle);
        let second = Overlapped::new();
        let refused = Err(ERROR_VHD_INVALID_STATE);
        assert_eq!(compact_virtual_disk(handle, 0, Some(&second)), refused);
        assert_eq!(second.status(), None);
        assert_eq!(compact_virtual_disk(handle, 0, None), refused);
        let read_only = ATTACH_VIRTUAL_DISK_FLAG_READ_ONLY;
        assert_eq!(attach_virtual_disk(handle, read_only, 0), refused);
        let unknown = Err(ERROR_INVALID_PARAMETER);
        assert_eq!(
            get_virtual_disk_operation_progress(handle, &second),
            unknown
        );
        release();
        assert_eq!(overlapped.wait(), Ok(()));
        // Whoever has been told may go on at once.
        let third = start(handle);
        assert_eq!(third.wait(), Ok(()));
        let stale = get_virtual_disk_operation_progress(handle, &overlapped);
        assert_eq!(stale, unknown);
    });
}

#[test]
fn cancelled() {
    held(|handle, path, release| {
        let before = len(path);
        let overlapped = start(handle);
        let other = Overlapped::new();
        assert_eq!(cancel_io_ex(handle, Some(&other)), Err(ERROR_NOT_FOUND));
        assert_eq!(cancel_io_ex(handle, Some(&overlapped)), Ok(()));
        assert_eq!(overlapped.status(), None, "it has not noticed yet");
        release();
        assert_eq!(overlapped.wait(), Err(ERROR_OPERATION_ABORTED));
        let progress = get_virtual_disk_operation_progress(handle, &overlapped).unwrap();
        assert_eq!(progress.operation_status, ERROR_OPERATION_ABORTED);
        assert_eq!(len(path), before);
        assert_eq!(cancel_io_ex(handle, None), Err(ERROR_NOT_FOUND));
    });
}

#[test]
fn a_blocked_caller_is_cancelled_too() {
    held(|handle, _, release| {
        thread::scope(|scope| {
            let blocked = scope.spawn(|| compact_virtual_disk(handle, 0, None));
            while cancel_io_ex(handle, None) == Err(ERROR_NOT_FOUND) {
                thread::yield_now();
            }
            assert!(!handle.wait(Some(Duration::from_millis(10))));
            release();
            assert_eq!(blocked.join().unwrap(), Err(ERROR_OPERATION_ABORTED));
        });
    });
}

/// While `end` ends what runs, it goes on, and sees that it is to stop.
fn ends(handle: &VirtualDisk, release: &mut dyn FnMut(), end: impl FnOnce() + Send) {
    let overlapped = start(handle);
    thread::scope(|scope| {
        let ending = scope.spawn(end);
        // Time to get to where it waits.
        thread::sleep(Duration::from_millis(50));
        assert!(!ending.is_finished(), "returned before it had ended");
        release();
        ending.join().unwrap();
        assert_eq!(overlapped.status(), Some(ERROR_OPERATION_ABORTED));
    });
}

/// One who is told by `overlapped`, and holds the operation at its start until `go` says something.
struct Holding {
    overlapped: Overlapped,
    handle: Arc<VirtualDisk>,
    go: Option<Receiver<()>>,
}

impl Waiter for Holding {
    fn key(&self) -> usize {
        self.overlapped.key()
    }

    fn begin(&mut self) {
        Waiter::begin(&mut self.overlapped);
        let disk = self.handle.open_disk().unwrap();
        let go = self.go.take().unwrap();
        let (held, is_held) = channel();
        thread::spawn(move || {
            let _hold = disk.take_turn();
            held.send(()).unwrap();
            let _ = go.recv();
        });
        is_held.recv().unwrap();
    }

    fn end(self: Box<Self>, status: Win32Error) {
        Waiter::end(Box::new(self.overlapped), status);
    }
}

#[test]
fn detached() {
    for name in ["a.vhd", "a.vhdx"] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        make(&path);
        let handle = Arc::new(open(&path));
        let detached = || detach_virtual_disk(&handle, 0, 0);
        assert_eq!(detached(), Err(ERROR_NOT_READY));
        let read_only = ATTACH_VIRTUAL_DISK_FLAG_READ_ONLY;
        assert_eq!(attach_virtual_disk(&handle, read_only, 0), Ok(()));
        let (go, go_on) = channel();
        let overlapped = Overlapped::new();
        let waiter = Holding {
            overlapped: overlapped.clone(),
            handle: Arc::clone(&handle),
            go: Some(go_on),
        };
        let started = compact(&handle, 0, Some(Box::new(waiter)));
        assert_eq!(started, Err(ERROR_IO_PENDING));
        let second = compact_virtual_disk(&handle, 0, None);
        assert_eq!(second, Err(ERROR_VHD_INVALID_STATE));
        // With another handle, as on Windows.
        let access = VIRTUAL_DISK_ACCESS_DETACH;
        let other =
            open_virtual_disk(&VirtualStorageType::UNKNOWN, &path, access, 0, None).unwrap();
        thread::scope(|scope| {
            let ending = scope.spawn(|| detach_virtual_disk(&other, 0, 0));
            // Time to get to where it waits.
            thread::sleep(Duration::from_millis(50));
            assert!(!ending.is_finished(), "returned before it had ended");
            go.send(()).unwrap();
            assert_eq!(ending.join().unwrap(), Ok(()));
        });
        assert_eq!(overlapped.status(), Some(ERROR_OPERATION_ABORTED));
        assert_eq!(detached(), Err(ERROR_NOT_READY));
        assert_eq!(compact_virtual_disk(&handle, 0, None), Ok(()));
    }
}

#[test]
fn closed() {
    held(|handle, path, release| {
        ends(handle, release, || handle.close());
        let closed = Err(ERROR_INVALID_HANDLE);
        assert_eq!(compact_virtual_disk(handle, 0, None), closed);
        assert_eq!(cancel_io_ex(handle, None), closed);
        assert_eq!(detach_virtual_disk(handle, 0, 0), closed);
        let version = GET_VIRTUAL_DISK_INFO_SIZE;
        let asked = get_virtual_disk_information(handle, version);
        assert_eq!(asked, Err(ERROR_INVALID_HANDLE));
        // Somebody else may have the file at once, though our caller still has the object. Only this
        // test's own reference to the disk keeps the file open.
        let again = open_virtual_disk(&VirtualStorageType::UNKNOWN, path, ACCESS, 0, None);
        assert_eq!(again.map(|_| ()), Err(ERROR_SHARING_VIOLATION));
    });
}

#[test]
fn the_file_is_free_once_the_handle_is_closed() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.vhd");
    make(&path);
    let handle = Arc::new(open(&path));
    let other = Arc::clone(&handle);
    let overlapped = start(&handle);
    handle.close();
    assert!(overlapped.status().is_some());
    let disk = Disk::open(&path, &OpenOptions::default());
    assert!(disk.is_ok(), "{disk:?}");
    drop(other);
}

/// The handle of one that only asks sees what another one's operation did.
#[test]
fn one_that_asks_sees_the_latest() {
    held(|handle, path, release| {
        let access = VIRTUAL_DISK_ACCESS_GET_INFO;
        let asks = open_virtual_disk(&VirtualStorageType::UNKNOWN, path, access, 0, None).unwrap();
        let size = || match get_virtual_disk_information(&asks, GET_VIRTUAL_DISK_INFO_SIZE) {
            Ok(VirtualDiskInfo::Size { physical_size, .. }) => physical_size,
            other => panic!("{other:?}"),
        };
        let before = size();
        assert_eq!(before, len(path));
        let overlapped = start(handle);
        assert_eq!(
            cancel_io_ex(&asks, None),
            Err(ERROR_NOT_FOUND),
            "not its own"
        );
        release();
        overlapped.wait().unwrap();
        assert!(size() < before);
        assert_eq!(size(), len(path));
    });
}

#[test]
fn what_the_host_answers() {
    use std::io::{Error, ErrorKind};

    use crate::error::{CompactError, DiskError};

    let io = |kind| DiskError::Io {
        action: "write",
        source: Error::from(kind),
    };
    for (error, code) in [
        (CompactError::NoRoom { blocks: 1 }, ERROR_DISK_FULL),
        (DiskError::NoSpace(None).into(), ERROR_DISK_FULL),
        (io(ErrorKind::StorageFull).into(), ERROR_DISK_FULL),
        (io(ErrorKind::QuotaExceeded).into(), ERROR_DISK_FULL),
        (io(ErrorKind::PermissionDenied).into(), ERROR_ACCESS_DENIED),
        (
            io(ErrorKind::ReadOnlyFilesystem).into(),
            ERROR_WRITE_PROTECT,
        ),
        (io(ErrorKind::Other).into(), ERROR_IO_DEVICE),
        (
            DiskError::Poisoned(String::new()).into(),
            ERROR_VHD_METADATA_WRITE_FAILURE,
        ),
        (CompactError::Fixed, ERROR_VHD_INVALID_TYPE),
        (CompactError::Cancelled, ERROR_OPERATION_ABORTED),
    ] {
        assert_eq!(Win32Error::from(&error), code, "{error:?}");
    }
}

/// Threads that begin and close at once: whoever has closed may forget the request.
#[test]
fn closed_while_it_begins() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.vhd");
    make(&path);
    for _ in 0..30 {
        let handle = open(&path);
        let overlapped = Overlapped::new();
        thread::scope(|scope| {
            let begin = scope.spawn(|| compact_virtual_disk(&handle, 0, Some(&overlapped)));
            handle.close();
            let told = overlapped.status();
            match begin.join().unwrap() {
                Err(ERROR_IO_PENDING) => assert!(told.is_some()),
                other => assert_eq!(other, Err(ERROR_INVALID_HANDLE)),
            }
        });
    }
}

#[test]
fn errors_say_their_names() {
    assert_eq!(ERROR_ACCESS_DENIED.to_string(), "ERROR_ACCESS_DENIED (5)");
    let text = "ERROR_VHD_INVALID_STATE (0xC03A001C)";
    assert_eq!(ERROR_VHD_INVALID_STATE.to_string(), text);
}

// Windows lets nobody write to the file.
#[cfg(unix)]
#[test]
fn what_others_made_of_the_file_is_not_compacted() {
    for name in ["a.vhd", "a.vhdx"] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        make(&path);
        let handle = open(&path);
        let other = std::fs::OpenOptions::new().append(true).open(&path);
        std::io::Write::write_all(&mut other.unwrap(), &[9; 4096]).unwrap();
        let found = std::fs::read(&path).unwrap();
        assert!(compact_virtual_disk(&handle, 0, None).is_err());
        drop(handle);
        assert!(std::fs::read(&path).unwrap() == found, "{name}");
    }
}
