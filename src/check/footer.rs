//! Footers of fixed VHDs that are not where they belong: what `check` says and does about them.

use std::io;
use std::path::Path;

use crate::image::vhd::stray::{State, Stray, find};
use crate::image::{CheckReport, is_named_vhd, read_array};
use crate::storage::Storage;
use crate::units::FileOffset;

/// How files of other formats begin that are named as a VHD now and then.
const OTHERS: [(&[u8], &str); 9] = [
    (b"QFI\xfb", "a QCOW image"),
    (b"KDMV", "a VMDK"),
    (b"COWD", "a VMDK"),
    (b"<<< ", "a VDI"),
    (b"PK\x03\x04", "a ZIP archive"),
    (b"\x1f\x8b", "a gzip file"),
    (b"\xfd7zXZ", "an XZ file"),
    (b"7z\xbc\xaf", "a 7-Zip archive"),
    (b"\x28\xb5\x2f\xfd", "a Zstandard file"),
];

/// Checks the file in `storage`, which people call `name`, if it is a fixed VHD without a footer at its
/// end, or may be one; and puts that right with `repair`. What is cut off `is_saved`, or not.
///
/// # Errors
/// Where the host fails.
pub(super) fn verify(
    storage: &dyn Storage,
    name: &Path,
    repair: bool,
    is_saved: bool,
) -> io::Result<Option<CheckReport>> {
    let Some(stray) = find(storage)? else {
        return Ok(None);
    };
    if stray.state == State::Missing && !is_named_vhd(name) {
        return Ok(None);
    }
    let mut report = CheckReport::default();
    match (obstacle(storage, &stray, is_saved)?, repair) {
        (None, true) => {
            stray.put(storage)?;
            report.repaired.push(repaired(&stray));
        }
        (obstacle, _) => report.errors.push(problem(&stray, obstacle.as_deref())),
    }
    Ok(Some(report))
}

/// Why the footer cannot be put where it belongs, or not so.
fn obstacle(storage: &dyn Storage, stray: &Stray, is_saved: bool) -> io::Result<Option<String>> {
    let size = stray.at.get();
    match stray.state {
        State::Damaged => return Ok(None),
        State::Followed { has_data, .. } => {
            let is_lost = has_data && !is_saved;
            return Ok(is_lost.then(|| {
                "some of that is not zero, so that only `vhdfs check --repair --backup`, which saves \
                 it, cuts it off"
                    .to_owned()
            }));
        }
        State::Missing => {}
    }
    let start = match size >= 1024 {
        true => read_array(storage, FileOffset::new(0))?,
        false => [0; 1024],
    };
    if let Some((_, what)) = OTHERS.iter().find(|(bytes, _)| start.starts_with(bytes)) {
        return Ok(Some(format!("it begins like {what}")));
    }
    let least = partitioned_len(&start);
    Ok((least > size).then(|| {
        format!(
            "its partition table tells of a disk of at least {least} bytes: more than the footer was \
             cut off; get the whole file once more, or copy out what is there as from a raw disk"
        )
    }))
}

fn problem(stray: &Stray, obstacle: Option<&str>) -> String {
    let size = stray.at;
    let what = match stray.state {
        State::Followed { len, .. } => {
            format!(
                "{len} bytes behind the footer of a fixed VHD, which lies at file offset {size}"
            )
        }
        State::Damaged => {
            format!("a damaged footer of a fixed VHD, at file offset {size}")
        }
        State::Missing => {
            "no footer at the end of the file: it is a fixed VHD that lost it, or raw data"
                .to_owned()
        }
    };
    let advice = match (obstacle, stray.state) {
        (Some(obstacle), _) => obstacle.to_owned(),
        (None, State::Followed { .. }) => "`vhdfs check --repair` cuts them off".to_owned(),
        (None, State::Damaged) => "`vhdfs check --repair` writes it anew".to_owned(),
        (None, State::Missing) => format!(
            "`vhdfs check --repair` writes one, for a disk of {} bytes",
            size.get()
        ),
    };
    format!("{what}; {advice}")
}

fn repaired(stray: &Stray) -> String {
    match stray.state {
        State::Followed { len, .. } => format!("the {len} bytes behind the footer cut off"),
        State::Damaged => "the footer written anew, with what it said".to_owned(),
        State::Missing => format!(
            "a new footer at the end: the file is, or was raw data and becomes, a fixed VHD of {} bytes",
            stray.at.get()
        ),
    }
}

/// The bytes that a disk that begins with `start` has at least, by its partition table; 0 where there is
/// none.
fn partitioned_len(start: &[u8; 1024]) -> u64 {
    const SECTOR: u64 = 512;
    let (first, second) = start.split_at(512);
    let bytes = |sectors: u64| sectors.saturating_mul(SECTOR);
    if let Some(gpt) = second.strip_prefix(b"EFI PART") {
        // Where its copy lies: in the last sector.
        let alternate = (gpt.get(24..)).and_then(|rest| rest.first_chunk::<8>());
        return alternate.map_or(0, |at| bytes(u64::from_le_bytes(*at).saturating_add(1)));
    }
    let (entries, signature) = first.get(446..).unwrap_or_default().as_chunks::<16>();
    let is_table = signature == [0x55, 0xaa] && entries.iter().all(|entry| entry[0] & 0x7f == 0);
    let ends = entries.iter().map(|entry| {
        let word = |at: usize| {
            let word = entry.get(at..).and_then(|rest| rest.first_chunk::<4>());
            word.map_or(0, |word| u64::from(u32::from_le_bytes(*word)))
        };
        match (entry[4], word(8)) {
            // Unused, or the mark of a GPT, which would have been found.
            (0 | 0xee, _) | (_, 0) => 0,
            (_, start) => bytes(start.saturating_add(word(12))),
        }
    });
    if is_table { ends.max().unwrap_or(0) } else { 0 }
}
