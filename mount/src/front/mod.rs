//! What the front ends have in common, whatever they are called by: open disks, reading and
//! writing within a disk's size, listing directories, and how service ends.

mod files;
mod handles;
mod listings;
mod settings;

pub(crate) use files::{Brake, OpenFile, Refused};
pub(crate) use handles::Handles;
#[cfg(unix)]
pub(crate) use listings::FIRST_PLACE;
#[cfg(windows)]
pub(crate) use listings::Place;
pub(crate) use listings::{Listings, Reader};
pub(crate) use settings::{check_places, library_options, start_logging};
