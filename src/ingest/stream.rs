//! Records of a source become events, in the transaction in which the consumer moves the source's positions.
//!
//! The consumer's turn with a batch that it polled outside of any transaction:
//!
//! 1. [`Stream::prepare`], outside of a transaction: decodes the records; collections and fields that they need are registered
//!    in short transactions of their own.
//! 2. In one transaction: [`Stream::store`], then `catalog::sources::advance`, which compares and sets the epoch and the position of
//!    each split that the batch moves. If somebody else has a split by now, everything is rolled back.
//! 3. If the transaction failed for another reason the consumer prepares the batch anew: `store` may leave what it likes in
//!    `Prepared`. But where there is no room for the batch now (53400, 53100) it is whole: the consumer stores it later, and no
//!    mapper has been called by then.
//!
//! Many events of a collection become columns, and a chunk of their own; they lose the copies of events that are known. Few, and
//! all of a collection with mappers, go through the inbox, where they are read at once and digested with others. Both roads
//! are those of every other event. Events that come back from an event store of the project itself have been through its
//! mappers and were charged when they were collected: neither is done again.
//!
//! The mappers of a batch have an allowance of time ([`Allowance`]). One that would take longer fails, and what it has is read
//! again in smaller batches ([`Pace`]). Of one that cannot be smaller the events that are left become dead letters.
//!
//! A consumer has one `Stream` for each source that it reads; it is made anew when the source's definition changes.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;

use arrow::array::{Array, AsArray, RecordBatch};
use rakam_event::schema::{ID, Schema};
use rakam_files::format::Options as CsvOptions;
use rakam_files::log::Log;
use rakam_sources::batch::{Batch, Limits, Record, written_us};
use rakam_sources::decode::{self, DeadLetter, DecodeError, Decoder, Route};
use rakam_sources::options::What;

use super::append::{self, Target};
use super::collect::limits;
use super::dedupe::Deduper;
use super::mapper::{self, Allowance, Outcome, Shape};
use super::quota;
use crate::catalog::dead_letter::{self, NewRecord};
use crate::catalog::inbox::Entry;
use crate::catalog::invalid;
use crate::catalog::mapper::Stage;
use crate::catalog::projects::{self, Project, Quota};
use crate::catalog::registry::{self, Collection};
use crate::catalog::sources::Source;
use crate::pg::xact::{self, Failure};
use crate::pg::{PgError, Result, failpoint, guc, wait};

mod again;
mod pace;
mod prepare;
mod schemas;

pub use again::Again;
use pace::Pace;
pub use schemas::unknown_source;

/// Of a day's bytes a batch is such a part at most, so that it fits into what is left of most days.
const DAY_PARTS: i64 = 16;

/// How the records of one source become events.
pub struct Stream {
    project_id: i32,
    source_id: i32,
    source: String,
    route: Route,
    decoder: Decoder,
    /// Of files: how their CSV is written.
    csv: CsvOptions,
    /// As of the last look.
    quota: Quota,
    pace: Pace,
}

/// Where an event came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Origin {
    /// By its place in the batch.
    Record(usize),
    /// The split's place in the batch's moves, and of a file the line if it is known.
    Split(usize, Option<u64>),
    /// Some record of the batch.
    Batch,
}

/// Rows of a collection that become a chunk.
struct Part {
    rows: RecordBatch,
    /// They come back from an event store of the project.
    is_own: bool,
    /// Of each row; of one for all: the same.
    origins: Vec<Origin>,
}

impl Part {
    fn origin(&self, row: usize) -> Option<Origin> {
        self.origins
            .get(row)
            .or_else(|| self.origins.first().filter(|_| self.origins.len() == 1))
            .copied()
    }
}

/// What becomes chunks of a collection.
struct Table {
    collection: Collection,
    schema: Rc<Schema>,
    parts: Vec<Part>,
    invalid: Log,
    /// Of the events as they were sent; and of those that come back from an event store of the project.
    bytes: usize,
    own_bytes: usize,
}

impl Table {
    /// Events that did not come back from an event store of the project.
    fn events_of_others(&self) -> usize {
        let others = self.parts.iter().filter(|part| !part.is_own);
        others.map(|part| part.rows.num_rows()).sum()
    }
}

type Tables = BTreeMap<(i32, i32), Table>;

/// Events that go through the inbox, one a line.
struct Lines {
    collection: String,
    shape: Shape,
    /// They come back from an event store of the project.
    is_own: bool,
    payload: String,
    origins: Vec<Origin>,
    /// Whether a line lacks an `_id`.
    lacks_id: bool,
}

impl Lines {
    /// What is known of where a line came from, whichever it was.
    fn common_origin(&self, prepared: &Prepared) -> Origin {
        let mut splits = self.origins.iter().map(|&origin| prepared.split(origin));
        match splits.next() {
            Some(Some(first)) if splits.all(|split| split == Some(first)) => {
                Origin::Split(first, None)
            }
            _ => Origin::Batch,
        }
    }
}

/// What is no event.
struct Letter {
    origin: Origin,
    /// None: the record's bytes.
    payload: Option<Vec<u8>>,
    error: String,
    /// Of an event.
    collection: Option<String>,
    stage: Stage,
    is_row: bool,
    /// Of a row of CSV: the names of the columns of its file, as a JSON array.
    columns: Option<Rc<str>>,
    /// The project's quota has it.
    is_charged: bool,
}

/// A batch that is ready to be stored.
pub struct Prepared {
    batch: Arc<Batch>,
    received_at_us: i64,
    project: String,
    /// By collection and version of its schema: counters are written in this order by everybody.
    tables: Tables,
    lines: Vec<Lines>,
    letters: Vec<Letter>,
    /// Nothing was taken out of it.
    is_whole: bool,
}

impl Prepared {
    /// Whether it may be stored later, after an attempt that failed. A full disk, too, answers 53100, but in the midst of it.
    pub fn is_whole(&self) -> bool {
        self.is_whole
    }

    /// How many records it has.
    fn records(&self) -> usize {
        self.batch.moves.iter().map(|m| m.records as usize).sum()
    }

    fn record(&self, origin: Origin) -> Option<&Record> {
        match origin {
            Origin::Record(at) => self.batch.records().get(at),
            Origin::Split(..) | Origin::Batch => None,
        }
    }

    /// The place of an event's split in the batch's moves.
    fn split(&self, origin: Origin) -> Option<usize> {
        match origin {
            Origin::Record(_) => self.record(origin).map(|record| record.split),
            Origin::Split(split, _) => Some(split),
            Origin::Batch => None,
        }
    }
}

/// What became of a batch.
#[derive(Debug, Default)]
pub struct Stored {
    pub events: u64,
    pub dead: u64,
    /// For each of the batch's moves, whether an event of it came without an `_id`: read again, it would count twice.
    pub lacks_id: Vec<bool>,
}

/// Why a record is no event, as a dead letter says it.
fn reason(error: &DecodeError) -> String {
    format!("{error} (SQLSTATE {})", error.sqlstate())
}

impl Stream {
    /// Outside of a transaction or in one.
    pub fn new(source: &Source) -> Self {
        Self {
            project_id: source.project_id,
            source_id: source.id,
            source: source.name.clone(),
            route: source.options.route.clone(),
            decoder: Decoder::new(
                source.options.format,
                source.options.route.clone(),
                limits(),
            ),
            csv: match &source.options.what {
                What::Objects { options, .. } => options.clone(),
                What::Topics(_) | What::Stream(_) => CsvOptions::default(),
            },
            quota: Quota::default(),
            pace: Pace::default(),
        }
    }

    /// The project has this quota now.
    pub fn set_quota(&mut self, quota: Quota) {
        self.quota = quota;
    }

    /// How much the next batch may have: no more than the project's quota takes at once, and its mappers in a while.
    pub fn limits(&self) -> Limits {
        let mut limits = Limits::default();
        if let Some(per_second) = self.quota.events_per_second {
            let most = usize::try_from(per_second).unwrap_or(usize::MAX);
            limits.records = limits.records.min(most.max(1));
        }
        if let Some(per_day) = self.quota.bytes_per_day {
            let most = usize::try_from(per_day / DAY_PARTS).unwrap_or(usize::MAX);
            limits.bytes = limits.bytes.min(most.max(1));
        }
        if let Some(most) = self.pace.most() {
            limits.records = limits.records.min(most);
        }
        limits
    }

    /// Decodes a batch. Outside of any transaction.
    pub fn prepare(&mut self, batch: Arc<Batch>) -> std::result::Result<Prepared, Failure> {
        self.decoder.set_limits(limits());
        self.learn_schemas(&batch)?;
        prepare::prepare(self, batch)
    }

    /// Stores a batch, in the transaction that moves the positions; nothing else is locked or written in it before but by the
    /// mappers of its events.
    ///
    /// Errors: 53400 and 53100 there is no room for it now, and `prepared` is as it was; 40001 what it was prepared for has changed
    /// meanwhile; 57014 its mappers take too long for a batch of this size, and [`Self::limits`] are smaller now.
    pub fn store(&mut self, prepared: &mut Prepared) -> Result<Stored> {
        failpoint::hit("stream.before_store");
        let project = projects::by_name(&prepared.project)?
            .filter(|project| project.id == self.project_id)
            .ok_or_else(|| PgError::new("42704", "the project was dropped"))?;
        charge(&project, prepared)?;
        prepared.is_whole = false;
        let (records, bound) = (prepared.records(), self.limits().records);
        let mut storing = Storing {
            source: &self.source,
            project: &project,
            dedupe: None,
            done: Stored {
                lacks_id: vec![false; prepared.batch.moves.len()],
                ..Stored::default()
            },
            letters: std::mem::take(&mut prepared.letters),
        };
        // Mappers take their time: what others wait for is locked behind them.
        let mut allowance = Allowance::of_batch();
        for lines in std::mem::take(&mut prepared.lines) {
            storing.lines(prepared, &lines, &mut allowance)?;
            if allowance.late() > 0 && self.pace.cut(records, bound, allowance.done()) {
                return Err(PgError::new(
                    "57014",
                    format!("mappers take too long for a batch of {records} records"),
                ));
            }
        }
        self.pace
            .took(records, allowance.spent(), guc::mapper_timeout());
        if allowance.only_many_timed_out() {
            self.pace.halve(records);
        }
        let tables = std::mem::take(&mut prepared.tables);
        let has_ids = |part: &Part| ids(part).is_none_or(|ids| ids.null_count() < ids.len());
        if tables.values().flat_map(|t| &t.parts).any(has_ids) {
            storing.dedupe = Some(Deduper::open([project.id]));
        }
        keep(&project, &tables)?;
        for table in tables.into_values() {
            storing.table(prepared, table)?;
        }
        let done = storing.finish(prepared)?;
        failpoint::hit("stream.after_store");
        Ok(done)
    }
}

fn ids(part: &Part) -> Option<&arrow::array::StringArray> {
    part.rows.column_by_name(ID)?.as_string_opt::<i32>()
}

/// Keeps the collections as they were when the batch was prepared.
fn keep(project: &Project, tables: &Tables) -> Result<()> {
    if tables.is_empty() {
        return Ok(());
    }
    let ids: Vec<i32> = tables.keys().map(|(id, _)| *id).collect();
    let kept = registry::keep_collections(&ids)?;
    for table in tables.values() {
        let name = &table.collection.name;
        let is_same = |c: &Collection| c.id == table.collection.id && c.name == *name;
        if !kept.iter().any(is_same)
            || table.events_of_others() > 0 && mapper::applies(project.id, name)?
        {
            return Err(PgError::new(
                "40001",
                format!("collection \"{name}\" has changed since its events were decoded"),
            ));
        }
    }
    Ok(())
}

fn charge(project: &Project, prepared: &Prepared) -> Result<()> {
    let mut batch = quota::Batch::default();
    for table in prepared.tables.values() {
        batch.events += table.events_of_others();
        batch.stored_bytes += table.bytes - table.own_bytes;
        batch.charged_bytes += table.own_bytes;
    }
    for lines in &prepared.lines {
        match lines.is_own {
            true => batch.charged_bytes += lines.payload.len(),
            false => {
                batch.events += lines.origins.len();
                batch.inbox_bytes += lines.payload.len();
            }
        }
    }
    quota::charge_batch(project, &batch)
}

/// A batch being stored.
struct Storing<'a> {
    source: &'a str,
    project: &'a Project,
    dedupe: Option<Deduper>,
    done: Stored,
    letters: Vec<Letter>,
}

impl Storing<'_> {
    fn lacks_id(&mut self, prepared: &Prepared, origin: Option<Origin>) {
        if let Some(split) = origin.and_then(|origin| prepared.split(origin))
            && let Some(lacks) = self.done.lacks_id.get_mut(split)
        {
            *lacks = true;
        }
    }

    /// Stores columns as chunks.
    fn table(&mut self, prepared: &Prepared, mut table: Table) -> Result<()> {
        let target = Target {
            project_id: self.project.id,
            collection_id: table.collection.id,
            schema_version: table.schema.version,
            level: 0,
            since_us: None,
        };
        let xid = xact::top_xid() as i64;
        for part in table.parts {
            wait::check_interrupts();
            let ids = ids(&part);
            for row in 0..part.rows.num_rows() {
                if ids.is_none_or(|ids| ids.is_null(row)) {
                    self.lacks_id(prepared, part.origin(row));
                }
            }
            let unique = match &mut self.dedupe {
                Some(dedupe) => {
                    dedupe.unique(target.project_id, target.collection_id, &part.rows)?
                }
                None => None,
            };
            let rows = unique.map_or(part.rows, |unique| unique.batch);
            self.done.events += rows.num_rows() as u64;
            append::append(target, &append::stamped(&rows, xid)?)?;
        }
        let (samples, counts) = table.invalid.take();
        invalid::record(target.project_id, target.collection_id, &samples, &counts)
    }

    /// Sends lines through mappers and inbox.
    fn lines(
        &mut self,
        prepared: &Prepared,
        lines: &Lines,
        allowance: &mut Allowance,
    ) -> Result<()> {
        let entry = Entry {
            project_id: self.project.id,
            collection_id: projects::collection_id(self.project.id, &lines.collection)?,
            collection: &lines.collection,
            n: lines.origins.len() as i32,
            received_at_us: prepared.received_at_us,
            shift_us: 0,
            store_id: None,
            payload: lines.payload.as_bytes().into(),
        };
        let outcome = match lines.is_own {
            true => {
                mapper::put(&entry)?;
                Outcome::all_stored(&entry)
            }
            false => mapper::enter_but_failed(&entry, lines.shape, allowance)?,
        };
        self.done.events += outcome.stored as u64;
        if outcome.lacks_id.unwrap_or(lines.lacks_id) {
            for &origin in &lines.origins {
                self.lacks_id(prepared, Some(origin));
            }
        }
        for failed in outcome.failed {
            let origin = failed.line.and_then(|line| lines.origins.get(line));
            self.letters.push(Letter {
                origin: origin
                    .copied()
                    .unwrap_or_else(|| lines.common_origin(prepared)),
                payload: Some(failed.event.into_bytes()),
                error: failed.error,
                collection: Some(lines.collection.clone()),
                stage: failed.stage,
                is_row: lines.shape == Shape::Row,
                columns: None,
                is_charged: true,
            });
        }
        Ok(())
    }

    fn finish(mut self, prepared: &Prepared) -> Result<Stored> {
        if let Some(dedupe) = &mut self.dedupe {
            dedupe.finish()?;
        }
        let letters: Vec<NewRecord<'_>> = (self.letters.iter())
            .map(|letter| letter.to_store(prepared))
            .collect();
        dead_letter::insert_records(
            self.project.id,
            self.source,
            prepared.received_at_us,
            &letters,
        )?;
        self.done.dead = letters.len() as u64;
        Ok(self.done)
    }
}

impl Letter {
    /// A record that is no event. One of an event store of the project (`is_own`) is mapped and charged.
    fn of_record(dead: &DeadLetter, is_own: bool) -> Self {
        Self {
            origin: Origin::Record(dead.record),
            payload: None,
            error: reason(&dead.error),
            collection: None,
            stage: match is_own {
                true => Stage::Stored,
                false => Stage::Project,
            },
            is_row: false,
            columns: None,
            is_charged: is_own,
        }
    }

    fn to_store<'a>(&'a self, prepared: &'a Prepared) -> NewRecord<'a> {
        let batch = &prepared.batch;
        let record = prepared.record(self.origin);
        let named = || Some(decode::collection_text(batch.collection(record?)?));
        let split = prepared
            .split(self.origin)
            .and_then(|at| batch.moves.get(at));
        NewRecord {
            split: split.map(|moved| moved.split.as_str()),
            offset: match self.origin {
                Origin::Record(_) => record.map(|record| record.offset.to_string()),
                Origin::Split(_, line) => line.map(|line| line.to_string()),
                Origin::Batch => None,
            },
            collection: (self.collection.as_deref().map(Cow::Borrowed)).or_else(named),
            payload: match &self.payload {
                Some(payload) => payload,
                None => record.and_then(|r| batch.value(r)).unwrap_or_default(),
            },
            error: self.error.clone(),
            stage: self.stage,
            is_row: self.is_row,
            is_record: self.collection.is_none(),
            written_at_us: record
                .and_then(|record| record.timestamp_ms)
                .and_then(written_us),
            columns: self.columns.as_deref(),
            is_charged: self.is_charged,
        }
    }
}
