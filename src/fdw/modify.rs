//! INSERT and COPY: the executor's callbacks, and who may write.
//!
//! Rows gather in a buffer of the statement ([`super::bulk`]) and are stored when it is large enough, at the latest when
//! the statement ends. The right to write is checked here, for the project and for the registered table: a foreign
//! table that somebody else has made with the same options is refused, whatever its grants say. Nothing that is
//! stored can be changed.
//!
//! There are no callbacks for batches of rows: Postgres would copy each row into one, and what is wrong with a row
//! would be told of the line of a COPY where its batch ended. Each row goes into the buffer's columns at once instead,
//! and comes as it is ([`super::slot`]).

use std::cell::RefCell;
use std::rc::Rc;

use pgrx::{PgMemoryContexts, pg_guard, pg_sys};
use rakam_event::entry::Limits;

use super::bulk::{Buffer, Statement};
use super::node;
use super::options;
use super::row::{self, Datums, Target};
use super::slot;
use crate::catalog::registry::{self, Collection, ProjectRow};
use crate::pg::error::OrRaise;
use crate::pg::security::{self, ActAs};
use crate::pg::snapshot::Registered;
use crate::pg::spi::View;
use crate::pg::{PG_EPOCH_US, PgError, Result, guc, xact};

const DELETE_HINT: &str =
    "Events cannot be changed; rakam.delete_events(project, collection, condition) removes them.";

/// What an INSERT or COPY into one collection needs.
struct Insert {
    is_admin: bool,
    targets: Vec<Target>,
    /// The position of `_received_at` among the targets.
    received_at: Option<usize>,
    /// The clock at the call: when all events of the statement are received.
    now_us: i64,
    statement: Rc<Statement>,
    buffer: Rc<RefCell<Buffer>>,
    /// A trigger may look for a row as soon as it was inserted: nothing is kept back.
    write_through: bool,
    /// The first row is still to come.
    is_at_start: bool,
    /// Scratch, emptied after each row.
    memory: pg_sys::MemoryContext,
}

/// UPDATE, DELETE and MERGE end here, at planning.
#[pg_guard]
pub unsafe extern "C-unwind" fn refuse_change(
    root: *mut pg_sys::PlannerInfo,
    _index: pg_sys::Index,
    _entry: *mut pg_sys::RangeTblEntry,
    relation: pg_sys::Relation,
) {
    // SAFETY: the planner's own structures.
    let (command, name) = unsafe { ((*(*root).parse).commandType, relation_name(relation)) };
    // SAFETY: an open relation.
    if options::of_table(unsafe { (*relation).rd_id })
        .attached
        .is_some()
    {
        refuse_attached(&name).raise();
    }
    let verb = match command {
        pg_sys::CmdType::CMD_DELETE => "delete from",
        _ => "update",
    };
    PgError::new("0A000", format!("cannot {verb} collection \"{name}\""))
        .hint(DELETE_HINT)
        .raise()
}

#[pg_guard]
pub unsafe extern "C-unwind" fn truncate(
    relations: *mut pg_sys::List,
    _behavior: pg_sys::DropBehavior::Type,
    _restart: bool,
) {
    // SAFETY: a list of open relations.
    let (name, is_attached) = unsafe {
        node::pointers::<pg_sys::RelationData>(relations)
            .first()
            .map(|&relation| {
                let options = options::of_table((*relation).rd_id);
                (relation_name(relation), options.attached.is_some())
            })
            .unwrap_or_default()
    };
    if is_attached {
        refuse_attached(&name).raise();
    }
    PgError::new("0A000", format!("cannot truncate collection \"{name}\""))
        .hint(DELETE_HINT)
        .raise()
}

/// Says what views of the catalog and automatically updatable views should know.
#[pg_guard]
pub unsafe extern "C-unwind" fn updatable(relation: pg_sys::Relation) -> i32 {
    // SAFETY: an open relation.
    if options::of_table(unsafe { (*relation).rd_id }).is_all() {
        0
    } else {
        1 << pg_sys::CmdType::CMD_INSERT
    }
}

#[pg_guard]
pub unsafe extern "C-unwind" fn plan(
    root: *mut pg_sys::PlannerInfo,
    plan: *mut pg_sys::ModifyTable,
    index: pg_sys::Index,
    _subplan: i32,
) -> *mut pg_sys::List {
    // SAFETY: the planner's own structures; range table entries count from 1.
    unsafe {
        let entry: *mut pg_sys::RangeTblEntry =
            pg_sys::list_nth((*(*root).parse).rtable, index as i32 - 1).cast();
        let options = options::of_table((*entry).relid);
        if options.is_all() {
            refuse_all().raise();
        }
        if let Some(name) = &options.attached {
            refuse_attached(name).raise();
        }
        if (*plan).onConflictAction == pg_sys::OnConflictAction::ONCONFLICT_UPDATE {
            PgError::new(
                "0A000",
                "ON CONFLICT DO UPDATE is not supported for collections",
            )
            .hint(DELETE_HINT)
            .raise();
        }
    }
    std::ptr::null_mut()
}

fn refuse_attached(name: &str) -> PgError {
    PgError::new("0A000", format!("cannot change attached table \"{name}\""))
        .hint("Its rows are those of the files: change these, or load them into a collection with rakam.copy_from.")
}

fn refuse_all() -> PgError {
    PgError::new("42809", "cannot insert into the table of all collections")
        .hint("Insert into the table of one collection.")
}

#[pg_guard]
pub unsafe extern "C-unwind" fn begin(
    state: *mut pg_sys::ModifyTableState,
    target: *mut pg_sys::ResultRelInfo,
    _private: *mut pg_sys::List,
    _subplan: i32,
    flags: i32,
) {
    if flags & pg_sys::EXEC_FLAG_EXPLAIN_ONLY as i32 == 0 {
        // SAFETY: the executor's own structures.
        unsafe { start((*state).ps.state, target) };
    }
}

/// For COPY, and for rows that a partitioned table routes here.
#[pg_guard]
pub unsafe extern "C-unwind" fn begin_copy(
    state: *mut pg_sys::ModifyTableState,
    target: *mut pg_sys::ResultRelInfo,
) {
    // SAFETY: the executor's own structures.
    unsafe { start((*state).ps.state, target) };
}

unsafe fn start(estate: *mut pg_sys::EState, target: *mut pg_sys::ResultRelInfo) {
    // SAFETY: the executor's own structures; the state goes with the query's context.
    unsafe {
        let relation = (*target).ri_RelationDesc;
        let user = effective_user(estate, target);
        let query = (*estate).es_query_cxt;
        let targets: Vec<Target> = node::columns((*relation).rd_att)
            .iter()
            .map(|column| Target::of(column, query))
            .collect();
        let memory = pg_sys::AllocSetContextCreateInternal(
            query,
            c"rakam insert".as_ptr(),
            pg_sys::ALLOCSET_DEFAULT_MINSIZE as usize,
            pg_sys::ALLOCSET_DEFAULT_INITSIZE as usize,
            pg_sys::ALLOCSET_DEFAULT_MAXSIZE as usize,
        );
        let (buffer, is_admin) = writable((*relation).rd_id, user).or_raise();
        let statement = Statement::of(estate.addr());
        let insert = Insert {
            is_admin,
            received_at: targets.iter().position(Target::is_received_at),
            targets,
            now_us: xact::now_us(),
            buffer: statement.join(buffer),
            statement,
            write_through: has_after_triggers(target),
            is_at_start: true,
            memory,
        };
        let insert = PgMemoryContexts::For(query).leak_and_drop_on_delete(insert);
        (*target).ri_FdwState = insert.cast();
    }
}

/// The user whose right to insert counts: of a view its owner, else the current one.
unsafe fn effective_user(
    estate: *mut pg_sys::EState,
    target: *mut pg_sys::ResultRelInfo,
) -> pg_sys::Oid {
    // SAFETY: the executor's own structures; a routed partition has its root's range table entry.
    let user = unsafe {
        #[cfg(feature = "pg15")]
        {
            let mut named = target;
            if (*named).ri_RangeTableIndex == 0 && !(*named).ri_RootResultRelInfo.is_null() {
                named = (*named).ri_RootResultRelInfo;
            }
            match (*named).ri_RangeTableIndex as i32 {
                0 => pg_sys::InvalidOid,
                index => {
                    let entry = pg_sys::list_nth((*estate).es_range_table, index - 1);
                    (*entry.cast::<pg_sys::RangeTblEntry>()).checkAsUser
                }
            }
        }
        #[cfg(not(feature = "pg15"))]
        {
            pg_sys::ExecGetResultRelCheckAsUser(target, estate)
        }
    };
    if user == pg_sys::InvalidOid {
        security::current_user()
    } else {
        user
    }
}

#[pg_guard]
pub unsafe extern "C-unwind" fn insert(
    estate: *mut pg_sys::EState,
    target: *mut pg_sys::ResultRelInfo,
    slot: *mut pg_sys::TupleTableSlot,
    _plan_slot: *mut pg_sys::TupleTableSlot,
) -> *mut pg_sys::TupleTableSlot {
    // SAFETY: the executor's own structures, and the state made by `start`.
    unsafe {
        let state = &mut *(*target).ri_FdwState.cast::<Insert>();
        if i32::from((*slot).tts_nvalid) < (*(*slot).tts_tupleDescriptor).natts {
            pg_sys::slot_getallattrs(slot);
        }
        let (time_us, received_at_us) = PgMemoryContexts::For(state.memory)
            .switch_to(|_| state.add(&Datums::new((*slot).tts_values, (*slot).tts_isnull)))
            .or_raise();
        if !(*state.memory).isReset {
            pg_sys::MemoryContextReset(state.memory);
        }
        if wants_row(target) {
            state.complete(slot, time_us, received_at_us);
        }
        if state.is_at_start {
            state.is_at_start = false;
            if is_looked_at_here_only(target) {
                slot::pass_values(estate, target);
            }
        }
        slot
    }
}

#[pg_guard]
pub unsafe extern "C-unwind" fn end(
    _estate: *mut pg_sys::EState,
    target: *mut pg_sys::ResultRelInfo,
) {
    // SAFETY: the state made by `start`; none for EXPLAIN without ANALYZE.
    unsafe {
        if let Some(state) = (*target).ri_FdwState.cast::<Insert>().as_mut() {
            PgMemoryContexts::For(state.memory)
                .switch_to(|_| state.buffer.borrow_mut().flush())
                .or_raise();
            pg_sys::MemoryContextReset(state.memory);
        }
    }
}

/// Whether triggers will run after rows of this target, or of the partitioned table that it belongs to, were stored.
/// They do before the statement ends for us.
unsafe fn has_after_triggers(target: *mut pg_sys::ResultRelInfo) -> bool {
    // SAFETY: the executor's own structures; a partition names its root.
    unsafe {
        [target, (*target).ri_RootResultRelInfo]
            .into_iter()
            .filter_map(|target| target.as_ref()?.ri_TrigDesc.as_ref())
            .any(|triggers| triggers.trig_insert_after_row || triggers.trig_insert_after_statement)
    }
}

/// Whether rows are for the insert callback alone: no triggers, nothing computed from a row. Known from the first row on.
unsafe fn is_looked_at_here_only(target: *mut pg_sys::ResultRelInfo) -> bool {
    // SAFETY: the executor's own structures.
    unsafe {
        let constraints = (*(*(*target).ri_RelationDesc).rd_att).constr;
        (*target).ri_TrigDesc.is_null()
            && (*target).ri_RootResultRelInfo.is_null()
            && !wants_row(target)
            && (constraints.is_null() || !(*constraints).has_generated_stored)
    }
}

/// Whether anybody looks at the row after it was stored.
unsafe fn wants_row(target: *mut pg_sys::ResultRelInfo) -> bool {
    // SAFETY: the executor's own structures.
    unsafe {
        let triggers = (*target).ri_TrigDesc;
        !(*target).ri_projectReturning.is_null()
            || !(*target).ri_WithCheckOptions.is_null()
            || !triggers.is_null() && (*triggers).trig_insert_after_row
    }
}

/// The buffer for rows of a table, and whether `user` is an admin of its project; an error if he may not write it.
fn writable(relation: pg_sys::Oid, user: pg_sys::Oid) -> Result<(Buffer, bool)> {
    let options = options::of_table(relation);
    if options.is_all() {
        return Err(refuse_all());
    }
    if let Some(name) = &options.attached {
        return Err(refuse_attached(name));
    }
    xact::ensure_writable("insert events")?;
    let no_project = || PgError::no_project(&options.project);
    let (project, collection) =
        registered(&options.project, &options.collection)?.ok_or_else(no_project)?;
    let is_admin =
        security::is_superuser(user) || security::has_privileges_of(user, project.admin_role);
    let is_writer = is_admin || security::has_privileges_of(user, project.write_role);
    if !is_writer {
        return Err(no_project());
    }
    if collection.ft != Some(relation) {
        return Err(PgError::new(
            "42501",
            format!(
                "foreign table is not the table of collection \"{}\"",
                collection.name
            ),
        )
        .hint("Insert into the table that rakam has made in the project's schema."));
    }
    let limits = Limits {
        max_event_bytes: guc::max_event_bytes(),
        max_string_bytes: guc::max_string_bytes(),
        max_fields: guc::max_fields(),
    };
    Ok((Buffer::new(project, collection, limits), is_admin))
}

impl Insert {
    /// Takes a row in; answers its `_time` and `_received_at`.
    fn add(&mut self, datums: &Datums) -> Result<(i64, i64)> {
        let given = match self.received_at {
            Some(at) => row::received_at(&self.targets[at], datums)?,
            None => None,
        };
        let received_at_us = match given {
            None => self.now_us,
            Some(micros) if self.is_admin => micros,
            Some(_) => {
                return Err(
                    PgError::new("42501", "permission denied to set \"_received_at\"")
                        .hint("Only the project's admin role may set it; leave it out."),
                );
            }
        };
        let time_us =
            self.statement
                .add(&self.buffer, datums, &mut self.targets, received_at_us)?;
        if self.write_through {
            self.buffer.borrow_mut().flush()?;
        }
        Ok((time_us, received_at_us))
    }

    /// Puts the times that the server has set into the row that RETURNING and triggers see.
    unsafe fn complete(
        &self,
        slot: *mut pg_sys::TupleTableSlot,
        time_us: i64,
        received_at_us: i64,
    ) {
        // SAFETY: the slot's values are deformed; the new tuple is a copy in the slot's own context, which owns it.
        unsafe {
            for target in &self.targets {
                let micros = if target.is_time() {
                    time_us
                } else if target.is_received_at() {
                    received_at_us
                } else {
                    continue;
                };
                *(*slot).tts_values.add(target.attribute) =
                    pg_sys::Datum::from(micros - PG_EPOCH_US);
                *(*slot).tts_isnull.add(target.attribute) = false;
            }
            let relation = (*slot).tts_tableOid;
            let tuple = PgMemoryContexts::For((*slot).tts_mcxt).switch_to(|_| {
                pg_sys::heap_form_tuple(
                    (*slot).tts_tupleDescriptor,
                    (*slot).tts_values,
                    (*slot).tts_isnull,
                )
            });
            pg_sys::ExecForceStoreHeapTuple(tuple, slot, true);
            (*slot).tts_tableOid = relation;
        }
    }
}

/// The project and collection of these names, whoever asks: as they are now, since a right may be gone.
fn registered(project: &str, collection: &str) -> Result<Option<(ProjectRow, Collection)>> {
    let _owner = ActAs::owner();
    let latest = Registered::latest();
    let view = View::Under(latest.get());
    let Some(project) = registry::project(view, project)? else {
        return Ok(None);
    };
    let collection = registry::collection(view, &project.name, collection)?;
    Ok(collection.map(|collection| (project, collection)))
}

unsafe fn relation_name(relation: pg_sys::Relation) -> String {
    // SAFETY: an open relation has its catalog row.
    unsafe { node::text((*(*relation).rd_rel).relname.data.as_ptr()) }
}
