//! The inbox: events just collected, as JSON text, in three heap tables of which one takes new rows.
//!
//! A tick is a stored snapshot up to which everything is digested. Un-digested are the rows whose origin
//! transaction is not finished in the tick: `txid >= xmax(tick) OR txid = ANY(xip(tick))`, never a range
//! from the snapshot's xmin, which one old transaction anywhere in the cluster drags down.

pub mod parked;
pub mod rotation;

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet, VecDeque};

use pgrx::datum::IntoDatum;

use super::former::{self, FormerName, Owner};
use super::three::Three;
use crate::pg::bytea::Bytea;
use crate::pg::security::ActAs;
use crate::pg::snapshot::XidSnapshot;
use crate::pg::spi::{self, View, arg, xid8, xid8_array};
use crate::pg::{Datum, Oid, PG_EPOCH_US, PgError, Result, heap, relation, wake, xact};

/// What one collect call stores.
pub struct Entry<'a> {
    pub project_id: i32,
    /// 0: the collection is not registered yet and is known by its name only.
    pub collection_id: i32,
    pub collection: &'a str,
    /// Number of events in `payload`.
    pub n: i32,
    pub received_at_us: i64,
    /// Added to explicit `_time`s (a client's clock skew).
    pub shift_us: i64,
    /// The event store that they are collected for; None: they stay in Postgres.
    pub store_id: Option<i32>,
    /// JSON objects, one a line.
    pub payload: Payload<'a>,
}

/// The bytes of an entry.
#[derive(Clone, Copy)]
pub enum Payload<'a> {
    /// Copied once, to where they are stored from.
    Borrowed(&'a [u8]),
    /// Written there.
    InPlace(&'a Bytea),
}

impl std::ops::Deref for Payload<'_> {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Borrowed(bytes) => bytes,
            Self::InPlace(bytea) => bytea.as_bytes(),
        }
    }
}

impl<'a> From<&'a [u8]> for Payload<'a> {
    fn from(bytes: &'a [u8]) -> Self {
        Self::Borrowed(bytes)
    }
}

thread_local! {
    static LAST_TABLE: Cell<usize> = const { Cell::new(0) };
}

static TABLES: Three = Three {
    tables: ["inbox_0", "inbox_1", "inbox_2"],
    state: "inbox_state",
    what: "inbox",
    last: &LAST_TABLE,
};

/// The oid of an inbox table.
pub fn table_oid(k: usize) -> Oid {
    TABLES.oid(k)
}

/// Stores events in the caller's transaction and wakes the worker at its commit.
pub fn append(entry: &Entry<'_>) -> Result<()> {
    let _owner = ActAs::owner();
    let table = TABLES.lock_current()?;
    let id = heap::nextval(relation::oid("rakam_internal", "inbox_id"));
    heap::insert(
        table,
        &[
            Datum::from(id),
            Datum::from(entry.project_id),
            Datum::from(entry.collection_id),
            datum(entry.collection),
            Datum::from(xact::top_xid()),
            Datum::from(entry.n),
            Datum::from(entry.received_at_us - PG_EPOCH_US),
            Datum::from(entry.shift_us),
            match entry.payload {
                Payload::Borrowed(bytes) => datum(bytes),
                Payload::InPlace(bytea) => bytea.datum(),
            },
        ],
    );
    wake::at_commit(entry.n as u32);
    Ok(())
}

/// A value that is not NULL, in the current memory context.
pub(super) fn datum(value: impl IntoDatum) -> Datum {
    value.into_datum().unwrap_or(Datum::null())
}

/// The point up to which the inbox is digested, and what a reader with this view has to open.
#[derive(Debug, Clone)]
pub struct Tick {
    pub id: i64,
    pub snapshot: XidSnapshot,
    /// The inbox tables that may hold un-digested rows.
    pub tables: Vec<usize>,
}

/// The newest tick of the view, for everybody whose project does not lag behind it.
pub fn tick(view: View) -> Result<Tick> {
    tick_of(view, 0)
}

/// The newest tick of the view as it holds for a project: with the project's own snapshot if it lags behind.
pub fn tick_of(view: View, project_id: i32) -> Result<Tick> {
    spi::first(
        view,
        "SELECT t.tick_id, coalesce(l.snapshot, t.snapshot)::text, s.sealed[1], s.sealed[2], s.sealed[3]
         FROM rakam_internal.inbox_tick t CROSS JOIN rakam_internal.inbox_state s
         LEFT JOIN rakam_internal.inbox_lag l ON l.project_id = $1
         WHERE t.shard = 0 ORDER BY t.tick_id DESC LIMIT 1",
        &[arg(project_id)],
        |row| {
            let id: i64 = row.must(1)?;
            let text: String = row.must(2)?;
            let mut tables = Vec::with_capacity(3);
            for k in 0..3 {
                let sealed: i64 = row.must(3 + k)?;
                if sealed == 0 || sealed > id {
                    tables.push(k);
                }
            }
            Ok(Tick {
                id,
                snapshot: XidSnapshot::parse(&text)
                    .ok_or_else(|| PgError::internal("a stored snapshot is malformed"))?,
                tables,
            })
        },
    )?
    .ok_or_else(|| PgError::internal("the inbox has no tick"))
}

/// An inbox row of the un-digested tail.
#[derive(Debug)]
pub struct TailRow {
    /// 0 for a parked row, which is in no inbox table any more.
    pub id: i64,
    pub project_id: i32,
    pub collection_id: i32,
    pub collection: String,
    pub txid: u64,
    pub n: i32,
    pub received_at_us: i64,
    pub shift_us: i64,
    pub payload: Vec<u8>,
}

pub(super) fn tail_row(row: &spi::Row) -> Result<TailRow> {
    Ok(TailRow {
        id: row.must(1)?,
        project_id: row.must(2)?,
        collection_id: row.must(3)?,
        collection: row.must(4)?,
        txid: row.xid8(5).unwrap_or(0),
        n: row.must(6)?,
        received_at_us: row.timestamptz(7).unwrap_or(0),
        shift_us: row.must(8)?,
        payload: row.bytes(9).unwrap_or_default(),
    })
}

/// How a page is bounded: rows of the next page, so that it stays near this many bytes.
const PAGE_BYTES: usize = 8 << 20;
pub(super) const FIRST_PAGE_ROWS: i64 = 64;
const PAGE_ROWS_MAX: i64 = 4096;

/// One ordered run over an index: from a transaction id on (or exactly one), in (txid, id) order.
#[derive(Debug)]
struct Run {
    table: usize,
    collection_id: i32,
    /// None: every transaction from `after` on.
    only_txid: Option<u64>,
    /// The last (txid, id) read.
    after: (u64, i64),
    page_rows: i64,
    /// Rows read and not handed out.
    rows: VecDeque<TailRow>,
    ended: bool,
}

impl Run {
    fn new(table: usize, collection_id: i32, only_txid: Option<u64>, start: u64) -> Self {
        Self {
            table,
            collection_id,
            only_txid,
            after: (only_txid.unwrap_or(start), 0),
            page_rows: FIRST_PAGE_ROWS,
            rows: VecDeque::new(),
            ended: false,
        }
    }

    fn next(&self) -> Option<(u64, i64)> {
        self.rows.front().map(|row| (row.txid, row.id))
    }
}

/// The un-digested rows of one collection, page by page, in the order in which the digest will meet them: by (txid, id),
/// parked ones last. Of two copies of an event a reader then shows the one that will stay.
pub struct Tail {
    project_id: i32,
    /// 0: known by its name only.
    collection_id: i32,
    name: String,
    /// Asked for when the first row is met that was stored by name.
    former: Option<Vec<FormerName>>,
    tables: Vec<usize>,
    ids: Vec<i32>,
    /// Runs that are read side by side, stage by stage: every transaction of a stage is older than those of the next.
    stages: VecDeque<Vec<Run>>,
    /// Transactions that ran when the tick was taken; looked for at the first page.
    xip: Vec<u64>,
    start: u64,
    parked_collection: Option<i32>,
    parked_after: i64,
}

impl Tail {
    /// Rows of this collection, and of its name where it was not registered yet. With `collection_id` 0 only
    /// the latter.
    pub fn new(tick: &Tick, project_id: i32, collection_id: i32, name: &str) -> Self {
        let mut ids = vec![0];
        if collection_id != 0 {
            ids.insert(0, collection_id);
        }
        let start = tick.snapshot.xmax;
        let newer = tick.tables.iter().flat_map(|&table| {
            ids.iter()
                .map(move |&collection_id| Run::new(table, collection_id, None, start))
        });
        Self {
            project_id,
            collection_id,
            name: name.to_owned(),
            former: None,
            stages: VecDeque::from([newer.collect()]),
            tables: tick.tables.clone(),
            ids,
            xip: tick.snapshot.xip.clone(),
            start,
            parked_collection: (collection_id != 0).then_some(collection_id),
            parked_after: 0,
        }
    }

    /// The parked events of a collection only.
    pub fn of_parked(project_id: i32, collection_id: i32, name: &str) -> Self {
        Self {
            project_id,
            collection_id,
            name: name.to_owned(),
            former: None,
            tables: Vec::new(),
            ids: Vec::new(),
            stages: VecDeque::new(),
            xip: Vec::new(),
            start: 0,
            parked_collection: Some(collection_id),
            parked_after: 0,
        }
    }

    /// The next rows; None at the end.
    pub fn next_page(&mut self, view: View) -> Result<Option<Vec<TailRow>>> {
        if !self.xip.is_empty() {
            self.add_in_progress(view)?;
        }
        while let Some(mut runs) = self.stages.pop_front() {
            let page = self.merged(view, &mut runs)?;
            if runs.iter().any(|run| !run.ended || !run.rows.is_empty()) {
                self.stages.push_front(runs);
            }
            if !page.is_empty() {
                return Ok(Some(page));
            }
        }
        let Some(collection_id) = self.parked_collection else {
            return Ok(None);
        };
        let rows = spi::query(
            view,
            "SELECT id, project_id, collection_id, collection, txid, n, received_at, shift_us, payload
             FROM rakam_internal.inbox_parked WHERE collection_id = $1 AND id > $2 ORDER BY id LIMIT 64",
            &[arg(collection_id), arg(self.parked_after)],
            tail_row,
        )?;
        match rows.last() {
            Some(last) => {
                self.parked_after = last.id;
                Ok(Some(rows))
            }
            None => {
                self.parked_collection = None;
                Ok(None)
            }
        }
    }

    /// The rows that are this collection's: by its id, or by what their name meant when they were stored.
    fn own(&mut self, view: View, mut rows: Vec<TailRow>) -> Result<Vec<TailRow>> {
        rows.retain(|row| row.project_id == self.project_id);
        if rows.iter().all(|row| row.collection_id != 0) {
            return Ok(rows);
        }
        if self.former.is_none() {
            self.former = Some(former::names(view, Some(self.project_id))?);
        }
        let names = self.former.as_deref().unwrap_or_default();
        rows.retain(|row| {
            row.collection_id != 0
                || match former::owner(names, row) {
                    Owner::Present => row.collection == self.name,
                    Owner::Collection(id) => id == self.collection_id,
                    Owner::Nobody => false,
                }
        });
        Ok(rows)
    }

    /// The next rows of runs, in order: as many as can be told without reading more than one page of each.
    fn merged(&mut self, view: View, runs: &mut [Run]) -> Result<Vec<TailRow>> {
        for run in runs.iter_mut() {
            if run.rows.is_empty() && !run.ended {
                self.read_page(view, run)?;
            }
        }
        let mut page = Vec::new();
        loop {
            // What such a run has next is not known.
            if runs.iter().any(|run| run.rows.is_empty() && !run.ended) {
                return Ok(page);
            }
            let first = runs
                .iter_mut()
                .filter_map(|run| run.next().map(|at| (at, run)))
                .min_by_key(|(at, _)| *at);
            match first.and_then(|(_, run)| run.rows.pop_front()) {
                Some(row) => page.push(row),
                None => return Ok(page),
            }
        }
    }

    /// Reads rows of a run until some are of this collection, or it ends.
    fn read_page(&mut self, view: View, run: &mut Run) -> Result<()> {
        while run.rows.is_empty() && !run.ended {
            let rows = Self::run_page(view, run)?;
            run.ended = (rows.len() as i64) < run.page_rows;
            if let Some(last) = rows.last() {
                run.after = (last.txid, last.id);
                let bytes: usize = rows.iter().map(|r| r.payload.len() + 64).sum();
                run.page_rows = page_rows(bytes, rows.len());
            }
            run.rows.extend(self.own(view, rows)?);
        }
        Ok(())
    }

    /// Transactions that ran when the tick was taken and have left rows since: they come first, each by itself.
    fn add_in_progress(&mut self, view: View) -> Result<()> {
        const PROBE: [&str; 3] = [
            "SELECT x FROM pg_catalog.unnest($2) x
             WHERE EXISTS (SELECT FROM rakam_internal.inbox_0 WHERE collection_id = $1 AND txid = x)",
            "SELECT x FROM pg_catalog.unnest($2) x
             WHERE EXISTS (SELECT FROM rakam_internal.inbox_1 WHERE collection_id = $1 AND txid = x)",
            "SELECT x FROM pg_catalog.unnest($2) x
             WHERE EXISTS (SELECT FROM rakam_internal.inbox_2 WHERE collection_id = $1 AND txid = x)",
        ];
        let xip = std::mem::take(&mut self.xip);
        let mut by_txid: BTreeMap<u64, Vec<Run>> = BTreeMap::new();
        for &table in &self.tables {
            for &collection_id in &self.ids {
                spi::run(
                    view,
                    PROBE[table],
                    &[arg(collection_id), xid8_array(&xip)],
                    |row| {
                        let txid = row.xid8(1).unwrap_or(0);
                        let run = Run::new(table, collection_id, Some(txid), self.start);
                        by_txid.entry(txid).or_default().push(run);
                        Ok(())
                    },
                )?;
            }
        }
        for runs in by_txid.into_values().rev() {
            self.stages.push_front(runs);
        }
        Ok(())
    }

    fn run_page(view: View, run: &Run) -> Result<Vec<TailRow>> {
        const FROM_ON: [&str; 3] = [
            "SELECT id, project_id, collection_id, collection, txid, n, received_at, shift_us, payload
             FROM rakam_internal.inbox_0 WHERE collection_id = $1 AND (txid, id) > ($2, $3)
             ORDER BY txid, id LIMIT $4",
            "SELECT id, project_id, collection_id, collection, txid, n, received_at, shift_us, payload
             FROM rakam_internal.inbox_1 WHERE collection_id = $1 AND (txid, id) > ($2, $3)
             ORDER BY txid, id LIMIT $4",
            "SELECT id, project_id, collection_id, collection, txid, n, received_at, shift_us, payload
             FROM rakam_internal.inbox_2 WHERE collection_id = $1 AND (txid, id) > ($2, $3)
             ORDER BY txid, id LIMIT $4",
        ];
        const ONLY: [&str; 3] = [
            "SELECT id, project_id, collection_id, collection, txid, n, received_at, shift_us, payload
             FROM rakam_internal.inbox_0 WHERE collection_id = $1 AND txid = $2 AND id > $3
             ORDER BY txid, id LIMIT $4",
            "SELECT id, project_id, collection_id, collection, txid, n, received_at, shift_us, payload
             FROM rakam_internal.inbox_1 WHERE collection_id = $1 AND txid = $2 AND id > $3
             ORDER BY txid, id LIMIT $4",
            "SELECT id, project_id, collection_id, collection, txid, n, received_at, shift_us, payload
             FROM rakam_internal.inbox_2 WHERE collection_id = $1 AND txid = $2 AND id > $3
             ORDER BY txid, id LIMIT $4",
        ];
        let (sql, txid) = match run.only_txid {
            Some(txid) => (ONLY[run.table], txid),
            None => (FROM_ON[run.table], run.after.0),
        };
        spi::query(
            view,
            sql,
            &[
                arg(run.collection_id),
                xid8(txid),
                arg(run.after.1),
                arg(run.page_rows),
            ],
            tail_row,
        )
    }
}

/// The names in a project under which events wait that know their collection by its name only.
pub fn unregistered(view: View, tick: &Tick, project_id: i32) -> Result<Vec<String>> {
    const NAMES: [&str; 3] = [
        "SELECT DISTINCT collection FROM rakam_internal.inbox_0
         WHERE collection_id = 0 AND project_id = $1 AND (txid >= $2 OR txid = ANY ($3))",
        "SELECT DISTINCT collection FROM rakam_internal.inbox_1
         WHERE collection_id = 0 AND project_id = $1 AND (txid >= $2 OR txid = ANY ($3))",
        "SELECT DISTINCT collection FROM rakam_internal.inbox_2
         WHERE collection_id = 0 AND project_id = $1 AND (txid >= $2 OR txid = ANY ($3))",
    ];
    let mut names = BTreeSet::new();
    for &table in &tick.tables {
        spi::run(
            view,
            NAMES[table],
            &[
                arg(project_id),
                xid8(tick.snapshot.xmax),
                xid8_array(&tick.snapshot.xip),
            ],
            |row| {
                names.insert(row.must(1)?);
                Ok(())
            },
        )?;
    }
    Ok(names.into_iter().collect())
}

/// Rows of the next page, so that it stays near [`PAGE_BYTES`].
pub(super) fn page_rows(bytes: usize, rows: usize) -> i64 {
    ((PAGE_BYTES / (bytes / rows.max(1)).max(1)) as i64).clamp(1, PAGE_ROWS_MAX)
}
