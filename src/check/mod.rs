//! Verifying an image, and putting right what is safe to put right.
//!
//! A repair can be rehearsed ([`CheckOptions::dry_run`]): the same work is done on a copy in memory of
//! what it changes, so that what is told is what would be done. And it can leave a backup
//! ([`CheckOptions::backup`]): the rehearsal shows what is going to change, all of that is saved, durably
//! and beside the file, and only then the file gets what was rehearsed, byte for byte and in the same
//! steps. [`restore`] puts it back.

mod backup;
mod footer;
mod rehearsal;
mod restore;
#[cfg(test)]
mod tests;

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::error::{OpenError, OpenProblem, RestoreError};
use crate::format::Format;
pub use crate::image::CheckReport;
use crate::image::{Repair, detect, vhd, vhdx};
use crate::storage::Storage;
use crate::storage::host::{HostFile, HostOptions, PATIENCE, paths, sync_directory_of};
use crate::units::FileRange;
use rehearsal::{Rehearsal, Script};
use restore::Refusal;

/// How to check.
#[derive(Clone, Copy, Debug, Default)]
pub struct CheckOptions {
    /// Put right what is safe. For VHD: a missing or outdated footer or copy of it, a batmap that does
    /// not fit, blocks behind the end of the file that were never flushed; the footer of a fixed disk that
    /// was cut off, is damaged, or has something behind it (a raw file under the name `.vhd` gets one);
    /// for VHDX: a log to replay, a damaged header or region table beside a good one, two damaged ones that
    /// agree where no log is to be replayed and all else is whole, block table entries that say what they
    /// must not where nothing can be lost; for both: unused space at the end.
    pub repair: bool,
    /// With `repair`: have what was cut off a dynamic disk's file, or a VHDX's, read as zeros. Without,
    /// reading it stays an error, and the disk read-only.
    pub zero_lost: bool,
    /// With `repair`: only tell what would be done.
    pub dry_run: bool,
    /// With `repair`: save what is changed in a new file beside the image first; see
    /// [`CheckReport::backup`]. Of [`check`] alone.
    pub backup: bool,
    /// With `repair`: how long ago the file must have been changed where the host cannot tell whether
    /// another program has it open. Of [`check`] alone.
    pub quiet_time: Duration,
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
    let file = HostFile::open(path, &host)?;
    if write {
        have_alone(&file, path, options.quiet_time)?;
    }
    let fail = |action| move |source| OpenError::new(path, OpenProblem::Io { action, source });
    if !write || !options.backup {
        return check_as(&file, path, options).map_err(fail("check the file"));
    }
    let (mut report, script) = rehearse(&file, path, options).map_err(fail("check the file"))?;
    if !script.is_empty() {
        let saved = save(&file, path, &script).map_err(fail("save what is to be repaired"))?;
        (script.perform(&file)).map_err(|error| {
            let advice = format!(
                "{error}; `vhdfs check --restore {}` undoes it",
                saved.display()
            );
            fail("repair the file")(io::Error::new(error.kind(), advice))
        })?;
        report.backup = Some(saved);
    }
    Ok(report)
}

/// Sees to it that nobody else has the file open until it is closed.
fn have_alone(file: &HostFile, path: &Path, quiet: Duration) -> Result<(), OpenError> {
    (file.claim(quiet, &|waited| waited < PATIENCE))
        .map_err(|problem| OpenError::new(path, problem))
}

/// Checks the image in `storage`, as [`check`] does.
///
/// # Errors
/// Where the host fails.
pub fn check_storage(storage: &dyn Storage, options: &CheckOptions) -> io::Result<CheckReport> {
    check_as(storage, Path::new(""), options)
}

fn check_as(storage: &dyn Storage, name: &Path, options: &CheckOptions) -> io::Result<CheckReport> {
    if options.repair && options.dry_run {
        return Ok(rehearse(storage, name, options)?.0);
    }
    verify(storage, name, options)
}

impl CheckOptions {
    /// What is to be put right.
    fn wanted(&self) -> Repair {
        match (self.repair, self.zero_lost) {
            (false, _) => Repair::Nothing,
            (true, false) => Repair::Safe,
            (true, true) => Repair::ZeroLost,
        }
    }
}

/// What a repair would find and do.
fn rehearse(
    storage: &dyn Storage,
    name: &Path,
    options: &CheckOptions,
) -> io::Result<(CheckReport, Script)> {
    let rehearsal = Rehearsal::new(storage)?;
    let report = verify(&rehearsal, name, options)?;
    Ok((report, rehearsal.into_script()))
}

fn verify(storage: &dyn Storage, name: &Path, options: &CheckOptions) -> io::Result<CheckReport> {
    let repair = options.wanted();
    match detect(storage, name) {
        Ok(Format::Vhd) => match footer::verify(storage, name, options.repair, options.backup)? {
            Some(report) => Ok(report),
            None => vhd::verify::verify(storage, repair),
        },
        Ok(Format::Vhdx) => vhdx::verify::verify(storage, repair),
        Err(OpenProblem::Io { source, .. }) => Err(source),
        Err(problem) => Ok(CheckReport {
            errors: vec![problem.to_string()],
            ..CheckReport::default()
        }),
    }
}

/// Saves what `script` is going to change in the image at `path`, durably; the new file's name.
fn save(file: &HostFile, path: &Path, script: &Script) -> io::Result<PathBuf> {
    let (name, saved) = create_beside(path)?;
    let done = guards(file, path)
        .and_then(|guards| backup::save(file, script, &guards, &saved))
        .and_then(|()| sync_directory_of(&name));
    // Windows removes nothing that is open.
    drop(saved);
    if let Err(error) = done {
        // Half a backup is none.
        let _ = std::fs::remove_file(&name);
        return Err(error);
    }
    Ok(name)
}

/// What else than the changes of a repair tells whether a file was used since.
fn guards(storage: &dyn Storage, name: &Path) -> io::Result<Vec<FileRange>> {
    match detect(storage, name) {
        Ok(Format::Vhd) => vhd::verify::metadata(storage),
        // Whoever opens it for writing changes the headers.
        Ok(Format::Vhdx) | Err(_) => Ok(Vec::new()),
    }
}

/// A new file beside `path`, for the user alone: what is cut off may hold what others must not read.
fn create_beside(path: &Path) -> io::Result<(PathBuf, HostFile)> {
    const MOST: u32 = 1000;
    for number in 1..=MOST {
        let mut name = path.as_os_str().to_owned();
        match number {
            1 => name.push(".backup"),
            more => name.push(format!(".backup{more}")),
        }
        let name = PathBuf::from(name);
        match HostFile::create_private(&name) {
            Ok(file) => return Ok((name, file)),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
    }
    Err(io::Error::new(
        io::ErrorKind::AlreadyExists,
        "there are a thousand backups of it already: remove some",
    ))
}

/// Makes the image at `path` again what it was before the repair that saved `backup`, durably. How many
/// sectors of 512 bytes were put back.
///
/// Where it is interrupted, it is to be done again.
///
/// # Errors
/// Where `backup` is none, or the file is not as the repair left it: then nothing was changed. Where one
/// of them cannot be opened, is in use, or the host fails.
pub fn restore(backup: &Path, path: &Path) -> Result<u64, RestoreError> {
    let reading = HostOptions {
        read_only: true,
        ..HostOptions::default()
    };
    let saved = HostFile::open(backup, &reading)?;
    if paths::is_same(backup, path) {
        return Err(RestoreError::NoBackup {
            path: backup.to_owned(),
            reason: "it is the file itself that is to be put right".to_owned(),
        });
    }
    let file = HostFile::open(path, &HostOptions::default())?;
    // It is compared with what the repair left.
    have_alone(&file, path, Duration::ZERO)?;
    let io = |path: &Path, action, source| {
        RestoreError::Open(OpenError::new(path, OpenProblem::Io { action, source }))
    };
    restore::restore(&saved, &file).map_err(|refusal| match refusal {
        Refusal::Backup(reason) => RestoreError::NoBackup {
            path: backup.to_owned(),
            reason,
        },
        Refusal::File(reason) => RestoreError::Changed {
            path: path.to_owned(),
            reason,
        },
        Refusal::BackupIo(source) => io(backup, "read the backup", source),
        Refusal::FileIo(source) => io(path, "put back what was saved; do it again", source),
    })
}
