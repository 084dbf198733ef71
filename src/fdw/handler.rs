//! The entry point that Postgres asks for the callbacks.

use pgrx::{PgBox, pg_guard, pg_sys};

use super::{explain, modify, plan, scan};

/// Tells the function manager how `rakam_fdw_handler` is called.
#[unsafe(no_mangle)]
pub extern "C" fn pg_finfo_rakam_fdw_handler() -> &'static pg_sys::Pg_finfo_record {
    const VERSION_1: pg_sys::Pg_finfo_record = pg_sys::Pg_finfo_record { api_version: 1 };
    &VERSION_1
}

/// SQL: `rakam_internal.fdw_handler() → fdw_handler`.
///
/// Without `IsForeignScanParallelSafe` scans stay in the leader: the engine's threads use the cores already.
/// Without the direct-modify and update callbacks nothing can be changed in place.
#[unsafe(no_mangle)]
#[pg_guard]
pub unsafe extern "C-unwind" fn rakam_fdw_handler(
    _call: pg_sys::FunctionCallInfo,
) -> pg_sys::Datum {
    // SAFETY: an FdwRoutine of zeroes is one without callbacks.
    let mut routine =
        unsafe { PgBox::<pg_sys::FdwRoutine>::alloc_node(pg_sys::NodeTag::T_FdwRoutine) };
    routine.GetForeignRelSize = Some(plan::rel_size);
    routine.GetForeignPaths = Some(plan::paths);
    routine.GetForeignPlan = Some(plan::plan);
    routine.BeginForeignScan = Some(scan::begin);
    routine.IterateForeignScan = Some(scan::iterate);
    routine.ReScanForeignScan = Some(scan::rescan);
    routine.EndForeignScan = Some(scan::end);
    routine.ExplainForeignScan = Some(explain::scan);
    routine.AddForeignUpdateTargets = Some(modify::refuse_change);
    routine.PlanForeignModify = Some(modify::plan);
    routine.BeginForeignModify = Some(modify::begin);
    routine.ExecForeignInsert = Some(modify::insert);
    routine.EndForeignModify = Some(modify::end);
    routine.BeginForeignInsert = Some(modify::begin_copy);
    routine.EndForeignInsert = Some(modify::end);
    routine.IsForeignRelUpdatable = Some(modify::updatable);
    routine.ExecForeignTruncate = Some(modify::truncate);
    pg_sys::Datum::from(routine.into_pg())
}
