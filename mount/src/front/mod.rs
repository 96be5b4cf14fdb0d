//! What the front ends have in common, whatever they are called by: open disks, reading and
//! writing within a disk's size, and how service ends.

mod files;
mod handles;
mod settings;

pub(crate) use files::{Brake, OpenFile, Refused};
pub(crate) use handles::Handles;
pub(crate) use settings::{check_places, library_options, start_logging};
