//! Verifying an image, and putting right what is safe to put right.

use std::path::Path;
use std::sync::Arc;

use crate::error::{OpenError, OpenProblem};
use crate::image::vhd::verify;
use crate::storage::Storage;
use crate::storage::host::{HostFile, HostOptions};

/// How to check.
#[derive(Clone, Copy, Debug, Default)]
pub struct CheckOptions {
    /// Put right what is safe: a missing or outdated footer or copy of it, unused space at the end,
    /// a batmap that does not fit.
    pub repair: bool,
    /// With `repair`: only tell what would be done.
    pub dry_run: bool,
}

/// What a check found. Messages are for people, one finding each.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// Damage: something reads wrongly, or the disk cannot be used by some program.
    pub errors: Vec<String>,
    /// Oddities: everything reads right, but space is wasted or a program may complain.
    pub warnings: Vec<String>,
    /// What was put right, or would be. Findings that were put right are not listed above.
    pub repaired: Vec<String>,
}

impl CheckReport {
    /// Whether nothing is wrong.
    pub fn is_clean(&self) -> bool {
        self.errors.is_empty()
    }
}

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
    let file: Arc<dyn Storage> = Arc::new(HostFile::open(path, &host)?);
    check_storage(&*file, options).map_err(|source| {
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
pub fn check_storage(
    storage: &dyn Storage,
    options: &CheckOptions,
) -> Result<CheckReport, std::io::Error> {
    verify::verify(storage, options)
}
