//! What a guest reads from built files.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::path::Path;

use vhdfs::storage::Storage;
use vhdfs::storage::sim::Random;
use vhdfs::units::FileOffset;

use super::super::{Parent, len, size};
use super::vhd::{VhdImage, VhdKind};
use super::vhdx::VhdxImage;

/// A description of a file.
pub(crate) trait Model {
    /// The disk's size in bytes.
    fn disk_len(&self) -> u64;

    /// Bytes in a block.
    fn block_size(&self) -> u64;

    /// The blocks that are described.
    fn described(&self) -> BTreeSet<u64>;

    /// Fills `buf` with what a guest reads at `offset`, what is not there from `parent`, or with
    /// zeros.
    fn expect(&self, parent: Parent, buf: &mut [u8], offset: u64);
}

impl Model for VhdImage {
    fn disk_len(&self) -> u64 {
        self.disk_len
    }

    fn block_size(&self) -> u64 {
        match self.kind {
            VhdKind::Fixed => 1 << 20,
            VhdKind::Dynamic | VhdKind::Differencing(_) => self.block_size,
        }
    }

    fn described(&self) -> BTreeSet<u64> {
        match self.kind {
            VhdKind::Fixed => (0..self.disk_len.div_ceil(1 << 20)).collect(),
            _ => self.slots.iter().map(|slot| slot.block).collect(),
        }
    }

    fn expect(&self, parent: Parent, buf: &mut [u8], offset: u64) {
        Self::expect(self, parent, buf, offset);
    }
}

impl Model for VhdxImage {
    fn disk_len(&self) -> u64 {
        self.disk_len
    }

    fn block_size(&self) -> u64 {
        self.block_size
    }

    fn described(&self) -> BTreeSet<u64> {
        let slots = self.slots().map(|slot| slot.block);
        slots.chain(self.states.keys().copied()).collect()
    }

    fn expect(&self, parent: Parent, buf: &mut [u8], offset: u64) {
        Self::expect(self, parent, buf, offset);
    }
}

/// Fills `buf` with what a guest reads at `offset` from a chain, the child first.
pub(crate) fn expect(chain: &[&dyn Model], buf: &mut [u8], offset: u64) {
    let Some((first, parents)) = chain.split_first() else {
        return buf.fill(0);
    };
    let there = first.disk_len().saturating_sub(offset).min(len(buf));
    let (buf, behind) = buf.split_at_mut(size(there));
    behind.fill(0);
    if !buf.is_empty() {
        let parent = |buf: &mut [u8], offset: u64| expect(parents, buf, offset);
        first.expect(Some(&parent), buf, offset);
    }
}

/// Compares what `read` gives of a disk with what a guest must read from `chain`, the child first:
/// all blocks that one of its files describes, those beside them, and a hundred ranges anywhere, of
/// any alignment.
///
/// # Errors
/// The first difference.
pub(crate) fn compare(chain: &[&dyn Model], read: &dyn Fn(&mut [u8], u64)) -> Result<(), String> {
    let disk_len = chain[0].disk_len();
    let mut ranges = BTreeSet::new();
    for model in chain {
        let block_size = model.block_size();
        for block in model.described() {
            for block in block.saturating_sub(1)..=block + 1 {
                ranges.insert((block * block_size, block_size));
            }
        }
    }
    let mut random = Random::new(disk_len);
    for _ in 0..100 {
        ranges.insert((random.below(disk_len), 1 + random.below(64 << 10)));
    }
    let reach = (disk_len - disk_len.min(5000), 5000);
    for (start, count) in ranges.into_iter().chain([reach]) {
        if start >= disk_len {
            continue;
        }
        let count = size(count.min(disk_len - start));
        let (mut found, mut expected) = (vec![0x99; count], vec![0x66; count]);
        read(&mut found, start);
        expect(chain, &mut expected, start);
        if found != expected {
            let pairs = found.iter().zip(&expected);
            let at = pairs
                .take_while(|(found, expected)| found == expected)
                .count();
            let show = |bytes: &[u8]| format!("{:02x?}", &bytes[at..count.min(at + 8)]);
            return Err(format!(
                "at {start:#x} + {at:#x}: {} instead of {}",
                show(&found),
                show(&expected)
            ));
        }
    }
    Ok(())
}

/// Writes what `file` holds to `path`, holes as holes.
pub(crate) fn save(file: &dyn Storage, path: &Path) {
    let mut host = File::create(path).expect("a new file");
    let end = file.len().expect("known");
    host.set_len(end).expect("room");
    let mut at = FileOffset::new(0);
    while let Some(data) = file.next_data(at, FileOffset::new(end)).expect("known") {
        let mut bytes = vec![0; size(data.len.min(1 << 20))];
        file.read_exact_at(&mut bytes, data.start).expect("there");
        host.seek(SeekFrom::Start(data.start.get()))
            .expect("a place");
        host.write_all(&bytes).expect("room");
        at = data.start.plus(len(&bytes));
    }
}
