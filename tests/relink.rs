//! Where the parent lies, written anew, and new identities: what a power cut at any moment leaves, on a
//! simulated host, for us and for the second reading of the formats.

#![allow(clippy::unwrap_used, reason = "a failure is what a test is for")]

mod support;

use std::path::Path;
use std::sync::Arc;
use std::time::UNIX_EPOCH;

use support::second::{Chain, read_checked};
use support::soak;
use vhdfs::check::{CheckOptions, CheckReport, check_storage};
use vhdfs::create::{CreateOptions, create_in};
use vhdfs::disk::{Disk, OpenOptions};
use vhdfs::error::{ErrorKind, OpenProblem};
use vhdfs::format::parent::{Identity, NewParent};
use vhdfs::format::{DiskType, Format};
use vhdfs::image::{identify, relink, renew_identity};
use vhdfs::storage::Storage;
use vhdfs::storage::sim::SimStorage;
use vhdfs::units::{FileOffset, usize_from};

const MIB: u64 = 1 << 20;
const FORMATS: [Format; 2] = [Format::Vhd, Format::Vhdx];
const READ_ONLY: OpenOptions = OpenOptions {
    read_only: true,
    lock: false,
    punch_holes: true,
};

fn shared(sim: &SimStorage) -> Arc<dyn Storage> {
    Arc::new(sim.fork())
}

fn open(sim: &SimStorage, parent: Option<&SimStorage>) -> Arc<Disk> {
    let parent = parent.map(|parent| open(parent, None));
    Disk::open_over(shared(sim), Path::new("x"), &READ_ONLY, parent).unwrap()
}

/// A disk and a child of it that says `old` of its place. Both hold something.
fn pair(old: &NewParent) -> [SimStorage; 2] {
    let format = match old.identity {
        Identity::Vhd(_) => Format::Vhd,
        Identity::Vhdx(_) => Format::Vhdx,
    };
    let write = |sim: &SimStorage, parent: Option<Arc<Disk>>, at: u64, byte: u8| {
        let storage: Arc<dyn Storage> = Arc::new(sim.fork());
        let options = OpenOptions::default();
        let disk = Disk::open_over(Arc::clone(&storage), Path::new("x"), &options, parent).unwrap();
        disk.write_at(&[byte; 100_000], at).unwrap();
        disk.close().unwrap();
        drop(disk);
        bytes_of(&*storage)
    };
    let base = SimStorage::new();
    create_in(
        &base,
        &CreateOptions::new(format, DiskType::Dynamic, 16 * MIB),
    )
    .unwrap();
    let base = SimStorage::from_bytes(&write(&base, None, MIB, 1));
    let child = SimStorage::new();
    let parent = NewParent {
        identity: identify(&base, Path::new("x")).unwrap().identity,
        ..old.clone()
    };
    create_in(&child, &CreateOptions::differencing(parent)).unwrap();
    let over = open(&base, None);
    let child = SimStorage::from_bytes(&write(&child, Some(over), 9 * MIB, 2));
    [base, child]
}

fn bytes_of(storage: &dyn Storage) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(storage.len().unwrap()).unwrap()];
    storage
        .read_exact_at(&mut bytes, FileOffset::new(0))
        .unwrap();
    bytes
}

fn place(format: Format, relative: &str, absolute: &str) -> NewParent {
    NewParent {
        identity: match format == Format::Vhd {
            true => Identity::Vhd([7; 16]),
            false => Identity::Vhdx(uuid::Uuid::from_bytes([7; 16])),
        },
        disk_len: 16 * MIB,
        sector_size: 512,
        mtime: UNIX_EPOCH,
        relative: relative.to_owned(),
        absolute: absolute.to_owned(),
    }
}

/// The paths that lead to the parent; the VHD's name in the header, which comes last, left out.
fn paths(file: &dyn Storage) -> Vec<String> {
    let link = identify(file, Path::new("x")).unwrap().parent.unwrap();
    link.paths
        .into_iter()
        .map(|path| path.text)
        .take(2)
        .collect()
}

fn to(base: &SimStorage, place: &NewParent) -> NewParent {
    NewParent {
        identity: identify(base, Path::new("x")).unwrap().identity,
        ..place.clone()
    }
}

/// Relinks `child` in the file itself.
fn relinked(child: &Arc<SimStorage>, parent: &NewParent) -> Result<Vec<String>, OpenProblem> {
    let storage: Arc<SimStorage> = Arc::clone(child);
    relink(storage, Path::new("x"), parent, Path::new("new place"))
}

/// Cuts the power at every moment of `work` on `start`, and has what is left looked at; about `states` of
/// what may be left at each.
fn cut_everywhere(
    start: &SimStorage,
    states: u64,
    work: impl Fn(&Arc<SimStorage>) -> Result<(), OpenProblem>,
    look: impl Fn(&SimStorage),
) {
    start.sync().unwrap();
    for changes in 0.. {
        let sim = Arc::new(start.fork());
        sim.cut_after(changes);
        let done = work(&sim);
        let choices = sim.choices(4, 8 * soak(), changes);
        let step = choices.len().div_ceil(usize_from(states * soak())).max(1);
        // Others at each moment, all kinds of them by and by.
        for choice in choices
            .iter()
            .skip(usize_from(changes) % step)
            .step_by(step)
        {
            look(&sim.crash(&mut { *choice }));
        }
        look(&sim.kill());
        if done.is_ok() && !sim.is_cut() {
            assert!(changes > 1);
            return;
        }
    }
}

/// What a power cut left of a child of `base`: it opens, leads to one of `places`, and can be worked with.
fn check_left(left: &SimStorage, base: &SimStorage, places: [&NewParent; 2]) {
    let found = paths(left);
    let is_one = places
        .iter()
        .any(|place| found == [&*place.relative, &*place.absolute]);
    assert!(is_one, "{found:.60?}");
    let chain = Chain::open([shared(left), shared(base)]).unwrap();
    let mut bytes = [0; 2];
    for (part, at) in bytes.chunks_mut(1).zip([MIB, 9 * MIB]) {
        chain.read_at(part, at);
    }
    assert_eq!(bytes, [1, 2]);
    let options = OpenOptions::default();
    let storage: Arc<dyn Storage> = Arc::new(left.fork());
    let over = Some(open(base, None));
    let disk = Disk::open_over(Arc::clone(&storage), Path::new("x"), &options, over).unwrap();
    disk.write_at(&[3; 4096], 5 * MIB).unwrap();
    disk.close().unwrap();
    drop(disk);
    read_checked(&*storage).unwrap();
    let report = check_storage(&*storage, &CheckOptions::default()).unwrap();
    assert_eq!(report, CheckReport::default());
    assert_eq!(paths(&*storage), found);
}

#[test]
fn a_cut_leaves_the_old_place_or_the_new_one() {
    let long = |start: &str| format!("{start}{}", "x".repeat(2500));
    for format in FORMATS {
        let old = place(format, r".\base", r"D:\old\base");
        for new in [
            place(format, r"..\bases\Win98 base", r"D:\bases\Win98 base"),
            // Longer than there is room for where the old ones are.
            place(format, &long(r"..\"), &long(r"D:\")),
        ] {
            let [base, child] = pair(&old);
            let new = to(&base, &new);
            cut_everywhere(
                &child,
                6,
                |sim| relinked(sim, &new).map(|_| ()),
                |left| check_left(left, &base, [&old, &new]),
            );
        }
    }
}

/// What was interrupted is done again, and leaves nothing of the first try.
#[test]
fn an_interrupted_run_is_done_again() {
    for format in FORMATS {
        let old = place(format, r".\base", r"D:\old\base");
        let new = place(format, r"..\bases\new base", r"D:\bases\new base");
        let [base, child] = pair(&old);
        let new = to(&base, &new);
        let whole = Arc::new(child.fork());
        relinked(&whole, &new).unwrap();
        cut_everywhere(
            &child,
            2,
            |sim| relinked(sim, &new).map(|_| ()),
            |left| {
                let again = Arc::new(left.fork());
                relinked(&again, &new).unwrap();
                check_left(&again, &base, [&new, &new]);
                // Whatever is longer is free, and goes with the next block that moves.
                let over = Some(open(&base, None));
                let storage: Arc<SimStorage> = Arc::clone(&again);
                let options = OpenOptions::default();
                drop(Disk::open_over(storage, Path::new("x"), &options, over).unwrap());
                assert_eq!(again.len().unwrap(), whole.len().unwrap());
                let images = [&again, &whole].map(|sim| read_checked(&**sim).unwrap());
                if format == Format::Vhd {
                    let places = images.map(|image| image.vhd().locators[0].at);
                    assert_eq!(places[0], places[1]);
                }
            },
        );
    }
}

#[test]
fn what_is_not_the_parent_is_refused_and_nothing_written() {
    for format in FORMATS {
        let old = place(format, r".\base", r"D:\old\base");
        let [base, child] = pair(&old);
        let right = to(&base, &old);
        let other = FORMATS.into_iter().find(|other| *other != format).unwrap();
        let sectors = NewParent {
            sector_size: 4096,
            ..right.clone()
        };
        for (parent, kind) in [
            (&old, ErrorKind::ParentMismatch),
            (&place(other, "x", "y"), ErrorKind::ParentMismatch),
            (&sectors, ErrorKind::Corrupt),
        ] {
            let sim = Arc::new(child.fork());
            let error = relinked(&sim, parent).unwrap_err();
            assert_eq!(error.kind(), kind, "{error}");
            if kind == ErrorKind::ParentMismatch {
                let text = error.to_string();
                let expected = right.identity.to_string();
                assert!(
                    text.contains("new place") && text.contains(&expected),
                    "{text}"
                );
                assert!(text.contains(&parent.identity.to_string()), "{text}");
            }
            assert!(sim.to_bytes() == child.to_bytes());
        }
        let sim = Arc::new(base.fork());
        let error = relinked(&sim, &right).unwrap_err().to_string();
        assert!(error.contains("without a parent"), "{error}");
        assert!(sim.to_bytes() == base.to_bytes());
    }
}

#[test]
fn a_cut_leaves_the_old_identity_or_the_new_one() {
    for format in FORMATS {
        for disk_type in [DiskType::Dynamic, DiskType::Fixed] {
            let start = SimStorage::new();
            create_in(&start, &CreateOptions::new(format, disk_type, 4 * MIB)).unwrap();
            let identity = |sim: &SimStorage| identify(sim, Path::new("x")).unwrap().identity;
            let old = identity(&start);
            let new = std::cell::Cell::new(old);
            cut_everywhere(
                &start,
                4,
                |sim| {
                    let storage: Arc<SimStorage> = Arc::clone(sim);
                    new.set(renew_identity(storage, Path::new("x"))?);
                    Ok(())
                },
                |left| {
                    let found = identity(left);
                    drop(open(left, None));
                    let storage: Arc<dyn Storage> = Arc::new(left.fork());
                    let options = OpenOptions::default();
                    drop(Disk::open_storage(
                        Arc::clone(&storage),
                        Path::new("x"),
                        &options,
                    ));
                    read_checked(&*storage).unwrap().check_closed().unwrap();
                    assert_eq!(identify(&*storage, Path::new("x")).unwrap().identity, found);
                },
            );
            assert_ne!(new.get(), old);
            let sim = Arc::new(start.fork());
            let storage: Arc<SimStorage> = Arc::clone(&sim);
            let new = renew_identity(storage, Path::new("x")).unwrap();
            assert_eq!((identity(&sim), new == old), (new, false));
            assert_eq!(sim.unsynced_len(), 0, "durable");
            read_checked(&*sim).unwrap().check_closed().unwrap();
        }
    }
}
