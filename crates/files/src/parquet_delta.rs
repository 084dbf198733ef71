//! Pages whose texts have their lengths apart (DELTA_LENGTH_BYTE_ARRAY, DELTA_BYTE_ARRAY).
//!
//! How many lengths there are is said behind the head of the page, among what is compressed, and the library makes room for
//! them before it has read one. So such a page is decompressed here first, to see that it says no more than its head, which
//! the page was counted by. Encodings and levels are those of parquet.thrift and Encodings.md of the format, 2.12.

use std::borrow::Cow;

use parquet::basic::Compression;
use parquet::errors::{ParquetError, Result};
use rakam_lake::untrusted::{Levels, PageHead};
use rakam_lake::varint::get_number;

use crate::parquet_pages::malformed;

/// How levels are encoded in pages of the first version.
const RLE: i64 = 3;
const BIT_PACKED: i64 = 4;

/// What it takes to find the values in a page of a column.
#[derive(Debug, Clone, Copy)]
pub struct Column {
    pub codec: Compression,
    pub max_repetition: i16,
    pub max_definition: i16,
}

/// Errors if a page has room made for more lengths than its head has values. `page` is what is behind the head.
pub fn check(page: &[u8], head: &PageHead, column: Column) -> Result<()> {
    let size = usize::try_from(head.bytes).map_err(|_| cut())?;
    let values = match head.levels() {
        Levels::Within {
            repetition,
            definition,
        } => {
            let page = decompress(column.codec, page, size)?;
            let mut at = 0;
            for (encoding, max) in [
                (repetition, column.max_repetition),
                (definition, column.max_definition),
            ] {
                at += levels(page.get(at..).ok_or_else(cut)?, encoding, max, head.values)?;
            }
            past(page, at)?
        }
        Levels::Before {
            bytes,
            is_compressed,
        } => {
            let levels = usize::try_from(bytes).map_err(|_| cut())?;
            let values = page.get(levels..).ok_or_else(cut)?;
            match is_compressed {
                true => decompress(column.codec, values, size.saturating_sub(levels))?,
                false => Cow::Borrowed(values),
            }
        }
    };
    // A page of NULLs only.
    if values.is_empty() {
        return Ok(());
    }
    let prefixes = packed(&values, head.values)?;
    if head.is_written_out() {
        packed(values.get(prefixes..).ok_or_else(cut)?, head.values)?;
    }
    Ok(())
}

fn cut() -> ParquetError {
    malformed("a page ends before its values")
}

fn past(page: Cow<'_, [u8]>, at: usize) -> Result<Cow<'_, [u8]>> {
    match page {
        Cow::Borrowed(page) => page.get(at..).map(Cow::Borrowed).ok_or_else(cut),
        Cow::Owned(mut page) if at <= page.len() => Ok(Cow::Owned(page.split_off(at))),
        Cow::Owned(_) => Err(cut()),
    }
}

/// No more than `size` bytes, which the head has said.
fn decompress(codec: Compression, bytes: &[u8], size: usize) -> Result<Cow<'_, [u8]>> {
    let failed =
        |e: &dyn std::error::Error| malformed(&format!("a page cannot be decompressed: {e}"));
    if size == 0 || codec == Compression::UNCOMPRESSED {
        return Ok(Cow::Borrowed(bytes));
    }
    let mut page = vec![0; size];
    let n = match codec {
        Compression::SNAPPY => {
            (snap::raw::Decoder::new().decompress(bytes, &mut page)).map_err(|e| failed(&e))?
        }
        Compression::ZSTD(_) => {
            (zstd::bulk::decompress_to_buffer(bytes, &mut page)).map_err(|e| failed(&e))?
        }
        Compression::LZ4_RAW => {
            (lz4_flex::block::decompress_into(bytes, &mut page)).map_err(|e| failed(&e))?
        }
        other => {
            return Err(ParquetError::NYI(format!(
                "texts of a delta encoding in compression {other}"
            )));
        }
    };
    page.truncate(n);
    Ok(Cow::Owned(page))
}

/// How many bytes the levels take that a page begins with.
fn levels(page: &[u8], encoding: i64, max: i16, values: u64) -> Result<usize> {
    if max <= 0 {
        return Ok(0);
    }
    let bytes = match encoding {
        RLE => {
            let (length, _) = page.split_first_chunk().ok_or_else(cut)?;
            4 + u64::from(u32::from_le_bytes(*length))
        }
        BIT_PACKED => {
            let bits = u64::from(i16::BITS - max.leading_zeros());
            values.saturating_mul(bits).div_ceil(8)
        }
        _ => return Err(malformed("the levels of a page have another encoding")),
    };
    usize::try_from(bytes).map_err(|_| cut())
}

/// Walks numbers that are packed as their differences (DELTA_BINARY_PACKED), of which there may be so many. Answers how many
/// bytes they take.
fn packed(bytes: &[u8], most: u64) -> Result<usize> {
    let number = |rest: &mut &[u8]| get_number(rest).ok_or_else(cut);
    let mut rest = bytes;
    let block = number(&mut rest)?;
    let parts = number(&mut rest)?;
    let count = number(&mut rest)?;
    // The first one.
    number(&mut rest)?;
    if count > most {
        return Err(malformed("a page has more lengths than values"));
    }
    if parts == 0 || block == 0 || block % parts != 0 || (block / parts) % 32 != 0 {
        return Err(malformed("the lengths of a page have impossible blocks"));
    }
    let per_part = block / parts;
    let parts = usize::try_from(parts).map_err(|_| cut())?;
    let mut left = count.saturating_sub(1);
    while left > 0 {
        // Their least difference.
        number(&mut rest)?;
        let widths = rest.split_off(..parts).ok_or_else(cut)?;
        for width in widths {
            // Parts that are not needed are not there.
            if left == 0 {
                break;
            }
            left = left.saturating_sub(per_part);
            let length = u64::from(*width).saturating_mul(per_part) / 8;
            let length = usize::try_from(length).map_err(|_| cut())?;
            // Some writers end with the last number.
            rest = match left {
                0 => rest.get(length..).unwrap_or_default(),
                _ => rest.get(length..).ok_or_else(cut)?,
            };
        }
    }
    Ok(bytes.len() - rest.len())
}

#[cfg(test)]
mod tests;
