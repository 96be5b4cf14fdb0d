//! Bytes that are not what they were, under checksums that are wrong or right.

use proptest::prelude::*;

use super::*;

#[test]
fn any_changed_byte_is_noticed() {
    for shape in [MODERN, OLD_STYLE] {
        let mut image = Image::new(shape);
        let nodes = image.nodes.clone();
        let places = nodes.iter().map(|logical| node(*logical));
        let places: Vec<_> = places.chain([SUPERBLOCK, COPY]).collect();
        for place in places {
            // A checksum has room for more than it takes.
            for at in (0..4).chain(32..4096).map(|at| place + at) {
                image.bytes[at] ^= 0x10;
                assert!(look(&image.bytes).is_err(), "byte {at}");
                image.bytes[at] ^= 0x10;
            }
        }
    }
}

#[test]
fn every_kind_of_checksum_counts() {
    for checksum in 0..4 {
        let mut image = Image::new(Shape { checksum, ..MODERN });
        for place in [SUPERBLOCK, COPY, node(ROOT_TREE), node(EXTENT_LEAF_2)] {
            for at in [place, place + 3, place + 4095] {
                image.bytes[at] ^= 1;
                assert!(look(&image.bytes).is_err(), "byte {at} of type {checksum}");
                image.bytes[at] ^= 1;
            }
        }
        look(&image.bytes).unwrap();
    }
    let unknown = skipped(MODERN, |image| image.bytes[SUPERBLOCK + 0xc4] = 4);
    assert!(unknown.contains("checksums that are not known here (type 4)"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// Damage under right checksums: no sum overflows, no loop is endless, the counts tell.
    #[test]
    fn damage_that_is_sealed(
        modern: bool,
        which in 0_usize..8,
        at in prop_oneof![0_usize..600, 0_usize..4088],
        value in prop::sample::select(vec![
            0, 1, 2, 4, 5, 169, 204, 4096, 8192, MIB, METADATA.0, DATA.0, TOTAL, 1 << 32, 1 << 63,
            u64::MAX - 4095, u64::MAX,
        ]),
        len in 1_usize..9,
    ) {
        let mut image = Image::new(if modern { MODERN } else { OLD_STYLE });
        let place = match image.nodes.get(which) {
            Some(logical) => node(*logical),
            None => SUPERBLOCK,
        };
        image.put(place + at, &value.to_le_bytes()[..len]);
        image.seal();
        same_or_skipped(&image);
    }

    /// The same of single bytes of what trees are made of.
    #[test]
    fn damage_to_items(which in 0_usize..8, at in 96_usize..1500, value: u8) {
        let mut image = Image::new(MODERN);
        let place = node(image.nodes[which % image.nodes.len()]);
        image.bytes[place + at] = value;
        image.seal();
        same_or_skipped(&image);
    }

    #[test]
    fn a_view_that_ends_early(len in 0..usize_from(TOTAL)) {
        let image = Image::new(MODERN);
        prop_assert!(look(&image.bytes[..len]).is_err());
    }
}
