//! One cycle of the resident worker: what is due, in the order in which events flow.
//!
//! Digest by volume, or by age when few events arrive; readers see the inbox anyway. Every step has its own
//! back-off: a failing storage must not stop the digest.

use std::collections::HashMap;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::catalog::{job, manifest};
use crate::ingest::digest::{self, When};
use crate::pg::locks::{LockOn, SessionLock};
use crate::pg::shared::Slot;
use crate::pg::spi::View;
use crate::pg::xact::{self, Failure};
use crate::pg::{PgError, bgworker, guc};
use crate::tiers::{ddl, flush, gc, merge, rotate};

/// The longest sleep: a COMMIT PREPARED, or a commit in a process without the shared table, wakes nobody.
const IDLE_PAUSE: Duration = Duration::from_secs(1);
const TIERS_INTERVAL: Duration = Duration::from_secs(2);
const UPKEEP_INTERVAL: Duration = Duration::from_secs(10);
const BACK_OFF_MAX: Duration = Duration::from_secs(60);

/// What a step is called in [`crate::pg::shared::STATES`] and in the job table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Step {
    Digest = 1,
    Merge = 2,
    Flush = 3,
    Ddl = 4,
    Gc = 5,
}

impl Step {
    fn name(self) -> &'static str {
        crate::pg::shared::STATES[self as usize]
    }
}

/// When a failing step (of a collection, or as a whole: 0) may be tried again.
struct BackOff {
    failures: u32,
    until: Instant,
}

pub struct Cycle<'a> {
    slot: &'a Slot,
    back_off: HashMap<(Step, i32), BackOff>,
    ddl_pending: bool,
    /// Events that were waiting after the last look and were not due yet.
    thin: bool,
    last_look: Instant,
    last_tiers: Instant,
    last_upkeep: Instant,
    hot: bool,
}

impl<'a> Cycle<'a> {
    pub fn new(slot: &'a Slot) -> Self {
        let past = Instant::now()
            .checked_sub(Duration::from_secs(3600))
            .unwrap_or_else(Instant::now);
        Self {
            slot,
            back_off: HashMap::new(),
            ddl_pending: true,
            thin: true,
            last_look: past,
            last_tiers: past,
            last_upkeep: past,
            hot: true,
        }
    }

    /// Does what is due and says how long to sleep (a commit wakes earlier).
    pub fn run(&mut self) -> Result<Duration, Failure> {
        let news = self.slot.waiting.load(Ordering::Acquire) > 0;
        let interval = guc::digest_interval();
        if news && self.last_look.elapsed() < interval {
            // Woken in the middle of the interval: let events gather.
            return Ok(interval.saturating_sub(self.last_look.elapsed()));
        }
        if news || self.thin || self.last_look.elapsed() >= IDLE_PAUSE {
            self.digest()?;
        }
        if self.ddl_pending && self.may(Step::Ddl, 0) {
            let done = self.attempt(Step::Ddl, 0, ddl::run)?;
            self.ddl_pending = done.is_none_or(|d| d.busy > 0);
        }
        if self.hot && self.last_tiers.elapsed() >= TIERS_INTERVAL {
            self.last_tiers = Instant::now();
            self.tiers()?;
        }
        if self.last_upkeep.elapsed() >= UPKEEP_INTERVAL {
            self.last_upkeep = Instant::now();
            self.upkeep()?;
        }
        self.slot.state.store(0, Ordering::Relaxed);
        Ok(if self.ddl_pending {
            Duration::from_millis(200)
        } else {
            IDLE_PAUSE
        })
    }

    fn digest(&mut self) -> Result<(), Failure> {
        if !self.may(Step::Digest, 0) {
            return Ok(());
        }
        self.last_look = Instant::now();
        self.slot.waiting.store(0, Ordering::Release);
        let outcome = self.attempt(Step::Digest, 0, || {
            let Some(_lock) = SessionLock::try_take(LockOn::Digest) else {
                return Ok(None);
            };
            let mut last = digest::look(When::Due)?;
            let mut schema_changed = last.round.schema_changed;
            let mut digested = last.round.events > 0;
            while last.round.more {
                last = digest::look(When::Now)?;
                schema_changed |= last.round.schema_changed;
                digested = true;
            }
            Ok(Some((last.waiting_events, schema_changed, digested)))
        })?;
        if let Some(Some((waiting, schema_changed, digested))) = outcome {
            self.thin = waiting > 0;
            self.ddl_pending |= schema_changed;
            self.hot |= digested;
        }
        Ok(())
    }

    /// Merge and flush, by collection.
    fn tiers(&mut self) -> Result<(), Failure> {
        let hot = xact::worker(|| manifest::hot_state(View::Current, merge::SMALL_ROWS))?;
        self.hot = !hot.is_empty();
        for state in hot {
            let id = state.collection_id;
            let old = state.oldest_age_s >= guc::flush_interval().as_secs_f64();
            if (old || state.bytes >= guc::flush_size_bytes()) && self.may(Step::Flush, id) {
                self.attempt(Step::Flush, id, || flush::try_collection(id))?;
            } else if state.small_chunks >= merge::FAN_IN as i64 && self.may(Step::Merge, id) {
                self.attempt(Step::Merge, id, || merge::collection(id))?;
            }
        }
        Ok(())
    }

    /// What nobody waits for: rotation, parked events, garbage.
    fn upkeep(&mut self) -> Result<(), Failure> {
        if self.may(Step::Gc, 0) {
            self.attempt(Step::Gc, 0, || {
                if let Some(_lock) = SessionLock::try_take(LockOn::Digest) {
                    digest::retry_parked()?;
                    rotate::run()?;
                }
                gc::run()
            })?;
        }
        // A column or table may have been dropped or denied by hand; a COPY has made chunks without a digest.
        self.ddl_pending = true;
        self.hot = true;
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
        }));
        let outcome = work();
        bgworker::show(None);
        match outcome {
            Ok(value) => {
                if self.back_off.remove(&(step, id)).is_some() {
                    xact::worker(|| job::succeeded(step.name(), id))?;
                }
                Ok(Some(value))
            }
            Err(Failure::ExtensionGone) => Err(Failure::ExtensionGone),
            Err(Failure::Error(error)) => {
                self.put_off(step, id, &error);
                xact::worker(|| job::failed(step.name(), id, &error.message))?;
                Ok(None)
            }
        }
    }

    fn put_off(&mut self, step: Step, id: i32, error: &PgError) {
        let entry = self.back_off.entry((step, id)).or_insert(BackOff {
            failures: 0,
            until: Instant::now(),
        });
        let pause = Duration::from_secs(1 << entry.failures.min(6)).min(BACK_OFF_MAX);
        entry.failures += 1;
        entry.until = Instant::now() + pause;
        error.clone().warn();
    }
}
