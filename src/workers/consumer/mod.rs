//! Consumers: workers that read sources and store what they bring, each record once.
//!
//! A consumer's own thread talks to the database, and to nobody else; the engine's threads talk to the services ([`tasks`]). Its
//! turn: look which sources and splits there are and take a share of them ([`share`]); of the batches that readers have brought
//! take one, prepare it, then store it together with the new positions in one transaction. Nothing is waited for inside a
//! transaction. Sources share the consumer's time: next is always the one that has had least of it.
//!
//! Consumers do not know each other. Who lives is in shared memory: a beat of the engine's threads, which stops when the process is
//! stopped. Who has a split is in its row. A consumer that was taken for dead while it lived finds that out when it stores: its
//! epoch is not the row's, and everything is rolled back.

mod reading;
mod share;
pub mod supply;
mod tasks;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use pgrx::{pg_guard, pg_sys};

use self::reading::Reading;
use self::tasks::Told;
use crate::catalog::projects::{self, Quota};
use crate::catalog::sources::{self, Source};
use crate::ingest::room;
use crate::pg::locks::{LockOn, SessionLock};
use crate::pg::runtime::{self, Port, Runtime, Sender};
use crate::pg::shared::{self, Slot};
use crate::pg::spi::View;
use crate::pg::xact::{self, Failure};
use crate::pg::{PgError, Result, bgworker, exit, memory};
use crate::sources::service::{self, Service};

/// How often a consumer looks at sources and leases; a change of sources wakes it earlier.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
/// How often a consumer shows that its process runs.
const BEAT_INTERVAL: Duration = Duration::from_millis(500);
/// One without a beat for so long is taken for dead.
pub const DEAD_AFTER: Duration = Duration::from_secs(5);
/// Messages of tasks that wait; each reader has two batches on their way at most.
const MESSAGES: usize = 64;
/// How soon a source whose reader failed is begun again: the wait doubles up to the maximum.
const AGAIN_MIN: Duration = Duration::from_secs(1);
const AGAIN_MAX: Duration = Duration::from_secs(30);

/// A called tick reads for so long at most, and ends when nothing has come for so long.
const ROUND_MOST: Duration = Duration::from_secs(60);
const QUIET: Duration = Duration::from_secs(1);

#[pg_guard]
#[unsafe(no_mangle)]
pub extern "C-unwind" fn rakam_consumer_main(argument: pg_sys::Datum) {
    let database = pg_sys::Oid::from(argument.value() as u32);
    bgworker::begin(Some(database));
    exit::without_cleanup();
    memory::keep_freed();
    let Some(slot) = shared::get().and_then(|s| s.find(database)) else {
        return;
    };
    let me = bgworker::my_pid();
    let free = slot.consumers.iter().find(|consumer| {
        (consumer.pid)
            .compare_exchange(0, me, Ordering::AcqRel, Ordering::Acquire)
            .is_ok()
    });
    let Some(place) = free else {
        return;
    };
    exit::on_exit(leave);
    place.since_us.store(xact::now_us(), Ordering::Release);
    place.beat_us.store(clock_us(), Ordering::Release);
    bgworker::show(Some(c"rakam consumer"));
    let outcome = Consumer::new(Some(slot)).map(|mut consumer| {
        consumer.runtime.spawn(async move {
            loop {
                place.beat_us.store(clock_us(), Ordering::Release);
                tokio::time::sleep(BEAT_INTERVAL).await;
            }
        });
        consumer.run_while(|_| true)
    });
    match outcome {
        Ok(Ok(()) | Err(Failure::ExtensionGone)) => {}
        Ok(Err(Failure::Error(error))) | Err(error) => error.warn(),
    }
}

/// Reads what there is now, where no consumers are: in the worker of a called tick. Another one that does so is not waited for.
pub fn round() -> std::result::Result<(), Failure> {
    let Some(_alone) = SessionLock::try_take(LockOn::Consume) else {
        return Ok(());
    };
    exit::without_cleanup();
    let mut consumer = Consumer::new(None).map_err(Failure::Error)?;
    let end = Instant::now() + ROUND_MOST;
    consumer.run_while(|consumer| Instant::now() < end && !consumer.has_settled())
}

/// Before the process lets go of shared memory: its splits are free.
fn leave() {
    if let Some(slot) = shared::get().and_then(|s| s.find(bgworker::my_database())) {
        let me = bgworker::my_pid();
        for place in &slot.consumers {
            if place.pid.load(Ordering::Acquire) == me {
                place.splits.store(0, Ordering::Relaxed);
                place.pid.store(0, Ordering::Release);
            }
        }
    }
}

/// Microseconds since 1970, on any thread.
fn clock_us() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_micros() as i64)
}

/// The consumers of a database that live, in an order that is the same for everybody.
pub fn live(slot: &Slot) -> Vec<i32> {
    let now = clock_us();
    // A beat of the future was made before the clock was put back: the next one is of now, if there is one.
    let is_recent = |beat: i64| now.abs_diff(beat) <= DEAD_AFTER.as_micros() as u64;
    slot.consumers
        .iter()
        .filter(|consumer| is_recent(consumer.beat_us.load(Ordering::Acquire)))
        .map(|consumer| consumer.pid.load(Ordering::Acquire))
        .filter(|pid| *pid != 0)
        .collect()
}

/// A process that reads sources.
struct Consumer {
    me: i32,
    /// None: it stands alone.
    slot: Option<&'static Slot>,
    runtime: Arc<Runtime>,
    told: Sender<Told>,
    port: Port<Told>,
    readings: BTreeMap<i32, Reading>,
    /// Of this consumer's time: what the source that was next had had before.
    had: Duration,
    /// Sources that could not be read: how often, and when they are begun again.
    put_off: HashMap<i32, (u32, Instant)>,
    numbers: u64,
    /// The changes of sources that the last look has seen.
    seen: u64,
    looked: Option<Instant>,
    /// No more events may come in.
    is_full: bool,
}

impl Consumer {
    fn new(slot: Option<&'static Slot>) -> Result<Self> {
        let (told, port) = runtime::port(MESSAGES)?;
        Ok(Self {
            me: bgworker::my_pid(),
            slot,
            // Kept for life: a changed `rakam.threads` must not end what runs.
            runtime: Runtime::current()?,
            told,
            port,
            readings: BTreeMap::new(),
            had: Duration::ZERO,
            put_off: HashMap::new(),
            numbers: 0,
            seen: 0,
            looked: None,
            is_full: false,
        })
    }

    /// Until there is nothing to be read by this process.
    fn run_while(&mut self, goes_on: impl Fn(&Self) -> bool) -> std::result::Result<(), Failure> {
        while goes_on(self) {
            bgworker::reload_if_asked();
            if self.is_look_due() {
                match self.look() {
                    Ok(true) => {}
                    Ok(false) => return self.let_go(),
                    Err(Failure::Error(error)) => error.warn(),
                    Err(gone) => return Err(gone),
                }
                self.looked = Some(Instant::now());
            }
            // All that was said while the last batch was stored: who waits is to be known before the next one.
            let mut pause = self.pause();
            for _ in 0..MESSAGES {
                let Some(Some(told)) = self.port.receive_or_wake(pause) else {
                    break;
                };
                self.hear(told)?;
                pause = Duration::ZERO;
            }
            self.store()?;
        }
        self.let_go()
    }

    /// Whether everything that there was is stored, or cannot be read.
    fn has_settled(&self) -> bool {
        self.looked.is_some()
            && self
                .readings
                .values()
                .all(|reading| reading.has_settled(QUIET))
    }

    fn is_look_due(&mut self) -> bool {
        if let Some(slot) = self.slot {
            let changes = slot.sources_changed.load(Ordering::Acquire);
            if std::mem::replace(&mut self.seen, changes) != changes {
                return true;
            }
        }
        self.looked
            .is_none_or(|looked| looked.elapsed() >= LOOK_INTERVAL)
    }

    /// How long there is nothing to do unless somebody says something.
    fn pause(&self) -> Duration {
        let since = self.looked.map_or(LOOK_INTERVAL, |l| l.elapsed());
        let waiting = self.readings.values().filter_map(Reading::due);
        waiting
            .map(|due| due.saturating_duration_since(Instant::now()))
            .chain([LOOK_INTERVAL.saturating_sub(since)])
            .min()
            .unwrap_or(LOOK_INTERVAL)
    }

    /// Looks which sources there are and takes a share of their splits. False: there is nothing for this consumer.
    fn look(&mut self) -> std::result::Result<bool, Failure> {
        let sources = xact::worker(|| sources::active(View::Current))?;
        let live = match self.slot {
            Some(slot) => live(slot),
            None => vec![self.me],
        };
        if sources.is_empty() || self.is_surplus(&live) {
            return Ok(false);
        }
        self.look_at_room()?;
        // Paused and dropped ones: their splits have other epochs by now, or none.
        self.readings
            .retain(|id, _| sources.iter().any(|source| source.id == *id));
        for source in sources {
            self.look_at(source, &live)?;
        }
        self.count_splits();
        Ok(true)
    }

    /// Whether there are more consumers than there should be, and this one is among those too many.
    fn is_surplus(&self, live: &[i32]) -> bool {
        self.slot.is_some_and(|slot| {
            let wanted = slot.consumers_wanted.load(Ordering::Acquire) as usize;
            live.iter().position(|pid| *pid == self.me) >= Some(wanted)
        })
    }

    fn look_at_room(&mut self) -> std::result::Result<(), Failure> {
        let is_full = xact::worker(|| match room::take(0) {
            Err(error) if error.sqlstate == "53100" => Ok(true),
            outcome => outcome.map(|()| false),
        })?;
        if self.is_full != is_full {
            self.is_full = is_full;
            for reading in self.readings.values_mut() {
                reading.press(is_full)?;
            }
        }
        Ok(())
    }

    fn look_at(&mut self, source: Source, live: &[i32]) -> std::result::Result<(), Failure> {
        let id = source.id;
        if self
            .put_off
            .get(&id)
            .is_some_and(|(_, until)| Instant::now() < *until)
        {
            return Ok(());
        }
        let (service, quota) = match xact::worker(|| Ok((service_of(&source)?, quota_of(&source)?)))
        {
            Ok(found) => found,
            Err(Failure::Error(error)) => return self.cannot(id, &error),
            Err(gone) => return Err(gone),
        };
        if let Some(reading) = self.readings.get_mut(&id)
            && !reading.is_of(&service)
        {
            reading.let_go()?;
            self.readings.remove(&id);
        }
        if !self.readings.contains_key(&id) {
            self.numbers += 1;
            let made = xact::worker(|| {
                let started = (&self.runtime, self.told.clone(), self.numbers);
                Reading::new(source, service, started)
            });
            let mut reading = match made {
                Ok(reading) => reading,
                Err(Failure::Error(error)) => return self.cannot(id, &error),
                Err(gone) => return Err(gone),
            };
            reading.press(self.is_full)?;
            self.readings.insert(id, reading);
        }
        let looked = match self.readings.get_mut(&id) {
            Some(reading) => {
                reading.bound(quota);
                reading.look(self.me, live)
            }
            None => Ok(()),
        };
        self.unless_failed(id, looked)
    }

    /// After an error of a source it is begun anew, and the others go on.
    fn unless_failed(
        &mut self,
        id: i32,
        outcome: std::result::Result<(), Failure>,
    ) -> std::result::Result<(), Failure> {
        match outcome {
            Err(Failure::Error(error)) => {
                error.clone().warn();
                self.cannot(id, &error)
            }
            outcome => outcome,
        }
    }

    /// A source cannot be read as it is; it is tried again later.
    fn cannot(&mut self, id: i32, error: &PgError) -> std::result::Result<(), Failure> {
        if let Some(mut reading) = self.readings.remove(&id) {
            reading.let_go()?;
        }
        let (attempts, until) = self.put_off.entry(id).or_insert((0, Instant::now()));
        let pause = AGAIN_MIN
            .saturating_mul(1 << (*attempts).min(16))
            .min(AGAIN_MAX);
        *attempts += 1;
        *until = Instant::now() + pause;
        xact::worker(|| sources::note_trouble(id, Some(&error.message))).map(drop)
    }

    fn hear(&mut self, told: Told) -> std::result::Result<(), Failure> {
        let by_number = self
            .readings
            .iter_mut()
            .find(|(_, reading)| reading.number == told.number);
        let Some((&id, reading)) = by_number else {
            return Ok(());
        };
        let heard = reading.hear(told.what);
        if reading.has_new_splits() {
            self.looked = None;
        }
        match heard {
            Ok(Some(error)) => self.cannot(id, &error.into()),
            outcome => self.unless_failed(id, outcome.map(drop)),
        }
    }

    /// Stores a batch of the source that has had least time, among those that have one: so one whose batches are slow delays
    /// another one by a single batch. Who had nothing to store meanwhile has no time saved up for it.
    fn store(&mut self) -> std::result::Result<(), Failure> {
        let is_due = |reading: &Reading| reading.due().is_some_and(|due| due <= Instant::now());
        let next = self
            .readings
            .iter_mut()
            .filter(|(_, reading)| is_due(reading))
            .min_by_key(|(_, reading)| reading.had);
        let Some((&id, reading)) = next else {
            return Ok(());
        };
        self.had = self.had.max(reading.had);
        let began = Instant::now();
        let stored = reading.store();
        reading.had = self.had + began.elapsed();
        if reading.is_well() {
            self.put_off.remove(&id);
        }
        if let Ok(true) = stored {
            self.looked = None;
        }
        self.unless_failed(id, stored.map(drop))
    }

    /// Gives all splits back.
    fn let_go(&mut self) -> std::result::Result<(), Failure> {
        for reading in self.readings.values_mut() {
            reading.let_go()?;
        }
        self.readings.clear();
        Ok(())
    }

    fn count_splits(&self) {
        let splits: usize = self.readings.values().map(Reading::splits).sum();
        let mine = |slot: &'static Slot| {
            let places = slot.consumers.iter();
            places
                .filter(|place| place.pid.load(Ordering::Acquire) == self.me)
                .for_each(|place| place.splits.store(splits as u32, Ordering::Relaxed));
        };
        if let Some(slot) = self.slot {
            mine(slot);
        }
    }
}

/// The quota of a source's project.
fn quota_of(source: &Source) -> Result<Quota> {
    let project = projects::by_name(&source.project)?;
    Ok(project.map_or_else(Quota::default, |project| project.quota))
}

/// The service of a source as it is defined now.
fn service_of(source: &Source) -> Result<Service> {
    let server = source.server.as_deref().ok_or_else(|| {
        PgError::new("42704", "the server of the source was dropped")
            .hint("Drop the source, or create it on another server.")
    })?;
    let (kind, service) = service::of(server)?;
    if kind != source.kind {
        return Err(PgError::new(
            "22023",
            format!("the type of server \"{server}\" is not that of the source"),
        ));
    }
    Ok(service)
}
