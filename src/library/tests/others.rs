//! Programs that take no lock, under an open library.

use super::*;
use crate::error::ErrorKind;

fn outsider(path: &Path) -> fs::File {
    fs::File::options()
        .read(true)
        .write(true)
        .open(path)
        .unwrap()
}

/// Whether leases can be had where tests have their files.
fn has_leases(path: &Path) -> bool {
    let file = HostFile::open(path, &HostOptions::default()).unwrap();
    let has = file.take_lease().unwrap() == crate::storage::host::Hold::Alone;
    if !has {
        println!("skipped: no leases in the temporary directory");
    }
    has
}

fn refused(library: &Library, node: NodeId) -> String {
    match library.open_disk(node, true) {
        Err(LibraryError::Unopenable {
            reason,
            kind: ErrorKind::InUse,
            ..
        }) => reason,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_guest_shares_no_disk_with_a_program_that_writes_to_its_file() {
    let root = sample();
    let path = root.path().join("a.vhd");
    if !has_leases(&path) {
        return;
    }
    let library = open(&root);
    let node = lookup(&library, "a.vhd.raw").node;
    let file = outsider(&path);
    let before = fs::read(&path).unwrap();
    let guest = library.open_disk(node, false).unwrap();
    assert!(library.disk_status(node).unwrap().read_only);
    drop(guest);
    let reason = refused(&library, node);
    assert!(reason.contains("in use by another program"), "{reason}");
    assert_eq!(fs::read(&path).unwrap(), before);
    drop(file);
    let guest = library.open_disk(node, true).unwrap();
    guest.disk().write_at(b"ours", 0).unwrap();
    // A program that comes now is neither kept waiting nor noticed: the disk is the guest's.
    drop(outsider(&path));
    guest.disk().write_at(b"mine", 0).unwrap();
}

#[test]
fn guests_that_come_at_once_get_a_disk_that_another_program_has_left() {
    let root = sample();
    let path = root.path().join("a.vhd");
    if !has_leases(&path) {
        return;
    }
    let library = open(&root);
    let node = lookup(&library, "a.vhd.raw").node;
    for _ in 0..10 {
        let file = outsider(&path);
        drop(library.open_disk(node, false).unwrap());
        assert!(library.disk_status(node).unwrap().read_only);
        drop(file);
        let open = || library.open_disk(node, true).unwrap();
        std::thread::scope(|scope| {
            let guests: Vec<_> = (0..4).map(|_| scope.spawn(open)).collect();
            let handles: Vec<_> = guests.into_iter().map(|guest| guest.join()).collect();
            assert!(handles.iter().all(|handle| handle.is_ok()));
        });
        library
            .core
            .disks
            .all()
            .iter()
            .for_each(|disk| disk.give_way());
        eventually("it is closed", || library.status().is_empty());
    }
}

#[test]
fn a_disk_that_others_changed_while_it_was_read_is_not_written() {
    let root = sample();
    let path = root.path().join("a.vhd");
    if !has_leases(&path) {
        return;
    }
    let library = open(&root);
    let node = lookup(&library, "a.vhd.raw").node;
    let guest = library.open_disk(node, false).unwrap();
    let file = outsider(&path);
    file.set_modified(SystemTime::UNIX_EPOCH).unwrap();
    drop(file);
    let reason = refused(&library, node);
    assert!(reason.contains("close it there"), "{reason}");
    let before = fs::read(&path).unwrap();
    drop(guest);
    assert_eq!(fs::read(&path).unwrap(), before, "closing it changed it");
    // Opened anew, it is what it is now.
    library.open_disk(node, true).unwrap();
}

#[test]
fn what_others_do_to_a_disk_once_its_guest_is_gone_is_not_cut_off() {
    let root = sample();
    let path = root.path().join("a.vhd");
    if !has_leases(&path) {
        return;
    }
    // Whether the other program comes while the guest is there, and whether it is still there in the end.
    for (is_early, stays) in [(true, true), (false, true), (false, false)] {
        let library = open(&root);
        let node = lookup(&library, "a.vhd.raw").node;
        let guest = library.open_disk(node, true).unwrap();
        guest.disk().write_at(b"ours", 0).unwrap();
        // What its end is made of is free again.
        guest.disk().write_at(&[1; 4 << 20], 2 << 20).unwrap();
        guest.disk().discard(2 << 20, 4 << 20).unwrap();
        guest.disk().flush().unwrap();
        let end = fs::metadata(&path).unwrap().len();
        let mut guest = Some(guest);
        if !is_early {
            guest = None;
        }
        let other = outsider(&path);
        let more = vec![9; 1 << 20];
        std::os::unix::fs::FileExt::write_all_at(&other, &more, end).unwrap();
        drop(guest);
        let other = stays.then_some(other);
        let found = fs::read(&path).unwrap();
        library.close();
        assert!(fs::read(&path).unwrap() == found, "{is_early}, {stays}");
        drop(other);
        let file = fs::File::options().write(true).open(&path).unwrap();
        file.set_len(end).unwrap();
    }
}

#[test]
fn children_made_while_others_have_the_file_still_fit() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("a.vhdx");
    let format = crate::disk::Format::Vhdx;
    let options = CreateOptions::new(format, crate::disk::DiskType::Dynamic, SIZE);
    create(&path, &options).unwrap();
    if !has_leases(&path) {
        return;
    }
    let library = open(&root);
    let node = lookup(&library, "a.vhdx.raw").node;
    let guest = library.open_disk(node, true).unwrap();
    guest.disk().write_at(b"ours", 0).unwrap();
    drop(guest);
    let disk = library.core.disks.all().pop().unwrap();
    assert!(disk.has_new_identity());
    assert_eq!(disk.take(), crate::storage::host::Hold::Alone);
    disk.let_in();
    assert!(!disk.has_new_identity());
}
