//! Rows of the inbox that came with a dump, until they are in the inbox of this database. Whoever moves them holds the
//! digest lock.

use super::inbox::{self, Entry, TailRow};
use crate::pg::Result;
use crate::pg::spi::{self, View, arg};

/// Rows that one transaction takes, and the bytes after which it takes no more.
const ROWS: i64 = 256;
const BYTES: i64 = 8 << 20;

/// Puts the oldest rows into the inbox and returns how many; 0 when none can be.
///
/// The caller holds the digest lock. A row waits until its project, and its collection if it names one by id, have been restored too: the digest takes
/// rows of unknown ones for rows of dropped ones.
pub fn readmit() -> Result<u64> {
    let rows: Vec<TailRow> = spi::query(
        View::Current,
        "WITH ready AS (
           SELECT r.id, sum(pg_catalog.octet_length(r.payload)) OVER (ORDER BY r.id) - pg_catalog.octet_length(r.payload) AS before
           FROM rakam_internal.inbox_restored r JOIN rakam_internal.project p USING (project_id)
           WHERE r.collection_id = 0 OR EXISTS (SELECT FROM rakam_internal.collection c WHERE c.collection_id = r.collection_id)
           ORDER BY r.id LIMIT $1)
         SELECT r.id, r.project_id, r.collection_id, r.collection, r.txid, r.n, r.received_at, r.shift_us, r.payload
         FROM rakam_internal.inbox_restored r JOIN ready USING (id) WHERE ready.before < $2 ORDER BY r.id",
        &[arg(ROWS), arg(BYTES)],
        inbox::tail_row,
    )?;
    for row in &rows {
        inbox::append(&Entry {
            project_id: row.project_id,
            collection_id: row.collection_id,
            collection: &row.collection,
            n: row.n,
            received_at_us: row.received_at_us,
            shift_us: row.shift_us,
            store_id: None,
            payload: row.payload.as_slice().into(),
        })?;
    }
    let ids: Vec<i64> = rows.iter().map(|row| row.id).collect();
    if !ids.is_empty() {
        spi::execute(
            "DELETE FROM rakam_internal.inbox_restored WHERE id = ANY ($1)",
            &[arg(ids)],
        )?;
    }
    Ok(rows.len() as u64)
}
