//! The two headers, and how they are changed: always the one that is not current, so that a good one
//! is there at any time; and always both, so that none is left that tells an old story.

use std::io;

use crate::error::FormatError;
use crate::format::Format;
use crate::format::vhdx::{CurrentHeader, Header, IDENTIFIER, MIB, agreed_header, choose_header};
use crate::image::{LayoutError, foreign, read_array};
use crate::storage::Storage;
use crate::units::u64_from;

/// Updates of a header that one file is good for in our hands: numbers never run out.
const SEQUENCE_RESERVE: u64 = 1 << 40;

/// Reads both headers and chooses the current one. Where both checksums are wrong, it may be what the two
/// agree in ([`CurrentHeader::doubt`]): such a file is read, and written by `check --repair` alone.
///
/// # Errors
/// Where there is none, or the host cannot read.
pub(crate) fn read_header(storage: &dyn Storage) -> Result<CurrentHeader, LayoutError> {
    let len = storage.len()?;
    check_signature(storage, len)?;
    if len < MIB {
        return Err(FormatError::corrupt(
            "file",
            format!("{len} bytes"),
            "at least 1 MiB, for the headers: the file was cut",
        )
        .into());
    }
    let read = |slot| read_array(storage, CurrentHeader::offset_of(slot));
    let bytes = [read(0)?, read(1)?];
    let [first, second] = [0, 1].map(|slot: usize| Header::parse(&bytes[slot]));
    Ok(match (first, second) {
        (Err(_), Err(_)) => agreed_header(&bytes)?,
        (first, second) => choose_header(first, second)?,
    })
}

/// That the file, of this length, begins as a VHDX does. What does not is something else, however short
/// it is.
///
/// # Errors
/// What it is instead, or the host's.
pub(super) fn check_signature(storage: &dyn Storage, len: u64) -> Result<(), LayoutError> {
    const SIGNATURE: &[u8; 8] = b"vhdxfile";
    if len >= u64_from(SIGNATURE.len()) && read_array(storage, IDENTIFIER)? == *SIGNATURE {
        return Ok(());
    }
    Err(foreign::none(storage, Format::Vhdx).into())
}

/// Why the headers cannot be changed, if so.
pub(super) fn not_updatable(current: &CurrentHeader) -> Option<FormatError> {
    let number = current.header.sequence_number;
    (number > u64::MAX.saturating_sub(SEQUENCE_RESERVE)).then(|| {
        FormatError::corrupt(
            "header",
            format!("sequence number {number}"),
            "one that leaves room for a larger one",
        )
    })
}

/// Writes the header that follows `current`, with `change`, to the other place. It is the current
/// one from then on; durably with the next sync.
///
/// # Errors
/// The host's. Which of the two is current is then unknown.
pub(super) fn write_next(
    storage: &dyn Storage,
    current: &mut CurrentHeader,
    change: &dyn Fn(&mut Header),
) -> io::Result<()> {
    let mut next = current.header.clone();
    next.sequence_number = next.sequence_number.saturating_add(1);
    change(&mut next);
    let slot = usize::from(current.slot == 0);
    storage.write_all_at(&next.to_bytes(), CurrentHeader::offset_of(slot))?;
    let old = std::mem::replace(&mut current.header, next);
    current.other = Ok(old);
    current.slot = slot;
    current.doubt = None;
    Ok(())
}
