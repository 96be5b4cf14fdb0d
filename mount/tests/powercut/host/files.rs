//! The files of a faulty host: one directory of simulated storages, which share their power.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use parking_lot::{Mutex, RwLock};
use vhdfs::storage::Storage;
use vhdfs::storage::sim::{Fault, OpKind, Random, SimStorage};

use super::orders::{Answer, Kept, Operation, Order};

/// The directory's own number; files count from the next one.
pub(crate) const ROOT: u64 = 1;

/// A file.
pub(crate) struct Node {
    pub(crate) storage: SimStorage,
    pub(crate) mode: u32,
    modified: Mutex<SystemTime>,
    chance: Mutex<Option<Chance>>,
}

/// Failures by chance.
struct Chance {
    on: Vec<OpKind>,
    one_in: u64,
    random: Random,
}

/// Names and files, as they are seen and as they are durable.
#[derive(Default)]
struct Tree {
    names: BTreeMap<OsString, u64>,
    durable_names: BTreeMap<OsString, u64>,
    nodes: BTreeMap<u64, Node>,
    created: u64,
}

/// The host.
#[derive(Default)]
pub(crate) struct Files {
    /// Held for reading by every operation, so that a restart finds none under way.
    tree: RwLock<Tree>,
    is_off: AtomicBool,
    /// Changes and syncs so far, and at how many the power goes.
    changes: AtomicU64,
    cut_at: AtomicU64,
    syncs: AtomicU64,
    cut_at_sync: AtomicU64,
    pause: AtomicU64,
    lies: AtomicBool,
    pub(crate) is_cached: AtomicBool,
}

impl Node {
    fn new(mode: u32) -> Self {
        Self {
            storage: SimStorage::new(),
            mode,
            modified: Mutex::new(SystemTime::now()),
            chance: Mutex::new(None),
        }
    }

    pub(crate) fn modified(&self) -> SystemTime {
        *self.modified.lock()
    }

    /// Lets the next operation fail if its turn has come.
    fn tempt(&self, kind: OpKind) {
        if let Some(chance) = &mut *self.chance.lock()
            && chance.on.contains(&kind)
            && chance.random.below(chance.one_in) == 0
        {
            self.storage.inject(Fault::next(kind));
        }
    }
}

impl Files {
    pub(crate) fn new() -> Self {
        let files = Self::default();
        files.stay_on();
        files
    }

    /// Does `work`, an operation of `kind`, on the file of that number.
    ///
    /// # Errors
    /// Without power, after the failures that were ordered, or what `work` says.
    pub(crate) fn work<T>(
        &self,
        number: u64,
        kind: OpKind,
        work: impl FnOnce(&Node) -> io::Result<T>,
    ) -> io::Result<T> {
        let tree = self.tree.read();
        self.spend(kind)?;
        let node = tree.nodes.get(&number).ok_or(io::ErrorKind::NotFound)?;
        node.tempt(kind);
        let result = work(node);
        // A new time would make the kernel drop what it has cached.
        let is_cached = self.is_cached.load(Ordering::SeqCst);
        if kind.changes() && kind != OpKind::Sync && !is_cached {
            *node.modified.lock() = SystemTime::now();
        }
        result
    }

    fn stay_on(&self) {
        self.cut_at.store(u64::MAX, Ordering::SeqCst);
        self.cut_at_sync.store(u64::MAX, Ordering::SeqCst);
        self.is_off.store(false, Ordering::SeqCst);
    }

    /// Makes the file of that number durable, or says so.
    pub(crate) fn sync(&self, number: u64) -> io::Result<()> {
        if self.lies.load(Ordering::SeqCst) {
            return self.spend(OpKind::Sync);
        }
        self.work(number, OpKind::Sync, |node| node.storage.sync())
    }

    /// Takes the power for one operation.
    fn spend(&self, kind: OpKind) -> io::Result<()> {
        if kind.changes() {
            let pause = self.pause.load(Ordering::SeqCst);
            if pause > 0 {
                std::thread::sleep(Duration::from_micros(pause));
            }
            let reaches = |count: &AtomicU64, limit: &AtomicU64| {
                count.fetch_add(1, Ordering::SeqCst) >= limit.load(Ordering::SeqCst)
            };
            if reaches(&self.changes, &self.cut_at)
                || kind == OpKind::Sync && reaches(&self.syncs, &self.cut_at_sync)
            {
                self.is_off.store(true, Ordering::SeqCst);
            }
        }
        match self.is_off.load(Ordering::SeqCst) {
            true => Err(io::Error::other("there is no power")),
            false => Ok(()),
        }
    }

    /// The number of the file of that name.
    pub(crate) fn find(&self, name: &OsStr) -> io::Result<u64> {
        let tree = self.tree.read();
        self.spend(OpKind::Query)?;
        let found = tree.names.get(name).copied();
        found.ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    /// Numbers and names.
    pub(crate) fn list(&self) -> io::Result<Vec<(u64, OsString)>> {
        let tree = self.tree.read();
        self.spend(OpKind::Query)?;
        let names = tree.names.iter();
        Ok(names
            .map(|(name, &number)| (number, name.clone()))
            .collect())
    }

    /// A new file, whose name is not durable yet.
    pub(crate) fn create(&self, name: &OsStr, mode: u32) -> io::Result<u64> {
        let mut tree = self.tree.write();
        self.spend(OpKind::Write)?;
        if tree.names.contains_key(name) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        tree.created += 1;
        let number = ROOT + tree.created;
        tree.nodes.insert(number, Node::new(mode));
        tree.names.insert(name.to_owned(), number);
        Ok(number)
    }

    /// Takes a name away. Its file stays: a cut may bring the name back.
    pub(crate) fn remove(&self, name: &OsStr) -> io::Result<()> {
        let mut tree = self.tree.write();
        self.spend(OpKind::Write)?;
        let removed = tree.names.remove(name);
        removed
            .map(drop)
            .ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    /// Makes the names durable.
    pub(crate) fn sync_names(&self) -> io::Result<()> {
        let mut tree = self.tree.write();
        self.spend(OpKind::Sync)?;
        tree.durable_names = tree.names.clone();
        Ok(())
    }

    /// Does as it is told.
    pub(crate) fn obey(&self, order: Order) -> Result<Answer, String> {
        match order {
            Order::Report => {}
            Order::Cut => self.is_off.store(true, Ordering::SeqCst),
            Order::CutAfter(changes) => {
                let at = self.changes.load(Ordering::SeqCst).saturating_add(changes);
                self.cut_at.store(at, Ordering::SeqCst);
            }
            Order::CutAtSync(syncs) => {
                let at = self.syncs.load(Ordering::SeqCst).saturating_add(syncs);
                self.cut_at_sync.store(at, Ordering::SeqCst);
            }
            Order::Restart(kept) => self.restart(kept),
            Order::Fail { file, failure } => {
                self.with_file(&file, |node| node.storage.inject(failure.into()))?;
            }
            Order::FailSometimes {
                file,
                on,
                one_in,
                seed,
            } => {
                let chance = Chance {
                    on: on.into_iter().map(Operation::into).collect(),
                    one_in,
                    random: Random::new(seed),
                };
                self.with_file(&file, |node| *node.chance.lock() = Some(chance))?;
            }
            Order::Limit { file, bytes } => {
                self.with_file(&file, |node| node.storage.set_capacity(bytes))?;
            }
            Order::Slow { microseconds } => self.pause.store(microseconds, Ordering::SeqCst),
            Order::Cache => self.is_cached.store(true, Ordering::SeqCst),
            Order::Lie => self.lies.store(true, Ordering::SeqCst),
            Order::Recover => self.recover(),
        }
        Ok(self.answer())
    }

    fn with_file(&self, name: &str, work: impl FnOnce(&Node)) -> Result<(), String> {
        let tree = self.tree.read();
        let number = tree.names.get(OsStr::new(name));
        let node = number.and_then(|number| tree.nodes.get(number));
        node.map(work).ok_or_else(|| format!("there is no {name}"))
    }

    fn recover(&self) {
        self.pause.store(0, Ordering::SeqCst);
        for node in self.tree.read().nodes.values() {
            node.storage.clear_faults();
            node.storage.set_capacity(None);
            *node.chance.lock() = None;
        }
    }

    fn restart(&self, kept: Kept) {
        let mut tree = self.tree.write();
        let tree = &mut *tree;
        for (&number, node) in &mut tree.nodes {
            node.storage = node.storage.crash(&mut kept.choice(number));
            *node.chance.lock() = None;
        }
        let names: BTreeSet<_> = tree.names.keys().chain(tree.durable_names.keys()).collect();
        let mut random = match kept {
            Kept::Some { seed, .. } => Some(Random::new(seed)),
            Kept::Nothing | Kept::All => None,
        };
        let mut left = BTreeMap::new();
        for name in names {
            let new = random
                .as_mut()
                .map_or(kept == Kept::All, |random| random.below(2) == 0);
            let from = if new {
                &tree.names
            } else {
                &tree.durable_names
            };
            if let Some(&number) = from.get(name) {
                left.insert(name.clone(), number);
            }
        }
        tree.names = left.clone();
        tree.durable_names = left;
        self.stay_on();
    }

    fn answer(&self) -> Answer {
        let tree = self.tree.read();
        let unsynced = (tree.nodes.values()).map(|node| node.storage.unsynced_len());
        Answer {
            is_off: self.is_off.load(Ordering::SeqCst),
            changes: self.changes.load(Ordering::SeqCst),
            syncs: self.syncs.load(Ordering::SeqCst),
            unsynced: u64::try_from(unsynced.sum::<usize>()).expect("a count"),
        }
    }

    /// The length and the stored bytes of a file.
    pub(crate) fn sizes(node: &Node) -> io::Result<(u64, u64)> {
        Ok((node.storage.len()?, node.storage.allocated_bytes()?))
    }
}
