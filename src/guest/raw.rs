//! On-disk structures and checksums as XFS and btrfs have them.

use zerocopy::FromBytes;

use super::Trouble;

/// The structure that begins at `at` of `bytes`.
///
/// # Errors
/// [`Trouble::Skip`] where `bytes` ends before it.
pub(super) fn structure<T: FromBytes>(bytes: &[u8], at: usize) -> Result<T, Trouble> {
    (bytes.get(at..))
        .and_then(|rest| T::read_from_prefix(rest).ok())
        .map(|(found, _)| found)
        .ok_or_else(|| Trouble::skip("has a structure that is cut off"))
}

/// The CRC-32C of `bytes` with the four at `field`, where it stands itself, as zeros.
///
/// # Panics
/// Where `field` does not lie in `bytes`.
pub(super) fn crc32c_without(bytes: &[u8], field: usize) -> u32 {
    let crc = crc32c::crc32c(&bytes[..field]);
    let crc = crc32c::crc32c_append(crc, &[0; 4]);
    crc32c::crc32c_append(crc, &bytes[field + 4..])
}
