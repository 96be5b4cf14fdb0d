//! The handles that were given out and not closed yet.

use std::collections::HashMap;
use std::sync::{Arc, LazyLock};

use parking_lot::Mutex;

use crate::virtdisk::disk::VirtualDisk;
use crate::virtdisk::event::Event;

/// What a handle stands for.
#[derive(Clone, Debug)]
pub(super) enum Object {
    Disk(Arc<VirtualDisk>),
    Event(Arc<Event>),
}

#[derive(Debug)]
struct Table {
    next: usize,
    objects: HashMap<usize, Object>,
}

/// As on Windows, the two lowest bits of a handle mean nothing.
const STEP: usize = 4;

static TABLE: LazyLock<Mutex<Table>> = LazyLock::new(|| {
    Mutex::new(Table {
        next: STEP,
        objects: HashMap::new(),
    })
});

/// Gives out a handle. No number comes twice, so that a stale one leads nowhere; `None` when they
/// are used up.
pub(super) fn insert(object: Object) -> Option<usize> {
    let mut table = TABLE.lock();
    let handle = table.next;
    table.next = handle.checked_add(STEP)?;
    table.objects.insert(handle, object);
    Some(handle)
}

pub(super) fn find(handle: usize) -> Option<Object> {
    TABLE.lock().objects.get(&(handle & !(STEP - 1))).cloned()
}

pub(super) fn remove(handle: usize) -> Option<Object> {
    TABLE.lock().objects.remove(&(handle & !(STEP - 1)))
}
