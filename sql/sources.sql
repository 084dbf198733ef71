-- Sources: what is read of Kafka, Kinesis and storages, and how far. Positions move in the transaction that stores the events.

CREATE SEQUENCE rakam_internal.source_id;
-- Of leases: a number is given once, so that nobody who had a split before can still write it.
CREATE SEQUENCE rakam_internal.source_epoch;

-- What is left of a rate that was noted then: means are over about ten seconds.
CREATE FUNCTION rakam_internal.fade(since timestamptz) RETURNS float8 LANGUAGE sql STABLE PARALLEL SAFE
RETURN pg_catalog.exp(-least(700, greatest(0, coalesce(
         pg_catalog.date_part('epoch', pg_catalog.clock_timestamp() - since), 0)) / 10));

CREATE TABLE rakam_internal.source (
  source_id  int PRIMARY KEY DEFAULT pg_catalog.nextval('rakam_internal.source_id'),
  project_id int NOT NULL REFERENCES rakam_internal.project ON DELETE CASCADE,
  name       text COLLATE "C" NOT NULL,
  kind       text COLLATE "C" NOT NULL CHECK (kind IN ('kafka', 'kinesis', 'files')),
  -- A foreign table of the server, which nobody reads: by it the server is not dropped by mistake, and found again under
  -- another name. NULL or gone: the server was dropped with all that depends on it.
  anchor     regclass,
  options    jsonb NOT NULL,                             -- as create_source took them, crates/sources `options.rs`
  is_paused  boolean NOT NULL DEFAULT false,
  created_at timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp(),
  begun_at   timestamptz,                                -- when its first splits were found: later ones are read from their beginning
  -- What its consumers struggle with now.
  last_error text,
  error_at   timestamptz,
  UNIQUE (project_id, name)
) WITH (fillfactor = 70);

-- A split of a source: how far it is stored, and who reads it. Every change of who reads it, or of where, takes a new epoch; a
-- batch is stored only by the holder of the epoch.
CREATE TABLE rakam_internal.source_split (
  source_id   int NOT NULL REFERENCES rakam_internal.source ON DELETE CASCADE,
  split       text COLLATE "C" NOT NULL,                 -- <topic>/<partition>, a shard's id, an object's path
  project_id  int NOT NULL,
  epoch       bigint NOT NULL DEFAULT pg_catalog.nextval('rakam_internal.source_epoch'),
  holder      int,                                       -- process id of the consumer that reads it; whether it lives is in shared memory
  position    jsonb NOT NULL,                            -- crates/sources `position.rs`
  next_offset numeric,                                   -- the same, for people
  state       text COLLATE "C" NOT NULL DEFAULT 'open' CHECK (state IN ('open', 'ended', 'stopped')),
  error       text,                                      -- why it stopped
  -- What was stored since the newest row of source_mark: the first of it then, and whether some of it had no _id.
  since       timestamptz,
  lacks_id    boolean NOT NULL DEFAULT false,
  record_at   timestamptz,                               -- when the last record was written, by its own time
  stored_at   timestamptz,                               -- when records were stored last
  -- Means, as of `stored_at`: they fade with the time since.
  records_per_s float8 NOT NULL DEFAULT 0,
  bytes_per_s   float8 NOT NULL DEFAULT 0,
  tombstones  bigint NOT NULL DEFAULT 0,                 -- records without a value, which are skipped
  lag_records bigint,                                    -- as seen last; NULL: not known
  lag_ms      bigint,
  updated_at  timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp(),
  PRIMARY KEY (source_id, split)
) WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0.05, autovacuum_vacuum_threshold = 200);
CREATE INDEX source_split_open ON rakam_internal.source_split (source_id, split) WHERE state = 'open';

-- When which part of a split was stored first: the records before `next_offset` and behind the mark before it. What was stored
-- longer ago than the window of de-duplication, or without an _id, would count twice if it were read again.
CREATE TABLE rakam_internal.source_mark (
  source_id   int NOT NULL REFERENCES rakam_internal.source ON DELETE CASCADE,
  split       text COLLATE "C" NOT NULL,
  project_id  int NOT NULL,
  next_offset numeric NOT NULL,
  since       timestamptz NOT NULL,
  lacks_id    boolean NOT NULL,
  PRIMARY KEY (source_id, split, since, next_offset)
);

-- Schemas with which records are written, by their id in Confluent's framing.
CREATE TABLE rakam_internal.source_schema (
  source_id     int NOT NULL REFERENCES rakam_internal.source ON DELETE CASCADE,
  schema_id     int NOT NULL,
  project_id    int NOT NULL,
  avro_schema   text NOT NULL,
  registered_at timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp(),
  PRIMARY KEY (source_id, schema_id)
);

-- A restored copy goes on where its events end.
DO $$
DECLARE t text;
BEGIN
  FOREACH t IN ARRAY '{source_id,source_epoch,source,source_split,source_mark,source_schema}'::text[] LOOP
    PERFORM pg_catalog.pg_extension_config_dump(('rakam_internal.' || t)::pg_catalog.regclass, '');
  END LOOP;
END $$;
