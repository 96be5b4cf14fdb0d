//! QEMU reads, checks and replays what is written here. Skipped where there is no `qemu-img`.

use std::path::Path;
use std::process::Command;

use super::*;

fn qemu_img(args: &[&str]) -> Option<(bool, String)> {
    let output = match Command::new("qemu-img").args(args).output() {
        Ok(output) => output,
        Err(error) => {
            println!("skipped: qemu-img: {error}");
            return None;
        }
    };
    let text = String::from_utf8_lossy(&output.stdout).into_owned()
        + &String::from_utf8_lossy(&output.stderr);
    Some((output.status.success(), text))
}

fn save(sim: &SimStorage, path: &Path) {
    std::fs::write(path, sim.to_bytes()).unwrap();
}

/// A disk of 64 blocks of which some are used, with what a guest reads from it.
fn written() -> (Arc<SimStorage>, Box<dyn Image>, Vec<u8>) {
    let sim = Arc::new(empty(64, 512, false));
    let image = open_shared(&sim, OPTIONS);
    let mut disk = vec![0; 64 << 20];
    image.begin_change().unwrap();
    for number in [3_u32, 60, 0, 17, 18, 5] {
        let slot = image.reserve().unwrap();
        let data: Vec<u8> = (0..4096_u32)
            .map(|n| u8::try_from((n + number) % 251).unwrap())
            .collect();
        sim.write_all_at(&data, slot.plus(8192)).unwrap();
        disk[usize_from_u32(number << 20) + 8192..][..4096].copy_from_slice(&data);
        image.commit(&[place(number, slot, None)]).unwrap();
    }
    image
        .commit(&[MapEdit::Drop {
            block: block(0),
            reads: Reads::Zeros,
        }])
        .unwrap();
    disk[..1 << 20].fill(0);
    image.sync().unwrap();
    (sim, image, disk)
}

#[test]
fn qemu_reads_what_is_written() {
    let (sim, image, disk) = written();
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let text = |name: &str| path(name).to_str().unwrap().to_owned();
    std::fs::write(path("raw"), &disk).unwrap();
    // As a crash leaves it: QEMU has to replay our log.
    save(&sim, &path("dirty.vhdx"));
    let (after, log) = qemu_img_pair(&text("dirty.vhdx"));
    let Some(log) = log else { return };
    assert!(!after, "a log is to be replayed: {log}");
    let (is_ok, said) = qemu_img(&["check", "-r", "all", &text("dirty.vhdx")]).unwrap();
    assert!(is_ok, "{said}");
    compare(&text("raw"), &text("dirty.vhdx"));
    image.cut(Cut::ALL).unwrap();
    image.settle().unwrap();
    save(&sim, &path("clean.vhdx"));
    compare(&text("raw"), &text("clean.vhdx"));
    assert_eq!(sim.len().unwrap(), 4 * MIB + 6 * MIB);
}

/// Whether QEMU opens the file at `path` read-only, and what it says.
fn qemu_img_pair(path: &str) -> (bool, Option<String>) {
    match qemu_img(&["info", path]) {
        None => (false, None),
        Some((is_ok, said)) => (is_ok, Some(said)),
    }
}

fn compare(raw: &str, image: &str) {
    let (is_ok, said) = qemu_img(&["check", image]).unwrap();
    assert!(is_ok, "{said}");
    let (is_ok, said) = qemu_img(&["compare", "-f", "raw", "-F", "vhdx", raw, image]).unwrap();
    assert!(is_ok, "{said}");
}

#[test]
fn files_of_qemu_are_taken_over() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("made.vhdx");
    let name = path.to_str().unwrap();
    for kind in ["dynamic", "fixed"] {
        let options = format!("subformat={kind},block_size=1M");
        let Some((is_ok, said)) = qemu_img(&["create", "-f", "vhdx", "-o", &options, name, "9M"])
        else {
            return;
        };
        assert!(is_ok, "{said}");
        let sim = Arc::new(SimStorage::from_file(&path).unwrap());
        let image = open_shared(&sim, OPTIONS);
        let is_fixed = kind == "fixed";
        assert_eq!(image.geometry().disk_type == DiskType::Fixed, is_fixed);
        // QEMU's fixed disks have room for their blocks but do not name it.
        let len = image.file_len();
        assert_eq!(image.map().present_count(), 0);
        image.begin_change().unwrap();
        allocate(&*image, 8);
        assert_eq!(image.file_len() == len, is_fixed);
        image.cut(Cut::ALL).unwrap();
        image.settle().unwrap();
        assert_eq!(image.file_len() == len, is_fixed);
        std::fs::remove_file(&path).unwrap();
        save(&sim, &path);
        let (is_ok, said) = qemu_img(&["check", name]).unwrap();
        assert!(is_ok, "{said}");
        std::fs::remove_file(&path).unwrap();
    }
}
