//! The end of a data file as the manifest keeps it: a query opens the file without a read for its metadata.
//!
//! Layout: magic `RKF1`, checksum, size of the file (u64 LE), then the file's last bytes from the page index on. A page
//! index above [`MAX_PAGE_INDEX`] stays in the file, where the reader fetches it if it wants it.

use std::sync::Arc;

use bytes::Bytes;
use parquet::file::metadata::{PageIndexPolicy, ParquetMetaData, ParquetMetaDataReader};

use crate::error::LakeError;
use crate::seal;
use crate::untrusted::{check_metadata, check_page_indexes};

const MAGIC: [u8; 4] = *b"RKF1";
const WHAT: &str = "file footer";
/// Every query on the file detoasts its footer; beyond this the page index costs more than the read it saves.
pub const MAX_PAGE_INDEX: usize = 256 << 10;
/// Length of the metadata, magic: what a Parquet file ends with.
const TAIL: usize = 8;

/// The manifest's form of the footer. `tail` is the file's end, from its page index (or its metadata) on.
pub fn seal_footer(tail: &Bytes, file_size: u64) -> Result<Bytes, LakeError> {
    let metadata = metadata_length(tail)?;
    let start = if tail.len() - metadata > MAX_PAGE_INDEX {
        tail.len() - metadata
    } else {
        0
    };
    let mut buffer = seal::start(8 + tail.len() - start);
    buffer.extend_from_slice(&file_size.to_le_bytes());
    buffer.extend_from_slice(&tail[start..]);
    Ok(seal::seal(buffer, MAGIC).into())
}

/// The last bytes of the file, as they were when it was written.
pub fn kept_end(footer: Bytes) -> Result<Bytes, LakeError> {
    let payload = seal::open(footer, MAGIC, WHAT)?;
    if payload.len() < 8 + TAIL {
        return Err(LakeError::corrupt(WHAT, "too short"));
    }
    Ok(payload.slice(8..))
}

/// The metadata of a data file, with its page index unless that was too large to keep.
pub fn parse_footer(footer: Bytes) -> Result<Arc<ParquetMetaData>, LakeError> {
    let payload = seal::open(footer, MAGIC, WHAT)?;
    let size = payload
        .first_chunk::<8>()
        .map(|bytes| u64::from_le_bytes(*bytes))
        .ok_or_else(|| LakeError::corrupt(WHAT, "too short"))?;
    let tail = payload.slice(8..);
    let with_index = metadata_length(&tail)? < tail.len();
    seal::guarded(WHAT, || parse_tail(&tail, size, with_index))
}

fn parse_tail(
    tail: &Bytes,
    file_size: u64,
    with_index: bool,
) -> Result<Arc<ParquetMetaData>, LakeError> {
    let failed = |e| LakeError::corrupt(WHAT, e);
    let end = tail.len() - TAIL;
    let metadata = tail.slice(tail.len() - metadata_length(tail)?..end);
    check_metadata(&metadata).map_err(failed)?;
    let metadata = ParquetMetaDataReader::decode_metadata(&metadata).map_err(failed)?;
    if !with_index {
        return Ok(Arc::new(metadata));
    }
    check_page_indexes(&metadata, tail, file_size).map_err(failed)?;
    let mut reader = ParquetMetaDataReader::new_with_metadata(metadata)
        .with_page_index_policy(PageIndexPolicy::Optional);
    reader
        .read_page_indexes_sized(tail, file_size)
        .map_err(failed)?;
    reader.finish().map(Arc::new).map_err(failed)
}

/// The metadata of a file from its end, without its page index.
pub(crate) fn parse_metadata(
    tail: &Bytes,
    file_size: u64,
) -> Result<Arc<ParquetMetaData>, LakeError> {
    parse_tail(tail, file_size, false)
}

/// Bytes from the start of the metadata to the end of the file, by its last eight.
pub(crate) fn metadata_bytes(tail: &[u8]) -> Result<usize, LakeError> {
    let end = tail
        .last_chunk::<TAIL>()
        .filter(|end| end.ends_with(b"PAR1"))
        .ok_or_else(|| LakeError::corrupt(WHAT, "not the end of a Parquet file"))?;
    Ok(u32::from_le_bytes([end[0], end[1], end[2], end[3]]) as usize + TAIL)
}

/// As [`metadata_bytes`], all of which are there.
fn metadata_length(tail: &[u8]) -> Result<usize, LakeError> {
    let length = metadata_bytes(tail)?;
    if length > tail.len() {
        return Err(LakeError::corrupt(WHAT, "truncated metadata"));
    }
    Ok(length)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Rng;
    use crate::write::tests::written;

    #[test]
    fn the_footer_is_the_files_metadata() {
        let (file, data) = written(2000, 1);
        let metadata = parse_footer(file.footer.clone()).unwrap();
        let mut reader =
            ParquetMetaDataReader::new().with_page_index_policy(PageIndexPolicy::Required);
        reader.try_parse(&data).unwrap();
        assert_eq!(*metadata, reader.finish().unwrap());
        assert!(metadata.column_index().is_some() && metadata.offset_index().is_some());
        assert_eq!(
            &data[data.len() - file.footer_bytes..][..],
            &file.footer[20..]
        );
    }

    #[test]
    fn a_large_page_index_stays_in_the_file() {
        let (file, _) = written(100, 2);
        let tail = file.footer.slice(20..);
        let mut long = vec![0; MAX_PAGE_INDEX + 1];
        let index = tail.len() - metadata_length(&tail).unwrap();
        long.extend_from_slice(&tail[index..]);
        let metadata = parse_footer(seal_footer(&long.into(), 1 << 30).unwrap()).unwrap();
        assert!(metadata.column_index().is_none());
        assert_eq!(metadata.file_metadata().num_rows(), 100);
    }

    #[test]
    fn garbage_is_an_error() {
        let (file, _) = written(300, 3);
        let mut rng = Rng::new(7);
        let payload = &file.footer[seal::HEADER..];
        let metadata = metadata_length(payload).unwrap();
        for _ in 0..300 {
            // Behind the checksum, as crafted bytes would be; the metadata more often than the page index.
            let mut bad = payload.to_vec();
            for _ in 0..=rng.below(4) {
                let at = bad.len() - 1 - rng.below(metadata as u64) as usize;
                bad[at] ^= 1 << rng.below(8);
            }
            if rng.below(4) == 0 {
                bad.truncate(rng.below(bad.len() as u64) as usize);
            }
            let mut sealed = seal::start(bad.len());
            sealed.extend_from_slice(&bad);
            let _ = parse_footer(seal::seal(sealed, MAGIC).into());

            let mut flipped = file.footer.to_vec();
            let at = rng.below(flipped.len() as u64) as usize;
            flipped[at] ^= 1 << rng.below(8);
            assert!(parse_footer(flipped.into()).is_err());
        }
        for length in [0, 11, 12, 19, 20, 27] {
            assert!(parse_footer(file.footer.slice(..length)).is_err());
        }
    }
}
