//! What a part holds, by the marks in it.

use super::{Level, Reader, Surveyor};
use crate::guest::container::{self, LVM2, Meaning};
use crate::guest::lvm::{self, Group};
use crate::guest::table::{self, Slot};
use crate::guest::view::View;
use crate::guest::{Trouble, Volume, swap};

/// Something that a part seems to hold.
pub(super) struct Mark<'r> {
    /// Its name, to be shown.
    pub(super) name: &'static str,
    kind: Kind<'r>,
    /// Where the mark lies in the part, if that is known.
    at: Option<u64>,
}

enum Kind<'r> {
    Filesystem(&'r Reader),
    Swap,
    Container(Meaning),
}

impl Mark<'_> {
    /// That it is not what one of the disk's partitions happens to hold there.
    pub(super) fn is_outside(&self, slots: &[Slot]) -> bool {
        let holds = |at: u64| slots.iter().any(|slot| slot.range.contains(&at));
        !self.at.is_some_and(holds)
    }
}

/// What a part holds.
pub(super) enum Content {
    /// A filesystem, or swap space.
    Volume(Volume),
    /// Volumes.
    Group(Group),
}

impl Surveyor<'_> {
    /// What is in a part, whose name goes to `name`.
    ///
    /// # Errors
    /// As every reader's.
    pub(super) fn content(
        &self,
        view: &View<'_>,
        level: Level,
        name: &mut Option<&'static str>,
    ) -> Result<Content, Trouble> {
        let mut marks = self.marks(view)?;
        if level != Level::Disk {
            marks.extend(table::is_here(view)?.map(|name| Mark {
                name,
                kind: Kind::Container(Meaning::Table),
                at: None,
            }));
        }
        let mut names = Vec::new();
        marks.retain(|mark| {
            let first = !names.contains(&mark.name);
            names.push(mark.name);
            first
        });
        // What nothing here can read needs no decision which of it is a remnant.
        let readable =
            |mark: &Mark<'_>| !matches!(mark.kind, Kind::Container(_)) || mark.name == LVM2;
        let [mark] = &marks[..] else {
            if let Some(mark) = marks.first().filter(|_| !marks.iter().any(readable)) {
                *name = Some(mark.name);
                return self.read(view, level, mark);
            }
            return Err(self.several(view, &marks));
        };
        *name = Some(mark.name);
        self.read(view, level, mark)
    }

    fn read(&self, view: &View<'_>, level: Level, mark: &Mark<'_>) -> Result<Content, Trouble> {
        match mark.kind {
            Kind::Filesystem(reader) => (reader.read)(view).map(Content::Volume),
            Kind::Swap => {
                let volume = swap::read(view)?;
                match self.options.swap {
                    true => Ok(Content::Volume(volume)),
                    false => Err(Trouble::skip(
                        "is swap space, which counts as in use unless it is asked for",
                    )),
                }
            }
            Kind::Container(_) if mark.name == LVM2 && level != Level::Volume => {
                lvm::read(view).map(Content::Group)
            }
            Kind::Container(meaning) => Err(Trouble::skip(meaning.reason())),
        }
    }

    /// The trouble with a part that holds no mark, or several: one of them may still say that the guest
    /// sleeps.
    fn several(&self, view: &View<'_>, marks: &[Mark<'_>]) -> Trouble {
        let mut asleep = false;
        for mark in marks {
            let volume = match mark.kind {
                Kind::Filesystem(reader) => (reader.read)(view),
                Kind::Swap => swap::read(view),
                Kind::Container(_) => continue,
            };
            match volume {
                Err(Trouble::Io(error)) => return Trouble::Io(error),
                Err(Trouble::Skip { hibernated, .. }) => asleep |= hibernated,
                Ok(_) => {}
            }
        }
        let names: Vec<_> = marks.iter().map(|mark| mark.name).collect();
        let reason = match names.is_empty() {
            true => "holds nothing that is known here".to_owned(),
            false => format!(
                "holds the marks of {}: which of them counts is not known",
                names.join(" and of ")
            ),
        };
        match asleep {
            true => Trouble::hibernated(reason),
            false => Trouble::skip(reason),
        }
    }

    /// Everything that a part seems to hold; something that has several marks, several times.
    ///
    /// # Errors
    /// As every reader's.
    pub(super) fn marks(&self, view: &View<'_>) -> Result<Vec<Mark<'_>>, Trouble> {
        let mut marks = Vec::new();
        for reader in self.readers {
            marks.extend((reader.is_here)(view)?.map(|name| Mark {
                name,
                kind: Kind::Filesystem(reader),
                at: None,
            }));
        }
        marks.extend(swap::is_here(view)?.map(|name| Mark {
            name,
            kind: Kind::Swap,
            at: None,
        }));
        for mark in container::marks(view)? {
            marks.push(Mark {
                name: mark.name,
                kind: Kind::Container(mark.meaning),
                at: Some(mark.at),
            });
        }
        Ok(marks)
    }
}
