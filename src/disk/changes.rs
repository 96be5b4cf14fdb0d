//! Counts what may have changed a disk, and tells of the next change who asks for it.

use std::fmt;
use std::sync::OnceLock;

use crate::sync::{AtomicBool, AtomicU64, Ordering};

/// Told of the next change.
type Tell = Box<dyn Fn() + Send + Sync>;

/// The count of changes.
#[derive(Default)]
pub(super) struct Changes {
    count: AtomicU64,
    /// Somebody waits for the next one.
    is_awaited: AtomicBool,
    tell: OnceLock<Tell>,
}

impl fmt::Debug for Changes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Changes").field(&self.count()).finish()
    }
}

impl Changes {
    pub(super) fn count(&self) -> u64 {
        self.count.load(Ordering::Acquire)
    }

    /// One more. Costs no more than counting where nobody waits.
    pub(super) fn note(&self) {
        // Both in one order with the two of `wait_for_next`: one of them sees the other.
        self.count.fetch_add(1, Ordering::SeqCst);
        if self.is_awaited.load(Ordering::SeqCst) {
            self.tell();
        }
    }

    #[cold]
    fn tell(&self) {
        if self.is_awaited.swap(false, Ordering::SeqCst)
            && let Some(tell) = self.tell.get()
        {
            tell();
        }
    }

    /// Who is told, from the thread that makes the change. The first one stays.
    pub(super) fn set_tell(&self, tell: Tell) {
        // One listener is all there is.
        let _ = self.tell.set(tell);
    }

    /// Asks to be told once, of the next change after `seen` of them. Says no where there was one already.
    pub(super) fn wait_for_next(&self, seen: u64) -> bool {
        self.is_awaited.store(true, Ordering::SeqCst);
        self.count.load(Ordering::SeqCst) == seen
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::AtomicUsize;

    use super::*;

    #[test]
    fn the_next_change_is_told_once_and_none_is_missed() {
        let changes = Changes::default();
        let told = Arc::new(AtomicUsize::new(0));
        let teller = Arc::clone(&told);
        changes.set_tell(Box::new(move || {
            teller.fetch_add(1, Ordering::SeqCst);
        }));
        changes.note();
        assert_eq!((changes.count(), told.load(Ordering::SeqCst)), (1, 0));
        assert!(!changes.wait_for_next(0), "it has been");
        assert!(changes.wait_for_next(1));
        for _ in 0..3 {
            changes.note();
        }
        assert_eq!((changes.count(), told.load(Ordering::SeqCst)), (4, 1));
    }
}
