//! What compaction asks of the manifest. Workers only.

use rakam_lake::compaction::FileSpan;

use crate::pg::Result;
use crate::pg::spi::{self, View, arg};

/// A data file as a merge takes it.
#[derive(Debug, Clone)]
pub struct Candidate {
    pub span: FileSpan,
    pub storage_id: i32,
    pub path: String,
    pub schema_version: i32,
    pub level: i16,
    /// Rows, deleted ones included.
    pub stored: i64,
    pub min_time_us: i64,
    pub max_time_us: i64,
}

fn candidate(row: &spi::Row) -> Result<Candidate> {
    let stored: i64 = row.must(4)?;
    let bytes: i64 = row.must(5)?;
    let deleted: i64 = row.must(6)?;
    let period: String = row.must(2)?;
    Ok(Candidate {
        span: FileSpan {
            id: row.must(1)?,
            period: period.parse()?,
            first_day: row.must(3)?,
            n: (stored - deleted).max(0) as u64,
            bytes: bytes.max(0) as u64,
        },
        storage_id: row.must(7)?,
        path: row.must(8)?,
        schema_version: row.must(9)?,
        level: row.must(10)?,
        stored,
        min_time_us: row.timestamptz(11).unwrap_or(i64::MIN),
        max_time_us: row.timestamptz(12).unwrap_or(i64::MAX),
    })
}

/// Every data file of a collection. For a pass over all of them: a merge asks for [`present`] ones of its own.
pub fn files(view: View, collection_id: i32) -> Result<Vec<Candidate>> {
    spi::query(
        view,
        "SELECT f.file_id, f.period, f.first_day - date '1970-01-01', f.n, f.bytes, coalesce(d.n, 0), f.storage_id, f.path,
                f.schema_version, f.level, f.min_time, f.max_time
         FROM rakam_internal.data_file f
         LEFT JOIN rakam_internal.deletion d ON d.kind = 'file' AND d.object_id = f.file_id
         WHERE f.collection_id = $1 ORDER BY f.file_id",
        &[arg(collection_id)],
        candidate,
    )
}

/// The data files of a collection of which every event is from before a time.
pub fn files_before(view: View, collection_id: i32, before_us: i64) -> Result<Vec<Candidate>> {
    spi::query(
        view,
        "SELECT f.file_id, f.period, f.first_day - date '1970-01-01', f.n, f.bytes, coalesce(d.n, 0), f.storage_id, f.path,
                f.schema_version, f.level, f.min_time, f.max_time
         FROM rakam_internal.data_file f
         LEFT JOIN rakam_internal.deletion d ON d.kind = 'file' AND d.object_id = f.file_id
         WHERE f.collection_id = $1 AND f.max_time < $2 ORDER BY f.file_id",
        &[
            arg(collection_id),
            spi::timestamptz_saturating(before_us),
        ],
        candidate,
    )
}

/// How many of these files are still in the manifest.
pub fn present(view: View, file_ids: &[i64]) -> Result<usize> {
    let found = spi::run(
        view,
        "SELECT FROM rakam_internal.data_file WHERE file_id = ANY ($1)",
        &[arg(file_ids.to_vec())],
        |_| Ok(()),
    )?;
    Ok(found as usize)
}

/// The end of the manifest's log.
pub fn newest_entry(view: View) -> Result<i64> {
    Ok(spi::first(
        view,
        "SELECT coalesce(max(seq), 0) FROM rakam_internal.manifest_log",
        &[],
        |row| row.must(1),
    )?
    .unwrap_or(0))
}

/// Collections with at least so many small files in one place (day, month or year): only of those can a day have too
/// many. With `after` only those that got files since that entry of the log, in a year in which they did.
pub fn crowded(view: View, small_below: u64, least: usize, after: Option<i64>) -> Result<Vec<i32>> {
    spi::query(
        view,
        // Periods lie within years, so that a new file shares its days with files of its year only.
        "SELECT DISTINCT collection_id FROM (
           SELECT f.collection_id FROM rakam_internal.data_file f
           WHERE $3 IS NULL AND f.bytes < $1
           GROUP BY f.collection_id, f.period, f.first_day HAVING count(*) >= $2
           UNION ALL
           SELECT y.collection_id FROM (
             SELECT DISTINCT n.collection_id, pg_catalog.date_trunc('year', n.first_day::timestamp)::date AS first_day
             FROM rakam_internal.manifest_log l JOIN rakam_internal.data_file n USING (file_id)
             WHERE $3 IS NOT NULL AND l.seq > $3 AND l.op = 'add') y
           WHERE EXISTS (
             SELECT FROM rakam_internal.data_file f
             WHERE f.collection_id = y.collection_id AND f.period IN ('day', 'month', 'year')
               AND f.first_day >= y.first_day AND f.first_day < y.first_day + 366 AND f.bytes < $1
             GROUP BY f.period, f.first_day HAVING count(*) >= $2)) places
         ORDER BY 1",
        &[arg(small_below as i64), arg(least as i64), arg(after)],
        |row| row.must(1),
    )
}
