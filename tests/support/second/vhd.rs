//! VHD files, read by another reading of the format.

use std::collections::BTreeMap;
use std::ops::Range;

use vhdfs::storage::Storage;

use super::bytes::{Guid, be32, be64, guid, is_zero, require, utf16le, vhd_checksum};
use super::view::{View, pieces, runs};
use super::{Block, Parent, State};
use crate::support::{len, size};

pub(crate) const SECTOR: u64 = 512;
pub(crate) const FIXED: u32 = 2;
pub(crate) const DYNAMIC: u32 = 3;
pub(crate) const DIFFERENCING: u32 = 4;
pub(super) const HEADER_LEN: u64 = 1024;
/// The entry of a block that is not there.
pub(super) const UNUSED: u32 = u32::MAX;
pub(super) const NOWHERE: u64 = u64::MAX;
pub(super) const VERSION: u32 = 0x0001_0000;
/// Where the header has the parent locators, and the length of each.
const LOCATORS: Range<usize> = 576..768;
const LOCATOR_LEN: usize = 24;
/// Blocks that the length of a Xen batmap is counted in.
const BATMAP_BLOCK: u64 = 2 << 20;

/// A valid footer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Footer {
    /// Where the dynamic header lies.
    pub(crate) header_at: u64,
    /// Seconds since 2000.
    pub(crate) timestamp: u32,
    /// Who made the file, and of which version.
    pub(crate) creator: ([u8; 4], u32),
    /// The disk's size in bytes.
    pub(crate) disk_len: u64,
    /// [`FIXED`], [`DYNAMIC`] or [`DIFFERENCING`].
    pub(crate) disk_type: u32,
    /// By what children know this file.
    pub(crate) unique_id: Guid,
    /// Whether a machine's memory goes with the disk.
    pub(crate) saved_state: bool,
    /// All of it.
    pub(super) bytes: Vec<u8>,
}

/// What the header says of the parent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ParentName {
    /// The parent's unique id.
    pub(crate) id: Guid,
    /// When the parent was last changed, 0 if nobody noted it.
    pub(crate) timestamp: u32,
    /// Its file's name.
    pub(crate) name: String,
}

/// A parent locator.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Locator {
    /// What its text is.
    pub(crate) code: [u8; 4],
    /// Bytes that it keeps.
    pub(crate) space: u64,
    /// Its file offset.
    pub(crate) at: u64,
    /// Its bytes.
    pub(crate) data: Vec<u8>,
}

/// Xen's map of the blocks that are there as a whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Batmap {
    pub(super) header_at: u64,
    /// Where the map lies.
    pub(super) at: u64,
    pub(super) map: Vec<u8>,
    pub(super) checksum: u32,
    /// How many bytes the checksum is of.
    pub(super) summed: u64,
}

/// A VHD file.
#[derive(Clone, Debug)]
pub(crate) struct Image {
    /// The file's length.
    pub(crate) file_len: u64,
    /// The footer at the end, where it is valid.
    pub(crate) trailing: Option<Footer>,
    /// Its copy at the start, where there is a valid one.
    pub(crate) leading: Option<Footer>,
    /// The one that counts.
    pub(crate) footer: Footer,
    /// Bytes of data in a block; of a fixed disk, all.
    pub(crate) block_size: u64,
    /// Where the block table lies.
    pub(crate) table_at: u64,
    /// The block table, without its padding.
    pub(crate) table: Vec<u32>,
    /// What is known of the parent.
    pub(crate) parent: Option<ParentName>,
    /// The parent locators.
    pub(crate) locators: Vec<Locator>,
    pub(super) batmap: Option<Batmap>,
}

impl Image {
    /// Reads the metadata of `file`.
    ///
    /// # Errors
    /// What keeps another implementation from opening it.
    pub(crate) fn read(file: &dyn Storage) -> Result<Self, String> {
        let file_len = file.len().map_err(|error| error.to_string())?;
        let view = View::bare(file, file_len);
        let trailing_len = trailing_len(file_len);
        require!(file_len >= trailing_len, "{file_len} bytes are no VHD");
        let mut bytes = view.bytes(file_len - trailing_len, trailing_len)?;
        bytes.resize(size(SECTOR), 0);
        let trailing = Footer::parse(bytes);
        let is_fixed = |footer: &Footer| footer.disk_type == FIXED;
        let leading = match &trailing {
            // The start of a fixed disk belongs to the guest.
            Ok(footer) if is_fixed(footer) => Err("not looked at".to_owned()),
            _ => Footer::parse(view.bytes(0, SECTOR.min(file_len))?),
        };
        let footer = match (&trailing, &leading) {
            (Ok(footer), _) | (Err(_), Ok(footer)) => footer.clone(),
            (Err(trailing), Err(leading)) => {
                return Err(format!("no footer: {trailing}; at the start {leading}"));
            }
        };
        let mut image = Self {
            file_len,
            trailing: trailing.ok(),
            leading: leading.ok(),
            block_size: footer.disk_len,
            footer,
            table_at: 0,
            table: Vec::new(),
            parent: None,
            locators: Vec::new(),
            batmap: None,
        };
        let kind = image.footer.disk_type;
        require!((FIXED..=DIFFERENCING).contains(&kind), "disk type {kind}");
        if kind == FIXED {
            let end = image.data_end();
            require!(image.footer.disk_len <= end, "the disk ends at {end:#x}");
        } else {
            image.read_header(&view)?;
        }
        Ok(image)
    }

    fn read_header(&mut self, view: &View) -> Result<(), String> {
        let header = view.bytes(self.footer.header_at, HEADER_LEN)?;
        require!(
            header.starts_with(b"cxsparse"),
            "the header has no signature"
        );
        let (noted, sum) = (be32(&header, 36), vhd_checksum(&header, 36));
        require!(noted == sum, "the header's checksum {noted:#x} is {sum:#x}");
        let version = be32(&header, 24);
        require!(version == VERSION, "header version {version:#x}");
        self.block_size = u64::from(be32(&header, 32));
        self.table_at = be64(&header, 16);
        let (block, disk) = (self.block_size, self.footer.disk_len);
        require!(
            block.is_power_of_two() && block >= SECTOR,
            "blocks of {block:#x} bytes"
        );
        let entries = u64::from(be32(&header, 28));
        require!(
            entries >= disk.div_ceil(block),
            "{entries} entries for {disk:#x} bytes"
        );
        let table = view.bytes(self.table_at, entries * 4)?;
        self.table = table.chunks(4).map(|entry| be32(entry, 0)).collect();
        if self.footer.disk_type == DIFFERENCING {
            self.parent = Some(ParentName {
                id: guid(&header, 40),
                timestamp: be32(&header, 56),
                name: name_of(&header[64..576])?,
            });
            for locator in header[LOCATORS].chunks(LOCATOR_LEN) {
                if !is_zero(&locator[..4]) {
                    self.locators.push(Locator::read(view, locator)?);
                }
            }
        }
        if &self.footer.creator.0 == b"tap\0" {
            self.batmap = Batmap::read(view, self.table_end(), self.footer.disk_len)?;
        }
        Ok(())
    }

    /// Where blocks must end: at the trailing footer.
    pub(super) fn data_end(&self) -> u64 {
        match self.trailing {
            Some(_) => self.file_len - trailing_len(self.file_len),
            None => self.file_len,
        }
    }

    /// Where the block table ends, with its padding.
    pub(super) fn table_end(&self) -> u64 {
        let entries = u64::try_from(self.table.len()).expect("at most 64 bits");
        self.table_at + (entries * 4).next_multiple_of(SECTOR)
    }

    /// Bytes of a block's bitmap.
    pub(crate) fn bitmap_len(&self) -> u64 {
        (self.block_size / SECTOR)
            .div_ceil(8)
            .next_multiple_of(SECTOR)
    }

    /// Bytes of a slot: bitmap and block.
    pub(crate) fn slot_len(&self) -> u64 {
        self.bitmap_len() + self.block_size
    }

    /// The blocks that are there. Spare entries of the table are among them, if used.
    pub(crate) fn blocks(&self) -> BTreeMap<u64, Block> {
        let state = match self.footer.disk_type {
            DIFFERENCING => State::Partial,
            _ => State::Full,
        };
        let used = (0..).zip(&self.table);
        let used = used.filter(|(_, entry)| **entry != UNUSED);
        let block = |entry: u32| Block {
            state,
            at: u64::from(entry) * SECTOR,
        };
        used.map(|(n, &entry)| (n, block(entry))).collect()
    }

    /// The name and the locators of the parent.
    pub(super) fn locator_texts(&self) -> Vec<(String, String)> {
        let name = self.parent.iter();
        let name = name.map(|parent| ("name".to_owned(), parent.name.clone()));
        let text = |locator: &Locator| {
            let code = String::from_utf8_lossy(&locator.code).into_owned();
            let text = match code.starts_with("W2") {
                true => utf16le(&locator.data).unwrap_or_else(|error| panic!("{error}")),
                false => String::from_utf8_lossy(&locator.data).into_owned(),
            };
            (code, text)
        };
        name.chain(self.locators.iter().map(text)).collect()
    }

    /// Which sectors of a block its bitmap says are there. The block is.
    pub(crate) fn sectors_of(&self, file: &dyn Storage, block: u64) -> Vec<bool> {
        let view = View::bare(file, self.file_len);
        let bitmap_at = u64::from(self.table[size(block)]) * SECTOR;
        let sectors = self.block_size / SECTOR;
        let bits = self.bits(&view, bitmap_at, 0, sectors);
        (0..sectors).map(|sector| bit(&bits, sector)).collect()
    }

    /// Fills `buf` with what a guest reads at `offset`. See [`super::Image::read_at`].
    pub(super) fn read_at(&self, file: &dyn Storage, parent: Parent, buf: &mut [u8], offset: u64) {
        let view = View::bare(file, self.file_len);
        let read = |buf: &mut [u8], at: u64| {
            let result = view.read(buf, at);
            result.unwrap_or_else(|error| panic!("{error}"));
        };
        // Of a dynamic disk nobody looks at a parent.
        let parent = parent.filter(|_| self.footer.disk_type == DIFFERENCING);
        let read_parent = |buf: &mut [u8], at: u64| match parent {
            Some(parent) => parent(buf, at),
            None => buf.fill(0),
        };
        if self.footer.disk_type == FIXED {
            return read(buf, offset);
        }
        for (block, within, part) in pieces(offset, len(buf), self.block_size) {
            let start = block * self.block_size;
            let buf = &mut buf[part];
            let entry = self.table[size(block)];
            if entry == UNUSED {
                read_parent(buf, start + within);
                continue;
            }
            let bitmap_at = u64::from(entry) * SECTOR;
            let data_at = bitmap_at + self.bitmap_len();
            let whole = self.batmap.as_ref().is_some_and(|map| map.has(block));
            let first = within / SECTOR / 8 * 8;
            let count = (within + len(buf)).div_ceil(SECTOR) - first;
            let bits = self.bits(&view, bitmap_at, first, count);
            let here = |sector| whole || bit(&bits, sector - first);
            for (here, from, part) in runs(within, len(buf), SECTOR, here) {
                let buf = &mut buf[part];
                match here {
                    true => read(buf, data_at + from),
                    false => read_parent(buf, start + from),
                }
            }
        }
    }

    /// The bytes that hold the bits of `count` sectors from `first`, a multiple of 8, on.
    fn bits(&self, view: &View, bitmap_at: u64, first: u64, count: u64) -> Vec<u8> {
        let bits = view.bytes(bitmap_at + first / 8, count.div_ceil(8));
        bits.unwrap_or_else(|error| panic!("{error}"))
    }
}

/// Bytes of the footer at the end: Virtual PC left the last one out before 2004.
fn trailing_len(file_len: u64) -> u64 {
    if file_len % SECTOR == 511 { 511 } else { 512 }
}

/// Most significant bit first.
pub(super) fn bit(bits: &[u8], index: u64) -> bool {
    bits.get(size(index / 8))
        .is_some_and(|byte| byte >> (7 - index % 8) & 1 == 1)
}

/// The big-endian UTF-16 in `field`, up to its first zero.
fn name_of(field: &[u8]) -> Result<String, String> {
    let units = field.chunks(2).map(|pair| [pair[1], pair[0]]);
    let text: Vec<u8> = units.take_while(|unit| *unit != [0; 2]).flatten().collect();
    utf16le(&text)
}

impl Footer {
    fn parse(bytes: Vec<u8>) -> Result<Self, String> {
        require!(len(&bytes) == SECTOR, "{} bytes", bytes.len());
        require!(bytes.starts_with(b"conectix"), "no cookie");
        let (noted, sum) = (be32(&bytes, 64), vhd_checksum(&bytes, 64));
        require!(noted == sum, "checksum {noted:#x} is {sum:#x}");
        let version = be32(&bytes, 12);
        require!(version == VERSION, "version {version:#x}");
        Ok(Self {
            header_at: be64(&bytes, 16),
            timestamp: be32(&bytes, 24),
            creator: (be32(&bytes, 28).to_be_bytes(), be32(&bytes, 32)),
            disk_len: be64(&bytes, 48),
            disk_type: be32(&bytes, 60),
            unique_id: guid(&bytes, 68),
            saved_state: bytes[84] == 1,
            bytes,
        })
    }
}

impl Locator {
    fn read(view: &View, entry: &[u8]) -> Result<Self, String> {
        let (space, count, at) = (be32(entry, 4), be32(entry, 8), be64(entry, 16));
        // By the specification sectors; Microsoft's own tools write bytes.
        let space = match u64::from(space) {
            sectors if sectors < SECTOR => sectors * SECTOR,
            bytes => bytes,
        };
        let code = be32(entry, 0).to_be_bytes();
        require!(
            space.is_multiple_of(SECTOR) && u64::from(count) <= space,
            "locator {code:x?}: {count} bytes in {space}"
        );
        let data = view.bytes(at, u64::from(count))?;
        Ok(Self {
            code,
            space,
            at,
            data,
        })
    }
}

impl Batmap {
    fn read(view: &View, header_at: u64, disk_len: u64) -> Result<Option<Self>, String> {
        let header = view.bytes(header_at, SECTOR)?;
        if !header.starts_with(b"tdbatmap") {
            return Ok(None);
        }
        let (at, sectors) = (be64(&header, 8), u64::from(be32(&header, 16)));
        Ok(Some(Self {
            header_at,
            at,
            map: view.bytes(at, sectors * SECTOR)?,
            checksum: be32(&header, 24),
            summed: (disk_len.div_ceil(BATMAP_BLOCK).div_ceil(8)).next_multiple_of(SECTOR),
        }))
    }

    pub(super) fn has(&self, block: u64) -> bool {
        bit(&self.map, block)
    }
}
