//! What must hold in a VHD, whoever wrote it.

use vhdfs::storage::Storage;

use super::bytes::{be32, require};
use super::size;
use super::vhd::{DYNAMIC, FIXED, HEADER_LEN, Image, NOWHERE, SECTOR};
use super::view::{Thing, What, check_places, holes};

/// On what Windows and Xen put a block's data.
const ALIGNMENT: u64 = 4096;
/// Bytes before a bitmap that Xen's tapdisk may overwrite with zeros.
const XEN_GAP: u64 = 3584;

impl Image {
    /// Checks all that must hold at any moment, a crash included.
    ///
    /// # Errors
    /// What does not.
    pub(crate) fn check(&self) -> Result<(), String> {
        let features = be32(&self.footer.bytes, 8);
        require!(features & !1 == 2, "features {features:#x}");
        if self.footer.disk_type == FIXED {
            let at = self.footer.header_at;
            require!(at == NOWHERE, "a fixed disk with a header at {at:#x}");
            return Ok(());
        }
        // QEMU looks nowhere else.
        let leading = self.leading.as_ref().ok_or("no footer at the start")?;
        require!(
            self.trailing
                .as_ref()
                .is_none_or(|trailing| trailing == leading),
            "the two footers differ"
        );
        require!(
            self.table_at.is_multiple_of(SECTOR),
            "the block table lies at {:#x}",
            self.table_at
        );
        let needed = self.footer.disk_len.div_ceil(self.block_size);
        let beyond = self
            .blocks()
            .range(needed..)
            .next()
            .map(|(&block, _)| block);
        if let Some(block) = beyond {
            return Err(format!("block {block} lies beyond the disk's end"));
        }
        self.check_batmap()?;
        check_places(&mut self.things(), self.data_end())
    }

    /// Checks what must hold in a file that was closed, besides.
    ///
    /// # Errors
    /// What does not.
    pub(crate) fn check_closed(&self) -> Result<(), String> {
        self.check()?;
        require!(self.trailing.is_some(), "no footer at the end");
        Ok(())
    }

    /// Checks that a compaction could not make the file shorter: no hole above the first block would
    /// take the last one, its data on 4 KiB, and the footer is within 4 KiB of the last block's end.
    /// What lies below the first block may belong to somebody, so nothing is asked there.
    ///
    /// # Errors
    /// What a compaction could do.
    pub(crate) fn check_compact(&self) -> Result<(), String> {
        self.check_closed()?;
        if self.footer.disk_type == FIXED {
            return Ok(());
        }
        let mut things = self.things();
        check_places(&mut things, self.data_end())?;
        let is_block = |thing: &Thing| matches!(thing.what, What::Block(_));
        let Some(first) = things.iter().find(|thing| is_block(thing)) else {
            return Ok(());
        };
        let gap = if self.batmap.is_some() { XEN_GAP } else { 0 };
        let fits = |hole: &std::ops::Range<u64>| {
            let bitmap_end = (hole.start + gap + self.bitmap_len()).next_multiple_of(ALIGNMENT);
            bitmap_end + self.block_size <= hole.end
        };
        let floor = first.place.start;
        let last = things.last().expect("there is a block");
        let above = things.iter().filter(|thing| thing.place.start >= floor);
        let above: Vec<Thing> = above.cloned().collect();
        let hole = holes(&above, floor).into_iter().find(fits);
        if let Some(hole) = hole.filter(|_| is_block(last)) {
            return Err(format!("{} would fit into {hole:#x?}", last.what));
        }
        let shortest = (last.place.end + SECTOR).next_multiple_of(ALIGNMENT);
        require!(
            self.file_len <= shortest,
            "the last thing ends at {:#x}, the file at {:#x}",
            last.place.end,
            self.file_len
        );
        Ok(())
    }

    /// Checks that sectors of a dynamic disk that no bitmap names are zeros in the file too: QEMU does
    /// not look at bitmaps.
    ///
    /// # Errors
    /// A sector that is not.
    pub(crate) fn check_unnamed_sectors(&self, file: &dyn Storage) -> Result<(), String> {
        if self.footer.disk_type != DYNAMIC {
            return Ok(());
        }
        let view = super::view::View::bare(file, self.file_len);
        for (block, place) in self.blocks() {
            let data = view.bytes(place.at + self.bitmap_len(), self.block_size)?;
            let named = self.sectors_of(file, block);
            let mut sectors = data.chunks(size(SECTOR)).zip(named);
            let bad = sectors.position(|(sector, named)| !named && !super::bytes::is_zero(sector));
            if let Some(sector) = bad {
                return Err(format!(
                    "block {block}: nobody named sector {sector}, which holds something"
                ));
            }
        }
        Ok(())
    }

    /// All that lies in the file but the trailing footer.
    pub(crate) fn things(&self) -> Vec<Thing> {
        if self.footer.disk_type == FIXED {
            return vec![Thing::new(What::Named("the disk"), 0, self.footer.disk_len)];
        }
        let named = |name, at, len| Thing::new(What::Named(name), at, len);
        let table_len = self.table_end() - self.table_at;
        let mut things = vec![
            named("the footer's copy", 0, SECTOR),
            named("the header", self.footer.header_at, HEADER_LEN),
            named("the block table", self.table_at, table_len),
        ];
        let locators = self.locators.iter();
        things.extend(locators.map(|locator| named("a parent locator", locator.at, locator.space)));
        if let Some(batmap) = &self.batmap {
            things.push(named("the batmap's header", batmap.header_at, SECTOR));
            things.push(named("the batmap", batmap.at, super::len(&batmap.map)));
        }
        let blocks = self.blocks().into_iter();
        let slot = |n, at| Thing::new(What::Block(n), at, self.slot_len());
        things.extend(blocks.map(|(n, block)| slot(n, block.at)));
        things
    }

    /// Tapdisk does not open a file for writing whose batmap is wrong.
    fn check_batmap(&self) -> Result<(), String> {
        let Some(batmap) = &self.batmap else {
            return Ok(());
        };
        let summed = batmap.map.get(..size(batmap.summed));
        let summed = summed.ok_or("the batmap is too short")?;
        let sum = !summed.iter().map(|&byte| u32::from(byte)).sum::<u32>();
        require!(
            sum == batmap.checksum,
            "the batmap's checksum {:#x} is {sum:#x}",
            batmap.checksum
        );
        let blocks = self.blocks();
        for block in 0..super::len(&batmap.map) * 8 {
            require!(
                !batmap.has(block) || blocks.contains_key(&block),
                "the batmap says that block {block} is whole, which is not there"
            );
        }
        Ok(())
    }
}
