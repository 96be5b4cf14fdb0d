//! A fixed disk's footer that is not where it belongs: cut off, damaged, or with something behind it.
//!
//! A fixed VHD is raw data with a footer behind. So the data is whole whatever became of the footer, and
//! where that lay tells the disk's size. One that is still there, of a disk that ends where it begins,
//! is beyond doubt; where there is none, the file may as well be raw data that never was a VHD.

use std::io;

use super::create::fixed_footer;
use super::layout::{Layout, read_tail};
use crate::format::DiskType;
use crate::format::vhd::{FOOTER_LEN, Footer, FooterFault, MAX_DISK_LEN};
use crate::image::{LayoutError, read_array};
use crate::storage::Storage;
use crate::units::{FileOffset, FileRange, SECTOR_SIZE, round_down, u64_from, usize_from};

/// How far in front of the end a footer is looked for.
const LOOK: u64 = 1 << 20;

const COOKIE: &[u8] = b"conectix";

/// A footer that is to be put where it belongs: behind the disk's last byte.
#[derive(Debug)]
pub(crate) struct Stray {
    footer: Footer,
    /// Where it belongs: the disk's size.
    pub(crate) at: FileOffset,
    /// What is wrong.
    pub(crate) state: State,
}

/// What is wrong with a footer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// It is good, but does not end the file.
    Followed {
        /// By that many bytes.
        len: u64,
        /// Whether some of them are not zero.
        has_data: bool,
    },
    /// It has lost its end, or does not fit its checksum; what it says fits the file.
    Damaged,
    /// Nothing is left of it, and the file may be raw data.
    Missing,
}

/// Looks for the footer of the file in `storage`, if that is a fixed disk that cannot be opened for lack of
/// one, or may be.
///
/// # Errors
/// Where the host fails.
pub(crate) fn find(storage: &dyn Storage) -> io::Result<Option<Stray>> {
    let file_len = storage.len()?;
    if file_len <= FOOTER_LEN {
        return Ok(None);
    }
    let tail = read_tail(storage, file_len)?;
    if tail.footer.is_ok() {
        return Ok(None);
    }
    match Layout::read(storage) {
        Ok(_) => return Ok(None),
        Err(LayoutError::Io(error)) => return Err(error),
        Err(LayoutError::Format(_)) => {}
    }
    if matches!(tail.footer, Err(FooterFault::Checksum { .. })) {
        // Virtual PC before 2004 left the last byte out.
        let mut bytes = [0; 512];
        let stored = usize_from(file_len.saturating_sub(tail.at.get())).min(bytes.len());
        storage.read_exact_at(&mut bytes[..stored], tail.at)?;
        return Ok(stray(Footer::resealed(&bytes), tail.at, State::Damaged));
    }
    if tail.footer != Err(FooterFault::NoFooter) || is_dynamic(storage, file_len)? {
        return Ok(None);
    }
    if let Some(found) = in_front_of_end(storage, file_len)? {
        return Ok(Some(found));
    }
    let rest = FileRange::between(
        FileOffset::new(round_down(file_len, SECTOR_SIZE)),
        FileOffset::new(file_len),
    );
    let mut remains = vec![0; usize_from(rest.len)];
    storage.read_exact_at(&mut remains, rest.start)?;
    // All of it was cut off, or all but its first bytes.
    let is_remains = remains.starts_with(COOKIE) || COOKIE.starts_with(&remains);
    let is_disk = rest.start.get() > 0 && rest.start.get() <= MAX_DISK_LEN;
    Ok((is_remains && is_disk).then(|| Stray {
        footer: fixed_footer(rest.start.get()),
        at: rest.start,
        state: State::Missing,
    }))
}

/// A footer of a fixed disk that ends where it lies.
fn stray(footer: Result<Footer, FooterFault>, at: FileOffset, state: State) -> Option<Stray> {
    let footer = footer.ok()?;
    let fits = footer.disk_type() == DiskType::Fixed && footer.disk_len() == at.get();
    fits.then_some(Stray { footer, at, state })
}

/// Whether the file starts like a dynamic disk's.
fn is_dynamic(storage: &dyn Storage, file_len: u64) -> io::Result<bool> {
    if file_len < FOOTER_LEN.saturating_mul(2) {
        return Ok(false);
    }
    let copy: [u8; 512] = read_array(storage, FileOffset::new(0))?;
    let header: [u8; 512] = read_array(storage, FileOffset::new(FOOTER_LEN))?;
    let is_copy = copy.starts_with(COOKIE) && copy.get(60..64) != Some(&2_u32.to_be_bytes());
    Ok(is_copy || header.starts_with(b"cxsparse"))
}

/// The last footer that lies near the end, whole or without its last bytes.
fn in_front_of_end(storage: &dyn Storage, file_len: u64) -> io::Result<Option<Stray>> {
    let first = round_down(
        file_len.saturating_sub(LOOK.saturating_add(FOOTER_LEN)),
        SECTOR_SIZE,
    );
    let mut bytes = vec![0; usize_from(file_len.saturating_sub(first))];
    storage.read_exact_at(&mut bytes, FileOffset::new(first))?;
    let places: Vec<_> = (first..file_len)
        .step_by(512)
        .zip(bytes.chunks(512))
        .collect();
    for (at, chunk) in places.into_iter().rev() {
        if !chunk.starts_with(COOKIE) {
            continue;
        }
        let mut sector = [0; 512];
        if let Some(start) = sector.get_mut(..chunk.len()) {
            start.copy_from_slice(chunk);
        }
        let end = at.saturating_add(FOOTER_LEN);
        let behind = usize_from(end.saturating_sub(first).min(u64_from(bytes.len())));
        let behind = bytes.get(behind..).unwrap_or_default();
        let state = match behind {
            [] => State::Damaged,
            some => State::Followed {
                len: u64_from(some.len()),
                has_data: some.iter().any(|byte| *byte != 0),
            },
        };
        let found = stray(Footer::parse(&sector), FileOffset::new(at), state);
        if found.is_some() {
            return Ok(found);
        }
    }
    Ok(None)
}

impl Stray {
    /// Puts it where it belongs, durably: a single sector is written, or the file is cut behind it.
    ///
    /// # Errors
    /// Where the host fails; what was there is then there still.
    pub(crate) fn put(&self, storage: &dyn Storage) -> io::Result<()> {
        storage.sync()?;
        match self.state {
            State::Followed { .. } => storage.set_len(self.at.plus(FOOTER_LEN).get())?,
            State::Damaged | State::Missing => {
                storage.write_all_at(&self.footer.to_bytes(), self.at)?;
            }
        }
        storage.sync()
    }
}
