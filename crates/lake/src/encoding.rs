//! Which Parquet encoding a column of a data file gets, judged by a sample of its rows.
//!
//! zstd follows in any case. A dictionary pays while values repeat; otherwise integers and times are stored as
//! differences, floats by byte position, text as lengths and bytes. All of them are read by DuckDB, pyarrow and Trino.
//! Where the bits before compression do not decide clearly, the beginning of the file is written both ways.

mod trial;

use std::collections::HashSet;
use std::hash::Hash;
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray};
use arrow::datatypes::{
    DataType, Date32Type, Decimal128Type, Float32Type, Float64Type, Int32Type, Int64Type,
    TimestampMicrosecondType,
};
use foldhash::fast::RandomState;
use parquet::basic::{Compression, Encoding};
use parquet::errors::ParquetError;

/// What to tell the writer of a column.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Choice {
    pub dictionary: bool,
    /// Without a dictionary, or once it has grown too large. `None`: the writer's default.
    pub plain: Option<Encoding>,
}

/// Values in a block of differences that share a width.
const MINIBLOCK: usize = 32;
/// A file that goes on behind the sample is taken to be this much longer.
const LONGER: usize = 4;

/// How many times fewer bits an encoding takes that compression would not make the larger one.
const CLEAR: f64 = 8.0;

/// A choice before compression.
struct Estimate {
    dictionary: bool,
    plain: Option<Encoding>,
    clear: bool,
    /// A dictionary's values per row of the file, against those per row of the sample.
    shared: f64,
}

impl Estimate {
    /// By the bits of a value with a dictionary and without.
    fn of_bits(dictionary: f64, without: f64, shared: f64, plain: Option<Encoding>) -> Self {
        Self {
            dictionary: dictionary < without,
            plain,
            clear: dictionary * CLEAR < without || without * CLEAR < dictionary,
            shared,
        }
    }

    fn certain(plain: Option<Encoding>) -> Self {
        Self {
            dictionary: true,
            plain,
            clear: true,
            shared: 1.0,
        }
    }
}

/// The choice for a column without its lists (see [`leaf`]). `complete`: the sample is the whole file.
pub fn choose(
    samples: &[ArrayRef],
    complete: bool,
    compression: Compression,
) -> Result<Choice, ParquetError> {
    let estimate = estimate(samples, complete);
    let dictionary = match estimate.plain {
        Some(plain) if !estimate.clear => {
            trial::dictionary_is_smaller(samples, plain, estimate.shared, compression)?
        }
        _ => estimate.dictionary,
    };
    Ok(Choice {
        dictionary,
        plain: estimate.plain,
    })
}

fn estimate(samples: &[ArrayRef], complete: bool) -> Estimate {
    let n = samples.iter().map(|s| s.len() - s.null_count()).sum();
    macro_rules! values {
        ($ty:ty) => {
            samples
                .iter()
                .flat_map(|s| s.as_primitive::<$ty>().iter().flatten())
        };
    }
    match samples.first().map(|s| s.data_type()) {
        Some(DataType::Int32) => integers(values!(Int32Type).map(i64::from), n, 4, complete),
        Some(DataType::Date32) => integers(values!(Date32Type).map(i64::from), n, 4, complete),
        Some(DataType::Int64) => integers(values!(Int64Type), n, 8, complete),
        Some(DataType::Timestamp(..)) => {
            integers(values!(TimestampMicrosecondType), n, 8, complete)
        }
        Some(DataType::Decimal128(precision, _)) => match precision {
            // Up to 18 digits Parquet stores an integer, beyond that bytes.
            ..=9 => integers(values!(Decimal128Type).map(|v| v as i64), n, 4, complete),
            10..=18 => integers(values!(Decimal128Type).map(|v| v as i64), n, 8, complete),
            _ => repeats(values!(Decimal128Type).map(|v| (v, 16)), n, complete, None),
        },
        Some(DataType::Float32) => floats(values!(Float32Type).map(f32::to_le_bytes), n, complete),
        Some(DataType::Float64) => floats(values!(Float64Type).map(f64::to_le_bytes), n, complete),
        Some(DataType::Utf8) => repeats(
            samples
                .iter()
                .flat_map(|s| s.as_string::<i32>().iter().flatten())
                .map(|v| (v, v.len() + 4)),
            n,
            complete,
            Some(Encoding::DELTA_LENGTH_BYTE_ARRAY),
        ),
        Some(DataType::FixedSizeBinary(_)) => repeats(
            samples
                .iter()
                .flat_map(|s| s.as_fixed_size_binary().iter().flatten())
                .map(|v| (v, v.len())),
            n,
            complete,
            None,
        ),
        _ => Estimate::certain(None),
    }
}

/// The values that Parquet stores of a column and the rest of their path: a list's elements, or the column itself.
pub fn leaf(column: &ArrayRef) -> (ArrayRef, &'static [&'static str]) {
    match column.as_list_opt::<i32>() {
        Some(list) => (Arc::clone(list.values()), &["list", "element"]),
        None => (Arc::clone(column), &[]),
    }
}

/// Counts different values, and how fast new ones come.
struct Distinct<T> {
    seen: HashSet<T, RandomState>,
    n: usize,
    total: usize,
    at_half: usize,
}

impl<T: Hash + Eq> Distinct<T> {
    fn new(total: usize) -> Self {
        Self {
            seen: HashSet::default(),
            n: 0,
            total,
            at_half: 0,
        }
    }

    /// True for a value not seen before.
    fn add(&mut self, value: T) -> bool {
        let new = self.seen.insert(value);
        self.n += 1;
        if self.n == self.total / 2 {
            self.at_half = self.seen.len();
        }
        new
    }

    /// Rows and different values of the expected file.
    fn expected(&self, complete: bool) -> (f64, f64) {
        let (n, seen) = (self.n as f64, self.seen.len() as f64);
        if complete {
            return (n, seen);
        }
        // New values come as fast as in the second half at first, and then more slowly, unless all are new.
        let fresh = (self.seen.len() - self.at_half) as f64 / (n / 2.0).max(1.0);
        let rows = n * LONGER as f64;
        (rows, seen + fresh * (0.6 + 0.4 * fresh) * (rows - n))
    }

    /// Bits of a dictionary of values of this size and of the indices into it, per value of the expected file.
    fn dictionary_bits(&self, value_bits: f64, complete: bool) -> f64 {
        let (rows, distinct) = self.expected(complete);
        distinct * value_bits / rows.max(1.0) + distinct.max(1.0).log2().ceil()
    }

    /// Values per row of the expected file against those per row of the sample.
    fn shared(&self, complete: bool) -> f64 {
        let (rows, distinct) = self.expected(complete);
        (distinct / rows.max(1.0)) / (self.seen.len() as f64 / self.n.max(1) as f64)
    }
}

/// Differences or a dictionary, whichever takes fewer bits.
fn integers(
    values: impl Iterator<Item = i64>,
    total: usize,
    width: usize,
    complete: bool,
) -> Estimate {
    let plain = Some(Encoding::DELTA_BINARY_PACKED);
    if total == 0 {
        return Estimate::certain(plain);
    }
    let mut distinct = Distinct::new(total);
    let mut last: Option<i64> = None;
    let (mut bits, mut changes) = (0usize, 0usize);
    let (mut low, mut high, mut in_block) = (i64::MAX, i64::MIN, 0);
    for value in values {
        distinct.add(value);
        let delta = value.wrapping_sub(last.unwrap_or(value));
        last = Some(value);
        changes += usize::from(delta != 0);
        (low, high, in_block) = (low.min(delta), high.max(delta), in_block + 1);
        if in_block == MINIBLOCK {
            bits += block_bits(low, high, in_block);
            (low, high, in_block) = (i64::MAX, i64::MIN, 0);
        }
    }
    if in_block > 0 {
        bits += block_bits(low, high, in_block);
    }
    let n = total as f64;
    // Runs of one index are run-length encoded: each costs its value and a length.
    let packed = distinct.dictionary_bits((width * 8) as f64, complete);
    let runs = (changes * (index_bits(distinct.seen.len()) + 16) + distinct.seen.len() * width * 8)
        as f64
        / n;
    Estimate::of_bits(
        packed.min(runs),
        bits as f64 / n,
        distinct.shared(complete),
        plain,
    )
}

/// Bits of an index into a dictionary of this many values.
fn index_bits(distinct: usize) -> usize {
    (usize::BITS - distinct.saturating_sub(1).leading_zeros()) as usize
}

fn block_bits(low: i64, high: i64, n: usize) -> usize {
    // The width of the block is that of its largest difference above the smallest, plus a byte that says so.
    let span = high.wrapping_sub(low) as u64;
    8 + n * (u64::BITS - span.leading_zeros()) as usize
}

/// A dictionary, or the values byte by byte, which zstd then brings down to about the entropy of each byte.
fn floats<const N: usize>(
    values: impl Iterator<Item = [u8; N]>,
    total: usize,
    complete: bool,
) -> Estimate {
    let plain = Some(Encoding::BYTE_STREAM_SPLIT);
    if total == 0 {
        return Estimate::certain(plain);
    }
    let mut distinct = Distinct::new(total);
    let mut counts = [[0u32; 256]; N];
    for value in values {
        distinct.add(value);
        for (counts, byte) in counts.iter_mut().zip(value) {
            counts[usize::from(byte)] += 1;
        }
    }
    let n = total as f64;
    let entropy: f64 = counts
        .iter()
        .flatten()
        .filter(|&&count| count > 0)
        .map(|&count| f64::from(count) / n)
        .map(|share| -share * share.log2())
        .sum();
    // A small dictionary is not worth giving up for a few bits: it is quicker to read and to filter.
    let bits = distinct.dictionary_bits((N * 8) as f64, complete);
    if bits <= 8.0 {
        return Estimate::certain(plain);
    }
    Estimate::of_bits(bits, entropy, distinct.shared(complete), plain)
}

/// A dictionary or the bytes.
fn repeats<T: Hash + Eq>(
    values: impl Iterator<Item = (T, usize)>,
    total: usize,
    complete: bool,
    plain: Option<Encoding>,
) -> Estimate {
    if total == 0 {
        return Estimate::certain(plain);
    }
    let mut distinct = Distinct::new(total);
    let (mut bytes, mut distinct_bytes) = (0usize, 0usize);
    for (value, size) in values {
        bytes += size;
        if distinct.add(value) {
            distinct_bytes += size;
        }
    }
    let value_bits = 8.0 * distinct_bytes as f64 / distinct.seen.len().max(1) as f64;
    let plain_bits = 8.0 * bytes as f64 / total as f64;
    Estimate::of_bits(
        distinct.dictionary_bits(value_bits, complete),
        plain_bits,
        distinct.shared(complete),
        plain.or(Some(Encoding::PLAIN)),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use arrow::array::{Float64Array, Int64Array, StringArray, TimestampMicrosecondArray};

    use crate::testing::Rng;

    fn pick(samples: &[ArrayRef], complete: bool) -> Choice {
        let level = parquet::basic::ZstdLevel::try_new(3).unwrap();
        choose(samples, complete, Compression::ZSTD(level)).unwrap()
    }

    fn dictionary(column: impl Array + 'static) -> bool {
        pick(&[Arc::new(column)], false).dictionary
    }

    #[test]
    fn values_decide() {
        let mut rng = Rng::new(5);
        // Sorted times, microseconds apart; and the same in the order of another column.
        let times: Vec<i64> = (0..10_000)
            .map(|i| i * 1_000_003 + rng.between(0, 999))
            .collect();
        assert!(!dictionary(
            TimestampMicrosecondArray::from(times).with_timezone("UTC")
        ));
        let batches: Vec<i64> = (0..10_000)
            .map(|_| rng.between(0, 20) * 1_000_000_007)
            .collect();
        assert!(dictionary(TimestampMicrosecondArray::from(batches)));
        assert!(!dictionary(Int64Array::from_iter_values(0..10_000)));
        assert!(dictionary(Int64Array::from(vec![None; 10])));

        let ids = (0..1000)
            .map(|_| format!("{:032x}", rng.next()))
            .collect::<Vec<_>>();
        assert!(!dictionary(StringArray::from(ids)));
        let urls = (0..1000)
            .map(|_| format!("/page/{}", rng.below(50)))
            .collect::<Vec<_>>();
        assert!(dictionary(StringArray::from(urls)));
        assert!(!dictionary(Float64Array::from_iter_values(
            (0..1000).map(|_| rng.next() as f64)
        )));
        assert!(dictionary(Float64Array::from_iter_values(
            (0..1000).map(|_| rng.below(9) as f64)
        )));
    }

    /// Ids that count up: compression finds the repeated bytes, and a dictionary only adds indices.
    #[test]
    fn compression_has_the_last_word() {
        let ids = |each: usize| -> Vec<String> {
            (0..32_000)
                .map(|i| format!("session-{:08}", i / each))
                .collect()
        };
        assert!(!dictionary(StringArray::from(ids(2))));
        assert!(dictionary(StringArray::from(ids(64))));
    }

    #[test]
    fn extremes_do_not_overflow() {
        let extremes = Int64Array::from(vec![i64::MIN, i64::MAX, i64::MIN, 0]);
        pick(&[Arc::new(extremes) as ArrayRef], true);
        assert_eq!(index_bits(0), 0);
        assert_eq!(index_bits(1), 0);
        assert_eq!(index_bits(2), 1);
        assert_eq!(index_bits(257), 9);
    }
}
