-- Isolation: row-level security on every table that holds rows of projects, enforced for their owner too.
-- Nothing but SELECT is granted; rows are written by functions and workers that act as the owner.

DO $$
DECLARE
  t text;
  -- Definitions: visible to every member of the project. Their rows name things, they hold no data.
  definitions text[] := '{project,collection,field,former_name,dropped_field,mapper,audit_log,progress,source,source_split,source_schema,event_store,event_store_topic}';
  -- Data, and what tells about it: for those who may read the project. The foreign tables are read through these.
  data text[] := '{inbox_0,inbox_1,inbox_2,inbox_parked,inbox_lag,hot_chunk,data_file,data_file_stat,data_file_footer,deletion,collection_stat,id_run,local_object,manifest_log,invalid_value,invalid_count,dead_letter,mapper_dropped,attached_table}';
  -- No policy: nobody but the owner, a superuser, sees a row.
  closed text[] := '{inbox_restored,api_key,file_deferred,collection_dropped,usage,session_span,file_load,description_due,source_mark,outbox_0,outbox_1,outbox_2,outbox_restored,outbox_batch,origin_seen}';
BEGIN
  FOREACH t IN ARRAY definitions || data || closed LOOP
    EXECUTE pg_catalog.format('ALTER TABLE rakam_internal.%I ENABLE ROW LEVEL SECURITY', t);
    EXECUTE pg_catalog.format('ALTER TABLE rakam_internal.%I FORCE ROW LEVEL SECURITY', t);
  END LOOP;
  -- The functions take no argument and answer for the caller; inside of ( ) they run once per query, not per row.
  FOREACH t IN ARRAY definitions LOOP
    EXECUTE pg_catalog.format('CREATE POLICY member ON rakam_internal.%I FOR SELECT TO PUBLIC
      USING (project_id = ANY ((SELECT rakam_internal.member_projects())::int[]))', t);
    EXECUTE pg_catalog.format('GRANT SELECT ON rakam_internal.%I TO PUBLIC', t);
  END LOOP;
  FOREACH t IN ARRAY data LOOP
    EXECUTE pg_catalog.format('CREATE POLICY reader ON rakam_internal.%I FOR SELECT TO PUBLIC
      USING (project_id = ANY ((SELECT rakam_internal.readable_projects())::int[]))', t);
    EXECUTE pg_catalog.format('GRANT SELECT ON rakam_internal.%I TO PUBLIC', t);
  END LOOP;
  -- What is cached per backend (src/catalog/projects.rs, mapper.rs): every change is announced to all of them.
  FOREACH t IN ARRAY '{project,api_key,mapper,attached_table}'::text[] LOOP
    EXECUTE pg_catalog.format('CREATE TRIGGER announce_change AFTER INSERT OR UPDATE OR DELETE OR TRUNCATE
      ON rakam_internal.%I FOR EACH STATEMENT EXECUTE FUNCTION rakam_internal.announce_change()', t);
    -- Also under session_replication_role = replica, as set by restores and replication.
    EXECUTE pg_catalog.format('ALTER TABLE rakam_internal.%I ENABLE ALWAYS TRIGGER announce_change', t);
  END LOOP;
END $$;

-- Schema versions change more often than names, and are not cached.
CREATE TRIGGER announce_change AFTER INSERT OR UPDATE OF collection_id, project_id, name OR DELETE OR TRUNCATE
  ON rakam_internal.collection FOR EACH STATEMENT EXECUTE FUNCTION rakam_internal.announce_change();
ALTER TABLE rakam_internal.collection ENABLE ALWAYS TRIGGER announce_change;

-- What the description of a storage is to tell next. `changed` has the rows of the statement.
CREATE FUNCTION rakam_internal.note_project() RETURNS trigger LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
  INSERT INTO rakam_internal.description_due (storage_id, project_id)
    SELECT c.storage_id, c.project_id FROM changed c JOIN rakam_internal.storage s USING (storage_id) WHERE s.kind <> 'local';
  RETURN NULL;
END $$;
CREATE FUNCTION rakam_internal.note_definition() RETURNS trigger LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
  INSERT INTO rakam_internal.description_due (storage_id, project_id, collection_id)
    SELECT DISTINCT p.storage_id, c.project_id, c.collection_id
    FROM changed c JOIN rakam_internal.project p USING (project_id) JOIN rakam_internal.storage s USING (storage_id)
    WHERE s.kind <> 'local';
  RETURN NULL;
END $$;
CREATE FUNCTION rakam_internal.note_file() RETURNS trigger LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
  INSERT INTO rakam_internal.description_due (storage_id, project_id, collection_id, path)
    SELECT c.storage_id, c.project_id, c.collection_id, c.path
    FROM changed c JOIN rakam_internal.storage s USING (storage_id) WHERE s.kind <> 'local';
  RETURN NULL;
END $$;
CREATE FUNCTION rakam_internal.note_deletion() RETURNS trigger LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
  INSERT INTO rakam_internal.description_due (storage_id, project_id, collection_id, path)
    SELECT f.storage_id, f.project_id, f.collection_id, f.path
    FROM changed c JOIN rakam_internal.data_file f ON c.kind = 'file' AND f.file_id = c.object_id
    JOIN rakam_internal.storage s USING (storage_id) WHERE s.kind <> 'local';
  RETURN NULL;
END $$;
-- An announced object is in the manifest now, or will never be: should it come through all the same, it is none.
CREATE FUNCTION rakam_internal.note_intent() RETURNS trigger LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
  INSERT INTO rakam_internal.description_due (storage_id, project_id, collection_id, path)
    SELECT c.storage_id, coalesce(o.project_id, 0), c.collection_id, c.path
    FROM changed c LEFT JOIN rakam_internal.collection o USING (collection_id);
  RETURN NULL;
END $$;
DO $$
DECLARE
  t record;
  event text;
BEGIN
  FOR t IN SELECT * FROM (VALUES
      ('project', 'note_project', '{INSERT,UPDATE,DELETE}'::text[]),
      ('collection', 'note_definition', '{INSERT,UPDATE,DELETE}'),
      ('field', 'note_definition', '{INSERT,DELETE}'),
      ('dropped_field', 'note_definition', '{INSERT}'),
      ('data_file', 'note_file', '{INSERT,DELETE}'),
      ('deletion', 'note_deletion', '{INSERT,UPDATE}'),
      ('file_intent', 'note_intent', '{DELETE}')) v (name, function, events) LOOP
    FOREACH event IN ARRAY t.events LOOP
      EXECUTE pg_catalog.format('CREATE TRIGGER %1$s_%2$s AFTER %2$s ON rakam_internal.%3$I REFERENCING %4$s TABLE AS changed
        FOR EACH STATEMENT EXECUTE FUNCTION rakam_internal.%1$I()',
        t.function, event, t.name, CASE event WHEN 'DELETE' THEN 'OLD' ELSE 'NEW' END);
    END LOOP;
  END LOOP;
END $$;

-- What reading needs to know of the installation.
GRANT SELECT (own_since) ON rakam_internal.installation TO PUBLIC;
-- Where the inbox is digested up to: transaction ids, nothing of a project.
GRANT SELECT ON rakam_internal.inbox_tick, rakam_internal.inbox_state TO PUBLIC;
