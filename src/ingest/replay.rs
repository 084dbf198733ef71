//! Dead letters tried again: records of a source are decoded once more, events go through the mapper that failed, and in, with
//! the time at which they first arrived.
//!
//! An event is charged to its project's quota once: when it came, or else when it is tried again for the first time. What it takes
//! of the hot tier is asked for each time, and ends the call where there is none. Where the quota is used up, only what is charged
//! already is tried.

use pgrx::{default, pg_extern};

use rakam_event::error::EventError;

use super::admission::Admission;
use super::mapper::{self, Outcome, Shape};
use super::stream::{self, Again, Stream};
use super::{quota, room};
use crate::catalog::dead_letter::{self, Failed, Letter, NewRecord};
use crate::catalog::inbox::Entry;
use crate::catalog::projects::{self, Project, Right};
use crate::catalog::{audit, sources};
use crate::pg::security::ActAs;
use crate::pg::snapshot::Registered;
use crate::pg::spi::View;
use crate::pg::{ErrorReport, PgError, Result, not_null, wait, xact};

/// Tries the dead letters of a project again, in the caller's transaction, and returns how many are dead letters no
/// more: stored, or dropped by a mapper. The others stay, with their newest reason. `source` NULL: those of collect. What the
/// project's quota has no room for is passed over, and without room in the hot tier it ends, both with a warning: the rest is left
/// for another call.
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
    let mut replay = Replay::begin(&project, source)?;
    // Not what fails in the meantime, or this would not end.
    let last = as_owner(|| dead_letter::last_id(project.id))?;
    let (mut after, mut gone) = (0, 0);
    'letters: loop {
        let page = as_owner(|| dead_letter::lock_page(project.id, source, after, last))?;
        let Some(newest) = page.last() else {
            break;
        };
        after = newest.id;
        for letter in &page {
            wait::check_interrupts();
            if replay.refusal.is_none() || letter.is_charged {
                gone += i64::from(replay.letter(letter)?);
            }
            if replay.is_full() {
                break 'letters;
            }
        }
    }
    if let Some(refusal) = replay.refusal {
        PgError::new(
            "01000",
            format!("not all dead letters were tried: {}", refusal.message),
        )
        .hint("Call rakam.replay_dead_letters again later: it goes on with the others.")
        .warn();
    }
    Ok(gone)
}

/// One call.
struct Replay<'a> {
    project: &'a Project,
    source: Option<&'a str>,
    /// Decodes records of the source, with the schemas of today.
    stream: Option<Stream>,
    /// Why there is no room for an event now: in the quota, or (which comes later, and ends the call) in the hot tier.
    refusal: Option<PgError>,
}

/// What has become of events that were tried again.
struct Attempt {
    outcome: Outcome,
    /// Whether they are charged by now.
    is_charged: bool,
    /// There was no room for them.
    is_refused: bool,
}

impl<'a> Replay<'a> {
    fn begin(project: &'a Project, source: Option<&'a str>) -> Result<Self> {
        Ok(Self {
            project,
            source,
            stream: source.map(|name| open(project, name)).transpose()?,
            refusal: None,
        })
    }

    /// Whether the hot tier has no room for anything.
    fn is_full(&self) -> bool {
        self.refusal.as_ref().is_some_and(|e| e.sqlstate == "53100")
    }

    /// Tries a letter again. Whether it is gone for good: all of its events are stored, or dropped by a mapper.
    fn letter(&mut self, letter: &Letter) -> Result<bool> {
        let project = self.project;
        let decoded = match &mut self.stream {
            Some(stream) if letter.is_record => as_owner(|| stream.decode_again(project, letter))?,
            _ => return self.event(letter),
        };
        match decoded {
            Ok(events) => self.record(letter, events),
            Err(error) => fails(letter, &error),
        }
    }

    /// Tries events again that failed after they were decoded.
    fn event(&mut self, letter: &Letter) -> Result<bool> {
        let collection = letter.collection.as_deref().unwrap_or_default();
        let shape = if letter.is_row {
            Shape::Row
        } else {
            Shape::Event
        };
        let entry = Entry {
            project_id: self.project.id,
            collection_id: projects::collection_id(self.project.id, collection)?,
            collection,
            n: 0,
            received_at_us: letter.received_at_us,
            shift_us: letter.shift_us,
            // Rows of an INSERT, what the digest gave up, and what came from a source stay here.
            store_id: self
                .project
                .event_store_id
                .filter(|_| self.source.is_none() && !letter.is_row),
            payload: letter.payload.as_slice().into(),
        };
        if self.source.is_some()
            && let Ok(text) = std::str::from_utf8(&letter.payload)
            && let Some(refusal) = Admission::new(self.project).refusal(collection, text)?
        {
            return fails(letter, &refused(&refusal));
        }
        let Attempt {
            outcome,
            is_charged,
            ..
        } = self.attempt(&entry, shape, letter)?;
        match outcome.failed.as_slice() {
            [] => as_owner(|| dead_letter::delete(letter.id))?,
            [failed] if outcome.stored == 0 => as_owner(|| {
                let failed = Failed {
                    payload: Some(failed.event.as_bytes()),
                    stage: failed.stage,
                    error: &failed.error,
                    is_charged,
                };
                dead_letter::failed_again(letter.id, &failed)
            })?,
            // One event became several, of which some are stored: the others are letters of their own.
            several => {
                self.keep(letter, &entry, shape, several, is_charged)?;
                as_owner(|| dead_letter::delete(letter.id))?;
            }
        }
        Ok(outcome.failed.is_empty())
    }

    /// Stores the events of a record.
    fn record(&mut self, letter: &Letter, events: Vec<Again>) -> Result<bool> {
        let mut is_gone = true;
        for (at, event) in events.into_iter().enumerate() {
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
            let tried = self.attempt(&entry, event.shape, letter)?;
            if let Some(refusal) = self
                .refusal
                .as_ref()
                .filter(|_| at == 0 && tried.is_refused)
            {
                // Nothing of it is stored: it stays as it came.
                return fails(letter, &mapper::reason(refusal));
            }
            let failed = &tried.outcome.failed;
            self.keep(letter, &entry, event.shape, failed, tried.is_charged)?;
            is_gone &= failed.is_empty();
        }
        as_owner(|| dead_letter::delete(letter.id))?;
        Ok(is_gone)
    }

    /// Tries events of a letter again if there is room for them.
    fn attempt(&mut self, entry: &Entry<'_>, shape: Shape, letter: &Letter) -> Result<Attempt> {
        let (stage, is_charged) = (letter.stage, letter.is_charged);
        let refused = |error: &PgError, is_refused| Attempt {
            outcome: Outcome::refused(entry, stage, error),
            is_charged,
            is_refused,
        };
        let events = match mapper::checked(entry, shape)? {
            Ok(events) => events,
            Err(error) => return Ok(refused(&error, false)),
        };
        if let Err(error) = charge(self.project, entry, &events, is_charged) {
            if !matches!(error.sqlstate.as_str(), "53400" | "53100") {
                return Err(error);
            }
            let attempt = refused(&error, true);
            self.refusal = Some(error);
            return Ok(attempt);
        }
        Ok(Attempt {
            outcome: mapper::again(entry, shape, stage, events)?,
            is_charged: true,
            is_refused: false,
        })
    }

    /// Keeps events that a letter has become, and that failed.
    fn keep(
        &self,
        letter: &Letter,
        entry: &Entry<'_>,
        shape: Shape,
        failed: &[mapper::Failed],
        is_charged: bool,
    ) -> Result<()> {
        let Some(source) = self.source else {
            return failed
                .iter()
                .try_for_each(|failed| mapper::keep(entry, shape, failed, is_charged));
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
                is_charged,
            })
            .collect();
        let project_id = self.project.id;
        as_owner(|| {
            dead_letter::insert_records(project_id, source, letter.received_at_us, &records)
        })
    }
}

fn open(project: &Project, source: &str) -> Result<Stream> {
    let found = as_owner(|| {
        let latest = Registered::latest();
        sources::named(View::Under(latest.get()), project.id, source)
    })?;
    let found = found.ok_or_else(|| {
        stream::unknown_source(source)
            .hint("With NULL as source the events of collect are replayed.")
    })?;
    Ok(Stream::new(&found))
}

/// Takes room for events, and charges them unless they are charged: 53100, 53400.
fn charge(project: &Project, entry: &Entry<'_>, events: &[String], is_charged: bool) -> Result<()> {
    let bytes = events.iter().map(String::len).sum::<usize>() as i64;
    if entry.store_id.is_some() {
        room::take_of_outbox(bytes)?;
    }
    room::take(bytes)?;
    if is_charged {
        return Ok(());
    }
    quota::charge_letter(project, events.len() as i64, bytes)
}

/// Notes why nothing of a letter could be stored; it is not gone.
fn fails(letter: &Letter, error: &str) -> Result<bool> {
    let failed = Failed {
        payload: None,
        stage: letter.stage,
        error,
        is_charged: letter.is_charged,
    };
    as_owner(|| dead_letter::failed_again(letter.id, &failed))?;
    Ok(false)
}

fn refused(error: &EventError) -> String {
    format!("{error} (SQLSTATE {})", error.sqlstate())
}

fn as_owner<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    let _owner = ActAs::owner();
    work()
}
