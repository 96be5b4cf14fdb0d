//! Which files a command works on: those that it is given, and the disk files in the directories that it is
//! given.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use vhdfs::disk::{Disk, HostParents, OpenOptions, disk_files};
use vhdfs::error::{ErrorKind, OpenError, OpenProblem, chain};
use vhdfs::image::probe;
use vhdfs::storage::host::{HostFile, HostOptions};

use super::about;
use crate::Failure;
use crate::cli::ParentArguments;

/// One file.
#[derive(Debug)]
pub(crate) struct Target {
    /// Its name.
    pub(crate) file: PathBuf,
    /// The directory that was named, if the file was found in it or below and not named itself: then what
    /// cannot be worked on for a good reason is no failure.
    found_in: Option<PathBuf>,
    /// Why nothing can be done: a directory that cannot be read.
    failure: Option<io::Error>,
}

impl Target {
    /// Whether it was found in a directory.
    pub(super) fn is_found(&self) -> bool {
        self.found_in.is_some()
    }

    /// Fails for what is only in the list to be told about.
    pub(super) fn check(&self) -> Result<(), Failure> {
        match &self.failure {
            Some(error) => Err(about(&self.file, error)),
            None => Ok(()),
        }
    }

    /// Where its parents are looked for: in the directory that was named, too.
    pub(super) fn parents(&self, arguments: &ParentArguments) -> HostParents {
        arguments.of_found(&self.file, self.found_in.as_deref())
    }

    /// Opens its file, which is going to be changed: one that was found not through a link that has taken
    /// its place. Whoever has it keeps others away.
    pub(super) fn open(&self, read_only: bool) -> Result<Arc<HostFile>, Failure> {
        let options = HostOptions {
            read_only,
            no_follow: self.is_found(),
            ..HostOptions::default()
        };
        let opened = HostFile::open(&self.file, &options);
        opened.map(Arc::new).map_err(|error| self.refused(error))
    }

    /// Opens the disk in it.
    pub(super) fn disk(
        &self,
        storage: &Arc<HostFile>,
        options: &OpenOptions,
        parents: &ParentArguments,
    ) -> Result<Arc<Disk>, Failure> {
        let (storage, parents) = (storage.clone(), self.parents(parents));
        let opened = Disk::open_storage_with(storage, &self.file, options, &parents);
        opened.map_err(|error| self.refused(error))
    }

    /// Fails as opening the disk for writing would, for what the file holds.
    pub(super) fn check_writable(&self, storage: &HostFile) -> Result<(), Failure> {
        let found = probe(storage, &self.file);
        let found = found.map_err(|problem| about(&self.file, &problem))?;
        let Some(problem) = found.not_writable.map(OpenProblem::NotWritable) else {
            return Ok(());
        };
        let left = self.not_ours(&problem).map(Failure::from);
        Err(left.unwrap_or_else(|| about(&self.file, &problem)))
    }

    /// The failure of a file that is not to be changed for this.
    pub(super) fn not_opened(&self, problem: &OpenProblem) -> Failure {
        let left = self.not_ours(problem).map(Failure::from);
        left.unwrap_or_else(|| about(&self.file, problem))
    }

    fn refused(&self, error: OpenError) -> Failure {
        match self.not_ours(error.problem()) {
            Some(left) => left.into(),
            None => error.into(),
        }
    }

    /// Why a file that was found is left alone, if that is why it cannot be opened for writing: others use
    /// it, or it may not be changed. What is damaged is a failure, and what is only not understood is not.
    fn not_ours(&self, problem: &OpenProblem) -> Option<LeftAlone> {
        let is_not_ours = match problem {
            OpenProblem::NotWritable(why) => why.kind() == ErrorKind::Incompatible,
            OpenProblem::Io { source, .. } => matches!(
                source.kind(),
                io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem
            ),
            problem => problem.kind() == ErrorKind::InUse,
        };
        (self.is_found() && is_not_ours).then(|| LeftAlone(chain(problem)))
    }
}

/// The files of one command, in the order in which they have their turn.
#[derive(Debug)]
pub(crate) struct Targets {
    /// The files.
    pub(crate) list: Vec<Target>,
    /// Whether a directory was named, however many disk files are in it.
    pub(crate) has_directory: bool,
}

impl Targets {
    /// What `named` stands for: files as they are, in place of a directory the disk files in it, sorted;
    /// with `recursive` also those below. Symbolic links in a directory are not followed.
    pub(crate) fn of(named: &[PathBuf], recursive: bool) -> Self {
        #[cfg(windows)]
        let named = &crate::wildcards::resolved(named)[..];
        let mut targets = Self {
            list: Vec::new(),
            has_directory: false,
        };
        for path in named {
            if path.is_dir() {
                targets.has_directory = true;
                targets.add_directory(path, recursive);
            } else {
                targets.list.push(Target {
                    file: path.clone(),
                    found_in: None,
                    failure: None,
                });
            }
        }
        targets
    }

    fn add_directory(&mut self, path: &Path, recursive: bool) {
        let found = disk_files(path, recursive);
        let files = found.files.into_iter().map(|file| (file, None));
        let unread = (found.unread.into_iter()).map(|(path, error)| (path, Some(error)));
        let mut targets: Vec<Target> = (files.chain(unread))
            .map(|(file, failure)| Target {
                file,
                found_in: Some(path.to_owned()),
                failure,
            })
            .collect();
        targets.sort_by(|one, other| one.file.cmp(&other.file));
        self.list.append(&mut targets);
    }
}

/// Why a file is left as it is, which is no failure.
#[derive(Debug)]
pub(crate) struct LeftAlone(pub(crate) String);

impl fmt::Display for LeftAlone {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for LeftAlone {}
