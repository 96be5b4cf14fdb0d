//! The targets of `tests/fuzz`, for libFuzzer: see `targets`.

#[path = "../../support/mod.rs"]
mod support;
#[allow(dead_code, reason = "some of it is for tests/fuzzing.rs")]
mod targets;

use peak_alloc::PeakAlloc;
use vhdfs::storage::sim::Random;

#[doc(hidden)]
pub use libfuzzer_sys;

#[global_allocator]
static ALLOCATOR: PeakAlloc = PeakAlloc;

fn find(name: &str) -> &'static targets::Target {
    let target = targets::TARGETS.iter().find(|target| target.name == name);
    target.unwrap_or_else(|| panic!("there is no target {name}"))
}

/// Runs the target `name` on `data`.
///
/// # Panics
/// Where something is wrong.
pub fn run(name: &str, data: &[u8]) {
    find(name).run(data);
}

/// Changes the input `data` of the target `name` so that it still means something, by `seed`; every
/// other time as libFuzzer does. `data` is as long as inputs may become, `len` what of it is used.
/// Gives the new length.
pub fn mutate(name: &str, data: &mut [u8], len: usize, seed: u32) -> usize {
    let mut random = Random::new(seed.into());
    if random.below(2) == 0 {
        return libfuzzer_sys::fuzzer_mutate(data, len, data.len());
    }
    let mut changed = data[..len].to_vec();
    (find(name).mutate)(&mut changed, &mut random);
    changed.truncate(data.len());
    data[..changed.len()].copy_from_slice(&changed);
    changed.len()
}

/// The names of all targets, and what each starts from.
pub fn targets() -> impl Iterator<Item = (&'static str, fn() -> Vec<Vec<u8>>)> {
    targets::TARGETS.iter().map(|target| (target.name, target.seeds))
}

/// The `main` of a target.
#[macro_export]
macro_rules! fuzz {
    ($name:literal) => {
        use $crate::libfuzzer_sys;
        $crate::libfuzzer_sys::fuzz_target!(|data: &[u8]| $crate::run($name, data));
        $crate::libfuzzer_sys::fuzz_mutator!(
            |data: &mut [u8], size: usize, max_size: usize, seed: u32| {
                $crate::mutate($name, &mut data[..max_size], size, seed)
            }
        );
    };
}
