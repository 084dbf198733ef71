//! Copies of events in the un-digested tail: none of them counts, as none will after the digest.
//!
//! An event of the tail with an `_id` is compared with the runs of ids that the query's snapshot sees (what has been
//! digested, by whatever road) and with the events of the tail before it. The tail comes in the order of the digest,
//! so the copy that counts is the one that will stay. Both answers are those of one snapshot: a run is written in the
//! transaction that writes its events.

use arrow::array::{Array, AsArray, BooleanArray, RecordBatch};
use arrow::compute::filter_record_batch;
use rakam_engine::{EngineError, Reserved};
use rakam_event::schema::{ID, SYSTEM_FIELDS};
use rakam_lake::id_run::{self, IdEntry};
use rakam_lake::id_set::IdSet;

/// The field `_id`.
pub fn id_field() -> Option<i32> {
    SYSTEM_FIELDS
        .iter()
        .find(|(_, name, _)| *name == ID)
        .map(|(id, _, _)| *id)
}

/// Events of one collection's tail that count, found so far.
pub struct Unique {
    /// 0: not registered yet, so none of its events is digested.
    collection_id: i32,
    window_us: i64,
    seen: IdSet,
    /// For `seen`.
    memory: Reserved,
}

/// Ids of a batch that are to be looked up.
pub struct Question {
    pub entries: Vec<IdEntry>,
    /// The row of each.
    rows: Vec<usize>,
}

impl Unique {
    pub fn new(collection_id: i32, window_us: i64, memory: Reserved) -> Self {
        Self {
            collection_id,
            window_us,
            seen: IdSet::default(),
            memory,
        }
    }

    /// The ids of a batch with a column `_id`, whose rows were received at these times; None: it has none.
    pub fn question(
        &self,
        batch: &RecordBatch,
        received_us: &[i64],
    ) -> Result<Option<Question>, EngineError> {
        let ids = batch
            .column_by_name(ID)
            .and_then(|column| column.as_string_opt::<i32>())
            .filter(|ids| ids.len() == received_us.len())
            .ok_or_else(|| EngineError::Internal("the tail has no column _id".to_owned()))?;
        if ids.null_count() == ids.len() {
            return Ok(None);
        }
        let (entries, rows) = ids
            .iter()
            .zip(received_us)
            .enumerate()
            .filter_map(|(row, (id, &received_us))| {
                let hash = id_run::hash(self.collection_id, id?);
                Some((IdEntry { hash, received_us }, row))
            })
            .unzip();
        Ok(Some(Question { entries, rows }))
    }

    pub fn window_us(&self) -> i64 {
        self.window_us
    }

    /// Whether ids of this collection can be in a run.
    pub fn may_be_known(&self) -> bool {
        self.collection_id != 0
    }

    /// The rows that count. `known` says for each entry of the question whether a run has it; empty: none.
    pub fn filter(
        &mut self,
        batch: RecordBatch,
        question: &Question,
        known: &[bool],
    ) -> Result<RecordBatch, EngineError> {
        self.memory
            .resize(self.seen.bytes_with(question.entries.len()))?;
        let mut mask = vec![true; batch.num_rows()];
        for (k, (entry, &row)) in question.entries.iter().zip(&question.rows).enumerate() {
            let is_known = known.get(k).copied().unwrap_or(false);
            if is_known || self.seen.has_copy_of(entry, self.window_us) {
                mask[row] = false;
            } else {
                self.seen.insert(*entry);
            }
        }
        self.memory.resize(self.seen.bytes())?;
        if mask.iter().all(|&counts| counts) {
            return Ok(batch);
        }
        filter_record_batch(&batch, &BooleanArray::from(mask))
            .map_err(|e| EngineError::Internal(e.to_string()))
    }
}
