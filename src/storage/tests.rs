//! What every [`Storage`] does, against a vector of bytes.

use std::io;

use proptest::prelude::*;

use super::Storage;
use super::host::HostFile;
use super::sim::SimStorage;
use crate::units::{FileOffset, FileRange, u64_from, usize_from};

pub(super) fn range(start: u64, len: u64) -> FileRange {
    FileRange::new(FileOffset::new(start), len)
}

/// A call that may change the file. Places are in bytes and may lie beyond the end.
#[derive(Clone, Debug)]
pub(super) enum Call {
    Write(u64, Vec<u8>),
    SetLen(u64),
    Punch(u64, u64),
    Zero(u64, u64),
    /// From, length, to.
    Copy(u64, u64, u64),
    Sync,
}

/// The longest file that calls make.
pub(super) const MAX: u64 = 5 * 4096 + 700;

/// A place that is likely to be special.
fn place() -> impl Strategy<Value = u64> {
    prop_oneof![
        0..MAX,
        (0..MAX / 512).prop_map(|n| n * 512),
        (0..MAX / 4096).prop_map(|n| n * 4096),
        (1..MAX / 512, -1..2i64).prop_map(|(n, off)| (n * 512).saturating_add_signed(off)),
    ]
}

pub(super) fn call() -> impl Strategy<Value = Call> {
    let span = || (place(), place()).prop_map(|(a, b)| (a.min(b), a.max(b) - a.min(b)));
    prop_oneof![
        6 => (span(), 1..=255u8, any::<bool>()).prop_map(|((at, len), byte, short)| {
            let len = if short { len.min(700) } else { len };
            // Differs everywhere, so that a byte of a wrong place shows.
            let bytes = (0..len).map(|n| byte ^ u8::try_from((at + n) / 97 % 256).unwrap());
            Call::Write(at, bytes.collect())
        }),
        3 => place().prop_map(Call::SetLen),
        2 => span().prop_map(|(at, len)| Call::Punch(at, len)),
        2 => span().prop_map(|(at, len)| Call::Zero(at, len)),
        3 => (span(), place()).prop_map(|((at, len), to)| Call::Copy(at, len, to)),
        2 => Just(Call::Sync),
    ]
}

impl Call {
    pub(super) fn run(&self, storage: &dyn Storage) -> io::Result<()> {
        match self {
            Self::Write(at, bytes) => storage.write_all_at(bytes, FileOffset::new(*at)),
            Self::SetLen(len) => storage.set_len(*len),
            Self::Punch(at, len) => storage.punch_hole(range(*at, *len)),
            Self::Zero(at, len) => storage.write_zeroes(range(*at, *len)),
            Self::Copy(at, len, to) => storage.copy_within(range(*at, *len), FileOffset::new(*to)),
            Self::Sync => storage.sync(),
        }
    }

    /// What it does to a plain file; false where it must fail, without a change.
    pub(super) fn run_on(&self, bytes: &mut Vec<u8>) -> bool {
        let len = u64_from(bytes.len());
        let overlay = |bytes: &mut Vec<u8>, at: u64, new: &[u8]| {
            if !new.is_empty() {
                let at = usize_from(at);
                bytes.resize(bytes.len().max(at + new.len()), 0);
                bytes[at..at + new.len()].copy_from_slice(new);
            }
        };
        match self {
            Self::Write(at, new) => overlay(bytes, *at, new),
            Self::SetLen(len) => bytes.resize(usize_from(*len), 0),
            Self::Punch(at, count) => {
                let end = (at + count).min(len);
                bytes[usize_from((*at).min(end))..usize_from(end)].fill(0);
            }
            Self::Zero(at, count) if at + count > len => return false,
            Self::Zero(at, count) => bytes[usize_from(*at)..usize_from(at + count)].fill(0),
            Self::Copy(at, count, to) => {
                let overlap = *count > 0 && at < &(to + count) && to < &(at + count);
                if at + count > len || overlap {
                    return false;
                }
                let copied = bytes[usize_from(*at)..usize_from(at + count)].to_vec();
                overlay(bytes, *to, &copied);
            }
            Self::Sync => {}
        }
        true
    }
}

pub(super) fn content(storage: &dyn Storage) -> Vec<u8> {
    let mut bytes = vec![0xee; usize_from(storage.len().unwrap())];
    storage
        .read_exact_at(&mut bytes, FileOffset::new(0))
        .unwrap();
    bytes
}

/// Holes read as zeros, and the runs are in order and inside the question.
fn check_runs(storage: &dyn Storage, bytes: &[u8], from: u64, end: u64) {
    let mut at = from;
    loop {
        let question = FileOffset::new(end);
        let run = storage.next_data(FileOffset::new(at), question).unwrap();
        let len = u64_from(bytes.len());
        let start = run.map_or(end.min(len), |run| run.start.get());
        assert!(
            start >= at.min(end).min(len),
            "{run:?} starts before {at:#x}"
        );
        let hole = usize_from(at.min(start))..usize_from(start);
        assert!(
            bytes[hole.clone()].iter().all(|&byte| byte == 0),
            "hole {hole:x?} holds data"
        );
        let Some(run) = run else { break };
        assert!(
            !run.is_empty() && run.end().get() <= end.min(len),
            "{run:?} in {end:#x}/{len:#x}"
        );
        at = run.end().get();
    }
}

fn conforms(storage: &dyn Storage, calls: &[Call]) {
    let mut expected = Vec::new();
    for call in calls {
        let may = call.run_on(&mut expected);
        let mut result = call.run(storage);
        if cfg!(windows)
            && let Call::Punch(at, count) = call
            && let Err(error) = &result
            && error.kind() == io::ErrorKind::Unsupported
        {
            // Wine's files have no holes. What reads the same is all that there is to compare.
            let len = storage.len().unwrap();
            let (start, end) = (len.min(*at), len.min(at + count));
            result = storage.write_zeroes(range(start, end - start));
        }
        assert_eq!(result.is_ok(), may, "{call:?} answered {result:?}");
        assert_eq!(
            storage.len().unwrap(),
            u64_from(expected.len()),
            "length after {call:?}"
        );
        assert!(content(storage) == expected, "content after {call:?}");
        let len = u64_from(expected.len());
        check_runs(storage, &expected, 0, len);
        check_runs(storage, &expected, len / 3, len + 512);
        let rounded = len.div_ceil(4096) * 4096;
        // A real one may keep space for metadata.
        assert!(storage.allocated_bytes().unwrap() <= rounded + (64 << 10));
    }
    let mut behind = [0; 2];
    let end = u64_from(expected.len());
    let error = storage.read_exact_at(&mut behind, FileOffset::new(end.saturating_sub(1)));
    assert_eq!(error.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
}

proptest! {
    #[test]
    fn simulated_file_conforms(calls in proptest::collection::vec(call(), 1..24)) {
        let sim = SimStorage::new();
        conforms(&sim, &calls);
        prop_assert!(sim.to_bytes() == content(&sim.fork()));
    }

    #[test]
    fn host_file_conforms(calls in proptest::collection::vec(call(), 1..24)) {
        let directory = tempfile::tempdir().unwrap();
        conforms(&HostFile::create_new(&directory.path().join("file")).unwrap(), &calls);
    }
}

#[cfg(unix)]
/// The same where the directory for temporary files of the tests is on another kind of file system:
/// tmpfs has neither `ZERO_RANGE` nor reflinks.
#[test]
fn host_file_conforms_in_memory() {
    let shared_memory = std::path::Path::new("/dev/shm");
    let Ok(directory) = tempfile::tempdir_in(shared_memory) else {
        println!("skipped: no {}", shared_memory.display());
        return;
    };
    let mut runner = proptest::test_runner::TestRunner::default();
    let calls = proptest::collection::vec(call(), 1..24);
    let file = directory.path().join("file");
    runner
        .run(&calls, |calls| {
            conforms(&HostFile::create_new(&file).unwrap(), &calls);
            std::fs::remove_file(&file).unwrap();
            Ok(())
        })
        .unwrap();
}
