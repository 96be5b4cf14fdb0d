//! What of the disk is stored, and what the file is used for.

use super::{Content, Disk};
use crate::map::BlockState;
use crate::units::{BlockIndex, DiskRange, FileOffset, FileRange, low_u32, u64_from, usize_from};

/// Whether an [`Extent`] can hold data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ExtentKind {
    /// Stored in the file.
    Data,
    /// Not stored: reads as zeros.
    Hole,
}

/// A run of the disk that is stored, or is not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Disk offset of the first byte.
    pub offset: u64,
    /// Length in bytes, above 0.
    pub len: u64,
    /// Whether it is stored.
    pub kind: ExtentKind,
}

/// What a part of the file is used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RegionKind {
    /// Headers, tables, footers, and what lies between them.
    Metadata,
    /// A block that holds data.
    Live,
    /// A block that is all zero.
    Dead,
    /// A block that nobody has looked at yet.
    Unknown,
    /// Used by nothing.
    Hole,
}

impl RegionKind {
    const ALL: [Self; 5] = [
        Self::Metadata,
        Self::Live,
        Self::Dead,
        Self::Unknown,
        Self::Hole,
    ];
    /// The bits of a code.
    const CODES: u64 = 7;

    fn code(self) -> u64 {
        let place = Self::ALL.iter().position(|kind| *kind == self);
        u64_from(place.unwrap_or_default())
    }

    fn from_code(code: u64) -> Self {
        let kind = Self::ALL.get(usize_from(code)).copied();
        kind.unwrap_or(Self::Metadata)
    }
}

/// Both of two sorted sequences in one, sorted.
fn merged(
    one: impl Iterator<Item = Region>,
    other: impl Iterator<Item = Region>,
) -> impl Iterator<Item = Region> {
    let (mut one, mut other) = (one.peekable(), other.peekable());
    std::iter::from_fn(move || match (one.peek(), other.peek()) {
        (Some(first), Some(second)) if second.range < first.range => other.next(),
        (Some(_), _) => one.next(),
        (None, _) => other.next(),
    })
}

/// A run of the file with one use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// The bytes.
    pub range: FileRange,
    /// Their use.
    pub kind: RegionKind,
}

/// What of the disk has its place beyond the end of the file, which was cut.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BeyondEnd {
    /// Blocks that lie there, wholly or in part; none of a disk without blocks.
    pub blocks: u64,
    /// Bytes of the disk that do: they cannot be read.
    pub bytes: u64,
}

impl Disk {
    /// The extents from disk offset `offset` to the end of the disk, in order, as the block table
    /// has them. A snapshot piece by piece: concurrent changes show or do not.
    pub fn extents(&self, offset: u64) -> impl Iterator<Item = Extent> + '_ {
        let mut at = offset;
        std::iter::from_fn(move || {
            let extent = self.extent_at(at, self.len())?;
            at = extent.offset + extent.len;
            Some(extent)
        })
    }

    /// The extent at `offset`, cut to `limit`, which is not beyond the disk's end.
    fn extent_at(&self, offset: u64, limit: u64) -> Option<Extent> {
        if offset >= limit {
            return None;
        }
        let first = self.part_at(offset, limit);
        let mut end = offset + first.len;
        while end < limit {
            let next = self.part_at(end, limit);
            if next.kind != first.kind {
                break;
            }
            end += next.len;
        }
        Some(Extent {
            offset,
            len: end - offset,
            kind: first.kind,
        })
    }

    /// The extent at `offset`, as far as one block or one table entry of a parent tells.
    fn part_at(&self, offset: u64, limit: u64) -> Extent {
        let geometry = self.geometry();
        if geometry.is_flat {
            return self.host_extent_at(offset, limit);
        }
        let block = offset / geometry.block_size;
        let end = ((block + 1) * geometry.block_size).min(limit);
        let part = |kind, end| Extent {
            offset,
            len: end - offset,
            kind,
        };
        match (
            self.image.map().get(BlockIndex::new(low_u32(block))),
            self.parent(),
        ) {
            (BlockState::Present { .. }, _) => part(ExtentKind::Data, end),
            (BlockState::NotPresent, Some(parent)) if offset < parent.len() => {
                parent.part_at(offset, end.min(parent.len()))
            }
            (BlockState::NotPresent | BlockState::Zero, _) => part(ExtentKind::Hole, end),
        }
    }

    /// Whether all of `range` is known to read as zeros without a look at data.
    pub(super) fn is_hole(&self, range: DiskRange) -> bool {
        let end = range.end().get().min(self.len());
        let mut at = range.start.get();
        while at < end {
            let part = self.part_at(at, end);
            if part.kind == ExtentKind::Data {
                return false;
            }
            at += part.len;
        }
        true
    }

    /// A fixed VHD has no table; the host file's holes are its extents.
    fn host_extent_at(&self, offset: u64, limit: u64) -> Extent {
        let (at, end) = (FileOffset::new(offset), FileOffset::new(limit));
        let all = Extent {
            offset,
            len: end.since(at),
            kind: ExtentKind::Data,
        };
        match self.image.storage().next_data(at, end) {
            Ok(Some(data)) if data.start > at => Extent {
                offset,
                len: data.start.since(at),
                kind: ExtentKind::Hole,
            },
            Ok(Some(data)) => Extent {
                offset,
                len: data.len,
                kind: ExtentKind::Data,
            },
            Ok(None) => Extent {
                kind: ExtentKind::Hole,
                ..all
            },
            // A host that cannot tell: all of it may be data.
            Err(_) => all,
        }
    }

    /// What lies beyond the end of the file, which [`Self::regions`] cannot show. Of the last block, only what
    /// the disk has of it counts: some programs cut the file there.
    pub fn beyond_end(&self) -> BeyondEnd {
        let geometry = self.geometry();
        let end = FileOffset::new(self.image.file_len());
        if geometry.is_flat {
            return BeyondEnd {
                blocks: 0,
                bytes: geometry.disk_len.saturating_sub(end.get()),
            };
        }
        let lost = self.image.map().present().filter_map(|(block, slot)| {
            let of_disk =
                (geometry.disk_len.saturating_sub(self.offset_of(block))).min(geometry.block_size);
            let data = FileRange::new(geometry.data_range(slot).start, of_disk);
            let lost = FileRange::between(data.start.max(end), data.end());
            (!lost.is_empty()).then_some(lost.len)
        });
        lost.fold(BeyondEnd::default(), |sum, bytes| BeyondEnd {
            blocks: sum.blocks + 1,
            bytes: sum.bytes + bytes,
        })
    }

    fn kind_of(&self, block: BlockIndex) -> RegionKind {
        match self.tracker.content(block) {
            Content::Dead => RegionKind::Dead,
            Content::Unknown => RegionKind::Unknown,
            Content::Data | Content::Mixed => RegionKind::Live,
        }
    }

    /// What each part of the file is used for: sorted, without gaps, from 0 to the file's length.
    pub fn regions(&self) -> Vec<Region> {
        let geometry = self.geometry();
        let end = FileOffset::new(self.image.file_len());
        let whole = FileRange::between(FileOffset::new(0), end);
        if geometry.is_flat {
            let data = FileRange::between(whole.start, end.min(FileOffset::new(geometry.disk_len)));
            let rest = FileRange::between(data.end(), end);
            return vec![
                Region {
                    range: data,
                    kind: RegionKind::Live,
                },
                Region {
                    range: rest,
                    kind: RegionKind::Metadata,
                },
            ];
        }
        // Slots start at multiples of a sector: the kind fits in beside. Entries of a damaged table may lie
        // behind the end: those take nothing of the file.
        let mut slots: Vec<u64> = (self.image.map().present())
            .filter(|(_, slot)| *slot < end)
            .map(|(block, slot)| slot.get() | self.kind_of(block).code())
            .collect();
        slots.sort_unstable();
        let slots = slots.into_iter().map(|code| Region {
            range: geometry.slot_range(FileOffset::new(code & !RegionKind::CODES)),
            kind: RegionKind::from_code(code & RegionKind::CODES),
        });
        let kept = self.image.kept_for().into_iter();
        let mut others: Vec<Region> = kept
            .map(|(slot, _)| Region {
                range: geometry.slot_range(slot),
                kind: RegionKind::Dead,
            })
            .collect();
        let holes = self.image.free_runs();
        others.extend(holes.into_iter().map(|range| Region {
            range,
            kind: RegionKind::Hole,
        }));
        others.retain(|region| region.range.start < end);
        others.sort_unstable_by_key(|region| region.range);
        let used = merged(slots, others.into_iter()).map(|region| Region {
            range: FileRange::between(region.range.start, region.range.end().min(end)),
            ..region
        });
        let mut regions: Vec<Region> = Vec::new();
        let mut push = |region: Region| match regions.last_mut() {
            _ if region.range.is_empty() => {}
            Some(last) if last.kind == region.kind && last.range.end() == region.range.start => {
                last.range = FileRange::between(last.range.start, region.range.end());
            }
            _ => regions.push(region),
        };
        let mut at = whole.start;
        for region in used {
            // What no block and no hole covers is metadata.
            push(Region {
                range: FileRange::between(at, region.range.start),
                kind: RegionKind::Metadata,
            });
            let from = region.range.start.max(at);
            push(Region {
                range: FileRange::between(from, region.range.end()),
                ..region
            });
            at = at.max(region.range.end());
        }
        push(Region {
            range: FileRange::between(at, end),
            kind: RegionKind::Metadata,
        });
        regions
    }
}
