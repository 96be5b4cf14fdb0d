//! Feature bits: which are known here, and which of them matter for free space.
//!
//! From the kernel's `fs/ext4/ext4.h` and e2fsprogs' `lib/ext2fs/ext2_fs.h`.

use crate::guest::Trouble;

pub(super) const COMPAT_HAS_JOURNAL: u32 = 0x4;
pub(super) const COMPAT_SPARSE_SUPER2: u32 = 0x200;
/// `DIR_PREALLOC`, `IMAGIC_INODES`, `HAS_JOURNAL`, `EXT_ATTR`, `RESIZE_INODE`, `DIR_INDEX`,
/// `SPARSE_SUPER2`, `FAST_COMMIT`, `STABLE_INODES`, `ORPHAN_FILE`. Not `LAZY_BG` and
/// `EXCLUDE_BITMAP`, which change what bitmaps say.
const COMPAT_KNOWN: u32 = 0x1e3f;

pub(super) const INCOMPAT_RECOVER: u32 = 0x4;
pub(super) const INCOMPAT_JOURNAL_DEV: u32 = 0x8;
pub(super) const INCOMPAT_META_BG: u32 = 0x10;
pub(super) const INCOMPAT_64BIT: u32 = 0x80;
pub(super) const INCOMPAT_MMP: u32 = 0x100;
pub(super) const INCOMPAT_FLEX_BG: u32 = 0x200;
pub(super) const INCOMPAT_CSUM_SEED: u32 = 0x2000;
/// `FILETYPE`, `RECOVER`, `META_BG`, `EXTENTS`, `64BIT`, `MMP`, `FLEX_BG`, `EA_INODE`, `DIRDATA`,
/// `CSUM_SEED`, `LARGEDIR`, `INLINE_DATA`, `ENCRYPT`, `CASEFOLD`.
const INCOMPAT_KNOWN: u32 = 0x3_f7d6;
/// What ext3 may have: `FILETYPE`, `RECOVER`, `JOURNAL_DEV`, `META_BG`.
const INCOMPAT_EXT3: u32 = 0x1e;

pub(super) const RO_COMPAT_SPARSE_SUPER: u32 = 0x1;
pub(super) const RO_COMPAT_GDT_CSUM: u32 = 0x10;
pub(super) const RO_COMPAT_BIGALLOC: u32 = 0x200;
pub(super) const RO_COMPAT_METADATA_CSUM: u32 = 0x400;
pub(super) const RO_COMPAT_ORPHAN_PRESENT: u32 = 0x1_0000;
/// `SPARSE_SUPER`, `LARGE_FILE`, `BTREE_DIR`, `HUGE_FILE`, `GDT_CSUM`, `DIR_NLINK`, `EXTRA_ISIZE`,
/// `QUOTA`, `BIGALLOC`, `METADATA_CSUM`, `READONLY`, `PROJECT`, `VERITY`, `ORPHAN_PRESENT`. Not
/// `HAS_SNAPSHOT`, `REPLICA` and `SHARED_BLOCKS`.
const RO_COMPAT_KNOWN: u32 = 0x1_b77f;
/// What ext3 may have: `SPARSE_SUPER`, `LARGE_FILE`, `BTREE_DIR`.
const RO_COMPAT_EXT3: u32 = 0x7;

/// The features of a filesystem.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Features {
    pub(super) compat: u32,
    pub(super) incompat: u32,
    pub(super) ro_compat: u32,
}

impl Features {
    pub(super) fn has_journal(self) -> bool {
        self.compat & COMPAT_HAS_JOURNAL != 0
    }

    /// Whether its journal has to be replayed before it is what it should be: it is mounted, or was
    /// when its machine stopped.
    pub(super) fn needs_recovery(self) -> bool {
        self.incompat & INCOMPAT_RECOVER != 0
    }

    /// What people call a filesystem with these features, by the rules of `blkid`.
    pub(super) fn name(self) -> &'static str {
        let newer = self.incompat & !INCOMPAT_EXT3 != 0 || self.ro_compat & !RO_COMPAT_EXT3 != 0;
        if self.incompat & INCOMPAT_JOURNAL_DEV != 0 {
            return "ext4 journal";
        }
        match (newer, self.has_journal()) {
            (true, _) => "ext4",
            (false, true) => "ext3",
            (false, false) => "ext2",
        }
    }

    /// Whether all are known here.
    ///
    /// # Errors
    /// [`Trouble::Skip`] where they are not. Of features that a program need not know (compatible
    /// ones), too: `e2fsck` refuses those as well.
    pub(super) fn check(self) -> Result<(), Trouble> {
        if self.incompat & INCOMPAT_JOURNAL_DEV != 0 {
            return Err(Trouble::skip("belongs to a filesystem on another device"));
        }
        let unknown = [
            ("incompatible", self.incompat & !INCOMPAT_KNOWN),
            ("read-only compatible", self.ro_compat & !RO_COMPAT_KNOWN),
            ("compatible", self.compat & !COMPAT_KNOWN),
        ];
        match unknown.iter().find(|(_, bits)| *bits != 0) {
            None => Ok(()),
            Some((kind, bits)) => Err(Trouble::skip(format!(
                "has features that are not known here ({kind}: {bits:#x})"
            ))),
        }
    }
}
