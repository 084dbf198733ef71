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
//! whole and a slice of one such project after the other, until it has caught up. A project that some transaction is dropping
//! lags, too, without slices: its rows are locked until that transaction ends, which nobody else is to wait for.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::rc::Rc;
use std::time::{Duration, Instant};

use rakam_event::error::EventError;

use super::dedupe::Deduper;
use super::learn::{Learner, Learnt, register};
use super::lookup::{Found, Registry};
use super::making::Making;
pub use super::making::limits;
use super::quota;
use super::waiting::{FIRST_SLICE_BYTES, Waiting, fitting};
use crate::catalog::backlog::{self, Backlog, Lag, Whose};
use crate::catalog::dead_letter;
use crate::catalog::dropping;
use crate::catalog::inbox::{self, TailRow, Tick};
use crate::catalog::registry::ProjectRow;
use crate::catalog::restored;
use crate::pg::locks::{LockOn, SessionLock};
use crate::pg::snapshot::{Snapshot, XidSnapshot};
use crate::pg::spi::View;
use crate::pg::xact::{self, Failure};
use crate::pg::{PgError, Result, failpoint, wait};

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

/// Projects that transactions are dropping, as far as they were asked for at a look. Whoever begins to drop one afterwards
/// waits for the digest lock before it locks any row.
#[derive(Default)]
struct Going(HashMap<i32, bool>);

impl Going {
    fn has(&mut self, project_id: i32) -> bool {
        *(self.0.entry(project_id)).or_insert_with(|| dropping::is_going(project_id))
    }
}

/// What the first transaction found.
struct Plan {
    tick: Tick,
    /// The next tick; that of the last one if it is only a slice that is digested.
    upto: XidSnapshot,
    /// Whether everybody's events are digested.
    tick_moves: bool,
    /// Whose events are not everybody's: they lag, or will from now on, or are being dropped.
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

/// Digests what was committed before the call, of these projects (None: of all), and whatever else is in turn.
/// Waits for the digest lock.
pub fn catch_up(projects: Option<&[i32]>) -> std::result::Result<(), Failure> {
    let _lock = SessionLock::take(LockOn::Digest);
    readmit_restored()?;
    let goal = xact::worker(|| XidSnapshot::of(View::Under(Snapshot::active())))?;
    let mut watch = Watch::default();
    while watch.look(When::Now)?.more && !xact::worker(|| is_digested(&goal, projects))? {}
    Ok(())
}

/// Puts what came with a dump into the inbox. Call it under the digest lock.
pub fn readmit_restored() -> std::result::Result<(), Failure> {
    while xact::worker(restored::readmit)? > 0 {
        wait::check_interrupts();
    }
    Ok(())
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
        let now = XidSnapshot::of(view)?;
        if self.tick_id != tick.id {
            // Somebody else digested, or nobody has looked yet.
            self.tick_id = tick.id;
            self.seen = tick.snapshot.clone();
            self.waiting = Waiting::new(self.slice_bytes);
        }
        let mut learner = Learner::new(view);
        let mut going = Going::default();
        self.waiting.set_apart_all(|id| going.has(id));
        let cut = self.see(view, &now, &lags, (&mut learner, &mut going))?;
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

        let served: Vec<i32> = apart.iter().copied().filter(|id| !going.has(*id)).collect();
        let next = served
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
        let left = served.len() - usize::from(slice.as_ref().is_some_and(|s| s.ends));
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
        (learner, going): (&mut Learner, &mut Going),
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
                if going.has(head.project_id) {
                    waiting.set_apart(head.project_id);
                    return false;
                }
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
        dead_letter::keep(row, event, &why, true)?;
    }
    Ok(())
}

/// Tries parked events again, each in a transaction of its own. Returns how many left the parking.
pub fn retry_parked() -> std::result::Result<u64, Failure> {
    let due = xact::worker(|| inbox::parked::due(View::Current, 100))?;
    let mut left = 0;
    for parked in due {
        if dropping::is_going(parked.row.project_id) {
            continue;
        }
        let outcome = xact::in_passing(|| retry(&parked))?;
        left += u64::from(outcome == Some(true));
    }
    Ok(left)
}

fn retry(parked: &inbox::parked::Parked) -> Result<bool> {
    let row = &parked.row;
    let dedupe = Rc::new(RefCell::new(Deduper::open([row.project_id])));
    let Found::Place(place) = Registry::new(View::Current).find(row)? else {
        inbox::parked::forget(row.id)?;
        return Ok(true);
    };
    match Making::new(place, Rc::clone(&dedupe)).retry(row)? {
        None => {
            dedupe.borrow_mut().finish()?;
            inbox::parked::forget(row.id).map(|_| true)
        }
        Some(error) if parked.attempts >= ATTEMPTS_MAX => {
            inbox::parked::to_dead_letter(row, &error).map(|()| true)
        }
        Some(error) => inbox::parked::again(row.id, &error).map(|()| false),
    }
}
