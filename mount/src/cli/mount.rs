//! `vhdfs mount`.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use super::{FsAware, Switch};
use crate::options::{self, MountOption, Share};

/// `vhdfs mount`.
#[derive(Clone, Debug, Args)]
pub(crate) struct MountArguments {
    /// The directory with the disk files
    #[arg(value_name = "DIR")]
    pub(crate) source: PathBuf,
    #[cfg_attr(
        not(windows),
        doc = "Where to show the disks: an existing directory, not below DIR"
    )]
    #[cfg_attr(
        windows,
        doc = "Where to show the disks: a free drive such as X:, or a directory that"
    )]
    #[cfg_attr(windows, doc = "does not exist yet, on an NTFS volume")]
    #[arg(value_name = "MNT")]
    pub(crate) mount_point: PathBuf,
    /// Stay in the foreground, log to stderr
    #[arg(short, long, hide = cfg!(windows))]
    pub(crate) foreground: bool,
    /// Never write to a disk file
    #[arg(short, long)]
    pub(crate) read_only: bool,
    /// Let other users in, as far as the files' permissions do
    #[arg(long, hide = cfg!(windows))]
    pub(crate) allow_other: bool,
    /// Compact a disk at full speed when no guest has used it for that long; 0s: at all times
    #[arg(long, value_name = "TIME", default_value = "5s", value_parser = options::duration)]
    pub(crate) idle_after: Duration,
    /// Of how much of the time to compact disks whose guests are active; less where that makes them slower.
    /// 0: only idle disks
    #[arg(long, value_name = "PERCENT", default_value = "5%", value_parser = options::percent)]
    pub(crate) busy_share: u8,
    /// Leave disks alone of which less could go
    #[arg(long, value_name = "SIZE", default_value = "16MiB", value_parser = options::size)]
    pub(crate) min_reclaim: u64,
    /// With less free on the file system of a disk, forget about --min-reclaim, and let --busy-share grow, up
    /// to 50%
    #[arg(long, value_name = "SIZE|PERCENT%", default_value = "10%", value_parser = options::share)]
    pub(crate) low_space: Share,
    /// Leave files alone that no guest has opened for writing, and that were changed by another program
    /// less than that long ago
    #[arg(long, value_name = "TIME", default_value = "5m", value_parser = options::duration)]
    pub(crate) quiet_time: Duration,
    /// Do not compact in the background
    #[arg(long)]
    pub(crate) no_compact: bool,
    /// Give freed parts of blocks in use back to the host, which makes the files sparse
    #[cfg_attr(windows, doc = "- and Windows attaches no sparse VHD or VHDX")]
    #[arg(long, value_name = "on|off", default_value = if cfg!(windows) { "off" } else { "on" })]
    pub(crate) punch_holes: Switch,
    /// Also give up what the guest's filesystems call free, while nobody has the disk open for writing.
    /// Of ext2/3/4 that were cleanly unmounted only: others (NTFS, XFS, btrfs, FAT, exFAT) do not always
    /// say on the disk that a suspended machine has them mounted, and are left to vhdfs compact
    #[arg(long, value_name = "auto|off", default_value = "auto")]
    pub(crate) fs_aware: FsAware,
    /// No disk but those below DIR has one of them as its parent: give up what filesystems call free in all
    /// of them. Without that word it stays in VHDs, and in VHDXs that nobody has written to through this
    /// mount, for a child that is elsewhere could still be opened over them
    #[arg(long)]
    pub(crate) no_children: bool,
    /// How many threads serve requests [default: by the number of CPUs, at least 4]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256))]
    pub(crate) threads: Option<u16>,
    /// Also look here for parents of differencing disks; may be given several times
    #[arg(long = "parent-dir", value_name = "DIR")]
    pub(crate) parent_dirs: Vec<PathBuf>,
    #[cfg_attr(not(windows), doc = "Log to this file instead of the system log")]
    #[cfg_attr(windows, doc = "Log to this file instead of stderr")]
    #[arg(long, value_name = "FILE")]
    pub(crate) log_file: Option<PathBuf>,
    /// Log more; twice: everything
    #[arg(short, long, action = clap::ArgAction::Count)]
    pub(crate) verbose: u8,
    /// Mount options, for fstab: ro, allow_other, idle-after=TIME, busy-share=PERCENT, min-reclaim=SIZE,
    /// low-space=SIZE|PERCENT%, quiet-time=TIME, no-compact, punch-holes=on|off, fs-aware=auto|off, no-children, threads=N, parent-dir=DIR, log-file=FILE; generic ones such as nofail are ignored
    #[arg(
        short,
        value_name = "OPTIONS",
        value_delimiter = ',',
        value_parser = options::mount_option,
        hide = cfg!(windows)
    )]
    pub(crate) options: Vec<MountOption>,
    /// Serve for a parent that waits to hear so.
    #[arg(long, hide = true)]
    pub(crate) report_ready: bool,
}

impl MountArguments {
    /// Lets the `-o` options say what the others do.
    pub(super) fn apply_options(&mut self) {
        for option in std::mem::take(&mut self.options) {
            match option {
                MountOption::ReadOnly(read_only) => self.read_only = read_only,
                MountOption::AllowOther => self.allow_other = true,
                MountOption::IdleAfter(idle_after) => self.idle_after = idle_after,
                MountOption::BusyShare(share) => self.busy_share = share,
                MountOption::LowSpace(share) => self.low_space = share,
                MountOption::QuietTime(quiet_time) => self.quiet_time = quiet_time,
                MountOption::MinReclaim(min_reclaim) => self.min_reclaim = min_reclaim,
                MountOption::NoCompact => self.no_compact = true,
                MountOption::PunchHoles(true) => self.punch_holes = Switch::On,
                MountOption::PunchHoles(false) => self.punch_holes = Switch::Off,
                MountOption::FsAware(true) => self.fs_aware = FsAware::Auto,
                MountOption::FsAware(false) => self.fs_aware = FsAware::Off,
                MountOption::NoChildren => self.no_children = true,
                MountOption::Threads(threads) => self.threads = Some(threads),
                MountOption::ParentDir(path) => self.parent_dirs.push(path),
                MountOption::LogFile(path) => self.log_file = Some(path),
                MountOption::Ignored => {}
            }
        }
    }
}
