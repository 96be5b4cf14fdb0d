//! `vhdfs compact`.

use std::cell::Cell;
use std::io::{self, Write};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use vhdfs::compact::{CompactOptions, CompactReport, Operation};
use vhdfs::disk::{Children, Disk, DiskType, OpenOptions};
use vhdfs::error::CompactError;
use vhdfs::storage::host::{HostFile, PATIENCE};

use super::targets::{LeftAlone, Target, Targets};
use super::unsparse::{fill, predict};
use super::{Report, Tally, about, children_of, count_of_children, for_each_file, listed, name};
use crate::cli::{CompactArguments, Mode, PunchHoles};
use crate::options::Share;
use crate::text::{Bytes, output, plain, say};
use crate::{Failure, Outcome};

/// How often progress is drawn and an interrupt is looked for.
const TICK: Duration = Duration::from_millis(50);

/// How long others are waited for without a word.
const SILENT: Duration = Duration::from_secs(1);

#[derive(Serialize)]
struct Compacted {
    file: String,
    length_before: u64,
    length_after: u64,
    allocated_before: u64,
    allocated_after: u64,
    blocks_dropped: u64,
    blocks_moved: u64,
    bytes_read: u64,
    kept: Vec<Kept>,
    /// The partitions and volumes, if the guest's filesystems were asked.
    partitions: Vec<Partition>,
    /// Why they were not, or no longer believed, though that was wanted.
    not_fs_aware: Option<String>,
    children: Vec<String>,
    /// Bytes of holes that were filled in the end, if that was wanted.
    #[serde(skip_serializing_if = "Option::is_none")]
    holes_filled: Option<u64>,
    /// Whether disks that were made over this one are refused from now on.
    new_identity: bool,
    #[serde(skip)]
    dry_run: bool,
}

#[derive(Serialize)]
struct Kept {
    reason: String,
    bytes: u64,
}

#[derive(Serialize)]
struct Partition {
    name: String,
    filesystem: Option<&'static str>,
    size: u64,
    free: u64,
    reclaimed: u64,
    skipped: Option<String>,
    journal_replayed: bool,
}

/// Runs the command.
pub(crate) fn run(arguments: &CompactArguments) -> Result<Outcome, Failure> {
    let interrupted = Arc::new(AtomicBool::new(false));
    watch_for_interrupts(&interrupted)?;
    let targets = Targets::of(&arguments.files, arguments.recursive);
    let mut total = Total::default();
    let tally = for_each_file(&targets, arguments.json, |target| {
        if interrupted.load(Ordering::Relaxed) {
            return Err(about(
                &target.file,
                &io::Error::other("interrupted before it was begun"),
            ));
        }
        let done = compact_file(target, arguments, &interrupted)?;
        total.add(&done);
        Ok(done)
    })?;
    if targets.has_directory && !targets.list.is_empty() && !arguments.json {
        total.print(&tally, arguments.dry_run)?;
    }
    Ok(tally.outcome())
}

/// What all files that were compacted came to.
#[derive(Clone, Copy, Debug, Default)]
struct Total {
    length_before: u64,
    length_after: u64,
    allocated_before: u64,
    allocated_after: u64,
}

impl Total {
    fn add(&mut self, done: &Compacted) {
        for (sum, bytes) in [
            (&mut self.length_before, done.length_before),
            (&mut self.length_after, done.length_after),
            (&mut self.allocated_before, done.allocated_before),
            (&mut self.allocated_after, done.allocated_after),
        ] {
            *sum = sum.saturating_add(bytes);
        }
    }

    fn print(self, tally: &Tally, dry_run: bool) -> io::Result<()> {
        let (done, left, failed) = (tally.done, tally.left_alone, tally.failed);
        let (before, after) = (Bytes(self.length_before), Bytes(self.length_after));
        let (stored, stays) = (Bytes(self.allocated_before), Bytes(self.allocated_after));
        let would = if dry_run { "would be " } else { "" };
        let text = format!(
            "in all: {done} {would}compacted, {left} left alone, {failed} failed; {would}{before} -> {after}, \
             stored on host {would}{stored} -> {stays}\n"
        );
        output(text.as_bytes())
    }
}

/// The first SIGINT (Ctrl-C) or SIGTERM sets the flag; a second one ends the program there and then,
/// which leaves a file that is safe but not as short as it could be.
#[cfg(unix)]
fn watch_for_interrupts(interrupted: &Arc<AtomicBool>) -> Result<(), Failure> {
    use signal_hook::consts::{SIGINT, SIGTERM};
    for signal in [SIGINT, SIGTERM] {
        signal_hook::flag::register_conditional_shutdown(signal, 1, interrupted.clone())?;
        signal_hook::flag::register(signal, interrupted.clone())?;
    }
    Ok(())
}

/// The same for Ctrl-C and Ctrl-Break. When the window is closed, or the user logs off, Windows ends the
/// program as soon as the flag is set.
#[cfg(windows)]
fn watch_for_interrupts(interrupted: &Arc<AtomicBool>) -> Result<(), Failure> {
    let interrupted = interrupted.clone();
    Ok(ctrlc::set_handler(move || {
        if interrupted.swap(true, Ordering::Relaxed) {
            std::process::exit(1);
        }
    })?)
}

/// Why a disk that was found in a directory is not compacted unless it is named itself.
fn not_by_the_way(is_fixed: bool, children: &Children) -> Option<String> {
    match children.files.len() {
        _ if is_fixed => Some("a fixed disk, whose file always has its full length".to_owned()),
        0 => None,
        number => {
            let children = count_of_children(number);
            Some(format!(
                "parent of {children}; it can be compacted by its own name"
            ))
        }
    }
}

/// Fails where a disk would give back less than is wanted.
fn check_reclaim(
    file: &Path,
    disk: &Arc<Disk>,
    options: CompactOptions,
    wanted: Share,
    interrupted: &AtomicBool,
) -> Result<(), Failure> {
    let look = CompactOptions {
        dry_run: true,
        ..options
    };
    let found = attend(file, disk.compact(&look), interrupted);
    let found = found.map_err(|error| about(file, &error))?;
    let shorter = found.length_before.saturating_sub(found.length_after);
    let less_stored = (found.allocated_before).saturating_sub(found.allocated_after);
    let (gain, wanted) = (shorter.max(less_stored), wanted.of(found.length_before));
    if gain >= wanted {
        return Ok(());
    }
    let (gain, wanted) = (Bytes(gain), Bytes(wanted));
    Err(LeftAlone(format!("{gain} to be had, less than {wanted}")).into())
}

fn compact_file(
    target: &Target,
    arguments: &CompactArguments,
    interrupted: &AtomicBool,
) -> Result<Compacted, Failure> {
    let storage = target.open(arguments.dry_run)?;
    match arguments.dry_run {
        true => target.check_writable(&storage)?,
        false => have_alone(target, &storage, arguments.quiet.time, interrupted)?,
    }
    let mut done = compact_disk(target, &storage, arguments, interrupted)?;
    if arguments.unsparse {
        done.unsparse(&target.file, &storage, interrupted)?;
    }
    Ok(done)
}

fn compact_disk(
    target: &Target,
    storage: &Arc<HostFile>,
    arguments: &CompactArguments,
    interrupted: &AtomicBool,
) -> Result<Compacted, Failure> {
    let (file, dry_run) = (&*target.file, arguments.dry_run);
    let punch_holes = arguments.punch_holes == PunchHoles::On;
    let open = OpenOptions {
        read_only: dry_run,
        punch_holes,
        ..OpenOptions::default()
    };
    let mut disk = target.disk(storage, &open, &arguments.parents)?;
    let before = disk.info().map_err(|error| about(file, &error))?;
    let is_fixed = before.disk_type == DiskType::Fixed;
    let mut plan = Plan::of(file, &disk, arguments);
    let not_now = |plan: &Plan| {
        (target.is_found() || arguments.unsparse && is_fixed)
            .then(|| not_by_the_way(is_fixed, &plan.children))
            .flatten()
    };
    match not_now(&plan) {
        Some(_) if arguments.unsparse => return Ok(untouched(file, &disk, dry_run)),
        Some(reason) => return Err(LeftAlone(reason).into()),
        None => {}
    }
    if let Some(wanted) = arguments.min_reclaim {
        check_reclaim(file, &disk, plan.options, wanted, interrupted)?;
    }
    let mut result = attend(file, disk.compact(&plan.options), interrupted);
    while matches!(result, Err(CompactError::Wanted)) && storage.is_wanted_to_read() {
        // It gets the file as it ought to be, and keeps it as long as it likes.
        disk.close().map_err(|error| about(file, &error))?;
        drop(disk);
        storage.lend().map_err(|error| about(file, &error))?;
        have_alone(target, storage, arguments.quiet.time, interrupted)?;
        // It may have made a child of the disk, which so becomes another one again before it loses anything.
        disk = target.disk(storage, &open, &arguments.parents)?;
        plan = Plan::of(file, &disk, arguments);
        if let Some(reason) = not_now(&plan) {
            return Err(LeftAlone(reason).into());
        }
        result = attend(file, disk.compact(&plan.options), interrupted);
    }
    // Also after a failure: what was done is to be durable, and the file clean.
    let closed = disk.close();
    match (result, closed) {
        (Ok(report), Ok(())) => Ok(Compacted {
            not_fs_aware: match plan.reliance {
                None => report.not_surveyed.clone(),
                Some(reason) => {
                    asks_filesystems(arguments).then(|| match &plan.children.files[..] {
                        [] => format!("{reason} (--no-children: there is none)"),
                        _ => reason,
                    })
                }
            },
            children: plan
                .children
                .files
                .iter()
                .map(|child| name(child))
                .collect(),
            ..describe(file, report, dry_run)
        }),
        (Ok(_), Err(error)) => Err(about(file, &error)),
        (Err(error), _) => {
            let length = std::fs::metadata(file).map_or(before.file_length, |found| found.len());
            if length < before.file_length {
                let (from, to) = (Bytes(before.file_length), Bytes(length));
                say(&format!(
                    "{}: shortened from {from} to {to} so far",
                    file.display()
                ));
            }
            Err(about(file, &error))
        }
    }
}

/// What is done to a disk with the children that it has now.
struct Plan {
    children: Children,
    /// Why these, or others, may rely on what is free in it.
    reliance: Option<String>,
    options: CompactOptions,
}

impl Plan {
    fn of(file: &Path, disk: &Disk, arguments: &CompactArguments) -> Self {
        let children = children_of(file, disk);
        // Other disks read what is free here, too.
        let reliance = disk.keeps_free_space(&children, arguments.no_children);
        let (length, allocated) = disk.size_at_open();
        let is_sparse = allocated < length;
        let options = CompactOptions {
            dry_run: arguments.dry_run,
            scan: matches!(arguments.mode, Mode::Full | Mode::Prezeroed),
            punch_holes: arguments.punch_holes == PunchHoles::On,
            drop_identical: !arguments.keep_identical,
            fs_aware: asks_filesystems(arguments) && reliance.is_none(),
            // Windows attaches no sparse file, so there it takes the user's word to make more of it so.
            punch_free: arguments.punch_holes == PunchHoles::Auto
                && is_sparse
                && !arguments.unsparse
                && !cfg!(windows),
            free_swap: arguments.free_swap,
            replay_journal: arguments.replay_journal,
            no_children: arguments.no_children,
            ..CompactOptions::default()
        };
        Self {
            children,
            reliance,
            options,
        }
    }
}

fn asks_filesystems(arguments: &CompactArguments) -> bool {
    matches!(arguments.mode, Mode::Full | Mode::Quick) && !arguments.no_fs_aware
}

/// Sees to it that nobody else has the file open, who then waits until it is closed or lent.
fn have_alone(
    target: &Target,
    storage: &HostFile,
    quiet_time: Duration,
    interrupted: &AtomicBool,
) -> Result<(), Failure> {
    let said = Cell::new(false);
    let wait = |waited: Duration| {
        if waited > SILENT && !said.replace(true) {
            let holder = storage.holder();
            let file = target.file.display();
            say(&format!("{file}: waiting for another program: {holder}"));
        }
        waited < PATIENCE && !interrupted.load(Ordering::Relaxed)
    };
    (storage.claim(quiet_time, &wait)).map_err(|problem| target.not_opened(&problem))
}

/// Draws nothing where stderr is no terminal.
pub(super) fn progress_bar() -> ProgressBar {
    let bar = ProgressBar::new(0);
    let template = "{msg} {bar:30} {bytes}/{total_bytes} {eta}";
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style.progress_chars("##."));
    }
    bar
}

/// Waits for the operation to end, drawing its progress on a terminal, and passes an interrupt on.
fn attend(
    file: &Path,
    operation: Operation,
    interrupted: &AtomicBool,
) -> Result<CompactReport, CompactError> {
    let bar = progress_bar();
    let label = plain(&name(file));
    while !operation.is_finished() {
        if interrupted.load(Ordering::Relaxed) {
            operation.cancel();
        }
        let progress = operation.progress();
        bar.set_message(format!("{label} {:?}", progress.phase));
        bar.set_length(progress.total);
        bar.set_position(progress.completed);
        std::thread::sleep(TICK);
    }
    bar.finish_and_clear();
    operation.wait()
}

fn describe(file: &Path, report: CompactReport, dry_run: bool) -> Compacted {
    let kept = report.kept.into_iter().map(|kept| Kept {
        reason: kept.reason,
        bytes: kept.bytes,
    });
    let partitions = report.parts.into_iter().map(|part| Partition {
        name: part.name,
        filesystem: part.content,
        size: part.size,
        free: part.free,
        reclaimed: part.reclaimed,
        skipped: part.skipped,
        journal_replayed: part.journal_replayed,
    });
    Compacted {
        file: name(file),
        length_before: report.length_before,
        length_after: report.length_after,
        allocated_before: report.allocated_before,
        allocated_after: report.allocated_after,
        blocks_dropped: report.blocks_dropped,
        blocks_moved: report.blocks_moved,
        bytes_read: report.bytes_read,
        kept: kept.collect(),
        partitions: partitions.collect(),
        not_fs_aware: None,
        children: Vec::new(),
        holes_filled: None,
        new_identity: report.new_identity,
        dry_run,
    }
}

/// A disk that only its holes are to be filled of.
fn untouched(file: &Path, disk: &Disk, dry_run: bool) -> Compacted {
    let (length, allocated) = disk.size_at_open();
    let report = CompactReport {
        length_before: length,
        length_after: length,
        allocated_before: allocated,
        allocated_after: allocated,
        ..CompactReport::default()
    };
    describe(file, report, dry_run)
}

impl Compacted {
    /// Fills the holes, once all else is done.
    fn unsparse(
        &mut self,
        file: &Path,
        storage: &HostFile,
        interrupted: &AtomicBool,
    ) -> Result<(), Failure> {
        let (length, allocated) = (self.length_after, self.allocated_after);
        let done = match self.dry_run {
            true => predict(file, length, allocated, self.allocated_before)?,
            false => fill(file, storage, interrupted)?,
        };
        self.holes_filled = Some(done.filled);
        self.allocated_after = done.allocated;
        Ok(())
    }
}

impl Partition {
    fn print(&self, out: &mut dyn Write, would: &str) -> io::Result<()> {
        let size = Bytes(self.size);
        write!(out, "  {}, {size}", self.name)?;
        if let Some(filesystem) = self.filesystem {
            write!(out, ", {filesystem}")?;
        }
        match &self.skipped {
            Some(reason) => writeln!(out, ": all in use: {reason}"),
            None => {
                let (free, reclaimed) = (Bytes(self.free), Bytes(self.reclaimed));
                let journal = match self.journal_replayed {
                    true => ", not unmounted, read as its journal has it",
                    false => "",
                };
                writeln!(
                    out,
                    "{journal}: {free} free, {reclaimed} of it {would}given back"
                )
            }
        }
    }
}

impl Report for Compacted {
    fn print(&self, out: &mut dyn Write) -> io::Result<()> {
        let would = if self.dry_run { "would be " } else { "" };
        writeln!(
            out,
            "{}: {would}{} -> {}, {} blocks dropped, {} moved",
            plain(&self.file),
            Bytes(self.length_before),
            Bytes(self.length_after),
            self.blocks_dropped,
            self.blocks_moved
        )?;
        let (before, after) = (Bytes(self.allocated_before), Bytes(self.allocated_after));
        writeln!(out, "  stored on host {would}{before} -> {after}")?;
        if let Some(filled) = self.holes_filled {
            writeln!(out, "  {} of holes {would}filled", Bytes(filled))?;
        }
        for part in &self.partitions {
            part.print(out, would)?;
        }
        if let Some(reason) = &self.not_fs_aware {
            writeln!(out, "  what filesystems call free stays: {reason}")?;
        }
        if self.new_identity {
            writeln!(
                out,
                "  {would}given a new identity, so that no disk over it is misled (--no-children keeps \
                 the old one of a VHD)"
            )?;
        }
        for kept in &self.kept {
            writeln!(out, "  kept {}: {}", Bytes(kept.bytes), kept.reason)?;
        }
        if !self.children.is_empty() {
            let (count, names) = (
                count_of_children(self.children.len()),
                listed(&self.children),
            );
            writeln!(
                out,
                "  parent of {count}: {names}; what they read stays as it is"
            )?;
        }
        Ok(())
    }

    fn has_problems(&self) -> bool {
        false
    }
}
