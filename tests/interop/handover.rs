//! A disk that QEMU and we change by turns. Each leaves it to the other closed, or killed.

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;

use vhdfs::storage::sim::SimStorage;

use crate::mirror::{
    Mirrored, is_sound, open, open_read_only, qemu_compares, qemu_format, same_bytes,
};
use crate::qemu::Maker;
use crate::support::second::build::log::{LogEntry, LogImage};
use crate::support::second::build::model::{compare, save};
use crate::support::second::build::vhdx::{Layout, Order, VhdxImage};
use crate::support::second::{State, read};
use crate::support::tools::{installed, replayed_by_qemu, run, tool};
use crate::support::{env_number, size};

const MIB: u64 = 1 << 20;
const KILLED: i32 = 9;

/// How QEMU ends its turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Closed,
    /// It gets a signal. All that it was asked for is in the file, but no more.
    Killed,
}

impl Mirrored {
    /// QEMU writes here and there.
    fn qemus_turn(&mut self, end: End) {
        let mut commands = Vec::new();
        for _ in 0..5 {
            // What is no whole sector it reads first, which is its own business.
            let place = self.place(512);
            let (start, count) = (place.start, (place.end - place.start) / 512 * 512);
            if count == 0 {
                continue;
            }
            let byte = u8::try_from(self.below(256)).unwrap();
            commands.push(match byte {
                0..=40 => format!("write -z {start} {count}"),
                _ => format!("write -P {byte} {start} {count}"),
            });
            let byte = if byte <= 40 { 0 } else { byte };
            self.holds(&vec![byte; size(count)], start);
            commands.push(format!("read -P {byte} {start} {count}"));
        }
        if end == End::Killed {
            commands.push(format!("sigraise {KILLED}"));
        }
        let format = qemu_format(&self.path);
        let commands = commands.iter().flat_map(|command| ["-c", command]);
        let words: Vec<&str> = ["-f", format].into_iter().chain(commands).collect();
        let output = run("qemu-io", &words, &[&self.path]);
        let expected = match end {
            End::Closed => (Some(0), None),
            End::Killed => (None, Some(KILLED)),
        };
        let said = String::from_utf8_lossy(&output.stdout);
        assert_eq!(
            (output.status.code(), output.status.signal()),
            expected,
            "{words:?}: {said}"
        );
        assert!(!said.contains("failed"), "{words:?}: {said}");
    }
}

/// Both change the disk, by turns.
fn by_turns(maker: Maker) {
    if !installed(&["qemu-img", "qemu-io"]) {
        return;
    }
    for seed in 1..=env_number("VHDFS_SOAK", 1) {
        let folder = tempfile::tempdir().unwrap();
        let mut disk = maker.make(folder.path(), seed);
        for turn in 0..6 {
            let end = if turn % 2 == 0 {
                End::Closed
            } else {
                End::Killed
            };
            disk.qemus_turn(end);
            disk.we_agree();
            qemu_compares(&disk.path, &disk.raw);
            disk.our_turn(4);
            disk.agree();
        }
        disk.second_agrees(std::slice::from_ref(&disk.path));
    }
}

#[test]
fn a_dynamic_vhd_goes_from_hand_to_hand() {
    let maker = Maker::ours("vhd", 2 * MIB, 40 * MIB + 1536);
    by_turns(maker);
    by_turns(maker.by_qemu("force_size=off"));
}

#[test]
fn a_vhdx_goes_from_hand_to_hand() {
    let maker = Maker::ours("vhdx", MIB, 30 * MIB + 512);
    by_turns(maker);
    by_turns(maker.by_qemu("block_size=1M"));
}

#[test]
fn a_fixed_vhdx_goes_from_hand_to_hand() {
    let maker = Maker::ours("vhdx", 2 * MIB, 40 * MIB).fixed();
    by_turns(maker);
    by_turns(maker.by_qemu("block_size=2M"));
}

/// QEMU cannot write to the block table and gives up, with what it wanted to write in the log.
fn gives_up(path: &Path, table_at: u64, write: &str) {
    let sector = table_at / 512;
    let file = path.to_str().unwrap();
    let open = format!(
        "open -o driver=vhdx,file.driver=blkdebug,file.image.filename={file},\
         file.inject-error.0.event=none,file.inject-error.0.iotype=write,\
         file.inject-error.0.sector={sector}"
    );
    let output = run("qemu-io", &["-c", &open, "-c", write], &[]);
    let said = String::from_utf8_lossy(&output.stdout);
    let said = said.into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("write failed: Input/output error"), "{said}");
}

#[test]
fn we_take_over_a_log_of_qemu() {
    if !installed(&["qemu-img", "qemu-io"]) {
        return;
    }
    for options in ["block_size=1M", "block_size=4M,log_size=2M"] {
        let folder = tempfile::tempdir().unwrap();
        let maker = Maker::ours("vhdx", MIB, 120 * MIB).by_qemu(options);
        let mut disk = maker.make(folder.path(), 3);
        disk.qemus_turn(End::Closed);
        for (turn, byte) in (0..).zip(1..4u8) {
            let image = read(&SimStorage::from_file(&disk.path).unwrap()).unwrap();
            let table_at = image.vhdx().things().into_iter();
            let table_at = table_at.map(|thing| (thing.what.to_string(), thing.place.start));
            let table_at = { table_at }.find(|(what, _)| what == "the block table");
            // A block that is not there.
            let blocks = image.blocks();
            let mut absent = { 0.. }.filter(|block| blocks.get(block).is_none_or(|b| b.at == 0));
            let start = absent.next().unwrap() * disk.block_size;
            assert!(start < disk.disk_len, "all blocks are there");
            let write = format!("write -P {byte} {start} 300k");
            gives_up(&disk.path, table_at.unwrap().1, &write);
            let left = read(&SimStorage::from_file(&disk.path).unwrap()).unwrap();
            assert!(left.vhdx().log.is_live());

            disk.holds(&[byte; 300 << 10], start);
            let theirs = folder.path().join("theirs.vhdx");
            fs::copy(&disk.path, &theirs).unwrap();
            replayed_by_qemu(&theirs);
            qemu_compares(&theirs, &disk.raw);
            disk.we_agree();
            disk.our_turn(turn);
            disk.agree();
        }
    }
}

/// Logs such as QEMU and we do not write: entries of all sorts, at any place of the ring.
#[test]
fn we_take_over_a_log_that_was_built() {
    if !installed(&["qemu-img"]) {
        return;
    }
    let disk_len = 30 * MIB;
    let blocks = [5, 0, 3, 9, 12];
    for order in [Order::Windows, Order::Qemu, Order::Behind] {
        for (start, layout) in [(0, Layout::Packed), (MIB - 8192, Layout::Gapped)] {
            let after = VhdxImage::dynamic(2 * MIB, disk_len, layout, &blocks).with_order(order);
            let after = after.with_state(1, State::Zero);
            let mut before = after.clone();
            before.states.clear();
            for block in [0, 3, 12] {
                before.slot_mut(block).linked = false;
            }
            let mut built = before.build();
            let link = LogEntry::of(built.pages_to(&after.build()));
            let empty = LogEntry::default();
            let mut log = LogImage::new(vec![empty.clone(), link.clone(), empty, link]);
            (log.start, log.first) = (start, 1 << 40);
            built.write_log(&log);
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("disk.vhdx");
            save(&built.sim, &path);

            let read_by = |path: &Path| {
                let disk = open_read_only(path);
                let read = |buf: &mut [u8], at: u64| disk.read_at(buf, at).unwrap();
                compare(&[&after], &read).unwrap_or_else(|error| panic!("{order:?}: {error}"));
            };
            read_by(&path);
            open(&path).close().unwrap();
            read_by(&path);
            is_sound(&path);
            let mut disk = Mirrored::of_content(&path, 5);
            let raw = folder.path().join("theirs.raw");
            let convert = ["convert", "-f", "vhdx", "-O", "raw"];
            tool("qemu-img", &convert, &[&path, &raw]);
            same_bytes(&raw, &disk.raw);
            for _ in 0..3 {
                disk.our_turn(3);
                disk.agree();
            }
        }
    }
}
