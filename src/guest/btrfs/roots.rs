//! The root tree: where all other trees are.

use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use super::damaged;
use super::tree::{Forest, MAX_LEVEL, Root};
use crate::guest::Trouble;
use crate::guest::raw::structure;

const ROOT_ITEM: u8 = 132;
/// What does not last: a balance that goes on with the next mount.
const TEMPORARY_ITEM: u8 = 248;

const EXTENT_TREE: u64 = 2;
const DEVICE_TREE: u64 = 4;
const CHECKSUM_TREE: u64 = 7;
const FREE_SPACE_TREE: u64 = 10;
const BLOCK_GROUP_TREE: u64 = 11;
const WANTED: [u64; 5] = [
    EXTENT_TREE,
    DEVICE_TREE,
    CHECKSUM_TREE,
    FREE_SPACE_TREE,
    BLOCK_GROUP_TREE,
];

/// A tree's root, without what only newer kernels write. [btrfs_tree.h `btrfs_root_item`]
#[derive(Clone, Copy, FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawRoot {
    /// 0: an inode.
    inode: [u8; 160],
    /// 160: commit that wrote the root node.
    generation: U64,
    /// 168: its first directory.
    root_directory: U64,
    /// 176: logical address of the root node.
    node: U64,
    /// 184: limit, bytes used, last snapshot, flags.
    numbers: [U64; 4],
    /// 216: 0 for a subvolume that is being deleted.
    references: U32,
    /// 220: how far that is.
    progress: [u8; 18],
    /// 238: level of the root node.
    level: u8,
}

const _: () = assert!(size_of::<RawRoot>() == 239);

/// A tree that tells what the extent tree tells, or a part of that.
#[derive(Clone, Copy)]
pub(super) enum Second {
    FreeSpace(Root),
    Checksums(Root),
}

/// Where the trees are that tell what is free, and the roots of all.
pub(super) struct Roots {
    pub(super) extent: Root,
    pub(super) device: Root,
    /// What the extent tree is checked by: the free space tree if the superblock says that it may be
    /// believed, else the checksums of all data.
    pub(super) second: Second,
    /// Where block groups are: if they have no tree of their own, the extent tree.
    pub(super) block_group: Root,
    /// Root nodes of all trees, among them subvolumes and snapshots.
    pub(super) all: Vec<u64>,
}

impl Roots {
    /// Reads the root tree.
    ///
    /// # Errors
    /// [`Trouble::Skip`] where it is damaged, lacks a tree, or tells of a balance under way;
    /// [`Trouble::Io`].
    pub(super) fn read(forest: &mut Forest<'_, '_>) -> Result<Self, Trouble> {
        let fs = forest.fs;
        let mut found = Vec::new();
        let mut all = vec![fs.root.node, fs.chunk_root.node];
        forest.walk(fs.root, &mut |key, data| {
            if key.kind == TEMPORARY_ITEM {
                return Err(Trouble::skip(
                    "has a balance under way: let its own system end or cancel it",
                ));
            }
            if key.kind != ROOT_ITEM {
                return Ok(());
            }
            let raw: RawRoot = structure(data, 0)?;
            let root = Root {
                tree: key.object,
                node: raw.node.get(),
                level: raw.level,
                generation: raw.generation.get(),
            };
            if root.level >= MAX_LEVEL {
                return Err(damaged(format_args!("the root of tree {}", root.tree)));
            }
            all.push(root.node);
            if WANTED.contains(&root.tree) {
                found.push(root);
            }
            Ok(())
        })?;
        let only = |tree| {
            let mut of_tree = found.iter().filter(|root| root.tree == tree);
            match (of_tree.next(), of_tree.next()) {
                (Some(root), None) => Ok(*root),
                _ => Err(damaged(format_args!("the root of tree {tree}"))),
            }
        };
        let extent = only(EXTENT_TREE)?;
        Ok(Self {
            extent,
            device: only(DEVICE_TREE)?,
            second: match fs.free_space_tree {
                true => Second::FreeSpace(only(FREE_SPACE_TREE)?),
                false => Second::Checksums(only(CHECKSUM_TREE)?),
            },
            block_group: match fs.block_group_tree {
                true => only(BLOCK_GROUP_TREE)?,
                false => extent,
            },
            all,
        })
    }
}
