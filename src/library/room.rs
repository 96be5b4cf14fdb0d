//! Whether a device is about to be full. That is asked in turns of the device, for the host may take its time with the
//! answer: while there is work on it, and after each search of the tree, so that it is noticed as well who else fills
//! it.

use std::io;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::Instant;

use super::agent::Agent;
use super::device::Device;
use crate::compact::{LowSpace, Room};
use crate::storage::host::Space;

impl Agent {
    /// Tells the pace of the device, on which the file at `path` is, whether it is about to be full.
    pub(super) fn look_at_room(
        &self,
        device: &Device,
        path: &Path,
        ask: impl FnOnce() -> io::Result<Space>,
    ) {
        if self.policy.is_some()
            && let Some(room) = device.new_room(ask)
        {
            self.note_room(device, path, room);
        }
    }

    pub(super) fn note_room(&self, device: &Device, path: &Path, room: Room) {
        let Some(policy) = &self.policy else { return };
        let (was_low, is_low) = {
            let mut pace = device.pace.lock();
            let was_low = pace.is_urgent();
            let is_low = is_low(policy.low_space, room, was_low);
            pace.look_at_room(Instant::now(), is_low);
            (was_low, is_low)
        };
        if was_low == is_low {
            return;
        }
        if !is_low {
            // What there was no room to move.
            return self.visit_again(device);
        }
        log::warn!(
            "{}: its file system has {} of {} bytes free: compaction takes more of the time until it has more",
            path.display(),
            room.free,
            room.total
        );
        // What was too little to be worth it is worth it now.
        let open = self.core.disks.all();
        let here = open
            .iter()
            .filter(|disk| disk.device.number == device.number);
        here.filter(|disk| disk.too_little.load(Ordering::Relaxed) > 0)
            .for_each(|disk| disk.look_again());
        self.visit_again(device);
    }
}

/// Whether so little is free. Where it was, it takes a tenth more until it is no longer so: else that would be told
/// again and again.
fn is_low(low_space: LowSpace, room: Room, was_low: bool) -> bool {
    let free = match was_low {
        true => room.free / 11 * 10,
        false => room.free,
    };
    low_space.is_below(Room { free, ..room })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn low_space_ends_when_there_is_a_tenth_more() {
        let low = |free, was_low| {
            let room = Room {
                free,
                total: 10_000,
            };
            is_low(LowSpace::Percent(10), room, was_low)
        };
        assert_eq!([999, 1000].map(|free| low(free, false)), [true, false]);
        assert_eq!(
            [1000, 1099, 1100].map(|free| low(free, true)),
            [true, true, false]
        );
    }
}
