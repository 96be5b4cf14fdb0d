//! Logical volumes by LVM2's own tools, which need no device mapper to describe them: each where they
//! say it is, nothing free that they want.

use std::fs::{self, File};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};

use vhdfs::guest::Survey;

use crate::parts::{
    Loop, MIB, ext4, ext4_free, free, gather, part, scatter, skipped, spoil, surveyed,
};
use crate::rig::{Mounted, blank, can_mount, contents};
use crate::support::tools::{installed, tool};

/// LVM2 on one device, away from all others of this machine, without the kernel's device mapper.
struct Lvm {
    devices: Vec<Loop>,
    config: String,
}

impl Lvm {
    fn new(devices: Vec<Loop>, folder: &Path) -> Self {
        let ours: Vec<_> = (devices.iter())
            .map(|device| format!("\"a|^{}$|\", ", device.0.display()))
            .collect();
        let ours = ours.concat();
        let locks = folder.join("locks");
        let config = format!(
            "devices {{ filter=[{ours}\"r|.*|\"] global_filter=[{ours}\"r|.*|\"] use_devicesfile=0 \
             hints=\"none\" }} activation {{ udev_sync=0 udev_rules=0 monitoring=0 }} \
             backup {{ backup=0 archive=0 }} \
             global {{ locking_dir=\"{}\" event_activation=0 activation=0 }}",
            locks.display()
        );
        Self { devices, config }
    }

    /// Runs a command, and gives what it says on its standard output.
    fn run(&self, words: &str) -> String {
        let mut words = words.split_whitespace();
        let command = words.next().unwrap();
        let output = Command::new(command)
            .args(["--config", &self.config])
            .args(words)
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{command}: {said}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    fn device(&self, number: usize) -> String {
        self.devices[number].0.display().to_string()
    }

    fn number(&self, words: &str) -> u64 {
        self.run(words).trim().parse().unwrap()
    }

    /// The ranges of a volume, in bytes of the device.
    fn ranges(&self, volume: &str) -> Vec<Range<u64>> {
        let start = self.number("pvs --noheadings --nosuffix --units b -o pe_start");
        let extent = self.number("vgs --noheadings --nosuffix --units b -o vg_extent_size");
        let words = "lvs --noheadings --segments -o seg_pe_ranges ";
        (self.run(&format!("{words}{volume}")).lines())
            .map(|line| {
                let (first, last) = line
                    .split_once(':')
                    .unwrap()
                    .1
                    .trim()
                    .split_once('-')
                    .unwrap();
                let number = |text: &str| text.parse::<u64>().unwrap();
                start + number(first) * extent..start + (number(last) + 1) * extent
            })
            .collect()
    }
}

fn can_use_lvm() -> bool {
    installed(&[
        "pvcreate",
        "mkfs.ext4",
        "dumpe2fs",
        "mkswap",
        "sgdisk",
        "losetup",
    ]) && can_mount()
}

#[test]
fn logical_volumes() {
    if !can_use_lvm() {
        return;
    }
    for sector in [512, 4096] {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let disk = path("disk");
        blank(&disk, 160 * MIB);
        tool(
            "sgdisk",
            &["-n", "1:0:+2M", "-n", "2:0:+150M", "-t", "2:8e00"],
            &[&Loop::new(&disk, sector, 0..160 * MIB).0],
        );
        let start = surveyed(&disk, sector, false).parts[1].start;
        let device = Loop::new(&disk, sector, start..start + 150 * MIB);
        let lvm = Lvm::new(vec![device], folder.path());
        let device = lvm.device(0);
        lvm.run(&format!(
            "pvcreate -y --metadatasize 32k --metadatacopies 2 {device}"
        ));
        skipped(
            &surveyed(&disk, sector, false).parts[1],
            "says nothing of its volume group",
        );
        lvm.run(&format!("vgcreate -s 1M vg0 {device}"));
        let make = "lvcreate -an -Zn -Wn vg0 -L";
        for volume in ["30M -n root", "8M -n gone", "12M -n swap"] {
            lvm.run(&format!("{make} {volume}"));
        }
        lvm.run("lvremove -y vg0/gone");
        lvm.run("lvextend -L +30M vg0/root");
        // Round the ring of descriptions.
        for number in 0..14 {
            lvm.run(&format!(
                "lvchange --addtag much_longer_than_it_has_to_be_{number} vg0/swap"
            ));
        }
        let ranges = |volume: &str| -> Vec<Range<u64>> {
            (lvm.ranges(volume).iter())
                .map(|range| range.start + start..range.end + start)
                .collect()
        };
        let (ext, swap) = (path("ext"), path("swap"));
        ext4(&ext, 60 * MIB, true);
        blank(&swap, 12 * MIB);
        tool("mkswap", &["-q"], &[&swap]);
        let root = ranges("vg0/root");
        assert_eq!(root.len(), 2, "in two pieces");
        scatter(&ext, &disk, &root);
        scatter(&swap, &disk, &ranges("vg0/swap"));

        let survey = surveyed(&disk, sector, true);
        let names: Vec<_> = survey.parts.iter().map(|part| part.name.as_str()).collect();
        let expected = [
            "partition 1",
            "volume vg0/root",
            "volume vg0/swap",
            "unused space of vg0",
        ];
        assert_eq!(names, expected);
        let found = part(&survey, "volume vg0/root");
        assert_eq!(
            (found.content, free(found)),
            (Some("ext4"), ext4_free(&ext))
        );
        assert_eq!(found.ranges, root);
        assert_eq!(free(part(&survey, "volume vg0/swap")), 12 * MIB - 4096);
        let unused = lvm.number("pvs --noheadings --nosuffix --units b -o pv_free");
        assert_eq!(free(part(&survey, "unused space of vg0")), unused);

        let before = lvm.run("vgs -a -o all vg0") + &lvm.run("lvs -a -o all vg0");
        spoil(&disk, sector, &survey);
        lvm.run("vgck vg0");
        let after = lvm.run("vgs -a -o all vg0") + &lvm.run("lvs -a -o all vg0");
        assert_eq!(before, after);
        gather(&disk, &path("after"), &root);
        tool("e2fsck", &["-fn"], &[&path("after")]);
        let content = |image: &Path| {
            contents(Mounted::kernel(image, &path("files"), "ext4", "loop,ro").path())
        };
        assert!(content(&path("after")) == content(&ext), "other files");

        // A guest that sleeps, in a volume.
        let file = File::options().write(true).open(&disk).unwrap();
        let signature = ranges("vg0/swap")[0].start + 4086;
        file.write_all_at(b"S1SUSPEND\0", signature).unwrap();
        let survey = surveyed(&disk, sector, false);
        assert!(survey.free.is_empty());
        skipped(
            part(&survey, "volume vg0/root"),
            "because volume vg0/swap holds the memory",
        );
        file.write_all_at(b"SWAPSPACE2", signature).unwrap();

        lvm.run("vgexport vg0");
        skipped(
            &surveyed(&disk, sector, false).parts[1],
            "vg0, which is exported",
        );
    }
}

/// A volume's part of a description: its flags, and the lines of its one segment.
fn described(name: &str, flags: &str, number: u32, segment: &str) -> String {
    format!(
        "{name} {{\nid = \"RQFr49-haTs-Ncf2-htIn-JlRY-tiP3-HkcQ{number:02}\"\nstatus = [{flags}]\n\
         flags = []\nsegment_count = 1\nsegment1 {{\nstart_extent = 0\n{segment}\n}}\n}}\n"
    )
}

fn striped(first: u64, count: u64) -> String {
    format!(
        "extent_count = {count}\ntype = \"striped\"\nstripe_count = 1\nstripes = [\"pv0\", {first}]"
    )
}

/// What LVM2 itself takes for a volume group, of volumes that only a kernel could make: that `a`, of 5
/// extents, is read, and of the rest only what nobody has.
#[test]
fn volumes_that_are_more_than_runs_of_extents() {
    const SHOWN: &str = "\"READ\", \"WRITE\", \"VISIBLE\"";
    const HIDDEN: &str = "\"READ\", \"WRITE\"";
    if !can_use_lvm() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let disk = folder.path().join("disk");
    blank(&disk, 40 * MIB);
    let device = Loop::new(&disk, 512, 0..40 * MIB);
    let lvm = Lvm::new(vec![device], folder.path());
    let device = lvm.device(0);
    lvm.run(&format!("pvcreate -y --metadatasize 64k {device}"));
    lvm.run(&format!("vgcreate -s 1M vg0 {device}"));
    lvm.run("lvcreate -an -Zn -Wn vg0 -l 5 -n a");
    lvm.run("lvcreate -an -Zn -Wn vg0 -l 5 -n b");
    let file = folder.path().join("vg0");
    lvm.run(&format!("vgcfgbackup -f {} vg0", file.display()));
    let text = fs::read_to_string(&file).unwrap();
    let restored = |volumes: &[(&str, &str, String)]| {
        let more: String = (10..)
            .zip(volumes)
            .map(|(number, (name, flags, segment))| described(name, flags, number, segment))
            .collect();
        let text = text.replacen(
            "logical_volumes {",
            &format!("logical_volumes {{\n{more}"),
            1,
        );
        fs::write(&file, text).unwrap();
        lvm.run(&format!("vgcfgrestore --force -f {} vg0", file.display()));
        surveyed(&disk, 512, false)
    };
    let total = lvm.number("vgs --noheadings -o vg_extent_count") * MIB;
    let check = |survey: &Survey, extents: u64, kept: &[(&str, &str)]| {
        skipped(part(survey, "volume vg0/a"), "holds nothing that is known");
        for (name, why) in kept {
            skipped(part(survey, &format!("volume vg0/{name}")), why);
        }
        let unused = total - (10 + extents) * MIB;
        assert_eq!(free(part(survey, "unused space of vg0")), unused);
        assert_eq!(
            lvm.number("pvs --noheadings --nosuffix --units b -o pv_free"),
            unused
        );
    };

    check(&restored(&[]), 0, &[("b", "holds nothing that is known")]);
    let thin = "extent_count = 6\ntype = \"thin-pool\"\nmetadata = \"p_tmeta\"\npool = \"p_tdata\"\n\
        transaction_id = 1\nchunk_size = 128\ndiscards = \"passdown\"\nzero_new_blocks = 1";
    let volume =
        "extent_count = 99\ntype = \"thin\"\nthin_pool = \"p\"\ntransaction_id = 0\ndevice_id = 1";
    let survey = restored(&[
        ("p", SHOWN, thin.to_owned()),
        ("p_tmeta", HIDDEN, striped(10, 4)),
        ("p_tdata", HIDDEN, striped(14, 6)),
        ("lvol0_pmspare", HIDDEN, striped(20, 4)),
        ("thin", SHOWN, volume.to_owned()),
    ]);
    let kept = [
        ("p_tdata", "belongs to p, which is of the kind thin-pool"),
        ("p_tmeta", "belongs to p, which is of the kind thin-pool"),
        ("lvol0_pmspare", "is for LVM2's own use"),
    ];
    check(&survey, 14, &kept);

    let raid = "extent_count = 3\ntype = \"raid1\"\ndevice_count = 2\nregion_size = 1024\n\
        raids = [\"r_rmeta_0\", \"r_rimage_0\", \"r_rmeta_1\", \"r_rimage_1\"]";
    let survey = restored(&[
        ("r", SHOWN, raid.to_owned()),
        ("r_rmeta_0", HIDDEN, striped(10, 1)),
        ("r_rimage_0", HIDDEN, striped(11, 3)),
        ("r_rmeta_1", HIDDEN, striped(14, 1)),
        ("r_rimage_1", HIDDEN, striped(15, 3)),
    ]);
    check(
        &survey,
        8,
        &[("r_rimage_1", "belongs to r, which is of the kind raid1")],
    );

    let stripes = "extent_count = 8\ntype = \"striped\"\nstripe_count = 2\nstripe_size = 128\n\
        stripes = [\"pv0\", 12, \"pv0\", 20]";
    let survey = restored(&[("s", SHOWN, stripes.to_owned())]);
    check(&survey, 8, &[("s", "of the kind striped")]);

    let moving = "extent_count = 3\ntype = \"mirror\"\nmirror_count = 2\nextents_moved = 0\n\
        region_size = 1024\nmirrors = [\"pv0\", 12, \"pv0\", 20]";
    let moved =
        "extent_count = 3\ntype = \"striped\"\nstripe_count = 1\nstripes = [\"pvmove0\", 0]";
    let survey = restored(&[
        (
            "pvmove0",
            "\"READ\", \"WRITE\", \"PVMOVE\", \"LOCKED\"",
            moving.to_owned(),
        ),
        (
            "m",
            "\"READ\", \"WRITE\", \"VISIBLE\", \"LOCKED\"",
            moved.to_owned(),
        ),
    ]);
    skipped(part(&survey, "the disk"), "of the kind mirror");

    let snapshot = "extent_count = 5\ntype = \"snapshot\"\nchunk_size = 8\norigin = \"a\"\n\
        cow_store = \"b\"";
    let survey = restored(&[("snapshot0", SHOWN, snapshot.to_owned())]);
    skipped(
        part(&survey, "volume vg0/a"),
        "belongs to snapshot0, which is of the kind snapshot",
    );
    skipped(
        part(&survey, "volume vg0/b"),
        "belongs to snapshot0, which is of the kind snapshot",
    );
}

#[test]
fn volume_groups_of_several_disks() {
    if !can_use_lvm() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let disks = ["one", "two"].map(|name| folder.path().join(name));
    disks.iter().for_each(|disk| blank(disk, 20 * MIB));
    let devices = disks
        .each_ref()
        .map(|disk| Loop::new(disk, 512, 0..20 * MIB));
    let lvm = Lvm::new(devices.into(), folder.path());
    let (one, two) = (lvm.device(0), lvm.device(1));
    lvm.run(&format!("pvcreate -y {one} {two}"));
    lvm.run(&format!("vgcreate vg0 {one} {two}"));
    for disk in &disks {
        let survey = surveyed(disk, 512, false);
        skipped(part(&survey, "the disk"), "has other disks as well");
        assert_eq!(survey.parts[0].content, Some("LVM2"));
    }
    lvm.run(&format!("vgreduce vg0 {two}"));
    assert!(
        free(part(
            &surveyed(&disks[0], 512, false),
            "unused space of vg0"
        )) > 10 * MIB
    );
    skipped(
        &surveyed(&disks[1], 512, false).parts[0],
        "says nothing of its volume group",
    );
    lvm.run(&format!("pvremove {two}"));
    skipped(
        &surveyed(&disks[1], 512, false).parts[0],
        "holds nothing that is known here",
    );
}
