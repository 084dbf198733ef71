//! Rows in the order of `_time`, and the rows of one data file out of many batches.

use std::collections::BTreeMap;

use arrow::array::{Array, AsArray, BooleanArray, RecordBatch, UInt32Array};
use arrow::compute::{filter_record_batch, interleave_record_batch, take_record_batch};
use arrow::datatypes::TimestampMicrosecondType;
use rakam_event::schema::TIME;

use crate::error::LakeError;
use crate::period::{Plan, day_of};

const WHAT: &str = "sorted rows";

/// The `_time` of each row, in microseconds.
pub(crate) fn times(batch: &RecordBatch) -> Result<&[i64], LakeError> {
    batch
        .column_by_name(TIME)
        .and_then(|column| column.as_primitive_opt::<TimestampMicrosecondType>())
        .filter(|column| column.null_count() == 0)
        .map(|column| &column.values()[..])
        .ok_or_else(|| LakeError::encode(WHAT, "an event has no _time"))
}

/// The batch stably sorted by `_time`.
pub fn by_time(batch: &RecordBatch) -> Result<RecordBatch, LakeError> {
    let times = times(batch)?;
    if times.is_sorted() {
        return Ok(batch.clone());
    }
    let n = u32::try_from(times.len()).map_err(|e| LakeError::encode(WHAT, e))?;
    let mut rows: Vec<u32> = (0..n).collect();
    rows.sort_by_key(|&row| times[row as usize]);
    take_record_batch(batch, &UInt32Array::from(rows)).map_err(|e| LakeError::encode(WHAT, e))
}

/// The events of the batch that are not before a time.
pub fn since(batch: &RecordBatch, from_us: i64) -> Result<RecordBatch, LakeError> {
    let times = times(batch)?;
    if times.iter().all(|time| *time >= from_us) {
        return Ok(batch.clone());
    }
    let kept: BooleanArray = times.iter().map(|time| Some(*time >= from_us)).collect();
    filter_record_batch(batch, &kept).map_err(|e| LakeError::encode(WHAT, e))
}

/// Adds the batch's events to the counts by UTC day.
pub fn count_days(batch: &RecordBatch, counts: &mut BTreeMap<i32, u64>) -> Result<(), LakeError> {
    // Times come in runs of one day.
    for day in times(batch)?.chunk_by(|a, b| day_of(*a) == day_of(*b)) {
        if let Some(&time) = day.first() {
            *counts.entry(day_of(time)).or_default() += day.len() as u64;
        }
    }
    Ok(())
}

/// The rows of several batches of one schema in the order of `_time` (then of the batches), some at a time.
///
/// Beside the batches themselves it holds 16 bytes per row (24 while it sorts) and one batch of output.
pub struct SortedRows<'a> {
    batches: Vec<&'a RecordBatch>,
    /// Time, batch, row.
    keys: Vec<(i64, u32, u32)>,
    next: usize,
    batch_rows: usize,
}

impl<'a> SortedRows<'a> {
    /// All rows, in batches of at most `batch_rows`.
    pub fn all(batches: &'a [RecordBatch], batch_rows: usize) -> Result<Self, LakeError> {
        Self::filtered(batches, batch_rows, |_| true)
    }

    /// The rows that the plan assigns to this file.
    pub fn of_file(
        batches: &'a [RecordBatch],
        batch_rows: usize,
        plan: &Plan,
        file: usize,
    ) -> Result<Self, LakeError> {
        // Times come in runs of one day: look a day up once per run.
        let mut last = None;
        Self::filtered(batches, batch_rows, move |time| {
            let day = day_of(time);
            match last {
                Some((d, keep)) if d == day => keep,
                _ => {
                    let keep = plan.assign(day) == Some(file);
                    last = Some((day, keep));
                    keep
                }
            }
        })
    }

    fn filtered(
        batches: &'a [RecordBatch],
        batch_rows: usize,
        mut keep: impl FnMut(i64) -> bool,
    ) -> Result<Self, LakeError> {
        let mut keys = Vec::new();
        for (b, batch) in batches.iter().enumerate() {
            for (r, &time) in times(batch)?.iter().enumerate() {
                if keep(time) {
                    keys.push((time, b as u32, r as u32));
                }
            }
        }
        if u32::try_from(batches.len()).is_err()
            || batches.iter().any(|b| u32::try_from(b.num_rows()).is_err())
        {
            return Err(LakeError::encode(WHAT, "too many rows"));
        }
        // Most batches are in order themselves: this sort merges what is.
        keys.sort();
        Ok(Self {
            batches: batches.iter().collect(),
            keys,
            next: 0,
            batch_rows: batch_rows.max(1),
        })
    }

    /// Rows in all batches together.
    pub fn len(&self) -> usize {
        self.keys.len()
    }

    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }
}

impl Iterator for SortedRows<'_> {
    type Item = Result<RecordBatch, LakeError>;

    fn next(&mut self) -> Option<Self::Item> {
        let end = self.keys.len().min(self.next + self.batch_rows);
        let keys = self.keys.get(self.next..end).filter(|k| !k.is_empty())?;
        self.next = end;
        let rows: Vec<(usize, usize)> = keys
            .iter()
            .map(|&(_, batch, row)| (batch as usize, row as usize))
            .collect();
        Some(interleave_record_batch(&self.batches, &rows).map_err(|e| LakeError::encode(WHAT, e)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::period::{MICROS_PER_DAY, plan};
    use crate::testing::{Rng, all_types, batch};
    use arrow::compute::concat_batches;

    #[test]
    fn sorts_stably_and_completely() {
        let schema = all_types();
        let mut rng = Rng::new(3);
        let batches: Vec<_> = (0..5).map(|_| batch(&schema, 300, &mut rng)).collect();
        let whole = concat_batches(&schema.arrow(), &batches).unwrap();
        let sorted: Vec<_> = SortedRows::all(&batches, 128)
            .unwrap()
            .map(Result::unwrap)
            .collect();
        assert!(sorted.iter().all(|b| b.num_rows() <= 128));
        let sorted = concat_batches(&schema.arrow(), &sorted).unwrap();
        assert_eq!(sorted, by_time(&whole).unwrap());
        assert!(times(&sorted).unwrap().is_sorted());

        // Stable: equal times keep the order of their _xid, which the test batches count up.
        let xid = sorted.column_by_name("_xid").unwrap();
        let xid = xid.as_primitive::<arrow::datatypes::Int64Type>();
        for (t, x) in times(&sorted)
            .unwrap()
            .windows(2)
            .zip(xid.values().windows(2))
        {
            assert!(t[0] < t[1] || x[0] < x[1]);
        }
    }

    #[test]
    fn each_row_goes_to_one_file() {
        let schema = all_types();
        let mut rng = Rng::new(4);
        let batches: Vec<_> = (0..4).map(|_| batch(&schema, 500, &mut rng)).collect();
        let mut counts = BTreeMap::new();
        for batch in &batches {
            count_days(batch, &mut counts).unwrap();
        }
        assert_eq!(counts.values().sum::<u64>(), 2000);
        let plan = plan(&counts, 40);
        assert!(plan.files().len() > 1);
        let mut total = 0;
        for (i, file) in plan.files().iter().enumerate() {
            let rows = SortedRows::of_file(&batches, 100, &plan, i).unwrap();
            assert!(!rows.is_empty());
            total += rows.len();
            for batch in rows {
                for time in times(&batch.unwrap()).unwrap() {
                    assert!(*time >= i64::from(file.first_day) * MICROS_PER_DAY);
                    assert!(*time < (i64::from(file.last_day) + 1) * MICROS_PER_DAY);
                }
            }
        }
        assert_eq!(total, 2000);
    }
}
