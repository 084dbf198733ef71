//! One column of a chunk as bytes. A chunk is written in the sender's own transaction and read a few times until it is a
//! data file, so what counts is how little the processor has to do for few bytes: numbers that need fewer bytes than their
//! type has get fewer, and only what a sample shows to shrink well is compressed.
//!
//! A column is its NULLs, then its values by type:
//!
//! - *NULLs*: a byte, 0 where there are none; else 1 and a block of Arrow's bitmap.
//! - *whole numbers* (integers, dates, times; floats and decimals that are whole, after a byte 1): the smallest (folded
//!   LEB128), a unit (LEB128), the bytes of a number, and a block of how many units each is above the smallest.
//! - *other numbers, uuids*: a block of them as they are. A byte 0 before floats and decimals says so.
//! - *booleans*: a block of Arrow's bitmap.
//! - *texts*: their lengths as whole numbers, then a block of the texts; *lists*: lengths, then the column of the elements.
//!
//! A *block* is its length times two, plus one if it is compressed (LEB128); then the bytes, or the length of the
//! compressed ones (LEB128) and these (an LZ4 block). What is wider than a byte is in the machine's own order, as in all
//! tables of the server. Nothing is trusted: what does not look like this is answered by None.

use std::sync::Arc;

use arrow::array::{
    Array, ArrayRef, ArrowPrimitiveType, AsArray, BooleanArray, FixedSizeBinaryArray, ListArray,
    PrimitiveArray, StringArray,
};
use arrow::buffer::{BooleanBuffer, Buffer, NullBuffer, OffsetBuffer, ScalarBuffer};
use arrow::datatypes::{
    DataType, Date32Type, Decimal128Type, Float32Type, Float64Type, Int32Type, Int64Type,
    TimestampMicrosecondType,
};
use bytes::{Buf, Bytes};
use lz4_flex::block;

use crate::varint::{get_number, get_signed, put_number, put_signed};

/// LZ4 expands a byte to at most 255; its ends add a little.
const MAX_EXPANSION: usize = 255;
const EXPANSION_SLACK: usize = 1024;
/// A shorter block is not compressed.
const COMPRESS_FROM: usize = 64;
/// One part of so many of a block, from its middle, is tried before all of it is compressed: so much at least and at most,
const SAMPLE_SHARE: usize = 16;
const SAMPLE_MIN_BYTES: usize = 512;
const SAMPLE_MAX_BYTES: usize = 8 << 10;
/// which is done if the sample shrinks to less than one part of so many: with less to gain, storing a byte costs less than
/// looking for a copy of it.
const WORTH: usize = 2;
/// What times are often whole multiples of, in microseconds: an hour, a minute, a second, a millisecond.
const TIME_UNITS: [i64; 4] = [3_600_000_000, 60_000_000, 1_000_000, 1_000];
const WHOLE: u8 = 1;
const AS_IT_IS: u8 = 0;

/// Appends a column. None: no field has such a type.
pub(super) fn put(out: &mut Vec<u8>, array: &dyn Array) -> Option<()> {
    let nulls = array.nulls().filter(|nulls| nulls.null_count() > 0);
    match nulls {
        None => out.push(0),
        Some(nulls) => {
            out.push(1);
            put_bits(out, nulls.inner());
        }
    }
    match array.data_type() {
        DataType::Boolean => put_bits(out, array.as_boolean_opt()?.values()),
        DataType::Int32 => put_numbers(out, &plain::<Int32Type>(array, nulls)?, &[]),
        DataType::Int64 => put_numbers(out, &plain::<Int64Type>(array, nulls)?, &[]),
        DataType::Date32 => put_numbers(out, &plain::<Date32Type>(array, nulls)?, &[]),
        DataType::Timestamp(..) => {
            let values = plain::<TimestampMicrosecondType>(array, nulls)?;
            put_numbers(out, &values, &TIME_UNITS);
        }
        DataType::Float32 => {
            let values = array.as_primitive_opt::<Float32Type>()?.values();
            put_block(out, values.inner());
        }
        DataType::Float64 => {
            let values = array.as_primitive_opt::<Float64Type>()?.values();
            put_or(out, whole_floats(values), values.inner());
        }
        DataType::Decimal128(..) => {
            let values = plain::<Decimal128Type>(array, nulls)?;
            let whole: Option<Vec<i64>> = values.iter().map(|v| i64::try_from(*v).ok()).collect();
            put_or(out, whole, values.inner());
        }
        DataType::FixedSizeBinary(16) => {
            let array = array.as_any().downcast_ref::<FixedSizeBinaryArray>()?;
            let start = array.value_offset(0).max(0) as usize;
            put_block(
                out,
                array
                    .values()
                    .get(start..start.checked_add(array.len() * 16)?)?,
            );
        }
        DataType::Utf8 => {
            let array = array.as_string_opt::<i32>()?;
            let (first, last) = put_lengths(out, array.offsets())?;
            put_block(out, array.values().get(first..last)?);
        }
        DataType::List(_) => {
            let array = array.as_list_opt::<i32>()?;
            let (first, last) = put_lengths(out, array.offsets())?;
            put(out, &array.values().slice(first, last - first))?;
        }
        _ => return None,
    }
    Some(())
}

/// The column of this type and so many rows at the beginning of `rest`, which then begins behind it.
pub(super) fn take(rest: &mut Bytes, data_type: &DataType, rows: usize) -> Option<ArrayRef> {
    let nulls = match rest.try_get_u8().ok()? {
        0 => None,
        1 => Some(NullBuffer::new(take_bits(rest, rows)?)),
        _ => return None,
    };
    Some(match data_type {
        DataType::Boolean => Arc::new(BooleanArray::new(take_bits(rest, rows)?, nulls)),
        DataType::Int32 => primitive::<Int32Type>(take_numbers(rest, rows, |v| v as i32)?, nulls)?,
        DataType::Int64 => primitive::<Int64Type>(take_numbers(rest, rows, |v| v)?, nulls)?,
        DataType::Date32 => {
            primitive::<Date32Type>(take_numbers(rest, rows, |v| v as i32)?, nulls)?
        }
        DataType::Timestamp(..) => {
            let values = ScalarBuffer::from(take_numbers(rest, rows, |v| v)?);
            let array = PrimitiveArray::<TimestampMicrosecondType>::try_new(values, nulls).ok()?;
            Arc::new(array.with_data_type(data_type.clone()))
        }
        DataType::Float32 => {
            primitive::<Float32Type>(take_fixed(rest, rows, f32::from_ne_bytes)?, nulls)?
        }
        DataType::Float64 => {
            let values = match rest.try_get_u8().ok()? {
                WHOLE => take_numbers(rest, rows, |v| v as f64)?,
                AS_IT_IS => take_fixed(rest, rows, f64::from_ne_bytes)?,
                _ => return None,
            };
            primitive::<Float64Type>(values, nulls)?
        }
        DataType::Decimal128(precision, scale) => {
            let values = match rest.try_get_u8().ok()? {
                WHOLE => take_numbers(rest, rows, i128::from)?,
                AS_IT_IS => take_fixed(rest, rows, i128::from_ne_bytes)?,
                _ => return None,
            };
            let array = PrimitiveArray::<Decimal128Type>::try_new(values.into(), nulls).ok()?;
            Arc::new(array.with_precision_and_scale(*precision, *scale).ok()?)
        }
        DataType::FixedSizeBinary(16) => {
            let values = take_block(rest, rows.checked_mul(16)?)?;
            Arc::new(FixedSizeBinaryArray::try_new(16, values.into(), nulls).ok()?)
        }
        DataType::Utf8 => {
            let offsets = take_lengths(rest, rows)?;
            let values = take_block(rest, end(&offsets))?;
            Arc::new(StringArray::try_new(offsets, values.into(), nulls).ok()?)
        }
        DataType::List(element) => {
            let offsets = take_lengths(rest, rows)?;
            let values = take(rest, element.data_type(), end(&offsets))?;
            let element = Arc::clone(element);
            Arc::new(ListArray::try_new(element, offsets, values, nulls).ok()?)
        }
        _ => return None,
    })
}

/// The most rows that a chunk of so many bytes can have: every column takes a byte for each before it is compressed, or,
/// of booleans, lies beside one that does.
pub(super) fn rows_max(bytes: usize) -> usize {
    bytes
        .saturating_mul(MAX_EXPANSION)
        .saturating_add(EXPANSION_SLACK)
        .min(i32::MAX as usize)
}

// -- whole numbers ------------------------------------------------------------------------------------------------

/// The values of an array. Where there is none stands one of the others, so that it takes no room of its own.
fn plain<T: ArrowPrimitiveType>(
    array: &dyn Array,
    nulls: Option<&NullBuffer>,
) -> Option<ScalarBuffer<T::Native>> {
    let values = array.as_primitive_opt::<T>()?.values();
    let Some(nulls) = nulls else {
        return Some(values.clone());
    };
    let other = nulls
        .valid_indices()
        .next()
        .map_or(T::Native::default(), |at| values[at]);
    let filled = values.iter().zip(nulls.iter());
    let filled: Vec<T::Native> = filled
        .map(|(value, is_valid)| if is_valid { *value } else { other })
        .collect();
    Some(filled.into())
}

/// All of them as integers, if that is what they are.
fn whole_floats(values: &[f64]) -> Option<Vec<i32>> {
    /// Added to a number below 2^31, it leaves a whole one in the lowest bits.
    const SHIFT: f64 = 6_755_399_441_055_744.0;
    /// So many are looked at before it is given up.
    const STEP: usize = 1 << 9;
    let mut whole = Vec::with_capacity(values.len());
    for step in values.chunks(STEP) {
        let mut differs = 0;
        whole.extend(step.iter().map(|value| {
            let integer = (value + SHIFT).to_bits() as i32;
            // By its bits: the sign of a zero counts.
            differs |= f64::from(integer).to_bits() ^ value.to_bits();
            integer
        }));
        if differs != 0 {
            return None;
        }
    }
    Some(whole)
}

fn put_or<T: Copy + Ord + Into<i64>>(out: &mut Vec<u8>, whole: Option<Vec<T>>, plain: &[u8]) {
    match whole {
        Some(whole) => {
            out.push(WHOLE);
            put_numbers(out, &whole, &[]);
        }
        None => {
            out.push(AS_IT_IS);
            put_block(out, plain);
        }
    }
}

/// Appends whole numbers, which are all multiples of one of these units more than the smallest, or of one.
fn put_numbers<T: Copy + Ord + Into<i64>>(out: &mut Vec<u8>, values: &[T], units: &[i64]) {
    let (mut low, mut high) = match values.first() {
        Some(first) => (*first, *first),
        None => {
            put_head(out, 0, 1, 1);
            put_block(out, &[]);
            return;
        }
    };
    for value in values {
        low = low.min(*value);
        high = high.max(*value);
    }
    let low: i64 = low.into();
    // Without a sign there is room for any two of them.
    let above = |value: T| value.into().wrapping_sub(low) as u64;
    let span = above(high);
    let mut unit = 1;
    if width(span) > 1 {
        let fits = |unit: &&i64| values.iter().all(|v| above(*v) % (**unit as u64) == 0);
        if let Some(found) = units.iter().find(fits)
            && width(span / *found as u64) < width(span)
        {
            unit = *found as u64;
        }
    }
    let width = width(span / unit);
    put_head(out, low, unit, width as u8);
    let units_above = |value: T| match unit {
        1 => above(value),
        unit => above(value) / unit,
    };
    match width {
        1 => {
            let bytes: Vec<u8> = values.iter().map(|v| units_above(*v) as u8).collect();
            put_block(out, &bytes);
        }
        2 => put_narrow(out, values, |v| units_above(v) as u16),
        4 => put_narrow(out, values, |v| units_above(v) as u32),
        _ => put_narrow(out, values, units_above),
    }
}

fn put_narrow<T: Copy, N: arrow::datatypes::ArrowNativeType>(
    out: &mut Vec<u8>,
    values: &[T],
    narrow: impl Fn(T) -> N,
) {
    let narrow: Vec<N> = values.iter().map(|value| narrow(*value)).collect();
    put_block(out, &Buffer::from_vec(narrow));
}

fn put_head(out: &mut Vec<u8>, low: i64, unit: u64, width: u8) {
    put_signed(out, low);
    put_number(out, unit);
    out.push(width);
}

/// How many bytes a number of this size takes.
fn width(largest: u64) -> usize {
    match largest {
        0..=0xff => 1,
        0x100..=0xffff => 2,
        0x1_0000..=0xffff_ffff => 4,
        _ => 8,
    }
}

fn take_numbers<T>(rest: &mut Bytes, rows: usize, of: impl Fn(i64) -> T) -> Option<Vec<T>> {
    let (low, unit, width) = with_slice(rest, |slice| {
        let low = get_signed(slice)?;
        let unit = get_number(slice)? as i64;
        Some((low, unit, *slice.split_off_first()?))
    })?;
    let value = |above: i64| of(low.wrapping_add(above.wrapping_mul(unit)));
    match width {
        1 => take_fixed(rest, rows, |b| value(i64::from(u8::from_ne_bytes(b)))),
        2 => take_fixed(rest, rows, |b| value(i64::from(u16::from_ne_bytes(b)))),
        4 => take_fixed(rest, rows, |b| value(i64::from(u32::from_ne_bytes(b)))),
        8 => take_fixed(rest, rows, |b| value(i64::from_ne_bytes(b))),
        _ => None,
    }
}

// -- lengths ------------------------------------------------------------------------------------------------------

/// Appends lengths; answers where the first begins and the last ends.
fn put_lengths(out: &mut Vec<u8>, offsets: &[i32]) -> Option<(usize, usize)> {
    let lengths: Vec<i32> = offsets
        .windows(2)
        .map(|pair| pair[1].wrapping_sub(pair[0]))
        .collect();
    put_numbers(out, &lengths, &[]);
    let at = |offset: &i32| usize::try_from(*offset).ok();
    Some((at(offsets.first()?)?, at(offsets.last()?)?))
}

fn take_lengths(rest: &mut Bytes, rows: usize) -> Option<OffsetBuffer<i32>> {
    // As many as are there: the number of rows may be a lie.
    let lengths = take_numbers(rest, rows, |v| v)?;
    let mut offsets = Vec::with_capacity(lengths.len().checked_add(1)?);
    offsets.push(0);
    let mut end = 0_i32;
    for length in lengths {
        end = end.checked_add(i32::try_from(length).ok().filter(|l| *l >= 0)?)?;
        offsets.push(end);
    }
    Some(OffsetBuffer::new(offsets.into()))
}

fn end(offsets: &[i32]) -> usize {
    offsets
        .last()
        .map_or(0, |end| usize::try_from(*end).unwrap_or(0))
}

// -- blocks -------------------------------------------------------------------------------------------------------

fn put_bits(out: &mut Vec<u8>, bits: &BooleanBuffer) {
    let bytes = bits.sliced();
    put_block(out, bytes.get(..bits.len().div_ceil(8)).unwrap_or(&bytes));
}

fn put_block(out: &mut Vec<u8>, bytes: &[u8]) {
    let length = (bytes.len() as u64) << 1;
    if shrinks(bytes) {
        let packed = block::compress(bytes);
        put_number(out, length | 1);
        put_number(out, packed.len() as u64);
        out.extend_from_slice(&packed);
    } else {
        put_number(out, length);
        out.extend_from_slice(bytes);
    }
}

/// Whether it is worth while to compress a block, by a piece of it.
fn shrinks(bytes: &[u8]) -> bool {
    if bytes.len() < COMPRESS_FROM {
        return false;
    }
    let length = (bytes.len() / SAMPLE_SHARE).clamp(SAMPLE_MIN_BYTES, SAMPLE_MAX_BYTES);
    let start = bytes.len().saturating_sub(length) / 2;
    let sample = bytes.get(start..).unwrap_or(bytes);
    let sample = sample.get(..length).unwrap_or(sample);
    block::compress(sample).len() < sample.len() / WORTH
}

/// A block of exactly so many bytes.
fn take_block(rest: &mut Bytes, expected: usize) -> Option<Bytes> {
    let head = with_slice(rest, get_number)?;
    if head >> 1 != expected as u64 {
        return None;
    }
    if head & 1 == 0 {
        return take_bytes(rest, expected);
    }
    let packed = usize::try_from(with_slice(rest, get_number)?).ok()?;
    let packed = take_bytes(rest, packed)?;
    if expected > packed.len().checked_mul(MAX_EXPANSION)? + EXPANSION_SLACK {
        return None;
    }
    let bytes = block::decompress(&packed, expected).ok()?;
    (bytes.len() == expected).then(|| bytes.into())
}

fn take_bits(rest: &mut Bytes, rows: usize) -> Option<BooleanBuffer> {
    let bytes = take_block(rest, rows.div_ceil(8))?;
    Some(BooleanBuffer::new(bytes.into(), 0, rows))
}

/// A block of so many values of a fixed size.
fn take_fixed<const N: usize, T>(
    rest: &mut Bytes,
    rows: usize,
    of: impl Fn([u8; N]) -> T,
) -> Option<Vec<T>> {
    let bytes = take_block(rest, rows.checked_mul(N)?)?;
    let (values, _) = bytes.as_chunks::<N>();
    Some(values.iter().map(|bytes| of(*bytes)).collect())
}

pub(super) fn take_bytes(rest: &mut Bytes, length: usize) -> Option<Bytes> {
    (length <= rest.len()).then(|| rest.split_to(length))
}

/// Reads from the beginning, which is then behind what was read.
pub(super) fn with_slice<T>(
    rest: &mut Bytes,
    read: impl FnOnce(&mut &[u8]) -> Option<T>,
) -> Option<T> {
    let mut slice = &rest[..];
    let value = read(&mut slice)?;
    let taken = rest.len() - slice.len();
    rest.advance(taken);
    Some(value)
}

fn primitive<T: ArrowPrimitiveType>(
    values: Vec<T::Native>,
    nulls: Option<NullBuffer>,
) -> Option<ArrayRef> {
    let array = PrimitiveArray::<T>::try_new(values.into(), nulls).ok()?;
    Some(Arc::new(array))
}
