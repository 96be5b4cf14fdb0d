//! What the fuzzer starts from: other programs' images, and filesystems that their own tools make.

use std::fs::File;
use std::path::Path;

use vhdfs::storage::sim::Random;
use vhdfs::units::{low_u8, u64_from, usize_from};

use super::edits;
use super::sparse::Sparse;
use crate::support::samples::{samples, unpack};
use crate::support::tools::{installed, tool};

/// Of a sample with more than this, the rest is left out.
const MAX_SEED: usize = 256 << 10;

/// Longer than a target takes ([`super::MAX_FILE`]).
const LONG: [&str; 3] = [
    "d2v-zerofilled.vhd",
    "iotest-dynamic-1G.vhdx",
    "test-disk2vhd.vhdx",
];

/// Disk images of other programs whose name ends so. Those that are long, but hold little, are whole.
fn images(extension: &str) -> Vec<Vec<u8>> {
    let Some(folder) = samples() else {
        return Vec::new();
    };
    let scratch = tempfile::tempdir().expect("a folder");
    let mut seeds = Vec::new();
    for entry in std::fs::read_dir(&folder).expect("readable").flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let Some(name) = name
            .strip_suffix(".bz2")
            .filter(|name| name.ends_with(extension))
        else {
            continue;
        };
        if LONG.contains(&name) {
            continue;
        }
        let path = unpack(&folder, scratch.path(), name);
        let mut seed = read(&path);
        seed.truncate(MAX_SEED);
        seeds.push(seed);
        std::fs::remove_file(path).expect("removed");
    }
    seeds.sort();
    seeds
}

pub(super) fn vhd_images() -> Vec<Vec<u8>> {
    images(".vhd")
}

pub(super) fn vhdx_images() -> Vec<Vec<u8>> {
    images(".vhdx")
}

fn read(path: &Path) -> Vec<u8> {
    Sparse::of(path).expect("readable").encode()
}

/// A disk that `make` fills with the `programs`; none where one of them is missing.
fn made(programs: &[&str], len: u64, make: impl FnOnce(&Path)) -> Option<Vec<u8>> {
    if !installed(programs) {
        return None;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("disk");
    let file = File::create(&path).expect("a new file");
    file.set_len(len).expect("the host has room");
    drop(file);
    make(&path);
    Some(read(&path))
}

/// One filesystem for each list of words to its `program`.
fn filesystems(program: &str, len: u64, variants: &[&[&str]]) -> Vec<Vec<u8>> {
    let one = |words: &&[&str]| made(&[program], len, |path| drop(tool(program, words, &[path])));
    variants.iter().filter_map(one).collect()
}

pub(super) fn ext() -> Vec<Vec<u8>> {
    // Without checksums, which depend on each other, a fuzzer gets further.
    filesystems(
        "mkfs.ext4",
        4 << 20,
        &[
            &["-qF", "-O", "^metadata_csum,^uninit_bg"],
            &[
                "-qF",
                "-b",
                "1024",
                "-O",
                "^metadata_csum,^uninit_bg,bigalloc,^resize_inode",
            ],
            &["-qF", "-t", "ext2", "-b", "1024"],
            &["-qF", "-t", "ext3", "-O", "^resize_inode,meta_bg"],
            &["-qF"],
        ],
    )
}

pub(super) fn ntfs() -> Vec<Vec<u8>> {
    let words: &[&[&str]] = &[&["-FQq"], &["-FQq", "-c", "512"]];
    filesystems("mkntfs", 2 << 20, words)
}

pub(super) fn xfs() -> Vec<Vec<u8>> {
    let words: &[&[&str]] = &[&["-q"], &["-q", "-m", "crc=0", "-d", "agcount=2"]];
    filesystems("mkfs.xfs", 300 << 20, words)
}

pub(super) fn btrfs() -> Vec<Vec<u8>> {
    let words: &[&[&str]] = &[&["-q"], &["-q", "--mixed", "-n", "4096"]];
    filesystems("mkfs.btrfs", 120 << 20, words)
}

pub(super) fn fat() -> Vec<Vec<u8>> {
    let mut seeds = filesystems(
        "mkfs.vfat",
        2 << 20,
        &[&["-F", "12"], &["-F", "12", "-s", "1", "-f", "1"]],
    );
    seeds.extend(filesystems(
        "mkfs.vfat",
        5 << 20,
        &[&["-F", "16", "-s", "1"]],
    ));
    seeds.extend(filesystems(
        "mkfs.vfat",
        34 << 20,
        &[&["-F", "32", "-s", "1"]],
    ));
    seeds
}

pub(super) fn exfat() -> Vec<Vec<u8>> {
    let words: &[&[&str]] = &[&[], &["-c", "4096"]];
    filesystems("mkfs.exfat", 4 << 20, words)
}

pub(super) fn swap() -> Vec<Vec<u8>> {
    let mut seeds = filesystems("mkswap", 1 << 20, &[&["-q"]]);
    // Counted as free only on request.
    for seed in &mut seeds {
        seed[6] |= 4;
    }
    seeds
}

pub(super) fn tables() -> Vec<Vec<u8>> {
    let words = ["-n1:2048:+1M", "-n2:0:+1M", "-t2:8200"];
    let gpt = made(&["sgdisk"], 8 << 20, |path| {
        drop(tool("sgdisk", &words, &[path]))
    });
    gpt.into_iter().chain([mbr()]).collect()
}

/// A disk with a primary partition and two logical ones.
fn mbr() -> Vec<u8> {
    let table = |entries: &[(u8, u32, u32)]| {
        let mut sector = vec![0; 510];
        for (n, (kind, start, count)) in entries.iter().enumerate() {
            let entry = &mut sector[446 + 16 * n..][..16];
            entry[4] = *kind;
            entry[8..12].copy_from_slice(&start.to_le_bytes());
            entry[12..].copy_from_slice(&count.to_le_bytes());
        }
        sector.extend([0x55, 0xaa]);
        sector
    };
    let mut disk = Sparse::default();
    disk.write(
        &table(&[(0x83, 64, 1000), (5, 2000, 8000), (7, 12_000, 1000)]),
        0,
    );
    disk.write(&table(&[(0x83, 64, 1000), (5, 3000, 3000)]), 2000 * 512);
    disk.write(&table(&[(0x82, 64, 1000)]), 5000 * 512);
    disk.write(&[0], (8 << 20) - 1);
    disk.encode()
}

/// A group of one physical volume: a logical volume of two runs, and one of one.
const GROUP: &str = r#"contents = "Text Format Volume Group"
version = 1
description = "a \"fuzzed\" one"
vg0 {
id = "LU46nQ-mJvP-a081-CKja-DEwv-leVE-vqLjEP"
seqno = 7
format = "lvm2"
status = ["RESIZEABLE", "READ", "WRITE"]
flags = []
extent_size = 8
max_lv = 0
physical_volumes {
pv0 {
id = "abcdef-ghij-klmn-opqr-stuv-wxyz-012345"
device = "/dev/sda2"
status = ["ALLOCATABLE"]
flags = []
dev_size = 2048
pe_start = 128
pe_count = 200
}
}
logical_volumes {
root {
id = "2xhfe0-ItgP-HMf3-O19N-CyBw-uMtx-9M1JeV"
status = ["READ", "WRITE", "VISIBLE"]
flags = []
segment_count = 2
segment2 {
start_extent = 20
extent_count = 5
type = "striped"
stripe_count = 1	# linear
stripes = [
"pv0", 10
]
}
segment1 {
start_extent = 0
extent_count = 20
type = "striped"
stripe_count = 1
stripes = ["pv0", 30]
}
}
home {
id = "RQFr49-haTs-Ncf2-htIn-JlRY-tiP3-HkcQw6"
status = ["READ", "WRITE", "VISIBLE"]
flags = []
segment_count = 1
segment1 {
start_extent = 0
extent_count = 100
type = "striped"
stripe_count = 1
stripes = ["pv0", 100]
}
}
}
}
"#;

/// A physical volume of LVM2, which needs no root to make. [`super::seal`] adds the checksums.
pub(super) fn lvm() -> Vec<Vec<u8>> {
    const AREA: u64 = 4096;
    let words = |numbers: &[u64]| {
        numbers
            .iter()
            .flat_map(|n| n.to_le_bytes())
            .collect::<Vec<_>>()
    };
    let mut label = b"LABELONE\x01\0\0\0\0\0\0\0\0\0\0\0\x20\0\0\0LVM2 001".to_vec();
    label.extend(b"abcdefghijklmnopqrstuvwxyz012345");
    // The device's size, the area of data, that of metadata, and the version of what follows.
    label.extend(words(&[
        1 << 20,
        64 << 10,
        0,
        0,
        0,
        AREA,
        60 << 10,
        0,
        0,
        2 | 1 << 32,
    ]));
    let mut area = vec![0; 4];
    area.extend(b" LVM2 x[5A%r0N*>\x01\0\0\0");
    area.extend(words(&[AREA, 60 << 10, 1024, u64_from(GROUP.len())]));
    let mut disk = Sparse::default();
    disk.write(&label, 512);
    disk.write(&area, AREA);
    disk.write(GROUP.as_bytes(), AREA + 1024);
    disk.write(&[0], (1 << 20) - 1);
    vec![disk.encode()]
}

/// Sessions of edited images: of each some, with ever more edits.
fn edited(which: usize) -> Vec<Vec<u8>> {
    let mut random = Random::new(1);
    let bases = 0..edits::counts()[which];
    let seeds = bases.flat_map(|base| (0..6).map(move |edits| (base, edits)));
    seeds
        .map(|(base, edits)| edited_session(base, edits, &mut random))
        .collect()
}

/// A session of image `base` with so many edits.
fn edited_session(base: u8, edits: u8, random: &mut Random) -> Vec<u8> {
    let mut any = |count: u64| -> Vec<u8> { (0..count).map(|_| low_u8(random.next())).collect() };
    let mut session = vec![base, 0, edits];
    session.extend(any(u64::from(edits) * 12));
    let [flags, operations] = [any(1)[0], any(1)[0] % 16];
    // Most are not repaired first.
    session.push(flags & (flags >> 1 | 2));
    session.extend(any(u64::from(operations) * 8));
    session
}

/// Changes the input of a target that edits images: its bytes, or all of it.
pub(super) fn mutate_edits(data: &mut Vec<u8>, random: &mut Random) {
    if random.below(4) > 0 {
        return mutate(data, random);
    }
    let [base, edits] = [random.next(), random.below(4)].map(low_u8);
    *data = edited_session(base, edits, random);
}

pub(super) fn edited_vhds() -> Vec<Vec<u8>> {
    edited(0)
}

pub(super) fn edited_vhdxs() -> Vec<Vec<u8>> {
    edited(1)
}

pub(super) fn edited_logs() -> Vec<Vec<u8>> {
    edited(2)
}

/// For the decoders: one of each kind with nothing behind it, or bytes at random.
pub(super) fn decoders() -> Vec<Vec<u8>> {
    let mut random = Random::new(2);
    let mut seeds = Vec::new();
    for kind in 0..8 {
        for len in [32, 600, 1200] {
            let mut seed = vec![kind, 1];
            seed.extend((0..len).map(|_| low_u8(random.next() & random.next())));
            seeds.push(seed);
        }
    }
    seeds
}

/// Paths to parents, as programs write them, in each of the ways that a child can.
pub(super) fn locators() -> Vec<Vec<u8>> {
    let paths = [
        r".\base.vhd",
        r"..\outside.vhd",
        r"deep\..\base.vhd",
        r"up\outside.vhd",
        r"C:\disks\inside\base.vhd",
        r"\\?\Volume{12345678-1234-1234-1234-123456789abc}\inside\base.vhd",
        r"\\server\share\inside\deep\base.vhd",
        "file:///disks/%2e%2e/outside.vhd",
        "/etc/../../base.vhd",
    ];
    let mut seeds = Vec::new();
    for path in paths {
        for kind in 0..3 {
            seeds.push([&[3, kind], path.as_bytes()].concat());
        }
        for platform in 0..5 {
            let wide: Vec<u8> = path.encode_utf16().flat_map(u16::to_le_bytes).collect();
            let text = if platform < 2 {
                &wide[..]
            } else {
                path.as_bytes()
            };
            seeds.push([&[0, platform], text].concat());
        }
        let locator = vhdfs::format::vhdx::ParentLocator::new(Default::default(), path, path);
        seeds.push([&[1], &locator.to_bytes()[..]].concat());
    }
    seeds
}

/// Changes an input as a fuzzer would that knows nothing of it.
pub(super) fn mutate(data: &mut Vec<u8>, random: &mut Random) {
    for _ in 0..=random.below(4) {
        if data.is_empty() {
            data.push(low_u8(random.next()));
        }
        let at = usize_from(random.below(u64_from(data.len())));
        match random.below(6) {
            0 => data[at] = low_u8(random.next()),
            1 => data[at] ^= 1 << random.below(8),
            2 => data[at] = data[at].wrapping_add(1),
            3 => data.truncate(at),
            4 => {
                let more = (0..8).map(|_| low_u8(random.next()));
                data.extend(more.collect::<Vec<u8>>());
            }
            _ => data[at] = [0, 0xff, 0x80, 0x7f][usize_from(random.below(4))],
        }
    }
}
