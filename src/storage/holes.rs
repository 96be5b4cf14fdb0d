//! The holes of a host file: how much of it they are, and filling them.

use std::io;

use super::Storage;
use crate::units::{FileOffset, FileRange, u64_from, usize_from};

/// Bytes that are filled at once.
const CHUNK: u64 = 1 << 20;

/// What filling holes came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Filled {
    /// Bytes of holes that were filled.
    pub filled: u64,
    /// Bytes of holes that are there all the same: it was interrupted, or the host's file system keeps zeros as
    /// holes.
    pub left: u64,
}

/// The holes of the file, in order. What the host allocated and nobody wrote may be one: tools that copy
/// a file ask the same question.
fn holes(storage: &dyn Storage) -> io::Result<impl Iterator<Item = io::Result<FileRange>> + '_> {
    let end = FileOffset::new(storage.len()?);
    let mut at = FileOffset::new(0);
    Ok(std::iter::from_fn(move || {
        while at < end {
            let data = match storage.next_data(at, end) {
                Ok(data) => data.unwrap_or(FileRange::between(end, end)),
                Err(error) => {
                    at = end;
                    return Some(Err(error));
                }
            };
            let hole = FileRange::between(at, data.start);
            at = data.end();
            if !hole.is_empty() {
                return Some(Ok(hole));
            }
        }
        None
    }))
}

/// Bytes of the file's length that are holes.
///
/// # Errors
/// What the host answers.
pub fn hole_bytes(storage: &dyn Storage) -> io::Result<u64> {
    holes(storage)?.try_fold(0, |sum: u64, hole| Ok(sum.saturating_add(hole?.len)))
}

/// Has the host store the holes of the file as data, durably. The bytes of the file stay what they are:
/// each piece is read and written back as it was read, so that a host that is wrong about its holes harms
/// nothing. Nobody else may write to the file meanwhile.
///
/// `go_on` is asked before each piece, with the bytes that are filled; where it says no, that is the end. So it is
/// where another program [waits](Storage::is_wanted) to open the file.
///
/// # Errors
/// What the host answers, as where it is full; what was filled stays filled.
pub fn fill_holes(storage: &dyn Storage, go_on: &mut dyn FnMut(u64) -> bool) -> io::Result<Filled> {
    let mut filled = 0_u64;
    let mut piece = vec![0; usize_from(CHUNK)];
    'all: for hole in holes(storage)? {
        let hole = hole?;
        let mut at = hole.start;
        while at < hole.end() {
            if !go_on(filled) || storage.is_wanted() {
                break 'all;
            }
            let part = &mut piece[..usize_from(hole.end().since(at).min(CHUNK))];
            storage.read_exact_at(part, at)?;
            storage.write_all_at(part, at)?;
            at = at.plus(u64_from(part.len()));
            filled = filled.saturating_add(u64_from(part.len()));
        }
    }
    storage.sync()?;
    let left = hole_bytes(storage)?;
    Ok(Filled { filled, left })
}

#[cfg(test)]
mod tests {
    use super::*;
    #[cfg(unix)]
    use crate::storage::host::HostFile;
    use crate::storage::sim::SimStorage;
    use crate::storage::tests::content;

    const MIB: u64 = 1 << 20;

    /// Data at 1 MiB and at the odd end of a file of 6 MiB and a bit; holes elsewhere.
    fn with_holes(storage: &dyn Storage) -> Vec<u8> {
        storage.set_len(6 * MIB + 777).unwrap();
        let data = vec![7; usize_from(MIB)];
        storage.write_all_at(&data, FileOffset::new(MIB)).unwrap();
        let end = FileOffset::new(6 * MIB);
        storage.write_all_at(&[9; 777], end).unwrap();
        content(storage)
    }

    fn fills(storage: &dyn Storage) {
        let before = with_holes(storage);
        let holes = hole_bytes(storage).unwrap();
        // A host's blocks may be larger than what was written.
        assert!((4 * MIB..=5 * MIB).contains(&holes), "{holes}");
        let mut seen = Vec::new();
        let mut go_on = |filled| {
            seen.push(filled);
            true
        };
        let found = fill_holes(storage, &mut go_on).unwrap();
        assert_eq!((found.filled, found.left), (holes, 0));
        assert!(seen.is_sorted() && seen.len() >= 5, "{seen:?}");
        assert!(content(storage) == before, "content");
        let again = fill_holes(storage, &mut |_| true).unwrap();
        assert_eq!((again.filled, again.left), (0, 0));
    }

    #[test]
    fn holes_are_filled_and_bytes_stay() {
        fills(&SimStorage::new());
    }

    #[cfg(unix)]
    #[test]
    fn holes_of_a_host_file_are_filled() {
        let folder = tempfile::tempdir().unwrap();
        fills(&HostFile::create_new(&folder.path().join("file")).unwrap());
    }

    /// Space that was allocated and never written counts as a hole to who copies the file.
    #[cfg(target_os = "linux")]
    #[test]
    fn allocated_space_is_written() {
        let folder = tempfile::tempdir().unwrap();
        let file = HostFile::create_new(&folder.path().join("file")).unwrap();
        let mib = vec![7; usize_from(MIB)];
        file.write_all_at(&mib, FileOffset::new(0)).unwrap();
        let whole = FileRange::new(FileOffset::new(0), MIB);
        file.write_zeroes(whole).unwrap();
        file.sync().unwrap();
        fill_holes(&file, &mut |_| true).unwrap();
        let end = FileOffset::new(MIB);
        let data = file.next_data(FileOffset::new(0), end).unwrap();
        assert_eq!(data, Some(whole));
    }

    #[test]
    fn filling_can_be_interrupted_and_gone_on_with() {
        let sim = SimStorage::new();
        let before = with_holes(&sim);
        let holes = hole_bytes(&sim).unwrap();
        let part = fill_holes(&sim, &mut |filled| filled < 2 * MIB).unwrap();
        assert_eq!((part.filled, part.left), (2 * MIB, holes - 2 * MIB));
        assert!(content(&sim) == before);
        let rest = fill_holes(&sim, &mut |_| true).unwrap();
        assert_eq!((rest.filled, rest.left), (holes - 2 * MIB, 0));
        assert!(content(&sim) == before);
    }

    /// A host that takes data for holes loses none of it.
    #[test]
    fn a_host_that_is_wrong_about_holes_loses_nothing() {
        #[derive(Debug)]
        struct Wrong(SimStorage);
        impl Storage for Wrong {
            fn len(&self) -> io::Result<u64> {
                self.0.len()
            }
            fn read_exact_at(&self, buf: &mut [u8], offset: FileOffset) -> io::Result<()> {
                self.0.read_exact_at(buf, offset)
            }
            fn write_all_at(&self, buf: &[u8], offset: FileOffset) -> io::Result<()> {
                self.0.write_all_at(buf, offset)
            }
            fn set_len(&self, len: u64) -> io::Result<()> {
                self.0.set_len(len)
            }
            fn punch_hole(&self, range: FileRange) -> io::Result<()> {
                self.0.punch_hole(range)
            }
            fn write_zeroes(&self, range: FileRange) -> io::Result<()> {
                self.0.write_zeroes(range)
            }
            fn copy_within(&self, from: FileRange, to: FileOffset) -> io::Result<()> {
                self.0.copy_within(from, to)
            }
            fn next_data(&self, _: FileOffset, _: FileOffset) -> io::Result<Option<FileRange>> {
                Ok(None)
            }
            fn allocated_bytes(&self) -> io::Result<u64> {
                self.0.allocated_bytes()
            }
            fn room(&self) -> Option<u64> {
                None
            }

            fn is_wanted(&self) -> bool {
                false
            }
            fn write_back(&self, range: FileRange) -> io::Result<()> {
                self.0.write_back(range)
            }
            fn sync(&self) -> io::Result<()> {
                self.0.sync()
            }
        }
        let wrong = Wrong(SimStorage::new());
        let before = with_holes(&wrong.0);
        let found = fill_holes(&wrong, &mut |_| true).unwrap();
        // And says that it is not done.
        assert_eq!(found.left, u64_from(before.len()));
        assert!(content(&wrong.0) == before);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn filling_ends_where_another_program_waits() {
        use std::os::unix::fs::OpenOptionsExt;
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        let file = HostFile::create_new(&path).unwrap();
        with_holes(&file);
        if file.take_lease().unwrap() != crate::storage::host::Hold::Alone {
            println!("skipped: no leases in the temporary directory");
            return;
        }
        let mut other = std::fs::File::options();
        other.read(true).custom_flags(nix::libc::O_NONBLOCK);
        other.open(&path).unwrap_err();
        let done = fill_holes(&file, &mut |_| true).unwrap();
        assert_eq!(done.filled, 0);
        assert!(done.left > 0);
    }
}
