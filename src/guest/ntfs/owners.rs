//! The walk through all records: which clusters belong to files, and whether files are whole.

use super::clusters::Clusters;
use super::lists::{self, Balance};
use super::mft::{Mft, number};
use super::record::{Record, Slot, Value, decode, kind};
use super::stream::PIECE;
use super::{Trouble, damaged, shadows};
use crate::units::{u64_from, usize_from};

/// The longest bitmap of records: far beyond the records that are read.
const MAX_RECORD_BITMAP: u64 = 32 << 20;

/// Checks all records against $Bitmap and against each other: each in use that is marked so and the
/// other way round, each run of each attribute in clusters that are in use and nobody else's, and
/// each attribute that has left its base record where the list says. Clusters that are in use
/// without an owner are harmless.
pub(super) fn check(mft: &Mft<'_, '_>, clusters: &mut Clusters) -> Result<(), Trouble> {
    let marks = mft.need(number::MFT, kind::BITMAP, "the bitmap of $MFT")?;
    let marks = marks.read_all(mft.view, MAX_RECORD_BITMAP)?;
    let mut balance = Balance::default();
    let record_size = usize_from(mft.geometry.record_size);
    let mut buffer = vec![0; PIECE];
    let mut next = 0;
    while next < mft.records {
        let count = (mft.records - next).min(u64_from(PIECE / record_size));
        let piece = &mut buffer[..usize_from(count) * record_size];
        (mft.stream).read_at(mft.view, piece, next * mft.geometry.record_size)?;
        for bytes in piece.chunks_exact_mut(record_size) {
            let marked = is_set(&marks, next);
            match decode(bytes, next)? {
                Slot::InUse(record) if marked => {
                    check_record(mft, &record, clusters, &mut balance)?;
                }
                Slot::InUse(_) => {
                    return Err(damaged(format!(
                        "record {next} is in use, but not marked so"
                    )));
                }
                Slot::Blank if marked => {
                    return Err(damaged(format!("record {next} is lost")));
                }
                Slot::Blank | Slot::Free => {}
            }
            next += 1;
        }
    }
    if (next..u64_from(marks.len()) * 8).any(|record| is_set(&marks, record)) {
        return Err(damaged("$MFT is shorter than its bitmap says"));
    }
    if !balance.is_even() {
        return Err(damaged("a file lacks a part that its attribute list names"));
    }
    Ok(())
}

fn is_set(bits: &[u8], index: u64) -> bool {
    (bits.get(usize_from(index / 8))).is_some_and(|byte| byte >> (index % 8) & 1 == 1)
}

fn check_record(
    mft: &Mft<'_, '_>,
    record: &Record<'_>,
    clusters: &mut Clusters,
    balance: &mut Balance,
) -> Result<(), Trouble> {
    shadows::check_record(record)?;
    let mut listed = record.base.is_some();
    if record.base.is_none()
        && let Some(list) = lists::read(mft.view, &mft.geometry, record)?
    {
        listed = true;
        for entry in lists::entries(&list) {
            balance.named(record.reference, &entry?);
        }
    }
    let base = record.base.unwrap_or(record.reference);
    for attribute in record.attributes() {
        let attribute = attribute?;
        if listed && attribute.kind != kind::ATTRIBUTE_LIST {
            balance.found(base, record.reference, &attribute);
        }
        if let Value::NonResident(mapping) = attribute.value {
            for run in mapping.runs(mft.geometry.clusters) {
                if let Some(lcns) = run?.lcns() {
                    clusters.claim(lcns, record)?;
                }
            }
        }
    }
    Ok(())
}
