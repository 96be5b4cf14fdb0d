//! The commands that work on single disk files.

pub(crate) mod check;
pub(crate) mod compact;
pub(crate) mod create;
pub(crate) mod info;
pub(crate) mod map;

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;
use vhdfs::error::chain;

use crate::{Failure, Outcome};

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
    Error { file: String, error: String },
}

/// Does `work` on each file and reports it: as text, or as JSON, one object for one file and an
/// array for several. Errors go to stderr in either case. A failed file does not keep the others
/// from their turn.
fn for_each_file<R: Report>(
    files: &[PathBuf],
    json: bool,
    mut work: impl FnMut(&Path) -> Result<R, Failure>,
) -> Result<Outcome, Failure> {
    let mut outcome = Outcome::Fine;
    let mut entries = Vec::new();
    for file in files {
        match work(file) {
            Ok(report) => {
                if report.has_problems() {
                    outcome = Outcome::Problems;
                }
                if json {
                    entries.push(JsonEntry::Report(report));
                } else {
                    report.print(&mut io::stdout().lock())?;
                }
            }
            Err(failure) => {
                outcome = Outcome::Problems;
                let error = chain(&*failure);
                eprintln!("vhdfs: {error}");
                entries.push(JsonEntry::Error {
                    file: name(file),
                    error,
                });
            }
        }
    }
    if json {
        let mut out = io::stdout().lock();
        match &entries[..] {
            [only] => serde_json::to_writer_pretty(&mut out, only)?,
            several => serde_json::to_writer_pretty(&mut out, several)?,
        }
        writeln!(out)?;
    }
    Ok(outcome)
}

/// A file's name as it can stand in JSON.
fn name(file: &Path) -> String {
    file.to_string_lossy().into_owned()
}

/// An error about a file, for errors that do not name it themselves.
fn about(file: &Path, error: &dyn std::error::Error) -> Failure {
    format!("{}: {}", file.display(), chain(error)).into()
}
