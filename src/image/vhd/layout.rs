//! Reads and verifies all metadata of a VHD, changing nothing.
//!
//! Bounds: memory is proportional to the blocks the disk's size needs, at most
//! [`vhd::MAX_BLOCKS`]; spare table entries are read in pieces and only those in use are kept.

use std::io;

use super::parent::read_parent_link;
use super::unflushed;
use crate::error::FormatError;
use crate::format::parent::ParentLink;
use crate::format::vhd::{
    self, BAT_ENTRY_LEN, DynamicHeader, FOOTER_LEN, Footer, FooterFault, HEADER_LEN,
};
use crate::format::xen::BatmapHeader;
use crate::format::{DiskType, Format};
use crate::image::{LayoutError, foreign, read_array};
use crate::map::{BlockMap, BlockState, Charge, SlotShape};
use crate::storage::Storage;
use crate::units::{
    BlockIndex, FileOffset, FileRange, SECTOR_SIZE, round_up, u64_from_u32, usize_from,
};

/// Creators whose files hold nothing between the metadata that the headers name and the first
/// block but alignment, so that a gap that a slot fits in is one that a block once had.
const KNOWN_CREATORS: [&[u8; 4]; 8] = [
    b"vhfs", b"qemu", b"qem2", b"win ", b"vpc ", b"d2v\0", b"tap\0", b"vbox",
];

/// Bytes at the end of a file without a footer that are looked at for data.
pub(super) const END_LOOK: u64 = 64 << 10;

/// The footer at the end of the file.
#[derive(Debug)]
pub(crate) struct Tail {
    /// Where it starts, or would.
    pub(crate) at: FileOffset,
    /// Whether its last byte is missing, as Virtual PC before 2004 wrote it.
    pub(crate) short: bool,
    /// What is there.
    pub(crate) footer: Result<Footer, FooterFault>,
    /// Whether what is there, good or bad, looks like the footer of a fixed disk.
    says_fixed: bool,
}

/// A VHD's metadata.
#[derive(Debug)]
pub(crate) struct Layout {
    /// The file's length.
    pub(crate) file_len: u64,
    /// The footer to go by.
    pub(crate) footer: Footer,
    /// The one at the end.
    pub(crate) tail: Tail,
    /// The blocks of a dynamic disk.
    pub(crate) dynamic: Option<DynamicLayout>,
    /// Blocks behind the end of the file that were never flushed, by their places.
    pub(super) unflushed: Vec<BlockIndex>,
    /// Why the disk may be read but not written.
    pub(crate) not_writable: Option<FormatError>,
    /// Whether the file may well be something else: it is not to be repaired either.
    pub(crate) is_doubtful: bool,
}

/// The parts that a dynamic disk has beside its footer.
#[derive(Debug)]
pub(crate) struct DynamicLayout {
    /// The copy of the footer at offset 0.
    pub(crate) copy: Result<Footer, FooterFault>,
    /// The dynamic header.
    pub(crate) header: DynamicHeader,
    /// What a differencing disk says of its parent.
    pub(crate) parent: Option<ParentLink>,
    /// Where the blocks lie.
    pub(crate) map: BlockMap,
    /// The form of a slot.
    pub(crate) slot: SlotShape,
    /// Xen's batmap, with whether its checksum fits.
    pub(crate) batmap: Option<(BatmapHeader, bool)>,
    /// The ranges that headers, tables and entries beyond the disk's size claim, with their names;
    /// sorted.
    pub(crate) metadata: Vec<(FileRange, String)>,
    /// Where the first slot may start.
    pub(crate) start: FileOffset,
    /// The end of the last thing in use, the footer excepted.
    pub(crate) end: FileOffset,
    /// The memory for all this.
    pub(crate) memory: Charge,
}

/// Bytes of memory for each block of an open disk: a word here, a byte of what is known of it.
pub(super) const BYTES_PER_BLOCK: u64 = 9;

/// The same while it is opened: a list of all in order.
const BYTES_TO_READ: u64 = BYTES_PER_BLOCK + 16;

impl Layout {
    /// Reads the metadata of the file in `storage`.
    ///
    /// # Errors
    /// What makes the file unusable even for reading. What forbids only writing is kept in
    /// [`Self::not_writable`].
    pub(crate) fn read(storage: &dyn Storage) -> Result<Self, LayoutError> {
        let file_len = storage.len()?;
        if file_len < FOOTER_LEN - 1 {
            return Err(foreign::none(storage, Format::Vhd).into());
        }
        let tail = read_tail(storage, file_len)?;
        let copy = if file_len < FOOTER_LEN {
            Err(FooterFault::NoFooter)
        } else {
            Footer::parse(&read_array(storage, FileOffset::new(0))?)
        };
        let footer = choose_footer(&tail, &copy).map_err(|error| named(storage, error))?;
        let mut layout = Self {
            file_len,
            footer,
            tail,
            dynamic: None,
            unflushed: Vec::new(),
            not_writable: None,
            is_doubtful: false,
        };
        layout.not_writable = saved_state(&footer);
        if matches!(layout.tail.footer, Err(FooterFault::InUseByTapdisk)) {
            layout.not_writable = Some(FooterFault::InUseByTapdisk.into_error("at the end"));
        }
        let disk_len = footer.disk_len();
        if disk_len == 0 || !disk_len.is_multiple_of(SECTOR_SIZE) {
            return Err(FormatError::corrupt(
                "footer",
                format!("a disk size of {disk_len} bytes"),
                "a multiple of 512 above 0",
            )
            .into());
        }
        match footer.disk_type() {
            DiskType::Fixed => {
                let end = layout.tail.at.get();
                if disk_len > end {
                    return Err(FormatError::corrupt(
                        "fixed disk",
                        format!("{end} bytes of data in the file"),
                        format!("{disk_len}, the size in its footer: the file was cut"),
                    )
                    .into());
                }
            }
            DiskType::Dynamic | DiskType::Differencing => {
                let dynamic = read_dynamic(storage, &layout, copy)?;
                layout.unflushed = unflushed::unflushed(&layout.tail, &dynamic.0);
                let unflushed = (layout.unflushed.first())
                    .map(|block| unflushed::problem(&dynamic.0, *block, layout.tail.at));
                if let Some(error) = dynamic.1 {
                    let error = match error {
                        FormatError::BeyondEnd { .. } => unflushed.unwrap_or(error),
                        other => other,
                    };
                    layout.not_writable.get_or_insert(error);
                }
                if let Some(error) =
                    stranger_behind(storage, &layout, dynamic.0.end, dynamic.0.slot)?
                {
                    layout.is_doubtful = true;
                    layout.not_writable.get_or_insert(error);
                }
                layout.dynamic = Some(dynamic.0);
            }
        }
        Ok(layout)
    }

    /// What a differencing disk says of its parent.
    pub(super) fn parent(&self) -> Option<&ParentLink> {
        self.dynamic.as_ref()?.parent.as_ref()
    }
}

/// Without a footer at the end, the copy at offset 0 may be what the guest of a fixed disk wrote there.
/// A file that was growing when it was cut off ends in zeros; one that ends in data is not touched, for
/// all behind the last block that the copy leads to would be lost.
fn stranger_behind(
    storage: &dyn Storage,
    layout: &Layout,
    end: FileOffset,
    slot: SlotShape,
) -> io::Result<Option<FormatError>> {
    let file_end = FileOffset::new(layout.file_len);
    if layout.tail.footer.is_ok() || file_end.since(end) < slot.len {
        return Ok(None);
    }
    // What was a footer may be part of it.
    let mut last = vec![0; usize_from(END_LOOK.min(file_end.since(end)))];
    let at = FileOffset::new(layout.file_len.saturating_sub(END_LOOK).max(end.get()));
    storage.read_exact_at(&mut last, at)?;
    let has_data = last.iter().any(|byte| *byte != 0);
    Ok(has_data.then(|| {
        FormatError::corrupt(
            "VHD",
            format!(
                "no valid footer at its end, and data there, {} bytes behind the last block",
                file_end.since(end)
            ),
            "a footer; if it was a fixed disk, its footer has to be restored first",
        )
    }))
}

/// `error`, with what the file is instead of a VHD.
pub(super) fn named(storage: &dyn Storage, error: FormatError) -> FormatError {
    match error {
        FormatError::NotVhd => foreign::none(storage, Format::Vhd),
        other => other,
    }
}

/// Why the disk of a machine that was saved is not to be written.
pub(super) fn saved_state(footer: &Footer) -> Option<FormatError> {
    footer.has_saved_state().then(|| {
        FormatError::incompatible(
            "a saved machine state that belongs to this disk",
            "resume or discard the saved state first",
        )
    })
}

/// Whether the file ends with a footer that is valid.
pub(crate) fn ends_with_footer(storage: &dyn Storage) -> io::Result<bool> {
    let file_len = storage.len()?;
    Ok(file_len >= FOOTER_LEN && read_tail(storage, file_len)?.footer.is_ok())
}

pub(super) fn read_tail(storage: &dyn Storage, file_len: u64) -> io::Result<Tail> {
    let short = file_len % SECTOR_SIZE == SECTOR_SIZE - 1;
    let at =
        FileOffset::new(file_len.saturating_sub(if short { FOOTER_LEN - 1 } else { FOOTER_LEN }));
    let mut bytes = [0_u8; 512];
    let stored = if short { 511 } else { 512 };
    storage.read_exact_at(&mut bytes[..stored], at)?;
    Ok(Tail {
        at,
        short,
        footer: Footer::parse(&bytes),
        says_fixed: bytes.starts_with(b"conectix") && bytes[60..64] == 2_u32.to_be_bytes(),
    })
}

/// The trailing footer decides. Only where it is gone may the copy at offset 0, which a fixed disk
/// does not have (there its guest's first sector lies), stand in for it.
pub(super) fn choose_footer(
    tail: &Tail,
    copy: &Result<Footer, FooterFault>,
) -> Result<Footer, FormatError> {
    match (&tail.footer, copy) {
        (Ok(footer), _) => Ok(*footer),
        (Err(FooterFault::Poisoned), _) => Err(FooterFault::Poisoned.into_error("at the end")),
        // A damaged footer of a fixed disk: what lies at offset 0 is its guest's.
        (Err(fault), Ok(_)) if tail.says_fixed => Err(fault
            .clone()
            .into_error(&format!("at file offset {}", tail.at))),
        (Err(_), Ok(copy)) if copy.disk_type() != DiskType::Fixed => Ok(*copy),
        (Err(FooterFault::NoFooter), Err(FooterFault::NoFooter) | Ok(_)) => {
            Err(FormatError::NotVhd)
        }
        (Err(FooterFault::NoFooter), Err(fault)) => {
            Err(fault.clone().into_error("copy at file offset 0x0"))
        }
        (Err(fault), _) => Err(fault
            .clone()
            .into_error(&format!("at file offset {}", tail.at))),
    }
}

fn read_dynamic(
    storage: &dyn Storage,
    layout: &Layout,
    copy: Result<Footer, FooterFault>,
) -> Result<(DynamicLayout, Option<FormatError>), LayoutError> {
    let header_at = FileOffset::new(layout.footer.data_offset());
    let in_file =
        header_at.get() >= FOOTER_LEN && header_at.plus(HEADER_LEN).get() <= layout.file_len;
    if !in_file {
        return Err(FormatError::corrupt(
            "footer",
            format!("a dynamic header at file offset {header_at}"),
            format!("one inside the file of {} bytes", layout.file_len),
        )
        .into());
    }
    let header = DynamicHeader::parse(&read_array(storage, header_at)?, header_at)?;
    let parent = match layout.footer.disk_type() {
        DiskType::Differencing => Some(read_parent_link(storage, &header, layout.file_len)?),
        _ => None,
    };
    let blocks = blocks_needed(layout, &header)?;
    let memory = Charge::take(u64_from_u32(blocks).saturating_mul(BYTES_TO_READ))?;
    let limit = match layout.tail.footer {
        Ok(_) => layout.tail.at,
        Err(_) => FileOffset::new(layout.file_len),
    };

    let mut metadata = vec![
        (
            FileRange::new(FileOffset::new(0), FOOTER_LEN),
            "the footer's copy".to_owned(),
        ),
        (
            FileRange::new(header_at, HEADER_LEN),
            "the dynamic header".to_owned(),
        ),
        (header.table_range(), "the block table".to_owned()),
    ];
    metadata.extend(
        header
            .locator_ranges()
            .map(|range| (range, "a parent locator".to_owned())),
    );
    let batmap = read_batmap(storage, layout, &header)?;
    if let Some((batmap, _)) = &batmap {
        metadata.push((batmap.range(), "the batmap's header".to_owned()));
        metadata.push((batmap.map_range(), "the batmap".to_owned()));
    }
    metadata.sort();
    for pair in metadata.windows(2) {
        if pair[0].0.overlaps(pair[1].0) {
            return Err(overlap(&pair[0], &pair[1]).into());
        }
    }
    let mut named_end = metadata
        .iter()
        .map(|(range, _)| range.end())
        .max()
        .unwrap_or_default();
    if layout.footer.creator().starts_with(b"tap") {
        // A tapdisk that updates a full block's bitmap writes all of its 4 KiB page, so that the
        // first slot must not share one with the metadata either.
        named_end = FileOffset::new(round_up(named_end.get(), 4096));
    }

    let slot = SlotShape {
        len: vhd::bitmap_len(header.block_size()).saturating_add(u64_from_u32(header.block_size())),
        header_len: vhd::bitmap_len(header.block_size()),
        align: 4096,
        strict: layout.footer.creator().starts_with(b"tap"),
    };
    let map = BlockMap::new(blocks, SECTOR_SIZE);
    read_table(storage, &header, &map, slot, &mut metadata)?;
    metadata.sort();

    let slots = sorted_slots(&map);
    let problem = first_problem(&slots, &metadata, slot, limit);
    let lowest = slots.first().map_or(limit, |(start, _)| *start);
    let known = KNOWN_CREATORS.contains(&&layout.footer.creator());
    let start = if known && lowest.since(named_end) >= slot.len {
        named_end
    } else {
        lowest
    };
    let end = (slots
        .last()
        .map(|(start, _)| start.plus(slot.len))
        .into_iter())
    .chain(metadata.iter().map(|(range, _)| range.end()))
    .fold(start, FileOffset::max);
    Ok((
        DynamicLayout {
            copy,
            parent,
            header,
            map,
            slot,
            batmap,
            metadata,
            start,
            end,
            memory,
        },
        problem,
    ))
}

/// The blocks that the disk's size needs, checked against the table and the file.
fn blocks_needed(layout: &Layout, header: &DynamicHeader) -> Result<u32, FormatError> {
    let disk_len = layout.footer.disk_len();
    let blocks = disk_len.div_ceil(u64_from_u32(header.block_size()));
    let table = header.table_range();
    if table.start.get() < FOOTER_LEN || table.end().get() > layout.file_len {
        return Err(FormatError::corrupt(
            "dynamic header",
            format!("a block table at {table}"),
            format!("one inside the file of {} bytes", layout.file_len),
        ));
    }
    if blocks > u64_from_u32(header.max_table_entries()) {
        return Err(FormatError::corrupt(
            "dynamic header",
            format!("{} block table entries", header.max_table_entries()),
            format!(
                "at least {blocks}, for {disk_len} bytes in blocks of {}",
                header.block_size()
            ),
        ));
    }
    match u32::try_from(blocks) {
        Ok(fits) if blocks <= vhd::MAX_BLOCKS => Ok(fits),
        _ => Err(FormatError::incompatible(
            format!("a disk of {blocks} blocks"),
            format!("at most {} are supported", vhd::MAX_BLOCKS),
        )),
    }
}

/// Xen's batmap, where the creator is Xen's and the cookie is there.
fn read_batmap(
    storage: &dyn Storage,
    layout: &Layout,
    header: &DynamicHeader,
) -> Result<Option<(BatmapHeader, bool)>, LayoutError> {
    /// A map of more blocks than a disk can have is no map.
    const MAX_MAP_LEN: u64 = vhd::MAX_BLOCKS / 8;
    if !layout.footer.creator().starts_with(b"tap") {
        return Ok(None);
    }
    if layout.footer.creator_version() == 1 {
        return Err(FormatError::incompatible(
            "a disk of Xen's tapdisk 0.1, whose sector bitmaps have another bit order",
            "convert it with a tapdisk of its time",
        )
        .into());
    }
    let at = FileOffset::new(round_up(header.table_range().end().get(), SECTOR_SIZE));
    if at.plus(SECTOR_SIZE).get() > layout.file_len {
        return Ok(None);
    }
    let Some(batmap) = BatmapHeader::parse(&read_array(storage, at)?, at) else {
        return Ok(None);
    };
    let range = batmap.map_range();
    if range.len > MAX_MAP_LEN || range.end().get() > layout.file_len {
        return Err(FormatError::corrupt(
            format!("batmap header at file offset {at}"),
            format!("a map at {range}"),
            "one of at most 2 MiB inside the file",
        )
        .into());
    }
    let mut map = vec![0; usize_from(range.len)];
    storage.read_exact_at(&mut map, range.start)?;
    let fits = batmap.fits(&map);
    Ok(Some((batmap, fits)))
}

/// Reads the block table into `map`; slots of entries beyond the disk's blocks go to `metadata`.
fn read_table(
    storage: &dyn Storage,
    header: &DynamicHeader,
    map: &BlockMap,
    slot: SlotShape,
    metadata: &mut Vec<(FileRange, String)>,
) -> Result<(), LayoutError> {
    const PIECE: u32 = 64 << 10;
    /// Spare entries in use are a curiosity; a file full of them is an attack.
    const MAX_SPARE_SLOTS: usize = 1 << 16;
    let entries = header.max_table_entries();
    let mut buf = Vec::new();
    let mut first = 0_u32;
    let mut spare = 0_usize;
    while first < entries {
        let count = PIECE.min(entries.saturating_sub(first));
        buf.resize(
            usize_from(u64_from_u32(count).saturating_mul(BAT_ENTRY_LEN)),
            0,
        );
        let at = vhd::bat_entry_at(header.table_offset(), BlockIndex::new(first));
        storage.read_exact_at(&mut buf, at)?;
        let (chunks, _) = buf.as_chunks::<4>();
        for (number, entry) in (first..).zip(chunks) {
            let Some(start) = vhd::decode_bat_entry(*entry) else {
                continue;
            };
            if number < map.len() {
                map.set(
                    BlockIndex::new(number),
                    BlockState::Present {
                        slot: start,
                        whole: false,
                    },
                );
            } else if start.get() != 0 {
                spare = spare.saturating_add(1);
                if spare > MAX_SPARE_SLOTS {
                    return Err(FormatError::corrupt(
                        "block table",
                        format!("over {MAX_SPARE_SLOTS} entries in use beyond the disk's size"),
                        "none",
                    )
                    .into());
                }
                let name = format!("block {number}, which lies beyond the disk's size,");
                metadata.push((FileRange::new(start, slot.len), name));
            }
        }
        first = first.saturating_add(count);
    }
    Ok(())
}

/// The slots in use with their blocks, in order of their places.
pub(super) fn sorted_slots(map: &BlockMap) -> Vec<(FileOffset, BlockIndex)> {
    let mut slots: Vec<_> = map.present().map(|(block, slot)| (slot, block)).collect();
    slots.sort_unstable();
    slots
}

/// The first thing that makes the table unsafe to change: slots that overlap one another or
/// metadata, and either that reaches beyond `limit`. Both lists are sorted.
fn first_problem(
    slots: &[(FileOffset, BlockIndex)],
    metadata: &[(FileRange, String)],
    slot: SlotShape,
    limit: FileOffset,
) -> Option<FormatError> {
    problems(slots, metadata, slot, limit).next()
}

/// Every such thing, for a checker.
pub(super) fn problems<'a>(
    slots: &'a [(FileOffset, BlockIndex)],
    metadata: &'a [(FileRange, String)],
    slot: SlotShape,
    limit: FileOffset,
) -> impl Iterator<Item = FormatError> + 'a {
    let range = move |at: usize| FileRange::new(slots[at].0, slot.len);
    let name = move |at: usize| (range(at), format!("block {} at {}", slots[at].1, range(at)));
    let against_blocks = (1..slots.len())
        .filter(move |at| range(at.saturating_sub(1)).overlaps(range(*at)))
        .map(move |at| overlap(&name(at.saturating_sub(1)), &name(at)));
    let against_metadata = metadata.iter().flat_map(move |entry| {
        let after = slots.partition_point(|(start, _)| start.plus(slot.len) <= entry.0.start);
        (after..slots.len())
            .take_while(move |at| range(*at).start < entry.0.end())
            .filter(move |at| range(*at).overlaps(entry.0))
            .map(move |at| overlap(&name(at), entry))
    });
    let beyond = (slots.iter())
        .filter(move |(start, _)| start.plus(slot.len) > limit)
        .map(move |(start, block)| FormatError::BeyondEnd {
            block: *block,
            at: FileRange::new(*start, slot.len),
            end: limit.get(),
        });
    // Blocks would be put behind it, however far off that is.
    let metadata_beyond = (metadata.iter())
        .filter(move |(range, _)| range.end() > limit)
        .map(move |(range, name)| {
            let found = format!("{range}");
            FormatError::corrupt(name.clone(), found, format!("a place in front of {limit}"))
        });
    against_metadata
        .chain(against_blocks)
        .chain(beyond)
        .chain(metadata_beyond)
}

fn overlap(one: &(FileRange, String), other: &(FileRange, String)) -> FormatError {
    let start = one.0.start.max(other.0.start);
    let end = one.0.end().min(other.0.end());
    FormatError::Overlap {
        what: one.1.clone(),
        other: other.1.clone(),
        at: FileRange::between(start, end),
    }
}
