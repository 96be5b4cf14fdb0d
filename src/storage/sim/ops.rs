//! The operations of the simulated host file.

use std::fmt;
use std::io;
use std::sync::atomic::Ordering;

use super::content::{PAGE, RunKind};
use super::faults::Verdict;
use super::{Choice, Effect, MAX_LEN, Op, OpKind, SimStorage, State};
use crate::storage::{Storage, check_copy, past_end};
use crate::units::{FileOffset, FileRange, u64_from, usize_from};

impl fmt::Debug for SimStorage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.state.lock();
        f.debug_struct("SimStorage")
            .field("len", &state.volatile.len())
            .field("allocated", &state.volatile.allocated())
            .field("unsynced", &state.journal.len())
            .finish_non_exhaustive()
    }
}

impl SimStorage {
    /// Runs `act` for `op` unless it is made to fail. A failing operation that has an effect runs
    /// `act` with that.
    fn call<T>(
        &self,
        op: Op,
        act: impl FnOnce(&mut State, Option<Effect>) -> io::Result<T>,
    ) -> io::Result<T> {
        let hook = self.hook.lock().clone();
        if let Some(hook) = hook {
            hook(self, &op);
        }
        let mut state = self.state.lock();
        state.log.push(op);
        if state.dead {
            return Err(io::Error::other("the simulated process is dead"));
        }
        match state.faults.judge(op.kind) {
            Verdict::Go => {
                let result = act(&mut state, None);
                if result.is_ok() {
                    state.counters.count(&op);
                }
                result
            }
            Verdict::Fail(error, Effect::Nothing) => Err(error),
            Verdict::Fail(error, effect) => {
                // What it answers does not matter: it has failed.
                drop(act(&mut state, Some(effect)));
                Err(error)
            }
        }
    }

    /// As `call`, for what changes a part of `op.range` where it fails. `act` gets that part.
    fn call_range(
        &self,
        op: Op,
        act: impl FnOnce(&mut State, FileRange) -> io::Result<()>,
    ) -> io::Result<()> {
        self.call(op, |state, effect| {
            let len = match effect {
                None | Some(Effect::Everything) => op.range.len,
                Some(Effect::Prefix(bytes)) => op.range.len.min(bytes),
                Some(Effect::Nothing | Effect::Scatter(_)) => return Ok(()),
            };
            act(state, FileRange::new(op.range.start, len))
        })
    }

    fn query<T>(&self, act: impl FnOnce(&State) -> T) -> io::Result<T> {
        let range = FileRange::new(FileOffset::new(0), 0);
        let op = Op {
            kind: OpKind::Query,
            range,
            target: None,
        };
        self.call(op, |state, _| Ok(act(state)))
    }
}

fn op(kind: OpKind, range: FileRange) -> Op {
    Op {
        kind,
        range,
        target: None,
    }
}

fn check_end(range: FileRange) -> io::Result<()> {
    if range.end().get() > MAX_LEN {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    Ok(())
}

impl State {
    /// The part of `range` that the host has room for, from its start; an error with it if that is
    /// not all.
    fn fitting(&self, range: FileRange) -> (FileRange, io::Result<()>) {
        let Some(capacity) = self.capacity else {
            return (range, Ok(()));
        };
        let new_pages = capacity.saturating_sub(self.volatile.allocated()) / PAGE;
        let len = self.volatile.fitting(range, new_pages);
        let full = || Err(io::ErrorKind::StorageFull.into());
        (
            FileRange::new(range.start, len),
            if len == range.len { Ok(()) } else { full() },
        )
    }

    fn write(&mut self, buf: &[u8], offset: FileOffset) -> io::Result<()> {
        let range = FileRange::new(offset, u64_from(buf.len()));
        check_end(range)?;
        let (fitting, result) = self.fitting(range);
        self.volatile.write(&buf[..usize_from(fitting.len)], offset);
        self.journal.content(OpKind::Write, fitting, &self.volatile);
        result
    }

    fn write_zeroes(&mut self, range: FileRange) -> io::Result<()> {
        let len = self.volatile.len();
        if range.end().get() > len {
            return Err(past_end(range, len));
        }
        let (fitting, result) = self.fitting(range);
        self.volatile.zero(fitting, false);
        self.journal
            .content(OpKind::WriteZeroes, fitting, &self.volatile);
        result
    }

    fn punch_hole(&mut self, range: FileRange) -> io::Result<()> {
        if self.no_punch {
            let text = "the simulated host cannot punch holes";
            return Err(io::Error::new(io::ErrorKind::Unsupported, text));
        }
        let range = self.volatile.clip(range);
        self.volatile.zero(range, true);
        self.journal
            .content(OpKind::PunchHole, range, &self.volatile);
        Ok(())
    }

    fn copy_within(&mut self, from: FileRange, to: FileOffset) -> io::Result<()> {
        check_copy(from, to, self.volatile.len())?;
        check_end(FileRange::new(to, from.len))?;
        let mut done = FileRange::new(to, 0);
        let mut result = Ok(());
        for (run, kind) in self.volatile.runs(from) {
            let target = FileRange::new(to.plus(run.start.since(from.start)), run.len);
            if kind == RunKind::Hole {
                self.volatile.extend_to(target.end().get());
                self.volatile.zero(target, true);
                done.len += run.len;
                continue;
            }
            let (fitting, fits) = self.fitting(target);
            let mut bytes = vec![0; usize_from(fitting.len)];
            assert!(
                self.volatile.read(&mut bytes, run.start),
                "a run is inside the file"
            );
            self.volatile.write(&bytes, target.start);
            done.len += fitting.len;
            result = fits;
            if result.is_err() {
                break;
            }
        }
        self.journal
            .content(OpKind::CopyWithin, done, &self.volatile);
        result
    }

    fn sync(&mut self, until: u64, effect: Option<Effect>) {
        let mut choice = match effect {
            None | Some(Effect::Everything) => Choice::AllKept,
            Some(Effect::Scatter(seed)) => Choice::Seeded { seed, atomic: 0 },
            Some(Effect::Nothing | Effect::Prefix(_)) => return,
        };
        let covered = self.journal.take(until);
        covered.apply(&mut self.durable, &mut choice);
    }
}

impl Storage for SimStorage {
    fn len(&self) -> io::Result<u64> {
        self.query(|state| state.volatile.len())
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: FileOffset) -> io::Result<()> {
        let range = FileRange::new(offset, u64_from(buf.len()));
        self.call(op(OpKind::Read, range), |state, effect| match effect {
            None if !state.volatile.read(buf, offset) => Err(past_end(range, state.volatile.len())),
            _ => Ok(()),
        })
    }

    fn write_all_at(&self, buf: &[u8], offset: FileOffset) -> io::Result<()> {
        let range = FileRange::new(offset, u64_from(buf.len()));
        self.call_range(op(OpKind::Write, range), |state, part| {
            state.write(&buf[..usize_from(part.len)], offset)
        })
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let range = FileRange::new(FileOffset::new(0), len);
        self.call(op(OpKind::SetLen, range), |state, effect| {
            if matches!(effect, None | Some(Effect::Everything)) {
                check_end(range)?;
                state.volatile.set_len(len);
                state.journal.length(len);
            }
            Ok(())
        })
    }

    fn punch_hole(&self, range: FileRange) -> io::Result<()> {
        self.call_range(op(OpKind::PunchHole, range), State::punch_hole)
    }

    fn write_zeroes(&self, range: FileRange) -> io::Result<()> {
        self.call_range(op(OpKind::WriteZeroes, range), State::write_zeroes)
    }

    fn copy_within(&self, from: FileRange, to: FileOffset) -> io::Result<()> {
        let op = Op {
            kind: OpKind::CopyWithin,
            range: from,
            target: Some(to),
        };
        self.call_range(op, |state, part| state.copy_within(part, to))
    }

    fn next_data(&self, from: FileOffset, end: FileOffset) -> io::Result<Option<FileRange>> {
        self.query(|state| state.volatile.next_data(from, end))
    }

    fn allocated_bytes(&self) -> io::Result<u64> {
        self.query(|state| state.volatile.allocated())
    }

    fn room(&self) -> Option<u64> {
        let state = self.state.lock();
        let capacity = state.capacity?;
        Some(capacity.saturating_sub(state.volatile.allocated()))
    }

    fn is_wanted(&self) -> bool {
        self.wanted.load(Ordering::Relaxed)
    }

    fn write_back(&self, range: FileRange) -> io::Result<()> {
        // What is on its way to a device may still be lost, any part of it.
        self.call(op(OpKind::WriteBack, range), |_, _| Ok(()))
    }

    fn sync(&self) -> io::Result<()> {
        // Before the hook runs: what changes from here on is not covered.
        let until = self.state.lock().journal.recorded();
        let nothing = FileRange::new(FileOffset::new(0), 0);
        self.call(op(OpKind::Sync, nothing), |state, effect| {
            state.sync(until, effect);
            Ok(())
        })
    }
}
