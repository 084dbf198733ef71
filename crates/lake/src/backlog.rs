//! Which chunks of a backlog a flush writes together, so that history in any order becomes few files in bounded memory.
//!
//! A backlog that is larger than one step is taken period by period, not in the order in which it came: else each step
//! would write a small file of every period. For that its chunks must cover one month each; [`split_by_month`] makes
//! such chunks of others. How fine the files are is decided once for the whole backlog.

use std::collections::BTreeMap;

use arrow::array::{RecordBatch, UInt32Array};
use arrow::compute::take_record_batch;

use crate::error::LakeError;
use crate::period::{MICROS_PER_DAY, Period, day_of};
use crate::sort::SortedRows;

/// A flush makes coarser periods of finer ones rather than write more small files than this.
pub const FEW_FILES: usize = 40;
/// A step writes at most so many files.
pub const MAX_FILES: usize = 64;
/// A chunk of several months is written as it is while that makes at most so many files: late events among present ones.
pub const SCATTERED_FILES: usize = 8;

/// A chunk of the backlog, without its rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkSpan {
    pub id: i64,
    pub n: u64,
    pub bytes: u64,
    /// First and last UTC day of its events, days since 1970.
    pub first_day: i32,
    pub last_day: i32,
}

impl ChunkSpan {
    /// The first day of the one month that its events are in; None if they are in several.
    pub fn month(&self) -> Option<i32> {
        let first = Period::Month.around(self.first_day).0;
        (first == Period::Month.around(self.last_day).0).then_some(first)
    }
}

/// What bounds a step, and what makes a file small.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// Bytes of chunks that a step takes (at least one chunk).
    pub step_bytes: u64,
    /// The size that data files should have.
    pub target_bytes: u64,
    pub min_file_events: u64,
}

/// Chunks to be written together, into files no finer than `finest`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    pub chunks: Vec<i64>,
    pub finest: Period,
}

/// The chunks of a month.
#[derive(Default)]
struct Month {
    n: u64,
    bytes: u64,
    chunks: Vec<ChunkSpan>,
}

impl Month {
    /// How many days may be worth a file: at most this.
    fn day_files(&self, min_file_events: u64) -> usize {
        (self.n / min_file_events.max(1)).min(31) as usize
    }
}

/// The steps that write these chunks, each of one month, oldest first.
pub fn steps(chunks: &[ChunkSpan], bounds: Bounds) -> Vec<Step> {
    let mut months = BTreeMap::<i32, Month>::new();
    for chunk in chunks {
        let month = months
            .entry(Period::Month.around(chunk.first_day).0)
            .or_default();
        month.n += chunk.n;
        month.bytes += chunk.bytes;
        month.chunks.push(*chunk);
    }
    // A chunk's bytes become about half as many in a file: a file of less than half the target is small.
    let small_days = |m: &Month| m.bytes / 31 < bounds.target_bytes;
    let small = |m: &Month| m.bytes < bounds.target_bytes;
    let worth = |m: &Month| m.n >= bounds.min_file_events;
    let day_files: usize = months
        .values()
        .filter(|m| small_days(m))
        .map(|m| m.day_files(bounds.min_file_events))
        .sum();
    let month_files = months.values().filter(|m| small(m) && worth(m)).count();

    // Months that share a year's file are one group.
    let mut groups = BTreeMap::<(i32, Period), Month>::new();
    for (first_day, month) in months {
        let finest = if !worth(&month) {
            Period::Year
        } else if day_files <= FEW_FILES || !small_days(&month) {
            Period::Day
        } else if month_files <= FEW_FILES || !small(&month) {
            Period::Month
        } else {
            Period::Year
        };
        let key = match finest {
            Period::Year => Period::Year.around(first_day).0,
            Period::Day | Period::Month => first_day,
        };
        let group = groups.entry((key, finest)).or_default();
        group.n += month.n;
        group.bytes += month.bytes;
        group.chunks.extend(month.chunks);
    }

    let mut steps = Vec::<Step>::new();
    let mut packed = Packed::default();
    for ((_, finest), mut group) in groups {
        let files = match finest {
            Period::Day => group.day_files(bounds.min_file_events) + 2,
            Period::Month | Period::Year => 1,
        };
        if packed.finest != Some(finest)
            || packed.bytes + group.bytes > bounds.step_bytes
            || packed.files + files > MAX_FILES
        {
            packed.end(&mut steps);
        }
        group
            .chunks
            .sort_by_key(|c| (c.first_day, c.last_day, c.id));
        for chunk in group.chunks {
            if packed.bytes > 0 && packed.bytes + chunk.bytes > bounds.step_bytes {
                packed.end(&mut steps);
            }
            packed.finest = Some(finest);
            packed.bytes += chunk.bytes;
            packed.chunks.push(chunk.id);
        }
        packed.files += files;
    }
    packed.end(&mut steps);
    steps
}

/// A step in the making.
#[derive(Default)]
struct Packed {
    finest: Option<Period>,
    bytes: u64,
    files: usize,
    chunks: Vec<i64>,
}

impl Packed {
    fn end(&mut self, steps: &mut Vec<Step>) {
        let done = std::mem::take(self);
        if let Some(finest) = done.finest {
            steps.push(Step {
                chunks: done.chunks,
                finest,
            });
        }
    }
}

/// The chunks of the largest months, which together have at least `bytes`: what is written first when a load of history
/// must not grow any further. Chunks of several months count to the month of their first event.
pub fn largest(chunks: &[ChunkSpan], bytes: u64) -> Vec<ChunkSpan> {
    let mut months = BTreeMap::<i32, Month>::new();
    for chunk in chunks {
        let month = months
            .entry(Period::Month.around(chunk.first_day).0)
            .or_default();
        month.bytes += chunk.bytes;
        month.chunks.push(*chunk);
    }
    let mut months: Vec<Month> = months.into_values().collect();
    months.sort_by_key(|m| std::cmp::Reverse(m.bytes));
    let mut taken = 0;
    let mut chosen = Vec::new();
    for month in months {
        if taken >= bytes {
            break;
        }
        taken += month.bytes;
        chosen.extend(month.chunks);
    }
    chosen.sort_by_key(|c| c.id);
    chosen
}

/// The rows of the batches, which share a schema, in the order of `_time`, in batches of at most `batch_rows` that are
/// of one month each. Gives them to `each` one after the other.
pub fn split_by_month<E: From<LakeError>>(
    batches: &[RecordBatch],
    batch_rows: usize,
    mut each: impl FnMut(RecordBatch) -> Result<(), E>,
) -> Result<(), E> {
    Months::new(batches, batch_rows)?.try_for_each(|part| each(part?))
}

/// As [`split_by_month`], one after the other.
pub struct Months<'a> {
    rows: SortedRows<'a>,
    /// What is left of a batch of several months.
    rest: Option<RecordBatch>,
}

impl<'a> Months<'a> {
    pub fn new(batches: &'a [RecordBatch], batch_rows: usize) -> Result<Self, LakeError> {
        Ok(Self {
            rows: SortedRows::all(batches, batch_rows)?,
            rest: None,
        })
    }

    /// Takes the first month off a batch.
    fn first_of(&mut self, batch: &RecordBatch) -> Result<RecordBatch, LakeError> {
        let times = crate::sort::times(batch)?;
        let length = times.first().map_or(0, |&first| {
            let end_us = month_end_us(first);
            times.partition_point(|&time| time < end_us)
        });
        let rest = batch.num_rows() - length;
        self.rest = (rest > 0).then(|| batch.slice(length, rest));
        Ok(batch.slice(0, length))
    }
}

impl Iterator for Months<'_> {
    type Item = Result<RecordBatch, LakeError>;

    fn next(&mut self) -> Option<Self::Item> {
        let batch = match self.rest.take() {
            Some(rest) => Ok(rest),
            None => self.rows.next()?,
        };
        Some(batch.and_then(|batch| self.first_of(&batch)))
    }
}

/// A batch is parted into at most so many: each part has columns of its own, however few its rows.
const PARTS: usize = 512;

/// The rows of a batch by the first day of their month, each month's in the order of `_time`. No memory is shared between
/// the parts, so that one may go before the other. Rows of more than [`PARTS`] months are put together under the first.
pub fn by_month(batch: &RecordBatch) -> Result<Vec<(i32, RecordBatch)>, LakeError> {
    let failed = |e| LakeError::encode("rows by month", e);
    let times = crate::sort::times(batch)?;
    let month = |time: i64| Period::Month.around(day_of(time)).0;
    if times.is_sorted()
        && let (Some(&first), Some(&last)) = (times.first(), times.last())
        && last < month_end_us(first)
    {
        return Ok(vec![(month(first), batch.clone())]);
    }
    let mut rows: Vec<(i64, u32)> = times.iter().copied().zip(0..).collect();
    rows.sort_unstable();
    let mut lengths = Vec::new();
    let mut rest = &rows[..];
    while let Some(&(first, _)) = rest.first() {
        let end_us = month_end_us(first);
        let length = rest.partition_point(|&(time, _)| time < end_us);
        lengths.push(length);
        rest = &rest[length..];
    }
    let together = lengths.len().div_ceil(PARTS).max(1);
    let mut months = Vec::with_capacity(lengths.len() / together + 1);
    let mut rest = &rows[..];
    for lengths in lengths.chunks(together) {
        let (part, after) = rest.split_at(lengths.iter().sum());
        rest = after;
        if let Some(&(first, _)) = part.first() {
            let rows = UInt32Array::from_iter_values(part.iter().map(|&(_, row)| row));
            months.push((
                month(first),
                take_record_batch(batch, &rows).map_err(failed)?,
            ));
        }
    }
    Ok(months)
}

/// The first microsecond after the month of a time.
fn month_end_us(time_us: i64) -> i64 {
    let last_day = Period::Month.around(day_of(time_us)).1;
    (i64::from(last_day) + 1).saturating_mul(MICROS_PER_DAY)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Rng, all_types, batch};
    use arrow::compute::concat_batches;

    const MB: u64 = 1 << 20;
    const BOUNDS: Bounds = Bounds {
        step_bytes: 128 * MB,
        target_bytes: 256 * MB,
        min_file_events: 10_000,
    };
    /// 2022-01-01.
    const JANUARY: i32 = 18_993;

    /// A chunk of the month that is so many months after January 2022.
    fn chunk(id: i64, month: i32, n: u64, bytes: u64) -> ChunkSpan {
        let mut first = JANUARY;
        for _ in 0..month {
            first = Period::Month.around(first).1 + 1;
        }
        ChunkSpan {
            id,
            n,
            bytes,
            first_day: first,
            last_day: Period::Month.around(first).1,
        }
    }

    /// Finest period and number of chunks of each step.
    fn shape(chunks: &[ChunkSpan]) -> Vec<(Period, usize)> {
        let steps = steps(chunks, BOUNDS);
        let mut ids: Vec<i64> = steps.iter().flat_map(|s| s.chunks.clone()).collect();
        ids.sort_unstable();
        let mut expected: Vec<i64> = chunks.iter().map(|c| c.id).collect();
        expected.sort_unstable();
        assert_eq!(ids, expected, "each chunk is in one step");
        steps.iter().map(|s| (s.finest, s.chunks.len())).collect()
    }

    #[test]
    fn history_in_any_order_is_taken_by_month() {
        // Ten rounds over 36 months, as a shuffled load leaves them: 300,000 events and 20 MB a month.
        let chunks: Vec<ChunkSpan> = (0..360)
            .map(|i| chunk(i64::from(i), i % 36, 30_000, 2 * MB))
            .collect();
        assert_eq!(shape(&chunks), [(Period::Month, 60); 6]);
        // Few enough days are files of their own,
        assert_eq!(
            shape(&[chunk(1, 0, 300_000, 90 * MB), chunk(2, 1, 100_000, 60 * MB)]),
            [(Period::Day, 1); 2]
        );
        // and so are large ones, however many.
        let large: Vec<ChunkSpan> = (0..720)
            .map(|i| chunk(i64::from(i), i % 3, 1_000_000, 100 * MB))
            .collect();
        assert_eq!(shape(&large), [(Period::Day, 1); 720]);
    }

    #[test]
    fn small_months_share_a_year() {
        let chunks: Vec<ChunkSpan> = (0..36).map(|i| chunk(i64::from(i), i, 900, MB)).collect();
        assert_eq!(shape(&chunks), [(Period::Year, 36)]);
        // More months than files there should be.
        let chunks: Vec<ChunkSpan> = (0..60)
            .map(|i| chunk(i64::from(i), i, 100_000, 10 * MB))
            .collect();
        assert_eq!(shape(&chunks), [(Period::Year, 12); 5]);
        // A year beyond the step is written in parts.
        let chunks: Vec<ChunkSpan> = (0..60)
            .map(|i| chunk(i64::from(i), i, 100_000, 40 * MB))
            .collect();
        assert_eq!(shape(&chunks)[..2], [(Period::Year, 3); 2]);
    }

    #[test]
    fn a_step_writes_few_files() {
        let chunks: Vec<ChunkSpan> = (0..2400).map(|i| chunk(i64::from(i), i, 10, 10)).collect();
        assert_eq!(
            shape(&chunks)
                .iter()
                .map(|&(_, n)| n)
                .collect::<Vec<usize>>(),
            [64 * 12, 64 * 12, 64 * 12, 8 * 12]
        );
        assert!(steps(&[], BOUNDS).is_empty());
    }

    #[test]
    fn the_largest_months_go_first() {
        let chunks = [
            chunk(1, 0, 1, 5),
            chunk(2, 1, 1, 50),
            chunk(3, 2, 1, 30),
            chunk(4, 1, 1, 1),
        ];
        let ids = |bytes| -> Vec<i64> { largest(&chunks, bytes).iter().map(|c| c.id).collect() };
        assert_eq!(ids(1), [2, 4]);
        assert_eq!(ids(52), [2, 3, 4]);
        assert_eq!(ids(1000), [1, 2, 3, 4]);
        assert_eq!(ids(0), [0; 0]);
    }

    #[test]
    fn batches_are_split_by_month() {
        let schema = all_types();
        let mut rng = Rng::new(5);
        let batches: Vec<RecordBatch> = (0..4).map(|_| batch(&schema, 500, &mut rng)).collect();
        let mut parts = Vec::new();
        split_by_month::<LakeError>(&batches, 300, |part| {
            parts.push(part);
            Ok(())
        })
        .unwrap();
        for part in &parts {
            let times = crate::sort::times(part).unwrap();
            let month = |t: &i64| Period::Month.around(crate::period::day_of(*t)).0;
            assert!(part.num_rows() <= 300 && !times.is_empty());
            assert!(times.iter().all(|t| month(t) == month(&times[0])));
        }
        assert!(parts.len() > 7, "the test data covers several months");
        let whole = concat_batches(&schema.arrow(), &batches).unwrap();
        let split = concat_batches(&schema.arrow(), &parts).unwrap();
        assert_eq!(split, crate::sort::by_time(&whole).unwrap());

        let months = by_month(&whole).unwrap();
        let first_days: Vec<i32> = months.iter().map(|(first_day, _)| *first_day).collect();
        assert!(first_days.len() > 1 && first_days.is_sorted_by(|a, b| a < b));
        for (first_day, rows) in &months {
            let times = crate::sort::times(rows).unwrap();
            assert!(
                times
                    .iter()
                    .all(|t| Period::Month.around(day_of(*t)).0 == *first_day)
            );
            assert_eq!(by_month(rows).unwrap(), [(*first_day, rows.clone())]);
        }
        let months: Vec<RecordBatch> = months.into_iter().map(|(_, rows)| rows).collect();
        assert_eq!(concat_batches(&schema.arrow(), &months).unwrap(), split);
        assert!(by_month(&whole.slice(0, 0)).unwrap().is_empty());

        // Months beyond counting share parts, in order all the same.
        let times: Vec<i64> = (0..2000)
            .map(|n| n * 7919 % 2000 * 32 * MICROS_PER_DAY)
            .collect();
        let times = arrow::array::TimestampMicrosecondArray::from(times);
        let column = schema.arrow().index_of("_time").unwrap();
        let many = batch(&schema, 2000, &mut rng);
        let mut columns = many.columns().to_vec();
        columns[column] =
            std::sync::Arc::new(times.with_data_type(columns[column].data_type().clone()));
        let many = RecordBatch::try_new(many.schema(), columns).unwrap();
        let (_, parts): (Vec<i32>, Vec<_>) = by_month(&many).unwrap().into_iter().unzip();
        assert_eq!(parts.len(), 500);
        let together = concat_batches(&schema.arrow(), &parts).unwrap();
        assert_eq!(together, crate::sort::by_time(&many).unwrap());
    }
}
