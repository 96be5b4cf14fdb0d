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
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

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
    let ending = Arc::new(Ending {
        library: library.clone(),
        brake,
        mount_point: mount_point.clone(),
        begun: AtomicBool::new(false),
    });
    let for_signals = ending.clone();
    std::thread::Builder::new()
        .name("vhdfs-signals".to_owned())
        .spawn(move || for_signals.on_signal(signals))?;
    if let Some(mounted) = mounts::at(&mount_point)? {
        let ending = ending.clone();
        std::thread::Builder::new()
            .name("vhdfs-mounts".to_owned())
            .spawn(move || ending.when_unmounted(&mounted.device))?;
    }
    // Until it is unmounted, by whomever.
    let ended = session.run();
    ending.begin();
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

/// How service ends other than by the kernel's word.
struct Ending {
    library: Arc<Library>,
    brake: Brake,
    mount_point: PathBuf,
    begun: AtomicBool,
}

impl Ending {
    /// For the one thread that closes all disks and ends the process; others wait for that.
    fn begin(&self) {
        while self.begun.swap(true, Ordering::AcqRel) {
            std::thread::park();
        }
    }

    /// Closes all disks, whoever has them open, and ends the process.
    fn end(&self) -> ! {
        self.begin();
        self.brake.stop();
        let unclean = self.library.close();
        log::info!("{} is unmounted", self.mount_point.display());
        std::process::exit(i32::from(unclean > 0));
    }

    fn on_signal(&self, mut signals: Signals) {
        /// Where nobody else has the mount, the session ends by itself that soon.
        const SOON: Duration = Duration::from_secs(1);
        let Some(signal) = signals.forever().next() else {
            return;
        };
        let mount_point = self.mount_point.display();
        log::info!("signal {signal}: unmounting {mount_point}");
        // What was written through mappings is still the kernel's; the workers go on serving.
        if let Err(error) = write_back(&self.mount_point) {
            log::error!("{mount_point}: not all mapped writes are saved: {error}");
        }
        match mounts::unmount(&self.mount_point, false) {
            // And the main thread with it.
            Ok(()) => std::thread::sleep(SOON),
            Err(error) => {
                match error.kind() {
                    io::ErrorKind::ResourceBusy => log::warn!(
                        "{mount_point} is in use: it goes all the same, and its users get errors from now on"
                    ),
                    _ => log::error!("{mount_point}: not unmounted: {error}"),
                }
                if let Err(error) = mounts::unmount(&self.mount_point, true) {
                    log::error!("{mount_point}: not detached: {error}");
                }
            }
        }
        self.end();
    }

    /// Ends service once the mount is gone here, though it lives on in another mount namespace. A disk that
    /// somebody has open there is served until it is closed: what was written to it is safe, but a program
    /// that was not told must not get errors.
    fn when_unmounted(&self, device: &str) {
        /// The kernel's word comes first where nobody else has the mount.
        const SOON: Duration = Duration::from_millis(500);
        const BETWEEN_LOOKS: Duration = Duration::from_millis(250);
        let mount_point = self.mount_point.display();
        if let Err(error) = mounts::wait_until_gone(device) {
            log::warn!("{mount_point}: whether it is mounted cannot be told: {error}");
            return;
        }
        std::thread::sleep(SOON);
        let mut is_told = false;
        while let Err(count) = self.brake.stop_if_unused() {
            if !is_told {
                log::warn!(
                    "{mount_point} is unmounted, but open files there: {count}; what is open is served on"
                );
                is_told = true;
            }
            self.library.retire();
            std::thread::sleep(BETWEEN_LOOKS);
        }
        self.end();
    }
}

fn write_back(mount_point: &Path) -> io::Result<()> {
    Ok(rustix::fs::syncfs(fs::File::open(mount_point)?)?)
}
