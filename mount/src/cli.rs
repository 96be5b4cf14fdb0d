//! The command line: clap's types, and the two other ways in which `mount` programs call us.

mod mount;
mod parents;
mod quiet;
mod switches;

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use clap::error::ErrorKind;
use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};

use crate::options::{self, Share};
pub(crate) use mount::MountArguments;
pub(crate) use parents::{ParentArguments, ParentDirectories, RelinkArguments};
pub(crate) use quiet::QuietArguments;
pub(crate) use switches::{FsAware, Switch};

/// Virtual hard disks that stay small.
#[derive(Debug, Parser)]
#[command(
    name = "vhdfs",
    version,
    about,
    after_help = "Exit codes: 0 fine; 1 problems found, something failed, or interrupted; \
                  2 wrong usage.\nSizes are bytes, or take K, M, G, T (also KiB, MiB, ...), all \
                  powers of 1024. Durations take ms, s, m, h."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Show the disks of a directory as raw files, and compact them in the background
    ///
    /// Every *.vhd, *.avhd, *.vhdx and *.avhdx file below DIR appears at the same place below MNT, with
    /// .raw behind its name. A disk over which others are is shown read-only.
    #[cfg_attr(
        not(windows),
        doc = " Returns once the mount serves; a daemon goes on until it is"
    )]
    #[cfg_attr(not(windows), doc = " unmounted or gets SIGTERM.")]
    #[cfg_attr(windows, doc = " Goes on until Ctrl-C, or until it is unmounted.")]
    ///
    #[cfg_attr(
        not(windows),
        doc = " The mount tells about itself in extended attributes:"
    )]
    #[cfg_attr(
        not(windows),
        doc = " `user.vhdfs.pid` and `user.vhdfs.status` (JSON) of MNT,"
    )]
    #[cfg_attr(
        not(windows),
        doc = " `user.vhdfs.status` (JSON) of each disk. Read them with"
    )]
    #[cfg_attr(not(windows), doc = " getfattr --only-values -n NAME FILE.")]
    #[cfg_attr(
        windows,
        doc = " Needs WinFsp 2.0 or later. Windows has no way to pass a discard on to"
    )]
    #[cfg_attr(
        windows,
        doc = " such a mount: disks shrink by what their guests overwrite with zeros"
    )]
    #[cfg_attr(
        windows,
        doc = " and, while nobody has them open for writing, by what their"
    )]
    #[cfg_attr(windows, doc = " filesystems call free.")]
    ///
    #[cfg_attr(
        windows,
        doc = " Works as a service as well, with --log-file and absolute paths:"
    )]
    #[cfg_attr(
        windows,
        doc = " sc create vhdfs start= auto binPath= \"C:\\...\\vhdfs.exe mount --log-file FILE DIR X:\""
    )]
    Mount(MountArguments),
    /// Unmount, and return when every disk is closed and clean
    ///
    /// Fails, and changes nothing, while something on the mount is in use. Where a program with a mount
    /// namespace of its own (unshare, a container, a sandbox) has a copy of the mount, disks that nobody has
    /// open there are closed all the same, and the others when they are closed there; then this fails and
    /// names the program.
    #[command(visible_alias = "umount")]
    Unmount {
        /// Where it is mounted
        #[arg(value_name = "MNT")]
        mount_point: PathBuf,
    },
    /// Make disk files as short as their content allows, in place
    ///
    /// Drops blocks that hold nothing but zeros and what the guest's filesystems call free, and moves
    /// the others together. A filesystem that is not clean, or not known, counts as in use; the report
    /// says so. Interrupting it is safe: what was done stays, the exit code is 1, and a further run
    /// goes on from there.
    ///
    /// A fixed disk keeps its length: see --punch-holes. Only what its file has beyond the disk goes.
    ///
    /// A file that another program has open is refused, once it was waited for for 10 seconds. One that
    /// opens the file later gets it at once: for reading, the rest is done afterwards, for writing, it is
    /// left.
    ///
    /// Not for the disk of a machine that was suspended or saved: what it knows of its filesystems
    /// is not all on the disk. Use --no-fs-aware there.
    Compact(CompactArguments),
    /// Say what a disk file is
    Info(InfoArguments),
    /// Look for damage in disk files
    Check(CheckArguments),
    /// Draw where in a disk file live blocks, dead ones, holes and metadata lie
    Map(MapArguments),
    /// Make a new, empty disk file
    Create(CreateArguments),
    /// Write into differencing disks where their parent is now
    ///
    /// For a parent that was renamed or moved. It has to be the disk that CHILD was made over, by its
    /// identity, unchanged since. In CHILD nothing else changes; places that other programs noted are
    /// replaced. Interrupting it is safe: CHILD names the old place then or the new one.
    Relink(RelinkArguments),
}

/// Whether `compact` punches holes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum PunchHoles {
    #[cfg_attr(
        not(windows),
        doc = "For what filesystems call free, if the file is sparse already"
    )]
    #[cfg_attr(windows, doc = "As off, for Windows attaches no sparse VHD or VHDX")]
    Auto,
    /// For that and for zeros, which are looked for in all blocks.
    On,
    /// Never.
    Off,
}

/// How much is looked at, with the meanings of Windows' Optimize-VHD.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Mode {
    /// Drop what the guest's filesystems call free, and look for blocks of zeros.
    Full,
    /// Drop what the guest's filesystems call free; read no other block.
    Quick,
    /// Look for blocks of zeros: for a disk whose free space was zeroed.
    Prezeroed,
    /// Drop nothing that is not known: for a disk whose free space was trimmed.
    Pretrimmed,
}

/// `vhdfs compact`.
#[derive(Debug, Args)]
pub(crate) struct CompactArguments {
    /// Disk files, which nobody else may have open, or directories of them. In a directory, files that are in
    /// use, fixed, read-only, or parents of other disks are left alone, which is no failure
    #[arg(value_name = "FILE|DIR", required = true)]
    pub(crate) files: Vec<PathBuf>,
    /// Of a directory, also the disk files below it
    #[arg(short, long)]
    pub(crate) recursive: bool,
    /// Leave files alone that would give back less: neither as much of their length, nor of what the host stores
    /// for them
    #[arg(long, value_name = "SIZE|PERCENT%", value_parser = options::share, conflicts_with = "unsparse")]
    pub(crate) min_reclaim: Option<Share>,
    /// Only say what would come of it; the predicted length is exact
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// How much is looked at
    #[arg(long, value_name = "MODE", default_value = "full")]
    pub(crate) mode: Mode,
    /// Do not ask the guest's filesystems what is free
    #[arg(long)]
    pub(crate) no_fs_aware: bool,
    /// No other disk has FILE as its parent: give up what the guest's filesystems call free of a VHD, too,
    /// and where not all disks beside it can be read. Without that word it stays in a VHD, for a child that
    /// is elsewhere could not tell that its parent has changed; a fixed VHD gets a new identity instead
    #[arg(long, conflicts_with = "no_fs_aware")]
    pub(crate) no_children: bool,
    /// Count Linux swap space as free
    #[arg(long, conflicts_with = "no_fs_aware")]
    pub(crate) free_swap: bool,
    /// Believe an ext3 or ext4 file system that was not unmounted cleanly, too, where its journal says
    /// what is free. For a machine that crashed, never for one that was suspended or saved
    #[arg(long, conflicts_with = "no_fs_aware")]
    pub(crate) replay_journal: bool,
    /// Give unused parts of the blocks that stay back to the host. That makes the file sparse, and
    /// Windows does not attach a copy that is still sparse. `on` is for fixed disks, too, which keep their
    /// length: what is zero or free becomes holes
    #[arg(long, value_name = "auto|on|off", default_value = "auto")]
    pub(crate) punch_holes: PunchHoles,
    /// In the end fill the holes of the file, so that it is no longer sparse and Windows attaches it and copies
    /// of it. The host stores all of its length then. Works on fixed disks as well
    #[arg(long)]
    pub(crate) unsparse: bool,
    /// Keep blocks of a differencing disk that hold the same as its parent
    #[arg(long)]
    pub(crate) keep_identical: bool,
    #[command(flatten)]
    pub(crate) parents: ParentArguments,
    #[command(flatten)]
    pub(crate) quiet: QuietArguments,
    /// Print JSON: one object for one file, an array for several or for a directory
    #[arg(long)]
    pub(crate) json: bool,
}

/// `vhdfs info`.
#[derive(Debug, Args)]
pub(crate) struct InfoArguments {
    /// Disk files, which may be in use, or directories of them
    #[arg(value_name = "FILE|DIR", required = true)]
    pub(crate) files: Vec<PathBuf>,
    /// Of a directory, also the disk files below it
    #[arg(short, long)]
    pub(crate) recursive: bool,
    #[command(flatten)]
    pub(crate) parents: ParentArguments,
    /// Print JSON: one object for one file, an array for several or for a directory
    #[arg(long)]
    pub(crate) json: bool,
}

/// `vhdfs check`.
#[derive(Debug, Args)]
pub(crate) struct CheckArguments {
    /// Disk files, or directories of them
    #[arg(value_name = "FILE|DIR", required = true)]
    pub(crate) files: Vec<PathBuf>,
    /// Of a directory, also the disk files below it
    #[arg(short, long)]
    pub(crate) recursive: bool,
    /// Repair what can be repaired without losing data
    ///
    /// A file that has the name of a VHD and no footer counts as a fixed VHD that lost it, and gets one:
    /// what is in front of it stays as it is, also if it is raw data and never was a VHD.
    #[arg(long)]
    pub(crate) repair: bool,
    /// With --repair: where the end of a file was cut off, have what was lost read as zeros, so that the
    /// disk can be written to again. Without this it can only be read, and what was lost is an error
    #[arg(long, requires = "repair")]
    pub(crate) zero_lost: bool,
    /// With --repair: only say what would be repaired
    #[arg(long, requires = "repair")]
    pub(crate) dry_run: bool,
    /// With --repair: first save all that is going to be changed in a new file beside FILE,
    /// FILE.backup, which --restore puts back
    #[arg(long, requires = "repair", conflicts_with = "dry_run")]
    pub(crate) backup: bool,
    /// Put back what a repair with --backup changed in FILE. Refuses a file whose length, or what it
    /// puts back, was changed since; where it is interrupted, it has to be done again
    #[arg(long, value_name = "BACKUP", conflicts_with_all = ["repair", "json"])]
    pub(crate) restore: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) parents: ParentArguments,
    #[command(flatten)]
    pub(crate) quiet: QuietArguments,
    /// Print JSON: one object for one file, an array for several or for a directory
    #[arg(long)]
    pub(crate) json: bool,
}

/// `vhdfs map`.
#[derive(Debug, Args)]
pub(crate) struct MapArguments {
    /// The disk file; it may be in use
    #[arg(value_name = "FILE")]
    pub(crate) file: PathBuf,
    #[command(flatten)]
    pub(crate) parents: ParentArguments,
    /// Do not read blocks to tell live ones from dead ones
    #[arg(long)]
    pub(crate) no_scan: bool,
    /// Draw with ASCII characters alone
    #[arg(long)]
    pub(crate) ascii: bool,
    /// Print the parts of the file as JSON instead: where each starts, its length, and what it is used for
    #[arg(long, conflicts_with = "ascii")]
    pub(crate) json: bool,
}

/// The kinds of disk that can be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum NewDiskType {
    /// Grows with its content.
    Dynamic,
    /// Has its full length from the start; the host stores what is written.
    Fixed,
    /// Reads as its parent where nothing was written.
    Differencing,
}

/// The formats of a disk that can be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum NewFormat {
    /// Virtual Hard Disk 1.0: up to 2040 GiB.
    Vhd,
    /// Virtual Hard Disk 2: up to 64 TiB.
    Vhdx,
}

/// `vhdfs create`.
#[derive(Debug, Args)]
pub(crate) struct CreateArguments {
    /// The file to make; it must not exist
    #[arg(value_name = "FILE")]
    pub(crate) file: PathBuf,
    /// The disk's size [default: the parent's]
    #[arg(long, value_parser = options::size, required_unless_present = "parent")]
    pub(crate) size: Option<u64>,
    /// Whether the file grows with its content, has its full length from the start, or holds what
    /// differs from a parent [default: dynamic, or differencing with --parent]
    #[arg(long = "type", value_name = "TYPE")]
    pub(crate) disk_type: Option<NewDiskType>,
    /// The disk file that a differencing disk is over; nothing may change it from then on
    #[arg(long, value_name = "FILE", required_if_eq("disk_type", "differencing"))]
    pub(crate) parent: Option<PathBuf>,
    /// The format [default: by FILE's extension, otherwise the parent's, or VHD]
    #[arg(long, value_name = "FORMAT")]
    pub(crate) format: Option<NewFormat>,
    /// Bytes in a block: a power of two [default: 2M]
    #[arg(long, value_name = "SIZE", value_parser = options::size)]
    pub(crate) block_size: Option<u64>,
    /// Bytes in a sector of a VHDX, 512 or 4096 [default: the parent's, or 512]
    #[arg(long, value_name = "BYTES", value_parser = options::sector_size)]
    pub(crate) sector_size: Option<u32>,
    /// With --parent: where the parent has no identity of its own (Bochs writes VHDs without, and QEMU
    /// where it was built without libuuid), give it one first. Refused where disks are over it already
    #[arg(long, requires = "parent")]
    pub(crate) give_identity: bool,
    #[command(flatten)]
    pub(crate) parents: ParentDirectories,
}

/// What these arguments ask for. Ends the program where they make no sense (exit code 2), and
/// after printing help or the version (exit code 0).
pub(crate) fn parse(arguments: Vec<OsString>) -> Command {
    let parsed = match as_mount_helper(&arguments) {
        Some(translated) => Cli::try_parse_from(translated),
        None => Cli::try_parse_from(arguments),
    };
    let mut command = parsed.unwrap_or_else(|error| error.exit()).command;
    if let Command::Mount(mount) = &mut command {
        mount.apply_options();
    }
    if let Command::Check(check) = &command
        && check.restore.is_some()
        && check.files.len() > 1
    {
        let text = "--restore takes one FILE: a backup is that of one file";
        Cli::command().error(ErrorKind::TooManyValues, text).exit();
    }
    if let Command::Compact(compact) = &command
        && compact.unsparse
        && compact.punch_holes == PunchHoles::On
    {
        let text = "--unsparse fills the holes that --punch-holes=on makes";
        Cli::command()
            .error(ErrorKind::ArgumentConflict, text)
            .exit();
    }
    if let Command::Create(create) = &command
        && (create.block_size).is_some_and(|size| u32::try_from(size).is_err())
    {
        Cli::command()
            .error(ErrorKind::ValueValidation, "--block-size is too large")
            .exit();
    }
    command
}

/// The arguments of a call by mount(8), as `mount.fuse.vhdfs SOURCE MNT [-sfnv] [-o OPTIONS]`, or
/// by mount.fuse(8), as `vhdfs SOURCE MNT -o OPTIONS`, in our own syntax. `None` for all others.
fn as_mount_helper(arguments: &[OsString]) -> Option<Vec<OsString>> {
    let program = Path::new(arguments.first()?)
        .file_name()
        .unwrap_or_default();
    let by_name = program == "mount.vhdfs" || program.as_encoded_bytes().starts_with(b"mount.fuse");
    let first = arguments.get(1)?;
    let is_option = |text: &OsStr| text.as_encoded_bytes().starts_with(b"-");
    // A path where a command was expected, and the option that mount.fuse always adds.
    let by_shape = first.as_encoded_bytes().contains(&b'/')
        && !is_option(first)
        && arguments
            .iter()
            .skip(3)
            .any(|text| text.as_encoded_bytes().starts_with(b"-o"));
    if !by_name && !by_shape {
        return None;
    }
    let mut translated = vec![OsString::from("vhdfs"), OsString::from("mount")];
    let mut rest = arguments.iter().skip(1);
    while let Some(argument) = rest.next() {
        match argument.as_encoded_bytes() {
            // Sloppy, no mtab, verbose: nothing that we would do otherwise. `-f` is mount's dry
            // run, which it does not even call us for.
            b"-s" | b"-f" | b"-n" | b"-v" => {}
            // The type and the namespace have done their work.
            b"-t" | b"-N" => {
                rest.next();
            }
            // `vhdfs#DIR` in the first field of fstab.
            text if !is_option(argument) && text.starts_with(b"vhdfs#") => {
                let source = argument
                    .to_str()
                    .map(|text| OsString::from(&text["vhdfs#".len()..]));
                translated.push(source.unwrap_or_else(|| argument.clone()));
            }
            _ => translated.push(argument.clone()),
        }
    }
    Some(translated)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn mount(arguments: &[&str]) -> MountArguments {
        match parse(arguments.iter().map(OsString::from).collect()) {
            Command::Mount(mount) => mount,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn mount_options_win() {
        let found = mount(&[
            "vhdfs",
            "mount",
            "d",
            "m",
            "-o",
            "ro,idle-after=2m,allow_other",
            "-o",
            "nofail,threads=3,punch-holes=off,no-compact,min-reclaim=1G,log-file=/l,parent-dir=/p",
        ]);
        assert!(found.read_only && found.allow_other && found.no_compact);
        assert_eq!(found.idle_after, Duration::from_secs(120));
        assert_eq!(found.min_reclaim, 1 << 30);
        assert_eq!((found.threads, found.punch_holes), (Some(3), Switch::Off));
        assert_eq!(found.log_file, Some(PathBuf::from("/l")));
        assert_eq!(found.parent_dirs, [PathBuf::from("/p")]);
    }

    #[test]
    fn mount_programs_call_with_their_own_syntax() {
        for arguments in [
            &["/sbin/mount.fuse.vhdfs", "/d", "/m", "-o", "rw,ro"][..],
            &[
                "mount.fuse.vhdfs",
                "vhdfs#/d",
                "/m",
                "-n",
                "-s",
                "-o",
                "ro",
                "-t",
                "fuse.vhdfs",
            ],
            &["/sbin/mount.vhdfs", "/d", "/m", "-oro"],
            &["vhdfs", "/d", "/m", "-o", "ro,dev,suid"],
        ] {
            let found = mount(arguments);
            assert_eq!(
                (found.source, found.mount_point),
                ("/d".into(), "/m".into())
            );
            assert!(found.read_only && !found.foreground, "{arguments:?}");
        }
        let plain = ["vhdfs", "info", "/some/file", "-o"].map(OsString::from);
        assert_eq!(as_mount_helper(&plain), None);
    }
}
