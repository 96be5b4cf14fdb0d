//! Random sequences of everything a guest and compaction can do, against a vector of bytes.

#![allow(clippy::unwrap_used, reason = "a failure is what a test is for")]

mod support;

use std::sync::Arc;

use proptest::prelude::*;
use support::guest::{check_closed, check_file, compact, open_over};
use support::image::{Image, Style, pattern};
use support::matrix::kinds;
use support::{env_number, size};
use vhdfs::compact::{CompactError, IdlePolicy, IdleWork, Next};
use vhdfs::disk::{Disk, ExtentKind};
use vhdfs::storage::sim::SimStorage;

/// What happens to the disk. Places are fractions of it, in units of 1/65536.
#[derive(Clone, Debug)]
enum Step {
    Write(Span, u64),
    WriteZeroBytes(Span),
    WriteZeroes(Span),
    Discard(Span),
    Read(Span),
    Flush,
    Compact,
    Idle(u32),
    Reopen,
}

/// Where: `start` of 65536, `len` bytes, and whether both are rounded to 512, to 4096, or to blocks.
#[derive(Clone, Copy, Debug)]
struct Span {
    start: u16,
    len: u64,
    round: Round,
}

#[derive(Clone, Copy, Debug)]
enum Round {
    Bytes,
    Sectors,
    Pages,
    Blocks,
}

impl Span {
    /// Bytes of the disk: start and length.
    fn on(self, disk_len: u64, block_size: u64) -> (u64, u64) {
        let unit = match self.round {
            Round::Bytes => 1,
            Round::Sectors => 512,
            Round::Pages => 4096,
            Round::Blocks => block_size,
        };
        let start = disk_len * u64::from(self.start) / 65536 / unit * unit;
        let len = self.len.next_multiple_of(unit);
        (start, len.min(disk_len - start))
    }
}

fn span() -> impl Strategy<Value = Span> {
    let round = prop_oneof![
        Just(Round::Bytes),
        Just(Round::Sectors),
        Just(Round::Pages),
        Just(Round::Blocks)
    ];
    let len = prop_oneof![1..2000u64, 1..200_000u64, 1..6_000_000u64];
    (any::<u16>(), len, round).prop_map(|(start, len, round)| Span { start, len, round })
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => (span(), any::<u64>()).prop_map(|(span, tag)| Step::Write(span, tag)),
        2 => span().prop_map(Step::WriteZeroBytes),
        2 => span().prop_map(Step::WriteZeroes),
        5 => span().prop_map(Step::Discard),
        3 => span().prop_map(Step::Read),
        2 => Just(Step::Flush),
        2 => Just(Step::Compact),
        3 => (1..30u32).prop_map(Step::Idle),
        1 => Just(Step::Reopen),
    ]
}

fn layout() -> impl Strategy<Value = Layout> {
    let style = prop_oneof![
        Just(Style::Packed),
        Just(Style::Aligned),
        Just(Style::Xen),
        Just(Style::Gapped)
    ];
    let blocks = proptest::sample::subsequence((0..9u64).collect::<Vec<_>>(), 0..6).prop_shuffle();
    // The last block may be cut by the disk's end.
    let cut = prop_oneof![Just(0u64), 1..1000u64];
    (19..23u32, style, blocks, cut, any::<bool>()).prop_map(|(shift, style, blocks, cut, exact)| {
        let block_size = 1 << shift;
        Layout {
            block_size,
            disk_len: 9 * block_size - cut * 512,
            style,
            blocks,
            exact,
        }
    })
}

#[derive(Clone, Debug)]
struct Layout {
    block_size: u64,
    disk_len: u64,
    style: Style,
    blocks: Vec<u64>,
    /// Whether bitmaps leave sectors out.
    exact: bool,
}

struct Run {
    storage: Arc<SimStorage>,
    parent: Option<Arc<Disk>>,
    disk: Arc<Disk>,
    work: IdleWork,
    bytes: Vec<u8>,
    block_size: u64,
    /// Not to be compacted.
    fixed: bool,
}

fn idle_work(disk: &Arc<Disk>) -> IdleWork {
    let idle_after = std::time::Duration::ZERO;
    let policy = IdlePolicy {
        idle_after,
        min_reclaim: 1,
        punch_holes: true,
        fs_aware: false,
        ..IdlePolicy::default()
    };
    IdleWork::new(disk.clone(), policy)
}

impl Run {
    fn new(layout: &Layout) -> Self {
        let disk_len = layout.disk_len;
        let mut bytes = vec![0; size(disk_len)];
        let mut image = Image::new(layout.block_size, disk_len, layout.style, &layout.blocks);
        image.exact = layout.exact;
        let storage = image.build(|block, data| {
            let start = size(block * layout.block_size);
            let inside = data.len().min(bytes.len() - start);
            // Every third block is zeros, and the others are so in part.
            if block % 3 != 2 {
                let end = if block % 2 == 0 { inside } else { inside / 3 };
                pattern(block, block, &mut data[..end]);
            }
            bytes[start..start + inside].copy_from_slice(&data[..inside]);
        });
        Self::on(storage, None, bytes, layout.block_size, false)
    }

    /// A disk that holds `bytes`.
    fn on(
        storage: SimStorage,
        parent: Option<Arc<Disk>>,
        bytes: Vec<u8>,
        block_size: u64,
        fixed: bool,
    ) -> Self {
        let storage = Arc::new(storage);
        let disk = open_over(&storage, parent.as_ref()).unwrap();
        let work = idle_work(&disk);
        Self {
            storage,
            parent,
            disk,
            work,
            bytes,
            block_size,
            fixed,
        }
    }

    fn place(&self, span: Span) -> (u64, u64) {
        span.on(self.disk.len(), self.block_size)
    }

    fn expect(&mut self, offset: u64, count: u64) -> &mut [u8] {
        &mut self.bytes[size(offset)..][..size(count)]
    }

    fn step(&mut self, step: &Step) {
        match *step {
            Step::Write(span, tag) => {
                let (offset, count) = self.place(span);
                let data = self.expect(offset, count);
                if !data.is_empty() {
                    pattern(tag, 0, data);
                }
                let data = data.to_vec();
                self.disk.write_at(&data, offset).unwrap();
            }
            Step::WriteZeroBytes(span) => {
                let (offset, count) = self.place(span);
                self.expect(offset, count).fill(0);
                self.disk.write_at(&vec![0; size(count)], offset).unwrap();
            }
            Step::WriteZeroes(span) => {
                let (offset, count) = self.place(span);
                self.expect(offset, count).fill(0);
                self.disk.write_zeroes(offset, count).unwrap();
            }
            Step::Discard(span) => {
                let (offset, count) = self.place(span);
                self.expect(offset, count).fill(0);
                self.disk.discard(offset, count).unwrap();
            }
            Step::Read(span) => {
                let (offset, count) = self.place(span);
                self.compare(offset, count);
            }
            Step::Flush => self.disk.flush().unwrap(),
            Step::Compact => {
                self.compact();
                self.compare(0, self.disk.len());
            }
            Step::Idle(steps) => {
                for _ in 0..steps {
                    match self.work.step() {
                        Next::Again | Next::Wait(_) => {}
                        Next::Done => break,
                        Next::Failed(error) => panic!("idle work: {error}"),
                    }
                }
            }
            Step::Reopen => self.reopen(),
        }
    }

    fn compact(&self) {
        match compact(&self.disk) {
            Err(CompactError::Fixed) if self.fixed => {}
            other => other.unwrap(),
        }
    }

    /// Closes, has the file checked, and opens it again.
    fn reopen(&mut self) {
        self.disk.close().unwrap();
        check_closed(&self.storage).unwrap();
        self.disk = open_over(&self.storage, self.parent.as_ref()).unwrap();
        self.work = idle_work(&self.disk);
    }

    fn compare(&self, offset: u64, count: u64) {
        let mut read = vec![0xee; size(count)];
        self.disk.read_at(&mut read, offset).unwrap();
        let expected = &self.bytes[size(offset)..][..size(count)];
        if let Some(at) = read.iter().zip(expected).position(|(a, b)| a != b) {
            panic!(
                "at {:#x}: {:#x} instead of {:#x}",
                size(offset) + at,
                read[at],
                expected[at]
            );
        }
    }

    fn check_extents(&self) {
        let mut end = 0;
        for extent in self.disk.extents(0) {
            assert_eq!(extent.offset, end, "extents adjoin");
            assert!(extent.len > 0, "and are not empty");
            end += extent.len;
            let bytes = &self.bytes[size(extent.offset)..size(end)];
            assert!(extent.kind == ExtentKind::Data || bytes.iter().all(|&byte| byte == 0));
        }
        assert_eq!(end, self.disk.len());
    }
}

impl Run {
    /// Does all `steps`, checking after each.
    fn live(&mut self, steps: &[Step]) {
        let all = self.disk.len();
        self.compare(0, all);
        for step in steps {
            self.step(step);
            self.check_extents();
            // The file is sound at each moment, not only when it is closed.
            check_file(&Arc::new(self.storage.fork())).unwrap();
        }
        self.compare(0, all);
        self.compact();
        self.compare(0, all);
        self.reopen();
        self.compare(0, all);
        let image = check_closed(&self.storage).unwrap();
        if self.fixed {
            return;
        }
        image.check_compact().unwrap();
        // What a scan could have found is gone.
        let blocks = image.blocks();
        for (&block, _) in blocks.iter().filter(|(_, block)| block.state.has_data()) {
            let start = size(block * self.block_size).min(self.bytes.len());
            let end = (start + size(self.block_size)).min(self.bytes.len());
            let mut below = vec![0; end - start];
            if let Some(parent) = &self.parent {
                let inside = parent.len().saturating_sub(block * self.block_size);
                let inside = size(inside).min(below.len());
                parent
                    .read_at(&mut below[..inside], block * self.block_size)
                    .unwrap();
            }
            assert!(self.bytes[start..end] != below, "block {block} could go");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: u32::try_from(60 * env_number("VHDFS_SOAK", 1)).unwrap(),
        max_shrink_iters: 300,
        failure_persistence: None,
        .. ProptestConfig::default()
    })]

    /// Both formats, with and without parents.
    #[test]
    fn every_kind_of_disk(
        kind in 0..10usize,
        seed in any::<u64>(),
        steps in proptest::collection::vec(step(), 1..30),
    ) {
        let spec = kinds(512 << 10, seed)[kind];
        let start = spec.start();
        Run::on(start.storage, start.parent, start.bytes, start.block_size, spec.fixed).live(&steps);
    }

    #[test]
    fn disks_are_vectors_of_bytes(
        layout in layout(),
        steps in proptest::collection::vec(step(), 1..40),
    ) {
        Run::new(&layout).live(&steps);
    }
}
