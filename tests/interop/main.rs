//! Disks that go from hand to hand: we and other programs read and change the same files, and all
//! must see the same. QEMU, libvhdi and 7-Zip, where they are installed; and the second reading of the
//! formats (`tests/support/second`) for what none of them knows: children, large sectors, large disks.

#![cfg(unix)]
#![allow(clippy::unwrap_used, reason = "a failure is what a test is for")]

mod chains;
mod handover;
mod live_log;
mod mirror;
mod qemu;
mod readers;
mod sizes;
#[path = "../support/mod.rs"]
mod support;
