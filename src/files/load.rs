//! The load of files into a collection, in a worker.
//!
//! The files are read piece by piece, converted and parted by month on other threads ([`super::reading`]). What has been
//! converted waits in memory until it is worth a transaction, which stores it as chunks of one month each and notes in the
//! same breath how far the files are stored; the reading goes on meanwhile. A cancel or a crash loses what waits; the same
//! call goes on from the note. New fields are registered before the data, in short transactions of their own.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arrow::array::types::TimestampMicrosecondType;
use arrow::array::{AsArray, RecordBatch};
use rakam_event::entry::Limits;
use rakam_event::error::EventError;
use rakam_event::print;
use rakam_event::schema::{RECEIVED_AT, Schema};
use rakam_event::types::FieldType;
use rakam_files::convert::Converter;
use rakam_files::format::{Format, Options};
use rakam_files::locate::Found;
use rakam_files::log::Log;
use rakam_files::source::{Position, Spec};
use rakam_lake::chunk;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::chunks;
use super::place::{Keep, Place};
use super::reading::{self, Converted, Readers, Told, value_bytes};
use crate::catalog::inbox::Entry;
use crate::catalog::load::{self as note, Progress};
use crate::catalog::projects::{self, Project};
use crate::catalog::registry::{self, Collection, ProjectRow};
use crate::catalog::{invalid, progress};
use crate::ingest::append::Target;
use crate::ingest::mapper::{self, Shape};
use crate::ingest::quota;
use crate::pg::locks::{LockOn, SessionLock};
use crate::pg::spi::View;
use crate::pg::xact::{self, Failure};
use crate::pg::{PgError, Result, failpoint, guc, memory, runtime, wait};

/// Memory of converted events that makes a transaction worth while, in sizes of a flush: with history in any order it
/// makes chunks of some ten thousand events of each month. As much is read while it is stored.
const BUFFER_SIZES: usize = 2;
const BUFFER_BYTES_MAX: usize = 128 << 20;
/// After so long what is there is stored, however little.
const STORE_INTERVAL: Duration = Duration::from_secs(60);
/// A transaction is repeated so often when it met another one.
const ATTEMPTS: usize = 4;
/// How long a lock that others have on the collection is waited for, and how soon it is asked for again.
const LOCK_PATIENCE: Duration = Duration::from_secs(60);
const LOCK_PAUSE: Duration = Duration::from_millis(100);
/// Bytes of events after which there is another inbox row.
const INBOX_ROW_BYTES: usize = 1 << 20;
/// How much larger than an event its text in a file may be.
const RECORD_SLACK: usize = 64 << 10;

/// What a call asks for, with its rights already checked.
#[derive(Debug, Serialize, Deserialize)]
pub struct Request {
    pub project_id: i32,
    pub collection: String,
    /// As the caller wrote it.
    pub url: String,
    pub place: Place,
    pub format: Option<String>,
    /// A JSON object.
    pub options: String,
    /// The caller may set `_received_at`.
    pub admin: bool,
    /// New collections and fields are refused.
    pub fixed: bool,
}

/// Loads the files, or the rest of them; returns the events stored by the load, in all its attempts. `make_ready` is called
/// for the collection before the last of its events are stored: what comes after that may not be known to have succeeded,
/// and the same call would load everything again.
pub fn run(
    request: &Request,
    make_ready: impl FnOnce(i32) -> std::result::Result<(), Failure>,
) -> std::result::Result<u64, Failure> {
    memory::keep_freed();
    let spec = spec(request).map_err(Failure::Error)?;
    let readers = Readers::default();
    let files = find(&request.place, &readers)?;
    for file in &files {
        let format = match spec.format {
            Some(format) => format,
            None => Format::of_name(&file.name).map_err(error)?,
        };
        spec.options.ensure_for(format).map_err(error)?;
    }
    let key = key(request, &files).map_err(Failure::Error)?;
    let [a, b, c, d, ..] = key;
    let _turn = SessionLock::take(LockOn::Load(i32::from_le_bytes([a, b, c, d])));
    let (mut load, converter) = xact::worker(|| Load::begin(request, &key))?;
    let total = files.iter().map(|f| f.bytes).sum();
    let outcome = progress::show(request.project_id, "copy_from", "bytes", total, |shown| {
        load.files(files, spec, converter, &readers, shown)?;
        make_ready(load.collection.id)?;
        load.store(true)
    });
    if matches!(outcome, Err(Failure::Error(_))) && load.stored == Progress::default() {
        // There is nothing to go on from, and nothing for which chunks should wait.
        xact::worker(|| note::finish(&key))?;
    }
    outcome.map(|()| load.stored.events)
}

/// The files of the call as they are now, outside of any transaction.
fn find(place: &Place, readers: &Readers) -> std::result::Result<Vec<Found>, Failure> {
    let counters = Arc::default();
    let root = xact::worker(|| place.open(Keep::Nothing, &counters, readers.stop()))?;
    let (pattern, stop) = (place.pattern.clone(), readers.stop().clone());
    let found = runtime::wait_for(async move { root.find(&pattern, &stop).await });
    found.map_err(Failure::Error)?.map_err(error)
}

fn error(error: rakam_files::FilesError) -> Failure {
    Failure::Error(error.into())
}

fn spec(request: &Request) -> Result<Spec> {
    Ok(Spec {
        format: request.format.as_deref().map(Format::parse).transpose()?,
        options: Options::parse(&request.options)?,
        max_record_bytes: guc::max_event_bytes() + RECORD_SLACK,
    })
}

/// What makes a call the same one: everything it says, and the files as they are. Not who makes it, nor what the project takes by
/// now: a load that was refused goes on once that was mended.
fn key(request: &Request, files: &[Found]) -> Result<[u8; 32]> {
    let mut hash = Sha256::new();
    let said = (
        request.project_id,
        &request.collection,
        &request.url,
        &request.format,
        &request.options,
    );
    let text = serde_json::to_vec(&said)
        .map_err(|e| PgError::internal(format!("could not encode a request: {e}")))?;
    hash.update((text.len() as u64).to_le_bytes());
    hash.update(text);
    for file in files {
        hash.update(file.identity());
    }
    Ok(hash.finalize().into())
}

/// A load under way.
struct Load<'a> {
    key: &'a [u8],
    project: ProjectRow,
    collection: Collection,
    fixed: bool,
    /// All events went through the inbox when the load began.
    is_mapped: bool,
    /// What has been told about values since the last store.
    log: Log,
    /// What is stored.
    stored: Progress,
    /// Up to where the buffer reaches.
    read: Progress,
    /// By the schema of the batches: a field that came later may lie in `_extra` of those before it.
    buffer: Vec<(Arc<Schema>, Vec<Converted>)>,
    buffer_bytes: usize,
    last_store: Instant,
}

impl<'a> Load<'a> {
    /// The load, and what converts the rows of its files.
    fn begin(request: &Request, key: &'a [u8]) -> Result<(Self, Converter)> {
        let gone = || PgError::new("42704", "the project was dropped");
        let project =
            registry::project_by_id(View::Current, request.project_id)?.ok_or_else(gone)?;
        let name = &request.collection;
        let find = || registry::collection_named(View::Current, project.id, name);
        let collection = match find()? {
            Some(collection) => collection,
            None if request.fixed => return Err(EventError::UnknownCollection(name.clone()).into()),
            None if registry::add_collection(project.id, name)? => find()?
                .ok_or_else(|| PgError::internal("a collection just registered is not there"))?,
            None => {
                return Err(PgError::new(
                    "53400",
                    "the project has as many collections as its quota allows",
                )
                .hint("rakam.set_quota raises the quota."));
            }
        };
        // Else its table could not be made at the end, when everything is stored. What has its name may also be the table that
        // has been made for it meanwhile.
        if collection.ft.is_none()
            && let Some(what) = registry::obstacle(View::Current, &collection)?
            && find()?.is_some_and(|again| again.ft.is_none())
        {
            return Err(
                PgError::new("42710", format!("{what} \"{name}\" already exists")).hint(
                    "A collection's table cannot have its name: choose another name, or rename what has it.",
                ),
            );
        }
        let schema = registry::schema(View::Current, &collection)?;
        let stored = note::begin(key, project.id, collection.id)?;
        let limits = Limits {
            max_event_bytes: guc::max_event_bytes(),
            max_string_bytes: guc::max_string_bytes(),
            max_fields: guc::max_fields(),
        };
        let converter = Converter::new(&schema, limits, request.admin);
        let load = Self {
            key,
            is_mapped: mapper::applies(project.id, &collection.name)?,
            fixed: request.fixed,
            log: Log::default(),
            project,
            collection,
            stored,
            read: stored,
            buffer: Vec::new(),
            buffer_bytes: 0,
            last_store: Instant::now(),
        };
        Ok((load, converter))
    }

    /// Reads what is left of the files, and stores all but the last of it.
    fn files(
        &mut self,
        files: Vec<Found>,
        spec: Spec,
        converter: Converter,
        readers: &Readers,
        shown: &mut progress::Progress,
    ) -> std::result::Result<(), Failure> {
        let buffer = (guc::flush_size_bytes() as usize)
            .saturating_mul(BUFFER_SIZES)
            .min(BUFFER_BYTES_MAX);
        let files = reading::Files {
            files,
            spec,
            first: self.stored.file,
            from: self.stored.position,
        };
        let conversion = reading::Conversion {
            converter,
            time_past_us: self.project.time_past_us,
            time_future_us: self.project.time_future_us,
            is_mapped: self.is_mapped,
            room: buffer,
        };
        let mut port = reading::start(files, conversion, readers).map_err(Failure::Error)?;
        loop {
            wait::check_interrupts();
            match port.receive() {
                Some(Told::NewFields(fields, answer)) => {
                    // Nobody waits any more when the reading has ended by itself; the port tells why.
                    let _unheard = answer.send(self.register(&fields)?);
                }
                Some(Told::Rows(converted)) => {
                    let bytes = converted.bytes;
                    self.take(*converted);
                    if self.buffer_bytes >= buffer || self.last_store.elapsed() >= STORE_INTERVAL {
                        self.store(false)?;
                    }
                    shown.set(bytes)?;
                }
                Some(Told::Next(file)) => {
                    self.read.file = file;
                    self.read.position = Position::default();
                }
                Some(Told::Failed(failed)) => return Err(error(failed)),
                Some(Told::End) => return Ok(()),
                None => {
                    let early = PgError::internal("the reading of files ended early");
                    return Err(Failure::Error(early));
                }
            }
        }
    }

    /// Makes fields of new names; the schema with them.
    fn register(&mut self, fields: &[(String, FieldType)]) -> std::result::Result<Schema, Failure> {
        if let (true, Some((field, _))) = (self.fixed, fields.first()) {
            let refused = EventError::UnknownField {
                collection: self.collection.name.clone(),
                field: field.clone(),
            };
            return Err(Failure::Error(refused.into()));
        }
        xact::worker(|| {
            registry::add_fields(self.collection.id, fields, false)?;
            let collection = self.registered()?;
            registry::schema(View::Current, &collection)
        })
    }

    /// Takes a piece into the buffer.
    fn take(&mut self, mut piece: Converted) {
        self.read.position = piece.after;
        let samples = std::mem::take(&mut piece.samples);
        self.log.extend(samples, std::mem::take(&mut piece.counts));
        if piece.memory > 0 {
            self.buffer_bytes += piece.memory;
            match self.buffer.last_mut() {
                Some((last, pieces)) if last.version == piece.schema.version => pieces.push(piece),
                _ => self.buffer.push((Arc::clone(&piece.schema), vec![piece])),
            }
        }
    }

    /// The collection as it is registered now.
    fn registered(&self) -> Result<Collection> {
        registry::collection_by_id(View::Current, self.collection.id)?.ok_or_else(|| self.dropped())
    }

    fn dropped(&self) -> PgError {
        let name = &self.collection.name;
        PgError::new("42704", format!("collection \"{name}\" was dropped"))
    }

    fn locked(&self) -> PgError {
        let name = &self.collection.name;
        PgError::new(
            "55P03",
            format!("collection \"{name}\" is locked by another transaction"),
        )
        .hint("Call it again when that transaction has ended: it goes on where it was.")
    }

    /// Keeps the collection from being dropped until the end of the transaction.
    fn keep(&self) -> Result<()> {
        if registry::keep_collections(&[self.collection.id])?.is_empty() {
            return Err(self.dropped());
        }
        Ok(())
    }

    /// Stores what is in the buffer, with the note of how far the files are stored; `last` ends the load.
    fn store(&mut self, last: bool) -> std::result::Result<(), Failure> {
        failpoint::hit("load.before_store");
        let (samples, counts) = self.log.take();
        let end = Instant::now() + LOCK_PATIENCE;
        let mut attempt = 1;
        loop {
            let stored = xact::worker(|| {
                let events = self.stored.events + self.store_events()?;
                invalid::record(self.project.id, self.collection.id, &samples, &counts)?;
                let to = Progress {
                    events,
                    ..self.read
                };
                let there = if last {
                    note::finish(self.key)?
                } else {
                    note::advance(self.key, &to)?
                };
                if !there {
                    return Err(PgError::new("55000", "the load was given up meanwhile"));
                }
                failpoint::hit("load.before_commit");
                Ok(to)
            });
            match stored {
                Ok(to) => {
                    self.stored = to;
                    break;
                }
                // The counters of invalid values have other writers, too.
                Err(Failure::Error(error))
                    if attempt < ATTEMPTS
                        && matches!(error.sqlstate.as_str(), "40P01" | "40001") =>
                {
                    attempt += 1;
                }
                // Somebody adds fields to the collection, or drops it in a transaction that is still open.
                Err(Failure::Error(error)) if error.sqlstate == "55P03" => {
                    if Instant::now() >= end {
                        return Err(Failure::Error(self.locked()));
                    }
                    wait::wait(None, LOCK_PAUSE);
                }
                Err(failure) => return Err(failure),
            }
        }
        self.buffer.clear();
        self.buffer_bytes = 0;
        self.last_store = Instant::now();
        failpoint::hit("load.after_store");
        Ok(())
    }

    /// Stores what is in the buffer; how many events that were. Those with an `_id`, whose copies are to be found, and
    /// those that go through a mapper take the road of the inbox, the others are chunks at once.
    fn store_events(&self) -> Result<u64> {
        let collection = self.registered()?;
        let xid = xact::top_xid() as i64;
        let mut stored = 0;
        // A load is no flood: it passes no inbox, and nobody waits for it. Its bytes count.
        let mut payer = projects::by_name(&self.project.name)?.map_or_else(
            || Err(PgError::no_project(&self.project.name)),
            |p| Ok(p.as_ref().clone()),
        )?;
        payer.quota.events_per_second = None;
        let is_mapped = mapper::applies(self.project.id, &collection.name)?;
        let mut ready = Vec::new();
        for (schema, pieces) in &self.buffer {
            let mut months = BTreeMap::<i32, Vec<RecordBatch>>::new();
            for piece in pieces {
                let (mut chunks, mut inbox) = (piece.rows.months.clone(), Vec::new());
                if let Some(rows) = &piece.rows.in_order {
                    let (plain, others) = reading::roads(rows, is_mapped).map_err(arrow_failed)?;
                    inbox.extend(others);
                    if let Some(plain) = plain {
                        chunks.extend(reading::by_month(&plain)?);
                    }
                }
                if is_mapped {
                    // Since after they were read.
                    for (_, rows) in chunks.drain(..) {
                        inbox.push(chunk::conform(&rows, &schema.arrow())?);
                    }
                }
                for rows in inbox {
                    wait::check_interrupts();
                    stored += to_inbox(&payer, &collection, schema, &rows)?;
                }
                for (month, rows) in chunks {
                    months.entry(month).or_default().push(rows);
                }
            }
            if !months.is_empty() {
                ready.push((schema, months));
            }
        }
        if !ready.is_empty() {
            // Behind the mappers, who take what time they like: others wait while it is kept.
            self.keep()?;
        }
        for (schema, months) in ready {
            let target = Target {
                project_id: self.project.id,
                collection_id: collection.id,
                schema_version: schema.version,
                level: 0,
                since_us: None,
            };
            let plain = || months.values().flatten();
            let rows: usize = plain().map(RecordBatch::num_rows).sum();
            let bytes: usize = plain().map(value_bytes).sum();
            quota::charge_stored(&payer, rows as i64, bytes as i64)?;
            stored += rows as u64;
            chunks::store(target, schema, months, xid)?;
        }
        Ok(stored)
    }
}

/// Sends rows through mappers and inbox; how many were stored.
fn to_inbox(
    payer: &Project,
    collection: &Collection,
    schema: &Schema,
    rows: &RecordBatch,
) -> Result<u64> {
    let received = rows
        .column_by_name(RECEIVED_AT)
        .and_then(|c| c.as_primitive_opt::<TimestampMicrosecondType>())
        .ok_or_else(|| PgError::internal("rows of a file have no time of receipt"))?;
    let mut stored = 0;
    let mut payload = String::new();
    let mut n = 0;
    for row in 0..rows.num_rows() {
        if n > 0 {
            payload.push('\n');
        }
        print::write_row(rows, schema, row, &mut payload)?;
        n += 1;
        let next = row + 1;
        let ends = next == rows.num_rows()
            || payload.len() >= INBOX_ROW_BYTES
            || received.value(next) != received.value(row);
        if ends {
            quota::charge(payer, n.into(), payload.len() as i64)?;
            let entry = Entry {
                project_id: payer.id,
                collection_id: collection.id,
                collection: &collection.name,
                n,
                received_at_us: received.value(row),
                shift_us: 0,
                store_id: None,
                payload: payload.as_bytes().into(),
            };
            stored += mapper::enter(&entry, Shape::Row)? as u64;
            payload.clear();
            n = 0;
        }
    }
    Ok(stored)
}

fn arrow_failed(error: arrow::error::ArrowError) -> PgError {
    PgError::internal(format!("could not store the rows of a file: {error}"))
}
