//! How a differencing image names its parent.

use std::fmt;
use std::time::SystemTime;

use uuid::Uuid;

/// What tells one disk, or one state of its content, from others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Identity {
    /// A VHD's `UniqueID`: the same for as long as the file lives.
    Vhd([u8; 16]),
    /// A VHDX's `DataWriteGuid`: a new one whenever somebody opens the file and changes what a
    /// guest reads.
    Vhdx(Uuid),
}

impl Identity {
    /// Whether it tells the disk from no other: nothing but zeros, which some programs write.
    pub fn is_nil(&self) -> bool {
        match self {
            Self::Vhd(id) => *id == [0; 16],
            Self::Vhdx(id) => id.is_nil(),
        }
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Vhd(id) => write!(f, "{}", Uuid::from_bytes(*id)),
            Self::Vhdx(id) => id.fmt(f),
        }
    }
}

/// How a path to the parent is meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PathKind {
    /// From the child's directory: `W2ru`, `relative_path`.
    Relative,
    /// From a root: `W2ku`, `absolute_win32_path`, a file URL.
    Absolute,
    /// From a volume that has no name but a GUID: `volume_path`.
    Volume,
}

/// One place where the parent may be.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ParentPath {
    /// How it is meant.
    pub kind: PathKind,
    /// As it stands in the image, decoded: usually with backslashes.
    pub text: String,
}

/// What a differencing image says of its parent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParentLink {
    /// The parent has one of these. More than one only while a merge changes a VHDX parent.
    pub identities: Vec<Identity>,
    /// Where to look, in this order.
    pub paths: Vec<ParentPath>,
}

impl ParentLink {
    /// The identities of which the parent must have one, for people.
    pub fn expected(&self) -> String {
        let identities: Vec<String> = self.identities.iter().map(Identity::to_string).collect();
        identities.join(" or ")
    }
}

/// The parent that a differencing disk is to have, or has where it is now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewParent {
    /// Which disk it is.
    pub identity: Identity,
    /// Its disk's size in bytes.
    pub disk_len: u64,
    /// Bytes in a sector of its disk.
    pub sector_size: u64,
    /// When its file was last changed.
    pub mtime: SystemTime,
    /// The way to it from the child's directory, as Windows writes it: `.\dir\base.vhdx`; empty for
    /// none.
    pub relative: String,
    /// The way to it from a root; empty for none.
    pub absolute: String,
}
