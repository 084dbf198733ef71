//! Dead letters: events that could not be stored, with the reason, and what it takes to try them again.

use std::borrow::Cow;

use super::inbox::TailRow;
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
    /// The project's quota has it already.
    pub is_charged: bool,
}

/// Keeps an event of collect as a dead letter.
pub fn insert(letter: &NewLetter<'_>) -> Result<()> {
    let _owner = ActAs::owner();
    spi::execute(
        "INSERT INTO rakam_internal.dead_letter
           (project_id, collection, payload, error, received_at, shift_us, stage, is_row, is_charged)
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)",
        &[
            arg(letter.project_id),
            arg(letter.collection),
            arg(letter.payload),
            arg(letter.error),
            timestamptz(letter.received_at_us),
            arg(letter.shift_us),
            arg(letter.stage as i16),
            arg(letter.is_row),
            arg(letter.is_charged),
        ],
    )?;
    Ok(())
}

/// Keeps an event of a row of the inbox or the outbox, with the reason, where it cannot go on. `is_row`: it may be of an INSERT.
pub fn keep(row: &TailRow, event: &[u8], error: &str, is_row: bool) -> Result<()> {
    insert(&NewLetter {
        project_id: row.project_id,
        collection: &row.collection,
        payload: event,
        error,
        received_at_us: row.received_at_us,
        shift_us: row.shift_us,
        // It has been mapped, checked and charged before it was stored.
        stage: Stage::Stored,
        is_row,
        is_charged: true,
    })
}

/// What of a source is no event, or an event of it that failed later.
pub struct NewRecord<'a> {
    pub split: Option<&'a str>,
    /// Digits of a numeric.
    pub offset: Option<String>,
    /// Of a record: the collection that it names beside its value.
    pub collection: Option<Cow<'a, str>>,
    /// A record as it came, or an event on one line.
    pub payload: &'a [u8],
    pub error: String,
    /// Of an event.
    pub stage: Stage,
    pub is_row: bool,
    /// It is a record, which is to be decoded.
    pub is_record: bool,
    /// When the record was written, in microseconds since 1970.
    pub written_at_us: Option<i64>,
    /// Of a row of CSV: the names of the columns of its file, as a JSON array.
    pub columns: Option<&'a str>,
    /// The project's quota has it already.
    pub is_charged: bool,
}

/// Keeps what failed of a source, in few statements. Workers only.
pub fn insert_records(
    project_id: i32,
    source: &str,
    received_at_us: i64,
    letters: &[NewRecord<'_>],
) -> Result<()> {
    // A statement has its arguments in memory once more.
    for letters in letters.chunks(INSERTED_AT_ONCE) {
        let each =
            |f: &dyn Fn(&NewRecord<'_>) -> bool| letters.iter().map(f).collect::<Vec<bool>>();
        let splits: Vec<Option<&str>> = letters.iter().map(|l| l.split).collect();
        let offsets: Vec<Option<&str>> = letters.iter().map(|l| l.offset.as_deref()).collect();
        let collections: Vec<Option<&str>> =
            letters.iter().map(|l| l.collection.as_deref()).collect();
        let payloads: Vec<&[u8]> = letters.iter().map(|l| l.payload).collect();
        // Text of Postgres has no NUL characters.
        let errors: Vec<String> = (letters.iter())
            .map(|l| l.error.replace('\0', "\u{fffd}"))
            .collect();
        let stages: Vec<i16> = letters.iter().map(|l| l.stage as i16).collect();
        let written: Vec<Option<i64>> = letters.iter().map(|l| l.written_at_us).collect();
        let columns: Vec<Option<&str>> = letters.iter().map(|l| l.columns).collect();
        spi::execute(
            "INSERT INTO rakam_internal.dead_letter
               (project_id, source, received_at, split, off, collection, payload, error, stage, is_row, is_record,
                written_at, columns, is_charged)
             SELECT $1, $2, $3, l.split, l.off::numeric, l.collection, l.payload, l.error, l.stage, l.is_row, l.is_record,
                    timestamptz '1970-01-01 00:00:00+00' + l.written_us * interval '1 microsecond', l.columns::jsonb,
                    l.is_charged
             FROM ROWS FROM (
               pg_catalog.unnest($4), pg_catalog.unnest($5), pg_catalog.unnest($6), pg_catalog.unnest($7),
               pg_catalog.unnest($8), pg_catalog.unnest($9), pg_catalog.unnest($10), pg_catalog.unnest($11),
               pg_catalog.unnest($12), pg_catalog.unnest($13), pg_catalog.unnest($14))
               l(split, off, collection, payload, error, stage, is_row, is_record, written_us, columns, is_charged)",
            &[
                arg(project_id),
                arg(source),
                timestamptz(received_at_us),
                arg(splits),
                arg(offsets),
                arg(collections),
                arg(payloads),
                arg(errors),
                arg(stages),
                arg(each(&|l| l.is_row)),
                arg(each(&|l| l.is_record)),
                arg(written),
                arg(columns),
                arg(each(&|l| l.is_charged)),
            ],
        )?;
    }
    Ok(())
}

/// A dead letter.
#[derive(Debug)]
pub struct Letter {
    pub id: i64,
    /// Of an event its collection; of a record the one that it names beside its value.
    pub collection: Option<String>,
    pub payload: Vec<u8>,
    pub received_at_us: i64,
    pub shift_us: i64,
    pub stage: Stage,
    pub is_row: bool,
    pub is_record: bool,
    pub split: Option<String>,
    pub offset: Option<String>,
    pub written_at_us: Option<i64>,
    /// Of a row of CSV: the names of the columns of its file, as a JSON array.
    pub columns: Option<String>,
    /// The project's quota has it already.
    pub is_charged: bool,
}

/// Letters that a page holds.
const PAGE: i32 = 64;
/// Letters of one statement.
const INSERTED_AT_ONCE: usize = 4096;

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

/// The next letters of a source (None: of collect) behind `after`, up to `last`, locked for the transaction. What somebody
/// else is replaying is left to them.
pub fn lock_page(
    project_id: i32,
    source: Option<&str>,
    after: i64,
    last: i64,
) -> Result<Vec<Letter>> {
    spi::query(
        View::Current,
        "SELECT id, collection, payload, coalesce(received_at, at), shift_us, stage, is_row, is_record, split, off::text,
                written_at, columns::text, is_charged
         FROM rakam_internal.dead_letter
         WHERE project_id = $1 AND id > $2 AND id <= $3 AND source IS NOT DISTINCT FROM $5
           AND (is_record OR collection IS NOT NULL)
         ORDER BY id LIMIT $4 FOR UPDATE SKIP LOCKED",
        &[arg(project_id), arg(after), arg(last), arg(PAGE), arg(source)],
        |row| {
            Ok(Letter {
                id: row.must(1)?,
                collection: row.get(2),
                payload: row.bytes(3).unwrap_or_default(),
                received_at_us: row.timestamptz(4).unwrap_or_else(xact::now_us),
                shift_us: row.must(5)?,
                stage: Stage::of(row.must(6)?),
                is_row: row.must(7)?,
                is_record: row.must(8)?,
                split: row.get(9),
                offset: row.get(10),
                written_at_us: row.timestamptz(11),
                columns: row.get(12),
                is_charged: row.must(13)?,
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

/// Another failure of a letter.
pub struct Failed<'a> {
    /// What it is now, if that is something else.
    pub payload: Option<&'a [u8]>,
    pub stage: Stage,
    pub error: &'a str,
    /// The project's quota has it by now.
    pub is_charged: bool,
}

/// Notes another failure of a letter.
pub fn failed_again(id: i64, failed: &Failed<'_>) -> Result<()> {
    spi::execute(
        "UPDATE rakam_internal.dead_letter
         SET attempts = attempts + 1, payload = coalesce($2, payload), stage = $3, error = $4, is_charged = $5
         WHERE id = $1",
        &[
            arg(id),
            arg(failed.payload),
            arg(failed.stage as i16),
            arg(failed.error),
            arg(failed.is_charged),
        ],
    )?;
    Ok(())
}
