//! Mappers: functions of the project's admin that every event of a collection goes through where it enters, before
//! it is stored. [`enter`] is the door for all paths; the SQL function that sets mappers is here too.
//!
//! First the project's mapper, then the collection's. An event whose mapper fails becomes a dead letter as it
//! entered that mapper, and the call goes on. A batch goes through in one subtransaction; when that fails, each of
//! its events goes alone, so that only the bad ones are set aside. What mappers may take together is in [`Allowance`].

use std::cell::Cell;
use std::rc::Rc;
use std::time::Instant;

use pgrx::{default, pg_extern};
use rakam_event::entry;
use rakam_event::names::CollectionName;

use super::collect::limits;
use crate::catalog::audit;
use crate::catalog::dead_letter::{self, NewLetter};
use crate::catalog::inbox::{self, Entry};
use crate::catalog::mapper::{self as catalog, Mapper, Mappers, Stage};
use crate::catalog::outbox;
use crate::catalog::projects::{self, Right};
use crate::pg::function::{self, Calls, JSONB, JSONB_ARRAY, Signature};
use crate::pg::security::{self, ActAs};
use crate::pg::tenant::{self, Failure, Tenant};
use crate::pg::{ErrorReport, Oid, PgError, Result, guc, not_null, roles, xact};

mod allowance;

use allowance::TIMEOUTS_MAX;
pub use allowance::{Allowance, CALLS};

/// Bytes of events after which a collection gets another inbox row.
const ROW_BYTES: usize = 1 << 20;

/// Bytes of mapped events that a batch may hold at a time; beyond them its events go one by one.
const BATCH_BYTES_MAX: usize = 64 << 20;

/// How deep mappers may collect events that have mappers.
const DEPTH_MAX: u32 = 4;

/// What an event may bring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    /// An event of a client.
    Event,
    /// A row that Postgres has typed: it may have an `_extra`.
    Row,
}

/// Sets the mapper of a collection, or with collection NULL of every collection of the project; mapper NULL removes
/// it. SQL: `rakam.set_mapper(project text, collection text, mapper regprocedure, every_batch boolean DEFAULT false)`.
/// Errors: 42501 no such project or not its admin, no right to the function; 42883 no such function; 22023 it does
/// not take and return jsonb (with every_batch jsonb[]); 42602 / 42939 the collection's name.
#[pg_extern(sql = "
CREATE FUNCTION rakam.set_mapper(
  project text, collection text, mapper regprocedure, every_batch boolean DEFAULT false) RETURNS void
LANGUAGE c VOLATILE PARALLEL UNSAFE
AS 'MODULE_PATHNAME', '@FUNCTION_NAME@';")]
fn set_mapper(
    project: Option<&str>,
    collection: Option<&str>,
    mapper: Option<Oid>,
    every_batch: default!(Option<bool>, "false"),
) -> std::result::Result<(), ErrorReport> {
    Ok(audit::call("set_mapper", project, collection, || {
        let every_batch = not_null(every_batch, "every_batch")?;
        set(
            not_null(project, "project")?,
            collection,
            mapper,
            every_batch,
        )
    })?)
}

fn set(
    project: &str,
    collection: Option<&str>,
    mapper: Option<Oid>,
    every_batch: bool,
) -> Result<()> {
    xact::ensure_writable("set a mapper")?;
    let project = projects::authorize(project, Right::Admin)?;
    let collection = collection.map(CollectionName::parse).transpose()?;
    let collection = collection.as_ref().map(CollectionName::as_str);
    let caller = security::current_user();
    match mapper {
        None => {
            let _owner = ActAs::owner();
            catalog::remove(project.id, collection)
        }
        Some(function) => {
            let signature = existing(function, &function.to_u32().to_string())?;
            ensure_mapper(function, &signature, every_batch)?;
            ensure_executable(function, caller)?;
            let _owner = ActAs::owner();
            catalog::set(project.id, collection, function, caller, every_batch)
        }
    }
}

fn existing(function: Oid, name: &str) -> Result<Signature> {
    function::signature(function).ok_or_else(|| {
        PgError::new("42883", format!("function {name} does not exist"))
            .hint("It was dropped: rakam.set_mapper sets another one, or with NULL none.")
    })
}

fn ensure_mapper(function: Oid, signature: &Signature, every_batch: bool) -> Result<()> {
    let ty = if every_batch { JSONB_ARRAY } else { JSONB };
    if signature.is_plain && signature.arguments == [ty] && signature.result == ty {
        return Ok(());
    }
    let hint = if every_batch {
        "With every_batch a mapper is a function that takes one jsonb[] and returns jsonb[]."
    } else {
        "A mapper is a function that takes one jsonb and returns jsonb; with every_batch => true, one that takes and \
         returns jsonb[]."
    };
    Err(PgError::new(
        "22023",
        format!("function {} cannot be a mapper", function::name(function)),
    )
    .hint(hint))
}

fn ensure_executable(function: Oid, user: Oid) -> Result<()> {
    if function::may_execute(function, user) {
        return Ok(());
    }
    Err(PgError::new(
        "42501",
        format!(
            "permission denied for function {}",
            function::name(function)
        ),
    )
    .hint("A mapper runs as the role that sets it, which needs EXECUTE on the function."))
}

/// Whether events of this collection go through a mapper, so that they have to come as JSON.
pub fn applies(project_id: i32, collection: &str) -> Result<bool> {
    Ok(catalog::of_project(project_id)?
        .of(collection)
        .next()
        .is_some())
}

/// Stores events after their collection's mappers; how many were stored. The others were dropped by a mapper, which
/// is counted, or have become dead letters. Their mappers have the time that the caller waits, who has charged the events.
pub fn enter(entry: &Entry<'_>, shape: Shape) -> Result<i64> {
    let outcome = enter_but_failed(entry, shape, &mut Allowance::default())?;
    for letter in &outcome.failed {
        keep(entry, shape, letter, true)?;
    }
    Ok(outcome.stored)
}

/// As [`enter`], but that the events whose mapper failed, or had no time left, are the caller's to keep.
pub fn enter_but_failed(
    entry: &Entry<'_>,
    shape: Shape,
    allowance: &mut Allowance,
) -> Result<Outcome> {
    let mappers = catalog::of_project(entry.project_id)?;
    if mappers.of(entry.collection).next().is_none() {
        put(entry)?;
        return Ok(Outcome::all_stored(entry));
    }
    let text = std::str::from_utf8(&entry.payload)
        .map_err(|_| PgError::internal("events are not UTF-8"))?;
    let lines = text.split('\n').enumerate();
    let lines = lines.map(|(at, text)| Line::new(text, Some(at))).collect();
    let mut run = Run::new(entry, shape, mappers, Stage::Project, allowance);
    run.through(0, lines)?;
    run.finish()
}

/// Stores events that have been through their mappers: in the inbox, or on their way to the event store.
pub fn put(entry: &Entry<'_>) -> Result<()> {
    match entry.store_id {
        None => inbox::append(entry),
        Some(store_id) => outbox::append(entry, store_id),
    }
}

/// Keeps a failed event as a dead letter. `is_charged`: it was charged already.
pub fn keep(entry: &Entry<'_>, shape: Shape, letter: &Failed, is_charged: bool) -> Result<()> {
    dead_letter::insert(&NewLetter {
        project_id: entry.project_id,
        collection: entry.collection,
        payload: letter.event.as_bytes(),
        error: &letter.error,
        received_at_us: entry.received_at_us,
        shift_us: entry.shift_us,
        stage: letter.stage,
        is_row: shape == Shape::Row,
        is_charged,
    })
}

/// Stores one event or row as a dead letter, neither mapped nor charged: for events that are refused where nobody can be told.
pub fn set_aside(entry: &Entry<'_>, shape: Shape, error: &PgError) -> Result<()> {
    let letter = Failed::whole(entry, Stage::Project, error);
    keep(entry, shape, &letter, false)
}

/// An event whose mapper failed, as it entered that mapper.
pub struct Failed {
    pub event: String,
    /// Which line of the payload it was, where a mapper of whole batches has not left that open.
    pub line: Option<usize>,
    pub stage: Stage,
    pub error: String,
}

impl Failed {
    /// All of an entry.
    fn whole(entry: &Entry<'_>, stage: Stage, error: &PgError) -> Self {
        Self {
            event: String::from_utf8_lossy(&entry.payload).into_owned(),
            line: None,
            stage,
            error: reason(error),
        }
    }
}

/// What became of events.
pub struct Outcome {
    pub stored: i64,
    pub failed: Vec<Failed>,
    /// Whether an event was stored without an `_id`; None: there was no mapper that could have taken one away.
    pub lacks_id: Option<bool>,
}

impl Outcome {
    /// Of events that no mapper has seen.
    pub fn all_stored(entry: &Entry<'_>) -> Self {
        Self {
            stored: i64::from(entry.n),
            failed: Vec::new(),
            lacks_id: None,
        }
    }

    /// Of events that no mapper from this stage on has seen, because of an error.
    pub fn refused(entry: &Entry<'_>, stage: Stage, error: &PgError) -> Self {
        Self {
            stored: 0,
            failed: vec![Failed::whole(entry, stage, error)],
            lacks_id: None,
        }
    }
}

/// An event on its way, and which line of the payload it was, if that is known.
struct Line {
    text: String,
    at: Option<usize>,
}

impl Line {
    fn new(text: &str, at: Option<usize>) -> Self {
        Self {
            text: text.to_owned(),
            at,
        }
    }
}

/// The events of an entry that failed before, as they are checked now. `Err` within: one of them is none.
pub fn checked(entry: &Entry<'_>, shape: Shape) -> Result<Result<Vec<String>>> {
    let text = std::str::from_utf8(&entry.payload)
        .map_err(|_| PgError::internal("events are not UTF-8"))?;
    Ok(text.split('\n').map(|line| check(line, shape)).collect())
}

/// Tries checked events of an entry again, from the mapper on in which they failed, for as long as the caller waits.
pub fn again(
    entry: &Entry<'_>,
    shape: Shape,
    stage: Stage,
    events: Vec<String>,
) -> Result<Outcome> {
    let lines = events.into_iter().map(|text| Line { text, at: None });
    let mappers = catalog::of_project(entry.project_id)?;
    let mut allowance = Allowance::default();
    let mut run = Run::new(entry, shape, mappers, stage, &mut allowance);
    run.through(0, lines.collect())?;
    run.finish()
}

/// What a dead letter says of an error.
pub fn reason(error: &PgError) -> String {
    format!("{} (SQLSTATE {})", error.message, error.sqlstate)
}

fn check(event: &str, shape: Shape) -> Result<String> {
    let checked = match shape {
        Shape::Event => entry::check_event(event, &limits())?,
        Shape::Row => entry::check_row(event, &limits())?,
    };
    Ok(checked.into_owned())
}

/// Where the events that a mapper gets came in, for the mappers built in that remember something.
#[derive(Debug, Clone, Copy)]
pub struct Surroundings {
    pub project_id: i32,
    pub received_at_us: i64,
    pub shift_us: i64,
}

thread_local! {
    static SURROUNDINGS: Cell<Option<Surroundings>> = const { Cell::new(None) };
    static DEPTH: Cell<u32> = const { Cell::new(0) };
}

/// The events that the running mapper works on; None outside of mappers.
pub fn surroundings() -> Option<Surroundings> {
    SURROUNDINGS.get()
}

/// Set while a mapper runs; put back also when an error unwinds.
struct Inside {
    before: Option<Surroundings>,
}

impl Inside {
    fn of(entry: &Entry<'_>) -> Result<Self> {
        if DEPTH.get() >= DEPTH_MAX {
            return Err(PgError::new(
                "54001",
                format!("mappers collect events for each other more than {DEPTH_MAX} deep"),
            ));
        }
        DEPTH.set(DEPTH.get() + 1);
        Ok(Self {
            before: SURROUNDINGS.replace(Some(Surroundings {
                project_id: entry.project_id,
                received_at_us: entry.received_at_us,
                shift_us: entry.shift_us,
            })),
        })
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        DEPTH.set(DEPTH.get() - 1);
        SURROUNDINGS.set(self.before);
    }
}

/// The way of some events through the mappers into the inbox.
struct Run<'a> {
    entry: &'a Entry<'a>,
    shape: Shape,
    mappers: Rc<Mappers>,
    chain: Vec<Mapper>,
    allowance: &'a mut Allowance,
    dropped: i64,
    stored: i64,
    failed: Vec<Failed>,
    /// Of those, for which there was no time.
    late: usize,
    lacks_id: bool,
    /// Events that wait to be stored, one a line.
    payload: String,
    n: i32,
}

impl<'a> Run<'a> {
    fn new(
        entry: &'a Entry<'a>,
        shape: Shape,
        mappers: Rc<Mappers>,
        from: Stage,
        allowance: &'a mut Allowance,
    ) -> Self {
        let chain = mappers
            .of(entry.collection)
            .filter(|mapper| mapper.stage >= from)
            .cloned()
            .collect();
        Self {
            entry,
            shape,
            mappers,
            chain,
            allowance,
            dropped: 0,
            stored: 0,
            failed: Vec::new(),
            late: 0,
            lacks_id: false,
            payload: String::new(),
            n: 0,
        }
    }

    /// Takes events from the `at`-th mapper on.
    fn through(&mut self, at: usize, mut events: Vec<Line>) -> Result<()> {
        let Some(mapper) = self.chain.get(at).cloned() else {
            return events.iter().try_for_each(|event| self.store(&event.text));
        };
        let is_fit = self.allowance.timeouts(mapper.function) == 0 && !self.allowance.is_used_up();
        if events.len() > 1 && is_fit {
            match self.call(&mapper, &events) {
                Ok(mapped) => {
                    self.dropped += mapped.dropped;
                    // For those that are left there was no time.
                    events.drain(..mapped.called);
                    self.through(at + 1, mapped.events)?;
                }
                Err(Failure::Cancelled(error)) => return Err(error),
                // What it did is rolled back; which event it was shows when each goes alone.
                Err(Failure::Tenant(_)) => {}
                Err(Failure::TimedOut(_)) => self.allowance.many_timed_out(),
            }
        }
        for event in events {
            let error = if self.allowance.timeouts(mapper.function) >= TIMEOUTS_MAX {
                PgError::new(
                    "57014",
                    format!("not called again after {TIMEOUTS_MAX} timeouts"),
                )
            } else if self.allowance.is_used_up() {
                self.late += 1;
                PgError::new(
                    "57014",
                    "not called, as the mappers of its batch had taken too long",
                )
            } else {
                match self.call(&mapper, std::slice::from_ref(&event)) {
                    Ok(mapped) => {
                        self.dropped += mapped.dropped;
                        self.through(at + 1, mapped.events)?;
                        continue;
                    }
                    Err(Failure::Cancelled(error)) => return Err(error),
                    Err(Failure::Tenant(error)) => error,
                    Err(Failure::TimedOut(error)) => {
                        self.allowance.timed_out(mapper.function);
                        error
                    }
                }
            };
            self.failed.push(Failed {
                event: event.text,
                line: event.at,
                stage: mapper.stage,
                error: self.blame(&mapper, &error),
            });
        }
        Ok(())
    }

    fn blame(&self, mapper: &Mapper, error: &PgError) -> String {
        format!(
            "mapper {} of collection \"{}\": {}",
            mapper.signature,
            self.entry.collection,
            reason(error)
        )
    }

    /// Calls a mapper on events, in one subtransaction: on the first, and on as many of the others as there is time for.
    fn call(&mut self, mapper: &Mapper, events: &[Line]) -> std::result::Result<Mapped, Failure> {
        let inside = Inside::of(self.entry).map_err(Failure::Tenant)?;
        let tenant = Tenant {
            user: self.runner(mapper).map_err(Failure::Tenant)?,
            schema: &self.mappers.project,
            timeout: guc::mapper_timeout(),
        };
        let shape = self.shape;
        let began = Instant::now();
        let ends = self.allowance.ends(began);
        let mapped = tenant::attempt(&tenant, |timer| {
            let mut calls = Calls::new(mapper.function);
            let mut mapped = Mapped::default();
            if mapper.every_batch {
                let texts: Vec<&str> = events.iter().map(|event| event.text.as_str()).collect();
                let results = calls.on_array(&texts, BATCH_BYTES_MAX)?;
                mapped.called = events.len();
                mapped.dropped = events.len().saturating_sub(results.len()) as i64;
                // Which result is of which event only the mapper knows.
                let line = events.first().filter(|_| events.len() == 1);
                for result in results {
                    mapped.take(result, shape, line.and_then(|line| line.at))?;
                }
            } else {
                for event in events {
                    if mapped.called > 0 && ends.is_some_and(|ends| Instant::now() >= ends) {
                        break;
                    }
                    timer.restart();
                    mapped.take(calls.on_value(&event.text)?, shape, event.at)?;
                    mapped.called += 1;
                }
            }
            Ok(mapped)
        });
        drop(inside);
        let is_in_vain = matches!(mapped, Err(Failure::TimedOut(_)));
        self.allowance.take(began, is_in_vain);
        mapped
    }

    /// The role as which a mapper runs: who set it, who still has to be an admin of the project and allowed to call
    /// the function.
    ///
    /// A superuser may set a function that is somebody else's, and whoever owns a function can put anything into it
    /// later: such a function runs as its own owner.
    fn runner(&self, mapper: &Mapper) -> Result<Oid> {
        let signature = existing(mapper.function, &mapper.signature)?;
        ensure_mapper(mapper.function, &signature, mapper.every_batch)?;
        let Some(name) = roles::name(mapper.owner) else {
            return Err(PgError::new(
                "42704",
                "the role that set the mapper does not exist",
            ));
        };
        let is_superuser = security::is_superuser(mapper.owner);
        if !is_superuser && !security::has_privileges_of(mapper.owner, self.mappers.admin_role) {
            return Err(PgError::new(
                "42501",
                format!(
                    "role \"{name}\", which set the mapper, is no admin of the project any more"
                ),
            ));
        }
        let runner = if is_superuser && !security::is_superuser(signature.owner) {
            signature.owner
        } else {
            mapper.owner
        };
        ensure_executable(mapper.function, runner)?;
        Ok(runner)
    }

    fn store(&mut self, event: &str) -> Result<()> {
        if self.n > 0 && self.payload.len() + 1 + event.len() > ROW_BYTES {
            self.flush()?;
        }
        if self.n > 0 {
            self.payload.push('\n');
        }
        self.payload.push_str(event);
        self.n += 1;
        self.lacks_id |= !self.chain.is_empty() && !entry::has_id(event);
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        if self.n == 0 {
            return Ok(());
        }
        put(&Entry {
            n: self.n,
            payload: self.payload.as_bytes().into(),
            ..*self.entry
        })?;
        self.stored += i64::from(self.n);
        self.payload.clear();
        self.n = 0;
        Ok(())
    }

    fn finish(mut self) -> Result<Outcome> {
        self.flush()?;
        self.allowance.count(self.entry.n as usize, self.late);
        if self.dropped > 0 {
            catalog::count_dropped(self.entry.project_id, self.entry.collection, self.dropped)?;
        }
        Ok(Outcome {
            stored: self.stored,
            failed: self.failed,
            lacks_id: Some(self.lacks_id),
        })
    }
}

/// What a mapper made of events.
#[derive(Default)]
struct Mapped {
    /// Of so many, the first ones.
    called: usize,
    events: Vec<Line>,
    bytes: usize,
    dropped: i64,
}

impl Mapped {
    /// Takes a result in: NULL drops the event, anything else has to be an event again.
    fn take(&mut self, result: Option<String>, shape: Shape, at: Option<usize>) -> Result<()> {
        let Some(text) = result else {
            self.dropped += 1;
            return Ok(());
        };
        let text = check(&text, shape).map_err(|mut error| {
            error.message = format!("its result is no event: {}", error.message);
            error
        })?;
        self.bytes += text.len();
        if self.bytes > BATCH_BYTES_MAX {
            return Err(PgError::new(
                "54000",
                format!("result is larger than {BATCH_BYTES_MAX} bytes"),
            ));
        }
        self.events.push(Line { text, at });
        Ok(())
    }
}
