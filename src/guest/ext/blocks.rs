//! Reading a filesystem's blocks: as they lie on the disk, or as they are once the journal has been
//! replayed.

use std::collections::HashMap;

use crate::guest::Trouble;
use crate::guest::view::View;

/// What the journal has for a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Copy {
    /// The block of the filesystem that holds it.
    pub(super) at: u64,
    /// Whether its first four bytes are not there, since they are what begins a block of the journal
    /// itself.
    pub(super) escaped: bool,
}

/// What begins a block of the journal.
pub(super) const JOURNAL_MAGIC: [u8; 4] = [0xc0, 0x3b, 0x39, 0x98];

/// The blocks of a filesystem.
pub(super) struct Blocks<'a> {
    view: &'a View<'a>,
    size: u64,
    overlay: HashMap<u64, Copy>,
}

impl<'a> Blocks<'a> {
    /// As they lie on the disk; `size` bytes each.
    pub(super) fn on_disk(view: &'a View<'a>, size: u64) -> Self {
        Self::replayed(view, size, HashMap::new())
    }

    /// With these in place of what lies on the disk.
    pub(super) fn replayed(view: &'a View<'a>, size: u64, overlay: HashMap<u64, Copy>) -> Self {
        Self {
            view,
            size,
            overlay,
        }
    }

    /// Reads a block.
    ///
    /// # Errors
    /// [`Trouble`] where it lies beyond the part, or the host cannot read.
    pub(super) fn read(&self, block: u64) -> Result<Vec<u8>, Trouble> {
        let copy = self.overlay.get(&block);
        let place = copy.map_or(block, |copy| copy.at);
        // What does not fit lies beyond the part.
        let mut bytes = self.view.read(place.saturating_mul(self.size), self.size)?;
        if copy.is_some_and(|copy| copy.escaped) {
            bytes[..4].copy_from_slice(&JOURNAL_MAGIC);
        }
        Ok(bytes)
    }
}
