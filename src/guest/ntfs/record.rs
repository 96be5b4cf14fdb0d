//! Records of $MFT and their attributes.
//!
//! A record is written sector by sector. The last two bytes of each 512 are replaced by a number
//! that all of them share and that changes with each write, and are kept beside it in the record's
//! head: a record that was written in part shows.

use zerocopy::byteorder::little_endian::{I64, U16, U32, U64};
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use super::runs::Mapping;
use super::{Trouble, damaged};
use crate::units::usize_from_u32;

/// Bytes of which the last two are replaced, whatever the sector size.
const STRIDE: usize = 512;
const IN_USE: u16 = 1;
/// `mft_record_number` exists in records whose fixups begin behind it.
const NUMBERED_FROM: u16 = 0x30;
/// The type that ends the attributes of a record.
const END: u32 = 0xffff_ffff;

/// Types of attributes. [ntfs-3g `layout.h`, `ATTR_TYPES`]
pub(super) mod kind {
    /// Where the attributes lie that have left the base record.
    pub(in super::super) const ATTRIBUTE_LIST: u32 = 0x20;
    /// A name of the file, and the folder that has it.
    pub(in super::super) const FILE_NAME: u32 = 0x30;
    /// Version and flags, in $Volume.
    pub(in super::super) const VOLUME_INFORMATION: u32 = 0x70;
    /// A stream of a file.
    pub(in super::super) const DATA: u32 = 0x80;
    /// The root of a directory's tree.
    pub(in super::super) const INDEX_ROOT: u32 = 0x90;
    /// The other nodes of it.
    pub(in super::super) const INDEX_ALLOCATION: u32 = 0xa0;
    /// Of $MFT: which records are in use.
    pub(in super::super) const BITMAP: u32 = 0xb0;
}

/// The head of what is protected by fixups. [ntfs-3g `layout.h`, `NTFS_RECORD`]
#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawProtected {
    /// 0x00: what it is.
    signature: [u8; 4],
    /// 0x04: where the number lies, and behind it what it replaced.
    usa_offset: U16,
    /// 0x06: how many 16-bit words that are, the number included.
    usa_count: U16,
}

/// Puts back what the fixups replaced. False where the parts do not belong together, or nothing is
/// protected.
pub(super) fn undo_fixups(bytes: &mut [u8]) -> bool {
    let Ok((raw, _)) = RawProtected::ref_from_prefix(bytes) else {
        return false;
    };
    let start = usize::from(raw.usa_offset.get());
    let count = usize::from(raw.usa_count.get());
    let strides = bytes.len() / STRIDE;
    let end = start + 2 * count;
    let fits = start >= size_of::<RawProtected>() && end <= STRIDE - 2;
    if !fits || count != strides + 1 || !bytes.len().is_multiple_of(STRIDE) {
        return false;
    }
    let number = [bytes[start], bytes[start + 1]];
    for stride in 1..count {
        let at = stride * STRIDE - 2;
        if bytes[at..at + 2] != number {
            return false;
        }
        bytes.copy_within(start + 2 * stride..start + 2 * stride + 2, at);
    }
    true
}

/// The head of a record. [ntfs-3g `layout.h`, `MFT_RECORD`]
#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawRecord {
    /// 0x00: `FILE`, or `BAAD` where chkdsk found it torn.
    signature: [u8; 4],
    /// 0x04: see [`RawProtected`].
    usa_offset: U16,
    /// 0x06: see [`RawProtected`].
    usa_count: U16,
    /// 0x08: of the last change that was logged.
    log_sequence_number: U64,
    /// 0x10: grows each time the record is used for another file; the high word of references.
    sequence_number: U16,
    /// 0x12: names of the file.
    link_count: U16,
    /// 0x14: where the first attribute lies.
    attrs_offset: U16,
    /// 0x16: bit 0 in use, bit 1 a directory.
    flags: U16,
    /// 0x18: where the attributes end.
    bytes_in_use: U32,
    /// 0x1c: the record's size.
    bytes_allocated: U32,
    /// 0x20: the base record that this one extends; 0 in a base record.
    base_mft_record: U64,
    /// 0x28: the number for the next attribute.
    next_attr_instance: U16,
    /// 0x2a: padding.
    reserved: U16,
    /// 0x2c: its own number, since NTFS 3.1.
    mft_record_number: U32,
}

const _: () = assert!(size_of::<RawRecord>() == 0x30);

/// A place in $MFT, its fixups undone.
#[derive(Debug)]
pub(super) enum Slot<'a> {
    /// Never was a record.
    Blank,
    /// Was a record.
    Free,
    /// A record in use.
    InUse(Record<'a>),
}

/// Decodes the record numbered `number` from its bytes on the disk.
pub(super) fn decode(bytes: &mut [u8], number: u64) -> Result<Slot<'_>, Trouble> {
    match bytes.get(..4) {
        Some(b"FILE") => {}
        Some(b"BAAD") => return Err(damaged(format!("record {number} was marked as torn"))),
        _ => return Ok(Slot::Blank),
    }
    if !undo_fixups(bytes) {
        return Err(damaged(format!("record {number} was written in part")));
    }
    let record = Record::parse(bytes, number)
        .ok_or_else(|| damaged(format!("the head of record {number} makes no sense")))?;
    Ok(match record {
        Some(record) => Slot::InUse(record),
        None => Slot::Free,
    })
}

/// A reference to a record: its number and the sequence number that it must have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Reference(u64);

impl Reference {
    pub(super) fn new(packed: u64) -> Self {
        Self(packed)
    }

    /// As it lies on the disk.
    pub(super) fn packed(self) -> u64 {
        self.0
    }

    /// The record's number.
    pub(super) fn record(self) -> u64 {
        self.0 & 0xffff_ffff_ffff
    }
}

/// A record in use.
#[derive(Clone, Copy, Debug)]
pub(super) struct Record<'a> {
    /// Its own reference.
    pub(super) reference: Reference,
    /// The record that it extends; `None` in a base record.
    pub(super) base: Option<Reference>,
    number: u64,
    /// What of it is used.
    bytes: &'a [u8],
    /// Where in it the attributes begin.
    attributes_at: usize,
}

impl<'a> Record<'a> {
    /// The record in `bytes`, the fixups undone; `Some(None)` for one that is not in use.
    #[expect(clippy::option_option, reason = "wrong, unused, used")]
    fn parse(bytes: &'a [u8], number: u64) -> Option<Option<Self>> {
        let (raw, _) = RawRecord::ref_from_prefix(bytes).ok()?;
        if raw.flags.get() & IN_USE == 0 {
            return Some(None);
        }
        let start = usize::from(raw.attrs_offset.get());
        let end = usize_from_u32(raw.bytes_in_use.get());
        let numbered = raw.usa_offset.get() >= NUMBERED_FROM;
        let sensible = usize_from_u32(raw.bytes_allocated.get()) == bytes.len()
            && (!numbered || u64::from(raw.mft_record_number.get()) == number);
        let bytes = bytes.get(..end).filter(|_| sensible && start <= end)?;
        let base = raw.base_mft_record.get();
        Some(Some(Self {
            reference: Reference(number | u64::from(raw.sequence_number.get()) << 48),
            base: (base != 0).then_some(Reference(base)),
            number,
            bytes,
            attributes_at: start,
        }))
    }

    /// Whether the two hold the same.
    pub(super) fn same(&self, other: &Record<'_>) -> bool {
        self.bytes == other.bytes
    }

    /// Its attributes, in order.
    pub(super) fn attributes(
        &self,
    ) -> impl Iterator<Item = Result<Attribute<'a>, Trouble>> + use<'a> {
        let (mut rest, number) = (self.bytes.get(self.attributes_at..), self.number);
        std::iter::from_fn(move || {
            let bytes = rest?;
            if bytes.starts_with(&END.to_le_bytes()) {
                return None;
            }
            match Attribute::parse(bytes) {
                Some((attribute, behind)) => {
                    rest = Some(behind);
                    Some(Ok(attribute))
                }
                None => {
                    rest = None;
                    Some(Err(damaged(format!(
                        "an attribute of record {number} makes no sense"
                    ))))
                }
            }
        })
    }

    /// The first attribute of this kind and name.
    pub(super) fn find(&self, kind: u32, name: &[u8]) -> Result<Option<Attribute<'a>>, Trouble> {
        for attribute in self.attributes() {
            let attribute = attribute?;
            if attribute.kind == kind && attribute.name == name {
                return Ok(Some(attribute));
            }
        }
        Ok(None)
    }
}

/// The head of an attribute. [ntfs-3g `layout.h`, `ATTR_RECORD`]
#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawAttribute {
    /// 0x00: see [`kind`].
    kind: U32,
    /// 0x04: bytes of the attribute.
    length: U32,
    /// 0x08: 1 where the value lies in clusters.
    non_resident: u8,
    /// 0x09: UTF-16 units of the name.
    name_length: u8,
    /// 0x0a: where the name lies.
    name_offset: U16,
    /// 0x0c: 0x00ff compressed, 0x4000 encrypted, 0x8000 sparse.
    flags: U16,
    /// 0x0e: distinguishes the attributes of a record.
    instance: U16,
}

/// What follows it in one whose value lies in the record.
#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawResident {
    /// 0x10: bytes of the value.
    value_length: U32,
    /// 0x14: where the value lies.
    value_offset: U16,
}

/// What follows it in one whose value lies in clusters.
#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawNonResident {
    /// 0x10: the first cluster of the value that this attribute maps.
    lowest_vcn: I64,
    /// 0x18: the last; -1 where there is none.
    highest_vcn: I64,
    /// 0x20: where the runs lie.
    mapping_pairs_offset: U16,
    /// 0x22: two to the power of it is the clusters of a compression unit.
    compression_unit: u8,
    /// 0x23: 0.
    reserved: [u8; 5],
    /// 0x28: bytes of all clusters of the value, holes included. As all further ones only where
    /// `lowest_vcn` is 0.
    allocated_size: U64,
    /// 0x30: bytes of the value.
    data_size: U64,
    /// 0x38: bytes of it that were ever written; the others read as zeros.
    initialized_size: U64,
}

const _: () = assert!(size_of::<RawAttribute>() + size_of::<RawNonResident>() == 0x40);

/// Flags of an attribute whose bytes do not lie in its clusters as they are.
const NOT_PLAIN: u16 = 0x40ff;

/// An attribute.
#[derive(Clone, Copy, Debug)]
pub(super) struct Attribute<'a> {
    /// See [`kind`].
    pub(super) kind: u32,
    /// The name in UTF-16LE; empty for none.
    pub(super) name: &'a [u8],
    /// Distinguishes the attributes of a record.
    pub(super) instance: u16,
    /// Neither compressed nor encrypted.
    pub(super) plain: bool,
    /// Where the value lies.
    pub(super) value: Value<'a>,
}

/// Where an attribute's value lies.
#[derive(Clone, Copy, Debug)]
pub(super) enum Value<'a> {
    /// Here.
    Resident(&'a [u8]),
    /// In clusters.
    NonResident(Mapping<'a>),
}

impl<'a> Attribute<'a> {
    /// The attribute that `bytes` begin with, and the bytes behind it.
    fn parse(bytes: &'a [u8]) -> Option<(Self, &'a [u8])> {
        let (raw, _) = RawAttribute::ref_from_prefix(bytes).ok()?;
        let length = usize_from_u32(raw.length.get());
        let (all, behind) = bytes.split_at_checked(length)?;
        let body = all.get(size_of::<RawAttribute>()..)?;
        let name_at = usize::from(raw.name_offset.get());
        let name = match usize::from(raw.name_length) {
            0 => &[],
            units => all.get(name_at..name_at + 2 * units)?,
        };
        let value = match raw.non_resident {
            0 => {
                let (resident, _) = RawResident::ref_from_prefix(body).ok()?;
                let at = usize::from(resident.value_offset.get());
                let end = at.checked_add(usize_from_u32(resident.value_length.get()))?;
                Value::Resident(all.get(at..end)?)
            }
            1 => Value::NonResident(mapping(all, body)?),
            _ => return None,
        };
        let attribute = Self {
            kind: raw.kind.get(),
            name,
            instance: raw.instance.get(),
            plain: raw.flags.get() & NOT_PLAIN == 0,
            value,
        };
        Some((attribute, behind))
    }

    /// The first cluster of the value that this attribute maps: 0 in all but extents.
    pub(super) fn lowest_vcn(&self) -> u64 {
        match self.value {
            Value::Resident(_) => 0,
            Value::NonResident(mapping) => mapping.lowest_vcn,
        }
    }
}

fn mapping<'a>(all: &'a [u8], body: &'a [u8]) -> Option<Mapping<'a>> {
    let (raw, _) = RawNonResident::ref_from_prefix(body).ok()?;
    let lowest_vcn = u64::try_from(raw.lowest_vcn.get()).ok()?;
    let behind = u64::try_from(raw.highest_vcn.get().checked_add(1)?).ok()?;
    let pairs_at = usize::from(raw.mapping_pairs_offset.get());
    if pairs_at < size_of::<RawAttribute>() + size_of::<RawNonResident>() {
        return None;
    }
    Some(Mapping {
        lowest_vcn,
        clusters: behind.checked_sub(lowest_vcn)?,
        allocated_size: raw.allocated_size.get(),
        data_size: raw.data_size.get(),
        initialized_size: raw.initialized_size.get(),
        pairs: all.get(pairs_at..)?,
    })
}
