//! The ids of a file's events with their times of receipt, by two of its columns, row group by row group: for a database
//! that has to know them again.

use std::io::Cursor;
use std::ops::Range;
use std::sync::Arc;

use arrow::array::AsArray;
use arrow::datatypes::TimestampMicrosecondType;
use bytes::{Buf, Bytes};
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::{
    ArrowReaderMetadata, ArrowReaderOptions, ParquetRecordBatchReaderBuilder,
};
use parquet::errors::{ParquetError, Result as ParquetResult};
use parquet::file::metadata::ParquetMetaData;
use parquet::file::reader::{ChunkReader, Length};
use rakam_event::schema::{ID, RECEIVED_AT};

use crate::error::LakeError;
use crate::footer::parse_footer;
use crate::seal;

const WHAT: &str = "data file";
const BATCH_ROWS: usize = 8192;

/// Reads the two columns of one file.
pub struct IdReader {
    metadata: Arc<ParquetMetaData>,
    /// Their places among the file's leaves.
    leaves: [usize; 2],
}

impl IdReader {
    /// `footer` as the manifest keeps it.
    pub fn open(footer: Bytes) -> Result<Self, LakeError> {
        let metadata = parse_footer(footer)?;
        let columns = metadata.file_metadata().schema_descr().columns();
        let place = |name: &str| {
            let mut names = columns.iter().map(|column| column.path().string());
            names
                .position(|column| column == name)
                .ok_or_else(|| LakeError::corrupt(WHAT, format!("it has no column {name}")))
        };
        let leaves = [place(ID)?, place(RECEIVED_AT)?];
        Ok(Self { metadata, leaves })
    }

    pub fn row_groups(&self) -> usize {
        self.metadata.num_row_groups()
    }

    /// The bytes of the file that are needed for a row group.
    pub fn ranges(&self, row_group: usize) -> Vec<Range<u64>> {
        let group = self.metadata.row_group(row_group);
        let range = |leaf: usize| {
            let (start, length) = group.column(leaf).byte_range();
            start..start + length
        };
        self.leaves.map(range).to_vec()
    }

    /// Id and time of receipt of the row group's events that have an id. `parts`: the bytes of [`Self::ranges`].
    pub fn read(
        &self,
        row_group: usize,
        parts: Vec<Bytes>,
    ) -> Result<Vec<(String, i64)>, LakeError> {
        let starts = self.ranges(row_group).into_iter().map(|range| range.start);
        let parts = Parts(Arc::new(starts.zip(parts).collect()));
        seal::guarded(WHAT, || self.read_parts(row_group, parts))
    }

    fn read_parts(&self, row_group: usize, parts: Parts) -> Result<Vec<(String, i64)>, LakeError> {
        let failed = |e: ParquetError| LakeError::corrupt(WHAT, e);
        let metadata =
            ArrowReaderMetadata::try_new(Arc::clone(&self.metadata), ArrowReaderOptions::new())
                .map_err(failed)?;
        let descriptor = self.metadata.file_metadata().schema_descr();
        let batches = ParquetRecordBatchReaderBuilder::new_with_metadata(parts, metadata)
            .with_row_groups(vec![row_group])
            .with_projection(ProjectionMask::leaves(descriptor, self.leaves))
            .with_batch_size(BATCH_ROWS)
            .build()
            .map_err(failed)?;
        let mut found = Vec::new();
        for batch in batches {
            let batch = batch.map_err(|e| LakeError::corrupt(WHAT, e))?;
            let ids = batch
                .column_by_name(ID)
                .and_then(|c| c.as_string_opt::<i32>());
            let received = (batch.column_by_name(RECEIVED_AT))
                .and_then(|c| c.as_primitive_opt::<TimestampMicrosecondType>());
            let (Some(ids), Some(received)) = (ids, received) else {
                return Err(LakeError::corrupt(WHAT, "its ids are of another type"));
            };
            let rows = ids.iter().zip(received.iter());
            found.extend(rows.filter_map(|(id, at)| Some((id?.to_owned(), at?))));
        }
        Ok(found)
    }
}

/// Parts of a file, by where they begin.
#[derive(Clone)]
struct Parts(Arc<Vec<(u64, Bytes)>>);

impl Parts {
    fn from(&self, start: u64) -> ParquetResult<Bytes> {
        let part = self.0.iter().find_map(|(first, bytes)| {
            let offset = start.checked_sub(*first)?;
            (offset < bytes.len() as u64).then(|| bytes.slice(offset as usize..))
        });
        part.ok_or_else(|| ParquetError::EOF(format!("byte {start} was not read")))
    }
}

impl Length for Parts {
    fn len(&self) -> u64 {
        let ends = self
            .0
            .iter()
            .map(|(start, bytes)| start + bytes.len() as u64);
        ends.max().unwrap_or_default()
    }
}

impl ChunkReader for Parts {
    type T = bytes::buf::Reader<Cursor<Bytes>>;

    fn get_read(&self, start: u64) -> ParquetResult<Self::T> {
        Ok(Cursor::new(self.from(start)?).reader())
    }

    fn get_bytes(&self, start: u64, length: usize) -> ParquetResult<Bytes> {
        let bytes = self.from(start)?;
        if length > bytes.len() {
            return Err(ParquetError::EOF(format!(
                "byte {} was not read",
                start + length as u64
            )));
        }
        Ok(bytes.slice(..length))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::read::FileReader;
    use crate::testing::all_types;
    use crate::write::tests::written;

    #[test]
    fn ids_are_those_of_the_file() {
        let (file, data) = written(5_000, 3);
        let mut expected = Vec::new();
        for batch in FileReader::open(data.clone(), &all_types(), 1, 700).unwrap() {
            let batch = batch.unwrap();
            let ids = batch.column_by_name(ID).unwrap().as_string::<i32>().clone();
            let times = batch.column_by_name(RECEIVED_AT).unwrap();
            let times = times.as_primitive::<TimestampMicrosecondType>().clone();
            for (id, at) in ids.iter().zip(times.iter()) {
                expected.extend(id.zip(at).map(|(id, at)| (id.to_owned(), at)));
            }
        }
        assert!(expected.len() > 100);
        let reader = IdReader::open(file.footer).unwrap();
        assert_eq!(reader.row_groups(), 1);
        let ranges = reader.ranges(0);
        let part = |range: &Range<u64>| data.slice(range.start as usize..range.end as usize);
        let parts: Vec<Bytes> = ranges.iter().map(part).collect();
        assert_eq!(reader.read(0, parts.clone()).unwrap(), expected);
        let short = vec![parts[0].slice(..parts[0].len() / 2), parts[1].clone()];
        assert!(reader.read(0, short).is_err());
    }
}
