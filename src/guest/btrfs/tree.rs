//! A walk through any tree, which believes nothing.
//!
//! Every node is checked for itself (checksum, place, filesystem), against what leads to it (level,
//! owner, commit, first key), and all keys of the walk must ascend, so that no leaf can be met twice.
//! [disk-io.c `btrfs_validate_extent_buffer`, tree-checker.c]

use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use super::chunks::Chunks;
use super::damaged;
use super::superblock::Superblock;
use crate::guest::Trouble;
use crate::guest::raw::structure;
use crate::guest::view::View;
use crate::units::{u64_from, usize_from_u32};

/// Levels are below this. [btrfs_tree.h `BTRFS_MAX_LEVEL`]
pub(super) const MAX_LEVEL: u8 = 8;
const FLAG_WRITTEN: u64 = 1;

/// What every node begins with. [btrfs_tree.h `btrfs_header`]
#[derive(Clone, Copy, FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawHeader {
    /// 0: of all that follows.
    checksum: [u8; 32],
    /// 32: of the filesystem.
    fsid: [u8; 16],
    /// 48: its own logical address.
    place: U64,
    /// 56: bit 0 written; the high byte is the revision of back references.
    flags: U64,
    /// 64: of the chunk tree.
    chunk_tree_uuid: [u8; 16],
    /// 80: commit that wrote it.
    generation: U64,
    /// 88: tree that it was written for.
    owner: U64,
    /// 96: items or pointers.
    count: U32,
    /// 100: 0 for a leaf.
    level: u8,
}

/// [btrfs_tree.h `btrfs_disk_key`]
#[derive(Clone, Copy, FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct RawKey {
    object: U64,
    kind: u8,
    offset: U64,
}

/// What an inner node holds. [btrfs_tree.h `btrfs_key_ptr`]
#[derive(Clone, Copy, FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawPointer {
    key: RawKey,
    node: U64,
    generation: U64,
}

/// What a leaf lists in front; the data of each lie at its end, backwards. [btrfs_tree.h `btrfs_item`]
#[derive(Clone, Copy, FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawItem {
    key: RawKey,
    /// Where the data begin, behind the node's header.
    offset: U32,
    /// Their bytes.
    size: U32,
}

const HEADER_LEN: usize = size_of::<RawHeader>();
const POINTER_LEN: usize = size_of::<RawPointer>();
const ITEM_LEN: usize = size_of::<RawItem>();
const _: () = assert!(HEADER_LEN == 101 && POINTER_LEN == 33 && ITEM_LEN == 25);

/// What items are sorted by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Key {
    pub(super) object: u64,
    pub(super) kind: u8,
    pub(super) offset: u64,
}

impl From<RawKey> for Key {
    fn from(raw: RawKey) -> Self {
        Self {
            object: raw.object.get(),
            kind: raw.kind,
            offset: raw.offset.get(),
        }
    }
}

/// Where a tree begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Root {
    /// Its number.
    pub(super) tree: u64,
    /// Logical address of its root node.
    pub(super) node: u64,
    /// Below [`MAX_LEVEL`].
    pub(super) level: u8,
    /// Commit that wrote the root node.
    pub(super) generation: u64,
}

/// What does something with an item of a walk: its key and data.
pub(super) type Each<'e> = &'e mut dyn FnMut(Key, &[u8]) -> Result<(), Trouble>;

/// All trees, and what it takes to read them.
pub(super) struct Forest<'a, 'v> {
    pub(super) view: &'a View<'v>,
    pub(super) fs: &'a Superblock,
    pub(super) chunks: Chunks,
    /// Logical addresses of all nodes that were read.
    pub(super) nodes: Vec<u64>,
}

impl<'a, 'v> Forest<'a, 'v> {
    /// The trees whose nodes lie in `chunks`.
    pub(super) fn new(view: &'a View<'v>, fs: &'a Superblock, chunks: Chunks) -> Self {
        Self {
            view,
            fs,
            chunks,
            nodes: Vec::new(),
        }
    }

    /// Gives every item of a tree to `each`, in the order of their keys.
    ///
    /// # Errors
    /// [`Trouble::Skip`] where it is not a sound tree; what `each` says.
    pub(super) fn walk(&mut self, root: Root, each: Each<'_>) -> Result<(), Trouble> {
        let mut walk = Walk { last: None, each };
        self.visit(&mut walk, root, None)
    }

    /// Walks through a node and all below. `first` is what the node that leads to it says it begins
    /// with.
    fn visit(&mut self, walk: &mut Walk<'_>, at: Root, first: Option<Key>) -> Result<(), Trouble> {
        let (node, count) = self.read(at)?;
        let wrong = || damaged(format_args!("the node at {} of tree {}", at.node, at.tree));
        // Only the root may be empty, and then it is a leaf.
        let empty_root = first.is_none() && at.level == 0;
        let entry_len = if at.level > 0 { POINTER_LEN } else { ITEM_LEN };
        if (count == 0 && !empty_root) || count > (node.len() - HEADER_LEN) / entry_len {
            return Err(wrong());
        }
        let key_of = |index: usize| {
            let raw: RawKey = structure(&node, HEADER_LEN + index * entry_len)?;
            Ok::<_, Trouble>(Key::from(raw))
        };
        if let Some(first) = first
            && key_of(0)? != first
        {
            return Err(wrong());
        }
        if at.level == 0 {
            return walk.leaf(&node, count, &wrong);
        }
        for index in 0..count {
            let raw: RawPointer = structure(&node, HEADER_LEN + index * POINTER_LEN)?;
            let child = Root {
                node: raw.node.get(),
                level: at.level - 1,
                generation: raw.generation.get(),
                ..at
            };
            if child.generation > at.generation {
                return Err(wrong());
            }
            self.visit(walk, child, Some(key_of(index)?))?;
        }
        Ok(())
    }

    /// Reads a node, checked for itself, and how many entries it has.
    fn read(&mut self, at: Root) -> Result<(Vec<u8>, usize), Trouble> {
        let wrong = || damaged(format_args!("the node at {} of tree {}", at.node, at.tree));
        // More nodes than the device has room for would be trees with a loop in them.
        let most = self.fs.total_bytes / self.fs.node_size;
        if !at.node.is_multiple_of(self.fs.sector_size) || u64_from(self.nodes.len()) > most {
            return Err(wrong());
        }
        let end = at.node.checked_add(self.fs.node_size).ok_or_else(wrong)?;
        // Where there are several copies, the kernel begins with the first, too.
        let place = (self.chunks.places(&(at.node..end))?).next();
        let place = place.ok_or_else(wrong)?;
        self.nodes.push(at.node);
        let node = self.view.read(place.start, self.fs.node_size)?;
        let header: RawHeader = structure(&node, 0)?;
        let sound = self.fs.checksum.is_right(&node)
            && header.fsid == self.fs.metadata_uuid
            && header.place.get() == at.node
            && header.flags.get() & FLAG_WRITTEN != 0
            && header.generation.get() == at.generation
            && header.generation.get() <= self.fs.generation
            && header.owner.get() == at.tree
            && header.level == at.level;
        if !sound {
            return Err(wrong());
        }
        Ok((node, usize_from_u32(header.count.get())))
    }
}

/// A walk under way.
struct Walk<'e> {
    last: Option<Key>,
    each: Each<'e>,
}

impl Walk<'_> {
    /// Gives all items of a leaf. Their data must lie one behind the other, backwards from its end.
    fn leaf(
        &mut self,
        node: &[u8],
        count: usize,
        wrong: &dyn Fn() -> Trouble,
    ) -> Result<(), Trouble> {
        let mut end = node.len() - HEADER_LEN;
        for index in 0..count {
            let at = HEADER_LEN + index * ITEM_LEN;
            let raw: RawItem = structure(node, at)?;
            let key = Key::from(raw.key);
            let start = usize_from_u32(raw.offset.get());
            let size = usize_from_u32(raw.size.get());
            let placed = start.checked_add(size) == Some(end) && start >= count * ITEM_LEN;
            if !placed || self.last.is_some_and(|last| last >= key) {
                return Err(wrong());
            }
            self.last = Some(key);
            let data = &node[HEADER_LEN + start..HEADER_LEN + end];
            (self.each)(key, data)?;
            end = start;
        }
        Ok(())
    }
}
