//! The time that mappers may take together: those of a call as long as its caller waits, those of a batch of a source no longer
//! than the sources of others can wait for it.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use crate::pg::{Oid, guc};

/// A mapper that ran into its time limit so often is not called again.
pub const TIMEOUTS_MAX: u32 = 3;

/// A batch of a source may take as long as so many calls: a mapper that never comes to an end is called once for all of its
/// events and [`TIMEOUTS_MAX`] times for single ones.
pub const CALLS: u32 = TIMEOUTS_MAX + 1;

/// The time that mappers have taken and still have, and how often each of them ran into its own limit.
#[derive(Debug, Default)]
pub struct Allowance {
    /// None: as long as they like.
    most: Option<Duration>,
    taken: Duration,
    /// Of that, in calls that ran into their limit.
    in_vain: Duration,
    timeouts: HashMap<Oid, u32>,
    /// A call with many events ran into its limit.
    many_timed_out: bool,
    done: usize,
    late: usize,
}

impl Allowance {
    /// Of a batch of a source.
    pub fn of_batch() -> Self {
        let limit = guc::mapper_timeout();
        Self {
            most: (!limit.is_zero()).then(|| limit * CALLS),
            ..Self::default()
        }
    }

    /// Events that their mappers had time for.
    pub fn done(&self) -> usize {
        self.done
    }

    /// Events for which a mapper was not called, since there was no time left.
    pub fn late(&self) -> usize {
        self.late
    }

    /// The time of the calls that came to an end by themselves.
    pub fn spent(&self) -> Duration {
        self.taken.saturating_sub(self.in_vain)
    }

    pub(super) fn is_used_up(&self) -> bool {
        self.most.is_some_and(|most| self.taken >= most)
    }

    /// When it will be used up by a call that began then; None: never.
    pub(super) fn ends(&self, began: Instant) -> Option<Instant> {
        Some(began + self.most?.saturating_sub(self.taken))
    }

    /// Takes the time of a call that began then.
    pub(super) fn take(&mut self, began: Instant, is_in_vain: bool) {
        let took = began.elapsed();
        self.taken += took;
        if is_in_vain {
            self.in_vain += took;
        }
    }

    /// A mapper ran into its limit on many events.
    pub(super) fn many_timed_out(&mut self) {
        self.many_timed_out = true;
    }

    /// Whether mappers ran into their limit on many events, and on none of them alone: fewer may do.
    pub fn only_many_timed_out(&self) -> bool {
        self.many_timed_out && self.timeouts.is_empty()
    }

    /// A mapper ran into its limit on a single event.
    pub(super) fn timed_out(&mut self, mapper: Oid) {
        *self.timeouts.entry(mapper).or_default() += 1;
    }

    pub(super) fn timeouts(&self, mapper: Oid) -> u32 {
        self.timeouts.get(&mapper).copied().unwrap_or(0)
    }

    pub(super) fn count(&mut self, events: usize, late: usize) {
        self.done += events.saturating_sub(late);
        self.late += late;
    }
}
