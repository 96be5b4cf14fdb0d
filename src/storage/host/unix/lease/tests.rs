use std::fs;
use std::path::PathBuf;
use std::sync::mpsc;
use std::thread;

use super::*;
use crate::error::{ErrorKind, OpenProblem};
use crate::storage::Storage;
use crate::storage::host::{HostFile, HostOptions};
use crate::units::FileOffset;

const READING: HostOptions = HostOptions {
    read_only: true,
    lock: false,
    no_follow: false,
};

fn temp() -> (tempfile::TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk");
    fs::write(&path, [7; 4096]).unwrap();
    (directory, path)
}

/// Whether leases can be had where tests have their files.
fn has_leases(path: &Path) -> bool {
    let can = has_writer(&File::open(path).unwrap()).is_some();
    if !can {
        println!("skipped: no leases on the file system of the temporary directory");
    }
    can
}

fn writer(path: &Path) -> HostFile {
    HostFile::open(path, &HostOptions::default()).unwrap()
}

fn holder(path: &Path) -> String {
    let error = HostFile::open(path, &HostOptions::default()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InUse);
    error.to_string()
}

#[test]
fn who_writes_without_a_lock_is_noticed_and_who_reads_does_not_matter() {
    let (_directory, path) = temp();
    if !has_leases(&path) {
        return;
    }
    let outsider = fs::OpenOptions::new().append(true).open(&path).unwrap();
    let text = holder(&path);
    // Ourselves it does not name.
    assert!(text.contains("/proc does not show who"), "{text}");
    drop(outsider);
    let mut child = std::process::Command::new("sleep")
        .arg("60")
        .stdout(fs::OpenOptions::new().append(true).open(&path).unwrap())
        .spawn()
        .unwrap();
    let text = holder(&path);
    let named = format!("process {}, sleep, has it open for writing", child.id());
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(text.contains(&named), "{text}");

    let reader = File::open(&path).unwrap();
    let file = writer(&path);
    assert_eq!(file.take_lease().unwrap(), Hold::Others);
    file.write_all_at(&[1], FileOffset::new(0)).unwrap();
    drop(reader);
    assert_eq!(file.take_lease().unwrap(), Hold::Alone);
}

#[test]
fn who_comes_waits_until_it_is_let_in_and_nothing_changes_from_then_on() {
    let (_directory, path) = temp();
    if !has_leases(&path) {
        return;
    }
    for write in [false, true] {
        let file = writer(&path);
        assert_eq!(file.take_lease().unwrap(), Hold::Alone);
        assert!(!file.is_wanted());
        let (opened, is_open) = mpsc::channel();
        let (close, is_over) = mpsc::channel::<()>();
        thread::scope(|scope| {
            let path = &path;
            // Gone, and so no longer waited for, where this fails.
            let close = close;
            scope.spawn(move || {
                let other = fs::OpenOptions::new().read(true).write(write).open(path);
                opened.send(()).unwrap();
                is_over.recv().unwrap();
                drop(other.unwrap());
            });
            while !file.is_wanted() {
                thread::sleep(Duration::from_millis(1));
            }
            assert_eq!(file.is_wanted_to_read(), !write);
            // The step under way ends.
            file.write_all_at(&[2], FileOffset::new(1)).unwrap();
            assert!(is_open.try_recv().is_err());
            file.lend().unwrap();
            is_open.recv().unwrap();
            assert!(!file.is_wanted());
            let error = file.write_all_at(&[3], FileOffset::new(2)).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::ResourceBusy);
            assert!(file.set_len(0).is_err() && file.punch_hole(FULL).is_err());
            assert!(file.write_zeroes(FULL).is_err());
            assert_eq!(file.take_lease().unwrap(), Hold::Others);
            close.send(()).unwrap();
        });
        assert_eq!(file.take_lease().unwrap(), Hold::Alone);
        file.write_all_at(&[4], FileOffset::new(2)).unwrap();
    }
}

const FULL: crate::units::FileRange = crate::units::FileRange {
    start: FileOffset::new(0),
    len: 4096,
};

#[test]
fn what_somebody_changed_meanwhile_is_not_changed_again() {
    let (_directory, path) = temp();
    if !has_leases(&path) {
        return;
    }
    // Lent, or not held yet: neither knows what the file holds now.
    for lends in [true, false] {
        let file = writer(&path);
        if lends {
            assert_eq!(file.take_lease().unwrap(), Hold::Alone);
            file.lend().unwrap();
        } else {
            thread::sleep(TICK);
        }
        fs::OpenOptions::new()
            .write(true)
            .open(&path)
            .and_then(|other| std::os::unix::fs::FileExt::write_all_at(&other, &[9], 100))
            .unwrap();
        if lends {
            assert!(!file.free_lease());
        }
        assert_eq!(file.take_lease().unwrap(), Hold::Changed);
        assert!(file.write_all_at(&[5], FileOffset::new(0)).is_err());
        assert!(!file.free_lease());
    }
    // What we changed ourselves is no reason.
    let file = writer(&path);
    file.write_all_at(&[6], FileOffset::new(0)).unwrap();
    assert_eq!(file.take_lease().unwrap(), Hold::Alone);
    file.write_all_at(&[7], FileOffset::new(0)).unwrap();
    file.lend().unwrap();
    assert_eq!(file.take_lease().unwrap(), Hold::Alone);
    assert!(file.free_lease());
    file.write_all_at(&[8], FileOffset::new(0)).unwrap();
    assert!(writer_waits_for_nobody(&path));
}

fn writer_waits_for_nobody(path: &Path) -> bool {
    let begun = Instant::now();
    fs::OpenOptions::new().write(true).open(path).unwrap();
    begun.elapsed() < Duration::from_secs(1)
}

#[test]
fn this_process_does_not_wait_for_itself() {
    let (_directory, path) = temp();
    if !has_leases(&path) {
        return;
    }
    let file = writer(&path);
    assert_eq!(file.take_lease().unwrap(), Hold::Alone);
    let look = HostFile::open(&path, &READING).unwrap();
    let mut byte = [0];
    look.read_exact_at(&mut byte, FileOffset::new(5)).unwrap();
    assert_eq!(byte, [7]);
    assert!(
        look.write_all_at(&[1], FileOffset::new(5)).is_err(),
        "it is for reading"
    );
    assert!(!file.is_wanted());
    for read_only in [false, true] {
        let options = HostOptions {
            read_only,
            lock: true,
            ..READING
        };
        let error = HostFile::open(&path, &options).unwrap_err();
        assert!(matches!(error.problem(), OpenProblem::InUse(_)), "{error}");
    }
    let link = path.with_extension("link");
    std::os::unix::fs::symlink(&path, &link).unwrap();
    let no_follow = HostOptions {
        no_follow: true,
        ..READING
    };
    assert!(HostFile::open(&link, &no_follow).is_err());
    drop(file);
    // A reader that is left keeps nobody out.
    assert!(writer_waits_for_nobody(&path));
    drop(look);
    assert_eq!(writer(&path).take_lease().unwrap(), Hold::Alone);
}

#[test]
fn where_the_host_cannot_tell_the_file_must_have_been_quiet() {
    let (_directory, path) = temp();
    let quiet = Duration::from_secs(3600);
    let never = |_| false;
    let file = writer(&path);
    if has_leases(&path) {
        // Its owner, or root.
        file.claim(quiet, &never).unwrap();
        drop(file);
        let reader = File::open(&path).unwrap();
        let error = writer(&path).claim(Duration::ZERO, &never).unwrap_err();
        assert!(matches!(error, OpenProblem::InUse(_)), "{error}");
        drop(reader);
    }
    if !rustix::process::geteuid().is_root() {
        println!("skipped: only root can be another user");
        return;
    }
    let everybody = std::os::unix::fs::PermissionsExt::from_mode(0o666);
    fs::set_permissions(&path, everybody).unwrap();
    fs::set_permissions(
        _directory.path(),
        std::os::unix::fs::PermissionsExt::from_mode(0o777),
    )
    .unwrap();
    thread::spawn(move || {
        use rustix::thread::{Uid, set_thread_res_uid};
        let nobody = Uid::from_raw(65534);
        set_thread_res_uid(nobody, nobody, nobody).unwrap();
        let file = writer(&path);
        assert_eq!(file.take_lease().unwrap(), Hold::Unknown);
        let error = file.claim(quiet, &never).unwrap_err();
        assert!(error.to_string().contains("--quiet-time 0s"), "{error}");
        assert!(matches!(error, OpenProblem::NotQuiet { .. }));
        file.claim(Duration::ZERO, &never).unwrap();
        // What it does itself is no reason, what others do is.
        file.write_all_at(&[1], FileOffset::new(0)).unwrap();
        file.note(&|| false);
        thread::sleep(TICK);
        assert_eq!(file.take_lease().unwrap(), Hold::Unknown);
        fs::write(&path, [1; 4097]).unwrap();
        assert_eq!(file.take_lease().unwrap(), Hold::Changed);
    })
    .join()
    .unwrap();
}

/// Somebody who comes, and does not wait.
fn come(path: &Path) {
    let nonblock = std::os::unix::fs::OpenOptionsExt::custom_flags;
    let mut options = fs::OpenOptions::new();
    let opened = nonblock(options.write(true), nix::libc::O_NONBLOCK).open(path);
    assert_eq!(opened.unwrap_err().kind(), io::ErrorKind::WouldBlock);
}

#[test]
fn a_lease_that_was_not_looked_at_for_long_is_not_believed() {
    let (_directory, path) = temp();
    if !has_leases(&path) {
        return;
    }
    for lends in [false, true] {
        let file = writer(&path);
        assert_eq!(file.take_lease().unwrap(), Hold::Alone);
        file.write_all_at(&[1], FileOffset::new(0)).unwrap();
        // As if this process had been stopped: somebody came, was let in by Linux, and has the file now.
        come(&path);
        match &mut *file.lease.as_ref().unwrap().state.lock() {
            State::Held(held) => held.whole -= Duration::from_secs(46),
            state => panic!("{state:?}"),
        }
        if lends {
            file.lend().unwrap();
            assert_eq!(file.take_lease().unwrap(), Hold::Changed);
        }
        let error = file.set_len(0).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ResourceBusy);
        assert!(!file.may_finish());
    }
    assert_eq!(fs::metadata(&path).unwrap().len(), 4096);
    // Nor longer than half of the time after which they are let in.
    assert_eq!([0, 45, 1000].map(|it| grace(it).as_secs()), [20, 18, 20]);
    assert_eq!(grace(1).as_millis(), 400);
}

#[test]
fn a_file_that_changed_since_it_was_looked_at_is_not_changed() {
    let (_directory, path) = temp();
    for noted in [false, true] {
        let file = writer(&path);
        if noted {
            file.write_all_at(&[1], FileOffset::new(0)).unwrap();
            // By a guest that is still there.
            file.note(&|| true);
            file.write_all_at(&[2], FileOffset::new(0)).unwrap();
            file.note(&|| false);
        }
        let mut other = fs::OpenOptions::new().append(true).open(&path).unwrap();
        io::Write::write_all(&mut other, &[3; 4096]).unwrap();
        drop(other);
        let found = fs::read(&path).unwrap();
        // Nor is what it looks like now taken for what it looked like.
        file.note(&|| false);
        let error = file.set_len(0).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ResourceBusy);
        assert!(error.to_string().contains("changed"), "{error}");
        assert!(file.write_all_at(&[4], FileOffset::new(0)).is_err());
        assert!(!file.may_finish() && !file.free_lease());
        assert_eq!(fs::read(&path).unwrap(), found);
    }
    let file = writer(&path);
    file.set_len(4096).unwrap();
    file.note(&|| false);
    file.write_all_at(&[5], FileOffset::new(0)).unwrap();
}

#[test]
fn a_change_that_is_under_way_is_not_taken_for_one_of_others() {
    let (_directory, path) = temp();
    let file = writer(&path);
    file.write_all_at(&[1], FileOffset::new(0)).unwrap();
    thread::sleep(TICK);
    // Background work changes the file while the last guest's handle is dropped, which notes how it looks.
    let change = file.begin_change().unwrap();
    file.note(&|| false);
    std::os::unix::fs::FileExt::write_all_at(&*file.file, &[2], 0).unwrap();
    drop(change);
    assert!(file.may_finish());
    // A guest comes and goes; then another program does, which is not to wait for a lease.
    assert!(file.free_lease());
    file.write_all_at(&[3], FileOffset::new(0)).unwrap();
    file.note(&|| false);
    fs::write(&path, [4; 4097]).unwrap();
    assert!(!file.may_finish(), "what others change is noticed again");
}

#[test]
fn who_only_looks_does_not_wait_for_a_lease() {
    let (_directory, path) = temp();
    if !has_leases(&path) {
        return;
    }
    // Of somebody who does not give it up.
    let file = fs::File::options().write(true).open(&path).unwrap();
    sys::set_lease(&file, Kind::Write).unwrap();
    let begun = Instant::now();
    let error = Pin::file(&path).unwrap().glance().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InUse);
    assert!(begun.elapsed() < Duration::from_secs(1), "it waited");
}

#[test]
fn who_only_looks_is_never_kept_out_by_this_program() {
    let (_directory, path) = temp();
    if !has_leases(&path) {
        return;
    }
    let pin = Pin::file(&path).unwrap();
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        // Background work comes and goes.
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                let file = writer(&path);
                let _ = file.take_lease().unwrap();
            }
        });
        for look in 0..3000 {
            let looked = pin.glance();
            if let Err(error) = looked {
                done.store(true, Ordering::Relaxed);
                panic!("look {look}: {error}");
            }
        }
        done.store(true, Ordering::Relaxed);
    });
}
