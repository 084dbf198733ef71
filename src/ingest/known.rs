//! Which ids are known: look-ups of many ids in the runs of a project.
//!
//! Ids are looked up in the order of their hashes, run by run. Filters exclude nearly everything; what they let pass is
//! looked for among a run's ids. Runs in which few ids are looked up are read in slices, the others whole; a worker
//! keeps what it has read whole, as far as `rakam.dedupe_memory` reaches.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ops::Range;

use rakam_lake::id_filter::{self, BLOCK_BYTES, Filter};
use rakam_lake::id_run::{self, IdEntry, Ids};

use crate::catalog::ids::{self, RunRow};
use crate::pg::spi::View;
use crate::pg::{Oid, PgError, Result, guc, relation, wait};

/// From so many look-ups on a filter is read whole, and of so many hits a run's ids: a slice costs about an eighth of
/// it, most of which is the statement's part and the index'.
const WORTH_THE_WHOLE: usize = 8;
/// What one statement reads, so that little is held twice.
const READ_BYTES: usize = 4 << 20;
/// Up to so many ids the statement that lists runs leaves out those that cannot have them.
const FEW: usize = 32;

/// For a reader: which of the ids have been received within the window in the runs that the view's user sees.
pub fn known(view: View, project_id: i32, window_us: i64, wanted: &[IdEntry]) -> Result<Vec<bool>> {
    let Some((from, to)) = received(wanted) else {
        return Ok(Vec::new());
    };
    let (from, to) = (from.saturating_sub(window_us), to.saturating_add(window_us));
    let runs = if wanted.len() <= FEW {
        let uppers: Vec<u64> = wanted.iter().map(IdEntry::upper).collect();
        ids::runs_with(view, project_id, from, to, &uppers)?
    } else {
        ids::runs_received(view, project_id, from, to)?
    };
    Lookup::new(view, window_us, wanted).run(&runs, &mut NoCache)
}

/// For a worker: as [`known`], in the given runs, with what this process has kept of them.
pub fn known_cached(
    view: View,
    runs: &[RunRow],
    window_us: i64,
    wanted: &[IdEntry],
) -> Result<Vec<bool>> {
    CACHE.with_borrow_mut(|cache| {
        cache.begin();
        Lookup::new(view, window_us, wanted).run(runs, cache)
    })
}

/// The earliest and the latest receipt.
fn received(entries: &[IdEntry]) -> Option<(i64, i64)> {
    let times = || entries.iter().map(|entry| entry.received_us);
    times().min().zip(times().max())
}

/// What is looked up, and what was found.
struct Lookup {
    view: View,
    window_us: i64,
    /// In the order of hashes, each with its place in the question.
    wanted: Vec<(IdEntry, usize)>,
    received: Option<(i64, i64)>,
    /// By place in `wanted`.
    found: Vec<bool>,
}

/// Ids that have to be looked up in a run: places in `wanted`.
struct Todo<'r> {
    run: &'r RunRow,
    places: Range<usize>,
}

impl Lookup {
    fn new(view: View, window_us: i64, wanted: &[IdEntry]) -> Self {
        let received = received(wanted);
        let mut wanted: Vec<(IdEntry, usize)> =
            wanted.iter().enumerate().map(|(k, e)| (*e, k)).collect();
        wanted.sort_unstable();
        Self {
            view,
            window_us,
            received,
            found: vec![false; wanted.len()],
            wanted,
        }
    }

    /// By place in the question: whether the id is known.
    fn run(mut self, runs: &[RunRow], cache: &mut impl Keeper) -> Result<Vec<bool>> {
        let (mut small, mut by_filter, mut by_slice) = (Vec::new(), Vec::new(), Vec::new());
        for run in runs {
            let places = self.places(run);
            if places.is_empty() || !self.is_near(run) {
                continue;
            }
            let todo = Todo { run, places };
            if !run.has_filter {
                small.push(todo);
            } else if todo.places.len() >= WORTH_THE_WHOLE || cache.has(run.run_id) {
                by_filter.push(todo);
            } else {
                by_slice.push(todo);
            }
        }
        self.in_ids(&small, cache)?;
        // By run, places that the filters have let pass.
        let mut hits: Vec<(&RunRow, usize)> = Vec::new();
        self.in_filters(&by_filter, cache, &mut hits)?;
        self.in_filter_slices(&by_slice, &mut hits)?;
        self.check(hits)?;
        let mut answer = vec![false; self.found.len()];
        for ((_, k), found) in self.wanted.iter().zip(self.found) {
            answer[*k] = found;
        }
        Ok(answer)
    }

    /// The wanted ids whose hashes lie in the run's node.
    fn places(&self, run: &RunRow) -> Range<usize> {
        let upper = |(entry, _): &(IdEntry, usize)| entry.upper();
        let from = self.wanted.partition_point(|w| upper(w) < run.node.first);
        let to = self.wanted.partition_point(|w| upper(w) <= run.node.last());
        from..to
    }

    /// Whether any event of the run was received within the window of any wanted one.
    fn is_near(&self, run: &RunRow) -> bool {
        self.received.is_some_and(|(from, to)| {
            run.max_received_us >= from.saturating_sub(self.window_us)
                && run.min_received_us <= to.saturating_add(self.window_us)
        })
    }

    /// Looks in whole runs.
    fn in_ids(&mut self, todo: &[Todo<'_>], cache: &mut impl Keeper) -> Result<()> {
        let mut missing = Vec::new();
        for task in todo {
            match cache.get(task.run.run_id) {
                Some(Kept::Ids(kept)) => self.search(&kept, task.places.clone()),
                _ => missing.push(task),
            }
        }
        let bytes = |task: &&Todo<'_>| task.run.n * id_run::ENTRY_BYTES;
        for group in groups(&missing, bytes) {
            wait::check_interrupts();
            let by_run: HashMap<i64, &Todo<'_>> =
                group.iter().map(|task| (task.run.run_id, *task)).collect();
            let run_ids: Vec<i64> = by_run.keys().copied().collect();
            ids::ids(self.view, &run_ids, |run_id, sealed| {
                if let Some(task) = by_run.get(&run_id) {
                    let whole = Ids::open(sealed.into(), task.run.min_received_us)?;
                    self.search(&whole, task.places.clone());
                    if !task.run.has_filter {
                        cache.keep(run_id, Kept::Ids(whole));
                    }
                }
                Ok(())
            })?;
        }
        Ok(())
    }

    /// Marks those of the wanted that are in a run, going through the shorter list.
    fn search(&mut self, run: &Ids, places: Range<usize>) {
        if run.len() < places.len() {
            for entry in run.iter() {
                let wanted = &self.wanted[places.clone()];
                let first =
                    places.start + wanted.partition_point(|(wanted, _)| wanted.hash < entry.hash);
                for place in first..places.end {
                    let (wanted, _) = &self.wanted[place];
                    if wanted.hash != entry.hash {
                        break;
                    }
                    self.found[place] |= wanted.is_copy_of(&entry, self.window_us);
                }
            }
        } else {
            for place in places {
                self.search_one(run, place);
            }
        }
    }

    fn search_one(&mut self, run: &Ids, place: usize) {
        let (wanted, _) = self.wanted[place];
        self.found[place] = self.found[place]
            || run
                .of_hash(wanted.hash)
                .any(|entry| wanted.is_copy_of(&entry, self.window_us));
    }

    /// Asks whole filters.
    fn in_filters<'r>(
        &self,
        todo: &[Todo<'r>],
        cache: &mut impl Keeper,
        hits: &mut Vec<(&'r RunRow, usize)>,
    ) -> Result<()> {
        let mut ask = |filter: &Filter, task: &Todo<'r>| {
            for place in task.places.clone() {
                if !self.found[place] && filter.may_have(self.wanted[place].0.hash) {
                    hits.push((task.run, place));
                }
            }
        };
        let mut missing = Vec::new();
        for task in todo {
            match cache.get(task.run.run_id) {
                Some(Kept::Filter(kept)) => ask(&kept, task),
                _ => missing.push(task),
            }
        }
        let bytes = |task: &&Todo<'_>| task.run.n * 2;
        for group in groups(&missing, bytes) {
            wait::check_interrupts();
            let by_run: HashMap<i64, &Todo<'r>> =
                group.iter().map(|task| (task.run.run_id, *task)).collect();
            let run_ids: Vec<i64> = by_run.keys().copied().collect();
            ids::filters(self.view, &run_ids, |run_id, sealed| {
                if let Some(task) = by_run.get(&run_id) {
                    let filter = Filter::open(sealed.into(), task.run.node, task.run.n)?;
                    ask(&filter, task);
                    cache.keep(run_id, Kept::Filter(filter));
                }
                Ok(())
            })?;
        }
        Ok(())
    }

    /// Asks single blocks of filters.
    fn in_filter_slices<'r>(
        &self,
        todo: &[Todo<'r>],
        hits: &mut Vec<(&'r RunRow, usize)>,
    ) -> Result<()> {
        let asked: Vec<(&RunRow, usize)> = todo
            .iter()
            .flat_map(|task| task.places.clone().map(move |place| (task.run, place)))
            .filter(|&(_, place)| !self.found[place])
            .collect();
        for group in groups(&asked, |_| BLOCK_BYTES * 32) {
            wait::check_interrupts();
            let slices: Vec<(i64, usize)> = group
                .iter()
                .map(|&(run, place)| {
                    let hash = self.wanted[place].0.hash;
                    (run.run_id, id_filter::block_offset(run.node, run.n, hash))
                })
                .collect();
            ids::filter_slices(self.view, &slices, BLOCK_BYTES, |k, block| {
                let (run, place) = group[k];
                ensure_len(block.len(), BLOCK_BYTES)?;
                if id_filter::block_may_have(&block, self.wanted[place].0.hash) {
                    hits.push((run, place));
                }
                Ok(())
            })?;
        }
        Ok(())
    }

    /// Looks for what the filters have let pass among the runs' ids.
    fn check(&mut self, mut hits: Vec<(&RunRow, usize)>) -> Result<()> {
        hits.retain(|&(_, place)| !self.found[place]);
        hits.sort_unstable_by_key(|(run, place)| (run.run_id, *place));
        let mut whole: Vec<&[(&RunRow, usize)]> = Vec::new();
        let mut single: Vec<(&RunRow, usize)> = Vec::new();
        for of_run in hits.chunk_by(|a, b| a.0.run_id == b.0.run_id) {
            if of_run.len() >= WORTH_THE_WHOLE {
                whole.push(of_run);
            } else {
                single.extend(of_run);
            }
        }
        let unsettled = self.in_id_slices(&single)?;
        whole.extend(unsettled.chunk_by(|a, b| a.0.run_id == b.0.run_id));
        for group in groups(&whole, |of_run| of_run[0].0.n * id_run::ENTRY_BYTES) {
            wait::check_interrupts();
            let by_run: HashMap<i64, &[(&RunRow, usize)]> = group
                .iter()
                .map(|of_run| (of_run[0].0.run_id, *of_run))
                .collect();
            let run_ids: Vec<i64> = by_run.keys().copied().collect();
            ids::ids(self.view, &run_ids, |run_id, sealed| {
                if let Some(of_run) = by_run.get(&run_id) {
                    let ids = Ids::open(sealed.into(), of_run[0].0.min_received_us)?;
                    for &(_, place) in *of_run {
                        self.search_one(&ids, place);
                    }
                }
                Ok(())
            })?;
        }
        Ok(())
    }

    /// Looks in the neighbourhoods of hashes; answers what that did not decide, in the order of runs.
    fn in_id_slices<'r>(
        &mut self,
        hits: &[(&'r RunRow, usize)],
    ) -> Result<Vec<(&'r RunRow, usize)>> {
        let mut unsettled = Vec::new();
        let range = |wanted: &[(IdEntry, usize)], &(run, place): &(&RunRow, usize)| {
            id_run::neighbourhood(run.node, run.n, wanted[place].0.hash)
        };
        let bytes = |hit: &(&RunRow, usize)| range(&self.wanted, hit).len() * id_run::ENTRY_BYTES;
        for group in groups(hits, bytes) {
            wait::check_interrupts();
            let slices: Vec<(i64, Range<usize>)> = group
                .iter()
                .map(|hit| (hit.0.run_id, range(&self.wanted, hit)))
                .collect();
            ids::id_slices(self.view, &slices, |k, bytes| {
                let (run, place) = group[k];
                let slice = Ids::slice(bytes.into(), run.min_received_us)?;
                if slice.is_conclusive(&slices[k].1, run.n, self.wanted[place].0.hash) {
                    self.search_one(&slice, place);
                } else {
                    unsettled.push((run, place));
                }
                Ok(())
            })?;
        }
        Ok(unsettled)
    }
}

fn ensure_len(len: usize, wanted: usize) -> Result<()> {
    if len == wanted {
        return Ok(());
    }
    Err(PgError::new(
        "XX001",
        "a run of event ids is corrupt: too short",
    ))
}

/// Cuts a list into groups of about [`READ_BYTES`], at least one item each.
fn groups<T>(items: &[T], bytes: impl Fn(&T) -> usize) -> Vec<&[T]> {
    let mut groups = Vec::new();
    let (mut start, mut size) = (0, 0);
    for (index, item) in items.iter().enumerate() {
        let more = bytes(item);
        if index > start && size + more > READ_BYTES {
            groups.push(&items[start..index]);
            (start, size) = (index, 0);
        }
        size += more;
    }
    if start < items.len() {
        groups.push(&items[start..]);
    }
    groups
}

/// What was read whole of a run.
#[derive(Clone)]
enum Kept {
    Filter(Filter),
    Ids(Ids),
}

impl Kept {
    fn bytes(&self) -> usize {
        // The entry around it counts too: small runs are many.
        128 + match self {
            Self::Filter(filter) => filter.byte_len(),
            Self::Ids(ids) => ids.byte_len(),
        }
    }
}

/// Where what was read is kept for the next look-ups.
trait Keeper {
    fn has(&self, run_id: i64) -> bool;
    fn get(&mut self, run_id: i64) -> Option<Kept>;
    fn keep(&mut self, run_id: i64, kept: Kept);
}

/// A backend keeps nothing: there may be hundreds of them.
struct NoCache;

impl Keeper for NoCache {
    fn has(&self, _run_id: i64) -> bool {
        false
    }

    fn get(&mut self, _run_id: i64) -> Option<Kept> {
        None
    }

    fn keep(&mut self, _run_id: i64, _kept: Kept) {}
}

/// What a worker keeps. Runs never change, so nothing here is ever wrong.
#[derive(Default)]
struct Cache {
    /// The table that the run ids are of: another one after the extension was created anew.
    table: Option<Oid>,
    values: HashMap<i64, (Kept, u64)>,
    bytes: usize,
    /// Counts look-ups: every one of them asks most runs.
    round: u64,
    /// The round of the last eviction.
    evicted: u64,
}

/// What was not used for so many look-ups is of runs that are no more.
const UNUSED_ROUNDS: u64 = 256;

thread_local! {
    static CACHE: RefCell<Cache> = RefCell::default();
}

impl Cache {
    fn begin(&mut self) {
        let table = Some(relation::oid("rakam_internal", "id_run"));
        if self.table != table {
            *self = Self {
                table,
                ..Self::default()
            };
        }
        self.round += 1;
    }

    fn evict(&mut self) {
        let oldest = self.round.saturating_sub(UNUSED_ROUNDS);
        self.values.retain(|_, (_, used)| *used >= oldest);
        self.bytes = self.values.values().map(|(kept, _)| kept.bytes()).sum();
        self.evicted = self.round;
    }
}

impl Keeper for Cache {
    fn has(&self, run_id: i64) -> bool {
        self.values.contains_key(&run_id)
    }

    fn get(&mut self, run_id: i64) -> Option<Kept> {
        let (kept, used) = self.values.get_mut(&run_id)?;
        *used = self.round;
        Some(kept.clone())
    }

    /// Keeps it if there is room. What is in use is not pushed out for it: all runs are asked in turn, so the oldest
    /// would be the one that is needed next.
    fn keep(&mut self, run_id: i64, kept: Kept) {
        let limit = guc::dedupe_memory_bytes();
        let bytes = kept.bytes();
        if self.bytes + bytes > limit && self.evicted + UNUSED_ROUNDS / 8 < self.round {
            self.evict();
        }
        if self.bytes + bytes <= limit {
            self.bytes += bytes;
            if let Some((old, _)) = self.values.insert(run_id, (kept, self.round)) {
                self.bytes -= old.bytes();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_are_bounded_and_complete() {
        let items = [READ_BYTES / 2, READ_BYTES / 2, 1, READ_BYTES * 2, 1];
        let sizes: Vec<usize> = groups(&items, |n| *n).iter().map(|g| g.len()).collect();
        assert_eq!(sizes, [2, 1, 1, 1]);
        assert!(groups::<usize>(&[], |n| *n).is_empty());
    }
}
