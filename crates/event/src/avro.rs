//! Events as Avro: the schema of each version, and records in our framing.
//!
//! A framed record is the byte 0xA7, the version of the collection's schema as four bytes, most significant first, and
//! the Avro body: every field of that version, in the order of the field ids, as a union of null and its type. Any
//! version decodes, whatever fields have come and gone since: fields are matched by their ids, never by name.

mod body;
mod schema;

use std::collections::HashMap;
use std::sync::Arc;

use arrow::array::{ArrayRef, RecordBatch, new_null_array};
use arrow::datatypes::{Field as ArrowField, Schema as ArrowSchema, SchemaRef};
use arrow_avro::reader::{Decoder as AvroDecoder, ReaderBuilder};
use arrow_avro::schema::{
    AvroSchema, CONFLUENT_MAGIC, Fingerprint, FingerprintAlgorithm, SCHEMA_METADATA_KEY,
    SchemaStore,
};
use arrow_avro::writer::format::AvroBinaryFormat;
use arrow_avro::writer::{Encoder as AvroEncoder, WriterBuilder};
use thiserror::Error;

use crate::schema::Schema;
use crate::types::FieldType;
pub use schema::{AvroField, avro_schema, parse_schema};

/// The first byte of a framed record.
pub const MAGIC: u8 = 0xA7;
/// The first byte and the version.
const HEADER: usize = 5;

/// Why bytes are no event.
#[derive(Debug, Error)]
pub enum AvroError {
    #[error("record has no Avro framing")]
    NotFramed,
    #[error("unknown schema version {0}")]
    UnknownVersion(u32),
    #[error("malformed Avro record: {0}")]
    Malformed(&'static str),
    #[error("invalid Avro schema: {0}")]
    Schema(String),
    #[error("could not convert between Avro and Arrow: {0}")]
    Convert(String),
}

impl From<arrow_avro::errors::AvroError> for AvroError {
    fn from(error: arrow_avro::errors::AvroError) -> Self {
        Self::Convert(error.to_string())
    }
}

impl From<arrow::error::ArrowError> for AvroError {
    fn from(error: arrow::error::ArrowError) -> Self {
        Self::Convert(error.to_string())
    }
}

/// The version and the body of a framed record.
pub fn unframe(record: &[u8]) -> Result<(u32, &[u8]), AvroError> {
    match record {
        [MAGIC, a, b, c, d, body @ ..] => Ok((u32::from_be_bytes([*a, *b, *c, *d]), body)),
        _ => Err(AvroError::NotFramed),
    }
}

/// Writes rows as framed records of one version.
pub struct Encoder {
    version: u32,
    columns: SchemaRef,
    inner: AvroEncoder,
}

impl Encoder {
    /// For batches that have the fields of `schema` first, in its order, as [`Schema::arrow`] has them.
    pub fn new(schema: &Schema) -> Result<Self, AvroError> {
        let version = u32::try_from(schema.version)
            .map_err(|_| AvroError::Schema("its version is negative".to_owned()))?;
        let fields = fields_of(schema);
        let columns = columns_by_id(schema);
        let inner = WriterBuilder::new(columns.as_ref().clone().with_metadata(HashMap::from([(
            SCHEMA_METADATA_KEY.to_owned(),
            schema::by_id(&fields).to_string(),
        )])))
        .build_encoder::<AvroBinaryFormat>()?;
        Ok(Self {
            version,
            columns,
            inner,
        })
    }

    /// A framed record for each row.
    pub fn encode(&mut self, batch: &RecordBatch) -> Result<Vec<Vec<u8>>, AvroError> {
        let columns = batch.columns().get(..self.columns.fields().len());
        let columns = columns.ok_or(AvroError::Malformed("the batch lacks columns"))?;
        let batch = RecordBatch::try_new(Arc::clone(&self.columns), columns.to_vec())?;
        self.inner.encode(&batch)?;
        let rows = self.inner.flush();
        Ok(rows
            .iter()
            .map(|body| {
                let mut record = Vec::with_capacity(HEADER + body.len());
                record.push(MAGIC);
                record.extend(self.version.to_be_bytes());
                record.extend_from_slice(&body);
                record
            })
            .collect())
    }
}

/// Reads framed records of any version into the columns of one schema.
pub struct Decoder {
    target: Schema,
    versions: HashMap<u32, Version>,
    current: Option<u32>,
    done: Vec<RecordBatch>,
}

struct Version {
    fields: Vec<AvroField>,
    inner: AvroDecoder,
}

/// Rows after which the decoder of a version hands over a batch.
const BATCH_ROWS: usize = 8192;

impl Decoder {
    pub fn new(target: &Schema) -> Self {
        Self {
            target: target.clone(),
            versions: HashMap::new(),
            current: None,
            done: Vec::new(),
        }
    }

    /// Lets records of this version be read. `fields` as [`parse_schema`] gives them. A field never changes its type, so a
    /// version in which one has another than in the target is refused.
    pub fn add_version(&mut self, version: u32, fields: Vec<AvroField>) -> Result<(), AvroError> {
        for field in &fields {
            let known = self.target.fields.iter().find(|f| f.id == field.id);
            if let Some(known) = known.filter(|known| known.ty != field.ty) {
                return Err(AvroError::Schema(format!(
                    "field \"{}\" is of type {}, not {}",
                    known.name, known.ty, field.ty
                )));
            }
        }
        let mut store = SchemaStore::new_with_type(FingerprintAlgorithm::Id);
        let fingerprint = Fingerprint::Id(version);
        store.set(
            fingerprint,
            AvroSchema::new(schema::by_id(&fields).to_string()),
        )?;
        let inner = ReaderBuilder::new()
            .with_batch_size(BATCH_ROWS)
            .with_writer_schema_store(store)
            .with_active_fingerprint(fingerprint)
            .build_decoder()?;
        self.versions.insert(version, Version { fields, inner });
        Ok(())
    }

    pub fn has_version(&self, version: u32) -> bool {
        self.versions.contains_key(&version)
    }

    /// Adds a record. One that is malformed changes nothing; after [`AvroError::Convert`] the decoder is of no more use.
    pub fn push(&mut self, record: &[u8]) -> Result<(), AvroError> {
        let (number, body) = unframe(record)?;
        if self.current.is_some_and(|current| current != number) {
            self.hand_over()?;
        }
        let version = self
            .versions
            .get_mut(&number)
            .ok_or(AvroError::UnknownVersion(number))?;
        body::check(&version.fields, body).map_err(AvroError::Malformed)?;
        self.current = Some(number);
        if version.inner.batch_is_full() {
            let batch = version.inner.flush()?;
            self.done.extend(conform(&self.target, batch)?);
        }
        // The library knows another framing of the same shape.
        let [a, b, c, d] = number.to_be_bytes();
        version.inner.decode(&[CONFLUENT_MAGIC[0], a, b, c, d])?;
        let read = version.inner.decode(body)?;
        if read != body.len() {
            return Err(AvroError::Convert("a record was not read whole".to_owned()));
        }
        Ok(())
    }

    /// The rows since the last call, in the order in which they came: the columns of the target's fields.
    pub fn finish(&mut self) -> Result<RecordBatch, AvroError> {
        self.hand_over()?;
        let schema = target_arrow(&self.target);
        let batches = std::mem::take(&mut self.done);
        Ok(arrow::compute::concat_batches(&schema, &batches)?)
    }

    fn hand_over(&mut self) -> Result<(), AvroError> {
        let Some(version) = self.current.take().and_then(|v| self.versions.get_mut(&v)) else {
            return Ok(());
        };
        let batch = version.inner.flush()?;
        self.done.extend(conform(&self.target, batch)?);
        Ok(())
    }
}

/// A batch whose columns are named by field ids, as columns of the target: fields that it lacks are NULL, those that
/// the target lacks are gone.
fn conform(target: &Schema, batch: Option<RecordBatch>) -> Result<Option<RecordBatch>, AvroError> {
    let Some(batch) = batch else {
        return Ok(None);
    };
    let schema = target_arrow(target);
    let columns = target
        .fields
        .iter()
        .zip(schema.fields())
        .map(|(field, wanted)| -> Result<ArrayRef, AvroError> {
            match batch.column_by_name(&schema::id_name(field.id)) {
                Some(column) => Ok(arrow::compute::cast(column, wanted.data_type())?),
                None => Ok(new_null_array(wanted.data_type(), batch.num_rows())),
            }
        })
        .collect::<Result<Vec<_>, _>>()?;
    Ok(Some(RecordBatch::try_new(schema, columns)?))
}

fn fields_of(schema: &Schema) -> Vec<AvroField> {
    schema
        .fields
        .iter()
        .map(|field| AvroField {
            id: field.id,
            ty: field.ty,
        })
        .collect()
}

fn target_arrow(schema: &Schema) -> SchemaRef {
    let fields: Vec<ArrowField> = schema.fields.iter().map(|f| f.arrow()).collect();
    Arc::new(ArrowSchema::new(fields))
}

/// The fields named by their ids, uuids marked as such.
fn columns_by_id(schema: &Schema) -> SchemaRef {
    let fields: Vec<ArrowField> = schema
        .fields
        .iter()
        .map(|field| {
            let column = field.arrow().with_name(schema::id_name(field.id));
            if field.ty == FieldType::Uuid {
                let mark = HashMap::from([("logicalType".to_owned(), "uuid".to_owned())]);
                column.with_metadata(mark)
            } else {
                column
            }
        })
        .collect();
    Arc::new(ArrowSchema::new(fields))
}

#[cfg(test)]
mod tests;
