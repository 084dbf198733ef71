//! A restore of a dump under way: whether there is one, and when it is through (sql/restore.sql).
//!
//! Rows come table by table, each table's in a transaction of its own, of pg_restore -j several at a time. Chunks may be there
//! before what is deleted of them, files before the fields of their collection, rows before their sequence. So from the first
//! row on nothing is digested, merged, written or deleted: the resident waits ([`is_over`]), tasks are refused, and what writes
//! chunks or the manifest asks [`ensure_over`] itself. It is over when every table has the rows that the dump says.

use std::cell::Cell;

use crate::pg::locks::{self, Mode};
use crate::pg::spi::{self, View, quote_ident};
use crate::pg::{PgError, Result, relation, xact};

/// Whether a restore is under way.
pub fn is_under_way(view: View) -> Result<bool> {
    Ok(spi::run(
        view,
        "SELECT FROM rakam_internal.restore LIMIT 1",
        &[],
        |_| Ok(()),
    )? > 0)
}

/// Rows come past our functions: a restore is under way from the commit of this transaction on.
pub fn begin() -> Result<()> {
    if !is_under_way(View::Current)? {
        spi::execute("INSERT INTO rakam_internal.restore DEFAULT VALUES", &[])?;
    }
    Ok(())
}

/// Whether no restore is under way any more. In a transaction of its own.
pub fn is_over(waits: Waits) -> Result<bool> {
    let view = View::Current;
    if !is_under_way(view)? {
        return Ok(true);
    }
    if first_lack(view)?.is_some() {
        // Whoever ends it takes the numbers away, too.
        return Ok(!is_under_way(view)?);
    }
    // Sessions that have noted it and not committed yet are still at it; or another one is just here.
    let table = relation::oid("rakam_internal", "restore");
    match waits {
        Waits::Yes => locks::relation(table, Mode::ShareRowExclusive),
        Waits::No if !locks::try_relation(table, Mode::ShareRowExclusive) => return Ok(false),
        Waits::No => {}
    }
    if is_under_way(view)? && first_lack(view)?.is_some() {
        return Ok(false);
    }
    spi::execute("DELETE FROM rakam_internal.restore", &[])?;
    Ok(true)
}

/// Whether to wait for sessions that are in the middle of something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Waits {
    Yes,
    No,
}

thread_local! {
    /// The transaction that was allowed to write.
    static ALLOWED: Cell<u64> = const { Cell::new(0) };
}

/// Before a transaction writes chunks or the manifest. Errors: 55000.
pub fn ensure_over() -> Result<()> {
    let xid = xact::top_xid();
    if ALLOWED.get() == xid {
        return Ok(());
    }
    if is_under_way(View::Current)? {
        return Err(under_way());
    }
    ALLOWED.set(xid);
    Ok(())
}

pub fn under_way() -> PgError {
    PgError::new("55000", "a restore of the database is under way")
        .detail("What a dump brings is used once all of it is there.")
        .hint("See rakam.health() for what is missing, and what to do if the restore was interrupted.")
}

/// What a restore that is under way lacks, in words; None: there is none, or nothing is missing.
pub fn lack(view: View) -> Result<Option<String>> {
    match is_under_way(view)? {
        true => first_lack(view),
        false => Ok(None),
    }
}

/// The tables that come last are asked first: of a restore that goes on it is one of those.
fn first_lack(view: View) -> Result<Option<String>> {
    let expected: Vec<(String, i64)> = spi::query(
        view,
        "SELECT relation, coalesce(sum(1::int8 << bit) FILTER (WHERE bit >= 0), 0)::int8
         FROM rakam_internal.restore_count GROUP BY 1 ORDER BY 1 DESC",
        &[],
        |row| Ok((row.must(1)?, row.must(2)?)),
    )?;
    // The empty name closes the list.
    if expected
        .last()
        .is_none_or(|(relation, _)| !relation.is_empty())
    {
        return Ok(Some("the dump has not said yet how much it has".to_owned()));
    }
    for (relation, expected) in expected.iter().filter(|(name, _)| !name.is_empty()) {
        let counted = spi::query_text(
            view,
            &format!(
                "SELECT count(*) FROM rakam_internal.{}{}",
                quote_ident(relation),
                match relation.as_str() {
                    "storage" => " WHERE storage_id > 1",
                    _ => "",
                }
            ),
            &[],
            |row| row.must::<i64>(1),
        )?;
        let found = counted.first().copied().unwrap_or(0);
        if found < *expected {
            return Ok(Some(format!(
                "rakam_internal.{relation} has {found} of {expected} rows"
            )));
        }
    }
    let behind: Option<String> = spi::first(
        view,
        "SELECT v.name FROM (VALUES
           ('storage', (SELECT last_value + is_called::int FROM rakam_internal.storage_storage_id),
            (SELECT max(storage_id) FROM rakam_internal.storage)),
           ('project', (SELECT last_value + is_called::int FROM rakam_internal.project_project_id),
            (SELECT max(project_id) FROM rakam_internal.project)),
           ('collection', (SELECT last_value + is_called::int FROM rakam_internal.collection_collection_id),
            (SELECT max(collection_id) FROM rakam_internal.collection)),
           ('hot_chunk', (SELECT last_value + is_called::int FROM rakam_internal.hot_chunk_chunk_id),
            (SELECT max(chunk_id) FROM rakam_internal.hot_chunk)),
           ('data_file', (SELECT last_value + is_called::int FROM rakam_internal.data_file_file_id),
            (SELECT max(file_id) FROM rakam_internal.data_file)),
           ('id_run', (SELECT last_value + is_called::int FROM rakam_internal.id_run_run_id),
            (SELECT max(run_id) FROM rakam_internal.id_run)),
           ('manifest_log', (SELECT last_value + is_called::int FROM rakam_internal.manifest_log_seq),
            (SELECT max(seq) FROM rakam_internal.manifest_log)),
           ('source', (SELECT last_value + is_called::int FROM rakam_internal.source_id),
            (SELECT max(source_id) FROM rakam_internal.source)),
           ('event_store', (SELECT last_value + is_called::int FROM rakam_internal.event_store_id),
            (SELECT max(store_id) FROM rakam_internal.event_store))) v (name, next, newest)
         WHERE v.next <= v.newest LIMIT 1",
        &[],
        |row| row.must(1),
    )?;
    Ok(behind.map(|name| format!("the sequence of rakam_internal.{name} is behind its rows")))
}
