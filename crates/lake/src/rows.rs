//! Which rows of a chunk or data file are deleted: row numbers from 0, kept as ascending runs.
//!
//! Chunks and files are never changed in place. What is deleted of one is a [`RowSet`] beside it until the next merge,
//! flush or rewrite leaves those rows out. Encoded: magic `RKD1`, checksum, then for each run two LEB128 numbers: the
//! rows between it and the run before, and its length less one.

use std::ops::Range;

use arrow::array::{BooleanArray, BooleanBufferBuilder, RecordBatch};
use arrow::compute::filter_record_batch;
use bytes::Bytes;

use crate::error::LakeError;
use crate::seal;
use crate::varint::{get_number, put_number};

const MAGIC: [u8; 4] = *b"RKD1";
const WHAT: &str = "set of deleted rows";

/// Row numbers as ascending runs with a gap between any two.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RowSet {
    runs: Vec<Range<u32>>,
    len: u64,
}

impl RowSet {
    /// How many rows are in it.
    pub fn len(&self) -> u64 {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub fn runs(&self) -> &[Range<u32>] {
        &self.runs
    }

    /// Bytes that the set takes in memory.
    pub fn memory(&self) -> usize {
        self.runs.capacity() * size_of::<Range<u32>>()
    }

    /// Adds a run that begins at or behind the end of the last one.
    fn push(&mut self, run: Range<u32>) {
        self.len += u64::from(run.end - run.start);
        match self.runs.last_mut() {
            Some(last) if last.end == run.start => last.end = run.end,
            _ => self.runs.push(run),
        }
    }

    /// The rows of both.
    pub fn union(&self, other: &Self) -> Self {
        let mut union = Self::default();
        let (mut left, mut right) = (self.runs.iter().peekable(), other.runs.iter().peekable());
        let mut open: Option<Range<u32>> = None;
        loop {
            let next = match (left.peek(), right.peek()) {
                (Some(a), Some(b)) if a.start <= b.start => left.next(),
                (Some(_), None) => left.next(),
                (_, Some(_)) => right.next(),
                (None, None) => None,
            };
            let Some(next) = next.cloned() else { break };
            open = Some(match open {
                Some(run) if next.start <= run.end => run.start..run.end.max(next.end),
                Some(run) => {
                    union.push(run);
                    next
                }
                None => next,
            });
        }
        if let Some(run) = open {
            union.push(run);
        }
        union
    }

    /// The runs within a range of rows, cut to it.
    pub fn within(&self, range: Range<u32>) -> impl Iterator<Item = Range<u32>> + '_ {
        let first = self.runs.partition_point(|run| run.end <= range.start);
        self.runs[first..]
            .iter()
            .take_while(move |run| run.start < range.end)
            .map(move |run| run.start.max(range.start)..run.end.min(range.end))
    }

    /// The batch without its rows that are in the set; its first row has the number `first`.
    pub fn remove_from(&self, batch: &RecordBatch, first: u32) -> Result<RecordBatch, LakeError> {
        let rows = batch.num_rows();
        let end = u32::try_from(rows)
            .ok()
            .and_then(|rows| first.checked_add(rows))
            .ok_or_else(|| LakeError::corrupt(WHAT, "row numbers beyond 32 bits"))?;
        let mut kept = BooleanBufferBuilder::new(rows);
        let mut next = first;
        for run in self.within(first..end) {
            kept.append_n((run.start - next) as usize, true);
            kept.append_n((run.end - run.start) as usize, false);
            next = run.end;
        }
        if next == first {
            return Ok(batch.clone());
        }
        kept.append_n((end - next) as usize, true);
        filter_record_batch(batch, &BooleanArray::new(kept.finish(), None))
            .map_err(|e| LakeError::corrupt(WHAT, e))
    }

    pub fn encode(&self) -> Vec<u8> {
        let mut buffer = seal::start(self.runs.len() * 3);
        let mut end = 0;
        for run in &self.runs {
            put_number(&mut buffer, u64::from(run.start - end));
            put_number(&mut buffer, u64::from(run.end - run.start - 1));
            end = run.end;
        }
        seal::seal(buffer, MAGIC)
    }

    /// The set of an object of `n` rows. A row beyond them is an error.
    pub fn decode(bytes: Bytes, n: u64) -> Result<Self, LakeError> {
        let payload = seal::open(bytes, MAGIC, WHAT)?;
        let corrupt = || LakeError::corrupt(WHAT, "malformed run");
        let (mut set, mut rest, mut end) = (Self::default(), &payload[..], 0_u32);
        while !rest.is_empty() {
            let mut next = || get_number(&mut rest).and_then(|n| u32::try_from(n).ok());
            let start = next().and_then(|gap| end.checked_add(gap));
            let start = start.ok_or_else(corrupt)?;
            let length = next().and_then(|n| n.checked_add(1));
            end = length
                .and_then(|length| start.checked_add(length))
                .filter(|&end| u64::from(end) <= n)
                .ok_or_else(corrupt)?;
            set.push(start..end);
        }
        Ok(set)
    }
}

/// Collects the row numbers of one object in any order: a bit per row.
#[derive(Debug)]
pub struct RowBits {
    words: Vec<u64>,
    n: u32,
}

impl RowBits {
    /// For an object of `n` rows.
    pub fn new(n: u32) -> Self {
        Self {
            words: vec![0; (n as usize).div_ceil(64)],
            n,
        }
    }

    /// False: the object has no such row.
    pub fn insert(&mut self, row: u32) -> bool {
        let inside = row < self.n;
        if inside {
            self.words[row as usize / 64] |= 1 << (row % 64);
        }
        inside
    }

    pub fn finish(&self) -> RowSet {
        let mut set = RowSet::default();
        for (index, &word) in self.words.iter().enumerate() {
            let (mut word, mut at) = (word, 0);
            while word != 0 {
                let zeros = word.trailing_zeros();
                word >>= zeros;
                let ones = word.trailing_ones();
                word = word.checked_shr(ones).unwrap_or(0);
                at += zeros;
                let start = index as u32 * 64 + at;
                set.push(start..start + ones);
                at += ones;
            }
        }
        set.runs.shrink_to_fit();
        set
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow::array::{AsArray, Int32Array, RecordBatchOptions};
    use arrow::datatypes::{DataType, Field, Int32Type, Schema};

    use super::*;
    use crate::testing::Rng;

    fn set(rows: &[u32], n: u32) -> RowSet {
        let mut bits = RowBits::new(n);
        assert!(rows.iter().all(|&row| bits.insert(row)));
        bits.finish()
    }

    fn batch(rows: Range<i32>) -> RecordBatch {
        let schema = Schema::new(vec![Field::new("n", DataType::Int32, false)]);
        let column = Int32Array::from_iter_values(rows);
        RecordBatch::try_new(Arc::new(schema), vec![Arc::new(column)]).unwrap()
    }

    fn rows(batch: &RecordBatch) -> Vec<i32> {
        batch
            .column(0)
            .as_primitive::<Int32Type>()
            .values()
            .to_vec()
    }

    #[test]
    fn rows_become_runs() {
        let s = set(&[3, 0, 1, 63, 64, 65, 127, 128, 199], 200);
        assert_eq!(s.runs(), [0..2, 3..4, 63..66, 127..129, 199..200]);
        assert_eq!(s.len(), 9);
        let all: Vec<u32> = (0..200).collect();
        let whole = set(&all, 200);
        assert_eq!((whole.runs().len(), &whole.runs()[0]), (1, &(0..200)));
        assert!(!RowBits::new(200).insert(200));
        assert!(RowBits::new(0).finish().is_empty());
    }

    #[test]
    fn random_sets_survive_encoding_union_and_removal() {
        let mut rng = Rng::new(11);
        for _ in 0..200 {
            let n = 1 + rng.below(600) as u32;
            let share = 1 + rng.below(20);
            let mut pick = || -> Vec<u32> { (0..n).filter(|_| rng.below(share) == 0).collect() };
            let (a, b) = (pick(), pick());
            let (left, right) = (set(&a, n), set(&b, n));
            assert_eq!(
                RowSet::decode(left.encode().into(), u64::from(n)).unwrap(),
                left
            );
            let both: Vec<u32> = (0..n).filter(|r| a.contains(r) || b.contains(r)).collect();
            assert_eq!(left.union(&right), set(&both, n));
            let first = rng.below(u64::from(n)) as u32;
            let end = first + rng.below(u64::from(n - first) + 1) as u32;
            let kept = left
                .remove_from(&batch(first as i32..end as i32), first)
                .unwrap();
            let expected: Vec<i32> = (first..end)
                .filter(|r| !a.contains(r))
                .map(|r| r as i32)
                .collect();
            assert_eq!(rows(&kept), expected);
        }
    }

    #[test]
    fn a_batch_without_columns_keeps_its_count() {
        let options = RecordBatchOptions::new().with_row_count(Some(10));
        let none =
            RecordBatch::try_new_with_options(Arc::new(Schema::empty()), vec![], &options).unwrap();
        let kept = set(&[1, 9], 10).remove_from(&none, 0).unwrap();
        assert_eq!(kept.num_rows(), 8);
    }

    #[test]
    fn garbage_is_an_error() {
        let encoded = set(&[5, 6, 900], 1000).encode();
        assert!(RowSet::decode(encoded.clone().into(), 900).is_err());
        assert!(RowSet::decode(encoded[..encoded.len() - 1].to_vec().into(), 1000).is_err());
        let mut rng = Rng::new(5);
        for _ in 0..2000 {
            // Behind the checksum, as crafted bytes would be.
            let mut crafted = seal::start(8);
            crafted.extend((0..rng.below(12)).map(|_| rng.below(256) as u8));
            let _ = RowSet::decode(seal::seal(crafted, MAGIC).into(), 1 << 33);
        }
    }
}
