//! What `rakam.map_session` remembers between batches: the spans of sessions, appended only.

use rakam_mappers::session::Span;

use crate::pg::Result;
use crate::pg::security::ActAs;
use crate::pg::spi::{self, View, arg, timestamptz};

/// The spans of a user that begin before `until_us` and end behind `from_us`, the newest ones.
pub fn spans(project_id: i32, actor: &[u8], from_us: i64, until_us: i64) -> Result<Vec<Span>> {
    let _owner = ActAs::owner();
    spi::query(
        View::Current,
        "SELECT session, first_at, last_at FROM rakam_internal.session_span
         WHERE project_id = $1 AND actor = $2 AND last_at >= $3 AND first_at <= $4
         ORDER BY last_at DESC LIMIT 1000",
        &[
            arg(project_id),
            arg(actor),
            timestamptz(from_us),
            timestamptz(until_us),
        ],
        |row| {
            Ok(Span {
                session: row.must(1)?,
                first_us: row.timestamptz(2).unwrap_or_default(),
                last_us: row.timestamptz(3).unwrap_or_default(),
            })
        },
    )
}

/// Remembers a span.
pub fn append(project_id: i32, actor: &[u8], span: &Span) -> Result<()> {
    let _owner = ActAs::owner();
    spi::execute(
        "INSERT INTO rakam_internal.session_span (project_id, actor, session, first_at, last_at)
         VALUES ($1, $2, $3, $4, $5)",
        &[
            arg(project_id),
            arg(actor),
            arg(span.session.as_str()),
            timestamptz(span.first_us),
            timestamptz(span.last_us),
        ],
    )?;
    Ok(())
}

/// Joins the spans that a session got within the last minute into one, and forgets those not seen for `keep_s` seconds. In the worker, under the
/// lock of the garbage collection.
pub fn tidy(keep_s: f64) -> Result<()> {
    spi::execute(
        "DELETE FROM rakam_internal.session_span
         WHERE seen_at < pg_catalog.clock_timestamp() - pg_catalog.make_interval(secs => $1)",
        &[arg(keep_s)],
    )?;
    spi::execute(
        "WITH many AS (
           SELECT pg_catalog.array_agg(id) AS ids FROM rakam_internal.session_span
           WHERE seen_at > pg_catalog.clock_timestamp() - interval '1 minute'
           GROUP BY project_id, actor, session HAVING pg_catalog.count(*) > 1),
         gone AS (
           DELETE FROM rakam_internal.session_span WHERE id IN (SELECT pg_catalog.unnest(ids) FROM many)
           RETURNING *)
         INSERT INTO rakam_internal.session_span (project_id, actor, session, first_at, last_at, seen_at)
         SELECT project_id, actor, session, pg_catalog.min(first_at), pg_catalog.max(last_at), pg_catalog.max(seen_at)
         FROM gone GROUP BY 1, 2, 3",
        &[],
    )?;
    Ok(())
}
