//! What a user of the host may do with its files, as their owners have it.
//!
//! The kernel asks that of the names and rights that a mount shows. What it cannot know is looked after
//! here: that a differencing disk also shows what is in its parents; and, on Linux, that an access control
//! list may allow less than the mode of its file says.

#[cfg(unix)]
mod unix;
#[cfg(windows)]
mod windows;

#[cfg(unix)]
pub use unix::User;
#[cfg(unix)]
pub(super) use unix::shown_mode;
#[cfg(windows)]
pub use windows::User;
