-- Event stores: projects whose events go out to Kafka or Kinesis, and the outbox from which a relay takes them. The outbox is
-- no inbox: a broker that is away holds up nobody's digest.

CREATE SEQUENCE rakam_internal.event_store_id;
-- Not cached: rows are sent in the order of their ids, which has to be that of the calls.
CREATE SEQUENCE rakam_internal.outbox_id;

-- Where a project sends its events, and where it sent them: what was collected for a store goes there, also when the project has
-- another one by now.
CREATE TABLE rakam_internal.event_store (
  store_id    int PRIMARY KEY DEFAULT pg_catalog.nextval('rakam_internal.event_store_id'),
  project_id  int NOT NULL REFERENCES rakam_internal.project ON DELETE CASCADE,
  kind        text COLLATE "C" NOT NULL CHECK (kind IN ('kafka', 'kinesis')),
  server      text COLLATE "C" NOT NULL,                 -- its name when the store was set
  -- A foreign table of the server, which nobody reads: by it the server is not dropped by mistake, and found again under
  -- another name. NULL or gone: the server was dropped with all that depends on it.
  anchor      regclass,
  options     jsonb NOT NULL,                            -- as set_event_store took them, crates/sources `publish.rs`
  -- Batches have dense numbers by origin. A copy of the database (restored, promoted) takes an origin of its own for its next
  -- batch: it and the original go on from the same number with other events.
  origin      uuid NOT NULL DEFAULT pg_catalog.gen_random_uuid(),
  former_origins uuid[] NOT NULL DEFAULT '{}',           -- that it had before: its records are in the service
  cluster     text COLLATE "C",                          -- system identifier, timeline and database that took it
  publish_seq bigint NOT NULL DEFAULT 0,                 -- of the newest batch
  published   bigint NOT NULL DEFAULT 0,                 -- events
  published_at timestamptz,
  last_error  text,                                      -- NULL: the last attempt succeeded
  error_at    timestamptz,
  created_at  timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp()
) WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 200);
CREATE INDEX event_store_project ON rakam_internal.event_store (project_id);

-- How many partitions a topic had when a store first wrote it: its keys are spread among these for good, so that none of them
-- goes on in another partition. set_event_store forgets the numbers.
CREATE TABLE rakam_internal.event_store_topic (
  store_id   int NOT NULL REFERENCES rakam_internal.event_store ON DELETE CASCADE,
  topic      text COLLATE "C" NOT NULL,
  project_id int NOT NULL,
  partitions int NOT NULL,
  PRIMARY KEY (store_id, topic)
);

-- The outbox: three tables of one shape. Rows are deleted in the transaction that notes their batch as published; a table that
-- takes no new rows and has none left is emptied for good.
DO $$
BEGIN
  FOR k IN 0..2 LOOP
    EXECUTE pg_catalog.format($f$
      CREATE TABLE rakam_internal.outbox_%s (
        id            bigint NOT NULL,
        store_id      int NOT NULL,
        project_id    int NOT NULL,
        collection_id int NOT NULL,                      -- 0: known by its name only
        collection    text COLLATE "C" NOT NULL,
        txid          xid8 NOT NULL,
        n             int NOT NULL,
        received_at   timestamptz NOT NULL,
        shift_us      bigint NOT NULL,
        payload       bytea NOT NULL,                    -- n events as JSON objects, one a line, UTF-8
        PRIMARY KEY (store_id, id)
      ) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000, autovacuum_vacuum_insert_threshold = -1,
              toast.autovacuum_vacuum_scale_factor = 0, toast.autovacuum_vacuum_threshold = 5000)$f$, k);
    BEGIN
      EXECUTE pg_catalog.format('ALTER TABLE rakam_internal.outbox_%s ALTER COLUMN payload SET COMPRESSION lz4', k);
    EXCEPTION WHEN feature_not_supported THEN            -- a server built without lz4
      EXECUTE pg_catalog.format('ALTER TABLE rakam_internal.outbox_%s ALTER COLUMN payload SET STORAGE EXTERNAL', k);
    END;
    -- No samples of events in pg_statistic.
    EXECUTE pg_catalog.format('ALTER TABLE rakam_internal.outbox_%s ALTER COLUMN payload SET STATISTICS 0', k);
  END LOOP;
END $$;

-- Rows that came with a dump: a relay puts them back once their store and collection have been restored too.
CREATE TABLE rakam_internal.outbox_restored (LIKE rakam_internal.outbox_0 INCLUDING STORAGE, PRIMARY KEY (store_id, id));
DO $$
BEGIN
  FOR k IN 0..2 LOOP
    EXECUTE pg_catalog.format('CREATE TRIGGER set_apart BEFORE INSERT ON rakam_internal.outbox_%s
      FOR EACH ROW EXECUTE FUNCTION rakam_internal.set_apart(%L)', k, 'outbox_restored');
    EXECUTE pg_catalog.format('ALTER TABLE rakam_internal.outbox_%s ENABLE ALWAYS TRIGGER set_apart', k);
  END LOOP;
END $$;

CREATE TABLE rakam_internal.outbox_state (
  id            boolean PRIMARY KEY DEFAULT true CHECK (id),
  current_table int NOT NULL DEFAULT 0,                  -- takes new rows
  switched_at   timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp()
) WITH (fillfactor = 50);
INSERT INTO rakam_internal.outbox_state DEFAULT VALUES;

-- The batch of a store that has a number and is not noted as published: it goes out, again and again until it is known to have
-- arrived, under this number and with these rows in this order.
CREATE TABLE rakam_internal.outbox_batch (
  store_id    int PRIMARY KEY REFERENCES rakam_internal.event_store ON DELETE CASCADE,
  project_id  int NOT NULL,
  origin      uuid NOT NULL,
  publish_seq bigint NOT NULL,
  ids         bigint[] NOT NULL,
  ns          int[] NOT NULL,                            -- how many events each row has
  assigned_at timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp()
) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 200);

-- What the splits of our own sources have brought of an event store: the newest batch, and which of its records, a bit each
-- (crates/sources `published.rs`). Written with the events; by it copies are told.
CREATE TABLE rakam_internal.origin_seen (
  source_id   int NOT NULL REFERENCES rakam_internal.source ON DELETE CASCADE,
  split       text COLLATE "C" NOT NULL,
  origin      uuid NOT NULL,
  project_id  int NOT NULL,
  publish_seq bigint NOT NULL,
  places      bytea NOT NULL,
  PRIMARY KEY (source_id, split, origin)
) WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0.05, autovacuum_vacuum_threshold = 200);

-- What is not published travels with a dump.
DO $$
DECLARE t text;
BEGIN
  FOREACH t IN ARRAY '{event_store_id,outbox_id,event_store,event_store_topic,outbox_0,outbox_1,outbox_2,outbox_restored,outbox_batch,origin_seen}'::text[] LOOP
    PERFORM pg_catalog.pg_extension_config_dump(('rakam_internal.' || t)::pg_catalog.regclass, '');
  END LOOP;
END $$;
