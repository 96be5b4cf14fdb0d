//! Every fuzz target on some inputs: what it starts from, seeded changes of that, and all that once
//! were finds. `scripts/fuzz` is the long form.
//!
//! `VHDFS_SOAK=n` tries n times as many changes, `VHDFS_SEED` others; `VHDFS_FUZZ=TARGET` only one target.

#![allow(clippy::unwrap_used, reason = "a failure is what a test is for")]

mod support;
#[path = "fuzz/src/targets/mod.rs"]
mod targets;

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::time::{Duration, Instant};

use peak_alloc::PeakAlloc;
use support::env_number;
use targets::{TARGETS, Target};
use vhdfs::storage::sim::Random;
use vhdfs::units::{u64_from, usize_from};

#[global_allocator]
static ALLOCATOR: PeakAlloc = PeakAlloc;

/// Longer than this for one input is a hang, on a busy machine too.
const MAX_TIME: Duration = Duration::from_secs(20);

/// What the inputs of a target came to.
#[derive(Default)]
struct Tally {
    runs: u64,
    memory: u64,
    slowest: Duration,
}

impl Tally {
    /// Runs one input; where that fails, `name` says how to come by it again.
    fn run(&mut self, target: &Target, data: &[u8], name: &str) {
        let started = Instant::now();
        let run = || {
            let memory = target.run(data);
            let time = started.elapsed();
            assert!(time < MAX_TIME, "{}: {name} took {time:?}", target.name);
            (memory, time)
        };
        let (memory, time) = catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|panic| {
            let kept = std::env::temp_dir().join(format!("vhdfs-{}", target.name));
            fs::write(&kept, data).unwrap();
            eprintln!("{}: {name}, kept in {}", target.name, kept.display());
            std::panic::resume_unwind(panic)
        });
        self.memory = self.memory.max(memory);
        self.slowest = self.slowest.max(time);
        self.runs += 1;
    }
}

/// One test, and so one target at a time: the allocator counts for all of the process.
#[test]
fn targets_hold_on_seeds_changes_and_former_finds() {
    let regressions = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/regressions");
    let only = std::env::var("VHDFS_FUZZ").ok();
    let wanted = |target: &&Target| only.as_deref().is_none_or(|name| name == target.name);
    for target in TARGETS.iter().filter(wanted) {
        let mut tally = Tally::default();
        let folder = regressions.join(target.name);
        let mut finds: Vec<_> = fs::read_dir(&folder)
            .into_iter()
            .flatten()
            .flatten()
            .collect();
        finds.sort_by_key(fs::DirEntry::file_name);
        for find in finds {
            let name = find.file_name().to_string_lossy().into_owned();
            tally.run(target, &fs::read(find.path()).unwrap(), &name);
        }
        let seeds = (target.seeds)();
        for (n, seed) in seeds.iter().enumerate() {
            tally.run(target, seed, &format!("seed {n}"));
        }
        let count = if seeds.is_empty() {
            0
        } else {
            target.rounds * env_number("VHDFS_SOAK", 1)
        };
        for n in 0..count {
            let mut random = Random::new(env_number("VHDFS_SEED", 1) << 32 | n);
            let mut data = seeds[usize_from(random.below(u64_from(seeds.len())))].clone();
            for _ in 0..=random.below(4) {
                (target.mutate)(&mut data, &mut random);
            }
            tally.run(target, &data, &format!("change {n}"));
        }
        let Tally {
            runs,
            memory,
            slowest,
        } = tally;
        let name = target.name;
        println!("{name}: {runs} inputs, at most {memory} bytes at once, at most {slowest:?}");
    }
}
