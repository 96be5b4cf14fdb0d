//! From a disk to its parts, and from each part to its reader.
//!
//! A part is read only if it holds the mark of exactly one thing that is known. Free is only what
//! lies in a part that was read; where any part says that the guest sleeps, nothing is.

mod marks;

use std::io;
use std::ops::Range;

use rangemap::RangeSet;

use super::container::LVM2;
use super::lvm::Group;
use super::table;
use super::view::{Source, View};
use super::{
    Outcome, Part, Rest, Survey, SurveyOptions, Trouble, Volume, btrfs, exfat, ext, fat, ntfs, xfs,
};

use marks::Content;

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
        is_here: exfat::is_here,
        read: exfat::read,
    },
    Reader {
        is_here: ext::is_here,
        read: ext::read,
    },
    Reader {
        is_here: fat::is_here,
        read: fat::read,
    },
    Reader {
        is_here: ntfs::is_here,
        read: ntfs::read,
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
pub fn survey(source: &dyn Source, options: &SurveyOptions) -> io::Result<Survey> {
    survey_with(source, options, READERS)
}

fn survey_with(
    source: &dyn Source,
    options: &SurveyOptions,
    readers: &[Reader],
) -> io::Result<Survey> {
    let disk = View::whole(source);
    let surveyor = Surveyor {
        readers,
        options: *options,
    };
    let mut found = Vec::new();
    match surveyor.disk(&disk, &mut found) {
        Ok(()) => {}
        Err(Trouble::Io(error)) => return Err(error),
        Err(Trouble::Skip { reason, hibernated }) => {
            found.clear();
            found.push(Found {
                content: None,
                result: Err(Skip { reason, hibernated }),
                ..Found::new("the disk".to_owned(), &disk)
            });
        }
    }
    let_sleep(&mut found);
    let mut free = RangeSet::new();
    let parts = (found.into_iter())
        .map(|found| found.into_part(&mut free))
        .collect();
    Ok(Survey {
        parts,
        free,
        evidence: disk.into_evidence(),
    })
}

/// Counts every part as in use if the guest sleeps: what it has in memory is not on the disk.
fn let_sleep(found: &mut [Found<'_>]) {
    let asleep = found.iter().find_map(|part| match &part.result {
        Err(skip) if skip.hibernated => Some(format!("{} {}", part.name, skip.reason)),
        _ => None,
    });
    let Some(asleep) = asleep else { return };
    for part in found.iter_mut().filter(|part| part.result.is_ok()) {
        part.result = Err(Skip {
            reason: format!("counts as in use, because {asleep}"),
            hibernated: true,
        });
    }
}

/// Why a part is in use, as [`Trouble::Skip`].
#[derive(Clone, Debug)]
struct Skip {
    reason: String,
    hibernated: bool,
}

/// What was found out about a part.
struct Found<'a> {
    name: String,
    view: View<'a>,
    /// Where it lies on the disk, in the order of its bytes.
    ranges: Vec<Range<u64>>,
    content: Option<&'static str>,
    result: Result<Volume, Skip>,
}

impl<'a> Found<'a> {
    /// A part that is all of `view`, of which nothing is known yet.
    fn new(name: String, view: &View<'a>) -> Self {
        Self {
            name,
            view: view.clone(),
            ranges: view.on_disk(0..view.len()),
            content: None,
            result: Err(Skip {
                reason: "was not looked at".to_owned(),
                hibernated: false,
            }),
        }
    }

    /// The line in the survey. What is free goes to `all`.
    fn into_part(self, all: &mut RangeSet<u64>) -> Part {
        let outcome = match self.result {
            Ok(volume) => {
                all.extend(self.view.all_on_disk(&volume.free));
                Outcome::Read {
                    reported_free: volume.reported_free,
                    free: total(&volume.free),
                    rest: volume.rest,
                }
            }
            Err(skip) => Outcome::Skipped {
                reason: skip.reason,
            },
        };
        Part {
            name: self.name,
            start: self.ranges.first().map_or(0, |range| range.start),
            size: self
                .ranges
                .iter()
                .map(|range| range.end - range.start)
                .sum(),
            ranges: self.ranges,
            content: self.content,
            outcome,
        }
    }
}

fn total(ranges: &RangeSet<u64>) -> u64 {
    ranges.iter().map(|range| range.end - range.start).sum()
}

/// What stands above a part.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Level {
    Disk,
    Partition,
    Volume,
}

struct Surveyor<'r> {
    readers: &'r [Reader],
    options: SurveyOptions,
}

impl Surveyor<'_> {
    /// Adds the parts of the disk to `found`.
    ///
    /// # Errors
    /// [`Trouble::Skip`] where all of the disk is in use; [`Trouble::Io`].
    fn disk<'a>(&self, disk: &View<'a>, found: &mut Vec<Found<'a>>) -> Result<(), Trouble> {
        let Some(slots) = table::read(disk)? else {
            return self.part("the disk".to_owned(), disk, Level::Disk, None, found);
        };
        if let Some(mark) = self
            .marks(disk)?
            .iter()
            .find(|mark| mark.is_outside(&slots))
        {
            return Err(Trouble::skip(format!(
                "holds the marks of {} and of a partition table, one of which is a remnant (wipefs)",
                mark.name
            )));
        }
        for slot in slots {
            let Some(view) = disk.part(std::slice::from_ref(&slot.range)) else {
                return Err(Trouble::skip(format!("ends before {} does", slot.name)));
            };
            let kept = slot.kept.map(|kept| kept.reason.to_owned());
            let first = found.len();
            self.part(slot.name, &view, Level::Partition, kept, found)?;
            for part in found.iter_mut().skip(first) {
                part.content = part.content.or(slot.kept.and_then(|kept| kept.content));
            }
        }
        Ok(())
    }

    /// Adds what a part comes to: itself, or the volumes in it. Where it is `kept` for a reason, it is
    /// looked at only for its name, and for a guest that sleeps.
    ///
    /// # Errors
    /// [`Trouble::Io`].
    fn part<'a>(
        &self,
        name: String,
        view: &View<'a>,
        level: Level,
        kept: Option<String>,
        found: &mut Vec<Found<'a>>,
    ) -> Result<(), Trouble> {
        let mut part = Found::new(name, view);
        let result = match self.content(view, level, &mut part.content) {
            Ok(Content::Group(group)) if kept.is_none() => {
                return self.group(view, group, found);
            }
            Ok(Content::Group(_)) => Err(Trouble::skip("is kept")),
            Ok(Content::Volume(volume)) => sound(&volume, view).map(|()| volume),
            Err(trouble) => Err(trouble),
        };
        part.result = match (result, kept) {
            (Err(Trouble::Io(error)), _) => return Err(Trouble::Io(error)),
            (Err(Trouble::Skip { hibernated, .. }), Some(reason)) => {
                Err(Skip { reason, hibernated })
            }
            (Err(Trouble::Skip { reason, hibernated }), None) => Err(Skip { reason, hibernated }),
            (Ok(_), Some(reason)) => Err(Skip {
                reason,
                hibernated: false,
            }),
            (Ok(volume), None) => Ok(volume),
        };
        found.push(part);
        Ok(())
    }

    /// Adds the volumes of a group, and what is in none.
    ///
    /// # Errors
    /// [`Trouble::Io`].
    fn group<'a>(
        &self,
        disk: &View<'a>,
        group: Group,
        found: &mut Vec<Found<'a>>,
    ) -> Result<(), Trouble> {
        for volume in group.volumes {
            let name = format!("volume {}/{}", group.name, volume.name);
            let Some(view) = disk.part(&volume.ranges) else {
                return Err(Trouble::skip("has volumes beyond its end"));
            };
            if volume.linear {
                self.part(name, &view, Level::Volume, volume.kept, found)?;
                continue;
            }
            let mut part = Found::new(name, &view);
            part.result = Err(Skip {
                reason: volume.kept.unwrap_or_default(),
                hibernated: false,
            });
            found.push(part);
        }
        let size = total(&group.unused);
        if size > 0 {
            let place = disk.all_on_disk(&group.unused);
            found.push(Found {
                name: format!("unused space of {}", group.name),
                view: disk.clone(),
                ranges: place.iter().cloned().collect(),
                content: Some(LVM2),
                result: Ok(Volume {
                    size: disk.len(),
                    reported_free: size,
                    free: group.unused,
                    rest: Rest::Unmounted,
                }),
            });
        }
        Ok(())
    }
}

/// That what a reader says fits the part.
fn sound(volume: &Volume, view: &View<'_>) -> Result<(), Trouble> {
    let end = volume.free.last().map_or(0, |run| run.end);
    if volume.size > view.len() || end > volume.size {
        return Err(Trouble::skip(format!(
            "claims {} bytes, but has {}",
            volume.size.max(end),
            view.len()
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests;
