mod named;

use std::fs;

use tempfile::TempDir;

use super::builder::{identity_of, make_child, make_child_of, make_disk};
use super::*;
use crate::error::ErrorKind;
use crate::format::parent::Identity;

const READ_ONLY: OpenOptions = OpenOptions {
    read_only: true,
    lock: true,
    punch_holes: true,
};

fn folder() -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = paths::canonical(folder.path()).unwrap();
    (folder, path)
}

fn open(path: &Path) -> Arc<Disk> {
    Disk::open(path, &READ_ONLY).unwrap_or_else(|error| panic!("{error}"))
}

fn refused(path: &Path) -> (ErrorKind, String) {
    let refused = |options| Disk::open(path, &options).expect_err("refused");
    let before = fs::read(path).unwrap();
    let (error, written) = (refused(READ_ONLY), refused(OpenOptions::default()));
    assert_eq!(error.kind(), written.kind());
    assert!(fs::read(path).unwrap() == before, "a refused file changed");
    (error.kind(), error.to_string())
}

#[test]
fn a_chain_is_found_from_each_file_to_the_next() {
    let (_folder, top) = folder();
    fs::create_dir_all(top.join("a/b")).unwrap();
    let names = ["base.vhd", "a/one.vhd", "a/b/two.vhd", "three.vhd"];
    let paths = names.map(|name| top.join(name));
    make_disk(&paths[0]);
    Disk::open(&paths[0], &OpenOptions::default())
        .unwrap()
        .write_at(b"from the base", 4096)
        .unwrap();
    make_child(&paths[1], &paths[0], r"..\base.vhd");
    make_child(&paths[2], &paths[1], r"..\one.vhd");
    make_child(&paths[3], &paths[2], r".\a\b\two.vhd");
    let disk = open(&paths[3]);
    assert_eq!(disk.chain_len(), 4);
    let ancestors = std::iter::successors(Some(&disk), |disk| disk.parent());
    let found: Vec<_> = ancestors.map(|disk| disk.path().to_owned()).collect();
    assert_eq!(found, [&*paths[3], &*paths[2], &*paths[1], &*paths[0]]);
    let mut text = [0; 13];
    disk.read_at(&mut text, 4096).unwrap();
    assert_eq!(&text, b"from the base");

    drop(disk);

    // From its own directory alone, `..` leads out.
    let (kind, text) = refused(&paths[2]);
    assert_eq!(kind, ErrorKind::ParentMissing);
    let wanted = format!("--parent-dir {}", top.join("a").display());
    assert!(
        text.contains(&wanted) && text.contains(r"..\one.vhd"),
        "{text}"
    );
    let allowed = HostParents::beside(&paths[2], std::slice::from_ref(&top));
    let disk = Disk::open_with(&paths[2], &READ_ONLY, &allowed).unwrap();
    assert_eq!(disk.chain_len(), 3);
}

#[test]
fn a_moved_parent_is_found_by_the_rest_of_its_path() {
    let (_folder, top) = folder();
    fs::create_dir_all(top.join("VMs")).unwrap();
    let (parent, child) = (top.join("VMs/Base.vhd"), top.join("child.vhd"));
    make_disk(&parent);
    let id = identity_of(&parent);
    make_child_of(
        &child,
        id,
        &[(b"W2ru", r"..\old\none.vhd"), (b"W2ku", r"D:\vms\base.vhd")],
    );
    assert_eq!(open(&child).parent().unwrap().path(), parent);
    // A disk of the same name that is not the one does not keep the right one from being found.
    make_disk(&top.join("base.vhd"));
    fs::remove_file(&child).unwrap();
    make_child_of(
        &child,
        id,
        &[(b"W2ku", r"D:\base.vhd"), (b"W2ku", r"E:\VMs\base.vhd")],
    );
    assert_eq!(open(&child).parent().unwrap().path(), parent);
}

#[test]
fn another_disk_is_no_parent() {
    let (_folder, top) = folder();
    let (parent, child) = (top.join("base.vhd"), top.join("child.vhd"));
    make_disk(&parent);
    make_child(&child, &parent, r".\base.vhd");
    let right = Identity::Vhd(identity_of(&parent)).to_string();
    fs::remove_file(&parent).unwrap();
    let (kind, text) = refused(&child);
    assert_eq!(kind, ErrorKind::ParentMissing);
    assert!(
        text.contains(parent.to_str().unwrap()) && text.contains("--parent-dir"),
        "{text}"
    );

    make_disk(&parent);
    let wrong = Identity::Vhd(identity_of(&parent)).to_string();
    let (kind, text) = refused(&child);
    assert_eq!(kind, ErrorKind::ParentMismatch);
    for part in [
        &right,
        &wrong,
        parent.to_str().unwrap(),
        child.to_str().unwrap(),
    ] {
        assert!(text.contains(part), "{text}");
    }

    // A name alone accuses nobody.
    fs::create_dir(top.join("sub")).unwrap();
    let other = top.join("sub/other.vhd");
    make_child_of(
        &other,
        [3; 16],
        &[
            (b"W2ru", r"..\sub\gone\child.vhd"),
            (b"W2ku", r"D:\other.vhd"),
        ],
    );
    make_child_of(&top.join("sub/child.vhd"), [4; 16], &[]);
    let (kind, text) = refused(&other);
    assert_eq!(kind, ErrorKind::ParentMissing);
    let text = text.replace('\\', "/");
    assert!(text.contains("sub/child.vhd: another disk"), "{text}");

    fs::write(&parent, [1; 4096]).unwrap();
    let (kind, text) = refused(&child);
    assert_eq!(kind, ErrorKind::ParentMissing);
    assert!(text.contains("base.vhd: not a VHD"), "{text}");
}

#[cfg(unix)]
#[test]
fn a_link_to_a_child_leads_to_where_it_really_is() {
    let (_folder, top) = folder();
    fs::create_dir(top.join("sub")).unwrap();
    make_disk(&top.join("sub/base.vhd"));
    make_child(
        &top.join("sub/child.vhd"),
        &top.join("sub/base.vhd"),
        "base.vhd",
    );
    std::os::unix::fs::symlink("sub/child.vhd", top.join("link.vhd")).unwrap();
    let disk = open(&top.join("link.vhd"));
    assert_eq!(disk.parent().unwrap().path(), top.join("sub/base.vhd"));
}

#[test]
fn a_parent_in_use_is_told_apart() {
    let (_folder, top) = folder();
    let (parent, child) = (top.join("base.vhd"), top.join("child.vhd"));
    make_disk(&parent);
    make_child(&child, &parent, "base.vhd");
    let writer = Disk::open(&parent, &OpenOptions::default()).unwrap();
    let (kind, text) = refused(&child);
    assert_eq!(kind, ErrorKind::InUse);
    assert!(text.contains("base.vhd is open for writing"), "{text}");
    drop(writer);
    let child = open(&child);
    let error = Disk::open(&parent, &OpenOptions::default()).expect_err("it is a parent in use");
    assert_eq!(error.kind(), ErrorKind::InUse);
    assert!(Disk::open(&parent, &READ_ONLY).is_ok());
    drop(child);
    assert!(Disk::open(&parent, &OpenOptions::default()).is_ok());
    // A look without a lock is always possible.
    let look = OpenOptions {
        lock: false,
        ..READ_ONLY
    };
    let _writer = Disk::open(&parent, &OpenOptions::default()).unwrap();
    assert!(Disk::open(&top.join("child.vhd"), &look).is_ok());
}

#[test]
fn circles_and_endless_chains_end() {
    let (_folder, top) = folder();
    let name = |n: usize| top.join(format!("{n}.vhd"));
    make_disk(&name(0));
    for n in 1..=MAX_CHAIN_LEN {
        make_child(&name(n), &name(n - 1), &format!("{}.vhd", n - 1));
    }
    assert_eq!(open(&name(MAX_CHAIN_LEN - 1)).chain_len(), MAX_CHAIN_LEN);
    let (kind, text) = refused(&name(MAX_CHAIN_LEN));
    assert_eq!(kind, ErrorKind::Incompatible);
    assert!(text.contains("at most 128") && text.len() < 300, "{text}");

    let (one, two, own) = (
        top.join("one.vhd"),
        top.join("two.vhd"),
        top.join("own.vhd"),
    );
    make_child_of(&one, [1; 16], &[(b"W2ru", "two.vhd")]);
    make_child(&two, &one, "one.vhd");
    set_parent(&one, identity_of(&two));
    let error = Disk::open(&one, &READ_ONLY).expect_err("a circle");
    assert!(error.to_string().contains("circle"), "{error}");
    make_child_of(&own, [1; 16], &[(b"W2ru", "own.vhd")]);
    set_parent(&own, identity_of(&own));
    let error = Disk::open(&own, &READ_ONLY).expect_err("its own parent");
    assert!(error.to_string().contains("circle"), "{error}");
    // Our own lock on it is nobody else's.
    for file in [&one, &own] {
        let error = Disk::open(file, &OpenOptions::default()).expect_err("a circle");
        assert!(error.to_string().contains("circle"), "{error}");
    }
}

#[test]
fn open_parents_are_shared() {
    let (_folder, top) = folder();
    let base = top.join("base.vhd");
    make_disk(&base);
    for name in ["one.vhd", "two.vhd"] {
        make_child(&top.join(name), &base, "base.vhd");
    }
    let mut scope = Scope::new();
    scope.add(&top).unwrap();
    let parents = HostParents::within(scope);
    let open = |name: &str| {
        let file = HostFile::open(&top.join(name), &HostOptions::default()).unwrap();
        let options = OpenOptions::default();
        Disk::open_storage_with(Arc::new(file), Path::new(name), &options, &parents).unwrap()
    };
    let (one, two) = (open("one.vhd"), open("two.vhd"));
    assert!(Arc::ptr_eq(one.parent().unwrap(), two.parent().unwrap()));
    drop((one, two));
    assert!(
        Disk::open(&base, &OpenOptions::default()).is_ok(),
        "closed with its last child"
    );
}

#[test]
fn text_from_an_image_is_shown_without_control_characters() {
    let (_folder, top) = folder();
    let child = top.join("child.vhd");
    make_child_of(&child, [1; 16], &[(b"W2ru", "\u{1b}[31m\n.vhd")]);
    let (_, text) = refused(&child);
    assert!(
        text.contains(r"\u{1b}[31m\u{a}.vhd") && !text.contains('\u{1b}'),
        "{text}"
    );
}

#[test]
fn a_path_from_an_image_is_not_advised_where_that_does_harm() {
    let (_folder, top) = folder();
    for (n, (hostile, harm)) in [
        (r"\x.vhd", "--parent-dir / "),
        (r"\x.vhd", r"--parent-dir C:\ "),
        (r"C:\x.vhd", "--parent-dir / "),
        (r"C:\x.vhd", r"--parent-dir C:\ "),
        (r"\\nas\vms\x.vhd", r"--parent-dir \\nas\vms "),
        (r"\srv\$(reboot)\x.vhd", "--parent-dir /srv/$"),
        (r"\srv\a b; reboot\x.vhd", "--parent-dir /srv/a b"),
        (r"\srv\a b; reboot\x.vhd", r"srv\a b; reboot allows"),
    ]
    .into_iter()
    .enumerate()
    {
        let child = top.join(format!("{n}.vhd"));
        make_child_of(&child, [1; 16], &[(b"W2ku", hostile)]);
        let (_, text) = refused(&child);
        assert!(!text.contains(harm), "{text}");
        assert!(text.contains("--parent-dir DIR"), "{text}");
    }
    let child = top.join("fair.vhd");
    make_child_of(&child, [1; 16], &[(b"W2ku", r"\srv\bases\x.vhd")]);
    let advised = match cfg!(windows) {
        true => r"\srv\bases allows that",
        false => "--parent-dir /srv/bases allows that",
    };
    assert!(refused(&child).1.contains(advised));
}

/// Puts another parent's identity into a child's header.
fn set_parent(path: &Path, parent: [u8; 16]) {
    let mut bytes = fs::read(path).unwrap();
    bytes[552..568].copy_from_slice(&parent);
    super::builder::fit_checksum(&mut bytes[512..1536], 36);
    fs::write(path, bytes).unwrap();
}

/// However it was found.
#[test]
fn a_child_is_not_opened_over_another_disk() {
    let (_folder, top) = folder();
    let [own, other, child] = ["own.vhd", "other.vhd", "child.vhd"].map(|name| top.join(name));
    make_disk(&own);
    make_disk(&other);
    make_child(&child, &own, r".\own.vhd");
    let storage = |path: &Path| -> Arc<dyn crate::storage::Storage> {
        Arc::new(crate::storage::sim::SimStorage::from_file(path).unwrap())
    };
    let over =
        |parent: &Path| Disk::open_over(storage(&child), &child, &READ_ONLY, Some(open(parent)));
    assert!(over(&own).is_ok());
    assert_eq!(over(&other).unwrap_err().kind(), ErrorKind::ParentMismatch);
}
