//! $MFT: the table of all records, itself a file whose record is the first.

use super::boot::Geometry;
use super::lists::{self, Entry};
use super::record::{Attribute, Record, Slot, Value, decode, kind};
use super::stream::Stream;
use super::{Trouble, View, damaged};
use crate::units::usize_from;

/// Numbers of records that are always the same.
pub(super) mod number {
    /// The table itself.
    pub(in super::super) const MFT: u64 = 0;
    /// A copy of its first records.
    pub(in super::super) const MIRROR: u64 = 1;
    /// The journal.
    pub(in super::super) const LOG: u64 = 2;
    /// Version and flags.
    pub(in super::super) const VOLUME: u64 = 3;
    /// The root folder.
    pub(in super::super) const ROOT: u64 = 5;
    /// Which clusters are in use.
    pub(in super::super) const BITMAP: u64 = 6;
}

/// The most records that are read: at 1 KiB, 128 GiB of them.
const MAX_RECORDS: u64 = 1 << 27;
/// Records that have a copy, at least.
const MIRRORED: u64 = 4;

/// The table of records, found.
pub(super) struct Mft<'a, 's> {
    pub(super) view: &'a View<'s>,
    pub(super) geometry: Geometry,
    /// The table's bytes.
    pub(super) stream: Stream,
    /// Records that were ever written.
    pub(super) records: u64,
}

impl<'a, 's> Mft<'a, 's> {
    /// Finds all of the table, and checks that its copy agrees.
    pub(super) fn open(view: &'a View<'s>, geometry: Geometry) -> Result<Self, Trouble> {
        let mut first = view.read(geometry.byte(geometry.mft_lcn), geometry.record_size)?;
        let Slot::InUse(base) = decode(&mut first, number::MFT)? else {
            return Err(damaged("no $MFT lies where the boot sector says"));
        };
        let fetch = |so_far: Option<&Stream>, number| match so_far {
            Some(so_far) => read_record(view, &geometry, so_far, number),
            None => Err(damaged("$MFT does not hold itself")),
        };
        let stream = assemble(view, &geometry, &base, (kind::DATA, &[]), fetch)?;
        let stream = stream.ok_or_else(|| damaged("$MFT has no data"))?;
        if stream.first_lcn() != Some(geometry.mft_lcn) || stream.has_holes() {
            return Err(damaged("$MFT does not hold itself"));
        }
        let records = stream.initialized / geometry.record_size;
        if records > MAX_RECORDS {
            return Err(Trouble::skip(format!(
                "has {records} records, more than the {MAX_RECORDS} that are read"
            )));
        }
        let mft = Self {
            view,
            geometry,
            stream,
            records,
        };
        mft.check_mirror()?;
        Ok(mft)
    }

    /// The stream of this kind and name of the file whose base record is `number`.
    pub(super) fn stream(
        &self,
        number: u64,
        kind: u32,
        name: &[u8],
    ) -> Result<Option<Stream>, Trouble> {
        let mut bytes = self.record(number)?;
        let Slot::InUse(base) = decode(&mut bytes, number)? else {
            return Err(damaged(format!("record {number} is not in use")));
        };
        if base.base.is_some() {
            return Err(damaged(format!("record {number} belongs to another file")));
        }
        let fetch = |_: Option<&Stream>, number| self.record(number);
        assemble(self.view, &self.geometry, &base, (kind, name), fetch)
    }

    /// As [`Self::stream`], of one that must be there.
    pub(super) fn need(&self, number: u64, kind: u32, name: &str) -> Result<Stream, Trouble> {
        let stream = self.stream(number, kind, &[])?;
        stream.ok_or_else(|| damaged(format!("{name} is missing")))
    }

    /// A record as it lies on the disk.
    pub(super) fn record(&self, number: u64) -> Result<Vec<u8>, Trouble> {
        read_record(self.view, &self.geometry, &self.stream, number)
    }

    /// Checks that $MFTMirr holds what the first records hold.
    fn check_mirror(&self) -> Result<(), Trouble> {
        let mirror = self.need(number::MIRROR, kind::DATA, "$MFTMirr")?;
        let differs = || damaged("$MFTMirr is not what $MFT is");
        if mirror.first_lcn() != Some(self.geometry.mirror_lcn) {
            return Err(differs());
        }
        for number in 0..MIRRORED {
            let mut one = self.record(number)?;
            let mut other = read_record(self.view, &self.geometry, &mirror, number)?;
            let (Slot::InUse(one), Slot::InUse(other)) =
                (decode(&mut one, number)?, decode(&mut other, number)?)
            else {
                return Err(differs());
            };
            if !one.same(&other) {
                return Err(differs());
            }
        }
        Ok(())
    }
}

fn read_record(
    view: &View<'_>,
    geometry: &Geometry,
    table: &Stream,
    number: u64,
) -> Result<Vec<u8>, Trouble> {
    let mut bytes = vec![0; usize_from(geometry.record_size)];
    let offset = (number.checked_mul(geometry.record_size))
        .ok_or_else(|| damaged(format!("there is no record {number}")))?;
    table.read_at(view, &mut bytes, offset)?;
    Ok(bytes)
}

/// Puts together the stream of a file, of this kind and name, from its base record and the records
/// that the attribute list names. `fetch` reads a record, and is told what is known of the stream so
/// far, for $MFT needs no more to find its next part.
fn assemble(
    view: &View<'_>,
    geometry: &Geometry,
    base: &Record<'_>,
    (kind, name): (u32, &[u8]),
    fetch: impl Fn(Option<&Stream>, u64) -> Result<Vec<u8>, Trouble>,
) -> Result<Option<Stream>, Trouble> {
    let owner = base.reference.record();
    let Some(list) = lists::read(view, geometry, base)? else {
        let Some(attribute) = base.find(kind, name)? else {
            return Ok(None);
        };
        let stream = Stream::begin(owner, &attribute, geometry)?;
        return stream.finish(allocated(&attribute)).map(Some);
    };
    let mut parts = Vec::new();
    for entry in lists::entries(&list) {
        let entry = entry?;
        if entry.kind == kind && entry.name == name {
            parts.push(entry);
        }
    }
    parts.sort_by_key(|entry| entry.lowest_vcn);
    let mut found = None;
    for entry in parts {
        let mut holder;
        let record = if entry.holder == base.reference {
            *base
        } else {
            let so_far = found.as_ref().map(|(stream, _)| stream);
            holder = fetch(so_far, entry.holder.record())?;
            extent(&mut holder, &entry, base)?
        };
        let attribute = part(&record, &entry)?;
        match (&mut found, attribute.value) {
            (None, _) => {
                let stream = Stream::begin(owner, &attribute, geometry)?;
                found = Some((stream, allocated(&attribute)));
            }
            (Some((stream, _)), Value::NonResident(mapping)) => {
                stream.extend(&mapping, geometry)?
            }
            (Some(_), Value::Resident(_)) => {
                return Err(damaged("metadata lies in several records"));
            }
        }
    }
    (found.map(|(stream, allocated)| stream.finish(allocated))).transpose()
}

/// The record that holds what `entry` names.
fn extent<'a>(
    bytes: &'a mut [u8],
    entry: &Entry<'_>,
    base: &Record<'_>,
) -> Result<Record<'a>, Trouble> {
    let number = entry.holder.record();
    match decode(bytes, number)? {
        Slot::InUse(record)
            if record.reference == entry.holder && record.base == Some(base.reference) =>
        {
            Ok(record)
        }
        _ => Err(damaged(format!(
            "record {number} is not the part of a file that it was"
        ))),
    }
}

/// The attribute that `entry` names.
fn part<'a>(record: &Record<'a>, entry: &Entry<'_>) -> Result<Attribute<'a>, Trouble> {
    for attribute in record.attributes() {
        let attribute = attribute?;
        if attribute.kind == entry.kind
            && attribute.name == entry.name
            && attribute.lowest_vcn() == entry.lowest_vcn
        {
            return Ok(attribute);
        }
    }
    Err(damaged("an attribute list names what is not there"))
}

/// Bytes of all clusters, as the first part says.
fn allocated(attribute: &Attribute<'_>) -> u64 {
    match attribute.value {
        Value::Resident(_) => 0,
        Value::NonResident(mapping) => mapping.allocated_size,
    }
}
