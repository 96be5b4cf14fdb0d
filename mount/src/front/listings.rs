//! Directories as the users of a mount list them: a page at a time, which all of them share.
//!
//! A reader may stop at any entry and go on much later, while names come and go. A listing kept for each
//! would cost memory for every directory that anybody has open. So entries have an order to which no other
//! entry matters: on Linux that of a keyed hash of the name, which is the offset that `telldir` gives; on
//! Windows that of the names. A reader is told what lies after the last entry that it got, however often the
//! directory has been read since: an entry that stays is listed exactly once. What comes or goes
//! meanwhile is listed or not.
//!
//! # Bounds
//! A page has at most [`PAGE_ENTRIES`] entries and [`PAGE_BYTES`] of names, and [`KEPT`] pages are kept, however many
//! directories are open. A larger directory is read once for each of its pages.

use std::collections::{BTreeSet, VecDeque};
use std::ffi::OsString;
#[cfg(unix)]
use std::hash::{BuildHasher, RandomState};
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Instant;

use parking_lot::Mutex;
use vhdfs::library::{Directory, Entry, Library, LibraryError, NodeId, NodeKind};

const PAGE_ENTRIES: usize = 1 << 16;
const PAGE_BYTES: usize = 8 << 20;
const KEPT: usize = 8;

/// Where a reader goes on: after the entry with this hash, or this name.
#[cfg(unix)]
pub(crate) type Place = u64;
#[cfg(windows)]
pub(crate) type Place = OsString;

/// Lower places are free for what a front end lists in front of all entries.
#[cfg(unix)]
pub(crate) const FIRST_PLACE: Place = 16;

/// An entry in its place.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Listed {
    /// Of two names with one hash, both are listed; that they come at the end of a reader's buffer, between
    /// which the second would be missed, is as good as impossible.
    #[cfg(unix)]
    hash: u64,
    pub(crate) name: OsString,
    pub(crate) kind: NodeKind,
}

impl Listed {
    pub(crate) fn place(&self) -> &Place {
        #[cfg(unix)]
        return &self.hash;
        #[cfg(windows)]
        return &self.name;
    }
}

/// A part of a directory: all that is after one place, up to another or to the end.
#[derive(Debug)]
pub(crate) struct Page {
    node: NodeId,
    /// Before it was read.
    begun: Instant,
    from: Option<Place>,
    entries: Vec<Listed>,
    /// Whether nothing is after it.
    pub(crate) is_last: bool,
}

impl Page {
    /// Its entries after `from`.
    pub(crate) fn behind(&self, from: Option<&Place>) -> &[Listed] {
        let before = |entry: &Listed| from.is_some_and(|from| entry.place() <= from);
        &self.entries[self.entries.partition_point(before)..]
    }

    /// Whether it has what is next after `from`.
    fn covers(&self, from: Option<&Place>) -> bool {
        self.from.as_ref() <= from
            && (self.is_last || from < self.entries.last().map(Listed::place))
    }
}

/// Who lists a directory.
#[derive(Debug)]
pub(crate) struct Reader {
    pub(crate) node: NodeId,
    begun: Mutex<Instant>,
}

impl Reader {
    pub(crate) fn new(node: NodeId) -> Self {
        Self {
            node,
            begun: Mutex::new(Instant::now()),
        }
    }

    /// What is listed is as it was then, or newer: `begins` says that the reader is at the start, perhaps
    /// again.
    fn since(&self, begins: bool) -> Instant {
        let mut begun = self.begun.lock();
        if begins {
            *begun = Instant::now();
        }
        *begun
    }
}

/// The pages of one mount.
#[derive(Debug)]
pub(crate) struct Listings {
    kept: Mutex<VecDeque<Arc<Page>>>,
    /// Keyed, so that nobody can make names that have one place.
    #[cfg(unix)]
    order: RandomState,
    most: usize,
}

impl Listings {
    pub(crate) fn new() -> Self {
        Self::with_pages_of(PAGE_ENTRIES)
    }

    fn with_pages_of(most: usize) -> Self {
        Self {
            kept: Mutex::default(),
            #[cfg(unix)]
            order: RandomState::new(),
            most,
        }
    }

    /// What is next for `reader` after `from`; `begins` as in [`Reader::since`]. Where that is not the last
    /// page, there is an entry.
    pub(crate) fn page(
        &self,
        library: &Library,
        reader: &Reader,
        from: Option<&Place>,
        begins: bool,
    ) -> Result<Arc<Page>, LibraryError> {
        let (node, since) = (reader.node, reader.since(begins));
        let fits =
            |page: &&Arc<Page>| page.node == node && page.begun >= since && page.covers(from);
        if let Some(page) = self.kept.lock().iter().find(fits) {
            return Ok(page.clone());
        }
        let begun = Instant::now();
        let (entries, is_last) = self.read(&library.directory(node)?, from)?;
        let page = Arc::new(Page {
            node,
            begun,
            from: from.cloned(),
            entries,
            is_last,
        });
        let mut kept = self.kept.lock();
        kept.retain(|other| other.node != node || other.from != page.from);
        kept.push_back(page.clone());
        if kept.len() > KEPT {
            kept.pop_front();
        }
        Ok(page)
    }

    /// The first entries after `from`, and whether that is all.
    fn read(
        &self,
        directory: &Directory,
        from: Option<&Place>,
    ) -> Result<(Vec<Listed>, bool), LibraryError> {
        let mut page = BTreeSet::new();
        let mut bytes = 0;
        let mut is_last = true;
        directory.read(&mut |entry| {
            let entry = self.listed(entry);
            let is_done = from.is_some_and(|from| entry.place() <= from);
            let is_beyond = !is_last && page.last().is_some_and(|last| entry > *last);
            let len = entry.name.len();
            if !is_done && !is_beyond && page.insert(entry) {
                bytes += len;
            }
            while page.len() > self.most || bytes > PAGE_BYTES {
                bytes -= page.pop_last().map_or(bytes, |entry| entry.name.len());
                is_last = false;
            }
            ControlFlow::Continue(())
        })?;
        Ok((page.into_iter().collect(), is_last))
    }

    fn listed(&self, entry: Entry) -> Listed {
        Listed {
            // Offsets are numbers of 63 bits.
            #[cfg(unix)]
            hash: (self.order.hash_one(&entry.name) >> 1).max(FIRST_PLACE),
            name: entry.name,
            kind: entry.kind,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::fs;

    use tempfile::TempDir;
    use vhdfs::library::LibraryOptions;

    use super::*;

    /// A directory of some empty disk files, and its library.
    fn sample(count: usize) -> (TempDir, Library) {
        let root = tempfile::tempdir().unwrap();
        for n in 0..count {
            fs::write(root.path().join(format!("{n}.vhd")), []).unwrap();
        }
        let library = Library::open(root.path(), LibraryOptions::default()).unwrap();
        (root, library)
    }

    #[test]
    fn what_stays_is_listed_once_whatever_comes_and_goes() {
        let (root, library) = sample(100);
        let listings = Listings::with_pages_of(7);
        let reader = Reader::new(NodeId::ROOT);
        let mut seen: HashMap<OsString, usize> = HashMap::new();
        let mut from = None;
        let mut read = 0;
        loop {
            let page = listings
                .page(&library, &reader, from.as_ref(), from.is_none())
                .unwrap();
            let entries = page.behind(from.as_ref());
            assert!(page.is_last || !entries.is_empty());
            // A buffer holds a few entries only.
            for entry in entries.iter().take(3) {
                *seen.entry(entry.name.clone()).or_default() += 1;
                from = Some(entry.place().to_owned());
            }
            if page.is_last && entries.len() <= 3 {
                break;
            }
            fs::write(root.path().join(format!("new{read}.vhd")), []).unwrap();
            // One of the second half goes.
            let _ = fs::remove_file(root.path().join(format!("{}.vhd", 50 + read)));
            listings.kept.lock().clear();
            read += 1;
        }
        for n in 0..50 {
            assert_eq!(seen.get(&OsString::from(format!("{n}.vhd.raw"))), Some(&1));
        }
        assert!(seen.values().all(|count| *count == 1), "{seen:?}");
    }

    #[test]
    fn pages_are_shared_and_few() {
        let (root, library) = sample(40);
        let listings = Listings::with_pages_of(3);
        let readers = [(); 2].map(|()| Reader::new(NodeId::ROOT));
        let page = |reader, from: Option<&Place>, begins| {
            listings.page(&library, reader, from, begins).unwrap()
        };
        let pages = readers.each_ref().map(|reader| page(reader, None, false));
        assert!(Arc::ptr_eq(&pages[0], &pages[1]));
        let mut from = None;
        loop {
            let page = page(&readers[0], from.as_ref(), false);
            from = page.entries.last().map(|entry| entry.place().to_owned());
            if page.is_last {
                break;
            }
        }
        assert_eq!(listings.kept.lock().len(), KEPT);
        // Who begins now sees what is there now.
        for n in 0..40 {
            fs::remove_file(root.path().join(format!("{n}.vhd"))).unwrap();
        }
        // Windows keeps the name of a file as long as a search for children looks into it.
        let gone = (0..500).any(|_| {
            std::thread::sleep(std::time::Duration::from_millis(10));
            page(&readers[0], None, true).entries.is_empty()
        });
        assert!(gone);
    }
}
