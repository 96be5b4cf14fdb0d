//! Multiple mount protection: a block that whoever has the filesystem mounted keeps writing to.
//!
//! Sources: the kernel's `fs/ext4/mmp.c`, e2fsprogs' `lib/ext2fs/mmp.c`.

use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::blocks::Blocks;
use super::superblock::Geometry;
use crate::guest::Trouble;

const MAGIC: u32 = 0x004d_4d50;
/// Nobody has it mounted. (`EXT4_MMP_SEQ_CLEAN`)
const SEQUENCE_CLEAN: u32 = 0xff4d_4d50;

/// `struct mmp_struct`, `fs/ext4/ext4.h`
#[derive(Clone, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawMmp {
    /// 0x00: `mmp_magic`.
    magic: U32,
    /// 0x04: `mmp_seq`.
    sequence: U32,
    /// 0x08: `mmp_time`.
    time: U64,
    /// 0x10: `mmp_nodename`: of the machine that has it mounted.
    node_name: [u8; 64],
    /// 0x50: `mmp_bdevname`.
    device_name: [u8; 32],
    /// 0x70: `mmp_check_interval`, in seconds.
    check_interval: U16,
    /// 0x72: `mmp_pad1`, `mmp_pad2`.
    padding: [u8; 906],
    /// 0x3fc: `mmp_checksum`: of all before it.
    checksum: U32,
}

const _: () = assert!(size_of::<RawMmp>() == 1024);

/// Whether nobody has the filesystem mounted, as the block `at` has it.
///
/// # Errors
/// [`Trouble::Skip`] where somebody has, or the block is damaged.
pub(super) fn check(blocks: &Blocks<'_>, geometry: &Geometry, at: u64) -> Result<(), Trouble> {
    let damaged = || Trouble::skip("has a damaged block of mount protection");
    if !geometry.has_blocks(&(at..at.saturating_add(1))) {
        return Err(damaged());
    }
    let block = blocks.read(at)?;
    let (raw, _) = RawMmp::read_from_prefix(&block).map_err(|_| damaged())?;
    let covered = &raw.as_bytes()[..size_of::<RawMmp>() - size_of::<U32>()];
    let right = geometry
        .checksums
        .is_right(covered, raw.checksum.get(), true);
    if raw.magic.get() != MAGIC || !right {
        return Err(damaged());
    }
    if raw.sequence.get() == SEQUENCE_CLEAN {
        return Ok(());
    }
    let end = raw.node_name.iter().position(|byte| *byte == 0);
    let name = &raw.node_name[..end.unwrap_or(raw.node_name.len())];
    let name = String::from_utf8_lossy(name);
    let name: String = name.chars().filter(char::is_ascii_graphic).collect();
    Err(Trouble::skip(format!(
        "is in use by the machine {name:?}, or was when that stopped, says its mount protection"
    )))
}
