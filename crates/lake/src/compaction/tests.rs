use std::collections::HashMap;

use super::*;
use crate::period::{day_of, plan_inside};
use crate::testing::Rng;

const MB: u64 = 1 << 20;
const BOUNDS: Bounds = Bounds {
    target_bytes: 256 * MB,
    min_file_events: 10_000,
    max_files_per_day: 8,
};
/// 2024-05-17 and the first days around it.
const DAY: i32 = 19_860;
const EVENT_BYTES: u64 = 40;

/// A lake of rows by day; a merge does what the execution does with real ones.
#[derive(Default)]
struct Lake {
    files: BTreeMap<i64, Stored>,
    next: i64,
}

#[derive(Clone)]
struct Stored {
    span: FileSpan,
    days: BTreeMap<i32, u64>,
    /// How often each row was rewritten, at most.
    rewritten: u32,
}

impl Lake {
    fn add(&mut self, period: Period, days: &[(i32, u64)], rewritten: u32) {
        let days: BTreeMap<i32, u64> = days.iter().copied().collect();
        let n = days.values().sum();
        let first_day = period.around(*days.keys().next().unwrap()).0;
        self.next += 1;
        let span = FileSpan {
            id: self.next,
            period,
            first_day,
            n,
            bytes: n * EVENT_BYTES,
        };
        let stored = Stored {
            span,
            days,
            rewritten,
        };
        self.files.insert(self.next, stored);
    }

    /// What a called flush of these days writes.
    fn flush(&mut self, days: &[(i32, u64)], bounds: Bounds) {
        let counts = days.iter().copied().collect();
        let plan = crate::period::plan(&counts, bounds.min_file_events);
        for (index, file) in plan.files().iter().enumerate() {
            let days: Vec<_> = (counts.iter().map(|(d, n)| (*d, *n)))
                .filter(|(day, _)| plan.assign(*day) == Some(index))
                .collect();
            self.add(file.period, &days, 0);
        }
    }

    fn spans(&self) -> Vec<FileSpan> {
        self.files.values().map(|stored| stored.span).collect()
    }

    fn days(&self) -> BTreeMap<i32, u64> {
        let mut days = BTreeMap::new();
        for stored in self.files.values() {
            for (day, n) in &stored.days {
                *days.entry(*day).or_default() += n;
            }
        }
        days
    }

    fn merge(&mut self, merge: &Merge, bounds: Bounds) {
        let mut counts = BTreeMap::<i32, u64>::new();
        let mut rewritten = 0;
        for id in &merge.inputs {
            let input = self.files.remove(id).expect("a file is in one merge only");
            assert!(input.span.bytes < bounds.target_bytes / 2);
            let (first, last) = merge.period.around(merge.first_day);
            assert!(input.days.keys().all(|day| (first..=last).contains(day)));
            for (day, n) in input.days {
                *counts.entry(day).or_default() += n;
            }
            rewritten = rewritten.max(input.rewritten + 1);
        }
        let plan = plan_inside(merge.period, &counts, bounds.min_file_events);
        for (index, file) in plan.files().iter().enumerate() {
            let mut days: Vec<(i32, u64)> = Vec::new();
            let mut bytes = 0;
            for (&day, &n) in counts
                .iter()
                .filter(|(day, _)| plan.assign(**day) == Some(index))
            {
                days.push((day, n));
                bytes += n * EVENT_BYTES;
                if bytes >= bounds.target_bytes {
                    self.add(file.period, &days, rewritten);
                    days.clear();
                    bytes = 0;
                }
            }
            if !days.is_empty() {
                self.add(file.period, &days, rewritten);
            }
        }
    }

    /// Passes until there is nothing to do; returns the number of merges.
    fn compact(&mut self, bounds: Bounds, extent: Extent) -> usize {
        let mut done = 0;
        for _ in 0..100 {
            let merges = plan(&self.spans(), bounds, extent);
            if merges.is_empty() {
                return done;
            }
            done += merges.len();
            for each in &merges {
                assert!(each.inputs.len() > 1 && each.inputs.len() <= MAX_INPUTS);
                self.merge(each, bounds);
            }
        }
        panic!("compaction does not end");
    }
}

#[test]
fn few_small_files_are_left_alone_unless_asked_for() {
    let mut lake = Lake::default();
    for _ in 0..8 {
        lake.flush(&[(DAY, 20_000)], BOUNDS);
    }
    assert_eq!(lake.compact(BOUNDS, Extent::Bound), 0);
    assert_eq!(lake.compact(BOUNDS, Extent::All), 1);
    assert_eq!(lake.spans().len(), 1);
    assert_eq!(lake.compact(BOUNDS, Extent::All), 0);
}

#[test]
fn large_files_are_never_touched() {
    let mut lake = Lake::default();
    for _ in 0..20 {
        lake.flush(&[(DAY, 128 * MB / EVENT_BYTES + 1)], BOUNDS);
    }
    assert_eq!(lake.compact(BOUNDS, Extent::All), 0);
    assert_eq!(most_small_per_day(&lake.spans(), BOUNDS), 0);
}

#[test]
fn thirty_small_flushes_of_a_day() {
    let mut lake = Lake::default();
    for _ in 0..30 {
        lake.flush(&[(DAY, 100)], BOUNDS);
    }
    assert!(lake.spans().iter().all(|file| file.period == Period::Year));
    assert_eq!(lake.compact(BOUNDS, Extent::Bound), 1);
    assert_eq!(lake.spans().len(), 1);
}

#[test]
fn small_days_move_up_and_large_ones_down() {
    let fine = Bounds {
        min_file_events: 1,
        ..BOUNDS
    };
    let mut lake = Lake::default();
    for day in 0..60 {
        lake.flush(&[(DAY + day, 200)], fine);
    }
    assert_eq!(lake.spans().len(), 60);
    assert_eq!(lake.compact(fine, Extent::All), 0);
    // 12,000 events of three months: none is worth a file.
    let mut all = Lake {
        files: lake.files.clone(),
        next: lake.next,
    };
    for (lake, extent) in [(&mut all, Extent::All), (&mut lake, Extent::Bound)] {
        lake.compact(BOUNDS, extent);
        let files = lake.spans();
        assert_eq!((files.len(), files[0].period), (1, Period::Year));
    }
    // Enough for two of the months, and for one day.
    lake.flush(&[(DAY, 9_999)], BOUNDS);
    lake.flush(&[(DAY + 20, 8_000)], BOUNDS);
    lake.compact(BOUNDS, Extent::All);
    let periods: Vec<Period> = lake.spans().iter().map(|file| file.period).collect();
    assert_eq!(periods.len(), 3, "{:?}", lake.spans());
    for period in [Period::Year, Period::Month, Period::Day] {
        assert!(periods.contains(&period));
    }
}

#[test]
fn a_lone_small_file_stays_where_it_is() {
    let mut lake = Lake::default();
    lake.add(Period::Day, &[(DAY, 5)], 0);
    assert_eq!(lake.compact(BOUNDS, Extent::All), 0);
    lake.add(Period::Day, &[(DAY + 100, 5)], 0);
    assert_eq!(lake.compact(BOUNDS, Extent::Bound), 0);
    assert_eq!(lake.compact(BOUNDS, Extent::All), 1);
}

#[test]
fn the_bound_holds_over_days_months_and_years_together() {
    let mut lake = Lake::default();
    for _ in 0..4 {
        lake.add(Period::Year, &[(DAY, 5)], 0);
        lake.add(Period::Month, &[(DAY, 10_000)], 0);
        lake.add(Period::Day, &[(DAY, 20_000)], 0);
    }
    assert_eq!(most_small_per_day(&lake.spans(), BOUNDS), 12);
    lake.compact(BOUNDS, Extent::Bound);
    assert!(most_small_per_day(&lake.spans(), BOUNDS) <= 8);
    let tight = Bounds {
        max_files_per_day: 3,
        ..BOUNDS
    };
    lake.compact(tight, Extent::Bound);
    assert!(most_small_per_day(&lake.spans(), tight) <= 3);
}

/// Whatever is flushed: compaction ends, keeps every row, holds the bound, and a second one has nothing to do.
#[test]
fn random_lakes_settle() {
    for seed in 0..40 {
        let mut rng = Rng::new(seed);
        let bounds = Bounds {
            target_bytes: MB << rng.between(0, 8),
            min_file_events: [1, 100, 10_000][rng.between(0, 2) as usize],
            max_files_per_day: rng.between(3, 10) as usize,
        };
        let mut lake = Lake::default();
        let span = [1, 40, 800][rng.between(0, 2) as usize];
        for round in 0..40 {
            for _ in 0..rng.between(1, 5) {
                let size = 1 << rng.between(0, 16);
                let days: Vec<(i32, u64)> = (0..rng.between(1, 6))
                    .map(|_| {
                        (
                            DAY + rng.between(0, span) as i32,
                            rng.between(1, size) as u64,
                        )
                    })
                    .collect();
                lake.flush(&days, bounds);
            }
            if rng.between(0, 5) == 0 {
                let period = [Period::Day, Period::Month][rng.between(0, 1) as usize];
                lake.add(period, &[(DAY, rng.between(1, 50) as u64)], 0);
            }
            let before = lake.days();
            let extent = match round % 7 {
                6 => Extent::All,
                _ => Extent::Bound,
            };
            lake.compact(bounds, extent);
            assert_eq!(lake.days(), before, "seed {seed}");
            let most = most_small_per_day(&lake.spans(), bounds);
            assert!(most <= bounds.max_files_per_day, "seed {seed}: {most}");
            assert!(plan(&lake.spans(), bounds, extent).is_empty());
        }
    }
}

/// Flushes of one size, each followed by a look, until their file is large: how often an event is rewritten.
#[test]
fn events_are_rewritten_a_few_times() {
    for (flush_bytes, most, average) in [(MB, 12, 6.0), (32 << 10, 30, 12.0), (4 << 10, 55, 20.0)] {
        let events = flush_bytes / EVENT_BYTES;
        let bounds = Bounds {
            min_file_events: 1,
            ..BOUNDS
        };
        let mut lake = Lake::default();
        let (mut moved, mut flushed) = (0_u64, 0_u64);
        let mut rewritten = HashMap::new();
        while flushed < 160 * MB {
            lake.add(Period::Day, &[(DAY, events)], 0);
            flushed += flush_bytes;
            for each in plan(&lake.spans(), bounds, Extent::Bound) {
                moved += (each.inputs.iter().map(|id| lake.files[id].span.bytes)).sum::<u64>();
                lake.merge(&each, bounds);
            }
            for (id, file) in &lake.files {
                rewritten.insert(*id, file.rewritten);
            }
        }
        let worst = rewritten.values().copied().max().unwrap();
        let mean = moved as f64 / flushed as f64;
        assert!(worst <= most, "{flush_bytes}: {worst} times");
        assert!(mean <= average, "{flush_bytes}: {mean:.1} times on average");
    }
}

#[test]
fn the_day_of_the_tests_is_in_may() {
    assert_eq!(day_of(1_715_904_000_000_000), DAY);
}
