//! The outbox: events on their way to an event store, in three tables of which one takes new rows.
//!
//! A row is deleted in the transaction that notes its batch as published, so whatever is there is still to be published. Rows of a
//! store go out in the order of their ids, as far as they are visible: an id is given at the call, and whoever has seen an event
//! committed gets a higher one.

use std::cell::Cell;

use super::event_store;
use super::inbox::{self, Entry, Payload, TailRow, datum};
use super::three::Three;
use crate::pg::security::ActAs;
use crate::pg::spi::{self, View, arg};
use crate::pg::{Datum, Oid, PG_EPOCH_US, PgError, Result, heap, relation, wake, xact};

/// Rows that are put back in one transaction after a restore.
const RESTORED_ROWS: i64 = 256;

thread_local! {
    static LAST_TABLE: Cell<usize> = const { Cell::new(0) };
}

static TABLES: Three = Three {
    tables: ["outbox_0", "outbox_1", "outbox_2"],
    state: "outbox_state",
    what: "outbox",
    last: &LAST_TABLE,
};

/// The oid of an outbox table.
pub fn table_oid(k: usize) -> Oid {
    TABLES.oid(k)
}

/// Stores events in the caller's transaction, for a store, and wakes the relay at its commit.
pub fn append(entry: &Entry<'_>, store_id: i32) -> Result<()> {
    let _owner = ActAs::owner();
    let table = TABLES.lock_current()?;
    insert(
        table,
        heap::nextval(relation::oid("rakam_internal", "outbox_id")),
        store_id,
        xact::top_xid(),
        entry,
    );
    wake::relay_at_commit();
    Ok(())
}

fn insert(table: Oid, id: i64, store_id: i32, txid: u64, entry: &Entry<'_>) {
    heap::insert(
        table,
        &[
            Datum::from(id),
            Datum::from(store_id),
            Datum::from(entry.project_id),
            Datum::from(entry.collection_id),
            datum(entry.collection),
            Datum::from(txid),
            Datum::from(entry.n),
            Datum::from(entry.received_at_us - PG_EPOCH_US),
            Datum::from(entry.shift_us),
            match entry.payload {
                Payload::Borrowed(bytes) => datum(bytes),
                Payload::InPlace(bytea) => bytea.datum(),
            },
        ],
    );
}

/// The number and the number of events of a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Head {
    pub id: i64,
    pub n: i32,
}

/// The first rows of a store, up to so many rows, events and bytes, at least one.
pub fn first_rows(
    view: View,
    store_id: i32,
    rows: i64,
    events: i64,
    bytes: i64,
) -> Result<Vec<Head>> {
    let (mut all_events, mut all_bytes) = (0, 0);
    let mut heads = Vec::new();
    spi::run(
        view,
        "SELECT id, n, pg_catalog.octet_length(payload)::int8 FROM (
           (SELECT id, n, payload FROM rakam_internal.outbox_0 WHERE store_id = $1 ORDER BY id LIMIT $2)
           UNION ALL (SELECT id, n, payload FROM rakam_internal.outbox_1 WHERE store_id = $1 ORDER BY id LIMIT $2)
           UNION ALL (SELECT id, n, payload FROM rakam_internal.outbox_2 WHERE store_id = $1 ORDER BY id LIMIT $2)) o
         ORDER BY id LIMIT $2",
        &[arg(store_id), arg(rows)],
        |row| {
            let head = Head {
                id: row.must(1)?,
                n: row.must(2)?,
            };
            all_events += i64::from(head.n);
            all_bytes += row.must::<i64>(3)?;
            if heads.is_empty() || all_events <= events && all_bytes <= bytes {
                heads.push(head);
            } else {
                // Nothing behind it either, or the order is lost.
                all_bytes = bytes.max(all_bytes);
                all_events = i64::MAX / 2;
            }
            Ok(())
        },
    )?;
    Ok(heads)
}

/// The rows with these ids that are there, in their order.
pub fn rows(view: View, store_id: i32, ids: &[i64]) -> Result<Vec<TailRow>> {
    spi::query(
        view,
        "SELECT id, project_id, collection_id, collection, txid, n, received_at, shift_us, payload FROM (
           SELECT * FROM rakam_internal.outbox_0 WHERE store_id = $1 AND id = ANY ($2)
           UNION ALL SELECT * FROM rakam_internal.outbox_1 WHERE store_id = $1 AND id = ANY ($2)
           UNION ALL SELECT * FROM rakam_internal.outbox_2 WHERE store_id = $1 AND id = ANY ($2)) o ORDER BY id",
        &[arg(store_id), arg(ids.to_vec())],
        inbox::tail_row,
    )
}

/// Removes the rows of a batch.
pub fn delete(store_id: i32, ids: &[i64]) -> Result<()> {
    for statement in [
        "DELETE FROM rakam_internal.outbox_0 WHERE store_id = $1 AND id = ANY ($2)",
        "DELETE FROM rakam_internal.outbox_1 WHERE store_id = $1 AND id = ANY ($2)",
        "DELETE FROM rakam_internal.outbox_2 WHERE store_id = $1 AND id = ANY ($2)",
    ] {
        spi::execute(statement, &[arg(store_id), arg(ids.to_vec())])?;
    }
    Ok(())
}

/// Removes what waits for a project's stores; with the project go the stores.
pub fn forget_project(project_id: i32) -> Result<()> {
    event_store::lock_all(project_id)?;
    event_store::untie(project_id)?;
    for statement in [
        "DELETE FROM rakam_internal.outbox_0 WHERE project_id = $1",
        "DELETE FROM rakam_internal.outbox_1 WHERE project_id = $1",
        "DELETE FROM rakam_internal.outbox_2 WHERE project_id = $1",
        "DELETE FROM rakam_internal.outbox_restored WHERE project_id = $1",
    ] {
        spi::execute(statement, &[arg(project_id)])?;
    }
    Ok(())
}

/// Removes rows of stores that went with their project, when whoever collected them committed afterwards. While a dump is being
/// restored, its stores come before its rows.
pub fn delete_orphans(k: usize) -> Result<u64> {
    const ORPHANS: [&str; 3] = [
        "DELETE FROM rakam_internal.outbox_0 o
         WHERE NOT EXISTS (SELECT FROM rakam_internal.event_store s WHERE s.store_id = o.store_id)",
        "DELETE FROM rakam_internal.outbox_1 o
         WHERE NOT EXISTS (SELECT FROM rakam_internal.event_store s WHERE s.store_id = o.store_id)",
        "DELETE FROM rakam_internal.outbox_2 o
         WHERE NOT EXISTS (SELECT FROM rakam_internal.event_store s WHERE s.store_id = o.store_id)",
    ];
    spi::execute(ORPHANS[k], &[])
}

/// Puts rows that came with a dump back, whose store and collection are there; how many.
pub fn readmit() -> Result<u64> {
    let mut stores = Vec::new();
    let rows: Vec<TailRow> = spi::query(
        View::Current,
        "SELECT r.id, r.project_id, r.collection_id, r.collection, r.txid, r.n, r.received_at, r.shift_us, r.payload, r.store_id
         FROM rakam_internal.outbox_restored r JOIN rakam_internal.event_store s USING (store_id)
         WHERE r.collection_id = 0 OR EXISTS (SELECT FROM rakam_internal.collection c WHERE c.collection_id = r.collection_id)
         ORDER BY r.id LIMIT $1",
        &[arg(RESTORED_ROWS)],
        |row| {
            stores.push(row.must::<i32>(10)?);
            inbox::tail_row(row)
        },
    )?;
    if rows.is_empty() {
        return Ok(0);
    }
    let table = TABLES.lock_current()?;
    for (row, &store_id) in rows.iter().zip(&stores) {
        insert(
            table,
            row.id,
            store_id,
            row.txid,
            &Entry {
                project_id: row.project_id,
                collection_id: row.collection_id,
                collection: &row.collection,
                n: row.n,
                received_at_us: row.received_at_us,
                shift_us: row.shift_us,
                store_id: Some(store_id),
                payload: row.payload.as_slice().into(),
            },
        );
    }
    let ids: Vec<i64> = rows.iter().map(|row| row.id).collect();
    spi::execute(
        "DELETE FROM rakam_internal.outbox_restored WHERE id = ANY ($1)",
        &[arg(ids)],
    )?;
    Ok(rows.len() as u64)
}

/// Which table takes new rows, and since when, in microseconds since 1970.
pub fn state(view: View) -> Result<(usize, i64)> {
    spi::first(
        view,
        "SELECT current_table, switched_at FROM rakam_internal.outbox_state",
        &[],
        |row| {
            Ok((
                row.must::<i32>(1)? as usize,
                row.timestamptz(2).unwrap_or(0),
            ))
        },
    )?
    .ok_or_else(|| PgError::internal("the outbox has no state"))
}

/// Lets another table take the new rows.
pub fn switch_to(k: usize) -> Result<()> {
    spi::execute(
        "UPDATE rakam_internal.outbox_state SET current_table = $1, switched_at = pg_catalog.clock_timestamp()",
        &[arg(k as i32)],
    )?;
    Ok(())
}

/// Whether a table has a row.
pub fn has_rows(view: View, k: usize) -> Result<bool> {
    const ANY: [&str; 3] = [
        "SELECT EXISTS (SELECT FROM rakam_internal.outbox_0)",
        "SELECT EXISTS (SELECT FROM rakam_internal.outbox_1)",
        "SELECT EXISTS (SELECT FROM rakam_internal.outbox_2)",
    ];
    Ok(spi::first(view, ANY[k], &[], |row| row.must(1))?.unwrap_or(true))
}

/// Gives a table's space back. The caller holds it exclusively, and it has no row.
pub fn truncate(k: usize) -> Result<()> {
    spi::execute_text(&format!("TRUNCATE rakam_internal.outbox_{k}"))
}
