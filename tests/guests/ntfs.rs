//! NTFS, made by mkntfs and filled by ntfs-3g. What the two and ntfsresize, which accounts for every
//! cluster, make of a volume whose free bytes are gone is what counts.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use rustix::fs::{FlockOperation, fcntl_lock};
use tempfile::TempDir;
use vhdfs::guest::{Outcome, Rest, Survey, SurveyOptions, survey};

use crate::rig::{Mounted, RawDisk, blank, churn, contents, fill};
use crate::support::tools::{installed, tool};

mod state;

const MIB: u64 = 1 << 20;

fn ready() -> bool {
    let tools = [
        "mkntfs",
        "ntfs-3g",
        "ntfs-3g.probe",
        "ntfscp",
        "ntfsfix",
        "ntfsinfo",
        "ntfsresize",
    ];
    let fuse = Path::new("/dev/fuse").exists() && rustix::process::geteuid().is_root();
    if !fuse {
        println!("skipped: needs root and /dev/fuse");
    }
    fuse && installed(&tools)
}

/// A disk that is all NTFS.
struct Disk {
    folder: TempDir,
    image: PathBuf,
    sector_size: u64,
}

impl Disk {
    fn new(len: u64, sector_size: u64, cluster_size: u64) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("disk");
        blank(&image, len);
        let (sector, cluster) = (sector_size.to_string(), cluster_size.to_string());
        let words = ["-Q", "-q", "-F", "-s", &sector, "-c", &cluster];
        tool("mkntfs", &words, &[&image]);
        Self {
            folder,
            image,
            sector_size,
        }
    }

    /// Does something in the root folder.
    fn mounted<T>(&self, options: &str, work: impl FnOnce(&Path) -> T) -> T {
        let at = self.folder.path().join("mount");
        let mount = Mounted::fuse("ntfs-3g", &["-o", options], &self.image, &at);
        let done = work(mount.path());
        drop(mount);
        self.wait();
        done
    }

    /// Waits for ntfs-3g to end, which it does after it was unmounted: it holds a lock as long.
    fn wait(&self) {
        for _ in 0..500 {
            let file = File::options().read(true).write(true).open(&self.image);
            if fcntl_lock(file.unwrap(), FlockOperation::NonBlockingLockExclusive).is_ok() {
                return;
            }
            thread::sleep(Duration::from_millis(20));
        }
        panic!("ntfs-3g does not end");
    }

    fn raw(&self) -> RawDisk {
        RawDisk::open(&self.image, self.sector_size)
    }

    fn survey(&self) -> Survey {
        let found = survey(&self.raw(), &SurveyOptions::default()).unwrap();
        assert_eq!(found.parts.len(), 1);
        assert_eq!(found.parts[0].content, Some("NTFS"));
        found
    }

    /// Why it is left alone.
    fn refused(&self) -> String {
        let found = self.survey();
        assert!(found.free.is_empty());
        match &found.parts[0].outcome {
            Outcome::Skipped { reason } => reason.clone(),
            other => panic!("{other:?}"),
        }
    }

    /// What ntfsinfo tells, by `words`, behind the last `what`.
    fn told_by(&self, words: &[&str], what: &str) -> String {
        let text = tool("ntfsinfo", &[&["-f"], words].concat(), &[&self.image]);
        let mut values = (text.lines()).filter_map(|line| line.trim().strip_prefix(what));
        let value = values
            .next_back()
            .unwrap_or_else(|| panic!("no {what} in {text}"));
        value.split_whitespace().next().unwrap().to_owned()
    }

    /// A number that ntfsinfo tells of the volume.
    fn told(&self, what: &str) -> u64 {
        self.told_by(&["-m"], what).parse().unwrap()
    }

    /// How many runs a file has, and whether it has an attribute list.
    fn runs(&self, file: &[&str]) -> (u64, bool) {
        let text = tool("ntfsinfo", &[&["-v"], file].concat(), &[&self.image]);
        let runs = text
            .lines()
            .find_map(|line| line.strip_prefix("Total runs: "))
            .unwrap();
        let runs = runs.split_whitespace().next().unwrap().parse().unwrap();
        (runs, text.contains("Dumping attribute $ATTRIBUTE_LIST"))
    }

    /// What the tools say of it.
    fn assert_sound(&self) {
        let text = tool("ntfsfix", &["-n"], &[&self.image]);
        assert!(text.contains("was processed successfully"), "{text}");
        tool(
            "ntfsresize",
            &["--info", "--force", "--no-progress-bar"],
            &[&self.image],
        );
    }

    /// Frees what the survey calls free, which must be what ntfsinfo calls free.
    fn spoil_free(&self) {
        let found = self.survey();
        let expected = self.told("Free Clusters:") * self.told("Cluster Size:");
        let outcome = Outcome::Read {
            reported_free: expected,
            free: expected,
            rest: Rest::Unmarked,
        };
        assert_eq!(found.parts[0].outcome, outcome);
        let sum: u64 = found.free.iter().map(|run| run.end - run.start).sum();
        assert_eq!(sum, expected);
        let disk = self.raw();
        found
            .free
            .iter()
            .for_each(|run| disk.spoil(run.start, run.end));
        // But for looks at where other filesystems have their marks.
        let mut evidence = found.evidence;
        evidence.without(&found.free);
        assert!(evidence.bytes() > MIB && evidence.still_holds(&disk).unwrap());
    }

    /// All that must hold of a volume that was left clean.
    fn check(&self, options: &str, extra: impl Fn(&Path) -> Vec<u8>, write: impl Fn(&Path)) {
        self.assert_sound();
        let all = |folder: &Path| (contents(folder), extra(folder));
        let before = self.mounted(options, all);
        self.spoil_free();
        self.assert_sound();
        let after = self.mounted(options, |folder| {
            let after = all(folder);
            write(folder);
            after
        });
        assert!(before == after, "files differ");
        self.assert_sound();
        self.spoil_free();
        self.assert_sound();
    }
}

fn nothing(_: &Path) -> Vec<u8> {
    Vec::new()
}

fn more(folder: &Path) {
    fill(&folder.join("new"), 99, 18, |number| number % 2 == 0);
}

/// Makes, fills and checks a volume.
fn round_trip(len: u64, sector_size: u64, cluster_size: u64) {
    if !ready() {
        return;
    }
    let disk = Disk::new(len, sector_size, cluster_size);
    disk.spoil_free();
    disk.assert_sound();
    disk.mounted("rw", |folder| {
        fill(folder, cluster_size, 27, |number| number % 3 == 1)
    });
    disk.check("rw", nothing, more);
}

#[test]
fn small_clusters() {
    round_trip(64 * MIB, 512, 512);
}

#[test]
fn usual_clusters() {
    // Not a whole number of clusters.
    round_trip(64 * MIB + 2560, 512, 4096);
}

#[test]
fn large_sectors() {
    round_trip(64 * MIB, 4096, 4096);
}

#[test]
fn large_clusters() {
    round_trip(96 * MIB, 512, 65536);
}

#[test]
fn huge_clusters() {
    round_trip(200 * MIB, 512, 2 * MIB);
}

#[test]
fn random_changes() {
    if !ready() {
        return;
    }
    for seed in [3, 4] {
        let disk = Disk::new(64 * MIB, 512, 1024 << (seed % 3));
        disk.mounted("rw", |folder| fill(folder, seed, 18, |_| true));
        for round in 0..3 {
            let before = disk.mounted("rw", |folder| {
                churn(folder, seed * 100 + round, 25);
                contents(folder)
            });
            disk.spoil_free();
            disk.assert_sound();
            let after = disk.mounted("ro", contents);
            assert!(
                before == after,
                "files differ after round {round} of {seed}"
            );
        }
    }
}

#[test]
fn compressed_sparse_and_streams() {
    if !ready() {
        return;
    }
    let disk = Disk::new(64 * MIB, 512, 4096);
    let options = "compression,streams_interface=windows";
    disk.mounted(options, |folder| {
        // The root folder's flag is what new files get: 0x800 is compressed.
        let set = |path: &Path| {
            let name = "system.ntfs_attrib";
            let flags = 0x810_u32.to_le_bytes();
            rustix::fs::setxattr(path, name, &flags, rustix::fs::XattrFlags::empty()).unwrap();
        };
        let packed = folder.join("packed");
        fs::create_dir(&packed).unwrap();
        set(&packed);
        for number in 0..8 {
            let text = format!("{number} may be compressed, ").repeat(20_000);
            fs::write(packed.join(format!("f{number}")), text).unwrap();
        }
        let sparse = File::create(folder.join("sparse")).unwrap();
        for piece in 0..40 {
            sparse.write_all_at(&[0x5a; 9000], piece * 700_000).unwrap();
        }
        for name in ["sparse:one", "packed/f3:two", "sparse:three"] {
            fs::write(folder.join(name), name.repeat(30_000)).unwrap();
        }
        fs::remove_file(packed.join("f2")).unwrap();
        fill(folder, 5, 18, |number| number % 2 == 0);
        fs::remove_file(folder.join("sparse:three")).unwrap();
    });
    let text = tool("ntfsinfo", &["-F", "packed/f3"], &[&disk.image]);
    assert!(text.contains("COMPRESSED"), "{text}");
    let streams = |folder: &Path| {
        let read = |name: &str| fs::read(folder.join(name)).unwrap();
        [read("sparse:one"), read("packed/f3:two")].concat()
    };
    disk.check(options, streams, more);
}

/// Leaves only holes of one KiB free in a full volume of 512-byte clusters.
fn riddle(folder: &Path, files: u64) {
    let below = folder.join("f");
    fs::create_dir(&below).unwrap();
    for number in 0..files {
        fs::write(below.join(number.to_string()), [0x31; 1024]).unwrap();
    }
    let free = fs_free(folder);
    fs::write(
        folder.join("rest"),
        vec![0x32; usize::try_from(free - 40_000).unwrap()],
    )
    .unwrap();
    for number in (0..files).step_by(2) {
        fs::remove_file(below.join(number.to_string())).unwrap();
    }
}

fn fs_free(folder: &Path) -> u64 {
    let found = rustix::fs::statvfs(folder).unwrap();
    found.f_bfree * found.f_frsize
}

#[test]
fn fragmented_table() {
    if !ready() {
        return;
    }
    let disk = Disk::new(8 * MIB, 512, 512);
    disk.mounted("rw", |folder| {
        riddle(folder, 2400);
        fs::create_dir(folder.join("g")).unwrap();
        // $MFT has only the holes to grow into.
        let mut number = 0;
        while fs_free(folder) > 90_000 {
            File::create(folder.join(format!("g/{number}"))).unwrap();
            number += 1;
        }
    });
    let (runs, list) = disk.runs(&["-i", "0"]);
    assert!(runs > 150 && list, "{runs} runs, attribute list {list}");
    disk.check("rw", nothing, |folder| {
        (0..30).for_each(|number| fs::write(folder.join(format!("h{number}")), "h").unwrap());
    });
}

#[test]
fn fragmented_files() {
    if !ready() {
        return;
    }
    let disk = Disk::new(32 * MIB, 512, 4096);
    disk.mounted("rw", |folder| {
        let names = ["a", "b", "c"].map(|name| folder.join(name));
        let mut files = names.each_ref().map(|name| File::create(name).unwrap());
        for number in 0..900_u32 {
            let piece = number.to_le_bytes().repeat(1024);
            files
                .iter_mut()
                .for_each(|file| file.write_all(&piece).unwrap());
        }
        fs::remove_file(&names[1]).unwrap();
    });
    for name in ["a", "c"] {
        let (runs, list) = disk.runs(&["-F", name]);
        assert!(
            runs > 300 && list,
            "{name}: {runs} runs, attribute list {list}"
        );
    }
    disk.check("rw", nothing, |folder| {
        fs::remove_file(folder.join("a")).unwrap();
        more(folder);
    });
}
