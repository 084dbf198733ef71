//! A condition that somebody hands over as text, as after WHERE: one expression over the columns of a relation, checked
//! by Postgres' own parser and evaluated by its executor.
//!
//! The text never becomes a part of another text: it is parsed alone, as an expression, and its tree is put below the
//! WHERE of a query of ours. So nothing in it can end the condition and begin something else.

use std::ffi::{CStr, CString, c_int, c_void};

use pgrx::{pg_guard, pg_sys};

use super::error::{PgError, Result};
use super::relation;
use super::snapshot::Snapshot;

/// A condition on the rows of a table.
pub struct Condition {
    /// The table's qualified name as SQL text.
    table: String,
    text: CString,
}

impl Condition {
    pub fn new(table: pg_sys::Oid, text: &str) -> Result<Self> {
        Ok(Self {
            table: relation::qualified_name(table)
                .ok_or_else(|| PgError::internal("the table of a condition is gone"))?,
            text: CString::new(text).map_err(|_| PgError::internal("NUL byte in a text"))?,
        })
    }

    /// Parses and type-checks it, with the names that the current user finds. What Postgres finds wrong is raised with
    /// its position in the text, as an error of the running statement: not to be caught.
    pub fn check(&self) -> Result<()> {
        let _position = PositionInText::push(&self.text);
        self.query().map(drop)
    }

    /// Calls `each` with the ctid of every row for which the condition is true, evaluated as the current user under the
    /// active snapshot. `ready` is called between planning and execution: from then until the scans have been opened no
    /// function that a user wrote runs.
    pub fn matching(
        &self,
        snapshot: Snapshot,
        ready: impl FnOnce(),
        mut each: impl FnMut(u32, u16),
    ) -> Result<()> {
        let query = self.query()?;
        let mut receiver = Receiver {
            server: pg_sys::DestReceiver {
                receiveSlot: Some(receive),
                rStartup: Some(start_up),
                rShutdown: Some(shut_down),
                rDestroy: Some(shut_down),
                mydest: pg_sys::CommandDest::DestNone,
            },
            each: &mut each,
        };
        // SAFETY: a query that was analysed and rewritten above; text, snapshot and receiver outlive the execution,
        // which is ended here, or with the transaction on an error. No parallel workers are planned.
        unsafe {
            let plan = pg_sys::pg_plan_query(query, self.text.as_ptr(), 0, std::ptr::null_mut());
            let run = pg_sys::CreateQueryDesc(
                plan,
                self.text.as_ptr(),
                snapshot.as_ptr(),
                std::ptr::null_mut(),
                (&raw mut receiver).cast(),
                std::ptr::null_mut(),
                std::ptr::null_mut(),
                0,
            );
            ready();
            pg_sys::ExecutorStart(run, 0);
            pg_sys::ExecutorRun(
                run,
                pg_sys::ScanDirection::ForwardScanDirection,
                0,
                #[cfg(not(feature = "pg18"))]
                true,
            );
            pg_sys::ExecutorFinish(run);
            pg_sys::ExecutorEnd(run);
            pg_sys::FreeQueryDesc(run);
        }
        Ok(())
    }

    /// `SELECT ctid FROM table WHERE condition`, analysed and rewritten, in the current memory context.
    fn query(&self) -> Result<*mut pg_sys::Query> {
        let frame = CString::new(format!("SELECT ctid FROM {} WHERE true", self.table))
            .map_err(|_| PgError::internal("NUL byte in a name"))?;
        // SAFETY: parse trees as the parser makes them, in the current memory context; errors are raised.
        unsafe {
            let expression = self.expression()?;
            let parsed =
                pg_sys::raw_parser(frame.as_ptr(), pg_sys::RawParseMode::RAW_PARSE_DEFAULT);
            let statement: *mut pg_sys::RawStmt = pg_sys::list_nth(parsed, 0).cast();
            (*(*statement).stmt.cast::<pg_sys::SelectStmt>()).whereClause = expression;
            let query = pg_sys::parse_analyze_fixedparams(
                statement,
                self.text.as_ptr(),
                std::ptr::null(),
                0,
                std::ptr::null_mut(),
            );
            ensure_plain_columns((*(*query).jointree).quals)?;
            let rewritten = pg_sys::pg_rewrite_query(query);
            if rewritten.is_null() || (*rewritten).length != 1 {
                return Err(PgError::internal("a query was rewritten to several"));
            }
            let query: *mut pg_sys::Query = pg_sys::list_nth(rewritten, 0).cast();
            if pg_sys::contain_volatile_functions(query.cast()) {
                return Err(PgError::new(
                    "0A000",
                    "the condition must not call volatile functions",
                )
                .hint("What such a function gives may differ from row to row and from call to call: work the value out first."));
            }
            Ok(query)
        }
    }

    /// The text as one expression.
    unsafe fn expression(&self) -> Result<*mut pg_sys::Node> {
        // SAFETY: as for `query`. In this mode the parser takes what may follow SELECT: all but the expression has to
        // be absent.
        unsafe {
            let parsed = pg_sys::raw_parser(
                self.text.as_ptr(),
                pg_sys::RawParseMode::RAW_PARSE_PLPGSQL_EXPR,
            );
            let statement: *mut pg_sys::RawStmt = pg_sys::list_nth(parsed, 0).cast();
            let select = &*(*statement).stmt.cast::<pg_sys::SelectStmt>();
            let others = [
                select.distinctClause,
                select.fromClause,
                select.groupClause,
                select.windowClause,
                select.sortClause,
                select.lockingClause,
                select.valuesLists,
            ];
            let clauses = [
                select.whereClause,
                select.havingClause,
                select.limitOffset,
                select.limitCount,
            ];
            let targets = select.targetList;
            let alone = others.iter().all(|list| list.is_null())
                && clauses.iter().all(|clause| clause.is_null())
                && !targets.is_null()
                && (*targets).length == 1;
            if alone {
                let target: *mut pg_sys::ResTarget = pg_sys::list_nth(targets, 0).cast();
                if (*target).name.is_null() && (*target).indirection.is_null() {
                    return Ok((*target).val);
                }
            }
            Err(
                PgError::new("42601", "the condition must be one expression")
                    .hint("Write it as after WHERE: country = 'TR' AND _time < '2024-01-01'."),
            )
        }
    }
}

/// What a row is called inside is nobody's business: no ctid, xmin and the like. `tableoid` is harmless.
unsafe fn ensure_plain_columns(quals: *mut pg_sys::Node) -> Result<()> {
    let mut used: *mut pg_sys::Bitmapset = std::ptr::null_mut();
    let mut member = -1;
    // SAFETY: a walker over an analysed expression; attribute numbers in the set are shifted to be positive.
    unsafe {
        pg_sys::pull_varattnos(quals, 1, &mut used);
        loop {
            member = pg_sys::bms_next_member(used, member);
            if member < 0 {
                return Ok(());
            }
            let attnum = member + pg_sys::FirstLowInvalidHeapAttributeNumber;
            if attnum < 0 && attnum != pg_sys::TableOidAttributeNumber {
                return Err(PgError::new(
                    "0A000",
                    "the condition must not use system columns",
                ));
            }
        }
    }
}

/// While it lives, errors of Postgres tell their position in the condition's text, not in the statement that called us.
///
/// An error is reported twice: by the server, whose report is turned into a panic without its position, and once more
/// where the panic leaves our code. So the position is noted the first time and told the second; for that the entry
/// stays on the server's stack when a panic passes, in memory of the transaction. Whoever handles the error on the
/// server's side puts the stack back to what it was.
struct PositionInText(*mut Entry);

#[repr(C)]
struct Entry {
    callback: pg_sys::ErrorContextCallback,
    text: *mut std::ffi::c_char,
    position: c_int,
}

impl PositionInText {
    fn push(text: &CStr) -> Self {
        // SAFETY: memory that lives as long as the transaction, and so longer than any error in it.
        unsafe {
            let memory = pg_sys::TopTransactionContext;
            let entry: *mut Entry = pg_sys::MemoryContextAlloc(memory, size_of::<Entry>()).cast();
            entry.write(Entry {
                callback: pg_sys::ErrorContextCallback {
                    previous: pg_sys::error_context_stack,
                    callback: Some(point_into_text),
                    arg: entry.cast(),
                },
                text: pg_sys::MemoryContextStrdup(memory, text.as_ptr()),
                position: 0,
            });
            pg_sys::error_context_stack = &raw mut (*entry).callback;
            Self(entry)
        }
    }
}

impl Drop for PositionInText {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            // SAFETY: the entry is the top of the stack again.
            unsafe {
                pg_sys::error_context_stack = (*self.0).callback.previous;
                pg_sys::pfree((*self.0).text.cast());
                pg_sys::pfree(self.0.cast());
            }
        }
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn point_into_text(entry: *mut c_void) {
    // SAFETY: called by the server while it makes an error, with the entry above; the text is copied.
    unsafe {
        let entry = entry.cast::<Entry>();
        let position = pg_sys::geterrposition();
        if position > 0 {
            (*entry).position = position;
        }
        if (*entry).position > 0 {
            pg_sys::errposition(0);
            pg_sys::internalerrposition((*entry).position);
            pg_sys::internalerrquery((*entry).text);
        }
    }
}

/// Where the executor sends rows.
#[repr(C)]
struct Receiver<'a> {
    server: pg_sys::DestReceiver,
    each: &'a mut dyn FnMut(u32, u16),
}

#[pg_guard]
unsafe extern "C-unwind" fn start_up(
    _receiver: *mut pg_sys::DestReceiver,
    _operation: c_int,
    _columns: pg_sys::TupleDesc,
) {
}

#[pg_guard]
unsafe extern "C-unwind" fn shut_down(_receiver: *mut pg_sys::DestReceiver) {}

#[pg_guard]
unsafe extern "C-unwind" fn receive(
    slot: *mut pg_sys::TupleTableSlot,
    receiver: *mut pg_sys::DestReceiver,
) -> bool {
    // SAFETY: the receiver is the first field of ours; the query's only column is a tid.
    unsafe {
        let receiver = &mut *receiver.cast::<Receiver>();
        if (*slot).tts_nvalid < 1 {
            pg_sys::slot_getsomeattrs_int(slot, 1);
        }
        if !*(*slot).tts_isnull {
            let tid: *mut pg_sys::ItemPointerData = (*(*slot).tts_values).cast_mut_ptr();
            let block = (*tid).ip_blkid;
            let block = (u32::from(block.bi_hi) << 16) | u32::from(block.bi_lo);
            (receiver.each)(block, (*tid).ip_posid);
        }
        true
    }
}
