//! How old a file is by the clock on the wall.

use std::time::{Duration, SystemTime};

use crate::storage::host::pin::Stat;

/// How long ago the file was changed last; no time where its times and the clock do not agree.
///
/// A clock that was set back makes a file too young, which is refused, with a word on how to go on. One that
/// was set forth, or a server's that is slow, makes it too old: of one command, which somebody has
/// asked for. What goes on by itself must not ask here.
pub(super) fn of(stat: &Stat) -> Duration {
    // A copy may be given the times of its original; that it was, and when, is in the other one.
    let last = stat.modified.max(stat.changed);
    SystemTime::now().duration_since(last).unwrap_or_default()
}
