//! EXPLAIN ANALYZE counts rows that a policy has hidden: "Rows Removed by Filter" and the rows of an index condition tell of other
//! tenants. So nobody whom the policies of our tables bind may have a query of them analyzed.

use pgrx::{pg_guard, pg_sys};

use super::error::{OrRaise, PgError, Result};
use super::relation;

static mut PREVIOUS: pg_sys::ExecutorFinish_hook_type = None;

/// Called when the library is loaded. A session that has loaded nothing of ours does so for the policies' functions when such a
/// query begins: its end is seen in any case.
pub fn init() {
    // SAFETY: once per process, before anything of ours runs in it.
    unsafe {
        PREVIOUS = pg_sys::ExecutorFinish_hook;
        pg_sys::ExecutorFinish_hook = Some(executor_finish);
    }
}

// Postgres' own, without pgrx' guard: that would turn an error of any trigger into a new one, without context.
unsafe extern "C-unwind" {
    fn standard_ExecutorFinish(query: *mut pg_sys::QueryDesc);
}

/// Not guarded either: an error jumps over this frame, which holds nothing that would be dropped.
unsafe extern "C-unwind" fn executor_finish(query: *mut pg_sys::QueryDesc) {
    // SAFETY: Postgres passes a valid query; the call goes on unchanged.
    unsafe {
        if (*query).instrument_options != 0 {
            refuse_analyzed(query);
        }
        PREVIOUS.unwrap_or(standard_ExecutorFinish)(query);
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn refuse_analyzed(query: *mut pg_sys::QueryDesc) {
    // SAFETY: as the caller promises.
    unsafe { check(query) }.or_raise();
}

/// Whether somebody takes the rows of a query: then it is not EXPLAIN that runs it, but auto_explain that measures it for the log.
fn has_reader(receiver: pg_sys::CommandDest::Type) -> bool {
    use pg_sys::CommandDest;
    [
        CommandDest::DestRemote,
        CommandDest::DestRemoteExecute,
        CommandDest::DestRemoteSimple,
        CommandDest::DestDebug,
        CommandDest::DestSPI,
        CommandDest::DestTuplestore,
        CommandDest::DestSQLFunction,
        CommandDest::DestCopyOut,
        CommandDest::DestTupleQueue,
    ]
    .contains(&receiver)
}

/// # Safety
/// `query` must be one that the executor runs.
unsafe fn check(query: *mut pg_sys::QueryDesc) -> Result<()> {
    // SAFETY: the executor's own structures; the relations of a running query are locked.
    unsafe {
        let receiver = (*query).dest;
        if !receiver.is_null() && has_reader((*receiver).mydest) {
            return Ok(());
        }
        let ours = pg_sys::get_namespace_oid(c"rakam_internal".as_ptr(), true);
        if ours == pg_sys::InvalidOid {
            return Ok(());
        }
        let entries = (*(*query).plannedstmt).rtable;
        for at in 0..pg_sys::list_length(entries) {
            let entry = pg_sys::list_nth(entries, at).cast::<pg_sys::RangeTblEntry>();
            if (*entry).rtekind == pg_sys::RTEKind::RTE_RELATION
                && pg_sys::get_rel_namespace((*entry).relid) == ours
                && relation::is_bound_by_policies((*entry).relid)
            {
                return Err(PgError::new(
                    "42501",
                    "permission denied to analyze a query of rakam's tables",
                )
                .detail("What EXPLAIN ANALYZE counts would tell of other projects.")
                .hint("Use EXPLAIN without ANALYZE."));
            }
        }
    }
    Ok(())
}
