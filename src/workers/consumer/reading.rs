//! One source as one consumer reads it.

use std::cell::Cell;
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rakam_sources::SourceError;
use rakam_sources::batch::{Batch, Limits, Stop};
use rakam_sources::options::Kind;
use rakam_sources::plan::Plan;
use rakam_sources::published::Copies;
use rakam_sources::source::{Lag, Split};

use super::share::{Among, share};
use super::tasks::{Lister, Reader, Told, What};
use crate::catalog::dropping;
use crate::catalog::event_store;
use crate::catalog::projects::Quota;
use crate::catalog::sources::leases::{self, Claim};
use crate::catalog::sources::{self, Source};
use crate::ingest::stream::{Prepared, Stream};
use crate::pg::runtime::{Runtime, Sender};
use crate::pg::xact::{self, Failure};
use crate::pg::{PgError, Result, failpoint, guc};
use crate::sources::service::{Reach, Service};

mod listing;

/// Objects of a prefix that a consumer has at a time: they are read one after another.
const OBJECTS: usize = 32;
/// While the service cannot be reached it is asked again after a second, then later each time, but so soon at least.
const PROBE_MIN: Duration = Duration::from_secs(1);
/// How soon a batch that could not be stored is tried again: the wait doubles up to the maximum.
const RETRY_MIN: Duration = Duration::from_millis(100);
const RETRY_MAX: Duration = Duration::from_secs(30);
/// One for which there is no room now is asked about more often, since that costs little: it is prepared already.
const ROOM_RETRY_MAX: Duration = Duration::from_millis(100);
/// It is prepared anew after so long: its events were received when they were prepared.
const PREPARED_FOR: Duration = Duration::from_secs(60);
/// Nothing is stored for a project that some transaction is dropping; it is asked again so often.
const BEING_DROPPED: Duration = Duration::from_secs(1);
/// A window of de-duplication is noted in so many parts.
const MARKS_PER_WINDOW: f64 = 16.0;
const MARKS_INTERVAL: Duration = Duration::from_secs(60);

/// What a source struggles with, by where that shows.
#[derive(Default)]
struct Trouble {
    fetching: Option<String>,
    storing: Option<String>,
    /// As it was noted; None: nothing was yet.
    noted: Option<Option<String>>,
}

pub struct Reading {
    /// In the messages of its tasks.
    pub number: u64,
    /// The consumer's time that it has had, as the consumer counts it.
    pub had: Duration,
    source: Source,
    service: Service,
    reach: Reach,
    runtime: Arc<Runtime>,
    told: Sender<Told>,
    stream: Stream,
    reader: Reader,
    /// Of the one consumer that looks for new splits.
    lister: Option<Lister>,
    is_listing: bool,
    list_at: Instant,
    list_failures: u32,
    listed: Vec<Split>,
    /// Splits that were found, and wait to be told where they begin.
    planned: Option<Plan>,
    /// Splits that are read, and the epochs under which they were taken.
    held: HashMap<String, i64>,
    /// What they have brought of event stores, by which records are told that come again.
    copies: Copies,
    /// Batches polled before are none any more.
    generation: u64,
    queue: VecDeque<Arc<Batch>>,
    /// The first of them, if there was no room for it when it was to be stored.
    prepared: Option<(Prepared, Instant)>,
    /// How much a batch may have.
    limits: Limits,
    /// How often the first of them could not be stored, and when it is tried again.
    failures: u32,
    retry_at: Option<Instant>,
    is_full: bool,
    trouble: Trouble,
    lags: HashMap<String, Option<Lag>>,
    marked: Instant,
    /// When the last batch or list came.
    heard: Instant,
    /// Splits have been noted that nobody has looked at.
    has_new: bool,
}

impl Reading {
    pub fn new(
        source: Source,
        service: Service,
        (runtime, told, number): (&Arc<Runtime>, Sender<Told>, u64),
    ) -> Result<Self> {
        let reach = Reach::new(&service, &source.options)?;
        Ok(Self {
            number,
            had: Duration::ZERO,
            stream: Stream::new(&source),
            reader: Reader::start(runtime, reach.clone(), number, told.clone()),
            source,
            service,
            reach,
            runtime: Arc::clone(runtime),
            told,
            lister: None,
            is_listing: false,
            list_at: Instant::now(),
            list_failures: 0,
            listed: Vec::new(),
            planned: None,
            held: HashMap::new(),
            copies: Copies::default(),
            generation: 0,
            queue: VecDeque::new(),
            prepared: None,
            limits: Limits::default(),
            failures: 0,
            retry_at: None,
            is_full: false,
            trouble: Trouble::default(),
            lags: HashMap::new(),
            marked: Instant::now(),
            heard: Instant::now(),
            has_new: false,
        })
    }

    pub fn is_of(&self, service: &Service) -> bool {
        self.service == *service
    }

    pub fn splits(&self) -> usize {
        self.held.len()
    }

    pub fn is_well(&self) -> bool {
        self.trouble.noted == Some(None)
    }

    /// Nothing has come for a while, and nothing is known to be there. A service that cannot be reached has nothing, and what
    /// there is no room for waits for the next tick.
    pub fn has_settled(&self, quiet: Duration) -> bool {
        let is_read = |split: &String| match self.lags.get(split) {
            Some(Some(Lag::Records(n) | Lag::Milliseconds(n))) => *n == 0,
            // Nobody has asked yet, or it is an object, which is read when it has ended.
            Some(None) | None => false,
        };
        let is_looking = self.is_listing || self.planned.is_some() || self.has_new;
        let is_through = self.list_failures > 0
            || self.trouble.fetching.is_some()
            || self.source.has_begun && !is_looking && self.held.keys().all(is_read);
        let is_stored = match self.trouble.storing {
            None => self.queue.is_empty(),
            Some(_) => true,
        };
        // What fails once may go well a moment later.
        let quiet = match self.trouble.fetching {
            Some(_) => quiet * 3,
            None => quiet,
        };
        (is_stored || self.is_full) && self.heard.elapsed() >= quiet && is_through
    }

    /// Whether splits have come to be that are to be shared.
    pub fn has_new_splits(&self) -> bool {
        self.has_new
    }

    /// When the next batch may be stored; None: there is none.
    pub fn due(&self) -> Option<Instant> {
        (!self.queue.is_empty()).then(|| self.retry_at.unwrap_or_else(Instant::now))
    }

    /// Takes a share of the splits, gives back what is more, and has new splits looked for.
    pub fn look(&mut self, me: i32, live: &[i32]) -> std::result::Result<(), Failure> {
        let among = Among {
            me,
            live,
            most: match self.source.kind {
                Kind::Files => OBJECTS,
                Kind::Kafka | Kind::Kinesis => usize::MAX,
            },
        };
        let id = self.source.id;
        self.has_new = false;
        let held = &self.held;
        let (share, taken) = xact::worker(|| {
            let mut share = share(id, &leases::open(id)?, held, among);
            let give_back: Vec<(String, i64)> = (share.give_back.iter())
                .filter_map(|split| Some((split.clone(), *held.get(split)?)))
                .collect();
            if !give_back.is_empty() {
                share.give_back = leases::release(id, &give_back)?;
            }
            let taken = match share.take.is_empty() {
                true => Vec::new(),
                false => leases::take(id, &share.take, me)?,
            };
            let taken: Vec<_> = (taken.into_iter())
                .map(|taken| {
                    Ok((
                        event_store::seen(id, std::slice::from_ref(&taken.split))?,
                        taken,
                    ))
                })
                .collect::<Result<_>>()?;
            Ok((share, taken))
        })?;
        self.forget(share.give_back.iter().chain(&share.lost));
        for (seen, taken) in taken {
            self.copies.open(&taken.split, seen);
            self.reader.open(&taken.split, taken.position);
            self.held.insert(taken.split, taken.epoch);
        }
        self.look_for_splits(live.first() == Some(&me));
        self.mark()
    }

    /// Reads splits no more. Batches on their way may have records of them: they are polled again without.
    fn forget<'a>(&mut self, splits: impl Iterator<Item = &'a String>) {
        let mut any = false;
        for split in splits {
            any = true;
            self.held.remove(split);
            self.lags.remove(split);
            self.copies.close(split);
            self.reader.close(split);
        }
        if any {
            self.rewind();
        }
    }

    fn rewind(&mut self) {
        self.generation += 1;
        self.queue.clear();
        self.prepared = None;
        self.copies.undo();
        self.failures = 0;
        self.retry_at = None;
        self.reader.rewind(self.generation);
    }

    /// Begins new marks, now and then.
    fn mark(&mut self) -> std::result::Result<(), Failure> {
        if self.marked.elapsed() < MARKS_INTERVAL {
            return Ok(());
        }
        self.marked = Instant::now();
        let Some(window_us) = guc::dedupe_window_us() else {
            return Ok(());
        };
        let age_s = window_us as f64 / 1e6 / MARKS_PER_WINDOW;
        let id = self.source.id;
        xact::worker(|| sources::roll_marks(id, age_s))
    }

    /// The project has this quota now.
    pub fn bound(&mut self, quota: Quota) {
        self.stream.set_quota(quota);
        self.fit();
    }

    /// Has batches polled as large as the stream takes them now. What was polled before they became smaller is polled again
    /// in parts that fit: true.
    fn fit(&mut self) -> bool {
        let limits = self.stream.limits();
        if self.limits == limits {
            return false;
        }
        let is_less = limits.records < self.limits.records || limits.bytes < self.limits.bytes;
        self.limits = limits;
        self.reader.limit(limits);
        if is_less {
            self.rewind();
            // It is still to come.
            self.heard = Instant::now();
        }
        is_less
    }

    /// Back-pressure: nothing is polled while no event may come in.
    pub fn press(&mut self, is_full: bool) -> std::result::Result<(), Failure> {
        if self.is_full != is_full {
            self.is_full = is_full;
            self.reader.pause(is_full);
        }
        self.note_trouble()
    }

    /// Takes what a task tells. An error: the source has to be begun anew.
    pub fn hear(&mut self, what: What) -> std::result::Result<Option<SourceError>, Failure> {
        match what {
            What::Batch(generation, batch) => {
                if let Some(error) = &batch.trouble {
                    self.struggles(error);
                    self.note_trouble()?;
                }
                if generation == self.generation && !batch.is_empty() {
                    self.heard = Instant::now();
                    self.queue.push_back(batch);
                }
            }
            What::Lag(Ok(lags)) => {
                self.trouble.fetching = None;
                self.note_trouble()?;
                self.note_lags(lags)?;
            }
            What::Lag(Err(error)) => {
                self.struggles(&error);
                self.note_trouble()?;
            }
            What::Failed(error) => return Ok(Some(error)),
            What::Listed(Ok(listed)) => self.found(listed)?,
            What::Located(Ok(positions)) => self.located(positions)?,
            What::Listed(Err(error)) | What::Located(Err(error)) => {
                self.planned = None;
                self.list_again(false);
                self.struggles(&error);
                self.note_trouble()?;
            }
        }
        Ok(None)
    }

    fn struggles(&mut self, error: &SourceError) {
        self.trouble.fetching = Some(error.to_string());
        // Whether it is over tells a list.
        self.list_at = self.list_at.min(Instant::now() + PROBE_MIN);
    }

    /// Stores the first batch that waits; true: the leases have to be looked at.
    pub fn store(&mut self) -> std::result::Result<bool, Failure> {
        let prepared = match self.prepared.take() {
            Some((prepared, since)) if since.elapsed() < PREPARED_FOR => Some((prepared, since)),
            Some(_) => {
                self.copies.undo();
                None
            }
            None => None,
        };
        let Some(batch) = self.queue.front_mut() else {
            return Ok(false);
        };
        // Its transaction would wait for the one that drops the project, and with it all that this process reads.
        if dropping::is_going(self.source.project_id) {
            self.retry_at = Some(Instant::now() + BEING_DROPPED);
            self.prepared = prepared;
            self.trouble.storing = Some("the project is being dropped by a transaction".to_owned());
            self.note_trouble()?;
            return Ok(false);
        }
        if prepared.is_none() && Copies::concern(batch) {
            self.copies.remove_from(Arc::make_mut(batch));
        }
        let batch = Arc::clone(batch);
        let (id, held, stream) = (self.source.id, &self.held, &mut self.stream);
        let (project_id, copies) = (self.source.project_id, &self.copies);
        let lost = Cell::new(false);
        let prepared = match prepared {
            Some(prepared) => Ok(prepared),
            None => (stream.prepare(Arc::clone(&batch))).map(|made| (made, Instant::now())),
        };
        let waits = &mut self.prepared;
        let outcome = prepared.and_then(|(mut prepared, since)| {
            let outcome = xact::worker(|| {
                let stored = stream.store(&mut prepared)?;
                let epoch = |split: &str| held.get(split).copied();
                match leases::advance(id, &batch, epoch, &stored.lacks_id)? {
                    Claim::Ours => failpoint::hit("consumer.before_commit"),
                    Claim::Lost => {
                        lost.set(true);
                        return Err(PgError::new("40001", "a split is another consumer's"));
                    }
                }
                for (split, origin, seen) in copies.changes() {
                    match seen {
                        Some(seen) => event_store::note_seen(id, project_id, split, origin, seen)?,
                        None => event_store::forget_seen(id, split, origin)?,
                    }
                }
                alarm(&self.source, &batch.stops)
            });
            if let Err(Failure::Error(error)) = &outcome
                && has_no_room(error)
                && prepared.is_whole()
            {
                *waits = Some((prepared, since));
            }
            outcome
        });
        match outcome {
            Ok(()) => {
                failpoint::hit("consumer.after_commit");
                self.copies.stored();
                let is_look_due = self.stored(batch)?;
                self.fit();
                Ok(is_look_due)
            }
            Err(Failure::ExtensionGone) => Err(Failure::ExtensionGone),
            Err(Failure::Error(error)) => {
                if self.fit() {
                    return Ok(lost.get());
                }
                let most = match self.prepared {
                    Some(_) => ROOM_RETRY_MAX,
                    None => {
                        self.copies.undo();
                        RETRY_MAX
                    }
                };
                let pause = RETRY_MIN
                    .saturating_mul(1 << self.failures.min(20))
                    .min(most);
                self.failures += 1;
                self.retry_at = Some(Instant::now() + pause);
                if !lost.get() && self.failures > 1 {
                    self.trouble.storing = Some(error.message);
                    self.note_trouble()?;
                }
                Ok(lost.get())
            }
        }
    }

    fn stored(&mut self, batch: Arc<Batch>) -> std::result::Result<bool, Failure> {
        self.queue.pop_front();
        self.failures = 0;
        self.retry_at = None;
        self.trouble.storing = None;
        if batch.trouble.is_none() {
            self.trouble.fetching = None;
        }
        self.note_trouble()?;
        let mut is_look_due = false;
        for moved in &batch.moves {
            // As the row of the split has it.
            if let Some(Some(Lag::Records(n))) = self.lags.get_mut(&moved.split) {
                *n = n.saturating_sub(moved.records);
            }
            if !moved.ended {
                continue;
            }
            self.held.remove(&moved.split);
            // Others may begin where it ended.
            self.list_at = Instant::now();
            is_look_due = true;
        }
        let stops: Vec<String> = batch.stops.iter().map(|stop| stop.split.clone()).collect();
        self.reader.ack(batch);
        for split in &stops {
            self.held.remove(split);
            self.reader.close(split);
        }
        Ok(is_look_due)
    }

    fn note_lags(&mut self, lags: Vec<(String, Option<Lag>)>) -> std::result::Result<(), Failure> {
        let changed: Vec<(String, Option<Lag>)> = lags
            .into_iter()
            .map(|(split, lag)| {
                let lag = lag.map(|lag| self.with_queued(&split, lag));
                (split, lag)
            })
            .filter(|(split, lag)| {
                self.held.contains_key(split) && self.lags.get(split) != Some(lag)
            })
            .collect();
        if changed.is_empty() {
            return Ok(());
        }
        let id = self.source.id;
        let noted = xact::worker(|| leases::note_lag(id, &changed))?;
        (self.lags).extend(
            changed
                .into_iter()
                .filter(|(split, _)| noted.contains(split)),
        );
        Ok(())
    }

    /// The reader counts from what it has read: what waits to be stored is to be counted, too.
    fn with_queued(&self, split: &str, lag: Lag) -> Lag {
        match lag {
            Lag::Records(n) => {
                let moves = self.queue.iter().flat_map(|batch| &batch.moves);
                let queued = moves.filter(|moved| moved.split == split);
                Lag::Records(n + queued.map(|moved| moved.records).sum::<u64>())
            }
            Lag::Milliseconds(_) => lag,
        }
    }

    fn note_trouble(&mut self) -> std::result::Result<(), Failure> {
        let full = || {
            "the hot tier is full: nothing is read until events are written to data files"
                .to_owned()
        };
        let Trouble {
            fetching, storing, ..
        } = &self.trouble;
        let now = (storing.clone())
            .or_else(|| self.is_full.then(full))
            .or_else(|| fetching.clone());
        let is_noted = match &self.trouble.noted {
            Some(noted) => *noted == now,
            None => now.is_none(),
        };
        if is_noted {
            return Ok(());
        }
        let id = self.source.id;
        if xact::worker(|| sources::note_trouble(id, now.as_deref()))? {
            self.trouble.noted = Some(now);
        }
        Ok(())
    }

    /// Gives all splits back.
    pub fn let_go(&mut self) -> std::result::Result<(), Failure> {
        let held: Vec<(String, i64)> = self.held.drain().collect();
        self.queue.clear();
        if held.is_empty() {
            return Ok(());
        }
        let id = self.source.id;
        xact::worker(|| leases::release(id, &held)).map(drop)
    }
}

/// The project's quota, or the hot tier, takes no more at present.
fn has_no_room(error: &PgError) -> bool {
    matches!(error.sqlstate.as_str(), "53400" | "53100")
}

/// Tells everybody who listens that splits have stopped.
fn alarm(source: &Source, stops: &[Stop]) -> Result<()> {
    for stop in stops {
        PgError::new(
            "01000",
            format!(
                "split \"{}\" of source \"{}\" of project \"{}\" has stopped: {}",
                stop.split, source.name, source.project, stop.reason
            ),
        )
        .hint("rakam.seek_source lets it go on where you say.")
        .warn();
        sources::alarm(source, &stop.split, &stop.reason.to_string())?;
    }
    Ok(())
}
