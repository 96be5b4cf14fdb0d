//! The entries of a folder, set by set. [exFAT 6]

use std::ops::Range;

use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use crate::guest::Trouble;
use crate::guest::clusters::{CHECK_IT, ENTRY_LEN, Entries};
use crate::guest::view::View;

/// Bits of an entry's type. [exFAT 6.2.1]
const IN_USE: u8 = 0x80;
const SECONDARY: u8 = 0x40;
const BENIGN: u8 = 0x20;

/// No entry from here on.
const NO_MORE: u8 = 0;

pub(super) const BITMAP: u8 = 0x81;
pub(super) const UP_CASE: u8 = 0x82;
pub(super) const LABEL: u8 = 0x83;
const FILE: u8 = 0x85;
const STREAM: u8 = 0xc0;
const FILE_NAME: u8 = 0xc1;

/// Of a file's attributes: it is a folder.
const FOLDER: u16 = 0x10;

/// Flags of what may own clusters. [exFAT 6.3.4, 6.4.2]
const ALLOCATION_POSSIBLE: u8 = 1;
const NO_FAT_CHAIN: u8 = 2;

/// An entry of any kind: where clusters may be named, all have them here. [exFAT 6.2, 6.3, 6.4]
#[derive(Clone, Copy, Debug, FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawEntry {
    /// 0: type.
    kind: u8,
    /// 1: of a primary, how many secondaries follow; of a secondary, flags; of a bitmap, which one.
    count_or_flags: u8,
    /// 2: of a primary, checksum of its set, without these two bytes.
    set_checksum: U16,
    /// 4: of a file, attributes; of another primary with secondaries, flags.
    attributes: U16,
    /// 6: times and more.
    other: [u8; 2],
    /// 8: of a stream, up to where it was written.
    valid_len: U64,
    /// 16: reserved.
    reserved: [u8; 4],
    /// 20: first cluster; 0 for none.
    first_cluster: U32,
    /// 24: bytes.
    len: U64,
}

const _: () = assert!(size_of::<RawEntry>() == ENTRY_LEN);

/// What owns clusters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stream {
    /// As the disk calls it; 0 for none.
    pub(super) first: u32,
    pub(super) len: u64,
    /// One cluster follows the other, and the table says nothing of them.
    pub(super) contiguous: bool,
}

/// What stands in a folder.
#[derive(Clone, Copy, Debug)]
pub(super) enum Found {
    /// A file, or what a vendor keeps beside one.
    Data(Stream),
    /// A folder.
    Folder(Stream),
    /// Of the root only: type, which one, and place of the bitmap, the up-case table, or the label.
    System(u8, u8, Stream),
}

/// Reads a folder, set by set.
pub(super) struct Folder<'v, 'd> {
    entries: Entries<'v, 'd>,
}

impl<'v, 'd> Folder<'v, 'd> {
    /// Of the one in `ranges`, bytes of the part.
    pub(super) fn new(view: &'v View<'d>, ranges: Vec<Range<u64>>) -> Self {
        Self {
            entries: Entries::new(view, ranges),
        }
    }

    /// What is next; nothing behind the last.
    ///
    /// # Errors
    /// [`Trouble::Skip`] for what cannot be understood; [`Trouble::Io`].
    pub(super) fn next(&mut self) -> Result<Option<Vec<Found>>, Trouble> {
        while let Some(bytes) = self.entries.next()? {
            let entry: RawEntry = zerocopy::transmute!(bytes);
            match entry.kind {
                NO_MORE => return Ok(None),
                kind if kind & IN_USE == 0 => {}
                kind @ (BITMAP | UP_CASE | LABEL) => {
                    let found = Found::System(kind, entry.count_or_flags, entry.chain());
                    return Ok(Some(vec![found]));
                }
                FILE => {
                    let set = self.rest_of_set(bytes, &entry)?;
                    return file(&entry, &set).map(Some);
                }
                kind if kind & (SECONDARY | BENIGN) == BENIGN => {
                    let set = self.rest_of_set(bytes, &entry)?;
                    let own = entry.benign_primary().into_iter().map(Ok);
                    let all = own.chain(set.iter().filter_map(beside));
                    return all.collect::<Result<_, _>>().map(Some);
                }
                kind => return Err(unknown(kind)),
            }
        }
        Ok(None)
    }

    /// The secondaries of a primary, whose checksum must be right.
    fn rest_of_set(
        &mut self,
        bytes: [u8; ENTRY_LEN],
        primary: &RawEntry,
    ) -> Result<Vec<RawEntry>, Trouble> {
        let mut sum = 0_u16;
        let mut add = |byte: u8| sum = sum.rotate_right(1).wrapping_add(u16::from(byte));
        let (start, rest) = (&bytes[..2], &bytes[4..]);
        start.iter().chain(rest).for_each(|byte| add(*byte));
        let mut set = Vec::new();
        for _ in 0..primary.count_or_flags {
            let next = self.entries.next()?;
            let Some(bytes) = next.filter(|bytes| bytes[0] & (IN_USE | SECONDARY) == 0xc0) else {
                return Err(Trouble::skip(format!(
                    "has an entry in a folder that is cut off: {CHECK_IT}"
                )));
            };
            bytes.iter().for_each(|byte| add(*byte));
            set.push(zerocopy::transmute!(bytes));
        }
        if sum != primary.set_checksum.get() {
            return Err(Trouble::skip(format!(
                "has an entry in a folder with a wrong checksum: {CHECK_IT}"
            )));
        }
        Ok(set)
    }
}

/// What a file's set says: its stream comes first, its names, then what vendors add.
fn file(entry: &RawEntry, set: &[RawEntry]) -> Result<Vec<Found>, Trouble> {
    let Some((stream, rest)) = set.split_first().filter(|(first, _)| first.kind == STREAM) else {
        return Err(Trouble::skip(format!(
            "has a file whose entry says not where it lies: {CHECK_IT}"
        )));
    };
    let found = stream.stream()?;
    let mut all = vec![match entry.attributes.get() & FOLDER {
        0 => Found::Data(found),
        _ => Found::Folder(found),
    }];
    for more in rest.iter().filter_map(beside) {
        all.push(more?);
    }
    Ok(all)
}

/// What a secondary behind the stream owns.
fn beside(entry: &RawEntry) -> Option<Result<Found, Trouble>> {
    match entry.kind {
        FILE_NAME => None,
        kind if kind & BENIGN == 0 => Some(Err(unknown(kind))),
        _ if entry.count_or_flags & ALLOCATION_POSSIBLE == 0 => None,
        _ => Some(Ok(Found::Data(entry.owned(entry.count_or_flags)))),
    }
}

fn unknown(kind: u8) -> Trouble {
    Trouble::skip(format!(
        "has an unknown kind of entry in a folder, {kind:#x}"
    ))
}

impl RawEntry {
    /// What the bitmap and the up-case table own: always a chain.
    fn chain(&self) -> Stream {
        self.owned(0)
    }

    fn owned(&self, flags: u8) -> Stream {
        Stream {
            first: self.first_cluster.get(),
            len: self.len.get(),
            contiguous: flags & NO_FAT_CHAIN != 0,
        }
    }

    /// What a benign primary, whose flags have 16 bits, owns.
    fn benign_primary(&self) -> Option<Found> {
        let [flags, _] = self.attributes.get().to_le_bytes();
        (flags & ALLOCATION_POSSIBLE != 0).then(|| Found::Data(self.owned(flags)))
    }

    /// What a file or folder owns.
    fn stream(&self) -> Result<Stream, Trouble> {
        let flags = self.count_or_flags;
        let stream = self.owned(flags);
        let is_none = stream.first == 0 && stream.len == 0;
        let possible = flags & ALLOCATION_POSSIBLE != 0 || is_none;
        if possible && self.valid_len.get() <= stream.len {
            return Ok(stream);
        }
        Err(Trouble::skip(format!(
            "has a file whose entry contradicts itself: {CHECK_IT}"
        )))
    }
}
