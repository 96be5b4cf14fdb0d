//! One handle has the disk attached, another one compacts it: mount read-only, then optimize.

use super::*;

/// The ways to open a handle that attaches, each for a disk of its own.
fn each_attacher(test: impl Fn(&Made, &dyn Fn() -> VirtualDisk)) {
    let version_2 = |read_only| {
        Some(OpenParameters::Version2 {
            get_info_only: false,
            read_only,
        })
    };
    let ways = [
        (VIRTUAL_DISK_ACCESS_READ, None),
        (VIRTUAL_DISK_ACCESS_ALL, None),
        (VIRTUAL_DISK_ACCESS_NONE, version_2(true)),
        (VIRTUAL_DISK_ACCESS_NONE, version_2(false)),
    ];
    for (access, parameters) in ways {
        for made in Made::each() {
            test(&made, &|| {
                let unknown = VirtualStorageType::UNKNOWN;
                open_virtual_disk(&unknown, &made.path, access, 0, parameters).unwrap()
            });
        }
    }
}

fn is_loaded(disk: &VirtualDisk) -> bool {
    let asked = get_virtual_disk_information(disk, GET_VIRTUAL_DISK_INFO_IS_LOADED);
    asked == Ok(VirtualDiskInfo::IsLoaded(true))
}

fn physical_size(disk: &VirtualDisk) -> u64 {
    match get_virtual_disk_information(disk, GET_VIRTUAL_DISK_INFO_SIZE) {
        Ok(VirtualDiskInfo::Size { physical_size, .. }) => physical_size,
        other => panic!("{other:?}"),
    }
}

#[test]
fn another_handle_compacts_what_is_attached() {
    each_attacher(|made, open_to_attach| {
        let predicted = made.predicted(made.with_fs());
        let disk = open_to_attach();
        // Not before it is attached.
        assert_eq!(refused(&made.path, METAOPS), ERROR_SHARING_VIOLATION);
        attach_virtual_disk(&disk, READ_ONLY, 0).unwrap();

        let other = open(&made.path, METAOPS);
        assert_eq!(compact_virtual_disk(&other, 0, None), Ok(()));
        assert_eq!(
            made.len(),
            predicted,
            "with what its file system calls free"
        );
        assert!(is_loaded(&disk), "still");
        assert_eq!(physical_size(&disk), predicted, "as it is now");
        drop(other);
        made.verify();
        assert_eq!(detach_virtual_disk(&disk, 0, 0), Ok(()));
        assert!(!is_loaded(&disk));
        // The handle keeps others off again.
        assert_eq!(refused(&made.path, METAOPS), ERROR_SHARING_VIOLATION);
    });
}

/// One who has it attached for everything compacts it after somebody else has, which moved its blocks.
#[test]
fn no_table_is_kept_while_it_is_attached() {
    for made in Made::each() {
        let disk = open(&made.path, VIRTUAL_DISK_ACCESS_ALL);
        attach_virtual_disk(&disk, READ_ONLY, 0).unwrap();
        let other = open(&made.path, METAOPS);
        assert_eq!(compact_virtual_disk(&other, 0, None), Ok(()));
        drop(other);
        let least = made.len();
        assert_eq!(compact_virtual_disk(&disk, 0, None), Ok(()));
        assert_eq!(made.len(), least);
        drop(disk);
        assert_eq!(made.len(), least);
        made.verify();
    }
}

#[test]
fn one_of_them_at_a_time() {
    for made in Made::each() {
        let disk = open(&made.path, VIRTUAL_DISK_ACCESS_ALL);
        attach_virtual_disk(&disk, READ_ONLY, 0).unwrap();
        let violation = Err(ERROR_SHARING_VIOLATION);
        let other = open(&made.path, VIRTUAL_DISK_ACCESS_ALL);
        assert_eq!(refused(&made.path, METAOPS), ERROR_SHARING_VIOLATION);
        assert_eq!(compact_virtual_disk(&disk, 0, None), violation);
        let attached = Err(ERROR_VHD_INVALID_STATE);
        assert_eq!(attach_virtual_disk(&other, READ_ONLY, 0), attached);
        drop(other);
        assert_eq!(compact_virtual_disk(&disk, 0, None), Ok(()));
        drop(open(&made.path, METAOPS));

        // Detached while another one has the file; then it is that one's to attach.
        let other = open(&made.path, VIRTUAL_DISK_ACCESS_ALL);
        assert_eq!(detach_virtual_disk(&disk, 0, 0), Ok(()));
        assert_eq!(attach_virtual_disk(&disk, READ_ONLY, 0), violation);
        assert_eq!(attach_virtual_disk(&other, READ_ONLY, 0), Ok(()));
        assert_eq!(compact_virtual_disk(&disk, 0, None), Ok(()));
        // The end of the handle that did not attach it does not detach it.
        drop(disk);
        assert!(is_loaded(&other));
        made.verify();
    }
}

/// Other programs: a writer is kept out, and a reader keeps out who compacts.
#[test]
fn other_programs_beside_an_attached_disk() {
    for made in Made::each() {
        let disk = open(&made.path, VIRTUAL_DISK_ACCESS_READ);
        attach_virtual_disk(&disk, READ_ONLY, 0).unwrap();
        let program = |read_only| {
            let options = OpenOptions {
                read_only,
                ..OpenOptions::default()
            };
            Disk::open(&made.path, &options)
        };
        // On Windows there is no way to let in one writer alone.
        if cfg!(unix) {
            let error = program(false).unwrap_err().to_string();
            assert!(error.contains("it has the disk attached"), "{error}");
        }
        let reader = program(true).unwrap();
        assert_eq!(refused(&made.path, METAOPS), ERROR_SHARING_VIOLATION);
        drop(reader);
        drop(disk);
        drop(program(false).unwrap());
    }
}

/// The parent of an attached child is not written to meanwhile.
#[test]
fn the_parents_of_an_attached_disk_stay() {
    for made in Made::each() {
        let child = made.child();
        let disk = open(&child, VIRTUAL_DISK_ACCESS_ALL);
        attach_virtual_disk(&disk, READ_ONLY, 0).unwrap();
        assert_eq!(refused(&made.path, METAOPS), ERROR_SHARING_VIOLATION);
        let other = open(&child, METAOPS);
        assert_eq!(compact_virtual_disk(&other, 0, None), Ok(()));
        drop((other, disk));
        drop(open(&made.path, METAOPS));
    }
}

/// What was opened stays what it was, whatever takes the name of its file.
#[test]
fn the_file_is_not_taken_for_another_one() {
    for made in Made::each() {
        let disk = open(&made.path, VIRTUAL_DISK_ACCESS_ALL);
        attach_virtual_disk(&disk, READ_ONLY, 0).unwrap();
        let away = made.path.with_extension("away");
        fs::rename(&made.path, &away).unwrap();
        fs::copy(&away, &made.path).unwrap();
        let other = Err(ERROR_FILE_NOT_FOUND);
        assert_eq!(compact_virtual_disk(&disk, 0, None), other);
        fs::rename(&away, &made.path).unwrap();
        assert_eq!(compact_virtual_disk(&disk, 0, None), Ok(()));
        made.verify();
    }
}
