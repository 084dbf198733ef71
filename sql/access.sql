-- Isolation: row-level security on every table that holds rows of projects, enforced for their owner too.
-- Nothing but SELECT is granted; rows are written by functions and workers that act as the owner.

DO $$
DECLARE
  t text;
  -- Definitions: visible to every member of the project. Their rows name things, they hold no data.
  definitions text[] := '{project,collection,field,former_name,dropped_field,mapper,audit_log,progress}';
  -- Data, and what tells about it: for those who may read the project. The foreign tables are read through these.
  data text[] := '{inbox_0,inbox_1,inbox_2,inbox_parked,inbox_lag,hot_chunk,data_file,data_file_stat,data_file_footer,deletion,collection_stat,id_run,local_object,manifest_log,invalid_value,invalid_count,dead_letter,mapper_dropped,attached_table}';
  -- No policy: nobody but the owner, a superuser, sees a row.
  closed text[] := '{inbox_restored,api_key,file_deferred,usage,session_span,file_load}';
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

-- Where the inbox is digested up to: transaction ids, nothing of a project.
GRANT SELECT ON rakam_internal.inbox_tick, rakam_internal.inbox_state TO PUBLIC;
