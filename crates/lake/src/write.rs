//! Writes a data file: Parquet, sorted by `_time`, with everything a reader needs to skip what it does not want.

use std::io::{self, Write};
use std::sync::Arc;

use arrow::array::RecordBatch;
use arrow::datatypes::SchemaRef;
use bytes::Bytes;
use parquet::arrow::ArrowSchemaConverter;
use parquet::arrow::arrow_writer::{ArrowWriter, ArrowWriterOptions};
use parquet::basic::{Compression, LogicalType, Type as PhysicalType, ZstdLevel};
use parquet::errors::ParquetError;
use parquet::file::metadata::{KeyValue, SortingColumn};
use parquet::file::properties::{
    DEFAULT_CREATED_BY, EnabledStatistics, WriterProperties, WriterVersion,
};
use parquet::schema::types::{ColumnPath, SchemaDescriptor, Type};
use rakam_event::schema::{ID, Schema, TIME, USER};
use rakam_event::types::FieldType;
use uuid::Uuid;

use crate::chunk::{self, ChunkInfo};
use crate::encoding::{choose, leaf};
use crate::error::LakeError;
use crate::footer::seal_footer;
use crate::period::Period;
use crate::stats::{ColumnStat, StatsBuilder};

/// `data_file.format_version` and `rakam.format_version` of what this module writes.
pub const FORMAT_VERSION: i32 = 1;
const ROW_GROUP_ROWS: usize = 1_000_000;
const ROW_GROUP_BYTES: usize = 128 << 20;
const PAGE_BYTES: usize = 1 << 20;
/// Numbers stored by byte position compress by their distribution only in long pages.
const PAGE_ROWS: usize = 65_536;
/// Above Parquet's usual 1 MiB: ids of users repeat over a row group, but there are many.
const DICTIONARY_BYTES: usize = 4 << 20;
/// Filters have a power of two as their size: at this rate an id takes six bits, at 5 % it may take twelve.
const BLOOM_FPP: f64 = 0.1;
/// Encodings are chosen by the first rows of the file.
const SAMPLE_ROWS: usize = 65_536;
const WHAT: &str = "data file";

/// Keys of a file's metadata. The first six have always been there.
pub(crate) mod keys {
    pub const FORMAT_VERSION: &str = "rakam.format_version";
    pub const PROJECT: &str = "rakam.project";
    pub const COLLECTION: &str = "rakam.collection";
    pub const SCHEMA_VERSION: &str = "rakam.schema_version";
    pub const FLUSH_ID: &str = "rakam.flush_id";
    pub const PERIOD: &str = "rakam.period";
    pub const FIRST_DAY: &str = "rakam.first_day";
    pub const PROJECT_ID: &str = "rakam.project_id";
    pub const COLLECTION_ID: &str = "rakam.collection_id";
    /// Types that the column's own does not tell: `id=type`, separated by commas.
    pub const TYPES: &str = "rakam.types";
    /// Ids of the files that were replaced, without hyphens, separated by commas.
    pub const REPLACES: &str = "rakam.replaces";
    pub const OUTPUTS: &str = "rakam.outputs";
    /// What Parquet's statistics do not tell: NULLs of array columns, NaNs of others. `id=count`, those above 0.
    pub const NULL_COUNTS: &str = "rakam.null_counts";
    pub const NAN_COUNTS: &str = "rakam.nan_counts";
}

/// What a file says about itself, so that a catalogue can be made of files alone ([`crate::file_info`] reads it).
#[derive(Debug, Clone)]
pub struct FileOptions {
    pub project: String,
    pub project_id: i32,
    pub collection: String,
    /// Stays when the collection is renamed.
    pub collection_id: i32,
    /// The operation that writes it.
    pub flush_id: Uuid,
    pub period: Period,
    pub first_day: i32,
    /// For a file made of other files, which it and the others of its operation take the place of.
    pub replaces: Option<Replaces>,
}

/// What an operation on files replaces.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Replaces {
    /// The ids in the names of the files.
    pub ids: Vec<Uuid>,
    /// How many files the operation writes, where that is known when the first is begun.
    pub outputs: Option<u32>,
}

/// A finished file: what its row of the manifest says, and the sink it went to.
#[derive(Debug)]
pub struct WrittenFile<W> {
    pub n: u64,
    pub bytes: u64,
    /// For `data_file_footer`; read by [`crate::footer::parse_footer`].
    pub footer: Bytes,
    /// Bytes from the page index to the end of the file: what one read must fetch to open it.
    pub footer_bytes: usize,
    pub stats: Vec<ColumnStat>,
    pub min_time_us: i64,
    pub max_time_us: i64,
    pub min_xid: i64,
    pub max_xid: i64,
    pub has_extra: bool,
    pub sink: W,
}

impl<W> WrittenFile<W> {
    /// The same file with another view of where it went.
    pub fn map_sink<V>(self, map: impl FnOnce(W) -> V) -> WrittenFile<V> {
        WrittenFile {
            n: self.n,
            bytes: self.bytes,
            footer: self.footer,
            footer_bytes: self.footer_bytes,
            stats: self.stats,
            min_time_us: self.min_time_us,
            max_time_us: self.max_time_us,
            min_xid: self.min_xid,
            max_xid: self.max_xid,
            has_extra: self.has_extra,
            sink: map(self.sink),
        }
    }
}

/// Writes batches of one schema, already in the order of `_time`, into a sink.
///
/// It holds a row group in encoded form and, before that, up to 65,536 rows from which encodings are chosen.
pub struct FileWriter<W: Write + Send> {
    schema: Schema,
    arrow: SchemaRef,
    options: FileOptions,
    stats: StatsBuilder,
    info: Option<ChunkInfo>,
    rows: u64,
    row_group_rows: usize,
    state: State<W>,
}

enum State<W: Write + Send> {
    Sampling {
        sink: W,
        rows: usize,
        batches: Vec<RecordBatch>,
    },
    Writing(Box<ArrowWriter<Recorder<W>>>),
    /// A write failed: the file is useless.
    Failed,
}

impl<W: Write + Send> FileWriter<W> {
    pub fn new(schema: &Schema, options: &FileOptions, sink: W) -> Self {
        Self {
            schema: schema.clone(),
            arrow: schema.arrow(),
            options: options.clone(),
            stats: StatsBuilder::new(schema),
            info: None,
            rows: 0,
            row_group_rows: ROW_GROUP_ROWS,
            state: State::Sampling {
                sink,
                rows: 0,
                batches: Vec::new(),
            },
        }
    }

    /// Appends rows. Their `_time` must not be before that of the rows already written.
    pub fn write(&mut self, batch: &RecordBatch) -> Result<(), LakeError> {
        if batch.num_rows() == 0 {
            return Ok(());
        }
        let batch = chunk::conform(batch, &self.arrow)?;
        let info = chunk::info(&batch)?;
        if self.info.is_some_and(|i| info.min_time_us < i.max_time_us) {
            return Err(LakeError::encode(
                WHAT,
                "rows are not in the order of _time",
            ));
        }
        self.stats.update(&batch)?;
        self.rows += info.n as u64;
        self.info = Some(match self.info {
            None => info,
            Some(before) => ChunkInfo {
                n: before.n + info.n,
                min_time_us: before.min_time_us,
                max_time_us: info.max_time_us,
                min_xid: before.min_xid.min(info.min_xid),
                max_xid: before.max_xid.max(info.max_xid),
                has_extra: before.has_extra || info.has_extra,
            },
        });
        match &mut self.state {
            State::Writing(writer) => {
                let written = writer.write(&batch);
                self.check(written)
            }
            State::Sampling { rows, batches, .. } => {
                *rows += batch.num_rows();
                batches.push(batch);
                if *rows >= SAMPLE_ROWS {
                    self.open()?;
                }
                Ok(())
            }
            State::Failed => Err(failed_before()),
        }
    }

    /// Completes the file. One without rows is refused: there are no empty files.
    pub fn finish(mut self) -> Result<WrittenFile<W>, LakeError> {
        let Some(info) = self.info else {
            return Err(LakeError::encode(WHAT, "no rows"));
        };
        if matches!(self.state, State::Sampling { .. }) {
            self.open()?;
        }
        let State::Writing(mut writer) = std::mem::replace(&mut self.state, State::Failed) else {
            return Err(failed_before());
        };
        let path = self.options.collection.as_str();
        let failed = |e| LakeError::from_writer(path, e);
        let stats = self.stats.finish();
        for (key, counts) in counts(&self.schema, &stats) {
            writer.append_key_value_metadata(KeyValue::new(key.to_owned(), counts));
        }
        // What the writer appends after the last row group is the page index and the metadata.
        writer.flush().map_err(failed)?;
        writer.sync().map_err(|e| failed(e.into()))?;
        writer.inner_mut().hold();
        let recorder = writer.into_inner().map_err(failed)?;
        let (mut sink, bytes) = (recorder.sink, recorder.bytes);
        let tail = Bytes::from(recorder.held.unwrap_or_default());
        sink.write_all(&tail)
            .and_then(|()| sink.flush())
            .map_err(|e| LakeError::io("write", path, &e))?;
        Ok(WrittenFile {
            n: self.rows,
            bytes,
            footer: seal_footer(&tail, bytes)?,
            footer_bytes: tail.len(),
            stats,
            min_time_us: info.min_time_us,
            max_time_us: info.max_time_us,
            min_xid: info.min_xid,
            max_xid: info.max_xid,
            has_extra: info.has_extra,
            sink,
        })
    }

    /// Bytes of the file so far, what is still in memory included: to end a file at its target size.
    pub fn estimated_bytes(&self) -> u64 {
        match &self.state {
            State::Writing(writer) => (writer.bytes_written() + writer.in_progress_size()) as u64,
            State::Sampling { .. } | State::Failed => 0,
        }
    }

    /// Ends the row group and gives the true size of the file so far: what is in memory is estimated, not compressed yet.
    pub fn settle(&mut self) -> Result<u64, LakeError> {
        if matches!(self.state, State::Sampling { .. }) && self.info.is_some() {
            self.open()?;
        }
        match &mut self.state {
            State::Writing(writer) => {
                let flushed = writer.flush();
                let bytes = writer.bytes_written() as u64;
                self.check(flushed)?;
                Ok(bytes)
            }
            State::Sampling { .. } => Ok(0),
            State::Failed => Err(failed_before()),
        }
    }

    /// Chooses the encodings and writes the sample.
    fn open(&mut self) -> Result<(), LakeError> {
        let State::Sampling { sink, batches, .. } =
            std::mem::replace(&mut self.state, State::Failed)
        else {
            return Err(failed_before());
        };
        let encode = |e: ParquetError| LakeError::encode(WHAT, e);
        let options = ArrowWriterOptions::new()
            .with_properties(self.properties(&batches)?)
            .with_parquet_schema(parquet_schema(&self.arrow).map_err(encode)?)
            // Our types follow from the Parquet schema alone; a second copy of it only makes footers larger.
            .with_skip_arrow_metadata(true);
        let mut writer = ArrowWriter::try_new_with_options(
            Recorder::new(sink),
            Arc::clone(&self.arrow),
            options,
        )
        .map_err(|e| LakeError::from_writer(&self.options.collection, e))?;
        for batch in &batches {
            writer
                .write(batch)
                .map_err(|e| LakeError::from_writer(&self.options.collection, e))?;
        }
        self.state = State::Writing(Box::new(writer));
        Ok(())
    }

    fn check(&mut self, written: Result<(), ParquetError>) -> Result<(), LakeError> {
        written.map_err(|e| {
            self.state = State::Failed;
            LakeError::from_writer(&self.options.collection, e)
        })
    }

    fn about_itself(&self) -> Vec<KeyValue> {
        let options = &self.options;
        let mut metadata = vec![
            (keys::FORMAT_VERSION, FORMAT_VERSION.to_string()),
            (keys::PROJECT, options.project.clone()),
            (keys::PROJECT_ID, options.project_id.to_string()),
            (keys::COLLECTION, options.collection.clone()),
            (keys::COLLECTION_ID, options.collection_id.to_string()),
            (keys::SCHEMA_VERSION, self.schema.version.to_string()),
            (keys::FLUSH_ID, options.flush_id.to_string()),
            (keys::PERIOD, options.period.to_string()),
            (keys::FIRST_DAY, options.first_day.to_string()),
        ];
        // Text columns that hold no text.
        let types: Vec<String> = (self.schema.fields.iter())
            .filter(|f| f.is_user() && matches!(f.ty, FieldType::Inet | FieldType::Jsonb))
            .map(|f| format!("{}={}", f.id, f.ty))
            .collect();
        if !types.is_empty() {
            metadata.push((keys::TYPES, types.join(",")));
        }
        if let Some(replaces) = &options.replaces {
            let ids: Vec<String> = replaces
                .ids
                .iter()
                .map(|id| id.simple().to_string())
                .collect();
            metadata.push((keys::REPLACES, ids.join(",")));
            metadata.extend(replaces.outputs.map(|n| (keys::OUTPUTS, n.to_string())));
        }
        metadata.sort_unstable();
        metadata
            .into_iter()
            .map(|(key, value)| KeyValue::new(key.to_owned(), value))
            .collect()
    }

    fn properties(&self, sample: &[RecordBatch]) -> Result<WriterProperties, LakeError> {
        let encode = |e: ParquetError| LakeError::encode(WHAT, e);
        let compression = Compression::ZSTD(ZstdLevel::try_new(3).map_err(encode)?);
        let metadata = self.about_itself();
        let mut builder = WriterProperties::builder()
            // Pages of version 2 leave the levels of NULLs and lists uncompressed; the encodings are set by column.
            .set_writer_version(WriterVersion::PARQUET_1_0)
            .set_created_by(format!(
                "rakam {} ({DEFAULT_CREATED_BY})",
                env!("CARGO_PKG_VERSION")
            ))
            .set_compression(compression)
            .set_statistics_enabled(EnabledStatistics::Page)
            .set_max_row_group_row_count(Some(self.row_group_rows))
            .set_max_row_group_bytes(Some(ROW_GROUP_BYTES))
            .set_data_page_size_limit(PAGE_BYTES)
            .set_data_page_row_count_limit(PAGE_ROWS)
            .set_dictionary_page_size_limit(DICTIONARY_BYTES)
            .set_key_value_metadata(Some(metadata));
        for (position, field) in self.arrow.fields().iter().enumerate() {
            let (columns, rest): (Vec<_>, Vec<_>) =
                sample.iter().map(|b| leaf(b.column(position))).unzip();
            let complete = self.rows < SAMPLE_ROWS as u64;
            let choice = choose(&columns, complete, compression).map_err(encode)?;
            let mut parts = vec![field.name().clone()];
            parts.extend(
                rest.first()
                    .into_iter()
                    .copied()
                    .flatten()
                    .map(|&p| p.to_owned()),
            );
            let path = ColumnPath::new(parts);
            builder = builder.set_column_dictionary_enabled(path.clone(), choice.dictionary);
            if let Some(encoding) = choice.plain {
                builder = builder.set_column_encoding(path.clone(), encoding);
            }
            // Made for a full row group and folded to the values there are: a column of NULLs takes 32 bytes.
            if field.name() == USER || field.name() == ID {
                builder = builder.set_column_bloom_filter_fpp(path, BLOOM_FPP);
            } else if field.name() == TIME {
                builder = builder.set_sorting_columns(Some(vec![SortingColumn {
                    column_idx: position as i32,
                    descending: false,
                    nulls_first: false,
                }]));
            }
        }
        Ok(builder.build())
    }
}

/// Counts that belong into the metadata, by key.
fn counts(schema: &Schema, stats: &[ColumnStat]) -> Vec<(&'static str, String)> {
    let is_array = |id: i32| {
        use FieldType::{BoolArray, Float8Array, TextArray};
        let mut fields = schema.fields.iter();
        fields.any(|f| f.id == id && matches!(f.ty, BoolArray | Float8Array | TextArray))
    };
    let list = |count: &dyn Fn(&ColumnStat) -> i64| {
        let counted = stats.iter().map(|stat| (stat.field_id, count(stat)));
        let above_0 = counted.filter(|(_, n)| *n > 0);
        above_0
            .map(|(id, n)| format!("{id}={n}"))
            .collect::<Vec<_>>()
            .join(",")
    };
    let nulls = list(&|stat| {
        if is_array(stat.field_id) {
            stat.null_count
        } else {
            0
        }
    });
    let nans = list(&|stat| stat.nan_count);
    let mut found = vec![(keys::NULL_COUNTS, nulls), (keys::NAN_COUNTS, nans)];
    found.retain(|(_, counts)| !counts.is_empty());
    found
}

fn failed_before() -> LakeError {
    LakeError::encode(WHAT, "an earlier write failed")
}

/// The Parquet schema of ours: what Arrow's conversion gives, with uuids marked as such.
fn parquet_schema(arrow: &SchemaRef) -> Result<SchemaDescriptor, ParquetError> {
    let converted = ArrowSchemaConverter::new()
        .schema_root("events")
        .convert(arrow)?;
    let fields = converted
        .root_schema()
        .get_fields()
        .iter()
        .map(|field| {
            let info = field.get_basic_info();
            let is_uuid = field.is_primitive()
                && field.get_physical_type() == PhysicalType::FIXED_LEN_BYTE_ARRAY
                && info.logical_type_ref().is_none();
            if !is_uuid {
                return Ok(Arc::clone(field));
            }
            Type::primitive_type_builder(info.name(), PhysicalType::FIXED_LEN_BYTE_ARRAY)
                .with_length(16)
                .with_repetition(info.repetition())
                .with_id(info.has_id().then(|| info.id()))
                .with_logical_type(Some(LogicalType::Uuid))
                .build()
                .map(Arc::new)
        })
        .collect::<Result<Vec<_>, ParquetError>>()?;
    let root = Type::group_type_builder("events")
        .with_fields(fields)
        .build()?;
    Ok(SchemaDescriptor::new(Arc::new(root)))
}

/// Passes bytes on and counts them; from [`Recorder::hold`] on it keeps them back.
struct Recorder<W> {
    sink: W,
    bytes: u64,
    held: Option<Vec<u8>>,
}

impl<W> Recorder<W> {
    fn new(sink: W) -> Self {
        Self {
            sink,
            bytes: 0,
            held: None,
        }
    }

    fn hold(&mut self) {
        self.held = Some(Vec::new());
    }
}

impl<W: Write> Write for Recorder<W> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let n = match &mut self.held {
            Some(held) => held.write(buf)?,
            None => self.sink.write(buf)?,
        };
        self.bytes += n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.sink.flush()
    }
}

#[cfg(test)]
pub(crate) mod tests;
