//! `rakam.delete_events`: finds the rows of a collection for which a condition is true, and hides them.
//!
//! The condition is somebody's text. It is checked in the caller's session, as the caller, and evaluated here by
//! Postgres' executor: again as the caller, so that rights and row-level security are the caller's, in a read-only
//! transaction that is rolled back, security-restricted, with a pinned search path. The rows tell which they are
//! ([`identity`]); a second transaction hides them all at once. Between the two the collection's job lock keeps every
//! chunk and file as it is. While the worker waits for that lock, what is committed after the call may have come into chunks
//! and files, too: rows of transactions that were not committed at the call are left out.

use std::sync::Arc;

use pgrx::pg_extern;
use pgrx::pg_sys::panic::ErrorReport;
use rakam_engine::ir::Transactions;
use rakam_event::names::CollectionName;
use rakam_lake::rows::RowBits;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::task::{self, Task};
use crate::catalog::audit::Note;
use crate::catalog::deletion::{self, Object};
use crate::catalog::projects::{self, Right};
use crate::catalog::{audit, dropping, manifest, rebuild, registry};
use crate::fdw::identity::{self, OBJECTS_MAX, Objects, PARKED};
use crate::ingest::digest;
use crate::pg::condition::Condition;
use crate::pg::locks::{LockOn, SessionLock};
use crate::pg::security::{self, ActAs};
use crate::pg::settings::{self, Settings};
use crate::pg::snapshot::{Registered, Snapshot, XidSnapshot};
use crate::pg::spi::{self, View};
use crate::pg::xact::{self, Failure};
use crate::pg::{Oid, PgError, Result, failpoint, not_null, wait};
use crate::tiers::delete::{Hit, delete_parked, hide};
use crate::tiers::rotate;

/// Rows looked through at a time: a bit is kept for each.
const GROUP_ROWS: u64 = 64 << 20;
/// Row numbers that one call may collect, encoded: two or three bytes for a run of rows.
const HITS_BYTES: usize = 256 << 20;

/// Settings of the caller that decide what a condition means.
const MEANING: [&std::ffi::CStr; 8] = [
    c"DateStyle",
    c"IntervalStyle",
    c"TimeZone",
    c"bytea_output",
    c"extra_float_digits",
    c"standard_conforming_strings",
    c"transform_null_equals",
    c"rakam.enable_pushdown",
];

/// What the worker is asked to do.
#[derive(Debug, Serialize, Deserialize)]
pub struct Deletion {
    project_id: i32,
    collection: String,
    condition: String,
    /// What was committed at the call.
    committed: XidSnapshot,
    /// As whom the condition is evaluated.
    user: u32,
    settings: Vec<(String, String)>,
}

/// Hides the events of a collection for which a condition is true, those committed before the call. Returns how many.
/// SQL: `rakam.delete_events(project text, collection text, condition text) → bigint`.
/// Errors: 42501 no such project or no right, 42704 no such collection, 22004 NULL argument, whatever is wrong with the
/// condition with its position (42601, 42703, 42804 …), 0A000 volatile functions or system columns, 55P03 the caller
/// holds a lock that the work needs, 54000 too many scattered rows for one call.
#[pg_extern(volatile, parallel_unsafe)]
fn delete_events(
    project: Option<&str>,
    collection: Option<&str>,
    condition: Option<&str>,
) -> std::result::Result<i64, ErrorReport> {
    // The condition is left out of the log: it names values.
    let deleted = audit::at_once("delete_events", project, collection, |note| {
        delete(project, collection, condition, note)
    })?;
    task::tell_at_once("delete_events");
    Ok(deleted)
}

fn delete(
    project: Option<&str>,
    collection: Option<&str>,
    condition: Option<&str>,
    note: Note,
) -> Result<i64> {
    let project = projects::authorize_committed(not_null(project, "project")?, Right::Admin)?;
    let name = CollectionName::parse(not_null(collection, "collection")?)?;
    let condition = not_null(condition, "condition")?;
    xact::ensure_writable("delete events")?;
    let committed = XidSnapshot::of(View::Under(Registered::latest().get()))?;
    let table = match table(project.id, name.as_str())? {
        Some(table) => table,
        None => {
            // Perhaps it was collected a moment ago.
            task::run(Task::CreateTables)?;
            table(project.id, name.as_str())?.ok_or_else(|| unknown(name.as_str()))?
        }
    };
    let settings = meaning(&project.name);
    {
        let _path = Settings::set(&settings[..1])?;
        Condition::new(table, condition)?.check()?;
    }
    let task = Task::Delete(Deletion {
        project_id: project.id,
        collection: name.as_str().to_owned(),
        condition: condition.to_owned(),
        committed,
        user: security::current_user().into(),
        settings,
    });
    let deleted = task::run_noted(task, note)?;
    deleted
        .as_i64()
        .ok_or_else(|| PgError::internal("malformed reply of a deletion"))
}

/// The registered table of a collection as of now; None: there is none (yet).
fn table(project_id: i32, name: &str) -> Result<Option<Oid>> {
    let _owner = ActAs::owner();
    let latest = Registered::latest();
    let view = View::Under(latest.get());
    Ok(registry::collection_named(view, project_id, name)?.and_then(|found| found.ft))
}

fn unknown(name: &str) -> PgError {
    PgError::new("42704", format!("collection \"{name}\" does not exist"))
        .hint("The view rakam.collections lists a project's collections.")
}

/// The search path of a condition, then the caller's settings.
fn meaning(project: &str) -> Vec<(String, String)> {
    let path = format!("pg_catalog, {}, pg_temp", spi::quote_ident(project));
    let own = MEANING.iter().filter_map(|name| {
        settings::get(name).map(|value| (name.to_string_lossy().into_owned(), value))
    });
    std::iter::once(("search_path".to_owned(), path))
        .chain(own)
        .collect()
}

/// In the task worker.
pub fn perform(deletion: &Deletion) -> std::result::Result<serde_json::Value, Failure> {
    digest::catch_up(Some(&[deletion.project_id]))?;
    let found = xact::worker(|| {
        registry::collection_named(View::Current, deletion.project_id, &deletion.collection)
    })?;
    let work = found.and_then(|collection| {
        collection.ft.map(|table| Work {
            deletion,
            table,
            collection,
        })
    });
    let work = work.ok_or_else(|| Failure::Error(unknown(&deletion.collection)))?;
    failpoint::hit("delete.after_digest");
    let deleted = work.parked()? + work.stored()?;
    if deleted > 0 {
        // Nobody waits for the inbox: what cannot be emptied yet is emptied later.
        let _lock = SessionLock::take(LockOn::Digest);
        rotate::run()?;
    }
    Ok(json!(deleted))
}

struct Work<'a> {
    deletion: &'a Deletion,
    table: Oid,
    collection: registry::Collection,
}

impl Work<'_> {
    /// Events that could not be digested and may be one day. While they are tested none is tried again.
    fn parked(&self) -> std::result::Result<u64, Failure> {
        let list = || deletion::parked(View::Current, self.collection.id);
        if xact::worker(list)?.is_empty() {
            return Ok(0);
        }
        let _digest = SessionLock::take(LockOn::Digest);
        dropping::ensure_stays(self.deletion.project_id).map_err(Failure::Error)?;
        let ids = xact::worker(list)?;
        let found = xact::read_only(|| {
            let mut found = Vec::new();
            self.evaluate(Objects::new(&[], &ids), |object, place| {
                if object == PARKED
                    && let Some(&id) = ids.get(place as usize)
                {
                    found.push(id);
                }
            })?;
            Ok(found)
        })?;
        if found.is_empty() {
            return Ok(0);
        }
        xact::worker(|| {
            let deleted = delete_parked(&self.collection, &found)?;
            audit::store_expected()?;
            Ok(deleted)
        })
    }

    /// Rows of chunks and data files.
    fn stored(&self) -> std::result::Result<u64, Failure> {
        let _job = SessionLock::take(LockOn::CollectionJob(self.collection.id));
        xact::worker(|| rebuild::ensure_over_of(self.collection.id))?;
        let hits = xact::read_only(|| self.find())?;
        failpoint::hit("delete.before_hide");
        if hits.is_empty() {
            return Ok(0);
        }
        xact::worker(|| {
            let hidden = hide(&self.collection, &hits)?;
            audit::store_expected()?;
            Ok(hidden)
        })
    }

    fn find(&self) -> Result<Vec<Hit>> {
        let view = View::Under(Snapshot::active());
        let id = self.collection.id;
        let mut objects: Vec<(Object, u64)> = manifest::files(view, id, None)?
            .into_iter()
            .map(|file| (Object::File(file.file_id), file.n as u64))
            .collect();
        objects.extend(
            manifest::chunks(view, id, None)?
                .into_iter()
                .map(|chunk| (Object::Chunk(chunk.chunk_id), chunk.n as u64)),
        );
        let (mut hits, mut bytes) = (Vec::new(), 0);
        let mut rest = &objects[..];
        while !rest.is_empty() {
            wait::check_interrupts();
            let (group, after) = rest.split_at(group_length(rest));
            rest = after;
            for hit in self.find_in(group)? {
                bytes += hit.rows.len();
                hits.push(hit);
            }
            if bytes > HITS_BYTES {
                return Err(
                    PgError::new("54000", "too many scattered events for one deletion")
                        .hint("Delete them in several calls, for instance by ranges of _time."),
                );
            }
        }
        Ok(hits)
    }

    fn find_in(&self, group: &[(Object, u64)]) -> Result<Vec<Hit>> {
        let numbers: Vec<Object> = group.iter().map(|(object, _)| *object).collect();
        let mut bits: Vec<Option<RowBits>> = group.iter().map(|_| None).collect();
        let mut stray = false;
        self.evaluate(Objects::new(&numbers, &[]), |object, row| {
            let number = usize::from(object);
            let inside = match (bits.get_mut(number), group.get(number)) {
                (Some(bits), Some((_, n))) => bits
                    .get_or_insert_with(|| RowBits::new(u32::try_from(*n).unwrap_or(u32::MAX)))
                    .insert(row),
                _ => false,
            };
            stray |= !inside;
        })?;
        if stray {
            return Err(PgError::internal(
                "a row told an identity that does not exist",
            ));
        }
        Ok(group
            .iter()
            .zip(bits)
            .filter_map(|(&(object, n), bits)| {
                Some(Hit {
                    object,
                    n,
                    rows: bits?.finish().encode(),
                })
            })
            .collect())
    }

    /// The transactions that were not committed at the call and may be by now.
    fn late(&self) -> Result<Transactions> {
        let view = View::Under(Snapshot::active());
        let committed = &self.deletion.committed;
        Ok(Transactions {
            xids: committed.xmax as i64..XidSnapshot::of(view)?.xmax as i64,
            others: committed.xip.iter().map(|&xid| xid as i64).collect(),
            own_since_us: registry::own_since_us(view)?,
        })
    }

    /// Runs the condition over these objects as the caller, leaving out what came after the call; `each` gets the number of
    /// an object and of a row in it.
    fn evaluate(&self, mut objects: Objects, mut each: impl FnMut(u16, u32)) -> Result<()> {
        objects.late = Some(self.late()?);
        let _settings = Settings::set(&self.deletion.settings)?;
        let _user = ActAs::restricted(Oid::from(self.deletion.user));
        Condition::new(self.table, &self.deletion.condition)?.matching(
            Snapshot::active(),
            || identity::arm(self.table, Arc::new(objects)),
            |row, object| each(object, row),
        )?;
        // Where the planner saw that no row can match, no scan was opened.
        identity::disarm();
        Ok(())
    }
}

/// How many of the objects are looked through together.
fn group_length(objects: &[(Object, u64)]) -> usize {
    let mut rows = 0;
    let fitting = objects.iter().take(OBJECTS_MAX).take_while(|(_, n)| {
        rows += n;
        rows <= GROUP_ROWS
    });
    fitting.count().max(1)
}
