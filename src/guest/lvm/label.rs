//! What a physical volume says of itself: its label, and where its metadata lies.
//! [lvm2 lib/label/label.h, lib/format_text/layout.h]

use std::ops::Range;

use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::guest::Trouble;
use crate::guest::view::View;
use crate::units::{u64_from, usize_from};

/// Bytes in a sector of LVM2, whatever the disk has.
pub(super) const SECTOR: u64 = 512;
/// Sectors that may hold the label.
const LABEL_SECTORS: u64 = 4;
/// What CRCs start with.
const INITIAL_CRC: u32 = 0xf597_a6cf;
/// The most bytes that are read of a description: 100 times what most need.
const MAX_TEXT: u64 = 8 << 20;

/// The label as it lies in its sector.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawLabel {
    /// 0: `LABELONE`.
    id: [u8; 8],
    /// 8: which sector this is.
    sector: U64,
    /// 16: CRC of the rest of the sector.
    crc: U32,
    /// 20: where in the sector the header lies.
    offset: U32,
    /// 24: `LVM2 001`.
    kind: [u8; 8],
}

/// Where the checksum of a label's sector starts.
const LABEL_CRC_FROM: usize = 20;

/// The header, without the lists of areas that follow it.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawHeader {
    /// 0: which physical volume it is.
    uuid: [u8; 32],
    /// 32: bytes of the device when it was made.
    device_size: U64,
}

/// An area of the device. Both 0: the end of a list of them.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawArea {
    /// 0: where it starts, in bytes.
    offset: U64,
    /// 8: its bytes; 0: up to the end.
    size: U64,
}

/// What newer versions put behind the lists, and the list of areas for boot loaders behind that.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawExtension {
    /// 0: 1, or 2 if `flags` count; 0: there is none.
    version: U32,
    /// 4: 1: the volume is in a group.
    flags: U32,
}

/// The first sector of an area of metadata.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawMetadataHeader {
    /// 0: CRC of the rest of the sector.
    crc: U32,
    /// 4: a magic number.
    magic: [u8; 16],
    /// 20: 1.
    version: U32,
    /// 24: where the area starts, on the device.
    start: U64,
    /// 32: its bytes.
    size: U64,
    /// 40: the description that holds.
    committed: RawLocation,
    /// 64: the one that is about to be put in its place.
    prepared: RawLocation,
    /// 88: unused.
    rest: [u8; 424],
}

/// Where a description lies in its area.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawLocation {
    /// 0: where it starts, in bytes of the area.
    offset: U64,
    /// 8: its bytes. Behind the area's end it goes on behind the area's first sector.
    size: U64,
    /// 16: its CRC.
    crc: U32,
    /// 20: 1: to be ignored.
    flags: U32,
}

const _: () = assert!(size_of::<RawLabel>() == 32);
const _: () = assert!(u64_from(size_of::<RawMetadataHeader>()) == SECTOR);

const METADATA_MAGIC: [u8; 16] = *b" LVM2 x[5A%r0N*>";
const METADATA_VERSION: u32 = 1;
const IGNORED: u32 = 1;

/// The CRC-32 of LVM2: the usual polynomial, another start, and not inverted in the end.
pub(super) fn crc(bytes: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new_with_initial(!INITIAL_CRC);
    hasher.update(bytes);
    !hasher.finalize()
}

/// A physical volume.
#[derive(Debug)]
pub(super) struct PhysicalVolume {
    /// Which one it is: 32 letters and digits.
    pub(super) uuid: String,
    /// Bytes of the device when it was made.
    pub(super) device_size: u64,
    /// Where its extents start, in bytes.
    pub(super) data_start: u64,
    /// What is not extents: label, metadata, space for boot loaders.
    pub(super) reserved: Vec<Range<u64>>,
    /// The description of its volume group.
    pub(super) text: Vec<u8>,
}

/// Reads what a part says of itself that has the mark of LVM2.
///
/// # Errors
/// [`Trouble::Skip`] where anything of it is in doubt; [`Trouble::Io`].
pub(super) fn read(part: &View<'_>) -> Result<PhysicalVolume, Trouble> {
    let sector = label(part)?;
    let (label, _) = RawLabel::read_from_prefix(&sector).map_err(|_| damaged())?;
    let offset = usize::try_from(label.offset.get()).map_err(|_| damaged())?;
    let rest = sector.get(offset..).unwrap_or_default();
    let (header, mut rest) = RawHeader::read_from_prefix(rest).map_err(|_| damaged())?;
    let data = areas(&mut rest)?;
    let metadata = areas(&mut rest)?;
    let boot = boot_areas(rest)?;
    let &[RawArea { offset, .. }] = &data[..] else {
        return Err(Trouble::skip(format!(
            "has {} areas of data, not one",
            data.len()
        )));
    };
    let mut reserved = Vec::new();
    reserved.push(0..LABEL_SECTORS * SECTOR);
    for area in metadata.iter().chain(&boot) {
        let (start, size) = (area.offset.get(), area.size.get());
        let end = start.checked_add(size).filter(|end| *end <= part.len());
        reserved.push(start..end.ok_or_else(damaged)?);
    }
    Ok(PhysicalVolume {
        uuid: String::from_utf8_lossy(&header.uuid).into_owned(),
        device_size: header.device_size.get(),
        data_start: offset.get(),
        reserved,
        text: text(part, &metadata)?,
    })
}

fn damaged() -> Trouble {
    Trouble::skip("has a label that is damaged")
}

/// The sector with the one good label.
fn label(part: &View<'_>) -> Result<Vec<u8>, Trouble> {
    let mut found = None;
    for number in 0..LABEL_SECTORS {
        let bytes = part.read(number * SECTOR, SECTOR)?;
        let (label, _) = RawLabel::read_from_prefix(&bytes).map_err(|_| damaged())?;
        if label.id != *b"LABELONE" {
            continue;
        }
        let good = label.kind == *b"LVM2 001"
            && label.sector.get() == number
            && label.crc.get() == crc(&bytes[LABEL_CRC_FROM..]);
        if !good || found.is_some() {
            return Err(damaged());
        }
        found = Some(bytes);
    }
    found.ok_or_else(damaged)
}

/// The list of areas that `rest` begins with, which it is cut off from.
fn areas(rest: &mut &[u8]) -> Result<Vec<RawArea>, Trouble> {
    let mut found = Vec::new();
    loop {
        let (area, behind) = RawArea::read_from_prefix(rest).map_err(|_| damaged())?;
        *rest = behind;
        if area.offset.get() == 0 {
            return Ok(found);
        }
        found.push(area);
    }
}

/// The space for boot loaders.
fn boot_areas(rest: &[u8]) -> Result<Vec<RawArea>, Trouble> {
    let Ok((extension, mut rest)) = RawExtension::read_from_prefix(rest) else {
        return Ok(Vec::new());
    };
    match extension.version.get() {
        0 => return Ok(Vec::new()),
        1 | 2 => {}
        _ => return Err(Trouble::skip("has a label of a newer version")),
    }
    areas(&mut rest)
}

/// The description of the volume group that all areas of metadata agree on.
fn text(part: &View<'_>, areas: &[RawArea]) -> Result<Vec<u8>, Trouble> {
    let mut found: Option<Vec<u8>> = None;
    for area in areas {
        let Some(text) = copy(part, area)? else {
            continue;
        };
        if found.as_ref().is_some_and(|found| *found != text) {
            return Err(Trouble::skip(
                "has two copies of its metadata that disagree: repair it with vgck --updatemetadata",
            ));
        }
        found = Some(text);
    }
    found.ok_or_else(|| Trouble::skip("says nothing of its volume group, if it is in one"))
}

/// The description in one area, if it has one.
fn copy(part: &View<'_>, area: &RawArea) -> Result<Option<Vec<u8>>, Trouble> {
    let bad = |what: &str| Trouble::skip(format!("has metadata {what}: repair it with vgck"));
    let (start, size) = (area.offset.get(), area.size.get());
    let sector = part.read(start, SECTOR)?;
    let (header, _) =
        RawMetadataHeader::read_from_prefix(&sector).map_err(|_| bad("without a header"))?;
    let good = header.crc.get() == crc(&sector[4..])
        && header.magic == METADATA_MAGIC
        && header.version.get() == METADATA_VERSION
        && header.start.get() == start
        && header.size.get() == size;
    if !good {
        return Err(bad("with a header that is damaged"));
    }
    if header.prepared.offset.get() != 0 || header.prepared.size.get() != 0 {
        return Err(Trouble::skip(
            "was being changed: let its own system finish or undo that",
        ));
    }
    let place = header.committed;
    if place.offset.get() == 0 || place.flags.get() & IGNORED != 0 {
        return Ok(None);
    }
    let (offset, len) = (place.offset.get(), place.size.get());
    // Checked against the part when the label was read.
    let fits = offset >= SECTOR && offset < size && len <= size.saturating_sub(SECTOR);
    if !fits || len > MAX_TEXT {
        return Err(bad("in a place that cannot be"));
    }
    let first = len.min(size - offset);
    let mut text = part.read(start + offset, first)?;
    text.extend(part.read(start + SECTOR, len - first)?);
    if crc(&text) != place.crc.get() {
        return Err(bad("with a wrong checksum"));
    }
    text.truncate(usize_from(len));
    Ok(Some(text))
}
