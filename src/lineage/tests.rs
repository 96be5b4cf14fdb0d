//! Tests of searches and of what follows from them.

use std::cell::Cell;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::*;
use crate::disk::parents::builder::{identity_of, make_child, make_disk};
use crate::format::parent::{Identity as DiskIdentity, ParentLink, ParentPath, PathKind};
use crate::storage::host::pin::{Identity, Pin};

const DISK: DiskIdentity = DiskIdentity::Vhd([7; 16]);

/// Words that lead to a path as it stands, if it has a root; how often they were asked.
#[derive(Default)]
struct Plain(Cell<usize>);

impl Words for Plain {
    fn real(&self, name: &Path) -> PathBuf {
        name.to_owned()
    }

    fn lead(&self, _: &Path, link: &ParentLink) -> Option<PathBuf> {
        self.0.set(self.0.get() + 1);
        let first = PathBuf::from(&link.paths.first()?.text);
        first.has_root().then_some(first)
    }
}

fn kin(number: usize, path: &str, identity: DiskIdentity, parent: Option<&str>) -> Kin {
    let link = parent.map(|text| ParentLink {
        identities: vec![DISK],
        paths: vec![ParentPath {
            kind: PathKind::Absolute,
            text: text.to_owned(),
        }],
    });
    Kin {
        key: Identity::numbered(u128::try_from(number).unwrap()),
        path: path.into(),
        lineage: Lineage {
            identity,
            link: link.map(Arc::new),
        },
    }
}

fn other(number: usize) -> DiskIdentity {
    DiskIdentity::Vhdx(uuid::Uuid::from_u128(u128::try_from(number).unwrap()))
}

#[test]
fn many_copies_and_children_that_lead_nowhere_cost_little() {
    const N: usize = 20_000;
    let copies = (0..N).map(|n| kin(n, &format!("/b{n}"), DISK, None));
    let children = (N..2 * N).map(|n| kin(n, &format!("/c{n}"), other(n), Some("gone")));
    let all: Vec<Kin> = copies.chain(children).collect();
    let begun = Instant::now();
    let family = Family::of(&all, &Plain::default());
    let spent = begun.elapsed();
    println!("{N} of each: {spent:?}");
    assert!(spent < Duration::from_secs(2), "{spent:?}");
    assert!(all[..N].iter().all(|copy| family.is_parent(&copy.key)));
    assert!(all[N..].iter().all(|child| !family.is_parent(&child.key)));
    assert_eq!(family.children(&all[N / 2].key).len(), N);
}

#[test]
fn words_tell_copies_apart_and_are_asked_for_nothing_else() {
    let words = Plain::default();
    let one = [kin(1, "/a", DISK, None), kin(2, "/c", other(2), Some("/b"))];
    // There is only one that it can be.
    assert!(Family::of(&one, &words).is_parent(&one[0].key));
    assert_eq!(words.0.get(), 0);
    let two = [
        kin(1, "/a", DISK, None),
        kin(3, "/b", DISK, None),
        kin(2, "/c", other(2), Some("/b")),
        // Over a disk with its own identity.
        kin(4, "/d", DISK, Some("/d")),
    ];
    let family = Family::of(&two, &words);
    let children = |kin: &Kin| family.children(&kin.key);
    assert_eq!(children(&two[0]), [Path::new("/d")]);
    assert_eq!(children(&two[1]), [Path::new("/c"), Path::new("/d")]);
    assert!(!family.is_parent(&two[3].key));
}

fn tree(top: &Path, entries: usize) -> Tree {
    let limits = Limits {
        entries,
        patience: Duration::from_secs(5),
        links: false,
    };
    Tree::new(Pin::directory(top).unwrap(), limits, Arc::new(Waiting))
}

#[test]
fn a_search_finds_changes_and_says_where_it_ends() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    fs::create_dir(at("sub")).unwrap();
    make_disk(&at("base.vhd"));
    make_child(&at("sub/child.vhd"), &at("base.vhd"), r"..\base.vhd");
    fs::write(at("sub/junk.vhdx"), "no disk").unwrap();
    fs::write(at("sub/notes.txt"), "no disk").unwrap();
    let all = tree(folder.path(), 5);
    let search = || {
        let survey = all.survey().unwrap().unwrap();
        assert!(survey.unread.is_empty() && !survey.cut_off);
        let mut files: Vec<(PathBuf, Option<DiskIdentity>)> = (survey.files.into_iter())
            .map(|file| (file.path, file.lineage.map(|lineage| lineage.identity)))
            .collect();
        files.sort_by(|one, other| one.0.cmp(&other.0));
        files
    };
    let identity = |name: &str| Some(DiskIdentity::Vhd(identity_of(&at(name))));
    let mut expected = vec![
        (PathBuf::from("base.vhd"), identity("base.vhd")),
        (
            Path::new("sub").join("child.vhd"),
            identity("sub/child.vhd"),
        ),
        (Path::new("sub").join("junk.vhdx"), None),
    ];
    assert_eq!(search(), expected);
    assert_eq!(search(), expected);
    fs::remove_file(at("sub/junk.vhdx")).unwrap();
    fs::remove_file(at("base.vhd")).unwrap();
    make_disk(&at("base.vhd"));
    expected.pop();
    expected[0].1 = identity("base.vhd");
    assert_eq!(search(), expected);

    let cut = tree(folder.path(), 2).survey().unwrap().unwrap();
    assert!(cut.cut_off && cut.files.len() < 2);
}
