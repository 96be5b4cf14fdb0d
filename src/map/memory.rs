//! How much memory the block tables of all open disks take together.
//!
//! What a table takes depends on the size that its file claims, which a stranger may have written: 64 TiB in
//! blocks of 1 MiB are some 330 MiB. One such disk is fine; as many as somebody can name are not.

use std::io;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering};

/// Whatever the host has, as much as this may be taken.
const AT_LEAST: u64 = 2 << 30;

/// What a host is taken to have that does not tell.
const ASSUMED: u64 = 8 << 30;

/// What is taken by this process.
static PROCESS: Budget = Budget::new();

/// Half of the host's memory, but [`AT_LEAST`] in any case.
static MOST: LazyLock<u64> = LazyLock::new(|| (host_memory().unwrap_or(ASSUMED) / 2).max(AT_LEAST));

#[derive(Debug)]
struct Budget {
    taken: AtomicU64,
}

impl Budget {
    const fn new() -> Self {
        Self {
            taken: AtomicU64::new(0),
        }
    }

    fn take(&self, bytes: u64, most: u64) -> io::Result<()> {
        let add = |taken: u64| taken.checked_add(bytes).filter(|sum| *sum <= most);
        let taken = (self.taken).fetch_update(Ordering::AcqRel, Ordering::Acquire, add);
        taken.map(drop).map_err(|taken| {
            let mib = |bytes: u64| bytes.div_ceil(1 << 20);
            let text = format!(
                "its block table needs {} MiB of memory, and the tables of the disks that are open \
                 have {} MiB of at most {}; close other disks first",
                mib(bytes),
                mib(taken),
                mib(most)
            );
            io::Error::new(io::ErrorKind::OutOfMemory, text)
        })
    }

    fn give_back(&self, bytes: u64) {
        self.taken.fetch_sub(bytes, Ordering::AcqRel);
    }
}

/// Memory that a block table takes, given back when this is dropped.
#[derive(Debug)]
pub(crate) struct Charge(u64);

impl Charge {
    /// Takes `bytes`.
    ///
    /// # Errors
    /// [`io::ErrorKind::OutOfMemory`] where other disks have too much.
    pub(crate) fn take(bytes: u64) -> io::Result<Self> {
        PROCESS.take(bytes, *MOST)?;
        Ok(Self(bytes))
    }

    /// Takes `bytes` more.
    ///
    /// # Errors
    /// As [`Self::take`]; then it stays as it was.
    pub(crate) fn grow(&mut self, bytes: u64) -> io::Result<()> {
        PROCESS.take(bytes, *MOST)?;
        self.0 = self.0.saturating_add(bytes);
        Ok(())
    }

    /// Gives back all but `bytes`.
    pub(crate) fn shrink(&mut self, bytes: u64) {
        PROCESS.give_back(self.0.saturating_sub(bytes));
        self.0 = self.0.min(bytes);
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        PROCESS.give_back(self.0);
    }
}

/// Bytes of memory that the host has.
#[cfg(target_os = "linux")]
fn host_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

#[cfg(not(target_os = "linux"))]
fn host_memory() -> Option<u64> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_taken_is_bounded_and_comes_back() {
        let budget = Budget::new();
        budget.take(600 << 20, 1 << 30).unwrap();
        let refused = budget.take(500 << 20, 1 << 30).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::OutOfMemory);
        let text = refused.to_string();
        assert!(
            text.contains("needs 500 MiB") && text.contains("600 MiB of at most 1024"),
            "{text}"
        );
        assert!(budget.take(u64::MAX, u64::MAX).is_err());
        budget.give_back(200 << 20);
        budget.take(500 << 20, 1 << 30).unwrap();
    }

    #[test]
    fn a_charge_grows_and_shrinks() {
        let mut charge = Charge::take(1000).unwrap();
        charge.grow(2000).unwrap();
        assert_eq!(charge.0, 3000);
        charge.shrink(10);
        charge.shrink(20);
        assert!(charge.grow(u64::MAX).is_err());
        assert_eq!(charge.0, 10);
        #[cfg(target_os = "linux")]
        assert!(host_memory().is_some_and(|bytes| bytes > 64 << 20));
    }
}
