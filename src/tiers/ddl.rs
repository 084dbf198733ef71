//! Foreign tables and columns for what the registry already knows.
//!
//! Never in the way of anybody: a table that is being read is tried again later; the attempt gives up after 100 ms,
//! so that new readers queue behind it no longer than that.

use std::cell::RefCell;
use std::collections::HashMap;
use std::time::{Duration, Instant};

use rakam_event::error::EventError;

use crate::catalog::dropping;
use crate::catalog::registry::{self, Collection, ProjectRow};
use crate::pg::locks::LockOn;
use crate::pg::spi::{self, View, arg, quote_ident, quote_literal};
use crate::pg::xact::{self, Failure};
use crate::pg::{Oid, PgError, Result, locks, relation};

/// A table that is in use is given up soon.
const LOCK_TIMEOUT: &str = "SET LOCAL lock_timeout = '100ms'";
/// After one that was in use, the next ones of a round are given up at once.
const NO_PATIENCE: &str = "SET LOCAL lock_timeout = '1ms'";
/// A round takes about so long: who makes the tables has other things to do, too.
const ROUND: Duration = Duration::from_millis(200);
/// Tables that a round looks for.
const MOST: usize = 1000;
/// dependent_objects_still_exist.
const DEPENDENTS: &str = "2BP01";

/// What is left to do.
#[derive(Debug, Clone, Copy, Default)]
pub struct Synced {
    pub done: u64,
    /// Tables whose lock was not to be had, or that nobody came to: try again.
    pub busy: u64,
    /// Tables that could not be made or changed: somebody's relation of that name, a schema that is gone, a trigger that refuses.
    pub failed: u64,
    /// When a round has something to do again; None: nothing is left.
    pub again: Option<Instant>,
}

impl Synced {
    fn again_at(&mut self, at: Instant) {
        self.again = Some(self.again.map_or(at, |again| again.min(at)));
    }
}

/// How long a process leaves a table, at first and at most: one that is in use, and one that it could not make or change.
const BUSY_PAUSES: [Duration; 2] = [Duration::from_millis(100), Duration::from_secs(1)];
const FAILED_PAUSES: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(60)];

/// What has not been tried for so long is not pending any more.
const FORGOTTEN: Duration = Duration::from_secs(600);

/// A table that is tried again later.
struct Later {
    at: Instant,
    pause: Duration,
    is_busy: bool,
}

thread_local! {
    static LATER: RefCell<HashMap<i32, Later>> = RefCell::default();
}

/// Makes pending tables and columns for a moment, each table in a transaction of its own.
pub fn run() -> std::result::Result<Synced, Failure> {
    let mut synced = Synced::default();
    let began = Instant::now();
    let (mut put_off, mut tried) = (Vec::new(), Vec::new());
    LATER.with_borrow_mut(|later| {
        // Collections that are gone.
        later.retain(|_, later| began.saturating_duration_since(later.at) < FORGOTTEN);
        for (id, later) in later {
            match later.at > began {
                false => tried.push(*id),
                true => {
                    put_off.push(*id);
                    synced.busy += u64::from(later.is_busy);
                    synced.failed += u64::from(!later.is_busy);
                    synced.again_at(later.at);
                }
            }
        }
    });
    let mut patience = LOCK_TIMEOUT;
    let found = xact::worker(|| pending(&put_off, &tried))?;
    if found.len() >= MOST {
        synced.again_at(began);
    }
    for id in found {
        if began.elapsed() > ROUND {
            synced.busy += 1;
            synced.again_at(began);
            break;
        }
        match xact::worker(|| within(patience, id)) {
            Ok(()) => synced.done += 1,
            Err(Failure::Error(error)) if error.sqlstate == "55P03" => {
                synced.busy += 1;
                patience = NO_PATIENCE;
                synced.again_at(leave_for_later(id, true));
                continue;
            }
            // Others go on.
            Err(Failure::Error(error)) => {
                synced.failed += 1;
                synced.again_at(leave_for_later(id, false));
                error.log();
                continue;
            }
            Err(gone) => return Err(gone),
        }
        LATER.with_borrow_mut(|later| later.remove(&id));
    }
    Ok(synced)
}

/// Says until when.
fn leave_for_later(collection_id: i32, is_busy: bool) -> Instant {
    let [first, longest] = match is_busy {
        true => BUSY_PAUSES,
        false => FAILED_PAUSES,
    };
    LATER.with_borrow_mut(|later| {
        let before = later.get(&collection_id).map(|later| later.pause * 2);
        let pause = before.unwrap_or(first).clamp(first, longest);
        let at = Instant::now() + pause;
        later.insert(collection_id, Later { at, pause, is_busy });
        at
    })
}

/// Collections without a table or with fields that are no columns yet, but for `put_off`: many of one project must not be in
/// the way of others, nor those that were `tried` before.
fn pending(put_off: &[i32], tried: &[i32]) -> Result<Vec<i32>> {
    spi::query(
        View::Current,
        // One that came in under the name of an attached table, while that was attached, waits until it is detached.
        "SELECT collection_id FROM (
           SELECT collection_id FROM rakam_internal.collection c WHERE ft IS NULL AND collection_id <> ALL ($1) AND NOT EXISTS
             (SELECT FROM rakam_internal.attached_table a WHERE a.project_id = c.project_id AND a.name = c.name)
           UNION SELECT collection_id FROM rakam_internal.field WHERE NOT column_ready AND collection_id <> ALL ($1)) pending
         ORDER BY collection_id = ANY ($2), collection_id LIMIT $3",
        &[arg(put_off.to_vec()), arg(tried.to_vec()), arg(MOST as i64)],
        |row| row.must(1),
    )
}

/// [`sync`] where nobody waits for it: other DDL of ours, and a project that is being dropped, are left for later, too.
fn within(patience: &str, collection_id: i32) -> Result<()> {
    spi::execute_text(patience)?;
    locks::transaction(LockOn::Ddl);
    if let Some(collection) = registry::collection_by_id(View::Current, collection_id)? {
        dropping::ensure_stays(collection.project_id)?;
        bring_up(collection)?;
    }
    Ok(())
}

/// Excludes other DDL of ours to the end of the transaction, in which locks are waited for as in [`sync`] from now on.
pub fn lock() -> Result<()> {
    locks::transaction(LockOn::Ddl);
    spi::execute_text(LOCK_TIMEOUT)
}

/// Locks a collection's table against its readers, if it has been made.
pub fn lock_table(collection: &Collection) {
    if let Some(table) = collection.ft {
        locks::relation(table, locks::Mode::AccessExclusive);
    }
}

/// Brings one collection's table up to its registered fields.
pub fn sync(collection_id: i32) -> Result<()> {
    // Before anything is read: a called function may be at the same table as the resident worker.
    lock()?;
    match registry::collection_by_id(View::Current, collection_id)? {
        Some(collection) => bring_up(collection),
        None => Ok(()),
    }
}

fn bring_up(collection: Collection) -> Result<()> {
    let Some(project) = registry::project_by_id(View::Current, collection.project_id)? else {
        return Ok(());
    };
    // A table that its owner has renamed or moved is the collection's all the same; one that was dropped is made again.
    match collection.ft.and_then(relation::qualified_name) {
        None => create(&project, &collection),
        Some(table) => add_columns(&table, &collection),
    }
}

fn table_name(project: &ProjectRow, collection: &Collection) -> String {
    format!(
        "{}.{}",
        quote_ident(&project.name),
        quote_ident(&collection.name)
    )
}

fn column(name: &str, ty: rakam_event::types::FieldType) -> String {
    use rakam_event::types::FieldType;
    let collate = match ty {
        FieldType::Text | FieldType::TextArray => " COLLATE pg_catalog.\"C\"",
        _ => "",
    };
    format!("{} {ty}{collate}", quote_ident(name))
}

fn create(project: &ProjectRow, collection: &Collection) -> Result<()> {
    let schema = registry::schema(View::Current, collection)?;
    let columns: Vec<String> = schema
        .fields
        .iter()
        .map(|f| column(&f.name, f.ty))
        .collect();
    let table = table_name(project, collection);
    spi::execute_text(&format!(
        "CREATE FOREIGN TABLE {table} ({}) SERVER rakam OPTIONS (project {}, collection {})",
        columns.join(", "),
        quote_literal(&project.name),
        quote_literal(&collection.name),
    ))?;
    grant(
        &table,
        &[
            (project.read_role, "SELECT"),
            (project.write_role, "INSERT"),
            (project.admin_role, "SELECT, INSERT"),
        ],
    )?;
    spi::execute(
        "UPDATE rakam_internal.collection SET ft = (
           SELECT c.oid FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
           WHERE n.nspname = $2 AND c.relname = $3)
         WHERE collection_id = $1",
        &[
            arg(collection.id),
            arg(project.name.as_str()),
            arg(collection.name.as_str()),
        ],
    )?;
    mark_ready(collection, &schema)
}

fn grant(table: &str, rights: &[(Oid, &str)]) -> Result<()> {
    for (role, rights) in rights {
        if let Some(name) = role_name(*role)? {
            spi::execute_text(&format!(
                "GRANT {rights} ON {table} TO {}",
                quote_ident(&name)
            ))?;
        }
    }
    Ok(())
}

/// Makes the table of attached files, with columns of these names and types.
pub fn create_attached(
    project: &ProjectRow,
    name: &str,
    columns: &[(String, String)],
) -> Result<()> {
    let table = format!("{}.{}", quote_ident(&project.name), quote_ident(name));
    let columns: Vec<String> = columns
        .iter()
        .map(|(column, ty)| {
            let collate = if matches!(ty.as_str(), "text" | "text[]") {
                " COLLATE pg_catalog.\"C\""
            } else {
                ""
            };
            format!("{} {ty}{collate}", quote_ident(column))
        })
        .collect();
    spi::execute_text(&format!(
        "CREATE FOREIGN TABLE {table} ({}) SERVER rakam OPTIONS (project {}, attached {})",
        columns.join(", "),
        quote_literal(&project.name),
        quote_literal(name),
    ))?;
    // That nothing can be inserted is said by the table itself, with the reason.
    grant(
        &table,
        &[
            (project.read_role, "SELECT"),
            (project.admin_role, "SELECT, INSERT"),
        ],
    )
}

fn add_columns(table: &str, collection: &Collection) -> Result<()> {
    let schema = registry::schema(View::Current, collection)?;
    let columns: Vec<String> = schema
        .fields
        .iter()
        .filter(|f| !f.column_ready)
        .map(|f| format!("ADD COLUMN IF NOT EXISTS {}", column(&f.name, f.ty)))
        .collect();
    if columns.is_empty() {
        return Ok(());
    }
    spi::execute_text(&format!(
        "ALTER FOREIGN TABLE {table} {}",
        columns.join(", ")
    ))?;
    mark_ready(collection, &schema)
}

/// The fields of `schema` are columns now; others may have been registered meanwhile.
fn mark_ready(collection: &Collection, schema: &rakam_event::schema::Schema) -> Result<()> {
    let ids: Vec<i32> = schema
        .fields
        .iter()
        .filter(|f| !f.column_ready)
        .map(|f| f.id)
        .collect();
    spi::execute(
        "UPDATE rakam_internal.field SET column_ready = true WHERE collection_id = $1 AND field_id = ANY ($2)",
        &[arg(collection.id), arg(ids)],
    )?;
    Ok(())
}

/// The name of a role; None if it was dropped by hand.
fn role_name(role: Oid) -> Result<Option<String>> {
    spi::first(
        View::Current,
        "SELECT rolname::text FROM pg_catalog.pg_roles WHERE oid = $1",
        &[arg(role)],
        |row| row.must(1),
    )
}

/// Drops a collection's table; an error if views depend on it, or if somebody uses it.
pub fn drop_table(collection: &Collection) -> Result<()> {
    drop_foreign_table(collection.ft)
}

/// Drops a foreign table of ours, if it is there; an error if views depend on it, or if somebody uses it.
pub fn drop_foreign_table(table: Option<Oid>) -> Result<()> {
    restricted(table, |table| format!("DROP FOREIGN TABLE {table}"))
}

/// Drops a column of a collection's table; an error if views depend on it, or if somebody uses the table.
pub fn drop_column(collection: &Collection, name: &str) -> Result<()> {
    let column = quote_ident(name);
    restricted(collection.ft, |table| {
        format!("ALTER FOREIGN TABLE {table} DROP COLUMN IF EXISTS {column}")
    })
}

/// Gives a collection's table another name, and the option by which it is read.
pub fn rename_table(collection: &Collection, name: &str) -> Result<()> {
    let (new, literal) = (quote_ident(name), quote_literal(name));
    with_table(collection.ft, |table| {
        format!("ALTER FOREIGN TABLE {table} OPTIONS (SET collection {literal})")
    })?;
    with_table(collection.ft, |table| {
        format!("ALTER FOREIGN TABLE {table} RENAME TO {new}")
    })
}

/// Runs a statement on a table, if it has been made. The lock is waited for as in [`sync`].
fn with_table(table: Option<Oid>, statement: impl FnOnce(&str) -> String) -> Result<()> {
    let Some(table) = table.and_then(relation::qualified_name) else {
        return Ok(());
    };
    spi::execute_text(LOCK_TIMEOUT)?;
    spi::execute_text(&statement(&table))
}

/// As [`with_table`]; what depends on the table stays, with an error that names it.
fn restricted(table: Option<Oid>, statement: impl FnOnce(&str) -> String) -> Result<()> {
    match xact::catch(|| with_table(table, statement)).and_then(|outcome| outcome) {
        Err(error) if error.sqlstate == DEPENDENTS => {
            Err(error.hint("Drop the objects that depend on it first."))
        }
        outcome => outcome,
    }
}

/// Registers a collection and makes its table now, for a caller who waits for it. Nothing happens if it is there; 42710 if
/// something else has its name.
pub fn ensure_table(project_id: i32, name: &str) -> Result<()> {
    // The name is locked from here on for as long as the table takes.
    lock()?;
    if !registry::add_collection(project_id, name)? {
        let project = registry::project_by_id(View::Current, project_id)?
            .ok_or_else(|| PgError::new("42704", "the project was dropped"))?;
        return Err(EventError::TooManyCollections(project.collections_max.unwrap_or(0)).into());
    }
    let collection = registry::collection_named(View::Current, project_id, name)?
        .ok_or_else(|| PgError::internal("a collection just registered is not there"))?;
    if collection.ft.and_then(relation::qualified_name).is_some() {
        // Columns that are still to be made may have to wait for whoever reads it.
        return Ok(());
    }
    if let Some(what) = registry::obstacle(View::Current, &collection)? {
        return Err(
            PgError::new("42710", format!("{what} \"{name}\" already exists")).hint(
                "A collection's table cannot have its name: choose another name, or rename what has it.",
            ),
        );
    }
    sync(collection.id)
}
