//! How an image is checked, and what that finds.

/// How to check.
#[derive(Clone, Copy, Debug, Default)]
pub struct CheckOptions {
    /// Put right what is safe. For VHD: a missing or outdated footer or copy of it, a batmap that does
    /// not fit; for VHDX: a log to replay, a damaged header or region table beside a good one, block
    /// table entries that say what they must not where nothing can be lost; for both: unused space at
    /// the end.
    pub repair: bool,
    /// With `repair`: only tell what would be done.
    pub dry_run: bool,
}

/// What a check found. Messages are for people, one finding each.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// Damage: something reads wrongly, or the disk cannot be used by some program.
    pub errors: Vec<String>,
    /// Oddities: everything reads right, but space is wasted or a program may complain.
    pub warnings: Vec<String>,
    /// What was put right, or would be. Findings that were put right are not listed above.
    pub repaired: Vec<String>,
}

impl CheckReport {
    /// Whether nothing is wrong.
    pub fn is_clean(&self) -> bool {
        self.errors.is_empty()
    }
}
