-- What users look at. Views run as their invoker, so row-level security decides which rows there are; where a
-- member sees more than the tables' policies give (counts of data to a role that only writes), a function of
-- src/projects/access.rs answers for the invoker's projects.

CREATE VIEW rakam.projects WITH (security_invoker = true) AS
SELECT p.name AS project, s.storage, p.event_store, p.schema_mode, p.created_at
FROM rakam_internal.project p LEFT JOIN rakam_internal.storages() s USING (storage_id);

CREATE VIEW rakam.keys WITH (security_invoker = true) AS
SELECT project, key_id, created_at, revoked_at FROM rakam_internal.key_sets();

CREATE VIEW rakam.collections WITH (security_invoker = true) AS
SELECT p.name AS project, c.name AS collection,
       (SELECT pg_catalog.count(*) FROM rakam_internal.field f WHERE f.collection_id = c.collection_id) AS fields,
       c.schema_version, c.retention, c.created_at
FROM rakam_internal.collection c JOIN rakam_internal.project p USING (project_id);

CREATE VIEW rakam.fields WITH (security_invoker = true) AS
SELECT p.name AS project, c.name AS collection, f.name AS field, f.field_id, f.type, f.declared, f.column_ready, f.added_at
FROM rakam_internal.field f
JOIN rakam_internal.collection c USING (collection_id)
JOIN rakam_internal.project p ON p.project_id = c.project_id;

-- A version has the fields that it or one before it added and none of these dropped.
CREATE VIEW rakam.schema_versions WITH (security_invoker = true) AS
SELECT p.name AS project, c.name AS collection, v.version,
       rakam_internal.avro_schema(p.name, c.name, v.version, f.ids, f.names, f.types) AS avro_schema, v.created_at
FROM rakam_internal.collection c
JOIN rakam_internal.project p USING (project_id)
CROSS JOIN LATERAL (
  SELECT version, pg_catalog.min(at) AS created_at
  FROM (SELECT 1 AS version, c.created_at AS at
        UNION ALL
        SELECT added_version, added_at FROM rakam_internal.field WHERE collection_id = c.collection_id
        UNION ALL
        SELECT added_version, added_at FROM rakam_internal.dropped_field WHERE collection_id = c.collection_id
        UNION ALL
        SELECT dropped_version, dropped_at FROM rakam_internal.dropped_field WHERE collection_id = c.collection_id) changes
  GROUP BY version
) v
CROSS JOIN LATERAL (
  SELECT coalesce(pg_catalog.array_agg(field_id ORDER BY field_id), '{}') AS ids,
         coalesce(pg_catalog.array_agg(name::text ORDER BY field_id), '{}') AS names,
         coalesce(pg_catalog.array_agg(type::text ORDER BY field_id), '{}') AS types
  FROM (SELECT field_id, name, type FROM rakam_internal.field
        WHERE collection_id = c.collection_id AND added_version <= v.version
        UNION ALL
        SELECT field_id, name, type FROM rakam_internal.dropped_field
        WHERE collection_id = c.collection_id AND added_version <= v.version AND dropped_version > v.version) fields
) f;

CREATE VIEW rakam.data_files WITH (security_invoker = true) AS
SELECT project, collection, storage, period, first_day, last_day, path, n, bytes, min_time, max_time, level, created_at
FROM rakam_internal.data_files();

CREATE VIEW rakam.attached WITH (security_invoker = true) AS
SELECT p.name AS project, a.name, a.url, a.format, a.attached_at
FROM rakam_internal.attached_table a JOIN rakam_internal.project p USING (project_id);

CREATE VIEW rakam.invalid_value WITH (security_invoker = true) AS
SELECT p.name AS project, c.name AS collection, v.field, v.type, v.value, v.error, v.event_id, v.at,
       coalesce(k.n, 1) AS count
FROM rakam_internal.invalid_value v
JOIN rakam_internal.collection c USING (collection_id)
JOIN rakam_internal.project p ON p.project_id = c.project_id
LEFT JOIN rakam_internal.invalid_count k
  ON k.collection_id = v.collection_id AND k.field = v.field AND k.day = (v.at AT TIME ZONE 'UTC')::date;

CREATE VIEW rakam.dead_letter WITH (security_invoker = true) AS
SELECT d.id, p.name AS project, d.source, d.split, d.off, d.payload, d.error, d.at
FROM rakam_internal.dead_letter d JOIN rakam_internal.project p USING (project_id);

CREATE VIEW rakam.stat_collection WITH (security_invoker = true) AS
SELECT project, collection, inbox_events + hot_events + cold_events AS events, inbox_events, hot_events, hot_bytes,
       cold_events, cold_bytes, files, duplicates, invalid_values, last_event_at,
       CASE WHEN last_event_at IS NOT NULL THEN
         greatest(0, pg_catalog.date_part('epoch', pg_catalog.clock_timestamp() - last_event_at)) END AS freshness_s
FROM rakam_internal.collection_sizes();

-- What the workers noted of the storages: looking waits for nobody.
CREATE VIEW rakam.stat_lake WITH (security_invoker = true) AS
SELECT storage, url, reachable, last_error, pending_bytes, orphans, deferred, owner FROM rakam_internal.lake();

-- Calls on one's own projects; those that name no project, or an unknown one, are for superusers.
CREATE VIEW rakam.audit_log WITH (security_invoker = true) AS
SELECT at, role, project, call, object, outcome FROM rakam_internal.audit_log;

CREATE VIEW rakam.stat_progress WITH (security_invoker = true) AS
SELECT r.pid, p.name AS project, r.what, r.done, r.total, r.unit, r.started_at
FROM rakam_internal.progress r JOIN rakam_internal.project p USING (project_id)
WHERE rakam_internal.is_running(r.pid);

CREATE VIEW rakam.sources WITH (security_invoker = true) AS
SELECT p.name AS project, s.name AS source, s.kind, f.srvname::text AS server, s.options, s.is_paused AS paused, s.created_at,
       (SELECT coalesce(pg_catalog.sum(t.tombstones), 0)::int8 FROM rakam_internal.source_split t
        WHERE t.source_id = s.source_id) AS tombstones
FROM rakam_internal.source s
JOIN rakam_internal.project p USING (project_id)
LEFT JOIN pg_catalog.pg_foreign_table t ON t.ftrelid = s.anchor
LEFT JOIN pg_catalog.pg_foreign_server f ON f.oid = t.ftserver;

CREATE VIEW rakam.offsets WITH (security_invoker = true) AS
SELECT p.name AS project, s.name AS source, t.split, t.next_offset, t.epoch, t.state, t.updated_at
FROM rakam_internal.source_split t
JOIN rakam_internal.source s USING (source_id)
JOIN rakam_internal.project p ON p.project_id = s.project_id;

-- One row a split; of a source without any, one row without split. Rates fade while nothing comes.
CREATE VIEW rakam.stat_source WITH (security_invoker = true) AS
SELECT p.name AS project, s.name AS source, t.split,
       CASE WHEN s.is_paused AND coalesce(t.state, 'open') = 'open' THEN 'paused' ELSE coalesce(t.state, 'open') END AS state,
       CASE WHEN t.state = 'ended' THEN 0 ELSE t.lag_records END AS lag_records,
       CASE WHEN t.state = 'ended' OR t.lag_records = 0 THEN 0
            WHEN t.lag_ms IS NOT NULL THEN t.lag_ms / 1000.0::float8
            WHEN t.lag_records > 0 THEN greatest(0, pg_catalog.date_part('epoch', pg_catalog.clock_timestamp() - t.record_at))
       END AS lag_s,
       t.records_per_s * rakam_internal.fade(t.stored_at) AS records_per_s,
       t.bytes_per_s * rakam_internal.fade(t.stored_at) AS bytes_per_s,
       t.stored_at AS last_commit_at, coalesce(t.error, s.last_error) AS last_error
FROM rakam_internal.source s
JOIN rakam_internal.project p USING (project_id)
LEFT JOIN rakam_internal.source_split t USING (source_id);

GRANT SELECT ON rakam.sources, rakam.offsets, rakam.stat_source, rakam.projects, rakam.keys, rakam.collections, rakam.fields, rakam.attached, rakam.schema_versions,
  rakam.data_files, rakam.invalid_value, rakam.dead_letter, rakam.stat_collection, rakam.stat_lake, rakam.audit_log,
  rakam.stat_progress TO PUBLIC;

COMMENT ON VIEW rakam.sources IS 'What one''s projects read of Kafka, Kinesis and storages';
COMMENT ON VIEW rakam.offsets IS 'How far each split of one''s projects'' sources is stored';
COMMENT ON VIEW rakam.stat_source IS 'How one''s projects'' sources are doing, split by split';
COMMENT ON VIEW rakam.projects IS 'Projects of which the current role is a member';
COMMENT ON VIEW rakam.keys IS 'Key sets of one''s projects; the keys themselves are stored nowhere';
COMMENT ON VIEW rakam.collections IS 'Collections of one''s projects';
COMMENT ON VIEW rakam.fields IS 'Fields of the collections of one''s projects, without the system fields';
COMMENT ON VIEW rakam.attached IS 'Tables of foreign files attached to one''s projects';
COMMENT ON VIEW rakam.schema_versions IS 'Versions of the schemas of one''s projects'' collections, as Avro';
COMMENT ON VIEW rakam.data_files IS 'Parquet objects in which one''s projects'' events lie';
COMMENT ON VIEW rakam.invalid_value IS 'Samples of values that did not fit their field; count is exact per field and day';
COMMENT ON VIEW rakam.dead_letter IS 'Events and records that could not be stored, with the reason';
COMMENT ON VIEW rakam.audit_log IS 'Calls that change or export something, refused ones included: who, when, project, call, outcome';
COMMENT ON VIEW rakam.stat_collection IS 'Events and bytes of each collection, tier by tier';
COMMENT ON VIEW rakam.stat_lake IS 'Storages of one''s projects: whether they can be reached, what waits for them, what is to be deleted in them';
COMMENT ON VIEW rakam.stat_progress IS 'How far the calls and background steps that work on one''s projects are';
