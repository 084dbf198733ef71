//! How long events are kept: the interval of a collection, and the times that follow from it.
//!
//! To a reader an event is there until its `_time` is before the start of the reader's transaction less the interval.
//! Rows are removed only once that is so for every transaction there is.

use serde::{Deserialize, Serialize};

use crate::pg::Result;
use crate::pg::spi::{self, Arg, View, arg};

/// An interval, by the server's parts of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Keep {
    pub months: i32,
    pub days: i32,
    pub micros: i64,
}

impl Keep {
    /// Some time, and no part of it backwards: else the times that follow from it could go back.
    pub fn is_positive(self) -> bool {
        let parts = [i64::from(self.months), i64::from(self.days), self.micros];
        parts.iter().all(|part| *part >= 0) && parts.iter().any(|part| *part > 0)
    }

    fn args(collection_id: i32, keep: Option<Self>) -> [Arg; 4] {
        [
            arg(collection_id),
            arg(keep.map(|keep| keep.months)),
            arg(keep.map(|keep| keep.days)),
            arg(keep.map(|keep| keep.micros)),
        ]
    }
}

/// Before this time, in microseconds since 1970, no transaction of this database sees an event of the collection, now or
/// later; None: all are kept. The margin is for a transaction that has begun and does not show its start yet.
pub fn removable_before(view: View, collection_id: i32) -> Result<Option<i64>> {
    Ok(spi::first(
        view,
        "SELECT rakam_internal.kept_since(c.retention,
                  least(pg_catalog.clock_timestamp() - interval '5 seconds', s.oldest))
         FROM rakam_internal.collection c,
              -- Who does not track his activities shows no transaction.
              (SELECT min(coalesce(a.xact_start, CASE WHEN a.state = 'disabled' AND (a.backend_xid IS NOT NULL
                                                   OR a.backend_xmin IS NOT NULL) THEN a.backend_start END)) AS oldest
               FROM pg_catalog.pg_stat_activity a
               WHERE a.pid <> pg_catalog.pg_backend_pid() AND (a.datid IS NULL OR a.datid =
                 (SELECT d.oid FROM pg_catalog.pg_database d WHERE d.datname = pg_catalog.current_database()))) s
         WHERE c.collection_id = $1 AND c.retention IS NOT NULL",
        &[arg(collection_id)],
        |row| Ok(row.timestamptz(1)),
    )?
    .flatten())
}

/// Before this time a transaction that begins now sees no event of the collection.
pub fn hidden_before(view: View, collection_id: i32) -> Result<Option<i64>> {
    Ok(spi::first(
        view,
        "SELECT rakam_internal.kept_since(retention, pg_catalog.now())
         FROM rakam_internal.collection WHERE collection_id = $1 AND retention IS NOT NULL",
        &[arg(collection_id)],
        |row| Ok(row.timestamptz(1)),
    )?
    .flatten())
}

/// Whether events would be kept longer than now, so that some that are hidden now would be seen again.
pub fn lengthens(view: View, collection_id: i32, keep: Option<Keep>) -> Result<bool> {
    Ok(spi::first(
        view,
        "SELECT coalesce(rakam_internal.kept_since(retention, pg_catalog.now()) > coalesce(
                  rakam_internal.kept_since(pg_catalog.make_interval(months => $2, days => $3)
                    + $4::float8 * interval '1 microsecond', pg_catalog.now()), '-infinity'), false)
         FROM rakam_internal.collection WHERE collection_id = $1",
        &Keep::args(collection_id, keep),
        |row| row.must(1),
    )?
    .unwrap_or(false))
}

/// Sets it; None: all are kept. One that reaches back beyond the first timestamp is an error (22008).
pub fn set(collection_id: i32, keep: Option<Keep>) -> Result<()> {
    spi::execute(
        "UPDATE rakam_internal.collection
         SET retention = pg_catalog.make_interval(months => $2, days => $3) + $4::float8 * interval '1 microsecond'
         WHERE collection_id = $1",
        &Keep::args(collection_id, keep),
    )?;
    hidden_before(View::Current, collection_id)?;
    Ok(())
}

/// The collections that have one, and files of which all or at least this share of the time is over.
pub fn collections_with_expired(view: View, share: f64) -> Result<Vec<i32>> {
    spi::query(
        view,
        "SELECT c.collection_id FROM rakam_internal.collection c,
           LATERAL (SELECT rakam_internal.kept_since(c.retention,
                      pg_catalog.clock_timestamp() - interval '5 seconds') AS horizon) h
         WHERE c.retention IS NOT NULL AND EXISTS (
           SELECT FROM rakam_internal.data_file f WHERE f.collection_id = c.collection_id AND f.min_time < h.horizon
             AND (f.max_time < h.horizon OR h.horizon - f.min_time >= $1 * (f.max_time - f.min_time)))
         ORDER BY 1",
        &[arg(share)],
        |row| row.must(1),
    )
}
