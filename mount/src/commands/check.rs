//! `vhdfs check`.

use std::io::{self, Write};
use std::path::Path;

use serde::Serialize;
use vhdfs::check::{CheckOptions, check, restore};
use vhdfs::disk::{Disk, OpenOptions};
use vhdfs::error::OpenProblem;

use super::targets::{Target, Targets};
use super::{Report, explained_problem, for_each_file, name};
use crate::cli::{CheckArguments, ParentArguments};
use crate::text::{output, plain, shown};
use crate::{Failure, Outcome};

#[derive(Serialize)]
struct Checked {
    file: String,
    errors: Vec<String>,
    warnings: Vec<String>,
    repaired: Vec<String>,
    /// Where what was changed is saved, if that was wanted.
    #[serde(skip_serializing_if = "Option::is_none")]
    backup: Option<String>,
    #[serde(skip)]
    dry_run: bool,
}

/// Runs the command.
pub(crate) fn run(arguments: &CheckArguments) -> Result<Outcome, Failure> {
    if let (Some(backup), [file]) = (&arguments.restore, &arguments.files[..]) {
        return put_back(backup, file);
    }
    let options = CheckOptions {
        repair: arguments.repair,
        zero_lost: arguments.zero_lost,
        dry_run: arguments.dry_run,
        backup: arguments.backup,
        quiet_time: arguments.quiet.time,
    };
    let targets = Targets::of(&arguments.files, arguments.recursive);
    let tally = for_each_file(&targets, arguments.json, |target| {
        check_file(target, &options, &arguments.parents)
    })?;
    Ok(tally.outcome())
}

fn put_back(backup: &Path, file: &Path) -> Result<Outcome, Failure> {
    let count = restore(backup, file)?;
    let text = match count {
        0 => "is as it was before the repair already".to_owned(),
        some => format!("is as it was before the repair: {some} sectors put back"),
    };
    output(format!("{}: {text}\n", shown(file)).as_bytes())?;
    Ok(Outcome::Fine)
}

fn check_file(
    target: &Target,
    options: &CheckOptions,
    parents: &ParentArguments,
) -> Result<Checked, Failure> {
    let file = &target.file;
    let mut report = check(file, options)?;
    report.errors.extend(missing_parent(target, parents));
    Ok(Checked {
        file: name(file),
        errors: report.errors,
        warnings: report.warnings,
        repaired: report.repaired,
        backup: report.backup.as_deref().map(name),
        dry_run: options.dry_run,
    })
}

/// What is wrong with the parents of a differencing disk.
fn missing_parent(target: &Target, parents: &ParentArguments) -> Option<String> {
    let look = OpenOptions {
        read_only: true,
        lock: false,
        ..OpenOptions::default()
    };
    let error = Disk::open_with(&target.file, &look, &target.parents(parents)).err()?;
    // Whatever else there is has been found already.
    matches!(error.problem(), OpenProblem::Parent(_)).then(|| explained_problem(error.problem()))
}

impl Report for Checked {
    fn print(&self, out: &mut dyn Write) -> io::Result<()> {
        let file = plain(&self.file);
        let repaired = if self.dry_run {
            "would repair"
        } else {
            "repaired"
        };
        let found = [
            ("error", &self.errors),
            ("warning", &self.warnings),
            (repaired, &self.repaired),
        ];
        for (what, texts) in found {
            for text in texts {
                writeln!(out, "{file}: {what}: {}", plain(text))?;
            }
        }
        if let Some(backup) = &self.backup {
            let backup = plain(backup);
            writeln!(out, "{file}: what was changed is saved in {backup}")?;
        }
        if found.iter().all(|(_, texts)| texts.is_empty()) {
            writeln!(out, "{file}: clean")?;
        }
        Ok(())
    }

    fn has_problems(&self) -> bool {
        !self.errors.is_empty()
    }
}
