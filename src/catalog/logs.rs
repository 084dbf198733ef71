//! Logs that grow: rows beyond their age go, some at a time.

use std::time::Duration;

use crate::pg::spi::{self, View, arg};
use crate::pg::{Result, guc};

/// Rows that one transaction deletes at most.
const ROWS: i64 = 10_000;

/// Deletes what is older than the settings allow. True: there may be more.
pub fn run() -> Result<bool> {
    // Rows that somebody else has locked (a replay of dead letters) are left for the next time.
    const STATEMENTS: [&str; 3] = [
        "DELETE FROM rakam_internal.invalid_value WHERE id = ANY (ARRAY(SELECT id FROM rakam_internal.invalid_value
           WHERE at < pg_catalog.clock_timestamp() - pg_catalog.make_interval(secs => $1) ORDER BY at LIMIT $2
           FOR UPDATE SKIP LOCKED))",
        "DELETE FROM rakam_internal.dead_letter WHERE id = ANY (ARRAY(SELECT id FROM rakam_internal.dead_letter
           WHERE at < pg_catalog.clock_timestamp() - pg_catalog.make_interval(secs => $1) ORDER BY at LIMIT $2
           FOR UPDATE SKIP LOCKED))",
        "DELETE FROM rakam_internal.audit_log WHERE id = ANY (ARRAY(SELECT id FROM rakam_internal.audit_log
           WHERE at < pg_catalog.clock_timestamp() - pg_catalog.make_interval(secs => $1) ORDER BY at LIMIT $2
           FOR UPDATE SKIP LOCKED))",
    ];
    let ages = [
        guc::invalid_retention(),
        guc::dead_letter_retention(),
        guc::audit_retention(),
    ];
    let mut more = false;
    for (statement, age) in STATEMENTS.into_iter().zip(ages) {
        if let Some(age) = age {
            more |= delete(statement, age)?;
        }
    }
    Ok(more)
}

fn delete(statement: &'static str, age: Duration) -> Result<bool> {
    let deleted = spi::run(
        View::Current,
        statement,
        &[arg(age.as_secs_f64()), arg(ROWS)],
        |_| Ok(()),
    )?;
    Ok(deleted as i64 == ROWS)
}
