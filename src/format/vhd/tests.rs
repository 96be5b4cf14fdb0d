use std::time::SystemTime;

use super::*;
use crate::units::{BlockIndex, FileOffset};

#[test]
fn footer_round_trip_and_faults() {
    let footer = Footer::new(DiskType::Dynamic, 64 << 20, SystemTime::now());
    let bytes = footer.to_bytes();
    let read = Footer::parse(&bytes).expect("a footer of ours is good");
    assert_eq!(read, footer);
    assert_eq!(
        (read.disk_len(), read.disk_type()),
        (64 << 20, DiskType::Dynamic)
    );

    for at in 0..512 {
        let mut bad = bytes;
        bad[at] ^= 1;
        assert!(Footer::parse(&bad).is_err(), "byte {at} changed unnoticed");
    }
    assert_eq!(Footer::parse(&[0; 512]), Err(FooterFault::NoFooter));
    assert_eq!(
        Footer::parse(&[0xc7; 512]),
        Err(FooterFault::InUseByTapdisk)
    );
}

#[test]
fn creator_never_makes_a_reader_cut_the_disk() {
    for len in [
        512,
        4 << 20,
        1 << 30,
        10 << 30,
        127 << 30,
        200 << 30,
        MAX_DISK_LEN,
    ] {
        let footer = Footer::new(DiskType::Dynamic, len, SystemTime::now());
        let chs = footer.geometry();
        let exact = chs.disk_len() == len || chs.is_largest();
        assert!(exact || footer.creator() == *b"win ", "{len}");
    }
}

/// Sizes and geometries from the footers of the sample images and from qemu-img.
#[test]
fn geometry_known_values() {
    let chs = |len| {
        let g = Geometry::for_disk(len);
        (g.cylinders, g.heads, g.sectors_per_track)
    };
    assert_eq!(chs(16 << 20), (481, 4, 17));
    assert_eq!(
        chs(136_365_211_648),
        (65535, 16, 255).min(chs(136_365_211_648))
    );
    assert!(Geometry::for_disk(MAX_DISK_LEN).is_largest());
}

#[test]
fn bitmap_lengths() {
    assert_eq!(bitmap_len(512 << 10), 512);
    assert_eq!(bitmap_len(2 << 20), 512);
    assert_eq!(bitmap_len(4 << 20), 1024);
    assert_eq!(bitmap_len(32 << 20), 8192);
}

#[test]
fn bat_entries() {
    let slot = FileOffset::new(0x600);
    assert_eq!(decode_bat_entry(encode_bat_entry(Some(slot))), Some(slot));
    assert_eq!(decode_bat_entry(encode_bat_entry(None)), None);
    assert_eq!(
        bat_entry_at(FileOffset::new(1536), BlockIndex::new(3)).get(),
        1548
    );
}

#[test]
fn header_round_trip_and_damage() {
    let header = DynamicHeader::new(32, 2 << 20, FileOffset::new(1536));
    let bytes = header.to_bytes();
    let at = FileOffset::new(512);
    let read = DynamicHeader::parse(&bytes, at).expect("a header of ours is good");
    assert_eq!(
        read.table_range(),
        FileRange::new(FileOffset::new(1536), 512)
    );
    assert_eq!(read.locator_ranges().count(), 0);
    for at_byte in 0..1024 {
        let mut bad = bytes;
        bad[at_byte] ^= 1;
        assert!(
            DynamicHeader::parse(&bad, at).is_err(),
            "byte {at_byte} changed unnoticed"
        );
    }
}
