//! The table of all collections, `_all`: one scan per collection, one after the other, in one shape.
//!
//! Its columns are `_collection`, `_time`, `_user`, `_id`, `_received_at` and `properties`; its filter may be on all
//! of them but the last. Collections are opened one by one, so that a project with thousands of them costs no more
//! memory than its largest; each is read in parallel by itself.

use std::sync::{Arc, Mutex, PoisonError};
use std::vec::IntoIter;

use arrow::array::{ArrayRef, RecordBatch, RecordBatchOptions, StringArray};
use arrow::datatypes::{Schema as ArrowSchema, SchemaRef};
use arrow::error::ArrowError;
use futures::{StreamExt, stream};
use rakam_event::extra;
use rakam_event::schema::{Field, SYSTEM_FIELDS, Schema, arrow_field};
use rakam_event::types::FieldType;
use rakam_lake::scalar::Scalar;

use crate::context::EngineContext;
use crate::error::EngineError;
use crate::ir::{Expr, ScanPlan};
use crate::metrics::ScanMetrics;
use crate::scan::{Broker, ChunkRef, FileRef, MetricsFn, ScanInput, ScanStream, execute};

/// The pseudo field `_collection`.
pub const COLLECTION_FIELD_ID: i32 = 12;
/// The pseudo field `properties`.
pub const PROPERTIES_FIELD_ID: i32 = 13;
/// The system fields that are columns of `_all`; every other one is among the properties.
const COMMON_FIELD_IDS: [i32; 4] = [1, 2, 3, 9];

/// One collection of the project and the one who answers for it.
pub struct Part {
    pub collection: String,
    pub schema: Schema,
    pub files: Vec<FileRef>,
    pub chunks: Vec<ChunkRef>,
    pub has_tail: bool,
    /// Events from before this time are left out, in microseconds since 1970.
    pub from_us: Option<i64>,
    pub broker: Arc<dyn Broker>,
}

/// What has to be read of one collection: its [`ScanPlan::needed`] is what the collection's tail has to hold.
pub fn part_plan(
    plan: &ScanPlan,
    collection: &str,
    schema: &Schema,
    from_us: Option<i64>,
) -> Result<ScanPlan, EngineError> {
    let mut columns = Vec::new();
    for &id in &plan.columns {
        match id {
            COLLECTION_FIELD_ID => {}
            PROPERTIES_FIELD_ID => columns.extend(properties(schema).map(|field| field.id)),
            id if COMMON_FIELD_IDS.contains(&id) => columns.push(id),
            id => return Err(unknown(id)),
        }
    }
    columns.sort_unstable();
    columns.dedup();
    let mut filter = plan.filter.clone();
    if let Some(filter) = &mut filter {
        let name = Expr::Literal(Scalar::Text(collection.to_owned()));
        filter.replace_column(COLLECTION_FIELD_ID, &name);
        let mut read = std::collections::BTreeSet::new();
        filter.columns(&mut read);
        if let Some(id) = read.into_iter().find(|id| !COMMON_FIELD_IDS.contains(id)) {
            return Err(unknown(id));
        }
    }
    let mut own = ScanPlan {
        columns,
        filter,
        limit: plan.limit,
    };
    if let Some(from_us) = from_us {
        own.leave_out_before(from_us);
    }
    Ok(own)
}

/// The fields that go into `properties`: the columns of the collection's table that `_all` has not.
fn properties(schema: &Schema) -> impl Iterator<Item = &Field> {
    schema
        .fields
        .iter()
        .filter(|field| field.column_ready && !COMMON_FIELD_IDS.contains(&field.id))
}

fn unknown(id: i32) -> EngineError {
    EngineError::Plan(format!("_all has no field {id}, or cannot filter by it"))
}

/// Starts a scan of all collections. `plan` speaks of the pseudo fields and ids of `_all`. As [`execute`].
pub fn execute_all(
    plan: ScanPlan,
    parts: Vec<Part>,
    ctx: &EngineContext,
) -> Result<ScanStream, EngineError> {
    let fields = plan
        .columns
        .iter()
        .map(|&id| {
            let (name, ty) = match id {
                COLLECTION_FIELD_ID => ("_collection", FieldType::Text),
                PROPERTIES_FIELD_ID => ("properties", FieldType::Jsonb),
                id if COMMON_FIELD_IDS.contains(&id) => SYSTEM_FIELDS
                    .iter()
                    .find(|(system, _, _)| *system == id)
                    .map(|&(_, name, ty)| (name, ty))
                    .ok_or_else(|| unknown(id))?,
                id => return Err(unknown(id)),
            };
            Ok(arrow_field(id, name, ty))
        })
        .collect::<Result<Vec<_>, _>>()?;
    let schema: SchemaRef = Arc::new(ArrowSchema::new(fields));
    let totals = Arc::new(Mutex::new(Totals::default()));
    let limit = plan.limit.map(|n| usize::try_from(n).unwrap_or(usize::MAX));
    let wanted = (0..plan.columns.len()).collect();
    let reader = AllReader {
        plan,
        schema: Arc::clone(&schema),
        parts: parts.into_iter(),
        current: None,
        totals: Arc::clone(&totals),
        ctx: ctx.clone(),
    };
    let batches = stream::try_unfold(reader, |mut reader| async move {
        Ok(reader.next().await?.map(|batch| (batch, reader)))
    });
    Ok(ScanStream::new(
        batches.boxed(),
        schema,
        wanted,
        limit,
        Arc::new(move || Totals::sum(&totals)),
    ))
}

/// The counters of the collections read so far and of the one being read.
#[derive(Default)]
struct Totals {
    finished: ScanMetrics,
    current: Option<MetricsFn>,
}

impl Totals {
    fn sum(totals: &Mutex<Self>) -> ScanMetrics {
        let totals = totals.lock().unwrap_or_else(PoisonError::into_inner);
        let mut sum = totals.finished;
        if let Some(current) = &totals.current {
            sum.add(&current());
        }
        sum
    }

    /// Ends the current collection's count and begins the next one's.
    fn turn(totals: &Mutex<Self>, next: Option<MetricsFn>) {
        let mut totals = totals.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(current) = totals.current.take() {
            totals.finished.add(&current());
        }
        totals.current = next;
    }
}

struct AllReader {
    plan: ScanPlan,
    schema: SchemaRef,
    parts: IntoIter<Part>,
    current: Option<OpenPart>,
    totals: Arc<Mutex<Totals>>,
    ctx: EngineContext,
}

struct OpenPart {
    collection: String,
    properties: Vec<Field>,
    batches: ScanStream,
}

impl AllReader {
    async fn next(&mut self) -> Result<Option<RecordBatch>, EngineError> {
        loop {
            if let Some(part) = &mut self.current {
                if let Some(batch) = part.batches.next().await {
                    return part
                        .shape(&self.plan.columns, &self.schema, &batch?)
                        .map(Some);
                }
                self.current = None;
                Totals::turn(&self.totals, None);
            }
            let Some(part) = self.parts.next() else {
                return Ok(None);
            };
            let plan = part_plan(&self.plan, &part.collection, &part.schema, part.from_us)?;
            let properties = properties(&part.schema).cloned().collect();
            let input = ScanInput {
                schema: part.schema,
                plan,
                files: part.files,
                chunks: part.chunks,
                has_tail: part.has_tail,
            };
            let batches = execute(input, part.broker, &self.ctx)?;
            Totals::turn(&self.totals, Some(batches.metrics_fn()));
            self.current = Some(OpenPart {
                collection: part.collection,
                properties,
                batches,
            });
        }
    }
}

impl OpenPart {
    /// A batch of the collection as rows of `_all`.
    fn shape(
        &self,
        columns: &[i32],
        schema: &SchemaRef,
        batch: &RecordBatch,
    ) -> Result<RecordBatch, EngineError> {
        let internal = |e: ArrowError| EngineError::Internal(e.to_string());
        let columns = columns
            .iter()
            .map(|&id| {
                Ok(match id {
                    COLLECTION_FIELD_ID => {
                        let names = std::iter::repeat_n(&self.collection, batch.num_rows());
                        Arc::new(StringArray::from_iter_values(names)) as ArrayRef
                    }
                    PROPERTIES_FIELD_ID => self.properties(batch)?,
                    id => self.column(batch, id)?,
                })
            })
            .collect::<Result<Vec<_>, EngineError>>()?;
        let options = RecordBatchOptions::new().with_row_count(Some(batch.num_rows()));
        RecordBatch::try_new_with_options(Arc::clone(schema), columns, &options).map_err(internal)
    }

    fn column(&self, batch: &RecordBatch, id: i32) -> Result<ArrayRef, EngineError> {
        batch
            .schema_ref()
            .fields()
            .iter()
            .position(|field| rakam_lake::chunk::field_id(field) == Some(id))
            .map(|index| Arc::clone(batch.column(index)))
            .ok_or_else(|| EngineError::Internal(format!("field {id} was not read")))
    }

    fn properties(&self, batch: &RecordBatch) -> Result<ArrayRef, EngineError> {
        let columns = self
            .properties
            .iter()
            .map(|field| self.column(batch, field.id))
            .collect::<Result<Vec<_>, _>>()?;
        let fields: Vec<_> = self.properties.iter().map(Field::arrow).collect();
        let batch = RecordBatch::try_new(Arc::new(ArrowSchema::new(fields)), columns)
            .map_err(|e| EngineError::Internal(e.to_string()))?;
        let properties =
            extra::properties(&batch, &self.properties).map_err(|e| EngineError::CorruptFile {
                reason: e.to_string(),
            })?;
        Ok(Arc::new(properties))
    }
}
