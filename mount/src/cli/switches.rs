//! What options of `vhdfs mount` can be.

use clap::ValueEnum;

/// `on` or `off`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Switch {
    /// Yes.
    On,
    /// No.
    Off,
}

/// When the guest's filesystems are asked in the background.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum FsAware {
    /// While it is safe.
    Auto,
    /// Never.
    Off,
}
