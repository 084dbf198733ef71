//! One cycle of the resident worker: what is due, in the order in which events flow.
//!
//! Digest by volume, or by age when few events arrive; readers see the inbox anyway. Every step has its own
//! back-off: a failing storage must not stop the digest. Nor must a slow one: flushes run in a process of their own
//! ([`helper`]) where one is to be had.

use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::consumer::supply::Supply;
use super::helper::{self, Helper};
use super::relay;
use crate::catalog::restore::{self, Waits};
use crate::catalog::{audit, job, storages};
use crate::ingest::digest::{self, Watch, When};
use crate::pg::locks::{LockOn, SessionLock};
use crate::pg::shared::Slot;
use crate::pg::xact::{self, Failure};
use crate::pg::{bgworker, cache, guc, notes};
use crate::tiers::erase::Eraser;
use crate::tiers::gc::{self, Asked};
use crate::tiers::hot::{Hot, Work};
use crate::tiers::{compact, ddl, flush, ids, merge, rewrite, rotate, upkeep};

/// The longest sleep: a COMMIT PREPARED, or a commit in a process without the shared table, wakes nobody.
const IDLE_PAUSE: Duration = Duration::from_secs(1);
const TIERS_INTERVAL: Duration = Duration::from_secs(2);
/// The same while nothing was digested: others may have stored chunks, and chunks get old.
const QUIET_TIERS_INTERVAL: Duration = Duration::from_secs(10);
/// Digests and merges each give way to the other steps after so long.
const DIGEST_TIME: Duration = Duration::from_secs(1);
const MERGE_TIME: Duration = Duration::from_millis(300);
/// Otherwise only collections that got files are looked at for compaction.
const COMPACTION_COUNT_INTERVAL: Duration = Duration::from_secs(600);
/// A COMMIT PREPARED wakes nobody, and a relay may not have been started for want of a slot.
const OUTBOX_INTERVAL: Duration = Duration::from_secs(2);
/// One that was started needs a moment to say so.
const OUTBOX_SOON: Duration = Duration::from_millis(200);
const UPKEEP_INTERVAL: Duration = Duration::from_secs(10);
const IDS_INTERVAL: Duration = Duration::from_secs(5);
/// How long the merging of event ids may keep the digest waiting.
const IDS_BUDGET: Duration = Duration::from_millis(300);
/// Between two cycles where something goes on.
const SHORT_PAUSE: Duration = Duration::from_millis(10);
/// Between two steps of the eraser.
const ERASE_PAUSE: Duration = Duration::from_millis(100);
/// What the cache of blocks gets of each cycle, while there is room to be made.
const CACHE_BUDGET: Duration = Duration::from_millis(20);
const BACK_OFF_MAX: Duration = Duration::from_secs(60);

/// What a step is called in [`crate::pg::shared::STATES`] and in the job table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Step {
    Digest = 1,
    Merge = 2,
    Flush = 3,
    Ddl = 4,
    Gc = 5,
    Rewrite = 6,
    Erase = 7,
    Compact = 8,
}

impl Step {
    fn of(work: Work) -> Self {
        match work {
            Work::Flush => Self::Flush,
            Work::Merge => Self::Merge,
        }
    }

    fn name(self) -> &'static str {
        crate::pg::shared::STATES[self as usize]
    }
}

/// What the resident does while a restore is under way, among [`crate::pg::shared::STATES`].
const RESTORE: u32 = 9;

/// When a failing step (of a collection, or as a whole: 0) may be tried again.
struct BackOff {
    failures: u32,
    until: Instant,
}

pub struct Cycle<'a> {
    slot: &'a Slot,
    watch: Watch,
    hot: Hot,
    helper: Option<Helper>,
    back_off: HashMap<(Step, i32), BackOff>,
    /// When tables and columns are to be made; None: nobody waits for any.
    ddl_due: Option<Instant>,
    /// Events that were waiting after the last look and were not due yet.
    thin: bool,
    /// The last digest gave way before it was done.
    behind: bool,
    /// Something was digested since the last look at the hot tier.
    digested: bool,
    last_look: Instant,
    last_tiers: Instant,
    last_ids: Instant,
    ids: ids::Upkeep,
    /// More ids are to be merged than the last step had time for.
    ids_pending: bool,
    last_upkeep: Instant,
    /// Collections with files to be written anew without deleted events.
    rewrites: Vec<i32>,
    /// A restore was under way at the last look.
    restoring: bool,
    /// The storages are to be seen after, and the helper that does so.
    care: bool,
    carer: Option<Helper>,
    /// Collections to be compacted, the helper that does so, and the entry of the manifest's log from which to look on.
    compactions: BTreeSet<i32>,
    compactor: Option<Helper>,
    compacted_to: Option<i64>,
    compactions_counted: Instant,
    eraser: Eraser,
    /// The eraser has more to do: a step in every cycle.
    erasing: bool,
    cache: cache::Upkeep,
    consumers: Supply,
    last_outbox: Instant,
}

impl<'a> Cycle<'a> {
    pub fn new(slot: &'a Slot) -> Self {
        let past = Instant::now()
            .checked_sub(Duration::from_secs(3600))
            .unwrap_or_else(Instant::now);
        Self {
            slot,
            watch: Watch::default(),
            hot: Hot::default(),
            helper: None,
            back_off: HashMap::new(),
            ddl_due: Some(Instant::now()),
            thin: true,
            behind: false,
            digested: true,
            last_look: past,
            last_tiers: past,
            last_ids: past,
            ids: ids::Upkeep::default(),
            ids_pending: false,
            last_upkeep: past,
            rewrites: Vec::new(),
            restoring: false,
            care: false,
            carer: None,
            compactions: BTreeSet::new(),
            compactor: None,
            compacted_to: None,
            compactions_counted: past,
            eraser: Eraser::default(),
            erasing: false,
            cache: cache::Upkeep::default(),
            consumers: Supply::default(),
            last_outbox: past,
        }
    }

    /// Does what is due and says how long to sleep (a commit wakes earlier).
    pub fn run(&mut self) -> Result<Duration, Failure> {
        if !xact::worker(|| restore::is_over(Waits::No))? {
            self.slot.state.store(RESTORE, Ordering::Relaxed);
            // What is known of the tables is of before.
            self.restoring = true;
            return Ok(IDLE_PAUSE);
        }
        if std::mem::take(&mut self.restoring) {
            *self = Self {
                helper: self.helper.take(),
                carer: self.carer.take(),
                compactor: self.compactor.take(),
                ..Self::new(self.slot)
            };
        }
        let news = self.slot.waiting.load(Ordering::Acquire) > 0;
        let interval = guc::digest_interval();
        if news && !self.behind && self.last_look.elapsed() < interval {
            // Woken in the middle of the interval: let events gather.
            return Ok(interval.saturating_sub(self.last_look.elapsed()));
        }
        if news || self.thin || self.behind || self.last_look.elapsed() >= IDLE_PAUSE {
            self.digest()?;
        }
        match notes::take(|left| xact::worker(|| audit::store(left))) {
            // They wait for the next cycle.
            Err(Failure::Error(error)) => error.warn(),
            outcome => outcome?,
        }
        let outgoing = self.slot.outgoing.load(Ordering::Acquire);
        if self.last_outbox.elapsed()
            >= if outgoing {
                OUTBOX_SOON
            } else {
                OUTBOX_INTERVAL
            }
        {
            self.last_outbox = Instant::now();
            // Without a free slot for a worker it is tried again at the next look.
            relay::start_if_needed(self.slot)?;
        }
        let now = Instant::now();
        if self.slot.schema_changed.swap(false, Ordering::AcqRel) {
            self.ddl_due = Some(now);
        }
        if self.ddl_due.is_some_and(|due| due <= now) && self.may(Step::Ddl, 0) {
            let done = self.attempt(Step::Ddl, 0, ddl::run)?;
            self.ddl_due = done.map_or(Some(now), |synced| synced.again);
        }
        let pause = if self.digested || self.helper.is_some() {
            TIERS_INTERVAL
        } else {
            QUIET_TIERS_INTERVAL
        };
        if self.last_tiers.elapsed() >= pause {
            self.last_tiers = Instant::now();
            self.tiers()?;
        }
        if self.last_ids.elapsed() >= IDS_INTERVAL && self.may(Step::Merge, 0) {
            let mut upkeep = std::mem::take(&mut self.ids);
            let more = self.attempt(Step::Merge, 0, || upkeep.step(IDS_BUDGET))?;
            self.ids = upkeep;
            self.ids_pending = more == Some(true);
            if !self.ids_pending {
                self.last_ids = Instant::now();
            }
        }
        if self.last_upkeep.elapsed() >= UPKEEP_INTERVAL {
            self.last_upkeep = Instant::now();
            self.upkeep()?;
            self.cache.look();
        }
        let evicting = self.cache.step(CACHE_BUDGET);
        match self.consumers.look(self.slot) {
            Err(Failure::Error(error)) => error.warn(),
            outcome => outcome?,
        }
        if self.erasing && self.may(Step::Erase, 0) {
            self.erase()?;
        }
        self.slot.state.store(0, Ordering::Relaxed);
        Ok(self.pause(evicting))
    }

    fn pause(&self, evicting: bool) -> Duration {
        if self.behind && self.may(Step::Digest, 0) {
            return Duration::ZERO;
        }
        if self.ids_pending {
            return SHORT_PAUSE;
        }
        let pause = if self.erasing || evicting {
            ERASE_PAUSE
        } else {
            IDLE_PAUSE
        };
        match self.ddl_due {
            Some(due) if self.may(Step::Ddl, 0) => {
                let left = due.saturating_duration_since(Instant::now());
                pause.min(left.max(SHORT_PAUSE))
            }
            _ => pause,
        }
    }

    fn digest(&mut self) -> Result<(), Failure> {
        if !self.may(Step::Digest, 0) {
            return Ok(());
        }
        self.last_look = Instant::now();
        self.slot.waiting.store(0, Ordering::Release);
        let mut watch = std::mem::take(&mut self.watch);
        let outcome = self.attempt(Step::Digest, 0, || {
            let Some(_lock) = SessionLock::try_take(LockOn::Digest) else {
                return Ok(None);
            };
            let began = Instant::now();
            let mut total = watch.look(When::Due)?;
            while total.more && began.elapsed() < DIGEST_TIME {
                let look = watch.look(When::Due)?;
                total.waiting = look.waiting;
                total.more = look.more;
                total.events += look.events;
                total.schema_changed |= look.schema_changed;
            }
            Ok(Some(total))
        })?;
        self.watch = watch;
        self.behind = false;
        if let Some(Some(look)) = outcome {
            self.thin = look.waiting > 0;
            self.behind = look.more;
            if look.schema_changed {
                self.ddl_due = Some(Instant::now());
            }
            self.digested |= look.events > 0;
        }
        Ok(())
    }

    /// Merge and flush, by collection.
    fn tiers(&mut self) -> Result<(), Failure> {
        self.digested = false;
        self.helper_ended()?;
        self.hot.refresh()?;
        let began = Instant::now();
        let mut slow = Vec::new();
        for (id, work) in self.hot.due() {
            let helped = self.helper.as_ref().is_some_and(|h| h.works_on(id));
            if helped || !self.may(Step::of(work), id) {
                continue;
            }
            if work == Work::Flush || self.behind {
                slow.push((id, work));
            } else if began.elapsed() < MERGE_TIME {
                self.work_on(id, work)?;
            } else {
                // More is due than there is time for now.
                self.digested = true;
            }
        }
        self.care()?;
        let mut rewrites = std::mem::take(&mut self.rewrites);
        rewrites.retain(|id| self.may(Step::Rewrite, *id));
        if self.helper.is_some() {
            return Ok(());
        }
        // Those whose storage is away are not tried one by one.
        let held_up = xact::worker(storages::collections_held_up)?;
        slow.retain(|(id, work)| *work == Work::Merge || !held_up.contains(id));
        if slow.is_empty() && rewrites.is_empty() {
            return Ok(());
        }
        slow.truncate(helper::MOST);
        rewrites.truncate(helper::MOST - slow.len());
        for id in &rewrites {
            // Forgotten once there is nothing to rewrite any more.
            self.put_off(Step::Rewrite, *id);
        }
        match Helper::start(slow, &rewrites) {
            Ok(helper) => self.helper = Some(helper),
            Err(slow) => {
                // No free slot for a worker: the digest waits meanwhile, and rewrites wait for a slot.
                for (id, work) in slow {
                    self.work_on(id, work)?;
                }
            }
        }
        Ok(())
    }

    /// Has the storages seen after where that is due: by a helper of its own, since a large bucket takes its time.
    fn care(&mut self) -> Result<(), Failure> {
        let _ended = Helper::ended(&mut self.carer);
        if !self.care || self.carer.is_some() {
            return Ok(());
        }
        self.care = false;
        self.carer = Helper::care();
        // Without a free slot for a worker the digest waits meanwhile.
        if self.carer.is_none() && self.may(Step::Gc, 0) {
            self.attempt(Step::Gc, 0, || gc::storages(Asked::ByTime))?;
        }
        Ok(())
    }

    fn work_on(&mut self, id: i32, work: Work) -> Result<(), Failure> {
        self.attempt(Step::of(work), id, || match work {
            Work::Flush => flush::try_collection(id).map(|_| ()),
            Work::Merge => merge::collection(id).map(|_| ()),
        })?;
        self.hot.reread(id)?;
        Ok(())
    }

    /// Notes what the helper has done, once it is through; what it could not do is put off.
    fn helper_ended(&mut self) -> Result<(), Failure> {
        let Some(done) = Helper::ended(&mut self.helper) else {
            return Ok(());
        };
        for (id, work) in done {
            let step = Step::of(work);
            if self.hot.reread(id)? {
                self.back_off.remove(&(step, id));
            } else {
                self.put_off(step, id);
            }
        }
        Ok(())
    }

    /// What nobody waits for: rotation, parked events, garbage.
    fn upkeep(&mut self) -> Result<(), Failure> {
        if self.may(Step::Gc, 0) {
            self.attempt(Step::Gc, 0, || {
                if let Some(_lock) = SessionLock::try_take(LockOn::Digest) {
                    digest::readmit_restored()?;
                    digest::retry_parked()?;
                    rotate::run()?;
                    upkeep::run()?;
                }
                upkeep::names_and_logs()?;
                upkeep::dropped_collections()?;
                gc::tables()
            })?;
            self.care |= self.attempt(Step::Gc, 0, gc::is_due)?.unwrap_or(false);
        }
        if let Some(due) = self.attempt(Step::Rewrite, 0, rewrite::due)? {
            self.back_off
                .retain(|(step, id), _| *step != Step::Rewrite || *id == 0 || due.contains(id));
            self.rewrites = due;
        }
        self.compact()?;
        self.erasing = true;
        // A column or table may have been dropped or denied by hand.
        self.ddl_due = Some(Instant::now());
        Ok(())
    }

    /// Finds collections with too many small files or with expired events, and has a helper see to them.
    fn compact(&mut self) -> Result<(), Failure> {
        if self.may(Step::Compact, 0) {
            if self.compactions_counted.elapsed() >= COMPACTION_COUNT_INTERVAL {
                self.compactions_counted = Instant::now();
                self.compacted_to = None;
            }
            let after = self.compacted_to;
            if let Some((due, newest)) = self.attempt(Step::Compact, 0, || compact::due(after))? {
                self.compacted_to = Some(newest);
                self.compactions.extend(due);
                let due = &self.compactions;
                self.back_off
                    .retain(|(step, id), _| *step != Step::Compact || *id == 0 || due.contains(id));
            }
        }
        let _ended = Helper::ended(&mut self.compactor);
        if self.compactor.is_some() {
            return Ok(());
        }
        if self.compactions.is_empty() {
            return Ok(());
        }
        let held_up = xact::worker(storages::collections_held_up)?;
        let due: Vec<i32> = (self.compactions.iter().copied())
            .filter(|id| self.may(Step::Compact, *id) && !held_up.contains(id))
            .take(helper::MOST)
            .collect();
        if due.is_empty() {
            return Ok(());
        }
        // Without a free slot they wait for one.
        self.compactor = Helper::compact(&due);
        if self.compactor.is_some() {
            for id in due {
                self.put_off(Step::Compact, id);
                self.compactions.remove(&id);
            }
        }
        Ok(())
    }

    /// A bounded step of the eraser, so that events never wait for it.
    fn erase(&mut self) -> Result<(), Failure> {
        let mut eraser = std::mem::take(&mut self.eraser);
        let outcome = self.attempt(Step::Erase, 0, || eraser.step())?;
        self.erasing = outcome.unwrap_or(false);
        self.eraser = eraser;
        Ok(())
    }

    fn may(&self, step: Step, id: i32) -> bool {
        self.back_off
            .get(&(step, id))
            .is_none_or(|b| Instant::now() >= b.until)
    }

    /// Runs a step. None: it failed and was put off; only the loss of the extension ends the cycle.
    fn attempt<T>(
        &mut self,
        step: Step,
        id: i32,
        work: impl FnOnce() -> Result<T, Failure>,
    ) -> Result<Option<T>, Failure> {
        self.slot.state.store(step as u32, Ordering::Relaxed);
        bgworker::show(Some(match step {
            Step::Digest => c"rakam digest",
            Step::Merge => c"rakam merge",
            Step::Flush => c"rakam flush",
            Step::Ddl => c"rakam ddl",
            Step::Gc => c"rakam gc",
            Step::Rewrite => c"rakam rewrite",
            Step::Erase => c"rakam erase",
            Step::Compact => c"rakam compact",
        }));
        let outcome = work();
        bgworker::show(None);
        match outcome {
            Ok(value) => {
                if self.back_off.remove(&(step, id)).is_some() {
                    xact::in_passing(|| job::succeeded(step.name(), id))?;
                }
                Ok(Some(value))
            }
            Err(Failure::ExtensionGone) => Err(Failure::ExtensionGone),
            Err(Failure::Error(error)) => {
                self.put_off(step, id);
                error.clone().warn();
                xact::in_passing(|| job::failed(step.name(), id, &error.message))?;
                Ok(None)
            }
        }
    }

    fn put_off(&mut self, step: Step, id: i32) {
        let entry = self.back_off.entry((step, id)).or_insert(BackOff {
            failures: 0,
            until: Instant::now(),
        });
        let pause = Duration::from_secs(1 << entry.failures.min(6)).min(BACK_OFF_MAX);
        entry.failures += 1;
        entry.until = Instant::now() + pause;
    }
}
