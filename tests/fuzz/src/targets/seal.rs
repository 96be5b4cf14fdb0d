//! Right checksums for changed structures, so that a fuzzer gets behind them.

use vhdfs::units::usize_from;

use super::sparse::Sparse;

/// Where a VHD footer has its checksum.
pub(super) const FOOTER_FIELD: usize = 64;
/// Where a VHD's dynamic header has it.
pub(super) const HEADER_FIELD: usize = 36;

fn le32(bytes: &[u8], at: usize) -> u32 {
    let field = bytes
        .get(at..at + 4)
        .and_then(|field| field.try_into().ok());
    u32::from_le_bytes(field.unwrap_or_default())
}

fn put(bytes: &mut [u8], at: usize, sum: u32) {
    bytes[at..at + 4].copy_from_slice(&sum.to_le_bytes());
}

/// Seals a footer or header of a VHD, whose checksum is at `field`.
pub(super) fn vhd(bytes: &mut [u8], field: usize) {
    bytes[field..field + 4].fill(0);
    let sum: u32 = !bytes.iter().map(|byte| u32::from(*byte)).sum::<u32>();
    bytes[field..field + 4].copy_from_slice(&sum.to_be_bytes());
}

/// Seals a structure of a VHDX.
pub(super) fn vhdx(bytes: &mut [u8]) {
    bytes[4..8].fill(0);
    let sum = crc32c::crc32c(bytes);
    put(bytes, 4, sum);
}

/// Seals whatever looks like an entry in a VHDX's log.
pub(super) fn log_entries(log: &mut [u8]) {
    let whole = log.len() / 4096 * 4096;
    for at in (0..whole).step_by(4096) {
        if !log[at..].starts_with(b"loge") {
            continue;
        }
        let len = usize_from(u64::from(le32(log, at + 8))).clamp(4096, whole) / 4096 * 4096;
        log[at + 4..at + 8].fill(0);
        let first = len.min(whole - at);
        let sum = crc32c::crc32c(&log[at..at + first]);
        let sum = crc32c::crc32c_append(sum, &log[..len - first]);
        put(log, at + 4, sum);
    }
}

/// Seals what is known to have a sum on a guest's disk: a GPT, an LVM2 label and its metadata,
/// headers and nodes of XFS and btrfs, the boot region of exFAT; and second copies that have to be the
/// same.
pub(super) fn guest(disk: &mut Sparse) {
    gpt(disk);
    lvm(disk);
    xfs(disk);
    btrfs(disk);
    exfat(disk);
    fat(disk);
}

fn gpt(disk: &mut Sparse) {
    for sector in [1, disk.len() / 512 - disk.len().min(512) / 512] {
        let mut header = disk.bytes(sector * 512, 512);
        if !header.starts_with(b"EFI PART") {
            continue;
        }
        let entries = u64::from(le32(&header, 72)) * 512;
        let len = u64::from(le32(&header, 80)) * u64::from(le32(&header, 84));
        let sum = crc32fast::hash(&disk.bytes(entries, len.min(64 << 10)));
        put(&mut header, 88, sum);
        put(&mut header, 16, 0);
        let sum = crc32fast::hash(&header[..92]);
        put(&mut header, 16, sum);
        disk.write(&header, sector * 512);
    }
}

fn lvm(disk: &mut Sparse) {
    let mut label = disk.bytes(512, 512);
    if !label.starts_with(b"LABELONE") {
        return;
    }
    let sum = lvm_sum(&label[20..]);
    put(&mut label, 16, sum);
    disk.write(&label, 512);
    const AREA: u64 = 4096;
    let mut area = disk.bytes(AREA, 512);
    let (at, len) = (u64::from(le32(&area, 40)), u64::from(le32(&area, 48)));
    let text = disk.bytes(AREA.saturating_add(at), len.min(64 << 10));
    put(&mut area, 56, lvm_sum(&text));
    let sum = lvm_sum(&area[4..]);
    put(&mut area, 0, sum);
    disk.write(&area, AREA);
}

/// LVM2's sum: a CRC-32 that starts elsewhere and is not inverted.
fn lvm_sum(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0xf597_a6cf, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            crc >> 1 ^ if crc & 1 == 1 { 0xedb8_8320 } else { 0 }
        })
    })
}

fn xfs(disk: &mut Sparse) {
    /// Magic, where the sum is, and over how many bytes.
    const KNOWN: [(&[u8; 4], usize, u64); 9] = [
        (b"XFSB", 224, 512),
        (b"XAGF", 216, 512),
        (b"XAGI", 312, 512),
        (b"XAFL", 32, 512),
        (b"AB3B", 52, 4096),
        (b"AB3C", 52, 4096),
        (b"IAB3", 52, 4096),
        (b"FIB3", 52, 4096),
        (b"RMB3", 52, 4096),
    ];
    for sector in disk.sectors() {
        let start = disk.bytes(sector * 512, 4);
        let Some((_, field, len)) = KNOWN.iter().find(|(magic, ..)| start == **magic) else {
            continue;
        };
        let mut bytes = disk.bytes(sector * 512, *len);
        if bytes.len() > *field + 4 {
            put(&mut bytes, *field, 0);
            let sum = crc32c::crc32c(&bytes);
            put(&mut bytes, *field, sum);
            disk.write(&bytes[..512], sector * 512);
        }
    }
}

fn btrfs(disk: &mut Sparse) {
    const SUPERBLOCK: u64 = 64 << 10;
    let mut superblock = disk.bytes(SUPERBLOCK, 4096);
    if superblock.get(64..72) != Some(b"_BHRfS_M") {
        return;
    }
    let sum = crc32c::crc32c(&superblock[32..]);
    put(&mut superblock, 0, sum);
    disk.write(&superblock, SUPERBLOCK);
    // Its copy says where it lies itself.
    const MIRROR: u64 = 64 << 20;
    if disk.len() >= MIRROR + 4096 {
        superblock[48..56].copy_from_slice(&MIRROR.to_le_bytes());
        let sum = crc32c::crc32c(&superblock[32..]);
        put(&mut superblock, 0, sum);
        disk.write(&superblock, MIRROR);
    }
    // A node begins with its sum and the filesystem's identity.
    let node_size = u64::from(le32(&superblock, 148)).clamp(4096, 64 << 10);
    for sector in disk.sectors() {
        let at = sector * 512;
        if !at.is_multiple_of(4096) || at == SUPERBLOCK {
            continue;
        }
        if disk.bytes(at + 32, 16) == superblock[32..48] {
            let mut node = disk.bytes(at, node_size);
            let sum = crc32c::crc32c(&node[32..]);
            put(&mut node, 0, sum);
            disk.write(&node[..512], at);
        }
    }
}

fn exfat(disk: &mut Sparse) {
    if disk.bytes(3, 8) != b"EXFAT   " {
        return;
    }
    let region = disk.bytes(0, 11 * 512);
    let counted = (0..)
        .zip(&region)
        .filter(|(at, _)| ![106, 107, 112].contains(at));
    let sum = counted.fold(0_u32, |sum: u32, (_, byte)| {
        sum.rotate_right(1).wrapping_add(u32::from(*byte))
    });
    let sums = sum.to_le_bytes().repeat(128);
    disk.write(&sums, 11 * 512);
    let region = disk.bytes(0, 12 * 512);
    disk.write(&region, 12 * 512);
}

fn fat(disk: &mut Sparse) {
    let boot = disk.bytes(0, 512);
    if &boot[54..57] != b"FAT" && &boot[82..85] != b"FAT" {
        return;
    }
    let le16 = |at| u64::from(le32(&boot, at) & 0xffff);
    let start = le16(14) * le16(11);
    let sectors = if le16(22) == 0 {
        u64::from(le32(&boot, 36))
    } else {
        le16(22)
    };
    let len = sectors * le16(11);
    if boot[16] == 2 && (1..1 << 20).contains(&len) && start + 2 * len <= disk.len() {
        let table = disk.bytes(start, len);
        disk.write(&table, start + len);
    }
}
