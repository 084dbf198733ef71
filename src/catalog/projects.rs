//! Projects, their keys and storages, and who may do what: the authority for every function that takes a
//! project's name.
//!
//! Look-ups answer what is committed now, whatever the caller's snapshot, through a per-backend cache that
//! [`invalidation`] keeps honest: a revoked key or a dropped project is gone at the very next call.

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, HashSet};
use std::rc::Rc;

use pgrx::datum::Interval;
use sha2::{Digest, Sha256};

use super::outbox;
use crate::pg::security::{self, ActAs};
use crate::pg::snapshot::{Registered, Snapshot};
use crate::pg::spi::{self, View, arg};
use crate::pg::{INVALID_OID, Oid, PgError, Result, invalidation, relation, roles, undo};

/// Entries of a kind after which the cache starts anew.
const CACHE_ENTRIES_MAX: usize = 10_000;

/// A project, as far as rights and writing need it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Project {
    pub id: i32,
    pub name: String,
    pub read_role: Oid,
    pub write_role: Oid,
    pub admin_role: Oid,
    pub storage_id: i32,
    /// Where what is collected goes; None: into the inbox.
    pub event_store_id: Option<i32>,
    /// Whether its fields and collections are fixed: for roles other than its admin.
    pub is_fixed: bool,
    pub quota: Quota,
    /// The names of its attached tables, which no collection may have.
    pub attached: HashSet<String>,
}

/// What a project may send and have; None: no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Quota {
    pub events_per_second: Option<i64>,
    pub bytes_per_day: Option<i64>,
    pub collections: Option<i32>,
    /// Of all collections together.
    pub fields: Option<i32>,
}

/// What a caller wants to do in a project.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Right {
    /// Query: the roles read and admin.
    Read,
    /// Collect: the roles write and admin.
    Write,
    /// Change definitions: the role admin.
    Admin,
    /// Anything that every member may: the roles read, write and admin.
    Member,
}

impl Project {
    /// Whether the user has the privileges of a role with this right; superusers have.
    pub fn allows(&self, user: Oid, right: Right) -> bool {
        let roles: &[Oid] = match right {
            Right::Read => &[self.read_role, self.admin_role],
            Right::Write => &[self.write_role, self.admin_role],
            Right::Admin => &[self.admin_role],
            Right::Member => &[self.read_role, self.write_role, self.admin_role],
        };
        roles
            .iter()
            .any(|&role| security::has_privileges_of(user, role))
            || security::is_superuser(user)
    }

    /// Errors (55000) if the running transaction has made the project: workers do not see it yet.
    pub fn ensure_committed(&self) -> Result<()> {
        if MADE.with_borrow(|made| !made.contains(&self.id)) {
            return Ok(());
        }
        Err(PgError::new(
            "55000",
            format!("project \"{}\" is not committed yet", self.name),
        )
        .detail("The call works in a background worker, which sees what is committed.")
        .hint("Commit the transaction that creates the project first."))
    }

    /// The project as its admin finds it: nothing is fixed.
    pub fn for_admin(self: Rc<Self>) -> Rc<Self> {
        if !self.is_fixed {
            return self;
        }
        Rc::new(Self {
            is_fixed: false,
            ..Self::clone(&self)
        })
    }
}

/// The project of this name, if the effective user has the right; one error for unknown and forbidden.
pub fn authorize(name: &str, right: Right) -> Result<Rc<Project>> {
    by_name(name)?
        .filter(|project| project.allows(security::current_user(), right))
        .ok_or_else(|| PgError::no_project(name))
}

/// As [`authorize`], for work in a worker, which sees what is committed: 55000 if this transaction has made the project.
pub fn authorize_committed(name: &str, right: Right) -> Result<Rc<Project>> {
    let project = authorize(name, right)?;
    project.ensure_committed()?;
    Ok(project)
}

/// The project of this name, in any case of its letters.
pub fn by_name(name: &str) -> Result<Option<Rc<Project>>> {
    if name.bytes().any(|b| b.is_ascii_uppercase()) {
        return by_name(&name.to_ascii_lowercase());
    }
    cached(
        |cache| cache.projects.get(name).cloned(),
        |view| load_project(view, name).map(|found| found.map(Rc::new)),
        |cache, project| limited(&mut cache.projects).insert(name.to_owned(), project),
    )
}

/// The id of a collection; 0 while it is not registered.
pub fn collection_id(project_id: i32, name: &str) -> Result<i32> {
    let found = cached(
        |cache| cache.collections.get(&project_id)?.get(name).copied(),
        |view| {
            let id = spi::first(
                view,
                "SELECT collection_id FROM rakam_internal.collection WHERE project_id = $1 AND name = $2",
                &[arg(project_id), arg(name)],
                |row| row.must(1),
            )?;
            Ok(Some(id.unwrap_or(0)))
        },
        |cache, id| {
            limited(
                limited(&mut cache.collections)
                    .entry(project_id)
                    .or_default(),
            )
            .insert(name.to_owned(), id)
        },
    )?;
    Ok(found.unwrap_or(0))
}

/// The names of a collection's fields, for asking whether one is there. A name that is missing may be new since: ask
/// [`fields_now`] before it matters.
pub fn fields(collection_id: i32) -> Result<Rc<FieldNames>> {
    let found = cached(
        |cache| cache.fields.get(&collection_id).cloned(),
        |view| load_fields(view, collection_id).map(Some),
        |cache, names| limited(&mut cache.fields).insert(collection_id, names),
    )?;
    Ok(found.unwrap_or_default())
}

/// As [`fields`], read now.
pub fn fields_now(collection_id: i32) -> Result<Rc<FieldNames>> {
    let before = invalidation::generation();
    let names = {
        let _owner = ActAs::owner();
        let latest = Registered::latest();
        load_fields(View::Under(latest.get()), collection_id)?
    };
    if invalidation::generation() == before {
        at_generation(before, |cache| {
            limited(&mut cache.fields).insert(collection_id, Rc::clone(&names));
        });
    }
    Ok(names)
}

fn load_fields(view: View, collection_id: i32) -> Result<Rc<FieldNames>> {
    let names = spi::query(
        view,
        "SELECT name FROM rakam_internal.field WHERE collection_id = $1",
        &[arg(collection_id)],
        |row| row.must(1),
    )?;
    Ok(Rc::new(names.into_iter().collect()))
}

/// Tells every session, at commit, that fields were dropped: [`fields`] is not to name them any more.
pub fn announce_dropped_fields() {
    invalidation::announce(relation::oid("rakam_internal", "collection"));
}

/// What a key is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeyKind {
    Read,
    Write,
    Master,
}

impl KeyKind {
    pub const ALL: [Self; 3] = [Self::Read, Self::Write, Self::Master];

    pub fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Master => "master",
        }
    }
}

/// A valid key's project and kind.
#[derive(Debug, Clone)]
pub struct Key {
    pub kind: KeyKind,
    pub project: Rc<Project>,
}

/// What is stored of a key.
pub fn key_hash(key: &str) -> [u8; 32] {
    Sha256::digest(key.as_bytes()).into()
}

/// The key with this text; 28000 if it is unknown or revoked.
pub fn key(text: &str) -> Result<Key> {
    let hash = key_hash(text);
    let found = cached(
        |cache| cache.keys.get(&hash).cloned(),
        |view| {
            spi::first(
                view,
                "SELECT p.project_id, p.name, p.read_role, p.write_role, p.admin_role, p.storage_id,
                        p.schema_mode = 'fixed', p.events_per_second, p.bytes_per_day, p.collections_max, p.fields_max,
                        ARRAY(SELECT a.name FROM rakam_internal.attached_table a WHERE a.project_id = p.project_id),
                        p.event_store_id, k.kind
                 FROM rakam_internal.api_key k JOIN rakam_internal.project p USING (project_id)
                 WHERE k.hash = $1 AND k.revoked_at IS NULL",
                &[arg(hash.as_slice())],
                |row| {
                    let kind: String = row.must(14)?;
                    Ok(Key {
                        kind: KeyKind::ALL
                            .into_iter()
                            .find(|k| k.name() == kind)
                            .ok_or_else(|| PgError::internal("unknown kind of key"))?,
                        project: Rc::new(project_row(row)?),
                    })
                },
            )
        },
        |cache, key| limited(&mut cache.keys).insert(hash, key),
    )?;
    found.ok_or_else(|| {
        PgError::new("28000", "key is unknown or revoked")
            .hint("Ask the project's admin for a key: rakam.create_keys makes new ones.")
    })
}

/// Which projects a role sees.
#[derive(Debug, Clone, Default)]
pub struct Scope {
    /// By the roles read and admin.
    pub readable: Vec<i32>,
    /// By any of the three roles.
    pub member: Vec<i32>,
}

/// The projects of the effective user; of one whom row-level security does not bind, all.
pub fn scope() -> Result<Rc<Scope>> {
    let user = security::current_user();
    if invalidation::in_parallel_mode() {
        // No new snapshot can be taken there.
        let _owner = ActAs::owner();
        return Ok(Rc::new(load_scope(View::Under(Snapshot::active()), user)?));
    }
    let scope = cached(
        |cache| cache.scopes.get(&user).cloned(),
        |view| load_scope(view, user).map(|scope| Some(Rc::new(scope))),
        |cache, scope| limited(&mut cache.scopes).insert(user, scope),
    )?;
    Ok(scope.unwrap_or_default())
}

/// The projects that the effective user administers. Asked by rare calls: not cached.
pub fn administered() -> Result<Vec<i32>> {
    let roles = roles::inherited(security::current_user());
    let _owner = ActAs::owner();
    let latest = Registered::latest();
    spi::query(
        View::Under(latest.get()),
        "SELECT project_id FROM rakam_internal.project WHERE admin_role = ANY ($1)",
        &[arg(roles)],
        |row| row.must(1),
    )
}

fn load_scope(view: View, user: Oid) -> Result<Scope> {
    let mut scope = Scope::default();
    let mut add = |row: &spi::Row| {
        let id = row.must(1)?;
        scope.member.push(id);
        if row.must(2)? {
            scope.readable.push(id);
        }
        Ok(())
    };
    if roles::bypasses_rls(user) {
        spi::run(
            view,
            "SELECT project_id, true FROM rakam_internal.project",
            &[],
            &mut add,
        )?;
    } else {
        // By index from the user's roles, never a loop over all projects.
        spi::run(
            view,
            "SELECT project_id, coalesce(read_role = ANY ($1), false) OR coalesce(admin_role = ANY ($1), false)
             FROM rakam_internal.project
             WHERE read_role = ANY ($1) OR write_role = ANY ($1) OR admin_role = ANY ($1)",
            &[arg(roles::inherited(user))],
            &mut add,
        )?;
    }
    Ok(scope)
}

fn project_row(row: &spi::Row) -> Result<Project> {
    Ok(Project {
        id: row.must(1)?,
        name: row.must(2)?,
        read_role: row.oid(3).unwrap_or(INVALID_OID),
        write_role: row.oid(4).unwrap_or(INVALID_OID),
        admin_role: row.oid(5).unwrap_or(INVALID_OID),
        storage_id: row.must(6)?,
        is_fixed: row.must(7)?,
        quota: Quota {
            events_per_second: row.get(8),
            bytes_per_day: row.get(9),
            collections: row.get(10),
            fields: row.get(11),
        },
        attached: row.must::<Vec<String>>(12)?.into_iter().collect(),
        event_store_id: row.get(13),
    })
}

fn load_project(view: View, name: &str) -> Result<Option<Project>> {
    spi::first(
        view,
        "SELECT project_id, name, read_role, write_role, admin_role, storage_id, schema_mode = 'fixed',
                events_per_second, bytes_per_day, collections_max, fields_max,
                ARRAY(SELECT a.name FROM rakam_internal.attached_table a WHERE a.project_id = p.project_id), event_store_id
         FROM rakam_internal.project p WHERE name = $1",
        &[arg(name)],
        project_row,
    )
}

/// What was loaded while the invalidation's generation was `generation`.
#[derive(Default)]
struct Cache {
    generation: u64,
    projects: HashMap<String, Rc<Project>>,
    collections: HashMap<i32, HashMap<String, i32>>,
    keys: HashMap<[u8; 32], Key>,
    scopes: HashMap<Oid, Rc<Scope>>,
    fields: HashMap<i32, Rc<FieldNames>>,
}

/// Names of fields.
pub type FieldNames = HashSet<String>;

thread_local! {
    static CACHE: RefCell<Cache> = RefCell::new(Cache::default());
}

fn at_generation<T>(generation: u64, f: impl FnOnce(&mut Cache) -> T) -> T {
    CACHE.with_borrow_mut(|cache| {
        if cache.generation != generation {
            *cache = Cache {
                generation,
                ..Cache::default()
            };
        }
        f(cache)
    })
}

/// From the cache, or loaded as the owner under a latest snapshot. What is not there is not cached.
fn cached<V: Clone, O>(
    get: impl FnOnce(&Cache) -> Option<V>,
    load: impl FnOnce(View) -> Result<Option<V>>,
    put: impl FnOnce(&mut Cache, V) -> O,
) -> Result<Option<V>> {
    if let Some(value) = at_generation(invalidation::generation(), |cache| get(cache)) {
        return Ok(Some(value));
    }
    for table in ["project", "collection", "api_key", "attached_table"] {
        invalidation::watch(relation::oid("rakam_internal", table));
    }
    let before = invalidation::generation();
    let value = {
        let _owner = ActAs::owner();
        let latest = Registered::latest();
        load(View::Under(latest.get()))?
    };
    if let Some(value) = &value
        && invalidation::generation() == before
    {
        at_generation(before, |cache| put(cache, value.clone()));
    }
    Ok(value)
}

fn limited<K, V>(map: &mut HashMap<K, V>) -> &mut HashMap<K, V> {
    if map.len() >= CACHE_ENTRIES_MAX {
        map.clear();
    }
    map
}

thread_local! {
    /// The projects that the running transaction has made.
    static MADE: RefCell<HashSet<i32>> = RefCell::default();
}

/// Registers a project without roles. None: the name is taken.
pub fn insert(name: &str, storage_id: i32) -> Result<Option<i32>> {
    let made: Option<i32> = spi::first(
        View::Current,
        "INSERT INTO rakam_internal.project (name, storage_id) VALUES ($1, $2)
         ON CONFLICT (name) DO NOTHING RETURNING project_id",
        &[arg(name), arg(storage_id)],
        |row| row.must(1),
    )?;
    if let Some(id) = made {
        MADE.with_borrow_mut(|made| made.insert(id));
        undo::at_end(move |_| MADE.with_borrow_mut(|made| made.retain(|other| *other != id)));
    }
    Ok(made)
}

/// Notes the project's roles, which exist by now.
pub fn set_roles(project_id: i32, read: &str, write: &str, admin: &str) -> Result<()> {
    spi::execute(
        "UPDATE rakam_internal.project
         SET read_role_name = $2, write_role_name = $3, admin_role_name = $4, lost_roles = NULL WHERE project_id = $1",
        &[arg(project_id), arg(read), arg(write), arg(admin)],
    )?;
    Ok(())
}

/// A project that lacks a role or what its roles may do, with the names of its roles for reading, writing and administration.
pub struct Lacking {
    pub project_id: i32,
    pub name: String,
    pub roles: [String; 3],
    /// Roles that are there and have lost what they may do.
    pub robbed: Vec<String>,
}

/// The projects of which a role is not there (any more), or has lost what it may do: DROP OWNED BY takes everything, so that
/// the right to use the schema tells.
pub fn lacking_roles(view: View) -> Result<Vec<Lacking>> {
    spi::query(
        view,
        "SELECT project_id, name, read_role_name, write_role_name, admin_role_name, r.robbed
         FROM rakam_internal.project p, LATERAL (
           SELECT count(*) AS there,
                  pg_catalog.array_agg(r.rolname::text) FILTER (
                    WHERE NOT pg_catalog.has_schema_privilege(r.oid, n.oid, 'USAGE')) AS robbed
           FROM pg_catalog.pg_roles r LEFT JOIN pg_catalog.pg_namespace n ON n.nspname = p.name
           WHERE r.oid IN (p.read_role, p.write_role, p.admin_role)) r
         WHERE (r.there < 3 OR r.robbed IS NOT NULL)
           AND (read_role_name || write_role_name || admin_role_name) IS NOT NULL
         ORDER BY name",
        &[],
        |row| {
            Ok(Lacking {
                project_id: row.must(1)?,
                name: row.must(2)?,
                roles: [row.must(3)?, row.must(4)?, row.must(5)?],
                robbed: row.get(6).unwrap_or_default(),
            })
        },
    )
}

thread_local! {
    /// The [`invalidation::generation`] up to which the names of roles were looked at.
    static NAMED: Cell<Option<u64>> = const { Cell::new(None) };
}

/// Notes the present names of roles that were renamed, and which are gone: a dump has the names. Costs nothing where no role has
/// changed. A project that somebody else is changing is left for the next time.
pub fn follow_renamed_roles() -> Result<()> {
    invalidation::watch(relation::oid("rakam_internal", "project"));
    let now = invalidation::generation();
    if NAMED.get() == Some(now) {
        return Ok(());
    }
    // Renamed or gone.
    macro_rules! changed {
        () => {
            "EXISTS (SELECT FROM (VALUES (p.read_role, p.read_role_name), (p.write_role, p.write_role_name),
                                         (p.admin_role, p.admin_role_name)) v (role, name)
                     LEFT JOIN pg_catalog.pg_roles r ON r.oid = v.role
                     WHERE v.role IS NOT NULL AND r.rolname IS DISTINCT FROM v.name)"
        };
    }
    spi::execute(
        concat!(
            "UPDATE rakam_internal.project SET name = name WHERE project_id = ANY (ARRAY(
               SELECT project_id FROM rakam_internal.project p WHERE ",
            changed!(),
            " FOR NO KEY UPDATE SKIP LOCKED))"
        ),
        &[],
    )?;
    let is_left = spi::run(
        View::Current,
        concat!(
            "SELECT FROM rakam_internal.project p WHERE ",
            changed!(),
            " LIMIT 1"
        ),
        &[],
        |_| Ok(()),
    )? > 0;
    if !is_left {
        NAMED.set(Some(now));
    }
    Ok(())
}

/// Sets a project's quota.
pub fn set_quota(project_id: i32, quota: &Quota) -> Result<()> {
    spi::execute(
        "UPDATE rakam_internal.project
         SET events_per_second = $2, bytes_per_day = $3, collections_max = $4, fields_max = $5 WHERE project_id = $1",
        &[
            arg(project_id),
            arg(quota.events_per_second),
            arg(quota.bytes_per_day),
            arg(quota.collections),
            arg(quota.fields),
        ],
    )?;
    Ok(())
}

/// Sets whether new fields and collections are taken from the write role: `open` or `fixed`.
pub fn set_schema_mode(project_id: i32, mode: &str) -> Result<()> {
    spi::execute(
        "UPDATE rakam_internal.project SET schema_mode = $2 WHERE project_id = $1",
        &[arg(project_id), arg(mode)],
    )?;
    Ok(())
}

/// Sets the bounds of `_time`, relative to the time of receipt. False: they are negative, or beyond 10,000 years.
pub fn set_time_bounds(project_id: i32, past: Interval, future: Interval) -> Result<bool> {
    Ok(spi::execute(
        "UPDATE rakam_internal.project SET time_past = $2, time_future = $3
         WHERE project_id = $1 AND $2 BETWEEN interval '0' AND interval '10000 years'
           AND $3 BETWEEN interval '0' AND interval '10000 years'",
        &[arg(project_id), arg(past), arg(future)],
    )? > 0)
}

/// The ids of a project's collections, in order.
pub fn collection_ids(project_id: i32) -> Result<Vec<i32>> {
    spi::query(
        View::Current,
        "SELECT collection_id FROM rakam_internal.collection WHERE project_id = $1 ORDER BY 1",
        &[arg(project_id)],
        |row| row.must(1),
    )
}

/// Removes every row of a project. Objects outside of this database are queued for deletion; un-digested
/// events are dropped by the digest, which finds no project for them.
pub fn delete(project_id: i32) -> Result<()> {
    let id = [arg(project_id)];
    // Whoever stores chunks of them is awaited, and comes after them no more.
    spi::execute(
        "SELECT FROM rakam_internal.collection WHERE project_id = $1 ORDER BY collection_id FOR UPDATE",
        &id,
    )?;
    spi::execute(
        "INSERT INTO rakam_internal.file_deferred (storage_id, path, project_id, reason)
         SELECT f.storage_id, f.path, f.project_id, 'project dropped'
         FROM rakam_internal.data_file f JOIN rakam_internal.storage s USING (storage_id)
         WHERE f.project_id = $1 AND s.kind <> 'local' ON CONFLICT DO NOTHING",
        &id,
    )?;
    outbox::forget_project(project_id)?;
    for statement in [
        "DELETE FROM rakam_internal.hot_chunk WHERE project_id = $1",
        "DELETE FROM rakam_internal.data_file WHERE project_id = $1",
        "DELETE FROM rakam_internal.local_object WHERE project_id = $1",
        "DELETE FROM rakam_internal.id_run WHERE project_id = $1",
        "DELETE FROM rakam_internal.manifest_log WHERE project_id = $1",
        "DELETE FROM rakam_internal.inbox_lag WHERE project_id = $1",
        "DELETE FROM rakam_internal.inbox_parked WHERE project_id = $1",
        "DELETE FROM rakam_internal.invalid_value WHERE project_id = $1",
        "DELETE FROM rakam_internal.dead_letter WHERE project_id = $1",
        "DELETE FROM rakam_internal.mapper_dropped WHERE project_id = $1",
        "DELETE FROM rakam_internal.session_span WHERE project_id = $1",
        "DELETE FROM rakam_internal.job USING rakam_internal.collection c
         WHERE c.project_id = $1 AND job_key LIKE '%/' || c.collection_id::text",
        "DELETE FROM rakam_internal.project WHERE project_id = $1",
    ] {
        spi::execute(statement, &id)?;
    }
    Ok(())
}

/// Stores a key's hash.
pub fn insert_key(
    key_id: uuid::Uuid,
    kind: KeyKind,
    project_id: i32,
    hash: &[u8; 32],
) -> Result<()> {
    spi::execute(
        "INSERT INTO rakam_internal.api_key (key_id, kind, project_id, hash) VALUES ($1, $2, $3, $4)",
        &[
            arg(pgrx::Uuid::from_bytes(*key_id.as_bytes())),
            arg(kind.name()),
            arg(project_id),
            arg(hash.as_slice()),
        ],
    )?;
    Ok(())
}

/// Revokes a key set; the number of its keys, 0 if the project has none of this id.
pub fn revoke_keys(project_id: i32, key_id: pgrx::Uuid) -> Result<u64> {
    spi::execute(
        "UPDATE rakam_internal.api_key SET revoked_at = coalesce(revoked_at, pg_catalog.now())
         WHERE project_id = $1 AND key_id = $2",
        &[arg(project_id), arg(key_id)],
    )
}

/// A storage by name: its row, and the foreign server that it is.
#[derive(Debug, Clone)]
pub struct Storage {
    /// None: the server is not in use as a storage yet.
    pub id: Option<i32>,
    /// None for the default storage, which is no server.
    pub url: Option<String>,
    /// Whether the user may use it.
    pub usable: bool,
}

/// The storage of this name, as `user` may use it.
pub fn storage(name: &str, user: Oid) -> Result<Option<Storage>> {
    spi::first(
        View::Current,
        "SELECT s.storage_id, o.option_value, coalesce(s.kind = 'local', false) OR pg_catalog.has_server_privilege($2, f.oid, 'USAGE')
         FROM (SELECT $1 AS name) n
         LEFT JOIN rakam_internal.storage s ON s.name = n.name
         LEFT JOIN (pg_catalog.pg_foreign_server f
                    JOIN pg_catalog.pg_foreign_data_wrapper w ON w.oid = f.srvfdw AND w.fdwname = 'rakam')
           ON f.srvname = n.name
         LEFT JOIN LATERAL pg_catalog.pg_options_to_table(f.srvoptions) o ON o.option_name = 'url'
         WHERE s.kind = 'local' OR f.oid IS NOT NULL",
        &[arg(name), arg(user)],
        |row| {
            Ok(Storage {
                id: row.get(1),
                url: row.get(2),
                usable: row.must(3)?,
            })
        },
    )
}

/// Takes a foreign server into use as a storage.
pub fn insert_storage(name: &str, kind: &str) -> Result<i32> {
    spi::first(
        View::Current,
        "INSERT INTO rakam_internal.storage (name, kind) VALUES ($1, $2)
         ON CONFLICT (name) DO UPDATE SET kind = excluded.kind RETURNING storage_id",
        &[arg(name), arg(kind)],
        |row| row.must(1),
    )?
    .ok_or_else(|| PgError::internal("a storage was not stored"))
}
