//! Partition tables.

use std::ops::Range;

use super::Trouble;
use super::view::View;
use crate::units::{u64_from, usize_from};

/// The partitions of a disk, with their names. `None` where it has no partition table.
pub(super) fn partitions(disk: &View<'_>) -> Result<Option<Vec<(String, Range<u64>)>>, Trouble> {
    let sector = disk.sector_size();
    if disk.len() < 4 * sector {
        return Ok(None);
    }
    let mut found = Vec::new();
    let header = disk.read(sector, sector)?;
    if header.starts_with(b"EFI PART") {
        let entries = disk.read(2 * sector, 128 * 128)?;
        for (index, entry) in entries.chunks_exact(128).enumerate() {
            let at = |at: usize| -> u64 {
                (0..8)
                    .rev()
                    .fold(0, |sum, n| sum << 8 | u64::from(entry[at + n]))
            };
            if entry[..16].iter().any(|byte| *byte != 0) && at(40) < disk.len() / sector {
                found.push((
                    format!("partition {}", index + 1),
                    at(32) * sector..(at(40) + 1) * sector,
                ));
            }
        }
        return Ok(Some(found));
    }
    let first = disk.read(0, 512)?;
    if first[510..] != [0x55, 0xaa] {
        return Ok(None);
    }
    for index in 0..4_u64 {
        let entry = &first[usize_from(446 + 16 * index)..][..16];
        let at = |at: usize| -> u64 {
            (0..4)
                .rev()
                .fold(0, |sum, n| sum << 8 | u64::from(entry[at + n]))
        };
        let (start, end) = (at(8) * sector, (at(8) + at(12)) * sector);
        if entry[0] & 0x7f != 0 || end > disk.len() || u64_from(entry.len()) != 16 {
            return Ok(None);
        }
        if entry[4] != 0 && start > 0 && start < end {
            found.push((format!("partition {}", index + 1), start..end));
        }
    }
    Ok((!found.is_empty()).then_some(found))
}
