//! Many disks at once: 64 guests write while other disks are compacted; nobody waits for long, nothing is lost.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::mirror::Mirror;
use super::rig::{Rig, VHDFS, length, obstacle, run, say_skipped};
use super::{PATIENCE, VHD_OF_OURS, VHDX_OF_OURS};

const SIZE: &str = "8M";
const BUSY: usize = 64;
const RESTING: usize = 16;
/// Changes by each guest, at least; they go on until the others are compacted.
const CHANGES: usize = 8;

fn names() -> impl Iterator<Item = String> {
    let busy = (0..BUSY).map(|n| format!("busy{n}"));
    busy.chain((0..RESTING).map(|n| format!("rests{n}")))
}

#[test]
fn many_disks_at_once() {
    let test = "many_disks_at_once";
    if let Some(reason) = obstacle() {
        return say_skipped(test, &reason);
    }
    for maker in [VHD_OF_OURS, VHDX_OF_OURS] {
        let mut rig = Rig::new(maker.extension);
        rig.idle_after = "200ms";
        names().for_each(|name| (maker.make)(SIZE, &rig.disk(&name)));
        rig.serve();
        let mirror_of = |(n, name): (usize, String)| {
            let expected = rig.path(&format!("{name}.raw"));
            Mirror::new(
                &rig.raw(&name),
                &expected,
                0xfeed + u64::try_from(n).unwrap_or(0),
            )
        };
        let mut mirrors: Vec<Mirror> = names().enumerate().map(mirror_of).collect();
        for mirror in &mut mirrors[BUSY..] {
            mirror.work(30).expect("the disk takes it");
            mirror.discard_most();
        }
        let (slowest, compacted_after) = work_while_others_rest(&rig, &mut mirrors);
        for mirror in &mirrors {
            mirror.verify();
        }
        drop(mirrors);
        rig.unmount();
        let disks: Vec<_> = names().map(|name| rig.disk(&name)).collect();
        // Fails where one is not clean.
        run(
            VHDFS,
            std::iter::once("check".as_ref()).chain(disks.iter().map(|disk| disk.as_os_str())),
        );
        let (vhd, raw) = (rig.disk("busy7"), rig.path("busy7.raw"));
        let words = ["compare", "-f", rig.qemu_format(), "-F", "raw"].map(std::ffi::OsStr::new);
        run(
            "qemu-img",
            words.into_iter().chain([vhd.as_os_str(), raw.as_os_str()]),
        );
        println!(
            "{test}, {}: slowest change {slowest:?}, all others compacted after {compacted_after:?}",
            maker.extension
        );
    }
}

/// All busy guests at once, until the disks that rest are short; the time of the slowest change, and
/// until the last disk was short.
fn work_while_others_rest(rig: &Rig, mirrors: &mut [Mirror]) -> (Duration, Duration) {
    let resting: Vec<_> = (0..RESTING)
        .map(|n| rig.disk(&format!("rests{n}")))
        .collect();
    let done = AtomicBool::new(false);
    let started = Instant::now();
    std::thread::scope(|scope| {
        let work = |mirror: &mut Mirror| {
            let mut slowest = Duration::ZERO;
            let mut changes = 0;
            while changes < CHANGES || !done.load(Ordering::Relaxed) {
                let started = Instant::now();
                mirror.work(1).expect("the disk takes it");
                slowest = slowest.max(started.elapsed());
                changes += 1;
                std::thread::sleep(Duration::from_millis(20));
            }
            slowest
        };
        let (busy, _) = mirrors.split_at_mut(BUSY);
        let guests: Vec<_> = (busy.iter_mut())
            .map(|mirror| scope.spawn(move || work(mirror)))
            .collect();
        // A few MiB of metadata, one block of data, and what it takes until it is cut.
        while resting.iter().any(|disk| length(disk) > 6 << 20) && started.elapsed() < PATIENCE {
            std::thread::sleep(Duration::from_millis(20));
        }
        let compacted_after = started.elapsed();
        done.store(true, Ordering::Relaxed);
        let slowest = guests
            .into_iter()
            .map(|guest| guest.join().expect("no guest fails"));
        let slowest = slowest.max().unwrap_or_default();
        assert!(
            compacted_after < PATIENCE,
            "disks at rest starve:\n{}",
            rig.log()
        );
        assert!(slowest < PATIENCE, "a guest starves: {slowest:?}");
        (slowest, compacted_after)
    })
}
