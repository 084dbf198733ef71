//! Seeded rows of every type, the tiers they are split over, and a broker that answers from memory.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use arrow::array::*;
use arrow::datatypes::{DataType, Field as ArrowField};
use async_trait::async_trait;
use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt};
use parquet::arrow::ArrowWriter;
use parquet::file::properties::{EnabledStatistics, WriterProperties};
use rakam_engine::{
    Broker, ChunkRef, EngineContext, EngineError, Expr, FileRef, ScanInput, ScanPlan, ScanStream,
    execute,
};
use rakam_event::batch::{BatchBuilder, Layout};
use rakam_event::entry::Limits;
use rakam_event::schema::{FIRST_USER_FIELD_ID, Field, Schema};
use rakam_event::types::FieldType;
use rakam_lake::chunk::ChunkFormat;
use rakam_lake::row_chunk::{Origin, Rows, Rules};
use rakam_lake::rows::{RowBits, RowSet};
use rakam_lake::scalar::Scalar;

/// SplitMix64.
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    pub fn pick<T: Clone>(&mut self, of: &[T]) -> T {
        of[self.below(of.len())].clone()
    }
}

/// The id of the field that numbers the rows.
pub const N: i32 = FIRST_USER_FIELD_ID;

pub fn field(id: i32, name: &str, ty: FieldType, added_version: i32, column_ready: bool) -> Field {
    Field {
        id,
        name: name.to_owned(),
        ty,
        added_version,
        column_ready,
    }
}

pub const fn numeric(precision: u8, scale: u8) -> FieldType {
    FieldType::Numeric { precision, scale }
}

/// `n`, then a field of each type.
pub fn all_types() -> Schema {
    let types = [
        FieldType::Int8,
        FieldType::Bool,
        FieldType::Int4,
        FieldType::Int8,
        FieldType::Float4,
        FieldType::Float8,
        numeric(9, 2),
        numeric(18, 0),
        numeric(38, 10),
        FieldType::Text,
        FieldType::Date,
        FieldType::Timestamptz,
        FieldType::Uuid,
        FieldType::Int4,
        FieldType::Float8,
        FieldType::Text,
        FieldType::Inet,
        FieldType::Jsonb,
        FieldType::BoolArray,
        FieldType::Float8Array,
        FieldType::TextArray,
    ];
    let fields = types
        .into_iter()
        .enumerate()
        .map(|(i, ty)| field(N + i as i32, &format!("f{i}"), ty, 1, true));
    Schema::new(1, fields.collect())
}

/// A row: a value for each field of the schema. Types without scalars have their text.
pub type Row = Vec<Option<Scalar>>;

/// Few distinct values per type, so that comparisons meet equals; extremes among them.
pub fn value(ty: FieldType, rng: &mut Rng) -> Scalar {
    let floats = [
        0.0,
        -0.0,
        1.5,
        -1.5,
        1e30,
        f64::INFINITY,
        f64::NEG_INFINITY,
        1e-40,
    ];
    match ty {
        FieldType::Bool => Scalar::Bool(rng.below(2) == 0),
        FieldType::Int4 => Scalar::Int4(rng.pick(&[0, 1, -1, 7, 8, i32::MIN, i32::MAX])),
        FieldType::Int8 => Scalar::Int8(rng.pick(&[0, 1, -1, 7, 1 << 40, i64::MIN, i64::MAX])),
        FieldType::Float4 => Scalar::Float4(rng.pick(&floats) as f32),
        FieldType::Float8 => Scalar::Float8(rng.pick(&floats)),
        FieldType::Numeric { precision, scale } => {
            let top = 10i128.pow(u32::from(precision)) - 1;
            let unit = 10i128.pow(u32::from(scale)).min(top);
            let seven = unit.saturating_mul(7).min(top);
            let unscaled = rng.pick(&[0, 1, -1, 150, unit, -unit, seven, top, -top]);
            Scalar::Numeric { unscaled, scale }
        }
        FieldType::Date => Scalar::Date(rng.pick(&[0, -719_162, 2_932_896, 19_000, 19_001])),
        FieldType::Timestamptz => {
            Scalar::Timestamptz(rng.pick(&[0, -62_135_596_800_000_000, 1_700_000_000_000_000, 5]))
        }
        FieldType::Uuid => Scalar::Uuid([rng.pick(&[0, 1, 127, 128, 255]); 16]),
        FieldType::Inet => Scalar::Text(format!("10.0.0.{}", rng.below(9))),
        FieldType::Jsonb => Scalar::Text(format!("{{\"a\":{}}}", rng.below(9))),
        FieldType::Text => {
            let parts = [
                "", "a", "b", "ab", "Z", "ä", "€", "%", "_", "\\", "\n", "😀", " ", "aXb",
            ];
            let n = rng.below(4);
            let mut text: String = (0..n).map(|_| rng.pick(&parts)).collect();
            if rng.below(20) == 0 {
                text.push_str(&"long ".repeat(30));
            }
            Scalar::Text(text)
        }
        FieldType::BoolArray | FieldType::Float8Array | FieldType::TextArray => {
            Scalar::Int8(rng.below(3) as i64)
        }
    }
}

/// `n` random rows; system fields but `_time` and `_user` are NULL.
pub fn rows(schema: &Schema, n: usize, rng: &mut Rng) -> Vec<Row> {
    (0..n)
        .map(|i| {
            let one = |field: &Field, rng: &mut Rng| match field.id {
                1 => Some(Scalar::Timestamptz(1_700_000_000_000_000 + i as i64)),
                2 => Some(Scalar::Text(format!("u{}", i % 7))),
                id if id < N => None,
                N => Some(Scalar::Int8(i as i64)),
                _ => (rng.below(5) > 0).then(|| value(field.ty, rng)),
            };
            schema.fields.iter().map(|f| one(f, rng)).collect()
        })
        .collect()
}

/// The rows as chunks and files hold them, `_xid` included.
pub fn batch(schema: &Schema, rows: &[Row]) -> RecordBatch {
    let mut columns: Vec<ArrayRef> = (0..schema.fields.len())
        .map(|i| {
            let values: Vec<_> = rows.iter().map(|row| row[i].clone()).collect();
            column(schema.fields[i].arrow().data_type(), &values)
        })
        .collect();
    columns.push(Arc::new(Int64Array::from(vec![700; rows.len()])));
    RecordBatch::try_new(schema.arrow(), columns).unwrap()
}

fn column(ty: &DataType, values: &[Option<Scalar>]) -> ArrayRef {
    macro_rules! typed {
        ($variant:ident, $array:ty) => {
            values
                .iter()
                .map(|v| match v {
                    None => None,
                    Some(Scalar::$variant(v)) => Some(v.clone()),
                    Some(other) => panic!("{other:?} in a column of {ty}"),
                })
                .collect::<$array>()
        };
    }
    match ty {
        DataType::Boolean => Arc::new(typed!(Bool, BooleanArray)),
        DataType::Int32 => Arc::new(typed!(Int4, Int32Array)),
        DataType::Int64 => Arc::new(typed!(Int8, Int64Array)),
        DataType::Float32 => Arc::new(typed!(Float4, Float32Array)),
        DataType::Float64 => Arc::new(typed!(Float8, Float64Array)),
        DataType::Utf8 => Arc::new(typed!(Text, StringArray)),
        DataType::Date32 => Arc::new(typed!(Date, Date32Array)),
        DataType::Timestamp(..) => {
            Arc::new(typed!(Timestamptz, TimestampMicrosecondArray).with_timezone("UTC"))
        }
        DataType::Decimal128(precision, scale) => {
            let unscaled = values.iter().map(|v| match v {
                Some(Scalar::Numeric { unscaled, .. }) => Some(*unscaled),
                _ => None,
            });
            let array: Decimal128Array = unscaled.collect();
            Arc::new(array.with_precision_and_scale(*precision, *scale).unwrap())
        }
        DataType::FixedSizeBinary(16) => {
            let mut builder = FixedSizeBinaryBuilder::new(16);
            for value in values {
                match value {
                    Some(Scalar::Uuid(v)) => builder.append_value(v).unwrap(),
                    _ => builder.append_null(),
                }
            }
            Arc::new(builder.finish())
        }
        DataType::List(item) => list(item, values),
        other => panic!("no column of {other}"),
    }
}

/// Lists of as many elements as the number says.
fn list(item: &Arc<ArrowField>, values: &[Option<Scalar>]) -> ArrayRef {
    let lengths: Vec<usize> = values
        .iter()
        .map(|v| match v {
            Some(Scalar::Int8(n)) => *n as usize,
            _ => 0,
        })
        .collect();
    let total = lengths.iter().sum();
    let items: Vec<Option<Scalar>> = (0..total)
        .map(|i| match item.data_type() {
            DataType::Boolean => Some(Scalar::Bool(i % 2 == 0)),
            DataType::Float64 => Some(Scalar::Float8(i as f64)),
            _ => Some(Scalar::Text(format!("t{i}"))),
        })
        .collect();
    let nulls = values.iter().map(Option::is_some).collect();
    Arc::new(ListArray::new(
        Arc::clone(item),
        arrow::buffer::OffsetBuffer::from_lengths(lengths),
        column(item.data_type(), &items),
        Some(nulls),
    ))
}

/// The scalar at a place of a result; what has no scalar type comes as text or, for lists, as a length.
pub fn cell(array: &dyn Array, row: usize) -> Option<Scalar> {
    if array.is_null(row) {
        return None;
    }
    Some(match array.data_type() {
        DataType::Boolean => Scalar::Bool(array.as_boolean().value(row)),
        DataType::Int32 => {
            Scalar::Int4(as_primitive_array::<arrow::datatypes::Int32Type>(array).value(row))
        }
        DataType::Int64 => {
            Scalar::Int8(as_primitive_array::<arrow::datatypes::Int64Type>(array).value(row))
        }
        DataType::Float32 => {
            Scalar::Float4(as_primitive_array::<arrow::datatypes::Float32Type>(array).value(row))
        }
        DataType::Float64 => {
            Scalar::Float8(as_primitive_array::<arrow::datatypes::Float64Type>(array).value(row))
        }
        DataType::Utf8 => Scalar::Text(as_string_array(array).value(row).to_owned()),
        DataType::Date32 => {
            Scalar::Date(as_primitive_array::<arrow::datatypes::Date32Type>(array).value(row))
        }
        DataType::Timestamp(..) => Scalar::Timestamptz(
            as_primitive_array::<arrow::datatypes::TimestampMicrosecondType>(array).value(row),
        ),
        DataType::Decimal128(_, scale) => Scalar::Numeric {
            unscaled: as_primitive_array::<arrow::datatypes::Decimal128Type>(array).value(row),
            scale: *scale as u8,
        },
        DataType::FixedSizeBinary(16) => {
            Scalar::Uuid(array.as_fixed_size_binary().value(row).try_into().unwrap())
        }
        DataType::List(_) => Scalar::Int8(array.as_list::<i32>().value(row).len() as i64),
        other => panic!("no scalar of {other}"),
    })
}

/// Answers from memory, counts, and can be slow.
#[derive(Default)]
pub struct MemoryBroker {
    pub chunks: HashMap<i64, Bytes>,
    pub tail: Mutex<VecDeque<RecordBatch>>,
    pub delay: Duration,
    pub asked: AtomicUsize,
    pub busy: AtomicUsize,
    pub busiest: AtomicUsize,
}

#[async_trait]
impl Broker for MemoryBroker {
    async fn chunk(&self, id: i64) -> Result<Bytes, EngineError> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        let busy = self.busy.fetch_add(1, Ordering::SeqCst) + 1;
        self.busiest.fetch_max(busy, Ordering::SeqCst);
        if !self.delay.is_zero() {
            tokio::time::sleep(self.delay).await;
        }
        self.busy.fetch_sub(1, Ordering::SeqCst);
        self.chunks
            .get(&id)
            .cloned()
            .ok_or_else(|| EngineError::Host {
                sqlstate: "XX001".to_owned(),
                message: "no such chunk".to_owned(),
                hint: None,
            })
    }

    async fn tail(&self) -> Result<Option<RecordBatch>, EngineError> {
        Ok(self.tail.lock().unwrap().pop_front())
    }
}

/// Where the events of row chunks come from.
pub const ORIGIN: Origin = Origin {
    received_at_us: 1_700_000_000_000_000,
    shift_us: 0,
    xid: 700,
    rules: Rules {
        time_past_us: 1_000_000_000,
        time_future_us: 0,
        max_string_bytes: 20,
    },
};

/// The tiers of one collection.
#[derive(Default)]
pub struct Tiers {
    pub store: Arc<InMemory>,
    pub files: Vec<FileRef>,
    pub chunks: Vec<ChunkRef>,
    pub broker: MemoryBroker,
}

impl Tiers {
    /// Adds a data file of small row groups and pages, with every kind of statistics and bloom filters everywhere.
    pub async fn file(&mut self, schema: &Schema, rows: &[Row], with_footer: bool) {
        self.file_without(schema, rows, with_footer, None).await;
    }

    /// A data file of which some rows are deleted.
    pub async fn file_without(
        &mut self,
        schema: &Schema,
        rows: &[Row],
        with_footer: bool,
        deleted: Option<RowSet>,
    ) {
        let batch = batch(schema, rows);
        let properties = WriterProperties::builder()
            .set_max_row_group_row_count(Some(64))
            .set_data_page_row_count_limit(16)
            .set_write_batch_size(16)
            .set_statistics_enabled(EnabledStatistics::Page)
            .set_bloom_filter_enabled(true)
            .set_bloom_filter_ndv(64)
            .build();
        let mut buffer = Vec::new();
        let mut writer =
            ArrowWriter::try_new(&mut buffer, batch.schema(), Some(properties)).unwrap();
        writer.write(&batch).unwrap();
        writer.close().unwrap();
        let data = Bytes::from(buffer);
        let path = format!("secret/place/{}.parquet", self.files.len());
        let footer =
            with_footer.then(|| rakam_lake::footer::seal_footer(&data, data.len() as u64).unwrap());
        self.store
            .put(&Path::from(path.as_str()), data.clone().into())
            .await
            .unwrap();
        self.files.push(FileRef {
            store: Arc::clone(&self.store) as Arc<dyn ObjectStore>,
            path,
            bytes: data.len() as u64,
            n: rows.len() as u64,
            has_extra: has_extra(&batch),
            footer,
            deleted: deleted.map(Arc::new),
            number: self.files.len() as u32,
            // Both ways of reading, whatever the test is about.
            remote: self.files.len() % 2 == 1,
        });
    }

    pub fn chunk(&mut self, schema: &Schema, rows: &[Row]) {
        self.chunk_without(schema, rows, None);
    }

    /// A chunk of which some rows are deleted.
    pub fn chunk_without(&mut self, schema: &Schema, rows: &[Row], deleted: Option<RowSet>) {
        let batch = batch(schema, rows);
        let data = Bytes::from(rakam_lake::chunk::encode(&batch, schema.version).unwrap());
        self.add_chunk(ChunkFormat::Arrow, schema, &batch, data, deleted);
    }

    fn add_chunk(
        &mut self,
        format: ChunkFormat,
        schema: &Schema,
        batch: &RecordBatch,
        data: Bytes,
        deleted: Option<RowSet>,
    ) {
        let id = 100 + self.chunks.len() as i64;
        self.chunks.push(ChunkRef {
            id,
            format,
            n: batch.num_rows() as u32,
            bytes: data.len() as u32,
            schema_version: schema.version,
            has_extra: has_extra(batch),
            deleted: deleted.map(Arc::new),
            number: id as u32,
        });
        self.broker.chunks.insert(id, data);
    }

    /// Events as text, as a row chunk.
    pub fn row_chunk(&mut self, schema: &Schema, events: &[&str]) {
        let mut rows = Rows::default();
        for event in events {
            rows.push(event, ORIGIN);
        }
        let batch = rows.batch(schema, &Layout::Stored).unwrap();
        let data = Bytes::from(rows.encode(schema.version).unwrap());
        self.add_chunk(ChunkFormat::Rows, schema, &batch, data, None);
    }

    /// The same events as the digest makes an Arrow chunk of them.
    pub fn digested_chunk(&mut self, schema: &Schema, events: &[&str]) {
        let limits = Limits {
            max_string_bytes: ORIGIN.rules.max_string_bytes,
            max_fields: 0,
            ..Limits::default()
        };
        let mut builder = BatchBuilder::new(schema, Layout::Stored, &limits).unwrap();
        for event in events {
            builder.push(event, &ORIGIN.stamp()).unwrap();
        }
        let batch = builder.finish().unwrap().batch;
        let data = Bytes::from(rakam_lake::chunk::encode(&batch, schema.version).unwrap());
        self.add_chunk(ChunkFormat::Arrow, schema, &batch, data, None);
    }

    pub fn tail(&mut self, schema: &Schema, rows: &[Row]) {
        self.broker
            .tail
            .lock()
            .unwrap()
            .push_back(batch(schema, rows));
    }

    /// Cuts the rows at random and puts each piece into a random tier, half of the files and chunks with further
    /// rows that are deleted.
    pub async fn split(schema: &Schema, rows: &[Row], rng: &mut Rng) -> Self {
        let mut tiers = Self::default();
        let mut rest = rows;
        while !rest.is_empty() {
            let n = (1 + rng.below(300)).min(rest.len());
            let (piece, after) = rest.split_at(n);
            let with_deleted = rng.below(2) == 0;
            match rng.below(4) {
                0 | 1 if with_deleted => {
                    let (stored, deleted) = with_rows_to_delete(piece, rng);
                    tiers
                        .file_without(schema, &stored, true, Some(deleted))
                        .await;
                }
                0 | 1 => tiers.file(schema, piece, rng.below(2) == 0).await,
                2 if with_deleted => {
                    let (stored, deleted) = with_rows_to_delete(piece, rng);
                    tiers.chunk_without(schema, &stored, Some(deleted));
                }
                2 => tiers.chunk(schema, piece),
                _ => tiers.tail(schema, piece),
            }
            rest = after;
        }
        tiers
    }

    pub fn input(&self, schema: &Schema, plan: ScanPlan) -> ScanInput {
        ScanInput {
            schema: schema.clone(),
            plan,
            files: self.files.clone(),
            chunks: self.chunks.clone(),
            has_tail: !self.broker.tail.lock().unwrap().is_empty(),
        }
    }

    /// Scans; the tail can be scanned again.
    pub async fn scan(
        &self,
        schema: &Schema,
        plan: ScanPlan,
        ctx: &EngineContext,
    ) -> (Vec<Row>, ScanStream) {
        let again = self.broker.tail.lock().unwrap().clone();
        let broker = MemoryBroker {
            chunks: self.broker.chunks.clone(),
            tail: Mutex::new(again),
            ..MemoryBroker::default()
        };
        let mut stream = execute(self.input(schema, plan), Arc::new(broker), ctx).unwrap();
        let batches: Vec<_> = stream.by_ref().try_collect().await.unwrap();
        for batch in &batches {
            assert_eq!(batch.schema(), stream.schema());
        }
        (cells(&batches), stream)
    }
}

/// The rows with copies of some of them between, and where the copies are. Sometimes there are long runs.
pub fn with_rows_to_delete(rows: &[Row], rng: &mut Rng) -> (Vec<Row>, RowSet) {
    let longest = rng.pick(&[1, 3, 150]);
    let (mut stored, mut copies) = (Vec::new(), Vec::new());
    for row in rows {
        if rng.below(longest * 2) == 0 {
            for _ in 0..=rng.below(longest) {
                copies.push(stored.len() as u32);
                stored.push(rng.pick(rows));
            }
        }
        stored.push(row.clone());
    }
    let mut bits = RowBits::new(stored.len() as u32);
    assert!(copies.into_iter().all(|row| bits.insert(row)));
    (stored, bits.finish())
}

pub fn cells(batches: &[RecordBatch]) -> Vec<Row> {
    let mut rows = Vec::new();
    for batch in batches {
        for row in 0..batch.num_rows() {
            rows.push(batch.columns().iter().map(|c| cell(c, row)).collect());
        }
    }
    rows
}

fn has_extra(batch: &RecordBatch) -> bool {
    let extra = batch.column_by_name("_extra").unwrap();
    extra.null_count() < batch.num_rows()
}

pub fn plan(columns: &[i32], filter: Option<Expr>, limit: Option<u64>) -> ScanPlan {
    ScanPlan {
        columns: columns.to_vec(),
        filter,
        limit,
    }
}

pub fn context() -> EngineContext {
    EngineContext::new(2, 256 << 20).unwrap()
}

/// The row numbers of a scan of `[N, …]`, in order.
pub fn numbers(rows: &[Row]) -> Vec<i64> {
    let mut numbers: Vec<i64> = rows
        .iter()
        .map(|row| match &row[0] {
            Some(Scalar::Int8(n)) => *n,
            other => panic!("{other:?} is no row number"),
        })
        .collect();
    numbers.sort_unstable();
    numbers
}
