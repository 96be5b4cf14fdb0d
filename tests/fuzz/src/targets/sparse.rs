//! A large file in a small input: its length, and the sectors of it that are not all zeros.
//!
//! ```text
//! u32  sectors of the file          u16  bytes behind them      u16  for the target
//! then, as often as there are more bytes:
//! u32  number of a sector           512 bytes of it
//! ```

use std::collections::BTreeMap;
use std::io;
use std::path::Path;

use vhdfs::storage::Storage;
use vhdfs::storage::host::{HostFile, HostOptions};
use vhdfs::storage::sim::{Random, SimStorage};
use vhdfs::units::{FileOffset, low_u8, low_u32, u64_from, usize_from};

use super::input::Input;

const HEAD: usize = 8;
const RECORD: usize = 4 + 512;
/// What fields are set to: the edges of their types and of what the formats allow.
pub(super) const EDGES: [u64; 24] = [
    0,
    1,
    2,
    7,
    0x80,
    0xff,
    0x1ff,
    0x200,
    0x1000,
    0x7fff,
    0xffff,
    0x10000,
    1 << 20,
    2 << 20,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
    1 << 32,
    64 << 40,
    (64 << 40) + 512,
    1 << 62,
    u64::MAX >> 1,
    1 << 63,
    u64::MAX,
];

/// A file with holes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Sparse {
    len: u64,
    /// For the target.
    pub(super) flags: u16,
    sectors: BTreeMap<u64, [u8; 512]>,
}

impl Sparse {
    /// What the input describes, at most `max_len` bytes long.
    pub(super) fn decode(data: &[u8], max_len: u64) -> Self {
        let mut input = Input::new(data);
        let sectors = u64::from(input.u32()).min(max_len / 512);
        let mut sparse = Self {
            len: sectors * 512 + u64::from(input.u16() % 512),
            flags: input.u16(),
            sectors: BTreeMap::new(),
        };
        while !input.is_empty() {
            let sector = u64::from(input.u32());
            let bytes = input.structure();
            if sector <= sectors {
                sparse.sectors.insert(sector, bytes);
            }
        }
        sparse
    }

    /// The input that describes this.
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut bytes = low_u32(self.len / 512).to_le_bytes().to_vec();
        bytes.extend(low_u32(self.len % 512).to_le_bytes()[..2].iter());
        bytes.extend(self.flags.to_le_bytes());
        for (sector, data) in &self.sectors {
            bytes.extend(low_u32(*sector).to_le_bytes());
            bytes.extend(data);
        }
        bytes
    }

    /// The file at `path`, without a look at its holes.
    pub(super) fn of(path: &Path) -> io::Result<Self> {
        let options = HostOptions {
            read_only: true,
            ..HostOptions::default()
        };
        let file = HostFile::open(path, &options).map_err(io::Error::other)?;
        let mut sparse = Self {
            len: file.len()?,
            ..Self::default()
        };
        let (mut at, end) = (FileOffset::new(0), FileOffset::new(sparse.len));
        while let Some(data) = file.next_data(at, end)? {
            let mut buf = vec![0; usize_from(data.len.min(1 << 20))];
            file.read_exact_at(&mut buf, data.start)?;
            sparse.write(&buf, data.start.get());
            at = data.start.plus(u64_from(buf.len()));
        }
        Ok(sparse)
    }

    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// Numbers of the sectors that are not all zeros.
    pub(super) fn sectors(&self) -> Vec<u64> {
        self.sectors.keys().copied().collect()
    }

    /// Writes, extending the file where needed.
    pub(super) fn write(&mut self, bytes: &[u8], offset: u64) {
        let end = offset + u64_from(bytes.len());
        self.len = self.len.max(end);
        let mut at = offset;
        while at < end {
            let sector = at / 512;
            let stop = ((sector + 1) * 512).min(end);
            let part = &bytes[usize_from(at - offset)..usize_from(stop - offset)];
            let is_new = !self.sectors.contains_key(&sector);
            if !is_new || part.iter().any(|byte| *byte != 0) {
                let data = self.sectors.entry(sector).or_insert([0; 512]);
                data[usize_from(at % 512)..][..part.len()].copy_from_slice(part);
            }
            at = stop;
        }
    }

    /// Fills `buf` from `offset` on, with zeros behind the end.
    pub(super) fn read(&self, buf: &mut [u8], offset: u64) {
        buf.fill(0);
        let end = offset.saturating_add(u64_from(buf.len()));
        for (sector, data) in self.sectors.range(offset / 512..end.div_ceil(512)) {
            let start = (sector * 512).max(offset);
            let stop = ((sector + 1) * 512).min(end);
            let part = &data[usize_from(start % 512)..][..usize_from(stop - start)];
            buf[usize_from(start - offset)..][..part.len()].copy_from_slice(part);
        }
    }

    /// Bytes from `offset` on.
    pub(super) fn bytes(&self, offset: u64, count: u64) -> Vec<u8> {
        let mut bytes = vec![0; usize_from(count)];
        self.read(&mut bytes, offset);
        bytes
    }

    /// The file on a simulated host.
    pub(super) fn to_storage(&self) -> SimStorage {
        let sim = SimStorage::new();
        for (sector, data) in &self.sectors {
            let written = sim.write_all_at(data, FileOffset::new(sector * 512));
            written.expect("the simulated host takes it");
        }
        sim.set_len(self.len).expect("it is short");
        sim.sync().expect("the simulated host keeps it");
        sim
    }
}

/// Changes an input without losing the rest of it: fields, sectors, and the length.
pub(super) fn mutate(data: &mut Vec<u8>, random: &mut Random) {
    data.resize(data.len().max(HEAD), 0);
    let records = (data.len() - HEAD) / RECORD;
    for _ in 0..=random.below(4) {
        if records == 0 || random.below(40) == 0 {
            change_head(data, random);
            continue;
        }
        let at = HEAD + RECORD * any_record(data, records, random);
        let (field, width) = any_field(random);
        match random.below(16) {
            // A sector elsewhere, one like another, one that is gone.
            0 => data[at] = low_u8(random.next()),
            1 => {
                let from = HEAD + RECORD * usize_from(random.below(u64_from(records)));
                data.copy_within(from + 4..from + RECORD, at + 4);
            }
            2 => data[at + 4..at + RECORD].fill(low_u8(random.next() & random.next())),
            3 => {
                let from = HEAD + RECORD * usize_from(random.below(u64_from(records)));
                let (other, _) = any_field(random);
                let mut bytes = [0; 8];
                bytes[..width].copy_from_slice(&data[from + 4 + other / width * width..][..width]);
                data[at + 4 + field..][..width].copy_from_slice(&bytes[..width]);
            }
            _ => change_field(&mut data[at + 4 + field..][..width], random),
        }
    }
}

/// A record, seldom one whose bytes are all the same: there are many of those, and they say little.
fn any_record(data: &[u8], records: usize, random: &mut Random) -> usize {
    let mut record = 0;
    for _ in 0..8 {
        record = usize_from(random.below(u64_from(records)));
        let bytes = &data[HEAD + RECORD * record + 4..][..512];
        if bytes.iter().any(|byte| *byte != bytes[0]) {
            break;
        }
    }
    record
}

/// A field of a sector: where, and how wide.
fn any_field(random: &mut Random) -> (usize, usize) {
    let width = 1 << random.below(4);
    let field = random.below(512 / width) * width;
    (usize_from(field), usize_from(width))
}

/// Changes a field of 1, 2, 4 or 8 bytes of either byte order.
fn change_field(field: &mut [u8], random: &mut Random) {
    let width = field.len();
    let big_endian = random.below(3) == 0;
    if big_endian {
        field.reverse();
    }
    let mut bytes = [0; 8];
    bytes[..width].copy_from_slice(field);
    let old = u64::from_le_bytes(bytes);
    let new = match random.below(6) {
        0 => EDGES[usize_from(random.below(u64_from(EDGES.len())))],
        1 => random.next(),
        2 => old.wrapping_add(random.below(16) + 1),
        3 => old.wrapping_sub(random.below(16) + 1),
        4 => old.rotate_left(1),
        _ => old ^ 1 << random.below(8 * u64_from(width)),
    };
    field.copy_from_slice(&new.to_le_bytes()[..width]);
    if big_endian {
        field.reverse();
    }
}

fn change_head(data: &mut [u8], random: &mut Random) {
    match random.below(4) {
        0 => change_field(&mut data[..4], random),
        1 => change_field(&mut data[4..6], random),
        // Sectors of the length that matter: one more or less.
        2 => {
            let sectors = u32::from_le_bytes([data[0], data[1], data[2], data[3]]);
            let new = sectors
                .wrapping_add(low_u32(random.below(9)))
                .wrapping_sub(4);
            data[..4].copy_from_slice(&new.to_le_bytes());
        }
        _ => change_field(&mut data[6..8], random),
    }
}
