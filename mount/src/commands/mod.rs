//! The commands that work on single disk files.

mod attach;
pub(crate) mod check;
pub(crate) mod compact;
pub(crate) mod create;
pub(crate) mod info;
pub(crate) mod map;
pub(crate) mod relink;
mod targets;
mod unsparse;

use std::io::{self, Write};
use std::path::Path;

use serde::Serialize;
use vhdfs::disk::{Children, Disk, children_below};
use vhdfs::error::{ErrorKind, OpenError, OpenProblem, chain};
use vhdfs::storage::host::paths;

use crate::text::{output, plain, say, shown};
use crate::{Failure, Outcome};
use targets::{LeftAlone, Target, Targets};

/// What one file came to.
pub(crate) trait Report: Serialize {
    /// Says it to a person.
    fn print(&self, out: &mut dyn Write) -> io::Result<()>;

    /// Whether it is a reason for exit code 1.
    fn has_problems(&self) -> bool;
}

#[derive(Serialize)]
#[serde(untagged)]
enum JsonEntry<R> {
    Report(R),
    LeftAlone { file: String, left_alone: String },
    Error { file: String, error: String },
}

/// What became of the files of one command.
#[derive(Clone, Copy, Debug, Default)]
struct Tally {
    done: u64,
    left_alone: u64,
    failed: u64,
    has_problems: bool,
}

impl Tally {
    fn outcome(self) -> Outcome {
        match self.has_problems || self.failed > 0 {
            true => Outcome::Problems,
            false => Outcome::Fine,
        }
    }
}

/// Does `work` on each file and reports it: as text, or as JSON, one object for one file and an
/// array for several, or for a directory. Errors go to stderr in either case. A failed file does not keep
/// the others from their turn.
fn for_each_file<R: Report>(
    targets: &Targets,
    json: bool,
    mut work: impl FnMut(&Target) -> Result<R, Failure>,
) -> Result<Tally, Failure> {
    let mut tally = Tally::default();
    let mut entries = Vec::new();
    for target in &targets.list {
        let file = name(&target.file);
        let entry = match target.check().and_then(|()| work(target)) {
            Ok(report) => {
                tally.done += 1;
                tally.has_problems |= report.has_problems();
                if !json {
                    print(&report)?;
                }
                JsonEntry::Report(report)
            }
            Err(failure) if failure.is::<LeftAlone>() => {
                tally.left_alone += 1;
                let left_alone = failure.to_string();
                if !json {
                    let (file, reason) = (shown(&target.file), plain(&left_alone));
                    output(format!("{file}: left alone: {reason}\n").as_bytes())?;
                }
                JsonEntry::LeftAlone { file, left_alone }
            }
            Err(failure) => {
                tally.failed += 1;
                let error = explained(&failure);
                say(&error);
                JsonEntry::Error { file, error }
            }
        };
        if json {
            entries.push(entry);
        }
    }
    if json {
        let mut text = match &entries[..] {
            [only] if !targets.has_directory => serde_json::to_vec_pretty(only)?,
            several => serde_json::to_vec_pretty(several)?,
        };
        text.push(b'\n');
        output(&text)?;
    } else if targets.list.is_empty() {
        say("no disk files there: those are called *.vhd, *.avhd, *.vhdx or *.avhdx");
    }
    Ok(tally)
}

/// Prints a report; what of it comes out of files cannot do anything to a terminal.
fn print<R: Report>(report: &R) -> io::Result<()> {
    let mut bytes = Vec::new();
    report.print(&mut bytes)?;
    let lines = String::from_utf8_lossy(&bytes);
    let text: String = lines.lines().map(|line| plain(line) + "\n").collect();
    output(text.as_bytes())
}

/// The children of a disk in the directory of its file and below.
fn children_of(file: &Path, disk: &Disk) -> Children {
    children_below(directory_of(file), disk)
}

/// The directory that a file is in.
fn directory_of(file: &Path) -> &Path {
    let directory = file.parent().filter(|found| !found.as_os_str().is_empty());
    directory.unwrap_or(Path::new("."))
}

/// `1 child`, `2 children`.
fn count_of_children(number: usize) -> String {
    match number {
        1 => "1 child".to_owned(),
        more => format!("{more} children"),
    }
}

/// Some names, and how many more there are.
fn listed(names: &[String]) -> String {
    const MOST: usize = 8;
    let names_shown: Vec<String> = names.iter().take(MOST).map(|name| plain(name)).collect();
    let mut text = names_shown.join(", ");
    if names.len() > MOST {
        text.push_str(&format!(" and {} more", names.len() - MOST));
    }
    text
}

/// A file's name as it can stand in JSON.
fn name(file: &Path) -> String {
    file.to_string_lossy().into_owned()
}

/// A failure and its causes, with what this program offers against it.
pub(crate) fn explained(failure: &Failure) -> String {
    let text = chain(&**failure);
    let advice = match failure.downcast_ref::<OpenError>() {
        Some(error) => advice(error.problem()),
        None => None,
    };
    advised(text, advice)
}

/// A reason why a disk could not be opened, with what this program offers against it.
fn explained_problem(problem: &OpenProblem) -> String {
    advised(problem.to_string(), advice(problem))
}

fn advised(text: String, advice: Option<&str>) -> String {
    match advice {
        Some(advice) => format!("{text}; {advice}"),
        None => text,
    }
}

fn advice(problem: &OpenProblem) -> Option<&'static str> {
    matches!(
        problem.kind(),
        ErrorKind::ParentMissing | ErrorKind::ParentMismatch
    )
    .then_some(
        "a parent that was renamed or moved can be named with --parent FILE, or for good with `vhdfs \
         relink --parent FILE`",
    )
}

/// Says what it takes to open a child whose parent is not below its own directory.
fn advise_about_place(child: &Path, parent: &Path) {
    let directory = paths::canonical(directory_of(child));
    let (Ok(directory), Ok(parent)) = (directory, paths::canonical(parent)) else {
        return;
    };
    let is_below = paths::below(&directory, &parent).is_some();
    if let Some(needed) = parent.parent().filter(|_| !is_below) {
        say(&format!(
            "{}: the parent is not below {}: opening it takes --parent-dir {}",
            child.display(),
            directory.display(),
            needed.display()
        ));
    }
}

/// An error about a file, for errors that do not name it themselves.
fn about(file: &Path, error: &dyn std::error::Error) -> Failure {
    format!("{}: {}", file.display(), chain(error)).into()
}
