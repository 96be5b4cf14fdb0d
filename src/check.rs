//! Verifying an image, and putting right what is safe to put right.

use std::io;
use std::path::Path;

use crate::error::{OpenError, OpenProblem};
use crate::format::Format;
pub use crate::image::{CheckOptions, CheckReport};
use crate::image::{detect, vhd, vhdx};
use crate::storage::Storage;
use crate::storage::host::{HostFile, HostOptions};

/// Checks the image at `path`: its structures, and that no two things claim the same bytes. Reads
/// metadata only.
///
/// Damage of the image is in the report, not an error; so is a file that is no image at all.
///
/// # Errors
/// Where the file cannot be opened, is in use, or the host fails.
pub fn check(path: &Path, options: &CheckOptions) -> Result<CheckReport, OpenError> {
    let write = options.repair && !options.dry_run;
    let host = HostOptions {
        read_only: !write,
        ..HostOptions::default()
    };
    let file = HostFile::open(path, &host)?;
    check_as(&file, path, options).map_err(|source| {
        OpenError::new(
            path,
            OpenProblem::Io {
                action: "check the file",
                source,
            },
        )
    })
}

/// Checks the image in `storage`, as [`check`] does.
///
/// # Errors
/// Where the host fails.
pub fn check_storage(storage: &dyn Storage, options: &CheckOptions) -> io::Result<CheckReport> {
    check_as(storage, Path::new(""), options)
}

fn check_as(storage: &dyn Storage, name: &Path, options: &CheckOptions) -> io::Result<CheckReport> {
    match detect(storage, name) {
        Ok(Format::Vhd) => vhd::verify::verify(storage, options),
        Ok(Format::Vhdx) => vhdx::verify::verify(storage, options),
        Err(OpenProblem::Io { source, .. }) => Err(source),
        Err(problem) => Ok(CheckReport {
            errors: vec![problem.to_string()],
            ..CheckReport::default()
        }),
    }
}
