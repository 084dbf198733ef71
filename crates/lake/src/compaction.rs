//! Which data files are to be merged, so that few small ones lie over any day of a collection (SPEC §5).
//!
//! A file is *small* below half the target size. Larger ones are left alone for ever: an event is rewritten only while its
//! file is small. A *place* is a period and its first day; files of one place are merged with each other, in the
//! background only where a day has more small files than allowed:
//!
//! - Of the small files of a place, by size `f1 <= f2 <= …`, the smallest `p` are merged for which
//!   `fp / (f1 + … + fp-1)` is least. The file of an event then grows, with each time that it is rewritten, by at least the
//!   factor `X / (X - 1)` with `X = ((k + 1) R) ^ (1 / k)`, where the place has `k + 1` small files and `R` is half the
//!   target over `f1`. So an event is rewritten at most `X ln R` times before its file is small no more: 12 times for
//!   flushes of 1 MB and a target of 256 MB, if 9 files of one place are over the day.
//! - Days with fewer events than are worth a file are lifted into their month, and such months into their year; the rows of
//!   a merge that are enough for a finer period go there ([`crate::period::plan_inside`]). Without deletions an event moves up
//!   at most twice, when the setting changes, and down at most twice: each move may begin the count above anew.
//!
//! Planning is in passes: no file is in two merges of one, and after a pass the next one looks at what is there then.

use std::collections::{BTreeMap, BTreeSet};

use crate::period::Period;

/// The most files that one merge reads at once.
pub const MAX_INPUTS: usize = 64;
/// A merge of more than two files takes at most so many times the target size.
const MAX_TARGETS: u64 = 4;

/// A data file, as far as planning needs it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileSpan {
    pub id: i64,
    pub period: Period,
    pub first_day: i32,
    /// Events, without deleted ones.
    pub n: u64,
    pub bytes: u64,
}

/// The settings that planning follows.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    pub target_bytes: u64,
    pub min_file_events: u64,
    /// At least 3: a day may have a file of its own, one of its month and one of its year.
    pub max_files_per_day: usize,
}

/// How much is merged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Extent {
    /// What the bound needs.
    Bound,
    /// All small files of a place into one.
    All,
}

/// Files to be merged into files of one place, or of finer periods within it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Merge {
    pub inputs: Vec<i64>,
    pub period: Period,
    pub first_day: i32,
}

/// A period and its first day.
type Place = (Period, i32);

/// What lies in a place.
#[derive(Debug, Default)]
struct Cell {
    /// Events of all its files.
    n: u64,
    /// It has a file that is not small: then it is worth files, whatever its events.
    large: bool,
    /// Small files, by size.
    small: Vec<FileSpan>,
}

/// The merges of the next pass; none: there is nothing to do.
pub fn plan(files: &[FileSpan], bounds: Bounds, extent: Extent) -> Vec<Merge> {
    let mut cells = cells(files, bounds);
    let least = match extent {
        Extent::All => 2,
        Extent::Bound => bounds.max_files_per_day.max(2),
    };
    let mut merges = lift(&mut cells, bounds, least);
    match extent {
        Extent::All => {
            for (&place, cell) in cells.iter().filter(|(_, cell)| cell.small.len() > 1) {
                let take = fitting(&cell.small, bounds);
                merges.push(merge(place, &cell.small[..take]));
            }
        }
        Extent::Bound => merges.extend(reduce(&cells, bounds)),
    }
    merges
}

/// The most small files that lie over any one day.
pub fn most_small_per_day(files: &[FileSpan], bounds: Bounds) -> usize {
    let cells = cells(files, bounds);
    let count = |place: &Place| cells.get(place).map_or(0, |cell| cell.small.len());
    cells
        .keys()
        .map(|place| chain(*place).iter().map(count).sum())
        .max()
        .unwrap_or(0)
}

fn is_small(file: &FileSpan, bounds: Bounds) -> bool {
    file.bytes < bounds.target_bytes / 2
}

fn cells(files: &[FileSpan], bounds: Bounds) -> BTreeMap<Place, Cell> {
    let mut cells = BTreeMap::<Place, Cell>::new();
    for file in files {
        let place = (file.period, file.period.around(file.first_day).0);
        let cell = cells.entry(place).or_default();
        cell.n = cell.n.saturating_add(file.n);
        if is_small(file, bounds) {
            cell.small.push(*file);
        } else {
            cell.large = true;
        }
    }
    for cell in cells.values_mut() {
        cell.small.sort_by_key(|file| (file.bytes, file.id));
    }
    cells
}

/// The place and the coarser ones around it.
fn chain((period, first_day): Place) -> Vec<Place> {
    [Period::Day, Period::Month, Period::Year]
        .into_iter()
        .filter(|coarser| *coarser >= period)
        .map(|coarser| (coarser, coarser.around(first_day).0))
        .collect()
}

fn merge((period, first_day): Place, inputs: &[FileSpan]) -> Merge {
    Merge {
        inputs: inputs.iter().map(|file| file.id).collect(),
        period,
        first_day,
    }
}

/// How many of these files one merge takes, two at least.
fn fitting(files: &[FileSpan], bounds: Bounds) -> usize {
    let most = bounds.target_bytes.saturating_mul(MAX_TARGETS);
    let mut bytes = 0_u64;
    let fits = files.iter().take(MAX_INPUTS).take_while(|file| {
        bytes = bytes.saturating_add(file.bytes);
        bytes <= most
    });
    fits.count().max(2).min(files.len())
}

/// Takes days and months that are not worth files of their own out of the cells, and merges them into coarser ones.
fn lift(cells: &mut BTreeMap<Place, Cell>, bounds: Bounds, least: usize) -> Vec<Merge> {
    let mut merges = Vec::new();
    for (finer, coarser) in [(Period::Day, Period::Month), (Period::Month, Period::Year)] {
        let mut groups = BTreeMap::<i32, Vec<Place>>::new();
        for (&(period, first_day), cell) in cells.iter() {
            if period == finer && !cell.large && cell.n < bounds.min_file_events {
                let around = coarser.around(first_day).0;
                groups.entry(around).or_default().push((period, first_day));
            }
        }
        for (first_day, places) in groups {
            let target = cells.remove(&(coarser, first_day)).unwrap_or_default();
            let mut inputs: Vec<FileSpan> = Vec::new();
            let mut n = target.n;
            for place in &places {
                if let Some(cell) = cells.get(place) {
                    inputs.extend(&cell.small);
                    n = n.saturating_add(cell.n);
                }
            }
            let worth = coarser == Period::Year || target.large || n >= bounds.min_file_events;
            let count = inputs.len() + target.small.len();
            if worth && count < least {
                cells.insert((coarser, first_day), target);
                continue;
            }
            for place in &places {
                cells.remove(place);
            }
            inputs.extend(&target.small);
            if worth {
                let take = fitting(&inputs, bounds);
                merges.push(merge((coarser, first_day), &inputs[..take]));
            } else {
                // Not enough for the month together: they go on to the year.
                inputs.sort_by_key(|file| (file.bytes, file.id));
                let cell = Cell {
                    n,
                    large: false,
                    small: inputs,
                };
                cells.insert((coarser, first_day), cell);
            }
        }
    }
    merges
}

/// Merges until no day has more small files than allowed, as far as one pass can.
fn reduce(cells: &BTreeMap<Place, Cell>, bounds: Bounds) -> Vec<Merge> {
    let mut counts: BTreeMap<Place, usize> = cells
        .iter()
        .map(|(place, cell)| (*place, cell.small.len()))
        .collect();
    let mut merged = BTreeSet::new();
    let mut merges = Vec::new();
    for &finest in cells.keys() {
        let chain = chain(finest);
        loop {
            let count: usize = chain.iter().filter_map(|place| counts.get(place)).sum();
            if count <= bounds.max_files_per_day {
                break;
            }
            let cheapest = chain
                .iter()
                .filter(|place| !merged.contains(*place))
                .filter_map(|place| Some((*place, cheapest(&cells.get(place)?.small, bounds)?)))
                .min_by(|(_, (a, _)), (_, (b, _))| a.total_cmp(b));
            let Some((place, (_, take))) = cheapest else {
                break;
            };
            merges.push(merge(place, &cells[&place].small[..take]));
            merged.insert(place);
            counts.insert(place, cells[&place].small.len() - take + 1);
        }
    }
    merges
}

/// The number of smallest files whose merge costs least for what it gains: its largest over all the others together.
fn cheapest(files: &[FileSpan], bounds: Bounds) -> Option<(f64, usize)> {
    if files.len() < 2 {
        return None;
    }
    let mut sum = files[0].bytes.max(1) as f64;
    let mut best: Option<(f64, usize)> = None;
    for (index, file) in files[..fitting(files, bounds)].iter().enumerate().skip(1) {
        let bytes = file.bytes.max(1) as f64;
        let cost = bytes / sum;
        if best.is_none_or(|(least, _)| cost <= least) {
            best = Some((cost, index + 1));
        }
        sum += bytes;
    }
    best
}

#[cfg(test)]
mod tests;
