"""A manifest of many files that are not there: how a query finds the few it needs does not depend on the others."""

from __future__ import annotations

from .database import Database

FIRST_DAY = "2023-01-01"
DAYS = 1095


def fill(db: Database, project: str, collection: str, files: int) -> None:
    """Adds files over three years, nearly all of a day, some of a month or a year.

    They have the statistics, and say that they have the columns, of the newest real file of the collection.
    """
    db.admin.execute(
        f"""
        WITH real AS MATERIALIZED (
          SELECT f.*, s.stats FROM rakam_internal.data_file f JOIN rakam_internal.data_file_stat s USING (file_id)
          JOIN rakam_internal.collection c USING (collection_id) JOIN rakam_internal.project p ON p.project_id = c.project_id
          WHERE p.name = %s AND c.name = %s ORDER BY file_id DESC LIMIT 1),
        wanted AS (
          SELECT i, CASE WHEN i %% 8000 = 0 THEN 'year' WHEN i %% 700 = 0 THEN 'month' ELSE 'day' END AS period,
                 date '{FIRST_DAY}' + i %% {DAYS} AS day
          FROM generate_series(1, %s) i),
        placed AS (
          SELECT i, period, date_trunc(period, day::timestamp)::date AS first_day,
                 date_trunc(period, day::timestamp) + ('1 ' || period)::interval - interval '1 second' AS last
          FROM wanted),
        added AS (
          INSERT INTO rakam_internal.data_file (project_id, collection_id, storage_id, path, schema_version, period,
            first_day, n, bytes, footer_bytes, min_time, max_time, has_extra, min_xid, max_xid, flush_id)
          SELECT r.project_id, r.collection_id, r.storage_id, r.path || '.' || i, r.schema_version, p.period, p.first_day,
                 r.n, r.bytes, r.footer_bytes, p.first_day::timestamp AT TIME ZONE 'UTC', p.last AT TIME ZONE 'UTC',
                 r.has_extra, r.min_xid, r.max_xid, r.flush_id
          FROM placed p, real r RETURNING file_id, project_id, collection_id),
        described AS (
          INSERT INTO rakam_internal.data_file_stat (file_id, project_id, stats)
          SELECT a.file_id, a.project_id, r.stats FROM added a, real r)
        UPDATE rakam_internal.collection_stat s SET files = s.files + %s FROM real r
        WHERE s.collection_id = r.collection_id""",
        (project, collection, files, files),
    )
