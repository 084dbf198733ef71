//! How large the batches of a source may be, so that its mappers do not keep the consumer from the sources of others for long.
//!
//! A batch is stored as a whole, so one whose mappers are slow has to be a small one: then others have their turn behind it, and
//! what is left waits in the source. Aimed at are batches that take half of the time that a single call may take.

use std::time::Duration;

use rakam_sources::batch::Limits;

use crate::ingest::mapper::CALLS;

/// An allowance of mappers is so many times what a batch should take.
const PARTS: usize = 2 * CALLS as usize;

/// The records that a batch has at most, as its mappers are.
#[derive(Debug, Default)]
pub struct Pace {
    /// None: as many as any batch.
    most: Option<usize>,
}

impl Pace {
    pub fn most(&self) -> Option<usize> {
        self.most
    }

    /// A batch of `records` went through its mappers, whose calls took so long; `limit` is what one of them may take, zero: as long
    /// as it likes.
    pub fn took(&mut self, records: usize, time: Duration, limit: Duration) {
        if limit.is_zero() {
            self.most = None;
        } else if time > limit {
            let fitting = records as f64 * limit.as_secs_f64() / (2.0 * time.as_secs_f64());
            let fitting = (fitting as usize).max(1);
            self.most = Some(self.most.map_or(fitting, |most| most.min(fitting)));
        } else if let Some(most) = self.most
            && records >= most
            && time < limit / 4
        {
            let next = most.saturating_mul(2);
            self.most = (next < Limits::default().records).then_some(next);
        }
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
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(4);

    fn paced(most: Option<usize>) -> Pace {
        Pace { most }
    }

    #[test]
    fn batches_become_smaller_while_they_take_long() {
        let mut pace = paced(None);
        pace.took(1_000, LIMIT, LIMIT);
        assert_eq!(pace.most(), None);
        // Twice the limit: a quarter of it takes half.
        pace.took(1_000, 2 * LIMIT, LIMIT);
        assert_eq!(pace.most(), Some(250));
        pace.took(250, 2 * LIMIT, LIMIT);
        assert_eq!(pace.most(), Some(62));
        pace.took(1, 9 * LIMIT, LIMIT);
        assert_eq!(pace.most(), Some(1));
        // One that was larger than it should be does not make the next ones larger.
        pace.took(1_000, 2 * LIMIT, LIMIT);
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
