use proptest::prelude::*;

use super::*;

const GUID: Uuid = Uuid::from_u128(0x1122_3344_5566_7788_99aa_bbcc_ddee_ff00);
const SECTORS: u64 = 64;
const LOG_LEN: u64 = SECTORS * PAGE;

/// A log in memory that counts what is read of it.
struct Ring {
    bytes: Vec<u8>,
    reads: u64,
}

impl LogSource for Ring {
    type Error = std::convert::Infallible;

    fn len(&self) -> u64 {
        u64_from(self.bytes.len())
    }

    fn read(&mut self, at: u64, sector: &mut Page) -> Result<(), Self::Error> {
        assert_eq!(at % PAGE, 0);
        sector.copy_from_slice(&self.bytes[usize_from(at)..][..4096]);
        self.reads += 1;
        Ok(())
    }

    fn next_data(&mut self, at: u64) -> Result<Option<u64>, Self::Error> {
        let (sectors, _) = self.bytes.as_chunks::<4096>();
        let zero = |n: &u64| sectors[usize_from(*n)].iter().all(|byte| *byte == 0);
        Ok((at / PAGE..u64_from(sectors.len()))
            .find(|n| !zero(n))
            .map(|n| n * PAGE))
    }
}

impl Ring {
    fn new() -> Self {
        Self {
            bytes: vec![0; usize_from(LOG_LEN)],
            reads: 0,
        }
    }

    fn put(&mut self, at: u64, entry: &LogEntry) -> u64 {
        let bytes = entry.encode();
        for (n, byte) in (0..).zip(&bytes) {
            self.bytes[usize_from((at + n) % LOG_LEN)] = *byte;
        }
        (at + u64_from(bytes.len())) % LOG_LEN
    }

    /// The active sequence: its entries and its last number.
    fn active(&mut self) -> Option<(Vec<u64>, u64)> {
        let Ok(found) = active_sequence(self, GUID);
        found.map(|sequence| (sequence.entries, sequence.sequence_number))
    }

    /// The changes of the entry at `at`.
    fn changes(&mut self, at: u64) -> Option<Vec<Change>> {
        let mut found = Vec::new();
        let Ok(header) = read_entry(self, GUID, at, |descriptor| found.push(descriptor));
        header?;
        let page = |page: LoggedPage| {
            let mut bytes: Page = self.bytes[usize_from(page.data_at)..][..4096]
                .try_into()
                .unwrap();
            assert!(page.restore(&mut bytes), "the wrong sector");
            Arc::new(bytes)
        };
        let change = |descriptor| match descriptor {
            Descriptor::Page { at, page: logged } => Change::Page {
                at,
                bytes: page(logged),
            },
            Descriptor::Zeros(range) => Change::Zeros(range),
        };
        Some(found.into_iter().map(change).collect())
    }
}

fn page(at: u64, fill: u8) -> Change {
    let mut bytes = [fill; 4096];
    bytes[0] = fill.wrapping_add(1);
    bytes[4095] = fill.wrapping_add(2);
    Change::Page {
        at: FileOffset::new(at),
        bytes: Arc::new(bytes),
    }
}

fn entry(sequence_number: u64, tail: u64, changes: Vec<Change>) -> LogEntry {
    LogEntry {
        sequence_number,
        tail,
        log_guid: GUID,
        flushed_file_offset: 4 << 20,
        last_file_offset: 5 << 20,
        changes,
    }
}

/// An entry of one page: two sectors.
fn small(sequence_number: u64, tail: u64) -> LogEntry {
    entry(sequence_number, tail, vec![page(3 << 20, 7)])
}

#[test]
fn an_entry_lies_in_the_log_as_specified() {
    let entry = entry(
        0x0102_0304_0506_0708,
        8192,
        vec![
            page(3 << 20, 7),
            Change::Zeros(FileRange::new(FileOffset::new(1 << 20), 8192)),
        ],
    );
    let bytes = entry.encode();
    assert_eq!(bytes.len(), 8192);
    let u32_at = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
    let u64_at = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
    assert_eq!(&bytes[..4], b"loge");
    assert_eq!(
        [u32_at(8), u32_at(12), u32_at(24), u32_at(28)],
        [8192, 8192, 2, 0]
    );
    assert_eq!(
        [u64_at(16), u64_at(48), u64_at(56)],
        [0x0102_0304_0506_0708, 4 << 20, 5 << 20]
    );
    assert_eq!(bytes[32..36], [0x44, 0x33, 0x22, 0x11], "mixed endian");
    assert_eq!(
        (&bytes[64..68], &bytes[68..72]),
        (&b"desc"[..], &[7, 7, 7, 9][..])
    );
    assert_eq!(bytes[72..80], [8, 7, 7, 7, 7, 7, 7, 7]);
    assert_eq!([u64_at(80), u64_at(88)], [3 << 20, 0x0102_0304_0506_0708]);
    assert_eq!(
        (&bytes[96..100], u64_at(104), u64_at(112)),
        (&b"zero"[..], 8192, 1 << 20)
    );
    assert_eq!(
        (&bytes[4096..4100], u32_at(4100), u32_at(8188)),
        (&b"data"[..], 0x0102_0304, 0x0506_0708)
    );
    assert_eq!(u32_at(4), checksum_without(&bytes, 4));
    assert_eq!(
        [
            entry_len(0, 0),
            entry_len(126, 0),
            entry_len(127, 0),
            entry_len(0, 254),
            entry_len(0, 255)
        ]
        .map(|len| len / PAGE),
        [1, 127, 129, 2, 3]
    );
}

#[test]
fn a_damaged_entry_is_none() {
    let mut ring = Ring::new();
    ring.put(0, &entry(5, 0, vec![page(1 << 20, 1), page(2 << 20, 2)]));
    assert_eq!(ring.changes(0).unwrap().len(), 2);
    for at in [
        0, 4, 8, 12, 16, 24, 28, 32, 48, 63, 64, 80, 88, 96, 200, 4095, 4096, 4100, 6000, 8188,
        12287,
    ] {
        ring.bytes[at] ^= 0x10;
        assert_eq!(ring.changes(0), None, "byte {at}");
        ring.bytes[at] ^= 0x10;
    }
    let Ok(other) = read_entry(&mut ring, Uuid::from_u128(1), 0, |_| {});
    assert_eq!(other, None, "another log's");
}

/// Breaks a rule and makes the checksum right again.
#[test]
fn the_rules_hold_under_a_good_checksum() {
    let broken = |at: usize, value: &[u8]| {
        let mut bytes = entry(5, 0, vec![page(1 << 20, 1), page(2 << 20, 2)]).encode();
        bytes[at..at + value.len()].copy_from_slice(value);
        let checksum = checksum_without(&bytes, 4);
        bytes[4..8].copy_from_slice(&checksum.to_le_bytes());
        let mut ring = Ring::new();
        ring.bytes[..bytes.len()].copy_from_slice(&bytes);
        ring.changes(0).is_some()
    };
    assert!(broken(60, &[0]), "nothing is broken by a zero");
    assert!(!broken(8, &0_u32.to_le_bytes()), "no length");
    assert!(!broken(8, &u32::MAX.to_le_bytes()), "longer than the log");
    assert!(!broken(12, &1_u32.to_le_bytes()), "a tail inside a sector");
    assert!(
        !broken(12, &low_u32(LOG_LEN).to_le_bytes()),
        "a tail outside"
    );
    assert!(!broken(16, &0_u64.to_le_bytes()), "number 0");
    assert!(!broken(24, &u32::MAX.to_le_bytes()), "too many descriptors");
    assert!(!broken(24, &1_u32.to_le_bytes()), "too few descriptors");
    assert!(!broken(64, b"nope"), "an unknown descriptor");
    assert!(!broken(64, b"zero"), "a page that has no descriptor");
    assert!(!broken(80, &512_u64.to_le_bytes()), "half a page");
    assert!(
        !broken(88, &4_u64.to_le_bytes()),
        "another entry's descriptor"
    );
    assert!(!broken(4096, b"desc"), "no data sector");
    assert!(!broken(4100, &[1]), "another entry's data");
    assert!(!broken(8188, &[1]), "torn data");
}

#[test]
fn an_empty_log_has_no_sequence() {
    assert_eq!(Ring::new().active(), None);
    let mut ring = Ring::new();
    ring.put(
        0,
        &LogEntry {
            log_guid: Uuid::from_u128(3),
            ..small(1, 0)
        },
    );
    assert_eq!(ring.active(), None, "stale");
}

#[test]
fn replay_starts_at_the_last_entrys_tail() {
    let mut ring = Ring::new();
    let mut at = 0;
    for number in 1..=5 {
        at = ring.put(at, &small(number, if number < 4 { 0 } else { 2 * 8192 }));
    }
    assert_eq!(ring.active(), Some((vec![2 * 8192, 3 * 8192, 4 * 8192], 5)));
    // The last one is torn: the one before counts.
    ring.bytes[usize_from(4 * 8192 + 5000)] ^= 1;
    assert_eq!(ring.active(), Some((vec![2 * 8192, 3 * 8192], 4)));
    // A hole in the middle: what is behind it has its tail outside.
    ring.bytes[usize_from(3 * 8192 + 5000)] ^= 1;
    ring.bytes[usize_from(4 * 8192 + 5000)] ^= 1;
    assert_eq!(ring.active(), Some((vec![0, 8192, 2 * 8192], 3)));
}

#[test]
fn a_tail_must_be_an_entry_of_the_sequence() {
    let mut ring = Ring::new();
    let at = ring.put(0, &small(1, 4096));
    assert_eq!(ring.active(), None, "inside an entry");
    ring.put(0, &small(1, 0));
    ring.put(at, &small(2, at + 8192));
    assert_eq!(
        ring.active(),
        None,
        "behind the sequence: it is no shorter one either"
    );
    ring.put(at, &small(3, 0));
    assert_eq!(ring.active(), Some((vec![0], 1)), "a gap in the numbers");
    ring.put(at, &small(3, at));
    assert_eq!(ring.active(), Some((vec![at], 3)), "the higher number wins");
}

#[test]
fn sequences_and_entries_wrap() {
    for start in [LOG_LEN - 3 * 8192, LOG_LEN - 8192, LOG_LEN - 4096, 4096] {
        let mut ring = Ring::new();
        // Leftovers of an earlier round of the same log.
        let mut at = 0;
        for number in 1..=SECTORS / 2 {
            at = ring.put(at, &small(number, at));
        }
        let mut at = start;
        let mut places = Vec::new();
        for number in 101..=105 {
            places.push(at);
            at = ring.put(at, &small(number, start));
        }
        assert_eq!(ring.active(), Some((places.clone(), 105)), "from {start}");
        let changes = vec![page(3 << 20, 7)];
        assert!(
            places
                .iter()
                .all(|at| ring.changes(*at).unwrap() == changes)
        );
    }
}

#[test]
fn a_full_ring_is_one_sequence() {
    let mut ring = Ring::new();
    let mut at = 12288;
    for number in 7..7 + SECTORS / 2 {
        at = ring.put(at, &small(number, 12288));
    }
    let (entries, last) = ring.active().unwrap();
    assert_eq!(
        (u64_from(entries.len()), last),
        (SECTORS / 2, 6 + SECTORS / 2)
    );
    assert_eq!(entries[0], 12288);
}

#[test]
fn empty_entries_change_nothing() {
    let mut ring = Ring::new();
    let at = ring.put(0, &entry(1, 0, Vec::new()));
    ring.put(at, &entry(2, 0, Vec::new()));
    let Ok(Some(sequence)) = active_sequence(&mut ring, GUID) else {
        panic!("two entries")
    };
    assert!(sequence.is_empty);
    assert_eq!(sequence.entries, [0, 4096]);
    assert_eq!(
        (sequence.flushed_file_offset, sequence.last_file_offset),
        (4 << 20, 5 << 20)
    );
}

#[test]
fn a_hostile_log_is_read_in_linear_time() {
    // Every sector starts an entry that claims all of the log.
    let mut ring = Ring::new();
    let pages: Vec<Change> = (0..60).map(|n| page(n << 20, 1)).collect();
    let long = entry(1, 0, pages).encode();
    for at in (0..LOG_LEN).step_by(4096) {
        ring.bytes[usize_from(at)..][..4096].copy_from_slice(&long[..4096]);
    }
    assert_eq!(ring.active(), None);
    assert!(ring.reads <= 3 * SECTORS, "{} reads", ring.reads);
    // One entry that is torn at its end, over and over through the wrap.
    let mut ring = Ring::new();
    ring.put(
        4096,
        &entry(1, 4096, (0..60).map(|n| page(n << 20, 1)).collect()),
    );
    ring.bytes[usize_from(62 * PAGE - 5)] ^= 1;
    assert_eq!(ring.active(), None);
    assert!(ring.reads <= 3 * SECTORS, "{} reads", ring.reads);
}

#[test]
fn the_last_number_has_no_successor() {
    let mut ring = Ring::new();
    let at = ring.put(0, &small(u64::MAX, 0));
    ring.put(at, &small(0, at));
    assert_eq!(ring.active(), Some((vec![0], u64::MAX)));
}

fn changes() -> impl Strategy<Value = Vec<Change>> {
    let one = prop_oneof![
        3 => (0_u64..1 << 40, any::<u8>()).prop_map(|(at, fill)| page(at / PAGE * PAGE, fill)),
        1 => (0_u64..1 << 40, 0_u64..1 << 40).prop_map(|(at, len)| {
            Change::Zeros(FileRange::new(FileOffset::new(at / PAGE * PAGE), len / PAGE * PAGE))
        }),
    ];
    prop::collection::vec(one, 0..55)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn entries_survive_the_log(at in 0..SECTORS, number in 1..u64::MAX, changes in changes()) {
        let mut ring = Ring::new();
        let at = at * PAGE;
        ring.put(at, &entry(number, at, changes.clone()));
        prop_assert_eq!(ring.changes(at).unwrap(), changes);
        prop_assert_eq!(ring.active(), Some((vec![at], number)));
    }

    #[test]
    fn many_zero_ranges_survive_too(count in 100_u64..700) {
        let zeros = |n| Change::Zeros(FileRange::new(FileOffset::new(n << 20), 4096));
        let mut changes: Vec<Change> = (0..count).map(zeros).collect();
        changes.insert(90, page(7 << 30, 5));
        changes.push(page(8 << 30, 6));
        let mut ring = Ring::new();
        ring.put(8192, &entry(9, 8192, changes.clone()));
        prop_assert_eq!(ring.changes(8192).unwrap(), changes);
    }

    #[test]
    fn rubbish_is_no_panic(sectors in prop::collection::vec((0..SECTORS, 0_usize..96, any::<[u8; 4]>()), 0..40)) {
        let mut ring = Ring::new();
        ring.put(8192, &entry(9, 8192, vec![page(1 << 20, 1), page(2 << 20, 2)]));
        for (sector, at, bytes) in sectors {
            ring.bytes[usize_from(sector * PAGE) + at..][..4].copy_from_slice(&bytes);
        }
        let _ = ring.active();
    }
}
