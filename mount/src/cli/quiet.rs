//! How long commands want a file to have been left alone.

use std::time::Duration;

use clap::Args;

use crate::options;

/// When a file is not changed.
#[derive(Debug, Args)]
pub(crate) struct QuietArguments {
    /// Refuse a file that was changed less than that long ago, where the host cannot tell whether another
    /// program still writes to it: on network file systems, and of other users' files
    #[arg(
        long = "quiet-time",
        value_name = "TIME",
        default_value = "5m",
        value_parser = options::duration
    )]
    pub(crate) time: Duration,
}
