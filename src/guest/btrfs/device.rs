//! The device tree: which parts of the device belong to chunks.

use std::ops::Range;

use zerocopy::byteorder::little_endian::U64;
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use super::damaged;
use super::roots::Roots;
use super::tree::Forest;
use crate::guest::Trouble;
use crate::guest::raw::structure;

const DEVICE_EXTENT: u8 = 204;
const REPLACE: u8 = 250;
/// Statistics of errors.
const PERSISTENT_ITEM: u8 = 249;

/// A part of the device that a chunk has. [btrfs_tree.h `btrfs_dev_extent`]
#[derive(Clone, Copy, FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawExtent {
    /// 0: 3.
    chunk_tree: U64,
    /// 8: 256.
    chunk_object: U64,
    /// 16: logical address of the chunk.
    chunk_offset: U64,
    /// 24: bytes.
    len: U64,
    /// 32: of the chunk tree.
    chunk_tree_uuid: [u8; 16],
}

/// A replacement of one device with another. [btrfs_tree.h `btrfs_dev_replace_item`]
#[derive(Clone, Copy, FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawReplace {
    /// 0: device, how far it is, how it reads.
    fields: [U64; 4],
    /// 32: 0 never started, 1 under way, 2 done, 3 cancelled, 4 suspended.
    state: U64,
}

const _: () = assert!(size_of::<RawExtent>() == 48 && size_of::<RawReplace>() == 40);

/// A part of the device: where, and which chunk has it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Extent {
    start: u64,
    len: u64,
    chunk: u64,
}

/// The parts of the device that no chunk has. The device tree and the chunk tree must say the same.
///
/// # Errors
/// [`Trouble::Skip`] where they do not, or a device is being replaced; [`Trouble::Io`].
pub(super) fn holes(
    forest: &mut Forest<'_, '_>,
    roots: &Roots,
) -> Result<Vec<Range<u64>>, Trouble> {
    let fs = forest.fs;
    let mut extents = Vec::new();
    forest.walk(roots.device, &mut |key, data| match key.kind {
        DEVICE_EXTENT if key.object == fs.device.id.get() => {
            let raw: RawExtent = structure(data, 0)?;
            extents.push(Extent {
                start: key.offset,
                len: raw.len.get(),
                chunk: raw.chunk_offset.get(),
            });
            Ok(())
        }
        REPLACE => {
            let raw: RawReplace = structure(data, 0)?;
            match raw.state.get() {
                0 | 2 | 3 => Ok(()),
                _ => Err(Trouble::skip("is replacing a device")),
            }
        }
        PERSISTENT_ITEM => Ok(()),
        _ => Err(damaged(format_args!("the device tree, with {key:?}"))),
    })?;
    let of_chunks = forest.chunks.iter().flat_map(|chunk| {
        let copies = chunk.copies.iter();
        copies.map(|copy| Extent {
            start: *copy,
            len: chunk.len,
            chunk: chunk.start,
        })
    });
    let mut of_chunks: Vec<_> = of_chunks.collect();
    of_chunks.sort();
    if of_chunks != extents {
        return Err(damaged("a device tree that disagrees with the chunk tree"));
    }
    let mut holes = Vec::new();
    let (mut at, mut used) = (0, 0);
    // Each ends on the device, as the places of chunks do.
    for extent in extents {
        if extent.start < at {
            return Err(damaged(format_args!(
                "two chunks at {} of the device",
                extent.start
            )));
        }
        if extent.start > at {
            holes.push(at..extent.start);
        }
        at = extent.start + extent.len;
        used += extent.len;
    }
    if at < fs.total_bytes {
        holes.push(at..fs.total_bytes);
    }
    if used != fs.device.bytes_used.get() {
        return Err(damaged("the count of bytes that chunks have"));
    }
    Ok(holes)
}
