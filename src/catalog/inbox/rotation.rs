//! Rotation of the three tables: which takes new rows, which are sealed, when one can be emptied.

use crate::pg::snapshot::XidSnapshot;
use crate::pg::spi::{self, View, arg, xid8, xid8_array};
use crate::pg::{PgError, Result};

/// State of the three tables for the rotation.
#[derive(Debug, Clone)]
pub struct Rotation {
    pub current: usize,
    /// Per table: the tick from which readers need not open it; 0 while they must.
    pub sealed: [i64; 3],
    pub switched_at_us: i64,
    /// Tables that may hold deleted events.
    pub to_empty: [bool; 3],
}

pub fn state(view: View) -> Result<Rotation> {
    spi::first(
        view,
        "SELECT current_table, sealed[1], sealed[2], sealed[3], switched_at, to_empty[1], to_empty[2], to_empty[3]
         FROM rakam_internal.inbox_state",
        &[],
        |row| {
            Ok(Rotation {
                current: row.must::<i32>(1)? as usize,
                sealed: [row.must(2)?, row.must(3)?, row.must(4)?],
                switched_at_us: row.timestamptz(5).unwrap_or(0),
                to_empty: [row.must(6)?, row.must(7)?, row.must(8)?],
            })
        },
    )?
    .ok_or_else(|| PgError::internal("the inbox has no state"))
}

/// Has every table emptied as soon as that can be: events that were in them have been deleted.
pub fn empty_soon() -> Result<()> {
    spi::execute(
        "UPDATE rakam_internal.inbox_state SET to_empty = '{t,t,t}'",
        &[],
    )?;
    Ok(())
}

/// Table `k` holds nothing of what had to go.
pub fn is_empty(k: usize) -> Result<()> {
    spi::execute(
        "UPDATE rakam_internal.inbox_state SET to_empty[$1] = false",
        &[arg(k as i32 + 1)],
    )?;
    Ok(())
}

/// Lets another table take the new rows.
pub fn switch_to(k: usize) -> Result<()> {
    spi::execute(
        "UPDATE rakam_internal.inbox_state SET current_table = $1, switched_at = pg_catalog.clock_timestamp()",
        &[arg(k as i32)],
    )?;
    Ok(())
}

/// From tick `tick` on, readers need not open table `k`: nobody writes it and all of it is digested.
pub fn seal(k: usize, tick: i64) -> Result<()> {
    spi::execute(
        "UPDATE rakam_internal.inbox_state SET sealed[$1] = $2",
        &[arg(k as i32 + 1), arg(tick)],
    )?;
    Ok(())
}

/// The xid of the transaction that wrote a tick, and its snapshot.
pub fn tick_by_id(view: View, id: i64) -> Result<Option<(u64, XidSnapshot)>> {
    spi::first(
        view,
        "SELECT created_xid, snapshot::text FROM rakam_internal.inbox_tick WHERE shard = 0 AND tick_id = $1",
        &[arg(id)],
        |row| {
            let text: String = row.must(2)?;
            Ok((
                row.xid8(1).unwrap_or(u64::MAX),
                XidSnapshot::parse(&text)
                    .ok_or_else(|| PgError::internal("a stored snapshot is malformed"))?,
            ))
        },
    )
}

/// Whether table `k` has a row of a lagging project that is not digested.
pub fn table_lags(view: View, k: usize) -> Result<bool> {
    const LAGS: [&str; 3] = [
        "SELECT EXISTS (SELECT FROM rakam_internal.inbox_lag l JOIN rakam_internal.project p USING (project_id)
                        JOIN rakam_internal.inbox_0 i USING (project_id)
                        WHERE NOT pg_catalog.pg_visible_in_snapshot(i.txid, l.snapshot))",
        "SELECT EXISTS (SELECT FROM rakam_internal.inbox_lag l JOIN rakam_internal.project p USING (project_id)
                        JOIN rakam_internal.inbox_1 i USING (project_id)
                        WHERE NOT pg_catalog.pg_visible_in_snapshot(i.txid, l.snapshot))",
        "SELECT EXISTS (SELECT FROM rakam_internal.inbox_lag l JOIN rakam_internal.project p USING (project_id)
                        JOIN rakam_internal.inbox_2 i USING (project_id)
                        WHERE NOT pg_catalog.pg_visible_in_snapshot(i.txid, l.snapshot))",
    ];
    Ok(spi::first(view, LAGS[k], &[], |row| row.must(1))?.unwrap_or(false))
}

/// Whether table `k` has any row at all, and whether it has one that the given snapshot does not cover.
pub fn table_content(view: View, k: usize, covered: &XidSnapshot) -> Result<(bool, bool)> {
    const ANY: [&str; 3] = [
        "SELECT EXISTS (SELECT FROM rakam_internal.inbox_0),
                EXISTS (SELECT FROM rakam_internal.inbox_0 WHERE txid >= $1)
                OR EXISTS (SELECT FROM rakam_internal.inbox_0 WHERE txid = ANY ($2))",
        "SELECT EXISTS (SELECT FROM rakam_internal.inbox_1),
                EXISTS (SELECT FROM rakam_internal.inbox_1 WHERE txid >= $1)
                OR EXISTS (SELECT FROM rakam_internal.inbox_1 WHERE txid = ANY ($2))",
        "SELECT EXISTS (SELECT FROM rakam_internal.inbox_2),
                EXISTS (SELECT FROM rakam_internal.inbox_2 WHERE txid >= $1)
                OR EXISTS (SELECT FROM rakam_internal.inbox_2 WHERE txid = ANY ($2))",
    ];
    spi::first(
        view,
        ANY[k],
        &[xid8(covered.xmax), xid8_array(&covered.xip)],
        |row| Ok((row.must(1)?, row.must(2)?)),
    )?
    .ok_or_else(|| PgError::internal("EXISTS gives a row"))
}

/// Empties a table whose rows no snapshot needs any more. The caller holds it exclusively.
pub fn truncate(k: usize, tick: i64) -> Result<()> {
    spi::execute_text(&format!("TRUNCATE rakam_internal.inbox_{k}"))?;
    spi::execute(
        "UPDATE rakam_internal.inbox_state SET sealed[$1] = 0, to_empty[$1] = false, truncated_to_tick = $2",
        &[arg(k as i32 + 1), arg(tick)],
    )?;
    Ok(())
}

/// The newest tick whose rows may be gone, read with a latest snapshot by readers on a standby.
pub fn truncated_to(view: View) -> Result<i64> {
    spi::first(
        view,
        "SELECT truncated_to_tick FROM rakam_internal.inbox_state",
        &[],
        |row| row.must(1),
    )?
    .ok_or_else(|| PgError::internal("the inbox has no state"))
}

/// Deletes ticks that no snapshot can have as its newest: an older one than a tick past the horizon.
pub fn forget_ticks(horizon: u64) -> Result<u64> {
    spi::execute(
        "DELETE FROM rakam_internal.inbox_tick t WHERE shard = 0 AND tick_id <
           (SELECT max(tick_id) FROM rakam_internal.inbox_tick WHERE shard = 0 AND created_xid < $1)
         AND tick_id NOT IN (SELECT pg_catalog.unnest(sealed) FROM rakam_internal.inbox_state)",
        &[xid8(horizon)],
    )
}
