//! `vhdfs mount`, from its start to its end: in a console window, or as a service.
//!
//! The same program does both: WinFsp's library finds out whether Windows' service manager has started it. In a
//! console, Ctrl-C, Ctrl-Break, closing the window and logging off end it in order, as does the manager's stop or the
//! system's shutdown of a service; see [`super::control`] for `vhdfs unmount`.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{self, Sender};

use parking_lot::Mutex;
use vhdfs::library::{Library, LibraryOptions};
use vhdfs::storage::host::paths;
use windows_sys::Win32::Foundation::STATUS_UNSUCCESSFUL;
use winfsp::service::{FileSystemService, FileSystemServiceBuilder};
use winfsp::{FspError, FspInit};

use super::control::{self, Requests};
use super::host::Mounted;
use super::raw;
use crate::cli::MountArguments;
use crate::front;
use crate::text::shown;
use crate::{Failure, Outcome};

/// The name that messages of the service manager give us.
const SERVICE: &str = "vhdfs";

/// The first version of WinFsp that has all that is called.
const OLDEST: (u32, u32) = (2, 0);

/// What happens to the service.
enum Event {
    /// It did not begin, for this reason.
    Failed(String),
    /// It has ended; how many disks could not be left clean.
    Ended(usize),
    /// `vhdfs unmount` was heard.
    Unmount,
}

/// What is served, and where.
struct Plan {
    source: PathBuf,
    mount_point: PathBuf,
    options: LibraryOptions,
    threads: Option<u16>,
}

/// A mount that is being served.
struct Running {
    library: Arc<Library>,
    mounted: Arc<Mutex<Mounted>>,
}

/// Runs the command: returns when the mount has ended.
pub(crate) fn mount(arguments: &MountArguments) -> Result<Outcome, Failure> {
    front::start_logging(arguments)?;
    let outcome = serve(arguments);
    if let (Err(failure), Some(_)) = (&outcome, &arguments.log_file) {
        // A service's stderr is read by nobody.
        log::error!("{}", vhdfs::error::chain(&**failure));
    }
    outcome
}

fn serve(arguments: &MountArguments) -> Result<Outcome, Failure> {
    let source = resolve(&arguments.source)?;
    let mount_point = resolve_mount_point(&arguments.mount_point)?;
    let parent_dirs = (arguments.parent_dirs.iter())
        .map(|directory| resolve(directory))
        .collect::<Result<Vec<_>, _>>()?;
    front::check_places(&source, &parent_dirs, &mount_point)?;
    let init = initialise()?;
    let plan = Plan {
        source,
        mount_point,
        options: front::library_options(arguments, parent_dirs),
        threads: arguments.threads,
    };
    let (events, happened) = mpsc::channel();
    let mut service = service(plan, &events, init)?;
    service.start().map_err(about_service)?;
    let outcome = loop {
        match happened.recv()? {
            Event::Unmount => service.stop(),
            Event::Failed(reason) => break Err(reason.into()),
            Event::Ended(0) => break Ok(Outcome::Fine),
            Event::Ended(_) => break Ok(Outcome::Problems),
        }
    };
    service.join().map_err(about_service)?;
    outcome
}

/// What begins and ends the mount when the service manager, or the console, says so.
fn service<'a>(
    plan: Plan,
    events: &Sender<Event>,
    init: FspInit,
) -> Result<FileSystemService<Running>, Failure> {
    let (of_start, of_stop) = (events.clone(), events.clone());
    // Nothing can be done about an event that nobody waits for any more.
    let builder = FileSystemServiceBuilder::new()
        .with_start(move || {
            begin(&plan, &of_start).map_err(|failure| {
                let _ = of_start.send(Event::Failed(vhdfs::error::chain(&*failure)));
                FspError::NTSTATUS(STATUS_UNSUCCESSFUL)
            })
        })
        .with_stop(move |running| {
            if let Some(running) = running {
                let unclean = end(running);
                let _ = of_stop.send(Event::Ended(unclean));
            }
            Ok(())
        });
    builder.build(SERVICE, init).map_err(about_service)
}

fn about_service(error: FspError) -> Failure {
    format!("WinFsp's service: status {:#010x}", error.to_ntstatus()).into()
}

fn begin(plan: &Plan, events: &Sender<Event>) -> Result<Running, Failure> {
    let library = Arc::new(Library::open(&plan.source, plan.options.clone())?);
    let mounted = Mounted::new(
        library.clone(),
        &plan.source,
        &plan.mount_point,
        plan.options.read_only,
        plan.threads,
    )?;
    let mounted = Arc::new(Mutex::new(mounted));
    let place = shown(&plan.mount_point);
    log::info!("{} is mounted at {place}", shown(&plan.source));
    match Requests::new(&plan.mount_point) {
        Ok(requests) => listen(requests, mounted.clone(), events.clone())?,
        Err(error) => log::warn!("`vhdfs unmount {place}` will not work: {error}"),
    }
    Ok(Running { library, mounted })
}

/// Lets `vhdfs unmount` end the mount while no disk is in use.
fn listen(
    requests: Requests,
    mounted: Arc<Mutex<Mounted>>,
    events: Sender<Event>,
) -> Result<(), Failure> {
    let answer = move || match mounted.lock().close_if_unused() {
        Ok(()) => {
            let _ = events.send(Event::Unmount);
            Ok(())
        }
        Err(count) => Err(format!(
            "in use; nothing has changed ({count} open files on it)"
        )),
    };
    std::thread::Builder::new()
        .name("vhdfs-unmount".to_owned())
        .spawn(move || {
            requests.serve(answer);
            // The pipe is there as long as the process, which shows who waits for its end.
            loop {
                std::thread::park();
            }
        })?;
    Ok(())
}

/// Ends a mount; how many disks could not be left clean.
fn end(running: &Running) -> usize {
    log::info!("the mount ends");
    let disks = running.library.status();
    let in_use = disks.iter().filter(|disk| disk.handles > 0).count();
    if in_use > 0 {
        log::warn!(
            "{in_use} disks are in use: it goes all the same, and their users get errors from now on"
        );
    }
    running.mounted.lock().end();
    let unclean = running.library.close();
    log::info!("the mount has ended");
    unclean
}

/// Loads WinFsp, or says what to do about it.
fn initialise() -> Result<FspInit, Failure> {
    let (found, version) = match raw::load() {
        Ok(version) => (winfsp::winfsp_init().is_ok(), version),
        Err(error) => {
            log::debug!("WinFsp's library: {error}");
            (false, (0, 0))
        }
    };
    match found {
        true if version >= OLDEST => Ok(winfsp::winfsp_init().map_err(about_service)?),
        true => Err(format!(
            "WinFsp {}.{} is too old: install WinFsp {}.{} or later (https://winfsp.dev)",
            version.0, version.1, OLDEST.0, OLDEST.1
        )
        .into()),
        false => Err(
            "mounting needs WinFsp, which is not installed: get it from https://winfsp.dev or \
             with `winget install WinFsp.WinFsp`; all other commands work without it"
                .into(),
        ),
    }
}

fn resolve(path: &Path) -> Result<PathBuf, Failure> {
    paths::canonical(path).map_err(|error| format!("{}: {error}", shown(path)).into())
}

fn resolve_mount_point(path: &Path) -> Result<PathBuf, Failure> {
    let place = shown(path);
    if control::drive(path).is_none() && fs::symlink_metadata(path).is_ok() {
        let text = "exists; give a free drive letter, or a directory that does not exist yet";
        return Err(format!("{place} {text}").into());
    }
    control::resolve(path).map_err(|error| format!("{place}: {error}").into())
}
