//! How `vhdfs unmount` and the process that serves a mount talk: through a named pipe that has the mount
//! point in its name, and to which that process's own user, administrators and the system may connect.
//!
//! The client writes [`UNMOUNT`]; the server answers [`DONE`] when it is about to end, or why it goes on. Both are one
//! line. That the server has ended shows in that the pipe is gone.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::path::{Component, Path, PathBuf, Prefix};
use std::time::{Duration, Instant};

use vhdfs::storage::host::paths;

use super::raw::PipeServer;
use crate::text::{plain, say, shown};
use crate::{Failure, Outcome};

const UNMOUNT: &str = "unmount";
const DONE: &str = "done";

/// The longest line, in bytes.
const LONGEST: u64 = 512;

/// After that time of waiting, the user is told what for.
const PATIENCE: Duration = Duration::from_secs(3);

/// How often it is looked whether the server has ended.
const TICK: Duration = Duration::from_millis(50);

/// The drive letter of a mount point such as `x:` or `X:\`.
pub(super) fn drive(path: &Path) -> Option<char> {
    let mut components = path.components();
    let Some(Component::Prefix(prefix)) = components.next() else {
        return None;
    };
    match (prefix.kind(), components.next(), components.next()) {
        (Prefix::Disk(letter), None | Some(Component::RootDir), None) => {
            Some(char::from(letter.to_ascii_uppercase()))
        }
        _ => None,
    }
}

/// A mount point as there is only one way to write it: a drive and its colon, or the absolute path of a
/// directory, in a directory that exists.
///
/// # Errors
/// Where the directory above does not exist.
pub(super) fn resolve(path: &Path) -> io::Result<PathBuf> {
    if let Some(letter) = drive(path) {
        return Ok(PathBuf::from(format!("{letter}:")));
    }
    let absolute = std::path::absolute(path)?;
    match (absolute.parent(), absolute.file_name()) {
        (Some(parent), Some(name)) => Ok(paths::canonical(parent)?.join(name)),
        _ => Ok(absolute),
    }
}

/// The pipe of a mount point that has been resolved.
fn pipe_name(mount_point: &Path) -> OsString {
    let place = match drive(mount_point) {
        Some(letter) => letter.to_string(),
        // Names of pipes have no backslash in them, and cannot be longer than that.
        None => {
            let text = shown(mount_point).to_lowercase().replace('\\', "/");
            let skipped = text.chars().count().saturating_sub(200);
            text.chars().skip(skipped).collect()
        }
    };
    format!(r"\\.\pipe\vhdfs-mount-{place}").into()
}

/// One line from the other end, which nobody makes longer than allowed.
fn read_line(pipe: &File) -> io::Result<String> {
    let mut line = String::new();
    BufReader::new(pipe.take(LONGEST)).read_line(&mut line)?;
    Ok(line.trim_end().to_owned())
}

fn write_line(mut pipe: &File, line: &str) -> io::Result<()> {
    pipe.write_all(format!("{line}\n").as_bytes())?;
    // Until the other end has read it, for it would be lost with the connection.
    pipe.sync_all()
}

/// Where requests to unmount arrive.
pub(super) struct Requests(PipeServer);

impl Requests {
    /// Makes the pipe for a mount point.
    ///
    /// # Errors
    /// Where another process has it: something else is mounted there, for somebody.
    pub(super) fn new(mount_point: &Path) -> io::Result<Self> {
        PipeServer::new(&pipe_name(mount_point)).map(Self)
    }

    /// Answers requests by `unmount` until that agrees; its error is told to who asked. The pipe goes
    /// with the process.
    pub(super) fn serve(&self, mut unmount: impl FnMut() -> Result<(), String>) {
        loop {
            let request = self
                .0
                .accept()
                .and_then(|pipe| Ok((pipe, read_line(pipe)?)));
            let mut agreed = false;
            let answered = request.and_then(|(pipe, line)| match line.as_str() {
                UNMOUNT => {
                    let answer = unmount();
                    agreed = answer.is_ok();
                    write_line(pipe, answer.as_ref().err().map_or(DONE, String::as_str))
                }
                _ => write_line(pipe, "not understood"),
            });
            self.0.disconnect();
            if agreed {
                return;
            }
            if let Err(error) = answered {
                log::debug!("a request to unmount came to nothing: {error}");
                // Not in a busy loop, should it be the pipe itself that is broken.
                std::thread::sleep(TICK);
            }
        }
    }
}

/// Runs `vhdfs unmount`: returns when the process that serves the mount has closed every disk.
pub(crate) fn unmount(mount_point: &Path) -> Result<Outcome, Failure> {
    let about = |text: &str| Failure::from(format!("{}: {text}", shown(mount_point)));
    let path = resolve(mount_point).map_err(|error| about(&error.to_string()))?;
    let name = pipe_name(&path);
    let pipe = File::options().read(true).write(true).open(&name);
    let pipe = pipe.map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => about("not a vhdfs mount"),
        io::ErrorKind::PermissionDenied => about("somebody else's mount: access is denied"),
        _ => about(&format!("cannot ask for it: {error}")),
    })?;
    let answer = write_line(&pipe, UNMOUNT).and_then(|()| read_line(&pipe));
    drop(pipe);
    match answer {
        Ok(answer) if answer == DONE => {}
        Ok(answer) => return Err(about(&plain(&answer))),
        Err(error) => return Err(about(&format!("no answer: {error}"))),
    }
    let begun = Instant::now();
    let mut told = false;
    // A pipe that nobody serves any more is not there.
    while Path::new(&name).exists() {
        if begun.elapsed() > PATIENCE && !told {
            told = true;
            say("waiting for the disks to be closed");
        }
        std::thread::sleep(TICK);
    }
    Ok(Outcome::Fine)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drives_are_told_from_directories() {
        let drive = |text: &str| drive(Path::new(text));
        assert_eq!((drive("x:"), drive("X:\\")), (Some('X'), Some('X')));
        assert_eq!(
            (drive(r"X:\a"), drive(r"C:a"), drive("a")),
            (None, None, None)
        );
        assert_eq!(resolve(Path::new(r"x:\")).unwrap(), Path::new("X:"));
        let (one, other) = (Path::new(r"C:\Disks"), Path::new(r"c:\disks"));
        assert_eq!(pipe_name(one), pipe_name(other));
        assert_ne!(pipe_name(one), pipe_name(Path::new(r"C:\Disk")));
    }

    #[test]
    fn unmounting_waits_and_can_be_refused() {
        let place = std::env::temp_dir().join(format!("vhdfs-{}", std::process::id()));
        assert!(
            unmount(&place)
                .unwrap_err()
                .to_string()
                .ends_with("not a vhdfs mount")
        );
        let resolved = resolve(&place).unwrap();
        let requests = Requests::new(&resolved).unwrap();
        assert!(
            Requests::new(&resolved).is_err(),
            "two servers of one mount"
        );
        let server = std::thread::spawn(move || {
            let mut asked = 0;
            requests.serve(|| {
                asked += 1;
                match asked {
                    1 => Err("2 disks are in use".to_owned()),
                    _ => Ok(()),
                }
            });
            asked
        });
        let refused = unmount(&place).unwrap_err().to_string();
        assert!(refused.ends_with("2 disks are in use"), "{refused}");
        assert!(matches!(unmount(&place), Ok(Outcome::Fine)));
        assert_eq!(server.join().unwrap(), 2);
    }
}
