//! What must hold in a VHDX, whoever wrote it.

use super::bytes::{guid_text, is_zero, require};
use super::vhdx::{BAT_REGION, Header, Image, METADATA_REGION, MIB, Region, decode};
use super::view::{Thing, What, check_places, holes};
use super::{Block, State};

/// Bytes of a sector bitmap block.
const BITMAP_LEN: u64 = MIB;

impl Image {
    /// Checks all that must hold at any moment, a crash included: read through the log.
    ///
    /// # Errors
    /// What does not.
    pub(crate) fn check(&self) -> Result<(), String> {
        require!(
            is_zero(&self.header().bytes[80..]),
            "the header's reserved bytes are not zero"
        );
        match &self.tables {
            [Ok(first), Ok(second)] => require!(first == second, "the region tables differ"),
            [Err(error), _] | [_, Err(error)] => return Err(format!("a region table: {error}")),
        }
        self.metadata.check()?;
        self.log.check()?;
        for (block, entry) in self.block_entries() {
            self.check_block(block, entry)?;
        }
        for (chunk, entry) in self.bitmap_entries() {
            let allowed = self.metadata.has_parent && entry & 0xf_ffff == 6;
            require!(
                entry == 0 || allowed,
                "the bitmap of chunk {chunk} has the entry {entry:#x}"
            );
        }
        for thing in self.things().iter().skip(1) {
            let (what, place) = (thing.what, &thing.place);
            require!(
                place.start >= MIB && (place.start | place.end).is_multiple_of(MIB),
                "{what} at {place:#x?} is not on whole MiB behind the first"
            );
        }
        check_places(&mut self.things(), self.grown_len())
    }

    /// Checks what must hold in a file that was closed, besides.
    ///
    /// # Errors
    /// What does not.
    pub(crate) fn check_closed(&self) -> Result<(), String> {
        self.check()?;
        let [Some(first), Some(second)] = &self.headers else {
            return Err("a header is not valid".into());
        };
        require!(!self.log.is_live(), "the log is in use");
        // From the DataWriteGuid on: before it are their numbers, and what tells writers apart.
        let rest = |header: &Header| header.bytes[32..].to_vec();
        require!(rest(first) == rest(second), "the headers differ");
        Ok(())
    }

    /// Checks that a compaction could not make the file shorter: it ends right behind the last thing
    /// in use, and no hole below would take that thing; no block keeps space that it does not need.
    ///
    /// # Errors
    /// What a compaction could do.
    pub(crate) fn check_compact(&self) -> Result<(), String> {
        let anchor = |(_, block): &(u64, Block)| !block.state.has_data() && block.at != 0;
        let mut blocks = self.blocks().into_iter();
        if let Some((block, _)) = blocks.find(anchor) {
            return Err(format!("block {block} keeps space for nothing"));
        }
        let ratio = self.metadata.chunk_ratio();
        let chunks: Vec<u64> = (self.blocks().into_iter())
            .filter(|(_, block)| block.state == State::Partial)
            .map(|(block, _)| block / ratio)
            .collect();
        if let Some(chunk) = self
            .bitmaps()
            .into_keys()
            .find(|chunk| !chunks.contains(chunk))
        {
            return Err(format!("chunk {chunk} keeps a bitmap that no block needs"));
        }
        let mut things = self.things();
        check_places(&mut things, self.grown_len())?;
        let last = things.last().expect("at least the first MiB");
        let end = last.place.end.next_multiple_of(MIB);
        require!(
            self.file_len <= end,
            "the last thing ends at {end:#x}, the file at {:#x}",
            self.file_len
        );
        let room = last.place.end - last.place.start;
        let movable = match last.what {
            What::Block(_) => !self.metadata.leave_blocks_allocated || self.metadata.has_parent,
            What::Bitmap(_) => true,
            What::Named(_) => false,
        };
        let hole = holes(&things, MIB)
            .into_iter()
            .find(|hole| hole.end - hole.start >= room);
        match hole.filter(|_| movable) {
            Some(hole) => Err(format!("{} would fit into {hole:#x?}", last.what)),
            None => Ok(()),
        }
    }

    /// All that lies in the file, the first MiB first; blocks that keep space for later too.
    pub(crate) fn things(&self) -> Vec<Thing> {
        let mut things = vec![
            Thing::new(What::Named("the first MiB"), 0, MIB),
            Thing::new(What::Named("the log"), self.log.at, self.log.len),
        ];
        let name = |region: &Region| match region.guid {
            BAT_REGION => "the block table",
            METADATA_REGION => "the metadata",
            _ => "an unknown region",
        };
        let named = |region| (What::Named(name(region)), region);
        let regions = self.regions().iter().map(named);
        things.extend(regions.map(|(what, region)| Thing::new(what, region.at, region.len)));
        for (block, Block { at, state }) in self.blocks() {
            if state.has_data() || at != 0 {
                let what = What::Block(block);
                things.push(Thing::new(what, at, self.metadata.block_size));
            }
        }
        for (chunk, at) in self.bitmaps() {
            things.push(Thing::new(What::Bitmap(chunk), at, BITMAP_LEN));
        }
        things
    }

    fn check_block(&self, block: u64, entry: u64) -> Result<(), String> {
        let wrong = || format!("block {block} has the entry {entry:#x}");
        let Block { state, at } = decode(entry);
        require!(
            entry & 0xf_fff8 == 0 && state != State::Reserved,
            "{}",
            wrong()
        );
        let placeless = matches!(state, State::NotPresent | State::Zero);
        require!(!placeless || at == 0, "{}: a place of nothing", wrong());
        if state == State::Partial {
            require!(self.metadata.has_parent, "{}, but no parent", wrong());
            let chunk = block / self.metadata.chunk_ratio();
            let bitmap = self.bitmap_entries().nth(super::size(chunk));
            require!(
                bitmap.is_some_and(|(_, entry)| entry & 7 == 6),
                "{}, but its chunk no bitmap",
                wrong()
            );
        }
        Ok(())
    }

    /// What a child must name as its parent, in the words of its `parent_linkage`.
    pub(crate) fn linkage(&self) -> String {
        guid_text(&self.header().data_write_guid)
    }
}
