//! Loads of files: how far each has been stored, and the storages whose files a role may name.

use std::collections::HashSet;

use rakam_files::source::Position;

use crate::pg::spi::{self, View, arg};
use crate::pg::{Oid, Result};

/// How far a load has been stored.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Progress {
    /// Files stored in full.
    pub file: usize,
    /// Of the file after them.
    pub position: Position,
    pub events: u64,
}

/// The load of this key, begun now if there is none.
pub fn begin(key: &[u8], project_id: i32, collection_id: i32) -> Result<Progress> {
    spi::execute(
        "INSERT INTO rakam_internal.file_load (load_key, project_id, collection_id) VALUES ($1, $2, $3)
         ON CONFLICT (load_key) DO UPDATE SET updated_at = pg_catalog.clock_timestamp()",
        &[arg(key), arg(project_id), arg(collection_id)],
    )?;
    let found = spi::first(
        View::Current,
        "SELECT file, next_row, next_byte, next_line, events FROM rakam_internal.file_load WHERE load_key = $1",
        &[arg(key)],
        |row| {
            let number = |column| row.must::<i64>(column).map(|n| n as u64);
            Ok(Progress {
                file: row.must::<i32>(1)? as usize,
                position: Position {
                    row: number(2)?,
                    byte: number(3)?,
                    line: number(4)?,
                },
                events: number(5)?,
            })
        },
    )?;
    Ok(found.unwrap_or_default())
}

/// Notes how far the load is stored, in the transaction that stores it. Returns false if the load is gone.
pub fn advance(key: &[u8], to: &Progress) -> Result<bool> {
    let updated = spi::execute(
        "UPDATE rakam_internal.file_load
         SET file = $2, next_row = $3, next_byte = $4, next_line = $5, events = $6,
             updated_at = pg_catalog.clock_timestamp()
         WHERE load_key = $1",
        &[
            arg(key),
            arg(to.file as i32),
            arg(to.position.row as i64),
            arg(to.position.byte as i64),
            arg(to.position.line as i64),
            arg(to.events as i64),
        ],
    )?;
    Ok(updated == 1)
}

/// The load is complete: the same call begins anew.
pub fn finish(key: &[u8]) -> Result<bool> {
    let deleted = spi::execute(
        "DELETE FROM rakam_internal.file_load WHERE load_key = $1",
        &[arg(key)],
    )?;
    Ok(deleted == 1)
}

/// How long an interrupted load may be taken up again; then its call begins anew. An interval.
const KEPT: &str = "30 days";

/// Forgets the loads that nobody has taken up again.
pub fn tidy() -> Result<()> {
    spi::execute(
        "DELETE FROM rakam_internal.file_load WHERE updated_at < pg_catalog.clock_timestamp() - $1::interval",
        &[arg(KEPT)],
    )?;
    Ok(())
}

/// How long an interrupted load counts as under way, as an interval: its caller may take it up again.
const PAUSE: &str = "10 minutes";

/// The collections into which files are being loaded.
pub fn loading(view: View) -> Result<HashSet<i32>> {
    let ids = spi::query(
        view,
        "SELECT collection_id FROM rakam_internal.file_load
         WHERE updated_at > pg_catalog.clock_timestamp() - $1::interval",
        &[arg(PAUSE)],
        |row| row.must(1),
    )?;
    Ok(ids.into_iter().collect())
}

/// The address of a storage server; None if there is none.
pub fn storage_url(view: View, name: &str) -> Result<Option<String>> {
    spi::first(
        view,
        "SELECT o.option_value FROM pg_catalog.pg_foreign_server f
         JOIN pg_catalog.pg_foreign_data_wrapper w ON w.oid = f.srvfdw AND w.fdwname = 'rakam'
         CROSS JOIN LATERAL pg_catalog.pg_options_to_table(f.srvoptions) o
         WHERE o.option_name = 'url' AND f.srvname = $1",
        &[arg(name)],
        |row| row.must(1),
    )
}

/// The storages that a role may use: name and address.
pub fn storage_urls(user: Oid) -> Result<Vec<(String, String)>> {
    spi::query(
        View::Current,
        "SELECT f.srvname::text, o.option_value FROM pg_catalog.pg_foreign_server f
         JOIN pg_catalog.pg_foreign_data_wrapper w ON w.oid = f.srvfdw AND w.fdwname = 'rakam'
         CROSS JOIN LATERAL pg_catalog.pg_options_to_table(f.srvoptions) o
         WHERE o.option_name = 'url' AND pg_catalog.has_server_privilege($1, f.oid, 'USAGE')
         ORDER BY pg_catalog.length(o.option_value) DESC",
        &[arg(user)],
        |row| Ok((row.must(1)?, row.must(2)?)),
    )
}
