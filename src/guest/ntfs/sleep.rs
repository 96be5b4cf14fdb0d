//! Whether Windows sleeps on this volume: what it has of the volume in memory is newer than the disk.

use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use super::mft::{Mft, number};
use super::record::{Reference, Slot, decode, kind, undo_fixups};
use super::stream::{PIECE, Stream};
use super::{Trouble, damaged};
use crate::units::{u64_from, usize_from, usize_from_u32};

/// The name of a folder's index, in UTF-16LE.
const INDEX_NAME: [u8; 8] = *b"$\0I\x003\x000\0";
const FILE: &[u8] = b"hiberfil.sys";
/// The longest root folder that is read.
const MAX_INDEX: u64 = 64 << 20;
/// The shortest image of a sleeping system. [ntfs-3g `volume.c`, `NTFS_HIBERFILE_HEADER_SIZE`]
const MIN_IMAGE: u64 = 4096;

/// Checks that no `hiberfil.sys` in the root folder holds a sleeping Windows.
pub(super) fn check(mft: &Mft<'_, '_>) -> Result<(), Trouble> {
    let mut found = Vec::new();
    let root = mft.need_index(kind::INDEX_ROOT)?;
    let root = root.ok_or_else(|| damaged("the root folder has no index"))?;
    let root = root.read_all(mft.view, mft.geometry.record_size)?;
    let head = RawIndexRoot::ref_from_prefix(&root);
    let (head, entries) = head.map_err(|_| damaged("the root folder makes no sense"))?;
    search(entries, &mut found)?;
    if let Some(nodes) = mft.need_index(kind::INDEX_ALLOCATION)? {
        search_nodes(
            mft,
            &nodes,
            usize_from_u32(head.index_block_size.get()),
            &mut found,
        )?;
    }
    found.iter().try_for_each(|file| check_file(mft, *file))
}

impl Mft<'_, '_> {
    fn need_index(&self, kind: u32) -> Result<Option<Stream>, Trouble> {
        self.stream(number::ROOT, kind, &INDEX_NAME)
    }
}

/// The head of a folder's root node. [ntfs-3g `layout.h`, `INDEX_ROOT`]
#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawIndexRoot {
    /// 0x00: of the attribute that is indexed.
    kind: U32,
    /// 0x04: how names compare.
    collation_rule: U32,
    /// 0x08: bytes in each other node.
    index_block_size: U32,
    /// 0x0c: the same in clusters.
    clusters_per_index_block: u8,
    /// 0x0d: 0.
    reserved: [u8; 3],
}

/// The head of another node. [ntfs-3g `layout.h`, `INDEX_BLOCK`]
const NODE_HEAD: usize = 0x18;

/// What the entries of a node begin with. [ntfs-3g `layout.h`, `INDEX_HEADER`]
#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawEntries {
    /// 0x00: where the first lies, from here.
    entries_offset: U32,
    /// 0x04: where they end, from here.
    index_length: U32,
    /// 0x08: where the node ends, from here.
    allocated_size: U32,
    /// 0x0c: bit 0: has nodes below.
    flags: U32,
}

/// The head of an entry. [ntfs-3g `layout.h`, `INDEX_ENTRY`]
#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawEntry {
    /// 0x00: the file.
    indexed_file: U64,
    /// 0x08: bytes of the entry.
    length: U16,
    /// 0x0a: bytes of the key behind this head: a FILE_NAME.
    key_length: U16,
    /// 0x0c: bit 1: the last, which has no key.
    flags: U16,
    /// 0x0e: 0.
    reserved: U16,
}

const LAST: u16 = 2;
/// Where a FILE_NAME has the UTF-16 units of its name; behind that and a byte, the name.
const NAME_LENGTH_AT: usize = 0x40;

/// Collects the files of that name among the entries of a node.
fn search(node: &[u8], found: &mut Vec<Reference>) -> Result<(), Trouble> {
    entries(node, found).ok_or_else(|| damaged("the root folder makes no sense"))
}

fn entries(node: &[u8], found: &mut Vec<Reference>) -> Option<()> {
    let (head, _) = RawEntries::ref_from_prefix(node).ok()?;
    let start = usize_from_u32(head.entries_offset.get());
    let mut rest = node.get(start..usize_from_u32(head.index_length.get()))?;
    loop {
        let (entry, body) = RawEntry::ref_from_prefix(rest).ok()?;
        if entry.flags.get() & LAST != 0 {
            return Some(());
        }
        let key = body.get(..usize::from(entry.key_length.get()))?;
        let units = usize::from(*key.get(NAME_LENGTH_AT)?);
        let name = key.get(NAME_LENGTH_AT + 2..)?.get(..2 * units)?;
        if is_sleep_file(name) {
            found.push(Reference::new(entry.indexed_file.get()));
        }
        let length = usize::from(entry.length.get());
        if length < size_of::<RawEntry>() {
            return None;
        }
        rest = rest.get(length..)?;
    }
}

/// Whether a name in UTF-16LE is the one that Windows sleeps in.
fn is_sleep_file(name: &[u8]) -> bool {
    let mut units = name.chunks_exact(2);
    name.len() == 2 * FILE.len()
        && FILE.iter().all(|letter| {
            (units.next())
                .is_some_and(|unit| unit[1] == 0 && unit[0].to_ascii_lowercase() == *letter)
        })
}

/// Collects the files of that name in all nodes but the root, used or not: a node that is no longer
/// used names files that are no longer there.
fn search_nodes(
    mft: &Mft<'_, '_>,
    nodes: &Stream,
    node_size: usize,
    found: &mut Vec<Reference>,
) -> Result<(), Trouble> {
    let whole = (512..=0x1_0000).contains(&node_size) && node_size.is_power_of_two();
    if !whole || nodes.size > MAX_INDEX {
        return Err(Trouble::skip(format!(
            "has a root folder of {} bytes, which is not read",
            nodes.size
        )));
    }
    let mut buffer = vec![0; PIECE.min(usize_from(nodes.size))];
    let mut at = 0;
    while at < nodes.initialized.min(nodes.size) {
        let len = u64_from(buffer.len()).min(nodes.size - at);
        let piece = &mut buffer[..usize_from(len)];
        nodes.read_at(mft.view, piece, at)?;
        at += len;
        for node in piece.chunks_exact_mut(node_size) {
            if !node.starts_with(b"INDX") {
                continue;
            }
            if !undo_fixups(node) {
                return Err(damaged("the root folder was written in part"));
            }
            search(&node[NODE_HEAD..], found)?;
        }
    }
    Ok(())
}

/// Checks that the file holds no sleeping Windows.
fn check_file(mft: &Mft<'_, '_>, file: Reference) -> Result<(), Trouble> {
    let number = file.record();
    let mut bytes = mft.record(number)?;
    match decode(&mut bytes, number)? {
        Slot::InUse(record) if record.reference == file => {}
        _ => return Ok(()),
    }
    let asleep = || {
        Trouble::hibernated(
            "is asleep (hiberfil.sys): let Windows start and shut down fully, without fast startup",
        )
    };
    let image = match mft.stream(number, kind::DATA, &[]) {
        Ok(Some(image)) if image.size >= MIN_IMAGE => image,
        Ok(_) | Err(Trouble::Skip { .. }) => return Err(asleep()),
        Err(error) => return Err(error),
    };
    let mut signature = [0; 4];
    image.read_at(mft.view, &mut signature, 0)?;
    // Anything but the two that a Windows leaves which has woken up.
    match signature.to_ascii_lowercase().as_slice() {
        b"wake" | b"\0\0\0\0" => Ok(()),
        _ => Err(asleep()),
    }
}
