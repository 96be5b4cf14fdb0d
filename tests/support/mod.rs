//! What the whole-crate tests share.

#![allow(dead_code, reason = "each test binary uses a part of it")]

pub(crate) mod fat;
pub(crate) mod guest;
pub(crate) mod image;
pub(crate) mod life;
pub(crate) mod matrix;
pub(crate) mod oracle;
pub(crate) mod samples;
pub(crate) mod scenarios;
pub(crate) mod second;
pub(crate) mod sweep;
pub(crate) mod tools;

use vhdfs::units::{u64_from, usize_from};

/// A file or memory length that is known to fit both.
pub(crate) fn size(bytes: u64) -> usize {
    usize_from(bytes)
}

/// The length of a slice in bytes.
pub(crate) fn len(bytes: &[u8]) -> u64 {
    u64_from(bytes.len())
}

/// The number in the environment variable `name`, else `default`.
pub(crate) fn env_number(name: &str, default: u64) -> u64 {
    std::env::var(name)
        .ok()
        .and_then(|value| value.parse().ok())
        .unwrap_or(default)
}

/// How many times as much is tried as usual: `VHDFS_SOAK`.
pub(crate) fn soak() -> u64 {
    env_number("VHDFS_SOAK", 1)
}

/// How many elements there are.
pub(crate) fn len_of<T>(items: &[T]) -> u64 {
    u64_from(items.len())
}
