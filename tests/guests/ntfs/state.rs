//! What must be left alone: marks of every kind, systems that sleep, volumes in use.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use vhdfs::guest::{Outcome, Rest};

use super::{Disk, MIB, ready};
use crate::rig::fill;
use crate::support::tools::{run, tool};

/// Patches the flags in $Volume, record 3, and in its copy.
fn patch_volume_flags(disk: &Disk, flags: u16) {
    let file = File::options()
        .read(true)
        .write(true)
        .open(&disk.image)
        .unwrap();
    let word = |at| {
        let mut bytes = [0; 8];
        file.read_exact_at(&mut bytes, at).unwrap();
        u64::from_le_bytes(bytes)
    };
    let (cluster, record) = (disk.told("Cluster Size:"), disk.told("MFT Record Size:"));
    for lcn in [word(0x30), word(0x38)] {
        let mut bytes = vec![0; usize::try_from(record).unwrap()];
        let at = lcn * cluster + 3 * record;
        file.read_exact_at(&mut bytes, at).unwrap();
        let mut attribute = usize::from(bytes[0x14]);
        while bytes[attribute] != 0x70 {
            attribute += usize::from(bytes[attribute + 4]);
        }
        let place = attribute + usize::from(bytes[attribute + 0x14]) + 10;
        assert!(place % 512 < 508, "not where the fixups are");
        bytes[place..place + 2].copy_from_slice(&flags.to_le_bytes());
        file.write_all_at(&bytes, at).unwrap();
    }
}

#[test]
fn flags_of_the_volume() {
    if !ready() {
        return;
    }
    let disk = Disk::new(16 * MIB, 512, 4096);
    for (flags, words) in [
        (1, "is marked as dirty"),
        (2, "has work to do"),
        (4, "has work to do"),
        (0x4000, "has work to do"),
        (0x8000, "has work to do"),
    ] {
        patch_volume_flags(&disk, flags);
        assert_eq!(
            disk.told_by(&["-m"], "Volume Flags:"),
            format!("{flags:#06x}")
        );
        let reason = disk.refused();
        assert!(reason.contains(words), "{reason}");
    }
    patch_volume_flags(&disk, 0);
    disk.spoil_free();
}

impl Disk {
    /// Whether ntfs-3g would mount it for writing: its exit code.
    fn probe(&self) -> Option<i32> {
        run("ntfs-3g.probe", &["--readwrite"], &[&self.image])
            .status
            .code()
    }

    /// A copy of the disk as it is at this moment.
    fn copied(&self, name: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join(name);
        fs::copy(&self.image, &image).unwrap();
        Self {
            folder,
            image,
            sector_size: self.sector_size,
        }
    }

    /// What $LogFile holds.
    fn log(&self) -> Vec<u8> {
        let output = run("ntfscat", &["-f", "-i", "2"], &[&self.image]);
        assert!(output.status.success());
        output.stdout
    }
}

const MOUNTABLE: i32 = 0;
const HIBERNATED: i32 = 14;
const UNCLEAN: i32 = 15;

/// A restart page that ntfs-3g, too, believes.
fn restart_page(major: u8, minor: u8, client: u16, flags: u8, log_len: u64) -> Vec<u8> {
    let mut page = vec![0; 4096];
    let mut put = |at: usize, bytes: &[u8]| page[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"RSTR\x1e\0\x09\0");
    put(16, &4096_u32.to_le_bytes());
    put(20, &4096_u32.to_le_bytes());
    put(24, &[0x30, 0, minor, 0, major, 0]);
    let area = 0x30;
    put(area, &[7]);
    put(area + 8, &[1, 0, 0xff, 0xff]);
    put(area + 12, &client.to_le_bytes());
    put(area + 14, &[flags]);
    let bits = 67 - (64 - log_len.leading_zeros());
    put(area + 16, &bits.to_le_bytes());
    put(area + 20, &[0xe0, 0, 0x40, 0]);
    put(area + 24, &log_len.to_le_bytes());
    put(area + 36, &[0x30, 0, 0x40, 0]);
    put(area + 0x40 + 16, &[0xff, 0xff, 0xff, 0xff]);
    // The fixups: all replaced words are 0.
    put(0x1e, &[1, 0]);
    (1..=8).for_each(|stride| put(stride * 512 - 2, &[1, 0]));
    page
}

#[test]
fn state_of_the_log() {
    if !ready() {
        return;
    }
    let disk = Disk::new(16 * MIB, 512, 4096);
    let empty = disk.folder.path().join("empty");
    fs::copy(&disk.image, &empty).unwrap();
    let len: u64 = disk.told_by(&["-i", "2"], "Data size:").parse().unwrap();
    let used = 0;
    let cases = [
        ((1, 1, used, 2), MOUNTABLE, None),
        ((1, 1, 0xffff, 0), MOUNTABLE, None),
        ((1, 1, used, 0), UNCLEAN, Some("its log is open")),
        ((2, 0, used, 2), HIBERNATED, Some("log version 2.0")),
        ((2, 0, used, 0), HIBERNATED, Some("log version 2.0")),
    ];
    for ((major, minor, client, flags), code, words) in cases {
        let log = disk.folder.path().join("log");
        let page = restart_page(major, minor, client, flags, len);
        let mut content = vec![0xff; usize::try_from(len).unwrap()];
        content[..8192].copy_from_slice(&page.repeat(2));
        fs::write(&log, content).unwrap();
        fs::copy(&empty, &disk.image).unwrap();
        tool(
            "ntfscp",
            &["-f", "-i"],
            &[&disk.image, &log, Path::new("2")],
        );
        assert_eq!(
            disk.probe(),
            Some(code),
            "ntfs-3g of {major} {client} {flags}"
        );
        match words {
            Some(words) => assert!(disk.refused().contains(words), "{}", disk.refused()),
            None => {
                assert_unmarked(&disk);
                // Nothing of that changes while ntfs-3g has it mounted and writes.
                let copy = disk.mounted("rw", |folder| {
                    fs::write(folder.join("file"), [7; 100_000]).unwrap();
                    tool("sync", &["-f"], &[folder]);
                    disk.copied("copy")
                });
                assert_unmarked(&copy);
                assert_eq!(copy.log(), disk.log());
                assert_eq!(copy.log()[..8192], page.repeat(2));
            }
        }
    }
}

/// That the volume is read, but may be mounted.
fn assert_unmarked(disk: &Disk) {
    match &disk.survey().parts[0].outcome {
        Outcome::Read { rest, .. } => assert_eq!(*rest, Rest::Unmarked),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_system_that_sleeps() {
    if !ready() {
        return;
    }
    let disk = Disk::new(16 * MIB, 512, 4096);
    let cases = [
        (b"hibr".to_vec(), HIBERNATED),
        (b"hibr".repeat(3000), HIBERNATED),
        (b"HIBR".repeat(3000), HIBERNATED),
        (b"wake".repeat(3000), MOUNTABLE),
        (b"\0\0\0\0".repeat(3000), MOUNTABLE),
    ];
    for (bytes, code) in cases {
        // Even ntfs-3g leaves a volume alone that sleeps, but for this option.
        disk.mounted("remove_hiberfile", |folder| {
            // So many that the folder's index leaves its record.
            (0..40).for_each(|number| fs::write(folder.join(format!("n{number}")), b"").unwrap());
            fs::write(folder.join("Hiberfil.sys"), &bytes).unwrap();
        });
        let reason = match code {
            MOUNTABLE => {
                disk.spoil_free();
                continue;
            }
            _ => disk.refused(),
        };
        assert!(reason.contains("is asleep (hiberfil.sys)"), "{reason}");
    }
}

#[test]
fn shadow_copies() {
    if !ready() {
        return;
    }
    let disk = Disk::new(16 * MIB, 512, 4096);
    let name = "System Volume Information/{673e7cc9-3a5c-11e9-b813-901b0e4d36dd}\
                {3808876b-c176-4e48-b7ae-04046e6cc752}";
    disk.mounted("rw", |folder| {
        let path = folder.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, vec![7; 1 << 16]).unwrap();
    });
    assert!(
        disk.refused().contains("has shadow copies"),
        "{}",
        disk.refused()
    );
    disk.mounted("rw", |folder| fs::remove_file(folder.join(name)).unwrap());
    disk.spoil_free();
    let file = File::options().write(true).open(&disk.image).unwrap();
    let identifier = b"\x6b\x87\x08\x38\x76\xc1\x48\x4e\xb7\xae\x04\x04\x6e\x6c\xc7\x52";
    file.write_all_at(identifier, 0x1e00).unwrap();
    disk.spoil_free();
    file.write_all_at(&[0, 0x40], 0x1e30).unwrap();
    assert!(
        disk.refused().contains("has shadow copies"),
        "{}",
        disk.refused()
    );
}

/// All files of a volume that may be damaged: what cannot be read counts as its error.
fn readable(folder: &Path) -> BTreeMap<PathBuf, Option<Vec<u8>>> {
    let mut found = BTreeMap::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(next) = folders.pop() {
        let Ok(entries) = fs::read_dir(&next) else {
            found.insert(next, None);
            continue;
        };
        for entry in entries.flatten() {
            let path = entry.path();
            match entry.file_type() {
                Ok(kind) if kind.is_dir() => folders.push(path),
                _ => {
                    let bytes = fs::read(&path).ok();
                    found.insert(path, bytes);
                }
            }
        }
    }
    found
}

#[test]
fn copied_while_mounted() {
    if !ready() {
        return;
    }
    let disk = Disk::new(48 * MIB, 512, 4096);
    let copies: Vec<_> = (0..6)
        .map(|n| Disk {
            folder: tempfile::tempdir().unwrap(),
            image: disk.folder.path().join(format!("copy{n}")),
            sector_size: 512,
        })
        .collect();
    disk.mounted("rw", |folder| {
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                for round in 0.. {
                    if done.load(Ordering::Relaxed) {
                        break;
                    }
                    fill(&folder.join(format!("r{}", round % 3)), round, 18, |n| {
                        n % 2 == round % 2
                    });
                }
            });
            for copy in &copies {
                thread::sleep(Duration::from_millis(150));
                fs::copy(&disk.image, &copy.image).unwrap();
            }
            done.store(true, Ordering::Relaxed);
        });
    });
    let mut read = 0;
    for copy in &copies {
        let found = copy.survey();
        match &found.parts[0].outcome {
            Outcome::Skipped { reason } => {
                println!("skipped: {reason}");
                continue;
            }
            Outcome::Read { rest, .. } => assert_eq!(*rest, Rest::Unmarked),
        }
        read += 1;
        let before = copy.mounted("ro", readable);
        let disk = copy.raw();
        found
            .free
            .iter()
            .for_each(|run| disk.spoil(run.start, run.end));
        assert!(before == copy.mounted("ro", readable), "files differ");
    }
    println!("{read} of {} copies read", copies.len());
}
