//! Opening, attaching, and what a handle tells.

use super::*;

#[test]
fn open_refuses_what_its_page_names() {
    let made = Made::new("vhd");
    let open = |access, flags| {
        let unknown = VirtualStorageType::UNKNOWN;
        open_virtual_disk(&unknown, &made.path, access, flags, None).map(|_| ())
    };
    let invalid = Err(ERROR_INVALID_PARAMETER);
    for access in [1, 0x0040_0000, METAOPS | 2, u32::MAX] {
        assert_eq!(open(access, 0), invalid, "{access:#x}");
    }
    for flags in [
        OPEN_VIRTUAL_DISK_FLAG_BLANK_FILE,
        OPEN_VIRTUAL_DISK_FLAG_BOOT_DRIVE,
        OPEN_VIRTUAL_DISK_FLAG_CUSTOM_DIFF_CHAIN,
        OPEN_VIRTUAL_DISK_FLAG_VHDSET_FILE_ONLY,
        0x1000,
        u32::MAX,
    ] {
        assert_eq!(open(METAOPS, flags), invalid, "{flags:#x}");
    }
    for flags in [
        OPEN_VIRTUAL_DISK_FLAG_NO_PARENTS,
        OPEN_VIRTUAL_DISK_FLAG_CACHED_IO,
        OPEN_VIRTUAL_DISK_FLAG_PARENT_CACHED_IO,
        OPEN_VIRTUAL_DISK_FLAG_NO_WRITE_HARDENING,
        OPEN_VIRTUAL_DISK_FLAG_SUPPORT_COMPRESSED_VOLUMES
            | OPEN_VIRTUAL_DISK_FLAG_SUPPORT_SPARSE_FILES_ANY_FS
            | OPEN_VIRTUAL_DISK_FLAG_SUPPORT_ENCRYPTED_FILES,
        OPEN_VIRTUAL_DISK_FLAG_IGNORE_RELATIVE_PARENT_LOCATOR,
        // As go-winio opens.
        OPEN_VIRTUAL_DISK_FLAG_CACHED_IO | OPEN_VIRTUAL_DISK_FLAG_IGNORE_RELATIVE_PARENT_LOCATOR,
    ] {
        assert_eq!(open(METAOPS, flags), Ok(()), "{flags:#x}");
    }
}

#[test]
fn storage_types() {
    let folder = tempfile::tempdir().unwrap();
    let open = |storage_type: &VirtualStorageType, name: &str| {
        let path = folder.path().join(name);
        open_virtual_disk(storage_type, &path, METAOPS, 0, None).map(|_| ())
    };
    let other = |device_id| VirtualStorageType {
        device_id,
        ..VirtualStorageType::VHD
    };
    let vendor = VirtualStorageType {
        vendor_id: uuid::Uuid::from_u128(1),
        ..VirtualStorageType::VHD
    };
    for (name, own, foreign, wrong) in [
        (
            "a.vhd",
            VirtualStorageType::VHD,
            VirtualStorageType::VHDX,
            ERROR_FILE_CORRUPT,
        ),
        (
            "a.vhdx",
            VirtualStorageType::VHDX,
            VirtualStorageType::VHD,
            ERROR_VHD_DRIVE_FOOTER_MISSING,
        ),
    ] {
        let path = folder.path().join(name);
        let options = CreateOptions::new(format_of(&path), DiskType::Dynamic, 4 * MB);
        create(&path, &options).unwrap();
        for known in [&own, &VirtualStorageType::UNKNOWN] {
            assert_eq!(open(known, name), Ok(()));
        }
        assert_eq!(open(&foreign, name), Err(wrong));
        let none = Err(ERROR_VIRTDISK_PROVIDER_NOT_FOUND);
        for unknown in [
            other(VIRTUAL_STORAGE_TYPE_DEVICE_ISO),
            other(VIRTUAL_STORAGE_TYPE_DEVICE_VHDSET),
            other(99),
            vendor,
        ] {
            assert_eq!(open(&unknown, name), none, "{unknown:?}");
        }
    }
}

#[test]
fn files_that_cannot_be_opened() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    assert_eq!(refused(&path("none.vhd"), METAOPS), ERROR_FILE_NOT_FOUND);
    let nowhere = path("none").join("none.vhd");
    assert_eq!(refused(&nowhere, METAOPS), ERROR_PATH_NOT_FOUND);
    assert_eq!(refused(folder.path(), METAOPS), ERROR_ACCESS_DENIED);
    let long = path(&"x".repeat(300));
    // Windows says that it is no name, Wine that there is none.
    let refusal = refused(&long, METAOPS);
    assert!(cfg!(windows) || refusal == ERROR_FILENAME_EXCED_RANGE);

    for name in ["junk.vhd", "junk.vhdx", "junk.img", "empty.vhd"] {
        let bytes = match name {
            "empty.vhd" => Vec::new(),
            _ => vec![0x5a; 2 << 20],
        };
        fs::write(path(name), bytes).unwrap();
    }
    let missing = ERROR_VHD_DRIVE_FOOTER_MISSING;
    assert_eq!(refused(&path("junk.vhd"), METAOPS), missing);
    assert_eq!(refused(&path("empty.vhd"), METAOPS), missing);
    assert_eq!(refused(&path("junk.vhdx"), METAOPS), ERROR_FILE_CORRUPT);
    let unknown = ERROR_VIRTDISK_PROVIDER_NOT_FOUND;
    assert_eq!(refused(&path("junk.img"), METAOPS), unknown);
}

#[test]
fn damaged_files() {
    // The block table's first entry leads beyond the end of the file.
    let made = Made::new("vhd");
    let mut bytes = fs::read(&made.path).unwrap();
    let table = bytes[512 + 16..512 + 24].try_into().unwrap();
    let table = usize::try_from(u64::from_be_bytes(table)).unwrap();
    bytes[table..table + 4].copy_from_slice(&0x00ff_ffff_u32.to_be_bytes());
    fs::write(&made.path, bytes).unwrap();
    let damaged = refused(&made.path, METAOPS);
    assert_eq!(damaged, ERROR_VHD_BLOCK_ALLOCATION_TABLE_CORRUPT);

    // Both headers.
    let made = Made::new("vhdx");
    let mut bytes = fs::read(&made.path).unwrap();
    bytes[64 << 10..192 << 10].fill(0x5a);
    fs::write(&made.path, bytes).unwrap();
    assert_eq!(refused(&made.path, METAOPS), ERROR_FILE_CORRUPT);
    assert_eq!(
        refused(&made.path, VIRTUAL_DISK_ACCESS_GET_INFO),
        ERROR_FILE_CORRUPT
    );
}

#[test]
fn parents_that_are_not_there_or_others() {
    for made in Made::each() {
        let child = made.child();
        let away = made.path.with_extension("away");
        fs::rename(&made.path, &away).unwrap();
        let missing = ERROR_VHD_PARENT_VHD_NOT_FOUND;
        assert_eq!(refused(&child, METAOPS), missing);
        assert_eq!(refused(&child, VIRTUAL_DISK_ACCESS_GET_INFO), missing);

        // Without its parent it can still be asked what it is, and nothing else.
        let flags = OPEN_VIRTUAL_DISK_FLAG_NO_PARENTS;
        let access = VIRTUAL_DISK_ACCESS_ALL;
        let unknown = VirtualStorageType::UNKNOWN;
        let alone = open_virtual_disk(&unknown, &child, access, flags, None).unwrap();
        let asked = get_virtual_disk_information(&alone, GET_VIRTUAL_DISK_INFO_PARENT_LOCATION);
        let Ok(VirtualDiskInfo::ParentLocation {
            resolved: false,
            locations,
        }) = asked
        else {
            panic!("{asked:?}");
        };
        let name = made.path.file_name().unwrap().to_str().unwrap();
        assert!(locations.iter().any(|path| path.ends_with(name)));
        let not_now = Err(ERROR_VHD_INVALID_STATE);
        assert_eq!(compact_virtual_disk(&alone, 0, None), not_now);
        assert_eq!(attach_virtual_disk(&alone, READ_ONLY, 0), not_now);
        drop(alone);

        let options = CreateOptions::new(format_of(&made.path), DiskType::Dynamic, DISK);
        create(&made.path, &options).unwrap();
        let mismatch = ERROR_VHD_CHILD_PARENT_ID_MISMATCH;
        assert_eq!(refused(&child, METAOPS), mismatch);

        // In use, for writing.
        fs::rename(&away, &made.path).unwrap();
        let writer = Disk::open(&made.path, &OpenOptions::default()).unwrap();
        assert_eq!(refused(&child, METAOPS), ERROR_SHARING_VIOLATION);
        drop(writer);
        drop(open(&child, METAOPS));
    }
}

/// With the flag, a parent that only a relative path leads to is not found.
#[test]
fn relative_paths_to_parents_are_left_out_on_request() {
    for made in Made::each() {
        let child = made.child();
        let flags = OPEN_VIRTUAL_DISK_FLAG_IGNORE_RELATIVE_PARENT_LOCATOR;
        for access in [METAOPS, VIRTUAL_DISK_ACCESS_GET_INFO] {
            let open = |flags| {
                let unknown = VirtualStorageType::UNKNOWN;
                open_virtual_disk(&unknown, &child, access, flags, None).map(|_| ())
            };
            assert_eq!(open(0), Ok(()));
            assert_eq!(open(flags), Err(ERROR_VHD_PARENT_VHD_NOT_FOUND));
        }
    }
}

#[test]
fn attaching() {
    for made in Made::each() {
        let attach = |disk: &VirtualDisk, flags| attach_virtual_disk(disk, flags, 0);
        let denied = Err(ERROR_ACCESS_DENIED);
        let disk = open(&made.path, METAOPS | VIRTUAL_DISK_ACCESS_DETACH);
        assert_eq!(attach(&disk, READ_ONLY), denied);
        drop(disk);

        let disk = open(&made.path, METAOPS | VIRTUAL_DISK_ACCESS_ATTACH_RO);
        let not_supported = Err(ERROR_NOT_SUPPORTED);
        assert_eq!(attach(&disk, ATTACH_VIRTUAL_DISK_FLAG_NONE), not_supported);
        let permanent = READ_ONLY | ATTACH_VIRTUAL_DISK_FLAG_PERMANENT_LIFETIME;
        assert_eq!(attach(&disk, permanent), not_supported);
        let invalid = Err(ERROR_INVALID_PARAMETER);
        for flags in [0x40, 0x80, 0x400, u32::MAX] {
            assert_eq!(attach(&disk, READ_ONLY | flags), invalid);
        }
        assert_eq!(attach_virtual_disk(&disk, READ_ONLY, 1), invalid);
        assert_eq!(attach(&disk, 0x3b), Ok(()));
        assert_eq!(attach(&disk, READ_ONLY), Err(ERROR_VHD_INVALID_STATE));
        assert_eq!(detach_virtual_disk(&disk, 0, 0), denied);

        let other = open(
            &made.path,
            VIRTUAL_DISK_ACCESS_DETACH | VIRTUAL_DISK_ACCESS_GET_INFO,
        );
        let loaded = || get_virtual_disk_information(&other, GET_VIRTUAL_DISK_INFO_IS_LOADED);
        assert_eq!(loaded(), Ok(VirtualDiskInfo::IsLoaded(true)));
        assert_eq!(detach_virtual_disk(&other, 1, 0), invalid);
        assert_eq!(detach_virtual_disk(&other, 0, 1), invalid);
        assert_eq!(detach_virtual_disk(&other, 0, 0), Ok(()));
        assert_eq!(loaded(), Ok(VirtualDiskInfo::IsLoaded(false)));
        let again = detach_virtual_disk(&other, 0, 0);
        assert_eq!(again, Err(ERROR_NOT_READY));

        // The handle's end detaches it.
        assert_eq!(attach(&disk, READ_ONLY), Ok(()));
        drop(disk);
        assert_eq!(loaded(), Ok(VirtualDiskInfo::IsLoaded(false)));
        assert_eq!(attach(&open(&made.path, ATTACHABLE), READ_ONLY), Ok(()));
    }
}

/// How deep it may be written to matters to differencing disks alone, as with the Virtual Disk Service.
#[test]
fn version_1_parameters() {
    for made in Made::each() {
        let child = made.child();
        let open = |path: &Path, rw_depth| {
            let parameters = OpenParameters::Version1 { rw_depth };
            let unknown = VirtualStorageType::UNKNOWN;
            open_virtual_disk(&unknown, path, METAOPS, 0, Some(parameters)).unwrap()
        };
        for rw_depth in [0, OPEN_VIRTUAL_DISK_RW_DEPTH_DEFAULT, 7] {
            let disk = open(&made.path, rw_depth);
            assert_eq!(compact_virtual_disk(&disk, 0, None), Ok(()));
            drop(disk);
            let disk = open(&child, rw_depth);
            let wanted = match rw_depth {
                0 => Err(ERROR_ACCESS_DENIED),
                _ => Ok(()),
            };
            assert_eq!(compact_virtual_disk(&disk, 0, None), wanted, "{rw_depth}");
        }
        made.verify_all();
    }
}

/// With version 2 the mask is none, and the parameters say what the handle is for.
#[test]
fn version_2_parameters() {
    for made in Made::each() {
        let try_open = |access, get_info_only, read_only| {
            let parameters = Some(OpenParameters::Version2 {
                get_info_only,
                read_only,
            });
            let unknown = VirtualStorageType::UNKNOWN;
            open_virtual_disk(&unknown, &made.path, access, 0, parameters)
        };
        let none = VIRTUAL_DISK_ACCESS_NONE;
        let open = |get_info_only, read_only| try_open(none, get_info_only, read_only).unwrap();
        let denied = Err(ERROR_ACCESS_DENIED);
        let disk = open(true, false);
        assert_eq!(compact_virtual_disk(&disk, 0, None), denied);
        assert_eq!(attach_virtual_disk(&disk, READ_ONLY, 0), denied);
        assert!(get_virtual_disk_information(&disk, GET_VIRTUAL_DISK_INFO_SIZE).is_ok());
        drop(disk);
        let disk = open(false, true);
        assert_eq!(attach_virtual_disk(&disk, READ_ONLY, 0), Ok(()));
        assert_eq!(compact_virtual_disk(&disk, 0, None), denied);
        drop(disk);
        for mask in [VIRTUAL_DISK_ACCESS_GET_INFO, VIRTUAL_DISK_ACCESS_ALL] {
            let masked = try_open(mask, false, false).err();
            assert_eq!(masked, Some(ERROR_INVALID_PARAMETER));
        }
        made.verify_all();
        let predicted = made.predicted(made.with_fs());
        let disk = open(false, false);
        assert_eq!(attach_virtual_disk(&disk, READ_ONLY, 0), Ok(()));
        assert_eq!(compact_virtual_disk(&disk, 0, None), Ok(()));
        drop(disk);
        assert_eq!(made.len(), predicted);
        made.verify();
    }
}

#[test]
fn information() {
    for made in Made::each() {
        let child = made.child();
        let ask = |path: &Path, version| {
            let disk = open(path, VIRTUAL_DISK_ACCESS_GET_INFO);
            get_virtual_disk_information(&disk, version)
        };
        let Ok(VirtualDiskInfo::Size {
            virtual_size,
            physical_size,
            block_size,
            sector_size,
        }) = ask(&made.path, GET_VIRTUAL_DISK_INFO_SIZE)
        else {
            panic!("no sizes");
        };
        assert_eq!((virtual_size, physical_size), (DISK, made.len()));
        assert_eq!((block_size, sector_size), (1 << 20, 512));
        let storage_type = match format_of(&made.path) {
            Format::Vhd => VirtualStorageType::VHD,
            _ => VirtualStorageType::VHDX,
        };
        let version = GET_VIRTUAL_DISK_INFO_VIRTUAL_STORAGE_TYPE;
        let wanted = VirtualDiskInfo::StorageType(storage_type);
        assert_eq!(ask(&made.path, version), Ok(wanted));
        let version = GET_VIRTUAL_DISK_INFO_PROVIDER_SUBTYPE;
        let subtypes = [(&made.path, 3), (&child, 4)];
        for (path, subtype) in subtypes {
            let wanted = VirtualDiskInfo::ProviderSubtype(subtype);
            assert_eq!(ask(path, version), Ok(wanted));
        }
        let version = GET_VIRTUAL_DISK_INFO_VHD_PHYSICAL_SECTOR_SIZE;
        assert!(matches!(
            ask(&made.path, version),
            Ok(VirtualDiskInfo::PhysicalSectorSize(512 | 4096))
        ));

        // A child names its parent by the identifier that the parent has.
        let own = ask(&made.path, GET_VIRTUAL_DISK_INFO_IDENTIFIER);
        let Ok(VirtualDiskInfo::Identifier(id)) = own else {
            panic!("{own:?}");
        };
        let parent = ask(&child, GET_VIRTUAL_DISK_INFO_PARENT_IDENTIFIER);
        assert_eq!(parent, Ok(VirtualDiskInfo::ParentIdentifier(id)));
        let found = ask(&child, GET_VIRTUAL_DISK_INFO_PARENT_LOCATION);
        let Ok(VirtualDiskInfo::ParentLocation {
            resolved: true,
            locations,
        }) = found
        else {
            panic!("{found:?}");
        };
        let real = vhdfs::storage::host::paths::canonical(&made.path).unwrap();
        assert_eq!(locations, [real.to_str().unwrap()]);
        for version in [
            GET_VIRTUAL_DISK_INFO_PARENT_LOCATION,
            GET_VIRTUAL_DISK_INFO_PARENT_IDENTIFIER,
        ] {
            let asked = ask(&made.path, version);
            assert_eq!(asked, Err(ERROR_VHD_INVALID_TYPE));
        }

        for version in [0, 16, u32::MAX] {
            let asked = ask(&made.path, version);
            assert_eq!(asked, Err(ERROR_INVALID_PARAMETER), "{version}");
        }
        for version in [5, 8, 9, 11, 12, 14, 15] {
            let asked = ask(&made.path, version);
            assert_eq!(asked, Err(ERROR_NOT_SUPPORTED), "{version}");
        }
        let disk = open(&made.path, ATTACHABLE);
        let asked = get_virtual_disk_information(&disk, GET_VIRTUAL_DISK_INFO_SIZE);
        assert_eq!(asked, Err(ERROR_ACCESS_DENIED));
    }
}
