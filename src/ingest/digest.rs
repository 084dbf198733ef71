//! The digest: inbox rows become chunks, exactly once.
//!
//! A round has three transactions. The first, read-only, takes the snapshot that becomes the next tick, and learns
//! from the waiting events which collections and fields are new. The second, short, registers those. The third
//! reads the same rows again (the same because the tick's snapshot says which they are), writes chunks and the
//! tick. A crash between them repeats the round; a second digester fails on the tick's primary key.
//!
//! A round takes a bounded slice of the backlog: the snapshot is cut at a transaction id, which is valid because
//! everything below the cut is either finished or listed as in progress.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::panic::{AssertUnwindSafe, catch_unwind};

use rakam_event::batch::{BatchBuilder, EventStamp, Layout};
use rakam_event::discovery::Discovery;
use rakam_event::entry::Limits;
use rakam_event::error::EventError;
use rakam_event::schema::Schema;
use rakam_event::types::FieldType;

use super::append::{Target, append};
use crate::catalog::inbox::{self, Backlog, TailRow, Tick};
use crate::catalog::invalid;
use crate::catalog::registry::{self, Collection, ProjectRow};
use crate::pg::snapshot::{Snapshot, XidSnapshot};
use crate::pg::spi::{self, View};
use crate::pg::xact::{self, Failure};
use crate::pg::{PgError, Result, failpoint, guc, wait};

/// A round stops taking rows at this many bytes of JSON (at the end of a transaction's rows).
const SLICE_BYTES: usize = 64 << 20;
/// A collection's builder is written out as a chunk at this size or number of rows.
const CHUNK_BYTES: usize = 8 << 20;
const CHUNK_ROWS: usize = 100_000;
/// All builders of a round together.
const BUILDERS_BYTES: usize = 128 << 20;
/// A parked event becomes a dead letter after so many attempts.
const ATTEMPTS_MAX: i32 = 8;

/// What a round did.
#[derive(Debug, Clone, Copy, Default)]
pub struct Round {
    pub events: u64,
    /// More is waiting than the slice took.
    pub more: bool,
    /// Collections or fields were registered: tables or columns are to be made.
    pub schema_changed: bool,
}

/// When a look at the inbox becomes a digest.
#[derive(Debug, Clone, Copy)]
pub enum When {
    /// Whatever is waiting.
    Now,
    /// Enough events, or one that has waited long enough; new names are registered in any case.
    Due,
}

/// What a look found.
#[derive(Debug, Clone, Copy, Default)]
pub struct Look {
    pub waiting_events: u64,
    pub round: Round,
}

/// What the first transaction found.
struct Plan {
    tick: Tick,
    upto: XidSnapshot,
    events: u64,
    oldest_us: i64,
    more: bool,
    new_collections: BTreeMap<(i32, String), Vec<(String, FieldType)>>,
    new_fields: BTreeMap<i32, Vec<(String, FieldType)>>,
}

/// Looks at the inbox, registers new names, and digests if it is time. The caller holds the digest lock.
pub fn look(when: When) -> std::result::Result<Look, Failure> {
    let plan = xact::worker(plan)?;
    let mut look = Look {
        waiting_events: plan.events,
        round: Round::default(),
    };
    if plan.events == 0 {
        return Ok(look);
    }
    if !plan.new_collections.is_empty() || !plan.new_fields.is_empty() {
        failpoint::hit("digest.before_registry");
        xact::worker(|| register(&plan))?;
        look.round.schema_changed = true;
    }
    let age_us = xact::now_us() - plan.oldest_us;
    let due = plan.more
        || plan.events as i64 >= guc::digest_events()
        || age_us >= guc::digest_max_age().as_micros() as i64;
    if matches!(when, When::Due) && !due {
        return Ok(look);
    }
    look.round.events = xact::worker(|| write(&plan))?;
    look.round.more = plan.more;
    look.waiting_events = 0;
    Ok(look)
}

/// The limits that apply to events now.
pub fn limits() -> Limits {
    Limits {
        max_event_bytes: guc::max_event_bytes(),
        max_string_bytes: guc::max_string_bytes(),
        max_fields: guc::max_fields(),
    }
}

/// The registry as one transaction sees it, looked up once per collection.
struct Registry {
    view: View,
    projects: HashMap<i32, Option<ProjectRow>>,
    by_id: HashMap<i32, Option<Collection>>,
    by_name: HashMap<(i32, String), Option<Collection>>,
}

impl Registry {
    fn new(view: View) -> Self {
        Self {
            view,
            projects: HashMap::new(),
            by_id: HashMap::new(),
            by_name: HashMap::new(),
        }
    }

    /// The project of a row. None: it was dropped.
    fn project(&mut self, id: i32) -> Result<Option<&ProjectRow>> {
        use std::collections::hash_map::Entry;
        let found = match self.projects.entry(id) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(entry) => entry.insert(registry::project_by_id(self.view, id)?),
        };
        Ok(found.as_ref())
    }

    /// The collection of a row, by id or by name. None: not registered (any more).
    fn collection(&mut self, row: &TailRow) -> Result<Option<Collection>> {
        if row.collection_id != 0 {
            if !self.by_id.contains_key(&row.collection_id) {
                let found = registry::collection_by_id(self.view, row.collection_id)?;
                self.by_id.insert(row.collection_id, found);
            }
            if let Some(found) = &self.by_id[&row.collection_id] {
                return Ok(Some(found.clone()));
            }
        }
        let key = (row.project_id, row.collection.clone());
        if !self.by_name.contains_key(&key) {
            let found = registry::collection_named(self.view, key.0, &key.1)?;
            self.by_name.insert(key.clone(), found);
        }
        Ok(self.by_name[&key].clone())
    }
}

/// The events of a row, one a line.
fn events(row: &TailRow) -> impl Iterator<Item = std::result::Result<&str, PgError>> {
    row.payload
        .split(|&b| b == b'\n')
        .filter(|line| !line.is_empty())
        .map(|line| {
            std::str::from_utf8(line)
                .map_err(|_| PgError::new("22021", "event is not valid UTF-8 text"))
        })
}

/// First transaction: the slice, and what in it is new. Read-only.
fn plan() -> Result<Plan> {
    // A transaction with an id of its own would count itself as finished in its own snapshot.
    if xact::has_xid() {
        return Err(PgError::internal(
            "a digest must not begin in a writing transaction",
        ));
    }
    let view = View::Under(Snapshot::active());
    let tick = inbox::tick(view)?;
    let now: String = spi::first(
        view,
        "SELECT pg_catalog.pg_current_snapshot()::text",
        &[],
        |r| r.must(1),
    )?
    .unwrap_or_default();
    let now = XidSnapshot::parse(&now)
        .ok_or_else(|| PgError::internal("the current snapshot is malformed"))?;

    let mut plan = Plan {
        upto: now.clone(),
        tick,
        events: 0,
        oldest_us: i64::MAX,
        more: false,
        new_collections: BTreeMap::new(),
        new_fields: BTreeMap::new(),
    };
    let mut registry = Registry::new(view);
    let mut learners: HashMap<i32, Discovery> = HashMap::new();
    let mut strangers: BTreeMap<(i32, String), Discovery> = BTreeMap::new();
    let max_fields = guc::max_fields();

    let mut backlog = Backlog::new(view, &plan.tick.snapshot, &now)?;
    let mut bytes = 0;
    let mut last_txid = 0;
    'pages: while let Some(page) = backlog.next_page(view)? {
        wait::check_interrupts();
        for row in &page {
            if bytes >= SLICE_BYTES && row.txid != last_txid && row.txid >= plan.tick.snapshot.xmax
            {
                plan.upto = now.cut(row.txid);
                plan.more = true;
                break 'pages;
            }
            bytes += row.payload.len();
            last_txid = row.txid;
            plan.events += row.n as u64;
            plan.oldest_us = plan.oldest_us.min(row.received_at_us);
            if registry.project(row.project_id)?.is_none() {
                continue;
            }
            let learner =
                match registry.collection(row)? {
                    Some(collection) => {
                        use std::collections::hash_map::Entry;
                        Some(match learners.entry(collection.id) {
                            Entry::Occupied(known) => known.into_mut(),
                            Entry::Vacant(entry) => {
                                let schema = registry::schema(view, &collection)?;
                                entry.insert(Discovery::new(&schema, max_fields))
                            }
                        })
                    }
                    None => {
                        let key = (row.project_id, row.collection.clone());
                        Some(strangers.entry(key).or_insert_with(|| {
                            Discovery::new(&Schema::new(1, Vec::new()), max_fields)
                        }))
                    }
                };
            if let Some(learner) = learner {
                for event in events(row).flatten() {
                    // A panic teaches nothing; the event is parked when it is written.
                    let _ = catch_unwind(AssertUnwindSafe(|| learner.observe(event)));
                }
            }
        }
    }
    plan.new_collections = strangers
        .into_iter()
        .map(|(key, learner)| (key, learner.new_fields()))
        .collect();
    plan.new_fields = learners
        .into_iter()
        .map(|(id, learner)| (id, learner.new_fields()))
        .filter(|(_, fields)| !fields.is_empty())
        .collect();
    Ok(plan)
}

/// Second transaction: names, in sorted order, before the data that uses them.
fn register(plan: &Plan) -> Result<()> {
    for ((project_id, name), fields) in &plan.new_collections {
        registry::add_collection(*project_id, name)?;
        if let Some(collection) = registry::collection_named(View::Current, *project_id, name)? {
            registry::add_fields(collection.id, fields, false)?;
        }
    }
    for (collection_id, fields) in &plan.new_fields {
        registry::add_fields(*collection_id, fields, false)?;
    }
    Ok(())
}

/// The chunk of a collection in the making.
struct Making {
    project: ProjectRow,
    collection: Collection,
    schema: Schema,
    builder: BatchBuilder,
}

impl Making {
    fn builder(schema: &Schema) -> Result<BatchBuilder> {
        Ok(BatchBuilder::new(schema, Layout::Stored, &limits())?)
    }

    fn stamp(&self, row: &TailRow) -> EventStamp {
        stamp(&self.project, row)
    }

    /// Writes the chunk and begins the next one.
    fn write(&mut self) -> Result<()> {
        let next = Self::builder(&self.schema)?;
        let done = std::mem::replace(&mut self.builder, next);
        if done.rows() == 0 {
            return Ok(());
        }
        let built = done.finish()?;
        append(
            Target {
                project_id: self.project.id,
                collection_id: self.collection.id,
                schema_version: self.schema.version,
                level: 0,
            },
            &built.batch,
        )?;
        invalid::record(
            self.project.id,
            self.collection.id,
            &built.invalid,
            &built.invalid_counts,
        )
    }

    /// Adds an event alone: Err is why it cannot be digested. A panic counts as one; the builder it may have
    /// left half-filled is not used any further.
    fn push(&mut self, event: &str, stamp: &EventStamp) -> std::result::Result<(), Poison> {
        match catch_unwind(AssertUnwindSafe(|| self.builder.push(event, stamp))) {
            Ok(Ok(())) => Ok(()),
            // The event is fine, the batch is at Arrow's limit: it goes into the next one.
            Ok(Err(EventError::BatchFull)) if self.builder.rows() > 0 => match self.write() {
                Ok(()) => self.push(event, stamp),
                Err(error) => Err(Poison::Failed(error)),
            },
            Ok(Err(error)) => Err(Poison::Refused(error.to_string())),
            Err(_) => Err(Poison::Panicked),
        }
    }
}

thread_local! {
    /// Events (inbox row, line) that crashed the parser in this process.
    static CRASHERS: RefCell<HashSet<(i64, usize)>> = RefCell::new(HashSet::new());
}

enum Poison {
    Refused(String),
    /// Not the event's fault: the round fails.
    Failed(PgError),
    /// The builder is unusable.
    Panicked,
}

/// What the server knows about the events of a row.
pub fn stamp(project: &ProjectRow, row: &TailRow) -> EventStamp {
    EventStamp {
        received_at_us: row.received_at_us,
        shift_us: row.shift_us,
        time_min_us: row.received_at_us.saturating_sub(project.time_past_us),
        time_max_us: row.received_at_us.saturating_add(project.time_future_us),
        xid: row.txid as i64,
    }
}

/// Third transaction: chunks and the tick. Returns the number of events.
fn write(plan: &Plan) -> Result<u64> {
    let mut registry = Registry::new(View::Current);
    let mut making: BTreeMap<i32, Making> = BTreeMap::new();
    let mut count = 0;
    // The rows are those that the plan saw: the tick's snapshot decides, and this one is newer.
    let view = View::Under(Snapshot::active());
    let mut backlog = Backlog::new(view, &plan.tick.snapshot, &plan.upto)?;
    while let Some(page) = backlog.next_page(view)? {
        wait::check_interrupts();
        for row in &page {
            let Some(project) = registry.project(row.project_id)?.cloned() else {
                // The project was dropped: its events go with it.
                continue;
            };
            let Some(collection) = registry.collection(row)? else {
                // Registered in the second transaction and dropped since: its events go with it.
                continue;
            };
            let id = collection.id;
            if let std::collections::btree_map::Entry::Vacant(entry) = making.entry(id) {
                let schema = registry::schema(View::Current, &collection)?;
                let builder = Making::builder(&schema)?;
                entry.insert(Making {
                    project,
                    collection,
                    schema,
                    builder,
                });
            }
            let Some(target) = making.get_mut(&id) else {
                continue;
            };
            count += digest_row(target, row)?;
            if target.builder.bytes() >= CHUNK_BYTES || target.builder.rows() >= CHUNK_ROWS {
                target.write()?;
            }
        }
        if making.values().map(|m| m.builder.bytes()).sum::<usize>() >= BUILDERS_BYTES {
            for target in making.values_mut() {
                target.write()?;
            }
        }
    }
    for target in making.values_mut() {
        wait::check_interrupts();
        target.write()?;
    }
    failpoint::hit("digest.before_tick");
    inbox::add_tick(plan.tick.id + 1, &plan.upto)?;
    failpoint::hit("digest.before_commit");
    Ok(count)
}

/// Adds the events of a row to its collection's chunk; what cannot be digested is parked, alone.
fn digest_row(target: &mut Making, row: &TailRow) -> Result<u64> {
    let stamp = target.stamp(row);
    let mut count = 0;
    let lines = row.payload.split(|&b| b == b'\n').filter(|l| !l.is_empty());
    for (number, line) in lines.enumerate() {
        let Ok(event) = std::str::from_utf8(line) else {
            inbox::park(
                row,
                line,
                target.collection.id,
                "event is not valid UTF-8 text",
            )?;
            continue;
        };
        if CRASHERS.with_borrow(|known| known.contains(&(row.id, number))) {
            inbox::park(
                row,
                line,
                target.collection.id,
                "the event crashed its parser",
            )?;
            continue;
        }
        match target.push(event, &stamp) {
            Ok(()) => count += 1,
            Err(Poison::Refused(error)) => {
                inbox::park(row, line, target.collection.id, &error)?;
            }
            Err(Poison::Failed(error)) => return Err(error),
            // The builder cannot be trusted any more: the round is given up, and repeated with this event
            // known as poison.
            Err(Poison::Panicked) => {
                CRASHERS.with_borrow_mut(|known| known.insert((row.id, number)));
                return Err(PgError::internal(format!(
                    "could not digest an event of collection \"{}\"",
                    target.collection.name
                )));
            }
        }
    }
    Ok(count)
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
    let mut registry = Registry::new(View::Current);
    let project = registry.project(row.project_id)?.cloned();
    let (Some(project), Some(collection)) = (project, registry.collection(row)?) else {
        inbox::unpark(row.id)?;
        return Ok(true);
    };
    let schema = registry::schema(View::Current, &collection)?;
    let builder = Making::builder(&schema)?;
    let mut target = Making {
        project,
        collection,
        schema,
        builder,
    };
    let stamp = target.stamp(row);
    let mut error = String::from("the event is empty");
    let mut fine = false;
    for event in events(row) {
        let pushed = match event {
            Ok(event) => target.push(event, &stamp),
            Err(e) => Err(Poison::Refused(e.message)),
        };
        match pushed {
            Ok(()) => fine = true,
            Err(Poison::Refused(why)) => error = why,
            Err(Poison::Failed(failure)) => return Err(failure),
            Err(Poison::Panicked) => "the event crashed its parser".clone_into(&mut error),
        }
    }
    if fine {
        target.write()?;
        inbox::unpark(row.id)?;
    } else if parked.attempts >= ATTEMPTS_MAX {
        inbox::to_dead_letter(row, &error)?;
    } else {
        inbox::park_again(row.id, &error)?;
        return Ok(false);
    }
    Ok(true)
}
