//! What the relay does for one store, and knows of it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use rakam_sources::publish::{Publish, Refused, Trouble};

use super::parcel::Packed;
use crate::catalog::event_store::Assigned;
use crate::catalog::inbox::TailRow;
use crate::pg::runtime::Task;
use crate::sources::service::Service;

/// How long a store is left alone after it failed (longer each time), or while somebody is about to change it.
pub const PAUSE: Duration = Duration::from_millis(500);

/// What is being done for a store.
pub enum Work {
    /// The numbers of partitions of topics are asked for.
    Asking { _task: Task, topics: Vec<Arc<str>> },
    Publishing {
        _task: Task,
        batch: Assigned,
        rows: Vec<TailRow>,
        packed: Box<Packed>,
    },
    /// All of it arrived but what is refused: that is to be noted.
    Published(Box<Published>),
}

/// A batch that is published.
pub struct Published {
    pub batch: Assigned,
    pub rows: Vec<TailRow>,
    pub packed: Packed,
    pub refused: Vec<Refused>,
}

/// What the relay knows of a store.
#[derive(Default)]
pub struct Lane {
    /// How its service was reached.
    pub service: Option<Service>,
    pub publisher: Option<Box<dyn Publish>>,
    pub work: Option<Work>,
    /// Of the work: what is told of an earlier one, which was given up, comes too late.
    pub attempt: u64,
    pub trouble: Trouble,
    /// What was noted as its error.
    pub noted: Option<String>,
    pub failures: u32,
    /// Not before.
    pub due: Option<Instant>,
    /// Topics are asked for again: what is noted of them may be out of date.
    pub doubts: bool,
    pub used: Option<Instant>,
}

impl Lane {
    /// Begins with some work; the number of the attempt.
    pub fn begin(&mut self) -> u64 {
        self.attempt += 1;
        self.trouble = Trouble::default();
        self.attempt
    }

    /// Ends whatever is under way: nobody knows how much of it arrives.
    pub fn give_up(&mut self) {
        self.work = None;
        self.attempt += 1;
        self.publisher = None;
        self.doubts = true;
    }

    /// Somebody is about to change the store.
    pub fn wait_for_change(&mut self) {
        self.due = Some(Instant::now() + PAUSE);
    }

    /// Something is being done: what is published waits to be noted only.
    pub fn is_under_way(&self) -> bool {
        !matches!(self.work, None | Some(Work::Published(_)))
    }

    /// It has failed, or is about to.
    pub fn is_struggling(&self) -> bool {
        match &self.work {
            Some(Work::Published(_)) => false,
            Some(_) => self.trouble.get().is_some(),
            None => self.failures > 0 && self.due.is_some(),
        }
    }
}
