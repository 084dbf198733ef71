//! The runs of event ids: small ones become larger ones, and what the window has passed over is dropped.
//!
//! Runs of one node and size class merge eight at a time; where that would be more than a part, the ids go to the
//! node's children instead. So every step handles a bounded number of ids, every id is rewritten a few times, and an
//! id is looked up in a few dozen runs, however many there are. A bucket that gets nothing new any more is settled:
//! afterwards each of its ids is in the only run of its place.

use std::cell::RefCell;
use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use rakam_lake::id_run::{Ids, Node, PART_IDS};

use crate::catalog::dropping;
use crate::catalog::ids::{self, Bucket, Crowd, RunRow};
use crate::ingest::dedupe::{self, IdEntry};
use crate::pg::locks::{LockOn, SessionLock};
use crate::pg::spi::View;
use crate::pg::xact::{self, Failure};
use crate::pg::{PgError, Result, failpoint, guc, wait};

/// So many runs of a class make a merge worth while: the children that a node has.
const FAN_IN: usize = 8;
/// A merge takes at most so many runs, and ids: 16 MB in memory, twice.
const MERGE_RUNS: usize = 64;
const MERGE_IDS: usize = FAN_IN * PART_IDS;
/// Runs dropped in one transaction.
const FORGET_RUNS: i64 = 64;
/// A prepared transaction may have run for the window, or this long, before it was prepared.
const PREPARE_WITHIN_US: i64 = 3_600_000_000;

/// The background looks through all runs this often; in between at those of projects that got some.
const WHOLE_INTERVAL: Duration = Duration::from_secs(60);

/// How far the background is.
#[derive(Debug, Default)]
pub struct Upkeep {
    /// Of the projects with newer runs it has not been seen whether there is something to merge.
    seen: i64,
    whole: Option<Instant>,
}

impl Upkeep {
    /// Merges and drops what is due, for about this long. True: more is to be done.
    pub fn step(&mut self, budget: Duration) -> std::result::Result<bool, Failure> {
        let newest = xact::worker(ids::newest)?;
        let is_whole = self.whole.is_none_or(|at| at.elapsed() >= WHOLE_INTERVAL);
        if !is_whole && newest == self.seen {
            return Ok(false);
        }
        let deadline = Instant::now() + budget;
        let is_over = || Instant::now() >= deadline;
        let more = match is_whole {
            true => all(&is_over)?,
            false => merge_crowds(self.seen, &is_over)?,
        };
        if !more {
            self.seen = newest;
            if is_whole {
                self.whole = Some(Instant::now());
            }
        }
        Ok(more)
    }
}

/// Merges and drops all that is due.
pub fn run() -> std::result::Result<(), Failure> {
    all(&|| false).map(drop)
}

fn all(is_over: &impl Fn() -> bool) -> std::result::Result<bool, Failure> {
    while xact::in_passing(forget)?.is_some_and(|dropped| dropped > 0) {
        wait::check_interrupts();
        if is_over() {
            return Ok(true);
        }
    }
    Ok(merge_crowds(0, is_over)? || settle(is_over)?)
}

/// Merges the runs of projects that have one newer than `since`. True: more is to be done.
fn merge_crowds(since: i64, is_over: &impl Fn() -> bool) -> std::result::Result<bool, Failure> {
    // A project whose runs cannot be merged stops no other one; its error is told at the end.
    let mut failed: HashMap<i32, PgError> = HashMap::new();
    loop {
        let crowds = xact::worker(|| ids::crowds(FAN_IN, since))?;
        let mut merged = 0;
        for crowd in &crowds {
            if is_over() {
                return Ok(true);
            }
            if failed.contains_key(&crowd.project_id) {
                continue;
            }
            match locked(crowd.project_id, || merge_crowd(crowd)) {
                Ok(done) => merged += u64::from(done),
                Err(Failure::Error(error)) => {
                    failed.insert(crowd.project_id, error);
                }
                Err(gone) => return Err(gone),
            }
        }
        // None merged: another worker is at them.
        if merged == 0 {
            break;
        }
    }
    match failed.into_iter().next() {
        Some((_, error)) => Err(Failure::Error(error)),
        None => Ok(false),
    }
}

/// Runs a step in a transaction, unless another worker merges the project's runs or somebody is dropping the project.
fn locked(
    project_id: i32,
    step: impl FnOnce() -> Result<bool>,
) -> std::result::Result<bool, Failure> {
    wait::check_interrupts();
    if dropping::is_going(project_id) {
        return Ok(false);
    }
    let Some(_job) = SessionLock::try_take(LockOn::IdMerge(project_id)) else {
        return Ok(false);
    };
    Ok(xact::in_passing(step)? == Some(true))
}

/// Drops some runs that no event can be a copy of any more; returns how many.
fn forget() -> Result<u64> {
    let Some(window_us) = guc::dedupe_window_us() else {
        return ids::forget(i64::MAX, i64::MAX, &[], 0, FORGET_RUNS);
    };
    let kept_us = xact::now_us() - window_us;
    if !ids::any_older(kept_us)? {
        return Ok(0);
    }
    // In this order: what commits in between is seen as waiting.
    let in_progress = ids::oldest_in_progress(window_us.max(PREPARE_WITHIN_US))?;
    let waiting = ids::oldest_waiting()?;
    let received_us = in_progress.saturating_sub(window_us);
    ids::forget(kept_us, received_us, &waiting, window_us, FORGET_RUNS)
}

/// Merges runs of one class. False: there are not enough any more.
fn merge_crowd(crowd: &Crowd) -> Result<bool> {
    let runs = ids::crowd(crowd, MERGE_RUNS)?;
    if runs.len() < FAN_IN {
        return Ok(false);
    }
    merge(crowd.project_id, &runs, false)?;
    Ok(true)
}

/// Replaces runs of one node by one, or (if there are too many ids, or always) by runs of its children.
fn merge(project_id: i32, runs: &[RunRow], to_children: bool) -> Result<()> {
    let Some(first) = runs.first() else {
        return Ok(());
    };
    let mut n = 0;
    let runs: Vec<&RunRow> = runs
        .iter()
        .take_while(|run| {
            n += run.n;
            n <= MERGE_IDS || n == run.n
        })
        .collect();
    let mut entries: Vec<IdEntry> = Vec::with_capacity(runs.iter().map(|run| run.n).sum());
    for run in &runs {
        wait::check_interrupts();
        ids::ids(View::Current, &[run.run_id], |_, sealed| {
            entries.extend(Ids::open(sealed.into(), run.min_received_us)?.iter());
            Ok(())
        })?;
    }
    // A merge of sorted pieces: the standard sort finds them.
    entries.sort();
    let written_us = runs.iter().map(|run| run.written_us).max().unwrap_or(0);
    let down = to_children || entries.len() > PART_IDS;
    let depth = first.node.depth + u8::from(down);
    dedupe::store(project_id, first.bucket, &entries, depth, written_us)?;
    let run_ids: Vec<i64> = runs.iter().map(|run| run.run_id).collect();
    if ids::delete(&run_ids)? != run_ids.len() as u64 {
        return Err(PgError::internal(
            "a run of event ids vanished under the project's merge lock",
        ));
    }
    failpoint::hit("ids.before_commit");
    Ok(())
}

thread_local! {
    /// Buckets found settled, with the number of their runs: not looked at again while it stays the same.
    static SETTLED: RefCell<HashMap<(i32, Bucket), i64>> = RefCell::default();
}

/// Settles buckets that have ended. True: more is to be done.
fn settle(is_over: &impl Fn() -> bool) -> std::result::Result<bool, Failure> {
    let quiet = xact::worker(|| ids::quiet_buckets(xact::now_us()))?;
    let listed: HashSet<(i32, Bucket)> = quiet.iter().map(|q| (q.0, q.1)).collect();
    SETTLED.with_borrow_mut(|settled| settled.retain(|key, _| listed.contains(key)));
    for (project_id, bucket, runs) in quiet {
        let key = (project_id, bucket);
        if SETTLED.with_borrow(|settled| settled.get(&key) == Some(&runs)) {
            continue;
        }
        while locked(project_id, || settle_step(project_id, bucket))? {
            if is_over() {
                return Ok(true);
            }
        }
        let settled = xact::worker(|| {
            let runs = ids::bucket(project_id, bucket)?;
            Ok(next_unsettled(&runs).is_none().then_some(runs.len() as i64))
        })?;
        if let Some(runs) = settled {
            SETTLED.with_borrow_mut(|settled| settled.insert(key, runs));
        }
    }
    Ok(false)
}

/// One merge towards a settled bucket. False: it is settled.
fn settle_step(project_id: i32, bucket: Bucket) -> Result<bool> {
    let runs = ids::bucket(project_id, bucket)?;
    let Some((of_node, has_children)) = next_unsettled(&runs) else {
        return Ok(false);
    };
    merge(project_id, of_node, has_children)?;
    Ok(true)
}

/// The runs of the first node, from the root down, that share ids' places with others; whether with runs of nodes
/// below it. `runs` are in the order of depth, then hash.
fn next_unsettled(runs: &[RunRow]) -> Option<(&[RunRow], bool)> {
    // Nodes further down in which some run lies, with all nodes above them.
    let mut inner: HashSet<Node> = HashSet::new();
    for run in runs {
        inner.extend(run.node.ancestors());
    }
    runs.chunk_by(|a, b| a.node == b.node).find_map(|of_node| {
        let has_children = inner.contains(&of_node.first()?.node);
        (of_node.len() > 1 || has_children).then_some((of_node, has_children))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(run_id: i64, depth: u8, first: u64) -> RunRow {
        RunRow {
            run_id,
            bucket: Bucket {
                from_us: 0,
                to_us: 1,
            },
            node: Node { depth, first },
            n: 1,
            min_received_us: 0,
            max_received_us: 0,
            written_us: 0,
            has_filter: false,
        }
    }

    fn unsettled(runs: &[RunRow]) -> Option<(Vec<i64>, bool)> {
        next_unsettled(runs).map(|(runs, down)| (runs.iter().map(|r| r.run_id).collect(), down))
    }

    #[test]
    fn a_settled_bucket_has_one_run_per_place() {
        assert_eq!(unsettled(&[]), None);
        assert_eq!(unsettled(&[run(1, 0, 0)]), None);
        assert_eq!(
            unsettled(&[run(1, 1, 0), run(2, 1, 1 << 61), run(3, 2, 2 << 61)]),
            None
        );
        let two = [run(1, 0, 0), run(2, 0, 0)];
        assert_eq!(unsettled(&two), Some((vec![1, 2], false)));
        let above = [run(1, 0, 0), run(2, 2, 5 << 58)];
        assert_eq!(unsettled(&above), Some((vec![1], true)));
        let below = [run(1, 1, 0), run(2, 2, 1 << 61), run(3, 2, 1 << 61)];
        assert_eq!(unsettled(&below), Some((vec![2, 3], false)));
    }
}
