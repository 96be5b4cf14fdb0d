//! What the bytes of a disk image mean. Nothing here reads or writes a file.

// Numbers from files meet here: every sum says what happens when it does not fit.
#![cfg_attr(not(test), warn(clippy::arithmetic_side_effects))]

pub mod foreign_path;
pub mod magic;
pub mod parent;
pub mod sector_bitmap;
pub mod vhd;
pub mod vhdx;
pub mod xen;

use std::fmt;

/// An image format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Format {
    /// Virtual Hard Disk 1.0.
    Vhd,
    /// Virtual Hard Disk 2.
    Vhdx,
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Vhd => f.write_str("vhd"),
            Self::Vhdx => f.write_str("vhdx"),
        }
    }
}

/// How an image stores its disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DiskType {
    /// All of the disk, in order.
    Fixed,
    /// Blocks, allocated when first written.
    Dynamic,
    /// Blocks that differ from those of a parent image.
    Differencing,
}

impl fmt::Display for DiskType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Fixed => "fixed",
            Self::Dynamic => "dynamic",
            Self::Differencing => "differencing",
        })
    }
}
