-- Restores. A dump's rows come past our functions, table by table, and of pg_restore -j in any order. Nothing may be made of
-- some of them before all are there: a restore begins with the first such row, and is over when there are as many rows as the
-- dump says (src/catalog/restore.rs).

-- There are rows while a restore is under way. No key in common, so that restoring sessions do not wait for each other.
CREATE TABLE rakam_internal.restore (
  id uuid PRIMARY KEY DEFAULT pg_catalog.gen_random_uuid(),
  at timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp()
);
-- Nothing of a project. Whoever writes events asks it.
GRANT SELECT ON rakam_internal.restore TO PUBLIC;

-- How many rows the dump says that it has, by table, as the bits of the number; bit -1: all of it is said.
CREATE TABLE rakam_internal.restore_count (
  relation text COLLATE "C" NOT NULL,
  bit      int NOT NULL,
  PRIMARY KEY (relation, bit)
);

-- What a dump takes that from: of every bit of every table's number those rows that are so in the dump's own snapshot. A
-- condition is all that a dump computes.
CREATE TABLE rakam_internal.announced_rows (LIKE rakam_internal.restore_count, PRIMARY KEY (relation, bit));

CREATE FUNCTION rakam_internal.set_count_apart() RETURNS trigger LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
  INSERT INTO rakam_internal.restore_count SELECT NEW.* ON CONFLICT DO NOTHING;
  -- The numbers of a dump without anything else are used up, too.
  INSERT INTO rakam_internal.restore SELECT WHERE NOT EXISTS (SELECT FROM rakam_internal.restore);
  RETURN NULL;
END $$;
-- Whoever ends a restore, by hand too: the next one has numbers of its own.
CREATE FUNCTION rakam_internal.forget_counts() RETURNS trigger LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
  DELETE FROM rakam_internal.restore_count;
  -- What comes from now on is received here.
  UPDATE rakam_internal.installation SET own_since = pg_catalog.clock_timestamp();
  RETURN NULL;
END $$;
CREATE TRIGGER forget_counts AFTER DELETE ON rakam_internal.restore
  FOR EACH STATEMENT EXECUTE FUNCTION rakam_internal.forget_counts();
REVOKE EXECUTE ON FUNCTION rakam_internal.set_count_apart(), rakam_internal.forget_counts(), rakam_internal.note_restore()
  FROM PUBLIC;

DO $$
DECLARE
  -- What workers make something of, or go on from. Their rows stay as many as they are while a restore is under way.
  counted text[] := '{storage,project,collection,field,dropped_field,hot_chunk,data_file,data_file_stat,data_file_footer,
    collection_stat,id_run,local_object,file_intent,file_deferred,deletion,source,source_split,source_mark,
    source_schema,event_store,event_store_topic,outbox_batch,origin_seen}';
  -- Written otherwise than by the rows of the dump: set apart, or added to at any time.
  free text[] := '{inbox_0,inbox_1,inbox_2,inbox_restored,outbox_0,outbox_1,outbox_2,outbox_restored,announced_rows,audit_log}';
  -- Rows that people add by hand are no restore: without those of the tables before, workers make nothing of them.
  by_hand text[] := '{data_file,data_file_stat,local_object}';
  t text;
  numbers text;
BEGIN
  INSERT INTO rakam_internal.announced_rows SELECT r, b FROM pg_catalog.unnest(counted) r, pg_catalog.generate_series(0, 47) b;
  INSERT INTO rakam_internal.announced_rows VALUES ('', -1);
  CREATE TRIGGER set_count_apart BEFORE INSERT ON rakam_internal.announced_rows
    FOR EACH ROW EXECUTE FUNCTION rakam_internal.set_count_apart();
  ALTER TABLE rakam_internal.announced_rows ENABLE ALWAYS TRIGGER set_count_apart;
  numbers := pg_catalog.string_agg(pg_catalog.format('WHEN %L THEN (SELECT pg_catalog.count(*) FROM rakam_internal.%I%s)',
    r, r, CASE r WHEN 'storage' THEN ' WHERE storage_id > 1' ELSE '' END), ' ') FROM pg_catalog.unnest(counted) r;
  PERFORM pg_catalog.pg_extension_config_dump('rakam_internal.announced_rows',
    pg_catalog.format('WHERE bit < 0 OR (1::bigint << bit) & CASE relation %s ELSE 0 END <> 0', numbers));
  -- Every table that a dump has: none of them is checked against another one that may come after it.
  FOR t IN
    SELECT r.relname FROM pg_catalog.pg_extension e, pg_catalog.unnest(e.extconfig) c JOIN pg_catalog.pg_class r ON r.oid = c
    WHERE e.extname = 'rakam' AND r.relkind = 'r' AND r.relname <> ALL (free)
  LOOP
    EXECUTE pg_catalog.format('CREATE TRIGGER restore_begins BEFORE INSERT ON rakam_internal.%I
      FOR EACH STATEMENT EXECUTE FUNCTION rakam_internal.note_restore(%L)', t, t = ANY (counted) AND t <> ALL (by_hand));
    EXECUTE pg_catalog.format('CREATE TRIGGER restore_ends AFTER INSERT ON rakam_internal.%I
      FOR EACH STATEMENT EXECUTE FUNCTION rakam_internal.note_restore(%L)', t, t = ANY (counted) AND t <> ALL (by_hand));
    EXECUTE pg_catalog.format('ALTER TABLE rakam_internal.%I ENABLE ALWAYS TRIGGER restore_begins,
      ENABLE ALWAYS TRIGGER restore_ends', t);
  END LOOP;
END $$;
