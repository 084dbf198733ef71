//! Seeking: the splits of a source go on elsewhere. In a task worker, because the service is asked where that is.
//!
//! Seeking back reads records again. They count once if their events had an `_id` and were stored within the window of
//! de-duplication; where that is not known of everything that would be read again, it is refused unless forced.

use std::collections::HashMap;

use rakam_sources::options::{Kind, seek_target};
use rakam_sources::plan::{Plan, plan};
use rakam_sources::position::Position;
use rakam_sources::source::{Split, Start};
use serde::{Deserialize, Serialize};

use super::functions::unknown;
use super::service::{self, Reach};
use crate::catalog::sources::{self, NewSplit, Source, Standing};
use crate::pg::spi::View;
use crate::pg::xact::{self, Failure};
use crate::pg::{PgError, Result, guc, runtime, wake};

/// What a call asks for, with its rights already checked.
#[derive(Debug, Serialize, Deserialize)]
pub struct Request {
    pub project_id: i32,
    pub name: String,
    pub target: String,
    pub force: bool,
}

/// In the task worker.
pub fn perform(request: &Request) -> std::result::Result<(), Failure> {
    let (source, reach) = xact::worker(|| {
        let source = find(request)?;
        let server = source.server.as_deref().ok_or_else(|| {
            PgError::new("42704", "the server of the source was dropped")
                .hint("Drop the source, or create it on another server.")
        })?;
        let reach = Reach::new(&service::of(server)?.1, &source.options)?;
        Ok((source, reach))
    })?;
    let start = seek_target(source.kind, &request.target).map_err(error)?;
    let (splits, later, only_named) = match start {
        Start::Splits(named) => {
            let noted = xact::worker(|| sources::noted(source.id))?;
            for (split, _) in &named {
                if !noted.contains_key(split) {
                    return Err(Failure::Error(
                        PgError::new(
                            "42704",
                            format!("source \"{}\" has no split \"{split}\"", source.name),
                        )
                        .hint("The view rakam.offsets lists the splits of a source."),
                    ));
                }
            }
            let named = named.into_iter().map(|(split, position)| NewSplit {
                split,
                position,
                is_ended: false,
            });
            (named.collect::<Vec<_>>(), Vec::new(), true)
        }
        start => {
            let (splits, later) = located(&source, &reach, start)?;
            (splits, later, false)
        }
    };
    xact::worker(|| {
        // Another one may have the name by now.
        if find(request)?.id != source.id {
            return Err(PgError::new(
                "40001",
                "the source was dropped and made anew",
            ));
        }
        // Splits that are noted later, because they come behind others, begin there, too. Files have no other start.
        if !only_named && source.kind != Kind::Files {
            sources::set_start(source.id, &request.target)?;
        }
        let standing = sources::lock_splits(source.id)?;
        if !request.force {
            ensure_once(&source, &standing, splits.iter().chain(&later))?;
        }
        sources::reposition(source.id, &splits, only_named)?;
        wake::sources_at_commit();
        Ok(())
    })
}

fn find(request: &Request) -> Result<Source> {
    sources::named(View::Current, request.project_id, &request.name)?
        .ok_or_else(|| unknown(&request.name))
}

fn error(error: rakam_sources::SourceError) -> Failure {
    Failure::Error(error.into())
}

/// All splits as a source that begins now would read them, and those that are read later, behind others.
fn located(
    source: &Source,
    reach: &Reach,
    start: Start,
) -> std::result::Result<(Vec<NewSplit>, Vec<NewSplit>), Failure> {
    let reach = reach.clone();
    runtime::wait_for(async move {
        let mut service = reach.splits().await?;
        let listed = service.list().await?;
        let plan = plan(&listed, &HashMap::new(), &start, true);
        let positions = match plan.at_start.as_slice() {
            [] => Vec::new(),
            splits => service.locate(splits, &start).await?,
        };
        let splits = new_splits(plan, positions);
        let is_later = |id: &String| !splits.iter().any(|split| split.split == *id);
        let position = match start {
            Start::Time(ms) => Position::Time(ms),
            _ => Position::Beginning,
        };
        let later = listed.into_iter().map(|split| split.id).filter(is_later);
        let later = later.map(|split| NewSplit {
            split,
            position: position.clone(),
            is_ended: false,
        });
        let later = later.collect();
        Ok((splits, later))
    })
    .map_err(Failure::Error)?
    .map_err(|e: rakam_sources::SourceError| {
        let mut error = PgError::from(e);
        error.detail = Some(format!("Source \"{}\" was not moved.", source.name));
        Failure::Error(error)
    })
}

/// The splits of a plan, those at the start with their positions.
pub fn new_splits(plan: Plan, positions: Vec<Position>) -> Vec<NewSplit> {
    let split = |split: String, position, is_ended| NewSplit {
        split,
        position,
        is_ended,
    };
    let first = |at: Split| split(at.id, Position::Beginning, false);
    (plan.at_start.into_iter().zip(positions))
        .map(|(at, position)| split(at.id, position, false))
        .chain(plan.from_beginning.into_iter().map(first))
        .chain((plan.ended.into_iter()).map(|id| split(id, Position::Beginning, true)))
        .collect()
}

/// Refuses what would read records again whose events could count twice.
fn ensure_once<'a>(
    source: &Source,
    standing: &[Standing],
    splits: impl Iterator<Item = &'a NewSplit>,
) -> Result<()> {
    let standing: HashMap<&str, &Standing> = standing
        .iter()
        .map(|standing| (standing.split.as_str(), standing))
        .collect();
    let (mut names, mut offsets) = (Vec::new(), Vec::new());
    for split in splits.filter(|split| !split.is_ended) {
        let is_behind = standing.get(split.split.as_str()).is_some_and(|standing| {
            matches!(split.position, Position::Time(ms)
                if standing.record_at_us.is_some_and(|at| ms.saturating_mul(1000) > at))
        });
        if !is_behind {
            names.push(split.split.clone());
            offsets.push(behind(&split.position));
        }
    }
    let window_s = guc::dedupe_window_us().unwrap_or(0) as f64 / 1e6;
    let repeated = sources::not_repeatable(source.id, names, offsets, window_s)?;
    let Some(first) = repeated.first() else {
        return Ok(());
    };
    let more = match repeated.len() - 1 {
        0 => String::new(),
        n => format!(" and {n} more"),
    };
    Err(PgError::new(
        "55000",
        format!("cannot seek source \"{}\": events could count twice", source.name),
    )
    .detail(format!(
        "Of split \"{first}\"{more} records would be read again whose events had no _id, or were stored longer than \
         rakam.dedupe_window ago."
    ))
    .hint("With force => true they are read again all the same."))
}

/// The `next_offset` that a split would have, None before everything. What is at a record of Kinesis is behind the one before.
fn behind(position: &Position) -> Option<String> {
    match position {
        Position::At(_) | Position::Time(_) | Position::Beginning => None,
        other => other.next_offset(),
    }
}
