//! VHD and VHDX files read, judged and built without the crate: a second reading of the formats, for
//! what no other tool at hand reads (children of VHDX files, sectors of 4096 bytes, logs).
//!
//! Nothing here uses the crate but for [`Storage`], the bytes of a file. [`read`] gives an [`Image`];
//! a [`Chain`] is a child with its parents. [`build`] makes files.

pub(crate) mod build;
pub(crate) mod bytes;
pub(crate) mod log;
pub(crate) mod metadata;
pub(crate) mod vhd;
mod vhd_check;
pub(crate) mod vhdx;
mod vhdx_check;
pub(crate) mod view;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use vhdfs::storage::Storage;

use self::bytes::{Guid, guid_text, parse_guid, require};
use super::{len, size};

/// How a child reads what it does not hold: fills the buffer from this disk offset on.
pub(crate) type Parent<'a> = Option<&'a dyn Fn(&mut [u8], u64)>;

/// What the block table says of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// Zeros, or what the parent has.
    NotPresent,
    /// Zeros here, though the format says undefined.
    Undefined,
    /// Zeros.
    Zero,
    /// Zeros here, though the old content would be legal.
    Unmapped,
    /// None of these: illegal.
    Reserved,
    /// In the file. Dynamic VHD: as far as its bitmap says, else zeros.
    Full,
    /// In the file as far as a bitmap says, else the parent's.
    Partial,
}

impl State {
    /// Whether the file holds the block.
    pub(crate) fn has_data(self) -> bool {
        matches!(self, Self::Full | Self::Partial)
    }
}

/// A block's entry of the block table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Block {
    /// How it is read.
    pub(crate) state: State,
    /// Its place in the file, 0 where it has none. Of a VHD: that of its bitmap.
    pub(crate) at: u64,
}

/// The metadata of a file as it was when read.
#[derive(Clone, Debug)]
pub(crate) enum Image {
    Vhd(vhd::Image),
    Vhdx(vhdx::Image),
}

/// Reads all metadata of `file`. What starts like a VHDX is one.
///
/// # Errors
/// What keeps another implementation from opening it.
pub(crate) fn read(file: &dyn Storage) -> Result<Image, String> {
    let mut start = [0; 8];
    let start_read = file.read_exact_at(&mut start, vhdfs::units::FileOffset::new(0));
    start_read.map_err(|error| error.to_string())?;
    if start == *b"vhdxfile" {
        vhdx::Image::read(file).map(Image::Vhdx)
    } else {
        vhd::Image::read(file).map(Image::Vhd)
    }
}

/// Reads the file and finds nothing wrong with it.
///
/// # Errors
/// What is wrong.
pub(crate) fn read_checked(file: &dyn Storage) -> Result<Image, String> {
    let image = read(file)?;
    image.check()?;
    Ok(image)
}

impl Image {
    /// The disk's size in bytes.
    pub(crate) fn disk_len(&self) -> u64 {
        match self {
            Self::Vhd(image) => image.footer.disk_len,
            Self::Vhdx(image) => image.metadata.disk_len,
        }
    }

    /// Bytes in a sector of the disk.
    pub(crate) fn sector_size(&self) -> u64 {
        match self {
            Self::Vhd(_) => vhd::SECTOR,
            Self::Vhdx(image) => image.metadata.logical_sector,
        }
    }

    /// Bytes of data in a block; of a fixed VHD, all of the disk.
    pub(crate) fn block_size(&self) -> u64 {
        match self {
            Self::Vhd(image) => image.block_size,
            Self::Vhdx(image) => image.metadata.block_size,
        }
    }

    /// The file's length.
    pub(crate) fn file_len(&self) -> u64 {
        match self {
            Self::Vhd(image) => image.file_len,
            Self::Vhdx(image) => image.file_len,
        }
    }

    /// Whether it has a parent.
    pub(crate) fn is_differencing(&self) -> bool {
        match self {
            Self::Vhd(image) => image.footer.disk_type == vhd::DIFFERENCING,
            Self::Vhdx(image) => image.metadata.has_parent,
        }
    }

    /// By what a child knows this file: a VHD's unique id, a VHDX's `DataWriteGuid`.
    pub(crate) fn identity(&self) -> Guid {
        match self {
            Self::Vhd(image) => image.footer.unique_id,
            Self::Vhdx(image) => image.header().data_write_guid,
        }
    }

    /// The identities of which the parent must have one.
    pub(crate) fn parent_identities(&self) -> Vec<Guid> {
        match self {
            Self::Vhd(image) => image.parent.iter().map(|parent| parent.id).collect(),
            Self::Vhdx(image) => {
                let keys = ["parent_linkage", "parent_linkage2"].into_iter();
                let texts = keys.filter_map(|key| image.metadata.locator(key));
                texts.filter_map(parse_guid).collect()
            }
        }
    }

    /// Keys and values of what leads to the parent: the entries of a VHDX's locator; a VHD's locators
    /// by their codes, and `name` of its header.
    pub(crate) fn locators(&self) -> Vec<(String, String)> {
        match self {
            Self::Vhd(image) => image.locator_texts(),
            Self::Vhdx(image) => image.metadata.locators.clone(),
        }
    }

    /// The blocks of which the block table says something.
    pub(crate) fn blocks(&self) -> BTreeMap<u64, Block> {
        match self {
            Self::Vhd(image) => image.blocks(),
            Self::Vhdx(image) => image.blocks(),
        }
    }

    /// Fills `buf` with what a guest reads at `offset`, whatever its alignment. What is not here comes
    /// from `parent`; without one it reads as zeros.
    ///
    /// # Panics
    /// The range is not on the disk, or the file does not hold what its metadata says.
    pub(crate) fn read_at(&self, file: &dyn Storage, parent: Parent, buf: &mut [u8], offset: u64) {
        let end = offset + len(buf);
        assert!(end <= self.disk_len(), "{offset:#x}..{end:#x} is no place");
        match self {
            Self::Vhd(image) => image.read_at(file, parent, buf, offset),
            Self::Vhdx(image) => image.read_at(file, parent, buf, offset),
        }
    }

    /// Checks all that must hold at any moment, a crash included.
    ///
    /// # Errors
    /// What does not.
    pub(crate) fn check(&self) -> Result<(), String> {
        match self {
            Self::Vhd(image) => image.check(),
            Self::Vhdx(image) => image.check(),
        }
    }

    /// Checks what must hold in a file that was closed: both footers, both headers, no log in use.
    ///
    /// # Errors
    /// What does not.
    pub(crate) fn check_closed(&self) -> Result<(), String> {
        match self {
            Self::Vhd(image) => image.check_closed(),
            Self::Vhdx(image) => image.check_closed(),
        }
    }

    /// Checks that a compaction could not make the file shorter.
    ///
    /// # Errors
    /// What it could do.
    pub(crate) fn check_compact(&self) -> Result<(), String> {
        match self {
            Self::Vhd(image) => image.check_compact(),
            Self::Vhdx(image) => image.check_compact(),
        }
    }

    /// The VHD that it is.
    pub(crate) fn vhd(&self) -> &vhd::Image {
        match self {
            Self::Vhd(image) => image,
            Self::Vhdx(_) => panic!("a VHDX"),
        }
    }

    /// The VHDX that it is.
    pub(crate) fn vhdx(&self) -> &vhdx::Image {
        match self {
            Self::Vhdx(image) => image,
            Self::Vhd(_) => panic!("a VHD"),
        }
    }
}

/// A disk: a file and the parents that it reads through.
#[derive(Clone, Debug)]
pub(crate) struct Chain(Vec<(Arc<dyn Storage>, Image)>);

impl Chain {
    /// Reads `files`, the child first, and checks that each is what the one before asks for.
    ///
    /// # Errors
    /// What another implementation would stumble over.
    pub(crate) fn open(files: impl IntoIterator<Item = Arc<dyn Storage>>) -> Result<Self, String> {
        let mut links = Vec::new();
        for file in files {
            let image = read(&*file)?;
            links.push((file, image));
        }
        let chain = Self(links);
        for pair in chain.0.windows(2) {
            check_link(&pair[0].1, &pair[1].1)?;
        }
        let last = chain.0.last().ok_or("an empty chain")?;
        require!(!last.1.is_differencing(), "the last file has a parent too");
        Ok(chain)
    }

    /// The files with their metadata, the child first.
    pub(crate) fn links(&self) -> &[(Arc<dyn Storage>, Image)] {
        &self.0
    }

    /// The child's metadata.
    pub(crate) fn child(&self) -> &Image {
        &self.0[0].1
    }

    /// The disk's size in bytes: the child's.
    pub(crate) fn disk_len(&self) -> u64 {
        self.child().disk_len()
    }

    /// Checks each file.
    ///
    /// # Errors
    /// What is wrong, and in which.
    pub(crate) fn check(&self) -> Result<(), String> {
        for (n, (_, image)) in self.0.iter().enumerate() {
            let result = image.check();
            result.map_err(|error| format!("file {n} of the chain: {error}"))?;
        }
        Ok(())
    }

    /// Fills `buf` with what a guest reads at `offset`.
    ///
    /// # Panics
    /// As [`Image::read_at`].
    pub(crate) fn read_at(&self, buf: &mut [u8], offset: u64) {
        assert!(offset + len(buf) <= self.disk_len());
        self.resolve(0, buf, offset);
    }

    /// What the disk holds, without its zeros: offset and bytes of each `piece` that is not all zero,
    /// of those that a file of the chain holds anything of.
    pub(crate) fn content(&self, piece: u64) -> Vec<(u64, Vec<u8>)> {
        let mut pieces = BTreeSet::new();
        for (_, image) in &self.0 {
            let block_size = image.block_size();
            let blocks: Vec<u64> = match image {
                Image::Vhd(image) if image.footer.disk_type == vhd::FIXED => vec![0],
                _ => image.blocks().into_keys().collect(),
            };
            for start in blocks.into_iter().map(|block| block * block_size) {
                pieces.extend(start / piece..(start + block_size).div_ceil(piece));
            }
        }
        let mut found = Vec::new();
        for at in pieces.into_iter().map(|number| number * piece) {
            if at < self.disk_len() {
                let mut bytes = vec![0; size(piece.min(self.disk_len() - at))];
                self.read_at(&mut bytes, at);
                if !bytes::is_zero(&bytes) {
                    found.push((at, bytes));
                }
            }
        }
        found
    }

    /// What the files from `level` on hold; zeros behind their end.
    fn resolve(&self, level: usize, buf: &mut [u8], offset: u64) {
        let Some((file, image)) = self.0.get(level) else {
            return buf.fill(0);
        };
        let there = image.disk_len().saturating_sub(offset).min(len(buf));
        let (buf, behind) = buf.split_at_mut(size(there));
        behind.fill(0);
        let parent = |buf: &mut [u8], offset: u64| self.resolve(level + 1, buf, offset);
        if !buf.is_empty() {
            image.read_at(&**file, Some(&parent), buf, offset);
        }
    }
}

/// Checks that `parent` is the one that `child` was made for.
fn check_link(child: &Image, parent: &Image) -> Result<(), String> {
    let same_format = matches!(
        (child, parent),
        (Image::Vhd(_), Image::Vhd(_)) | (Image::Vhdx(_), Image::Vhdx(_))
    );
    require!(same_format, "a parent of the other format");
    require!(
        child.sector_size() == parent.sector_size(),
        "a parent with sectors of another size"
    );
    let (wanted, found) = (child.parent_identities(), parent.identity());
    require!(
        wanted.contains(&found),
        "the parent is {}, not any of {:?}",
        guid_text(&found),
        wanted.iter().map(guid_text).collect::<Vec<_>>()
    );
    Ok(())
}
