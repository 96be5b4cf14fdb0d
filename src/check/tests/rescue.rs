//! Files that could not be opened, or have lost a part: footers of fixed disks, and what was cut off.

use super::*;
use crate::format::parent::{Identity, NewParent};
use crate::image::identify;

const ZERO_LOST: CheckOptions = CheckOptions {
    zero_lost: true,
    ..REPAIR
};
const SIZE: u64 = BLOCKS * VHD_BLOCK;

fn named(sim: &SimStorage, name: &str, options: &CheckOptions) -> CheckReport {
    check_as(sim, Path::new(name), options).unwrap()
}

/// A fixed VHD with data at its start and its end.
fn fixed() -> SimStorage {
    let sim = SimStorage::new();
    vhd::create(&sim, DiskType::Fixed, SIZE, 0).unwrap();
    for place in [5, SIZE - 9000] {
        sim.write_all_at(&[7; 9000], at(place)).unwrap();
    }
    sim.sync().unwrap();
    sim
}

fn cut_to(sim: &SimStorage, len: u64) {
    sim.set_len(len).unwrap();
}

/// A footer that is not where it belongs, what brings it back, and whether it is the same.
type Stray = (&'static str, Change, bool);

const STRAYS: [Stray; 7] = [
    ("cut off", |sim| cut_to(sim, SIZE), false),
    ("cut to its cookie", |sim| cut_to(sim, SIZE + 8), false),
    ("cut to a third", |sim| cut_to(sim, SIZE + 170), true),
    (
        "a bad checksum",
        |sim| sim.write_all_at(&[9], at(SIZE + 66)).unwrap(),
        true,
    ),
    (
        "a sector of zeros behind",
        |sim| cut_to(sim, SIZE + 1024),
        true,
    ),
    (
        "a MiB of zeros behind",
        |sim| cut_to(sim, SIZE + 512 + MIB),
        true,
    ),
    (
        "some bytes behind",
        |sim| sim.write_all_at(&[3; 700], at(SIZE + 512)).unwrap(),
        true,
    ),
];

fn stray() -> impl Iterator<Item = (&'static str, SimStorage, CheckOptions, bool)> {
    STRAYS.into_iter().map(|(name, damage, is_same)| {
        let sim = fixed();
        damage(&sim);
        sim.sync().unwrap();
        // What is cut off with other bytes than zeros has to be saved.
        let backup = name.starts_with("some");
        (name, sim, CheckOptions { backup, ..REPAIR }, is_same)
    })
}

#[test]
fn footers_of_fixed_disks_are_put_where_they_belong() {
    let good = content(&fixed()).unwrap();
    for (name, sim, options, is_same) in stray() {
        let before = sim.to_bytes();
        let found = named(&sim, "a.vhd", &CheckOptions::default());
        assert!(!found.is_clean(), "{name}: {found:?}");
        let refused = open(Arc::new(sim.fork()), true).unwrap_err();
        assert!(!refused.to_string().is_empty(), "{name}");
        let dry = CheckOptions {
            dry_run: true,
            ..options
        };
        let told = named(&sim, "a.vhd", &dry);
        assert!(sim.to_bytes() == before, "{name}: a dry run wrote");
        let (report, script) = rehearse(&sim, Path::new("a.vhd"), &options).unwrap();
        assert_eq!(report, told, "{name}");
        assert!(
            report.is_clean() && report.repaired.len() == 1,
            "{name}: {report:?}"
        );
        let backup = SimStorage::new();
        backup::save(&sim, &script, &[], &backup).unwrap();
        at_each_cut(&sim, &|cut| named_result(cut, &options), &|crashed, cut| {
            named(crashed, "a.vhd", &options);
            let after = named(crashed, "a.vhd", &CheckOptions::default());
            assert_eq!(after, CheckReport::default(), "{name}: {cut}");
            assert_eq!(content(crashed).unwrap(), good, "{name}: {cut}");
        });
        script.perform(&sim).unwrap();
        assert_eq!(sim.len().unwrap(), SIZE + 512, "{name}");
        let original = footer(&fixed()).0.unique_id();
        let kept = footer(&sim).0.unique_id();
        assert_ne!(kept, original, "{name}: of another disk");
        restored(&backup, &sim);
        assert!(sim.to_bytes() == before, "{name}: not the file that it was");
        if is_same {
            assert!(
                before.windows(16).any(|bytes| bytes == kept),
                "{name}: another identity"
            );
        }
    }
}

fn named_result(sim: &SimStorage, options: &CheckOptions) -> io::Result<()> {
    check_as(sim, Path::new("a.vhd"), options).map(drop)
}

#[test]
fn footers_are_given_only_to_what_may_be_a_fixed_disk() {
    let partitioned = |last: u32| {
        let mut record = [0; 512];
        record[446 + 4] = 0x83;
        record[446 + 8..446 + 12].copy_from_slice(&64_u32.to_le_bytes());
        record[446 + 12..446 + 16].copy_from_slice(&(last - 64).to_le_bytes());
        record[510..].copy_from_slice(&[0x55, 0xaa]);
        record
    };
    let gpt = |last: u64| {
        let mut header = [0; 512];
        header[..8].copy_from_slice(b"EFI PART");
        header[32..40].copy_from_slice(&last.to_le_bytes());
        header
    };
    let sectors = SIZE / 512;
    let raw = |start: &[u8], place: u64| {
        let sim = SimStorage::new();
        sim.set_len(SIZE).unwrap();
        sim.write_all_at(start, at(place)).unwrap();
        sim
    };
    let dynamic = good(Format::Vhd);
    dynamic.set_len(dynamic.len().unwrap() - 512).unwrap();
    dynamic.write_all_at(&[0; 512], at(0)).unwrap();
    let odd = raw(&[1], 0);
    odd.set_len(SIZE + 100).unwrap();
    let followed = fixed();
    followed.write_all_at(&[3; 700], at(SIZE + 512)).unwrap();
    let far = fixed();
    far.set_len(SIZE + 3 * MIB + 100).unwrap();
    let refused = [
        (
            "a partition beyond",
            "a.vhd",
            raw(&partitioned(low_u32(sectors) + 1), 0),
            "at least",
        ),
        (
            "a GPT of more",
            "a.vhd",
            raw(&gpt(sectors), 512),
            "at least",
        ),
        ("a QCOW image", "a.vhd", raw(b"QFI\xfb", 0), "a QCOW image"),
        ("another name", "a.raw", raw(&[1], 0), "not a VHD"),
        ("no name", "a", raw(&[1], 0), "not a VHD"),
        ("a dynamic disk", "a.vhd", dynamic, "not a VHD"),
        ("an odd length", "a.vhd", odd, "not a VHD"),
        ("something behind it", "a.vhd", followed, "--backup"),
        ("much behind it", "a.vhd", far, "not a VHD"),
    ];
    for (name, file, sim, text) in refused {
        let before = sim.to_bytes();
        let report = named(&sim, file, &REPAIR);
        assert!(report.repaired.is_empty(), "{name}: {report:?}");
        assert!(
            report.errors.iter().any(|error| error.contains(text)),
            "{name}: {report:?}"
        );
        assert!(sim.to_bytes() == before, "{name}");
    }
    for whole in [
        partitioned(low_u32(sectors)).to_vec(),
        [&[0; 512][..], &gpt(sectors - 1)].concat(),
    ] {
        let report = named(&raw(&whole, 0), "a.vhd", &REPAIR);
        assert_eq!(report.repaired.len(), 1, "{report:?}");
    }
    // Whoever opens it hears what it may be.
    let error = Disk::open_storage(
        Arc::new(raw(&[1], 0)),
        Path::new("a.vhd"),
        &OpenOptions::default(),
    );
    let error = error.unwrap_err().to_string();
    assert!(
        error.contains("raw data") && error.contains("check --repair"),
        "{error}"
    );
}

/// Disks whose last block, and a part of the one before, are gone.
fn cut() -> Vec<(&'static str, SimStorage)> {
    let mut made = Vec::new();
    let sim = good(Format::Vhd);
    sim.set_len(sim.len().unwrap() - 512 - SLOT - 200 * 1024)
        .unwrap();
    made.push(("a VHD", sim));
    let sim = good(Format::Vhdx);
    sim.set_len(DATA + 2 * MIB - 200 * 1024).unwrap();
    made.push(("a VHDX", sim));
    let sim = with_log();
    sim.set_len(DATA + 2 * MIB - 200 * 1024).unwrap();
    made.push(("a VHDX with a log", sim));
    made.iter().for_each(|(_, sim)| sim.sync().unwrap());
    made
}

#[test]
fn what_was_cut_off_becomes_zeros_on_request_alone() {
    for (name, sim) in cut() {
        let readable = content(&sim).unwrap();
        assert!(readable.contains(&None), "{name}: nothing is an error");
        let before = sim.to_bytes();
        let report = check_storage(&sim, &REPAIR).unwrap();
        assert!(
            !report.is_clean() && report.repaired.is_empty(),
            "{name}: {report:?}"
        );
        let advised = |error: &String| error.contains("--zero-lost");
        assert!(report.errors.iter().any(advised), "{name}: {report:?}");
        assert!(sim.to_bytes() == before, "{name}: changed");
        assert!(
            open(Arc::new(sim.fork()), false).is_err(),
            "{name}: opened for writing"
        );

        let identity = identify(&sim, Path::new("")).unwrap().identity;
        let told = CheckOptions {
            dry_run: true,
            ..ZERO_LOST
        };
        let told = check_storage(&sim, &told).unwrap();
        let (report, script) = rehearse(&sim, Path::new(""), &ZERO_LOST).unwrap();
        assert_eq!(report, told, "{name}");
        assert!(
            report.is_clean() && !report.repaired.is_empty(),
            "{name}: {report:?}"
        );
        let backup = SimStorage::new();
        let guarded = guards(&sim, Path::new("")).unwrap();
        backup::save(&sim, &script, &guarded, &backup).unwrap();
        let whole = |now: &SimStorage, cut: &str| {
            let what = format!("{name}: {cut}");
            let after = check_storage(now, &CheckOptions::default()).unwrap();
            assert_eq!(after, CheckReport::default(), "{what}");
            reads_as(now, &readable, &what);
            assert!(content(now).unwrap().iter().all(Option::is_some), "{what}");
            let now = identify(now, Path::new("")).unwrap().identity;
            assert_ne!(now, identity, "{what}: children are misled");
        };
        let work = |cut: &SimStorage| check_storage(cut, &ZERO_LOST).map(drop);
        at_each_cut(&sim, &work, &|crashed, cut| {
            reads_as(crashed, &readable, &format!("{name}: {cut}"));
            // Nothing is zero under the old identity.
            let now = identify(crashed, Path::new("")).unwrap().identity;
            let is_whole = content(crashed).unwrap().iter().all(Option::is_some);
            assert!(
                now != identity || !is_whole,
                "{name}: {cut}: children are misled"
            );
            check_storage(crashed, &ZERO_LOST).unwrap();
            whole(crashed, cut);
        });
        script.perform(&sim).unwrap();
        whole(&sim, "done");
        restored(&backup, &sim);
        assert!(sim.to_bytes() == before, "{name}: not the file that it was");
    }
}

#[test]
fn what_was_cut_off_a_child_stays_an_error_where_the_parent_would_show() {
    let parent = |identity| NewParent {
        identity,
        disk_len: BLOCKS * MIB,
        sector_size: 512,
        mtime: std::time::SystemTime::now(),
        relative: ".\\parent".to_owned(),
        absolute: "C:\\parent".to_owned(),
    };
    let vhd = SimStorage::new();
    let of = parent(Identity::Vhd([7; 16]));
    vhd::create_differencing(&vhd, SIZE, low_u32(VHD_BLOCK), &of).unwrap();
    let end = vhd.len().unwrap() - 512;
    let entry = low_u32(end / 512 + 1).to_be_bytes();
    vhd.write_all_at(&entry, at(TABLE + 4)).unwrap();
    vhd.set_len(end + 200).unwrap();

    let vhdx = SimStorage::new();
    let of = parent(Identity::Vhdx(Uuid::from_u128(7)));
    let disk = vhdx::NewDisk {
        disk_type: DiskType::Differencing,
        disk_len: BLOCKS * MIB,
        block_size: low_u32(MIB),
        sector_size: 512,
        physical_sector_size: 4096,
        parent: Some(&of),
    };
    vhdx::create(&vhdx, &disk).unwrap();
    let bat = vhdx.len().unwrap() - MIB;
    let set = |index: u64, entry: u64| {
        (vhdx.write_all_at(&entry.to_le_bytes(), at(bat + 8 * index))).unwrap();
    };
    set(1, (bat + MIB) | 7);
    // The chunk's bitmap, which is cut off.
    set(4096, (bat + 2 * MIB) | 6);
    vhdx.set_len(bat + 2 * MIB).unwrap();
    for (sim, why) in [(vhd, "no way to say"), (vhdx, "was lost too")] {
        let before = sim.to_bytes();
        let report = check_storage(&sim, &ZERO_LOST).unwrap();
        assert!(
            report.errors.iter().any(|error| error.contains(why)),
            "{report:?}"
        );
        assert!(
            report.repaired.is_empty() && sim.to_bytes() == before,
            "{report:?}"
        );
    }
}
