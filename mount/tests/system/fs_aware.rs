//! Files are deleted, nobody trims: the daemon finds out from the guest's file system, once that is
//! unmounted and nobody has the disk open for writing.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use super::rig::{Rig, length, number, obstacle, report, run, say_skipped, wait_until};
use super::{
    GUEST_SIZE, Maker, PATIENCE, VHD_OF_QEMU, VHDX_OF_OURS, checksums, make_file_system,
    write_files,
};

#[test]
fn a_disk_shrinks_when_its_guest_is_gone() {
    // A VHD gives up what is free only if there is no child anywhere.
    let vouched = &["--no-children"];
    shrinks(
        "a_disk_shrinks_when_its_guest_is_gone",
        VHD_OF_QEMU,
        vouched,
    );
}

#[test]
fn a_vhdx_shrinks_when_its_guest_is_gone() {
    shrinks("a_vhdx_shrinks_when_its_guest_is_gone", VHDX_OF_OURS, &[]);
}

/// Deletes the files that go; says nothing to the disk.
fn delete_files(rig: &Rig, round: usize) {
    let script = "cd \"$1\" && rm goes-$2-* && sync -f .";
    let (round, files) = (round.to_string(), rig.files());
    let words = ["-c", script, "sh"].map(OsStr::new);
    run(
        "sh",
        words.into_iter().chain([files.as_os_str(), round.as_ref()]),
    );
}

/// Bytes that the host stores for a file.
fn stored(path: &Path) -> u64 {
    fs::metadata(path).expect("the file exists").blocks() * 512
}

fn shrinks(test: &str, maker: Maker, options: &[&str]) {
    if let Some(reason) = obstacle() {
        return say_skipped(test, &reason);
    }
    let mut rig = Rig::new(maker.extension);
    (maker.make)(GUEST_SIZE, &rig.disk("guest"));
    rig.serve_with(options);
    let device = rig.attach("guest");
    make_file_system(&device);
    rig.mount_files();
    let sums = write_files(&rig, 0);
    delete_files(&rig, 0);
    let before = length(&rig.disk("guest"));
    let stored_before = stored(&rig.disk("guest"));
    // As long as somebody could write, nothing goes but what a growing file has too much.
    std::thread::sleep(Duration::from_secs(2));
    assert!(
        stored(&rig.disk("guest")) + (16 << 20) >= stored_before,
        "\n{}",
        rig.log()
    );
    rig.detach();
    wait_until("what was deleted to go", PATIENCE, || {
        length(&rig.disk("guest")) + (80 << 20) < before
    });

    // Another guest comes, perhaps in the middle of it.
    rig.attach("guest");
    rig.mount_files();
    assert_eq!(checksums(&rig), sums);
    write_files(&rig, 1);
    delete_files(&rig, 1);
    let sums = checksums(&rig);
    rig.detach();
    // Whoever only reads is not disturbed, and disturbs nothing.
    let reader = fs::File::open(rig.raw("guest")).expect("readable");
    let full = length(&rig.disk("guest"));
    wait_until("what was deleted to go", PATIENCE, || {
        length(&rig.disk("guest")) + (80 << 20) < full
    });
    run("fsck.ext4", ["-fn".as_ref(), rig.raw("guest").as_os_str()]);
    drop(reader);
    rig.attach("guest");
    rig.mount_files();
    assert_eq!(checksums(&rig), sums, "\n{}", rig.log());
    rig.detach();
    rig.unmount();

    let disk = rig.disk("guest");
    let first = report(&[&["compact"], options].concat(), &disk);
    assert_eq!(number(&first, "length_after"), length(&disk));
    let part = &first["partitions"][0];
    assert_eq!(part["filesystem"], "ext4", "{first}");
    assert!(number(part, "free") > 500 << 20, "{first}");
    let second = report(&[&["compact"], options].concat(), &disk);
    for key in ["blocks_dropped", "blocks_moved"] {
        assert_eq!(number(&second, key), 0, "{first} {second}");
    }
    let found = report(&["check"], &disk);
    assert_eq!(found["errors"], serde_json::json!([]), "{found}");
}
