//! A bound plan and the tiers of one collection → a stream of batches.
//!
//! Data files ∪ chunks ∪ inbox tail, each adapted to the wanted columns, then filtered; the order of rows is
//! unspecified. The filter runs above every tier even where Parquet's decoder applies it too: DataFusion drops a
//! conjunct that it cannot push without saying so, and on the rows that are left it costs little.

use std::collections::BTreeSet;
use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use arrow::array::{RecordBatch, RecordBatchOptions};
use arrow::datatypes::{Schema as ArrowSchema, SchemaRef};
use arrow::error::ArrowError;
use async_trait::async_trait;
use bytes::Bytes;
use datafusion_common::config::TableParquetOptions;
use datafusion_datasource::file_groups::{FileGroup, FileGroupPartitioner};
use datafusion_datasource::file_scan_config::FileScanConfigBuilder;
use datafusion_datasource::source::DataSourceExec;
use datafusion_datasource_parquet::source::ParquetSource;
use datafusion_execution::memory_pool::{MemoryConsumer, MemoryLimit, MemoryReservation};
use datafusion_physical_expr::PhysicalExpr;
use datafusion_physical_plan::coalesce_partitions::CoalescePartitionsExec;
use datafusion_physical_plan::filter::FilterExecBuilder;
use datafusion_physical_plan::union::UnionExec;
use datafusion_physical_plan::{ExecutionPlan, ExecutionPlanProperties};
use futures::stream::BoxStream;
use futures::{Stream, StreamExt};
use object_store::ObjectStore;
use parquet::arrow::arrow_reader::RowSelector;
use rakam_event::schema::{Field, Schema, XID_FIELD_ID};
use rakam_lake::chunk::ChunkFormat;
use rakam_lake::rows::RowSet;

use crate::adapt::{FileAdapterFactory, Table, xid_field};
use crate::context::EngineContext;
use crate::error::EngineError;
use crate::hot::{Chunks, HotExec, HotSource};
use crate::ir::ScanPlan;
use crate::metrics::{Counters, ScanMetrics};
use crate::parquet_file::{ReaderFactory, partitioned_file, placeholder_url};
use crate::rows::{ROW_FIELD_ID, RowsExec, row_field};
use crate::translate::{Filter, Translator, target_schema};

/// Bytes a batch of rows should not exceed by much, by the average row of the scanned tiers.
const BATCH_BYTES: u64 = 32 << 20;
/// What a stored byte may become in memory: the batch size is cut for wide rows with this in mind.
const EXPANSION: u64 = 8;
const TIME_FIELD_ID: i32 = 1;
/// What a run of deleted rows takes in a Parquet selection: what is skipped and what is read after it.
const SELECTION_BYTES: usize = 2 * size_of::<RowSelector>();
/// Row groups that a thread has under way when they come from afar: it decodes one while the others are fetched.
const REMOTE_GROUPS_PER_THREAD: usize = 4;
/// A row group of our files has at most so many rows (`rakam_lake::write`).
const ROW_GROUP_ROWS: u64 = 1_000_000;
/// What row groups under way may take of the memory that there is: a query is not the only one.
const READAHEAD_SHARE: u64 = 8;
const READAHEAD_BYTES_MAX: u64 = 512 << 20;

/// Everything a scan of one collection reads. The caller has pruned files and chunks by their statistics.
#[derive(Debug)]
pub struct ScanInput {
    /// The registry's view under the query's snapshot.
    pub schema: Schema,
    /// Without parameters, see [`ScanPlan::bind`].
    pub plan: ScanPlan,
    pub files: Vec<FileRef>,
    pub chunks: Vec<ChunkRef>,
    /// Whether to ask [`Broker::tail`].
    pub has_tail: bool,
}

/// A data file.
#[derive(Debug, Clone)]
pub struct FileRef {
    pub store: Arc<dyn ObjectStore>,
    /// Below the store's root.
    pub path: String,
    pub bytes: u64,
    pub n: u64,
    pub has_extra: bool,
    /// From the manifest; without it the footer is read from the file. A file with deleted rows must have it.
    pub footer: Option<Bytes>,
    /// Rows that are not there any more.
    pub deleted: Option<Arc<RowSet>>,
    /// What [`ROW_FIELD_ID`] calls the file.
    pub number: u32,
    /// Its store is far away: while one part is decoded, others should be on their way.
    pub remote: bool,
}

/// A chunk of the hot tier.
#[derive(Debug, Clone)]
pub struct ChunkRef {
    pub id: i64,
    pub format: ChunkFormat,
    pub n: u32,
    pub bytes: u32,
    pub schema_version: i32,
    pub has_extra: bool,
    /// Rows that are not there any more.
    pub deleted: Option<Arc<RowSet>>,
    /// What [`ROW_FIELD_ID`] calls the chunk.
    pub number: u32,
}

/// What only the server can read, answered by the backend's main thread.
#[async_trait]
pub trait Broker: Send + Sync {
    /// The bytes of a chunk.
    async fn chunk(&self, id: i64) -> Result<Bytes, EngineError>;
    /// The next batch of the un-digested inbox tail; `None` at the end. It holds at least [`ScanPlan::needed`],
    /// fields marked with their ids, in the layout of the table: `_extra` is final, apart from pending fields,
    /// which may be columns of the batch.
    async fn tail(&self) -> Result<Option<RecordBatch>, EngineError>;
    /// What it has read by itself, of files that the engine does not know.
    fn metrics(&self) -> ScanMetrics {
        ScanMetrics::default()
    }
}

/// Reads the counters of a running scan.
pub(crate) type MetricsFn = Arc<dyn Fn() -> ScanMetrics + Send + Sync>;

/// The operators that read one collection, over the targets of `table`.
struct Tiers {
    plans: Vec<Arc<dyn ExecutionPlan>>,
    parquet: Vec<Arc<dyn ExecutionPlan>>,
    counters: Arc<Counters>,
    broker: Arc<dyn Broker>,
}

/// Starts a scan. Call it inside the engine's runtime: it spawns the tasks that read. Dropping the stream ends them.
pub fn execute(
    input: ScanInput,
    broker: Arc<dyn Broker>,
    ctx: &EngineContext,
) -> Result<ScanStream, EngineError> {
    let ScanInput {
        mut schema,
        plan,
        files,
        chunks,
        has_tail,
    } = input;
    let with_rows = plan.columns.contains(&ROW_FIELD_ID);
    if with_rows {
        schema.fields.push(row_field());
    }
    let needed = plan.needed();
    if needed.contains(&XID_FIELD_ID) {
        schema.fields.push(xid_field());
    }
    let outputs = targets(&schema, &plan.columns)?;
    let targets = targets(&schema, &needed)?;
    let output_schema: SchemaRef = Arc::new(ArrowSchema::new(
        outputs.iter().map(Field::arrow).collect::<Vec<_>>(),
    ));
    let table = Arc::new(Table {
        target_schema: target_schema(&targets),
        targets,
        schema,
    });
    let filter = match &plan.filter {
        Some(filter) => {
            Translator::new(&table.targets, Arc::clone(&table.target_schema)).filter(filter)?
        }
        None => Filter::All,
    };
    let filter = match filter {
        Filter::All => None,
        Filter::Some(filter) => Some(filter),
        Filter::Nothing => {
            let none = futures::stream::empty().boxed();
            let metrics = Arc::new(ScanMetrics::default);
            return Ok(ScanStream::new(none, output_schema, vec![], None, metrics));
        }
    };
    let decode_filter = filter_while_decoding(&plan, &table.targets);
    let mut scan = TierScan {
        table,
        filter,
        decode_filter,
        limit: plan.limit.map(|n| usize::try_from(n).unwrap_or(usize::MAX)),
        batch_rows: batch_rows(&files, &chunks, ctx.batch_rows),
        with_rows,
        memory: MemoryConsumer::new("deleted rows").register(ctx.task.memory_pool()),
        ctx,
    };
    let tiers = scan.tiers(files, chunks, has_tail, broker)?;
    // The wanted columns are the first of the targets; a column wanted twice is one target.
    let wanted: Vec<usize> = outputs
        .iter()
        .filter_map(|output| scan.table.targets.iter().position(|t| t.id == output.id))
        .collect();
    scan.stream(tiers, wanted, output_schema)
}

/// The fields of a plan; an unknown one is a fault of the plan.
fn targets(schema: &Schema, ids: &[i32]) -> Result<Vec<Field>, EngineError> {
    ids.iter()
        .map(|id| {
            let field = schema.fields.iter().find(|field| field.id == *id);
            field
                .cloned()
                .ok_or_else(|| EngineError::Plan(format!("the collection has no field {id}")))
        })
        .collect()
}

/// Whether Parquet's decoder should test the filter row by row before it decodes the other columns. It pays when
/// there is something to leave undecoded; on `_time` alone, by which files are sorted, pages are skipped anyway.
/// Measured elsewhere with the decoder's filter always on: more queries got slower than faster (DataFusion #20324).
fn filter_while_decoding(plan: &ScanPlan, targets: &[Field]) -> bool {
    let Some(filter) = &plan.filter else {
        return false;
    };
    let mut in_filter = BTreeSet::new();
    filter.columns(&mut in_filter);
    let only_time = in_filter.iter().all(|id| *id == TIME_FIELD_ID);
    let not_tested = targets.iter().filter(|t| !in_filter.contains(&t.id));
    not_tested.count() >= 3 && !only_time
}

/// Rows per batch: the usual number, fewer when rows are wide.
fn batch_rows(files: &[FileRef], chunks: &[ChunkRef], usual: usize) -> usize {
    let widest = files
        .iter()
        .map(|f| f.bytes / f.n.max(1))
        .chain(chunks.iter().map(|c| u64::from(c.bytes / c.n.max(1))))
        .max()
        .unwrap_or(0);
    let fitting = BATCH_BYTES / (widest * EXPANSION).max(1);
    usual.min(usize::try_from(fitting).unwrap_or(usual).max(64))
}

/// A scan in the making.
struct TierScan<'a> {
    table: Arc<Table>,
    filter: Option<Arc<dyn PhysicalExpr>>,
    decode_filter: bool,
    limit: Option<usize>,
    batch_rows: usize,
    /// The plan wants [`ROW_FIELD_ID`].
    with_rows: bool,
    /// Holds what is known of deleted rows.
    memory: MemoryReservation,
    ctx: &'a EngineContext,
}

impl TierScan<'_> {
    fn tiers(
        &self,
        files: Vec<FileRef>,
        chunks: Vec<ChunkRef>,
        has_tail: bool,
        broker: Arc<dyn Broker>,
    ) -> Result<Tiers, EngineError> {
        let counters = Arc::new(Counters::default());
        let mut plans: Vec<Arc<dyn ExecutionPlan>> = Vec::with_capacity(4);
        self.reserve(&files, &chunks)?;
        let files = if self.with_rows && !files.is_empty() {
            plans.push(Arc::new(RowsExec::new(
                Arc::clone(&self.table),
                files,
                Arc::clone(&counters),
                self.ctx.threads,
                self.batch_rows,
            )?));
            Vec::new()
        } else {
            files
        };
        // Apart, because a file without `_extra` is pruned by filters on fields it does not have.
        let (with_extra, without): (Vec<_>, Vec<_>) = files.into_iter().partition(|f| f.has_extra);
        for (files, has_extra) in [(with_extra, true), (without, false)] {
            if !files.is_empty() {
                plans.push(self.parquet(files, has_extra, &counters)?);
            }
        }
        let parquet = if self.with_rows {
            Vec::new()
        } else {
            plans.clone()
        };
        let mut hot = |source| {
            plans.push(Arc::new(HotExec::new(
                Arc::clone(&self.table),
                source,
                Arc::clone(&broker),
                Arc::clone(&counters),
                self.ctx.threads,
                self.batch_rows,
                self.with_rows,
            )));
        };
        if !chunks.is_empty() {
            hot(HotSource::Chunks(Arc::new(Chunks::new(chunks))));
        }
        if has_tail {
            hot(HotSource::Tail);
        }
        Ok(Tiers {
            plans,
            parquet,
            counters,
            broker,
        })
    }

    /// Takes memory for the sets of deleted rows, and for the selections that are made of them.
    fn reserve(&self, files: &[FileRef], chunks: &[ChunkRef]) -> Result<(), EngineError> {
        let files = files.iter().filter_map(|file| file.deleted.as_ref());
        let chunks = chunks.iter().filter_map(|chunk| chunk.deleted.as_ref());
        let selections: usize = files
            .clone()
            .map(|set| set.runs().len() * SELECTION_BYTES)
            .sum();
        let sets: usize = files.chain(chunks).map(|set| set.memory()).sum();
        Ok(self.memory.try_grow(sets + selections)?)
    }

    fn parquet(
        &self,
        files: Vec<FileRef>,
        has_extra: bool,
        counters: &Arc<Counters>,
    ) -> Result<Arc<dyn ExecutionPlan>, EngineError> {
        let mut options = TableParquetOptions::default();
        options.global.pushdown_filters = self.decode_filter;
        let mut source = ParquetSource::new(Arc::clone(&self.table.target_schema))
            .with_table_parquet_options(options)
            .with_parquet_file_reader_factory(Arc::new(ReaderFactory {
                memory: Arc::clone(self.ctx.task.memory_pool()),
                counters: Arc::clone(counters),
            }));
        if let Some(filter) = &self.filter {
            source = source.with_predicate(Arc::clone(filter));
        }
        let adapter = FileAdapterFactory {
            table: Arc::clone(&self.table),
            has_extra,
            filter: self.filter.clone(),
        };
        // DataFusion takes the limit of a scan before any filter above it. (Given both, it would also forget which
        // rows are deleted of the row groups that match as a whole.)
        let limit = self.limit.filter(|_| self.filter.is_none());
        let config = FileScanConfigBuilder::new(placeholder_url(), Arc::new(source))
            .with_file_groups(self.file_groups(files)?)
            .with_limit(limit)
            .with_batch_size(Some(self.batch_rows))
            .with_expr_adapter(Some(Arc::new(adapter)))
            .build();
        Ok(DataSourceExec::from_data_source(config))
    }

    /// How many partitions read files at a time. A partition fetches a row group, decodes it, and fetches the next; so of
    /// files that are far away more are read than there are threads. Not where a limit may be reached by the first.
    fn partitions(&self, files: &[FileRef]) -> usize {
        let threads = self.ctx.threads;
        if self.limit.is_some() || !files.iter().any(|file| file.remote) {
            return threads;
        }
        let group_bytes = files
            .iter()
            .map(|file| file.bytes / file.n.div_ceil(ROW_GROUP_ROWS).max(1))
            .max()
            .unwrap_or(0);
        let memory = match self.ctx.task.memory_pool().memory_limit() {
            MemoryLimit::Finite(limit) => limit as u64 / READAHEAD_SHARE,
            _ => READAHEAD_BYTES_MAX,
        };
        let fitting = memory.min(READAHEAD_BYTES_MAX) / group_bytes.max(1);
        usize::try_from(fitting)
            .unwrap_or(usize::MAX)
            .clamp(threads, threads * REMOTE_GROUPS_PER_THREAD)
    }

    /// Files over the partitions: by byte ranges when there is enough to share, else whole files.
    fn file_groups(&self, files: Vec<FileRef>) -> Result<Vec<FileGroup>, EngineError> {
        let partitions = self.partitions(&files);
        let files = files
            .into_iter()
            .enumerate()
            .map(|(number, file)| partitioned_file(number, file))
            .collect::<Result<Vec<_>, _>>()?;
        let group = FileGroup::new(files);
        let shared = FileGroupPartitioner::new()
            .with_target_partitions(partitions)
            .repartition_file_groups(std::slice::from_ref(&group));
        Ok(shared.unwrap_or_else(|| group.split_files(partitions)))
    }

    /// Filters, joins the partitions, and gives the columns at `wanted` under the names of `schema`.
    fn stream(
        &mut self,
        tiers: Tiers,
        wanted: Vec<usize>,
        schema: SchemaRef,
    ) -> Result<ScanStream, EngineError> {
        let Tiers {
            plans,
            parquet,
            counters,
            broker,
        } = tiers;
        let Some(union) = union(plans)? else {
            return Ok(ScanStream::new(
                futures::stream::empty().boxed(),
                schema,
                vec![],
                self.limit,
                Arc::new(ScanMetrics::default),
            ));
        };
        // The wanted columns come first; one column at least, to carry the number of rows.
        let passed = (0..=wanted.iter().copied().max().unwrap_or(0)).collect();
        let plan: Arc<dyn ExecutionPlan> = match &self.filter {
            Some(filter) => Arc::new(
                FilterExecBuilder::new(Arc::clone(filter), union)
                    .apply_projection(Some(passed))?
                    .with_batch_size(self.batch_rows)
                    .with_fetch(self.limit)
                    .build()?,
            ),
            None => union,
        };
        let plan: Arc<dyn ExecutionPlan> = if plan.output_partitioning().partition_count() > 1 {
            Arc::new(CoalescePartitionsExec::new(plan))
        } else {
            plan
        };
        let batches = plan.execute(0, Arc::clone(&self.ctx.task))?;
        let metrics = move || {
            let mut metrics = counters.snapshot();
            metrics.add(&broker.metrics());
            for exec in &parquet {
                if let Some(set) = exec.metrics() {
                    metrics.add_parquet(&set);
                }
            }
            metrics
        };
        let memory = self.memory.take();
        Ok(ScanStream::new(
            batches
                .map(move |batch| {
                    let _held_by_the_stream = &memory;
                    batch.map_err(EngineError::from)
                })
                .boxed(),
            schema,
            wanted,
            self.limit,
            Arc::new(metrics),
        ))
    }
}

fn union(
    mut plans: Vec<Arc<dyn ExecutionPlan>>,
) -> Result<Option<Arc<dyn ExecutionPlan>>, EngineError> {
    Ok(match plans.len() {
        0 => None,
        1 => plans.pop(),
        _ => Some(UnionExec::try_new(plans)?),
    })
}

/// The batches of a scan: the plan's columns in its order, at most its limit of rows, none after an error.
pub struct ScanStream {
    batches: BoxStream<'static, Result<RecordBatch, EngineError>>,
    schema: SchemaRef,
    /// For each column of `schema` its place in a batch.
    wanted: Vec<usize>,
    left: Option<usize>,
    rows_out: u64,
    metrics: MetricsFn,
    done: bool,
}

impl ScanStream {
    pub(crate) fn new(
        batches: BoxStream<'static, Result<RecordBatch, EngineError>>,
        schema: SchemaRef,
        wanted: Vec<usize>,
        limit: Option<usize>,
        metrics: MetricsFn,
    ) -> Self {
        // A panic in the engine's libraries is an error of this query, not the end of the thread that polls it.
        let batches = AssertUnwindSafe(batches).catch_unwind().map(|caught| {
            caught.unwrap_or_else(|_| {
                Err(EngineError::Internal(
                    "the query engine panicked".to_owned(),
                ))
            })
        });
        Self {
            batches: batches.boxed(),
            schema,
            wanted,
            left: limit,
            rows_out: 0,
            metrics,
            done: limit == Some(0),
        }
    }

    /// The schema of every batch: field names and ids of the plan's columns.
    pub fn schema(&self) -> SchemaRef {
        Arc::clone(&self.schema)
    }

    /// What was done so far.
    pub fn metrics(&self) -> ScanMetrics {
        ScanMetrics {
            rows_out: self.rows_out,
            ..(self.metrics)()
        }
    }

    pub(crate) fn metrics_fn(&self) -> MetricsFn {
        Arc::clone(&self.metrics)
    }

    /// The batch as the reader wants it, cut to the limit.
    fn shape(&mut self, batch: &RecordBatch) -> Result<RecordBatch, EngineError> {
        let internal = |e: ArrowError| EngineError::Internal(e.to_string());
        let rows = match &mut self.left {
            Some(left) => {
                let rows = batch.num_rows().min(*left);
                *left -= rows;
                self.done = *left == 0;
                rows
            }
            None => batch.num_rows(),
        };
        self.rows_out += rows as u64;
        let options = RecordBatchOptions::new().with_row_count(Some(rows));
        let batch = batch
            .slice(0, rows)
            .project(&self.wanted)
            .map_err(internal)?;
        let (_, columns, _) = batch.into_parts();
        RecordBatch::try_new_with_options(Arc::clone(&self.schema), columns, &options)
            .map_err(internal)
    }
}

impl Stream for ScanStream {
    type Item = Result<RecordBatch, EngineError>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            if self.done {
                return Poll::Ready(None);
            }
            let shaped = match ready!(self.batches.poll_next_unpin(cx)) {
                None => {
                    self.done = true;
                    continue;
                }
                Some(Ok(batch)) if batch.num_rows() == 0 => continue,
                Some(Ok(batch)) => self.shape(&batch),
                Some(Err(error)) => Err(error),
            };
            self.done |= shaped.is_err();
            if self.done {
                // What still runs reads for nobody.
                self.batches = futures::stream::empty().boxed();
            }
            return Poll::Ready(Some(shaped));
        }
    }
}

impl std::fmt::Debug for ScanStream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ScanStream")
            .field("schema", &self.schema)
            .finish_non_exhaustive()
    }
}
