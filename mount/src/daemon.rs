//! `vhdfs mount`: from the start of the daemon to its end.
//!
//! Without `--foreground` the program starts itself again in the background and waits until that
//! child says, through its standard output, that the mount serves. Until then the child's errors
//! go to the user's stderr, and its exit code is ours.
//!
//! # Strangers
//! The daemon has the rights of who started it and gives them to nobody. The kernel decides who comes in
//! (without `--allow-other` only that user), and by `default_permissions` what they may do, from the modes and
//! owners of the backing files; set-id bits and device nodes of the mount mean nothing. There is no socket and
//! no command to the daemon: it is told things by signals, which the kernel lets through from its own user
//! and root alone, and by requests for the files. SIGTERM, SIGINT, SIGHUP and SIGQUIT end it in order, once;
//! other signals that can be caught do nothing. See the threat model of the library.

use std::ffi::OsString;
use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use rustix::process::{Resource, Rlimit};
use signal_hook::consts::{SIGALRM, SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2};
use signal_hook::iterator::Signals;
use vhdfs::library::Library;

use crate::cli::MountArguments;
use crate::front::{self, Brake};
use crate::fuse::{self, Settings, VhdFs};
use crate::mounts::{self, FILE_SYSTEM_TYPE};
use crate::{Failure, Outcome};

/// Tells the child that a parent waits for it.
const REPORT_READY: &str = "--report-ready";

/// What the child says when it serves.
const READY: &[u8] = b"ready\n";

/// How many files we want to have open at most.
const OPEN_FILES: u64 = 65_536;

/// Runs the command: returns when the mount serves, or, in the foreground, when it has ended.
pub(crate) fn mount(arguments: MountArguments) -> Result<Outcome, Failure> {
    if arguments.foreground || arguments.report_ready {
        serve(&arguments)
    } else {
        start_daemon()
    }
}

fn start_daemon() -> Result<Outcome, Failure> {
    let mut arguments = std::env::args_os();
    let own_name = arguments.next().unwrap_or_else(|| OsString::from("vhdfs"));
    let (mut from_child, to_parent) = io::pipe()?;
    let mut child = Command::new(std::env::current_exe()?)
        .arg0(own_name)
        .args(arguments)
        .arg(REPORT_READY)
        .stdin(Stdio::null())
        .stdout(to_parent)
        .spawn()?;
    // Until the child closes its end, which it does at the latest when it ends. Ours went with the
    // command.
    let mut said = Vec::new();
    from_child.read_to_end(&mut said)?;
    if said == READY {
        return Ok(Outcome::Fine);
    }
    // Otherwise it has said why.
    if child.wait()?.code().is_none_or(|code| code == 0) {
        return Err("the daemon ended before it served".into());
    }
    Ok(Outcome::Problems)
}

fn serve(arguments: &MountArguments) -> Result<Outcome, Failure> {
    let source = resolve(&arguments.source)?;
    let mount_point = resolve(&arguments.mount_point)?;
    let parent_dirs = (arguments.parent_dirs.iter())
        .map(|directory| resolve(directory))
        .collect::<Result<Vec<_>, _>>()?;
    check_mount_point(&mount_point)?;
    front::check_places(&source, &parent_dirs, &mount_point)?;
    front::start_logging(arguments)?;
    allow_open_files();
    // From here on these wait for us, whatever thread they reach.
    let signals = Signals::new([SIGTERM, SIGINT, SIGHUP, SIGQUIT])?;
    // These mean nothing to us, but would end us without unmounting.
    for signal in [SIGUSR1, SIGUSR2, SIGALRM] {
        signal_hook::flag::register(signal, Arc::new(AtomicBool::new(false)))?;
    }
    let options = front::library_options(arguments, parent_dirs);
    let library = Arc::new(Library::open(&source, options)?);
    let settings = Settings {
        read_only: arguments.read_only,
        allow_other: arguments.allow_other,
        threads: arguments.threads,
    };
    let file_system = VhdFs::new(library.clone());
    let brake = file_system.brake();
    let session = fuse::mount(file_system, &source, &mount_point, &settings)
        .map_err(|error| format!("cannot mount at {}: {error}", mount_point.display()))?;
    log::info!(
        "{} is mounted at {}",
        source.display(),
        mount_point.display()
    );
    if arguments.report_ready {
        detach()?;
    }
    let (for_stopper, at) = (library.clone(), mount_point.clone());
    std::thread::Builder::new()
        .name("vhdfs-signals".to_owned())
        .spawn(move || stop_on_signal(signals, &for_stopper, &brake, &at))?;
    // Until it is unmounted, by whomever.
    let ended = session.run();
    let unclean = library.close();
    log::info!("{} is unmounted", mount_point.display());
    ended?;
    Ok(if unclean == 0 {
        Outcome::Fine
    } else {
        Outcome::Problems
    })
}

fn resolve(path: &Path) -> Result<PathBuf, Failure> {
    mounts::resolve(path).map_err(|error| format!("{}: {error}", path.display()).into())
}

/// Refuses what could not work.
fn check_mount_point(mount_point: &Path) -> Result<(), Failure> {
    if let Some(mounted) = mounts::at(mount_point)?
        && mounted.file_system == FILE_SYSTEM_TYPE
    {
        let place = mount_point.display();
        return Err(
            format!("{place} is mounted already; `vhdfs unmount {place}` ends that").into(),
        );
    }
    Ok(())
}

/// Raises the limit of open files as far as we may.
fn allow_open_files() {
    let limit = rustix::process::getrlimit(Resource::Nofile);
    let wanted = limit
        .maximum
        .map_or(OPEN_FILES, |maximum| maximum.min(OPEN_FILES));
    if limit.current.is_some_and(|current| current < wanted) {
        let raised = Rlimit {
            current: Some(wanted),
            maximum: limit.maximum,
        };
        if let Err(error) = rustix::process::setrlimit(Resource::Nofile, raised) {
            log::debug!("the limit of open files stays: {error}");
        }
    }
}

/// Reports to the parent and lets go of all that it gave us.
fn detach() -> io::Result<()> {
    // We cannot lead a process group yet, so this does not fail.
    rustix::process::setsid()?;
    std::env::set_current_dir("/")?;
    let null = fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/null")?;
    let mut out = io::stdout();
    out.write_all(READY)?;
    out.flush()?;
    rustix::stdio::dup2_stderr(&null)?;
    // The parent returns when it sees this end.
    rustix::stdio::dup2_stdout(&null)?;
    Ok(())
}

fn stop_on_signal(mut signals: Signals, library: &Library, brake: &Brake, mount_point: &Path) {
    let Some(signal) = signals.forever().next() else {
        return;
    };
    log::info!("signal {signal}: unmounting {}", mount_point.display());
    match mounts::unmount(mount_point, false) {
        // The session ends by itself, and the main thread with it.
        Ok(()) => return,
        Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {
            log::warn!(
                "{} is in use: it goes all the same, and its users get errors from now on",
                mount_point.display()
            );
        }
        Err(error) => log::error!("{}: not unmounted: {error}", mount_point.display()),
    }
    // What was written through mappings is still the kernel's; the workers go on serving.
    if let Err(error) = write_back(mount_point) {
        log::error!(
            "{}: not all mapped writes are saved: {error}",
            mount_point.display()
        );
    }
    if let Err(error) = mounts::unmount(mount_point, true) {
        log::error!("{}: not detached: {error}", mount_point.display());
    }
    brake.stop();
    let unclean = library.close();
    std::process::exit(i32::from(unclean > 0));
}

fn write_back(mount_point: &Path) -> io::Result<()> {
    Ok(rustix::fs::syncfs(fs::File::open(mount_point)?)?)
}
