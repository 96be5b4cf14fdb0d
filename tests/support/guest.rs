//! Somebody who uses a disk and remembers what it must hold.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;
use vhdfs::check::{CheckOptions, check_storage};
use vhdfs::compact::{CompactOptions, IdlePolicy, IdleWork, Next};
use vhdfs::disk::{Disk, OpenOptions};
use vhdfs::error::{CompactError, DiskError, ErrorKind};
use vhdfs::storage::Storage;
use vhdfs::storage::sim::{Op, SimStorage};

use super::image::pattern;
use super::oracle::Oracle;
use super::second;
use super::size;

/// A disk in use.
pub(crate) struct Guest {
    storage: Arc<SimStorage>,
    disk: Option<Arc<Disk>>,
    oracle: Arc<Mutex<Oracle>>,
    /// Whether operations may fail.
    tolerant: bool,
    /// How they failed.
    errors: Mutex<Vec<ErrorKind>>,
    /// Tells contents apart.
    writes: AtomicU64,
    /// Called before each operation of the storage.
    hook: Option<Hook>,
}

type Hook = Arc<dyn Fn(&SimStorage, &Op) + Send + Sync>;

pub(crate) fn open(storage: &Arc<SimStorage>) -> Result<Arc<Disk>, String> {
    open_over(storage, None)
}

/// Opens what `storage` holds over `parent`.
pub(crate) fn open_over(
    storage: &Arc<SimStorage>,
    parent: Option<&Arc<Disk>>,
) -> Result<Arc<Disk>, String> {
    let storage: Arc<dyn Storage> = storage.clone();
    let (name, options) = (Path::new("simulated"), OpenOptions::default());
    let disk = Disk::open_over(storage, name, &options, parent.cloned());
    disk.map_err(|error| format!("does not open: {error}"))
}

/// Opens what `storage` holds, as a parent is opened.
pub(crate) fn open_parent(storage: SimStorage, parent: Option<&Arc<Disk>>) -> Arc<Disk> {
    let options = OpenOptions {
        read_only: true,
        ..OpenOptions::default()
    };
    let name = Path::new("simulated parent");
    Disk::open_over(Arc::new(storage), name, &options, parent.cloned()).unwrap()
}

/// The crate's own checker and ours find nothing.
pub(crate) fn check_file(storage: &Arc<SimStorage>) -> Result<second::Image, String> {
    let image = second::read_checked(&**storage)?;
    let report = check_storage(&**storage, &CheckOptions::default());
    let report = report.map_err(|error| format!("cannot be checked: {error}"))?;
    if !report.is_clean() {
        return Err(format!("the check finds {:?}", report.errors));
    }
    Ok(image)
}

/// As [`check_file`], of a file that was closed.
pub(crate) fn check_closed(storage: &Arc<SimStorage>) -> Result<second::Image, String> {
    let image = check_file(storage)?;
    image.check_closed().map(|()| image)
}

/// Compacts all that can be, with a scan.
pub(crate) fn compact(disk: &Arc<Disk>) -> Result<(), CompactError> {
    let options = CompactOptions {
        scan: true,
        ..CompactOptions::default()
    };
    disk.compact(&options).wait().map(drop)
}

impl Guest {
    /// Opens what `storage` holds, which `oracle` knows. `hook` is called before each operation of
    /// the storage, those of the opening among them.
    pub(crate) fn new(
        storage: SimStorage,
        oracle: Oracle,
        hook: impl Fn(&Mutex<Oracle>, &SimStorage, &Op) + Send + Sync + 'static,
    ) -> Self {
        let oracle = Arc::new(Mutex::new(oracle));
        let watched = oracle.clone();
        let hook: Hook = Arc::new(move |storage, op| hook(&watched, storage, op));
        listen(&storage, &hook);
        let mut guest = Self::on(storage, oracle, false);
        guest.hook = Some(hook);
        guest
    }

    /// Opens what `storage` holds, which `oracle` knows. Operations may fail from now on.
    pub(crate) fn tolerant(storage: SimStorage, oracle: Oracle) -> Self {
        Self::on(storage, Arc::new(Mutex::new(oracle)), true)
    }

    fn on(storage: SimStorage, oracle: Arc<Mutex<Oracle>>, tolerant: bool) -> Self {
        let storage = Arc::new(storage);
        // The hook locks the oracle.
        let parent = oracle.lock().parent().cloned();
        let disk = open_over(&storage, parent.as_ref()).unwrap();
        Self {
            disk: Some(disk),
            storage,
            oracle,
            tolerant,
            errors: Mutex::default(),
            writes: AtomicU64::new(1 << 16),
            hook: None,
        }
    }

    pub(crate) fn disk(&self) -> &Arc<Disk> {
        self.disk.as_ref().expect("it is open")
    }

    pub(crate) fn storage(&self) -> &Arc<SimStorage> {
        &self.storage
    }

    pub(crate) fn oracle(&self) -> &Mutex<Oracle> {
        &self.oracle
    }

    pub(crate) fn is_tolerant(&self) -> bool {
        self.tolerant
    }

    /// What failed so far.
    pub(crate) fn errors(&self) -> Vec<ErrorKind> {
        self.errors.lock().clone()
    }

    /// Whether that went well; where operations must not fail, it did.
    fn accept(&self, what: &str, result: Result<(), (ErrorKind, String)>) -> bool {
        match result {
            Ok(()) => true,
            Err((kind, _)) if self.tolerant => {
                self.errors.lock().push(kind);
                false
            }
            Err((_, error)) => panic!("{what}: {error}"),
        }
    }

    /// Changes the disk at `offset` to `data` by `change`.
    fn change(
        &self,
        offset: u64,
        data: &[u8],
        change: impl FnOnce(&Disk) -> Result<(), DiskError>,
    ) {
        let pending = self.oracle.lock().begin(offset, data);
        let result = change(self.disk());
        if self.accept(
            "a change",
            result.map_err(|error| (error.kind(), error.to_string())),
        ) {
            self.oracle.lock().acknowledge(pending);
        }
    }

    /// What of `count` bytes lies on the disk, whose end may cut the last block.
    fn inside(&self, offset: u64, count: u64) -> u64 {
        count.min(self.disk().len().saturating_sub(offset))
    }

    pub(crate) fn write(&self, offset: u64, count: u64) {
        let count = self.inside(offset, count);
        if count == 0 {
            return;
        }
        let mut data = vec![0; size(count)];
        let tag = self.writes.fetch_add(1, Ordering::Relaxed);
        pattern(tag, offset / 512, &mut data);
        self.write_bytes(offset, &data);
    }

    /// An ordinary write of zeros.
    pub(crate) fn write_zero_bytes(&self, offset: u64, count: u64) {
        let count = self.inside(offset, count);
        self.write_bytes(offset, &vec![0; size(count)]);
    }

    fn write_bytes(&self, offset: u64, data: &[u8]) {
        self.change(offset, data, |disk| disk.write_at(data, offset));
    }

    pub(crate) fn write_zeroes(&self, offset: u64, count: u64) {
        let count = self.inside(offset, count);
        let zeros = vec![0; size(count)];
        self.change(offset, &zeros, |disk| disk.write_zeroes(offset, count));
    }

    pub(crate) fn discard(&self, offset: u64, count: u64) {
        let count = self.inside(offset, count);
        let zeros = vec![0; size(count)];
        self.change(offset, &zeros, |disk| disk.discard(offset, count));
    }

    pub(crate) fn flush(&self) {
        self.flush_by(Disk::flush);
    }

    fn flush_by(&self, flush: impl FnOnce(&Disk) -> Result<(), DiskError>) -> bool {
        let pending = self.oracle.lock().begin_flush();
        let result = flush(self.disk());
        let done = self.accept(
            "a flush",
            result.map_err(|error| (error.kind(), error.to_string())),
        );
        if done {
            self.oracle.lock().acknowledge_flush(pending);
        }
        done
    }

    pub(crate) fn compact(&self) {
        match compact(self.disk()) {
            // There is nothing to gain.
            Err(CompactError::Fixed) => {}
            other => drop(self.accept("a compaction", other.map_err(described))),
        }
    }

    /// At most `steps` steps of idle work; true once it has nothing more to do.
    pub(crate) fn idle(&self, work: &mut IdleWork, steps: u32) -> bool {
        for _ in 0..steps {
            match work.step() {
                Next::Again => {}
                Next::Wait(_) => std::thread::yield_now(),
                Next::Done => return true,
                Next::Failed(error) => {
                    self.accept("idle work", Err(described(error)));
                    return true;
                }
            }
        }
        false
    }

    /// Idle work on the disk that begins at once, however little there is to gain.
    pub(crate) fn idle_work(&self) -> IdleWork {
        let idle_after = std::time::Duration::ZERO;
        let policy = IdlePolicy {
            idle_after,
            min_reclaim: 1,
            punch_holes: true,
            fs_aware: false,
            ..IdlePolicy::default()
        };
        IdleWork::new(self.disk().clone(), policy)
    }

    /// Closes cleanly, which flushes, and opens again.
    pub(crate) fn reopen(&mut self) {
        self.close();
        let parent = self.oracle.lock().parent().cloned();
        self.disk = Some(open_over(&self.storage, parent.as_ref()).unwrap());
    }

    /// The process dies, and the next one opens what it left.
    pub(crate) fn die(&mut self) {
        self.storage.clear_hook();
        let left = self.storage.kill();
        // Whatever it still does, the file no longer hears of it.
        self.disk = None;
        if let Some(hook) = &self.hook {
            listen(&left, hook);
        }
        self.storage = Arc::new(left);
        let parent = self.oracle.lock().parent().cloned();
        self.disk = Some(open_over(&self.storage, parent.as_ref()).unwrap());
    }

    pub(crate) fn close(&mut self) {
        let closed = self.flush_by(Disk::close);
        self.disk = None;
        if closed {
            check_closed(&self.storage).unwrap();
        }
    }
}

fn listen(storage: &SimStorage, hook: &Hook) {
    let hook = hook.clone();
    storage.on_op(move |storage, op| hook(storage, op));
}

fn described(error: CompactError) -> (ErrorKind, String) {
    (error.kind(), error.to_string())
}
