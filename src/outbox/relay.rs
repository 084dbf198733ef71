//! The relay: brings the outbox of every store out, batch after batch, several stores at a time.
//!
//! A store has one batch under way at most, so that its batches arrive one after the other. Between a batch's number and the note
//! that it is published nothing here is known for sure: a batch is published again until an attempt says that all of it arrived. A
//! store that struggles gives way to the others after a while, or at once when its server gets another definition, and is tried
//! again later. A store that somebody is about to change is looked at again a moment later: the relay waits for nobody.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rakam_sources::SourceError;
use rakam_sources::publish::{Publish, Refused, Trouble};

use super::lane::{Lane, PAUSE, Published, Work};
use super::parcel::{self, Packed, Topics};
use super::rotate;
use crate::catalog::dead_letter;
use crate::catalog::dropping;
use crate::catalog::event_store::{self, Assigned, EventStore};
use crate::catalog::inbox::TailRow;
use crate::catalog::outbox;
use crate::ingest::learn::{Learner, register};
use crate::pg::runtime::{self, Port, Sender, Task};
use crate::pg::snapshot::Snapshot;
use crate::pg::spi::View;
use crate::pg::xact::{self, Failure};
use crate::pg::{PgError, Result, bgworker, failpoint, shared};
use crate::sources::service::{self, Service};

/// What a batch takes of the outbox, at least one row.
const BATCH_ROWS: i64 = 2_000;
const BATCH_EVENTS: i64 = 20_000;
const BATCH_BYTES: i64 = 4 << 20;
/// Stores that are worked on at a time, and whose batches are in memory at most.
const STORES_AT_A_TIME: usize = 8;
const STORES_IN_MEMORY: usize = 4 * STORES_AT_A_TIME;
/// Of them those that have failed before.
const FAILED_STORES_AT_A_TIME: usize = STORES_AT_A_TIME / 2;
/// How long an attempt may struggle before it gives way, and how long a store that failed waits: longer each time.
const STRUGGLE: Duration = Duration::from_secs(20);
const PAUSE_MOST: Duration = Duration::from_secs(8);
/// A connection that nothing was sent over for so long is closed.
const IDLE: Duration = Duration::from_secs(30);
/// Stores are looked for this often although nobody said that there is work: a COMMIT PREPARED wakes nobody.
const LOOK: Duration = Duration::from_secs(1);
/// Errors are noted, and tables emptied, this often.
const NOTE: Duration = Duration::from_millis(500);
const ROTATE: Duration = Duration::from_secs(5);

/// What a task on the engine's threads tells, with the publisher that it had.
struct Told {
    store_id: i32,
    attempt: u64,
    /// None: it is of no use any more.
    publisher: Option<Box<dyn Publish>>,
    outcome: Outcome,
}

enum Outcome {
    Topics(std::result::Result<Vec<i32>, SourceError>),
    Published(std::result::Result<Vec<Refused>, SourceError>),
}

/// The relay of a database.
pub struct Relay {
    lanes: HashMap<i32, Lane>,
    sender: Sender<Told>,
    port: Port<Told>,
    looked: Option<Instant>,
    noted: Instant,
    rotated: Option<Instant>,
}

/// How a turn ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Turn {
    /// Something is under way, or waits for its next attempt.
    Busy,
    /// Nothing waits for any store.
    Idle,
}

impl Relay {
    pub fn new() -> Result<Self> {
        let (sender, port) = runtime::port(64)?;
        Ok(Self {
            lanes: HashMap::new(),
            sender,
            port,
            looked: None,
            noted: Instant::now(),
            rotated: None,
        })
    }

    /// Takes in what tasks have told, begins what can begin, and waits up to `wait` for news.
    pub fn turn(&mut self, wait: Duration) -> std::result::Result<Turn, Failure> {
        let mut news = false;
        while let Some(Some(told)) = self.port.receive_or_wake(Duration::ZERO) {
            news = true;
            self.hear(told)?;
        }
        let slot = shared::get().and_then(|s| s.find(bgworker::my_database()));
        let called = slot.is_some_and(|slot| {
            slot.outgoing
                .swap(false, std::sync::atomic::Ordering::AcqRel)
        });
        let mut turn = Turn::Busy;
        if news || called || self.looked.is_none_or(|at| at.elapsed() >= LOOK) || self.is_due() {
            self.looked = Some(Instant::now());
            turn = self.begin()?;
        } else if (self.lanes.values()).all(|lane| lane.work.is_none() && lane.due.is_none()) {
            turn = Turn::Idle;
        }
        self.give_way();
        if self.noted.elapsed() >= NOTE {
            self.noted = Instant::now();
            self.note_troubles()?;
            self.lanes.retain(|_, lane| {
                lane.work.is_some()
                    || lane.due.is_some()
                    || lane.used.is_some_and(|used| used.elapsed() < IDLE)
            });
        }
        if self.rotated.is_none_or(|at| at.elapsed() >= ROTATE) {
            self.rotated = Some(Instant::now());
            rotate::run()?;
        }
        if !wait.is_zero()
            && let Some(Some(told)) = self.port.receive_or_wake(wait)
        {
            self.hear(told)?;
            // Its store may go on at once.
            self.looked = None;
        }
        Ok(turn)
    }

    /// Gives space back before the relay ends.
    pub fn end(&mut self) -> std::result::Result<(), Failure> {
        rotate::run()
    }

    /// A store's pause is over.
    fn is_due(&self) -> bool {
        let now = Instant::now();
        let over = |lane: &Lane| !lane.is_under_way() && lane.due.is_some_and(|due| due <= now);
        self.lanes.values().any(over)
    }

    /// Whether every store for which something waits has failed, and nothing is under way.
    pub fn is_stuck(&self) -> bool {
        let mut waiting = self
            .lanes
            .values()
            .filter(|lane| lane.due.is_some())
            .peekable();
        waiting.peek().is_some() && !self.lanes.values().any(Lane::is_under_way)
    }

    /// Begins with the stores that have work, those first that were served longest ago.
    fn begin(&mut self) -> std::result::Result<Turn, Failure> {
        while xact::worker(outbox::readmit)? > 0 {}
        let mut stores = xact::worker(|| event_store::with_work(View::Under(Snapshot::active())))?;
        // Those that failed come last: others, whose broker is there, do not wait for them.
        let has_failed = |lane: &Lane| lane.failures > 0;
        stores.sort_by_key(|(id, _)| self.lanes.get(id).is_some_and(has_failed));
        let mut turn = Turn::Idle;
        let now = Instant::now();
        // A store that failed and has no work any more is forgotten with its failure, and with what was published if it is gone.
        for (id, lane) in &mut self.lanes {
            if !lane.is_under_way() && !stores.iter().any(|(with_work, _)| with_work == id) {
                lane.work = None;
                lane.due = None;
                lane.failures = 0;
            }
        }
        for (id, store) in stores {
            turn = Turn::Busy;
            let lane = self.lanes.entry(id).or_default();
            if lane.is_struggling()
                && let Ok(store) = &store
                && is_redefined(lane, store)?
            {
                lane.give_up();
                lane.due = None;
            }
            let is_due = lane.due.is_none_or(|due| due <= now);
            let (is_under_way, has_work) = (lane.is_under_way(), lane.work.is_some());
            let count = |is: fn(&Lane) -> bool| self.lanes.values().filter(|lane| is(lane)).count();
            // Those that wait to be noted wait for somebody's transaction.
            let tries_again = |lane: &Lane| lane.is_under_way() && lane.failures > 0;
            let is_crowded = self.lanes.get(&id).is_some_and(has_failed)
                && count(tries_again) >= FAILED_STORES_AT_A_TIME;
            let is_full = is_crowded
                || count(Lane::is_under_way) >= STORES_AT_A_TIME
                || count(|lane| lane.work.is_some()) >= STORES_IN_MEMORY;
            let outcome = match store {
                _ if !is_due || is_under_way => continue,
                _ if has_work => self.note_published(id),
                _ if is_full => continue,
                // Its rows are locked until a transaction ends that is dropping the project: no other store waits for that.
                Ok(store) if dropping::is_going(store.project_id) => continue,
                Ok(store) => self.begin_store(&store),
                Err(error) => Err(Failure::Error(error)),
            };
            match outcome {
                Err(Failure::Error(error)) => self.failed(id, error.message),
                outcome => outcome?,
            }
        }
        Ok(turn)
    }

    /// Begins with the next batch of a store, or with the one that is under way.
    fn begin_store(&mut self, store: &EventStore) -> std::result::Result<(), Failure> {
        let (assigned, rows) = xact::worker(|| {
            let view = View::Under(Snapshot::active());
            let assigned = event_store::under_way(view, store.id)?;
            let heads = match &assigned {
                Some(batch) => batch.rows.clone(),
                None => outbox::first_rows(view, store.id, BATCH_ROWS, BATCH_EVENTS, BATCH_BYTES)?,
            };
            let ids: Vec<i64> = heads.iter().map(|head| head.id).collect();
            let rows = outbox::rows(view, store.id, &ids)?;
            Ok((assigned.ok_or(heads), rows))
        })?;
        if matches!(&assigned, Err(heads) if heads.is_empty()) {
            return Ok(());
        }
        learn(&rows)?;
        let lane = self.lanes.entry(store.id).or_default();
        connect(lane, store)?;
        let (topics, known) = xact::worker(|| {
            let topics = parcel::topics(store, &rows)?;
            Ok((topics, event_store::topics(View::Current, store.id)?))
        })?;
        let known: Topics = known
            .into_iter()
            .map(|(topic, n)| (Arc::from(topic), n))
            .collect();
        let unknown: Vec<Arc<str>> = topics
            .into_iter()
            .filter(|topic| lane.doubts || !known.contains_key(topic))
            .collect();
        if !unknown.is_empty() {
            return self.ask(store.id, unknown).map_err(Failure::Error);
        }
        let made = xact::worker(|| {
            let batch = match assigned {
                Ok(batch) => batch,
                Err(_) if !event_store::try_lock(store.id)? => return Ok(None),
                Err(heads) => event_store::assign(store, heads)?,
            };
            let packed = parcel::pack(store, &batch, &rows, &known)?;
            Ok(Some((batch, packed)))
        })?;
        let Some((batch, packed)) = made else {
            if let Some(lane) = self.lanes.get_mut(&store.id) {
                lane.wait_for_change();
            }
            return Ok(());
        };
        failpoint::hit("relay.after_assign");
        self.publish(store.id, batch, rows, packed)
            .map_err(Failure::Error)
    }

    fn ask(&mut self, store_id: i32, topics: Vec<Arc<str>>) -> Result<()> {
        let Some(lane) = self.lanes.get_mut(&store_id) else {
            return Ok(());
        };
        let Some(mut publisher) = lane.publisher.take() else {
            return Err(PgError::internal("a store has no publisher"));
        };
        let (sender, asked) = (self.sender.clone(), topics.clone());
        let attempt = lane.begin();
        let task = Task::spawn(async move {
            let told = publisher.partitions(&asked).await;
            let told = Told {
                store_id,
                attempt,
                publisher: Some(publisher),
                outcome: Outcome::Topics(told),
            };
            sender.send(told).await;
        })?;
        lane.work = Some(Work::Asking {
            _task: task,
            topics,
        });
        Ok(())
    }

    fn publish(
        &mut self,
        store_id: i32,
        batch: Assigned,
        rows: Vec<TailRow>,
        packed: Packed,
    ) -> Result<()> {
        let Some(lane) = self.lanes.get_mut(&store_id) else {
            return Ok(());
        };
        let Some(mut publisher) = lane.publisher.take() else {
            return Err(PgError::internal("a store has no publisher"));
        };
        let attempt = lane.begin();
        let (sender, trouble) = (self.sender.clone(), lane.trouble.clone());
        let parcel = Arc::clone(&packed.parcel);
        let task = Task::spawn(async move {
            let outcome = publisher.publish(parcel, trouble).await;
            let told = Told {
                store_id,
                attempt,
                // After an error it may still hold some of the records.
                publisher: outcome.is_ok().then_some(publisher),
                outcome: Outcome::Published(outcome),
            };
            sender.send(told).await;
        })?;
        lane.work = Some(Work::Publishing {
            _task: task,
            batch,
            rows,
            packed: Box::new(packed),
        });
        Ok(())
    }

    fn hear(&mut self, told: Told) -> std::result::Result<(), Failure> {
        let Some(lane) = self.lanes.get_mut(&told.store_id) else {
            return Ok(());
        };
        if lane.attempt != told.attempt {
            return Ok(());
        }
        let Some(work) = lane.work.take() else {
            return Ok(());
        };
        lane.publisher = told.publisher;
        lane.used = Some(Instant::now());
        let error = match (work, told.outcome) {
            (Work::Asking { topics, .. }, Outcome::Topics(Ok(counts))) => {
                match note_topics(told.store_id, &topics, &counts, lane.doubts)? {
                    true => lane.doubts = false,
                    false => lane.wait_for_change(),
                }
                return Ok(());
            }
            (
                Work::Publishing {
                    batch,
                    rows,
                    packed,
                    ..
                },
                Outcome::Published(Ok(refused)),
            ) => {
                failpoint::hit("relay.before_mark");
                lane.work = Some(Work::Published(Box::new(Published {
                    batch,
                    rows,
                    packed: *packed,
                    refused,
                })));
                return self.note_published(told.store_id);
            }
            (_, Outcome::Topics(Err(error)) | Outcome::Published(Err(error))) => error.to_string(),
            (_, _) => "a task told of another".to_owned(),
        };
        self.failed(told.store_id, error);
        Ok(())
    }

    /// Notes a store's batch as published, or waits for who is about to change the store.
    fn note_published(&mut self, store_id: i32) -> std::result::Result<(), Failure> {
        let Some(lane) = self.lanes.get_mut(&store_id) else {
            return Ok(());
        };
        let Some(Work::Published(published)) = &mut lane.work else {
            return Ok(());
        };
        let Published {
            batch,
            rows,
            packed,
            refused,
        } = &mut **published;
        let events = packed.parcel.records.len().saturating_sub(refused.len());
        let noted = xact::worker(|| {
            if !event_store::try_lock(store_id)? {
                return Ok(false);
            }
            if event_store::published(store_id, batch, events as i64)? {
                outbox::delete(store_id, &batch.ids())?;
                bury(batch, rows, packed, refused)?;
                packed.note()?;
            }
            Ok(true)
        });
        match noted {
            Ok(true) => {
                packed.tell();
                lane.work = None;
                lane.failures = 0;
                lane.due = None;
                lane.noted = None;
                Ok(())
            }
            Ok(false) => {
                lane.wait_for_change();
                Ok(())
            }
            Err(Failure::ExtensionGone) => Err(Failure::ExtensionGone),
            // It is published again, under the same marks.
            Err(Failure::Error(error)) => {
                self.failed(store_id, error.message);
                Ok(())
            }
        }
    }

    fn failed(&mut self, store_id: i32, error: String) {
        let lane = self.lanes.entry(store_id).or_default();
        lane.give_up();
        lane.due = Some(Instant::now() + (PAUSE * (1 << lane.failures.min(8))).min(PAUSE_MOST));
        lane.failures += 1;
        lane.trouble = Trouble::of(error);
    }

    /// Ends attempts that have struggled for too long without getting on: others may wait, and servers may have new options.
    fn give_way(&mut self) {
        let struggling: Vec<(i32, String)> = self
            .lanes
            .iter()
            .filter(|(_, lane)| lane.work.is_some())
            .filter_map(|(id, lane)| Some((*id, lane.trouble.lasting(STRUGGLE)?)))
            .collect();
        for (id, error) in struggling {
            self.failed(id, error);
        }
    }

    fn note_troubles(&mut self) -> std::result::Result<(), Failure> {
        let mut changes: BTreeMap<i32, Option<String>> = BTreeMap::new();
        for (id, lane) in &self.lanes {
            let trouble = lane.trouble.get();
            // What failed stays an error until something succeeds.
            let trouble = trouble.or_else(|| lane.noted.clone().filter(|_| lane.failures > 0));
            if trouble != lane.noted {
                changes.insert(*id, trouble);
            }
        }
        if changes.is_empty() {
            return Ok(());
        }
        let noted = xact::worker(|| {
            let mut noted = Vec::with_capacity(changes.len());
            for (id, error) in changes {
                if event_store::try_lock(id)? {
                    event_store::note_error(id, error.as_deref())?;
                    noted.push((id, error));
                }
            }
            Ok(noted)
        })?;
        for (id, error) in noted {
            if let Some(lane) = self.lanes.get_mut(&id) {
                lane.noted = error;
            }
        }
        Ok(())
    }
}

/// Registers the collections and fields that are new in the rows, in a transaction of its own.
fn learn(rows: &[TailRow]) -> std::result::Result<(), Failure> {
    let learnt = xact::worker(|| {
        let mut learner = Learner::new(View::Under(Snapshot::active()));
        learner.prepare(rows)?;
        for row in rows {
            learner.learn(row)?;
        }
        Ok(learner.finish())
    })?;
    if learnt.is_empty() {
        return Ok(());
    }
    if xact::worker(|| register(&learnt))?
        && let Some(slot) = shared::get().and_then(|s| s.find(bgworker::my_database()))
    {
        slot.schema_changed
            .store(true, std::sync::atomic::Ordering::Release);
        slot.wake();
    }
    Ok(())
}

/// The service of a store as its server defines it now.
fn service_of(store: &EventStore) -> std::result::Result<Service, Failure> {
    let found = xact::worker(|| {
        let server = store
            .server
            .as_deref()
            .ok_or_else(|| PgError::new("42704", "the server of the event store was dropped"))?;
        service::of(server)
    })?;
    Ok(found.1)
}

/// Whether a store's service is another one than its lane has tried.
fn is_redefined(lane: &Lane, store: &EventStore) -> std::result::Result<bool, Failure> {
    match service_of(store) {
        Ok(service) => Ok(lane.service.as_ref().is_some_and(|tried| *tried != service)),
        // The next attempt tells.
        Err(Failure::Error(_)) => Ok(false),
        Err(gone) => Err(gone),
    }
}

/// Gives a store a publisher, unless it has one by what its server says now.
fn connect(lane: &mut Lane, store: &EventStore) -> std::result::Result<(), Failure> {
    let service = service_of(store)?;
    if lane.service.as_ref() != Some(&service) {
        lane.publisher = None;
    }
    // Noted also if it is of no use: it is tried again when it is another one.
    let service = lane.service.insert(service);
    if lane.publisher.is_none() {
        lane.publisher = Some(
            service
                .publisher(&store.options)
                .map_err(|error| Failure::Error(error.into()))?,
        );
    }
    Ok(())
}

/// Notes how many partitions topics have, where that is not known yet, or where there are fewer than before: the topic was made
/// anew then. False: somebody is about to change the store.
fn note_topics(
    store_id: i32,
    topics: &[Arc<str>],
    counts: &[i32],
    doubts: bool,
) -> std::result::Result<bool, Failure> {
    xact::worker(|| {
        if !event_store::try_lock(store_id)? {
            return Ok(false);
        }
        let known = event_store::topics(View::Current, store_id)?;
        for (topic, &count) in topics.iter().zip(counts) {
            let before = known.iter().find(|(name, _)| **name == **topic);
            if before.is_none_or(|(_, before)| doubts && count < *before) {
                event_store::note_topic(store_id, topic, count)?;
            }
        }
        Ok(true)
    })
}

/// Makes dead letters of the events that could not be published.
fn bury(batch: &Assigned, rows: &[TailRow], packed: &Packed, refused: &[Refused]) -> Result<()> {
    let why: HashMap<u32, &str> = packed
        .dead
        .iter()
        .map(|dead| (dead.place, dead.error.as_str()))
        .chain(refused.iter().map(|r| (r.place, r.reason.as_str())))
        .collect();
    if why.is_empty() {
        return Ok(());
    }
    for (place, _, row, event) in parcel::events(batch, rows) {
        if let Some(error) = why.get(&place) {
            dead_letter::keep(row, event, error, false)?;
        }
    }
    Ok(())
}
