//! What the guest's filesystems call free, as compaction uses it: counted as zero, in a book of its
//! own ([`FreeBook`]).
//!
//! Free bytes are lost only while nobody may write, checked at every step:
//! * [`Disk::begin_writing`] waits for the step under way, and ends the work;
//! * a write that nobody announced is noticed by the disk's count of changes, under the gates of the
//!   blocks that are about to go;
//! * all metadata that the survey rests on is read again, and must be the same.
//!
//! Where one of these says no, nothing of what is free is touched any more, and compaction goes on with
//! what is zero.

use std::io;
use std::time::{Duration, Instant};

use rangemap::RangeSet;

use super::CompactError;
use crate::disk::{Disk, FreeBook};
use crate::error::DiskError;
use crate::guest::{Outcome, Rest, Source, Survey, SurveyOptions, survey};

/// How old a look at the metadata may be when blocks go by it.
const FRESH: Duration = Duration::from_millis(250);

/// The disk as the readers see it. Reading ends where `go_on` says no.
struct GuestView<'a> {
    disk: &'a Disk,
    go_on: &'a dyn Fn() -> bool,
}

impl Source for GuestView<'_> {
    fn len(&self) -> u64 {
        self.disk.len()
    }

    fn sector_size(&self) -> u64 {
        self.disk.geometry().sector_size
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        if !(self.go_on)() {
            return Err(io::ErrorKind::Interrupted.into());
        }
        (self.disk.read_quietly(buf, offset)).map_err(|error| match error {
            DiskError::Io { source, .. } => source,
            other => io::Error::other(other),
        })
    }
}

/// What is free on a disk, and how that is known.
#[derive(Debug)]
pub(super) struct Freed {
    survey: Survey,
    /// All that is free and believed, and what that makes of blocks.
    pub(super) book: FreeBook,
    /// When the metadata was last seen to be the same.
    verified: Option<Instant>,
}

impl Freed {
    /// Asks the filesystems of `disk`, and believes those that are at `least` that sure to be at rest.
    ///
    /// # Errors
    /// [`CompactError::Cancelled`] where `go_on` says no; where the host cannot read.
    pub(super) fn find(
        disk: &Disk,
        swap: bool,
        least: Rest,
        go_on: &dyn Fn() -> bool,
    ) -> Result<Self, CompactError> {
        let at = disk.io_count();
        let options = SurveyOptions { swap };
        let mut survey = survey(&GuestView { disk, go_on }, &options).map_err(read_error)?;
        let mut free = std::mem::take(&mut survey.free);
        for part in &mut survey.parts {
            let Outcome::Read { rest, .. } = part.outcome else {
                continue;
            };
            if rest < least {
                let reason = disbelief(rest).to_owned();
                // Whoever waits for the background to act on it gets no report.
                let content = part.content.unwrap_or("unknown");
                let path = disk.path().display();
                log::debug!("{path}: {}, {content}: {reason}", part.name);
                part.outcome = Outcome::Skipped { reason };
                (part.ranges.iter()).for_each(|range| free.remove(range.clone()));
            }
        }
        Ok(Self {
            survey,
            book: FreeBook::new(disk, free, at),
            verified: None,
        })
    }

    /// What was surveyed.
    pub(super) fn survey(&self) -> &Survey {
        &self.survey
    }

    /// Whether the metadata is what it was, as seen a moment ago or now.
    ///
    /// # Errors
    /// As [`Self::find`].
    pub(super) fn still_holds(
        &mut self,
        disk: &Disk,
        go_on: &dyn Fn() -> bool,
    ) -> Result<bool, CompactError> {
        if self.verified.is_some_and(|then| then.elapsed() < FRESH) {
            return Ok(true);
        }
        let view = GuestView { disk, go_on };
        let evidence = &mut self.survey.evidence;
        if !evidence.still_holds(&view).map_err(read_error)? {
            return Ok(false);
        }
        if self.verified.is_none() {
            // From here on free bytes go, also those that were only looked at for a magic number.
            evidence.without(self.book.free());
        }
        self.verified = Some(Instant::now());
        Ok(true)
    }
}

/// What the filesystems on the parents of `disk`, each as it is over its own parents, could be taken to call
/// free, by anybody at any time: swap and what a journal frees among it.
///
/// # Errors
/// As [`Freed::find`].
pub(super) fn free_in_parents(
    disk: &Disk,
    go_on: &dyn Fn() -> bool,
) -> Result<RangeSet<u64>, CompactError> {
    let mut free = RangeSet::new();
    for parent in std::iter::successors(disk.parent(), |disk| disk.parent()) {
        let view = GuestView {
            disk: parent,
            go_on,
        };
        let found = survey(&view, &SurveyOptions { swap: true }).map_err(read_error)?;
        free.extend(found.free);
    }
    Ok(free)
}

/// Why a filesystem that is not surer than that to be at rest is not believed.
fn disbelief(rest: Rest) -> &'static str {
    match rest {
        Rest::Replayed => {
            "was not unmounted cleanly: let its own system mount it once, or, after a crash, let \
             `vhdfs compact --replay-journal` look into its journal"
        }
        Rest::Unmarked | Rest::Unmounted => {
            "may be mounted by a suspended machine without a mark on the disk that says so: run \
             `vhdfs compact` if you know that there is none"
        }
    }
}

fn read_error(error: io::Error) -> CompactError {
    match error.kind() {
        io::ErrorKind::Interrupted => CompactError::Cancelled,
        _ => DiskError::io("read the guest's filesystems", error).into(),
    }
}
