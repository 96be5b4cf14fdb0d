//! An operation on a disk, from its start until everybody who waits for it has been told.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

use super::error::{ERROR_SUCCESS, Win32Error};
use super::event::Event;
use crate::compact::{Control, Phase};

/// Who is told of an operation that runs while its caller goes on.
pub(super) trait Waiter: Send {
    /// Tells this request from others: the address that the caller knows it by.
    fn key(&self) -> usize;
    /// It begins; nobody else knows of it yet.
    fn begin(&mut self);
    /// It has ended, with this.
    fn end(self: Box<Self>, status: Win32Error);
}

/// How far an operation is (`VIRTUAL_DISK_PROGRESS`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VirtualDiskProgress {
    /// [`super::ERROR_IO_PENDING`] until it has ended; then its outcome, [`ERROR_SUCCESS`] or why not.
    pub operation_status: Win32Error,
    /// How far it is, as a part of `completion_value`. No other meaning; it may go back.
    pub current_value: u64,
    /// What the current value will be at the end, if that is a success. Never 0.
    pub completion_value: u64,
}

#[derive(Clone, Copy, Debug)]
enum Stage {
    Running,
    /// Another operation may begin.
    Ended(Win32Error),
    /// Nobody will be told of it any more.
    Told(Win32Error),
}

/// An operation.
#[derive(Debug)]
pub(super) struct Job {
    key: Option<usize>,
    pub(super) control: Control,
    stage: Mutex<Stage>,
    told: Condvar,
}

/// Steps of the progress in each phase.
const PHASE_STEPS: u64 = 1000;
const PHASES: u64 = 5;

impl Job {
    /// One that runs, for the waiter with this `key`, or for a caller that is blocked.
    pub(super) fn new(key: Option<usize>) -> Self {
        Self {
            key,
            control: Control::default(),
            stage: Mutex::new(Stage::Running),
            told: Condvar::new(),
        }
    }

    pub(super) fn has_key(&self, key: usize) -> bool {
        self.key == Some(key)
    }

    pub(super) fn is_running(&self) -> bool {
        matches!(*self.stage.lock(), Stage::Running)
    }

    /// Ends it and tells `waiter`.
    pub(super) fn end(&self, status: Win32Error, waiter: Option<Box<dyn Waiter>>) {
        *self.stage.lock() = Stage::Ended(status);
        if let Some(waiter) = waiter {
            waiter.end(status);
        }
        *self.stage.lock() = Stage::Told(status);
        self.told.notify_all();
    }

    /// Waits until everybody has been told, for `timeout` at most; says whether they have.
    pub(super) fn wait(&self, timeout: Option<Duration>) -> bool {
        let mut stage = self.stage.lock();
        let is_untold = |stage: &mut Stage| !matches!(stage, Stage::Told(_));
        match timeout {
            Some(timeout) => {
                self.told.wait_while_for(&mut stage, is_untold, timeout);
            }
            None => self.told.wait_while(&mut stage, is_untold),
        }
        !is_untold(&mut stage)
    }

    /// Says that it has ended only when everybody has been told: after that a caller may free what it
    /// would be told by.
    pub(super) fn progress(&self) -> VirtualDiskProgress {
        let mut stage = self.stage.lock();
        let is_telling = |stage: &mut Stage| matches!(stage, Stage::Ended(_));
        self.told.wait_while(&mut stage, is_telling);
        let completion_value = PHASES * PHASE_STEPS;
        match *stage {
            Stage::Running => VirtualDiskProgress {
                operation_status: super::ERROR_IO_PENDING,
                current_value: self.steps(),
                completion_value,
            },
            Stage::Ended(operation_status) | Stage::Told(operation_status) => VirtualDiskProgress {
                operation_status,
                current_value: match operation_status {
                    ERROR_SUCCESS => completion_value,
                    // It never got there.
                    _ => self.steps().min(completion_value - 1),
                },
                completion_value,
            },
        }
    }

    fn steps(&self) -> u64 {
        let progress = self.control.progress();
        let phase = match progress.phase {
            Phase::Survey => 0,
            Phase::Scan => 1,
            Phase::Drop => 2,
            Phase::Move => 3,
            Phase::Punch => 4,
            Phase::Done => return PHASES * PHASE_STEPS,
        };
        // The two are not read at the same moment.
        let completed = progress.completed.min(progress.total);
        let part = (completed.saturating_mul(PHASE_STEPS)).checked_div(progress.total);
        phase * PHASE_STEPS + part.unwrap_or(0).min(PHASE_STEPS)
    }
}

/// Makes an operation run while its caller goes on, and tells of its end: Windows' `OVERLAPPED`.
/// Clones are the same one. Not for two operations at a time.
#[derive(Clone, Debug)]
pub struct Overlapped {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    status: Mutex<Option<Win32Error>>,
    ended: Event,
}

impl Default for Overlapped {
    fn default() -> Self {
        Self::new()
    }
}

impl Overlapped {
    /// One that no operation uses yet.
    pub fn new() -> Self {
        Self {
            shared: Arc::new(Shared {
                status: Mutex::new(None),
                ended: Event::new(true, false),
            }),
        }
    }

    pub(super) fn key(&self) -> usize {
        Arc::as_ptr(&self.shared).addr()
    }

    /// How its operation ended, if one was begun with it and has ended.
    pub fn status(&self) -> Option<Win32Error> {
        *self.shared.status.lock()
    }

    /// Waits until its operation ends. For ever, if none was begun with it.
    ///
    /// # Errors
    /// The operation's.
    pub fn wait(&self) -> Result<(), Win32Error> {
        self.shared.ended.wait(None);
        self.status().unwrap_or(ERROR_SUCCESS).into_result()
    }

    /// Waits until its operation ends, for `timeout` at most; says whether it has.
    pub fn wait_for(&self, timeout: Duration) -> bool {
        self.shared.ended.wait(Some(timeout))
    }
}

impl Waiter for Overlapped {
    fn key(&self) -> usize {
        Self::key(self)
    }

    fn begin(&mut self) {
        *self.shared.status.lock() = None;
        self.shared.ended.reset();
    }

    fn end(self: Box<Self>, status: Win32Error) {
        *self.shared.status.lock() = Some(status);
        self.shared.ended.set();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, Sender, channel};
    use std::thread;

    use super::*;

    /// One who takes its time to be told.
    struct Slow {
        telling: Sender<()>,
        go_on: Receiver<()>,
    }

    impl Waiter for Slow {
        fn key(&self) -> usize {
            1
        }

        fn begin(&mut self) {}

        fn end(self: Box<Self>, status: Win32Error) {
            assert_eq!(status, ERROR_SUCCESS);
            self.telling.send(()).unwrap();
            self.go_on.recv().unwrap();
        }
    }

    /// Who asks how far it is must not learn of its end before the one who waits has been told: both
    /// may be the same, who then frees what it is told by.
    #[test]
    fn nobody_learns_of_its_end_before_the_waiter() {
        let (telling, is_telling) = channel();
        let (go, go_on) = channel();
        let job = Job::new(Some(1));
        thread::scope(|scope| {
            let end = scope.spawn(|| {
                job.end(ERROR_SUCCESS, Some(Box::new(Slow { telling, go_on })));
            });
            is_telling.recv().unwrap();
            assert!(!job.is_running(), "another one may begin");
            assert!(!job.wait(Some(Duration::from_millis(5))));
            let asks = scope.spawn(|| job.progress());
            thread::sleep(Duration::from_millis(20));
            assert!(!asks.is_finished());
            go.send(()).unwrap();
            let progress = asks.join().unwrap();
            assert_eq!(progress.operation_status, ERROR_SUCCESS);
            assert_eq!(progress.current_value, progress.completion_value);
            end.join().unwrap();
        });
        assert!(job.wait(None));
    }
}
