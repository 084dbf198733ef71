//! The digest: inbox rows become chunks, exactly once, and no project waits for another one's flood.
//!
//! A round has three transactions. The first, read-only, takes the snapshot that becomes the next tick, and learns
//! from the waiting events which collections and fields are new. The second, short, registers those. The third
//! reads the same rows again (the same because the tick's snapshot says which they are), writes chunks and the
//! tick. A crash between them repeats the round; a second digester fails on the tick's primary key.
//!
//! A round takes a bounded slice of the backlog: the snapshot is cut at a transaction id, which is valid because
//! everything below the cut is either finished or listed as in progress. A project of which more than its share waits
//! gets a snapshot of its own, behind the tick ([`crate::catalog::backlog`]): the rounds take everybody else's events
//! whole and a slice of one such project after the other, until it has caught up.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::RangeInclusive;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::time::{Duration, Instant};

use rakam_event::discovery::Discovery;
use rakam_event::error::EventError;
use rakam_event::schema::Schema;
use rakam_event::types::FieldType;

use super::dedupe::Deduper;
use super::lookup::{Found, Registry};
use super::making::Making;
pub use super::making::limits;
use super::quota;
use crate::catalog::backlog::{self, Backlog, Head, Lag, Whose};
use crate::catalog::inbox::{self, TailRow, Tick};
use crate::catalog::registry::{self, ProjectRow};
use crate::pg::locks::{LockOn, SessionLock};
use crate::pg::snapshot::{Snapshot, XidSnapshot};
use crate::pg::spi::{self, View};
use crate::pg::xact::{self, Failure};
use crate::pg::{PgError, Result, failpoint, guc, wait};

/// A round takes about so long, on whatever machine: slices become smaller or larger until it does.
const ROUND_TIME: Duration = Duration::from_millis(250);
/// Of a lagging project it takes so many bytes of JSON (up to the end of a transaction's rows),
const SLICE_BYTES: RangeInclusive<usize> = (256 << 10)..=(16 << 20);
const FIRST_SLICE_BYTES: usize = 1 << 20;
/// of everybody else's together so many times as much.
const EVERYBODY: usize = 4;
/// No more projects than these are taken apart because everybody's is too much.
const APART_MOST: usize = 64;
/// So many waiting bytes make a digest due, whosever they are.
const DUE_BYTES: usize = 8 << 20;
/// While some project lags, everybody else's events are digested at least this often.
const FAIR_INTERVAL: Duration = Duration::from_millis(500);
/// All chunks in the making of a round together.
const MAKING_BYTES: usize = 128 << 20;
/// A parked event becomes a dead letter after so many attempts.
const ATTEMPTS_MAX: i32 = 8;

/// When a look at the inbox becomes a digest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum When {
    /// Whatever is waiting.
    Now,
    /// Enough events, or one that has waited long enough; new names are registered in any case.
    Due,
}

/// What a look found and did.
#[derive(Debug, Clone, Copy, Default)]
pub struct Look {
    /// Still waiting, not due yet.
    pub waiting: u64,
    /// Digested.
    pub events: u64,
    /// More is due than the round took.
    pub more: bool,
    /// Collections or fields were registered: tables or columns are to be made.
    pub schema_changed: bool,
}

/// What waits since the tick, of the projects that do not lag behind it.
#[derive(Debug, Default)]
struct Waiting {
    /// What a round takes of one lagging project.
    slice: usize,
    events: u64,
    bytes: usize,
    oldest_us: Option<i64>,
    /// Events and bytes by project.
    projects: HashMap<i32, (u64, usize)>,
    /// Events by project and collection.
    collections: HashMap<(i32, i32), u64>,
    /// The most events of a collection.
    most: u64,
    /// Projects with more than their share; they count for nothing else here.
    heavy: BTreeSet<i32>,
}

impl Waiting {
    fn new(slice: usize) -> Self {
        Self {
            slice,
            ..Self::default()
        }
    }

    /// A project's events are not everybody's any more.
    fn set_apart(&mut self, project_id: i32) {
        let (events, bytes) = self.projects.remove(&project_id).unwrap_or_default();
        self.events -= events;
        self.bytes -= bytes;
        self.heavy.insert(project_id);
    }

    /// Whether a round can take all of it.
    fn is_bearable(&self) -> bool {
        self.bytes < EVERYBODY * self.slice
    }

    /// Takes the largest projects apart until the rest is bearable, or nobody is larger than the others.
    fn lighten(&mut self) {
        while !self.is_bearable() && self.heavy.len() < APART_MOST {
            let largest = self.projects.iter().max_by_key(|(_, (_, bytes))| *bytes);
            match largest {
                Some((&id, (_, bytes))) if *bytes >= self.bytes / APART_MOST => self.set_apart(id),
                _ => return,
            }
        }
    }

    /// Counts a row. False: it is one of a project with more than its share.
    fn count(&mut self, row: &Head) -> bool {
        if self.heavy.contains(&row.project_id) {
            return false;
        }
        let n = row.n as u64;
        let (events, bytes) = self.projects.entry(row.project_id).or_default();
        *events += n;
        *bytes += row.bytes;
        self.events += n;
        self.bytes += row.bytes;
        let oldest = self.oldest_us.unwrap_or(i64::MAX);
        self.oldest_us = Some(oldest.min(row.received_at_us));
        if *bytes >= self.slice {
            self.set_apart(row.project_id);
            return false;
        }
        let of_collection = self
            .collections
            .entry((row.project_id, row.collection_id))
            .or_default();
        *of_collection += n;
        self.most = self.most.max(*of_collection);
        self.lighten();
        !self.heavy.contains(&row.project_id)
    }

    fn is_due(&self) -> bool {
        let age_us = self.oldest_us.map_or(0, |oldest| xact::now_us() - oldest);
        !self.heavy.is_empty()
            || self.most as i64 >= guc::digest_events()
            || self.bytes >= DUE_BYTES
            || self.events > 0 && age_us >= guc::digest_max_age().as_micros() as i64
    }
}

/// What a digester remembers between its looks, so that each reads what is new since the last one only.
pub struct Watch {
    tick_id: i64,
    /// Everything finished in it was seen, and its names are registered.
    seen: XidSnapshot,
    waiting: Waiting,
    slice_bytes: usize,
    last_tick: Option<Instant>,
    /// Lagging projects by the round that took their last slice.
    served: HashMap<i32, u64>,
    rounds: u64,
}

impl Default for Watch {
    fn default() -> Self {
        Self {
            tick_id: 0,
            seen: XidSnapshot {
                xmin: 0,
                xmax: 0,
                xip: Vec::new(),
            },
            waiting: Waiting::new(FIRST_SLICE_BYTES),
            slice_bytes: FIRST_SLICE_BYTES,
            last_tick: None,
            served: HashMap::new(),
            rounds: 0,
        }
    }
}

/// What the first transaction found.
struct Plan {
    tick: Tick,
    /// The next tick; that of the last one if it is only a slice that is digested.
    upto: XidSnapshot,
    /// Whether everybody's events are digested.
    tick_moves: bool,
    /// Whose events are not everybody's: they lag, or will from now on.
    apart: Vec<i32>,
    /// Of those, the ones that begin to lag.
    begin_to_lag: Vec<i32>,
    slice: Option<Slice>,
    /// Whose events are digested, and perhaps some more.
    projects: BTreeSet<i32>,
    more: bool,
    learnt: Learnt,
}

impl Plan {
    fn is_due(&self) -> bool {
        self.tick_moves || self.slice.is_some()
    }
}

/// A part of a lagging project's events.
struct Slice {
    project_id: i32,
    from: XidSnapshot,
    upto: XidSnapshot,
    bytes: usize,
    /// The project has caught up with the tick.
    ends: bool,
}

/// What is to be registered.
#[derive(Default)]
struct Learnt {
    collections: BTreeMap<(i32, String), Vec<(String, FieldType)>>,
    fields: BTreeMap<i32, Vec<(String, FieldType)>>,
}

impl Learnt {
    fn is_empty(&self) -> bool {
        self.collections.is_empty() && self.fields.is_empty()
    }
}

/// Digests what was committed before the call, of these projects (None: of all), and whatever else is in turn.
/// Waits for the digest lock.
pub fn catch_up(projects: Option<&[i32]>) -> std::result::Result<(), Failure> {
    let _lock = SessionLock::take(LockOn::Digest);
    let goal = xact::worker(|| present(View::Under(Snapshot::active())))?;
    let mut watch = Watch::default();
    while watch.look(When::Now)?.more && !xact::worker(|| is_digested(&goal, projects))? {}
    Ok(())
}

/// The active snapshot.
fn present(view: View) -> Result<XidSnapshot> {
    let text: String = spi::first(
        view,
        "SELECT pg_catalog.pg_current_snapshot()::text",
        &[],
        |r| r.must(1),
    )?
    .unwrap_or_default();
    XidSnapshot::parse(&text).ok_or_else(|| PgError::internal("the current snapshot is malformed"))
}

fn is_digested(goal: &XidSnapshot, projects: Option<&[i32]>) -> Result<bool> {
    let of_interest = |lag: &Lag| projects.is_none_or(|list| list.contains(&lag.project_id));
    Ok(inbox::tick(View::Current)?.snapshot.covers(goal)
        && backlog::lagging(View::Current)?
            .iter()
            .filter(|lag| of_interest(lag))
            .all(|lag| lag.snapshot.covers(goal)))
}

impl Watch {
    /// Looks at the inbox, registers new names, and digests if it is time. The caller holds the digest lock.
    pub fn look(&mut self, when: When) -> std::result::Result<Look, Failure> {
        let outcome = self.try_look(when);
        if outcome.is_err() {
            // What was seen may not be registered.
            *self = Self {
                slice_bytes: self.slice_bytes,
                waiting: Waiting::new(self.slice_bytes),
                ..Self::default()
            };
        }
        outcome
    }

    fn try_look(&mut self, when: When) -> std::result::Result<Look, Failure> {
        let began = Instant::now();
        let plan = xact::worker(|| self.plan(when))?;
        let mut look = Look {
            waiting: self.waiting.events,
            more: plan.more,
            ..Look::default()
        };
        if !plan.learnt.is_empty() {
            failpoint::hit("digest.before_registry");
            look.schema_changed = xact::worker(|| register(&plan.learnt))?;
        }
        if !plan.is_due() {
            return Ok(look);
        }
        let (events, usage) = xact::worker(|| write(&plan))?;
        usage.tell();
        look.events = events;
        self.tick_id = plan.tick.id + 1;
        self.rounds += 1;
        if let Some(slice) = &plan.slice {
            self.slice_bytes = fitting(self.slice_bytes, slice.bytes, began.elapsed());
            self.served.insert(slice.project_id, self.rounds);
            if slice.ends {
                self.served.remove(&slice.project_id);
            }
        }
        if plan.tick_moves {
            self.waiting = Waiting::new(self.slice_bytes);
            self.last_tick = Some(Instant::now());
            look.waiting = 0;
        }
        Ok(look)
    }

    /// First transaction: what waits, whether it is due, and what in it is new. Read-only.
    fn plan(&mut self, when: When) -> Result<Plan> {
        // A transaction with an id of its own would count itself as finished in its own snapshot.
        if xact::has_xid() {
            return Err(PgError::internal(
                "a digest must not begin in a writing transaction",
            ));
        }
        let view = View::Under(Snapshot::active());
        let tick = inbox::tick(view)?;
        let lags = backlog::lagging(view)?;
        let now = present(view)?;
        if self.tick_id != tick.id {
            // Somebody else digested, or nobody has looked yet.
            self.tick_id = tick.id;
            self.seen = tick.snapshot.clone();
            self.waiting = Waiting::new(self.slice_bytes);
        }
        let mut learner = Learner::new(view);
        let cut = self.see(view, &now, &lags, &mut learner)?;
        let is_cut = cut.is_some();
        self.seen = cut.unwrap_or_else(|| now.clone());

        let waiting = &self.waiting;
        let rested = self.last_tick.is_none_or(|t| t.elapsed() >= FAIR_INTERVAL);
        let begin_to_lag: Vec<i32> = waiting.heavy.iter().copied().collect();
        let mut tick_moves = match when {
            When::Now => waiting.events > 0 || waiting.is_due(),
            When::Due => waiting.is_due() || !lags.is_empty() && waiting.events > 0 && rested,
        } || is_cut;
        let mut apart: Vec<i32> = lags.iter().map(|lag| lag.project_id).collect();
        apart.extend(&begin_to_lag);

        let next = apart
            .iter()
            .copied()
            .min_by_key(|id| self.served.get(id).copied().unwrap_or(0));
        let slice = match next {
            Some(project_id) => {
                let from = lags
                    .iter()
                    .find(|lag| lag.project_id == project_id)
                    .map_or(&tick.snapshot, |lag| &lag.snapshot);
                let (upto, bytes) =
                    slice_end(view, project_id, from, &now, self.slice_bytes, &mut learner)?;
                // The tick and the project meet where both have come to this very snapshot.
                let ends = upto.is_none() && !is_cut;
                tick_moves |= ends;
                Some(Slice {
                    project_id,
                    from: from.clone(),
                    upto: upto.unwrap_or_else(|| now.clone()),
                    bytes,
                    ends,
                })
            }
            None => None,
        };
        let mut projects: BTreeSet<i32> = slice.iter().map(|slice| slice.project_id).collect();
        if tick_moves {
            projects.extend(self.waiting.projects.keys());
        }
        let left = apart.len() - usize::from(slice.as_ref().is_some_and(|s| s.ends));
        Ok(Plan {
            upto: if tick_moves {
                self.seen.clone()
            } else {
                tick.snapshot.clone()
            },
            tick,
            tick_moves,
            more: is_cut || left > 0,
            apart,
            begin_to_lag,
            slice,
            projects,
            learnt: learner.finish(),
        })
    }

    /// Sees everybody's rows that are new since the last look. The snapshot to stop at, if there are too many.
    fn see(
        &mut self,
        view: View,
        now: &XidSnapshot,
        lags: &[Lag],
        learner: &mut Learner,
    ) -> Result<Option<XidSnapshot>> {
        let mut apart: Vec<i32> = lags.iter().map(|lag| lag.project_id).collect();
        apart.extend(&self.waiting.heavy);
        let mut rows = Backlog::new(view, &self.seen, now, Whose::Except(apart))?;
        let mut last_txid = 0;
        loop {
            // Whether everything before each row is enough for a round.
            let mut enough = Vec::new();
            let waiting = &mut self.waiting;
            let page = rows.next_page(view, |head| {
                enough.push(!waiting.is_bearable());
                waiting.count(head)
            })?;
            let Some(page) = page else {
                return Ok(None);
            };
            wait::check_interrupts();
            learner.prepare(&page)?;
            for (row, enough) in page.iter().zip(enough) {
                let begins = row.txid != last_txid && row.txid >= self.seen.xmax;
                if begins && enough {
                    return Ok(Some(now.cut(row.txid)));
                }
                last_txid = row.txid;
                learner.learn(row)?;
            }
        }
    }
}

/// The size of slices after one of these bytes took so long, not far from the present size.
fn fitting(present: usize, bytes: usize, took: Duration) -> usize {
    let (smallest, largest) = SLICE_BYTES.into_inner();
    let in_time = bytes as f64 * ROUND_TIME.as_secs_f64() / took.as_secs_f64().max(0.001);
    if bytes < present / 2 {
        // The last of a backlog: what a round costs at least hides what its events cost.
        return present;
    }
    (in_time as usize)
        .clamp(present / 4, present.saturating_mul(2))
        .clamp(smallest, largest)
}

/// Where a slice of a lagging project's rows ends (None: with all of them), and its bytes.
fn slice_end(
    view: View,
    project_id: i32,
    from: &XidSnapshot,
    now: &XidSnapshot,
    slice_bytes: usize,
    learner: &mut Learner,
) -> Result<(Option<XidSnapshot>, usize)> {
    let mut rows = Backlog::new(view, from, now, Whose::Only(project_id))?;
    let mut bytes = 0;
    let mut last_txid = 0;
    while let Some(page) = rows.next_page(view, |_| true)? {
        wait::check_interrupts();
        learner.prepare(&page)?;
        for row in &page {
            let begins = row.txid != last_txid && row.txid >= from.xmax;
            if begins && bytes >= slice_bytes {
                return Ok((Some(now.cut(row.txid)), bytes));
            }
            bytes += row.payload.len();
            last_txid = row.txid;
            learner.learn(row)?;
        }
    }
    Ok((None, bytes))
}

/// Learns new names from events.
struct Learner {
    registry: Registry,
    known: HashMap<i32, Discovery>,
    strangers: BTreeMap<(i32, String), Discovery>,
    max_fields: usize,
}

impl Learner {
    fn new(view: View) -> Self {
        Self {
            registry: Registry::new(view),
            known: HashMap::new(),
            strangers: BTreeMap::new(),
            max_fields: guc::max_fields(),
        }
    }

    fn prepare(&mut self, page: &[TailRow]) -> Result<()> {
        self.registry.prepare(page)
    }

    fn learn(&mut self, row: &TailRow) -> Result<()> {
        if row.payload.is_empty() {
            return Ok(());
        }
        let max_fields = self.max_fields;
        let learner = match self.registry.find(row)? {
            Found::Dropped => return Ok(()),
            Found::Place(place) => self
                .known
                .entry(place.collection.id)
                .or_insert_with(|| Discovery::new(&place.schema, max_fields)),
            Found::NoCollection(_) => {
                let key = (row.project_id, row.collection.clone());
                self.strangers
                    .entry(key)
                    .or_insert_with(|| Discovery::new(&Schema::new(1, Vec::new()), max_fields))
            }
        };
        for line in row.payload.split(|&b| b == b'\n') {
            let Ok(event) = std::str::from_utf8(line) else {
                continue;
            };
            if !event.is_empty() {
                // A panic teaches nothing; the event is parked when it is written.
                let _ = catch_unwind(AssertUnwindSafe(|| {
                    learner.observe(event, row.txid as i64, row.received_at_us);
                }));
            }
        }
        Ok(())
    }

    fn finish(self) -> Learnt {
        Learnt {
            collections: self
                .strangers
                .into_iter()
                .map(|(key, learner)| (key, learner.new_fields()))
                .collect(),
            fields: self
                .known
                .into_iter()
                .map(|(id, learner)| (id, learner.new_fields()))
                .filter(|(_, fields)| !fields.is_empty())
                .collect(),
        }
    }
}

/// Second transaction: names, in sorted order, before the data that uses them. What the project's quota has no room
/// for is left out. Answers whether anything was new.
fn register(learnt: &Learnt) -> Result<bool> {
    let mut changed = false;
    for ((project_id, name), fields) in &learnt.collections {
        if !registry::add_collection(*project_id, name)? {
            continue;
        }
        changed = true;
        if let Some(collection) = registry::collection_named(View::Current, *project_id, name)? {
            registry::add_fields(collection.id, fields, false)?;
        }
    }
    for (collection_id, fields) in &learnt.fields {
        changed |= registry::add_fields(*collection_id, fields, false)? > 0;
    }
    Ok(changed)
}

/// Third transaction: chunks, ids and the tick. Returns the number of events, and the bytes to be told after the commit.
fn write(plan: &Plan) -> Result<(u64, quota::Digested)> {
    let dedupe = Rc::new(RefCell::new(Deduper::open(plan.projects.iter().copied())));
    // The rows are those that the plan saw: the tick's snapshot decides, and this one is newer.
    let view = View::Under(Snapshot::active());
    let mut chunks = Chunks {
        registry: Registry::new(View::Current),
        making: BTreeMap::new(),
        dedupe: Rc::clone(&dedupe),
        events: 0,
        usage: quota::Digested::default(),
    };
    if plan.tick_moves {
        let everybody = Whose::Except(plan.apart.clone());
        chunks.take(
            view,
            Backlog::new(view, &plan.tick.snapshot, &plan.upto, everybody)?,
        )?;
    }
    if let Some(slice) = &plan.slice {
        let project = Whose::Only(slice.project_id);
        chunks.take(view, Backlog::new(view, &slice.from, &slice.upto, project)?)?;
    }
    chunks.write()?;
    dedupe.borrow_mut().finish()?;
    chunks.usage.store()?;
    failpoint::hit("digest.before_tick");
    backlog::add_tick(plan.tick.id + 1, &plan.upto)?;
    for project_id in &plan.begin_to_lag {
        backlog::set_lag(*project_id, &plan.tick.snapshot)?;
    }
    match &plan.slice {
        Some(slice) if slice.ends => backlog::end_lag(slice.project_id)?,
        Some(slice) => backlog::set_lag(slice.project_id, &slice.upto)?,
        None => {}
    }
    failpoint::hit("digest.before_commit");
    Ok((chunks.events, chunks.usage))
}

/// The chunks that a round makes.
struct Chunks {
    registry: Registry,
    making: BTreeMap<i32, Making>,
    dedupe: Rc<RefCell<Deduper>>,
    events: u64,
    usage: quota::Digested,
}

impl Chunks {
    fn take(&mut self, view: View, mut backlog: Backlog) -> Result<()> {
        while let Some(page) = backlog.next_page(view, |_| true)? {
            wait::check_interrupts();
            self.registry.prepare(&page)?;
            for row in &page {
                match self.registry.find(row)? {
                    Found::Place(place) => {
                        self.usage.add(&place.project, row);
                        self.making
                            .entry(place.collection.id)
                            .or_insert_with(|| Making::new(place, Rc::clone(&self.dedupe)))
                            .add(row)?;
                    }
                    Found::NoCollection(project) => {
                        self.usage.add(&project, row);
                        refuse(&project, row)?;
                    }
                    Found::Dropped => {}
                }
            }
            if self.making.values().map(Making::bytes).sum::<usize>() >= MAKING_BYTES {
                self.write()?;
            }
        }
        Ok(())
    }

    fn write(&mut self) -> Result<()> {
        for (_, mut chunk) in std::mem::take(&mut self.making) {
            wait::check_interrupts();
            chunk.write()?;
            self.events += chunk.written;
        }
        Ok(())
    }
}

/// Makes dead letters of the events of a row whose collection the second transaction did not register.
fn refuse(project: &ProjectRow, row: &TailRow) -> Result<()> {
    let why = match project.collections_max {
        Some(most) => EventError::TooManyCollections(most).to_string(),
        // The quota was lifted in this very moment.
        None => "collection could not be registered".to_owned(),
    };
    for event in row.payload.split(|&b| b == b'\n').filter(|e| !e.is_empty()) {
        inbox::add_dead_letter(row, event, &why)?;
    }
    Ok(())
}

/// Tries parked events again, each in a transaction of its own. Returns how many left the parking.
pub fn retry_parked() -> std::result::Result<u64, Failure> {
    let due = xact::worker(|| inbox::parked_due(View::Current, 100))?;
    let mut left = 0;
    for parked in due {
        let outcome = xact::worker(|| retry(&parked))?;
        left += u64::from(outcome);
    }
    Ok(left)
}

fn retry(parked: &inbox::Parked) -> Result<bool> {
    let row = &parked.row;
    let dedupe = Rc::new(RefCell::new(Deduper::open([row.project_id])));
    let Found::Place(place) = Registry::new(View::Current).find(row)? else {
        inbox::unpark(row.id)?;
        return Ok(true);
    };
    match Making::new(place, Rc::clone(&dedupe)).retry(row)? {
        None => {
            dedupe.borrow_mut().finish()?;
            inbox::unpark(row.id).map(|_| true)
        }
        Some(error) if parked.attempts >= ATTEMPTS_MAX => {
            inbox::to_dead_letter(row, &error).map(|()| true)
        }
        Some(error) => inbox::park_again(row.id, &error).map(|()| false),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(project_id: i32, n: i32, bytes: usize) -> Head {
        Head {
            project_id,
            collection_id: project_id,
            n,
            bytes,
            received_at_us: 1,
        }
    }

    #[test]
    fn a_project_with_more_than_its_share_counts_apart() {
        let mut waiting = Waiting::new(1_000);
        assert!(waiting.count(&head(1, 5, 100)));
        assert!(waiting.count(&head(2, 1, 999)));
        assert_eq!((waiting.events, waiting.bytes), (6, 1_099));
        assert!(!waiting.count(&head(2, 1, 1)));
        assert!(!waiting.count(&head(2, 1, 1)));
        assert_eq!((waiting.events, waiting.bytes), (5, 100));
        assert!(waiting.heavy.contains(&2) && waiting.heavy.len() == 1);
    }

    #[test]
    fn the_largest_go_apart_when_everybody_is_too_much() {
        let mut waiting = Waiting::new(1_000);
        for id in 1..=5 {
            waiting.count(&head(id, 1, 900));
        }
        for id in 10..=15 {
            waiting.count(&head(id, 1, 10));
        }
        assert!(waiting.is_bearable());
        assert_eq!(waiting.heavy.len(), 1);
        assert!((10..=15).all(|id| !waiting.heavy.contains(&id)));
        // Where nobody is larger than others, nobody goes apart.
        let mut waiting = Waiting::new(1_000);
        for id in 0..500 {
            waiting.count(&head(id, 1, 10));
        }
        assert!(!waiting.is_bearable() && waiting.heavy.is_empty());
    }

    #[test]
    fn slices_find_their_size() {
        let size = 4 << 20;
        let ms = Duration::from_millis;
        assert_eq!(fitting(size, size, ms(250)), size);
        assert_eq!(fitting(size, size, ms(500)), size / 2);
        assert_eq!(fitting(size, size, ms(10_000)), size / 4);
        assert_eq!(fitting(size, size, ms(1)), size * 2);
        assert_eq!(fitting(size, 100, ms(20)), size);
        assert_eq!(fitting(300 << 10, 300 << 10, ms(10_000)), 256 << 10);
    }
}
