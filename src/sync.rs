//! What threads meet at. Code that imports it from here can be run under a model checker, which has its
//! own (`tests/models`).

pub(crate) use std::sync::atomic::{AtomicUsize, Ordering};

pub(crate) use parking_lot::{Mutex, MutexGuard, RwLock, RwLockReadGuard, RwLockWriteGuard};
