//! A second disk without a file system: every change goes to the served disk and to a raw file, which is then
//! what other programs must read out of the VHD, byte by byte.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FallocateFlags, fallocate};

const MIB: u64 = 1 << 20;
const LARGEST_WRITE: u64 = MIB;
const LARGEST_DISCARD: u64 = 12 * MIB;

pub(crate) struct Mirror {
    served: PathBuf,
    disk: File,
    expected: File,
    expected_path: PathBuf,
    len: u64,
    random: u64,
    /// What a failed change was about: its range may hold old and new bytes, in any mixture.
    torn: Option<Change>,
    changed: u64,
}

#[derive(Clone)]
enum Change {
    Write { offset: u64, bytes: Vec<u8> },
    Discard { range: Range<u64>, zero: bool },
}

impl Change {
    fn range(&self) -> Range<u64> {
        match self {
            Self::Write { offset, bytes } => {
                *offset..*offset + u64::try_from(bytes.len()).expect("fits")
            }
            Self::Discard { range, .. } => range.clone(),
        }
    }
}

impl Mirror {
    /// Opens the served disk, all zero so far, and makes its raw twin at `expected`.
    pub(crate) fn new(served: &Path, expected: &Path, seed: u64) -> Mirror {
        let disk = open(served);
        let len = disk.metadata().expect("a served disk").len();
        let twin = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(expected);
        let twin = twin.expect("a new file");
        twin.set_len(len).expect("a sparse file");
        Mirror {
            served: served.to_owned(),
            disk,
            expected: twin,
            expected_path: expected.to_owned(),
            len,
            random: seed,
            torn: None,
            changed: 0,
        }
    }

    /// Discards all but the first MiB.
    pub(crate) fn discard_most(&mut self) {
        let range = MIB..self.len;
        let change = Change::Discard { range, zero: false };
        for file in [&self.disk, &self.expected] {
            apply(file, &change).expect("the disk takes it");
        }
    }

    /// Takes what the disk holds already, which need not be zero, for what is expected.
    pub(crate) fn learn(&mut self) {
        for start in (0..self.len).step_by(1 << 22) {
            let range = start..(start + 4 * MIB).min(self.len);
            let bytes = read(&self.disk, &range);
            (self.expected.write_all_at(&bytes, start)).expect("the raw twin takes it");
        }
    }

    /// How many bytes the disk has been asked to change so far.
    pub(crate) fn changed(&self) -> u64 {
        self.changed
    }

    pub(crate) fn expected_path(&self) -> &Path {
        &self.expected_path
    }

    /// Makes `count` random changes; stops at the first that the disk refuses.
    pub(crate) fn work(&mut self, count: usize) -> io::Result<()> {
        for _ in 0..count {
            let change = self.invent();
            self.changed += change.range().end - change.range().start;
            if let Err(error) = apply(&self.disk, &change) {
                self.torn = Some(change);
                return Err(error);
            }
            apply(&self.expected, &change).expect("the raw twin takes what the disk took");
        }
        Ok(())
    }

    /// Opens the served disk anew after the daemon was killed, and checks the change that was under way then: each
    /// of its bytes must be as before or as it was to become.
    pub(crate) fn reopen(&mut self) {
        self.disk = open(&self.served);
        let Some(change) = self.torn.take() else {
            return;
        };
        let range = change.range();
        let before = read(&self.expected, &range);
        let found = read(&self.disk, &range);
        apply(&self.expected, &change).expect("the raw twin takes it");
        let after = read(&self.expected, &range);
        for (index, byte) in found.iter().enumerate() {
            assert!(
                *byte == before[index] || *byte == after[index],
                "byte {index} of the interrupted change at {range:?} is neither old nor new"
            );
        }
        self.expected
            .write_all_at(&found, range.start)
            .expect("the raw twin takes it");
    }

    /// Every byte of the served disk is what was written.
    pub(crate) fn verify(&self) {
        let mut start = 0;
        while start < self.len {
            let range = start..(start + 4 * MIB).min(self.len);
            if read(&self.disk, &range) != read(&self.expected, &range) {
                panic!(
                    "{} differs from what was written, in {range:?}",
                    self.served.display()
                );
            }
            start = range.end;
        }
    }

    /// One to write for two that discard in bytes, so that blocks come and go.
    fn invent(&mut self) -> Change {
        let kind = self.below(10);
        let zero = kind == 0;
        if kind < 2 {
            let start = self.below(self.len);
            let end = (start + 1 + self.below(LARGEST_DISCARD)).min(self.len);
            return Change::Discard {
                range: start..end,
                zero,
            };
        }
        let offset = self.below(self.len - LARGEST_WRITE);
        let length = usize::try_from(1 + self.below(LARGEST_WRITE)).expect("fits");
        let mut bytes = Vec::with_capacity(length + 8);
        while bytes.len() < length {
            // Some zeros that a guest wrote, too.
            let value = if kind == 2 { 0 } else { self.next() };
            bytes.extend_from_slice(&value.to_le_bytes());
        }
        bytes.truncate(length);
        Change::Write { offset, bytes }
    }

    /// Uniform enough in `0..limit`.
    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    /// xorshift64.
    pub(crate) fn next(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random
    }
}

fn open(path: &Path) -> File {
    let file = File::options().read(true).write(true).open(path);
    file.unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn apply(file: &File, change: &Change) -> io::Result<()> {
    match change {
        Change::Write { offset, bytes } => file.write_all_at(bytes, *offset),
        Change::Discard { range, zero } => {
            let how = if *zero {
                FallocateFlags::ZERO_RANGE
            } else {
                FallocateFlags::PUNCH_HOLE
            };
            let flags = how | FallocateFlags::KEEP_SIZE;
            Ok(fallocate(
                file,
                flags,
                range.start,
                range.end - range.start,
            )?)
        }
    }
}

fn read(file: &File, range: &Range<u64>) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(range.end - range.start).expect("fits")];
    file.read_exact_at(&mut bytes, range.start)
        .expect("a range inside the disk");
    bytes
}
