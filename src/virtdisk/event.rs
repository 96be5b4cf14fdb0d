//! Something that threads wait for: Windows' event object.

use std::time::Duration;

use parking_lot::{Condvar, Mutex};

/// An event.
#[derive(Debug)]
pub(super) struct Event {
    manual_reset: bool,
    is_set: Mutex<bool>,
    changed: Condvar,
}

impl Event {
    /// One that stays set until it is reset (`manual_reset`), or until one waiter has seen it.
    pub(super) fn new(manual_reset: bool, is_set: bool) -> Self {
        Self {
            manual_reset,
            is_set: Mutex::new(is_set),
            changed: Condvar::new(),
        }
    }

    pub(super) fn set(&self) {
        *self.is_set.lock() = true;
        self.changed.notify_all();
    }

    pub(super) fn reset(&self) {
        *self.is_set.lock() = false;
    }

    /// Waits until it is set, for `timeout` at most (`None`: for ever); says whether it was.
    pub(super) fn wait(&self, timeout: Option<Duration>) -> bool {
        let mut is_set = self.is_set.lock();
        let is_unset = |is_set: &mut bool| !*is_set;
        match timeout {
            Some(timeout) => {
                self.changed.wait_while_for(&mut is_set, is_unset, timeout);
            }
            None => self.changed.wait_while(&mut is_set, is_unset),
        }
        let seen = *is_set;
        if !self.manual_reset {
            *is_set = false;
        }
        seen
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::thread;

    use super::*;

    const NO_TIME: Option<Duration> = Some(Duration::ZERO);

    #[test]
    fn stays_set_until_reset() {
        let event = Event::new(true, false);
        assert!(!event.wait(NO_TIME));
        event.set();
        assert!(event.wait(NO_TIME) && event.wait(None));
        event.reset();
        assert!(!event.wait(NO_TIME));
    }

    #[test]
    fn lets_one_waiter_through() {
        let event = Event::new(false, true);
        assert!(event.wait(None));
        assert!(!event.wait(NO_TIME));
    }

    #[test]
    fn wakes_who_waits() {
        let event = Arc::new(Event::new(false, false));
        let waiters: Vec<_> = (0..2)
            .map(|_| {
                let event = Arc::clone(&event);
                thread::spawn(move || event.wait(Some(Duration::from_secs(20))))
            })
            .collect();
        for _ in 0..2 {
            thread::sleep(Duration::from_millis(5));
            event.set();
            // An automatic event that nobody has seen yet would swallow the second.
            while *event.is_set.lock() {
                thread::yield_now();
            }
        }
        for waiter in waiters {
            assert!(waiter.join().unwrap());
        }
    }
}
