//! A host that can lose its power, fail, fill up and be slow: a directory of simulated storages
//! (`vhdfs::storage::sim` says what a power cut may leave) behind FUSE, so that any program can use it.
//!
//! A process of its own serves it: were it this one, a killed test would hang for ever, waiting for
//! itself. It is this very binary, told by an environment variable to serve instead of to test.

pub(crate) mod files;
pub(crate) mod orders;
mod serve;

use std::io::{BufRead, BufReader, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use orders::{Answer, Order};

const PLACE: &str = "VHDFS_FAULTY_HOST";

/// The other end of a [`Host`].
#[test]
#[ignore = "not a test: the others start it to have a host served"]
fn serve_a_faulty_host() {
    if let Some(place) = std::env::var_os(PLACE) {
        serve::run(Path::new(&place)).unwrap();
    }
}

/// A mounted host. Dropping it takes it away.
pub(crate) struct Host {
    place: PathBuf,
    process: Child,
    line: BufReader<UnixStream>,
}

impl Host {
    /// Mounts an empty one.
    pub(crate) fn start(place: &Path) -> Self {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let process = Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", "host::serve_a_faulty_host"])
            .env(PLACE, place)
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let mut host = Self {
            place: place.to_owned(),
            process,
            line: BufReader::new(ours),
        };
        host.answer();
        host
    }

    /// Has something done.
    pub(crate) fn order(&mut self, order: &Order) -> Answer {
        let line = serde_json::to_string(order).unwrap();
        writeln!(self.line.get_mut(), "{line}").unwrap();
        self.answer()
    }

    fn answer(&mut self) -> Answer {
        let mut line = String::new();
        self.line.read_line(&mut line).unwrap();
        let answer: Result<Answer, String> = serde_json::from_str(&line)
            .unwrap_or_else(|error| panic!("the host answers {line:?}: {error}"));
        answer.unwrap()
    }

    /// Where a file of it is.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.place.join(name)
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // Its death ends all that still waits for it.
        let _ = self.process.kill();
        let _ = self.process.wait();
        let _ = Command::new("umount").arg("-l").arg(&self.place).status();
    }
}
