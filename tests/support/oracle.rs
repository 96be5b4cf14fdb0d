//! What each sector of a disk may read as.

use std::collections::BTreeMap;
use std::sync::Arc;

use vhdfs::disk::{Disk, ExtentKind};

use super::{len, size};

const SECTOR: u64 = 512;

type Content = Arc<[u8; 512]>;

#[derive(Clone, Debug)]
struct Sector {
    /// What it may read as after a power cut: the last flushed content, then every later one; each
    /// with its number.
    legal: Vec<(u64, Content)>,
    /// How many contents it was given.
    given: u64,
    /// What it may read as while the host lives: the last acknowledged content, then those under way.
    live: Vec<Content>,
}

/// What a guest has asked for. Clones are cheap: they share the sectors.
#[derive(Clone, Debug)]
pub(crate) struct Oracle {
    disk_len: u64,
    zero: Content,
    /// What is read where nothing was ever written.
    parent: Option<Arc<Disk>>,
    sectors: BTreeMap<u64, Arc<Sector>>,
}

/// A change that the guest waits for.
#[derive(Debug)]
pub(crate) struct Pending(Vec<(u64, Content)>);

/// A flush that the guest waits for: by sector, how many contents it was given, and the live ones.
#[derive(Debug)]
pub(crate) struct PendingFlush(Vec<(u64, u64, Vec<Content>)>);

/// After what a disk is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum After {
    /// The power was cut.
    PowerCut,
    /// The process died, or nothing happened.
    Kill,
}

impl Sector {
    fn holding(content: Content) -> Arc<Self> {
        Arc::new(Self {
            legal: vec![(0, content.clone())],
            given: 1,
            live: vec![content],
        })
    }
}

impl Oracle {
    /// A disk of zeros.
    pub(crate) fn new(disk_len: u64) -> Self {
        Self {
            disk_len,
            zero: Arc::new([0; 512]),
            parent: None,
            sectors: BTreeMap::new(),
        }
    }

    /// A disk that holds what `parent` does.
    pub(crate) fn over(disk_len: u64, parent: Option<Arc<Disk>>) -> Self {
        Self {
            parent,
            ..Self::new(disk_len)
        }
    }

    /// The disk underneath.
    pub(crate) fn parent(&self) -> Option<&Arc<Disk>> {
        self.parent.as_ref()
    }

    /// What sectors hold that were never written.
    pub(crate) fn base(&self, offset: u64, bytes: &mut [u8]) {
        bytes.fill(0);
        if let Some(parent) = &self.parent {
            let inside = parent.len().saturating_sub(offset).min(len(bytes));
            if inside > 0 {
                parent.read_at(&mut bytes[..size(inside)], offset).unwrap();
            }
        }
    }

    fn base_sector(&self, sector: u64) -> Content {
        if self.parent.is_none() {
            return self.zero.clone();
        }
        let mut bytes = [0; 512];
        self.base(sector * SECTOR, &mut bytes);
        Arc::new(bytes)
    }

    /// Says that the disk holds `data` at `offset`, durably. Both are whole sectors.
    pub(crate) fn holds(&mut self, offset: u64, data: &[u8]) {
        let pending = self.begin(offset, data);
        self.acknowledge(pending);
        let flush = self.begin_flush();
        self.acknowledge_flush(flush);
    }

    /// The guest asks for `data` at `offset`.
    pub(crate) fn begin(&mut self, offset: u64, data: &[u8]) -> Pending {
        let mut pending = Vec::new();
        let end = offset + len(data);
        for sector in offset / SECTOR..end.div_ceil(SECTOR) {
            let start = sector * SECTOR;
            if !self.sectors.contains_key(&sector) {
                let state = Sector::holding(self.base_sector(sector));
                self.sectors.insert(sector, state);
            }
            let state = self.sectors.get_mut(&sector).expect("just inserted");
            let state = Arc::make_mut(state);
            let mut content = **state.live.last().expect("a sector has a content");
            let (from, to) = (offset.max(start), end.min(start + SECTOR));
            content[size(from - start)..size(to - start)]
                .copy_from_slice(&data[size(from - offset)..size(to - offset)]);
            let content = Arc::new(content);
            state.legal.push((state.given, content.clone()));
            state.given += 1;
            state.live.push(content.clone());
            pending.push((sector, content));
        }
        Pending(pending)
    }

    /// The guest was told that it is done.
    pub(crate) fn acknowledge(&mut self, pending: Pending) {
        for (sector, content) in pending.0 {
            let state = self.sectors.get_mut(&sector).expect("begun");
            let state = Arc::make_mut(state);
            let done = state
                .live
                .iter()
                .position(|live| Arc::ptr_eq(live, &content));
            state.live.drain(..done.unwrap_or(0));
        }
    }

    /// The guest asks for a flush.
    pub(crate) fn begin_flush(&mut self) -> PendingFlush {
        let unflushed = self
            .sectors
            .iter()
            .filter(|(_, state)| state.legal.len() > 1);
        let flush = |(&n, state): (&u64, &Arc<Sector>)| (n, state.given, state.live.clone());
        PendingFlush(unflushed.map(flush).collect())
    }

    /// The guest was told that the flush is done. What it covered is among what was live when it
    /// began; of flushes at the same time, each rules out what it can.
    pub(crate) fn acknowledge_flush(&mut self, flush: PendingFlush) {
        for (sector, given, live) in flush.0 {
            let state = Arc::make_mut(self.sectors.get_mut(&sector).expect("known"));
            let was_live = |content: &Content| live.iter().any(|live| Arc::ptr_eq(live, content));
            (state.legal).retain(|(number, content)| *number >= given || was_live(content));
        }
    }

    /// After a power cut everything that is there is durable: what `disk` reads is all that is legal
    /// from now on.
    pub(crate) fn settle(&mut self, disk: &Disk) {
        self.settle_reads(&|bytes, offset| disk.read_at(bytes, offset).unwrap());
    }

    /// As [`Self::settle`], of all that `read` gives.
    pub(crate) fn settle_reads(&mut self, read: &dyn Fn(&mut [u8], u64)) {
        let mut bytes = [0; 512];
        for (&sector, state) in &mut self.sectors {
            read(&mut bytes, sector * SECTOR);
            *state = Sector::holding(Arc::new(bytes));
        }
    }

    /// Reads all of `disk` and compares. `thorough` reads holes too.
    ///
    /// # Errors
    /// The first sector that reads as something that it may not.
    pub(crate) fn check(&self, disk: &Disk, after: After, thorough: bool) -> Result<(), String> {
        if disk.len() != self.disk_len {
            return Err(format!("{} bytes instead of {}", disk.len(), self.disk_len));
        }
        let mut buffer = Vec::new();
        let mut end = 0;
        for extent in disk.extents(0) {
            if extent.offset != end {
                return Err(format!("extents have a gap at {end:#x}"));
            }
            end += extent.len;
            if extent.kind == ExtentKind::Hole && !thorough && self.parent.is_none() {
                self.check_hole(extent.offset, end, after)?;
                continue;
            }
            let mut at = extent.offset;
            while at < end {
                buffer.resize(size((end - at).min(1 << 20)), 0);
                disk.read_at(&mut buffer, at)
                    .map_err(|error| format!("at {at:#x}: {error}"))?;
                self.check_bytes(&buffer, at, after)?;
                at += len(&buffer);
            }
        }
        if end != self.disk_len {
            return Err(format!("extents end at {end:#x}"));
        }
        Ok(())
    }

    /// Compares all that `read` gives.
    ///
    /// # Errors
    /// As [`Self::check`].
    pub(crate) fn check_reads(
        &self,
        read: &dyn Fn(&mut [u8], u64),
        after: After,
    ) -> Result<(), String> {
        let mut buffer = vec![0; 1 << 20];
        let mut at = 0;
        while at < self.disk_len {
            let count = size((self.disk_len - at).min(1 << 20));
            read(&mut buffer[..count], at);
            self.check_bytes(&buffer[..count], at, after)?;
            at += 1 << 20;
        }
        Ok(())
    }

    fn allowed(&self, sector: u64, after: After) -> Option<Vec<&Content>> {
        let state = self.sectors.get(&sector)?;
        Some(match after {
            After::PowerCut => state.legal.iter().map(|(_, content)| content).collect(),
            After::Kill => state.live.iter().collect(),
        })
    }

    fn check_bytes(&self, bytes: &[u8], offset: u64, after: After) -> Result<(), String> {
        let mut base = vec![0; bytes.len()];
        self.base(offset, &mut base);
        let sectors = bytes.chunks(512).zip(base.chunks(512));
        for (sector, (content, base)) in (offset / SECTOR..).zip(sectors) {
            let is_legal = match self.allowed(sector, after) {
                Some(allowed) => allowed
                    .iter()
                    .any(|allowed| allowed[..content.len()] == *content),
                None => content == base,
            };
            if !is_legal {
                return Err(self.explain(sector, content, after));
            }
        }
        Ok(())
    }

    fn check_hole(&self, start: u64, end: u64, after: After) -> Result<(), String> {
        for (&sector, _) in self.sectors.range(start / SECTOR..end.div_ceil(SECTOR)) {
            let allowed = self.allowed(sector, after);
            if !allowed.is_some_and(|allowed| allowed.contains(&&self.zero)) {
                return Err(self.explain(sector, &self.zero[..], after));
            }
        }
        Ok(())
    }

    fn explain(&self, sector: u64, content: &[u8], after: After) -> String {
        let base = self.base_sector(sector);
        let allowed = self.allowed(sector, after).unwrap_or(vec![&base]);
        let origin = |content: &[u8]| {
            let is = |other: &Content| other[..content.len()] == *content;
            let holders = self.sectors.iter();
            let mut found =
                holders.filter(|(_, state)| state.legal.iter().any(|(_, other)| is(other)));
            match found.next() {
                _ if content.iter().all(|&byte| byte == 0) => "zeros".to_owned(),
                Some((place, _)) => format!("a content of sector {place:#x}"),
                None => "something that nobody may read any more, or never wrote".to_owned(),
            }
        };
        let offset = sector * SECTOR;
        let allowed: Vec<_> = allowed.iter().map(|content| origin(&content[..])).collect();
        format!(
            "the sector {sector:#x} at {offset:#x} holds {} ({:02x?}...), allowed: {allowed:?}",
            origin(content),
            &content[..8.min(content.len())]
        )
    }
}
