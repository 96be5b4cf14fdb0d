//! The whole thing as a user has it: the built binary, VHDs made by others and by us, a loop device with ext4, fio,
//! idle compaction under a running guest, `kill -9`, and QEMU as the judge of the file.
//!
//! Needs root, /dev/fuse and loop devices; skips with a printed reason where they are missing.

#![cfg(target_os = "linux")]

mod fs_aware;
mod fsx;
mod kills;
mod many;
mod mirror;
mod rig;

use std::ffi::OsStr;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use mirror::Mirror;
use rig::{Rig, VHDFS, head_of, length, number, obstacle, report, run, say_skipped, wait_until};
use rustix::process::Signal;

const GUEST_SIZE: &str = "1G";
const MIRROR_SIZE: &str = "256M";
const PATIENCE: Duration = Duration::from_secs(30);

/// How an empty dynamic disk is made, and of which format.
#[derive(Clone, Copy)]
struct Maker {
    extension: &'static str,
    make: fn(size: &str, path: &Path),
}

const VHD_OF_QEMU: Maker = Maker {
    extension: "vhd",
    make: |size, path| made_by_qemu("vpc", "subformat=dynamic,force_size=on", size, path),
};
const VHDX_OF_QEMU: Maker = Maker {
    extension: "vhdx",
    make: |size, path| made_by_qemu("vhdx", "subformat=dynamic,block_size=2M", size, path),
};
const VHD_OF_OURS: Maker = Maker {
    extension: "vhd",
    make: made_by_vhdfs,
};
const VHDX_OF_OURS: Maker = Maker {
    extension: "vhdx",
    make: made_by_vhdfs,
};

const VHDX_OF_4096: Maker = Maker {
    extension: "vhdx",
    make: |size, path| {
        let words = ["create", "--sector-size", "4096", "--size", size].map(OsStr::new);
        run(VHDFS, words.into_iter().chain([path.as_os_str()]));
    },
};

fn made_by_qemu(format: &str, options: &str, size: &str, path: &Path) {
    let words = ["create", "-q", "-f", format, "-o", options].map(OsStr::new);
    run(
        "qemu-img",
        words.into_iter().chain([path.as_os_str(), size.as_ref()]),
    );
}

fn made_by_vhdfs(size: &str, path: &Path) {
    let words = ["create", "--size", size].map(OsStr::new);
    run(VHDFS, words.into_iter().chain([path.as_os_str()]));
}

#[test]
fn a_disk_of_qemu_shrinks_under_its_guest() {
    shrinks_under_its_guest("a_disk_of_qemu_shrinks_under_its_guest", VHD_OF_QEMU);
}

#[test]
fn a_disk_of_ours_shrinks_under_its_guest() {
    shrinks_under_its_guest("a_disk_of_ours_shrinks_under_its_guest", VHD_OF_OURS);
}

#[test]
fn a_vhdx_of_qemu_shrinks_under_its_guest() {
    shrinks_under_its_guest("a_vhdx_of_qemu_shrinks_under_its_guest", VHDX_OF_QEMU);
}

#[test]
fn a_vhdx_of_ours_shrinks_under_its_guest() {
    shrinks_under_its_guest("a_vhdx_of_ours_shrinks_under_its_guest", VHDX_OF_OURS);
}

#[test]
fn a_disk_of_qemu_survives_a_killed_daemon() {
    survives_a_killed_daemon("a_disk_of_qemu_survives_a_killed_daemon", VHD_OF_QEMU);
}

#[test]
fn a_disk_of_ours_survives_a_killed_daemon() {
    survives_a_killed_daemon("a_disk_of_ours_survives_a_killed_daemon", VHD_OF_OURS);
}

#[test]
fn a_vhdx_of_qemu_survives_a_killed_daemon() {
    survives_a_killed_daemon("a_vhdx_of_qemu_survives_a_killed_daemon", VHDX_OF_QEMU);
}

#[test]
fn a_child_lives_over_its_parent() {
    lives_over_its_parent("a_child_lives_over_its_parent", VHD_OF_OURS);
}

#[test]
fn a_child_vhdx_lives_over_its_parent() {
    lives_over_its_parent("a_child_vhdx_lives_over_its_parent", VHDX_OF_OURS);
}

/// A guest goes on on a child of its disk: what it writes and trims there, no kill of the daemon loses, and the parent
/// stays as it is.
fn lives_over_its_parent(test: &str, maker: Maker) {
    if let Some(reason) = obstacle() {
        return say_skipped(test, &reason);
    }
    let mut rig = Rig::new(maker.extension);
    (maker.make)(GUEST_SIZE, &rig.disk("base"));
    rig.serve();
    let device = rig.attach("base");
    make_file_system(&device);
    rig.mount_files();
    write_files(&rig, 0);
    rig.detach();
    rig.unmount();
    let base = fs::read(rig.disk("base")).expect("readable");

    let words = ["create", "--type", "differencing", "--parent"].map(OsStr::new);
    let (parent, child) = (rig.disk("base"), rig.disk("guest"));
    let paths = [parent.as_os_str(), child.as_os_str()];
    run(VHDFS, words.into_iter().chain(paths));
    rig.serve();
    let writing = fs::OpenOptions::new().write(true).open(rig.raw("base"));
    assert!(writing.is_err(), "a parent is for reading only");
    rig.attach("guest");
    rig.mount_files();
    write_files(&rig, 1);
    delete_files(&rig, 0);
    fio(&rig, "randwrite", &[]);
    // What the guest's file system did not flush, it may forget.
    run("sync", ["-f".as_ref(), rig.files().as_os_str()]);
    let sums = checksums(&rig);
    rig.crash();

    rig.serve();
    rig.attach("guest");
    rig.mount_files();
    assert_eq!(checksums(&rig), sums, "after a kill");
    fio(&rig, "randread", &[]);
    delete_files(&rig, 1);
    rig.detach();
    rig.unmount();
    assert!(
        fs::read(rig.disk("base")).expect("readable") == base,
        "the parent changed"
    );
    let first = report(&["compact"], &child);
    assert_eq!(number(&first, "length_after"), length(&child));
    let second = report(&["compact"], &child);
    for key in ["blocks_dropped", "blocks_moved"] {
        assert_eq!(number(&second, key), 0, "{first} {second}");
    }
    for path in [&parent, &child] {
        let report = report(&["check"], path);
        assert_eq!(report["errors"], serde_json::json!([]), "{report}");
    }
    rig.serve();
    rig.attach("guest");
    rig.mount_files();
    assert_eq!(checksums(&rig), sums, "compacted");
    fio(&rig, "randread", &[]);
    rig.detach();
    run("fsck.ext4", ["-fn".as_ref(), rig.raw("guest").as_os_str()]);
    rig.unmount();
}

fn shrinks_under_its_guest(test: &str, maker: Maker) {
    if let Some(reason) = obstacle() {
        return say_skipped(test, &reason);
    }
    let mut rig = Rig::new(maker.extension);
    (maker.make)(GUEST_SIZE, &rig.disk("guest"));
    (maker.make)(MIRROR_SIZE, &rig.disk("mirror"));
    rig.serve();
    let mut mirror = Mirror::new(&rig.raw("mirror"), &rig.path("mirror.raw"), 0x5eed);
    mirror.work(150).expect("the disk takes it");

    let device = rig.attach("guest");
    make_file_system(&device);
    rig.mount_files();
    let sums = write_files(&rig, 0);
    fio(&rig, "randwrite", &[]);
    let before = length(&rig.disk("guest"));
    delete_files(&rig, 0);

    let predicted = predicted_length(&rig);
    assert!(
        predicted < before,
        "nothing to gain: {before} bytes, predicted {predicted}"
    );
    wait_until("the predicted length", PATIENCE, || {
        // Guests at work, with pauses just long enough for a compaction to begin.
        fio(&rig, "randread", &["--number_ios=500", "--randrepeat=0"]);
        mirror.work(3).expect("the disk takes it");
        std::thread::sleep(Duration::from_millis(600));
        length(&rig.disk("guest")) <= predicted
    });
    assert_eq!(length(&rig.disk("guest")), predicted, "\n{}", rig.log());

    fio(&rig, "randread", &[]);
    fio(&rig, "randwrite", &[]);
    assert_eq!(checksums(&rig), sums);
    rig.detach();
    mirror.verify();
    run("fsck.ext4", ["-fn".as_ref(), rig.raw("guest").as_os_str()]);
    let guest_raw = rig.path("guest.raw");
    run(
        "cp",
        [
            "--sparse=always".as_ref(),
            rig.raw("guest").as_os_str(),
            guest_raw.as_os_str(),
        ],
    );
    let expected_mirror = mirror.expected_path().to_owned();
    drop(mirror);
    rig.unmount();
    judge(&rig, "guest", &guest_raw);
    judge(&rig, "mirror", &expected_mirror);
}

fn survives_a_killed_daemon(test: &str, maker: Maker) {
    if let Some(reason) = obstacle() {
        return say_skipped(test, &reason);
    }
    let mut rig = Rig::new(maker.extension);
    (maker.make)(GUEST_SIZE, &rig.disk("guest"));
    (maker.make)(MIRROR_SIZE, &rig.disk("mirror"));
    rig.serve();
    let mut mirror = Mirror::new(&rig.raw("mirror"), &rig.path("mirror.raw"), 0xc0ffee);
    let device = rig.attach("guest");
    make_file_system(&device);
    rig.mount_files();

    let mut in_the_middle = 0;
    for round in 0..6 {
        let sums = write_files(&rig, round);
        delete_files(&rig, round);
        let predicted = predicted_length(&rig);
        mirror = kill_in_the_middle(&mut rig, mirror, predicted);
        in_the_middle += usize::from(length(&rig.disk("guest")) > predicted);

        rig.serve();
        mirror.reopen();
        mirror.verify();
        rig.attach("guest");
        rig.mount_files();
        assert_eq!(checksums(&rig), sums, "round {round}");
        if in_the_middle == 2 {
            break;
        }
    }
    assert!(in_the_middle > 0, "no kill hit a compaction before its end");

    rig.detach();
    run("fsck.ext4", ["-fn".as_ref(), rig.raw("guest").as_os_str()]);
    let guest_raw = rig.path("guest.raw");
    run(
        "cp",
        [
            "--sparse=always".as_ref(),
            rig.raw("guest").as_os_str(),
            guest_raw.as_os_str(),
        ],
    );
    let expected_mirror = mirror.expected_path().to_owned();
    drop(mirror);
    rig.unmount();
    judge(&rig, "guest", &guest_raw);
    judge(&rig, "mirror", &expected_mirror);
}

/// Waits until the compaction of the guest's disk has changed its metadata, then kills the daemon, while another guest
/// writes to the other disk. On a slow machine the compaction may be over before this looks.
fn kill_in_the_middle(rig: &mut Rig, mut mirror: Mirror, predicted: u64) -> Mirror {
    // The block table of a VHD; of a VHDX the headers, the log and the block table.
    let head = if rig.qemu_format() == "vpc" {
        8192
    } else {
        4 << 20
    };
    let file = rig.disk("guest");
    let before = head_of(&file, head);
    std::thread::scope(|scope| {
        let writer = scope.spawn(move || {
            while mirror.work(1).is_ok() {}
            mirror
        });
        let deadline = Instant::now() + PATIENCE;
        let begun = || head_of(&file, head) != before || length(&file) <= predicted;
        while !begun() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(2));
        }
        let in_time = begun();
        // Before anything is judged: the writer goes on for as long as its disk does.
        rig.crash();
        assert!(in_time, "no compaction within {PATIENCE:?}");
        writer.join().expect("the writer ends when its disk does")
    })
}

/// The length that an offline compaction of the guest's disk, as it is now, would leave.
fn predicted_length(rig: &Rig) -> u64 {
    let copy = rig.path("copy").with_extension(rig.extension());
    // A daemon that stands still cannot change the file under the copy.
    rig.signal(Signal::STOP);
    let copied = fs::copy(rig.disk("guest"), &copy);
    rig.signal(Signal::CONT);
    copied.expect("there is room for a copy");
    let predicted = number(
        &report(&["compact", "--dry-run", "--no-fs-aware"], &copy),
        "length_after",
    );
    fs::remove_file(&copy).expect("the copy is ours");
    predicted
}

/// The last word on an unmounted disk: QEMU reads what is expected, our own check finds nothing, a compaction leaves
/// QEMU reading the same, and another one finds nothing to do.
fn judge(rig: &Rig, name: &str, expected: &Path) {
    let disk = rig.disk(name);
    let compare = || {
        let options = ["compare", "-f", rig.qemu_format(), "-F", "raw"].map(OsStr::new);
        run(
            "qemu-img",
            options
                .into_iter()
                .chain([disk.as_os_str(), expected.as_os_str()]),
        )
    };
    let check = || {
        let report = report(&["check"], &disk);
        assert_eq!(report["errors"], serde_json::json!([]), "{name}: {report}");
        assert_eq!(
            report["warnings"],
            serde_json::json!([]),
            "{name}: {report}"
        );
    };
    let qemu_check = || {
        let words = ["check", "-q", "-f", rig.qemu_format()].map(OsStr::new);
        // QEMU's VHD driver has no check.
        if rig.qemu_format() != "vpc" {
            run("qemu-img", words.into_iter().chain([disk.as_os_str()]));
        }
    };
    compare();
    check();
    qemu_check();
    let first = report(&["compact", "--no-fs-aware"], &disk);
    assert_eq!(number(&first, "length_after"), length(&disk));
    compare();
    check();
    qemu_check();
    let second = report(&["compact", "--no-fs-aware"], &disk);
    for key in ["blocks_dropped", "blocks_moved"] {
        assert_eq!(
            number(&second, key),
            0,
            "{name}: the second compaction found something: {second}"
        );
    }
    assert_eq!(
        number(&second, "length_before"),
        number(&second, "length_after")
    );
}

fn make_file_system(device: &str) {
    // A small journal, written once: what ext4 does on its own must not change which blocks are in use.
    let options = [
        "-q",
        "-J",
        "size=4",
        "-E",
        "lazy_itable_init=0,lazy_journal_init=0",
        device,
    ];
    run("mkfs.ext4", options);
}

/// Writes files that stay between files that go; returns the checksums of all that stay.
fn write_files(rig: &Rig, round: usize) -> String {
    let script = "cd \"$1\" && for i in 1 2 3 4 5 6 7 8 9 10; do \
         head -c 6M /dev/urandom >stays-$2-$i && head -c 10M /dev/urandom >goes-$2-$i || exit; done && sync -f .";
    let round = round.to_string();
    run(
        "sh",
        [
            "-c".as_ref(),
            script.as_ref(),
            "sh".as_ref(),
            rig.files().as_os_str(),
            round.as_ref(),
        ],
    );
    checksums(rig)
}

/// Deletes the files that go, and has the file system discard their space.
fn delete_files(rig: &Rig, round: usize) {
    let script = "cd \"$1\" && rm goes-$2-* && sync -f . && fstrim . && sync -f .";
    let round = round.to_string();
    run(
        "sh",
        [
            "-c".as_ref(),
            script.as_ref(),
            "sh".as_ref(),
            rig.files().as_os_str(),
            round.as_ref(),
        ],
    );
}

fn checksums(rig: &Rig) -> String {
    let script = "cd \"$1\" && sha256sum stays-*";
    run(
        "sh",
        [
            "-c".as_ref(),
            script.as_ref(),
            "sh".as_ref(),
            rig.files().as_os_str(),
        ],
    )
}

/// fio on one file of the guest, each block with a checksum of its own that fio verifies.
fn fio(rig: &Rig, kind: &str, more: &[&str]) {
    let file = format!("--filename={}", rig.files().join("verify").display());
    let job = [
        "--name=verify",
        "--size=24m",
        "--bs=4k",
        "--direct=1",
        "--verify=crc32c",
        "--verify_fatal=1",
    ];
    let kind = format!("--rw={kind}");
    run(
        "fio",
        job.iter()
            .copied()
            .chain([file.as_str(), kind.as_str()])
            .chain(more.iter().copied()),
    );
}
