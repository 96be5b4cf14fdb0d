//! What only Windows has.

use std::os::windows::io::AsHandle;

use super::*;

/// A directory with `base.vhd` and its child `child.vhd`.
fn family() -> TempDir {
    let root = tempfile::tempdir().unwrap();
    let at = |name: &str| root.path().join(name);
    crate::disk::parents::builder::make_disk(&at("base.vhd"));
    crate::disk::parents::builder::make_child(&at("child.vhd"), &at("base.vhd"), "BASE.vhd");
    root
}

#[test]
fn an_open_disk_cannot_be_deleted_or_renamed() {
    let root = sample();
    let (path, other) = (root.path().join("a.vhd"), root.path().join("z.vhd"));
    let library = open(&root);
    let handle = library
        .open_disk(lookup(&library, "a.vhd.raw").node, true)
        .unwrap();
    assert!(fs::remove_file(&path).is_err());
    assert!(fs::rename(&path, &other).is_err());
    drop(handle);
    library.close();
    fs::rename(&path, &other).unwrap();
    fs::remove_file(&other).unwrap();
}

#[test]
fn names_are_found_in_any_case() {
    let root = sample();
    let library = open(&root);
    let shown = lookup(&library, "a.vhd.raw");
    let again = lookup(&library, "A.Vhd.RAW");
    assert_eq!((again.node, again.kind), (shown.node, NodeKind::Disk));
    let sub = lookup(&library, "SUB");
    assert_eq!(sub.node, lookup(&library, "sub").node);
    let disk = library.lookup(sub.node, OsStr::new("B.vhd.raw")).unwrap();
    assert!(library.open_disk(disk.node, true).is_ok());
    // The disk hides a directory of its name, however that is written.
    fs::create_dir(root.path().join("A.VHD.RAW")).unwrap();
    assert_eq!(names(&library, NodeId::ROOT), ["a.vhd.raw", "sub"]);
    assert_eq!(lookup(&library, "A.VHD.RAW").kind, NodeKind::Disk);
}

#[test]
fn no_name_leads_anywhere_else() {
    let root = sample();
    let library = open(&root);
    for name in [
        "..",
        "sub/b.VHD.raw",
        r"sub\b.VHD.raw",
        "a.vhd:stream.vhd.raw",
        "a.vhd::$DATA",
        "a.vhd.raw:x",
        "a.vhd.raw.",
        "a.vhd.raw ",
        r"C:\",
        "C:",
        "C:a.vhd.raw",
        r"\\?\C:\a.vhd.raw",
        r"\\localhost\c$",
        "NUL.vhd.raw",
        "a.vh?.raw",
        "*.vhd.raw",
    ] {
        let found = library.lookup(NodeId::ROOT, OsStr::new(name));
        let missing = matches!(found, Err(LibraryError::NotFound { .. }));
        assert!(missing, "{name}: {found:?}");
    }
}

#[test]
fn a_read_only_file_is_never_written() {
    let root = sample();
    let library = open(&root);
    let path = root.path().join("a.vhd");
    let before = fs::read(&path).unwrap();
    let mut permissions = fs::metadata(&path).unwrap().permissions();
    permissions.set_readonly(true);
    fs::set_permissions(&path, permissions.clone()).unwrap();
    let shown = lookup(&library, "a.vhd.raw");
    assert!(!is_writable(&shown));
    let refused = library.open_disk(shown.node, true);
    assert!(
        matches!(refused, Err(LibraryError::ReadOnly { .. })),
        "{refused:?}"
    );
    let handle = library.open_disk(shown.node, false).unwrap();
    assert!(handle.disk().is_read_only());
    let error = HostFile::open(&path, &HostOptions::default()).unwrap_err();
    assert!(error.to_string().contains("read-only attribute"), "{error}");
    drop(handle);
    library.close();
    assert!(fs::read(&path).unwrap() == before);
    // What is left behind must be removable.
    #[expect(
        clippy::permissions_set_readonly_false,
        reason = "there is no world to write it"
    )]
    permissions.set_readonly(false);
    fs::set_permissions(&path, permissions).unwrap();
}

#[test]
fn what_is_shown_of_a_file_is_its_own() {
    let root = sample();
    let library = open(&root);
    let host = fs::metadata(root.path().join("a.vhd")).unwrap();
    let shown = lookup(&library, "a.vhd.raw");
    assert_eq!(shown.size, SIZE);
    assert!(
        shown.allocated > 0 && shown.allocated < 1 << 20,
        "{shown:?}"
    );
    assert_eq!(shown.modified, host.modified().unwrap());
    assert_eq!(shown.created, host.created().unwrap());
    let descriptor = library.security_descriptor(shown.node).unwrap();
    // Revision 1, self-relative.
    assert_eq!((descriptor[0], descriptor[3] & 0x80), (1, 0x80));
    let open = library.open_disk(shown.node, true).unwrap();
    assert_eq!(library.security_descriptor(shown.node).unwrap(), descriptor);
    drop(open);
    assert!(
        !library
            .security_descriptor(NodeId::ROOT)
            .unwrap()
            .is_empty()
    );
    assert!(library.space().unwrap().blocks > 0);
}

#[test]
fn users_get_what_they_may_read() {
    let root = family();
    let library = open(&root);
    let node = lookup(&library, "CHILD.vhd.raw").node;
    let user = User::from_token(own_token().as_handle()).unwrap();
    let disk = library.open_disk_for(node, true, &user).unwrap();
    assert_eq!(disk.disk().chain_len(), 2);
    drop(disk);
    assert!(!user.may_read(&root.path().join("none.vhd"), root.path()));
    assert!(
        User::from_token(
            fs::File::open(root.path().join("base.vhd"))
                .unwrap()
                .as_handle()
        )
        .is_err()
    );
}

fn own_token() -> std::os::windows::io::OwnedHandle {
    crate::storage::host::windows::sys::own_token().unwrap()
}
