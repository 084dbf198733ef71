//! What a data file says about itself, read from its end: enough to enter it in a manifest that knows nothing of it.

use std::collections::HashMap;

use arrow::datatypes::{DataType, Schema as ArrowSchema, TimeUnit};
use bytes::Bytes;
use parquet::arrow::parquet_to_arrow_schema;
use parquet::file::metadata::ParquetMetaData;
use rakam_event::schema::{
    EXTRA, FIRST_USER_FIELD_ID, RECEIVED_AT, SYSTEM_FIELDS, TIME, XID_FIELD_ID,
};
use rakam_event::types::FieldType;
use uuid::Uuid;

use crate::chunk::field_id;
use crate::error::LakeError;
use crate::footer::{parse_metadata, seal_footer};
use crate::period::Period;
use crate::seal;
use crate::stats::{self, ColumnStat, FileColumn};
use crate::write::{FORMAT_VERSION, Replaces, keys};

const WHAT: &str = "data file";

/// A field as a file has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileField {
    pub id: i32,
    pub name: String,
    pub ty: FieldType,
}

/// What a row of the manifest says of a file, and which collection it belongs to.
#[derive(Debug, Clone, PartialEq)]
pub struct FileInfo {
    pub project: String,
    /// None: written before files said so.
    pub project_id: Option<i32>,
    pub collection: String,
    pub collection_id: Option<i32>,
    pub flush_id: Uuid,
    pub period: Period,
    pub first_day: i32,
    pub schema_version: i32,
    /// The project's own fields.
    pub fields: Vec<FileField>,
    pub replaces: Option<Replaces>,
    pub n: u64,
    pub bytes: u64,
    pub min_time_us: i64,
    pub max_time_us: i64,
    pub min_xid: i64,
    pub max_xid: i64,
    /// When the last of its events was received.
    pub max_received_us: i64,
    pub has_extra: bool,
    pub stats: Vec<ColumnStat>,
    /// For `data_file_footer`, as [`crate::write::WrittenFile`] has it.
    pub footer: Bytes,
    pub footer_bytes: usize,
}

/// The outcome of reading a file's end.
#[derive(Debug)]
pub enum Opened {
    Info(Box<FileInfo>),
    /// So many bytes at the end are needed.
    Needs(u64),
}

/// Reads a file of `size` bytes by its last ones. Errors: XX001 it is no data file, or of a later format.
pub fn open(tail: &Bytes, size: u64) -> Result<Opened, LakeError> {
    let length = crate::footer::metadata_bytes(tail)?;
    if length > tail.len() {
        // It cannot be: [`FileInfo`] of another file, or a part of one.
        if length as u64 > size {
            return Err(LakeError::corrupt(
                WHAT,
                "its metadata is longer than the file",
            ));
        }
        return Ok(Opened::Needs(length as u64));
    }
    seal::guarded(WHAT, || {
        let metadata = parse_metadata(tail, size)?;
        let index = (metadata.row_groups().iter())
            .flat_map(|group| group.columns())
            .flat_map(|c| [c.column_index_offset(), c.offset_index_offset()])
            .flatten()
            .filter_map(|offset| u64::try_from(offset).ok())
            .min();
        let start = index.unwrap_or(size - length as u64);
        let end_bytes = size
            .checked_sub(start)
            .filter(|bytes| *bytes >= length as u64)
            .ok_or_else(|| LakeError::corrupt(WHAT, "its page index lies outside"))?;
        if end_bytes > tail.len() as u64 {
            return Ok(Opened::Needs(end_bytes));
        }
        let end = tail.slice(tail.len() - end_bytes as usize..);
        info(&metadata, &end, size).map(|info| Opened::Info(Box::new(info)))
    })
}

fn info(metadata: &ParquetMetaData, end: &Bytes, size: u64) -> Result<FileInfo, LakeError> {
    let corrupt = |reason: &str| LakeError::corrupt(WHAT, reason.to_owned());
    let about = About::new(metadata);
    match about.number::<i32>(keys::FORMAT_VERSION)? {
        Some(FORMAT_VERSION) => {}
        Some(other) => return Err(corrupt(&format!("unknown format {other}"))),
        None => return Err(corrupt("it was not written by rakam")),
    }
    let descriptor = metadata.file_metadata().schema_descr();
    let arrow =
        parquet_to_arrow_schema(descriptor, None).map_err(|e| LakeError::corrupt(WHAT, e))?;
    let columns = columns(&arrow, &about)?;
    let stats = stats::of_file(metadata, &columns)?;
    let n = u64::try_from(metadata.file_metadata().num_rows())
        .ok()
        .filter(|n| *n > 0)
        .ok_or_else(|| corrupt("it has no rows"))?;
    let range = |id: i32| {
        let stat = stats.iter().find(|stat| stat.field_id == id);
        let number = |bound: &Option<Vec<u8>>| {
            bound
                .as_deref()
                .and_then(|b| b.try_into().ok())
                .map(i64::from_le_bytes)
        };
        stat.and_then(|stat| number(&stat.min).zip(number(&stat.max)))
            .ok_or_else(|| corrupt(&format!("it has no bounds of field {id}")))
    };
    let system = |name: &str| {
        let mut fields = SYSTEM_FIELDS.iter();
        fields
            .find(|(_, known, _)| *known == name)
            .map_or(0, |(id, ..)| *id)
    };
    let ((min_time_us, max_time_us), (min_xid, max_xid)) =
        (range(system(TIME))?, range(XID_FIELD_ID)?);
    let extra = stats.iter().find(|stat| stat.field_id == system(EXTRA));
    let fields = arrow
        .fields()
        .iter()
        .zip(&columns)
        .filter(|(_, column)| column.field_id >= FIRST_USER_FIELD_ID)
        .map(|(field, column)| FileField {
            id: column.field_id,
            name: field.name().clone(),
            ty: column.ty,
        })
        .collect();
    Ok(FileInfo {
        project: about.must(keys::PROJECT)?.to_owned(),
        project_id: about.number(keys::PROJECT_ID)?,
        collection: about.must(keys::COLLECTION)?.to_owned(),
        collection_id: about.number(keys::COLLECTION_ID)?,
        flush_id: about.must_number(keys::FLUSH_ID)?,
        period: about.must(keys::PERIOD)?.parse()?,
        first_day: about.must_number(keys::FIRST_DAY)?,
        schema_version: about.must_number(keys::SCHEMA_VERSION)?,
        fields,
        replaces: about.replaces()?,
        n,
        bytes: size,
        min_time_us,
        max_time_us,
        min_xid,
        max_xid,
        max_received_us: range(system(RECEIVED_AT))?.1,
        has_extra: extra.is_some_and(|stat| stat.null_count < n as i64),
        stats,
        footer: seal_footer(end, size)?,
        footer_bytes: end.len(),
    })
}

/// The columns of a file, by their place.
fn columns(arrow: &ArrowSchema, about: &About<'_>) -> Result<Vec<FileColumn>, LakeError> {
    let types = about.by_id::<String>(keys::TYPES)?;
    let nulls = about.by_id::<i64>(keys::NULL_COUNTS)?;
    let nans = about.by_id::<i64>(keys::NAN_COUNTS)?;
    let column = |field: &arrow::datatypes::Field| {
        let id = field_id(field).ok_or_else(|| format!("column \"{}\" has no id", field.name()))?;
        let system = SYSTEM_FIELDS.iter().find(|(known, ..)| *known == id);
        let ty = match (system, types.get(&id)) {
            (Some((_, _, ty)), _) => Some(*ty),
            (None, Some(name)) => FieldType::parse(name),
            (None, None) => type_of(field.data_type()),
        };
        let ty = ty
            .filter(|ty| types_agree(&ty.arrow(), field.data_type()))
            .ok_or_else(|| format!("column \"{}\" is of no type of a field", field.name()))?;
        let is_array = matches!(field.data_type(), DataType::List(_));
        Ok(FileColumn {
            field_id: id,
            ty,
            null_count: is_array.then(|| nulls.get(&id).copied().unwrap_or(0)),
            nan_count: nans.get(&id).copied().unwrap_or(0),
        })
    };
    let columns: Result<_, String> = arrow.fields().iter().map(|f| column(f)).collect();
    columns.map_err(|reason| LakeError::corrupt(WHAT, reason))
}

fn types_agree(known: &DataType, stored: &DataType) -> bool {
    match (known, stored) {
        // Names and ids of elements apart.
        (DataType::List(known), DataType::List(stored)) => known.data_type() == stored.data_type(),
        _ => known == stored,
    }
}

/// The type of a field that is stored so; what is stored as text is text unless the file says otherwise.
pub(crate) fn type_of(stored: &DataType) -> Option<FieldType> {
    Some(match stored {
        DataType::Boolean => FieldType::Bool,
        DataType::Int32 => FieldType::Int4,
        DataType::Int64 => FieldType::Int8,
        DataType::Float32 => FieldType::Float4,
        DataType::Float64 => FieldType::Float8,
        DataType::Decimal128(precision, scale) => FieldType::Numeric {
            precision: *precision,
            scale: u8::try_from(*scale).ok()?,
        },
        DataType::Utf8 => FieldType::Text,
        DataType::Date32 => FieldType::Date,
        DataType::Timestamp(TimeUnit::Microsecond, Some(_)) => FieldType::Timestamptz,
        DataType::FixedSizeBinary(16) => FieldType::Uuid,
        DataType::List(item) => match item.data_type() {
            DataType::Boolean => FieldType::BoolArray,
            DataType::Float64 => FieldType::Float8Array,
            DataType::Utf8 => FieldType::TextArray,
            _ => return None,
        },
        _ => return None,
    })
}

/// The key-value pairs of a file.
struct About<'a>(HashMap<&'a str, &'a str>);

impl<'a> About<'a> {
    fn new(metadata: &'a ParquetMetaData) -> Self {
        let pairs = metadata.file_metadata().key_value_metadata();
        let known = pairs.into_iter().flatten();
        Self(
            known
                .filter_map(|kv| Some((kv.key.as_str(), kv.value.as_deref()?)))
                .collect(),
        )
    }

    fn must(&self, key: &str) -> Result<&'a str, LakeError> {
        let value = self.0.get(key).copied();
        value.ok_or_else(|| LakeError::corrupt(WHAT, format!("it does not say \"{key}\"")))
    }

    fn number<T: std::str::FromStr>(&self, key: &str) -> Result<Option<T>, LakeError> {
        match self.0.get(key) {
            None => Ok(None),
            Some(_) => self.must_number(key).map(Some),
        }
    }

    fn must_number<T: std::str::FromStr>(&self, key: &str) -> Result<T, LakeError> {
        (self.must(key)?.parse())
            .map_err(|_| LakeError::corrupt(WHAT, format!("malformed \"{key}\"")))
    }

    /// A list of `id=value`.
    fn by_id<T: std::str::FromStr>(&self, key: &str) -> Result<HashMap<i32, T>, LakeError> {
        let text = self.0.get(key).copied().unwrap_or_default();
        // A numeric type has a comma of its own, but is never in a list.
        let pair = |item: &str| {
            let (id, value) = item.split_once('=')?;
            Some((id.parse().ok()?, value.parse().ok()?))
        };
        let items = text.split(',').filter(|item| !item.is_empty());
        let pairs: Option<HashMap<i32, T>> = items.map(pair).collect();
        pairs.ok_or_else(|| LakeError::corrupt(WHAT, format!("malformed \"{key}\"")))
    }

    fn replaces(&self) -> Result<Option<Replaces>, LakeError> {
        let Some(text) = self.0.get(keys::REPLACES) else {
            return Ok(None);
        };
        let ids = text.split(',').filter(|id| !id.is_empty());
        let ids: Result<Vec<Uuid>, _> = ids.map(Uuid::try_parse).collect();
        Ok(Some(Replaces {
            ids: ids.map_err(|e| LakeError::corrupt(WHAT, e))?,
            outputs: self.number(keys::OUTPUTS)?,
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Rng, all_types};
    use crate::write::tests::written;

    fn opened(data: &Bytes, bytes: usize) -> Opened {
        open(&data.slice(data.len() - bytes..), data.len() as u64).unwrap()
    }

    fn info_of(data: &Bytes) -> FileInfo {
        match opened(data, data.len()) {
            Opened::Info(info) => *info,
            Opened::Needs(bytes) => panic!("needs {bytes} of {}", data.len()),
        }
    }

    #[test]
    fn a_file_tells_what_its_writer_knew() {
        for (n, seed) in [(1, 1), (2, 2), (50, 3), (5_000, 4)] {
            let (file, data) = written(n, seed);
            let info = info_of(&data);
            assert_eq!(
                (
                    info.project.as_str(),
                    info.collection.as_str(),
                    info.project_id,
                    info.collection_id
                ),
                ("acme", "pageview", Some(3), Some(7))
            );
            assert_eq!((info.period, info.first_day), (Period::Month, 19_844));
            assert_eq!(
                (info.n, info.bytes, info.has_extra),
                (file.n, file.bytes, file.has_extra)
            );
            assert_eq!(
                (info.min_time_us, info.max_time_us),
                (file.min_time_us, file.max_time_us)
            );
            assert_eq!((info.min_xid, info.max_xid), (file.min_xid, file.max_xid));
            assert_eq!(
                (info.footer, info.footer_bytes),
                (file.footer, file.footer_bytes)
            );
            let schema = all_types();
            let fields: Vec<_> = (schema.fields.iter().filter(|f| f.is_user()))
                .map(|f| (f.id, f.name.clone(), f.ty))
                .collect();
            let told: Vec<_> = info
                .fields
                .into_iter()
                .map(|f| (f.id, f.name, f.ty))
                .collect();
            assert_eq!((told, info.schema_version), (fields, schema.version));
            assert_eq!(info.stats.len(), file.stats.len());
            for (mine, written) in info.stats.iter().zip(&file.stats) {
                assert_eq!(
                    (mine.field_id, mine.null_count, mine.nan_count),
                    (written.field_id, written.null_count, written.nan_count)
                );
                if mine.exact {
                    assert_eq!(mine, written);
                }
                assert_eq!(
                    mine.min.is_some(),
                    written.min.is_some(),
                    "{mine:?} {written:?}"
                );
            }
        }
    }

    #[test]
    fn the_end_is_read_as_far_as_it_is_needed() {
        let (file, data) = written(3_000, 5);
        let Opened::Needs(first) = opened(&data, 8) else {
            panic!("eight bytes are enough");
        };
        let Opened::Needs(second) = opened(&data, first as usize) else {
            panic!("the page index is not asked for");
        };
        assert_eq!(second as usize, file.footer_bytes);
        assert!(matches!(opened(&data, second as usize), Opened::Info(_)));
    }

    #[test]
    fn garbage_is_an_error() {
        let (file, data) = written(300, 6);
        let mut rng = Rng::new(8);
        for _ in 0..300 {
            let mut bad = data.to_vec();
            for _ in 0..=rng.below(4) {
                let at = bad.len() - 1 - rng.below(file.footer_bytes as u64) as usize;
                bad[at] ^= 1 << rng.below(8);
            }
            let _ = open(&bad.into(), data.len() as u64);
        }
        for end in [0, 3, 7] {
            assert!(open(&data.slice(..end), end as u64).is_err());
        }
        assert!(open(&data.slice(..data.len() - 1), data.len() as u64 - 1).is_err());
    }
}
