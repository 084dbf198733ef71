//! Tracked tables: each changed row of a local table is an event, in the transaction that changes it.
//!
//! Statement triggers with transition tables, so that a statement's rows go to the inbox together. What is wrong with
//! an event, a field that a fixed schema has not, and a quota that is used up must not stop whoever writes the table: events
//! become dead letters.

use std::cell::RefCell;
use std::rc::Rc;

use pgrx::heap_tuple::PgHeapTuple;
use pgrx::trigger_support::PgTrigger;
use pgrx::{AllocatedByPostgres, pg_extern, pg_trigger};
use rakam_event::error::EventError;
use rakam_event::names::{self, CollectionName};
use rakam_event::{entry, json, schema};

use super::admission::Admission;
use super::collect::limits;
use super::mapper::{self, Shape};
use super::quota;
use crate::catalog::audit;
use crate::catalog::inbox::Entry;
use crate::catalog::projects::{self, Project, Right};
use crate::catalog::track;
use crate::pg::error::OrRaise;
use crate::pg::locks::{self, Mode};
use crate::pg::security::{self, ActAs};
use crate::pg::transition::{self, Operation, Statement};
use crate::pg::{self, ErrorReport, Oid, PgError, not_null, relation, xact};

/// Bytes of events after which they go to the inbox.
const ENTRY_BYTES: usize = 1 << 20;

/// The field that says what happened.
const OPERATION: &str = "op";

/// Makes each change of a table an event of a collection, from now on. A table that is tracked in the project
/// already is tracked anew: with another collection, and with partitions that have come since.
/// SQL: `rakam.track_table(project text, collection text, source regclass)`.
/// Errors: 42501 no such project or not its admin, not the table's owner; 42602 / 42939 the collection's name;
/// 42809 not a table, 0A000 a foreign table among its partitions.
#[pg_extern(sql = "
CREATE FUNCTION rakam.track_table(project text, collection text, source regclass) RETURNS void
LANGUAGE c VOLATILE PARALLEL UNSAFE
AS 'MODULE_PATHNAME', '@FUNCTION_NAME@';")]
fn track_table(
    project: Option<&str>,
    collection: Option<&str>,
    source: Option<Oid>,
) -> std::result::Result<(), ErrorReport> {
    Ok(audit::call("track_table", project, collection, || {
        let project = admin_project(project)?;
        let collection = not_null(collection, "collection")?;
        start(&project, collection, not_null(source, "source")?)
    })?)
}

/// Ends what [`track_table`] began. SQL: `rakam.untrack_table(project text, source regclass)`.
/// Errors: 42501 no such project or not its admin, 42704 the table is not tracked in it.
#[pg_extern(sql = "
CREATE FUNCTION rakam.untrack_table(project text, source regclass) RETURNS void
LANGUAGE c VOLATILE PARALLEL UNSAFE
AS 'MODULE_PATHNAME', '@FUNCTION_NAME@';")]
fn untrack_table(
    project: Option<&str>,
    source: Option<Oid>,
) -> std::result::Result<(), ErrorReport> {
    Ok(audit::call("untrack_table", project, None, || {
        let project = admin_project(project)?;
        stop(&project, not_null(source, "source")?)
    })?)
}

fn admin_project(project: Option<&str>) -> pg::Result<Rc<Project>> {
    let project = not_null(project, "project")?;
    xact::ensure_writable("track tables")?;
    projects::authorize(project, Right::Admin)
}

fn start(project: &Project, collection: &str, source: Oid) -> pg::Result<()> {
    let collection = CollectionName::parse(collection)?;
    if project.attached.contains(collection.as_str()) {
        return Err(EventError::AttachedTable(collection.into_string()).into());
    }
    let caller = security::current_user();
    // Checked first, so that nobody can lock a table that is not theirs; and again below, once it cannot change.
    ensure_trackable(source, caller)?;
    locks::relation(source, Mode::ShareRowExclusive);
    let tables = track::with_inheritors(source)?;
    for &table in &tables {
        if table != source {
            locks::relation(table, Mode::ShareRowExclusive);
        }
        ensure_trackable(table, caller)?;
    }
    let _owner = ActAs::owner();
    track::drop_triggers(&project.name, Some(&tables))?;
    for table in tables {
        track::create_triggers(&project.name, collection.as_str(), table)?;
    }
    Ok(())
}

fn ensure_trackable(table: Oid, caller: Oid) -> pg::Result<()> {
    let Some(name) = relation::sql_name(table) else {
        return Err(PgError::new("42P01", "the table does not exist"));
    };
    if !relation::is_owned_by(table, caller) {
        return Err(
            PgError::new("42501", format!("must be owner of table {name}"))
                .hint("A table can be tracked by its owner only."),
        );
    }
    if !relation::is_table(table) {
        return Err(PgError::new("42809", format!("cannot track {name}")).hint(
            "Ordinary and partitioned tables can be tracked, as far as no partition is a foreign table.",
        ));
    }
    if name.starts_with("\"rakam_internal\".") {
        return Err(PgError::new(
            "0A000",
            format!("cannot track {name}, a table of rakam itself"),
        ));
    }
    Ok(())
}

fn stop(project: &Project, source: Oid) -> pg::Result<()> {
    let _owner = ActAs::owner();
    let tables = track::with_inheritors(source)?;
    if track::drop_triggers(&project.name, Some(&tables))? == 0 {
        let name = relation::sql_name(source).unwrap_or_else(|| source.to_u32().to_string());
        return Err(PgError::new(
            "42704",
            format!(
                "table {name} is not tracked in project \"{}\"",
                project.name
            ),
        )
        .hint("rakam.track_table begins to track a table."));
    }
    Ok(())
}

/// Called after each statement that changed a tracked table, with the names of project and collection. Its right to
/// collect is that it is called at all: nobody but the extension's owner may put it into a trigger.
#[pg_trigger(sql = "
CREATE FUNCTION rakam_internal.track_change() RETURNS trigger LANGUAGE c
AS 'MODULE_PATHNAME', '@FUNCTION_NAME@';")]
fn track_change<'a>(
    trigger: &'a PgTrigger<'a>,
) -> std::result::Result<Option<PgHeapTuple<'a, AllocatedByPostgres>>, ErrorReport> {
    // Raised here: what wraps this function makes a panic of an error that it is given.
    statement(trigger).or_raise();
    Ok(None)
}

fn statement(trigger: &PgTrigger<'_>) -> pg::Result<()> {
    let arguments = trigger
        .extra_args()
        .map_err(|e| PgError::new("39P01", e.to_string()))?;
    changed(&Statement::of(trigger)?, &arguments)
}

fn changed(statement: &Statement<'_>, arguments: &[String]) -> pg::Result<()> {
    let [project, collection] = arguments else {
        return Err(PgError::new("39P01", "the trigger names no collection"));
    };
    let Some(project) = projects::by_name(project)? else {
        PgError::new(
            "01000",
            format!("changes are not collected: project \"{project}\" does not exist"),
        )
        .hint("Drop the trigger.")
        .warn();
        return Ok(());
    };
    let mut events = Events {
        collection_id: projects::collection_id(project.id, collection)?,
        project,
        collection,
        received_at_us: xact::now_us(),
        payload: String::new(),
        n: 0,
    };
    let operation = match statement.operation {
        Operation::Insert => "insert",
        Operation::Update => "update",
        Operation::Delete => "delete",
        Operation::Truncate => return truncated(&mut events, statement.table),
    };
    let mut event = String::new();
    statement.rows(|row| {
        write_event(operation, row, &mut event)?;
        events.add(&event)
    })?;
    events.flush()
}

/// A row's columns as an event's fields. Names that mean something else in an event get `table_` before them: `op`,
/// `_id` (a later change of the row would count as a copy of the first one), and what only the server sets.
fn write_event(operation: &str, row: &str, out: &mut String) -> pg::Result<()> {
    out.clear();
    out.push('{');
    json::object_entries(row, |column, value| {
        if json::kind(value) == json::Kind::Null {
            return;
        }
        let name = names::field_name(column);
        let taken =
            name == OPERATION || name == schema::ID || names::server_field(column).is_some();
        if taken {
            let renamed = format!("table_{}", name.trim_start_matches(['_', '$']));
            json::write_string(&renamed, out);
        } else {
            json::write_string(column, out);
        }
        out.push(':');
        out.push_str(value);
        out.push(',');
    })?;
    json::write_string(OPERATION, out);
    out.push(':');
    json::write_string(operation, out);
    out.push('}');
    Ok(())
}

/// Events on their way into the inbox.
struct Events<'a> {
    project: Rc<Project>,
    collection_id: i32,
    collection: &'a str,
    received_at_us: i64,
    payload: String,
    n: i32,
}

impl Events<'_> {
    fn add(&mut self, event: &str) -> pg::Result<()> {
        let checked = entry::check_event(event, &limits());
        let refused = match &checked {
            Ok(event) => Admission::new(&self.project).refusal(self.collection, event)?,
            Err(_) => None,
        };
        let event = match refused.map_or(checked, Err) {
            Ok(event) => event,
            Err(error) => {
                // Events of a dead letter are one a line.
                return mapper::set_aside(
                    &self.entry(entry::one_line(event).as_bytes(), 1),
                    Shape::Event,
                    &error.into(),
                );
            }
        };
        if self.n > 0 && self.payload.len() + 1 + event.len() > ENTRY_BYTES {
            self.flush()?;
        }
        if self.n > 0 {
            self.payload.push('\n');
        }
        self.payload.push_str(&event);
        self.n += 1;
        Ok(())
    }

    fn flush(&mut self) -> pg::Result<()> {
        if self.n == 0 {
            return Ok(());
        }
        let entry = self.entry(self.payload.as_bytes(), self.n);
        match quota::charge(&self.project, i64::from(self.n), entry.payload.len() as i64) {
            Ok(()) => {
                mapper::enter(&entry, Shape::Event)?;
            }
            // One dead letter of them all: what is refused for its amount must not become many rows.
            Err(refused) if refused.sqlstate == "53400" => {
                mapper::set_aside(&entry, Shape::Event, &refused)?;
            }
            Err(error) => return Err(error),
        }
        self.payload.clear();
        self.n = 0;
        Ok(())
    }

    fn entry<'e>(&'e self, payload: &'e [u8], n: i32) -> Entry<'e> {
        Entry {
            project_id: self.project.id,
            collection_id: self.collection_id,
            collection: self.collection,
            n,
            received_at_us: self.received_at_us,
            shift_us: 0,
            store_id: None,
            payload: payload.into(),
        }
    }
}

/// Tables whose truncation has been told of, in one command.
#[derive(Default)]
struct Truncated {
    /// When the last one was told.
    moment: (u64, u32),
    tables: Vec<(i32, Oid)>,
}

thread_local! {
    static TRUNCATED: RefCell<Truncated> = RefCell::new(Truncated::default());
}

/// TRUNCATE calls the triggers of a table and of all its partitions, of the table first: it is one event, of the
/// whole. Nothing but our own writes counts commands between those calls.
fn truncated(events: &mut Events<'_>, table: Oid) -> pg::Result<()> {
    let ancestors = track::ancestors(table)?;
    let now = transition::moment();
    let is_part = TRUNCATED.with_borrow_mut(|truncated| {
        if truncated.moment != now {
            truncated.tables.clear();
        }
        truncated.tables.push((events.project.id, table));
        ancestors
            .iter()
            .any(|&ancestor| truncated.tables.contains(&(events.project.id, ancestor)))
    });
    if !is_part {
        events.add("{\"op\":\"truncate\"}")?;
        events.flush()?;
    }
    TRUNCATED.with_borrow_mut(|truncated| truncated.moment = transition::moment());
    Ok(())
}
