//! A volume built by hand, and all that can be wrong with it.

pub(super) mod build;
mod damage;
mod lies;

use build::{
    BITMAP, CLUSTER, CLUSTERS, HIBERNATION, Image, LOG, LOST, OWNED, SPLIT, entry, file_name,
    index_entry, put, reference, resident, restart,
};

use super::{is_here, read};
use crate::guest::view::View;
use crate::guest::{Trouble, Volume};
use crate::units::usize_from;

fn look(image: &Image) -> Result<Volume, Trouble> {
    read(&View::whole(image))
}

/// Why an image is left alone, and whether its system sleeps.
fn refused(image: &Image) -> (String, bool) {
    match look(image) {
        Err(Trouble::Skip { reason, hibernated }) => (reason, hibernated),
        other => panic!("{other:?}"),
    }
}

fn assert_refused(image: &Image, words: &str) {
    let (reason, hibernated) = refused(image);
    assert!(reason.contains(words), "{reason:?} has no {words:?}");
    assert!(!hibernated, "{reason}");
}

fn assert_read(image: &Image) {
    if let Err(trouble) = look(image) {
        panic!("{trouble:?}");
    }
}

#[test]
fn what_nobody_has_is_free() {
    let image = Image::new();
    assert_eq!(is_here(&View::whole(&image)).unwrap(), Some("NTFS"));
    let volume = look(&image).unwrap();
    for lcn in 0..CLUSTERS {
        let used = OWNED
            .iter()
            .chain([&LOST])
            .any(|range| range.contains(&lcn));
        for byte in [lcn * CLUSTER, (lcn + 1) * CLUSTER - 1] {
            assert_eq!(volume.free.contains(&byte), !used, "cluster {lcn}");
        }
    }
    assert_eq!(
        volume.free.iter().next_back().unwrap().end,
        CLUSTERS * CLUSTER
    );
    let free: u64 = volume.free.iter().map(|run| run.end - run.start).sum();
    assert_eq!(volume.reported_free, free);
    assert_eq!(volume.size, CLUSTERS * CLUSTER + CLUSTER / 2);
    assert_eq!(volume.rest, crate::guest::Rest::Unmarked);
}

#[test]
fn other_things_are_not_here() {
    let mut image = Image::new();
    image.bytes[3] = b'E';
    assert_eq!(is_here(&View::whole(&image)).unwrap(), None);
    for len in [0, 3, 511] {
        image.bytes.truncate(len);
        assert_eq!(is_here(&View::whole(&image)).unwrap(), None);
    }
}

#[test]
fn boot_sector() {
    let cases: [(usize, &[u8]); 16] = [
        (0x0b, &[0, 1]),
        (0x0b, &[0, 3]),
        (0x0b, &[0, 0x20]),
        (0x0d, &[0]),
        (0x0d, &[3]),
        (0x0d, &[0x80]),
        (0x0d, &[0xf2]),
        (0x0e, &[1]),
        (0x10, &[2]),
        (0x20, &[1]),
        (0x28, &[0, 0]),
        (0x2c, &[1]),
        (0x30, &[0]),
        (0x30, &[128]),
        (0x38, &[255]),
        (0x40, &[0xf3]),
    ];
    for (at, value) in cases {
        let mut image = Image::new();
        put(&mut image.bytes, at, value);
        let (reason, _) = refused(&image);
        let expected = ["makes no sense", "more than", "damaged"];
        assert!(
            expected.iter().any(|words| reason.contains(words)),
            "{at:#x}: {reason}"
        );
    }
    let mut image = Image::new();
    put(&mut image.bytes, 0x2f, &[0xff]);
    assert_refused(&image, "makes no sense");
    let mut image = Image::new();
    put(&mut image.bytes, 0x2e, &[1]);
    assert_refused(&image, "more than the 4294967295 that are read");
    let mut image = Image::new();
    put(&mut image.bytes, 0x28, &(CLUSTERS * 8 + 6).to_le_bytes());
    assert_refused(&image, "more than the");
}

#[test]
fn volume_flags() {
    for bit in 0..16 {
        let mut image = Image::new();
        let flags = 1_u16 << bit;
        image.edit(3, |bytes| put(bytes, 0x38 + 24 + 10, &flags.to_le_bytes()));
        match flags {
            0x0008 | 0x0080 => assert_read(&image),
            0x0001 => assert_refused(&image, "was not unmounted cleanly (is marked as dirty)"),
            _ => assert_refused(&image, "has work to do at its next mount"),
        }
    }
    for (major, minor, known) in [(1, 2, true), (3, 0, true), (1, 1, false), (4, 0, false)] {
        let mut image = Image::new();
        image.edit(3, |bytes| put(bytes, 0x38 + 24 + 8, &[major, minor]));
        match known {
            true => assert_read(&image),
            false => assert_refused(&image, "which is not known here"),
        }
    }
}

#[test]
fn restart_pages() {
    let clean = |lsn| restart(lsn, 1, true, true);
    let closed = |lsn| restart(lsn, 1, false, false);
    let open = |lsn| restart(lsn, 1, true, false);
    let (torn, chkdsk) = (
        {
            let mut page = clean(1);
            page[1023] ^= 1;
            page
        },
        {
            let mut page = clean(1);
            put(&mut page, 0, b"CHKD");
            page
        },
    );
    let version = |major| restart(9, major, true, true);
    // What the two pages are, and what is wrong with that.
    let cases = [
        (clean(1), clean(1), None),
        (closed(1), closed(1), None),
        (clean(2), open(1), None),
        (open(1), clean(2), None),
        (open(2), clean(1), Some("its log is open")),
        (clean(1), open(2), Some("its log is open")),
        (clean(1), open(1), Some("its log is open")),
        (open(1), clean(1), Some("its log is open")),
        (clean(1), torn.clone(), Some("its log was written in part")),
        (torn, clean(1), Some("its log was written in part")),
        (chkdsk, clean(1), Some("was checked by chkdsk")),
        (clean(1), vec![0xff; 4096], Some("its log makes no sense")),
        (vec![0xff; 4096], clean(1), Some("its log makes no sense")),
        (
            vec![0xff; 4096],
            vec![0xff; 4096],
            Some("its log makes no sense"),
        ),
        (vec![0; 4096], vec![0; 4096], Some("its log makes no sense")),
        (clean(1), version(0), Some("of version 0")),
    ];
    for (number, (first, second, wrong)) in cases.into_iter().enumerate() {
        let mut image = Image::new();
        image.log(&first, &second);
        match wrong {
            None => assert_eq!(
                look(&image).unwrap().rest,
                crate::guest::Rest::Unmarked,
                "case {number}"
            ),
            Some(words) => assert_refused(&image, words),
        }
    }
    for pages in [(version(2), clean(1)), (clean(1), version(2))] {
        let mut image = Image::new();
        image.log(&pages.0, &pages.1);
        let (reason, hibernated) = refused(&image);
        assert!(hibernated && reason.contains("log version 2.0"), "{reason}");
    }
}

#[test]
fn emptied_log() {
    for at in [0, 511, 4096, 60_000, 32 * 4096 - 1] {
        let mut image = Image::new();
        image.bytes[usize_from(LOG.start * CLUSTER) + at] = 0xfe;
        let (reason, _) = refused(&image);
        assert!(reason.contains("makes no sense"), "{reason}");
    }
}

/// An image with a file in the root folder, in its record or outside.
fn with_file(name: &str, first: Option<&[u8]>, outside: bool) -> Image {
    let mut image = Image::new();
    let entry = index_entry(HIBERNATION, name);
    if outside {
        image.node(&[index_entry(29, "Also"), entry]);
    } else {
        let head = [0x30, 0, 0, 0, 1, 0, 0, 0, 0, 16, 0, 0, 1, 0, 0, 0];
        let entries = build::index_entries(&[entry], 16);
        let root = [head.to_vec(), entries].concat();
        let nodes = build::mapped(0xa0, 1, "$I30", 0, &[(16, 1)], [1, CLUSTER]);
        image.add(5, 0, &[resident(0x90, 0, "$I30", &root), nodes]);
    }
    let data = match first {
        None => resident(0x80, 0, "", b"wake"),
        Some(first) => {
            put(&mut image.bytes, usize_from(220 * CLUSTER), first);
            build::mapped(0x80, 0, "", 0, &[(220, 1)], [1, CLUSTER])
        }
    };
    image.add(HIBERNATION, 0, &[data]);
    image.mark(220, true);
    image
}

#[test]
fn hibernation() {
    for outside in [false, true] {
        for name in ["hiberfil.sys", "HIBERFIL.SYS", "Hiberfil.Sys"] {
            for first in [
                None,
                Some(b"hibr"),
                Some(b"HIBR"),
                Some(b"RSTR"),
                Some(b"LINK"),
            ] {
                let image = with_file(name, first.map(|first| first.as_slice()), outside);
                let (reason, hibernated) = refused(&image);
                assert!(
                    hibernated && reason.contains("is asleep (hiberfil.sys)"),
                    "{reason}"
                );
            }
            for first in [b"wake", b"WAKE", b"\0\0\0\0"] {
                assert_read(&with_file(name, Some(first), outside));
            }
        }
        for name in [
            "hiberfil.sy",
            "hiberfil.sys1",
            "\u{168}iberfil.sys",
            "hiberfil_sys",
        ] {
            assert_read(&with_file(name, Some(b"hibr"), outside));
        }
    }
}

#[test]
fn hibernation_goes_first() {
    let mut image = with_file("hiberfil.sys", Some(b"hibr"), false);
    image.edit(3, |bytes| bytes[0x38 + 24 + 10] = 1);
    image.log(&restart(1, 1, true, false), &restart(1, 1, true, false));
    image.mark(220, false);
    assert!(refused(&image).1, "news for the whole disk");
}

#[test]
fn a_name_that_is_no_longer_used() {
    let mut image = with_file("hiberfil.sys", Some(b"hibr"), true);
    // The file is gone, and its record used for another one.
    image.edit(HIBERNATION, |bytes| bytes[0x10] += 1);
    assert_read(&image);
    let mut image = with_file("hiberfil.sys", Some(b"hibr"), true);
    image.edit(HIBERNATION, |bytes| bytes[0x16] = 0);
    assert_read(&image);
}

#[test]
fn shadow_copies_in_the_boot_area() {
    let identifier = [
        0x6b, 0x87, 0x08, 0x38, 0x76, 0xc1, 0x48, 0x4e, 0xb7, 0xae, 0x04, 0x04, 0x6e, 0x6c, 0xc7,
        0x52,
    ];
    // Where the catalog lies, this volume, and the one with the shadow copies.
    for (catalog, volume, storage, has) in [
        (0, 0, 0, false),
        (0, 7, 7, false),
        (0, 7, 0, false),
        (0x4000, 7, 7, true),
        (1 << 40, 0, 0, true),
        (0, 7, 8, true),
    ] {
        let mut image = Image::new();
        put(&mut image.bytes, 0x1e00, &identifier);
        put(&mut image.bytes, 0x1e00 + 0x30, &u64::to_le_bytes(catalog));
        put(&mut image.bytes, 0x1e00 + 0x40, &[volume; 16]);
        put(&mut image.bytes, 0x1e00 + 0x50, &[storage; 16]);
        match has {
            true => assert_refused(&image, "has shadow copies"),
            false => assert_read(&image),
        }
        image.bytes[0x1e00] = 0;
        assert_read(&image);
    }
}

#[test]
fn shadow_copies_in_files() {
    let identifier = "{3808876b-c176-4e48-b7ae-04046e6cc752}";
    let other = "{673e7cc9-3a5c-11e9-b813-901b0e4d36dd}";
    for (name, has) in [
        (format!("{other}{identifier}"), true),
        (format!("{other}{}", identifier.to_uppercase()), true),
        (identifier.to_owned(), false),
        (format!("{identifier}{other}"), false),
        (format!("{other}{identifier}."), false),
        (format!("{}{identifier}", &other[1..]), false),
        (
            format!("{other}{}", identifier.replace('b', "\u{162}")),
            false,
        ),
    ] {
        let mut image = Image::new();
        image.add(29, 0, &[resident(0x30, 0, "", &file_name(&name))]);
        match has {
            true => assert_refused(&image, "has shadow copies"),
            false => assert_read(&image),
        }
    }
}

#[test]
fn attribute_lists() {
    let [base, second, third] = SPLIT;
    let list_at = usize_from(build::LIST * CLUSTER);
    let lacks = "a file lacks a part";
    // Of each entry: another kind, place, holder, sequence number. Of the first: another attribute,
    // which may be any in the others.
    let all = [0, 8, 16, 22].map(|at| [at, at + 32, at + 64]);
    for at in all.into_iter().flatten().chain([24]) {
        let mut image = Image::new();
        image.bytes[list_at + at] ^= 1;
        assert_refused(&image, lacks);
    }
    for record in [second, third] {
        // Not in use, another one's, of another age.
        let changes: [fn(&mut [u8]); 3] = [|b| b[0x16] = 0, |b| b[0x20] ^= 4, |b| b[0x26] ^= 1];
        for change in changes {
            let mut image = Image::new();
            image.edit(record, change);
            assert_refused(&image, lacks);
        }
    }
    let mut image = Image::new();
    image.edit(base, |bytes| bytes[0x38 + 48] -= 32);
    image.edit(base, |bytes| bytes[0x38 + 56] -= 32);
    assert_refused(&image, lacks);
    let mut image = Image::new();
    put(&mut image.bytes, list_at + 96, &entry(0x80, 30, third, 4));
    image.edit(base, |bytes| bytes[0x38 + 48] += 32);
    image.edit(base, |bytes| bytes[0x38 + 56] += 32);
    assert_refused(&image, lacks);
    let mut image = Image::new();
    image.add(23, reference(base), &[resident(0x80, 0, "of nobody", b"1")]);
    assert_refused(&image, lacks);
}

#[test]
fn attribute_lists_of_names() {
    let named = || {
        let mut named = entry(0x80, 0, 30, 1);
        named[6] = 3;
        put(&mut named, 26, b"a\0b\0c\0");
        named
    };
    let at = 0x38 + 24;
    let mut image = Image::new();
    let stream = resident(0x80, 1, "abc", b"value");
    image.add(30, 0, &[resident(0x20, 0, "", &named()), stream]);
    assert_read(&image);
    for change in [0, 16, 24, 26, 30] {
        let mut other = image.clone();
        other.edit(30, |bytes| bytes[at + change] ^= 1);
        assert_refused(&other, "a file lacks a part");
    }
    // Of a part that is not the first, a list may say 0 for the attribute's number.
    let mut image = Image::new();
    image.bytes[usize_from(build::LIST * CLUSTER) + 64 + 24] = 0;
    assert_read(&image);
}

#[test]
fn fragmented_table() {
    // The part of $MFT that its first record does not map.
    for at in [0x10, 0x16, 0x20, 0x26] {
        let mut image = Image::new();
        image.edit(15, |bytes| bytes[at] ^= 1);
        assert_refused(&image, "record 15 is not the part of a file that it was");
    }
    let mut image = Image::new();
    image.edit(15, |bytes| bytes[0x38] ^= 0x10);
    assert_refused(&image, "an attribute list names what is not there");
    // A table whose second part would only be found through itself, whose parts stand in any order.
    let [first, second, other] = [(0, 0, 1), (4, 15, 0), (0, 0, 2)];
    let beyond = (4, 20, 0);
    for (list, words) in [
        ([first, beyond, other], Some("ends too early")),
        ([beyond, first, other], Some("ends too early")),
        ([other, second, first], None),
        ([other, second, second], Some("does not hold itself")),
    ] {
        let mut image = Image::new();
        let entries = list.map(|(from, holder, instance)| {
            let kind = if instance == 2 { 0xb0 } else { 0x80 };
            entry(kind, from, holder, instance)
        });
        image.edit(0, |bytes| put(bytes, 0x38 + 24, &entries.concat()));
        match words {
            Some(words) => assert_refused(&image, words),
            None => assert_read(&image),
        }
    }
}

#[test]
fn small_volumes_are_cut_anywhere() {
    let whole = Image::new();
    let mut cuts: Vec<usize> = (0..whole.bytes.len()).step_by(4096 - 1).collect();
    cuts.extend([512, 513, whole.bytes.len() - 513]);
    for len in cuts {
        let mut image = whole.clone();
        image.bytes.truncate(len);
        assert!(look(&image).is_err(), "cut to {len}");
    }
    // The copy of the boot sector is not counted among the volume's bytes.
    let mut image = whole;
    image.bytes.truncate(image.bytes.len() - 512);
    assert_read(&image);
}

#[test]
fn two_files_or_none() {
    // Every cluster of every file.
    for lcn in OWNED.into_iter().flatten() {
        let mut image = Image::new();
        image.mark(lcn, false);
        let (reason, _) = refused(&image);
        assert!(
            reason.contains("has free") || reason.contains("boot sector"),
            "{lcn}: {reason}"
        );
    }
    // A second owner of every cluster.
    for lcn in OWNED.into_iter().flatten().filter(|lcn| *lcn != 0) {
        let mut image = Image::new();
        let data = build::mapped(0x80, 0, "", 0, &[(lcn, 1)], [1, CLUSTER]);
        image.add(30, 0, &[data]);
        assert_refused(&image, "which is another file's");
    }
    let mut image = Image::new();
    let data = build::mapped(0x80, 0, "", 0, &[(LOST.start, 2)], [2, CLUSTER]);
    image.add(30, 0, &[data]);
    assert_read(&image);
    let at = usize_from(BITMAP * CLUSTER);
    put(&mut image.bytes, at, &[0; 32]);
    assert_refused(&image, "$Bitmap has the boot sector's cluster free");
}
