//! Objects that nobody needs: those announced by a crashed flush, those out of use for long enough, and orphans that
//! [`super::check`] found. The object goes first, then its row: a crash between them repeats a deletion, which is harmless.
//!
//! Nothing is deleted of a storage that is not certainly this database's ([`super::owner`]). Storages do not wait for each
//! other: one that fails is left until it is reached again.

use std::time::Duration;

use crate::catalog::{load, manifest, mapper, orphans, rebuild, session, storages};
use crate::pg::locks::{LockOn, SessionLock};
use crate::pg::spi::View;
use crate::pg::xact::{self, Failure};
use crate::pg::{cache, failpoint, guc, relation, wait};
use crate::tiers::object::Remote;
use crate::tiers::{check, describe, owner, reach};

/// How much later than its gap allows a session may still get events with times of then.
const LATE_VISITS: Duration = Duration::from_secs(3600);
/// Objects deleted between two looks at the fence, and the rows that go in one transaction.
const BATCH: i64 = 1_000;
/// A storage with nothing to do is looked at so often, to know whether it is there and whose it is.
const LOOK_INTERVAL: Duration = Duration::from_secs(15);
/// And compared with the manifest so often.
const CHECK_INTERVAL: Duration = Duration::from_secs(7 * 24 * 3600);

/// Rows that were appended so that nobody waits are added up or forgotten; later, if somebody is dropping some of them.
pub fn tables() -> std::result::Result<(), Failure> {
    xact::in_passing(|| {
        mapper::fold_dropped()?;
        load::tidy()?;
        manifest::forget_log()?;
        session::tidy((2 * guc::session_gap() + LATE_VISITS).as_secs_f64())
    })
    .map(drop)
}

/// Whether [`storages`] would find something to do.
pub fn is_due() -> std::result::Result<bool, Failure> {
    xact::worker(|| {
        storages::need_care(
            horizon(),
            guc::file_retention().as_secs_f64(),
            LOOK_INTERVAL.as_secs_f64(),
            CHECK_INTERVAL.as_secs_f64(),
        )
    })
}

fn horizon() -> u64 {
    xact::horizon(relation::oid("rakam_internal", "file_deferred"))
}

/// Who asks for a round.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Asked {
    /// The background: what somebody else works on, or what fails, is left for later.
    ByTime,
    /// A caller, who waits for everything that is due.
    ByCall,
}

/// Deletes what is due in every storage; the number of objects. The first error comes back when all have had their turn.
pub fn storages(asked: Asked) -> std::result::Result<u64, Failure> {
    let mut deleted = 0;
    let mut first = None;
    for storage_id in xact::worker(|| storages::all(View::Current))? {
        match storage(storage_id, asked) {
            Ok(n) => deleted += n,
            Err(Failure::ExtensionGone) => return Err(Failure::ExtensionGone),
            Err(failure) => {
                first.get_or_insert(failure);
            }
        }
    }
    first.map_or(Ok(deleted), Err)
}

fn storage(storage_id: i32, asked: Asked) -> std::result::Result<u64, Failure> {
    if asked == Asked::ByTime {
        compare(storage_id)?;
    }
    let lock = LockOn::Gc(storage_id);
    let _lock = match asked {
        Asked::ByCall => SessionLock::take(lock),
        Asked::ByTime => match SessionLock::try_take(lock) {
            Some(lock) => lock,
            None => return Ok(0),
        },
    };
    let remote = match Remote::open(storage_id) {
        Ok(Some(remote)) => remote,
        Ok(None) => return out_of_use(storage_id, None, asked),
        Err(failure) => {
            // Its server is gone, or has no address that can be used.
            if let Failure::Error(error) = &failure {
                reach::note_undefined(storage_id, &error.message)?;
            }
            return Err(failure);
        }
    };
    if asked == Asked::ByTime && xact::worker(|| storages::reach(storage_id))?.waiting {
        return Ok(0);
    }
    owner::look(&remote)?;
    if xact::worker(|| rebuild::is_rebuilding(storage_id))? {
        // What counts there is not known before that is through.
        return Ok(0);
    }
    let abandoned = abandoned(storage_id, &remote)?;
    // Before files go: that they do not count any more.
    match asked {
        Asked::ByCall => describe::storage(storage_id)?,
        Asked::ByTime => describe::try_storage(storage_id)?,
    }
    Ok(abandoned + out_of_use(storage_id, Some(&remote), asked)?)
}

/// Compares a storage with the manifest if it is time. That takes as long as the storage is large: callers who wait for what is
/// due do not wait for it.
fn compare(storage_id: i32) -> std::result::Result<(), Failure> {
    let check_s = CHECK_INTERVAL.as_secs_f64();
    if !xact::worker(|| storages::check_is_due(storage_id, check_s))? {
        return Ok(());
    }
    // What is wrong with it is told by whoever deletes.
    let Ok(Some(remote)) = Remote::open(storage_id) else {
        return Ok(());
    };
    if xact::worker(|| storages::reach(storage_id))?.waiting {
        return Ok(());
    }
    if xact::worker(|| rebuild::is_rebuilding(storage_id))? {
        return Ok(());
    }
    check::storage(storage_id, Some(&remote), check::Depth::Listing).map(drop)
}

/// Deletes what was announced and never entered the manifest.
fn abandoned(storage_id: i32, remote: &Remote) -> std::result::Result<u64, Failure> {
    let mut deleted = 0;
    let mut allowed = None;
    for (path, collection_id) in xact::worker(|| manifest::intents(View::Current, storage_id))? {
        wait::check_interrupts();
        // A running flush or compaction holds its collection: what it announced is not garbage.
        let Some(_quiet) = SessionLock::try_take(LockOn::Compaction(collection_id)) else {
            continue;
        };
        let Some(_idle) = SessionLock::try_take(LockOn::CollectionJob(collection_id)) else {
            continue;
        };
        // Read again under the lock: the flush may have committed since.
        if !xact::worker(|| manifest::has_intent(storage_id, &path))? {
            continue;
        }
        if allowed.is_none() {
            allowed = Some(owner::may_delete(remote)?);
        }
        if allowed != Some(true) {
            break;
        }
        remote.discard(&path)?;
        cache::forget(storage_id, &path);
        failpoint::hit("gc.after_object");
        xact::worker(|| manifest::delete_intent(storage_id, &path))?;
        deleted += 1;
    }
    Ok(deleted)
}

/// Deletes what is out of use, and what a comparison found that nobody knows.
fn out_of_use(
    storage_id: i32,
    remote: Option<&Remote>,
    asked: Asked,
) -> std::result::Result<u64, Failure> {
    let deleted = deferred(storage_id, remote, false)?;
    // While files are being attached nobody knows yet which of them are somebody's.
    let lock = LockOn::Orphans(storage_id);
    let _still = match asked {
        Asked::ByCall => SessionLock::take(lock),
        Asked::ByTime => match SessionLock::try_take(lock) {
            Some(lock) => lock,
            None => return Ok(deleted),
        },
    };
    Ok(deleted + deferred(storage_id, remote, true)?)
}

/// Deletes what is out of use before the horizon and for longer than the retention, or the orphans that still are some.
fn deferred(
    storage_id: i32,
    remote: Option<&Remote>,
    orphans: bool,
) -> std::result::Result<u64, Failure> {
    let mut deleted = 0;
    loop {
        wait::check_interrupts();
        let paths = xact::worker(|| {
            if rebuild::is_rebuilding(storage_id)? {
                return Ok(None);
            }
            let retention_s = guc::file_retention().as_secs_f64();
            let since = (horizon(), retention_s);
            let queued = manifest::deferred_due(View::Current, storage_id, orphans, since, BATCH)?;
            if queued.is_empty() {
                return Ok(None);
            }
            // What took them out of use must not come back by a crash, whatever synchronous_commit is.
            xact::settle();
            if orphans {
                orphans::unqueue(storage_id, &queued).map(Some)
            } else {
                Ok(Some(queued))
            }
        })?;
        let Some(paths) = paths else {
            return Ok(deleted);
        };
        if paths.is_empty() {
            continue;
        }
        if let Some(remote) = remote {
            if !owner::may_delete(remote)? {
                return Ok(deleted);
            }
            remote.delete_all(&paths)?;
            for path in &paths {
                cache::forget(storage_id, path);
            }
            failpoint::hit("gc.after_object");
        }
        let forget = || {
            manifest::delete_deferred(storage_id, &paths)?;
            storages::forget_problems(storage_id, &paths)
        };
        match remote {
            Some(_) => xact::worker(forget)?,
            None => {
                let forgotten = xact::in_passing(|| {
                    for path in &paths {
                        manifest::delete_object(path)?;
                    }
                    forget()
                })?;
                // Somebody drops the project of one of them.
                if forgotten.is_none() {
                    return Ok(deleted);
                }
            }
        }
        deleted += paths.len() as u64;
    }
}
