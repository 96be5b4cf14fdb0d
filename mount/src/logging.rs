//! Where log lines go.

use std::fmt;
use std::fs::File;
use std::io::{self, Write};
#[cfg(unix)]
use std::os::unix::net::UnixDatagram;
#[cfg(unix)]
use std::path::Path;
use std::path::PathBuf;

use env_logger::{Builder, Target};
use log::{Level, LevelFilter};

use crate::text::{plain, shown};

/// The system log's socket.
#[cfg(unix)]
const SYSLOG: &str = "/dev/log";

/// Where they can go.
#[derive(Clone, Debug)]
pub(crate) enum Destination {
    Stderr,
    File(PathBuf),
    #[cfg(unix)]
    Syslog,
    #[cfg(unix)]
    Nowhere,
}

impl fmt::Display for Destination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stderr => f.write_str("stderr"),
            Self::File(path) => f.write_str(&shown(path)),
            #[cfg(unix)]
            Self::Syslog => f.write_str(SYSLOG),
            #[cfg(unix)]
            Self::Nowhere => f.write_str("nowhere"),
        }
    }
}

#[cfg(unix)]
impl Destination {
    /// Where a daemon logs if nobody says otherwise.
    pub(crate) fn of_daemon() -> Self {
        if Path::new(SYSLOG).exists() {
            Self::Syslog
        } else {
            Self::Nowhere
        }
    }
}

/// Sets logging up, once. `verbose` counts how often the user asked for more; `RUST_LOG` says it
/// in detail.
///
/// # Errors
/// Where the file or the system log cannot be opened.
pub(crate) fn start(destination: &Destination, verbose: u8) -> io::Result<()> {
    let level = match verbose {
        0 => LevelFilter::Info,
        1 => LevelFilter::Debug,
        _ => LevelFilter::Trace,
    };
    let mut builder = Builder::new();
    builder.filter_level(level);
    if verbose < 2 {
        // At debug it logs each request.
        builder.filter_module("fuser", LevelFilter::Error);
    }
    builder.parse_default_env();
    match destination {
        #[cfg(unix)]
        Destination::Nowhere => return Ok(()),
        Destination::Stderr => {
            builder.format(|line, record| {
                let text = plain(&record.args().to_string());
                writeln!(line, "vhdfs: {}: {text}", name(record.level()))
            });
        }
        Destination::File(path) => {
            let file = File::options().append(true).create(true).open(path)?;
            builder.target(Target::Pipe(Box::new(file)));
            builder.format(|line, record| {
                let (time, level) = (line.timestamp_seconds(), name(record.level()));
                writeln!(
                    line,
                    "{time} {level}: {}",
                    plain(&record.args().to_string())
                )
            });
        }
        #[cfg(unix)]
        Destination::Syslog => {
            builder.target(Target::Pipe(Box::new(Syslog::connect()?)));
            builder.format(|line, record| {
                // Facility "daemon", and the level as syslog(3) counts it.
                let priority = 3 * 8 + severity(record.level());
                let pid = std::process::id();
                let text = plain(&record.args().to_string());
                write!(line, "<{priority}>vhdfs[{pid}]: {text}")
            });
        }
    }
    builder.try_init().map_err(io::Error::other)
}

fn name(level: Level) -> &'static str {
    match level {
        Level::Error => "error",
        Level::Warn => "warning",
        Level::Info => "info",
        Level::Debug => "debug",
        Level::Trace => "trace",
    }
}

#[cfg(unix)]
fn severity(level: Level) -> u8 {
    match level {
        Level::Error => 3,
        Level::Warn => 4,
        Level::Info => 6,
        Level::Debug | Level::Trace => 7,
    }
}

#[cfg(unix)]
/// The system log. Each write is one message; what cannot be delivered is lost, as with syslog(3).
struct Syslog {
    socket: UnixDatagram,
}

#[cfg(unix)]
impl Syslog {
    fn connect() -> io::Result<Self> {
        let socket = UnixDatagram::unbound()?;
        // A full log must not hold up a guest.
        socket.set_nonblocking(true)?;
        socket.connect(SYSLOG)?;
        Ok(Self { socket })
    }
}

#[cfg(unix)]
impl Write for Syslog {
    fn write(&mut self, message: &[u8]) -> io::Result<usize> {
        if self.socket.send(message).is_err() {
            // It may have been restarted.
            let _ = self
                .socket
                .connect(SYSLOG)
                .and_then(|()| self.socket.send(message));
        }
        Ok(message.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
