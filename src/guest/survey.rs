//! From a disk to its parts, and from each part to its reader.

use std::io;
use std::ops::Range;

use rangemap::RangeSet;

use super::view::{Source, View};
use super::{Outcome, Part, Survey, SurveyOptions, Trouble, Volume, btrfs, table, xfs};

/// A filesystem that can be read.
struct Reader {
    /// A cheap look at the magic number: the name to show.
    is_here: fn(&View<'_>) -> Result<Option<&'static str>, Trouble>,
    /// What is free, in bytes of the part.
    read: fn(&View<'_>) -> Result<Volume, Trouble>,
}

/// All filesystems that can be read.
const READERS: &[Reader] = &[
    Reader {
        is_here: btrfs::is_here,
        read: btrfs::read,
    },
    Reader {
        is_here: xfs::is_here,
        read: xfs::read,
    },
];

/// Says what the guest's filesystems call free.
///
/// # Errors
/// Only where the host cannot read. What cannot be understood counts as in use.
pub fn survey(source: &dyn Source, _options: &SurveyOptions) -> io::Result<Survey> {
    let disk = View::whole(source);
    let mut parts = Vec::new();
    let mut free = RangeSet::new();
    for (name, range) in places(&disk)? {
        let Some(view) = disk.part(std::slice::from_ref(&range)) else {
            continue;
        };
        let (content, outcome) = look(&view, &mut free)?;
        parts.push(Part {
            name,
            start: range.start,
            size: range.end - range.start,
            content,
            outcome,
        });
    }
    Ok(Survey {
        parts,
        free,
        evidence: disk.into_evidence(),
    })
}

/// The partitions, or the whole disk.
fn places(disk: &View<'_>) -> io::Result<Vec<(String, Range<u64>)>> {
    match table::partitions(disk) {
        Ok(Some(found)) => Ok(found),
        Ok(None) | Err(Trouble::Skip { .. }) => Ok(vec![("the disk".to_owned(), 0..disk.len())]),
        Err(Trouble::Io(error)) => Err(error),
    }
}

fn look(view: &View<'_>, free: &mut RangeSet<u64>) -> io::Result<(Option<&'static str>, Outcome)> {
    let mut content = None;
    let outcome = match find(view, &mut content) {
        Ok(volume) => {
            let free_here: u64 = volume.free.iter().map(|run| run.end - run.start).sum();
            free.extend(view.all_on_disk(&volume.free));
            Outcome::Read {
                reported_free: volume.reported_free,
                free: free_here,
            }
        }
        Err(Trouble::Skip { reason, .. }) => Outcome::Skipped { reason },
        Err(Trouble::Io(error)) => return Err(error),
    };
    Ok((content, outcome))
}

fn find(view: &View<'_>, content: &mut Option<&'static str>) -> Result<Volume, Trouble> {
    for reader in READERS {
        if let Some(name) = (reader.is_here)(view)? {
            *content = Some(name);
            return (reader.read)(view);
        }
    }
    Err(Trouble::skip("holds nothing that is known here"))
}
