use std::ops::Range;

use super::{Group, label, read};
use crate::guest::Trouble;
use crate::guest::testing::{Disk, random};
use crate::guest::view::View;
use crate::units::{low_u8, low_u32, u64_from, usize_from};

const KIB: u64 = 1024;
/// Where the extents of 4 KiB start, and how many there are.
const DATA: u64 = 64 * KIB;
const EXTENTS: u64 = 200;
const FIRST: Range<u64> = 4 * KIB..64 * KIB;
const SECOND: Range<u64> = 960 * KIB..1024 * KIB;

/// A group with what is put in place of parts of this: a volume of two runs and one of one.
pub(in crate::guest) fn description(changes: &[(&str, &str)]) -> String {
    let mut text = r#"# made by a test
contents = "Text Format Volume Group"
version = 1
description = "with a \"quote\" and a \\"
creation_host = "vm"	# not { this
creation_time = 1795364323
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
"#
    .to_owned();
    for (from, to) in changes {
        assert!(text.contains(from), "{from}");
        text = text.replace(from, to);
    }
    text
}

fn locations(disk: &mut Disk, area: Range<u64>, committed: (u64, &str), prepared: u64) {
    let mut sector = vec![0; 4];
    sector.extend(b" LVM2 x[5A%r0N*>\x01\0\0\0");
    sector.extend(area.start.to_le_bytes());
    sector.extend((area.end - area.start).to_le_bytes());
    sector.extend(committed.0.to_le_bytes());
    sector.extend(u64_from(committed.1.len()).to_le_bytes());
    sector.extend(label::crc(committed.1.as_bytes()).to_le_bytes());
    sector.extend([0; 4]);
    sector.extend(prepared.to_le_bytes());
    sector.extend(prepared.to_le_bytes());
    sector.resize(512, 0);
    let crc = label::crc(&sector[4..]);
    sector[..4].copy_from_slice(&crc.to_le_bytes());
    disk.put(area.start, &sector);
}

/// Writes a description into an area, `at` bytes from its start on, around its end if need be.
fn describe(disk: &mut Disk, area: Range<u64>, at: u64, text: &str) {
    locations(disk, area.clone(), (at, text), 0);
    let (first, rest) = text.split_at(text.len().min(usize_from(area.end - area.start - at)));
    disk.put(area.start + at, first.as_bytes());
    disk.put(area.start + 512, rest.as_bytes());
}

fn relabel(disk: &mut Disk, sector: u64) {
    let start = usize_from(sector * 512);
    let crc = label::crc(&disk.bytes[start + 20..start + 512]);
    disk.put(sector * 512 + 16, &crc.to_le_bytes());
}

/// A physical volume with this description in both areas of metadata.
pub(in crate::guest) fn volume(text: &str) -> Disk {
    let mut disk = Disk::new(1 << 20, 512);
    let mut sector = b"LABELONE\x01\0\0\0\0\0\0\0\0\0\0\0\x20\0\0\0LVM2 001".to_vec();
    sector.extend(b"abcdefghijklmnopqrstuvwxyz012345");
    let areas = [DATA, 0, 0, 0, FIRST.start, FIRST.end - FIRST.start];
    let more = [SECOND.start, SECOND.end - SECOND.start, 0, 0];
    sector.extend((1_u64 << 20).to_le_bytes());
    sector.extend(
        areas
            .iter()
            .chain(&more)
            .flat_map(|number| number.to_le_bytes()),
    );
    sector.extend([2, 0, 0, 0, 1, 0, 0, 0]);
    disk.put(512, &sector);
    relabel(&mut disk, 1);
    describe(&mut disk, FIRST, 1024, text);
    describe(&mut disk, SECOND, 512, text);
    disk
}

fn found(disk: &Disk) -> Result<Group, String> {
    read(&View::whole(disk)).map_err(|trouble| match trouble {
        Trouble::Skip { reason, .. } => reason,
        Trouble::Io(error) => error.to_string(),
    })
}

fn refused(disk: &Disk, why: &str) {
    let found = found(disk);
    assert!(
        found.as_ref().is_err_and(|reason| reason.contains(why)),
        "{found:?}, not {why}"
    );
}

/// The extents of a range of bytes.
fn extents(range: &Range<u64>) -> Range<u64> {
    (range.start - DATA) / (4 * KIB)..(range.end - DATA) / (4 * KIB)
}

/// Name, extents, and why it is kept.
type Line = (String, Vec<Range<u64>>, Option<String>);

fn lines(group: &Group) -> Vec<Line> {
    (group.volumes.iter())
        .map(|volume| {
            let ranges = volume.ranges.iter().map(extents).collect();
            (volume.name.clone(), ranges, volume.kept.clone())
        })
        .collect()
}

fn unused(group: &Group) -> Vec<Range<u64>> {
    group.unused.iter().map(extents).collect()
}

fn home() -> Line {
    ("home".to_owned(), vec![100..200], None)
}

fn root() -> Line {
    ("root".to_owned(), vec![30..50, 10..15], None)
}

#[test]
fn linear_volumes_and_what_is_unused() {
    let group = found(&volume(&description(&[]))).unwrap();
    assert_eq!(group.name, "vg0");
    assert_eq!(lines(&group), [home(), root()]);
    assert_eq!(unused(&group), [0..10, 15..30, 50..100]);
    assert!(group.volumes.iter().all(|volume| volume.linear));

    // In whatever order.
    let other = description(&[("segment2 {", "segment0 {")]);
    assert_eq!(lines(&found(&volume(&other)).unwrap()), [home(), root()]);

    let none = description(&[("logical_volumes", "historical_logical_volumes")]);
    let group = found(&volume(&none)).unwrap();
    assert_eq!(lines(&group), []);
    assert_eq!(unused(&group), vec![0..EXTENTS]);
}

#[test]
fn a_description_around_the_end_of_its_area() {
    let text = description(&[]);
    for at in [
        60 * KIB - 100,
        60 * KIB - 1,
        60 * KIB - u64_from(text.len()),
    ] {
        let mut disk = volume(&text);
        describe(&mut disk, FIRST, at, &text);
        assert_eq!(lines(&found(&disk).unwrap()), [home(), root()], "{at}");
    }
    let mut disk = volume(&text);
    locations(&mut disk, FIRST, (60 * KIB, &text), 0);
    refused(&disk, "in a place that cannot be");
    locations(&mut disk, FIRST, (511, &text), 0);
    refused(&disk, "in a place that cannot be");
}

#[test]
fn copies_of_the_metadata() {
    let text = description(&[]);
    let older = description(&[("seqno = 7", "seqno = 6")]);
    let mut disk = volume(&text);
    describe(&mut disk, SECOND, 512, &older);
    refused(&disk, "two copies of its metadata that disagree");
    // One that is not used, as when a group has many disks.
    let mut disk = volume(&text);
    describe(&mut disk, FIRST, 1024, &older);
    locations(&mut disk, FIRST, (0, ""), 0);
    assert!(found(&disk).is_ok());
    locations(&mut disk, SECOND, (0, ""), 0);
    refused(&disk, "says nothing of its volume group");
    let mut disk = volume(&text);
    locations(&mut disk, SECOND, (512, &text), 1024);
    refused(&disk, "was being changed");
    // A header that belongs elsewhere, or tells another size.
    for at in [24, 32] {
        let mut disk = volume(&text);
        let start = usize_from(SECOND.start);
        disk.bytes[start + at] ^= 2;
        let crc = label::crc(&disk.bytes[start + 4..start + 512]);
        disk.put(SECOND.start, &crc.to_le_bytes());
        refused(&disk, "with a header that is damaged");
    }
}

#[test]
fn damage_is_noticed() {
    let fresh = volume(&description(&[]));
    let text = u64_from(description(&[]).len());
    for area in [512..1024, 4096..4608, 960 * KIB..960 * KIB + 512] {
        for at in area {
            let mut disk = fresh.clone();
            disk.bytes[usize_from(at)] ^= 0x10;
            assert!(found(&disk).is_err(), "byte {at}");
        }
    }
    for area in [
        5 * KIB..5 * KIB + text,
        960 * KIB + 512..960 * KIB + 512 + text,
    ] {
        for at in area.step_by(7) {
            let mut disk = fresh.clone();
            disk.bytes[usize_from(at)] ^= 1;
            refused(&disk, "with a wrong checksum");
        }
    }
    let mut disk = fresh.clone();
    let label = disk.bytes[512..1024].to_vec();
    disk.put(0, &label);
    refused(&disk, "a label that is damaged");
    disk.put(8, &[0]);
    relabel(&mut disk, 0);
    refused(&disk, "a label that is damaged");
    let mut disk = fresh.clone();
    disk.bytes.truncate(usize_from((1 << 20) - 512));
    assert!(found(&disk).is_err());
}

#[test]
fn labels_that_cannot_be() {
    let fresh = volume(&description(&[]));
    for at in (20..176).step_by(4) {
        for value in [0, 1, 3, 500, u32::MAX - 511, u32::MAX] {
            let mut disk = fresh.clone();
            disk.put(512 + at, &value.to_le_bytes());
            relabel(&mut disk, 1);
            if disk.bytes == fresh.bytes || found(&disk).is_err() {
                continue;
            }
            // What is not relied on, or means the same.
            let harmless = [
                32 + 32..32 + 40,   // the device's size, when it was smaller
                32 + 48..32 + 56,   // the data's size, which depends on that of the extents
                32 + 64..32 + 72,   // a size behind the end of a list
                32 + 88..32 + 92,   // no second area of metadata
                32 + 112..32 + 144, // the extension, with space for boot loaders
            ];
            assert!(
                harmless.iter().any(|range| range.contains(&at)),
                "{at} {value}"
            );
        }
    }
}

#[test]
fn a_device_that_shrank() {
    let mut disk = volume(&description(&[]));
    disk.put(512 + 64, &(1_u64 << 21).to_le_bytes());
    relabel(&mut disk, 1);
    refused(&disk, "claims more than the 1048576 bytes");
}

#[test]
fn groups_that_are_not_read() {
    let cases: &[(&[(&str, &str)], &str)] = &[
        (&[("pv0 {", "pv1 { }\npv0 {")], "has other disks as well"),
        (&[("abcdef", "abcdeg")], "knows nothing of it"),
        (
            &[("[\"RESIZEABLE\"", "[\"EXPORTED\"")],
            "vg0, which is exported",
        ),
        (
            &[("[\"RESIZEABLE\"", "[\"CLUSTERED\"")],
            "several systems share",
        ),
        (
            &[("seqno = 7", "lock_type = \"sanlock\"")],
            "several systems share",
        ),
        (
            &[("[\"RESIZEABLE\"", "[\"FRESH\"")],
            "the flag FRESH on vg0",
        ),
        (
            &[("[\"ALLOCATABLE\"]", "[\"MISSING\"]")],
            "taken for missing",
        ),
        (&[("[\"ALLOCATABLE\"]", "[\"EXPORTED\"]")], "exported"),
        (
            &[("[\"ALLOCATABLE\"]", "[\"FRESH\"]")],
            "the flag FRESH on pv0",
        ),
        (&[("[\"ALLOCATABLE\"]", "3")], "without a status"),
        (
            &[("version = 1", "version = 2")],
            "of a kind that is not known",
        ),
        (&[("contents", "content")], "of a kind that is not known"),
        (
            &[("vg0 {", "vg1 { }\nvg0 {")],
            "of a kind that is not known",
        ),
        (&[("vg0 {", "\"v\u{1b}\" {")], "a name that cannot be"),
        (&[("root {", "r$t {")], "a name that cannot be"),
        (&[("pe_count = 200", "pe_count = 241")], "claims more than"),
        (
            &[("pe_count = 200", "pe_count = 9000000000000000000")],
            "claims more than",
        ),
        (
            &[("dev_size = 2048", "dev_size = 2049")],
            "claims more than",
        ),
        (
            &[("dev_size = 2048", "dev_size = 1600")],
            "claims more than",
        ),
        (
            &[("pe_count = 200", "pe_count = 225")],
            "where its metadata lies",
        ),
        (
            &[(
                "pe_count = 200",
                "pe_count = 200\nba_start = 900\nba_size = 8",
            )],
            "where its metadata",
        ),
        (
            &[("pe_start = 128", "pe_start = 136")],
            "label and metadata that disagree",
        ),
        (
            &[("extent_size = 8", "extent_size = 0")],
            "without a size of extents",
        ),
        (
            &[("extent_size = 8", "extent_size = -8")],
            "without a size of extents",
        ),
        (
            &[("max_lv = 0", "volumes { }")],
            "a section volumes that is not known",
        ),
        (
            &[("segment_count = 2", "segment_count = 3")],
            "segments of volume root are missing",
        ),
        (
            &[("start_extent = 20", "start_extent = 21")],
            "volume root has a gap",
        ),
        (
            &[("start_extent = 20", "start_extent = 19")],
            "volume root has a gap",
        ),
        (
            &[("\"pv0\", 10\n", "\"pv0\", 30\n")],
            "the extents, which others have",
        ),
        (
            &[("\"pv0\", 10\n", "\"pv0\", 29\n")],
            "the extents, which others have",
        ),
        (
            &[("\"pv0\", 100", "\"pv0\", 101")],
            "the extents, which others have or nobody",
        ),
        (
            &[("\"pv0\", 100", "\"pv0\", -1")],
            "the extents, which others have or nobody",
        ),
        (
            &[("\"pv0\", 100", "\"pv0\"")],
            "not clear about the stripes of volume home",
        ),
        (
            &[("\"pv0\", 100", "\"pv0\", 100, \"pv0\", 0")],
            "not clear about the stripes",
        ),
        (
            &[(
                "stripe_count = 1\n                stripes = [\"pv0\", 100]",
                "stripe_count = 0\nstripes = [ ]",
            )],
            "not clear about the stripes",
        ),
        (
            &[("extent_count = 100", "extent_count = 0")],
            "not clear about the extents",
        ),
        (
            &[("id = \"RQFr49", "id = \"x\" id = \"RQFr49")],
            "says id twice",
        ),
    ];
    for (changes, why) in cases {
        refused(&volume(&description(changes)), why);
    }
    let ragged = [
        ("extent_count = 100", "extent_count = 99"),
        (
            "stripe_count = 1\n                stripes = [\"pv0\", 100]",
            "stripe_count = 2\nstripes = [\"pv0\", 100, \"pv0\", 150]",
        ),
    ];
    refused(
        &volume(&description(&ragged)),
        "not clear about the stripes",
    );
    // A mirror that has extents itself, as pvmove makes them.
    let moving = [(
        "type = \"striped\"\n                stripe_count = 1\n                stripes",
        "type = \"mirror\"\nmirrors",
    )];
    refused(&volume(&description(&moving)), "of the kind mirror");
}

#[test]
fn volumes_that_are_kept() {
    let home_segment = "type = \"striped\"\n                stripe_count = 1\n                \
        stripes = [\"pv0\", 100]";
    let snapshot = "logical_volumes {\n snapshot0 {\n status = [\"READ\", \"WRITE\", \"VISIBLE\"]\n \
        segment_count = 1\n segment1 {\n start_extent = 0\n extent_count = 25\n type = \"snapshot\"\n \
        chunk_size = 8\n origin = \"root\"\n cow_store = \"home\"\n } }";
    let group = found(&volume(&description(&[("logical_volumes {", snapshot)]))).unwrap();
    let why = Some("belongs to snapshot0, which is of the kind snapshot".to_owned());
    let kept = |line: Line, why: &Option<String>| (line.0, line.1, why.clone());
    assert_eq!(lines(&group), [kept(home(), &why), kept(root(), &why)]);
    assert_eq!(unused(&group), [0..10, 15..30, 50..100]);

    let pool = "logical_volumes {\n pool {\n status = [\"READ\", \"WRITE\", \"VISIBLE\"]\n \
        segment_count = 1\n segment1 {\n start_extent = 0\n extent_count = 25\n type = \"thin-pool\"\n \
        metadata = \"m\"\n pool = \"home\"\n } }";
    let group = found(&volume(&description(&[("logical_volumes {", pool)]))).unwrap();
    let why = Some("belongs to pool, which is of the kind thin-pool".to_owned());
    assert_eq!(lines(&group), [kept(home(), &why), root()]);

    let stacked = [("\"pv0\", 10\n", "\"home\", 10\n")];
    let group = found(&volume(&description(&stacked))).unwrap();
    let root_kept = Some("is of the kind stacked, which is not read here".to_owned());
    let home_kept = Some("belongs to root, which is of the kind striped".to_owned());
    let expected = [
        kept(home(), &home_kept),
        ("root".to_owned(), vec![30..50], root_kept),
    ];
    assert_eq!(lines(&group), expected);

    let two = [(
        home_segment,
        "type = \"striped\"\nstripe_count = 2\nstripes = [\"pv0\", 100, \"pv0\", 150]",
    )];
    let group = found(&volume(&description(&two))).unwrap();
    let why = Some("is of the kind striped, which is not read here".to_owned());
    let striped = ("home".to_owned(), vec![100..150, 150..200], why);
    assert_eq!(lines(&group), [striped, root()]);
    assert!(!group.volumes[0].linear);

    for (flag, why) in [
        (
            "\"LOCKED\", \"VISIBLE\"",
            "is being moved: let pvmove finish",
        ),
        (
            "\"PVMOVE\", \"VISIBLE\"",
            "is being moved: let pvmove finish",
        ),
        ("\"FRESH\", \"VISIBLE\"", "has the flag FRESH"),
        ("\"FIXED_MINOR\"", "is for LVM2's own use"),
    ] {
        let flags = [("\"VISIBLE\"", flag)];
        let group = found(&volume(&description(&flags))).unwrap();
        assert!(
            group
                .volumes
                .iter()
                .all(|volume| volume.kept.as_deref() == Some(why))
        );
    }
    let raid = [(
        home_segment,
        "type = \"raid1+RESHAPE\"\nraids = [\"a\", \"b\"]",
    )];
    let group = found(&volume(&description(&raid))).unwrap();
    assert_eq!(lines(&group), [root()], "home has no extents of its own");
    assert_eq!(unused(&group), [0..10, 15..30, 50..200]);
}

#[test]
fn garbage_neither_panics_nor_hangs() {
    let text = description(&[]);
    let mut random = random(5);
    for _ in 0..3000 {
        let mut bytes = text.clone().into_bytes();
        for _ in 0..=random(3) {
            let at = usize_from(random(u64_from(bytes.len())));
            match random(3) {
                0 => bytes[at] = low_u8(b" {}=[]\"0123456789,#\\-x"[usize_from(random(22))].into()),
                1 => {
                    bytes.remove(at);
                }
                _ => bytes.truncate(at.max(1)),
            }
        }
        let Ok(text) = String::from_utf8(bytes) else {
            continue;
        };
        let Ok(group) = found(&volume(&text)) else {
            continue;
        };
        let volumes = group.volumes.iter().flat_map(|volume| &volume.ranges);
        let mut all: Vec<Range<u64>> = volumes
            .cloned()
            .chain(group.unused.iter().cloned())
            .collect();
        all.sort_by_key(|range| range.start);
        assert!(
            all.iter()
                .all(|range| range.start >= DATA && range.end <= 1 << 20)
        );
        assert!(all.windows(2).all(|pair| pair[0].end <= pair[1].start));
    }
    let mut disk = volume(&text);
    for _ in 0..2000 {
        disk.put(512 + random(512), &low_u32(random(1 << 32)).to_le_bytes());
        relabel(&mut disk, 1);
        let _ = found(&disk);
        if random(4) == 0 {
            disk = volume(&text);
        }
    }
}
