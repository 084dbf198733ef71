//! Reads a data file back as it was written, batch by batch in its order: to write its rows anew.

use std::collections::BTreeMap;

use arrow::array::RecordBatch;
use arrow::datatypes::SchemaRef;
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::{ParquetRecordBatchReader, ParquetRecordBatchReaderBuilder};
use parquet::file::reader::ChunkReader;
use parquet::schema::types::ColumnDescPtr;
use rakam_event::schema::{Schema, TIME};

use crate::chunk::{conform, field_id};
use crate::error::LakeError;
use crate::seal;
use crate::sort::count_days;
use crate::untrusted::Checked;

const WHAT: &str = "data file";

/// The rows of one file in the stored layout of the schema it was written under.
pub struct FileReader {
    batches: ParquetRecordBatchReader,
    schema: Schema,
    arrow: SchemaRef,
    batch_rows: usize,
}

impl FileReader {
    /// `schema` is the collection's, `version` the file's. Fields that the file does not have are left out: a value that
    /// waits in `_extra` stays there, which a column of NULLs would hide.
    pub fn open<R: ChunkReader + 'static>(
        file: R,
        schema: &Schema,
        version: i32,
        batch_rows: usize,
    ) -> Result<Self, LakeError> {
        Self::open_within(file, schema, version, (batch_rows, usize::MAX))
    }

    /// As [`FileReader::open`], with batches of fewer rows where rows are so wide that as many would take more than the
    /// bytes given beside them.
    pub fn open_within<R: ChunkReader + 'static>(
        file: R,
        schema: &Schema,
        version: i32,
        (batch_rows, batch_bytes): (usize, usize),
    ) -> Result<Self, LakeError> {
        let failed = |e| LakeError::corrupt(WHAT, e);
        seal::guarded(WHAT, || {
            let file = Checked::new(file).map_err(failed)?;
            let builder = ParquetRecordBatchReaderBuilder::try_new(file).map_err(failed)?;
            let row_bytes = (builder.metadata().row_groups().iter())
                .map(|group| group.total_byte_size().max(0) / group.num_rows().max(1))
                .max()
                .unwrap_or(0);
            let batch_rows = batch_rows
                .min(batch_bytes / (row_bytes.max(1) as usize))
                .max(1);
            let known = |id: i32| {
                let mut fields = builder.schema().fields().iter();
                fields.any(|field| field_id(field) == Some(id))
            };
            let user_fields = schema.fields.iter().filter(|f| f.is_user() && known(f.id));
            let schema = Schema::new(version, user_fields.cloned().collect());
            let batches = builder
                .with_batch_size(batch_rows)
                .build()
                .map_err(failed)?;
            let arrow = schema.arrow();
            Ok(Self {
                batches,
                schema,
                arrow,
                batch_rows,
            })
        })
    }

    /// The fields that the file has.
    pub fn schema(&self) -> &Schema {
        &self.schema
    }

    /// The most rows of a batch.
    pub fn batch_rows(&self) -> usize {
        self.batch_rows
    }

    fn read(&mut self) -> Result<Option<RecordBatch>, LakeError> {
        let batch = self.batches.next().transpose();
        match batch.map_err(|e| LakeError::corrupt(WHAT, e))? {
            // Ids and types are those of the stored layout: see the test of `write`.
            Some(batch) => conform(&batch, &self.arrow).map(Some),
            None => Ok(None),
        }
    }
}

impl Iterator for FileReader {
    type Item = Result<RecordBatch, LakeError>;

    fn next(&mut self) -> Option<Self::Item> {
        seal::guarded(WHAT, || self.read()).transpose()
    }
}

/// The number of events of a file by UTC day, from its column `_time` alone.
pub fn days<R: ChunkReader + 'static>(
    file: R,
    batch_rows: usize,
) -> Result<BTreeMap<i32, u64>, LakeError> {
    let failed = |e| LakeError::corrupt(WHAT, e);
    seal::guarded(WHAT, || {
        let file = Checked::new(file).map_err(failed)?;
        let builder = ParquetRecordBatchReaderBuilder::try_new(file).map_err(failed)?;
        let leaf = |column: &ColumnDescPtr| column.name() == TIME;
        let leaves = builder.parquet_schema().columns().iter();
        let leaves = leaves.enumerate().filter(|(_, column)| leaf(column));
        let mask = ProjectionMask::leaves(builder.parquet_schema(), leaves.map(|(at, _)| at));
        let batches = builder
            .with_projection(mask)
            .with_batch_size(batch_rows)
            .build()
            .map_err(failed)?;
        let mut days = BTreeMap::new();
        for batch in batches {
            let batch = batch.map_err(|e| LakeError::corrupt(WHAT, e))?;
            count_days(&batch, &mut days)?;
        }
        Ok(days)
    })
}

#[cfg(test)]
mod tests {
    use arrow::compute::concat_batches;

    use super::*;
    use crate::testing::all_types;
    use crate::write::tests::written;

    #[test]
    fn a_file_is_read_back_under_its_own_schema() {
        let (_, data) = written(5000, 9);
        let mut schema = all_types();
        let read = |schema: &Schema| {
            let reader = FileReader::open(data.clone(), schema, 1, 700).unwrap();
            let arrow = reader.schema().arrow();
            let batches: Vec<_> = reader.map(Result::unwrap).collect();
            concat_batches(&arrow, &batches).unwrap()
        };
        let before = read(&schema);
        assert_eq!(before.num_rows(), 5000);
        // A field added since is no column of the file, and none of what is read.
        let mut added = schema.fields.last().unwrap().clone();
        added.id += 1;
        added.name = "added".to_owned();
        schema.fields.push(added);
        schema.version += 1;
        assert_eq!(read(&schema), before);
    }

    #[test]
    fn garbage_is_an_error() {
        let (_, data) = written(300, 2);
        let schema = all_types();
        for end in [0, 3, 100, data.len() - 1] {
            assert!(FileReader::open(data.slice(..end), &schema, 1, 100).is_err());
        }
    }
}
