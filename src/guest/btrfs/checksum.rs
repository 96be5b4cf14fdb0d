//! The four kinds of checksums.

use blake2::{Blake2b256, Digest};
use sha2::Sha256;
use twox_hash::XxHash64;

use crate::guest::Trouble;

/// Bytes that a checksum has room in, at the beginning of each node and superblock.
pub(super) const ROOM: usize = 32;

/// What checksums all metadata has. [btrfs_tree.h `enum btrfs_csum_type`]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Checksum {
    Crc32c,
    XxHash,
    Sha256,
    Blake2b,
}

impl Checksum {
    /// The one that the superblock calls `number`.
    ///
    /// # Errors
    /// [`Trouble::Skip`] where there is none.
    pub(super) fn new(number: u16) -> Result<Self, Trouble> {
        match number {
            0 => Ok(Self::Crc32c),
            1 => Ok(Self::XxHash),
            2 => Ok(Self::Sha256),
            3 => Ok(Self::Blake2b),
            _ => Err(Trouble::skip(format!(
                "has checksums that are not known here (type {number})"
            ))),
        }
    }

    /// Bytes of a checksum.
    pub(super) fn len(self) -> u64 {
        match self {
            Self::Crc32c => 4,
            Self::XxHash => 8,
            Self::Sha256 | Self::Blake2b => 32,
        }
    }

    /// The checksum of `bytes`.
    pub(super) fn of(self, bytes: &[u8]) -> Vec<u8> {
        match self {
            Self::Crc32c => crc32c::crc32c(bytes).to_le_bytes().to_vec(),
            Self::XxHash => XxHash64::oneshot(0, bytes).to_le_bytes().to_vec(),
            Self::Sha256 => Sha256::digest(bytes).to_vec(),
            Self::Blake2b => Blake2b256::digest(bytes).to_vec(),
        }
    }

    /// Whether `block` begins with the checksum of the rest of it. `false` where it is too short.
    pub(super) fn is_right(self, block: &[u8]) -> bool {
        block
            .get(ROOM..)
            .is_some_and(|rest| block.starts_with(&self.of(rest)))
    }
}
