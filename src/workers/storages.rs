//! `rakam.check_storage` and `rakam.adopt_storage`: they ask the storage itself, so a task worker does it.

use pgrx::pg_sys::panic::ErrorReport;
use pgrx::prelude::*;

use super::task::{self, Task};
use crate::catalog::{audit, description, rebuild, storages};
use crate::pg::locks::{LockOn, SessionLock};
use crate::pg::security::{self, ActAs};
use crate::pg::snapshot::Registered;
use crate::pg::spi::View;
use crate::pg::xact::{self, Failure};
use crate::pg::{PgError, Result, not_null};
use crate::tiers::check::Depth;
use crate::tiers::object::Remote;
use crate::tiers::{check, describe, owner};

/// Compares a storage with the manifest, now: data files that are missing, objects that nobody knows, files whose size or
/// metadata is not what was written. Orphans are queued for deletion, if the storage is this database's.
/// SQL: `rakam.check_storage(storage text) → TABLE(path text, problem text, bytes bigint)`; `bytes`: of a missing file as
/// written, else as found.
/// Errors: 42501 neither superuser nor rakam_admin, 42704 no such storage, 58030 it cannot be reached.
#[pg_extern(volatile, parallel_unsafe)]
#[allow(clippy::type_complexity, reason = "the shape of a SQL table")]
fn check_storage(
    storage: Option<&str>,
) -> std::result::Result<
    TableIterator<
        'static,
        (
            name!(path, String),
            name!(problem, String),
            name!(bytes, i64),
        ),
    >,
    ErrorReport,
> {
    let storage_id = audit::at_once("check_storage", None, storage, |note| {
        let storage_id = permitted(storage, "check")?;
        task::run_noted(Task::CheckStorage { storage_id }, note)?;
        Ok(storage_id)
    })?;
    let _owner = ActAs::owner();
    let latest = Registered::latest();
    let rows = storages::problems(View::Under(latest.get()), storage_id)?;
    Ok(TableIterator::new(rows))
}

/// Makes a storage this database's: from now on it deletes there what it does not need any more, and whoever owned it does
/// not. SQL: `rakam.adopt_storage(storage text)`.
/// Errors: as [`check_storage`]; 0A000 the store has no conditional writes, 40001 somebody adopted it at the same moment, 55000
/// its catalog is being rebuilt.
#[pg_extern(volatile, parallel_unsafe)]
fn adopt_storage(storage: Option<&str>) -> std::result::Result<(), ErrorReport> {
    Ok(audit::at_once("adopt_storage", None, storage, |note| {
        let storage_id = permitted(storage, "adopt")?;
        task::run_noted(Task::AdoptStorage { storage_id }, note)?;
        Ok(())
    })?)
}

/// The storage, if the caller may do this with it.
fn permitted(storage: Option<&str>, what: &str) -> Result<i32> {
    let name = not_null(storage, "storage")?;
    if !security::is_server_admin(security::current_user()) {
        return Err(
            PgError::new("42501", format!("permission denied to {what} a storage"))
                .hint("Superusers and members of rakam_admin may do it."),
        );
    }
    let _owner = ActAs::owner();
    storages::named(name)?.ok_or_else(|| {
        PgError::new("42704", format!("storage \"{name}\" does not exist")).hint(
            "A foreign server becomes a storage with the first project that is created on it.",
        )
    })
}

/// In the task worker.
pub fn check(storage_id: i32) -> std::result::Result<(), Failure> {
    let remote = Remote::open(storage_id)?;
    check::storage(storage_id, remote.as_ref(), Depth::Footers)
}

/// In the task worker.
pub fn adopt(storage_id: i32) -> std::result::Result<(), Failure> {
    let Some(remote) = Remote::open(storage_id)? else {
        // The default storage is a part of the database: it is nobody else's.
        return Ok(());
    };
    let _lock = SessionLock::take(LockOn::Gc(storage_id));
    xact::worker(|| rebuild::ensure_over(storage_id))?;
    owner::adopt(&remote)?;
    // What the storage says of itself is somebody else's word until this database has said everything.
    xact::worker(|| description::begin_anew(storage_id))?;
    describe::storage(storage_id)
}
