//! What a scan of an attached table reads: foreign files, through the engine as if they were the tail of a collection.
//!
//! Nothing of it concerns the backend's own thread, and nothing waits for it: files are listed and read on the engine's
//! threads for blocking work, a bounded piece at a time, by as many readers as the engine has threads. A reader holds a
//! thread only while it reads a piece, since the scan may stand still for as long as its query likes.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use arrow::array::{ArrayRef, RecordBatch, RecordBatchOptions};
use arrow::datatypes::{Schema as ArrowSchema, SchemaRef};
use async_trait::async_trait;
use bytes::Bytes;
use pgrx::pg_sys;
use rakam_engine::{
    Broker, BudgetPool, EngineError, RequestMemory, Reserved, ScanInput, ScanMetrics, ScanPlan,
};
use rakam_event::schema::{Field, Schema};
use rakam_event::types::FieldType;
use rakam_files::FilesError;
use rakam_files::format::{Format, Options};
use rakam_files::locate::Root;
use rakam_files::object::{READER_BYTES, Stop, WAITING_THREADS, blocking};
use rakam_files::source::{Meter, Spec};
use rakam_files::table::read::{self, Known, Part};
use rakam_files::table::{Form, Pruner, Reader, Wanted};
use rakam_lake::cache as lake;
use rakam_lake::prune::{self, Predicate};
use rakam_lake::stats::{ColumnStat, StatsBuilder};
use tokio::sync::{Mutex as AsyncMutex, mpsc};
use tokio::task::JoinSet;

use super::columns::Column;
use super::execution::{self, Running};
use super::tiers;
use super::tuples::Output;
use crate::catalog::attached::Attached;
use crate::files::place::{self, Keep};
use crate::pg::spi::View;
use crate::pg::{Result, guc, memory};

/// The ids of columns are their numbers and this: apart from the ids that mean something in a collection.
const FIRST_ID: i32 = 1000;

fn id(column: &Column) -> i32 {
    FIRST_ID + i32::from(column.attnum)
}

/// How the values of a column come, by its type.
fn form(column: &Column) -> Form {
    if let Some(ty) = column.field_type() {
        return Form::Field(ty);
    }
    match (column.type_oid, column.typmod) {
        (pg_sys::INT2OID, -1) => Form::SmallInt,
        (pg_sys::TIMESTAMPOID, -1) => Form::Timestamp,
        (pg_sys::TIMEOID, -1) => Form::Time,
        _ => Form::Literal,
    }
}

/// The engine's field of each column, by attribute number.
pub fn fields(columns: &[Column]) -> HashMap<i16, (i32, FieldType)> {
    columns
        .iter()
        .map(|column| (column.attnum, (id(column), form(column).carrier())))
        .collect()
}

/// The outputs, with the types whose values come as text.
pub fn outputs(columns: &[Column], outputs: Vec<Output>) -> Vec<Output> {
    let input = |output: &Output| {
        columns
            .iter()
            .find(|column| column.attnum as usize == output.attribute + 1)
            .filter(|column| form(column) == Form::Literal)
            .map(|column| (column.type_oid, column.typmod))
    };
    outputs
        .into_iter()
        .map(|output| Output {
            input: input(&output),
            ..output
        })
        .collect()
}

/// Begins to read. `plan` speaks of the ids of [`fields`].
pub fn start(view: View, table: &Attached, columns: &[Column], plan: ScanPlan) -> Result<Running> {
    let place = place::attached(view, table)?;
    let (stop, counters) = (Stop::new(), Arc::default());
    let root = place.open(Keep::Blocks, &counters, &stop)?;
    let format = table.format.as_deref().map(Format::parse).transpose()?;
    let schema = Schema {
        version: 1,
        fields: columns
            .iter()
            .map(|column| Field {
                id: id(column),
                name: column.name.clone(),
                ty: form(column).carrier(),
                added_version: 0,
                column_ready: true,
            })
            .collect(),
        dropped: Vec::new(),
    };
    // In the order in which the engine needs them.
    let (mut wanted, mut arrow, mut numbers) = (Vec::new(), Vec::new(), HashMap::new());
    for needed in plan.needed() {
        let pairs = || columns.iter().zip(&schema.fields);
        if let Some((column, field)) = pairs().find(|(_, field)| field.id == needed) {
            numbers.insert(needed, wanted.len());
            arrow.push(field.arrow());
            wanted.push(Wanted {
                name: column.name.clone(),
                form: form(column),
            });
        }
    }
    let predicates = tiers::predicates(plan.filter.as_ref())
        .into_iter()
        .filter_map(|(id, predicate)| {
            let number = *numbers.get(&id)?;
            Some((number, wanted[number].form.carrier(), predicate))
        })
        .collect();
    let job = Arc::new(Job {
        readers: readers(&root),
        root,
        pattern: place.pattern,
        spec: Spec {
            format,
            options: Options::default(),
            max_record_bytes: guc::max_event_bytes(),
        },
        wanted: wanted.into(),
        schema: Arc::new(ArrowSchema::new(arrow)),
        pruning: Pruning::new(predicates),
        memory: memory::pool(),
        stop,
        fetched: counters,
        counters: Counters::default(),
    });
    let input = ScanInput {
        schema,
        plan,
        files: Vec::new(),
        chunks: Vec::new(),
        has_tail: true,
    };
    let broker = FilesBroker {
        job,
        reading: AsyncMutex::new(None),
    };
    execution::start_alone(input, Arc::new(broker))
}

/// How many files, or parts of them, are read at a time. Who reads a bucket waits for it more than it decodes; but each
/// reader has windows in memory, of which all together get an eighth of what there is.
fn readers(root: &Root) -> usize {
    let threads = guc::threads();
    match root {
        Root::Directory { .. } => threads,
        Root::Bucket(_) => {
            let fitting = guc::memory_limit_bytes() / 8 / READER_BYTES;
            fitting.clamp(1, (2 * threads).clamp(4, WAITING_THREADS))
        }
    }
}

/// What is to be read, and how far that is.
struct Job {
    root: Root,
    pattern: String,
    spec: Spec,
    wanted: Arc<[Wanted]>,
    /// Of the batches: the wanted columns with their ids.
    schema: SchemaRef,
    pruning: Pruning,
    readers: usize,
    memory: Arc<BudgetPool>,
    /// Ends whoever still looks for files, or waits for them, when the scan is over.
    stop: Stop,
    /// What was read of a bucket.
    fetched: Arc<lake::Counters>,
    counters: Counters,
}

#[derive(Default)]
struct Counters {
    files: AtomicU64,
    files_skipped: AtomicU64,
    row_groups: AtomicU64,
    row_groups_skipped: AtomicU64,
    bytes: AtomicU64,
}

/// A batch, and the memory that it takes.
type Batch = std::result::Result<(RecordBatch, Reserved), EngineError>;

/// The readers at work. Dropped, they end after the piece that they read.
struct Reading {
    batches: mpsc::Receiver<Batch>,
    _readers: JoinSet<()>,
    /// Of the batch that the engine has.
    held: Option<Reserved>,
}

struct FilesBroker {
    job: Arc<Job>,
    reading: AsyncMutex<Option<Reading>>,
}

impl Drop for FilesBroker {
    fn drop(&mut self) {
        self.job.stop.stop();
    }
}

#[async_trait]
impl Broker for FilesBroker {
    async fn chunk(&self, id: i64) -> std::result::Result<Bytes, EngineError> {
        Err(EngineError::Plan(format!("there is no chunk {id}")))
    }

    async fn tail(&self) -> std::result::Result<Option<RecordBatch>, EngineError> {
        let mut reading = self.reading.lock().await;
        let reading = match &mut *reading {
            Some(reading) => reading,
            none => none.insert(Arc::clone(&self.job).begin().await?),
        };
        reading.held = None;
        match reading.batches.recv().await {
            None => Ok(None),
            Some(batch) => {
                let (batch, memory) = batch?;
                reading.held = Some(memory);
                Ok(Some(batch))
            }
        }
    }

    fn metrics(&self) -> ScanMetrics {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let counters = &self.job.counters;
        let fetched = self.job.fetched.get();
        let bytes = match &self.job.root {
            Root::Bucket(_) => fetched.hit_bytes + fetched.fetched_bytes,
            Root::Directory { .. } => get(&counters.bytes),
        };
        ScanMetrics {
            files_opened: get(&counters.files),
            files_skipped: get(&counters.files_skipped),
            row_groups_read: get(&counters.row_groups),
            row_groups_pruned_by_stats: get(&counters.row_groups_skipped),
            bytes_read: bytes,
            ..ScanMetrics::default()
        }
    }
}

fn failed(error: FilesError) -> EngineError {
    EngineError::Host {
        sqlstate: error.sqlstate().to_owned(),
        message: error.to_string(),
        hint: error.hint(),
    }
}

impl Job {
    /// Lists the files and sets readers to work.
    async fn begin(self: Arc<Self>) -> std::result::Result<Reading, EngineError> {
        let parts = self.parts().await.map_err(failed)?;
        let readers = self.readers.clamp(1, parts.len().max(1));
        let parts = Arc::new(Mutex::new(parts));
        let (sender, batches) = mpsc::channel(1);
        let mut tasks = JoinSet::new();
        for _ in 0..readers {
            let (job, parts, sender) = (Arc::clone(&self), Arc::clone(&parts), sender.clone());
            tasks.spawn(async move {
                if let Err(error) = job.read(&parts, &sender).await {
                    // If it cannot be sent nobody waits for it any more.
                    let _ = sender.send(Err(error)).await;
                }
            });
        }
        Ok(Reading {
            batches,
            _readers: tasks,
            held: None,
        })
    }

    async fn parts(&self) -> std::result::Result<VecDeque<Part>, FilesError> {
        let files = self
            .root
            .below(&self.pattern, self.spec.format, &self.stop)
            .await?;
        let mut parts = VecDeque::with_capacity(files.len());
        for file in &files {
            parts.extend(read::parts(file, &self.spec, self.readers)?);
        }
        Ok(parts)
    }

    /// Reads parts of files until none is left, or nobody wants more.
    async fn read(
        self: &Arc<Self>,
        parts: &Mutex<VecDeque<Part>>,
        sender: &mpsc::Sender<Batch>,
    ) -> std::result::Result<(), EngineError> {
        let next = || {
            parts
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .pop_front()
        };
        while let Some(part) = next() {
            let mut reader = self.open(part).await?;
            let mut before = 0;
            loop {
                // Before it is read: whoever may not hold it does not make it either.
                let mut memory = self.memory.reserve("attached files");
                memory.resize(reader.next_bytes())?;
                let batch;
                (reader, batch) = blocking(move || {
                    let batch = reader.next_batch();
                    (reader, batch)
                })
                .await
                .map_err(failed)?;
                let bytes = reader.bytes();
                self.counters.add(|c| &c.bytes, bytes - before);
                before = bytes;
                let Some(batch) = batch.map_err(failed)? else {
                    break;
                };
                memory.resize(batch.get_array_memory_size())?;
                let batch = self.with_ids(&batch)?;
                if sender.send(Ok((batch, memory))).await.is_err() {
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    async fn open(self: &Arc<Self>, part: Part) -> std::result::Result<Reader, EngineError> {
        let job = Arc::clone(self);
        let is_first = part.part == 0;
        let memory = Arc::new(RequestMemory::new(&self.memory));
        let meter = Meter::of(&self.stop).with_memory(memory);
        let open = move || Reader::open(&part, &job.spec, &job.wanted, &job.pruning, &meter);
        let reader = blocking(open)
            .await
            .and_then(|opened| opened)
            .map_err(failed)?;
        let read = reader.read;
        if is_first {
            match read.skipped {
                true => self.counters.add(|c| &c.files_skipped, 1),
                false => self.counters.add(|c| &c.files, 1),
            }
        }
        self.counters.add(|c| &c.row_groups, read.row_groups);
        self.counters
            .add(|c| &c.row_groups_skipped, read.row_groups_skipped);
        Ok(reader)
    }

    /// The batch under the names and ids that the engine knows.
    fn with_ids(&self, batch: &RecordBatch) -> std::result::Result<RecordBatch, EngineError> {
        let columns = batch
            .columns()
            .iter()
            .zip(self.schema.fields())
            .map(|(column, field)| {
                if column.data_type() == field.data_type() {
                    Ok(Arc::clone(column))
                } else {
                    // The element of an array has an id of its own.
                    arrow::compute::cast(column, field.data_type())
                }
            })
            .collect::<std::result::Result<Vec<ArrayRef>, _>>();
        let options = RecordBatchOptions::new().with_row_count(Some(batch.num_rows()));
        columns
            .and_then(|columns| {
                RecordBatch::try_new_with_options(Arc::clone(&self.schema), columns, &options)
            })
            .map_err(|e| EngineError::Internal(e.to_string()))
    }
}

impl Counters {
    fn add(&self, counter: impl FnOnce(&Self) -> &AtomicU64, n: u64) {
        counter(self).fetch_add(n, Ordering::Relaxed);
    }
}

/// What the filter says of single columns, by which row groups are skipped, and files by their folders.
struct Pruning {
    columns: Vec<usize>,
    predicates: Vec<(usize, FieldType, Predicate)>,
}

impl Pruning {
    fn new(predicates: Vec<(usize, FieldType, Predicate)>) -> Self {
        let mut columns: Vec<usize> = predicates.iter().map(|p| p.0).collect();
        columns.sort_unstable();
        columns.dedup();
        Self {
            columns,
            predicates,
        }
    }
}

impl Pruner for Pruning {
    fn columns(&self) -> &[usize] {
        &self.columns
    }

    fn may_match(&self, column: usize, known: &Known) -> bool {
        let rows = i64::try_from(known.rows).unwrap_or(i64::MAX);
        let nulls = known.nulls.and_then(|n| i64::try_from(n).ok());
        let of_column = self.predicates.iter().filter(|(of, _, _)| *of == column);
        of_column.into_iter().all(|(_, ty, predicate)| {
            let says_null = matches!(predicate, Predicate::IsNull | Predicate::IsNotNull);
            match nulls {
                None if says_null => true,
                // Bounds hold whether there are NULLs or not.
                nulls => {
                    let stat = stat(known, *ty, nulls.unwrap_or(0));
                    prune::may_match(Some(&stat), rows, *ty, predicate)
                }
            }
        })
    }
}

/// The bounds as statistics of a data file.
fn stat(known: &Known, ty: FieldType, null_count: i64) -> ColumnStat {
    let bound = |array: Option<&ArrayRef>, of: fn(ColumnStat) -> Option<Vec<u8>>| {
        let mut builder = StatsBuilder::of(&[(FIRST_ID, ty)]);
        builder.update_columns(std::slice::from_ref(array?)).ok()?;
        builder.finish().into_iter().next().and_then(of)
    };
    ColumnStat {
        field_id: FIRST_ID,
        null_count,
        nan_count: 0,
        min: bound(known.min.as_ref(), |stat| stat.min),
        max: bound(known.max.as_ref(), |stat| stat.max),
        exact: false,
    }
}
