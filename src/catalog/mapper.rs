//! Mappers: which functions the events of a collection go through before they are stored, and how many they dropped.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;

use crate::pg::security::ActAs;
use crate::pg::snapshot::Registered;
use crate::pg::spi::{self, View, arg};
use crate::pg::{INVALID_OID, Oid, Result, invalidation, relation, server};

/// Projects after which the cache starts anew.
const CACHE_PROJECTS_MAX: usize = 10_000;

/// In the table: a mapper of every collection.
const EVERY_COLLECTION: &str = "";

/// Mappers that an event has still to go through. The numbers are stored with dead letters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// The project's, for every collection.
    Project = 0,
    /// The collection's own.
    Collection = 1,
    /// None.
    Stored = 2,
}

impl Stage {
    pub fn of(number: i16) -> Self {
        match number {
            0 => Self::Project,
            1 => Self::Collection,
            _ => Self::Stored,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mapper {
    pub stage: Stage,
    /// INVALID_OID: it was dropped.
    pub function: Oid,
    /// `schema.name(argument types)` of the function, as it was last if it was dropped.
    pub signature: Rc<str>,
    /// The role that set it.
    pub owner: Oid,
    /// Takes an array of events, not one.
    pub every_batch: bool,
}

/// The mappers of a project, and what running them needs to know of it.
#[derive(Debug, Default)]
pub struct Mappers {
    pub project: String,
    pub admin_role: Oid,
    by_collection: HashMap<String, Mapper>,
}

impl Mappers {
    /// The mappers of a collection, in the order in which they run.
    pub fn of(&self, collection: &str) -> impl Iterator<Item = &Mapper> {
        // Most projects have none: then nothing is looked up.
        let any = !self.by_collection.is_empty();
        [EVERY_COLLECTION, collection]
            .into_iter()
            .filter(move |_| any)
            .filter_map(|name| self.by_collection.get(name))
    }
}

#[derive(Default)]
struct Cache {
    generation: u64,
    projects: HashMap<i32, Rc<Mappers>>,
}

thread_local! {
    static CACHE: RefCell<Cache> = RefCell::new(Cache::default());
}

/// The mappers of a project as they are now, from a per-backend cache that [`invalidation`] keeps honest.
pub fn of_project(project_id: i32) -> Result<Rc<Mappers>> {
    let now = invalidation::generation();
    let found = CACHE.with_borrow(|cache| {
        (cache.generation == now)
            .then(|| cache.projects.get(&project_id).cloned())
            .flatten()
    });
    if let Some(mappers) = found {
        return Ok(mappers);
    }
    for table in ["project", "mapper"] {
        invalidation::watch(relation::oid("rakam_internal", table));
    }
    let before = invalidation::generation();
    let mappers = Rc::new(load(project_id)?);
    if invalidation::generation() == before {
        CACHE.with_borrow_mut(|cache| {
            if cache.generation != before || cache.projects.len() >= CACHE_PROJECTS_MAX {
                *cache = Cache {
                    generation: before,
                    ..Cache::default()
                };
            }
            cache.projects.insert(project_id, mappers.clone());
        });
    }
    Ok(mappers)
}

fn load(project_id: i32) -> Result<Mappers> {
    let _owner = ActAs::owner();
    let latest = Registered::latest();
    let mut mappers = Mappers::default();
    spi::run(
        View::Under(latest.get()),
        // Until the background has found them (see keep_functions), oids after pg_upgrade are those of another server.
        "SELECT p.name, p.admin_role, m.collection, m.function,
                CASE WHEN m.is_lost THEN NULL WHEN i.id THEN m.function_oid
                     ELSE rakam_internal.function_named(m.function) END,
                m.owner::oid, m.every_batch
         FROM rakam_internal.mapper m JOIN rakam_internal.project p USING (project_id)
         LEFT JOIN rakam_internal.installation i ON i.system_identifier = $2
         WHERE m.project_id = $1",
        &[arg(project_id), arg(server::system_identifier())],
        |row| {
            mappers.project = row.must(1)?;
            mappers.admin_role = row.oid(2).unwrap_or(INVALID_OID);
            let collection: String = row.must(3)?;
            let mapper = Mapper {
                stage: match collection.as_str() {
                    EVERY_COLLECTION => Stage::Project,
                    _ => Stage::Collection,
                },
                signature: row.must::<String>(4)?.into(),
                function: row.oid(5).unwrap_or(INVALID_OID),
                owner: row.oid(6).unwrap_or(INVALID_OID),
                every_batch: row.must(7)?,
            };
            mappers.by_collection.insert(collection, mapper);
            Ok(())
        },
    )?;
    Ok(mappers)
}

/// Sets the mapper of a collection, or of every collection. It replaces the one that was there.
pub fn set(
    project_id: i32,
    collection: Option<&str>,
    function: Oid,
    owner: Oid,
    every_batch: bool,
) -> Result<()> {
    spi::execute(
        "INSERT INTO rakam_internal.mapper (project_id, collection, function, owner, every_batch)
         VALUES ($1, $2, $3::regprocedure::text, $4, $5)
         ON CONFLICT (project_id, collection) DO UPDATE
           SET function = excluded.function, is_lost = false, owner = excluded.owner,
               every_batch = excluded.every_batch, set_at = excluded.set_at",
        &[
            arg(project_id),
            arg(collection.unwrap_or(EVERY_COLLECTION)),
            arg(function),
            arg(owner),
            arg(every_batch),
        ],
    )?;
    Ok(())
}

/// Removes the mapper of a collection, or of every collection, if there is one.
pub fn remove(project_id: i32, collection: Option<&str>) -> Result<()> {
    spi::execute(
        "DELETE FROM rakam_internal.mapper WHERE project_id = $1 AND collection = $2",
        &[arg(project_id), arg(collection.unwrap_or(EVERY_COLLECTION))],
    )?;
    Ok(())
}

/// Gives a collection's mapper and counts to its new name, where a mapper set ahead gives way.
pub fn rename(project_id: i32, old: &str, new: &str) -> Result<()> {
    let args = [arg(project_id), arg(old), arg(new)];
    for statement in [
        "DELETE FROM rakam_internal.mapper n WHERE n.project_id = $1 AND n.collection = $3
           AND EXISTS (SELECT FROM rakam_internal.mapper o WHERE o.project_id = $1 AND o.collection = $2)",
        "UPDATE rakam_internal.mapper SET collection = $3 WHERE project_id = $1 AND collection = $2",
        "UPDATE rakam_internal.mapper_dropped SET collection = $3 WHERE project_id = $1 AND collection = $2",
    ] {
        spi::execute(statement, &args)?;
    }
    Ok(())
}

/// Has the catalogue know functions by the names and oids that they have now (sql/mappers.sql). Event triggers do so when
/// one changes, nobody does after pg_upgrade.
pub fn keep_functions() -> Result<()> {
    spi::execute("SELECT rakam_internal.keep_functions()", &[])?;
    Ok(())
}

/// Counts events that a mapper dropped.
pub fn count_dropped(project_id: i32, collection: &str, n: i64) -> Result<()> {
    let _owner = ActAs::owner();
    spi::execute(
        "INSERT INTO rakam_internal.mapper_dropped (project_id, collection, n) VALUES ($1, $2, $3)",
        &[arg(project_id), arg(collection), arg(n)],
    )?;
    Ok(())
}

/// Adds the counts of a collection up into one row each. In the worker, under the lock of the garbage collection.
pub fn fold_dropped() -> Result<()> {
    spi::execute(
        "WITH many AS (
           SELECT project_id, collection FROM rakam_internal.mapper_dropped
           GROUP BY 1, 2 HAVING pg_catalog.count(*) > 1),
         free AS MATERIALIZED (
           SELECT d.ctid AS place FROM rakam_internal.mapper_dropped d JOIN many m USING (project_id, collection)
           FOR UPDATE OF d SKIP LOCKED),
         gone AS (
           DELETE FROM rakam_internal.mapper_dropped d USING free f WHERE d.ctid = f.place
           RETURNING d.project_id, d.collection, d.n)
         INSERT INTO rakam_internal.mapper_dropped (project_id, collection, n)
         SELECT project_id, collection, pg_catalog.sum(n)::int8 FROM gone GROUP BY 1, 2",
        &[],
    )?;
    Ok(())
}

/// How many mappers the caller's projects have, and how many events they dropped, as row-level security shows them.
pub fn totals(view: View) -> Result<(i64, i64)> {
    let found = spi::first(
        view,
        "SELECT (SELECT pg_catalog.count(*) FROM rakam_internal.mapper),
                (SELECT coalesce(pg_catalog.sum(n), 0)::int8 FROM rakam_internal.mapper_dropped)",
        &[],
        |row| Ok((row.must(1)?, row.must(2)?)),
    )?;
    Ok(found.unwrap_or((0, 0)))
}
