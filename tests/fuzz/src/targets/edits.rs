//! Valid images with changed fields and right checksums.
//!
//! ```text
//! u8   which image           u8   which structures keep a wrong checksum
//! u8   how many edits (16 at most), each of 12 bytes:
//!      u8 structure, u16 where in it, u8 width and kind of the change, u64 to what
//! then what happens: see `session`
//! ```

use std::sync::LazyLock;

use vhdfs::storage::Storage;
use vhdfs::storage::sim::SimStorage;
use vhdfs::units::{FileOffset, u64_from, usize_from};

use super::input::Input;
use super::seal;
use super::session::{Case, session};
use super::sparse::EDGES;
use crate::support::image::Style;
use crate::support::second::State;
use crate::support::second::build::log::{LogEntry, LogImage};
use crate::support::second::build::vhd::{ParentOf, VhdImage, VhdKind};
use crate::support::second::build::vhdx::{Layout, Order, Slot, VhdxImage, VhdxKind};
use crate::support::second::build::vhdx_file::Built;
use crate::support::second::build::{Bits, Fill};

const MIB: u64 = 1 << 20;
const VHD_BLOCK: u64 = 64 << 10;
/// The longest file that an edit makes: tables as long as the file says take memory.
const MAX_LEN: u64 = 64 * MIB;

/// A structure of a file.
#[derive(Clone, Copy, Debug)]
struct Spot {
    at: u64,
    len: u64,
}

impl Spot {
    const fn fields(at: u64, len: u64) -> Self {
        Self { at, len }
    }
}

/// An image to edit, and its parents, the oldest first.
struct Base {
    file: SimStorage,
    parents: Vec<SimStorage>,
    spots: Vec<Spot>,
    /// The block table; nothing of a fixed VHD.
    table: Spot,
    /// Where a VHDX's log lies.
    log: Option<Spot>,
    is_vhdx: bool,
}

static VHDS: LazyLock<Vec<Base>> = LazyLock::new(vhds);
static VHDXS: LazyLock<Vec<Base>> = LazyLock::new(vhdxs);
static LOGS: LazyLock<Vec<Base>> = LazyLock::new(logs);

/// Edited VHDs.
pub(super) fn vhd(data: &[u8]) {
    run(&VHDS, data);
}

/// Edited VHDXs.
pub(super) fn vhdx(data: &[u8]) {
    run(&VHDXS, data);
}

/// VHDXs whose log is to be replayed, edited.
pub(super) fn log(data: &[u8]) {
    run(&LOGS, data);
}

/// How many images each of these targets has.
pub(super) fn counts() -> [u8; 3] {
    [&VHDS, &VHDXS, &LOGS].map(|bases| u8::try_from(bases.len()).expect("few"))
}

fn run(bases: &[Base], data: &[u8]) {
    let mut input = Input::new(data);
    let base = input.one_of(bases);
    let file = base.file.fork();
    let unsealed = input.byte();
    for _ in 0..input.byte() % 17 {
        edit(&file, base, &mut input);
    }
    match base.is_vhdx {
        true => seal_vhdx(&file, base, unsealed),
        false => seal_vhd(&file, unsealed),
    }
    file.sync().expect("the simulated host keeps it");
    session(
        Case {
            file,
            parents: base.parents.iter().map(SimStorage::fork).collect(),
            name: if base.is_vhdx {
                "fuzzed.vhdx"
            } else {
                "fuzzed.vhd"
            },
        },
        &mut input,
    );
}

fn edit(file: &SimStorage, base: &Base, input: &mut Input<'_>) {
    let (spot, place, kind, value) = (input.byte(), input.u16(), input.byte(), input.u64());
    let len = file.len().expect("known");
    if spot >= 0xf0 {
        let new = match kind % 4 {
            0 => len.saturating_sub(value % MAX_LEN),
            1 => len + value % 8192,
            2 => (value % MAX_LEN) & !511,
            _ => len + value % (8 * MIB),
        };
        file.set_len(new.min(MAX_LEN)).expect("it is short");
        return;
    }
    // Every fourth changes an entry of the block table as a whole: what it says moves data.
    let entry = if base.is_vhdx { 8 } else { 4 };
    let is_entry = kind & 0x60 == 0x20 && base.table.len > 0;
    let width = if is_entry { entry } else { 1_u64 << (kind & 3) };
    let place_of = |spot: u64, place: u64| {
        if is_entry {
            return base.table.at + place % (base.table.len / entry) * entry;
        }
        let spot = base.spots[usize_from(spot) % base.spots.len()];
        spot.at + place % spot.len / width * width
    };
    let at = place_of(spot.into(), place.into());
    let get = |at: u64| {
        let mut bytes = vec![0; usize_from(width)];
        let _ = file.read_exact_at(&mut bytes, FileOffset::new(at));
        number(&bytes, base.is_vhdx)
    };
    let old = get(at);
    let new = match kind >> 2 & 7 {
        0 => value,
        1 => EDGES[usize_from(value % u64_from(EDGES.len()))],
        2 => old.wrapping_add(value % 16).wrapping_sub(8),
        3 => old ^ 1 << (value % 64),
        4 => get(place_of(value & 0xff, value >> 8 & 0xffff)),
        // An offset elsewhere in the file, in the units of the formats.
        5 => old.wrapping_add((value % 32).wrapping_sub(16) << (value >> 8 & 31)),
        6 => [len, len / 512, len - len % MIB, len.saturating_sub(512)][usize_from(value % 4)],
        _ => {
            // All of it.
            let spot = base.spots[usize::from(spot) % base.spots.len()];
            let fill = vec![[0, 0xff, 1, 0x80][usize_from(value % 4)]; usize_from(spot.len)];
            put(file, &fill, spot.at);
            return;
        }
    };
    let mut bytes = new.to_le_bytes()[..usize_from(width)].to_vec();
    if !base.is_vhdx {
        bytes.reverse();
    }
    put(file, &bytes, at);
}

/// The number that `bytes` are in the format's byte order.
fn number(bytes: &[u8], little_endian: bool) -> u64 {
    let push = |number, byte: &u8| number << 8 | u64::from(*byte);
    match little_endian {
        true => bytes.iter().rev().fold(0, push),
        false => bytes.iter().fold(0, push),
    }
}

/// Writes what lies inside the file.
fn put(file: &SimStorage, bytes: &[u8], at: u64) {
    let room = file.len().expect("known").saturating_sub(at);
    let bytes = &bytes[..bytes.len().min(usize_from(room))];
    let written = file.write_all_at(bytes, FileOffset::new(at));
    written.expect("the simulated host takes it");
}

/// `count` bytes at `at`; none where the file is shorter.
fn get(file: &SimStorage, at: u64, count: u64) -> Option<Vec<u8>> {
    let mut bytes = vec![0; usize_from(count)];
    file.read_exact_at(&mut bytes, FileOffset::new(at)).ok()?;
    Some(bytes)
}

fn seal_vhd(file: &SimStorage, unsealed: u8) {
    let len = file.len().expect("known");
    let footer = len.saturating_sub(512);
    let structures = [
        (0, 512, seal::FOOTER_FIELD),
        (512, 1024, seal::HEADER_FIELD),
        (footer, 512, seal::FOOTER_FIELD),
    ];
    for (n, (at, len, field)) in structures.into_iter().enumerate() {
        if let Some(mut bytes) = get(file, at, len).filter(|_| unsealed >> n & 1 == 0)
            && [&b"conectix"[..], b"cxsparse"].contains(&&bytes[..8])
        {
            seal::vhd(&mut bytes, field);
            put(file, &bytes, at);
        }
    }
}

fn seal_vhdx(file: &SimStorage, base: &Base, unsealed: u8) {
    let structures = [
        (64 << 10, 4096),
        (128 << 10, 4096),
        (192 << 10, 64 << 10),
        (256 << 10, 64 << 10),
    ];
    for (n, (at, len)) in structures.into_iter().enumerate() {
        if let Some(mut bytes) = get(file, at, len).filter(|_| unsealed >> n & 1 == 0) {
            seal::vhdx(&mut bytes);
            put(file, &bytes, at);
        }
    }
    let log = base.log.filter(|_| unsealed & 0x10 == 0);
    if let Some((spot, mut bytes)) = log.and_then(|log| Some((log, get(file, log.at, log.len)?))) {
        seal::log_entries(&mut bytes);
        // Only heads have changed.
        for at in (0..bytes.len()).step_by(4096) {
            if bytes[at..].starts_with(b"loge") {
                put(file, &bytes[at..at + 512], spot.at + u64_from(at));
            }
        }
    }
}

fn vhd_base(chain: &[VhdImage]) -> Base {
    let (image, parents) = chain.split_last().expect("there is one");
    let file = image.build();
    let len = file.len().expect("known");
    let mut spots = vec![Spot::fields(len - 512, 512)];
    let mut table = Spot::fields(0, 0);
    if !matches!(image.kind, VhdKind::Fixed) {
        let entries = image.disk_len.div_ceil(image.block_size) + image.spare_entries;
        table = Spot::fields(image.table_at(), entries * 4);
        spots.extend([
            Spot::fields(0, 512),
            Spot::fields(512, 768),
            table,
            Spot::fields(1536, image.floor() - 1536),
        ]);
        for entry in get(&file, table.at, table.len).expect("inside").chunks(4) {
            let sector = number(entry, false);
            if sector != 0xffff_ffff {
                spots.push(Spot::fields(sector * 512, 512));
            }
        }
    }
    Base {
        file,
        parents: parents.iter().map(VhdImage::build).collect(),
        spots,
        table,
        log: None,
        is_vhdx: false,
    }
}

fn vhds() -> Vec<Base> {
    let disk_len = 8 * VHD_BLOCK - 4096;
    let dynamic = |style, blocks: &[u64]| VhdImage::dynamic(VHD_BLOCK, disk_len, style, blocks);
    let parent = dynamic(Style::Packed, &[0, 2, 3, 6]);
    let kind = VhdKind::Differencing(ParentOf::new(parent.unique_id, "parent.vhd"));
    let bits = [
        (1, Bits::All),
        (2, Bits::Random(5)),
        (7, Bits::Random(9)),
        (0, Bits::None),
    ];
    let mut child = VhdImage::new(kind, VHD_BLOCK, disk_len, Style::Gapped, &bits);
    (child.tag, child.unique_id) = (2, [9; 16]);
    vec![
        vhd_base(&[dynamic(Style::Packed, &[3, 0, 7, 1])]),
        vhd_base(&[dynamic(Style::Aligned, &[6, 5, 4])]),
        vhd_base(&[dynamic(Style::Gapped, &[0, 7, 2])]),
        vhd_base(&[dynamic(Style::Xen, &[])]),
        vhd_base(&[parent, child]),
        vhd_base(&[VhdImage::fixed(disk_len)]),
    ]
}

fn vhdx_base(built: &Built, parents: Vec<SimStorage>) -> Base {
    let (log_at, log_len) = built.log;
    let (bat_at, entries) = (built.bat.0, u64_from(built.table.len()));
    let bat = Spot::fields(bat_at, entries * 8);
    let header = |at| Spot::fields(at, 80);
    let mut spots = vec![
        Spot::fields(0, 64),
        header(64 << 10),
        header(128 << 10),
        Spot::fields(192 << 10, 96),
        Spot::fields(256 << 10, 96),
        Spot::fields(built.metadata_at, 32 * 8),
        Spot::fields(built.metadata_at + (64 << 10), 512),
        bat,
    ];
    spots.extend(built.bitmaps.values().map(|&at| Spot::fields(at, 4096)));
    let log = Spot::fields(log_at, log_len);
    let bytes = get(&built.sim, log_at, log_len).expect("inside");
    for at in (0..bytes.len()).step_by(4096) {
        let sector = log_at + u64_from(at);
        if bytes[at..].starts_with(b"loge") {
            spots.extend([Spot::fields(sector, 64), Spot::fields(sector + 64, 32 * 6)]);
        } else if bytes[at..].starts_with(b"data") {
            spots.push(Spot::fields(sector, 4096));
        }
    }
    let base = Base {
        file: built.sim.fork(),
        parents,
        spots,
        table: bat,
        log: Some(log),
        is_vhdx: true,
    };
    base.file.sync().expect("the simulated host keeps it");
    base
}

/// A block with little in it, so that a fuzzer gets through many.
fn half(mut slot: Slot) -> Slot {
    slot.fill = Fill::Half;
    slot
}

fn dynamic(layout: Layout, blocks: &[u64]) -> VhdxImage {
    let slots = blocks.iter().map(|block| half(Slot::full(*block)));
    VhdxImage::new(VhdxKind::Dynamic, MIB, 4 * MIB - 4096, layout, slots)
}

fn family() -> (VhdxImage, VhdxImage) {
    let parent = dynamic(Layout::Packed, &[0, 2]);
    let slots = [
        half(Slot::partial(2, Bits::Random(3))),
        half(Slot::full(1)),
        Slot::anchor(3, State::Unmapped),
    ];
    let mut child = VhdxImage::child(&parent, Layout::Packed, &slots);
    (child.tag, child.data_write_guids) = (2, [[0x31; 16]; 2]);
    (parent, child.with_state(0, State::Zero))
}

fn vhdxs() -> Vec<Base> {
    let (parent, child) = family();
    let alone = |image: VhdxImage| vhdx_base(&image.build(), Vec::new());
    vec![
        alone(dynamic(Layout::Packed, &[2, 0])),
        alone(dynamic(Layout::Gapped, &[3, 1]).with_order(Order::Qemu)),
        alone(
            dynamic(Layout::Packed, &[0, 1])
                .with_4k_sectors()
                .with_order(Order::Behind),
        ),
        vhdx_base(&child.build(), vec![parent.build().sim]),
        alone(VhdxImage::fixed(MIB, 2 * MIB)),
    ]
}

/// Files that a log makes into others.
fn logs() -> Vec<Base> {
    let replayed = |before: &VhdxImage, after: &VhdxImage, start, parents| {
        let mut built = before.build();
        let link = LogEntry::of(built.pages_to(&after.build()));
        let zeros = LogEntry::default();
        let mut log = LogImage::new(vec![zeros, link]);
        (log.start, log.first) = (start, 77);
        built.write_log(&log);
        vhdx_base(&built, parents)
    };
    let after = dynamic(Layout::Packed, &[3, 0, 2]);
    let mut before = after.clone();
    before.slot_mut(0).linked = false;
    before.slot_mut(2).linked = false;
    let (parent, child) = family();
    let mut unlinked = child.clone();
    unlinked.slot_mut(1).linked = false;
    unlinked.slot_mut(2).linked = false;
    vec![
        replayed(&before, &after, 0, Vec::new()),
        // Round the ring's end.
        replayed(&before, &after, MIB - 4096, Vec::new()),
        // Backwards: what the log takes away was there.
        replayed(&after, &before, 4096, Vec::new()),
        replayed(&unlinked, &child, 0, vec![parent.build().sim]),
    ]
}
