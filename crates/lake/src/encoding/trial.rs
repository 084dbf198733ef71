//! The beginning of a column written with a dictionary and without, to see which is smaller once compressed.

use std::sync::Arc;

use arrow::array::{ArrayRef, RecordBatch};
use arrow::datatypes::{Field, Schema};
use parquet::arrow::ArrowWriter;
use parquet::basic::{Compression, Encoding};
use parquet::errors::ParquetError;
use parquet::file::properties::{EnabledStatistics, WriterProperties};

/// Values that are written both ways.
const VALUES: usize = 32_768;

/// Compressed bytes of a column.
struct Written {
    dictionary: i64,
    data: i64,
}

/// Whether a dictionary gives the smaller column. `shared`: how much of the trial's dictionary, per row, a longer file
/// needs.
pub fn dictionary_is_smaller(
    samples: &[ArrayRef],
    plain: Encoding,
    shared: f64,
    compression: Compression,
) -> Result<bool, ParquetError> {
    let with = write(samples, None, compression)?;
    let without = write(samples, Some(plain), compression)?;
    Ok(with.data as f64 + with.dictionary as f64 * shared < without.data as f64)
}

fn write(
    samples: &[ArrayRef],
    plain: Option<Encoding>,
    compression: Compression,
) -> Result<Written, ParquetError> {
    let Some(first) = samples.first() else {
        return Ok(Written {
            dictionary: 0,
            data: 0,
        });
    };
    let schema = Arc::new(Schema::new(vec![Field::new(
        "v",
        first.data_type().clone(),
        true,
    )]));
    let mut properties = WriterProperties::builder()
        .set_compression(compression)
        .set_statistics_enabled(EnabledStatistics::None)
        .set_dictionary_enabled(plain.is_none())
        .set_data_page_row_count_limit(VALUES);
    if let Some(encoding) = plain {
        properties = properties.set_encoding(encoding);
    }
    let mut writer =
        ArrowWriter::try_new(Vec::new(), Arc::clone(&schema), Some(properties.build()))?;
    let mut left = VALUES;
    for sample in samples {
        let part = sample.slice(0, sample.len().min(left));
        left -= part.len();
        writer.write(&RecordBatch::try_new(Arc::clone(&schema), vec![part])?)?;
        if left == 0 {
            break;
        }
    }
    let metadata = writer.close()?;
    let mut written = Written {
        dictionary: 0,
        data: 0,
    };
    for group in metadata.row_groups() {
        let column = group.column(0);
        let dictionary = column
            .dictionary_page_offset()
            .map_or(0, |at| column.data_page_offset() - at);
        written.dictionary += dictionary;
        written.data += column.compressed_size() - dictionary;
    }
    Ok(written)
}
