//! The second reading of the formats.
#![allow(clippy::unwrap_used, reason = "a failure is what a test is for")]

mod support;

use support::samples::{samples, unpack};
use support::second;
use vhdfs::storage::sim::SimStorage;

#[test]
fn look() {
    let Some(samples) = samples() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    for name in [
        "d2v-zerofilled.vhd",
        "hyperv2012r2-dynamic.vhd",
        "virtualpc-dynamic.vhd",
        "ext2.vhd",
        "image.vhd",
        "image-differential.vhd",
        "xen-dyn.vhd",
        "xen-big.vhd",
        "xen-snap.vhd",
        "qemu10-forcesize-dyn.vhd",
        "qemu10-fixed-511footer.vhd",
        "iotest-dynamic-1G.vhdx",
        "iotest-dirtylog-10G-4M.vhdx",
        "test-disk2vhd.vhdx",
        "qemu10-dyn-1M.vhdx",
    ] {
        let path = unpack(&samples, folder.path(), name);
        let sim = SimStorage::from_file(&path).unwrap();
        match second::read(&sim) {
            Err(e) => println!("{name}: ERR {e}"),
            Ok(image) => {
                println!(
                    "{name}: {} blocks {} check {:?} closed {:?} compact {:?} loc {:?}",
                    image.disk_len(),
                    image.blocks().len(),
                    image.check(),
                    image.check_closed(),
                    image.check_compact(),
                    image.locators()
                );
                match &image {
                    second::Image::Vhd(v) => println!(
                        "  unnamed {:?} batmap {:x?}",
                        v.check_unnamed_sectors(&sim),
                        v.things()[3..].iter().take(6).collect::<Vec<_>>()
                    ),
                    second::Image::Vhdx(v) => println!(
                        "  log live {} needs {} entries {:?} regions {:x?} states {:?}",
                        v.log.is_live(),
                        v.log.needs_replay(),
                        v.log
                            .entries
                            .iter()
                            .map(|e| (
                                e.at,
                                e.len,
                                e.sequence,
                                e.tail,
                                e.flushed,
                                e.last,
                                e.writes.len()
                            ))
                            .collect::<Vec<_>>(),
                        v.regions(),
                        v.blocks().values().map(|b| format!("{:?}", b.state)).fold(
                            std::collections::BTreeMap::<String, u32>::new(),
                            |mut m, s| {
                                *m.entry(s).or_default() += 1;
                                m
                            }
                        )
                    ),
                }
            }
        }
    }
}
