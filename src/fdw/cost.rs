//! What the planner is told: rows from the manifest's totals, and costs.

use pgrx::pg_sys;

use super::options::TableOptions;
use crate::catalog::{attached, manifest, registry};
use crate::pg::Result;
use crate::pg::security::ActAs;
use crate::pg::snapshot::Snapshot;
use crate::pg::spi::View;

/// Rows of a table about which nothing is known, or nothing may be.
const UNKNOWN_ROWS: f64 = 1000.0;
/// Starting engine tasks and reading the manifest, in units of a sequential page read.
const STARTUP_COST: f64 = 25.0;
/// A row that the engine reads, relative to one that Postgres handles: columns are read, not tuples.
const ENGINE_ROW: f64 = 0.1;

/// Estimated rows of the table before any filter, as `user` may know them.
///
/// The caller marks the plan as dependent on the role.
pub fn rows(options: &TableOptions, user: pg_sys::Oid) -> f64 {
    // SAFETY: reads backend state.
    if !unsafe { pg_sys::ActiveSnapshotSet() } {
        return UNKNOWN_ROWS;
    }
    let _user = ActAs::user(user);
    let view = View::Under(Snapshot::active());
    // An estimate is no reason to fail: the scan itself reports what is wrong.
    match totals(options, view) {
        Ok(rows) if rows > 0 => rows as f64,
        _ => UNKNOWN_ROWS,
    }
}

fn totals(options: &TableOptions, view: View) -> Result<i64> {
    if let Some(name) = &options.attached {
        let table = attached::find(view, &options.project, name)?;
        return Ok(table.map_or(0, |table| table.n));
    }
    let collections = if options.is_all() {
        registry::collections(view, &options.project)?
    } else {
        registry::collection(view, &options.project, &options.collection)?
            .into_iter()
            .collect()
    };
    collections.iter().try_fold(0_i64, |sum, collection| {
        let (cold, hot) = manifest::estimate(view, collection.id)?;
        Ok(sum.saturating_add(cold).saturating_add(hot))
    })
}

/// Startup and total cost of reading `tuples` rows of which the engine hands `rows` over.
pub fn scan(tuples: f64, rows: f64, local: pg_sys::QualCost) -> (f64, f64) {
    // SAFETY: reads a planner setting.
    let per_row = unsafe { pg_sys::cpu_tuple_cost };
    let startup = STARTUP_COST + local.startup;
    let total = startup + tuples * per_row * ENGINE_ROW + rows * (per_row + local.per_tuple);
    (startup, total)
}
