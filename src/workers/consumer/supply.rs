//! The resident's part: as many consumers as there is work for.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use pgrx::pg_sys;

use super::live;
use crate::catalog::sources;
use crate::pg::bgworker::{self, Worker};
use crate::pg::shared::Slot;
use crate::pg::xact::{self, Failure};
use crate::pg::{PgError, guc};

/// How often it is looked how many consumers there should be: with sources, and without.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
const QUIET_INTERVAL: Duration = Duration::from_secs(10);
/// How soon another one is started after a start: the wait doubles up to the maximum, and begins anew once all have been there
/// for a while.
const START_MIN: Duration = Duration::from_secs(1);
const START_MAX: Duration = Duration::from_secs(60);
const HEALTHY: Duration = Duration::from_secs(60);

#[derive(Default)]
pub struct Supply {
    /// The changes of sources that the last look has seen.
    seen: Option<u64>,
    looked: Option<Instant>,
    wanted: usize,
    /// So many consumers lived at the last look.
    live: usize,
    starts: u32,
    started: Option<Instant>,
    /// It was said that there is no free slot for a worker.
    is_starved: bool,
}

impl Supply {
    /// Starts a consumer if there are too few.
    pub fn look(&mut self, slot: &Slot) -> Result<(), Failure> {
        let changes = Some(slot.sources_changed.load(Ordering::Acquire));
        let interval = match self.wanted {
            0 => QUIET_INTERVAL,
            _ => LOOK_INTERVAL,
        };
        if self.seen == changes && self.looked.is_some_and(|l| l.elapsed() < interval) {
            return Ok(());
        }
        if self.seen != changes {
            // What somebody has just changed is not put off by what was before.
            self.starts = 0;
        }
        self.seen = changes;
        self.looked = Some(Instant::now());
        let most = guc::max_consumers();
        self.wanted = xact::worker(|| sources::demand(most as i64))? as usize;
        slot.consumers_wanted
            .store(self.wanted as u32, Ordering::Release);
        let live = live(slot).len();
        let gone = self.live.min(self.wanted).saturating_sub(live);
        self.live = live;
        slot.consumer_restarts
            .fetch_add(gone as u32, Ordering::Relaxed);
        if live < self.wanted {
            self.start();
        } else {
            self.is_starved = false;
            if self.started.is_some_and(|s| s.elapsed() >= HEALTHY) {
                self.starts = 0;
            }
        }
        Ok(())
    }

    fn start(&mut self) {
        let pause = START_MIN
            .saturating_mul(1 << self.starts.min(16))
            .min(START_MAX);
        let is_early = self.starts > 0 && self.started.is_some_and(|s| s.elapsed() < pause);
        if is_early {
            return;
        }
        self.starts += 1;
        self.started = Some(Instant::now());
        let started = bgworker::start_detached(&Worker {
            kind: "rakam consumer",
            name: "rakam consumer",
            function: "rakam_consumer_main",
            argument: pg_sys::Datum::from(bgworker::my_database()),
            extra: &[],
            notify: false,
            restart_s: None,
        });
        match started {
            Ok(()) => self.is_starved = false,
            Err(error) => {
                if !std::mem::replace(&mut self.is_starved, true) {
                    PgError {
                        message: format!("{}: sources are not read", error.message),
                        ..error
                    }
                    .warn();
                }
            }
        }
    }
}
