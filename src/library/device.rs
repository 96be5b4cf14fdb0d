//! The host's devices: what lies on one has its turn there one after the other, and shares its room.
//!
//! A device is a file system of the host (`st_dev`; on Windows a volume). Two of them may be on one piece of
//! hardware, and one on many: of that nothing is known.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::agent::Bell;
use super::open_disk::OpenDisk;
use super::queue::{Limits, Queue};
use crate::compact::{Pace, Room};
use crate::disk::Activity;
use crate::storage::host::Space;
use crate::storage::host::pin::Identity;

/// How long what is known of a device's room is good.
const ROOM_IS_KNOWN_FOR: Duration = Duration::from_secs(3);

/// What there is to do on a device.
#[derive(Clone)]
pub(super) enum Task {
    /// Look after an open disk.
    Disk(Arc<OpenDisk>),
    /// Visit the files that nobody has open.
    Visits(Arc<Device>),
}

/// Names a task.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Key {
    Disk(Identity),
    Visits,
}

/// What is known of its room.
#[derive(Debug, Default)]
struct Known {
    room: Option<Room>,
    asked: Option<Instant>,
}

/// One file system of the host.
pub(super) struct Device {
    pub(super) number: u64,
    pub(super) queue: Queue<Key, Task>,
    /// How fast work on it goes beside guests.
    pub(super) pace: Arc<Mutex<Pace>>,
    /// Bytes given back to the host, on all devices.
    pub(super) reclaimed: Arc<AtomicU64>,
    /// Whether there is work on it, for who measures how long guests wait.
    pub(super) activity: Arc<Activity>,
    room: Mutex<Known>,
}

impl Device {
    /// Its room, as of the last few seconds in which there was work on it.
    pub(super) fn room(&self) -> Option<Room> {
        self.room.lock().room
    }

    /// Whether nobody has asked for its room for so long that somebody is to.
    pub(super) fn is_room_unknown(&self) -> bool {
        let asked = self.room.lock().asked;
        asked.is_none_or(|asked| asked.elapsed() >= ROOM_IS_KNOWN_FOR)
    }

    /// Its room, where it is time to ask for that again. Only for its worker: the host may take its time.
    pub(super) fn new_room(&self, ask: impl FnOnce() -> std::io::Result<Space>) -> Option<Room> {
        if !self.is_room_unknown() {
            return None;
        }
        let room = ask().ok().map(|space| Room {
            free: space.blocks_available.saturating_mul(space.block_size),
            total: space.blocks.saturating_mul(space.block_size),
        });
        *self.room.lock() = Known {
            room,
            asked: Some(Instant::now()),
        };
        room
    }

    /// A disk of it has changed, or its use has.
    pub(super) fn wake(&self, disk: Identity) {
        self.queue.wake(Key::Disk(disk));
    }
}

/// All devices that have disks which are looked after.
pub(super) struct Devices {
    known: Mutex<HashMap<u64, Arc<Device>>>,
    bell: Arc<Bell>,
    limits: Limits,
    busy_share: u8,
    reclaimed: Arc<AtomicU64>,
    /// Which device a file is on.
    number: fn(&Identity) -> u64,
}

impl Devices {
    /// `busy_share` as in [`Pace::new`]; `number` tells devices apart.
    pub(super) fn new(
        bell: Arc<Bell>,
        limits: Limits,
        busy_share: u8,
        number: fn(&Identity) -> u64,
    ) -> Self {
        Self {
            known: Mutex::default(),
            bell,
            limits,
            busy_share,
            reclaimed: Arc::default(),
            number,
        }
    }

    /// Bytes given back to the host.
    pub(super) fn reclaimed(&self) -> u64 {
        self.reclaimed.load(Ordering::Relaxed)
    }

    /// The number of the device that the file is on.
    pub(super) fn number(&self, file: &Identity) -> u64 {
        (self.number)(file)
    }

    /// The device that the file is on.
    pub(super) fn of(&self, file: &Identity) -> Arc<Device> {
        let number = self.number(file);
        let mut known = self.known.lock();
        let device = known.entry(number).or_insert_with(|| {
            Arc::new(Device {
                number,
                queue: Queue::new(Arc::clone(&self.bell), self.limits),
                pace: Arc::new(Mutex::new(Pace::new(self.busy_share))),
                reclaimed: Arc::clone(&self.reclaimed),
                activity: Arc::default(),
                room: Mutex::default(),
            })
        });
        Arc::clone(device)
    }

    pub(super) fn all(&self) -> Vec<Arc<Device>> {
        self.known.lock().values().cloned().collect()
    }

    /// Forgets those on which nothing is left.
    pub(super) fn forget_unused(&self) {
        // Who has got one from here may be about to use it.
        let is_used = |device: &Arc<Device>| {
            // Of one that is about to be full that has been told, and is not to be told again.
            let is_urgent = || device.pace.lock().is_urgent();
            Arc::strong_count(device) > 1 || !device.queue.is_empty() || is_urgent()
        };
        self.known.lock().retain(|_, device| is_used(device));
    }

    /// No turns are given any more.
    pub(super) fn stop(&self) {
        self.all().iter().for_each(|device| device.queue.stop());
    }
}
