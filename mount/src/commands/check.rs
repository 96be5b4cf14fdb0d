//! `vhdfs check`.

use std::io::{self, Write};
use std::path::Path;

use serde::Serialize;
use vhdfs::check::{CheckOptions, check};

use super::{Report, for_each_file, name};
use crate::cli::CheckArguments;
use crate::{Failure, Outcome};

#[derive(Serialize)]
struct Checked {
    file: String,
    errors: Vec<String>,
    warnings: Vec<String>,
    repaired: Vec<String>,
    #[serde(skip)]
    dry_run: bool,
}

/// Runs the command.
pub(crate) fn run(arguments: &CheckArguments) -> Result<Outcome, Failure> {
    let options = CheckOptions {
        repair: arguments.repair,
        dry_run: arguments.dry_run,
    };
    for_each_file(&arguments.files, arguments.json, |file| {
        check_file(file, &options)
    })
}

fn check_file(file: &Path, options: &CheckOptions) -> Result<Checked, Failure> {
    let report = check(file, options)?;
    Ok(Checked {
        file: name(file),
        errors: report.errors,
        warnings: report.warnings,
        repaired: report.repaired,
        dry_run: options.dry_run,
    })
}

impl Report for Checked {
    fn print(&self, out: &mut dyn Write) -> io::Result<()> {
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
                writeln!(out, "{}: {what}: {text}", self.file)?;
            }
        }
        if found.iter().all(|(_, texts)| texts.is_empty()) {
            writeln!(out, "{}: clean", self.file)?;
        }
        Ok(())
    }

    fn has_problems(&self) -> bool {
        !self.errors.is_empty()
    }
}
