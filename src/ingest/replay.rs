//! Dead letters tried again: records of a source are decoded once more, events go through the mapper that failed, and in, with
//! the time at which they first arrived.

use pgrx::{default, pg_extern};

use rakam_event::error::EventError;

use super::admission::Admission;
use super::mapper::{self, Shape};
use super::stream::{self, Stream};
use crate::catalog::dead_letter::{self, Letter, NewRecord};
use crate::catalog::inbox::Entry;
use crate::catalog::projects::{self, Project, Right};
use crate::catalog::{audit, sources};
use crate::pg::security::ActAs;
use crate::pg::snapshot::Registered;
use crate::pg::spi::View;
use crate::pg::{ErrorReport, Result, not_null, wait, xact};

/// Tries the dead letters of a project again, in the caller's transaction, and returns how many are dead letters no
/// more: stored, or dropped by a mapper. The others stay, with their newest reason. `source` NULL: those of collect.
/// SQL: `rakam.replay_dead_letters(project text, source text DEFAULT NULL)`.
/// Errors: 42501 no such project or not its admin, 42704 no such source.
#[pg_extern(volatile, parallel_unsafe)]
fn replay_dead_letters(
    project: Option<&str>,
    source: default!(Option<&str>, "NULL"),
) -> std::result::Result<i64, ErrorReport> {
    Ok(audit::call("replay_dead_letters", project, source, || {
        replay(not_null(project, "project")?, source)
    })?)
}

fn replay(project: &str, source: Option<&str>) -> Result<i64> {
    xact::ensure_writable("replay dead letters")?;
    let project = projects::authorize(project, Right::Admin)?;
    let source = source.map(sources::name_of).transpose()?;
    let source = source.as_deref();
    let mut records = match source {
        Some(name) => Some(Records::open(&project, name)?),
        None => None,
    };
    // Not what fails in the meantime, or this would not end.
    let last = as_owner(|| dead_letter::last_id(project.id))?;
    let (mut after, mut gone) = (0, 0);
    loop {
        let page = as_owner(|| dead_letter::lock_page(project.id, source, after, last))?;
        let Some(newest) = page.last() else {
            return Ok(gone);
        };
        after = newest.id;
        for letter in page {
            wait::check_interrupts();
            let is_gone = match (&mut records, letter.is_record) {
                (Some(records), true) => records.replay(&letter)?,
                _ => replay_one(&project, source, &letter)?,
            };
            gone += i64::from(is_gone);
        }
    }
}

/// Tries an event again. Whether the letter is gone for good.
fn replay_one(project: &Project, source: Option<&str>, letter: &Letter) -> Result<bool> {
    let collection = letter.collection.as_deref().unwrap_or_default();
    let shape = if letter.is_row {
        Shape::Row
    } else {
        Shape::Event
    };
    let entry = Entry {
        project_id: project.id,
        collection_id: projects::collection_id(project.id, collection)?,
        collection,
        n: 0,
        received_at_us: letter.received_at_us,
        shift_us: letter.shift_us,
        // Rows of an INSERT, what the digest gave up, and what came from a source stay here.
        store_id: project
            .event_store_id
            .filter(|_| source.is_none() && !letter.is_row),
        payload: letter.payload.as_slice().into(),
    };
    if source.is_some()
        && let Ok(text) = std::str::from_utf8(&letter.payload)
        && let Some(refusal) = Admission::new(project).refusal(collection, text)?
    {
        as_owner(|| dead_letter::failed_again(letter.id, None, letter.stage, &refused(&refusal)))?;
        return Ok(false);
    }
    let outcome = mapper::again(&entry, shape, letter.stage)?;
    match outcome.failed.as_slice() {
        [] => as_owner(|| dead_letter::delete(letter.id))?,
        [failed] if outcome.stored == 0 => as_owner(|| {
            dead_letter::failed_again(
                letter.id,
                Some(failed.event.as_bytes()),
                failed.stage,
                &failed.error,
            )
        })?,
        // One event became several, of which some are stored: the others are letters of their own.
        several => {
            keep(project, source, letter, &entry, shape, several)?;
            as_owner(|| dead_letter::delete(letter.id))?;
        }
    }
    Ok(outcome.failed.is_empty())
}

/// Keeps events that a letter has become, and that failed.
fn keep(
    project: &Project,
    source: Option<&str>,
    letter: &Letter,
    entry: &Entry<'_>,
    shape: Shape,
    failed: &[mapper::Failed],
) -> Result<()> {
    let Some(source) = source else {
        return failed
            .iter()
            .try_for_each(|failed| mapper::keep(entry, shape, failed));
    };
    let records: Vec<NewRecord<'_>> = (failed.iter())
        .map(|failed| NewRecord {
            split: letter.split.as_deref(),
            offset: letter.offset.clone(),
            collection: Some(entry.collection.into()),
            payload: failed.event.as_bytes(),
            error: failed.error.clone(),
            stage: failed.stage,
            is_row: shape == Shape::Row,
            is_record: false,
            written_at_us: letter.written_at_us,
            columns: None,
        })
        .collect();
    as_owner(|| dead_letter::insert_records(project.id, source, letter.received_at_us, &records))
}

fn refused(error: &EventError) -> String {
    format!("{error} (SQLSTATE {})", error.sqlstate())
}

/// Records of a source that were no events, decoded with the schemas of today.
struct Records<'a> {
    project: &'a Project,
    source: &'a str,
    stream: Stream,
}

impl<'a> Records<'a> {
    fn open(project: &'a Project, source: &'a str) -> Result<Self> {
        let found = as_owner(|| {
            let latest = Registered::latest();
            sources::named(View::Under(latest.get()), project.id, source)
        })?;
        let found = found.ok_or_else(|| {
            stream::unknown_source(source)
                .hint("With NULL as source the events of collect are replayed.")
        })?;
        let stream = Stream::new(&found);
        Ok(Self {
            project,
            source,
            stream,
        })
    }

    /// Whether the letter is gone for good: all events of the record are stored, or dropped by a mapper.
    fn replay(&mut self, letter: &Letter) -> Result<bool> {
        let decoded = as_owner(|| self.stream.decode_again(self.project, letter))?;
        let events = match decoded {
            Ok(events) => events,
            Err(error) => {
                as_owner(|| dead_letter::failed_again(letter.id, None, letter.stage, &error))?;
                return Ok(false);
            }
        };
        let mut is_gone = true;
        for event in events {
            let entry = Entry {
                project_id: self.project.id,
                collection_id: projects::collection_id(self.project.id, &event.collection)?,
                collection: &event.collection,
                n: 1,
                received_at_us: letter.received_at_us,
                shift_us: 0,
                store_id: None,
                payload: event.line.as_bytes().into(),
            };
            let outcome = mapper::again(&entry, event.shape, letter.stage)?;
            let source = Some(self.source);
            keep(
                self.project,
                source,
                letter,
                &entry,
                event.shape,
                &outcome.failed,
            )?;
            is_gone &= outcome.failed.is_empty();
        }
        as_owner(|| dead_letter::delete(letter.id))?;
        Ok(is_gone)
    }
}

fn as_owner<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    let _owner = ActAs::owner();
    work()
}
