//! Dead letters tried again: through the mapper that failed, and in, with the time at which they first arrived.

use pgrx::{default, pg_extern};

use super::mapper::{self, Shape};
use crate::catalog::audit;
use crate::catalog::dead_letter::{self, Letter};
use crate::catalog::inbox::Entry;
use crate::catalog::projects::{self, Right};
use crate::pg::security::ActAs;
use crate::pg::{ErrorReport, PgError, Result, not_null, wait, xact};

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
    if let Some(source) = source {
        return Err(
            PgError::new("42704", format!("source \"{source}\" does not exist"))
                .hint("With NULL as source the events of collect are replayed."),
        );
    }
    // Not what fails in the meantime, or this would not end.
    let last = as_owner(|| dead_letter::last_id(project.id))?;
    let (mut after, mut gone) = (0, 0);
    loop {
        let page = as_owner(|| dead_letter::lock_page(project.id, after, last))?;
        let Some(newest) = page.last() else {
            return Ok(gone);
        };
        after = newest.id;
        for letter in page {
            wait::check_interrupts();
            gone += i64::from(replay_one(project.id, &letter)?);
        }
    }
}

/// Whether the letter is gone for good.
fn replay_one(project_id: i32, letter: &Letter) -> Result<bool> {
    let entry = Entry {
        project_id,
        collection_id: projects::collection_id(project_id, &letter.collection)?,
        collection: &letter.collection,
        n: 0,
        received_at_us: letter.received_at_us,
        shift_us: letter.shift_us,
        payload: letter.payload.as_bytes().into(),
    };
    let shape = if letter.is_row {
        Shape::Row
    } else {
        Shape::Event
    };
    let outcome = mapper::again(&entry, shape, letter.stage)?;
    match outcome.failed.as_slice() {
        [] => as_owner(|| dead_letter::delete(letter.id))?,
        [failed] if outcome.stored == 0 => as_owner(|| {
            dead_letter::failed_again(
                letter.id,
                failed.event.as_bytes(),
                failed.stage,
                &failed.error,
            )
        })?,
        // One event became several, of which some are stored: the others are letters of their own.
        several => {
            for failed in several {
                mapper::keep(&entry, shape, failed)?;
            }
            as_owner(|| dead_letter::delete(letter.id))?;
        }
    }
    Ok(outcome.failed.is_empty())
}

fn as_owner<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    let _owner = ActAs::owner();
    work()
}
