//! Whether the volume has shadow copies: restore points and previous versions.
//!
//! A shadow copy keeps what was overwritten since, in files. What was not it reads from the volume,
//! and that may be what was a file then and is free now. Which free clusters that are, only formats
//! tell that nobody has published, so all are kept.

use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use super::record::{Record, Value, kind};
use super::{Trouble, View};
use crate::units::u64_from;

/// Where the boot area tells of shadow copies. [libvshadow, "Volume Shadow Snapshot (VSS) format"]
const HEADER_AT: u64 = 0x1e00;
/// `{3808876b-c176-4e48-b7ae-04046e6cc752}`.
const IDENTIFIER: [u8; 16] = [
    0x6b, 0x87, 0x08, 0x38, 0x76, 0xc1, 0x48, 0x4e, 0xb7, 0xae, 0x04, 0x04, 0x6e, 0x6c, 0xc7, 0x52,
];
/// How the name of the file ends that holds a shadow copy; before it stands another such number.
const SUFFIX: &[u8] = b"{3808876b-c176-4e48-b7ae-04046e6cc752}";

/// The header.
#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawHeader {
    /// 0x00: see [`IDENTIFIER`].
    identifier: [u8; 16],
    /// 0x10: 1, or 2 since Windows 8.
    version: U32,
    /// 0x14: 1.
    record_type: U32,
    /// 0x18: where the header lies, and what nobody knows.
    places: [U64; 3],
    /// 0x30: where the catalog lies; 0 for none, as where there are no shadow copies.
    catalog: U64,
    /// 0x38: the most bytes to use.
    maximum: U64,
    /// 0x40: this volume.
    volume: [u8; 16],
    /// 0x50: the volume that holds its shadow copies.
    storage: [u8; 16],
}

const _: () = assert!(size_of::<RawHeader>() == 0x60);

/// Checks that the boot area tells of no shadow copies.
pub(super) fn check_header(view: &View<'_>) -> Result<(), Trouble> {
    let bytes = view.read(HEADER_AT, u64_from(size_of::<RawHeader>()))?;
    let Ok((header, _)) = RawHeader::ref_from_prefix(&bytes) else {
        return Ok(());
    };
    let elsewhere = header.storage != [0; 16] && header.storage != header.volume;
    if header.identifier == IDENTIFIER && (header.catalog.get() != 0 || elsewhere) {
        return Err(found());
    }
    Ok(())
}

/// Checks that a record is not that of a file with a shadow copy.
pub(super) fn check_record(record: &Record<'_>) -> Result<(), Trouble> {
    for attribute in record.attributes() {
        let attribute = attribute?;
        if attribute.kind == kind::FILE_NAME
            && let Value::Resident(value) = attribute.value
            && value.get(NAME_AT..).is_some_and(is_shadow)
        {
            return Err(found());
        }
    }
    Ok(())
}

/// Where the value of a FILE_NAME has the name. [ntfs-3g `layout.h`, `FILE_NAME_ATTR`]
const NAME_AT: usize = 0x42;

/// Whether a name in UTF-16LE is that of a file with a shadow copy.
fn is_shadow(name: &[u8]) -> bool {
    let len = 2 * SUFFIX.len();
    let Some((first, last)) = name.split_at_checked(len) else {
        return false;
    };
    let mut units = last.chunks_exact(2);
    last.len() == len
        && first.starts_with(b"{\0")
        && SUFFIX.iter().all(|letter| {
            (units.next())
                .is_some_and(|unit| unit[1] == 0 && unit[0].to_ascii_lowercase() == *letter)
        })
}

fn found() -> Trouble {
    Trouble::skip(
        "has shadow copies (restore points), which may need what is free: delete them in Windows \
         first (vssadmin delete shadows)",
    )
}
