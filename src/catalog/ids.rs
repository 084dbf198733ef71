//! The runs of event ids that de-duplication remembers.
//!
//! Rows are immutable. Whoever reads several times does so under one snapshot: a merge may replace rows meanwhile.

use rakam_lake::id_run::{ENTRIES_AT, ENTRY_BYTES, Node};

use crate::pg::spi::{self, View, arg};
use crate::pg::{PgError, Result};

/// A time range in which all events of a run were received, in microseconds since 1970; the end is not in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Bucket {
    pub from_us: i64,
    pub to_us: i64,
}

/// A run without its ids.
#[derive(Debug, Clone, Copy)]
pub struct RunRow {
    pub run_id: i64,
    pub bucket: Bucket,
    pub node: Node,
    pub n: usize,
    pub min_received_us: i64,
    pub max_received_us: i64,
    pub written_us: i64,
    pub has_filter: bool,
}

/// A run to be stored.
pub struct NewRun {
    pub project_id: i32,
    pub bucket: Bucket,
    pub node: Node,
    pub level: i16,
    pub n: usize,
    pub min_received_us: i64,
    pub max_received_us: i64,
    pub written_us: i64,
    pub filter: Option<Vec<u8>>,
    pub ids: Vec<u8>,
}

/// The upper half of a hash as SQL has it: in the same order.
pub fn signed(upper: u64) -> i64 {
    (upper ^ (1 << 63)) as i64
}

fn unsigned(signed: i64) -> u64 {
    signed as u64 ^ (1 << 63)
}

/// Reads nine columns from `first` on.
fn run_row(row: &spi::Row, first: usize) -> Result<RunRow> {
    Ok(RunRow {
        run_id: row.must(first)?,
        bucket: Bucket {
            from_us: row.timestamptz(first + 1).unwrap_or(i64::MIN),
            to_us: row.timestamptz(first + 2).unwrap_or(i64::MAX),
        },
        node: Node {
            depth: row.must::<i16>(first + 3)? as u8,
            first: unsigned(row.must(first + 4)?),
        },
        n: row.must::<i32>(first + 5)? as usize,
        min_received_us: row.timestamptz(first + 6).unwrap_or(i64::MIN),
        max_received_us: row.timestamptz(first + 7).unwrap_or(i64::MAX),
        written_us: row.timestamptz(first + 8).unwrap_or(i64::MAX),
        has_filter: row.must(first + 9)?,
    })
}

/// The runs of projects, each with its project. Workers only.
pub fn runs(view: View, project_ids: &[i32]) -> Result<Vec<(i32, RunRow)>> {
    spi::query(
        view,
        "SELECT project_id, run_id, bucket_from, bucket_to, depth, hash_from, n, min_received, max_received,
                written_at, filter IS NOT NULL
         FROM rakam_internal.id_run WHERE project_id = ANY ($1) ORDER BY run_id",
        &[arg(project_ids.to_vec())],
        |row| Ok((row.must(1)?, run_row(row, 2)?)),
    )
}

/// The runs of a project with events received in the range (both ends inclusive), as far as the view's user sees them.
pub fn runs_received(view: View, project_id: i32, from_us: i64, to_us: i64) -> Result<Vec<RunRow>> {
    spi::query(
        view,
        "SELECT run_id, bucket_from, bucket_to, depth, hash_from, n, min_received, max_received, written_at,
                filter IS NOT NULL
         FROM rakam_internal.id_run WHERE project_id = $1 AND max_received >= $2 AND min_received <= $3",
        &[
            arg(project_id),
            spi::timestamptz_saturating(from_us),
            spi::timestamptz_saturating(to_us),
        ],
        |row| run_row(row, 1),
    )
}

/// As [`runs_received`], only those that may hold one of a few hashes, given by their upper halves.
pub fn runs_with(
    view: View,
    project_id: i32,
    from_us: i64,
    to_us: i64,
    uppers: &[u64],
) -> Result<Vec<RunRow>> {
    spi::query(
        view,
        "SELECT run_id, bucket_from, bucket_to, depth, hash_from, n, min_received, max_received, written_at,
                filter IS NOT NULL
         FROM rakam_internal.id_run WHERE project_id = $1 AND max_received >= $2 AND min_received <= $3
         AND EXISTS (SELECT FROM pg_catalog.unnest($4) h WHERE h BETWEEN hash_from AND hash_to)",
        &[
            arg(project_id),
            spi::timestamptz_saturating(from_us),
            spi::timestamptz_saturating(to_us),
            arg(uppers.iter().map(|&upper| signed(upper)).collect::<Vec<_>>()),
        ],
        |row| run_row(row, 1),
    )
}

/// The sealed filters of runs, by run.
pub fn filters(
    view: View,
    run_ids: &[i64],
    each: impl FnMut(i64, Vec<u8>) -> Result<()>,
) -> Result<()> {
    let sql = "SELECT run_id, filter FROM rakam_internal.id_run WHERE run_id = ANY ($1)";
    sealed(view, sql, run_ids, each)
}

/// The sealed ids of runs, by run.
pub fn ids(
    view: View,
    run_ids: &[i64],
    each: impl FnMut(i64, Vec<u8>) -> Result<()>,
) -> Result<()> {
    let sql = "SELECT run_id, ids FROM rakam_internal.id_run WHERE run_id = ANY ($1)";
    sealed(view, sql, run_ids, each)
}

fn sealed(
    view: View,
    sql: &'static str,
    run_ids: &[i64],
    mut each: impl FnMut(i64, Vec<u8>) -> Result<()>,
) -> Result<()> {
    let found = spi::run(view, sql, &[arg(run_ids.to_vec())], |row| {
        each(row.must(1)?, row.bytes(2).unwrap_or_default())
    })?;
    ensure_all(found, run_ids.len())
}

fn ensure_all(found: u64, wanted: usize) -> Result<()> {
    if found == wanted as u64 {
        return Ok(());
    }
    Err(PgError::internal(
        "a run of event ids that was listed is not visible any more",
    ))
}

/// Pieces of filters, in the order in which they are asked for: each of `len` bytes from an offset on.
pub fn filter_slices(
    view: View,
    slices: &[(i64, usize)],
    len: usize,
    mut each: impl FnMut(usize, Vec<u8>) -> Result<()>,
) -> Result<()> {
    spi::run(
        view,
        "SELECT o.k, (SELECT pg_catalog.substr(r.filter, o.first, $3) FROM rakam_internal.id_run r
                      WHERE r.run_id = o.run_id)
         FROM ROWS FROM (pg_catalog.unnest($1), pg_catalog.unnest($2)) WITH ORDINALITY o (run_id, first, k)",
        &[
            arg(slices.iter().map(|s| s.0).collect::<Vec<i64>>()),
            arg(slices.iter().map(|s| s.1 as i32 + 1).collect::<Vec<i32>>()),
            arg(len as i32),
        ],
        |row| each(row.must::<i64>(1)? as usize - 1, row.bytes(2).unwrap_or_default()),
    )?;
    Ok(())
}

/// Some entries of runs, in the order in which they are asked for: from an entry on, so many.
pub fn id_slices(
    view: View,
    slices: &[(i64, std::ops::Range<usize>)],
    mut each: impl FnMut(usize, Vec<u8>) -> Result<()>,
) -> Result<()> {
    let first =
        |s: &(i64, std::ops::Range<usize>)| (ENTRIES_AT + s.1.start * ENTRY_BYTES) as i32 + 1;
    let len = |s: &(i64, std::ops::Range<usize>)| (s.1.len() * ENTRY_BYTES) as i32;
    spi::run(
        view,
        "SELECT o.k, (SELECT pg_catalog.substr(r.ids, o.first, o.len) FROM rakam_internal.id_run r
                      WHERE r.run_id = o.run_id)
         FROM ROWS FROM (pg_catalog.unnest($1), pg_catalog.unnest($2), pg_catalog.unnest($3)) WITH ORDINALITY
              o (run_id, first, len, k)",
        &[
            arg(slices.iter().map(|s| s.0).collect::<Vec<i64>>()),
            arg(slices.iter().map(first).collect::<Vec<i32>>()),
            arg(slices.iter().map(len).collect::<Vec<i32>>()),
        ],
        |row| each(row.must::<i64>(1)? as usize - 1, row.bytes(2).unwrap_or_default()),
    )?;
    Ok(())
}

/// Runs of one statement at most, and about the bytes of their ids.
const ADDED_AT_ONCE: usize = 1000;
const ADDED_BYTES: usize = 8 << 20;

/// Stores runs, many with one statement: where receipts are spread over years each bucket of time has a run of its own.
pub fn add(runs: &[NewRun]) -> Result<()> {
    let mut left = runs;
    while !left.is_empty() {
        let mut bytes = 0;
        let fits = |run: &&NewRun| {
            bytes += run.ids.len() + run.filter.as_ref().map_or(0, Vec::len);
            bytes <= ADDED_BYTES
        };
        let n = (left.iter().take(ADDED_AT_ONCE).take_while(fits).count()).max(1);
        let (now, later) = left.split_at(n);
        add_some(now)?;
        left = later;
    }
    Ok(())
}

fn add_some(runs: &[NewRun]) -> Result<()> {
    let times = |f: &dyn Fn(&NewRun) -> i64| {
        spi::timestamptz_array(&runs.iter().map(f).collect::<Vec<i64>>())
    };
    let hashes =
        |f: &dyn Fn(&NewRun) -> u64| runs.iter().map(|run| signed(f(run))).collect::<Vec<i64>>();
    spi::execute(
        "INSERT INTO rakam_internal.id_run (project_id, bucket_from, bucket_to, depth, hash_from, hash_to, level, n,
           min_received, max_received, written_at, filter, ids)
         SELECT * FROM ROWS FROM (
           pg_catalog.unnest($1), pg_catalog.unnest($2), pg_catalog.unnest($3), pg_catalog.unnest($4),
           pg_catalog.unnest($5), pg_catalog.unnest($6), pg_catalog.unnest($7), pg_catalog.unnest($8),
           pg_catalog.unnest($9), pg_catalog.unnest($10), pg_catalog.unnest($11), pg_catalog.unnest($12),
           pg_catalog.unnest($13)) r",
        &[
            arg(runs.iter().map(|r| r.project_id).collect::<Vec<i32>>()),
            times(&|r| r.bucket.from_us),
            times(&|r| r.bucket.to_us),
            arg((runs.iter().map(|r| i16::from(r.node.depth))).collect::<Vec<i16>>()),
            arg(hashes(&|r| r.node.first)),
            arg(hashes(&|r| r.node.last())),
            arg(runs.iter().map(|r| r.level).collect::<Vec<i16>>()),
            arg(runs.iter().map(|r| r.n as i32).collect::<Vec<i32>>()),
            times(&|r| r.min_received_us),
            times(&|r| r.max_received_us),
            times(&|r| r.written_us),
            arg(runs.iter().map(|r| r.filter.as_deref()).collect::<Vec<_>>()),
            arg(runs.iter().map(|r| r.ids.as_slice()).collect::<Vec<_>>()),
        ],
    )?;
    Ok(())
}

/// Deletes runs by id; the caller compares the number.
pub fn delete(run_ids: &[i64]) -> Result<u64> {
    spi::execute(
        "DELETE FROM rakam_internal.id_run WHERE run_id = ANY ($1)",
        &[arg(run_ids.to_vec())],
    )
}

/// Adds to the number of copies that were dropped in a collection.
pub fn count_duplicates(collection_id: i32, project_id: i32, n: i64) -> Result<()> {
    spi::execute(
        "INSERT INTO rakam_internal.collection_stat AS s (collection_id, project_id, duplicates) VALUES ($1, $2, $3)
         ON CONFLICT (collection_id) DO UPDATE SET duplicates = s.duplicates + $3",
        &[arg(collection_id), arg(project_id), arg(n)],
    )?;
    Ok(())
}

/// Runs of one size class in one place.
#[derive(Debug, Clone, Copy)]
pub struct Crowd {
    pub project_id: i32,
    pub bucket: Bucket,
    pub node: Node,
    pub level: i16,
}

/// The number of the newest run; 0: there is none.
pub fn newest() -> Result<i64> {
    let newest = spi::first(
        View::Current,
        "SELECT max(run_id) FROM rakam_internal.id_run",
        &[],
        |row| Ok(row.get(1)),
    )?;
    Ok(newest.flatten().unwrap_or(0))
}

/// Where there are at least so many runs of one class, in projects that have a run with a higher number than `since`.
pub fn crowds(at_least: usize, since: i64) -> Result<Vec<Crowd>> {
    spi::query(
        View::Current,
        "SELECT project_id, bucket_from, bucket_to, depth, hash_from, level FROM rakam_internal.id_run
         WHERE project_id IN (SELECT n.project_id FROM rakam_internal.id_run n WHERE n.run_id > $2)
         GROUP BY 1, 2, 3, 4, 5, 6 HAVING count(*) >= $1 ORDER BY 4, 1, 2 LIMIT 1000",
        &[arg(at_least as i64), arg(since)],
        |row| {
            Ok(Crowd {
                project_id: row.must(1)?,
                bucket: Bucket {
                    from_us: row.timestamptz(2).unwrap_or(i64::MIN),
                    to_us: row.timestamptz(3).unwrap_or(i64::MAX),
                },
                node: Node {
                    depth: row.must::<i16>(4)? as u8,
                    first: unsigned(row.must(5)?),
                },
                level: row.must(6)?,
            })
        },
    )
}

/// The runs of a class in a place, oldest first.
pub fn crowd(of: &Crowd, limit: usize) -> Result<Vec<RunRow>> {
    spi::query(
        View::Current,
        "SELECT run_id, bucket_from, bucket_to, depth, hash_from, n, min_received, max_received, written_at,
                filter IS NOT NULL
         FROM rakam_internal.id_run
         WHERE project_id = $1 AND bucket_from = $2 AND bucket_to = $3 AND depth = $4 AND hash_from = $5 AND level = $6
         ORDER BY run_id LIMIT $7",
        &[
            arg(of.project_id),
            spi::timestamptz(of.bucket.from_us),
            spi::timestamptz(of.bucket.to_us),
            arg(i16::from(of.node.depth)),
            arg(signed(of.node.first)),
            arg(of.level),
            arg(limit as i64),
        ],
        |row| run_row(row, 1),
    )
}

/// Buckets (project, bucket, runs) with several runs that ended before `now` and have got nothing new for an eighth of
/// their length.
pub fn quiet_buckets(now_us: i64) -> Result<Vec<(i32, Bucket, i64)>> {
    spi::query(
        View::Current,
        "SELECT project_id, bucket_from, bucket_to, count(*) FROM rakam_internal.id_run WHERE bucket_to <= $1
         GROUP BY 1, 2, 3 HAVING count(*) > 1 AND max(written_at) <= $1 - (bucket_to - bucket_from) / 8
         ORDER BY 2, 1 LIMIT 1000",
        &[spi::timestamptz(now_us)],
        |row| {
            Ok((
                row.must(1)?,
                Bucket {
                    from_us: row.timestamptz(2).unwrap_or(i64::MIN),
                    to_us: row.timestamptz(3).unwrap_or(i64::MAX),
                },
                row.must(4)?,
            ))
        },
    )
}

/// The runs of a bucket, from the root of its nodes down.
pub fn bucket(project_id: i32, bucket: Bucket) -> Result<Vec<RunRow>> {
    spi::query(
        View::Current,
        "SELECT run_id, bucket_from, bucket_to, depth, hash_from, n, min_received, max_received, written_at,
                filter IS NOT NULL
         FROM rakam_internal.id_run WHERE project_id = $1 AND bucket_from = $2 AND bucket_to = $3
         ORDER BY depth, hash_from, run_id",
        &[
            arg(project_id),
            spi::timestamptz(bucket.from_us),
            spi::timestamptz(bucket.to_us),
        ],
        |row| run_row(row, 1),
    )
}

/// Whether a run holds only ids received and kept before this moment.
pub fn any_older(cutoff_us: i64) -> Result<bool> {
    Ok(spi::run(
        View::Current,
        "SELECT FROM rakam_internal.id_run WHERE max_received < $1 AND written_at < $1 LIMIT 1",
        &[spi::timestamptz_saturating(cutoff_us)],
        |_| Ok(()),
    )? > 0)
}

/// Before the returned moment no event was received that a transaction in progress may still commit. A transaction is
/// taken to have run at most `longest_us` before it was prepared; while it ran it was seen as running. A session whose
/// activity is not tracked is taken to have begun its transaction with itself.
pub fn oldest_in_progress(longest_us: i64) -> Result<i64> {
    let found = spi::first(
        View::Current,
        "SELECT least(pg_catalog.clock_timestamp(),
           (SELECT min(coalesce(xact_start, backend_start)) FROM pg_catalog.pg_stat_activity
            WHERE datname = pg_catalog.current_database() AND pid <> pg_catalog.pg_backend_pid()
              AND (xact_start IS NOT NULL
                   OR state = 'disabled' AND (backend_xid IS NOT NULL OR backend_xmin IS NOT NULL))),
           (SELECT min(prepared) - $1 * interval '1 microsecond' FROM pg_catalog.pg_prepared_xacts
            WHERE database = pg_catalog.current_database()))",
        &[arg(longest_us)],
        |row| Ok(row.timestamptz(1)),
    )?;
    Ok(found.flatten().unwrap_or(i64::MIN))
}

/// Of each project with such events: when the oldest one was received that is committed and not digested yet.
pub fn oldest_waiting() -> Result<Vec<(i32, i64)>> {
    spi::query(
        View::Current,
        "WITH tick AS (SELECT t.snapshot FROM rakam_internal.inbox_tick t WHERE t.shard = 0 ORDER BY t.tick_id DESC LIMIT 1),
              digested AS (SELECT p.project_id, coalesce(l.snapshot, t.snapshot) AS snapshot
                           FROM rakam_internal.project p CROSS JOIN tick t LEFT JOIN rakam_internal.inbox_lag l USING (project_id))
         SELECT w.project_id, min(w.received_at) FROM (
           SELECT i.project_id, i.received_at FROM digested d JOIN rakam_internal.inbox_0 i USING (project_id)
             WHERE i.txid >= pg_catalog.pg_snapshot_xmin(d.snapshot)
               AND NOT pg_catalog.pg_visible_in_snapshot(i.txid, d.snapshot)
           UNION ALL SELECT i.project_id, i.received_at FROM digested d JOIN rakam_internal.inbox_1 i USING (project_id)
             WHERE i.txid >= pg_catalog.pg_snapshot_xmin(d.snapshot)
               AND NOT pg_catalog.pg_visible_in_snapshot(i.txid, d.snapshot)
           UNION ALL SELECT i.project_id, i.received_at FROM digested d JOIN rakam_internal.inbox_2 i USING (project_id)
             WHERE i.txid >= pg_catalog.pg_snapshot_xmin(d.snapshot)
               AND NOT pg_catalog.pg_visible_in_snapshot(i.txid, d.snapshot)
           UNION ALL SELECT project_id, received_at FROM rakam_internal.inbox_parked
           UNION ALL SELECT project_id, received_at FROM rakam_internal.inbox_restored) w
         GROUP BY 1",
        &[],
        |row| Ok((row.must(1)?, row.timestamptz(2).unwrap_or(i64::MIN))),
    )
}

/// Deletes some runs that hold only ids received and kept before `kept_us`, and received before `received_us` and, where events
/// of their project wait, a window before the oldest of these.
pub fn forget(
    kept_us: i64,
    received_us: i64,
    waiting: &[(i32, i64)],
    window_us: i64,
    limit: i64,
) -> Result<u64> {
    let (projects, until): (Vec<i32>, Vec<i64>) = waiting
        .iter()
        .map(|&(project_id, at_us)| (project_id, at_us.saturating_sub(window_us)))
        .unzip();
    spi::execute(
        "DELETE FROM rakam_internal.id_run WHERE run_id = ANY (ARRAY(
           SELECT r.run_id FROM rakam_internal.id_run r
           LEFT JOIN ROWS FROM (pg_catalog.unnest($3), pg_catalog.unnest($4)) w (project_id, until)
             ON w.project_id = r.project_id
           WHERE r.max_received < least($1, $2, w.until) AND r.written_at < $1 LIMIT $5 FOR UPDATE OF r SKIP LOCKED))",
        &[
            spi::timestamptz_saturating(kept_us),
            spi::timestamptz_saturating(received_us),
            arg(projects),
            spi::timestamptz_array(&until),
            arg(limit),
        ],
    )
}
