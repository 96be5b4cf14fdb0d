//! VHDX files, read by another reading of the format.

use std::collections::BTreeMap;

use vhdfs::storage::Storage;

use super::bytes::{Guid, guid, is_zero, le16, le32, le64, require, vhdx_checksum};
use super::log::{Log, Write};
use super::metadata::Metadata;
use super::view::{View, pieces, runs};
use super::{Block, Parent, State};
use crate::support::{len, size};

pub(super) const KIB: u64 = 1 << 10;
pub(super) const MIB: u64 = 1 << 20;
/// Where the two headers lie.
pub(super) const HEADERS_AT: [u64; 2] = [64 * KIB, 128 * KIB];
pub(super) const HEADER_LEN: u64 = 4 * KIB;
/// Where the two region tables lie.
pub(super) const TABLES_AT: [u64; 2] = [192 * KIB, 256 * KIB];
pub(super) const TABLE_LEN: u64 = 64 * KIB;
/// Entries of a region or metadata table.
const MAX_ENTRIES: usize = 2047;
/// Sectors that a sector bitmap block covers.
pub(super) const CHUNK_SECTORS: u64 = 1 << 23;

/// The region of the block table: 2DC27766-F623-4200-9D64-115E9BFD4A08.
pub(super) const BAT_REGION: Guid = [
    0x66, 0x77, 0xc2, 0x2d, 0x23, 0xf6, 0x00, 0x42, 0x9d, 0x64, 0x11, 0x5e, 0x9b, 0xfd, 0x4a, 0x08,
];
/// The region of the metadata: 8B7CA206-4790-4B9A-B8FE-575F050F886E.
pub(super) const METADATA_REGION: Guid = [
    0x06, 0xa2, 0x7c, 0x8b, 0x90, 0x47, 0x9a, 0x4b, 0xb8, 0xfe, 0x57, 0x5f, 0x05, 0x0f, 0x88, 0x6e,
];

/// A valid header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    /// Its number; the header with the larger one counts.
    pub(crate) sequence: u64,
    /// Changes each time the file is opened for writing.
    pub(crate) file_write_guid: Guid,
    /// Changes when what a guest may read does. Children name it.
    pub(crate) data_write_guid: Guid,
    /// Zeros where the log holds nothing.
    pub(crate) log_guid: Guid,
    /// All of it.
    pub(super) bytes: Vec<u8>,
}

/// A region of a region table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Region {
    /// What it is.
    pub(crate) guid: Guid,
    /// Where it lies in the file.
    pub(crate) at: u64,
    /// Its length.
    pub(crate) len: u64,
    /// Whether nobody may open the file who does not know it.
    pub(crate) required: bool,
}

/// A VHDX file.
#[derive(Clone, Debug)]
pub(crate) struct Image {
    /// The file's length.
    pub(crate) file_len: u64,
    /// The two headers, where they are valid.
    pub(crate) headers: [Option<Header>; 2],
    /// Which of them counts.
    pub(crate) current: usize,
    /// The log, and what it would change. All below is as if it had.
    pub(crate) log: Log,
    /// The two region tables, or what is wrong with them.
    pub(crate) tables: [Result<Vec<Region>, String>; 2],
    /// The metadata items.
    pub(crate) metadata: Metadata,
    /// The entries of the block table that the disk needs, those of bitmaps among them.
    pub(crate) table: Vec<u64>,
    /// What the log writes.
    writes: Vec<Write>,
}

impl Image {
    /// Reads the metadata of `file`.
    ///
    /// # Errors
    /// What keeps another implementation from opening it.
    pub(crate) fn read(file: &dyn Storage) -> Result<Self, String> {
        let file_len = file.len().map_err(|error| error.to_string())?;
        let bare = View::bare(file, file_len);
        require!(
            bare.bytes(0, 8)? == b"vhdxfile",
            "the file identifier is missing"
        );
        let (headers, current) = read_headers(&bare)?;
        let header = headers[current].as_ref().expect("the current one is valid");
        let log = read_log(&bare, header, file_len)?;
        let writes = log.writes();
        let view = View::through(file, file_len, log.grown(file_len), &writes);
        let mut tables = [Ok(Vec::new()), Ok(Vec::new())];
        for (table, at) in tables.iter_mut().zip(TABLES_AT) {
            *table = parse_regions(&view.bytes(at, TABLE_LEN)?);
        }
        let regions = match &tables {
            [Ok(regions), _] | [Err(_), Ok(regions)] => regions,
            [Err(first), Err(second)] => return Err(format!("region tables: {first}; {second}")),
        };
        for region in regions {
            let known = [BAT_REGION, METADATA_REGION].contains(&region.guid);
            require!(known || !region.required, "unknown region {region:x?}");
        }
        let region = |guid: Guid, name: &str| {
            let found = regions.iter().find(|region| region.guid == guid);
            found.ok_or(format!("no {name} region"))
        };
        let metadata = Metadata::read(&view, region(METADATA_REGION, "metadata")?)?;
        let bat = region(BAT_REGION, "BAT")?;
        let bytes = metadata.table_entries() * 8;
        require!(bytes <= bat.len, "the BAT region is too short: {bat:x?}");
        let table = view.bytes(bat.at, bytes)?;
        Ok(Self {
            file_len,
            current,
            table: table.chunks(8).map(|entry| le64(entry, 0)).collect(),
            metadata,
            tables,
            writes,
            log,
            headers,
        })
    }

    /// The header that counts.
    pub(crate) fn header(&self) -> &Header {
        let header = self.headers[self.current].as_ref();
        header.expect("the current one is valid")
    }

    /// The regions.
    pub(crate) fn regions(&self) -> &[Region] {
        match &self.tables {
            [Ok(regions), _] | [Err(_), Ok(regions)] => regions,
            [Err(_), Err(_)] => unreachable!("refused when read"),
        }
    }

    /// The region of the block table.
    pub(crate) fn bat(&self) -> &Region {
        let found = self
            .regions()
            .iter()
            .find(|region| region.guid == BAT_REGION);
        found.expect("there when read")
    }

    /// The file's length once the log is replayed.
    pub(crate) fn grown_len(&self) -> u64 {
        self.log.grown(self.file_len)
    }

    /// The index in the table of a payload block's entry.
    pub(crate) fn block_entry(&self, block: u64) -> u64 {
        block + block / self.metadata.chunk_ratio()
    }

    /// The index in the table of the entry of a chunk's bitmap.
    pub(crate) fn bitmap_entry(&self, chunk: u64) -> u64 {
        let ratio = self.metadata.chunk_ratio();
        chunk * (ratio + 1) + ratio
    }

    /// The entries of all payload blocks.
    pub(crate) fn block_entries(&self) -> impl Iterator<Item = (u64, u64)> {
        let entry = |block: u64| self.table[size(self.block_entry(block))];
        (0..self.metadata.block_count()).map(move |block| (block, entry(block)))
    }

    /// The entries of the bitmaps of all chunks that have one.
    pub(crate) fn bitmap_entries(&self) -> impl Iterator<Item = (u64, u64)> {
        let chunks = (0..).map(|chunk| (chunk, self.bitmap_entry(chunk)));
        let entry = |(chunk, index): (u64, u64)| Some((chunk, *self.table.get(size(index))?));
        chunks.map_while(entry)
    }

    /// The blocks whose entry is not zero.
    pub(crate) fn blocks(&self) -> BTreeMap<u64, Block> {
        let used = self.block_entries().filter(|(_, entry)| *entry != 0);
        used.map(|(block, entry)| (block, decode(entry))).collect()
    }

    /// The sector bitmaps that are there: chunk and file offset.
    pub(crate) fn bitmaps(&self) -> BTreeMap<u64, u64> {
        let present = self.bitmap_entries().filter(|(_, entry)| entry & 7 == 6);
        present
            .map(|(chunk, entry)| (chunk, decode(entry).at))
            .collect()
    }

    /// Which sectors of a block are set in its chunk's bitmap.
    ///
    /// # Panics
    /// The chunk has no bitmap.
    pub(crate) fn sectors_of(&self, file: &dyn Storage, block: u64) -> Vec<bool> {
        let sectors = self.metadata.block_size / self.metadata.logical_sector;
        let bits = self.bits(&self.view(file), block, 0, sectors);
        (0..sectors).map(|sector| bit(&bits, sector)).collect()
    }

    /// Fills `buf` with what a guest reads at `offset`. See [`super::Image::read_at`].
    pub(super) fn read_at(&self, file: &dyn Storage, parent: Parent, buf: &mut [u8], offset: u64) {
        let view = self.view(file);
        let block_size = self.metadata.block_size;
        for (block, within, part) in pieces(offset, len(buf), block_size) {
            let at = block * block_size + within;
            let buf = &mut buf[part];
            let entry = self.table[size(self.block_entry(block))];
            let Block { state, at: data } = decode(entry);
            match state {
                State::Full => read(&view, buf, data + within),
                State::Partial => {
                    let sector = self.metadata.logical_sector;
                    // Of the bytes that hold the bits: only those that are needed.
                    let first = within / sector / 8 * 8;
                    let count = (within + len(buf)).div_ceil(sector) - first;
                    let bits = self.bits(&view, block, first, count);
                    let here = |sector| bit(&bits, sector - first);
                    for (here, from, part) in runs(within, len(buf), sector, here) {
                        let buf = &mut buf[part];
                        match here {
                            true => read(&view, buf, data + from),
                            false => read_parent(parent, buf, block * block_size + from),
                        }
                    }
                }
                State::NotPresent if self.metadata.has_parent => read_parent(parent, buf, at),
                State::NotPresent | State::Undefined | State::Zero | State::Unmapped => buf.fill(0),
                State::Reserved => panic!("block {block} has the entry {entry:#x}"),
            }
        }
    }

    fn view<'a>(&'a self, file: &'a dyn Storage) -> View<'a> {
        View::through(file, self.file_len, self.grown_len(), &self.writes)
    }

    /// The bytes that hold the bits of `count` sectors of `block` from `first`, a multiple of 8, on.
    fn bits(&self, view: &View, block: u64, first: u64, count: u64) -> Vec<u8> {
        let ratio = self.metadata.chunk_ratio();
        let entry = self.table[size(self.bitmap_entry(block / ratio))];
        assert!(entry & 7 == 6, "block {block} has no sector bitmap");
        let block_sectors = CHUNK_SECTORS / ratio;
        let bit = block % ratio * block_sectors + first;
        let bits = view.bytes(decode(entry).at + bit / 8, count.div_ceil(8));
        bits.unwrap_or_else(|error| panic!("{error}"))
    }
}

/// Least significant bit first.
fn bit(bits: &[u8], sector: u64) -> bool {
    bits[size(sector / 8)] >> (sector % 8) & 1 == 1
}

fn read(view: &View, buf: &mut [u8], at: u64) {
    view.read(buf, at).unwrap_or_else(|error| panic!("{error}"));
}

fn read_parent(parent: Parent, buf: &mut [u8], offset: u64) {
    match parent {
        Some(parent) => parent(buf, offset),
        None => buf.fill(0),
    }
}

/// An entry of the block table.
pub(super) fn decode(entry: u64) -> Block {
    let state = match entry & 7 {
        0 => State::NotPresent,
        1 => State::Undefined,
        2 => State::Zero,
        3 => State::Unmapped,
        6 => State::Full,
        7 => State::Partial,
        _ => State::Reserved,
    };
    let at = entry >> 20 << 20;
    Block { state, at }
}

/// The two headers, and which counts.
fn read_headers(view: &View) -> Result<([Option<Header>; 2], usize), String> {
    let mut headers = [None, None];
    for (header, at) in headers.iter_mut().zip(HEADERS_AT) {
        let bytes = view.bytes(at, HEADER_LEN)?;
        if bytes.starts_with(b"head") && le32(&bytes, 4) == vhdx_checksum(&bytes) {
            *header = Some(Header {
                sequence: le64(&bytes, 8),
                file_write_guid: guid(&bytes, 16),
                data_write_guid: guid(&bytes, 32),
                log_guid: guid(&bytes, 48),
                bytes,
            });
        }
    }
    let current = match &headers {
        [None, None] => return Err("no header is valid".into()),
        [Some(first), Some(second)] if first.sequence == second.sequence => {
            require!(
                first == second,
                "two headers of one sequence number that differ"
            );
            0
        }
        [Some(first), Some(second)] => usize::from(second.sequence > first.sequence),
        [first, _] => usize::from(first.is_none()),
    };
    let bytes = &headers[current].as_ref().expect("chosen").bytes;
    let version = le16(bytes, 66);
    require!(version == 1, "version {version}");
    Ok((headers, current))
}

/// The log that `header` gives.
fn read_log(view: &View, header: &Header, file_len: u64) -> Result<Log, String> {
    let mut log = Log {
        at: le64(&header.bytes, 72),
        len: u64::from(le32(&header.bytes, 68)),
        guid: header.log_guid,
        entries: Vec::new(),
    };
    if is_zero(&log.guid) {
        return Ok(log);
    }
    let version = le16(&header.bytes, 64);
    require!(version == 0, "log version {version}");
    let whole = log.at.is_multiple_of(MIB) && log.len.is_multiple_of(MIB);
    require!(
        whole && log.at >= MIB && log.len > 0,
        "the log lies at {:#x}, length {:#x}",
        log.at,
        log.len
    );
    let ring = view.bytes(log.at, log.len)?;
    log.load(&ring, file_len)?;
    Ok(log)
}

/// The regions of a region table.
fn parse_regions(bytes: &[u8]) -> Result<Vec<Region>, String> {
    require!(bytes.starts_with(b"regi"), "no signature");
    require!(le32(bytes, 4) == vhdx_checksum(bytes), "wrong checksum");
    let count = usize::try_from(le32(bytes, 8)).expect("at least 32 bits");
    require!(count <= MAX_ENTRIES, "{count} regions");
    let regions = bytes[16..].chunks(32).take(count).map(|entry| Region {
        guid: guid(entry, 0),
        at: le64(entry, 16),
        len: u64::from(le32(entry, 24)),
        required: le32(entry, 28) & 1 == 1,
    });
    let regions: Vec<Region> = regions.collect();
    for (n, region) in regions.iter().enumerate() {
        let twin = regions[..n].iter().find(|other| other.guid == region.guid);
        require!(twin.is_none(), "two regions {:x?}", region.guid);
    }
    Ok(regions)
}
