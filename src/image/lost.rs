//! Blocks of which a part was cut off with the end of the file.

use std::fmt::Write;
use std::ops::Range;

use crate::units::{BlockIndex, u64_from};

/// Runs of the disk that are listed; the rest is counted.
const LISTED: usize = 8;

/// What a disk lost when its file was cut. Reading it is an error, until somebody asks for zeros.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Lost {
    blocks: u64,
    /// Where the first of them lie on the disk: sorted, disjoint.
    runs: Vec<Range<u64>>,
    /// How many runs there are.
    count: u64,
    /// Where the last one ends.
    end: u64,
}

impl Lost {
    /// Of `blocks`, sorted, of `block_size` bytes of a disk of `disk_len`.
    pub(crate) fn new(
        blocks: impl Iterator<Item = BlockIndex>,
        block_size: u64,
        disk_len: u64,
    ) -> Self {
        let mut lost = Self::default();
        for block in blocks {
            let start = u64::from(block.get()).saturating_mul(block_size);
            let end = start.saturating_add(block_size).min(disk_len);
            lost.blocks = lost.blocks.saturating_add(1);
            let is_next = lost.count > 0 && lost.end == start;
            lost.count = lost.count.saturating_add(u64::from(!is_next));
            lost.end = end;
            let is_listed = lost.count <= u64_from(LISTED);
            match lost.runs.last_mut() {
                Some(last) if is_next && is_listed => last.end = end,
                _ if is_listed => lost.runs.push(start..end),
                _ => {}
            }
        }
        lost
    }

    /// What to say of it; `obstacle`: why it cannot be put right.
    pub(crate) fn problem(&self, obstacle: Option<&str>) -> String {
        let advice = match obstacle {
            None => {
                "`vhdfs check --repair --backup --zero-lost` makes the disk usable, with zeros in \
                     their place"
                    .to_owned()
            }
            Some(obstacle) => format!("nothing makes it writable again, for {obstacle}"),
        };
        format!(
            "the file was cut, and lost {}: opened read-only (`vhdfs mount \
             --read-only`) it gives what is there, and errors for the rest; {advice}",
            self.listed()
        )
    }

    /// What was done about it.
    pub(crate) fn repaired(&self) -> String {
        format!(
            "what was cut off reads as zeros, {}; children made of the disk before are not \
             accepted any more",
            self.listed()
        )
    }

    fn listed(&self) -> String {
        let mut text = match self.blocks {
            0 => return "nothing but unused space".to_owned(),
            1 => "all or part of 1 block, at disk offsets ".to_owned(),
            more => format!("all or part of {more} blocks, at disk offsets "),
        };
        for (at, run) in self.runs.iter().enumerate() {
            let comma = if at == 0 { "" } else { ", " };
            let _ = write!(text, "{comma}{:#x}..{:#x}", run.start, run.end);
        }
        let more = self.count.saturating_sub(u64_from(self.runs.len()));
        if more > 0 {
            let _ = write!(text, " and {more} more places");
        }
        text
    }
}
