//! Verifying an image, and putting right what is safe to put right.

use std::path::Path;
use std::sync::Arc;

use crate::error::{OpenError, OpenProblem};
use crate::image::vhd::verify;
pub use crate::image::{CheckOptions, CheckReport};
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
