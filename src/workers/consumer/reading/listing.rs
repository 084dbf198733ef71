//! Which splits a source has: the one consumer that looks for new ones, and what it notes of them.

use std::time::Instant;

use rakam_sources::SourceError;
use rakam_sources::options::{Kind, What as Reads};
use rakam_sources::plan::{Plan, plan};
use rakam_sources::position::Position;
use rakam_sources::source::{Split, Start};

use super::{PROBE_MIN, Reading};
use crate::catalog::event_store;
use crate::catalog::sources;
use crate::pg::guc;
use crate::pg::spi::View;
use crate::pg::xact::{self, Failure};
use crate::sources::seek::new_splits;
use crate::workers::consumer::tasks::Lister;

impl Reading {
    pub(super) fn look_for_splits(&mut self, is_mine: bool) {
        if !is_mine {
            self.lister = None;
            self.is_listing = false;
            self.planned = None;
            return;
        }
        if self.lister.is_none() {
            let (reach, told) = (self.reach.clone(), self.told.clone());
            self.lister = Some(Lister::start(&self.runtime, reach, self.number, told));
            self.list_at = Instant::now();
        }
        if let Some(lister) = &self.lister
            && !self.is_listing
            && Instant::now() >= self.list_at
        {
            self.is_listing = true;
            lister.list();
        }
    }

    /// A list has been worked on; when the next one is made.
    pub(super) fn list_again(&mut self, succeeded: bool) {
        self.is_listing = false;
        let interval = guc::source_refresh();
        let pause = match succeeded {
            true => {
                self.list_failures = 0;
                interval
            }
            false => {
                self.list_failures += 1;
                PROBE_MIN
                    .saturating_mul(1 << (self.list_failures - 1).min(10))
                    .min(interval)
            }
        };
        self.list_at = Instant::now() + pause;
    }

    /// These are the splits that there are.
    pub(super) fn found(&mut self, listed: Vec<Split>) -> std::result::Result<(), Failure> {
        self.heard = Instant::now();
        self.trouble.fetching = self.missing(&listed).map(|error| error.to_string());
        // It may stand there since before this process.
        self.trouble.noted.get_or_insert(Some(String::new()));
        self.note_trouble()?;
        // Objects wait for no others, and there may be very many.
        if self.source.kind == Kind::Files && self.source.has_begun && listed == self.listed {
            self.list_again(true);
            return Ok(());
        }
        let id = self.source.id;
        let planned = xact::worker(|| {
            // As it is now: a seek moves the start.
            let Some(source) = sources::by_id(View::Current, id)? else {
                return Ok(None);
            };
            let (noted, start) = (sources::noted(id)?, source.options.start);
            Ok(Some((
                plan(&listed, &noted, &start, !source.has_begun),
                start,
            )))
        })?;
        self.listed = listed;
        let Some((plan, start)) = planned else {
            // It was dropped a moment ago.
            self.list_again(true);
            return Ok(());
        };
        if plan.at_start.is_empty() {
            return self.add(plan, Vec::new());
        }
        if let Some(lister) = &self.lister {
            // What is written from the call on, not from now on.
            let start = match start {
                Start::Latest => Start::Time(self.source.created_at_us.div_euclid(1000)),
                start => start,
            };
            lister.locate(plan.at_start.clone(), start);
            self.planned = Some(plan);
        }
        Ok(())
    }

    /// A topic that was named and does not exist.
    fn missing(&self, listed: &[Split]) -> Option<SourceError> {
        let Reads::Topics(topics) = &self.source.options.what else {
            return None;
        };
        let has = |topic: &String| {
            let of = |split: &Split| {
                let name = split.id.rsplit_once('/').map(|(name, _)| name);
                name == Some(topic.as_str())
            };
            listed.iter().any(of)
        };
        let name = topics.names().iter().find(|topic| !has(topic))?;
        Some(SourceError::Missing {
            what: "topic",
            name: name.clone(),
        })
    }

    pub(super) fn located(&mut self, positions: Vec<Position>) -> std::result::Result<(), Failure> {
        match self.planned.take() {
            Some(plan) => self.add(plan, positions),
            None => Ok(()),
        }
    }

    /// Notes new splits.
    fn add(&mut self, plan: Plan, positions: Vec<Position>) -> std::result::Result<(), Failure> {
        let parents: Vec<(String, Vec<String>)> =
            (plan.from_beginning.iter().chain(&plan.at_start))
                .filter(|split| !split.parents.is_empty())
                .map(|split| (split.id.clone(), split.parents.clone()))
                .collect();
        let new = new_splits(plan, positions);
        if !new.is_empty() || !self.source.has_begun {
            let (id, project_id) = (self.source.id, self.source.project_id);
            let added = xact::worker(|| {
                if !sources::add_splits(id, &new)? {
                    return Ok(false);
                }
                // What a shard has brought may come once more in those that follow it.
                for (split, parents) in &parents {
                    for (origin, seen) in event_store::seen(id, parents)? {
                        event_store::note_seen(id, project_id, split, origin, &seen)?;
                    }
                }
                Ok(true)
            })?;
            if !added {
                // Somebody is changing the source: the same list is worked on once more.
                self.listed.clear();
                self.list_again(false);
                return Ok(());
            }
            self.source.has_begun = true;
            self.has_new = !new.is_empty();
        }
        self.list_again(true);
        Ok(())
    }
}
