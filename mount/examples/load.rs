//! The guest of `scripts/bench --only online`: asks a disk for so many operations a second, whatever the disk answers
//! ("open loop"), and says how long each took from the moment when it was due.
//!
//! `load FILE RANGES WHAT SECONDS`: RANGES is a file with a line `live OFFSET LENGTH` or `dead OFFSET LENGTH` for each part of
//! the disk. What is dead is discarded first, then `ready` is printed, then the load goes to what is live, with `O_DIRECT`,
//! for SECONDS or until standard input ends. WHAT is
//!
//! - a number: as many operations of 4 KiB a second, or none, anywhere; 7 of 10 are reads, each fifth write is followed by an fdatasync;
//! - `full`: the same, four at a time, each as soon as the one before is done;
//! - `stream`: 50 MiB a second written one after the other, 1 MiB each, with an fdatasync each second.
//!
//! fio keeps such rates, too, but counts no time that a request was late to begin with, as one that follows a slow sync is, and
//! leaves the sync out of the write's time.

#[cfg(not(target_os = "linux"))]
fn main() {
    eprintln!("the load is for a FUSE mount and runs on Linux only");
}

#[cfg(target_os = "linux")]
fn main() -> std::io::Result<()> {
    load::run(&std::env::args().skip(1).collect::<Vec<_>>())
}

#[cfg(target_os = "linux")]
mod load {
    use std::fs::{self, File};
    use std::io::{self, Read, Write};
    use std::os::unix::fs::{FileExt, OpenOptionsExt};
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
    use std::time::{Duration, Instant};

    use rustix::fs::{FallocateFlags, OFlags, fallocate};

    const PAGE: u64 = 4096;
    const MIB: u64 = 1 << 20;
    /// More requests than that are never under way; what is due then counts as late.
    const THREADS: u64 = 32;
    const FULL_THREADS: u64 = 4;
    const STREAM_RATE: u64 = 50;

    #[derive(Clone, Copy, PartialEq)]
    enum What {
        Rate(u64),
        Full,
        Stream,
    }

    impl What {
        fn parse(text: &str) -> io::Result<What> {
            match text {
                "full" => Ok(What::Full),
                "stream" => Ok(What::Stream),
                number => number.parse().map(What::Rate).map_err(io::Error::other),
            }
        }

        fn threads(self) -> u64 {
            match self {
                What::Rate(rate) => rate.min(THREADS),
                What::Full => FULL_THREADS,
                What::Stream => THREADS,
            }
        }

        /// When the operation of that number is due, if not at once.
        fn due(self, number: u64) -> Option<Duration> {
            let rate = match self {
                What::Rate(rate) => rate,
                What::Full => return None,
                What::Stream => STREAM_RATE,
            };
            Some(Duration::from_nanos(number * 1_000_000_000 / rate))
        }

        fn length(self) -> u64 {
            if self == What::Stream { MIB } else { PAGE }
        }
    }

    /// What all threads have in common.
    struct Load {
        file: File,
        /// Where the live pages are, and the MiB that a stream writes.
        pages: Vec<u64>,
        mebibytes: Vec<u64>,
        what: What,
        started: Instant,
        lasts: Duration,
        stopped: AtomicBool,
        /// The number of the next operation, and how many writes there were.
        next: AtomicU64,
        writes: AtomicU64,
    }

    pub(super) fn run(arguments: &[String]) -> io::Result<()> {
        let [path, ranges, what, seconds] = arguments else {
            return Err(io::Error::other("usage: load FILE RANGES WHAT SECONDS"));
        };
        let direct = OFlags::DIRECT.bits().cast_signed();
        let mut options = File::options();
        let file = options
            .read(true)
            .write(true)
            .custom_flags(direct)
            .open(path)?;
        let what = What::parse(what)?;
        let (mut pages, mut mebibytes) = (Vec::new(), Vec::new());
        for (kind, offset, length) in parts(ranges)? {
            if kind == "live" {
                let end = offset + length;
                pages.extend((offset..end).step_by(1 << 12));
                mebibytes.extend(
                    (offset..end)
                        .step_by(1 << 20)
                        .filter(|place| place + MIB <= end),
                );
            } else {
                let how = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                fallocate(&file, how, offset, length)?;
            }
        }
        file.sync_all()?;
        println!("ready");
        io::stdout().flush()?;
        let load = Load {
            file,
            pages,
            mebibytes,
            what,
            started: Instant::now(),
            lasts: Duration::from_secs_f64(seconds.parse().map_err(io::Error::other)?),
            stopped: AtomicBool::new(false),
            next: AtomicU64::new(0),
            writes: AtomicU64::new(0),
        };
        let mut times = load.work()?;
        let seconds = load.started.elapsed().as_secs_f64();
        times.sort_unstable();
        report(what, &times, seconds);
        // The thread that waits for standard input may wait for ever.
        std::process::exit(0)
    }

    /// Kind, offset and length of each line.
    fn parts(path: &str) -> io::Result<Vec<(String, u64, u64)>> {
        let text = fs::read_to_string(path)?;
        let part = |line: &str| {
            let words: Vec<&str> = line.split(' ').collect();
            let [kind, offset, length] = words[..] else {
                return None;
            };
            Some((kind.to_owned(), offset.parse().ok()?, length.parse().ok()?))
        };
        let parts: Option<Vec<_>> = text.lines().map(part).collect();
        parts.ok_or_else(|| io::Error::other(format!("{path}: not a list of ranges")))
    }

    fn report(what: What, times: &[Duration], seconds: f64) {
        // The least time that so many of a thousand do not exceed.
        let at = |thousandth: usize| {
            let time = times.get((times.len() * thousandth).div_ceil(1000).saturating_sub(1));
            time.map_or("null".to_owned(), |time| {
                format!("{:.1}", time.as_secs_f64() * 1e6)
            })
        };
        println!(
            "{{\"operations\": {}, \"seconds\": {seconds:.3}, \"bytes\": {}, \"p50\": {}, \"p99\": {}, \"p99.9\": {}, \"max\": {}}}",
            times.len(),
            u64::try_from(times.len()).unwrap_or(0) * what.length(),
            at(500),
            at(990),
            at(999),
            at(1000),
        );
    }

    impl Load {
        /// How long each operation took.
        fn work(&self) -> io::Result<Vec<Duration>> {
            let run = |number| move || self.work_of_one(number);
            std::thread::scope(|scope| {
                let works: Vec<_> = (0..self.what.threads())
                    .map(|number| scope.spawn(run(number)))
                    .collect();
                let mut times = Vec::new();
                self.wait_for_the_end();
                for work in works {
                    times.extend(
                        work.join()
                            .map_err(|_| io::Error::other("a thread panicked"))??,
                    );
                }
                Ok(times)
            })
        }

        /// Until standard input ends, or the time is over.
        fn wait_for_the_end(&self) {
            let (said, hears) = std::sync::mpsc::channel();
            // Not one that the scope waits for: it may never end.
            std::thread::spawn(move || {
                let mut rest = Vec::new();
                let _ = io::stdin().read_to_end(&mut rest);
                let _ = said.send(());
            });
            let _ = hears.recv_timeout(self.lasts.saturating_sub(self.started.elapsed()));
            self.stopped.store(true, Ordering::Relaxed);
        }

        fn work_of_one(&self, number: u64) -> io::Result<Vec<Duration>> {
            let length = usize::try_from(self.what.length()).map_err(io::Error::other)?;
            let page = usize::try_from(PAGE).map_err(io::Error::other)?;
            let mut memory = vec![0; length + page];
            let start = memory.as_ptr().align_offset(page);
            let bytes = &mut memory[start..start + length];
            let mut random = Random(0x9e37_79b9_7f4a_7c15 ^ (number + 1));
            let mut times = Vec::new();
            loop {
                let number = self.next.fetch_add(1, Ordering::Relaxed);
                let due = match self.what.due(number) {
                    Some(after) => self.started + after,
                    None => Instant::now(),
                };
                while let Some(left) = due
                    .checked_duration_since(Instant::now())
                    .filter(|left| !left.is_zero())
                {
                    if self.stopped.load(Ordering::Relaxed) {
                        return Ok(times);
                    }
                    std::thread::sleep(left.min(Duration::from_millis(50)));
                }
                if self.stopped.load(Ordering::Relaxed) {
                    return Ok(times);
                }
                match self.what {
                    What::Stream => self.stream(number, bytes, &mut random)?,
                    What::Rate(_) | What::Full => self.mixed(bytes, &mut random)?,
                }
                times.push(due.elapsed());
            }
        }

        fn mixed(&self, bytes: &mut [u8], random: &mut Random) -> io::Result<()> {
            let offset = chosen(&self.pages, random.next())?;
            if random.next() % 10 < 7 {
                return self.file.read_exact_at(bytes, offset);
            }
            random.fill(bytes);
            self.file.write_all_at(bytes, offset)?;
            let write = self.writes.fetch_add(1, Ordering::Relaxed);
            if write % 5 == 4 {
                self.file.sync_data()?;
            }
            Ok(())
        }

        fn stream(&self, number: u64, bytes: &mut [u8], random: &mut Random) -> io::Result<()> {
            let offset = chosen(&self.mebibytes, number)?;
            random.fill(bytes);
            self.file.write_all_at(bytes, offset)?;
            if number % STREAM_RATE == STREAM_RATE - 1 {
                self.file.sync_data()?;
            }
            Ok(())
        }
    }

    /// The place of that number, counted around.
    fn chosen(places: &[u64], number: u64) -> io::Result<u64> {
        let count = u64::try_from(places.len()).unwrap_or(u64::MAX).max(1);
        let place = usize::try_from(number % count)
            .ok()
            .and_then(|index| places.get(index));
        place
            .copied()
            .ok_or_else(|| io::Error::other("no live part is as long as a request"))
    }

    /// xorshift64.
    struct Random(u64);

    impl Random {
        fn next(&mut self) -> u64 {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            self.0
        }

        fn fill(&mut self, bytes: &mut [u8]) {
            for piece in bytes.chunks_exact_mut(8) {
                piece.copy_from_slice(&self.next().to_le_bytes());
            }
        }
    }
}
