//! The triggers by which a restore is seen (sql/restore.sql): they fire for rows that come past our functions.

use std::cell::Cell;

use pgrx::pg_sys::panic::ErrorReport;
use pgrx::prelude::*;

use crate::catalog::restore;
use crate::pg::security::ActAs;
use crate::pg::{settings, spi, xact};

thread_local! {
    /// This session has put its checks off for the present statement.
    static PUT_OFF: Cell<bool> = const { Cell::new(false) };
}

/// Around each statement that adds rows to a table that dumps have. Of somebody else's statement, it is noted that a restore is
/// under way (argument `true`: the table is one that is counted), and rows are not checked against tables that may come later.
#[pg_trigger(sql = "
CREATE FUNCTION rakam_internal.note_restore() RETURNS trigger LANGUAGE c
AS 'MODULE_PATHNAME', '@FUNCTION_NAME@';")]
fn note_restore<'a>(
    trigger: &'a PgTrigger<'a>,
) -> std::result::Result<Option<PgHeapTuple<'a, AllocatedByPostgres>>, ErrorReport> {
    if spi::is_inside() || xact::is_in_extension_script() {
        return Ok(None);
    }
    if matches!(trigger.when(), Ok(PgTriggerWhen::After)) {
        if PUT_OFF.replace(false) {
            settings::put_off_checks(false);
        }
        return Ok(None);
    }
    let is_counted = trigger
        .extra_args()
        .is_ok_and(|args| args.first().is_some_and(|arg| arg == "t" || arg == "true"));
    if is_counted {
        let _owner = ActAs::owner();
        restore::begin()?;
    }
    // One statement may fill several such tables.
    PUT_OFF.set(settings::put_off_checks(true) || PUT_OFF.get());
    Ok(None)
}
