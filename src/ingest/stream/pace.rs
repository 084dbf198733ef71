//! How large the batches of a source may be, so that its mappers do not keep the consumer from the sources of others for long.
//!
//! A batch is stored as a whole, so one whose mappers are slow has to be a small one: then others have their turn behind it, and
//! what is left waits in the source. Aimed at are batches that take half of the time that a single call may take.

use std::time::Duration;

use rakam_sources::batch::Limits;

use crate::ingest::mapper::CALLS;

/// An allowance of mappers is so many times what a batch should take.
const PARTS: usize = 2 * CALLS as usize;

/// Smaller batches whose records take so many times as long as those of the large one are no help: what takes the time is each
/// call, however few events it has.
const DEARER: f64 = 3.0;
/// After so many batches it is found out anew.
const HELD: u32 = 200;

/// The records that a batch has at most, as its mappers are.
#[derive(Debug, Default)]
pub struct Pace {
    /// None: as many as any batch.
    most: Option<usize>,
    /// The first batch that was too slow, and the bound that it had.
    slow: Option<Slow>,
    /// For so many batches more none is made smaller for the time that it takes.
    held: u32,
}

#[derive(Debug)]
struct Slow {
    most: Option<usize>,
    records: usize,
    time: Duration,
}

impl Pace {
    pub fn most(&self) -> Option<usize> {
        self.most
    }

    /// A batch of `records` went through its mappers, whose calls took so long; `limit` is what one of them may take, zero: as long
    /// as it likes.
    pub fn took(&mut self, records: usize, time: Duration, limit: Duration) {
        self.held = self.held.saturating_sub(1);
        if limit.is_zero() {
            *self = Self::default();
        } else if let Some(slow) = self.slow.take_if(|slow| slow.is_cheaper(records, time)) {
            self.most = slow.most;
            self.held = HELD;
        } else if time > limit && self.held == 0 {
            let fitting = records as f64 * limit.as_secs_f64() / (2.0 * time.as_secs_f64());
            let fitting = (fitting as usize).max(1);
            let most = self.most;
            self.slow.get_or_insert(Slow {
                most,
                records,
                time,
            });
            self.lower(fitting);
        } else if let Some(most) = self.most
            && records >= most
            && time < limit / 4
        {
            let next = most.saturating_mul(2);
            self.most = (next < Limits::default().records).then_some(next);
            self.slow = None;
        }
    }

    /// A mapper ran into its limit on the events of so many records together.
    pub fn halve(&mut self, records: usize) {
        self.lower((records / 2).max(1));
    }

    fn lower(&mut self, to: usize) {
        self.most = Some(self.most.map_or(to, |most| most.min(to)));
    }

    /// A batch of `records`, which might have had `bound`, had more events than its mappers had time for: `done` of them went
    /// through. False: there is no smaller one.
    pub fn cut(&mut self, records: usize, bound: usize, done: usize) -> bool {
        let present = records.min(bound);
        if present < 2 {
            return false;
        }
        let fitting = done.min(records) / PARTS;
        self.most = Some(fitting.clamp(1, present / 2));
        // It is of no use to know how slow that one would have been.
        (self.slow, self.held) = (None, 0);
        true
    }
}

impl Slow {
    /// Whether it was larger than a batch of so many `records`, and took far less for each of them.
    fn is_cheaper(&self, records: usize, time: Duration) -> bool {
        let each = |records: usize, time: Duration| time.as_secs_f64() / records.max(1) as f64;
        records < self.records && each(records, time) > DEARER * each(self.records, self.time)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(4);

    fn paced(most: Option<usize>) -> Pace {
        Pace {
            most,
            ..Pace::default()
        }
    }

    #[test]
    fn batches_become_smaller_while_they_take_long() {
        let mut pace = paced(None);
        pace.took(1_000, LIMIT, LIMIT);
        assert_eq!(pace.most(), None);
        // Twice the limit: a quarter of it takes half.
        pace.took(1_000, 2 * LIMIT, LIMIT);
        assert_eq!(pace.most(), Some(250));
        pace.took(250, LIMIT * 6 / 5, LIMIT);
        assert_eq!(pace.most(), Some(104));
        let mut pace = paced(Some(8));
        pace.took(8, 9 * LIMIT, LIMIT);
        assert_eq!(pace.most(), Some(1));
        // One that was larger than it should be does not make the next ones larger.
        pace.took(1_000, 2 * LIMIT, LIMIT);
        assert_eq!(pace.most(), Some(1));
    }

    #[test]
    fn they_stay_large_where_each_call_takes_its_time() {
        let mut pace = paced(None);
        // Fifty calls of 300 ms, however many events they have.
        let time = Duration::from_secs(15);
        pace.took(30_000, time, LIMIT);
        assert_eq!(pace.most(), Some(4_000));
        pace.took(4_000, time, LIMIT);
        assert_eq!(pace.most(), None);
        for _ in 0..HELD {
            pace.took(30_000, time, LIMIT);
        }
        assert_eq!(pace.most(), Some(4_000), "found out anew");
        // Half of it is for the calls, half for the records: as good as it gets.
        let mut pace = paced(None);
        let time = |records: u32| Duration::from_secs(1) + Duration::from_millis(1) * records;
        pace.took(30_000, time(30_000), LIMIT);
        assert_eq!(pace.most(), Some(1_935));
        pace.took(1_935, time(1_935), LIMIT);
        assert_eq!(pace.most(), Some(1_935));
    }

    #[test]
    fn half_as_many_where_only_many_time_out() {
        let mut pace = paced(None);
        pace.halve(5_000);
        assert_eq!(pace.most(), Some(2_500));
        pace.halve(9_000);
        assert_eq!(pace.most(), Some(2_500));
        pace.halve(1);
        assert_eq!(pace.most(), Some(1));
    }

    #[test]
    fn they_grow_again_when_full_ones_are_quick() {
        let mut pace = paced(Some(100));
        for (records, time) in [(99, LIMIT / 100), (100, LIMIT / 2)] {
            pace.took(records, time, LIMIT);
            assert_eq!(pace.most(), Some(100));
        }
        pace.took(101, LIMIT / 5, LIMIT);
        assert_eq!(pace.most(), Some(200));
        let mut pace = paced(Some(Limits::default().records / 2));
        pace.took(Limits::default().records, LIMIT / 5, LIMIT);
        assert_eq!(pace.most(), None);
        let mut pace = paced(Some(1));
        pace.took(1, LIMIT, Duration::ZERO);
        assert_eq!(pace.most(), None);
    }

    #[test]
    fn one_that_is_too_large_is_cut_until_it_cannot_be() {
        let mut pace = paced(None);
        assert!(pace.cut(10_000, 32_768, 160));
        assert_eq!(pace.most(), Some(20));
        // More events than records, and more records than there should be.
        assert!(pace.cut(1_000, 20, 50_000));
        assert_eq!(pace.most(), Some(10));
        assert!(pace.cut(10, 10, 0));
        assert_eq!(pace.most(), Some(1));
        assert!(!pace.cut(500, 1, 3));
        assert!(!pace.cut(1, 32_768, 3));
        assert_eq!(pace.most(), Some(1));
    }
}
