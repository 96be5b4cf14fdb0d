//! Somebody who uses a mounted disk from several threads, and knows what he was promised.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::{Mutex, RwLock};
use rustix::fs::{FallocateFlags, fallocate};
use vhdfs::storage::sim::Random;

use crate::support::image::pattern;
use crate::support::oracle::{After, Oracle};
use crate::support::{len, size};

const THREADS: u64 = 3;
/// Bytes that one thread alone writes to: several threads share each block.
const ZONE: u64 = 64 << 10;
const LARGEST_DISCARD: u64 = 5 << 20;

/// What a guest did.
#[derive(Debug, Default)]
pub(crate) struct Deeds {
    pub(crate) changes: AtomicU64,
    pub(crate) flushes: AtomicU64,
}

/// A user of one disk, over all of the disk's lives.
pub(crate) struct Guest {
    len: u64,
    /// What it does begins and ends at multiples of this.
    unit: u64,
    oracle: Mutex<Oracle>,
    /// Tells contents apart.
    tags: AtomicU64,
    /// Held for reading by each change inside a zone, for writing by whoever crosses zones: what two
    /// that overlap leave is nobody's promise.
    zones: RwLock<()>,
    pub(crate) deeds: Deeds,
}

/// Opens the disk at `path` for reading and writing.
pub(crate) fn open(path: &Path) -> io::Result<File> {
    File::options().read(true).write(true).open(path)
}

impl Guest {
    /// Of a disk of which `oracle` knows what is on it.
    pub(crate) fn new(len: u64, oracle: Oracle) -> Self {
        Self {
            len,
            unit: 1,
            oracle: Mutex::new(oracle),
            tags: AtomicU64::new(1),
            zones: RwLock::new(()),
            deeds: Deeds::default(),
        }
    }

    /// The same, of a disk that may fail: what it does is in whole sectors. Of half a sector that is
    /// written over a change that failed, nobody could say what stands in the other half.
    pub(crate) fn in_sectors(len: u64, oracle: Oracle) -> Self {
        Self {
            unit: 512,
            ..Self::new(len, oracle)
        }
    }

    /// Gets another disk, of which `oracle` knows what is on it.
    pub(crate) fn begin_anew(&self, oracle: Oracle) {
        *self.oracle.lock() = oracle;
    }

    /// Writes, discards, flushes and rests until the disk fails or `stop` is set. The first error of
    /// each thread.
    pub(crate) fn work(&self, disk: &File, seed: u64, stop: &AtomicBool) -> Vec<io::Error> {
        std::thread::scope(|scope| {
            let workers: Vec<_> = (0..THREADS)
                .map(|thread| scope.spawn(move || self.work_alone(disk, thread, seed, stop)))
                .collect();
            let ends = workers.into_iter().map(|worker| worker.join().unwrap());
            ends.filter_map(Result::err).collect()
        })
    }

    fn work_alone(&self, disk: &File, thread: u64, seed: u64, stop: &AtomicBool) -> io::Result<()> {
        let mut random = Random::new(seed ^ thread << 56);
        while !stop.load(Ordering::Relaxed) {
            let zones = self.len / (ZONE * THREADS);
            let zone = (random.below(zones) * THREADS + thread) * ZONE;
            let within = random.below(ZONE) / self.unit * self.unit;
            let count = (1 + random.below(ZONE - within)).next_multiple_of(self.unit);
            let few = count.min(5000 / self.unit * self.unit);
            match random.below(20) {
                0..9 => self.write(disk, zone + within, few, 1)?,
                9..14 => self.write(disk, zone + within, count, 1)?,
                14 => self.write(disk, zone, ZONE, 0)?,
                15 => {
                    let _zone = self.zones.read();
                    self.change_zeros(disk, zone + within, count, FallocateFlags::ZERO_RANGE)?;
                }
                16 | 17 => {
                    let _alone = self.zones.write();
                    let start = random.below(self.len) / self.unit * self.unit;
                    let count = (1 + random.below(LARGEST_DISCARD)).next_multiple_of(self.unit);
                    let count = count.min(self.len - start);
                    self.change_zeros(disk, start, count, FallocateFlags::PUNCH_HOLE)?;
                }
                18 => self.flush(disk)?,
                _ if random.below(4) == 0 => {
                    // Long enough for a compaction.
                    let _alone = self.zones.write();
                    std::thread::sleep(Duration::from_millis(30 + random.below(60)));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// A write of data, or of zeros if `data` is 0.
    fn write(&self, disk: &File, offset: u64, count: u64, data: u64) -> io::Result<()> {
        let _zone = self.zones.read();
        let mut bytes = vec![0; size(count)];
        if data != 0 {
            let tag = self.tags.fetch_add(1, Ordering::Relaxed);
            pattern(tag, offset / 512, &mut bytes);
        }
        self.change(offset, &bytes, || disk.write_all_at(&bytes, offset))
    }

    /// Writes `bytes`, and notes it.
    pub(crate) fn write_bytes(&self, disk: &File, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.change(offset, bytes, || disk.write_all_at(bytes, offset))
    }

    /// Makes a range zero, and notes it.
    pub(crate) fn change_zeros(
        &self,
        disk: &File,
        offset: u64,
        count: u64,
        how: FallocateFlags,
    ) -> io::Result<()> {
        self.change(offset, &vec![0; size(count)], || {
            let flags = how | FallocateFlags::KEEP_SIZE;
            Ok(fallocate(disk, flags, offset, count)?)
        })
    }

    fn change(
        &self,
        offset: u64,
        bytes: &[u8],
        change: impl FnOnce() -> io::Result<()>,
    ) -> io::Result<()> {
        let pending = self.oracle.lock().begin(offset, bytes);
        change()?;
        self.oracle.lock().acknowledge(pending);
        self.deeds.changes.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// Flushes, and notes it.
    pub(crate) fn flush(&self, disk: &File) -> io::Result<()> {
        let pending = self.oracle.lock().begin_flush();
        disk.sync_data()?;
        self.oracle.lock().acknowledge_flush(pending);
        self.deeds.flushes.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// Compares all that `read` gives with what may be there.
    ///
    /// # Errors
    /// What may not.
    pub(crate) fn check(&self, read: &dyn Fn(&mut [u8], u64), after: After) -> Result<(), String> {
        self.oracle.lock().check_reads(read, after)
    }

    /// As [`Self::settle`], of a mounted disk.
    pub(crate) fn settle_disk(&self, disk: &File) {
        self.settle(&|buf, offset| disk.read_exact_at(buf, offset).unwrap());
    }

    /// As [`Self::check`], of a mounted disk.
    pub(crate) fn check_disk(&self, disk: &File, after: After) -> Result<(), String> {
        assert_eq!(disk.metadata().unwrap().len(), self.len);
        self.check(
            &|buf, offset| disk.read_exact_at(buf, offset).unwrap(),
            after,
        )
    }

    /// After a power cut, or a flush that failed: what is there is durable, and nothing else legal any more.
    pub(crate) fn settle(&self, read: &dyn Fn(&mut [u8], u64)) {
        let mut content = vec![0; size(self.len)];
        for (part, chunk) in (0..).zip(content.chunks_mut(1 << 20)) {
            read(chunk, part << 20);
        }
        let copy = |buf: &mut [u8], offset: u64| {
            let count = buf.len().min(size(self.len - offset));
            buf[..count].copy_from_slice(&content[size(offset)..][..count]);
        };
        assert_eq!(len(&content), self.len);
        self.oracle.lock().settle_reads(&copy);
    }
}
