//! What the guest's filesystems call free, told from any bytes.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

use vhdfs::guest::{Outcome, Source, SurveyOptions, survey};
use vhdfs::units::u64_from;

use super::seal;
use super::sparse::Sparse;

/// The longest disk.
pub(super) const MAX_LEN: u64 = 1 << 30;

/// A disk whose reads are counted.
struct Disk {
    bytes: Sparse,
    sector_size: u64,
    reads: AtomicU64,
    read: AtomicU64,
}

impl Disk {
    /// What a survey may read: every byte of the disk some times over, as several readers look at
    /// it. More is a loop without an end.
    fn budget(&self) -> (u64, u64) {
        let len = self.bytes.len();
        (len / 128 + (1 << 17), 8 * len + (64 << 20))
    }
}

impl Source for Disk {
    fn len(&self) -> u64 {
        self.bytes.len()
    }

    fn sector_size(&self) -> u64 {
        self.sector_size
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let len = u64_from(buf.len());
        assert!(
            offset.checked_add(len).is_some_and(|end| end <= self.len()),
            "{len} bytes at {offset} of {}",
            self.len()
        );
        let reads = self.reads.fetch_add(1, Ordering::Relaxed);
        let read = self.read.fetch_add(len, Ordering::Relaxed);
        let (max_reads, max_read) = self.budget();
        assert!(
            reads < max_reads && read < max_read,
            "{reads} reads of {read} bytes, the disk has {}",
            self.len()
        );
        self.bytes.read(buf, offset);
        Ok(())
    }
}

/// A survey of a [`Sparse`] disk. Of its flags, bit 0 leaves checksums as they are, bit 1 makes
/// sectors of 4096 bytes, bit 2 counts swap space as free.
pub(super) fn run(data: &[u8]) {
    let mut bytes = Sparse::decode(data, MAX_LEN);
    if bytes.flags & 1 == 0 {
        seal::guest(&mut bytes);
    }
    let sector_size = if bytes.flags & 2 == 0 { 512 } else { 4096 };
    let options = SurveyOptions {
        swap: bytes.flags & 4 != 0,
    };
    let disk = Disk {
        bytes,
        sector_size,
        reads: AtomicU64::new(0),
        read: AtomicU64::new(0),
    };
    let found = survey(&disk, &options).expect("the disk can be read");
    let mut sum = 0;
    for part in &found.parts {
        assert!(!part.name.is_empty());
        let own: u64 = part
            .ranges
            .iter()
            .map(|range| range.end - range.start)
            .sum();
        assert!(own <= disk.len(), "{part:?}");
        if let Outcome::Read { free, .. } = part.outcome {
            assert!(free <= own, "{part:?}");
            sum += free;
        }
    }
    let free: u64 = found.free.iter().map(|range| range.end - range.start).sum();
    assert_eq!(free, sum, "no two parts share a free byte");
    if let Some(last) = found.free.last() {
        assert!(last.end <= disk.len(), "free up to {}", last.end);
    }
    disk.reads.store(0, Ordering::Relaxed);
    disk.read.store(0, Ordering::Relaxed);
    let holds = found
        .evidence
        .still_holds(&disk)
        .expect("the disk can be read");
    assert!(holds, "nothing has changed");
}
