//! The hot tiers as one operator: chunks and the inbox tail, asked from the [`Broker`] and adapted to the targets.

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use arrow::array::RecordBatch;
use arrow::datatypes::SchemaRef;
use bytes::Bytes;
use datafusion_common::Result as DfResult;
use datafusion_common::utils::memory::get_record_batch_memory_size;
use datafusion_execution::TaskContext;
use datafusion_execution::memory_pool::{MemoryConsumer, MemoryReservation};
use datafusion_physical_expr::{EquivalenceProperties, PhysicalExpr};
use datafusion_physical_plan::coop::cooperative;
use datafusion_physical_plan::execution_plan::{Boundedness, EmissionType};
use datafusion_physical_plan::stream::RecordBatchStreamAdapter;
use datafusion_physical_plan::{
    DisplayAs, DisplayFormatType, ExecutionPlan, Partitioning, PlanProperties,
    SendableRecordBatchStream,
};
use futures::{StreamExt, stream};
use rakam_event::batch::Layout;
use rakam_event::schema::{Field, XID_FIELD_ID};
use rakam_lake::LakeError;
use rakam_lake::chunk::{self, ChunkFormat};
use rakam_lake::row_chunk::Rows;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::adapt::{Stored, Table, adapt};
use crate::error::EngineError;
use crate::metrics::Counters;
use crate::rows::{ROW_FIELD_ID, numbered};
use crate::scan::{Broker, ChunkRef};

/// Chunks that may be held at once: each is megabytes, and the server side answers them one after the other anyway.
const CHUNKS_IN_FLIGHT: usize = 4;

/// Rows that were made in the layout of the table: nothing is to be promoted.
const IN_TABLE_LAYOUT: Stored = Stored {
    has_extra: false,
    version: None,
};

/// What one [`HotExec`] reads.
#[derive(Debug, Clone)]
pub(crate) enum HotSource {
    Chunks(Arc<Chunks>),
    Tail,
}

/// Chunks that the partitions take from one list, so that none waits while another has a queue.
#[derive(Debug)]
pub(crate) struct Chunks {
    refs: Vec<ChunkRef>,
    next: AtomicUsize,
    in_flight: Arc<Semaphore>,
}

impl Chunks {
    pub(crate) fn new(refs: Vec<ChunkRef>) -> Self {
        Self {
            refs,
            next: AtomicUsize::new(0),
            in_flight: Arc::new(Semaphore::new(CHUNKS_IN_FLIGHT)),
        }
    }

    fn take(&self) -> Option<&ChunkRef> {
        self.refs.get(self.next.fetch_add(1, Ordering::Relaxed))
    }
}

pub(crate) struct HotExec {
    table: Arc<Table>,
    source: HotSource,
    broker: Arc<dyn Broker>,
    counters: Arc<Counters>,
    batch_rows: usize,
    with_rows: bool,
    properties: Arc<PlanProperties>,
}

impl HotExec {
    pub(crate) fn new(
        table: Arc<Table>,
        source: HotSource,
        broker: Arc<dyn Broker>,
        counters: Arc<Counters>,
        threads: usize,
        batch_rows: usize,
        with_rows: bool,
    ) -> Self {
        let partitions = match &source {
            HotSource::Chunks(chunks) => threads.min(chunks.refs.len()).min(CHUNKS_IN_FLIGHT),
            HotSource::Tail => 1,
        };
        let properties = PlanProperties::new(
            EquivalenceProperties::new(Arc::clone(&table.target_schema)),
            Partitioning::UnknownPartitioning(partitions.max(1)),
            EmissionType::Incremental,
            Boundedness::Bounded,
        );
        Self {
            table,
            source,
            broker,
            counters,
            batch_rows,
            with_rows,
            properties: Arc::new(properties),
        }
    }
}

impl fmt::Debug for HotExec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HotExec")
            .field("source", &self.source)
            .finish_non_exhaustive()
    }
}

impl DisplayAs for HotExec {
    fn fmt_as(&self, _: DisplayFormatType, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.source {
            HotSource::Chunks(chunks) => write!(f, "HotExec: chunks={}", chunks.refs.len()),
            HotSource::Tail => write!(f, "HotExec: tail"),
        }
    }
}

impl ExecutionPlan for HotExec {
    fn name(&self) -> &str {
        "HotExec"
    }

    fn properties(&self) -> &Arc<PlanProperties> {
        &self.properties
    }

    fn children(&self) -> Vec<&Arc<dyn ExecutionPlan>> {
        Vec::new()
    }

    fn with_new_children(
        self: Arc<Self>,
        _: Vec<Arc<dyn ExecutionPlan>>,
    ) -> DfResult<Arc<dyn ExecutionPlan>> {
        Ok(self)
    }

    fn execute(
        &self,
        _partition: usize,
        context: Arc<TaskContext>,
    ) -> DfResult<SendableRecordBatchStream> {
        let name = match &self.source {
            HotSource::Chunks(_) => "chunks",
            HotSource::Tail => "inbox tail",
        };
        let reader = HotReader {
            table: Arc::clone(&self.table),
            source: self.source.clone(),
            broker: Arc::clone(&self.broker),
            counters: Arc::clone(&self.counters),
            batch_rows: self.batch_rows,
            with_rows: self.with_rows,
            memory: MemoryConsumer::new(name).register(context.memory_pool()),
            current: None,
        };
        let schema: SchemaRef = Arc::clone(&self.table.target_schema);
        let batches = stream::try_unfold(reader, |mut reader| async move {
            Ok(reader.next().await?.map(|batch| (batch, reader)))
        })
        .boxed();
        let stream = RecordBatchStreamAdapter::new(schema, batches);
        Ok(Box::pin(cooperative(stream)))
    }
}

/// Reads one partition.
struct HotReader {
    table: Arc<Table>,
    source: HotSource,
    broker: Arc<dyn Broker>,
    counters: Arc<Counters>,
    batch_rows: usize,
    /// The row numbers of a chunk are wanted; a tail batch brings its own.
    with_rows: bool,
    /// Holds what `current` holds.
    memory: MemoryReservation,
    current: Option<Loaded>,
}

/// A chunk or tail batch on its way out, slice by slice.
struct Loaded {
    batch: RecordBatch,
    offset: usize,
    expressions: Vec<Arc<dyn PhysicalExpr>>,
    _permit: Option<OwnedSemaphorePermit>,
}

impl HotReader {
    async fn next(&mut self) -> DfResult<Option<RecordBatch>> {
        loop {
            if let Some(loaded) = &mut self.current {
                let left = loaded.batch.num_rows() - loaded.offset;
                if left > 0 {
                    let rows = left.min(self.batch_rows);
                    let slice = loaded.batch.slice(loaded.offset, rows);
                    loaded.offset += rows;
                    return adapt(&self.table, &loaded.expressions, &slice).map(Some);
                }
                self.current = None;
                self.memory.free();
            }
            self.current = match self.source.clone() {
                HotSource::Chunks(chunks) => self.load_chunk(&chunks).await?,
                HotSource::Tail => self.load_tail().await?,
            };
            if self.current.is_none() {
                return Ok(None);
            }
        }
    }

    async fn load_chunk(&mut self, chunks: &Chunks) -> DfResult<Option<Loaded>> {
        let Some(chunk) = chunks.take() else {
            return Ok(None);
        };
        let permit = Arc::clone(&chunks.in_flight)
            .acquire_owned()
            .await
            .map_err(|_| EngineError::Internal("the chunk queue was closed".to_owned()))?;
        // Before it is asked for: the server side would otherwise copy what nobody may hold.
        self.memory.try_grow(chunk.bytes as usize)?;
        let bytes = self.broker.chunk(chunk.id).await?;
        let corrupt = |e: LakeError| EngineError::CorruptChunk {
            id: chunk.id,
            reason: e.to_string(),
        };
        let (mut batch, stored) = self.decode(chunk, bytes).map_err(corrupt)?;
        if self.with_rows {
            batch = numbered(&batch, chunk.number, 0)?;
        }
        if let Some(deleted) = &chunk.deleted {
            batch = deleted.remove_from(&batch, 0).map_err(corrupt)?;
        }
        self.memory
            .try_resize(get_record_batch_memory_size(&batch))?;
        self.counters.chunks_read.fetch_add(1, Ordering::Relaxed);
        self.loaded(batch, stored, Some(permit)).map(Some)
    }

    /// The columns of a chunk that the scan needs, and how they relate to the table.
    fn decode(&self, chunk: &ChunkRef, bytes: Bytes) -> Result<(RecordBatch, Stored), LakeError> {
        match chunk.format {
            ChunkFormat::Arrow => {
                let needs = self.table.needs(chunk.has_extra);
                let stored = Stored {
                    has_extra: chunk.has_extra,
                    version: Some(chunk.schema_version),
                };
                Ok((chunk::decode_projected(bytes, &needs)?, stored))
            }
            ChunkFormat::Rows => {
                let targets = self.table.targets.iter().map(|field| field.id);
                // The number of a row is nothing that an event has.
                let wanted = targets.filter(|id| *id != ROW_FIELD_ID).collect();
                let layout = Layout::Table {
                    projection: Some(wanted),
                };
                // What was no field at the digest stays in `_extra` as it came until it is a column.
                let mut schema = Cow::Borrowed(&self.table.schema);
                let came_later =
                    |f: &Field| !f.column_ready && f.added_version > chunk.schema_version;
                // Nor is either of these a field that an event may have.
                let unknown =
                    |f: &Field| came_later(f) || [ROW_FIELD_ID, XID_FIELD_ID].contains(&f.id);
                if schema.fields.iter().any(unknown) {
                    schema.to_mut().fields.retain(|f| !unknown(f));
                }
                let batch = Rows::decode(bytes)?.batch(&schema, &layout)?;
                Ok((batch, IN_TABLE_LAYOUT))
            }
        }
    }

    async fn load_tail(&mut self) -> DfResult<Option<Loaded>> {
        let Some(batch) = self.broker.tail().await? else {
            return Ok(None);
        };
        self.memory
            .try_resize(get_record_batch_memory_size(&batch))?;
        self.counters
            .tail_rows
            .fetch_add(batch.num_rows() as u64, Ordering::Relaxed);
        self.loaded(batch, IN_TABLE_LAYOUT, None).map(Some)
    }

    fn loaded(
        &self,
        batch: RecordBatch,
        stored: Stored,
        permit: Option<OwnedSemaphorePermit>,
    ) -> DfResult<Loaded> {
        Ok(Loaded {
            expressions: self.table.expressions(batch.schema_ref(), stored)?,
            batch,
            offset: 0,
            _permit: permit,
        })
    }
}
