//! De-duplication: the same `_id` in a project and collection, received within `rakam.dedupe_window`, counts once.
//!
//! Whoever moves events with ids into the hot tier (the digest, and other workers) passes them through a [`Deduper`]:
//! it drops what is known and writes the ids of the rest as a run, in the same transaction as the events. Readers
//! compare the events that are not digested yet with the runs of their snapshot and with each other
//! (`fdw::unique`), so at every instant exactly one copy of an event counts.
//!
//! Two transactions that write ids of one project must not miss each other's: they hold a lock of the project from
//! before the snapshot under which they read runs to their end. Only workers take it, and shortly; a session that
//! collects compares nothing and waits for nobody.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use arrow::array::{Array, AsArray, BooleanArray, RecordBatch};
use arrow::compute::filter_record_batch;
use arrow::datatypes::TimestampMicrosecondType;
use rakam_event::schema::{ID, RECEIVED_AT};
use rakam_lake::id_set::IdSet;
use rakam_lake::{id_filter, id_run};

use super::known;
pub use rakam_lake::id_run::IdEntry;

use crate::catalog::ids::{self, Bucket, NewRun, RunRow};
use crate::pg::locks::{self, ID_SLOTS, LockOn};
use crate::pg::snapshot::Registered;
use crate::pg::spi::View;
use crate::pg::{PgError, Result, guc, xact};

/// Runs are dropped when the window has passed over them: one part of so many of the window at a time.
const BUCKETS_PER_WINDOW: i64 = 4;
/// The SQLSTATE of data that cannot be read.
const CORRUPT: &str = "XX001";
/// A run of fewer ids has no filter: it is read whole.
const UNFILTERED_IDS: usize = 512;

/// Keeps the first copy of each event of one transaction. Open it before anything is locked that other writers of the hot tier
/// lock, and [`finish`](Self::finish) it in the same transaction; keep that short, since other writers of the projects wait.
///
/// An event must have been received at most a window ago, or by the clock of a transaction that still runs: what was
/// received longer ago may have been forgotten.
pub struct Deduper {
    /// None: de-duplication is switched off.
    window_us: Option<i64>,
    snapshot: Registered,
    project_ids: BTreeSet<i32>,
    /// By project, read when the first id comes.
    runs: Option<HashMap<i32, Vec<RunRow>>>,
    /// By project, ids that this transaction has kept.
    kept: BTreeMap<i32, IdSet>,
    /// By project and collection, copies dropped.
    dropped: BTreeMap<(i32, i32), i64>,
}

/// What is left of a batch of which some events are copies.
pub struct Unique {
    pub batch: RecordBatch,
    /// For each row of the batch before, whether it is left.
    pub kept: Vec<bool>,
}

impl Deduper {
    /// For events of these projects. Waits until no other worker writes ids of theirs.
    pub fn open(project_ids: impl IntoIterator<Item = i32>) -> Self {
        let window_us = guc::dedupe_window_us();
        let project_ids: BTreeSet<i32> = project_ids.into_iter().collect();
        if window_us.is_some() {
            // In order, so that two workers never wait for each other.
            let slots: BTreeSet<i32> = project_ids
                .iter()
                .map(|id| id.rem_euclid(ID_SLOTS))
                .collect();
            for slot in slots {
                locks::transaction(LockOn::Ids(slot));
            }
        }
        Self {
            window_us,
            // After the locks: it sees what their last holders have written.
            snapshot: Registered::latest(),
            project_ids,
            runs: None,
            kept: BTreeMap::new(),
            dropped: BTreeMap::new(),
        }
    }

    /// The events of a batch of the stored layout that are no copies, in their order. None: all of them.
    pub fn unique(
        &mut self,
        project_id: i32,
        collection_id: i32,
        batch: &RecordBatch,
    ) -> Result<Option<Unique>> {
        let missing = || PgError::internal("a batch of events has no _id or no _received_at");
        let ids = batch
            .column_by_name(ID)
            .and_then(|column| column.as_string_opt::<i32>())
            .ok_or_else(missing)?;
        if ids.null_count() == ids.len() {
            return Ok(None);
        }
        let received = batch
            .column_by_name(RECEIVED_AT)
            .and_then(|column| column.as_primitive_opt::<TimestampMicrosecondType>())
            .ok_or_else(missing)?;
        let events = ids.iter().zip(received.values().iter().copied());
        let Some(kept) = self.keep(project_id, collection_id, events)? else {
            return Ok(None);
        };
        let batch = filter_record_batch(batch, &BooleanArray::from(kept.clone()))
            .map_err(|e| PgError::internal(format!("could not filter events: {e}")))?;
        Ok(Some(Unique { batch, kept }))
    }

    /// Which events to keep, of events given by `_id` and time of receipt; None: all of them.
    pub fn keep<'a>(
        &mut self,
        project_id: i32,
        collection_id: i32,
        events: impl Iterator<Item = (Option<&'a str>, i64)>,
    ) -> Result<Option<Vec<bool>>> {
        let Some(window_us) = self.window_us else {
            return Ok(None);
        };
        if !self.project_ids.contains(&project_id) {
            return Err(PgError::internal(format!(
                "project {project_id} was not locked for its event ids"
            )));
        }
        let mut entries = Vec::new();
        let mut rows = Vec::new();
        let mut count = 0;
        for (row, (id, received_us)) in events.enumerate() {
            count += 1;
            if let Some(id) = id {
                let hash = id_run::hash(collection_id, id);
                entries.push(IdEntry { hash, received_us });
                rows.push(row);
            }
        }
        let known = self.known(project_id, window_us, &entries)?;
        let kept = self.kept.entry(project_id).or_default();
        let mut mask = vec![true; count];
        let mut dropped = 0;
        for ((entry, row), known) in entries.into_iter().zip(rows).zip(known) {
            if known || kept.has_copy_of(&entry, window_us) {
                mask[row] = false;
                dropped += 1;
            } else {
                kept.insert(entry);
            }
        }
        if dropped == 0 {
            return Ok(None);
        }
        *self.dropped.entry((project_id, collection_id)).or_default() += dropped;
        Ok(Some(mask))
    }

    /// Takes ids for known that events have which are stored already. As [`keep`](Self::keep), but nothing is dropped and
    /// counted.
    pub fn remember(
        &mut self,
        project_id: i32,
        collection_id: i32,
        events: &[(String, i64)],
    ) -> Result<()> {
        let events = events.iter().map(|(id, at)| (Some(id.as_str()), *at));
        self.keep(project_id, collection_id, events)?;
        self.dropped.clear();
        Ok(())
    }

    fn known(&mut self, project_id: i32, window_us: i64, entries: &[IdEntry]) -> Result<Vec<bool>> {
        let view = View::Under(self.snapshot.get());
        if self.runs.is_none() {
            let project_ids: Vec<i32> = self.project_ids.iter().copied().collect();
            let mut by_project: HashMap<i32, Vec<RunRow>> = HashMap::new();
            for (project_id, run) in ids::runs(view, &project_ids)? {
                by_project.entry(project_id).or_default().push(run);
            }
            self.runs = Some(by_project);
        }
        let Some(runs) = self.runs.as_ref().and_then(|runs| runs.get(&project_id)) else {
            return Ok(vec![false; entries.len()]);
        };
        match known::known_cached(view, runs, window_us, entries) {
            // A damaged run must not stop the events of everybody: rather one of them counts twice.
            Err(error) if error.sqlstate == CORRUPT => {
                error
                    .detail(format!(
                        "Events of project {project_id} may be stored although they are copies."
                    ))
                    .warn();
                Ok(vec![false; entries.len()])
            }
            known => known,
        }
    }

    /// Writes the ids that were kept, and counts the copies that were not.
    pub fn finish(&mut self) -> Result<()> {
        let Some(window_us) = self.window_us else {
            return Ok(());
        };
        let now_us = xact::now_us();
        for (project_id, kept) in std::mem::take(&mut self.kept) {
            if kept.is_empty() {
                continue;
            }
            let mut entries = kept.into_sorted();
            let of = |entry: &IdEntry| bucket(entry.received_us, window_us);
            // Nearly always there is one bucket; stable, so that hashes stay in order within each.
            entries.sort_by_key(of);
            let mut runs = Vec::new();
            for part in entries.chunk_by(|a, b| of(a) == of(b)) {
                if let Some(bucket) = part.first().map(of) {
                    runs.extend(laid_out(project_id, bucket, part, 0, now_us)?);
                }
            }
            ids::add(&runs)?;
        }
        for ((project_id, collection_id), n) in std::mem::take(&mut self.dropped) {
            ids::count_duplicates(collection_id, project_id, n)?;
        }
        Ok(())
    }
}

/// The bucket in which an event received then belongs.
fn bucket(received_us: i64, window_us: i64) -> Bucket {
    let width = (window_us / BUCKETS_PER_WINDOW).max(1);
    let from_us = received_us.div_euclid(width).saturating_mul(width);
    Bucket {
        from_us,
        to_us: from_us.saturating_add(width),
    }
}

/// Stores sorted entries of a bucket as runs of nodes of this depth or a greater one.
pub fn store(
    project_id: i32,
    bucket: Bucket,
    entries: &[IdEntry],
    depth: u8,
    written_us: i64,
) -> Result<()> {
    ids::add(&laid_out(project_id, bucket, entries, depth, written_us)?)
}

fn laid_out(
    project_id: i32,
    bucket: Bucket,
    entries: &[IdEntry],
    depth: u8,
    written_us: i64,
) -> Result<Vec<NewRun>> {
    let mut runs = Vec::new();
    for (node, part) in id_run::lay_out(entries, depth) {
        let times = || part.iter().map(|entry| entry.received_us);
        let (Some(min_received_us), Some(max_received_us)) = (times().min(), times().max()) else {
            continue;
        };
        runs.push(NewRun {
            project_id,
            bucket,
            node,
            level: id_run::level(part.len()),
            n: part.len(),
            min_received_us,
            max_received_us,
            written_us,
            filter: (part.len() > UNFILTERED_IDS).then(|| id_filter::build(node, part)),
            ids: id_run::encode(part, min_received_us)?,
        });
    }
    Ok(runs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_follow_each_other() {
        for window_us in [1, 3, 4_000_000] {
            for received_us in [-9_000_001, -1, 0, 1, 12_345_678] {
                let found = bucket(received_us, window_us);
                assert!((found.from_us..found.to_us).contains(&received_us));
                assert!((found.to_us - found.from_us - 1) * BUCKETS_PER_WINDOW <= window_us);
                assert_eq!(bucket(found.to_us, window_us).from_us, found.to_us);
            }
        }
    }
}
