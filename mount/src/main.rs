//! `vhdfs`: mounts a directory of virtual hard disks and keeps them small, and works on single
//! disk files. See `vhdfs --help`.
//!
//! ```text
//! cli, options --> commands/*                     one file: info, check, compact, map, create, relink
//!              \-> daemon --> fuse/*   --> front   a directory, served until it is unmounted
//!              \-> winfsp/service      --> front   the same on Windows
//!              \-> unmount, winfsp/control
//! ```
//! Only this crate knows FUSE, WinFsp, their errors and the command line; all else is the library's.

mod cli;
mod commands;
#[cfg(target_os = "linux")]
mod daemon;
#[cfg(any(target_os = "linux", windows))]
mod front;
#[cfg(target_os = "linux")]
mod fuse;
#[cfg(target_os = "linux")]
mod holders;
#[cfg(any(target_os = "linux", windows))]
mod logging;
#[cfg(target_os = "linux")]
mod mounts;
mod options;
mod text;
#[cfg(target_os = "linux")]
mod unmount;
#[cfg(windows)]
mod wildcards;
#[cfg(windows)]
mod winfsp;

use std::ffi::OsString;
use std::process::ExitCode;

use cli::Command;

/// How the program ends when nothing went wrong on the way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    /// All is well.
    Fine,
    /// Something was found, or failed, and has been reported.
    Problems,
}

/// A reason to end with exit code 1, or 2 if it is a [`WrongUsage`], in words for the user.
type Failure = Box<dyn std::error::Error>;

/// Arguments that contradict each other or ask for what is not possible.
#[derive(Debug)]
struct WrongUsage(String);

impl std::fmt::Display for WrongUsage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for WrongUsage {}

fn main() -> ExitCode {
    #[cfg(unix)]
    if let Err(error) = fail_at_limits() {
        text::say(&format!(
            "a limit of the files' size will end this process: {error}"
        ));
    }
    let arguments: Vec<OsString> = std::env::args_os().collect();
    match run(cli::parse(arguments)) {
        Ok(Outcome::Fine) => ExitCode::SUCCESS,
        Ok(Outcome::Problems) => ExitCode::from(1),
        Err(failure) => {
            text::say(&commands::explained(&failure));
            ExitCode::from(if failure.is::<WrongUsage>() { 2 } else { 1 })
        }
    }
}

/// Has a write beyond the limit of a file's size (`ulimit -f`) fail, as on a full host, instead of ending the
/// process, and with it all that a mount serves.
#[cfg(unix)]
fn fail_at_limits() -> std::io::Result<()> {
    let ignored = std::sync::Arc::default();
    signal_hook::flag::register(signal_hook::consts::SIGXFSZ, ignored).map(drop)
}

fn run(command: Command) -> Result<Outcome, Failure> {
    match command {
        #[cfg(target_os = "linux")]
        Command::Mount(arguments) => daemon::mount(arguments),
        #[cfg(target_os = "linux")]
        Command::Unmount { mount_point } => unmount::unmount(&mount_point),
        #[cfg(windows)]
        Command::Mount(arguments) => winfsp::mount(&arguments),
        #[cfg(windows)]
        Command::Unmount { mount_point } => winfsp::unmount(&mount_point),
        #[cfg(not(any(target_os = "linux", windows)))]
        Command::Mount(_) | Command::Unmount { .. } => {
            Err("mounting is only supported on Linux and Windows".into())
        }
        Command::Compact(arguments) => commands::compact::run(&arguments),
        Command::Info(arguments) => commands::info::run(&arguments),
        Command::Check(arguments) => commands::check::run(&arguments),
        Command::Map(arguments) => commands::map::run(&arguments),
        Command::Create(arguments) => commands::create::run(&arguments),
        Command::Relink(arguments) => commands::relink::run(&arguments),
    }
}
