//! What changes in the headers of a VHD that nobody has open: where its parent lies, and its identity.
//!
//! # Where the parent lies
//! The dynamic header has two sectors and one checksum, so that it cannot be changed where it is: half of
//! it would be no header. A footer has one sector, and says where the header is. So for as long as it
//! takes there is a second header at the end of the file, with paths of its own:
//!
//! 1. the footer, as it is, behind the place for them: the file gets longer; sync;
//! 2. the second header and its paths; sync;
//! 3. the footer that names it, at the end of the file; sync; the same at the start; sync;
//! 4. paths and header in the places that they are to keep; sync;
//! 5. the footer that names this header, at the end; sync; at the start; sync;
//! 6. the same where the file is to end; sync; and there the file is cut; sync.
//!
//! At every cut the footer at the end, or the copy where there is none, leads to a header that is durable
//! and names paths that are: the old ones up to 3, the new ones from then on. A file that was cut off
//! between 3 and 6 is whole, only longer; doing it again brings its header to its place.
//!
//! # Identity
//! It stands in the footer alone: the one at the end decides, and is written first.

use std::io;

use super::create::{LOCATOR_SPACE, ParentTexts, renewed, space_for};
use super::layout::{DynamicLayout, END_LOOK, Layout, sorted_slots};
use super::recover::read_recovered;
use crate::error::{FormatError, OpenProblem};
use crate::format::parent::{Identity, NewParent};
use crate::format::vhd::{DynamicHeader, FOOTER_LEN, Footer, HEADER_LEN};
use crate::image::read_array;
use crate::storage::Storage;
use crate::units::{
    FileOffset, FileRange, SECTOR_SIZE, round_down, round_up, u64_from, usize_from,
};

/// Where all programs put the header.
const HOME: FileRange = FileRange::new(FileOffset::new(FOOTER_LEN), HEADER_LEN);

/// Writes where `parent` lies into the differencing VHD in `storage`, durably; what was put right before,
/// for people. See [`crate::image::relink()`].
///
/// # Errors
/// As opening it for writing, and what the host answers.
pub(crate) fn relink(
    storage: &dyn Storage,
    parent: &NewParent,
) -> Result<Vec<String>, OpenProblem> {
    let (layout, repaired) = read_recovered(storage, &|_| Ok(()))?;
    let Some(dynamic) = &layout.dynamic else {
        let (found, advice) = ("a fixed disk", "it has no parent");
        return Err(FormatError::incompatible(found, advice).into());
    };
    let rewrite = || {
        let texts = ParentTexts::of(parent)?;
        let places = Places::choose(storage, &layout, dynamic, &texts)?;
        Rewrite::plan(&layout, dynamic, &texts, places).carry_out(storage)
    };
    rewrite().map_err(|source| OpenProblem::Io {
        action: "write where its parent is",
        source,
    })?;
    Ok(repaired)
}

/// Gives the VHD in `storage` a new identity, durably; which one. See [`crate::image::renew_identity`].
///
/// # Errors
/// As opening it for writing, and what the host answers.
pub(crate) fn renew_identity(storage: &dyn Storage) -> Result<Identity, OpenProblem> {
    let (layout, _) = read_recovered(storage, &|_| Ok(()))?;
    let renewed = renewed(&layout.footer);
    let footer = renewed.to_bytes();
    let write = || {
        // Where it would not be one sector, what was there stays until there is another behind it.
        let at = match layout.tail.at.get().is_multiple_of(SECTOR_SIZE) {
            true => layout.tail.at,
            false => sector_from(layout.tail.at.plus(FOOTER_LEN)),
        };
        storage.write_all_at(&footer, at)?;
        storage.sync()?;
        if layout.dynamic.is_some() {
            storage.write_all_at(&footer, FileOffset::new(0))?;
            storage.sync()?;
        }
        Ok(())
    };
    write().map_err(|source| OpenProblem::Io {
        action: "write its identity",
        source,
    })?;
    Ok(Identity::Vhd(renewed.unique_id()))
}

/// The places that header and paths are to keep.
#[derive(Clone, Copy, Debug)]
struct Places {
    header: FileOffset,
    relative: FileRange,
    absolute: FileRange,
    /// Where the footer is to lie.
    end: FileOffset,
}

impl Places {
    /// Those that they have; for paths that do not fit there, the first free space that they fit in.
    fn choose(
        storage: &dyn Storage,
        layout: &Layout,
        dynamic: &DynamicLayout,
        texts: &ParentTexts<'_>,
    ) -> io::Result<Self> {
        let current = FileOffset::new(layout.footer.data_offset());
        let used = used(dynamic);
        let is_free = |range: FileRange| {
            range.end() <= layout.tail.at && used.iter().all(|taken| !taken.overlaps(range))
        };
        let mut spaces: Vec<FileRange> = dynamic.header.locator_ranges().collect();
        let mut header = current;
        if current != HOME.start && is_free(HOME) {
            let bytes: [u8; 1024] = read_array(storage, HOME.start)?;
            if bytes.starts_with(b"cxsparse") {
                // An earlier run was interrupted. The places that paths had are their places still.
                header = HOME.start;
                spaces = disjoint(DynamicHeader::torn(&bytes).locator_ranges(), is_free);
            }
        }
        spaces.sort_unstable();
        let mut take = |path: &[u8]| take_space(&mut spaces, u64_from(path.len()));
        // The longer one has the choice.
        let found = if texts.relative.len() > texts.absolute.len() {
            take(&texts.relative).zip(take(&texts.absolute))
        } else {
            let absolute = take(&texts.absolute);
            take(&texts.relative).zip(absolute)
        };
        let old_end = sector_from(layout.tail.at);
        let (relative, absolute, end) = match found {
            Some((relative, absolute)) => (relative, absolute, layout.tail.at),
            None => {
                let lens = [&texts.relative, &texts.absolute].map(|path| space_for(path));
                let gap = first_gap(dynamic.start, &used, lens[0].saturating_add(lens[1]));
                let relative = FileRange::new(gap, lens[0]);
                let absolute = FileRange::new(relative.end(), lens[1]);
                (relative, absolute, old_end.max(absolute.end()))
            }
        };
        Ok(Self {
            header,
            relative,
            absolute,
            end,
        })
    }
}

/// Those of `ranges` that are free, and apart from each other and from the header's place.
fn disjoint(
    ranges: impl Iterator<Item = FileRange>,
    is_free: impl Fn(FileRange) -> bool,
) -> Vec<FileRange> {
    let mut kept = vec![HOME];
    for range in ranges.filter(|range| is_free(*range)) {
        if kept.iter().all(|other| !other.overlaps(range)) {
            kept.push(range);
        }
    }
    kept.split_off(1)
}

/// What blocks and metadata take of the file, sorted.
fn used(dynamic: &DynamicLayout) -> Vec<FileRange> {
    let slots = sorted_slots(&dynamic.map).into_iter();
    let slots = slots.map(|(start, _)| FileRange::new(start, dynamic.slot.len));
    let mut used: Vec<FileRange> = slots.collect();
    used.extend(dynamic.metadata.iter().map(|(range, _)| *range));
    used.sort_unstable();
    used
}

/// The smallest of `spaces` that takes a path of `len` bytes, and takes it away; nothing of the file for
/// no path.
fn take_space(spaces: &mut Vec<FileRange>, len: u64) -> Option<FileRange> {
    if len == 0 {
        return Some(FileRange::new(FileOffset::new(0), 0));
    }
    // Other lengths mean different things to different programs.
    let whole = |range: &FileRange| round_down(range.len, SECTOR_SIZE);
    let fitting = spaces.iter().enumerate();
    let fitting = fitting.filter(|(_, range)| whole(range) >= len);
    let (best, _) = fitting.min_by_key(|(_, range)| range.len)?;
    let range = spaces.remove(best);
    Some(FileRange::new(range.start, whole(&range)))
}

/// The lowest place from `start` on for `len` bytes that none of `used`, sorted, takes. Whole pages: a
/// tapdisk writes those around the sector bitmap of a block.
fn first_gap(start: FileOffset, used: &[FileRange], len: u64) -> FileOffset {
    let page_from = |at: FileOffset| FileOffset::new(round_up(at.get(), LOCATOR_SPACE));
    let mut at = page_from(start);
    for range in used {
        if at.plus(len) <= range.start {
            break;
        }
        at = at.max(page_from(range.end()));
    }
    at
}

fn sector_from(at: FileOffset) -> FileOffset {
    FileOffset::new(round_up(at.get(), SECTOR_SIZE))
}

/// A header and the paths that it names, with their places.
#[derive(Debug)]
struct Placed(Vec<(FileOffset, Vec<u8>)>);

impl Placed {
    fn new(header: &DynamicHeader, texts: &ParentTexts<'_>, places: &Places) -> Self {
        let fields = texts.fields(places.relative, places.absolute);
        let header = header.with_parent(&fields).to_bytes().to_vec();
        let path = |bytes: &[u8], space: FileRange| {
            let mut bytes = bytes.to_vec();
            // Nothing of an older one behind it, for who reads up to a zero.
            let len = round_up(u64_from(bytes.len()).saturating_add(2), SECTOR_SIZE);
            bytes.resize(usize_from(len.min(space.len)), 0);
            (space.start, bytes)
        };
        let mut parts = vec![(places.header, header)];
        parts.extend(
            [
                (&texts.relative, places.relative),
                (&texts.absolute, places.absolute),
            ]
            .into_iter()
            .filter(|(bytes, _)| !bytes.is_empty())
            .map(|(bytes, space)| path(bytes, space)),
        );
        Self(parts)
    }

    fn write(&self, storage: &dyn Storage) -> io::Result<()> {
        for (at, bytes) in &self.0 {
            storage.write_all_at(bytes, *at)?;
        }
        storage.sync()
    }
}

/// All that is written, see the module.
#[derive(Debug)]
struct Rewrite {
    old: Footer,
    old_len: u64,
    second: Placed,
    /// Names `second`.
    second_footer: Footer,
    /// Where the footer lies meanwhile.
    second_end: FileOffset,
    last: Placed,
    last_footer: Footer,
    last_end: FileOffset,
}

impl Rewrite {
    fn plan(
        layout: &Layout,
        dynamic: &DynamicLayout,
        texts: &ParentTexts<'_>,
        last: Places,
    ) -> Self {
        // So far behind the footer that was there that it is not taken for data behind the blocks, where
        // a power cut leaves the longer file without the new one.
        let apart = FOOTER_LEN.saturating_add(END_LOOK);
        let header = sector_from(last.end.max(layout.tail.at).plus(apart));
        let space = |at: FileOffset, path: &[u8]| {
            FileRange::new(at, round_up(u64_from(path.len()), SECTOR_SIZE))
        };
        let relative = space(header.plus(HEADER_LEN), &texts.relative);
        let absolute = space(relative.end(), &texts.absolute);
        let second = Places {
            header,
            relative,
            absolute,
            end: absolute.end(),
        };
        Self {
            old: layout.footer,
            old_len: layout.file_len,
            second: Placed::new(&dynamic.header, texts, &second),
            second_footer: layout.footer.with_data_offset(header),
            second_end: second.end,
            last: Placed::new(&dynamic.header, texts, &last),
            last_footer: layout.footer.with_data_offset(last.header),
            last_end: last.end,
        }
    }

    fn carry_out(&self, storage: &dyn Storage) -> io::Result<()> {
        let put = |footer: &Footer, at| {
            storage.write_all_at(&footer.to_bytes(), at)?;
            storage.sync()
        };
        let switch = |footer| {
            put(footer, self.second_end)?;
            put(footer, FileOffset::new(0))
        };
        // Longer in one write: see `space.rs`.
        if let Err(error) = put(&self.old, self.second_end) {
            // The footer that was there is there still.
            let _ = storage.set_len(self.old_len);
            return Err(error);
        }
        self.second.write(storage)?;
        switch(&self.second_footer)?;
        self.last.write(storage)?;
        switch(&self.last_footer)?;
        put(&self.last_footer, self.last_end)?;
        storage.set_len(self.last_end.plus(FOOTER_LEN).get())?;
        storage.sync()
    }
}
