//! Objects that nobody needs: those announced by a crashed flush, and those out of use for long enough.
//! The object goes first, then its row: a crash between them repeats a deletion, which is harmless.
//! And rows that were appended so that nobody waits, to be added up or forgotten here.

use std::time::Duration;

use crate::catalog::{load, manifest, mapper, session};
use crate::pg::locks::{LockOn, SessionLock};
use crate::pg::spi::View;
use crate::pg::xact::{self, Failure};
use crate::pg::{cache, failpoint, guc, relation, wait};
use crate::tiers::object::Remote;

/// How much later than its gap allows a session may still get events with times of then.
const LATE_VISITS: Duration = Duration::from_secs(3600);

/// Collects garbage; returns the number of objects deleted.
pub fn run() -> std::result::Result<u64, Failure> {
    let Some(_job) = SessionLock::try_take(LockOn::Gc) else {
        return Ok(0);
    };
    xact::worker(|| {
        mapper::fold_dropped()?;
        load::tidy()?;
        session::tidy((2 * guc::session_gap() + LATE_VISITS).as_secs_f64())
    })?;
    let mut deleted = 0;
    for (storage_id, path, collection_id) in xact::worker(|| manifest::intents(View::Current))? {
        wait::check_interrupts();
        // A running flush holds its collection: what it announced is not garbage.
        let Some(_idle) = SessionLock::try_take(LockOn::CollectionJob(collection_id)) else {
            continue;
        };
        // Read again under the lock: the flush may have committed since.
        if xact::worker(|| manifest::has_intent(storage_id, &path))? {
            delete_object(storage_id, &path)?;
            xact::worker(|| manifest::delete_intent(storage_id, &path))?;
            deleted += 1;
        }
    }
    let due = xact::worker(|| {
        manifest::deferred_due(
            View::Current,
            xact::horizon(relation::oid("rakam_internal", "file_deferred")),
            guc::file_retention().as_secs_f64(),
        )
    })?;
    for (storage_id, path) in due {
        wait::check_interrupts();
        delete_object(storage_id, &path)?;
        failpoint::hit("gc.after_object");
        xact::worker(|| manifest::delete_deferred(storage_id, &path))?;
        deleted += 1;
    }
    Ok(deleted)
}

fn delete_object(storage_id: i32, path: &str) -> std::result::Result<(), Failure> {
    match Remote::open(storage_id)? {
        Some(remote) => {
            let deleted = remote.delete(path).map_err(|e| Failure::Error(e.into()));
            cache::forget(storage_id, path);
            deleted
        }
        None => xact::worker(|| manifest::delete_object(path)).map(drop),
    }
}
