//! What is fuzzed. Each target is a function of bytes that panics where something is wrong; the fuzz
//! crate gives it the fuzzer's, `tests/fuzzing.rs` some of its own and all that once were a find.
//!
//! | target | what it is given | what must hold |
//! |---|---|---|
//! | `decode_*`, `log_decode`, `locators` | structures, with and without right checksums | decoded or refused; what is decoded is what is encoded; a parent is never found outside |
//! | `file_vhd`, `file_vhdx` | whole files, from other programs' images | see `session` |
//! | `edit_vhd`, `edit_vhdx`, `replay` | edits of valid images, checksums repaired | see `session` |
//! | `guest_*` | disks with filesystems of their own tools, checksums repaired | reads bounded; free space inside, once |
//!
//! # Bounds
//! What is allocated at once, as the allocator counts it, is at most 64 bytes for each byte of the
//! input, and 4 MiB for decoders, 64 MiB for sessions (most of that is the simulated file and what is
//! remembered of it), 24 MiB for surveys (a structure is read in pieces of 16 MiB at most). Reads are
//! counted by the storage: 400,000 operations a session, and what [`guests`] says a survey. An input
//! that takes longer than 20 s is a find, too.

mod decoders;
mod edits;
mod guests;
mod input;
mod seal;
mod seeds;
mod session;
mod sparse;

use peak_alloc::PeakAlloc;
use vhdfs::storage::sim::Random;
use vhdfs::units::u64_from;

use self::session::Case;
use self::sparse::Sparse;

const MIB: u64 = 1 << 20;
/// The longest file that an input describes as it is.
const MAX_FILE: u64 = 64 * MIB;

/// Something to be fuzzed.
pub(crate) struct Target {
    pub(crate) name: &'static str,
    run: fn(&[u8]),
    /// Bytes allocated at once, apart from 64 for each byte of the input: content is kept several
    /// times over by the targets themselves.
    memory: u64,
    /// How many changed inputs a short run tries.
    pub(crate) rounds: u64,
    /// What to start from.
    pub(crate) seeds: fn() -> Vec<Vec<u8>>,
    /// Changes an input so that it still means something.
    pub(crate) mutate: fn(&mut Vec<u8>, &mut Random),
}

const fn target(name: &'static str, run: fn(&[u8]), seeds: fn() -> Vec<Vec<u8>>) -> Target {
    Target {
        name,
        run,
        memory: 4 * MIB,
        rounds: 300,
        seeds,
        mutate: seeds::mutate,
    }
}

const fn session_of(name: &'static str, run: fn(&[u8]), seeds: fn() -> Vec<Vec<u8>>) -> Target {
    Target {
        memory: 64 * MIB,
        rounds: 10,
        ..target(name, run, seeds)
    }
}

const fn guest(name: &'static str, seeds: fn() -> Vec<Vec<u8>>) -> Target {
    Target {
        memory: 24 * MIB,
        rounds: 200,
        mutate: sparse::mutate,
        ..target(name, guests::run, seeds)
    }
}

const fn edit(name: &'static str, run: fn(&[u8]), seeds: fn() -> Vec<Vec<u8>>) -> Target {
    Target {
        rounds: 300,
        mutate: seeds::mutate_edits,
        ..session_of(name, run, seeds)
    }
}

/// All targets.
pub(crate) const TARGETS: &[Target] = &[
    target("decode_vhd", decoders::vhd, seeds::decoders),
    target("decode_vhdx", decoders::vhdx, seeds::decoders),
    target("log_decode", decoders::log, seeds::decoders),
    target("locators", decoders::locators, seeds::locators),
    Target {
        mutate: sparse::mutate,
        ..session_of(
            "file_vhd",
            |data| file(data, "fuzzed.vhd"),
            seeds::vhd_images,
        )
    },
    Target {
        mutate: sparse::mutate,
        ..session_of(
            "file_vhdx",
            |data| file(data, "fuzzed.vhdx"),
            seeds::vhdx_images,
        )
    },
    edit("edit_vhd", edits::vhd, seeds::edited_vhds),
    edit("edit_vhdx", edits::vhdx, seeds::edited_vhdxs),
    edit("replay", edits::log, seeds::edited_logs),
    guest("guest_table", seeds::tables),
    guest("guest_lvm", seeds::lvm),
    guest("guest_ntfs", seeds::ntfs),
    guest("guest_ext", seeds::ext),
    Target {
        // Its log alone has 64 MiB.
        rounds: 20,
        ..guest("guest_xfs", seeds::xfs)
    },
    guest("guest_btrfs", seeds::btrfs),
    guest("guest_fat", seeds::fat),
    guest("guest_exfat", seeds::exfat),
    guest("guest_swap", seeds::swap),
];

impl Target {
    /// Runs the target, with [`PeakAlloc`] as the allocator, and gives what it allocated at once.
    ///
    /// # Panics
    /// Where something is wrong.
    pub(crate) fn run(&self, data: &[u8]) -> u64 {
        let before = PeakAlloc.current_usage();
        PeakAlloc.reset_peak_usage();
        (self.run)(data);
        let most = u64_from(PeakAlloc.peak_usage().saturating_sub(before));
        let bound = self.memory + 64 * u64_from(data.len());
        assert!(
            most <= bound,
            "{} allocated {most} bytes at once, over {bound}",
            self.name
        );
        most
    }
}

/// A file as it is. Its flags are the seed of what is done to it.
fn file(data: &[u8], name: &'static str) {
    let sparse = Sparse::decode(data, MAX_FILE);
    let mut random = Random::new(sparse.flags.into());
    let mut script = vec![0; 1 + 8 * 12];
    for byte in &mut script {
        *byte = vhdfs::units::low_u8(random.next());
    }
    let case = Case {
        file: sparse.to_storage(),
        parents: Vec::new(),
        name,
    };
    session::session(case, &mut input::Input::new(&script));
}
