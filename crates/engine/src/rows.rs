//! Scans that say which row of which object each row is: how events to be deleted are found.
//!
//! Such a scan asks for the pseudo field [`ROW_FIELD_ID`]. It reads data files whole, in their order, with no pruning
//! and no decoding filter inside of a file, so that a row's number is a count. Rows deleted before do not appear.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use arrow::array::{ArrayRef, Int64Array, RecordBatch, RecordBatchOptions};
use arrow::datatypes::{Schema as ArrowSchema, SchemaRef};
use datafusion_common::DataFusionError;
use datafusion_common::Result as DfResult;
use datafusion_execution::TaskContext;
use datafusion_execution::memory_pool::MemoryPool;
use datafusion_physical_expr::{EquivalenceProperties, PhysicalExpr};
use datafusion_physical_plan::coop::cooperative;
use datafusion_physical_plan::execution_plan::{Boundedness, EmissionType};
use datafusion_physical_plan::stream::RecordBatchStreamAdapter;
use datafusion_physical_plan::{
    DisplayAs, DisplayFormatType, ExecutionPlan, Partitioning, PlanProperties,
    SendableRecordBatchStream,
};
use futures::{StreamExt, stream};
use parquet::arrow::ProjectionMask;
use parquet::arrow::async_reader::{ParquetRecordBatchStream, ParquetRecordBatchStreamBuilder};
use rakam_event::schema::{Field, arrow_field};
use rakam_event::types::FieldType;
use rakam_lake::chunk;
use rakam_lake::rows::RowSet;

use crate::adapt::{EXTRA_FIELD_ID, Stored, Table, adapt};
use crate::error::EngineError;
use crate::metrics::Counters;
use crate::parquet_file::{Handle, Reader};
use crate::scan::FileRef;

/// The pseudo field that tells rows apart, a bigint: see [`row`].
pub const ROW_FIELD_ID: i32 = 14;
const ROW: &str = "_row";

/// The object's number and the row's number in the object, out of a value of [`ROW_FIELD_ID`].
pub fn row(value: i64) -> (u32, u32) {
    ((value >> 32) as u32, value as u32)
}

pub(crate) fn row_field() -> Field {
    Field {
        id: ROW_FIELD_ID,
        name: ROW.to_owned(),
        ty: FieldType::Int8,
        added_version: 0,
        column_ready: true,
    }
}

/// The batch with the column [`ROW_FIELD_ID`]; its first row is row `first` of the object.
pub fn numbered(batch: &RecordBatch, object: u32, first: u32) -> Result<RecordBatch, EngineError> {
    let start = (i64::from(object) << 32) + i64::from(first);
    let numbers = Int64Array::from_iter_values(start..start + batch.num_rows() as i64);
    with_rows(batch, numbers)
}

/// The batch with these values of [`ROW_FIELD_ID`], one for each row.
pub fn with_rows(batch: &RecordBatch, numbers: Int64Array) -> Result<RecordBatch, EngineError> {
    let mut fields = batch.schema().fields().to_vec();
    fields.push(Arc::new(arrow_field(ROW_FIELD_ID, ROW, FieldType::Int8)));
    let mut columns = batch.columns().to_vec();
    columns.push(Arc::new(numbers) as ArrayRef);
    let options = RecordBatchOptions::new().with_row_count(Some(batch.num_rows()));
    RecordBatch::try_new_with_options(Arc::new(ArrowSchema::new(fields)), columns, &options)
        .map_err(|e| EngineError::Internal(e.to_string()))
}

/// Reads data files with the numbers of their rows.
pub(crate) struct RowsExec {
    table: Arc<Table>,
    files: Arc<Files>,
    counters: Arc<Counters>,
    batch_rows: usize,
    properties: Arc<PlanProperties>,
}

/// Files that the partitions take from one list.
struct Files {
    all: Vec<File>,
    next: AtomicUsize,
}

struct File {
    handle: Arc<Handle>,
    number: u32,
    has_extra: bool,
    deleted: Option<Arc<RowSet>>,
}

impl RowsExec {
    pub(crate) fn new(
        table: Arc<Table>,
        files: Vec<FileRef>,
        counters: Arc<Counters>,
        threads: usize,
        batch_rows: usize,
    ) -> Result<Self, EngineError> {
        let partitions = threads.min(files.len()).max(1);
        let all = files
            .into_iter()
            .map(|file| {
                Ok(File {
                    number: file.number,
                    has_extra: file.has_extra,
                    deleted: file.deleted.clone(),
                    handle: Arc::new(Handle::new(file)?),
                })
            })
            .collect::<Result<Vec<_>, EngineError>>()?;
        let properties = PlanProperties::new(
            EquivalenceProperties::new(Arc::clone(&table.target_schema)),
            Partitioning::UnknownPartitioning(partitions),
            EmissionType::Incremental,
            Boundedness::Bounded,
        );
        Ok(Self {
            table,
            files: Arc::new(Files {
                all,
                next: AtomicUsize::new(0),
            }),
            counters,
            batch_rows,
            properties: Arc::new(properties),
        })
    }
}

impl fmt::Debug for RowsExec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RowsExec").finish_non_exhaustive()
    }
}

impl DisplayAs for RowsExec {
    fn fmt_as(&self, _: DisplayFormatType, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RowsExec: files={}", self.files.all.len())
    }
}

impl ExecutionPlan for RowsExec {
    fn name(&self) -> &str {
        "RowsExec"
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
        let reader = RowsReader {
            table: Arc::clone(&self.table),
            files: Arc::clone(&self.files),
            counters: Arc::clone(&self.counters),
            batch_rows: self.batch_rows,
            memory: Arc::clone(context.memory_pool()),
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
struct RowsReader {
    table: Arc<Table>,
    files: Arc<Files>,
    counters: Arc<Counters>,
    batch_rows: usize,
    memory: Arc<dyn MemoryPool>,
    current: Option<Open>,
}

/// A file being read.
struct Open {
    batches: ParquetRecordBatchStream<Reader>,
    /// Made with the first batch.
    expressions: Option<Vec<Arc<dyn PhysicalExpr>>>,
    number: u32,
    /// The number of the next row.
    next: u32,
    has_extra: bool,
    deleted: Option<Arc<RowSet>>,
}

impl RowsReader {
    async fn next(&mut self) -> DfResult<Option<RecordBatch>> {
        loop {
            if let Some(open) = &mut self.current {
                match open.batches.next().await {
                    Some(batch) => return open.adapt(&self.table, &batch?).map(Some),
                    None => self.current = None,
                }
            }
            let number = self.files.next.fetch_add(1, Ordering::Relaxed);
            if number >= self.files.all.len() {
                return Ok(None);
            }
            self.current = Some(self.open(number).await?);
        }
    }

    async fn open(&mut self, number: usize) -> DfResult<Open> {
        let files = Arc::clone(&self.files);
        let file = &files.all[number];
        let reader = Reader::new(
            Arc::clone(&file.handle),
            &self.memory,
            Arc::clone(&self.counters),
        );
        let builder = ParquetRecordBatchStreamBuilder::new(reader).await?;
        let wanted = self.table.needs(file.has_extra);
        // What `_extra` shows depends on which columns the file has: then all of them are decoded.
        let mask = if wanted.contains(&EXTRA_FIELD_ID) {
            ProjectionMask::all()
        } else {
            let fields = builder.schema().fields().iter().enumerate();
            let roots: Vec<usize> = fields
                .filter(|(_, field)| chunk::field_id(field).is_some_and(|id| wanted.contains(&id)))
                .map(|(index, _)| index)
                .collect();
            ProjectionMask::roots(builder.parquet_schema(), roots)
        };
        let batches = builder
            .with_projection(mask)
            .with_batch_size(self.batch_rows)
            .build()?;
        Ok(Open {
            batches,
            expressions: None,
            number: file.number,
            next: 0,
            has_extra: file.has_extra,
            deleted: file.deleted.clone(),
        })
    }
}

impl Open {
    fn adapt(&mut self, table: &Table, batch: &RecordBatch) -> DfResult<RecordBatch> {
        let first = self.next;
        self.next = u32::try_from(batch.num_rows())
            .ok()
            .and_then(|rows| first.checked_add(rows))
            .ok_or_else(|| EngineError::CorruptFile {
                reason: "impossible number of rows".to_owned(),
            })?;
        let mut batch = numbered(batch, self.number, first)?;
        if let Some(deleted) = &self.deleted {
            batch = deleted
                .remove_from(&batch, first)
                .map_err(|e| DataFusionError::External(Box::new(e)))?;
        }
        if self.expressions.is_none() {
            let stored = Stored {
                has_extra: self.has_extra,
                version: None,
            };
            self.expressions = Some(table.expressions(batch.schema_ref(), stored)?);
        }
        adapt(
            table,
            self.expressions.as_deref().unwrap_or_default(),
            &batch,
        )
    }
}
