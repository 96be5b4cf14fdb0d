//! What commands are told of parents.

use std::path::{Path, PathBuf};

use clap::Args;
use vhdfs::disk::HostParents;

/// Where else than below the directory of a disk file its parents may be.
#[derive(Debug, Args)]
pub(crate) struct ParentDirectories {
    /// Also look here for parents of differencing disks; may be given several times. Without it
    /// they are looked for in the directory of FILE and below
    #[arg(long = "parent-dir", value_name = "DIR")]
    pub(crate) directories: Vec<PathBuf>,
}

/// The same, and which files they are.
#[derive(Debug, Args)]
pub(crate) struct ParentArguments {
    #[command(flatten)]
    in_directories: ParentDirectories,
    /// A parent that was renamed or moved, wherever it is; may be given several times, for the parents of
    /// parents. Each is taken for the disk that names its identity (see also: vhdfs relink)
    #[arg(long = "parent", value_name = "FILE")]
    parent_files: Vec<PathBuf>,
}

impl ParentArguments {
    /// Where the parents of the disk in `file` are looked for.
    pub(crate) fn of(&self, file: &Path) -> HostParents {
        self.of_found(file, None)
    }

    /// As [`Self::of`], of a file that was found in or below `directory`, which was named.
    pub(crate) fn of_found(&self, file: &Path, directory: Option<&Path>) -> HostParents {
        let mut more = self.in_directories.directories.clone();
        more.extend(directory.map(Path::to_owned));
        HostParents::beside(file, &more).with_files(&self.parent_files)
    }
}

/// `vhdfs relink`.
#[derive(Debug, Args)]
pub(crate) struct RelinkArguments {
    /// Differencing disk files; nobody else may have them open
    #[arg(value_name = "CHILD", required = true)]
    pub(crate) children: Vec<PathBuf>,
    /// Their parent, where it is now; nobody may have it open for writing
    #[arg(long, value_name = "FILE")]
    pub(crate) parent: PathBuf,
    /// Print JSON: one object for one CHILD, an array for several
    #[arg(long)]
    pub(crate) json: bool,
}
