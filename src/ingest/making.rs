//! A chunk in the making: the events of one collection, as text while they are few, as columns from then on.
//!
//! Few events keep their text as a row chunk: columns cost kilobytes per collection, which thousands of collections with
//! an event each would pay at once. Every event becomes columns here all the same, whatever is stored of it then: what
//! cannot be digested is found now and set aside alone, and values that do not fit are counted now, once.

use std::cell::RefCell;
use std::collections::HashSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;

use arrow::array::RecordBatch;
use rakam_event::batch::{BatchBuilder, EventStamp, InvalidCount, InvalidValue, Layout};
use rakam_event::entry::Limits;
use rakam_event::error::EventError;
use rakam_lake::chunk;
use rakam_lake::row_chunk::{Origin, Rows, Rules};

use super::append::{Target, append, append_rows};
use super::dedupe::Deduper;
use super::lookup::Place;
use crate::catalog::inbox::TailRow;
use crate::catalog::{inbox, invalid};
use crate::pg::{PgError, Result, guc};

/// A chunk is written out at this size or number of rows.
const CHUNK_BYTES: usize = 8 << 20;
const CHUNK_ROWS: usize = 100_000;

thread_local! {
    /// Events (inbox row, line) that crashed the parser in this process.
    static CRASHERS: RefCell<HashSet<(i64, usize)>> = RefCell::new(HashSet::new());
}

/// The limits that apply to events now.
pub fn limits() -> Limits {
    Limits {
        max_event_bytes: guc::max_event_bytes(),
        max_string_bytes: guc::max_string_bytes(),
        max_fields: guc::max_fields(),
    }
}

/// Why an event did not become part of a batch.
enum Poison {
    Refused(String),
    /// The builder is unusable.
    Panicked,
}

/// What a batch is written as.
struct Built<'a> {
    batch: RecordBatch,
    /// The same events as text, while they are few.
    few: Option<&'a Rows>,
    invalid: Vec<InvalidValue>,
    invalid_counts: Vec<InvalidCount>,
}

/// The chunk of a collection in the making.
pub struct Making {
    place: Place,
    rules: Rules,
    /// Events that are not columns yet, and where in the inbox each was.
    rows: Rows,
    sources: Vec<(i64, usize)>,
    builder: Option<BatchBuilder>,
    /// That of the round.
    dedupe: Rc<RefCell<Deduper>>,
    /// Events written so far.
    pub written: u64,
}

impl Making {
    pub fn new(place: Place, dedupe: Rc<RefCell<Deduper>>) -> Self {
        let project = &place.project;
        let rules = Rules {
            time_past_us: project.time_past_us,
            time_future_us: project.time_future_us,
            max_string_bytes: guc::max_string_bytes(),
        };
        Self {
            place,
            rules,
            rows: Rows::default(),
            sources: Vec::new(),
            builder: None,
            dedupe,
            written: 0,
        }
    }

    /// About how many bytes of memory it takes.
    pub fn bytes(&self) -> usize {
        self.rows.bytes() + self.builder.as_ref().map_or(0, BatchBuilder::bytes)
    }

    /// Adds the events of a row; what cannot be digested is parked, alone. Writes the chunk when it is full.
    pub fn add(&mut self, row: &TailRow) -> Result<()> {
        let origin = self.origin(row);
        let lines = row.payload.split(|&b| b == b'\n').filter(|l| !l.is_empty());
        for (number, line) in lines.enumerate() {
            let Ok(event) = std::str::from_utf8(line) else {
                self.park(line, &origin, "event is not valid UTF-8 text")?;
                continue;
            };
            let source = (row.id, number);
            if self.builder.is_some() {
                self.push_or_park(event, origin, source)?;
                continue;
            }
            self.rows.push(event, origin);
            self.sources.push(source);
            if !self.rows.is_few() {
                self.begin_columns()?;
            }
        }
        let full = |b: &BatchBuilder| b.bytes() >= CHUNK_BYTES || b.rows() >= CHUNK_ROWS;
        if self.builder.as_ref().is_some_and(full) {
            self.write()?;
        }
        Ok(())
    }

    fn origin(&self, row: &TailRow) -> Origin {
        Origin {
            received_at_us: row.received_at_us,
            shift_us: row.shift_us,
            xid: row.txid as i64,
            rules: self.rules,
        }
    }

    fn new_builder(&self) -> Result<BatchBuilder> {
        Ok(BatchBuilder::new(
            &self.place.schema,
            Layout::Stored,
            &limits(),
        )?)
    }

    /// The events are not few any more.
    fn begin_columns(&mut self) -> Result<()> {
        self.builder = Some(self.new_builder()?);
        let rows = std::mem::take(&mut self.rows);
        let sources = std::mem::take(&mut self.sources);
        for ((event, origin), source) in rows.iter().zip(sources) {
            self.push_or_park(event, origin, source)?;
        }
        Ok(())
    }

    fn push_or_park(&mut self, event: &str, origin: Origin, source: (i64, usize)) -> Result<()> {
        if is_crasher(source) {
            return self.park(event.as_bytes(), &origin, CRASHED);
        }
        let mut builder = match self.builder.take() {
            Some(builder) => builder,
            None => self.new_builder()?,
        };
        match push(&mut builder, event, &origin.stamp()) {
            // The event is fine, the batch is at Arrow's limit: it goes into the next one.
            Ok(false) if builder.rows() > 0 => {
                self.builder = Some(builder);
                self.write()?;
                self.builder = Some(self.new_builder()?);
                self.push_or_park(event, origin, source)
            }
            Ok(fits) => {
                self.builder = Some(builder);
                if fits {
                    return Ok(());
                }
                self.park(
                    event.as_bytes(),
                    &origin,
                    &EventError::BatchFull.to_string(),
                )
            }
            Err(Poison::Refused(error)) => {
                self.builder = Some(builder);
                self.park(event.as_bytes(), &origin, &error)
            }
            Err(Poison::Panicked) => Err(self.crashed(source)),
        }
    }

    /// The builder cannot be trusted any more: the round is given up, and repeated with this event known as poison.
    fn crashed(&self, source: (i64, usize)) -> PgError {
        CRASHERS.with_borrow_mut(|known| known.insert(source));
        PgError::internal(format!(
            "could not digest an event of collection \"{}\"",
            self.place.collection.name
        ))
    }

    /// Writes the chunk and begins the next one.
    pub fn write(&mut self) -> Result<()> {
        let Some(builder) = self.builder.take() else {
            return self.write_few();
        };
        if builder.rows() == 0 {
            return Ok(());
        }
        let done = builder.finish()?;
        self.store(&Built {
            batch: done.batch,
            few: None,
            invalid: done.invalid,
            invalid_counts: done.invalid_counts,
        })
    }

    fn write_few(&mut self) -> Result<()> {
        let rows = std::mem::take(&mut self.rows);
        let sources = std::mem::take(&mut self.sources);
        if rows.is_empty() {
            return Ok(());
        }
        let mut builder = self.new_builder()?;
        let mut good = Rows::default();
        for ((event, origin), source) in rows.iter().zip(sources) {
            let why = if is_crasher(source) {
                CRASHED.to_owned()
            } else {
                match push(&mut builder, event, &origin.stamp()) {
                    Ok(true) => {
                        good.push(event, origin);
                        continue;
                    }
                    Ok(false) => EventError::BatchFull.to_string(),
                    Err(Poison::Refused(error)) => error,
                    Err(Poison::Panicked) => return Err(self.crashed(source)),
                }
            };
            self.park(event.as_bytes(), &origin, &why)?;
        }
        if good.is_empty() {
            return Ok(());
        }
        let done = builder.finish()?;
        self.store(&Built {
            batch: done.batch,
            few: Some(&good),
            invalid: done.invalid,
            invalid_counts: done.invalid_counts,
        })
    }

    fn store(&mut self, built: &Built<'_>) -> Result<()> {
        let target = Target {
            project_id: self.place.project.id,
            collection_id: self.place.collection.id,
            schema_version: self.place.schema.version,
            level: 0,
            since_us: None,
        };
        let unique = self.dedupe.borrow_mut().unique(
            target.project_id,
            target.collection_id,
            &built.batch,
        )?;
        match (built.few, unique) {
            (None, None) => append(target, &built.batch)?,
            (None, Some(unique)) => append(target, &unique.batch)?,
            (Some(rows), None) => append_rows(target, &chunk::info(&built.batch)?, rows)?,
            (Some(_), Some(unique)) if unique.batch.num_rows() == 0 => {}
            (Some(rows), Some(unique)) => {
                let mut kept = Rows::default();
                for ((event, origin), &is_kept) in rows.iter().zip(&unique.kept) {
                    if is_kept {
                        kept.push(event, origin);
                    }
                }
                append_rows(target, &chunk::info(&unique.batch)?, &kept)?;
            }
        }
        self.written += built.batch.num_rows() as u64;
        invalid::record(
            target.project_id,
            target.collection_id,
            &built.invalid,
            &built.invalid_counts,
        )
    }

    fn park(&self, event: &[u8], origin: &Origin, error: &str) -> Result<()> {
        let collection = &self.place.collection;
        let row = TailRow {
            id: 0,
            project_id: collection.project_id,
            collection_id: collection.id,
            collection: collection.name.clone(),
            txid: origin.xid as u64,
            n: 1,
            received_at_us: origin.received_at_us,
            shift_us: origin.shift_us,
            payload: Vec::new(),
        };
        inbox::parked::park(&row, event, collection.id, error)
    }

    /// Another attempt on the events of a parked row: those that are fine are written. None: some were; else why not.
    pub fn retry(&mut self, row: &TailRow) -> Result<Option<String>> {
        let origin = self.origin(row);
        let mut error = String::from("the event is empty");
        for line in row.payload.split(|&b| b == b'\n').filter(|l| !l.is_empty()) {
            let Ok(event) = std::str::from_utf8(line) else {
                "event is not valid UTF-8 text".clone_into(&mut error);
                continue;
            };
            // With a builder of its own: one that crashed is of no use to the next event.
            match push(&mut self.new_builder()?, event, &origin.stamp()) {
                Ok(true) => {
                    self.rows.push(event, origin);
                    // A parked row is in no inbox table.
                    self.sources.push((0, 0));
                }
                Ok(false) => error = EventError::BatchFull.to_string(),
                Err(Poison::Refused(why)) => error = why,
                Err(Poison::Panicked) => CRASHED.clone_into(&mut error),
            }
        }
        if self.rows.is_empty() {
            return Ok(Some(error));
        }
        if !self.rows.is_few() {
            self.begin_columns()?;
        }
        self.write()?;
        Ok(None)
    }
}

const CRASHED: &str = "the event crashed its parser";

fn is_crasher(source: (i64, usize)) -> bool {
    CRASHERS.with_borrow(|known| known.contains(&source))
}

/// Adds an event alone; false: the batch is at Arrow's limit. A panic counts as poison.
fn push(
    builder: &mut BatchBuilder,
    event: &str,
    stamp: &EventStamp,
) -> std::result::Result<bool, Poison> {
    match catch_unwind(AssertUnwindSafe(|| builder.push(event, stamp))) {
        Ok(Ok(())) => Ok(true),
        Ok(Err(EventError::BatchFull)) => Ok(false),
        Ok(Err(error)) => Err(Poison::Refused(error.to_string())),
        Err(_) => Err(Poison::Panicked),
    }
}
