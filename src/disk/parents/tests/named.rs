//! Parents that the user names, new places of parents, and new identities.

use super::*;
use crate::create::{CreateOptions, create};
use crate::disk::{give_identity, relink};
use crate::error::{CreateError, IdentityError};
use crate::format::{DiskType, Format};

/// Makes a child of the disk at `parent`.
fn adopt(child: &Path, parent: &Path) {
    let parent = open(parent).as_parent_of(child).unwrap();
    create(child, &CreateOptions::differencing(parent)).unwrap();
}

/// A chain of three below `top`, the grandparent first.
fn chain(top: &Path, format: Format) -> [PathBuf; 3] {
    let names = ["base", "middle", "leaf"].map(|name| top.join(format!("{name}.{format}")));
    create(
        &names[0],
        &CreateOptions::new(format, DiskType::Dynamic, 8 << 20),
    )
    .unwrap();
    adopt(&names[1], &names[0]);
    adopt(&names[2], &names[1]);
    names
}

fn with(child: &Path, files: &[&PathBuf]) -> Result<Arc<Disk>, OpenError> {
    let files: Vec<PathBuf> = files.iter().map(|path| (*path).clone()).collect();
    let parents = HostParents::beside(child, &[]).with_files(&files);
    Disk::open_with(child, &READ_ONLY, &parents)
}

fn error_of(opened: Result<Arc<Disk>, OpenError>) -> (ErrorKind, String) {
    let error = opened.expect_err("refused");
    (error.kind(), error.to_string())
}

#[test]
fn parents_of_any_name_and_place_can_be_named() {
    for format in [Format::Vhd, Format::Vhdx] {
        let (_folder, top) = folder();
        let (_elsewhere, away) = super::folder();
        let [base, middle, leaf] = chain(&top, format);
        let [moved, renamed] = [away.join("the base"), top.join("Win98 middle")];
        fs::rename(&base, &moved).unwrap();
        fs::rename(&middle, &renamed).unwrap();
        assert_eq!(refused(&leaf).0, ErrorKind::ParentMissing);
        for files in [[&renamed, &moved], [&moved, &renamed]] {
            let disk = with(&leaf, &files).unwrap();
            let found = std::iter::successors(disk.parent(), |disk| disk.parent());
            let found: Vec<_> = found.map(|disk| disk.path().to_owned()).collect();
            assert_eq!(found, [&*renamed, &*moved]);
        }
        // One of the two, twice, and the child itself, which somebody's wildcard brought in.
        let (kind, text) = error_of(with(&leaf, &[&renamed, &renamed, &leaf]));
        assert_eq!(kind, ErrorKind::ParentMissing, "{text}");
        assert!(
            text.contains("Win98 middle") && text.contains("base"),
            "{text}"
        );
        // What is not needed does no harm.
        fs::rename(&renamed, &middle).unwrap();
        assert_eq!(with(&leaf, &[&moved]).unwrap().chain_len(), 3);
    }
}

#[test]
fn a_named_file_that_is_not_the_parent_is_told_of() {
    for format in [Format::Vhd, Format::Vhdx] {
        let (_folder, top) = folder();
        let [base, middle, _leaf] = chain(&top, format);
        let identity = open(&base).identity().to_string();
        let other = top.join("other.vhd");
        make_disk(&other);
        fs::rename(&base, top.join("away")).unwrap();
        let (kind, text) = error_of(with(&middle, &[&other]));
        assert_eq!(kind, ErrorKind::ParentMismatch);
        let found = Identity::Vhd(identity_of(&other)).to_string();
        assert!(text.contains(&identity) && text.contains(&found), "{text}");
        let (kind, text) = error_of(with(&middle, &[&top.join("gone")]));
        assert_eq!(kind, ErrorKind::ParentMissing);
        assert!(text.contains("gone: no such file"), "{text}");
        let (_, text) = error_of(with(&middle, &[&top]));
        assert!(text.contains("a directory"), "{text}");
    }
}

/// Two states of one VHD have one identity.
#[test]
fn of_two_named_files_that_could_be_the_parent_none_is_taken() {
    let (_folder, top) = folder();
    let [base, middle, _leaf] = chain(&top, Format::Vhd);
    let copies = ["one", "two"].map(|name| top.join(name));
    fs::copy(&base, &copies[0]).unwrap();
    fs::rename(&base, &copies[1]).unwrap();
    let (kind, text) = error_of(with(&middle, &[&copies[0], &copies[1]]));
    assert_eq!(kind, ErrorKind::InvalidInput);
    assert!(
        text.contains("one and") && text.contains("two have"),
        "{text}"
    );
    assert!(with(&middle, &[&copies[0], &copies[0]]).is_ok());
}

#[test]
fn a_relinked_child_finds_its_parent_by_itself() {
    for format in [Format::Vhd, Format::Vhdx] {
        let (_folder, top) = folder();
        let [base, middle, leaf] = chain(&top, format);
        let renamed = top.join("Win98 base");
        fs::rename(&base, &renamed).unwrap();
        let before = [&renamed, &leaf].map(|path| fs::read(path).unwrap());
        let identity = image::identify(&HostFile::open(&middle, &HOST).unwrap(), &middle);
        let done = relink(&middle, &renamed).unwrap();
        assert_eq!(done.relative, r".\Win98 base");
        assert_eq!(open(&leaf).chain_len(), 3);
        // Its own children know it still.
        assert_eq!(open(&middle).identity(), identity.unwrap().identity);
        assert!(before == [&renamed, &leaf].map(|path| fs::read(path).unwrap()));
        let link = open(&middle).parent_link().unwrap().clone();
        assert_eq!(link.paths[0].text, r".\Win98 base");
        let all: Vec<_> = link.paths.iter().map(|path| path.text.as_str()).collect();
        assert!(all.iter().all(|text| !text.contains("base.")), "{all:?}");
    }
}

const HOST: HostOptions = HostOptions {
    read_only: true,
    lock: false,
    no_follow: false,
};

#[test]
fn what_cannot_be_relinked_stays_as_it_is() {
    for format in [Format::Vhd, Format::Vhdx] {
        let (_folder, top) = folder();
        let [base, middle, leaf] = chain(&top, format);
        let before = [&base, &middle, &leaf].map(|path| fs::read(path).unwrap());
        let refuse = |child: &Path, parent: &Path, kind, part: &str| {
            let error = relink(child, parent).expect_err("refused");
            let text = error.to_string();
            assert_eq!(error.kind(), kind, "{text}");
            assert!(text.contains(part), "{text}");
        };
        refuse(&leaf, &base, ErrorKind::ParentMismatch, "is needed");
        refuse(&base, &middle, ErrorKind::Incompatible, "without a parent");
        refuse(&leaf, &leaf, ErrorKind::Corrupt, "circle");
        refuse(&leaf, &top.join("gone"), ErrorKind::Io, "gone");
        let reader = open(&leaf);
        refuse(&leaf, &middle, ErrorKind::InUse, "leaf");
        drop(reader);
        let writer = Disk::open(&middle, &OpenOptions::default()).unwrap();
        refuse(&leaf, &middle, ErrorKind::InUse, "middle");
        drop(writer);
        let after = [&base, &middle, &leaf].map(|path| fs::read(path).unwrap());
        assert!(before == after);
    }
}

/// Takes the identity of the disk at `path` away.
fn make_nil(path: &Path) {
    let mut bytes = fs::read(path).unwrap();
    let end = bytes.len() - 512;
    let is_fixed = bytes[end + 63] == 2;
    for at in [0, end].into_iter().skip(usize::from(is_fixed)) {
        bytes[at + 68..at + 84].fill(0);
        super::super::builder::fit_checksum(&mut bytes[at..at + 512], 64);
    }
    fs::write(path, bytes).unwrap();
}

#[test]
fn a_disk_without_identity_is_no_parent_until_it_gets_one() {
    for disk_type in [DiskType::Dynamic, DiskType::Fixed] {
        let (_folder, top) = folder();
        let [base, child] = ["base.vhd", "child.vhd"].map(|name| top.join(name));
        create(&base, &CreateOptions::new(Format::Vhd, disk_type, 8 << 20)).unwrap();
        let whole = fs::read(&base).unwrap();
        make_nil(&base);
        let error = open(&base).as_parent_of(&child).expect_err("refused");
        assert!(matches!(error, CreateError::ParentIdentity { .. }));
        assert_eq!(error.kind(), ErrorKind::Incompatible);
        let text = error.to_string();
        assert!(text.contains("base.vhd") && text.contains("nil"), "{text}");

        let given = give_identity(&base, &HostParents::beside(&base, &[])).unwrap();
        assert_eq!(Identity::Vhd(identity_in(&base)), given);
        let changed = fs::read(&base).unwrap();
        assert_eq!(changed.len(), whole.len());
        let differ = changed
            .iter()
            .zip(&whole)
            .filter(|(one, other)| one != other);
        assert!(
            differ.count() <= 2 * 24,
            "identity, its time and checksum alone"
        );
        adopt(&child, &base);
        assert_eq!(open(&child).parent().unwrap().identity(), given);
        // From now on it has one that others know it by.
        let error = give_identity(&base, &HostParents::beside(&base, &[])).unwrap_err();
        assert!(
            matches!(error, IdentityError::HasChildren { .. }),
            "{error}"
        );
        assert!(error.to_string().contains("over this one"), "{error}");
        assert!(fs::read(&base).unwrap() == changed);
    }
}

/// The identity in the footer at the end of the VHD at `path`.
fn identity_in(path: &Path) -> [u8; 16] {
    let bytes = fs::read(path).unwrap();
    bytes[bytes.len() - 444..][..16].try_into().unwrap()
}

/// A VHDX's identity is in its headers.
#[test]
fn a_vhdx_without_identity_is_no_parent_until_it_gets_one() {
    let (_folder, top) = folder();
    let [base, child] = ["base.vhdx", "child.vhdx"].map(|name| top.join(name));
    create(
        &base,
        &CreateOptions::new(Format::Vhdx, DiskType::Dynamic, 8 << 20),
    )
    .unwrap();
    let mut bytes = fs::read(&base).unwrap();
    for at in [64 << 10, 128 << 10] {
        bytes[at + 32..at + 48].fill(0);
        bytes[at + 4..at + 8].fill(0);
        let sum = crc32c::crc32c(&bytes[at..at + 4096]);
        bytes[at + 4..at + 8].copy_from_slice(&sum.to_le_bytes());
    }
    fs::write(&base, bytes).unwrap();
    assert!(open(&base).identity().is_nil());
    let error = open(&base).as_parent_of(&child).expect_err("refused");
    assert!(matches!(error, CreateError::ParentIdentity { .. }));
    let given = give_identity(&base, &HostParents::beside(&base, &[])).unwrap();
    adopt(&child, &base);
    assert_eq!(open(&child).parent().unwrap().identity(), given);
}

/// Whoever looked for the parent of another child could take the one for the other.
#[test]
fn a_disk_with_the_identity_of_its_own_parent_is_no_parent() {
    let (_folder, top) = folder();
    let [base, middle, _leaf] = chain(&top, Format::Vhd);
    let mut bytes = fs::read(&middle).unwrap();
    let end = bytes.len() - 512;
    for at in [0, end] {
        bytes[at + 68..at + 84].copy_from_slice(&identity_of(&base));
        super::super::builder::fit_checksum(&mut bytes[at..at + 512], 64);
    }
    fs::write(&middle, bytes).unwrap();
    let error = open(&middle).as_parent_of(&top.join("new.vhd"));
    let text = error.expect_err("refused").to_string();
    assert!(
        text.contains("the same identity as") && text.contains("base.vhd"),
        "{text}"
    );
}
