//! Text for people: sizes in words, and names that others have chosen.

use std::fmt;
use std::io::{self, BufWriter, Write};
use std::path::Path;

pub(crate) use vhdfs::error::plain;

/// A path as it may go to a terminal.
pub(crate) fn shown(path: &Path) -> String {
    plain(&path.to_string_lossy())
}

/// Writes to stderr what is no part of a report.
pub(crate) fn say(text: &str) {
    // Nobody may be there to read it.
    let _ = writeln!(io::stderr(), "vhdfs: {}", plain(text));
}

/// Writes a part of a report to stdout, in one go. Who reads it may have seen enough before its end, as
/// `head` and `grep -q` have: that is no failure, for what was to be done is done, or goes on.
pub(crate) fn output(text: &[u8]) -> io::Result<()> {
    output_with(|out| out.write_all(text))
}

/// As [`output`], of what is too much to have in one piece.
pub(crate) fn output_with(write: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> io::Result<()> {
    let mut out = BufWriter::new(io::stdout().lock());
    match write(&mut out).and_then(|()| out.flush()) {
        // What is left in the buffer is dropped with it.
        Err(error) if is_broken_pipe(&error) => Ok(()),
        result => result,
    }
}

fn is_broken_pipe(error: &io::Error) -> bool {
    /// `ERROR_PIPE_NOT_CONNECTED`, which has no name in Rust.
    #[cfg(windows)]
    const NOT_CONNECTED: Option<i32> = Some(233);
    #[cfg(not(windows))]
    const NOT_CONNECTED: Option<i32> = None;
    let number = error.raw_os_error();
    error.kind() == io::ErrorKind::BrokenPipe || number.is_some() && number == NOT_CONNECTED
}

/// A byte count that displays as a person reads it: `512 bytes`, `1.5 GiB`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Bytes(pub(crate) u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
        if self.0 < 1024 {
            return f.pad(&format!("{} bytes", self.0));
        }
        // In tenths of the unit: no floating point, so 1023.99 never rounds up to 1024.0.
        let mut tenths = u128::from(self.0) * 10 / 1024;
        let mut unit = 0;
        while tenths >= 10_240 && unit + 1 < UNITS.len() {
            tenths /= 1024;
            unit += 1;
        }
        f.pad(&format!("{}.{} {}", tenths / 10, tenths % 10, UNITS[unit]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_read_well() {
        for (bytes, text) in [
            (0, "0 bytes"),
            (1023, "1023 bytes"),
            (1024, "1.0 KiB"),
            (1536, "1.5 KiB"),
            ((1 << 20) - 1, "1023.9 KiB"),
            (10 << 30, "10.0 GiB"),
            (u64::MAX, "16383.9 PiB"),
        ] {
            assert_eq!(Bytes(bytes).to_string(), text);
        }
        assert_eq!(format!("{:>9}", Bytes(1)), "  1 bytes");
    }
}
