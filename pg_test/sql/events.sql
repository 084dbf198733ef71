-- The road of events as a user sees it: collect, query, new fields, tiers, the view over all collections.
SET client_min_messages = warning;
SET timezone = 'UTC';
SET datestyle = 'ISO';
SELECT project FROM rakam.create_project('events');
SELECT rakam.create_collection('events', 'pageview');

-- ======== collect ========
SELECT rakam.collect('events', 'pageview',
  '{"_id": "1", "_time": "2026-03-01T10:00:00Z", "_user": "ada", "page": "/", "loadMs": 12.5, "tags": ["a", null], "ok": true}');
SELECT stored, rejected, rejected_indexes, errors FROM rakam.collect_batch('events', '[
  {"properties": {"_id": "2", "_time": 1772359200000, "_user": "bob", "page": "/x", "at": "2026-03-01T10:00:00+02:00"}, "collection": "pageview"},
  {"collection": "Signup", "properties": {"_id": "3", "_time": "2026-03-02", "_user": "ada", "plan": {"name": "team", "seats": 3}}},
  {"collection": "signup", "properties": 7}]'::text);
SELECT rakam.tick();

-- ======== types, names, columns ========
SELECT field, type, declared, column_ready FROM rakam.fields WHERE project = 'events' ORDER BY collection, field_id;
SELECT attname, format_type(atttypid, atttypmod), collname FROM pg_attribute LEFT JOIN pg_collation c ON c.oid = attcollation
  WHERE attrelid = 'events.pageview'::regclass AND attnum > 0 ORDER BY attnum;
SELECT _id, _time, _user, page, load_ms, tags, ok, at, _extra FROM events.pageview ORDER BY _id;
SELECT _collection, _time, _user, _id, properties FROM events._all ORDER BY _id;

-- ======== a value that does not fit ========
SELECT rakam.collect('events', 'pageview', '{"_id": "4", "_time": "2026-03-03T00:00:00Z", "loadMs": "slow", "page": 5}');
SELECT rakam.tick();
SELECT _id, load_ms, page, _extra FROM events.pageview WHERE _id = '4';
SELECT collection, field, type, value, event_id, count FROM rakam.invalid_value WHERE project = 'events';

-- ======== INSERT ========
INSERT INTO events.pageview (_id, _time, load_ms, tags) VALUES ('5', '2026-03-04', 1, '{x,y}'), ('6', '2026-03-05', NULL, NULL)
  RETURNING _id, _time, load_ms, tags;
INSERT INTO events.pageview (load_ms) VALUES ('slow');                       -- should fail
SELECT _id FROM events.pageview WHERE 'x' = ANY (tags);

-- ======== files ========
SELECT collection, events, files FROM rakam.flush('events') ORDER BY collection;
SELECT collection, period, first_day, last_day, n, level FROM rakam.data_files WHERE project = 'events' ORDER BY collection;
SELECT collection, events, inbox_events, hot_events, cold_events, files, invalid_values FROM rakam.stat_collection
  WHERE project = 'events' ORDER BY collection;
SELECT count(*), count(DISTINCT _user), min(_time), max(_time), sum(load_ms) FROM events.pageview;

-- ======== plans of a foreign table ========
CREATE TABLE teams (name text COLLATE "C" PRIMARY KEY, member text COLLATE "C");
INSERT INTO teams VALUES ('red', 'ada'), ('blue', 'bob');
SELECT t.name, count(*) FROM teams t JOIN events.pageview p ON p._user = t.member GROUP BY 1 ORDER BY 1;
WITH seen AS (SELECT _user, _time, lag(_time) OVER (PARTITION BY _user ORDER BY _time) AS before FROM events._all)
  SELECT _user, _time - before AS gap FROM seen WHERE before IS NOT NULL ORDER BY 1, 2;
SELECT p._id, q.n FROM events.pageview p, LATERAL (SELECT count(*) AS n FROM events.signup s WHERE s._user = p._user) q ORDER BY 1;
PREPARE by_user(text) AS SELECT _id FROM events.pageview WHERE _user = $1 ORDER BY 1;
EXECUTE by_user('ada');
EXECUTE by_user('nobody');
BEGIN;
DECLARE c CURSOR FOR SELECT _id FROM events.pageview ORDER BY _id;
FETCH 2 FROM c;
SELECT rakam.collect('events', 'pageview', '{"_id": "7"}');
FETCH ALL FROM c;
ROLLBACK;
SELECT count(*) FROM events.pageview WHERE _id = '7';
COPY (SELECT _id, page FROM events.pageview ORDER BY _id) TO STDOUT;

-- ======== pruning and what stays in Postgres ========
EXPLAIN (VERBOSE, COSTS OFF) SELECT _id FROM events.pageview WHERE _user = 'ada' AND lower(page) = '/' AND page ~ '^/';

-- ======== roles ========
CREATE ROLE regress_reader;
CREATE ROLE regress_writer;
GRANT rakam_events_read TO regress_reader;
GRANT rakam_events_write TO regress_writer;
SET ROLE regress_reader;
SELECT count(*) FROM events.pageview;
SELECT rakam.collect('events', 'pageview', '{}');                            -- should fail
SELECT project, collection, events FROM rakam.stat_collection ORDER BY collection;
SET ROLE regress_writer;
SELECT count(*) FROM events.pageview;                                        -- should fail
SELECT rakam.collect('events', 'pageview', '{"_id": "8"}');
SELECT rakam.create_collection('events', 'other');                           -- should fail
RESET ROLE;
SELECT count(*) FROM events.pageview;

SET rakam.allow_project_drop = on;
SELECT rakam.drop_project('events');
DROP ROLE regress_reader, regress_writer;
DROP TABLE teams;
