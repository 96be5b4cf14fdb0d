//! The folders, walked from the root: all that they lead to must be in use, and once only.

use std::ops::Range;

use zerocopy::byteorder::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use super::boot::{Boot, Kind, Root};
use crate::guest::Trouble;
use crate::guest::clusters::{CHECK_IT, Chains, Claims, ENTRY_LEN, Entries, Heap, capacity};
use crate::guest::view::View;

/// The most folders that are walked.
const MAX_FOLDERS: usize = 4 << 20;

/// The most bytes of a folder: 65536 entries. [Linux: `FAT_MAX_DIR_SIZE`]
const MAX_FOLDER_LEN: u64 = 2 << 20;

/// First bytes of a name: no entry from here on; a deleted one.
const NO_MORE: u8 = 0;
const DELETED: u8 = 0xe5;

/// Attributes: a label, or part of a long name; a folder.
const LABEL: u8 = 0x08;
const FOLDER: u8 = 0x10;

const OWN: &[u8; 11] = b".          ";
const PARENT: &[u8; 11] = b"..         ";
const HIBERNATION: &[u8; 11] = b"HIBERFILSYS";

/// An entry of a folder.
#[derive(Clone, Copy, Debug, FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawEntry {
    /// 0x00: name and extension, padded with spaces.
    name: [u8; 11],
    /// 0x0B: [`LABEL`], [`FOLDER`] and more.
    attributes: u8,
    /// 0x0C: times.
    times: [u8; 8],
    /// 0x14: first cluster, high half; in FAT12 and FAT16 something else.
    first_high: U16,
    /// 0x16: times.
    written: [u8; 4],
    /// 0x1A: first cluster, low half; 0 for none.
    first_low: U16,
    /// 0x1C: bytes; 0 for a folder.
    len: U32,
}

const _: () = assert!(size_of::<RawEntry>() == ENTRY_LEN);

/// A folder to be walked.
#[derive(Clone, Copy, Debug)]
struct Pending {
    /// Its first cluster, as the disk calls it.
    first: u32,
    /// Its parent's; `None` for the root.
    parent: Option<u32>,
}

/// Walks all folders and claims what they and their files own.
///
/// # Errors
/// [`Trouble::Skip`] where something is wrong, or the guest sleeps; [`Trouble::Io`].
pub(super) fn check(
    view: &View<'_>,
    boot: &Boot,
    chains: &Chains,
    claims: &mut Claims,
) -> Result<(), Trouble> {
    let mut walk = Walk {
        view,
        kind: boot.kind,
        heap: &boot.heap,
        root: None,
        chains,
        claims,
        pending: Vec::new(),
        found: 0,
    };
    match &boot.root {
        Root::Bytes(range) => walk.folder(vec![range.clone()], None)?,
        Root::Cluster(first) => {
            walk.root = Some(*first);
            let ranges = walk.chain(*first)?;
            walk.folder(ranges, None)?;
        }
    }
    while let Some(folder) = walk.pending.pop() {
        let ranges = walk.chain(folder.first)?;
        walk.folder(ranges, Some(folder))?;
    }
    Ok(())
}

struct Walk<'a, 'd> {
    view: &'a View<'d>,
    kind: Kind,
    heap: &'a Heap,
    /// The root's first cluster, if it lies in one.
    root: Option<u32>,
    chains: &'a Chains,
    claims: &'a mut Claims,
    pending: Vec<Pending>,
    /// How many folders there were.
    found: usize,
}

impl Walk<'_, '_> {
    /// Claims a folder's chain: where it lies, in bytes of the part.
    fn chain(&mut self, first: u32) -> Result<Vec<Range<u64>>, Trouble> {
        let first = self.heap.first(first)?;
        let runs = self.chains.follow(first, self.claims)?;
        let len = capacity(self.heap, &runs);
        if len > MAX_FOLDER_LEN.max(self.heap.cluster_size()) {
            let problem =
                format!("has a folder of {len} bytes, more than one can have: {CHECK_IT}");
            return Err(Trouble::skip(problem));
        }
        Ok(self.heap.all_bytes(&runs))
    }

    /// Walks a folder; `own` says which one, `None` for the root.
    fn folder(&mut self, ranges: Vec<Range<u64>>, own: Option<Pending>) -> Result<(), Trouble> {
        let mut entries = Entries::new(self.view, ranges);
        if let Some(own) = own {
            let parent = match own.parent {
                Some(parent) => [parent, parent],
                // Some write the number of the root's cluster, though it should be 0.
                None => [0, self.root.unwrap_or(0)],
            };
            self.expect(entries.next()?, OWN, &[own.first])?;
            self.expect(entries.next()?, PARENT, &parent)?;
        }
        while let Some(bytes) = entries.next()? {
            let entry: RawEntry = zerocopy::transmute!(bytes);
            match entry.name[0] {
                NO_MORE => break,
                DELETED => {}
                _ if entry.attributes & LABEL != 0 => {}
                _ if entry.attributes & FOLDER != 0 => self.add_folder(&entry, own)?,
                _ => self.file(&entry, own.is_none())?,
            }
        }
        Ok(())
    }

    /// Whether an entry with which each folder but the root begins is there. Were the folder's
    /// cluster taken for something else, it would not be.
    fn expect(
        &self,
        entry: Option<[u8; ENTRY_LEN]>,
        name: &[u8; 11],
        first: &[u32],
    ) -> Result<(), Trouble> {
        let good = entry.is_some_and(|bytes| {
            let entry: RawEntry = zerocopy::transmute!(bytes);
            entry.name == *name
                && entry.attributes & (FOLDER | LABEL) == FOLDER
                && first.contains(&self.first(&entry))
        });
        if good {
            return Ok(());
        }
        Err(Trouble::skip(format!(
            "has a folder that does not begin as one: {CHECK_IT}"
        )))
    }

    fn add_folder(&mut self, entry: &RawEntry, own: Option<Pending>) -> Result<(), Trouble> {
        self.found += 1;
        if self.found > MAX_FOLDERS {
            let problem = format!("has more than {MAX_FOLDERS} folders");
            return Err(Trouble::skip(problem));
        }
        self.pending.push(Pending {
            first: self.first(entry),
            parent: own.map(|own| own.first),
        });
        Ok(())
    }

    /// Claims a file's chain, which must have room for its bytes.
    fn file(&mut self, entry: &RawEntry, in_root: bool) -> Result<(), Trouble> {
        let len = u64::from(entry.len.get());
        let first = self.first(entry);
        if first == 0 && len == 0 {
            return Ok(());
        }
        let runs = self.chains.follow(self.heap.first(first)?, self.claims)?;
        if capacity(self.heap, &runs) < len {
            return Err(Trouble::skip(format!(
                "has a file of {len} bytes with clusters for fewer: {CHECK_IT}"
            )));
        }
        if in_root && entry.name == *HIBERNATION {
            let start = self
                .heap
                .all_bytes(&runs)
                .first()
                .map_or(0, |run| run.start);
            return self.check_hibernation(start, len);
        }
        Ok(())
    }

    /// Whether the memory of a Windows that sleeps lies at `start`. Too short a file has no header
    /// to tell.
    fn check_hibernation(&self, start: u64, len: u64) -> Result<(), Trouble> {
        let header = self.view.read(start, 4)?;
        if len < 4096 || header.eq_ignore_ascii_case(b"hibr") {
            return Err(Trouble::hibernated(
                "holds a Windows that is hibernated: start it and shut it down",
            ));
        }
        Ok(())
    }

    /// An entry's first cluster, as the disk calls it.
    fn first(&self, entry: &RawEntry) -> u32 {
        let low = u32::from(entry.first_low.get());
        match self.kind {
            Kind::Fat12 | Kind::Fat16 => low,
            Kind::Fat32 => u32::from(entry.first_high.get()) << 16 | low,
        }
    }
}
