//! Projects: the SQL functions that create and drop them, their keys, acting by key. Start at
//! [`create_project`]. The functions on which the row-level policies rest are in [`access`].

mod access;
mod keys;
pub mod objects;
mod schemas;
mod settings;
mod values;

use pgrx::iter::TableIterator;
use pgrx::{default, name, pg_extern};
use rakam_event::names::ProjectName;

use crate::catalog::projects::{self as catalog, KeyKind, Right};
use crate::catalog::{audit, rebuild, restore};
use crate::catalog::{sources, track};
use crate::pg::locks::{self, LockOn, SessionLock};
use crate::pg::security::{self, ActAs};
use crate::pg::spi::View;
use crate::pg::{ErrorReport, PgError, Result, activity, guc, not_null, roles, wake, xact};
use keys::KeySet;

/// Creates a project: schema, roles, users table, `_all`, one key set, which is shown this once.
/// SQL: `rakam.create_project(name text, storage text DEFAULT NULL)`.
/// Errors: 42501 neither superuser nor rakam_admin, 42602 / 42939 the name is not usable / reserved, 42710 it
/// exists (project, schema or role), 42704 no such storage, 0A000 a kind of storage that is not supported.
#[pg_extern(volatile, parallel_unsafe)]
#[allow(clippy::type_complexity, reason = "the shape of a SQL table")]
fn create_project(
    name: Option<&str>,
    storage: default!(Option<&str>, "NULL"),
) -> std::result::Result<
    TableIterator<
        'static,
        (
            name!(project, String),
            name!(key_id, pgrx::Uuid),
            name!(read_key, String),
            name!(write_key, String),
            name!(master_key, String),
        ),
    >,
    ErrorReport,
> {
    let (project, keys) = audit::call("create_project", name, storage, || {
        create(not_null(name, "name")?, storage)
    })?;
    Ok(TableIterator::once((
        project,
        keys.id,
        keys.read,
        keys.write,
        keys.master,
    )))
}

fn create(name: &str, storage: Option<&str>) -> Result<(String, KeySet)> {
    ensure_server_admin("create a project")?;
    xact::ensure_writable("create a project")?;
    let name = ProjectName::parse(name)?;
    let caller = security::current_user();
    let _owner = ActAs::owner();
    restore::ensure_over()?;
    let storage_id = match storage {
        None => objects::DEFAULT_STORAGE_ID,
        Some(storage) => objects::storage(storage, caller)?,
    };
    let project_id = objects::create(name.as_str(), storage_id)?;
    let keys = keys::create(project_id)?;
    Ok((name.as_str().to_owned(), keys))
}

/// Drops a project with everything in it. SQL: `rakam.drop_project(name text)`.
/// Errors: 42501 no such project or neither superuser nor rakam_admin, 55000 `rakam.allow_project_drop` is off, or the
/// transaction is REPEATABLE READ or SERIALIZABLE.
#[pg_extern(volatile, parallel_unsafe)]
fn drop_project(name: Option<&str>) -> std::result::Result<(), ErrorReport> {
    Ok(audit::call("drop_project", name, None, || {
        drop_by_name(not_null(name, "name")?)
    })?)
}

fn drop_by_name(name: &str) -> Result<()> {
    ensure_server_admin("drop a project")?;
    xact::ensure_writable("drop a project")?;
    let project = catalog::by_name(name)?.ok_or_else(|| PgError::no_project(name))?;
    if xact::keeps_snapshot() {
        // What others have stored since its snapshot would stay.
        return Err(PgError::new(
            "55000",
            format!(
                "cannot drop project \"{}\" with this isolation level",
                project.name
            ),
        )
        .hint("Call it in a transaction with ISOLATION LEVEL READ COMMITTED."));
    }
    if !guc::allow_project_drop() {
        return Err(
            PgError::new("55000", format!("cannot drop project \"{}\"", project.name))
                .detail("All its events, in every tier, would be deleted.")
                .hint("Set rakam.allow_project_drop to on first."),
        );
    }
    let _owner = ActAs::owner();
    restore::ensure_over()?;
    rebuild::ensure_over(project.storage_id)?;
    // No digest or flush may add rows behind the deletion: from now on they pass this project over, and what is under way is
    // awaited. Nothing that others need is held to the end of the transaction, which may be far.
    locks::transaction(LockOn::Project(project.id));
    drop(SessionLock::take(LockOn::Digest));
    if catalog::by_name(&project.name)?.is_none_or(|now| now.id != project.id) {
        // Somebody else was dropping it.
        return Err(PgError::no_project(name));
    }
    for collection in catalog::collection_ids(project.id)? {
        locks::transaction(LockOn::Manifest(collection));
    }
    track::drop_triggers(&project.name, None)?;
    // Before the rows: what somebody inserts, or a consumer stores, just now is there before they are deleted.
    objects::drop(&project)?;
    sources::drop(project.id, None)?;
    wake::sources_at_commit();
    catalog::delete(project.id)
}

/// Makes the roles of projects that are missing, with the privileges that they have from the start on tables of rakam, and
/// gives these back to roles that have lost them; members and other privileges come back with `pg_dumpall -g` only. Returns which.
/// SQL: `rakam.repair_roles() → TABLE(project text, role text)`.
/// Errors: 42501 neither superuser nor rakam_admin, 42710 somebody else has made a role of that name.
#[pg_extern(volatile, parallel_unsafe)]
#[allow(clippy::type_complexity, reason = "the shape of a SQL table")]
fn repair_roles() -> std::result::Result<
    TableIterator<'static, (name!(project, String), name!(role, String))>,
    ErrorReport,
> {
    let repaired = audit::call("repair_roles", None, None, || {
        ensure_server_admin("repair roles")?;
        xact::ensure_writable("repair roles")?;
        let _owner = ActAs::owner();
        let mut repaired = Vec::new();
        for project in catalog::lacking_roles(View::Current)? {
            let made = objects::repair(&project)?;
            repaired.extend(made.into_iter().map(|role| (project.name.clone(), role)));
        }
        Ok(repaired)
    })?;
    Ok(TableIterator::new(repaired))
}

/// Makes another key set of a project. SQL: `rakam.create_keys(project text)`.
/// Errors: 42501 no such project or not its admin.
#[pg_extern(volatile, parallel_unsafe)]
#[allow(clippy::type_complexity, reason = "the shape of a SQL table")]
fn create_keys(
    project: Option<&str>,
) -> std::result::Result<
    TableIterator<
        'static,
        (
            name!(key_id, pgrx::Uuid),
            name!(read_key, String),
            name!(write_key, String),
            name!(master_key, String),
        ),
    >,
    ErrorReport,
> {
    let keys = audit::call("create_keys", project, None, || {
        new_keys(not_null(project, "project")?)
    })?;
    Ok(TableIterator::once((
        keys.id,
        keys.read,
        keys.write,
        keys.master,
    )))
}

fn new_keys(project: &str) -> Result<KeySet> {
    xact::ensure_writable("create keys")?;
    let project = catalog::authorize(project, Right::Admin)?;
    let _owner = ActAs::owner();
    keys::create(project.id)
}

/// Revokes a key set, at once and for every session. SQL: `rakam.revoke_keys(project text, key_id uuid)`.
/// Errors: 42501 no such project or not its admin, 42704 no such key set in it.
#[pg_extern(volatile, parallel_unsafe)]
fn revoke_keys(
    project: Option<&str>,
    key_id: Option<pgrx::Uuid>,
) -> std::result::Result<(), ErrorReport> {
    let object = key_id.map(|id| id.to_string());
    Ok(audit::call(
        "revoke_keys",
        project,
        object.as_deref(),
        || revoke(not_null(project, "project")?, not_null(key_id, "key_id")?),
    )?)
}

fn revoke(project: &str, key_id: pgrx::Uuid) -> Result<()> {
    xact::ensure_writable("revoke keys")?;
    let project = catalog::authorize(project, Right::Admin)?;
    let _owner = ActAs::owner();
    if catalog::revoke_keys(project.id, key_id)? == 0 {
        return Err(
            PgError::new("42704", format!("key \"{key_id}\" does not exist"))
                .hint("The view rakam.keys lists a project's keys."),
        );
    }
    Ok(())
}

/// Becomes the role that the key stands for, as SET LOCAL ROLE does (SET ROLE with `local => false`).
/// SQL: `rakam.authenticate(key text, local boolean DEFAULT true)`.
/// Errors: 28000 unknown or revoked key, 42501 inside a security-definer function.
#[pg_extern(volatile, parallel_unsafe)]
fn authenticate(
    key: Option<&str>,
    local: default!(Option<bool>, "true"),
) -> std::result::Result<(), ErrorReport> {
    Ok(become_role_of(
        not_null(key, "key")?,
        not_null(local, "local")?,
    )?)
}

fn become_role_of(key: &str, local: bool) -> Result<()> {
    activity::hide(key);
    let key = catalog::key(key)?;
    let role = match key.kind {
        KeyKind::Read => key.project.read_role,
        KeyKind::Write => key.project.write_role,
        KeyKind::Master => key.project.admin_role,
    };
    let name = roles::name(role).ok_or_else(|| {
        PgError::new(
            "42704",
            format!(
                "role of project \"{}\" for {} keys does not exist",
                key.project.name,
                key.kind.name()
            ),
        )
    })?;
    roles::set(&name, local)
}

fn ensure_server_admin(what: &str) -> Result<()> {
    if security::is_server_admin(security::current_user()) {
        return Ok(());
    }
    Err(
        PgError::new("42501", format!("permission denied to {what}"))
            .hint("Superusers and members of rakam_admin may do it."),
    )
}
