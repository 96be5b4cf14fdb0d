//! Virtual hard disks that stay small.
pub mod error;
pub mod storage;
pub mod units;
