//! What waits in the inbox for the digest, and the projects that lag behind the tick.
//!
//! A project of which more waits than a round takes gets a snapshot of its own (`inbox_lag`) up to which its events are
//! digested, and everybody else's tick goes on. Readers take the project's snapshot for the tick's.

use std::collections::VecDeque;

use super::inbox::{FIRST_PAGE_ROWS, TailRow, page_rows, tail_row};
use crate::pg::snapshot::XidSnapshot;
use crate::pg::spi::{self, View, arg, xid8, xid8_array};
use crate::pg::{PgError, Result};

/// Whose rows are meant.
#[derive(Debug, Clone)]
pub enum Whose {
    Except(Vec<i32>),
    Only(i32),
}

/// What a row says of itself before its payload is read, which may lie elsewhere, compressed.
#[derive(Debug, Clone, Copy)]
pub struct Head {
    pub project_id: i32,
    pub collection_id: i32,
    pub n: i32,
    pub bytes: usize,
    pub received_at_us: i64,
}

/// The rows between two ticks in the order of their origin transactions, for the digester: first those whose
/// transaction ran when the old tick was taken, then everything that began since.
pub struct Backlog {
    /// Transactions of the old tick's xip that have finished since and left rows.
    finished: VecDeque<u64>,
    upto: XidSnapshot,
    after: (u64, i64),
    page_rows: i64,
    projects: Vec<i32>,
    only: bool,
}

impl Backlog {
    /// `upto` must be a snapshot in which every transaction is finished that the view sees as such.
    pub fn new(view: View, tick: &XidSnapshot, upto: &XidSnapshot, whose: Whose) -> Result<Self> {
        let finished: Vec<u64> = if tick.xip.is_empty() {
            Vec::new()
        } else {
            spi::query(
                view,
                "SELECT x FROM pg_catalog.unnest($1) x WHERE NOT x = ANY ($2) AND x < $3 AND (
                   EXISTS (SELECT FROM rakam_internal.inbox_0 WHERE txid = x)
                   OR EXISTS (SELECT FROM rakam_internal.inbox_1 WHERE txid = x)
                   OR EXISTS (SELECT FROM rakam_internal.inbox_2 WHERE txid = x)) ORDER BY x",
                &[
                    xid8_array(&tick.xip),
                    xid8_array(&upto.xip),
                    xid8(upto.xmax),
                ],
                |row| Ok(row.xid8(1).unwrap_or(0)),
            )?
        };
        let (projects, only) = match whose {
            Whose::Except(projects) => (projects, false),
            Whose::Only(project) => (vec![project], true),
        };
        Ok(Self {
            after: (finished.first().copied().unwrap_or(tick.xmax), 0),
            finished: finished.into(),
            upto: XidSnapshot {
                xmin: tick.xmax,
                ..upto.clone()
            },
            page_rows: FIRST_PAGE_ROWS,
            projects,
            only,
        })
    }

    /// The next rows in (txid, id) order with their sizes; None at the end. `wanted` is asked for each in this order:
    /// a row that is not wanted comes without its payload, which then is not read either.
    pub fn next_page(
        &mut self,
        view: View,
        mut wanted: impl FnMut(&Head) -> bool,
    ) -> Result<Option<Vec<TailRow>>> {
        loop {
            let only = self.finished.front().copied();
            let mut bytes = 0;
            let map = |row: &spi::Row| -> Result<TailRow> {
                let head = Head {
                    project_id: row.must(2)?,
                    collection_id: row.must(3)?,
                    n: row.must(6)?,
                    bytes: row.must::<i32>(10)? as usize,
                    received_at_us: row.timestamptz(7).unwrap_or(0),
                };
                bytes += 64;
                if wanted(&head) {
                    bytes += head.bytes;
                    return tail_row(row);
                }
                Ok(TailRow {
                    id: row.must(1)?,
                    project_id: head.project_id,
                    collection_id: head.collection_id,
                    collection: String::new(),
                    txid: row.xid8(5).unwrap_or(0),
                    n: 0,
                    received_at_us: head.received_at_us,
                    shift_us: 0,
                    payload: Vec::new(),
                })
            };
            let rows = match only {
                Some(txid) => self.page_of(view, txid, map)?,
                None => self.page_from(view, map)?,
            };
            let full = rows.len() as i64 == self.page_rows;
            if let Some(last) = rows.last() {
                self.after = (last.txid, last.id);
                self.page_rows = page_rows(bytes, rows.len());
            }
            if only.is_some() && !full {
                self.finished.pop_front();
                // `upto.xmin` keeps the old tick's xmax, where the second part begins.
                self.after = (self.finished.front().copied().unwrap_or(self.upto.xmin), 0);
            }
            if !rows.is_empty() {
                return Ok(Some(rows));
            }
            if only.is_none() {
                return Ok(None);
            }
        }
    }

    fn page_of(
        &self,
        view: View,
        txid: u64,
        map: impl FnMut(&spi::Row) -> Result<TailRow>,
    ) -> Result<Vec<TailRow>> {
        spi::query(
            view,
            "SELECT id, project_id, collection_id, collection, txid, n, received_at, shift_us, payload,
                    octet_length(payload) FROM (
               SELECT id, project_id, collection_id, collection, txid, n, received_at, shift_us, payload
               FROM rakam_internal.inbox_0 WHERE txid = $1 AND id > $2
               UNION ALL SELECT id, project_id, collection_id, collection, txid, n, received_at, shift_us, payload
               FROM rakam_internal.inbox_1 WHERE txid = $1 AND id > $2
               UNION ALL SELECT id, project_id, collection_id, collection, txid, n, received_at, shift_us, payload
               FROM rakam_internal.inbox_2 WHERE txid = $1 AND id > $2
             ) i WHERE (project_id = ANY ($4)) = $5 ORDER BY id LIMIT $3",
            &[
                xid8(txid),
                arg(self.after.1),
                arg(self.page_rows),
                arg(self.projects.clone()),
                arg(self.only),
            ],
            map,
        )
    }

    fn page_from(
        &self,
        view: View,
        map: impl FnMut(&spi::Row) -> Result<TailRow>,
    ) -> Result<Vec<TailRow>> {
        spi::query(
            view,
            "SELECT id, project_id, collection_id, collection, txid, n, received_at, shift_us, payload,
                    octet_length(payload) FROM (
               SELECT id, project_id, collection_id, collection, txid, n, received_at, shift_us, payload
               FROM rakam_internal.inbox_0 WHERE (txid, id) > ($1, $2) AND txid < $3 AND NOT txid = ANY ($4)
               UNION ALL SELECT id, project_id, collection_id, collection, txid, n, received_at, shift_us, payload
               FROM rakam_internal.inbox_1 WHERE (txid, id) > ($1, $2) AND txid < $3 AND NOT txid = ANY ($4)
               UNION ALL SELECT id, project_id, collection_id, collection, txid, n, received_at, shift_us, payload
               FROM rakam_internal.inbox_2 WHERE (txid, id) > ($1, $2) AND txid < $3 AND NOT txid = ANY ($4)
             ) i WHERE (project_id = ANY ($6)) = $7 ORDER BY txid, id LIMIT $5",
            &[
                xid8(self.after.0),
                arg(self.after.1),
                xid8(self.upto.xmax),
                xid8_array(&self.upto.xip),
                arg(self.page_rows),
                arg(self.projects.clone()),
                arg(self.only),
            ],
            map,
        )
    }
}

/// A project that lags behind the tick, and the snapshot up to which its events are digested.
#[derive(Debug, Clone)]
pub struct Lag {
    pub project_id: i32,
    pub snapshot: XidSnapshot,
}

/// The projects that lag behind the newest tick. One that began to lag while it was dropped is none.
pub fn lagging(view: View) -> Result<Vec<Lag>> {
    spi::query(
        view,
        "SELECT project_id, snapshot::text FROM rakam_internal.inbox_lag JOIN rakam_internal.project USING (project_id)
         ORDER BY project_id",
        &[],
        |row| {
            let text: String = row.must(2)?;
            Ok(Lag {
                project_id: row.must(1)?,
                snapshot: XidSnapshot::parse(&text)
                    .ok_or_else(|| PgError::internal("a stored snapshot is malformed"))?,
            })
        },
    )
}

/// Notes how far a lagging project's events are digested. In the transaction of the next tick. A project that was dropped
/// has nothing to be noted.
pub fn set_lag(project_id: i32, snapshot: &XidSnapshot) -> Result<()> {
    spi::execute(
        "INSERT INTO rakam_internal.inbox_lag AS l (project_id, snapshot)
         SELECT project_id, $2::pg_snapshot FROM rakam_internal.project WHERE project_id = $1
         ON CONFLICT (project_id) DO UPDATE SET snapshot = $2::pg_snapshot",
        &[arg(project_id), arg(snapshot.to_string())],
    )?;
    Ok(())
}

/// The project has caught up: the tick holds for it, too. In the transaction of that tick.
pub fn end_lag(project_id: i32) -> Result<()> {
    spi::execute(
        "DELETE FROM rakam_internal.inbox_lag WHERE project_id = $1",
        &[arg(project_id)],
    )?;
    Ok(())
}

/// Forgets projects that began to lag while they were dropped.
pub fn forget_dropped() -> Result<()> {
    spi::execute(
        "DELETE FROM rakam_internal.inbox_lag l
         WHERE NOT EXISTS (SELECT FROM rakam_internal.project p WHERE p.project_id = l.project_id)",
        &[],
    )?;
    Ok(())
}

/// Writes the next tick. A second digester with the same predecessor fails on the primary key.
pub fn add_tick(id: i64, snapshot: &XidSnapshot) -> Result<()> {
    spi::execute(
        "INSERT INTO rakam_internal.inbox_tick (shard, tick_id, snapshot) VALUES (0, $1, $2::pg_snapshot)",
        &[arg(id), arg(snapshot.to_string())],
    )?;
    Ok(())
}
