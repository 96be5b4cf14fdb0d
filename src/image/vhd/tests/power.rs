//! Power cuts: in which order a VHD's changes may reach the host.

use super::*;

/// Seen as it is, before anybody has opened it and put it right.
#[test]
fn a_power_cut_while_the_file_grows_leaves_a_footer_at_its_end() {
    let start = empty();
    start.sync().unwrap();
    for changes in 0.. {
        let storage = Arc::new(start.fork());
        let image = open_shared(&storage);
        storage.cut_after(changes);
        let grown = image.reserve();
        for mut choice in storage.choices(10, 100, changes) {
            let left = storage.crash(&mut choice);
            let found = Footer::parse(&read_array(&left, at(left.len().unwrap() - 512)).unwrap());
            assert!(found.is_ok(), "{changes} changes, {choice:?}: {found:?}");
        }
        if grown.is_ok() {
            assert!(image.file_len() > start.len().unwrap() && changes > 1);
            return;
        }
    }
}

/// Of what is done while a sync runs it says nothing: the table that the host has may name the slot still.
#[test]
fn a_sync_does_not_cover_what_is_done_while_it_runs() {
    let storage = Arc::new(with_slots(&[FLOOR, FLOOR + SLOT]));
    let image: Arc<dyn Image> = Arc::from(open_shared(&storage));
    image.sync().unwrap();
    image.note_payload();
    let other = Arc::clone(&image);
    storage.on_op(move |_, op| {
        if op.kind == OpKind::Sync {
            let (block, reads) = (BlockIndex::new(0), Reads::Zeros);
            other.commit(&[MapEdit::Drop { block, reads }]).unwrap();
        }
    });
    image.sync().unwrap();
    storage.clear_hook();
    assert_eq!(image.reserve_at(at(FLOOR)), None);
    assert_ne!(storage.unsynced_len(), 0);
    image.sync().unwrap();
    assert_eq!(storage.unsynced_len(), 0);
    assert!(image.reserve_at(at(FLOOR)).is_some());
}

#[test]
fn a_new_disk_is_none_or_whole_after_a_power_cut() {
    for changes in 0.. {
        let sim = SimStorage::new();
        sim.cut_after(changes);
        let made = create(&sim, DiskType::Dynamic, 16 * BLOCK, 512 << 10);
        for mut choice in sim.choices(8, 30, changes) {
            if let Ok(image) = open(&sim.crash(&mut choice), READ_ONLY) {
                assert_eq!(image.map().present_count(), 0, "{changes}, {choice:?}");
            }
        }
        if made.is_ok() {
            return;
        }
    }
}

/// The old footer lies inside the first new slot where a gap is behind the last block.
#[test]
fn what_a_file_grows_by_is_zeros_after_a_power_cut() {
    for gap in [0, 512, 8192, SLOT - 512] {
        let sim = with_slots(&[FLOOR]);
        let (footer, end) = (footer_of(&sim), sim.len().unwrap() - 512);
        sim.write_all_at(&[0; 512], at(end)).unwrap();
        sim.write_all_at(&footer.to_bytes(), at(end + gap)).unwrap();
        let storage = Arc::new(sim);
        let slot = open_shared(&storage).reserve().unwrap();
        for mut choice in storage.choices(8, 50, gap) {
            let mut found = vec![1; usize_from(SLOT)];
            let left = storage.crash(&mut choice);
            left.read_exact_at(&mut found, slot).unwrap();
            assert!(found.iter().all(|byte| *byte == 0), "{gap}, {choice:?}");
        }
    }
}

/// Until the table that no longer names it is durable, a block at the end keeps its bytes.
#[test]
fn the_end_is_cut_once_no_table_names_it() {
    let start = with_slots(&[FLOOR, FLOOR + SLOT]);
    let mut data = vec![7; usize_from(SLOT)];
    data[..512].fill(0xff);
    start.write_all_at(&data, at(FLOOR + SLOT)).unwrap();
    start.sync().unwrap();
    let (block, reads) = (BlockIndex::new(1), Reads::Zeros);
    for changes in 0.. {
        let storage = Arc::new(start.fork());
        let image = open_shared(&storage);
        storage.cut_after(changes);
        let dropped = image.commit(&[MapEdit::Drop { block, reads }]);
        let cut = dropped.and_then(|()| image.cut(Cut::ALL));
        for mut choice in storage.choices(8, 50, changes) {
            let left = storage.crash(&mut choice);
            if let Some(slot) = open(&left, READ_ONLY).unwrap().map().get(block).slot() {
                let mut found = vec![0; data.len()];
                left.read_exact_at(&mut found, slot).unwrap();
                assert!(found == data, "{changes}, {choice:?}");
            }
        }
        if cut.is_ok() && !storage.is_cut() {
            assert!(storage.len().unwrap() < start.len().unwrap());
            return;
        }
    }
}

/// A block that is not in the table has no bit in the batmap, or the batmap does not fit its checksum: then
/// no reader believes it.
#[test]
fn a_block_leaves_the_table_behind_xens_batmap() {
    let storage = Arc::new(xen());
    storage.sync().unwrap();
    let image = open_shared(&storage);
    let (block, reads) = (BlockIndex::new(0), Reads::Zeros);
    image.commit(&[MapEdit::Drop { block, reads }]).unwrap();
    let choices = storage.choices(8, 50, 0);
    assert!(choices.len() > 1);
    for mut choice in choices {
        let left = storage.crash(&mut choice);
        let dynamic = Layout::read(&left).unwrap().dynamic.unwrap();
        let (batmap, fits) = dynamic.batmap.unwrap();
        let map: [u8; 512] = read_array(&left, batmap.map_range().start).unwrap();
        let is_there = dynamic.map.get(block).slot().is_some();
        assert!(is_there || !fits || map[0] & 0x80 == 0, "{choice:?}");
    }
}

/// Entries in two sectors of the table, which reach the host in any order.
#[test]
fn blocks_that_were_never_flushed_go_last_one_first() {
    const BLOCKS: u64 = 200;
    let start = SimStorage::new();
    create(&start, DiskType::Dynamic, BLOCKS * BLOCK, 512 << 10).unwrap();
    let end = start.len().unwrap() - 512;
    for (n, entry) in (0..).zip([7, 190, 3]) {
        set_entry(&start, entry, low_u32((end + n * SLOT) / 512));
    }
    start.sync().unwrap();
    for changes in 0.. {
        let sim = start.fork();
        sim.cut_after(changes);
        let repaired = verify::verify(&sim, crate::image::Repair::Safe);
        for mut choice in sim.choices(8, 50, changes) {
            let left = sim.crash(&mut choice);
            let report = verify::verify(&left, crate::image::Repair::Safe).unwrap();
            assert!(report.is_clean(), "{changes}, {choice:?}: {report:?}");
        }
        if repaired.is_ok() && !sim.is_cut() {
            return;
        }
    }
}
