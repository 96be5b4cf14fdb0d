//! Files that we left without closing them, for QEMU to open: it replays our log to what we read
//! through it.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use vhdfs::disk::{Disk, OpenOptions};
use vhdfs::storage::Storage;
use vhdfs::storage::sim::{Change, Choice, CrashChoice, Keep, OpKind, Random, SimStorage};
use vhdfs::units::{FileOffset, FileRange, u64_from};

use crate::mirror::{
    compact, export, is_sound, open, open_read_only, qemu_compares, qemu_format, same_bytes,
};
use crate::qemu::Maker;
use crate::support::second::build::model::save;
use crate::support::second::read;
use crate::support::tools::{installed, replayed_by_qemu, run};
use crate::support::{env_number, size};

const MIB: u64 = 1 << 20;

const VHDX: Maker = Maker::ours("vhdx", MIB, 30 * MIB + 512);
const VHD: Maker = Maker::ours("vhd", 2 * MIB, 40 * MIB + 1536);

/// A copy of the file at `path` as the process that has it open would leave it if it died now.
fn killed(path: &Path) -> PathBuf {
    let extension = path.extension().unwrap();
    let copy = path.with_file_name("killed").with_extension(extension);
    fs::copy(path, &copy).unwrap();
    copy
}

fn has_live_log(path: &Path) -> bool {
    read(&SimStorage::from_file(path).unwrap())
        .unwrap()
        .vhdx()
        .log
        .is_live()
}

/// QEMU replays the log of the file at `path`, if it has one, to what the raw file at `raw` holds.
fn qemu_takes_over(path: &Path, raw: &Path) {
    if qemu_format(path) == "vhdx" {
        if has_live_log(path) {
            // It needs to write for that, and says so.
            let refused = run("qemu-img", &["check", "-f", "vhdx"], &[path]);
            assert!(!refused.status.success());
            let said = String::from_utf8_lossy(&refused.stderr).into_owned();
            assert!(said.contains("log that needs to be replayed"), "{said}");
        }
        replayed_by_qemu(path);
        assert!(!has_live_log(path));
        is_sound(path);
    }
    qemu_compares(path, raw);
}

/// After each of many things done to one open disk, QEMU finds all of them in a copy of the file.
fn left_open(maker: Maker) -> u64 {
    let mut live = 0;
    for seed in 1..=env_number("VHDFS_SOAK", 1) {
        let folder = tempfile::tempdir().unwrap();
        let mut mirrored = maker.make(folder.path(), seed);
        let disk = open(&mirrored.path);
        for _ in 0..16 {
            mirrored.act(&disk);
            let copy = killed(&mirrored.path);
            live += u64::from(maker.extension == "vhdx" && has_live_log(&copy));
            mirrored.we_read_from(&copy);
            qemu_takes_over(&copy, &mirrored.raw);
            // And back to us.
            mirrored.we_read_from(&copy);
            let ours = open(&copy);
            ours.write_at(&[1], 0).unwrap();
            ours.close().unwrap();
            drop(ours);
            is_sound(&copy);
        }
        disk.close().unwrap();
        drop(disk);
        mirrored.agree();
    }
    live
}

#[test]
fn qemu_takes_over_a_vhdx_that_we_left_open() {
    if installed(&["qemu-img"]) {
        let live = left_open(VHDX) + left_open(VHDX.by_qemu("block_size=1M"));
        assert!(live > 20, "only {live} files had a log to replay");
    }
}

#[test]
fn qemu_takes_over_a_vhd_that_we_left_open() {
    if installed(&["qemu-img"]) {
        left_open(VHD);
        left_open(VHD.by_qemu("force_size=on"));
    }
}

/// A long session uses the log again and again. The table has several pages, of which the last
/// entries in the log name only some.
#[test]
fn qemu_takes_over_a_vhdx_whose_log_was_full() {
    if !installed(&["qemu-img"]) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let mut mirrored = Maker::ours("vhdx", MIB, 2 << 30).make(folder.path(), 4);
    let simulated = Simulated::open(&mirrored.path);
    let copy = folder.path().join("copy.vhdx");
    for turn in 0..330 {
        let at = mirrored.below(mirrored.disk_len / MIB) * MIB;
        mirrored.write(&simulated.disk, at..at + 4096);
        if turn % 7 == 0 {
            simulated.disk.flush().unwrap();
        }
        if turn % 100 == 60 {
            // The file is cut in the midst of it.
            mirrored.discard(&simulated.disk, 0..200 << 20);
            compact(&simulated.disk, false);
        }
        if turn > 120 && turn % 20 == 0 {
            save(&*simulated.storage, &copy);
            qemu_takes_over(&copy, &mirrored.raw);
        }
    }
}

/// A disk in the memory of a simulated host.
struct Simulated {
    storage: Arc<SimStorage>,
    disk: Arc<Disk>,
    /// Where the log lies.
    log: FileRange,
}

impl Simulated {
    /// Of the VHDX at `path`.
    fn open(path: &Path) -> Self {
        let storage = Arc::new(SimStorage::from_file(path).unwrap());
        let image = read(&*storage).unwrap();
        let log = &image.vhdx().log;
        let log = FileRange::new(FileOffset::new(log.at), log.len);
        let shared: Arc<dyn Storage> = storage.clone();
        let options = OpenOptions::default();
        let disk = Disk::open_storage(shared, Path::new("simulated"), &options).unwrap();
        Self { storage, disk, log }
    }

    /// What a power cut leaves that keeps any part of what was not synced, but changes of the log in
    /// their order, the last one torn. QEMU replays an entry behind one that is missing, too.
    fn cut(&self, seed: u64) -> SimStorage {
        let changes = self.storage.unsynced().into_iter();
        let in_log = { changes }.filter(|change| self.log.overlaps(change.range));
        let mut random = Random::new(seed);
        let mut left = random.below(u64_from(in_log.count()) + 1);
        let atomic = [512, 4096][size(random.below(2))];
        let mut any = Choice::Seeded { seed, atomic };
        self.storage.crash(&mut |change: &Change| {
            let is_log = self.log.overlaps(change.range) && change.kind != OpKind::SetLen;
            match (is_log, left) {
                (true, 0) => Keep::Nothing,
                (true, 2..) => {
                    left -= 1;
                    Keep::All
                }
                (true, 1) => {
                    left = 0;
                    any.keep(change)
                }
                (false, _) => any.keep(change),
            }
        })
    }
}

/// The power is cut after each of many things done to a disk. QEMU reads the same as we do, whatever
/// that is. Says how many logs there were to replay.
fn cut(maker: Maker, seed: u64) -> u64 {
    let folder = tempfile::tempdir().unwrap();
    let mut mirrored = maker.make(folder.path(), seed);
    let simulated = Simulated::open(&mirrored.path);
    let path = folder.path().join("cut.vhdx");
    let [before, after] = ["before.raw", "after.raw"].map(|name| folder.path().join(name));
    let mut live = 0;
    for turn in 0..8 {
        mirrored.act(&simulated.disk);
        for left in [
            simulated.storage.crash(&mut Choice::AllLost),
            simulated.cut(seed << 32 | turn << 1),
            simulated.cut(seed << 32 | turn << 1 | 1),
        ] {
            save(&left, &path);
            export(&open_read_only(&path), &before);
            live += u64::from(has_live_log(&path));
            qemu_takes_over(&path, &before);
            export(&open_read_only(&path), &after);
            same_bytes(&before, &after);
        }
    }
    live
}

#[test]
fn qemu_takes_over_a_vhdx_after_a_power_cut() {
    if !installed(&["qemu-img"]) {
        return;
    }
    for seed in 1..=env_number("VHDFS_SOAK", 1) {
        let live = cut(VHDX, 2 * seed) + cut(VHDX.by_qemu("block_size=1M"), 2 * seed + 1);
        assert!(live > 20, "only {live} files had a log to replay");
    }
}
