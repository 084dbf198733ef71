//! Bytes of events by project and UTC day, for quotas of them. A row per digest, summed up later: nobody waits for a
//! counter that somebody else has changed and not committed.

use crate::pg::Result;
use crate::pg::spi::{self, View, arg};

/// Notes bytes of a day (since 1970).
pub fn add(project_id: i32, day: i32, bytes: i64) -> Result<()> {
    spi::execute(
        "INSERT INTO rakam_internal.usage (project_id, day, bytes)
         SELECT project_id, date '1970-01-01' + $2, $3 FROM rakam_internal.project WHERE project_id = $1",
        &[arg(project_id), arg(day), arg(bytes)],
    )?;
    Ok(())
}

/// The bytes of a project on a day.
pub fn of_day(view: View, project_id: i32, day: i32) -> Result<i64> {
    Ok(spi::first(
        view,
        "SELECT coalesce(sum(bytes), 0)::int8 FROM rakam_internal.usage
         WHERE project_id = $1 AND day = date '1970-01-01' + $2",
        &[arg(project_id), arg(day)],
        |row| row.must(1),
    )?
    .unwrap_or(0))
}

/// Makes one row of the rows of each project and day, and forgets days before yesterday. One caller at a time.
pub fn sum_up() -> Result<()> {
    spi::execute(
        // Rows of a project that some transaction is dropping are left alone.
        "DELETE FROM rakam_internal.usage WHERE ctid = ANY (ARRAY(
           SELECT ctid FROM rakam_internal.usage
           WHERE day < (pg_catalog.clock_timestamp() AT TIME ZONE 'UTC')::date - 1 FOR UPDATE SKIP LOCKED))",
        &[],
    )?;
    spi::execute(
        "WITH many AS (SELECT project_id, day FROM rakam_internal.usage GROUP BY 1, 2 HAVING count(*) > 1),
              free AS MATERIALIZED (
                SELECT u.ctid AS place FROM rakam_internal.usage u JOIN many m USING (project_id, day)
                FOR UPDATE OF u SKIP LOCKED),
              gone AS (DELETE FROM rakam_internal.usage u USING free f
                       WHERE u.ctid = f.place RETURNING u.project_id, u.day, u.bytes)
         INSERT INTO rakam_internal.usage (project_id, day, bytes)
           SELECT project_id, day, sum(bytes)::int8 FROM gone GROUP BY 1, 2",
        &[],
    )?;
    Ok(())
}
