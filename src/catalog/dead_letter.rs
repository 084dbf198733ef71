//! Dead letters: events that could not be stored, with the reason, and what it takes to try them again.

use super::mapper::Stage;
use crate::pg::security::ActAs;
use crate::pg::spi::{self, View, arg, timestamptz};
use crate::pg::{Result, xact};

/// An event on its way into the dead letters.
pub struct NewLetter<'a> {
    pub project_id: i32,
    pub collection: &'a str,
    /// JSON objects, one a line.
    pub payload: &'a [u8],
    pub error: &'a str,
    pub received_at_us: i64,
    pub shift_us: i64,
    pub stage: Stage,
    /// Of an INSERT: it may bring an `_extra`.
    pub is_row: bool,
}

/// Keeps an event of collect as a dead letter.
pub fn insert(letter: &NewLetter<'_>) -> Result<()> {
    let _owner = ActAs::owner();
    spi::execute(
        "INSERT INTO rakam_internal.dead_letter
           (project_id, collection, payload, error, received_at, shift_us, stage, is_row)
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8)",
        &[
            arg(letter.project_id),
            arg(letter.collection),
            arg(letter.payload),
            arg(letter.error),
            timestamptz(letter.received_at_us),
            arg(letter.shift_us),
            arg(letter.stage as i16),
            arg(letter.is_row),
        ],
    )?;
    Ok(())
}

/// A record of a source that is no event.
pub struct NewRecord<'a> {
    pub project_id: i32,
    pub source: &'a str,
    pub split: &'a str,
    /// Digits of a numeric.
    pub offset: &'a str,
    pub payload: &'a [u8],
    pub error: &'a str,
    pub received_at_us: i64,
}

/// Keeps a record of a source as a dead letter. Workers only.
pub fn insert_record(letter: &NewRecord<'_>) -> Result<()> {
    spi::execute(
        "INSERT INTO rakam_internal.dead_letter (project_id, source, split, off, payload, error, received_at)
         VALUES ($1, $2, $3, $4::text::numeric, $5, $6, $7)",
        &[
            arg(letter.project_id),
            arg(letter.source),
            arg(letter.split),
            arg(letter.offset),
            arg(letter.payload),
            arg(letter.error),
            timestamptz(letter.received_at_us),
        ],
    )?;
    Ok(())
}

/// A dead letter of collect.
#[derive(Debug)]
pub struct Letter {
    pub id: i64,
    pub collection: String,
    pub payload: String,
    pub received_at_us: i64,
    pub shift_us: i64,
    pub stage: Stage,
    pub is_row: bool,
}

/// Letters that a page holds.
const PAGE: i32 = 64;

/// The newest dead letter there is.
pub fn last_id(project_id: i32) -> Result<i64> {
    let id = spi::first(
        View::Current,
        "SELECT coalesce(pg_catalog.max(id), 0) FROM rakam_internal.dead_letter WHERE project_id = $1",
        &[arg(project_id)],
        |row| row.must(1),
    )?;
    Ok(id.unwrap_or(0))
}

/// The next letters of collect behind `after`, up to `last`, locked for the transaction. What somebody else is
/// replaying is left to them.
pub fn lock_page(project_id: i32, after: i64, last: i64) -> Result<Vec<Letter>> {
    spi::query(
        View::Current,
        "SELECT id, collection, payload, coalesce(received_at, at), shift_us, stage, is_row
         FROM rakam_internal.dead_letter
         WHERE project_id = $1 AND id > $2 AND id <= $3 AND source IS NULL AND collection IS NOT NULL
         ORDER BY id LIMIT $4 FOR UPDATE SKIP LOCKED",
        &[arg(project_id), arg(after), arg(last), arg(PAGE)],
        |row| {
            Ok(Letter {
                id: row.must(1)?,
                collection: row.must(2)?,
                payload: String::from_utf8_lossy(&row.bytes(3).unwrap_or_default()).into_owned(),
                received_at_us: row.timestamptz(4).unwrap_or_else(xact::now_us),
                shift_us: row.must(5)?,
                stage: Stage::of(row.must(6)?),
                is_row: row.must(7)?,
            })
        },
    )
}

/// Removes a letter whose event has been stored, or dropped by a mapper.
pub fn delete(id: i64) -> Result<()> {
    spi::execute(
        "DELETE FROM rakam_internal.dead_letter WHERE id = $1",
        &[arg(id)],
    )?;
    Ok(())
}

/// Notes another failure of a letter: where it is now, and why.
pub fn failed_again(id: i64, payload: &[u8], stage: Stage, error: &str) -> Result<()> {
    spi::execute(
        "UPDATE rakam_internal.dead_letter
         SET attempts = attempts + 1, payload = $2, stage = $3, error = $4 WHERE id = $1",
        &[arg(id), arg(payload), arg(stage as i16), arg(error)],
    )?;
    Ok(())
}
