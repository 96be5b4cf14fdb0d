//! What checking an image finds.

use std::path::PathBuf;

/// What a check puts right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Repair {
    /// Nothing.
    Nothing,
    /// What is safe.
    Safe,
    /// That, and what was cut off of a file becomes zeros ([`super::Lost`]).
    ZeroLost,
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
    /// Where what was changed is saved, if anything was and that was wanted.
    pub backup: Option<PathBuf>,
}

impl CheckReport {
    /// Whether nothing is wrong.
    pub fn is_clean(&self) -> bool {
        self.errors.is_empty()
    }
}
