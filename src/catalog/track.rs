//! Tracked tables. Their triggers are the whole registration: only we can make them, since nobody else may execute
//! their function, and they go with the table, with the extension and with a dump.

use crate::pg::spi::{self, View, arg, quote_ident, quote_literal};
use crate::pg::{Oid, PgError, Result, relation};

/// The table and all that inherit from it, partitions included; the table first.
pub fn with_inheritors(table: Oid) -> Result<Vec<Oid>> {
    spi::query(
        View::Current,
        "WITH RECURSIVE family(relation, depth) AS (
           SELECT $1::oid, 0
           UNION ALL SELECT i.inhrelid, f.depth + 1
           FROM family f JOIN pg_catalog.pg_inherits i ON i.inhparent = f.relation)
         SELECT relation FROM family GROUP BY relation ORDER BY pg_catalog.min(depth), relation",
        &[arg(table)],
        |row| row.oid(1).ok_or_else(gone),
    )
}

/// What the table inherits from, directly and further up.
pub fn ancestors(table: Oid) -> Result<Vec<Oid>> {
    spi::query(
        View::Current,
        "WITH RECURSIVE family(relation) AS (
           SELECT inhparent FROM pg_catalog.pg_inherits WHERE inhrelid = $1
           UNION SELECT i.inhparent FROM family f JOIN pg_catalog.pg_inherits i ON i.inhrelid = f.relation)
         SELECT relation FROM family",
        &[arg(table)],
        |row| row.oid(1).ok_or_else(gone),
    )
}

fn gone() -> PgError {
    PgError::internal("a relation without oid")
}

/// Puts the triggers on a table. There must be none of this project on it.
pub fn create_triggers(project: &str, collection: &str, table: Oid) -> Result<()> {
    let name = relation::sql_name(table)
        .ok_or_else(|| PgError::new("42P01", "the table does not exist any more"))?;
    for (operation, referencing) in [
        ("insert", "REFERENCING NEW TABLE AS rakam_changed"),
        ("update", "REFERENCING NEW TABLE AS rakam_changed"),
        ("delete", "REFERENCING OLD TABLE AS rakam_changed"),
        ("truncate", ""),
    ] {
        spi::execute_text(&format!(
            "CREATE TRIGGER {} AFTER {operation} ON {name} {referencing} FOR EACH STATEMENT \
             EXECUTE FUNCTION rakam_internal.track_change({}, {})",
            quote_ident(&format!("rakam_{project}_{operation}")),
            quote_literal(project),
            quote_literal(collection),
        ))?;
    }
    Ok(())
}

/// Removes a project's triggers from these tables, or from all; how many there were.
pub fn drop_triggers(project: &str, tables: Option<&[Oid]>) -> Result<usize> {
    let mut prefix = project.as_bytes().to_vec();
    prefix.push(0);
    let found = spi::query(
        View::Current,
        "SELECT t.tgrelid, t.tgname::text FROM pg_catalog.pg_trigger t
         JOIN pg_catalog.pg_proc p ON p.oid = t.tgfoid AND p.proname = 'track_change'
         JOIN pg_catalog.pg_namespace n ON n.oid = p.pronamespace AND n.nspname = 'rakam_internal'
         WHERE pg_catalog.substr(t.tgargs, 1, pg_catalog.length($1)) = $1
           AND ($2 IS NULL OR t.tgrelid = ANY ($2))",
        &[arg(prefix.as_slice()), arg(tables.map(<[Oid]>::to_vec))],
        |row| Ok((row.oid(1).ok_or_else(gone)?, row.must::<String>(2)?)),
    )?;
    for (table, trigger) in &found {
        if let Some(name) = relation::sql_name(*table) {
            spi::execute_text(&format!("DROP TRIGGER {} ON {name}", quote_ident(trigger)))?;
        }
    }
    Ok(found.len())
}
