//! Each kind of damage that a repair mends: rehearsed, mended, saved, put back, and interrupted at every
//! step of each.

use std::sync::Arc;

use uuid::Uuid;

mod rescue;

use super::*;
use crate::disk::{Disk, OpenOptions};
use crate::format::DiskType;
use crate::format::vhd::{FOOTER_LEN, Footer};
use crate::format::vhdx::MIB;
use crate::image::read_array;
use crate::storage::sim::{OpKind, Random, SimStorage};
use crate::units::{FileOffset, low_u32, usize_from};

/// Blocks of the disks, and bytes in each.
const BLOCKS: u64 = 8;
const VHD_BLOCK: u64 = 512 << 10;
const SLOT: u64 = VHD_BLOCK + 512;
/// Where the tables lie, and where the blocks of a VHDX start.
const TABLE: u64 = 1536;
const BAT: u64 = 3 * MIB;
const DATA: u64 = 4 * MIB;

const REPAIR: CheckOptions = CheckOptions {
    repair: true,
    zero_lost: false,
    dry_run: false,
    backup: false,
    quiet_time: std::time::Duration::ZERO,
};
const DRY_RUN: CheckOptions = CheckOptions {
    dry_run: true,
    ..REPAIR
};

fn at(offset: u64) -> FileOffset {
    FileOffset::new(offset)
}

/// A disk with data in blocks 0, 1 and 4.
fn good(format: Format) -> SimStorage {
    let sim = SimStorage::new();
    let block = match format {
        Format::Vhd => {
            let size = BLOCKS * VHD_BLOCK;
            vhd::create(&sim, DiskType::Dynamic, size, low_u32(VHD_BLOCK)).unwrap();
            VHD_BLOCK
        }
        Format::Vhdx => {
            let disk = vhdx::NewDisk {
                disk_type: DiskType::Dynamic,
                disk_len: BLOCKS * MIB,
                block_size: low_u32(MIB),
                sector_size: 512,
                physical_sector_size: 4096,
                parent: None,
            };
            vhdx::create(&sim, &disk).unwrap();
            MIB
        }
    };
    let storage = Arc::new(sim);
    let disk = open(Arc::<SimStorage>::clone(&storage), false).unwrap();
    for (byte, number) in [(7, 0), (8, 1), (9, 4)] {
        disk.write_at(&[byte; 70_000], number * block + 5).unwrap();
    }
    disk.close().unwrap();
    drop(disk);
    storage.fork()
}

fn open(storage: Arc<SimStorage>, read_only: bool) -> Result<Arc<Disk>, OpenError> {
    let options = OpenOptions {
        read_only,
        ..OpenOptions::default()
    };
    Disk::open_storage(storage, Path::new("disk"), &options)
}

/// What a guest reads in each half MiB; `None` where that fails.
fn content(sim: &SimStorage) -> Result<Vec<Option<u32>>, String> {
    let disk = open(Arc::new(sim.fork()), true).map_err(|error| error.to_string())?;
    let mut buf = vec![0; usize_from(VHD_BLOCK)];
    let parts = 0..disk.len() / VHD_BLOCK;
    let read = parts.map(|part| {
        let read = disk.read_at(&mut buf, part * VHD_BLOCK);
        read.is_ok().then(|| crc32c::crc32c(&buf))
    });
    Ok(read.collect())
}

/// That `now` reads as `before` wherever that could be read.
#[track_caller]
fn reads_as(now: &SimStorage, before: &[Option<u32>], what: &str) {
    let now = content(now).unwrap_or_else(|error| panic!("{what}: {error}"));
    for (part, (now, before)) in now.iter().zip(before).enumerate() {
        assert!(before.is_none() || now == before, "{what}: part {part}");
    }
}

fn footer(sim: &SimStorage) -> (Footer, u64) {
    let end = sim.len().unwrap() - FOOTER_LEN;
    (
        Footer::parse(&read_array(sim, at(end)).unwrap()).unwrap(),
        end,
    )
}

/// Moves the footer `by` bytes on. Some of what is then in front of it holds `fill`.
fn lengthen(sim: &SimStorage, by: u64, fill: u8) {
    let (footer, end) = footer(sim);
    sim.write_all_at(&footer.to_bytes(), at(end + by)).unwrap();
    sim.write_all_at(&[0; 512], at(end)).unwrap();
    let some = vec![fill; usize_from(by.min(3000))];
    sim.write_all_at(&some, at(end + by / 2)).unwrap();
}

/// Names `count` blocks in the table that begin where the file ends, `gap` bytes apart.
fn name_lost_blocks(sim: &SimStorage, count: u64, gap: u64) {
    let (_, end) = footer(sim);
    for (n, block) in (0..count).zip([7_u64, 2, 5]) {
        let sector = low_u32((end + gap + n * (SLOT + gap)).div_ceil(512));
        sim.write_all_at(&sector.to_be_bytes(), at(TABLE + 4 * block))
            .unwrap();
    }
}

fn set_entry(sim: &SimStorage, index: u64, state: u64, place: u64) {
    sim.write_all_at(&(place | state).to_le_bytes(), at(BAT + 8 * index))
        .unwrap();
}

/// A VHDX of which a writer died with changes in its log.
fn with_log() -> SimStorage {
    let storage = Arc::new(good(Format::Vhdx));
    let disk = open(Arc::<SimStorage>::clone(&storage), false).unwrap();
    disk.write_at(&[5; 4096], 6 * MIB).unwrap();
    disk.flush().unwrap();
    storage.kill()
}

type Change = fn(&SimStorage);
type Damage = (&'static str, Format, Change);

/// What a repair mends, a VHD's and then a VHDX's.
const DAMAGES: &[Damage] = &[
    ("the footer is missing", Format::Vhd, |sim| {
        sim.set_len(sim.len().unwrap() - 512).unwrap();
    }),
    ("the footer is damaged", Format::Vhd, |sim| {
        sim.write_all_at(b"xyz", at(sim.len().unwrap() - 400))
            .unwrap();
    }),
    ("the footer has 511 bytes", Format::Vhd, |sim| {
        sim.set_len(sim.len().unwrap() - 1).unwrap();
    }),
    ("the copy is damaged", Format::Vhd, |sim| {
        sim.write_all_at(&[1; 30], at(20)).unwrap();
    }),
    ("the copy is missing", Format::Vhd, |sim| {
        sim.write_all_at(&[0; 512], at(0)).unwrap();
    }),
    ("the copy is stale", Format::Vhd, |sim| {
        let (footer, _) = footer(sim);
        let mut bytes = footer.to_bytes();
        bytes[27] ^= 1;
        let sum = bytes
            .iter()
            .enumerate()
            .filter(|(n, _)| !(64..68).contains(n));
        let sum = !sum.fold(0_u32, |sum, (_, byte)| sum + u32::from(*byte));
        bytes[64..68].copy_from_slice(&sum.to_be_bytes());
        sim.write_all_at(&bytes, at(0)).unwrap();
    }),
    ("leaked space, and no copy", Format::Vhd, |sim| {
        lengthen(sim, 2 * SLOT + 1024, 0x33);
        sim.write_all_at(&[0; 512], at(0)).unwrap();
    }),
    ("leaked space of zeros", Format::Vhd, |sim| {
        lengthen(sim, SLOT, 0)
    }),
    ("a block was never flushed", Format::Vhd, |sim| {
        name_lost_blocks(sim, 1, 0)
    }),
    ("three were not", Format::Vhd, |sim| {
        name_lost_blocks(sim, 3, 3584)
    }),
    (
        "two were not, and the copy is damaged",
        Format::Vhd,
        |sim| {
            name_lost_blocks(sim, 2, 0);
            sim.write_all_at(&[1; 30], at(20)).unwrap();
        },
    ),
    ("the first header is damaged", Format::Vhdx, |sim| {
        sim.write_all_at(b"x", at(64 << 10)).unwrap();
    }),
    ("the second header is damaged", Format::Vhdx, |sim| {
        sim.write_all_at(b"x", at((128 << 10) + 70)).unwrap();
    }),
    ("the first region table is damaged", Format::Vhdx, |sim| {
        sim.write_all_at(b"x", at(192 << 10)).unwrap();
    }),
    ("the second region table is damaged", Format::Vhdx, |sim| {
        sim.write_all_at(b"x", at((256 << 10) + 30_000)).unwrap();
    }),
    ("both headers are damaged", Format::Vhdx, |sim| {
        for place in [64 << 10, 128 << 10] {
            sim.write_all_at(&[1; 4016], at(place + 80)).unwrap();
        }
    }),
    ("both region tables are", Format::Vhdx, |sim| {
        for place in [192 << 10, 256 << 10] {
            sim.write_all_at(&[1; 512], at(place + 10_000)).unwrap();
        }
    }),
    ("places that nobody reads", Format::Vhdx, |sim| {
        set_entry(sim, 3, 2, DATA);
        set_entry(sim, 5, 3, DATA + 100 * MIB);
    }),
    ("leaked space", Format::Vhdx, |sim| {
        let end = sim.len().unwrap();
        sim.set_len(end + 3 * MIB).unwrap();
        sim.write_all_at(&[0x44; 9000], at(end + MIB)).unwrap();
    }),
    ("all at once", Format::Vhdx, |sim| {
        sim.write_all_at(b"x", at((256 << 10) + 30_000)).unwrap();
        set_entry(sim, 3, 2, DATA);
        sim.write_all_at(b"x", at((128 << 10) + 70)).unwrap();
        let end = sim.len().unwrap();
        sim.write_all_at(&[0x44; 4096], at(end + 2 * MIB)).unwrap();
    }),
];

/// Every damage, with its name.
fn damaged() -> impl Iterator<Item = (&'static str, SimStorage)> {
    let made = DAMAGES.iter().map(|(name, format, damage)| {
        let sim = good(*format);
        damage(&sim);
        sim.sync().unwrap();
        (*name, sim)
    });
    made.chain([("a log to be replayed", with_log())])
}

/// The script of a repair of `sim`, and its backup.
fn saved(sim: &SimStorage) -> (CheckReport, Script, SimStorage) {
    let (report, script) = rehearse(sim, Path::new(""), &REPAIR).unwrap();
    let backup = SimStorage::new();
    let guards = guards(sim, Path::new("")).unwrap();
    backup::save(sim, &script, &guards, &backup).unwrap();
    (report, script, backup)
}

fn restored(backup: &SimStorage, sim: &SimStorage) -> u64 {
    restore::restore(backup, sim).unwrap_or_else(|refusal| panic!("{refusal:?}"))
}

#[test]
fn a_dry_run_says_what_a_repair_does_and_writes_nothing() {
    for (name, sim) in damaged() {
        let found = check_storage(&sim, &CheckOptions::default()).unwrap();
        assert_ne!(found, CheckReport::default(), "{name}");
        sim.take_log();
        let told = check_storage(&sim, &DRY_RUN).unwrap();
        assert!(sim.take_log().iter().all(|op| !op.kind.changes()), "{name}");
        assert!(
            !told.repaired.is_empty() && told.is_clean(),
            "{name}: {told:?}"
        );
        assert_eq!(check_storage(&sim, &REPAIR).unwrap(), told, "{name}");
        assert_eq!(sim.unsynced_len(), 0, "{name}: durably");
        let after = check_storage(&sim, &CheckOptions::default()).unwrap();
        assert_eq!(after, CheckReport::default(), "{name}");
    }
}

#[test]
fn a_backup_gives_the_very_file_back() {
    for (name, sim) in damaged() {
        let before = sim.to_bytes();
        let (report, script, backup) = saved(&sim);
        assert!(sim.to_bytes() == before, "{name}: saving writes");
        assert_eq!(backup.unsynced_len(), 0, "{name}: the backup is durable");
        assert_eq!(restored(&backup, &sim), 0, "{name}: before the repair");
        script.perform(&sim).unwrap();
        assert!(!report.repaired.is_empty(), "{name}");
        let after = check_storage(&sim, &CheckOptions::default()).unwrap();
        assert_eq!(after, CheckReport::default(), "{name}");
        let count = restored(&backup, &sim);
        println!("{name}: {count} sectors put back");
        assert!(sim.to_bytes() == before, "{name}: not the file that it was");
        assert_eq!(restored(&backup, &sim), 0, "{name}: twice");
        let len = backup.len().unwrap();
        println!(
            "{name}: a backup of {len} bytes of a file of {}",
            before.len()
        );
    }
}

/// Cuts the power after each operation of `work`, and shows `look` each state that may be left. How
/// many there were.
fn at_each_cut(
    sim: &SimStorage,
    work: &dyn Fn(&SimStorage) -> io::Result<()>,
    look: &dyn Fn(&SimStorage, &str),
) -> u64 {
    let more = std::env::var("VHDFS_SOAK").ok();
    let more: u64 = more.and_then(|text| text.parse().ok()).unwrap_or(1);
    let mut states = 0;
    for ops in 0..200 {
        let cut = sim.fork();
        cut.cut_after(ops);
        let done = work(&cut);
        assert!(done.is_ok() || cut.is_cut(), "{done:?}");
        for mut choice in cut.choices(3, 3 * more, ops) {
            states += 1;
            look(
                &cut.crash(&mut choice),
                &format!("cut after {ops}: {choice:?}"),
            );
        }
        if !cut.is_cut() {
            return states;
        }
    }
    panic!("over 200 operations");
}

fn host(refusal: Refusal) -> io::Error {
    match refusal {
        Refusal::FileIo(error) | Refusal::BackupIo(error) => error,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_power_cut_never_makes_it_worse() {
    let mut states = [0; 3];
    for (name, sim) in damaged() {
        let (bytes, readable) = (sim.to_bytes(), content(&sim).unwrap());
        let (_, script, backup) = saved(&sim);
        let mended = |crashed: &SimStorage, cut: &str| {
            reads_as(crashed, &readable, &format!("{name}: {cut}"));
            check_storage(crashed, &REPAIR).unwrap();
            let after = check_storage(crashed, &CheckOptions::default()).unwrap();
            assert_eq!(after, CheckReport::default(), "{name}: {cut}");
            reads_as(crashed, &readable, &format!("{name}: {cut}, then mended"));
        };
        states[0] += at_each_cut(&sim, &|cut| check_storage(cut, &REPAIR).map(drop), &mended);
        states[1] += at_each_cut(&sim, &|cut| script.perform(cut), &|crashed, cut| {
            let again = crashed.fork();
            restored(&backup, &again);
            assert!(again.to_bytes() == bytes, "{name}: {cut}: not what it was");
            mended(crashed, cut);
        });
        script.perform(&sim).unwrap();
        let undo = |cut: &SimStorage| restore::restore(&backup, cut).map(drop).map_err(host);
        states[2] += at_each_cut(&sim, &undo, &|crashed, cut| {
            reads_as(crashed, &readable, &format!("{name}: undoing, {cut}"));
            restored(&backup, crashed);
            assert!(
                crashed.to_bytes() == bytes,
                "{name}: {cut}: not what it was"
            );
        });
    }
    let [direct, with_backup, undone] = states;
    println!(
        "{direct} states of a repair, {with_backup} of one with a backup, {undone} of undoing it"
    );
}

#[test]
fn a_backup_that_was_interrupted_is_none() {
    for (name, sim) in damaged().step_by(4) {
        let (_, script, _) = saved(&sim);
        let whole = SimStorage::new();
        backup::save(&sim, &script, &[], &whole).unwrap();
        let whole = whole.to_bytes();
        let states = at_each_cut(
            &SimStorage::new(),
            &|cut| backup::save(&sim, &script, &[], cut),
            &|crashed, cut| match restore::restore(crashed, &sim.fork()) {
                Err(Refusal::Backup(_)) => {}
                Ok(_) => assert!(crashed.to_bytes() == whole, "{name}: {cut}"),
                other => panic!("{name}: {cut}: {other:?}"),
            },
        );
        assert!(states > 4);
    }
}

#[test]
fn without_its_backup_a_repair_changes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    // There is no room for more in a name.
    let path = folder.path().join("d".repeat(250));
    let options = CheckOptions {
        backup: true,
        ..REPAIR
    };
    for (name, sim) in damaged() {
        let before = sim.to_bytes();
        std::fs::write(&path, &before).unwrap();
        assert!(check(&path, &options).is_err(), "{name}");
        assert!(std::fs::read(&path).unwrap() == before, "{name}");
    }
}

#[test]
fn only_the_file_that_a_backup_is_of_is_changed() {
    for (name, sim) in damaged() {
        let (_, script, backup) = saved(&sim);
        script.perform(&sim).unwrap();
        let others = [good(Format::Vhd), good(Format::Vhdx)];
        for other in others {
            let before = other.to_bytes();
            let refused = restore::restore(&backup, &other);
            assert!(
                matches!(refused, Err(Refusal::File(_))),
                "{name}: {refused:?}"
            );
            assert!(other.to_bytes() == before, "{name}");
        }
    }
}

#[test]
fn a_file_that_was_used_since_is_refused() {
    for (name, sim) in damaged() {
        let (_, script, backup) = saved(&sim);
        script.perform(&sim).unwrap();
        let storage = Arc::new(sim);
        let disk = open(Arc::<SimStorage>::clone(&storage), false).unwrap();
        // A new block, mostly of zeros, perhaps where something was cut off.
        disk.write_at(&[1; 512], 3 * MIB).unwrap();
        disk.close().unwrap();
        drop(disk);
        let before = storage.to_bytes();
        let refused = restore::restore(&backup, &*storage);
        assert!(
            matches!(refused, Err(Refusal::File(_))),
            "{name}: {refused:?}"
        );
        assert!(storage.to_bytes() == before, "{name}");
    }
}

#[test]
fn a_damaged_backup_is_refused_and_harms_nothing() {
    let mut random = Random::new(3);
    for (name, sim) in damaged() {
        let (_, script, backup) = saved(&sim);
        script.perform(&sim).unwrap();
        let repaired = sim.to_bytes();
        for _ in 0..100 {
            let bad = backup.fork();
            let place = random.below(bad.len().unwrap().min(1 << 12));
            match random.below(4) {
                0 => bad.set_len(place).unwrap(),
                1 => bad.write_all_at(&[0; 1], at(bad.len().unwrap())).unwrap(),
                _ => {
                    let mut byte = [0];
                    bad.read_exact_at(&mut byte, at(place)).unwrap();
                    bad.write_all_at(&[byte[0] ^ 0x41], at(place)).unwrap();
                }
            }
            let refused = restore::restore(&bad, &sim);
            assert!(refused.is_err(), "{name}: {place}");
            assert!(sim.to_bytes() == repaired, "{name}: {place}");
        }
    }
}

#[test]
fn what_may_be_lost_data_is_not_taken_out() {
    let refused: [(&str, Change); 5] = [
        ("one beside the end", |sim| name_lost_blocks(sim, 1, 4096)),
        ("a gap between", |sim| {
            name_lost_blocks(sim, 2, 0);
            let sector = low_u32((footer(sim).1 + SLOT + 4096).div_ceil(512));
            sim.write_all_at(&sector.to_be_bytes(), at(TABLE + 4 * 2))
                .unwrap();
        }),
        ("partly in the file", |sim| {
            let sector = low_u32((footer(sim).1 - 512) / 512);
            lengthen(sim, 512, 0);
            sim.write_all_at(&sector.to_be_bytes(), at(TABLE + 4 * 2))
                .unwrap();
        }),
        ("a copy that was cut short", |sim| {
            let len = sim.len().unwrap();
            sim.set_len(len - SLOT / 2).unwrap();
        }),
        ("no footer", |sim| {
            name_lost_blocks(sim, 1, 0);
            sim.set_len(sim.len().unwrap() - 512).unwrap();
        }),
    ];
    for (name, damage) in refused {
        let sim = good(Format::Vhd);
        damage(&sim);
        let before = sim.to_bytes();
        let report = check_storage(&sim, &REPAIR).unwrap();
        assert!(report.repaired.is_empty(), "{name}: {report:?}");
        assert!(!report.is_clean(), "{name}");
        assert!(sim.to_bytes() == before, "{name}");
    }
    let sim = good(Format::Vhdx);
    set_entry(&sim, 6, 6, sim.len().unwrap());
    let report = check_storage(&sim, &REPAIR).unwrap();
    assert!(
        report.repaired.is_empty() && !report.is_clean(),
        "{report:?}"
    );
}

#[test]
fn a_lost_block_is_told_of_when_the_disk_is_opened() {
    let sim = good(Format::Vhd);
    name_lost_blocks(&sim, 1, 0);
    let storage = Arc::new(sim);
    let error = open(Arc::<SimStorage>::clone(&storage), false)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("`vhdfs check --repair` takes it out"),
        "{error}"
    );
    check_storage(&*storage, &REPAIR).unwrap();
    let disk = open(storage, false).unwrap();
    let mut byte = [1];
    disk.read_at(&mut byte, 7 * VHD_BLOCK).unwrap();
    assert_eq!(byte, [0]);
}

#[test]
fn a_rehearsal_reads_like_the_file() {
    let mut random = Random::new(5);
    let uuid = Uuid::from_u128(4);
    for _ in 0..40 {
        let start = random.below(9000);
        let real = SimStorage::from_bytes(&vec![0x55; usize_from(start)]);
        let copy = real.fork();
        let rehearsal = Rehearsal::new(&copy).unwrap();
        for _ in 0..30 {
            let place = at(random.below(9000));
            let len = random.below(2000);
            let bytes = uuid.as_bytes().repeat(125);
            let bytes = &bytes[..usize_from(len)];
            match random.below(4) {
                0 => {
                    real.set_len(place.get()).unwrap();
                    rehearsal.set_len(place.get()).unwrap();
                }
                1 => {
                    let range = crate::units::FileRange::new(place, len);
                    let both = (real.write_zeroes(range), rehearsal.write_zeroes(range));
                    assert_eq!(both.0.is_ok(), both.1.is_ok());
                }
                2 => rehearsal.sync().unwrap(),
                _ => {
                    real.write_all_at(bytes, place).unwrap();
                    rehearsal.write_all_at(bytes, place).unwrap();
                }
            }
            let len = real.len().unwrap();
            assert_eq!(rehearsal.len().unwrap(), len);
            let from = random.below(len + 1);
            let mut buf = vec![0; usize_from(len - from)];
            rehearsal.read_exact_at(&mut buf, at(from)).unwrap();
            assert!(buf == real.to_bytes()[usize_from(from)..]);
            let end = at(len);
            let mut place = at(0);
            while let Some(data) = rehearsal.next_data(place, end).unwrap() {
                let hole = usize_from(place.get())..usize_from(data.start.get());
                assert!(real.to_bytes()[hole].iter().all(|byte| *byte == 0));
                place = data.end();
            }
        }
        copy.take_log();
        rehearsal.into_script().perform(&copy).unwrap();
        assert!(copy.to_bytes() == real.to_bytes());
        assert!(copy.take_log().iter().any(|op| op.kind == OpKind::Write));
    }
}
