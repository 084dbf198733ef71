//! Flush: a collection's chunks become data files.
//!
//! In steps, each of bounded memory and few files. What fits one step is written as it is; a larger backlog is taken
//! period by period ([`rakam_lake::backlog`]), for which chunks of many months are first rewritten as chunks of one
//! month each.
//!
//! First transaction of a step: which chunks, and (for storages outside of Postgres) an intent per object. Then the
//! objects are written, outside of any transaction. Last transaction: chunks out, files in, intents gone. A crash before
//! it leaves the chunks and perhaps objects that have an intent, which [`super::gc`] deletes.

use std::collections::{BTreeMap, HashMap};

use arrow::array::RecordBatch;
use rakam_event::schema::Schema;
use rakam_lake::backlog::{self, Bounds, ChunkSpan, FEW_FILES, MAX_FILES, SCATTERED_FILES};
use rakam_lake::chunk::{self, ChunkFormat};
use rakam_lake::period::{self, Period, Plan};
use rakam_lake::sort::{SortedRows, count_days, since};
use rakam_lake::write::FileWriter;
use uuid::Uuid;

use crate::catalog::dropping;
use crate::catalog::load;
use crate::catalog::manifest;
use crate::catalog::progress::{self, Progress};
use crate::catalog::projects;
use crate::catalog::registry::{self, Collection};
use crate::catalog::retention;
use crate::ingest::append::{Target, append, of_chunk_size};
use crate::pg::locks::{LockOn, SessionLock};
use crate::pg::spi::View;
use crate::pg::xact::{self, Failure};
use crate::pg::{PgError, Result, failpoint, guc, wait};
use crate::tiers::object::{Home, Output};
use crate::tiers::{delete, describe, reach};

const BATCH_ROWS: usize = 8192;
/// Rows of a chunk that a split makes.
const SPLIT_ROWS: usize = 65_536;

/// What a flush wrote.
#[derive(Debug, Clone, Copy, Default)]
pub struct Flushed {
    pub events: u64,
    pub files: u64,
    pub bytes: u64,
}

/// Writes all chunks that a collection has when called. Waits for another job on the collection.
pub fn collection(collection_id: i32) -> std::result::Result<Flushed, Failure> {
    let job = SessionLock::take(LockOn::CollectionJob(collection_id));
    // Under the lock: it may have been lengthened by who had it.
    let from_us = xact::worker(|| retention::removable_before(View::Current, collection_id))?;
    flush_locked(collection_id, false, from_us, job)
}

/// As [`collection`], leaving out events from before a time.
pub fn collection_since(
    collection_id: i32,
    from_us: Option<i64>,
) -> std::result::Result<Flushed, Failure> {
    let job = SessionLock::take(LockOn::CollectionJob(collection_id));
    flush_locked(collection_id, false, from_us, job)
}

/// As [`collection`], unless another job has the collection, its storage is away or its project is being dropped. While history is loaded into it, only the months of which
/// there is most: the others wait for more.
pub fn try_collection(collection_id: i32) -> std::result::Result<Flushed, Failure> {
    if !reach::is_open(collection_id)? || xact::worker(|| dropping::concerns(collection_id))? {
        return Ok(Flushed::default());
    }
    let Some(job) = SessionLock::try_take(LockOn::CollectionJob(collection_id)) else {
        return Ok(Flushed::default());
    };
    let (loading, from_us) = xact::worker(|| {
        let loading = load::loading(View::Current)?.contains(&collection_id);
        let from_us = retention::removable_before(View::Current, collection_id)?;
        Ok((loading, from_us))
    })?;
    flush_locked(collection_id, loading, from_us, job)
}

fn flush_locked(
    collection_id: i32,
    largest: bool,
    from_us: Option<i64>,
    _job: SessionLock,
) -> std::result::Result<Flushed, Failure> {
    describe::left_behind(collection_id)?;
    let bounds = bounds();
    // Chunks digested meanwhile are left for the next flush, so that a busy collection ends, too.
    let mut chunks = spans(collection_id)?;
    if largest {
        let of_one_month: Vec<ChunkSpan> = (chunks.iter().copied())
            .filter(|c| c.month().is_some())
            .collect();
        let half = bytes(&chunks) / 2;
        if bytes(&of_one_month) >= half {
            chunks = backlog::largest(&of_one_month, half);
        }
    }
    if bytes(&chunks) <= bounds.step_bytes {
        let write = Write {
            finest: Period::Day,
            most: FEW_FILES,
            split_beyond: Some(MAX_FILES),
            from_us,
        };
        match step(collection_id, &ids(&chunks), write)? {
            Done::Written(flushed) => return Ok(flushed),
            Done::Split => chunks = spans(collection_id)?,
        }
    }
    let collection = xact::worker(|| registry::collection_by_id(View::Current, collection_id))?;
    let Some(collection) = collection else {
        return Ok(Flushed::default());
    };
    let total = bytes(&chunks);
    progress::show(collection.project_id, "flush", "bytes", total, |shown| {
        in_steps(collection_id, chunks, (bounds, from_us), shown)
    })
}

/// Writes more chunks than fit one step.
fn in_steps(
    collection_id: i32,
    mut chunks: Vec<ChunkSpan>,
    (bounds, from_us): (Bounds, Option<i64>),
    shown: &mut Progress,
) -> std::result::Result<Flushed, Failure> {
    let mut total = Flushed::default();
    let mut split = false;
    for part in scattered(&chunks, bounds.step_bytes) {
        let write = Write {
            finest: Period::Day,
            most: FEW_FILES,
            split_beyond: Some(SCATTERED_FILES),
            from_us,
        };
        match step(collection_id, &part, write)? {
            Done::Written(flushed) => total += flushed,
            Done::Split => split = true,
        }
    }
    if split {
        chunks = spans(collection_id)?;
    }
    chunks.retain(|c| c.month().is_some());
    let sizes: HashMap<i64, u64> = chunks.iter().map(|c| (c.id, c.bytes)).collect();
    let mut written = 0;
    for next in backlog::steps(&chunks, bounds) {
        let write = Write {
            finest: next.finest,
            most: MAX_FILES,
            split_beyond: None,
            from_us,
        };
        if let Done::Written(flushed) = step(collection_id, &next.chunks, write)? {
            total += flushed;
        }
        written += next
            .chunks
            .iter()
            .filter_map(|id| sizes.get(id))
            .sum::<u64>();
        shown.set(written)?;
    }
    Ok(total)
}

impl std::ops::AddAssign for Flushed {
    fn add_assign(&mut self, more: Self) {
        self.events += more.events;
        self.files += more.files;
        self.bytes += more.bytes;
    }
}

fn bounds() -> Bounds {
    let target_bytes = guc::target_file_bytes() as u64;
    Bounds {
        // In memory the rows of a chunk take several times as much.
        step_bytes: (guc::flush_size_bytes() as u64).max(target_bytes / 4),
        target_bytes,
        min_file_events: guc::min_file_events(),
    }
}

/// What a chunk counts for each of its rows and columns at least: in memory all columns of all rows are there, however
/// little the chunk stores of them.
const CELL_BYTES: u64 = 1;
/// Columns that no field is registered for.
const OWN_COLUMNS: u64 = 6;

/// The collection's chunks as they are now, oldest first.
fn spans(collection_id: i32) -> std::result::Result<Vec<ChunkSpan>, Failure> {
    xact::worker(|| {
        let chunks = manifest::chunks(View::Current, collection_id, None)?;
        let row_bytes = CELL_BYTES * (projects::fields(collection_id)?.len() as u64 + OWN_COLUMNS);
        let span = |c: &manifest::ChunkRow| ChunkSpan {
            id: c.chunk_id,
            n: u64::from(c.n.unsigned_abs()),
            bytes: u64::from(c.bytes.unsigned_abs()).max(u64::from(c.n.unsigned_abs()) * row_bytes),
            first_day: period::day_of(c.min_time_us),
            last_day: period::day_of(c.max_time_us),
        };
        Ok(chunks.iter().map(span).collect())
    })
}

fn bytes(chunks: &[ChunkSpan]) -> u64 {
    chunks.iter().map(|c| c.bytes).sum()
}

fn ids(chunks: &[ChunkSpan]) -> Vec<i64> {
    chunks.iter().map(|c| c.id).collect()
}

/// The chunks of several months, in parts that fit a step.
fn scattered(chunks: &[ChunkSpan], step_bytes: u64) -> Vec<Vec<i64>> {
    let mut parts = Vec::new();
    let mut part = Vec::new();
    let mut bytes = 0;
    for chunk in chunks.iter().filter(|c| c.month().is_none()) {
        if bytes > 0 && bytes + chunk.bytes > step_bytes {
            parts.push(std::mem::take(&mut part));
            bytes = 0;
        }
        bytes += chunk.bytes;
        part.push(chunk.id);
    }
    if !part.is_empty() {
        parts.push(part);
    }
    parts
}

/// How the rows of a step are to be spread over files.
#[derive(Clone, Copy)]
struct Write {
    finest: Period,
    /// Coarser periods are taken rather than more files than this.
    most: usize,
    /// If there would be more files all the same, the rows become chunks of one month each instead.
    split_beyond: Option<usize>,
    /// Events from before this time are left out: nobody sees them any more.
    from_us: Option<i64>,
}

enum Done {
    Written(Flushed),
    Split,
}

/// What the first transaction of a step made of its chunks.
enum Prepared {
    /// There was nothing to write.
    Nothing,
    /// Chunks of one month each.
    Split,
    Files(Box<Step>),
}

/// One bounded part of a flush: its chunks, as files.
struct Step {
    home: Home,
    schema: Schema,
    chunk_ids: Vec<i64>,
    outputs: Vec<Output>,
}

fn step(collection_id: i32, chunk_ids: &[i64], write: Write) -> std::result::Result<Done, Failure> {
    let step = match xact::worker(|| prepare(collection_id, chunk_ids, write))? {
        Prepared::Nothing => return Ok(Done::Written(Flushed::default())),
        Prepared::Split => return Ok(Done::Split),
        Prepared::Files(step) => step,
    };
    failpoint::hit("flush.after_intent");
    step.home.put(&step.outputs)?;
    failpoint::hit("flush.after_upload");
    xact::worker(|| commit(&step)).map(Done::Written)
}

/// First transaction: reads the chunks and makes the files in memory; announces the objects.
fn prepare(collection_id: i32, chunk_ids: &[i64], write: Write) -> Result<Prepared> {
    let view = View::Current;
    if chunk_ids.is_empty() {
        return Ok(Prepared::Nothing);
    }
    let Some(collection) = registry::collection_by_id(view, collection_id)? else {
        return Ok(Prepared::Nothing);
    };
    let Some(project) = registry::project_by_id(view, collection.project_id)? else {
        return Ok(Prepared::Nothing);
    };
    let storage = manifest::storage(view, project.storage_id)?
        .ok_or_else(|| PgError::internal("a project's storage is not registered"))?;
    let schema = registry::schema(view, &collection)?;
    let batches = read(collection_id, chunk_ids, &schema, write.from_us)?;
    let mut counts = BTreeMap::new();
    for batch in &batches {
        count_days(batch, &mut counts)?;
    }
    let plan = period::plan_within(write.finest, &counts, guc::min_file_events(), write.most);
    if write
        .split_beyond
        .is_some_and(|most| plan.files().len() > most)
    {
        return Ok(if split(&collection, &schema, chunk_ids, &batches)? {
            Prepared::Split
        } else {
            Prepared::Nothing
        });
    }
    let home = Home {
        storage_id: project.storage_id,
        project,
        collection,
        storage,
        op_id: Uuid::now_v7(),
    };
    let outputs = write_files(&home, &schema, &batches, &plan)?;
    for output in &outputs {
        home.announce(output, "flush")?;
    }
    Ok(Prepared::Files(Box::new(Step {
        home,
        schema,
        chunk_ids: chunk_ids.to_vec(),
        outputs,
    })))
}

/// The events of the chunks, in the collection's present layout.
fn read(
    collection_id: i32,
    chunk_ids: &[i64],
    schema: &Schema,
    from_us: Option<i64>,
) -> Result<Vec<RecordBatch>> {
    let vanished = || PgError::internal("a chunk vanished under the collection's job lock");
    let formats: HashMap<i64, ChunkFormat> = manifest::chunks(View::Current, collection_id, None)?
        .into_iter()
        .map(|chunk| (chunk.chunk_id, chunk.format))
        .collect();
    let mut batches = Vec::with_capacity(chunk_ids.len());
    for id in chunk_ids {
        wait::check_interrupts();
        let format = formats.get(id).ok_or_else(vanished)?;
        let data = manifest::chunk_data(View::Current, *id)?.ok_or_else(vanished)?;
        let batch = chunk::read(*format, data.into(), schema)?;
        let batch = delete::without_deleted(collection_id, *id, batch)?;
        batches.push(match from_us {
            Some(from_us) => since(&batch, from_us)?,
            None => batch,
        });
    }
    Ok(batches)
}

/// Rewrites chunks of many months as chunks of one month each. False: the collection was dropped meanwhile.
fn split(
    collection: &Collection,
    schema: &Schema,
    chunk_ids: &[i64],
    batches: &[RecordBatch],
) -> Result<bool> {
    dropping::lock_manifest(collection.id)?;
    if registry::collection_by_id(View::Current, collection.id)?.is_none() {
        return Ok(false);
    }
    let target = Target {
        project_id: collection.project_id,
        collection_id: collection.id,
        schema_version: schema.version,
        level: 0,
        since_us: None,
    };
    backlog::split_by_month(batches, SPLIT_ROWS, |part| {
        wait::check_interrupts();
        for part in of_chunk_size(part) {
            append(target, &part)?;
        }
        Result::Ok(())
    })?;
    delete_chunks(collection, chunk_ids)?;
    failpoint::hit("flush.after_split");
    Ok(true)
}

fn write_files(
    home: &Home,
    schema: &Schema,
    batches: &[RecordBatch],
    plan: &Plan,
) -> Result<Vec<Output>> {
    let target = guc::target_file_bytes() as u64;
    let mut outputs = Vec::new();
    for (index, period) in plan.files().iter().enumerate() {
        let options = home.options(period.period, period.first_day);
        let mut finish = |writer: FileWriter<Vec<u8>>| -> Result<()> {
            outputs.push(home.output(period.period, period.first_day, writer.finish()?)?);
            Ok(())
        };
        let mut writer = FileWriter::new(schema, &options, Vec::new());
        let mut rows = 0;
        for batch in SortedRows::of_file(batches, BATCH_ROWS, plan, index)? {
            wait::check_interrupts();
            if writer.estimated_bytes() >= target {
                finish(std::mem::replace(
                    &mut writer,
                    FileWriter::new(schema, &options, Vec::new()),
                ))?;
                rows = 0;
            }
            let batch = batch?;
            rows += batch.num_rows();
            writer.write(&batch)?;
        }
        if rows > 0 {
            finish(writer)?;
        }
    }
    Ok(outputs)
}

/// Last transaction: the same rows leave the chunks and enter the manifest.
fn commit(step: &Step) -> Result<Flushed> {
    let collection = &step.home.collection;
    let mut flushed = Flushed::default();
    dropping::lock_manifest(collection.id)?;
    if registry::collection_by_id(View::Current, collection.id)?.is_none() {
        // Dropped meanwhile; the objects go by their intents.
        return Ok(flushed);
    }
    delete_chunks(collection, &step.chunk_ids)?;
    for output in &step.outputs {
        wait::check_interrupts();
        step.home.enter(output, step.schema.version)?;
        flushed.events += output.file.n;
        flushed.bytes += output.file.bytes;
        flushed.files += 1;
    }
    manifest::add_to_stat(
        collection.id,
        step.home.project.id,
        flushed.events as i64,
        flushed.bytes as i64,
        flushed.files as i64,
    )?;
    failpoint::hit("flush.before_commit");
    Ok(flushed)
}

/// Deletes exactly these chunks.
fn delete_chunks(collection: &Collection, chunk_ids: &[i64]) -> Result<()> {
    if manifest::delete_chunks(chunk_ids)? == chunk_ids.len() as u64 {
        return Ok(());
    }
    Err(PgError::new(
        "40001",
        format!(
            "chunks of collection \"{}\" changed during a flush",
            collection.name
        ),
    ))
}
