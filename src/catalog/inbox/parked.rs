//! Events that could not be digested: set aside, tried again alone, given up as dead letters.

use super::{TailRow, tail_row};
use crate::catalog::dead_letter;
use crate::pg::Result;
use crate::pg::spi::{self, View, arg, xid8};

/// Sets an event aside that could not be digested: it stays readable, is tried again alone, and never stops others.
pub fn park(row: &TailRow, event: &[u8], collection_id: i32, error: &str) -> Result<()> {
    spi::execute(
        "INSERT INTO rakam_internal.inbox_parked
           (id, project_id, collection_id, collection, txid, n, received_at, shift_us, payload, error, next_attempt)
         VALUES (pg_catalog.nextval('rakam_internal.inbox_id'), $1, $2, $3, $4, 1, $5, $6, $7, $8,
                 pg_catalog.clock_timestamp() + interval '10 seconds')",
        &[
            arg(row.project_id),
            arg(collection_id),
            arg(row.collection.as_str()),
            xid8(row.txid),
            spi::timestamptz(row.received_at_us),
            arg(row.shift_us),
            arg(event),
            arg(error),
        ],
    )?;
    Ok(())
}

/// A parked event that is due for another attempt.
pub struct Parked {
    pub row: TailRow,
    pub attempts: i32,
}

/// Parked events whose next attempt is due.
pub fn due(view: View, limit: i64) -> Result<Vec<Parked>> {
    spi::query(
        view,
        "SELECT id, project_id, collection_id, collection, txid, n, received_at, shift_us, payload, attempts
         FROM rakam_internal.inbox_parked WHERE next_attempt <= pg_catalog.clock_timestamp() ORDER BY id LIMIT $1",
        &[arg(limit)],
        |row| {
            Ok(Parked {
                row: tail_row(row)?,
                attempts: row.must(10)?,
            })
        },
    )
}

/// Puts a parked event off: the wait doubles with each attempt.
pub fn again(id: i64, error: &str) -> Result<()> {
    spi::execute(
        "UPDATE rakam_internal.inbox_parked SET attempts = attempts + 1, error = $2,
           next_attempt = pg_catalog.clock_timestamp() + interval '10 seconds' * (2 ^ attempts)
         WHERE id = $1",
        &[arg(id), arg(error)],
    )?;
    Ok(())
}

/// Takes a parked event out: it has been digested or has become a dead letter.
pub fn forget(id: i64) -> Result<u64> {
    spi::execute(
        "DELETE FROM rakam_internal.inbox_parked WHERE id = $1",
        &[arg(id)],
    )
}

/// Gives a parked event up: its bytes and the reason are kept as a dead letter.
pub fn to_dead_letter(parked: &TailRow, error: &str) -> Result<()> {
    dead_letter::keep(parked, &parked.payload, error, true)?;
    forget(parked.id)?;
    Ok(())
}
