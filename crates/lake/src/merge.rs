//! Data files, each in the order of `_time`, as new files in that order: a merge of streams.
//!
//! Of each input it holds one batch and the decompressed pages that the batch comes from (of each column at most one
//! page of 1 MiB and a dictionary of 4 MiB, and together no more than the file decompressed); of each file being written
//! one row group in encoded form (at most 128 MiB, less in files below). At most three files are being written at a time: of
//! the present day, of its month and of its year.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::io::Write;
use std::sync::Arc;

use arrow::array::RecordBatch;
use arrow::compute::interleave_record_batch;
use parquet::file::reader::ChunkReader;
use rakam_event::schema::Schema;

use crate::chunk::upgrade;
use crate::error::LakeError;
use crate::period::{PeriodFile, Plan, day_of};
use crate::read::FileReader;
use crate::rows::RowSet;
use crate::sort::times;
use crate::write::{FileOptions, FileWriter, WrittenFile};

const WHAT: &str = "data file";
/// Rows of a batch, and the memory that the batches of all inputs may take together.
const BATCH_ROWS: usize = 8192;
const BATCHES_BYTES: usize = 64 << 20;

/// A file to be merged.
pub struct Input<R> {
    pub file: R,
    pub schema_version: i32,
    /// Rows, deleted ones included.
    pub n: u64,
    pub deleted: Option<Arc<RowSet>>,
}

/// The rows of all inputs in the layout of one schema and the order of `_time` (then of the inputs), without deleted ones
/// and those before a time.
pub struct MergedRows {
    cursors: Vec<Cursor>,
    /// Time and input of the next row of each input.
    heads: BinaryHeap<Reverse<(i64, usize)>>,
    batch_rows: usize,
}

impl MergedRows {
    /// `schema` is the collection's present one; values of newer fields are taken out of `_extra`.
    pub fn open<R: ChunkReader + 'static>(
        inputs: Vec<Input<R>>,
        schema: &Schema,
        from_us: Option<i64>,
    ) -> Result<Self, LakeError> {
        let bytes = BATCHES_BYTES / inputs.len().max(1);
        let mut merged = Self {
            cursors: Vec::with_capacity(inputs.len()),
            heads: BinaryHeap::new(),
            batch_rows: BATCH_ROWS,
        };
        for (index, input) in inputs.into_iter().enumerate() {
            let version = input.schema_version;
            let reader = FileReader::open_within(input.file, schema, version, (BATCH_ROWS, bytes))?;
            merged.batch_rows = merged.batch_rows.min(reader.batch_rows());
            merged.cursors.push(Cursor {
                reader,
                schema: schema.clone(),
                n: input.n,
                deleted: input.deleted,
                from_us: from_us.unwrap_or(i64::MIN),
                row: 0,
                expired: 0,
                last: i64::MIN,
                batch: None,
                at: 0,
            });
            merged.advance(index)?;
        }
        Ok(merged)
    }

    /// Rows left out so far because they are too old.
    pub fn expired(&self) -> u64 {
        self.cursors.iter().map(|cursor| cursor.expired).sum()
    }

    /// Puts the next row of an input among the heads.
    fn advance(&mut self, index: usize) -> Result<(), LakeError> {
        if let Some(time) = self.cursors[index].head()? {
            self.heads.push(Reverse((time, index)));
        }
        Ok(())
    }

    fn read(&mut self) -> Result<Option<RecordBatch>, LakeError> {
        let mut batches: Vec<RecordBatch> = Vec::new();
        let mut rows: Vec<(usize, usize)> = Vec::new();
        let mut whole = None;
        while rows.len() < self.batch_rows {
            let Some(Reverse((_, index))) = self.heads.pop() else {
                break;
            };
            let until = self.heads.peek().map(|Reverse(head)| *head);
            let cursor = &mut self.cursors[index];
            let room = self.batch_rows - rows.len();
            let Some((batch, from, count)) = cursor.take(index, until, room)? else {
                continue;
            };
            if rows.is_empty() {
                whole = Some((from, count));
            } else {
                whole = None;
            }
            rows.extend((from..from + count).map(|row| (batches.len(), row)));
            batches.push(batch);
            self.advance(index)?;
        }
        match (whole, &batches[..]) {
            (_, []) => Ok(None),
            (Some((from, count)), [batch]) => Ok(Some(batch.slice(from, count))),
            (_, batches) => {
                let batches: Vec<&RecordBatch> = batches.iter().collect();
                interleave_record_batch(&batches, &rows)
                    .map(Some)
                    .map_err(|e| LakeError::encode(WHAT, e))
            }
        }
    }
}

impl Iterator for MergedRows {
    type Item = Result<RecordBatch, LakeError>;

    fn next(&mut self) -> Option<Self::Item> {
        self.read().transpose()
    }
}

/// One input as far as it is read.
struct Cursor {
    reader: FileReader,
    schema: Schema,
    n: u64,
    deleted: Option<Arc<RowSet>>,
    from_us: i64,
    /// The next row of the file.
    row: u32,
    expired: u64,
    /// The time of the last row.
    last: i64,
    batch: Option<RecordBatch>,
    /// The next row of the batch.
    at: usize,
}

impl Cursor {
    /// The time of the next row; reads the next batch if this one is through.
    fn head(&mut self) -> Result<Option<i64>, LakeError> {
        loop {
            if let Some(batch) = &self.batch {
                if let Some(&time) = times(batch)?.get(self.at) {
                    return Ok(Some(time));
                }
                self.batch = None;
            }
            let Some(batch) = self.reader.next().transpose()? else {
                if u64::from(self.row) != self.n {
                    let reason = format!("{} rows where the manifest says {}", self.row, self.n);
                    return Err(LakeError::corrupt(WHAT, reason));
                }
                return Ok(None);
            };
            let first = self.row;
            let count = u32::try_from(batch.num_rows()).ok();
            self.row = count
                .and_then(|count| first.checked_add(count))
                .ok_or_else(|| LakeError::corrupt(WHAT, "row numbers beyond 32 bits"))?;
            let batch = match &self.deleted {
                Some(deleted) => deleted.remove_from(&batch, first)?,
                None => batch,
            };
            let times = times(&batch)?;
            if !times.is_sorted() || times.first().is_some_and(|first| *first < self.last) {
                return Err(LakeError::corrupt(
                    WHAT,
                    "rows are not in the order of _time",
                ));
            }
            self.last = times.last().copied().unwrap_or(self.last);
            let expired = times.partition_point(|time| *time < self.from_us);
            self.expired += expired as u64;
            let kept = batch.slice(expired, batch.num_rows() - expired);
            self.batch = Some(upgrade(&kept, &self.schema)?);
            self.at = 0;
        }
    }

    /// The next rows that come before `until`, the next row of another input: their batch, the first and how many.
    fn take(
        &mut self,
        index: usize,
        until: Option<(i64, usize)>,
        room: usize,
    ) -> Result<Option<(RecordBatch, usize, usize)>, LakeError> {
        let Some(batch) = &self.batch else {
            return Ok(None);
        };
        let rest = &times(batch)?[self.at..];
        let before = match until {
            None => rest.len(),
            Some(other) => rest.partition_point(|time| (*time, index) < other),
        };
        let (from, count) = (self.at, before.clamp(1, room.max(1)));
        let batch = batch.clone();
        self.at += count;
        Ok(Some((batch, from, count)))
    }
}

/// Writes rows in the order of `_time` into the files of a plan.
pub struct PlanWriter<W: Write + Send> {
    schema: Schema,
    options: FileOptions,
    plan: Plan,
    target_bytes: u64,
    open: BTreeMap<usize, FileWriter<W>>,
}

/// A file written, and its period.
pub type Finished<W> = (PeriodFile, WrittenFile<W>);

impl<W: Write + Send> PlanWriter<W> {
    /// The period of the options is that of no file: each gets its own.
    pub fn new(schema: &Schema, options: &FileOptions, plan: Plan, target_bytes: u64) -> Self {
        Self {
            schema: schema.clone(),
            options: options.clone(),
            plan,
            target_bytes,
            open: BTreeMap::new(),
        }
    }

    /// Appends rows; gives the files that are complete. `sink` is asked once for each new file.
    pub fn write<E: From<LakeError>>(
        &mut self,
        batch: &RecordBatch,
        mut sink: impl FnMut() -> Result<W, E>,
    ) -> Result<Vec<Finished<W>>, E> {
        let mut finished = Vec::new();
        let times = times(batch)?;
        let mut from = 0;
        while let Some(&first) = times.get(from) {
            let day = day_of(first);
            self.close_before(day, &mut finished)?;
            let same = times[from..].partition_point(|time| day_of(*time) <= day);
            let index = self
                .plan
                .assign(day)
                .ok_or_else(|| LakeError::encode(WHAT, "a day that was not counted"))?;
            let writer = match self.open.entry(index) {
                std::collections::btree_map::Entry::Occupied(open) => open.into_mut(),
                std::collections::btree_map::Entry::Vacant(free) => {
                    let file = self.plan.files()[index];
                    let options = FileOptions {
                        period: file.period,
                        first_day: file.first_day,
                        ..self.options.clone()
                    };
                    free.insert(FileWriter::new(&self.schema, &options, sink()?))
                }
            };
            writer.write(&batch.slice(from, same))?;
            from += same;
            // Below half the target by its true size it would be a small file, to be merged once more.
            if writer.estimated_bytes() >= self.target_bytes
                && writer.settle()? >= self.target_bytes.div_ceil(2)
                && let Some(writer) = self.open.remove(&index)
            {
                finished.push((self.plan.files()[index], writer.finish()?));
            }
        }
        Ok(finished)
    }

    /// Finishes the files of days that are over.
    fn close_before(&mut self, day: i32, finished: &mut Vec<Finished<W>>) -> Result<(), LakeError> {
        let files = self.plan.files();
        let over = |index: &usize| files[*index].last_day < day;
        while let Some(index) = self.open.keys().copied().find(over) {
            if let Some(writer) = self.open.remove(&index) {
                finished.push((files[index], writer.finish()?));
            }
        }
        Ok(())
    }

    /// The files that are left.
    pub fn finish(self) -> Result<Vec<Finished<W>>, LakeError> {
        let files = self.plan;
        self.open
            .into_iter()
            .map(|(index, writer)| Ok((files.files()[index], writer.finish()?)))
            .collect()
    }
}

#[cfg(test)]
mod tests;
