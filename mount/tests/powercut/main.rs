//! The program over a host that fails: power cuts, errors, no space.
//!
//! The host is [`host`], a file system of ours whose unsynced changes a power cut loses in full or in
//! part. `VHDFS_SOAK=n` goes n times as many rounds, `VHDFS_SEED` chooses others.

#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "../common/mod.rs"]
mod common;
mod cuts;
mod faults;
mod full;
mod guest;
mod host;
mod rig;
#[path = "../../../tests/support/mod.rs"]
mod support;
