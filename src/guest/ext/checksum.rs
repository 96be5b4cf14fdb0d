//! Checksums of metadata: CRC-32C (`metadata_csum`), or CRC-16 of group descriptors alone
//! (`uninit_bg`), or none.
//!
//! Sources: e2fsprogs' `lib/ext2fs/csum.c`, the kernel's `fs/ext4/super.c` and `fs/ext4/bitmap.c`.

use crate::units::{low_u32, usize_from};

/// The byte of a group descriptor where its checksum starts; 2 bytes.
const DESCRIPTOR_CHECKSUM_AT: usize = 0x1e;

/// CRC-32C as Linux has it: of `seed` and `bytes`, not inverted at the end.
pub(super) fn crc32c(seed: u32, bytes: &[u8]) -> u32 {
    !crc32c::crc32c_append(!seed, bytes)
}

/// CRC-16 with the polynomial 0x8005, reflected (`lib/crc/crc16.c`).
fn crc16(seed: u16, bytes: &[u8]) -> u16 {
    bytes.iter().fold(seed, |crc, byte| {
        (0..8).fold(crc ^ u16::from(*byte), |crc, _| match crc & 1 {
            0 => crc >> 1,
            _ => crc >> 1 ^ 0xa001,
        })
    })
}

/// How a filesystem's metadata is checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Checksums {
    /// Not at all.
    None,
    /// Group descriptors: of the filesystem's UUID, the group's number and the descriptor.
    Crc16 { of_uuid: u16 },
    /// Everything, each beginning with this seed.
    Crc32c { seed: u32 },
}

impl Checksums {
    pub(super) fn crc16(uuid: &[u8; 16]) -> Self {
        Self::Crc16 {
            of_uuid: crc16(!0, uuid),
        }
    }

    /// Whether the descriptor of group `group` has the right checksum.
    pub(super) fn descriptor_is_right(self, group: u64, descriptor: &[u8]) -> bool {
        let (before, from) = descriptor.split_at(DESCRIPTOR_CHECKSUM_AT);
        let (found, behind) = from.split_at(2);
        let number = low_u32(group).to_le_bytes();
        let expected = match self {
            Self::None => return true,
            Self::Crc16 { of_uuid } => {
                let crc = crc16(crc16(of_uuid, &number), before);
                crc16(crc, behind).to_le_bytes()
            }
            Self::Crc32c { seed } => {
                let crc = crc32c(crc32c(seed, &number), before);
                let crc = crc32c(crc32c(crc, &[0; 2]), behind).to_le_bytes();
                [crc[0], crc[1]]
            }
        };
        found == expected
    }

    /// Whether `found` is the checksum of a structure, of which `wide` says whether it keeps all 32
    /// bits or only the lower 16.
    pub(super) fn is_right(self, bytes: &[u8], found: u32, wide: bool) -> bool {
        let Self::Crc32c { seed } = self else {
            return true;
        };
        let crc = crc32c(seed, bytes);
        found == if wide { crc } else { crc & 0xffff }
    }

    /// The checksums of what belongs to an inode.
    pub(super) fn of_inode(self, number: u32, generation: u32) -> Self {
        match self {
            Self::Crc32c { seed } => {
                let seed = crc32c(seed, &number.to_le_bytes());
                let seed = crc32c(seed, &generation.to_le_bytes());
                Self::Crc32c { seed }
            }
            other => other,
        }
    }

    /// Whether bitmaps may be left out of a group, to be made when they are first needed.
    pub(super) fn allow_uninitialised(self) -> bool {
        self != Self::None
    }
}

/// `bytes` with zeros in the `len` bytes at `at`.
pub(super) fn without(bytes: &[u8], at: u64, len: u64) -> Vec<u8> {
    let mut copy = bytes.to_vec();
    copy[usize_from(at)..usize_from(at + len)].fill(0);
    copy
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_values() {
        // CRC-16/MODBUS and CRC-32/ISCSI of the usual nine digits.
        assert_eq!(crc16(!0, b"123456789"), 0x4b37);
        assert_eq!(!crc32c(!0, b"123456789"), 0xe306_9283);
        assert_eq!(crc32c(crc32c(!0, b"1234"), b"56789"), !0xe306_9283);
    }
}
