//! What the arguments of `vhdfs mount` mean for every front end.

use std::fs;
use std::path::{Path, PathBuf};

use vhdfs::compact::{IdlePolicy, LowSpace};
use vhdfs::library::LibraryOptions;
use vhdfs::storage::host::paths;

use crate::Failure;
use crate::cli::{FsAware, MountArguments, Switch};
use crate::logging::{self, Destination};
use crate::options::Share;
#[cfg(unix)]
use crate::text::say;
use crate::text::shown;

/// Refuses places that could not work. All paths are absolute and without links.
pub(crate) fn check_places(
    source: &Path,
    parent_dirs: &[PathBuf],
    mount_point: &Path,
) -> Result<(), Failure> {
    let mounted = shown(mount_point);
    for directory in std::iter::once(source).chain(parent_dirs.iter().map(PathBuf::as_path)) {
        let served = shown(directory);
        if !fs::metadata(directory).is_ok_and(|found| found.is_dir()) {
            return Err(format!("{served}: not a directory").into());
        }
        // Looking for disks, we would come to our own mount and wait for ourselves.
        if paths::below(directory, mount_point).is_some_and(|rest| rest.as_os_str().is_empty()) {
            return Err(format!("{served} would hide its own disks: mount it elsewhere").into());
        }
        if paths::below(directory, mount_point).is_some() {
            return Err(format!("{mounted} lies below {served}: mount it elsewhere").into());
        }
        if paths::below(mount_point, directory).is_some() {
            return Err(format!("{mounted} would hide {served}: mount it elsewhere").into());
        }
    }
    Ok(())
}

/// Sets logging up as the arguments say.
pub(crate) fn start_logging(arguments: &MountArguments) -> Result<(), Failure> {
    let destination = match &arguments.log_file {
        Some(path) => Destination::File(std::path::absolute(path)?),
        #[cfg(unix)]
        None if !arguments.foreground => Destination::of_daemon(),
        None => Destination::Stderr,
    };
    #[cfg(unix)]
    if matches!(destination, Destination::Nowhere) {
        say("no system log here: give --log-file to learn of problems later");
    }
    logging::start(&destination, arguments.verbose)
        .map_err(|error| format!("cannot log to {destination}: {error}").into())
}

/// How the library is to work.
pub(crate) fn library_options(
    arguments: &MountArguments,
    parent_dirs: Vec<PathBuf>,
) -> LibraryOptions {
    let punch_holes = arguments.punch_holes == Switch::On;
    let compact = !arguments.no_compact && !arguments.read_only;
    LibraryOptions {
        read_only: arguments.read_only,
        punch_holes,
        compact: compact.then_some(IdlePolicy {
            idle_after: arguments.idle_after,
            busy_share: arguments.busy_share,
            min_reclaim: arguments.min_reclaim,
            low_space: match arguments.low_space {
                Share::Bytes(bytes) => LowSpace::Bytes(bytes),
                Share::Percent(percent) => LowSpace::Percent(percent),
            },
            punch_holes,
            fs_aware: arguments.fs_aware == FsAware::Auto,
        }),
        parent_dirs,
        no_other_children: arguments.no_children,
        quiet_time: arguments.quiet_time,
        ..LibraryOptions::default()
    }
}
