//! One search for a parent: place by place, until a disk with the right identity is found.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::{FoundParent, HostParents};
use crate::error::{OpenError, OpenProblem, ParentProblem, plain};
use crate::format::parent::{Identity, ParentLink};
use crate::image;
use crate::storage::host::{Candidate, FileKey, Found, Listings, Miss, Scope};

/// A directory out of an image, as an argument that may be advised: not a root, which would allow
/// everything, and nothing that a shell could take for something else.
fn advisable(directory: &Path) -> Option<&str> {
    let text = directory.to_str()?;
    let is_harmless = |c: char| {
        c.is_alphanumeric()
            || matches!(c, '/' | '.' | '_' | '-' | '+' | ',' | '@')
            || cfg!(windows) && matches!(c, '\\' | ':')
    };
    (directory.parent().is_some() && text.chars().all(is_harmless)).then_some(text)
}

/// How many places an error lists.
const LISTED: usize = 16;

/// One search for a parent.
pub(super) struct Hunt<'a> {
    parents: &'a HostParents,
    scope: &'a Scope,
    link: &'a ParentLink,
    lock: bool,
    listings: Listings,
    /// Files that have been looked into.
    seen: Vec<FileKey>,
    /// The first disk found, where the user or the child says that it is, that has another identity.
    mismatch: Option<(PathBuf, Identity)>,
    tried: Vec<String>,
}

impl<'a> Hunt<'a> {
    pub(super) fn new(
        parents: &'a HostParents,
        scope: &'a Scope,
        link: &'a ParentLink,
        lock: bool,
    ) -> Self {
        Self {
            parents,
            scope,
            link,
            lock,
            listings: Listings::default(),
            seen: Vec::new(),
            mismatch: None,
            tried: Vec::new(),
        }
    }

    /// Finds the parent of the image at `child`, which is where it really is.
    pub(super) fn run(&mut self, child: &Path) -> Result<FoundParent, ParentProblem> {
        let link = self.link;
        if let Some(found) = self.named_by_user(child)? {
            return Ok(found);
        }
        for text in link.paths.iter().map(|path| &path.text) {
            let named = self.scope.named(child, text);
            for place in &named.inside {
                if let Some(found) = self.look(place, true)? {
                    return Ok(found);
                }
            }
            match &named.outside {
                Some(outside) => self.note_outside(text, outside),
                None if named.inside.is_empty() => {
                    let directories = self.directories();
                    self.note(format!("{text}: nothing of that name below {directories}"));
                }
                None => {}
            }
        }
        // Only then by what is left of the paths when the files have been moved.
        for text in link.paths.iter().map(|path| &path.text) {
            for place in &self.scope.guesses(child, text) {
                if let Some(found) = self.look(place, false)? {
                    return Ok(found);
                }
            }
        }
        Err(match self.mismatch.take() {
            Some((path, found)) => ParentProblem::Mismatch {
                path,
                found: found.to_string(),
                expected: self.link.expected(),
            },
            None => ParentProblem::Missing {
                tried: self.finish_tried(),
            },
        })
    }

    /// The parent, if it is one of the files that the user names.
    fn named_by_user(&mut self, child: &Path) -> Result<Option<FoundParent>, ParentProblem> {
        let parents = self.parents;
        let mut found: Option<(FoundParent, PathBuf)> = None;
        for named in &parents.files {
            let file = Found::at(&named.path).map_err(|miss| {
                let tried = vec![plain(&format!("{}: {miss}", named.path.display()))];
                ParentProblem::Missing { tried }
            })?;
            if file.path == child {
                named.was_found.store(true, Ordering::Relaxed);
            }
            // Those that are of the chain, but not here, are no mistake.
            let is_spare = !named.was_found.load(Ordering::Relaxed);
            if file.path == child || self.is_seen(file.key) {
                continue;
            }
            let Some(parent) = self.examine(&file, is_spare)? else {
                continue;
            };
            if let Some((_, other)) = found {
                return Err(ParentProblem::Ambiguous {
                    one: other,
                    other: file.path,
                    identity: self.link.expected(),
                });
            }
            named.was_found.store(true, Ordering::Relaxed);
            found = Some((parent, file.path));
        }
        Ok(found.map(|(parent, _)| parent))
    }

    /// Whether a file has been looked into; from now on it has.
    fn is_seen(&mut self, key: FileKey) -> bool {
        let is_seen = self.seen.contains(&key);
        if !is_seen {
            self.seen.push(key);
        }
        is_seen
    }

    /// The parent, if it is at `place`. A place that was only guessed is not worth a word.
    fn look(
        &mut self,
        place: &Candidate,
        named: bool,
    ) -> Result<Option<FoundParent>, ParentProblem> {
        let files = match self.scope.look(place, &mut self.listings) {
            Ok(files) => files,
            Err(Miss::Missing) if !named => return Ok(None),
            Err(miss) => {
                let place = self.scope.shown(place);
                self.note(format!("{}: {miss}", place.display()));
                return Ok(None);
            }
        };
        for file in files {
            if self.is_seen(file.key) {
                continue;
            }
            if let Some(found) = self.examine(&file, named)? {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }

    /// `file`, if it is the parent.
    fn examine(&mut self, file: &Found, named: bool) -> Result<Option<FoundParent>, ParentProblem> {
        if let Some(disk) = self.parents.shared(file.key)
            && self.link.identities.contains(&disk.identity())
        {
            return Ok(Some(FoundParent::Open(disk)));
        }
        let mut holder = None;
        let opened = file.open(self.lock).or_else(|error| match error.problem() {
            // Whether that is bad depends on which disk it is.
            OpenProblem::InUse(who) => {
                holder = Some(who.clone());
                file.open(false)
            }
            _ => Err(error),
        });
        let opened = opened.map_err(OpenError::into_problem).and_then(|storage| {
            let found = image::identify(&storage, &file.path)?;
            Ok((storage, found.identity))
        });
        match opened {
            Err(problem) => {
                self.note(format!("{}: {problem}", file.path.display()));
                Ok(None)
            }
            Ok((_, identity)) if !self.link.identities.contains(&identity) => {
                if named {
                    self.mismatch.get_or_insert((file.path.clone(), identity));
                } else {
                    // Only its name is the same.
                    let path = file.path.display();
                    self.note(format!("{path}: another disk, {identity}"));
                }
                Ok(None)
            }
            Ok((storage, _)) => match holder {
                None => Ok(Some(FoundParent::Closed {
                    path: file.path.clone(),
                    storage: Arc::new(storage),
                    key: file.key,
                })),
                Some(holder) => Err(ParentProblem::InUse {
                    path: file.path.clone(),
                    holder,
                }),
            },
        }
    }

    fn note(&mut self, text: String) {
        // Paths out of an image may hold anything, and this goes to a terminal.
        let text = plain(&text);
        if !self.tried.contains(&text) {
            self.tried.push(text);
        }
    }

    fn note_outside(&mut self, text: &str, outside: &Path) {
        let directories = self.directories();
        let leads = format!("{text} leads outside of {directories}");
        self.note(match outside.parent().and_then(advisable) {
            Some(needed) => format!("{leads}: --parent-dir {needed} allows that"),
            None => leads,
        });
    }

    fn directories(&self) -> String {
        let names = self.scope.directories().map(|path| path.display());
        let names: Vec<String> = names.map(|name| name.to_string()).collect();
        names.join(", ")
    }

    fn finish_tried(&mut self) -> Vec<String> {
        let mut tried = std::mem::take(&mut self.tried);
        let more = tried.len().saturating_sub(LISTED);
        tried.truncate(LISTED);
        if more > 0 {
            tried.push(format!("{more} more places"));
        }
        if !tried.is_empty() {
            tried.push("if it is elsewhere, name its directory with --parent-dir DIR".to_owned());
        }
        tried
    }
}
