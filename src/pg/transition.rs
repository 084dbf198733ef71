//! What a statement-level AFTER trigger sees: the operation, and the rows of its transition table as JSON.

use pgrx::datum::FromDatum;
use pgrx::pg_sys;
use pgrx::trigger_support::PgTrigger;
use pgrx::{PgMemoryContexts, direct_function_call_as_datum};

use super::error::{PgError, Result};
use super::settings::Defaults;
use super::wait;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    Insert,
    Update,
    Delete,
    Truncate,
}

/// The statement that a trigger was called for.
pub struct Statement<'a> {
    data: &'a pg_sys::TriggerData,
    pub operation: Operation,
    pub table: pg_sys::Oid,
}

impl<'a> Statement<'a> {
    pub fn of(trigger: &'a PgTrigger<'a>) -> Result<Self> {
        let data = trigger.trigger_data();
        let per_row = data.tg_event & pg_sys::TRIGGER_EVENT_ROW != 0;
        let after = data.tg_event & pg_sys::TRIGGER_EVENT_TIMINGMASK == pg_sys::TRIGGER_EVENT_AFTER;
        if per_row || !after || data.tg_relation.is_null() {
            return Err(PgError::new(
                "39P01",
                "the trigger must be called after a statement",
            ));
        }
        Ok(Self {
            data,
            operation: match data.tg_event & pg_sys::TRIGGER_EVENT_OPMASK {
                pg_sys::TRIGGER_EVENT_INSERT => Operation::Insert,
                pg_sys::TRIGGER_EVENT_DELETE => Operation::Delete,
                pg_sys::TRIGGER_EVENT_UPDATE => Operation::Update,
                _ => Operation::Truncate,
            },
            // SAFETY: the relation is open for the call.
            table: unsafe { (*data.tg_relation).rd_id },
        })
    }

    /// Calls `each` with every changed row as a JSON object: the new rows, of a DELETE the old ones. Conversions of
    /// types to JSON run as the current user.
    pub fn rows(&self, mut each: impl FnMut(&str) -> Result<()>) -> Result<()> {
        let store = match self.operation {
            Operation::Insert | Operation::Update => self.data.tg_newtable,
            Operation::Delete => self.data.tg_oldtable,
            Operation::Truncate => return Ok(()),
        };
        if store.is_null() {
            return Err(PgError::new("39P01", "the trigger has no transition table"));
        }
        // The writer's settings must not take digits away.
        let _defaults = Defaults::enter();
        let rows = Rows::of(store, self.data.tg_relation);
        let mut scratch = PgMemoryContexts::new("rakam changed row");
        loop {
            wait::check_interrupts();
            // SAFETY: the text is copied out before the context is emptied; the slot has its own memory.
            let row = unsafe {
                let row = scratch.switch_to(|_| rows.next());
                scratch.reset();
                row
            };
            match row {
                Some(json) => each(&json)?,
                None => return Ok(()),
            }
        }
    }
}

/// A read pointer of our own over a transition table, which other triggers read too.
struct Rows {
    store: *mut pg_sys::Tuplestorestate,
    pointer: i32,
    slot: *mut pg_sys::TupleTableSlot,
}

impl Rows {
    fn of(store: *mut pg_sys::Tuplestorestate, relation: pg_sys::Relation) -> Self {
        // SAFETY: the trigger's own tuplestore and open relation, whose rows have its row type.
        unsafe {
            let pointer =
                pg_sys::tuplestore_alloc_read_pointer(store, pg_sys::EXEC_FLAG_REWIND as i32);
            pg_sys::tuplestore_select_read_pointer(store, pointer);
            pg_sys::tuplestore_rescan(store);
            let slot = pg_sys::MakeSingleTupleTableSlot(
                (*relation).rd_att,
                &raw const pg_sys::TTSOpsMinimalTuple,
            );
            Self {
                store,
                pointer,
                slot,
            }
        }
    }

    /// The next row as JSON, allocated in the current context on the way.
    fn next(&self) -> Option<String> {
        // SAFETY: as in `of`; the pointer is chosen again, since whatever `each` does may read the table too.
        unsafe {
            pg_sys::tuplestore_select_read_pointer(self.store, self.pointer);
            if !pg_sys::tuplestore_gettupleslot(self.store, true, false, self.slot) {
                return None;
            }
            let row = pg_sys::ExecFetchSlotHeapTupleDatum(self.slot);
            let json = direct_function_call_as_datum(pg_sys::row_to_json, &[Some(row)])?;
            String::from_datum(json, false)
        }
    }
}

impl Drop for Rows {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            // SAFETY: made in `of`; the first read pointer is the one that is expected to be chosen.
            unsafe {
                pg_sys::ExecDropSingleTupleTableSlot(self.slot);
                pg_sys::tuplestore_select_read_pointer(self.store, 0);
            }
        }
    }
}

/// The top-level transaction and the command in it that is running.
pub fn moment() -> (u64, u32) {
    // SAFETY: backend variables; the transaction has an id, since it has changed a table.
    unsafe {
        (
            pg_sys::GetTopFullTransactionId().value,
            pg_sys::GetCurrentCommandId(false),
        )
    }
}
