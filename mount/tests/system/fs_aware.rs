//! Files are deleted, nobody trims: the daemon finds out from the guest's file system, once that is
//! unmounted and nobody has the disk open for writing.

use std::ffi::OsStr;
use std::fs;
use std::hash::{DefaultHasher, Hasher};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use vhdfs::disk::{Disk, HostParents, OpenOptions};
use vhdfs::error::{ErrorKind, OpenError};

use super::rig::{Rig, VHDFS, length, number, obstacle, report, run, say_skipped, wait_until};
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

/// Of the content of the disk at `child`, which has its parent below `parents`.
fn hash_of(child: &Path, parents: &Path) -> Result<u64, OpenError> {
    let options = OpenOptions {
        read_only: true,
        ..OpenOptions::default()
    };
    let parents = HostParents::beside(child, &[parents.to_owned()]);
    let disk = Disk::open_with(child, &options, &parents)?;
    let mut hash = DefaultHasher::new();
    let mut piece = vec![0; 1 << 20];
    for at in (0..disk.len()).step_by(piece.len()) {
        disk.read_at(&mut piece, at).expect("readable");
        hash.write(&piece);
    }
    Ok(hash.finish())
}

/// A child that no search finds is over the disk: as long as it would be accepted, it reads what it read.
#[test]
fn what_is_free_stays_for_a_child_that_is_elsewhere() {
    let test = "what_is_free_stays_for_a_child_that_is_elsewhere";
    if let Some(reason) = obstacle() {
        return say_skipped(test, &reason);
    }
    for maker in [VHD_OF_QEMU, VHDX_OF_OURS] {
        let mut rig = Rig::new(maker.extension);
        (maker.make)(GUEST_SIZE, &rig.disk("guest"));
        rig.serve_with(&["--no-compact"]);
        let device = rig.attach("guest");
        make_file_system(&device);
        rig.mount_files();
        write_files(&rig, 0);
        delete_files(&rig, 0);
        rig.detach();
        rig.unmount();
        fs::create_dir(rig.path("elsewhere")).expect("a directory");
        let child = (rig.path("elsewhere/child")).with_extension(maker.extension);
        let disk = rig.disk("guest");
        let words = ["create", "--parent"].map(OsStr::new);
        run(
            VHDFS,
            words
                .into_iter()
                .chain([disk.as_os_str(), child.as_os_str()]),
        );
        let disks = rig.path("disks");
        let read = || hash_of(&child, &disks);
        let before = read().expect("a child that opens");
        let full = length(&disk);
        rig.serve_with(&["--verbose"]);
        wait_until("a word about the child", PATIENCE, || {
            rig.log().contains("would still be accepted")
        });
        wait_until("a first look at the disk", PATIENCE, || {
            rig.log().contains("nothing worth compacting") || rig.log().contains("compacted from")
        });
        rig.unmount();
        assert_eq!(read().expect("the child opens"), before);
        // Somebody asks for it: a VHDX says that it is another disk now.
        let report = report(&["compact"], &disk);
        let reason = report["not_fs_aware"].as_str().unwrap_or_default();
        match maker.extension {
            "vhd" => {
                assert!(reason.contains("--no-children"), "{report}");
                assert_eq!(read().expect("the child opens"), before);
            }
            _ => {
                assert!(length(&disk) + (64 << 20) < full, "{report}");
                let refused = read().expect_err("another disk");
                assert_eq!(refused.kind(), ErrorKind::ParentMismatch);
            }
        }
    }
}
