//! `vhdfs relink`.

use std::io::{self, Write};
use std::path::Path;

use serde::Serialize;
use vhdfs::disk::relink;

use super::targets::Targets;
use super::{Report, advise_about_place, for_each_file, name};
use crate::cli::RelinkArguments;
use crate::text::plain;
use crate::{Failure, Outcome};

#[derive(Serialize)]
struct Linked {
    file: String,
    parent: String,
    /// As they stand in the file now.
    relative_path: String,
    absolute_path: String,
    repaired: Vec<String>,
}

/// Runs the command.
pub(crate) fn run(arguments: &RelinkArguments) -> Result<Outcome, Failure> {
    let targets = Targets::of(&arguments.children, false);
    let tally = for_each_file(&targets, arguments.json, |target| {
        relink_file(&target.file, &arguments.parent)
    })?;
    Ok(tally.outcome())
}

fn relink_file(child: &Path, parent: &Path) -> Result<Linked, Failure> {
    // What else could be done about a parent that is not the right one is no help here.
    let done = relink(child, parent).map_err(|error| vhdfs::error::chain(&error))?;
    advise_about_place(child, parent);
    Ok(Linked {
        file: name(child),
        parent: name(parent),
        relative_path: done.relative,
        absolute_path: done.absolute,
        repaired: done.repaired,
    })
}

impl Report for Linked {
    fn print(&self, out: &mut dyn Write) -> io::Result<()> {
        let file = plain(&self.file);
        for repair in &self.repaired {
            writeln!(out, "{file}: repaired: {repair}")?;
        }
        let path = match self.relative_path.is_empty() {
            true => &self.absolute_path,
            false => &self.relative_path,
        };
        writeln!(out, "{file}: its parent is {}", plain(path))
    }

    fn has_problems(&self) -> bool {
        false
    }
}
