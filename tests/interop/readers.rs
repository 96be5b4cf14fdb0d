//! libvhdi and 7-Zip read what we write. Both know children, which QEMU does not.

use crate::mirror::{Mirrored, create_child, same_bytes};
use crate::qemu::Maker;
use crate::support::tools::{Mounted, extracted, installed, tool};

const MIB: u64 = 1 << 20;

const VHD: Maker = Maker::ours("vhd", 2 * MIB, 20 * MIB + 1536);
// 7-Zip refuses a VHDX with an odd number of sectors.
const VHDX: Maker = Maker::ours("vhdx", MIB, 20 * MIB + 1024);

/// libvhdi knows the disk's type and reads from it what it must hold.
fn libvhdi_agrees(disk: &Mirrored, disk_type: &str) {
    if !installed(&["vhdiinfo"]) {
        return;
    }
    let info = tool("vhdiinfo", &[], &[&disk.path]);
    for known in [disk_type, &disk.disk_len.to_string()] {
        assert!(info.contains(known), "no {known} in {info}");
    }
    if let Some(mounted) = Mounted::new(&disk.path) {
        same_bytes(&mounted.disk(), &disk.raw);
    }
}

/// 7-Zip extracts from the disk what it must hold.
fn seven_zip_agrees(disk: &Mirrored) {
    if let Some(raw) = extracted(&disk.path) {
        same_bytes(&raw, &disk.raw);
    }
}

#[test]
fn dynamic_disks_are_read_by_others() {
    let larger = Maker::ours("vhdx", 2 * MIB, 30 * MIB + 1024);
    for maker in [VHD, VHDX, larger] {
        let folder = tempfile::tempdir().unwrap();
        let mut disk = maker.make(folder.path(), 8);
        for _ in 0..4 {
            disk.our_turn(5);
            libvhdi_agrees(&disk, "Dynamic");
            seven_zip_agrees(&disk);
        }
    }
}

/// A child, then a child of that: all of `readers` read what they must hold.
fn children(maker: Maker, zeroing_unit: Option<u64>, readers: &[fn(&Mirrored)]) {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).with_extension(maker.extension);
    let mut parent = maker.make(folder.path(), 9);
    parent.our_turn(12);
    let mut files = vec![parent.path.clone()];
    for name in ["child", "grandchild"] {
        let child = create_child(&parent.path, &path(name), 2 * MIB, 512);
        let mut child = parent.child(&child, 2 * MIB);
        child.zeroing_unit = zeroing_unit;
        files.insert(0, child.path.clone());
        for _ in 0..4 {
            child.our_turn(5);
            child.we_agree();
            child.second_agrees(&files);
            readers.iter().for_each(|agrees| agrees(&child));
        }
        parent = child;
    }
}

fn libvhdi(child: &Mirrored) {
    libvhdi_agrees(child, "Differential");
}

/// Of each byte of a bitmap libvhdi takes all bits behind the first set one for set. What we write
/// ends where bytes do, since some of the parent is copied around it; what we zero is made to.
#[test]
fn children_of_vhd_are_read_by_others() {
    children(VHD, Some(4096), &[libvhdi, seven_zip_agrees]);
    children(VHD, Some(1), &[seven_zip_agrees]);
}

/// libvhdi reads a block whose state is zero from the parent: for it nothing is zeroed.
#[test]
fn children_of_vhdx_are_read_by_others() {
    children(VHDX, None, &[libvhdi, seven_zip_agrees]);
    children(VHDX, Some(1), &[seven_zip_agrees]);
}
