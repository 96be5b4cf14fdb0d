//! Attribute lists: of a file whose attributes do not fit in one record, where each of them lies.

use std::hash::Hasher;

use twox_hash::XxHash3_64;
use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use super::boot::Geometry;
use super::record::{Attribute, Record, Reference, kind};
use super::stream::Stream;
use super::{Trouble, View, damaged};

/// The longest list. [ntfs-3g `volume.c`, `ntfs_mft_load`]
const MAX_LEN: u64 = 0x4_0000;

/// The fixed part of an entry. [ntfs-3g `layout.h`, `ATTR_LIST_ENTRY`]
#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawEntry {
    /// 0x00: of the attribute.
    kind: U32,
    /// 0x04: bytes of the entry.
    length: U16,
    /// 0x06: UTF-16 units of the attribute's name.
    name_length: u8,
    /// 0x07: where the name lies.
    name_offset: u8,
    /// 0x08: of the attribute.
    lowest_vcn: U64,
    /// 0x10: the record that holds it.
    mft_reference: U64,
    /// 0x18: of the attribute.
    instance: U16,
}

/// What an attribute list says of an attribute.
#[derive(Clone, Copy, Debug)]
pub(super) struct Entry<'a> {
    pub(super) kind: u32,
    pub(super) name: &'a [u8],
    pub(super) lowest_vcn: u64,
    /// The record that holds the attribute.
    pub(super) holder: Reference,
    instance: u16,
}

/// The attribute list of a base record, as it lies on the disk; `None` where it has none.
pub(super) fn read(
    view: &View<'_>,
    geometry: &Geometry,
    base: &Record<'_>,
) -> Result<Option<Vec<u8>>, Trouble> {
    let Some(attribute) = base.find(kind::ATTRIBUTE_LIST, &[])? else {
        return Ok(None);
    };
    let stream = Stream::begin(base.reference.record(), &attribute, geometry)?;
    if stream.is_sparse() {
        return Err(damaged("an attribute list has a hole"));
    }
    stream.read_all(view, MAX_LEN).map(Some)
}

/// The entries of an attribute list. Ends with the first trouble.
pub(super) fn entries(list: &[u8]) -> impl Iterator<Item = Result<Entry<'_>, Trouble>> {
    let mut rest = Some(list);
    std::iter::from_fn(move || {
        let bytes = rest.take().filter(|bytes| !bytes.is_empty())?;
        let Some((entry, behind)) = entry(bytes) else {
            return Some(Err(damaged("an attribute list makes no sense")));
        };
        rest = Some(behind);
        Some(Ok(entry))
    })
}

fn entry(bytes: &[u8]) -> Option<(Entry<'_>, &[u8])> {
    let (raw, _) = RawEntry::ref_from_prefix(bytes).ok()?;
    let (all, behind) = bytes.split_at_checked(usize::from(raw.length.get()))?;
    if all.len() < size_of::<RawEntry>() {
        return None;
    }
    let name_at = usize::from(raw.name_offset);
    let name = match usize::from(raw.name_length) {
        0 => &[],
        units => all.get(name_at..name_at + 2 * units)?,
    };
    let entry = Entry {
        kind: raw.kind.get(),
        name,
        lowest_vcn: raw.lowest_vcn.get(),
        holder: Reference::new(raw.mft_reference.get()),
        instance: raw.instance.get(),
    };
    Some((entry, behind))
}

/// Whether the attribute lists of a volume name exactly the attributes that there are. A sum of
/// hashes on either side takes no memory, however many there are.
#[derive(Debug, Default)]
pub(super) struct Balance(u64);

impl Balance {
    /// A list of `base` names this attribute.
    pub(super) fn named(&mut self, base: Reference, entry: &Entry<'_>) {
        let what = (entry.kind, entry.name, entry.lowest_vcn, entry.instance);
        self.0 = self.0.wrapping_add(hash(base, entry.holder, what));
    }

    /// This attribute of the file of `base` lies in the record `holder`.
    pub(super) fn found(&mut self, base: Reference, holder: Reference, attribute: &Attribute<'_>) {
        let (kind, name, instance) = (attribute.kind, attribute.name, attribute.instance);
        let what = (kind, name, attribute.lowest_vcn(), instance);
        self.0 = self.0.wrapping_sub(hash(base, holder, what));
    }

    /// Whether none was named that was not found, and none found that was not named.
    pub(super) fn is_even(&self) -> bool {
        self.0 == 0
    }
}

fn hash(
    base: Reference,
    holder: Reference,
    (kind, name, lowest_vcn, instance): (u32, &[u8], u64, u16),
) -> u64 {
    let mut hasher = XxHash3_64::default();
    hasher.write(&base.packed().to_le_bytes());
    hasher.write(&holder.packed().to_le_bytes());
    hasher.write(&kind.to_le_bytes());
    hasher.write(name);
    hasher.write(&lowest_vcn.to_le_bytes());
    // Lists may say 0 for all parts but the first. [ntfs-3g `layout.h`, `ATTR_LIST_ENTRY`]
    let instance = if lowest_vcn == 0 { instance } else { 0 };
    hasher.write(&instance.to_le_bytes());
    hasher.finish()
}
