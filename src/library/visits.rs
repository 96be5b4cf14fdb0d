//! Visits: disks that no guest has opened are opened by background work, compacted, and closed again.
//!
//! A search of the tree now and then says which files have changed since they were last looked through and have
//! been quiet for long enough. They are opened device by device, small ones first, and one at a time; only while
//! one takes long the next ones are opened beside it, up to [`MOST`].

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use super::agent::{Agent, FOREVER, POLL};
use super::device::{Device, Key, Task};
use super::family::{Asked, File, Survey};
use super::open_disks::{Purpose, Refused};
use super::queue::Turned;
use super::turn::pause_after;
use super::turns::{After, Kind};
use crate::compact::{IdlePolicy, Outlook};
use crate::error::ErrorKind;
use crate::storage::host::pin::{Identity, Stamp, Stat};

/// How often the directory is searched for disks that have changed while nobody had them open.
const SEARCH: Duration = Duration::from_secs(60);

/// A visit that takes longer no longer keeps others waiting.
const LONG: Duration = Duration::from_secs(5);

/// How many disks of one device are visited at once at most.
const MOST: usize = 8;

/// What is left of [`Stamp`] when changes that do not concern the content are left out.
type Seen = (SystemTime, u64);

fn seen(stamp: &Stamp) -> Seen {
    (stamp.modified, stamp.len)
}

/// The visits on one device.
#[derive(Default)]
struct Round {
    /// What is to be visited, the smallest first.
    files: BTreeMap<(u64, Identity), PathBuf>,
    /// What is being opened for it.
    begun: Option<(Identity, PathBuf)>,
    /// What is being visited, and since when.
    open: Vec<(Identity, Instant)>,
}

/// What is remembered of the files that nobody has open.
pub(super) struct Visits {
    /// Files that need no visit while they look like this, and whether something was left in them that is too
    /// little while there is room.
    finished: HashMap<Identity, (Seen, bool)>,
    /// How other files looked when they were last seen to change or to be in use, and when that was.
    watched: HashMap<Identity, (Seen, Instant)>,
    /// What was said of files that others use.
    refused: HashMap<Identity, String>,
    /// Disks on which work has failed so many times, and when they were last left alone for it.
    failed: HashMap<Identity, (u32, Instant)>,
    rounds: HashMap<u64, Round>,
    /// A file on each device.
    places: HashMap<u64, PathBuf>,
    next_search: Instant,
    /// A search that is under way.
    searching: Option<Asked>,
    /// What filesystems call free was left to disks that may have had children.
    withheld: bool,
}

impl Visits {
    pub(super) fn new() -> Self {
        Self {
            finished: HashMap::new(),
            watched: HashMap::new(),
            refused: HashMap::new(),
            failed: HashMap::new(),
            rounds: HashMap::new(),
            places: HashMap::new(),
            next_search: Instant::now(),
            searching: None,
            withheld: false,
        }
    }

    pub(super) fn is_finished(&self, stat: &Stat) -> bool {
        let finished = self.finished.get(&stat.identity());
        finished.is_some_and(|(known, _)| *known == seen(&stat.stamp()))
    }

    fn search_within(&mut self, wait: Duration) {
        self.next_search = self.next_search.min(Instant::now() + wait.min(SEARCH));
    }
}

// What turns on disks tell.
impl Agent {
    /// That disk is as it is to be while its file looks like this, or, where `too_little` was left, until the device
    /// is about to be full.
    pub(super) fn finish(&self, stat: &Stat, too_little: bool) {
        let finished = &mut self.visits.lock().finished;
        finished.insert(stat.identity(), (seen(&stat.stamp()), too_little));
    }

    /// What was left on that device is worth a visit now.
    pub(super) fn visit_again(&self, device: &Device) {
        let mut visits = self.visits.lock();
        let before = visits.finished.len();
        let is_here = |disk: &Identity| self.core.devices.number(disk) == device.number;
        (visits.finished).retain(|disk, (_, too_little)| !*too_little || !is_here(disk));
        if visits.finished.len() < before {
            visits.search_within(Duration::ZERO);
            self.core.bell.ring();
        }
    }

    /// Quiet begins anew: somebody is at the file.
    pub(super) fn forget_look(&self, disk: Identity) {
        self.visits.lock().watched.remove(&disk);
    }

    /// There is a file that is to be visited once others are done with it.
    pub(super) fn search_soon(&self) {
        let soon = self.core.options.quiet_time.clamp(POLL, SEARCH);
        self.visits.lock().search_within(soon);
        self.core.bell.ring();
    }

    /// Work on that disk has failed, after so many failures since it was opened. How many it were in all.
    pub(super) fn has_failed(&self, disk: Identity, before: u32) -> u32 {
        let mut visits = self.visits.lock();
        let known = visits.failed.get(&disk).map_or(0, |(count, _)| *count);
        let count = known.max(before).saturating_add(1);
        visits.failed.insert(disk, (count, Instant::now()));
        count
    }

    /// Work on that disk has come to its end.
    pub(super) fn has_recovered(&self, disk: Identity) {
        self.visits.lock().failed.remove(&disk);
    }

    /// Something was left for children that may have been there.
    pub(super) fn withhold(&self) {
        self.visits.lock().withheld = true;
    }

    /// The next one may begin.
    pub(super) fn visit_is_over(&self, device: &Device) {
        device.queue.wake(Key::Visits);
    }
}

// Visits.
impl Agent {
    /// The next visit on that device. `None` where there are no more.
    pub(super) fn visit_turn(&self, device: &Arc<Device>) -> Option<Turned> {
        let place = self.visits.lock().places.get(&device.number).cloned();
        if let Some(path) = place {
            self.look_at_room(device, &path, || {
                let (directory, name) = self.core.host.parent(&path)?;
                directory.child(name)?.space()
            });
        }
        let now = Instant::now();
        let path = {
            let mut visits = self.visits.lock();
            let round = visits.rounds.entry(device.number).or_default();
            let disks = &self.core.disks;
            let is_on = |disk: &Identity| disks.get(disk).is_some_and(|disk| disk.is_visiting());
            round.open.retain(|(disk, _)| is_on(disk));
            // None is to be closed to make room for another.
            let most = (self.core.options.max_open.get() / 8).clamp(1, MOST);
            let is_full = round.open.len() >= most || { round.open.iter() }
                .any(|(_, since)| now.duration_since(*since) < LONG);
            match round.files.pop_first() {
                Some(first) if is_full => {
                    round.files.insert(first.0, first.1);
                    let wait = Self::visits_after(round, POLL);
                    return Some(wait);
                }
                Some(((_, disk), path)) => {
                    round.begun = Some((disk, path.clone()));
                    path
                }
                None => {
                    if round.open.is_empty() {
                        visits.rounds.remove(&device.number);
                    }
                    return None;
                }
            }
        };
        let begun = self.begin_visit(path);
        let mut visits = self.visits.lock();
        let round = visits.rounds.entry(device.number).or_default();
        round.begun = None;
        round.open.extend(begun.map(|disk| (disk, now)));
        Some(Self::visits_after(round, Duration::ZERO))
    }

    /// The file that is being opened for a visit on that device, or one that is there.
    pub(super) fn visited(&self, device: &Device) -> Option<PathBuf> {
        let visits = self.visits.lock();
        let round = visits.rounds.get(&device.number);
        let begun = round.and_then(|round| round.begun.as_ref());
        (begun.map(|(_, path)| path))
            .or_else(|| visits.places.get(&device.number))
            .cloned()
    }

    /// A turn of visits has ended in a panic. The next search says what is left.
    pub(super) fn visits_failed(&self, device: &Device) {
        if let Some(round) = self.visits.lock().rounds.get_mut(&device.number) {
            round.begun = None;
        }
    }

    fn visits_after(round: &Round, wait: Duration) -> Turned {
        let next = round.files.first_key_value();
        let after = After {
            due: Some(Instant::now() + wait),
            worked: wait.is_zero(),
            rest: Duration::ZERO,
            kind: Kind::Look,
            outlook: Outlook {
                gain: 0,
                work: next.map_or(0, |((size, _), _)| *size),
            },
        };
        Turned {
            after,
            holds: false,
        }
    }

    /// Opens a disk for work, if it is still to be. Which one.
    fn begin_visit(&self, path: PathBuf) -> Option<Identity> {
        let found = self.core.find_disk(&path, &self.family()).ok()?;
        let (identity, stamp) = (found.stat.identity(), found.stat.stamp());
        if self.visits.lock().is_finished(&found.stat) {
            return None;
        }
        let opened = (self.core.disks).open(&self.core.probes, found, Purpose::Visit);
        let mut visits = self.visits.lock();
        match opened {
            Ok(handle) => {
                visits.refused.remove(&identity);
                drop(visits);
                drop(handle);
                return Some(identity);
            }
            Err(Refused::Failed(failure)) if failure.kind == ErrorKind::InUse => {
                let before = visits.refused.insert(identity, failure.reason.clone());
                if before.as_ref() != Some(&failure.reason) {
                    log::info!("{}: left alone: {}", path.display(), failure.reason);
                }
                // Quiet begins when they are done.
                let now = Instant::now();
                visits.watched.insert(identity, (seen(&stamp), now));
                drop(visits);
                self.search_soon();
            }
            Err(Refused::Failed(failure)) if !failure.may_pass() => {
                // Not before it has changed.
                visits.finished.insert(identity, (seen(&stamp), false));
            }
            Err(_) => {}
        }
        None
    }
}

// Searches: what the agent's own thread does, without I/O.
impl Agent {
    /// Asks for a search, or goes by its result. When to call again at the latest.
    pub(super) fn search_if_due(&self) -> Instant {
        let now = Instant::now();
        let mut visits = self.visits.lock();
        if let Some(asked) = visits.searching {
            // Which rings when it is over.
            let Some(survey) = self.core.families.answer(asked) else {
                return now + FOREVER;
            };
            visits.searching = None;
            self.search(&mut visits, &survey, now);
        }
        if now >= visits.next_search {
            visits.next_search = now + SEARCH;
            visits.searching = Some(self.core.families.ask());
            return now + FOREVER;
        }
        visits.next_search
    }

    /// Looks through all disks that were found for those that may be worth a visit.
    fn search(&self, visits: &mut Visits, survey: &Survey, now: Instant) {
        let Survey { files, family } = survey;
        let Some(policy) = self.policy.filter(|_| !self.core.options.read_only) else {
            return;
        };
        if visits.withheld && family.unread.is_empty() {
            visits.withheld = false;
            visits.finished.clear();
            let open = self.core.disks.all();
            open.iter().for_each(|disk| disk.look_again());
        }
        let mut present = HashSet::new();
        for round in visits.rounds.values_mut() {
            round.files.clear();
        }
        for file in files {
            let identity = file.stat.identity();
            present.insert(identity);
            let quiet = self.quiet_for(&policy, file);
            let wait = self.wait_for(visits, file, quiet, now);
            let Some(wait) = wait else { continue };
            if !wait.is_zero() {
                visits.search_within(wait);
            } else if !family.is_parent(&identity) {
                let number = self.core.devices.number(&identity);
                let round = visits.rounds.entry(number).or_default();
                if (round.begun.as_ref()).is_none_or(|(begun, _)| *begun != identity) {
                    let key = (file.stat.allocated, identity);
                    round.files.insert(key, file.path.clone());
                }
            }
        }
        self.call_on_devices(visits, files);
        let is_present = |identity: &Identity| present.contains(identity);
        visits.watched.retain(|identity, _| is_present(identity));
        visits.refused.retain(|identity, _| is_present(identity));
        visits.finished.retain(|identity, _| is_present(identity));
        visits.failed.retain(|identity, _| is_present(identity));
    }

    /// Has those devices have a turn on which there is a file to visit, or of which nobody knows any more how much
    /// room they have.
    fn call_on_devices(&self, visits: &mut Visits, files: &[File]) {
        visits.places.clear();
        for file in files {
            let identity = file.stat.identity();
            let number = self.core.devices.number(&identity);
            if visits.places.contains_key(&number) {
                continue;
            }
            visits.places.insert(number, file.path.clone());
            let device = self.core.devices.of(&identity);
            let first =
                (visits.rounds.get(&number)).and_then(|round| round.files.first_key_value());
            if first.is_none() && !device.is_room_unknown() {
                continue;
            }
            let (gain, work) = (0, first.map_or(0, |((size, _), _)| *size));
            let task = Task::Visits(Arc::clone(&device));
            // One that does not come back is not followed by another: the next file may do the same.
            (device.queue).ensure(Key::Visits, task, Outlook { gain, work });
        }
    }

    /// How long the file must not have changed.
    fn quiet_for(&self, policy: &IdlePolicy, file: &File) -> Duration {
        match self.core.probes.is_ours(&file.stat.stamp()) {
            true => policy.idle_after,
            false => policy.idle_after.max(self.core.options.quiet_time),
        }
    }

    /// How long a file is still to be left alone; `None` where it needs no visit.
    fn wait_for(
        &self,
        visits: &mut Visits,
        file: &File,
        quiet: Duration,
        now: Instant,
    ) -> Option<Duration> {
        let (identity, now_seen) = (file.stat.identity(), seen(&file.stat.stamp()));
        let is_open = self.core.disks.get(&identity).is_some();
        if is_open || visits.is_finished(&file.stat) {
            return None;
        }
        // Whoever still writes to it does not always hold a lock. By our own clock: those of the
        // file's host and of the wall may be anywhere.
        let watched = (visits.watched.entry(identity)).or_insert((now_seen, now));
        if watched.0 != now_seen {
            *watched = (now_seen, now);
        }
        let mut wait = quiet.saturating_sub(now.duration_since(watched.1));
        if let Some((count, since)) = visits.failed.get(&identity) {
            wait = wait.max(pause_after(*count).saturating_sub(now.duration_since(*since)));
        }
        Some(wait)
    }
}
